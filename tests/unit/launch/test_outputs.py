import argparse
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from launch.cli import COMMANDS, main
from launch.cmd_bench import BENCHMARKS
from launch.cmd_evaluate import PROTOCOLS
from launch.outputs import output, output_file, output_folder
from retrieval.embedding_files import write_embeddings
from retrieval.embeddings import EmbeddingSet

WRITTEN = {
    "details",
    "holdout_out",
    "out",
    "profile",
    "repair",
    "save_candidates",
    "save_scores",
    "strength",
    "summary",
    "timing_cache",
}
TYPES = [output, output_file, output_folder]


def _options(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _options(inner)
        elif action.dest in WRITTEN and action.nargs != 0:
            yield action


def test_every_command_checks_where_it_writes() -> None:
    count = 0
    for module, _ in [*COMMANDS.values(), *PROTOCOLS.values(), *BENCHMARKS.values()]:
        parser = argparse.ArgumentParser()
        importlib.import_module(module).add_arguments(parser)
        for option in _options(parser):
            kind = getattr(option.type, "__module__", None)
            assert option.type in TYPES or kind == "launch.cmd_embed", (module, option.dest)
            count += 1
    assert count > 30


@pytest.mark.parametrize("kind", TYPES)
def test_what_cannot_be_written_is_refused_and_nothing_is_left_behind(
    tmp_path: Path, kind: Callable[[str], Path]
) -> None:
    (tmp_path / "file").write_text("mine")
    for place in ("file/r.json", "file/deeper/r.json"):
        with pytest.raises(argparse.ArgumentTypeError, match="Not a directory.*name a place where you may write"):
            kind(str(tmp_path / place))
    with pytest.raises(argparse.ArgumentTypeError, match="name a place where you may write"):
        kind("/proc/r.json")
    assert kind(str(tmp_path / "new" / "deeper" / "r")) == tmp_path / "new" / "deeper" / "r"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_file_is_no_folder_and_a_folder_no_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(argparse.ArgumentTypeError, match="is a folder; name a file in it"):
        output_file(str(tmp_path))
    with pytest.raises(argparse.ArgumentTypeError, match="is a file; name a folder"):
        output_folder(str(tmp_path / "file"))
    assert output_file(str(tmp_path / "file")) == output(str(tmp_path / "file")) == tmp_path / "file"
    assert output_folder(str(tmp_path)) == output(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    "command",
    [
        ("train", "no.yaml", "--run", "FILE"),
        ("embed", "no-model", "no-images", "--out", "FOLDER.npz"),
        ("embed", "no-model", "no-images", "--out", "FILE/x.npz"),
        ("embed", "no-model", "no-images", "--out", "FILE"),
        ("export", "no-model", "--out", "FOLDER.npz"),
        ("gallery", "search", "no-gallery", "--probes", "none.npz", "--out", "FOLDER.npz"),
        ("report", "none.json", "--out", "FILE/report"),
        ("evaluate", "verification", "--embeddings", "no.npz", "--pairs", "no.csv", "--out", "FILE/r.json"),
        ("evaluate", "lfw", "--embeddings", "no.npz", "--pairs", "no", "--out", "r.json", "--details", "FOLDER.npz"),
    ],
)
def test_a_place_that_cannot_be_written_is_told_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE").touch()
    Path("FOLDER.npz").mkdir()
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "; name a" in error
    written = next(option for option in ("--details", "--run", "--out") if option in command)
    assert f"argument {written}: " in error


def test_the_result_is_written_before_what_stands_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    write_embeddings(tmp_path / "e.npz", EmbeddingSet(values, np.arange(20) // 2))
    (tmp_path / "pairs.csv").write_text("index_a,index_b,label\n0,1,1\n2,3,1\n4,9,0\n6,8,0\n")
    command = ["evaluate", "verification", "--embeddings", str(tmp_path / "e.npz"), "--out", str(tmp_path / "r.json")]
    command += ["--pairs", str(tmp_path / "pairs.csv"), "--details", str(tmp_path / "d.npz")]

    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("retrieval.details.write_details", full)
    with pytest.raises(OSError, match="No space"):
        main(command)
    assert (tmp_path / "r.json").is_file()
