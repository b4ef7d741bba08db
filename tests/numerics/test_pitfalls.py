"""Traps that public evaluators have fallen into, one by one; the others are tested beside what they concern."""

from fractions import Fraction

import numpy as np
import pytest

from retrieval.embeddings import EmbeddingSet
from retrieval.extraction import embed_face_set
from retrieval.metrics import evaluate_identification, evaluate_pairs, operating_point, pair_scores
from retrieval.metrics.edc import edc
from retrieval.metrics.identification import identification_by_stratum
from retrieval.metrics.rules import accepts, allowed_false_positives
from retrieval.metrics.verification import det_curve, rates_by_stratum
from retrieval.probabilistic import mutual_likelihood, mutual_likelihood_of_pairs
from retrieval.templates import Pooling, TemplateSamples, pool_templates
from tests.numerics.test_protocol_vectors import VECTORS
from tests.unit.retrieval.test_extraction import Faces, MeanEmbedder


def test_a_hundred_millionth_above_the_top_impostor_is_nothing_in_single_precision() -> None:
    impostor = np.array([0.1, 0.75], np.float32)
    point = operating_point(impostor, 0.01, rule="pfe_int")
    assert point.threshold > 0.75
    assert accepts(impostor, point).tolist() == [False, True]  # the top impostor is accepted all the same
    assert point.realised == 0.5
    assert operating_point(impostor, 0.01).realised == 0  # the canonical rule lets nobody through


def test_the_number_of_allowed_false_positives_is_exact() -> None:
    assert (allowed_false_positives(30, 0.1), int(0.29 * 100), allowed_false_positives(100, 0.29)) == (3, 28, 29)
    for rate in ("1e-6", "1e-5", "1e-4", "1e-3", "0.01", "0.1", "0.3"):
        for count in (8_000_000, 15_638_932, 3000, 733, 30):
            assert allowed_false_positives(count, float(rate)) == int(Fraction(rate) * count)


def test_whole_floor_half_even_and_ceiling_are_four_rules() -> None:
    negatives = np.arange(10) / 10
    chosen = {rule: operating_point(negatives, 0.25, rule=rule) for rule in ("canonical", "pfe_int", "pfe_round")}
    assert {rule: round(10 * point.realised) for rule, point in chosen.items()} == {
        "canonical": 2,
        "pfe_int": 2,
        "pfe_round": 2,  # 2.5 goes to the even 2
    }
    assert round(10 * operating_point(negatives, 0.35, rule="pfe_round").realised) == 4
    assert round(10 * operating_point(negatives, 0.25, rule="ijb_evals").realised) == 1  # one false alarm fewer


def test_lengths_of_embeddings_change_no_score() -> None:
    generator = np.random.default_rng(0)
    rows, ids = generator.normal(size=(30, 16)).astype(np.float32), generator.integers(0, 9, 30)
    scales = generator.uniform(0.1, 40, (30, 1)).astype(np.float32)
    plain, scaled = EmbeddingSet(rows, ids), EmbeddingSet(rows * scales, ids)
    first, second = generator.integers(0, 30, (2, 50))
    np.testing.assert_allclose(pair_scores(plain, first, second), pair_scores(scaled, first, second), atol=1e-6)
    ranks = [evaluate_identification([s.take(np.arange(15))], s, fpirs=(0.1,)).ranks for s in (plain, scaled)]
    assert ranks[0] == ranks[1]


def test_rows_of_a_template_may_stand_anywhere_in_the_list() -> None:
    generator = np.random.default_rng(1)
    template, media = np.repeat(np.arange(4), 5), np.tile([1, 1, 2, 2, 3], 4)
    rows = generator.normal(size=(20, 8)).astype(np.float32)
    pooled = []
    for order in (np.arange(20), generator.permutation(20)):
        samples = TemplateSamples(np.arange(20)[order], template[order], media[order], np.arange(4), np.arange(4))
        stream = samples.stream_order()
        found = EmbeddingSet(rows[order], np.zeros(20, int))
        chunks = [(part, found.take(part)) for part in np.array_split(stream, 3)]
        pooled.append(pool_templates(samples, chunks, Pooling()).embeddings)
    np.testing.assert_allclose(pooled[0], pooled[1], atol=1e-6)


def test_tv9_raw_vectors_of_both_views_are_added() -> None:
    v = VECTORS["TV9"]
    views = [np.array(v[name][:2]) * v[name][2] for name in ("f", "flip")]

    class TwoViews(MeanEmbedder):
        def embed(self, images: np.ndarray) -> np.ndarray:
            is_flipped = images[:, 0, -1, 0] > images[:, 0, 0, 0]
            return np.where(is_flipped[:, None], views[1], views[0]).astype(np.float32)

    found = embed_face_set(TwoViews(), Faces(["a"]), flip="sum").embeddings.embeddings[0]
    x, y, norm = v["pre_norm_vector_add"]
    np.testing.assert_allclose(found, np.array([x, y]) * norm, rtol=1e-6)


def test_the_fast_discard_curve_equals_leaving_out_level_by_level() -> None:
    generator = np.random.default_rng(2)
    for _ in range(300):
        count = int(generator.integers(1, 30))
        scores, quality = generator.random(count), generator.integers(0, 6, count)
        levels = [quality >= level for level in np.unique(quality)]
        expected = [(1 - kept.mean(), (scores[kept] <= 0.5).mean()) for kept in levels]
        np.testing.assert_allclose(edc(scores, quality, threshold=0.5), expected, atol=1e-12)


