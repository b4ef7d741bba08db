"""Tables and lines on stdout that show names as they are: no markup is read into them, and nothing is cut off."""

from collections.abc import Collection

from rich.console import Console
from rich.table import Table

__all__ = ["new_table", "show"]


def new_table(*columns: str, title: str | None = None, numbers: Collection[str] = ()) -> Table:
    """A table whose cells go on in the next line where they are too long for the terminal.

    Args:
        columns: headings.
        title: above the table.
        numbers: columns that stand on the right.
    """
    table = Table(title=title, title_justify="left", caption_justify="left")
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return table


def show(*parts: str | Table) -> None:
    """Print lines and tables of `new_table`: `[old]`, `[/x]` and `:smile:` are names like others."""
    console = Console(markup=False, emoji=False)
    for part in parts:
        console.print(part)
