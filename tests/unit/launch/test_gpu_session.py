"""The commands of the GPU session are commands that exist, and no step of it stops the others."""

import argparse
import importlib
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from launch import cmd_bench
from launch.cli import COMMANDS
from tests.peers import compare_training

SCRIPT = Path(__file__).parents[3] / "launch" / "gpu" / "session.sh"


def session(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=60)


def commands(part: int) -> list[list[str]]:
    found = session(part, "results", "--dry-run", "--peers", "/checkouts")
    assert found.returncode == 0
    return [shlex.split(line) for line in found.stdout.splitlines() if not line.startswith("#")]


def parse(command: list[str]) -> argparse.Namespace:
    """With the parser of the command itself; SystemExit if it does not take it."""
    parser = argparse.ArgumentParser()
    match command:
        case ["aroface", "bench", benchmark, *rest]:
            importlib.import_module(cmd_bench.BENCHMARKS[benchmark][0]).add_arguments(parser)
        case ["aroface", name, *rest]:
            importlib.import_module(COMMANDS[name][0]).add_arguments(parser)
        case ["python", "-m", "tests.peers.compare_training", *rest]:
            parser = compare_training._parser()
        case _:
            raise AssertionError(f"unknown command {shlex.join(command)}")
    return parser.parse_args(rest)


@pytest.mark.parametrize("part", [1, 2, 3])
def test_every_command_is_one_that_exists(part):
    found = [command for command in commands(part) if command[:3] != ["python", "-m", "pytest"]]
    assert len(found) >= 5
    for command in found:
        parse(command)


def test_a_misspelt_option_would_be_noticed():
    with pytest.raises(SystemExit):
        parse(["aroface", "bench", "step", "--depht", "100"])


def test_the_sizes_that_are_asked_for_are_measured():
    steps = [parse(command) for command in commands(2) if command[:3] == ["aroface", "bench", "step"]]
    assert {step.depth for step in steps} == {50, 100}
    assert {step.classes for step in steps} == {93_431, 617_970, 2_059_906}
    assert {step.batch for step in steps} == {128, 256, 512, 1024}
    assert {step.precision for step in steps} == {"auto", "fp16"}
    assert sum(step.profile is not None for step in steps) == 1
    assert len({step.out for step in steps}) == len(steps)
    heads = [parse(command) for command in commands(1) if command[:3] == ["aroface", "bench", "head"]]
    assert {head.classes for head in heads} == {93_431, 617_970, 2_059_906}
    assert all(head.device == "cuda" for head in heads)


def test_the_configuration_of_the_training_takes_the_overrides(tmp_path):
    from aroface.config import TrainConfig, load_config

    train = next(parse(command) for command in commands(3) if command[:2] == ["aroface", "train"])
    config = load_config(SCRIPT.parents[2] / train.config, TrainConfig, train.overrides)
    assert config.model.depth == 100
    assert config.data.shards != "SHARDS"


@pytest.fixture
def interpreter(tmp_path):
    """Stands in for Python: `doctor` fails, one head runs into its limit, everything else is done."""
    path = tmp_path / "python"
    path.write_text('#!/bin/sh\necho "ran $*"\ncase "$*" in *doctor*) exit 3;; *"classes 93431"*) exit 124;; esac\n')
    path.chmod(0o755)
    return path


def test_a_step_that_fails_or_takes_too_long_does_not_stop_the_others(tmp_path, interpreter):
    out = tmp_path / "results"
    found = session(1, out, "--python", interpreter, "--work", tmp_path / "work", "--seconds", 60)
    assert found.returncode == 0
    rows = [line.split("\t") for line in (out / "summary.tsv").read_text().splitlines()]
    outcome = {row[0]: row[1] for row in rows}
    assert outcome["doctor"] == "failed"
    assert "exit code 3" in rows[0][3]
    heads = {"head-617970", "head-93431", "head-2059906", "head-617970-batch-4096"}
    assert set(outcome) == {"doctor", "graphs", *heads, "tests"}
    assert outcome["head-617970"] == "ok"
    assert outcome["head-93431"] == "stopped"
    assert outcome["tests"] == "skipped"  # it may take 240 s
    assert "s are left" in rows[-1][3]
    assert (out / "doctor.log").read_text().startswith("ran -m launch doctor")


def test_without_checkouts_the_peers_are_skipped(tmp_path, interpreter):
    out = tmp_path / "results"
    assert session(2, out, "--python", interpreter, "--work", tmp_path / "work").returncode == 0
    outcome = {line.split("\t")[0]: line.split("\t")[1:] for line in (out / "summary.tsv").read_text().splitlines()}
    assert outcome["peers-r100"][0] == "skipped"
    assert "--peers" in outcome["peers-r100"][2]
    stopped = [name for name in outcome if "classes-93431" in name]
    assert sum(found[0] == "ok" for found in outcome.values()) == len(outcome) - 2 - len(stopped)


@pytest.mark.parametrize("arguments", [[], ["4", "out"], ["1"], ["1", "out", "--peers"], ["1", "out", "--what"]])
def test_wrong_arguments_get_the_usage(arguments):
    found = session(*arguments)
    assert found.returncode == 2
    assert "launch/gpu/session.sh 1 OUT" in found.stdout


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_shellcheck_finds_nothing():
    subprocess.run(["shellcheck", SCRIPT], check=True)