def test_strata_share_the_threshold_of_the_whole() -> None:
    generator = np.random.default_rng(3)
    gallery = EmbeddingSet(generator.normal(size=(20, 6)).astype(np.float32), np.arange(20))
    ids = generator.integers(0, 40, 300)
    centres = np.vstack([gallery.embeddings, generator.normal(size=(20, 6))])
    probes = EmbeddingSet((centres[ids] + 0.8 * generator.normal(size=(300, 6))).astype(np.float32), ids)
    result = evaluate_identification([gallery], probes, fpirs=(0.1,), candidates=3)
    strata = generator.integers(0, 3, 300)
    found = identification_by_stratum(result, strata)
    threshold, search = result.open_set[0].point.threshold, result.searches[0]
    for one in found:
        own = strata == one.stratum
        mated, others = own & search.is_mated, own & ~search.is_mated
        hits = (search.best > threshold) & (search.rank <= 1)
        assert one.tpir[0][0] == pytest.approx(hits[mated].mean())
        listed = (search.best > threshold) & (search.rank <= 3)
        assert one.tpir_rank_l[0][0] == pytest.approx(listed[mated].mean())
        assert one.fpir[0][0] == pytest.approx((search.best[others] > threshold).mean())
        assert one.ranks[0][1] == pytest.approx((search.rank[mated] <= 1).mean())
    whole = sum(one.tpir[0][0] * one.num_mated for one in found) / result.num_mated
    assert whole == pytest.approx(result.open_set[0].tpir)
    assert any(one.tpir_rank_l != one.tpir for one in found)


def test_rates_by_stratum_add_up() -> None:
    generator = np.random.default_rng(4)
    scores, codes = generator.random(200).astype(np.float32), generator.integers(0, 3, 200)
    point = operating_point(scores, 0.3)
    found = rates_by_stratum(scores, codes, ["x", "y", "z", "nobody"], point)
    assert [name for name, *_ in found] == ["x", "y", "z"]
    assert sum(total * share for _, total, share, _ in found) == pytest.approx(accepts(scores, point).sum())


def test_thresholds_of_the_det_curve_give_its_rates() -> None:
    generator = np.random.default_rng(5)
    genuine, impostor = generator.normal(1, 1, 100), generator.normal(0, 1, 900)
    for fmr, fnmr, threshold in zip(*det_curve(genuine, impostor, points=30), strict=True):
        at = -np.inf if threshold is None else threshold
        assert fmr == pytest.approx((impostor > at).mean())
        assert fnmr == pytest.approx((genuine <= at).mean())


@pytest.mark.parametrize("width", [1, 5])
def test_mutual_likelihood_of_pairs_searches_and_the_whole_agree(width: int) -> None:
    generator = np.random.default_rng(6)
    rows, ids = generator.normal(size=(12, 5)).astype(np.float32), np.arange(12) // 2
    variances = generator.uniform(0.1, 1, (12, width)).astype(np.float32)
    faces = EmbeddingSet(rows, ids, variances=variances, fte=np.arange(12) == 3)
    first, second = (side.reshape(-1) for side in np.indices((12, 12)))
    scores = pair_scores(faces, first, second, similarity="mls").reshape(12, 12)
    unit = faces.unit()
    everything = mutual_likelihood((unit, variances), (unit, variances))
    known = np.arange(12) != 3
    np.testing.assert_allclose(scores[np.ix_(known, known)], everything[np.ix_(known, known)], rtol=1e-4, atol=1e-5)
    assert np.isneginf(scores[3]).all()
    one = mutual_likelihood_of_pairs((unit[:1], variances[:1]), (unit[1:2], variances[1:2]))[0]
    total = np.broadcast_to(variances[0].astype(float) + variances[1], 5)
    assert one == pytest.approx(-0.5 * ((unit[0] - unit[1]) ** 2 / total + np.log(total)).sum(), rel=1e-5)
    result = evaluate_identification([faces], faces, similarity="mls", fpirs=())
    best = [max(scores[i, j] for j in range(12) if ids[j] == ids[i]) for i in range(12)]
    np.testing.assert_allclose(result.searches[0].best, best, rtol=1e-4)


def test_a_sure_sample_outweighs_an_unsure_one_when_templates_are_fused_by_precision() -> None:
    rows = np.array([[3, 0], [0, 2]], np.float32)
    samples = TemplateSamples(np.arange(2), np.zeros(2, int), np.arange(2), np.array([7]), np.array([1]))
    variances = np.array([[0.1], [0.9]], np.float32)
    found = EmbeddingSet(rows, np.zeros(2, int), variances=variances)
    fused = pool_templates(samples, [(np.arange(2), found)], Pooling.parse("PFE"))
    np.testing.assert_allclose(fused.embeddings[0], [0.9, 0.1], atol=1e-6)
    np.testing.assert_allclose(fused.variances[0], [0.09, 0.09], atol=1e-6)


def test_wilson_stands_in_where_nobody_is_known_by_name() -> None:
    scores = np.array([0.9, 0.8, 0.1, 0.2], np.float32)
    result = evaluate_pairs(scores, np.array([True, True, False, False]), fars=(0.5,))
    assert result.points[0].interval.method == "wilson"
