"""Pooling, flip fusion and uncertainty against their definitions, whatever the pieces they come in."""

import json

import numpy as np
import pytest

from aroface.errors import ConfigError
from retrieval.embeddings import EmbeddingSet
from retrieval.metrics import evaluate_identification, evaluate_pairs, kfold_accuracy
from retrieval.metrics.intervals import resampled_tar, resampled_weights, wilson
from retrieval.metrics.rules import RULES, accepts, operating_point, operating_points
from retrieval.metrics.search import rank_scores
from retrieval.metrics.verification import area_under_roc, best_accuracy, pair_scores
from retrieval.probabilistic import mutual_likelihood, precision_weighted
from retrieval.results import verification_record
from retrieval.templates import Pooling, TemplateSums
from tests.numerics.test_protocol_vectors import VECTORS


def pooled(template, media, values, code="N1D0", *, media_level=True, cuts=(), **more):
    pooling = Pooling.parse(code, media=media_level)
    sums = TemplateSums(int(max(template)) + 1, values.shape[1], pooling)
    for part in np.split(np.arange(len(template)), cuts):
        own = {key: None if value is None else value[part] for key, value in more.items()}
        sums.add(template[part], media[part], values[part], **own)
    return sums.finish()


@pytest.mark.parametrize("code", ["N1D1F1", "N0D1F1", "N1D0F1"])
def test_tv4(code):
    v = VECTORS["TV4"]
    both = np.array(v["emb"], np.float32) + np.array(v["flip"], np.float32)
    media = np.array(v["media"])
    features, enrolled = pooled(
        np.zeros(len(media), int), media, both, code[:4], det_scores=np.array(v["det"], np.float32)
    )
    np.testing.assert_allclose(features[0], v[code], atol=1e-6)
    assert enrolled.all()


def test_tv8_frames_are_averaged_with_their_norm_or_without():
    v = VECTORS["TV8"]
    frames, zeros = np.array(v["frames"], np.float32), np.zeros(2, int)
    raw, _ = pooled(zeros, np.arange(2), frames, "N1D0", media_level=False)
    alike, _ = pooled(zeros, np.arange(2), frames, "N0D0", media_level=False)
    np.testing.assert_allclose(raw[0], v["raw_mean"], atol=1e-6)
    np.testing.assert_allclose(alike[0], v["unit_mean"], atol=1e-4)


def test_tv8_reversed_argsort_lets_the_last_column_win():
    scores = np.zeros((1, 3), np.float32)
    for mate in range(3):
        ranks = rank_scores(scores, np.arange(3), np.array([mate]), ties="last_column").rank
        assert ranks[0] == 1 + VECTORS["TV8"]["zero_probe_legacy_order"].index(mate)
        assert rank_scores(scores, np.arange(3), np.array([mate])).rank[0] == 3


def test_pooling_equals_plain_loops_in_any_pieces():
    generator = np.random.default_rng(2)
    for _ in range(100):
        count = int(generator.integers(1, 40))
        template = np.sort(generator.integers(0, 5, count))
        media = generator.integers(0, 3, count)
        order = np.lexsort((media, template))
        template, media = template[order], media[order]
        values = generator.normal(size=(count, 6)).astype(np.float32)
        values[generator.random(count) < 0.1] = 0
        usable = generator.random(count) < 0.8
        det = generator.uniform(0.1, 1, count).astype(np.float32)
        cuts = np.sort(generator.integers(0, count + 1, 3))
        features, enrolled = pooled(template, media, values, "N0D1", cuts=cuts, usable=usable, det_scores=det)
        for number in range(int(template.max()) + 1):
            total = np.zeros(6)
            for medium in set(media[template == number].tolist()):
                rows = np.flatnonzero((template == number) & (media == medium) & usable & values.any(1))
                if len(rows):
                    parts = [det[r] * values[r].astype(float) / np.linalg.norm(values[r].astype(float)) for r in rows]
                    total += np.mean(parts, axis=0)
            assert enrolled[number] == (np.linalg.norm(total) > 0)
            expected = total / np.linalg.norm(total) if enrolled[number] else total
            np.testing.assert_allclose(features[number], expected, atol=1e-6)


def test_one_media_in_two_templates_counts_in_each_of_them():
    values = np.array([[1, 0], [0, 1], [3, 0]], np.float32)
    features, _ = pooled(np.array([0, 1, 1]), np.array([7, 7, 7]), values)
    np.testing.assert_allclose(features, [[1, 0], [3 / np.sqrt(10), 1 / np.sqrt(10)]], atol=1e-6)


