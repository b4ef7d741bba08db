"""The safe reader of verification sets: what it accepts, and that nothing of a hostile pickle runs."""

import io
import os
import pickle
import pickletools
from pathlib import Path

import numpy as np
import pytest

from aroface.bin_file import read_bin_file
from aroface.errors import DataError
from aroface.images import encode_jpeg

IMAGES = [encode_jpeg(np.full((8, 8, 3), 40 * i, np.uint8)) for i in range(4)]
SAME = [True, False]


def written(path: Path, value: object, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("as_array", [False, True])
def test_bytes_and_arrays_of_every_protocol(tmp_path: Path, protocol: int, as_array: bool) -> None:
    images = [np.frombuffer(image, np.uint8) for image in IMAGES] if as_array else IMAGES
    found = read_bin_file(written(tmp_path / "a.bin", (images, SAME), protocol))
    assert found == (IMAGES, SAME)


def test_strings_of_python_2(tmp_path: Path) -> None:
    """Protocol 2 of Python 2: BINSTRING opcodes, lists built by APPENDS, a tuple of two."""
    out = io.BytesIO()
    out.write(b"\x80\x02](")
    for image in IMAGES:
        out.write(b"T" + len(image).to_bytes(4, "little") + image)
    out.write(b"e](" + b"\x88\x89" + b"e\x86.")
    (tmp_path / "a.bin").write_bytes(out.getvalue())
    assert "BINSTRING" in {op.name for op, _, _ in pickletools.genops(out.getvalue())}
    assert read_bin_file(tmp_path / "a.bin") == (IMAGES, SAME)


def test_arrays_named_as_old_numpy_named_them(tmp_path: Path) -> None:
    images = [np.frombuffer(image, np.uint8).copy() for image in IMAGES]
    data = pickle.dumps((images, SAME), protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    (tmp_path / "a.bin").write_bytes(data)
    assert read_bin_file(tmp_path / "a.bin").images == IMAGES


class _Runs:
    def __init__(self, function: object, *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> object:
        return self.call


@pytest.mark.parametrize(
    "wrap", [lambda evil: evil, lambda evil: ([evil, *IMAGES[1:]], SAME), lambda evil: (IMAGES, evil)]
)
@pytest.mark.parametrize("function", [os.system, eval, exec])
def test_code_is_refused_and_does_not_run(tmp_path: Path, wrap: object, function: object) -> None:
    mark = tmp_path / "ran"
    text = f"touch {mark}" if function is os.system else f"open({str(mark)!r}, 'w')"
    path = written(tmp_path / "evil.bin", wrap(_Runs(function, text)))
    with pytest.raises(DataError, match=r"asks to load .*\.(system|eval|exec), which no image set needs"):
        read_bin_file(path)
    assert not mark.exists()
    pickle.loads(path.read_bytes())  # noqa: S301 - the payload is a live one
    assert mark.exists()


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    images = np.array(IMAGES, object)
    with pytest.raises(DataError, match=r"holds no list of images|is an array"):
        read_bin_file(written(tmp_path / "a.bin", (images, SAME)))
    with pytest.raises(DataError, match="is an array of object"):
        read_bin_file(written(tmp_path / "a.bin", ([np.array([None]), *IMAGES[1:]], SAME)))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ((IMAGES, [True]), "holds 4 images for 1 pairs"),
        ((IMAGES[:3], SAME), "holds 3 images for 2 pairs"),
        (IMAGES, "no pair of"),
        ((IMAGES, ["yes", "no"]), "no list of true and false"),
        (([], []), "holds no pairs"),
        (([b"text", *IMAGES[1:]], SAME), "image 0 is no JPEG or PNG"),
        ((["text", *IMAGES[1:]], SAME), "image 0 is no JPEG or PNG"),
    ],
)
def test_other_contents_are_named(tmp_path: Path, value: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_bin_file(written(tmp_path / "a.bin", value))


def test_damage_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "a.bin", (IMAGES, SAME))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="no readable pickle"):
        read_bin_file(path)
    with pytest.raises(DataError, match="No such file"):
        read_bin_file(tmp_path / "absent.bin")
