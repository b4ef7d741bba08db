"""The argument parser of every command: options anywhere, help as wide as the terminal, hints for misspelt options."""

import argparse
import re
import textwrap
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NoReturn

__all__ = ["CommandParser"]

_ROW = re.compile(r"\s+\S+\s{2,}")  # a row of a table: a name and, two spaces on, what it is
_WRONG_CHOICE = re.compile(r"invalid choice: '([^']*)' \(choose from (.*)\)$")


class _HelpFormatter(argparse.HelpFormatter):
    """Defaults are shown; paragraphs fill the terminal; indented lines stay lines, rows of a table hang."""

    def _get_help_string(self, action: argparse.Action) -> str:
        """The help of an option, with its default where that is a value and the help does not state it."""
        text = action.help or ""
        default = action.default
        is_value = default not in (None, argparse.SUPPRESS, []) and not isinstance(default, bool)
        if not (action.option_strings and is_value) or "default" in text:
            return text
        shown = ",".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
        return f"{text} (default: {shown.replace('%', '%%')})".lstrip()

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs: list[str] = []
        filled: list[str] = []
        for line in [*text.strip("\n").splitlines(), ""]:
            if line.strip() and not line[0].isspace():
                filled.append(line)
                continue
            if filled:
                paragraphs.append(textwrap.fill(" ".join(filled), width, break_on_hyphens=False))
                filled = []
            row = _ROW.match(line)
            hanging = " " * row.end() if row and row.end() < width // 2 else None
            paragraphs.append(line if hanging is None else textwrap.fill(line, width, subsequent_indent=hanging))
        return "\n".join(paragraphs).rstrip()


class CommandParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose positional arguments may stand before, between and behind the options."""

    def __init__(
        self,
        *,
        prog: str,
        description: str | None,
        parents: Sequence[argparse.ArgumentParser] = (),
        allow_abbrev: bool = True,
    ) -> None:
        super().__init__(
            prog=prog,
            description=description,
            parents=list(parents),
            allow_abbrev=allow_abbrev,
            formatter_class=_HelpFormatter,
        )

    def parse(self, arguments: Sequence[str], namespace: argparse.Namespace | None = None) -> argparse.Namespace:
        """Read all arguments; one that is unknown ends the program with exit code 2 and the nearest that is known."""
        chosen, unknown = self.parse_known(arguments, namespace)
        if unknown:
            self.error(self.unknown_message(unknown))
        return chosen

    def parse_known(
        self, arguments: Sequence[str], namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """What `parse` reads, and the arguments that nobody knows."""
        positionals = [action for action in self._actions if not action.option_strings]
        if any(action.nargs in (argparse.PARSER, argparse.REMAINDER) for action in positionals):
            return self.parse_known_args(arguments, namespace)  # what follows is for another parser
        return self.parse_known_intermixed_args(arguments, namespace)

    def error(self, message: str) -> NoReturn:
        """Print usage and message and end with exit code 2; for a wrong choice the nearest right one is added."""
        if choice := _WRONG_CHOICE.search(message):
            near = get_close_matches(choice[1], re.findall(r"[\w.:-]+", choice[2]), n=1)
            message += f"; did you mean {near[0]}?" if near else ""
        super().error(message)

    def unknown_message(self, unknown: Sequence[str]) -> str:
        """Name the arguments that nobody knows, and for a misspelt option the nearest one."""
        known = [option for action in self._actions for option in action.option_strings]
        words = [word.partition("=")[0] for word in unknown if word.startswith("--")]
        near = [match for word in words for match in get_close_matches(word, known, n=1, cutoff=0.7)]
        return f"unrecognized arguments: {' '.join(unknown)}" + (f"; did you mean {', '.join(near)}?" if near else "")
