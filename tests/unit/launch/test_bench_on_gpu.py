"""The benchmarks for GPUs, run on the CPU: what they compute does not depend on the device."""

import numpy as np
import pytest
import torch

from launch.bench import gallery_on_gpu, head_on_gpu, searches_on_gpu
from launch.bench.output import Report
from launch.bench.roofline import Peaks
from launch.cli import main
from retrieval.metrics import evaluate_identification

CPU = torch.device("cpu")


def figures(report: Report) -> dict[str, float]:
    return {figure.name: figure.value for figure in report.figures}


def test_heads_are_measured_beside_the_peer():
    report = Report("head", (), {})
    head_on_gpu.measure_on(CPU, report, batch=8, classes=60, rounds=2, bf16=False)
    found = figures(report)
    for name in ("arcface_torch", "plain", "chunked fp32", "chunked bf16"):
        assert found[f"8 x 60: {name}, pass"] > 0
    assert {name for name in found if "speed" in name} == {
        f"8 x 60: {name}, speed of arcface_torch" for name in ("plain", "chunked fp32", "chunked bf16")
    }


def test_what_does_not_fit_is_left_out(monkeypatch, capsys):
    class Huge(head_on_gpu.Pass):
        def __call__(self):
            if self.name == "arcface_torch":
                raise torch.OutOfMemoryError
            return super().__call__()

    monkeypatch.setattr(head_on_gpu, "Pass", Huge)
    report = Report("head", (), {})
    head_on_gpu.measure_on(CPU, report, batch=8, classes=60, rounds=1, bf16=False)
    assert "skipped: arcface_torch at 8 x 60 does not fit" in capsys.readouterr().out
    assert "8 x 60: chunked bf16, pass" in figures(report)


def test_exact_search_finds_the_best_of_drawn_vectors():
    import faiss

    bare = faiss.IndexScalarQuantizer(512, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    report = Report("gallery", (), {})
    peaks = Peaks("a card", 1, "wall", {"fp32": 1e9, "fp16": 2e9}, 1e9)
    gallery_on_gpu.measure_on(CPU, report, size=500, top=5, bare=bare, many=70, peaks=peaks)
    found = figures(report)
    assert found["same best entry as a float32 product, 64 probes"] == 1.0
    for count in (1, 70):
        for name in (
            "index alone, float16",
            "gallery, fp16: compared again in float32",
            "product and topk in PyTorch",
            "bare Faiss, float16",
        ):
            limit = max(2 * 512 * 500 * count / 2e9, 2 * 512 * 500 / 1e9)
            assert found[f"500 x {count}: {name} / limit"] == pytest.approx(
                found[f"500 x {count}: {name}"] / 1e3 / limit
            )


def test_the_product_in_blocks_gives_the_nearest(monkeypatch):
    monkeypatch.setattr(gallery_on_gpu, "_BLOCK_ROWS", 64)
    rows, kept = gallery_on_gpu._drawn(200, CPU)
    probes, _ = gallery_on_gpu._drawn(6, CPU, seed=3)
    near = gallery_on_gpu._by_pytorch(kept, probes, 4)
    scores = probes.astype(np.float64) @ rows.T.astype(np.float64)
    chosen = np.take_along_axis(scores, near, axis=1)
    best = -np.sort(-scores, axis=1)[:, :4]
    np.testing.assert_allclose(chosen, best, atol=2e-3)


def test_searches_are_compared_with_those_of_the_cpu(monkeypatch):
    report = Report("protocols", (), {})
    searches_on_gpu.measure_on([CPU, CPU], report, scale=0.002, rounds=1)
    found = figures(report)
    assert sum(name.endswith(": same result") and value == 1 for name, value in found.items()) == 3
    assert sum(name.endswith(": device") and value > 0 for name, value in found.items()) == 3
    monkeypatch.setattr(searches_on_gpu, "_is_same", lambda *_: False)
    searches_on_gpu.measure_on([CPU], report, scale=0.002, rounds=1)
    assert [figure.reached for figure in report.figures if figure.name.endswith("same result")] == [True] * 3 + [
        False
    ] * 3


def test_another_result_is_noticed():
    galleries, probes, options = searches_on_gpu._collection(0.002)
    one = evaluate_identification(galleries, probes, **options)
    assert searches_on_gpu._is_same(one, evaluate_identification(galleries, probes, **options))
    one.searches[0].best[3] = np.nextafter(one.searches[0].best[3], np.float32(2))
    assert not searches_on_gpu._is_same(one, evaluate_identification(galleries, probes, **options))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("benchmark", ["head", "gallery", "protocols"])
def test_a_gpu_that_is_not_there_is_named(benchmark, capsys):
    assert main(["bench", benchmark, "--device", "cuda"]) == 2
    assert "cuda" in capsys.readouterr().err