def test_a_quality_replaces_the_norm():
    values = np.array([[2, 0], [0, 5]], np.float32)
    features, _ = pooled(np.zeros(2, int), np.arange(2), values, quality=np.array([3.0, 4.0]))
    np.testing.assert_allclose(features[0], [0.6, 0.8], atol=1e-6)


def test_detector_weights_without_scores_are_refused():
    with pytest.raises(ConfigError, match="choose D0"):
        pooled(np.zeros(1, int), np.zeros(1, int), np.ones((1, 2), np.float32), "N1D1")
    with pytest.raises(ConfigError, match="N2D0"):
        Pooling.parse("N2D0")


def test_precision_weighted_fusion_and_mutual_likelihood():
    generator = np.random.default_rng(4)
    means = generator.normal(size=(6, 3)).astype(np.float32)
    variances = generator.uniform(0.2, 2, (6, 3)).astype(np.float32)
    owner = np.array([0, 0, 1, 1, 1, 3])
    fused, spread = precision_weighted(means, variances, owner, num_templates=4)
    for template in (0, 1, 3):
        own = owner == template
        np.testing.assert_allclose(spread[template], 1 / (1 / variances[own]).sum(0), rtol=1e-5)
        np.testing.assert_allclose(
            fused[template], (means[own] / variances[own]).sum(0) * spread[template], rtol=1e-4, atol=1e-6
        )
    scores = mutual_likelihood((fused, spread), (fused[:2], spread[:2]))
    assert np.isneginf(scores[2]).all()  # template 2 has no samples
    v = spread[0].astype(float) + spread[1]
    expected = -0.5 * ((fused[0].astype(float) - fused[1]) ** 2 / v + np.log(v)).sum()
    assert scores[0, 1] == pytest.approx(expected, rel=1e-5)


def test_scattered_and_crowded_pairs_score_alike():
    generator = np.random.default_rng(6)
    faces = EmbeddingSet(generator.normal(size=(400, 16)).astype(np.float32), np.arange(400), fte=np.arange(400) == 7)
    first, second = generator.integers(0, 400, (2, 9000))  # dense: by blocks
    crowded = pair_scores(faces, first, second)
    few = np.concatenate([pair_scores(faces, first[i : i + 1], second[i : i + 1]) for i in range(200)])
    scattered = pair_scores(faces, first[:300], second[:300])  # too few for blocks
    np.testing.assert_array_equal(crowded[:200], few)
    np.testing.assert_array_equal(crowded[:300], scattered)
    assert np.isneginf(crowded[(first == 7) | (second == 7)]).all()


def test_best_accuracy_and_area_equal_brute_force():
    generator, accepted = np.random.default_rng(8), 0
    for trial in range(1000):
        genuine = (generator.integers(-2, 6, generator.integers(1, 9)) / 4).astype(np.float32)
        impostor = (generator.integers(-4, 4, generator.integers(1, 9)) / 4).astype(np.float32)
        if trial % 4 == 0:  # comparisons that could not be made
            genuine[generator.random(len(genuine)) < 0.2] = -np.inf
            impostor[generator.random(len(impostor)) < 0.2] = -np.inf
        thresholds = np.append(np.unique(np.concatenate([genuine, impostor])), -np.inf)
        shares = [((genuine > t).sum() + (impostor <= t).sum()) / (len(genuine) + len(impostor)) for t in thresholds]
        best, threshold = best_accuracy(genuine, impostor)
        assert (best, threshold) == (max(shares), thresholds[int(np.argmax(shares))])
        accepted += threshold == -np.inf
        pairs = (genuine[:, None] > impostor) + 0.5 * (genuine[:, None] == impostor)
        assert area_under_roc(genuine, impostor) == pytest.approx(pairs.mean())
    assert 10 < accepted < 500


def test_a_best_threshold_that_accepts_everything_is_a_record_too():
    scores = np.array([0.2, 0.4, 0.5, 0.6, 0.9], np.float32)  # one impostor, above all genuine pairs
    result = evaluate_pairs(scores, np.array([True] * 4 + [False]), fars=(0.5,), resamples=0)
    assert (result.accuracy, result.accuracy_threshold) == (0.8, -np.inf)
    entry = json.loads(json.dumps(verification_record(result, far_labels=["0.5"]), allow_nan=False))["metrics"]
    assert (entry["accuracy"]["value"], entry["accuracy"]["threshold"]) == (0.8, None)


@pytest.mark.parametrize("rule", ["canonical", "nearest", "pfe_int", "pfe_round", "ijb_evals"])
def test_many_rates_at_once_equal_one_by_one(rule):
    generator = np.random.default_rng(9)
    for _ in range(200):
        genuine, impostor = ((generator.integers(0, 9, generator.integers(2, 30)) / 8).astype("f4") for _ in range(2))
        rates = [0.05, 0.2, 0.5]
        for rate, point in zip(rates, operating_points(impostor, rates, rule=rule, positives=genuine), strict=True):
            assert point == operating_point(impostor, rate, rule=rule, positives=genuine)
            assert point.realised == accepts(impostor, point).mean()


