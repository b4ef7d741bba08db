"""Searches of the protocols on one GPU and on all of them give what they give on the CPU, to the last bit."""

from typing import Any

import numpy as np
import pytest
import torch

from retrieval.candidates import candidate_rows
from retrieval.embeddings import EmbeddingSet
from retrieval.metrics import device_blocks, evaluate_identification
from retrieval.metrics.device_blocks import blocks_on, search_devices

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

DEVICES = ["cuda:0", "cuda"]


def _faces(count: int, people: int, seed: int) -> EmbeddingSet:
    generator = np.random.default_rng(seed)
    subjects = generator.integers(0, people, count)
    values = np.random.default_rng(0).normal(size=(2000, 512))[subjects] + 3 * generator.normal(size=(count, 512))
    values[100:200] = values[:100]  # ties
    values[200:220] = 0
    return EmbeddingSet(values.astype(np.float32), subjects, fte=generator.random(count) < 0.02)


GALLERY, PROBES = _faces(20_000, 1500, 1), _faces(3000, 2000, 2)


def _everything(result: Any) -> str:
    searches = [[getattr(search, name) for name in search.__dataclass_fields__] for search in result.searches]
    arrays = [[None if a is None else a.tolist() for a in search] for search in searches]
    return repr((arrays, result.open_set, result.ranks))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", ["canonical", "argsort_rev", "ijb_1n"])
def test_searches_equal_the_cpu(device: str, rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_blocks, "_BLOCK_ELEMENTS", 1 << 23)  # several blocks
    for level in ("entry", "identity"):
        options: dict[str, Any] = {"rank_level": level, "rule": rule, "with_average_precision": True}
        expected = evaluate_identification([GALLERY], PROBES, **options)
        found = evaluate_identification([GALLERY], PROBES, **options, blocks=blocks_on(search_devices(device)))
        assert _everything(found) == _everything(expected)


@pytest.mark.parametrize("device", DEVICES)
def test_candidate_lists_equal_the_cpu(device: str) -> None:
    expected = list(candidate_rows(GALLERY, PROBES, count=20))
    assert list(candidate_rows(GALLERY, PROBES, count=20, blocks=blocks_on(search_devices(device)))) == expected


def test_a_gallery_that_does_not_fit_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from aroface.errors import ConfigError

    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(0)
    wide = torch.empty(max(0, free - (1 << 26)), dtype=torch.uint8, device="cuda:0")  # little is left
    with pytest.raises(ConfigError, match="choose cpu"):
        evaluate_identification([GALLERY], PROBES, blocks=blocks_on([torch.device("cuda", 0)]))
    del wide
    torch.cuda.empty_cache()
