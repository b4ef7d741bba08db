"""A report as one HTML page: style and pictures inside, no script, nothing fetched."""

import base64
import re
from collections.abc import Mapping
from html import escape
from importlib.resources import files

from retrieval.report.document import (
    Block,
    Document,
    KeyNumbers,
    Listing,
    Notice,
    Paragraph,
    Picture,
    Plot,
    Section,
    Table,
)
from retrieval.report.style import COLOURS, GRID, INK, MUTED

__all__ = ["render_html"]

#: Colours of the figures -> variables of the style sheet, which has them for light and for dark.
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--line",
    **{colour: f"--series-{index}" for index, colour in enumerate(COLOURS)},
}


def render_html(document: Document, drawings: Mapping[str, str]) -> str:
    """The page.

    Args:
        document: what to show.
        drawings: SVG text of every plot by its name.
    """
    style = files("retrieval.report").joinpath("page.css").read_text(encoding="utf-8")
    links = "".join(f'<a href="#{_anchor(s.title)}">{escape(s.title)}</a>' for s in document.sections)
    sections = "".join(_section(section, drawings) for section in document.sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(document.title)}</title><style>\n{style}</style></head>\n<body><header>"
        f"<h1>{escape(document.title)}</h1><p>{escape(document.subtitle)}</p><nav>{links}</nav></header>\n"
        f"<main>{sections}</main></body></html>\n"
    )


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _section(section: Section, drawings: Mapping[str, str]) -> str:
    body = "\n".join(_render(block, drawings) for block in section.blocks)
    return f'<section id="{_anchor(section.title)}"><h2>{escape(section.title)}</h2>\n{body}</section>\n'


def _render(block: Block, drawings: Mapping[str, str]) -> str:
    match block:
        case KeyNumbers(numbers):
            tiles = (
                f'<div class="tile"><span>{escape(n.label)}</span><strong>{escape(n.value)}</strong>'
                f"<small>{escape(n.detail).replace(chr(10), '<br>')}</small></div>"
                for n in numbers
            )
            return f'<div class="tiles">{"".join(tiles)}</div>'
        case Paragraph(text):
            return f"<p>{escape(text)}</p>"
        case Notice(text):
            return f'<p class="notice">{escape(text)}</p>'
        case Table():
            return _table(block)
        case Plot(name=name, alt=alt, caption=caption):
            return f"<figure>{_inline(drawings[name], name, alt)}<figcaption>{escape(caption)}</figcaption></figure>"
        case Picture(png=png, alt=alt, caption=caption):
            data = base64.b64encode(png).decode()
            image = f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}">'
            return f'<figure class="wide">{image}<figcaption>{escape(caption)}</figcaption></figure>'
        case Listing(summary, text):
            return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"


def _table(table: Table) -> str:
    def row(cells: tuple[str, ...], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=text' if index < table.text_columns else ''}>{escape(cell)}</{tag}>"
            for index, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in table.rows)
    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f'<div class="table"><table>{caption}<thead><tr>{row(table.columns, "th")}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{note}"
    )


def _inline(svg: str, name: str, alt: str) -> str:
    """SVG for a page: no prologue, its own names, colours from the style sheet, sized by it."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    # The first rectangle is the white background of the figure; the page has one of its own.
    svg = re.sub(r'(<g id="[^"]*patch_1">\s*<path [^>]*style=")fill: #ffffff', r"\1fill: none", svg, count=1)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    head, _, rest = svg.partition(">")
    head = re.sub(r' (?:width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{escape(alt)}">{rest}'
