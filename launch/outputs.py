"""Types of options that say where a command writes: what cannot be written is told before the work, not after it."""

import argparse
import tempfile
from pathlib import Path

__all__ = ["output", "output_file", "output_folder"]


def output(text: str) -> Path:
    """Parse the path of a file or folder to write, where a file can be made now.

    A file without a name, which nobody sees, is made in the folder, or in the nearest one above it that exists.

    Raises:
        argparse.ArgumentTypeError: none can.
    """
    path = Path(text)
    try:
        folders = (path, *path.parents) if path.is_dir() else path.parents
        folder = next((folder for folder in folders if folder.exists()), Path())
        with tempfile.TemporaryFile(dir=folder):
            return path
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"{text} cannot be written ({error.strerror}); name a place where you may write, with space left"
        ) from error


def output_file(text: str) -> Path:
    """As `output`; a folder is refused."""
    path = output(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file in it")
    return path


def output_folder(text: str) -> Path:
    """As `output`; a file is refused."""
    path = output(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file; name a folder")
    return path