def test_every_rule_searches():
    generator = np.random.default_rng(12)
    gallery = [EmbeddingSet(generator.normal(size=(9, 8)).astype("f4"), np.arange(9) + 9 * g) for g in range(2)]
    probes = EmbeddingSet(generator.normal(size=(40, 8)).astype("f4"), generator.integers(0, 18, 40))
    for rule in RULES:
        result = evaluate_identification(gallery, probes, fpirs=(0.1, 0.5), rule=rule)
        assert [0 <= point.tpir <= 1 for point in result.open_set] == [True, True]


def test_tv6_pseudo_tpir_of_the_merged_gallery():
    v = VECTORS["TV6"]
    names, people = np.array(v["g1"] + v["g2"]), np.array(v["probes"])
    products = 0.5 * np.hstack([v["S1"], v["S2"]])  # halved, so that the entries below can have length 1
    own_axis = np.diagflat(np.sqrt(1 - (products**2).sum(0)))
    entries = np.vstack([products, own_axis]).T.astype(np.float32)  # their products with the axes are the scores
    galleries = [EmbeddingSet(entries[:2], names[:2]), EmbeddingSet(entries[2:], names[2:])]
    probes = EmbeddingSet(np.eye(len(people), entries.shape[1], dtype=np.float32), people)
    result = evaluate_identification(galleries, probes, fpirs=(0.34,), rule="ijb_1n")
    assert result.open_set[0].tpir == v["ijb_1n_rule"]
    assert result.ranks[0][1] == v["rank1_concatenated"]


def test_resampled_rates_equal_plain_loops():
    generator = np.random.default_rng(13)
    subjects, pairs = 12, 400
    first, second = generator.integers(0, subjects, (2, pairs))
    scores = (generator.integers(0, 20, pairs) / 20 + 0.3 * (first == second)).astype(np.float32)
    same = first == second
    values = resampled_tar(
        scores[same], first[same], scores[~same], (first[~same], second[~same]), [0.05, 0.3], resamples=40
    )
    for row, weight in zip(values, resampled_weights(subjects, 40), strict=True):
        genuine = np.repeat(scores[same], weight[first[same]].astype(int))
        impostor = np.repeat(scores[~same], (weight[first[~same]] * weight[second[~same]]).astype(int))
        for value, rate in zip(row, [0.05, 0.3], strict=True):
            assert value == pytest.approx(accepts(genuine, operating_point(impostor, rate)).mean())


def test_resampled_search_holds_the_value_and_needs_people_not_probes():
    generator = np.random.default_rng(14)
    centres = generator.normal(size=(30, 12))
    gallery = EmbeddingSet(centres[:20].astype("f4"), np.arange(20))
    widths = []
    for copies in (2, 40):  # more probes of the same 30 people are no new people
        ids = np.repeat(np.arange(30), copies)
        shift = np.repeat(1.2 * generator.normal(size=(30, 12)), copies, 0)
        probes = EmbeddingSet((centres[ids] + shift).astype("f4"), ids)
        point = evaluate_identification([gallery], probes, fpirs=(0.2,), resamples=200)
        (_, value, interval), *_ = point.ranks
        assert interval.low <= value <= interval.high
        assert point.open_set[0].interval.low <= point.open_set[0].tpir <= point.open_set[0].interval.high
        widths.append(interval.high - interval.low)
    assert widths[1] == pytest.approx(widths[0], rel=0.3)


def test_a_blind_bootstrap_tells_what_the_number_of_people_allows():
    centres = np.eye(10, dtype=np.float32)
    gallery, ids = EmbeddingSet(centres, np.arange(10)), np.arange(10).repeat(50)
    result = evaluate_identification([gallery], EmbeddingSet(centres[ids], ids), resamples=50)
    _, value, interval = result.ranks[0]
    assert (value, interval.method) == (1.0, "wilson over 10 subjects")
    assert interval.low == pytest.approx(wilson(10, 10).low)


def test_folds_and_pairs_without_a_kind():
    result = evaluate_pairs(np.array([0.3, 0.9], np.float32), np.array([True, True]), fars=(0.1,))
    assert (result.points[0].tar, result.points[0].reason) == (None, "no impostor pairs")
    found = kfold_accuracy(np.array([0.1, 0.9] * 20), np.array([True, False] * 20))
    assert (found.mean, found.std) == (1.0, 0.0)
