"""What is installed here, which accelerators and backends work, and how to mend what does not.

Exits with 0 when the quick start can run on this machine, with 2 when something it needs is missing.
"""

import argparse
import json
from dataclasses import asdict

_COLOURS = {"ok": "green", "absent": "yellow", "broken": "red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    """Examine and print."""
    from launch.doctor import examine

    findings = examine()
    blocking = [finding for finding in findings if finding.is_required and finding.status != "ok"]
    if args.json:
        print(json.dumps({"ready": not blocking, "findings": [asdict(finding) for finding in findings]}, indent=2))
        return 2 if blocking else 0
    from rich.text import Text

    from launch.console import new_table, show

    table = new_table("", "what", "found", "fix")
    table.box, table.pad_edge = None, False
    for finding in findings:
        mark = Text(finding.status, _COLOURS[finding.status])
        table.add_row(mark, finding.subject, finding.detail, "" if finding.status == "ok" else finding.fix)
    names = ", ".join(finding.subject for finding in blocking)
    show(table, f"\nThe quick start cannot run: {names}." if blocking else "\nThe quick start can run here.")
    return 2 if blocking else 0
