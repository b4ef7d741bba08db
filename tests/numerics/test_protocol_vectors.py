"""The protocol vectors TV-1 to TV-12: hand-computed, checked against the public evaluators when they were made."""

import json
from pathlib import Path

import numpy as np
import pytest

from retrieval.embeddings import EmbeddingSet
from retrieval.metrics import average_precision, edc, kfold_accuracy, operating_point, partial_area, wilson
from retrieval.metrics.identification import _open_set
from retrieval.metrics.rules import accepts
from retrieval.metrics.search import rank_scores

VECTORS = json.loads((Path(__file__).parents[1] / "goldens" / "protocol_vectors.json").read_text())


def tar_fmr(genuine, impostor, far, rule):
    genuine, impostor = np.array(genuine), np.array(impostor)
    point = operating_point(impostor, far, rule=rule, positives=genuine)
    return accepts(genuine, point).mean(), point.realised


@pytest.mark.parametrize("far", [float(far) for far in VECTORS["TV1"]["tar_fmr"]])
def test_tv1_canonical_with_ties(far):
    expected = next(v for k, v in VECTORS["TV1"]["tar_fmr"].items() if float(k) == far)
    assert tar_fmr(VECTORS["TV1"]["genuine"], VECTORS["TV1"]["impostor"], far, "canonical") == pytest.approx(expected)


def test_tv1_compat_rules():
    genuine, impostor = VECTORS["TV1"]["genuine"], VECTORS["TV1"]["impostor"]
    assert tar_fmr(genuine, impostor, 0.16, "nearest") == pytest.approx((0.6, 0.2))
    point = operating_point(np.array(impostor), 0.5, rule="pfe_int")
    assert (point.threshold, point.realised) == (0.4, 0.6)


def test_tv2_dropped_points():
    v = VECTORS["TV2"]
    assert tar_fmr(v["genuine"], v["impostor"], v["far"], "canonical")[0] == v["canonical"]
    assert tar_fmr(v["genuine"], v["impostor"], v["far"], "nearest")[0] == v["nearest_drop_intermediate"]


def test_tv3_kfold():
    v = VECTORS["TV3"]
    result = kfold_accuracy(np.array(v["dist"]), np.array(v["same"], bool), folds=v["folds"])
    assert result.folds == tuple(v["acc"])
    assert (result.mean, result.std) == pytest.approx((v["mean"], v["std"]))
    assert result.thresholds == pytest.approx((0.21, 0.31))


def tv5(scores=None, gallery=None, probes=None, level="entry"):
    v = VECTORS["TV5"]
    gallery = np.array(gallery or v["gallery"])
    probes = np.array(probes or v["probes"])
    rows = scores or v["scores"]
    matrix = np.array([[-np.inf] * len(gallery) if row is None else row for row in rows], np.float32)
    return rank_scores(matrix, gallery, probes, rank_level=level)


def test_tv5_ranks_and_counts():
    v = VECTORS["TV5"]
    search = tv5()
    assert (search.is_mated.sum(), (~search.is_mated).sum()) == (v["mated"], v["nonmated"])
    assert search.rank[search.is_mated].tolist() == [float(rank) for rank in v["rank_entry_pess"]]
    rank = search.rank[search.is_mated]
    assert [(rank <= k).mean() for k in (1, 3, 4)] == v["cmc_entry_pess_1_3_4"]
    assert (search.optimistic_rank[search.is_mated] <= 1).mean() == v["cmc_entry_opt_1"]
    by_identity = tv5(level="identity")
    assert (by_identity.rank[by_identity.is_mated] <= 3).mean() == v["cmc_identity_pess_3"]


@pytest.mark.parametrize("case", VECTORS["TV5"]["tpir"])
def test_tv5_open_set(case):
    fpir, rank = (float(part.split("=")[1]) for part in case.split(","))
    tpir, realised = VECTORS["TV5"]["tpir"][case]
    point = _open_set([tv5()], fpir, int(rank), "canonical")
    assert point.tpir_rank_l == tpir
    assert point.point.realised == realised


def test_tv5_pfe_realises_more_than_wanted_on_ties():
    assert _open_set([tv5()], 0.25, 1, "pfe_int").point.realised == 0.5


def test_tv5b_listed_mate_without_template_is_a_miss():
    search = tv5(scores=[[0.5, -np.inf]], gallery=["A", "B"], probes=["B"])
    assert search.is_mated.tolist() == [True]
    assert search.rank.tolist() == [np.inf]


def test_tv5c_no_non_mated_search_is_null_with_a_reason():
    search = tv5(scores=[[0.9, 0.1]], gallery=["A", "B"], probes=["A"])
    point = _open_set([search], 0.1, 20, "canonical")
    assert (point.tpir, point.tpir_rank_l, point.reason) == (None, None, "no non-mated searches")
    assert search.rank.tolist() == [1]


def test_tv6_two_galleries():
    v = VECTORS["TV6"]
    probes = np.array(v["probes"])
    searches = [
        rank_scores(np.array(v[s], np.float32), np.array(v[g]), probes) for s, g in (("S1", "g1"), ("S2", "g2"))
    ]
    rank = np.concatenate([s.rank[s.is_mated] for s in searches])
    assert (rank <= 1).mean() == v["rank1_pooled"]
    assert np.mean([(s.rank[s.is_mated] <= 1).mean() for s in searches]) == pytest.approx(v["rank1_mean_of_galleries"])
    both = rank_scores(np.hstack([v["S1"], v["S2"]]).astype(np.float32), np.array(v["g1"] + v["g2"]), probes)
    assert (both.rank <= 1).mean() == v["rank1_concatenated"]
    assert _open_set(searches, 0.34, 1, "canonical").tpir == pytest.approx(v["tpir@.34_mean"])
    assert _open_set(searches, 0.34, 1, "ijb_evals").tpir == pytest.approx(v["ijb_evals_rule"])


@pytest.mark.parametrize("ranks", VECTORS["TV7"]["ap"])
def test_tv7_average_precision(ranks):
    assert average_precision(json.loads(ranks)) == pytest.approx(VECTORS["TV7"]["ap"][ranks])


def test_tv8_zero_probe_is_a_miss():
    embeddings = EmbeddingSet(np.zeros((1, 2), np.float32), np.array(["A"]))
    assert not embeddings.enrolled.any()


def test_tv10_edc():
    v = VECTORS["TV10"]
    curve = edc(np.array(v["scores"]), np.array(v["quality"]), threshold=v["threshold"])
    np.testing.assert_allclose(curve, v["edc"], atol=1e-12)
    assert partial_area(curve, 0.5) == pytest.approx(v["pauc_0.5_step"])


def test_tv12_wilson():
    v = VECTORS["TV12"]
    interval = wilson(v["k"], v["n"])
    assert (interval.low, interval.high) == pytest.approx(tuple(v["wilson95"]))
