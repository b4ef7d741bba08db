"""A report as Markdown, with pictures beside it in plots/."""

from collections.abc import Sequence

from retrieval.report.document import (
    Block,
    Document,
    KeyNumbers,
    Listing,
    Notice,
    Paragraph,
    Picture,
    Plot,
    Table,
)

__all__ = ["render_markdown"]


def render_markdown(document: Document) -> str:
    """GitHub-flavoured Markdown."""
    parts = [f"# {_escape(document.title)}"]
    if document.subtitle:
        parts.append(_escape(document.subtitle))
    for section in document.sections:
        parts.append(f"## {_escape(section.title)}")
        parts += [_render(block) for block in section.blocks]
    return "\n\n".join(part for part in parts if part) + "\n"


def _render(block: Block) -> str:
    match block:
        case KeyNumbers(numbers):
            cells = [(_escape(n.label), f"**{n.value}**", _escape(n.detail.replace("\n", "; "))) for n in numbers]
            return _table(("", "value", "beside it"), cells, 1)
        case Paragraph(text):
            return _escape(text)
        case Notice(text):
            return f"> ⚠ {_escape(text)}"
        case Table():
            rows = [tuple(map(_escape, row)) for row in block.rows]
            parts = [f"**{_escape(block.caption)}**" if block.caption else ""]
            parts += [_table(tuple(map(_escape, block.columns)), rows, block.text_columns), _escape(block.note)]
            return "\n\n".join(part for part in parts if part)
        case Plot(name=name, alt=alt, caption=caption) | Picture(name=name, alt=alt, caption=caption):
            return f"![{_escape(alt)}](plots/{name}.png)\n\n*{_escape(caption)}*"
        case Listing(summary, text):
            return f"{_escape(summary)}:\n\n```text\n{text}\n```"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int) -> str:
    rule = [":--" if index < text_columns else "--:" for index in range(len(columns))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, rule, *rows))


def _escape(text: str) -> str:
    """Keep what is meant as text from being read as Markdown."""
    for character in "\\`*_[]<>|#":
        text = text.replace(character, "\\" + character)
    return text
