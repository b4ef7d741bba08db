import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aroface.files import sha256_of
from launch.cli import main
from shards.manifest import read_identities, read_manifest
from shards.pack import PackOptions, pack
from tests.helpers.face_folders import write_faces


def hashes(directory: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in sorted(directory.iterdir())}


def test_pack_then_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faces = write_faces(tmp_path / "faces", {"ada": 3, "bob": 2})
    keep = tmp_path / "keep.txt"
    keep.write_text("ada\n")
    out = tmp_path / "out"
    assert main(["pack", str(faces), str(out), "--identities", str(keep), "--workers", "1"]) == 0
    assert "images               3" in capsys.readouterr().out
    assert main(["verify", str(out)]) == 0
    (out / "shard-000000.idx").unlink()
    assert main(["verify", str(out)]) == 2
    assert "shard-000000.idx is missing" in capsys.readouterr().out


def test_a_killed_packing_is_continued(tmp_path: Path) -> None:
    faces = write_faces(tmp_path / "faces", {f"id{i:03d}": 20 for i in range(40)})
    out = tmp_path / "out"
    command = ["-m", "launch", "pack", str(faces), str(out), "--samples-per-shard", "4", "--workers", "2"]
    with subprocess.Popen([sys.executable, *command], stderr=subprocess.DEVNULL) as packer:
        while len(list((out / ".packing").glob("shard-*.json"))) < 5 and packer.poll() is None:
            time.sleep(0.01)
        os.kill(packer.pid, signal.SIGKILL)
    assert not (out / "manifest.json").exists()
    first = (out / "shard-000000.tar").stat().st_mtime_ns
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    assert (out / "shard-000000.tar").stat().st_mtime_ns == first
    command[4] = str(tmp_path / "fresh")
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    assert hashes(out) == hashes(tmp_path / "fresh")


def test_a_full_disk_is_told_and_nothing_is_lost(tmp_path: Path) -> None:
    faces = write_faces(tmp_path / "faces", {f"id{i:03d}": 20 for i in range(20)})
    out = tmp_path / "out"
    command = [sys.executable, "-m", "launch", "pack", str(faces), str(out), "--samples-per-shard", "100"]
    limited = ["bash", "-c", 'ulimit -f 150; exec "$@"', "bash", *command, "--workers", "1"]  # KiB a file may grow to
    done = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Finished shards are kept: make room" in done.stderr
    assert not (out / "manifest.json").exists()
    assert not list(out.glob("*.tar"))
    subprocess.run(command, check=True, capture_output=True)
    assert main(["verify", str(out)]) == 0


def test_many_sources_and_a_holdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_faces(tmp_path / "one", {"ada": 3, "bob": 2})
    two = write_faces(tmp_path / "two", {"ada": 1, "cleo": 2})
    out = tmp_path / "out"
    assert main(["pack", str(one), str(two), str(out), "--holdout", "1", "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert str(tmp_path / "out-holdout") in printed
    assert main(["verify", str(out)]) == main(["verify", str(tmp_path / "out-holdout")]) == 0
    assert main(["pack", str(one), str(tmp_path / "x"), "--size", "5"]) == 2
    assert "--size is 5; choose from 8 to 4096" in capsys.readouterr().err


def test_one_bad_line_costs_no_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faces = write_faces(tmp_path / "faces", {"ada": 5, "bob": 1, "cleo": 7, "dan": 2, "eve": 2, "fay": 1})
    merges = {"ada": "Lovelace", "bob": "Lovelace", "eve": "both", "fay": "both"}  # names that no key tells
    pack(faces, tmp_path / "shards", PackOptions(merges=merges))
    path = tmp_path / "shards" / "identities.csv"
    text = path.read_text()
    assert text.splitlines()[1:] == ["0,Lovelace,6", "1,both,3", "2,cleo,7", "3,dan,2"]
    path.write_text(text.replace("1,both,3", "1,b").replace("2,cleo,7", "2;cleo;7"))
    assert main(["verify", str(tmp_path / "shards"), "--repair", str(tmp_path / "clean")]) == 0
    assert [i.name for i in read_identities(tmp_path / "clean")] == ["Lovelace", "class_00000001", "cleo", "dan"]
    assert "names    1 that identities.csv did not tell are the folders of their images, 1 are lost" in (
        capsys.readouterr().out
    )


def test_a_repair_tells_what_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack(write_faces(tmp_path / "faces", {"ada": 20, "bob": 20}), tmp_path / "shards", PackOptions())
    tar = tmp_path / "shards" / "shard-000000.tar"
    os.truncate(tar, tar.stat().st_size // 2)
    assert main(["verify", str(tmp_path / "shards"), "--repair", str(tmp_path / "clean")]) == 0
    captured = capsys.readouterr()
    saved = read_manifest(tmp_path / "clean").num_samples
    assert 10 < saved < 30
    assert f"lost     {40 - saved} images ({tmp_path / 'clean' / 'dropped.csv'})" in captured.out
    assert "Read: 1 of 1 shards" in captured.err
    assert "Write: 1 of 1 shards" in captured.err
    (tmp_path / "shards" / "manifest.json").unlink()
    assert main(["verify", str(tmp_path / "shards"), "--repair", str(tmp_path / "again")]) == 0
    assert f"lost     {40 - saved} images; perhaps more, for no manifest tells" in capsys.readouterr().out
