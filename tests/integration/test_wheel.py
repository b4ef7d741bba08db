"""What a user installs: five packages, their data files, nothing else."""

import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[2]
PACKAGES = {"aroface", "shards", "export", "retrieval", "launch"}


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    wheel = next(WheelBuilder(str(ROOT)).build(directory=str(out), versions=["standard"]))
    with zipfile.ZipFile(wheel) as file:
        return file.namelist()


def test_exactly_five_packages(names):
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == PACKAGES


def test_every_source_and_data_file_is_in_it(names):
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*"):
            if path.suffix in {".py", ".yaml", ".css", ".sh"}:
                assert path.relative_to(ROOT).as_posix() in names


def test_it_refuses_to_be_uploaded(names):
    assert "Private :: Do Not Upload" in (ROOT / "pyproject.toml").read_text()
