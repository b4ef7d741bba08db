"""What a test needs of the machine: it skips where that is missing, and fails there in CI, which installs it."""

import os
from typing import NoReturn

import pytest


def missing(what: str) -> NoReturn:
    """Skip with this reason; where AROFACE_CI is set, fail with it."""
    if os.environ.get("AROFACE_CI"):
        pytest.fail(f"{what} (AROFACE_CI is set, so this is no reason to skip)")
    pytest.skip(what)
