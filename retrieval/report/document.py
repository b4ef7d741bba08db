"""What a report is made of, before it becomes HTML or Markdown."""

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Block", "Document", "KeyNumber", "KeyNumbers", "Listing", "Notice", "Paragraph", "Picture", "Plot"]
__all__ += ["Section", "Table"]


@dataclass(frozen=True)
class KeyNumber:
    """One number that the page leads with."""

    label: str
    value: str
    detail: str  #: interval, baselines; one short line each


@dataclass(frozen=True)
class KeyNumbers:
    """A row of numbers."""

    numbers: tuple[KeyNumber, ...]


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclass(frozen=True)
class Notice:
    """A warning."""

    text: str


@dataclass(frozen=True)
class Table:
    """The first column is text, the others are aligned right."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""  #: what the numbers mean, shown beneath
    caption: str = ""
    text_columns: int = 1  #: leading columns that hold text


@dataclass(frozen=True)
class Plot:
    """A matplotlib figure; becomes NAME.svg and NAME.png."""

    name: str
    figure: Any
    alt: str  #: what a reader who cannot see it is told
    caption: str


@dataclass(frozen=True)
class Picture:
    """An image that another command made; becomes NAME.png."""

    name: str
    png: bytes = field(repr=False)
    alt: str
    caption: str


@dataclass(frozen=True)
class Listing:
    """Text in lines of its own, folded away in HTML."""

    summary: str
    text: str


Block = KeyNumbers | Paragraph | Notice | Table | Plot | Picture | Listing


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Document:
    """The whole report."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]
