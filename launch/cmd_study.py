"""Compare alignment attacks by many small trainings: every head x alignment x budget x seed of one file.

Each run is trained and evaluated by public commands, on low-quality and misaligned probes; finished runs are not done
again. OUT/study.md, study.json and study.svg hold means, spreads, and differences paired by seed.
"""

import argparse
import shlex
import sys
from pathlib import Path

from launch.evaluate_options import positive
from launch.outputs import output_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("study", type=Path, metavar="STUDY.yaml", help="such as configs/study/alignment.yaml")
    parser.add_argument("--data", type=Path, required=True, metavar="PATH", help="training faces: a source of pack")
    parser.add_argument("--test", type=Path, required=True, metavar="PATH", help="faces of other people")
    parser.add_argument(
        "--pairs", type=Path, metavar="FILE", help="LFW-style pairs (default: NAME_pairs.txt beside --test NAME.zip)"
    )
    parser.add_argument("--out", type=output_folder, required=True, metavar="OUT", help="folder of the study")
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="runs side by side")
    parser.add_argument("--threads", type=positive, metavar="N", help="of each run (default: its share of idle cores)")
    parser.add_argument("--collect", action="store_true", help="only write the tables of what is finished")


def run(args: argparse.Namespace) -> int:
    """Pack, run, summarise."""
    from aroface.errors import DataError
    from aroface.files import atomic_path, write_json
    from launch.stages import Stage, hardware, package_versions, run_stages
    from launch.study.design import load_study
    from launch.study.pages import draw, to_json, to_markdown
    from launch.study.runner import StudyData, run_study
    from launch.study.summary import summarise
    from retrieval.protocols.lfw_pairs import pairs_beside

    study = load_study(args.study)
    planned = list(study.runs())
    for path in (args.data, args.test, args.pairs):
        if path is not None and not path.exists():
            raise DataError(
                f"{path} does not exist; name the training faces with --data, those to test on with --test."
            )
    print(f"{len(planned)} runs of {len(study.arms())} arms", flush=True)
    if not args.collect:
        shards = args.out / "shards"
        if not (shards / "manifest.json").is_file():  # written last, when every shard is whole
            stages = [Stage("Pack", ("pack", str(args.data), str(shards)))]
            run_stages(stages, record_path=args.out / "pack.json", say=_say)
        data = StudyData(shards, args.test, args.pairs or pairs_beside(args.test))
        run_study(study, data, args.out, jobs=args.jobs, threads=args.threads, say=_say)
    summary = summarise(study, args.out)
    command = shlex.join(["aroface", *sys.argv[1:]])
    machine = hardware() | package_versions()
    write_json(args.out / "study.json", {"command": command, "machine": machine, **to_json(summary)})
    text = to_markdown(study, summary, command=command, machine=hardware())
    with atomic_path(args.out / "study.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    draw(study, summary, args.out / "study.svg")
    draw(study, summary, args.out / "study.png")
    print(f"\n{text}\nwritten: {args.out / 'study.md'}, study.json, study.svg, study.png")
    return 0


def _say(line: str) -> None:
    print(line, flush=True)
