"""Errors that a user can act on.

Every message says which setting or file, what it was, what is allowed, and what to do. The command line prints the
message without a traceback and exits with 2; any other exception is a bug in aroface and exits with 1.
"""

__all__ = ["ArofaceError", "CheckpointError", "ConfigError", "DataError", "ExportError", "ShapeError"]


class ArofaceError(Exception):
    """A user error: something outside the program has to change."""


class ConfigError(ArofaceError):
    """A setting is unknown, out of range, or contradicts another one."""


class DataError(ArofaceError):
    """An input file is missing, damaged, or not what it is said to be."""


class CheckpointError(ArofaceError):
    """A checkpoint is incomplete, damaged, or belongs to another model."""


class ExportError(ArofaceError):
    """A model cannot be exported, or the exported model does not equal the original."""


class ShapeError(ArofaceError, ValueError):
    """An array has another shape than the function takes."""
