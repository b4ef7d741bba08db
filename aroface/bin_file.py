"""InsightFace's `.bin` verification sets, read without running the code that a pickle may hold.

The file is a pickle of (images, issame): 2 P encoded images and P bools; images are byte strings (`str` of Python 2 in
old files) or one-dimensional uint8 arrays.
"""

import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aroface.errors import DataError

__all__ = ["BinFile", "read_bin_file"]

_MAX_FILE_BYTES = 4 << 30
_MAX_IMAGE_BYTES = 16 << 20
_MAGICS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")
#: What a pickled uint8 array needs, and nothing else.
_ARRAY_GLOBALS = {
    *((f"numpy{core}.multiarray", "_reconstruct") for core in (".core", "._core")),
    *((f"numpy{core}.numeric", "_frombuffer") for core in (".core", "._core")),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class BinFile(NamedTuple):
    """P pairs: images 2 i and 2 i + 1 are pair i."""

    images: list[bytes]  #: 2 P encoded images
    is_same: list[bool]  #: P


class _NothingAllowed(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        raise _RefusedError(f"{module_name}.{global_name}")


class _ArraysAllowed(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in _ARRAY_GLOBALS:
            raise _RefusedError(f"{module_name}.{global_name}")
        return super().find_class(module_name.replace("numpy.core", "numpy._core"), global_name)


class _RefusedError(Exception):
    """The pickle asks for something that is not on the list."""


def read_bin_file(path: Path) -> BinFile:
    """Read a verification set.

    Raises:
        DataError: unreadable, too large, not (images, issame), or a pickle that asks for more than arrays of bytes.
    """
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise DataError(
                f"{path} has {path.stat().st_size} bytes; a verification set has {_MAX_FILE_BYTES} at most."
            )
        value = _unpickle(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise DataError(f"{path} holds no pair of (images, issame); it is not a verification set.")
    images, is_same = value
    flags = _flags(is_same, path)
    if not isinstance(images, list | tuple) or len(images) != 2 * len(flags):
        count = len(images) if isinstance(images, list | tuple) else "no list of"
        raise DataError(f"{path} holds {count} images for {len(flags)} pairs; two each are needed.")
    return BinFile([_image(image, f"{path}: image {number}") for number, image in enumerate(images)], flags)


def _unpickle(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return _NothingAllowed(file, encoding="bytes").load()
    except _RefusedError:
        pass  # it holds arrays, or something worse; the next reader tells
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no readable pickle ({error}); copy the file again.") from error
    try:
        with path.open("rb") as file:
            return _ArraysAllowed(file, encoding="bytes").load()
    except _RefusedError as error:
        raise DataError(
            f"{path} asks to load {error}, which no image set needs: it may run code and is refused. Convert "
            "it with the tool that wrote it, or get it from a source you trust."
        ) from None
    except Exception as error:  # a crafted pickle can make numpy raise anything
        raise DataError(f"{path} is no readable pickle ({type(error).__name__}: {error}); copy it again.") from error


def _flags(is_same: Any, path: Path) -> list[bool]:
    if isinstance(is_same, np.ndarray) and is_same.dtype.kind in "biu" and is_same.ndim == 1:
        is_same = is_same.tolist()
    if not isinstance(is_same, list | tuple) or not all(isinstance(flag, bool | int) for flag in is_same):
        raise DataError(f"{path}: its second part is no list of true and false.")
    if not is_same:
        raise DataError(f"{path} holds no pairs.")
    return [bool(flag) for flag in is_same]


def _image(image: Any, where: str) -> bytes:
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim > 2:
            raise DataError(f"{where} is an array of {image.dtype} {image.shape}; encoded images are uint8.")
        image = image.tobytes()
    if not isinstance(image, bytes) or len(image) > _MAX_IMAGE_BYTES or not image.startswith(_MAGICS):
        raise DataError(f"{where} is no JPEG or PNG file of at most {_MAX_IMAGE_BYTES} bytes.")
    return image
