"""`--device` of the protocols: the same records, details and lists; CPU tensors of PyTorch stand in for two GPUs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch.cli import main
from retrieval.embedding_files import write_embeddings
from retrieval.embeddings import EmbeddingSet
from retrieval.metrics import device_blocks
from tests.helpers.protocol_sets import (
    SAMPLES,
    TEMPLATES,
    embeddings_of,
    write_ijb,
    write_ijbs,
    write_keyed,
    write_manifest,
    write_survface,
    write_tinyface,
)

Files = tuple[list[str], list[int]]


def _keyed(tmp_path: Path, files: Files) -> list[object]:
    keys, people = files
    return ["--embeddings", write_keyed(tmp_path / "e.npz", keys, embeddings_of(people, noise=1.5))]


def _identification(tmp_path: Path) -> list[object]:
    people = np.random.default_rng(0).integers(0, 20, 120)
    values = embeddings_of(people.tolist(), noise=2.0)
    values[40:50] = values[:10]  # ties
    for name, part in (("g1", slice(0, 40)), ("g2", slice(40, 80)), ("p", slice(80, 120))):
        write_embeddings(
            tmp_path / f"{name}.npz", EmbeddingSet(values[part], people[part] % (25 if name == "p" else 15))
        )
    galleries = ["--gallery", tmp_path / "g1.npz", "--gallery-2", tmp_path / "g2.npz"]
    return [*galleries, "--probes", tmp_path / "p.npz", "--rank-level", "identity"]


def _templates(tmp_path: Path) -> list[object]:
    keys = [line.split(",")[2] for line in SAMPLES]
    source = _keyed(tmp_path, (keys, [int(key[0]) for key in keys]))
    return ["--manifest", write_manifest(tmp_path / "set", TEMPLATES, SAMPLES), *source]


def _command(protocol: str, tmp_path: Path) -> list[object]:
    lists = tmp_path / "lists"
    match protocol:
        case "identification":
            return _identification(tmp_path)
        case "templates":
            return _templates(tmp_path)
        case "tinyface":
            return ["--lists", lists, *_keyed(tmp_path, write_tinyface(lists))]
        case "ijbc":
            return ["--task", "1:N", "--meta", lists, *_keyed(tmp_path, write_ijb(lists))]
        case "survface":
            return ["--root", lists, *_keyed(tmp_path, write_survface(lists))]
    return ["--task", "surveillance_to_surveillance", "--protocol", lists, *_keyed(tmp_path, write_ijbs(lists))]


PROTOCOLS = ["identification", "templates", "tinyface", "ijbc", "ijbs", "survface"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_search_on_devices_gives_the_record_of_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    asked = []

    def stand_ins(device: str) -> list[torch.device]:
        asked.append(device)
        return [torch.device("cpu")] * 2

    monkeypatch.setattr(device_blocks, "search_devices", stand_ins)
    command = ["evaluate", protocol, *map(str, _command(protocol, tmp_path)), "--resamples", "20"]
    found: dict[str, Any] = {}
    for device in ("cpu", "cuda"):
        out, lists, details = (tmp_path / f"{device}.{suffix}" for suffix in ("json", "csv", "npz"))
        written = ["--out", str(out), "--save-candidates", str(lists), "--details", str(details)]
        assert main([*command, "--device", device, *written]) == 0
        with np.load(details) as arrays:
            found[device] = json.loads(out.read_text()), lists.read_text(), {k: v.tolist() for k, v in arrays.items()}
    assert set(asked) == {"cuda"}
    assert repr(found["cpu"]) == repr(found["cuda"])  # NaN equals NaN
    assert len(found["cpu"][1].splitlines()) > 2


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_device_that_is_not_there_is_named_first(
    tmp_path: Path, protocol: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command = ["evaluate", protocol, *map(str, _command(protocol, tmp_path)), "--out", str(tmp_path / "r.json")]
    (tmp_path / "e.npz").unlink(missing_ok=True)  # nothing was read before
    assert main([*command, "--device", "cuda"]) == 2
    assert "PyTorch sees 0 GPU(s) here. Install a build of PyTorch with CUDA" in capsys.readouterr().err


def test_what_a_device_does_not_do_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(device_blocks, "search_devices", lambda device: [torch.device("cpu")])
    out = ["--out", str(tmp_path / "r.json"), "--device", "cuda"]
    pairs = ["--meta", str(tmp_path), "--embeddings", "e.npz"]
    assert main(["evaluate", "ijbc", *pairs, *out]) == 2
    assert "--device has no effect on --task 1:1, it belongs to --task 1:N" in capsys.readouterr().err
    search = ["--gallery", "g.npz", "--probes", "p.npz", "--similarity", "mls"]
    assert main(["evaluate", "identification", *search, *out]) == 2
    assert "--similarity mls is computed on the CPU only" in capsys.readouterr().err
    for protocol in ("verification", "scface"):
        with pytest.raises(SystemExit, match="2"):
            main(["evaluate", protocol, "--embeddings", "e.npz", "--pairs", "p.csv", *out])
