"""The command table: fast help, lazy imports, exit codes, and names that shadow nothing."""

import argparse
import errno
import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launch.cli import COMMANDS, main
from launch.cmd_bench import BENCHMARKS
from launch.cmd_evaluate import PROTOCOLS
from launch.command_parser import CommandParser

ROOT = Path(__file__).parents[3]
PACKAGES = ("aroface", "shards", "export", "retrieval", "launch")
HEAVY = ("torch", "deepspeed", "numpy", "faiss", "onnx", "onnxruntime", "matplotlib", "pydantic", "rich")


def test_help_imports_nothing_heavy_and_lists_every_command():
    script = (
        "import sys\nfrom launch.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        f"print('loaded', [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.rstrip().endswith("loaded []")
    for command in COMMANDS:
        assert re.search(rf"^  {command} ", result.stdout, re.MULTILINE), command


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"aroface {command}" in capsys.readouterr().out


def test_unknown_command_names_the_nearest(capsys):
    assert main(["trian"]) == 2
    assert "did you mean `aroface train`?" in capsys.readouterr().err


def test_no_command_prints_the_help(capsys):
    assert main([]) == 0
    assert "quickstart" in capsys.readouterr().out


def modules():
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT)


@pytest.mark.parametrize("path", [path for path in modules() if path.name != "__main__.py"], ids=str)
def test_every_module_imports(path):
    importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))


def test_no_file_shadows_a_dependency_or_a_sibling():
    taken = set(importlib.metadata.packages_distributions()) | set(PACKAGES)
    own = {path.stem for path in modules()} - {"__init__", "__main__"}
    assert own & taken == set()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 4 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 2.50 GiB."),
    ],
)
def test_memory_that_runs_out_is_told_with_what_to_lower(error, monkeypatch, capsys):
    def run(args):
        raise error

    monkeypatch.setattr("launch.cmd_train.run", run)
    assert main(["train", "c.yaml", "--run", "r"]) == 2
    assert "out of memory (2.50 GiB more were wanted). Lower batch.micro_batch" in capsys.readouterr().err


def test_another_runtime_error_is_a_bug(monkeypatch):
    def run(args):
        raise RuntimeError("no idea")

    monkeypatch.setattr("launch.cmd_train.run", run)
    with pytest.raises(RuntimeError, match="no idea"):
        main(["train", "c.yaml", "--run", "r"])


@pytest.mark.parametrize(
    ("code", "what_to_do"),
    [
        ("ENOSPC", "Make room"),
        ("EDQUOT", "Make room"),
        ("EFBIG", "Make room"),
        ("EROFS", "Change its permissions"),
        ("EACCES", "Change its permissions"),
        ("EPERM", "Change its permissions"),
        ("ENOTDIR", "A file stands where a folder is meant"),
        ("EISDIR", "A folder stands where a file is meant"),
        ("EEXIST", "Something else stands there"),
    ],
)
def test_a_path_that_the_system_refuses_is_told(code, what_to_do, monkeypatch, capsys):
    number = getattr(errno, code)

    def run(args):
        raise OSError(number, os.strerror(number), "some/file")

    monkeypatch.setattr("launch.cmd_train.run", run)
    assert main(["train", "c.yaml", "--run", "r"]) == 2
    assert f"aroface train: some/file: {os.strerror(number)}. {what_to_do}" in capsys.readouterr().err


def test_another_error_of_the_system_is_a_bug(monkeypatch):
    def run(args):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr("launch.cmd_train.run", run)
    with pytest.raises(OSError, match="Bad file descriptor"):
        main(["train", "c.yaml", "--run", "r"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["c.yaml", "a.b=1", "d=2", "--run", "r"],
        ["--run", "r", "c.yaml", "a.b=1", "d=2"],
        ["c.yaml", "a.b=1", "--run", "r", "d=2"],
    ],
)
def test_settings_stand_before_between_or_behind_the_options(arguments, monkeypatch):
    seen = []
    monkeypatch.setattr("launch.cmd_train.run", lambda args: seen.append(args) or 0)
    assert main(["train", *arguments]) == 0
    assert (seen[0].config, seen[0].overrides, seen[0].run) == (Path("c.yaml"), ["a.b=1", "d=2"], Path("r"))


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["train", "c.yaml", "--run", "r", "--resum", "auto", "--chek"], "did you mean --check?"),
        (["embed", "m", "i", "--out", "o", "--presicion", "bf16"], "did you mean --precision?"),
        (["evaluate", "compare", "a", "b", "--out", "o", "--resample-count", "3"], "unrecognized arguments"),
        (["bench", "head", "--clases", "3"], "did you mean --classes?"),
        (["evaluate", "lwf"], "did you mean lfw?"),
        (["gallery", "serch", "g"], "did you mean search?"),
        (["export", "r", "--out", "o", "--precision", "fp61"], "did you mean fp16?"),
        (["export", "r", "--out", "o", "--precision", "double"], "(choose from"),
    ],
)
def test_a_misspelt_option_names_the_nearest(arguments, wanted, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert wanted in capsys.readouterr().err


def test_help_shows_defaults_and_keeps_to_the_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["pack", "--help"])
    text = capsys.readouterr().out
    assert "images in a shard (default: 8192)" in text
    assert "set N identities aside (default: 0)" in text
    assert max(map(len, text.splitlines())) <= 80


def options_of(parser):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for other in action.choices.values():
                yield from options_of(other)
        elif action.option_strings:
            yield action


@pytest.mark.parametrize(
    "module", sorted({name for table in (COMMANDS, BENCHMARKS, PROTOCOLS) for name, _ in table.values()})
)
def test_no_option_tells_its_default_twice(module):
    parser = CommandParser(prog="x", description="")
    importlib.import_module(module).add_arguments(parser)
    for action in options_of(parser):
        shown = parser._get_formatter()._get_help_string(action)
        default = re.escape(str(action.default))
        assert len(re.findall(rf"default|\({default}\)", shown)) <= 1, shown
