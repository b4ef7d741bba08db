"""What is installed here, which accelerators and backends work, and how to mend what does not.

Exits with 0 when the quick start can run on this machine, with 2 when something it needs is missing.
"""

import argparse
import json
from dataclasses import asdict

_MARKS = {"ok": "[green]ok[/]", "absent": "[yellow]absent[/]", "broken": "[red]broken[/]"}


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
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("", "what", "found", "fix"):
        table.add_column(heading)
    for finding in findings:
        table.add_row(
            _MARKS[finding.status], finding.subject, finding.detail, "" if finding.status == "ok" else finding.fix
        )
    console = Console()
    console.print(table)
    names = ", ".join(finding.subject for finding in blocking)
    console.print(f"\nThe quick start cannot run: {names}." if blocking else "\nThe quick start can run here.")
    return 2 if blocking else 0
