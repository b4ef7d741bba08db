"""Files are whole or absent, whatever happens while they are written."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from aroface.errors import DataError
from aroface.files import atomic_path, new_directory, read_json, sha256_of, write_json

ROOT = Path(__file__).parents[3]


def test_exception_keeps_the_old_file_and_leaves_no_other(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("old")

    def fail_halfway():
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_sigkill_keeps_the_old_file(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("old")
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom aroface.files import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(target)], cwd=ROOT, check=False)
    assert result.returncode == -9
    assert target.read_text() == "old"


def test_success_replaces_the_file_with_ordinary_permissions(tmp_path):
    target = tmp_path / "deep" / "file.txt"
    with atomic_path(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o644


def test_a_system_error_names_the_file_that_was_meant(tmp_path):
    (tmp_path / "file").touch()

    def write(path, action):
        with pytest.raises(OSError, match=r".") as caught, atomic_path(path) as temporary:
            action(temporary)
        return caught.value.errno, caught.value.filename

    def fill(_):
        os.write(os.open("/dev/full", os.O_WRONLY), b"x")

    def save(temporary):
        with temporary.open("wb") as file:
            np.save(file, np.zeros(1 << 16))

    def read_badly(_):
        raise OSError(errno.EIO, "Input/output error")  # of an input

    out = tmp_path / "out.bin"
    assert write(out, read_badly) == (errno.EIO, None)
    assert write(out, fill) == (errno.ENOSPC, str(out))
    assert write(out, lambda temporary: temporary.mkdir()) == (errno.EEXIST, str(out))
    assert write(out, lambda temporary: (tmp_path / "none").read_bytes()) == (errno.ENOENT, str(tmp_path / "none"))
    assert write(tmp_path, lambda temporary: None) == (errno.EISDIR, str(tmp_path))
    assert write(tmp_path / "file" / "out", lambda temporary: None)[1] == str(tmp_path / "file")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, before[1]))
    try:
        assert write(out, save) == (errno.ENOSPC, str(out))  # NumPy itself tells no errno
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_json_round_trip_refuses_nan_and_names_what_is_wrong(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"a": [1, 2.5, None, "x"]})
    assert read_json(path) == {"a": [1, 2.5, None, "x"]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert read_json(path)["a"]
    path.write_text("[1]")
    with pytest.raises(DataError, match="an object is expected"):
        read_json(path)
    path.write_text("{")
    with pytest.raises(DataError, match="cannot be read as JSON"):
        read_json(path)
    with pytest.raises(DataError, match="does not exist"):
        read_json(tmp_path / "none.json")


def test_hash_is_that_of_the_bytes(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    assert sha256_of(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_directories_that_hold_something_are_refused(tmp_path):
    assert new_directory(tmp_path / "new", what="Output").is_dir()
    new_directory(tmp_path / "new", what="Output")  # empty: accepted
    (tmp_path / "new" / "x").write_text("")
    with pytest.raises(DataError, match="Name another one, or remove it first"):
        new_directory(tmp_path / "new", what="Output")
