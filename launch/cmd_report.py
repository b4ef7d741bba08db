"""Result files to one page of tables and curves: report.html, which opens without a network, report.md, results.json.

RESULT is what `aroface evaluate` wrote. Results of one protocol stand side by side, published values of that protocol
beneath them, each with the rule that it was made by. The page says what each number means, and holds the warnings.
"""

import argparse
from pathlib import Path

from launch.outputs import output_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT.json", help="results of aroface evaluate")
    parser.add_argument("--out", type=output_folder, required=True, metavar="DIR", help="new folder for the report")
    parser.add_argument("--run", type=Path, metavar="RUN", help="training run: curve, configuration, versions")
    parser.add_argument("--stages", type=Path, metavar="RUN.json", help="record of the stages that quickstart writes")
    parser.add_argument("--grid", type=Path, metavar="FILE.png", help="picture that aroface attack draws")
    parser.add_argument(
        "--references",
        type=Path,
        metavar="FILE.json",
        help='values to compare with: {"rows": [{protocol, metric, value, source}]}',
    )
    parser.add_argument(
        "--names",
        type=lambda text: tuple(name.strip() for name in text.split(",")),
        default=(),
        metavar="NAME,..",
        help="what to call the system of each RESULT (default: the id of its model)",
    )
    parser.add_argument("--title", default="Face recognition report", help="heading of the page")


def run(args: argparse.Namespace) -> int:
    """Read, draw, write."""
    from retrieval.report import read_inputs, write_report

    inputs = read_inputs(
        args.results,
        run=args.run,
        stages=args.stages,
        grid=args.grid,
        references=args.references,
        names=args.names,
    )
    for page in write_report(inputs, args.out, title=args.title):
        print(page)
    return 0
