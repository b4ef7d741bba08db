"""More metrics against plain loops: precision, people drawn again, compat rules, means of galleries, discard areas."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from retrieval.curves import discard
from retrieval.embeddings import EmbeddingSet
from retrieval.metrics import evaluate_identification, evaluate_pairs, operating_point
from retrieval.metrics.intervals import percentile_interval, resampled_tar, resampled_weights
from retrieval.metrics.rules import PAIR_RULES, accepts
from retrieval.metrics.search import rank_scores
from retrieval.results import identification_record
from retrieval.templates import Pooling, TemplateSamples, pool_templates
from tests.numerics.test_metrics_brute_force import canonical_threshold, random_sets

ROOT = Path(__file__).parents[2]


def precision_by_walking(scores, is_mate):
    """Trapezoids of TinyFace along a list that puts rivals before mates of an equal score; failed mates are missed."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], is_mate[i]))
    found, area, before = 0, 0.0, 1.0
    for place, index in enumerate(order, 1):
        if scores[index] == -math.inf:
            break
        found += bool(is_mate[index])
        if is_mate[index]:
            area += (before + found / place) / 2
        before = found / place
    return area / sum(is_mate)


def test_average_precision_equals_walking_down_the_list():
    generator = np.random.default_rng(23)
    tied = 0
    for _ in range(500):
        probes, gallery = generator.integers(0, 4, 4), generator.integers(0, 4, generator.integers(1, 9))
        scores = (generator.integers(-2, 3, (4, len(gallery))) / 2).astype(np.float32)
        scores[generator.random(4) < 0.15] = -np.inf
        scores[:, generator.random(len(gallery)) < 0.15] = -np.inf
        search = rank_scores(scores, gallery, probes, with_average_precision=True)
        for row in np.flatnonzero(search.is_mated):
            is_mate = gallery == probes[row]
            expected = precision_by_walking(scores[row].tolist(), is_mate.tolist())
            assert search.average_precision[row] == pytest.approx(expected)
            tied += bool(set(scores[row, is_mate]) & set(scores[row, ~is_mate]))
    assert tied > 200


@pytest.mark.parametrize("galleries", [1, 2])
def test_intervals_of_open_set_rates_are_those_of_people_drawn_again_in_plain_loops(galleries):
    generator = np.random.default_rng(29)
    centres = generator.normal(size=(20, 5))
    ids = np.repeat(np.arange(20), 3)
    probes = EmbeddingSet((centres[ids] + 0.9 * generator.normal(size=(60, 5))).astype(np.float32), ids)
    parts = [np.arange(0, 7), np.arange(7, 15)][:galleries]
    sets = [EmbeddingSet(centres[own].astype(np.float32), own) for own in parts]
    rate, listed, resamples = 0.2, 3, 60
    result = evaluate_identification(sets, probes, fpirs=(rate,), candidates=listed, resamples=resamples)
    drawn = []
    for weight in resampled_weights(20, resamples).astype(int):
        copies = np.repeat(np.arange(60), weight[ids])  # a person drawn twice brings every probe twice
        rates = []
        for search in result.searches:
            is_mated, best, rank = search.is_mated[copies], search.best[copies], search.rank[copies]
            hits = is_mated & (best > canonical_threshold(best[~is_mated].tolist(), rate))
            rates.append([(hits & (rank <= limit)).sum() / is_mated.sum() for limit in (1, listed)])
        drawn.append(np.mean(rates, axis=0))
    point = result.open_set[0]
    for column, interval in enumerate((point.interval, point.interval_rank_l)):
        expected = np.percentile(np.array(drawn)[:, column], [2.5, 97.5])
        assert (interval.low, interval.high) == pytest.approx(tuple(expected), abs=1e-6)
    assert point.interval.low < point.interval.high


def test_a_resample_without_the_person_of_the_highest_scores_looks_further_down():
    generator = np.random.default_rng(31)
    count, rates = 9000, (0.01, 0.3)
    first = np.where(np.arange(count) < 5000, 0, generator.integers(1, 6, count))  # the top 5,000 are person 0's
    second = generator.integers(6, 12, count)
    impostor = np.where(first == 0, 1, 0) + generator.random(count)
    genuine, people = 2 * generator.random(40), generator.integers(0, 12, 40)
    found = resampled_tar(genuine, people, impostor, (first, second), rates, resamples=12)
    weights = resampled_weights(12, 12).astype(int)
    assert (weights[:, 0] == 0).any()
    for row, weight in zip(found, weights, strict=True):
        others = np.repeat(impostor, weight[first] * weight[second]).tolist()
        own = np.repeat(genuine, weight[people])
        assert row == pytest.approx([(own > canonical_threshold(others, rate)).mean() for rate in rates])


def test_rates_of_merged_galleries_count_impostor_pairs_per_probe():
    generator, compared = np.random.default_rng(37), 0
    for _ in range(200):
        gallery, probes = random_sets(generator)
        rate = float(generator.choice([0.1, 0.34, 0.6]))
        point = evaluate_identification([gallery], probes, fpirs=(rate,), rule="ijb_1n").open_set[0]
        scores = (probes.unit() @ gallery.unit().T).astype(np.float32)
        known = probes.enrolled[:, None] & gallery.enrolled[None, :]
        same = probes.subject_ids[:, None] == gallery.subject_ids[None, :]
        others = sorted(np.where(known, scores, -np.inf)[~same].tolist(), reverse=True)
        best = [np.where(k, s, -np.inf)[m].max() for s, k, m in zip(scores, known, same, strict=True) if m.any()]
        if not best or not others:
            continue
        threshold = others[min(max(math.ceil(rate * len(probes)) - 1, 0), len(others) - 1)]
        assert point.tpir == sum(score > threshold for score in best) / len(best)
        compared += 1
    assert compared > 100


def test_a_rate_that_rounds_to_nobody_wants_more_than_a_hundred_thousandth_above_the_top():
    point = operating_point(np.array([0.1, 0.5]), 0.2, rule="pfe_round")
    assert point.threshold == pytest.approx(0.50001, abs=1e-9)
    assert accepts(np.array([0.500005, 0.50002]), point).tolist() == [False, True]
    assert operating_point(np.array([0.1, 0.5]), 0.2, rule="pfe_int").threshold == pytest.approx(0.5 + 1e-8, abs=1e-12)


def test_the_record_of_two_galleries_holds_their_means():
    generator = np.random.default_rng(41)
    centres = generator.normal(size=(16, 4))
    ids = generator.integers(0, 16, 90)
    probes = EmbeddingSet((centres[ids] + 0.7 * generator.normal(size=(90, 4))).astype(np.float32), ids)
    sets = [EmbeddingSet(centres[own].astype(np.float32), own) for own in (np.arange(5), np.arange(5, 16))]
    result = evaluate_identification(sets, probes, fpirs=(0.15,), ranks=(1,))
    entry = identification_record(result, fpir_labels=["0.15"])["metrics"]["tpir@fpir=0.15"]
    alone = [
        identification_record(evaluate_identification([one], probes, fpirs=(0.15,)), fpir_labels=["0.15"])
        for one in sets
    ]
    parts = [record["metrics"]["tpir@fpir=0.15"] for record in alone]
    assert parts[0]["value"] != parts[1]["value"]
    assert parts[0]["realised"] != parts[1]["realised"]
    for name in ("value", "value_rank_l", "value_enrolled_only", "realised"):
        assert entry[name] == pytest.approx((parts[0][name] + parts[1][name]) / 2)
    assert entry["k"] == min(part["k"] for part in parts)
    assert entry["threshold"] is None
    assert [part["threshold"] for part in entry["galleries"]] == [part["threshold"] for part in parts]


def test_the_quality_of_a_template_is_the_mean_of_its_usable_samples():
    rows = np.array([[3, 4], [0, 1], [0, 0], [6, 8]], np.float32)
    samples = TemplateSamples(np.arange(4), np.array([0, 0, 0, 1]), np.arange(4), np.arange(2), np.arange(2))
    found = pool_templates(samples, [(np.arange(4), EmbeddingSet(rows, np.zeros(4, int)))], Pooling())
    assert found.quality.tolist() == [3.0, 10.0]  # norms 5 and 1; the zero vector failed


def test_the_area_of_the_discard_curve_is_its_mean_over_the_stretch():
    genuine = np.array([0.1, 0.9, 0.2, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9], np.float32)
    impostor = np.full(100, 0.5, np.float32)
    curve = discard(genuine, np.arange(10), impostor)
    assert curve["far"] == 0.1  # the threshold is 0.5: pairs 0 and 2 are errors
    assert not curve["supported"]
    assert curve["area"]["0.2"] == pytest.approx((2 / 10 + 1 / 9) / 2)
    assert curve["area"]["0.3"] == pytest.approx((2 / 10 + 1 / 9 + 1 / 8) / 3)


@pytest.mark.parametrize("level", ["entry", "identity"])
def test_order_changes_neither_precision_nor_ranks_of_entries_and_people(level):
    generator = np.random.default_rng(43)
    for _ in range(200):
        gallery, probes = random_sets(generator)
        order = generator.permutation(len(probes))
        shuffled = gallery.take(generator.permutation(len(gallery))), probes.take(order)
        one, other = (
            evaluate_identification([g], p, fpirs=(), rank_level=level, with_average_precision=True)
            for g, p in ((gallery, probes), shuffled)
        )
        assert [value for _, value, _ in one.ranks] == [value for _, value, _ in other.ranks]
        before, after = (result.searches[0].average_precision for result in (one, other))
        np.testing.assert_array_equal(before[order], after)


def test_order_of_pairs_changes_neither_rates_nor_the_discard_curve():
    generator = np.random.default_rng(47)
    for _ in range(200):
        scores = (generator.integers(0, 8, 60) / 8).astype(np.float32)
        scores[generator.random(60) < 0.1] = -np.inf
        same, quality = generator.random(60) < 0.5, generator.integers(0, 4, 60)
        order = generator.permutation(60)
        found = []
        for rows in (np.arange(60), order):
            own, is_same = scores[rows], same[rows]
            result = evaluate_pairs(own, is_same, fars=(0.05, 0.3), resamples=0)
            found.append(
                (
                    [(p.tar, p.tar_enrolled, p.point) for p in result.points],
                    (result.accuracy, result.accuracy_threshold),
                    discard(own[is_same], quality[rows][is_same], own[~is_same]),
                )
            )
        assert found[0] == found[1]


def test_the_rule_of_reversed_argsort_scores_failures_as_zero_and_the_last_column_wins():
    gallery = EmbeddingSet(np.array([[-1, 0.5], [0, 0], [0, 0]], np.float32), np.array([0, 1, 2]))
    probes = EmbeddingSet(np.array([[1, 0], [0, 0], [0, 0], [0, 0]], np.float32), np.array([0, 2, 1, 9]))
    result = evaluate_identification([gallery], probes, ranks=(1,), fpirs=(1.0,), rule="argsort_rev")
    search = result.searches[0]
    # Probe 0: two failed entries with 0 stand above its mate's negative score. Probes 1 and 2 failed: 0 everywhere.
    assert search.rank[:3].tolist() == [3, 1, 2]
    assert search.best[1:].tolist() == [0, 0, 0]  # the stranger that failed is a false alarm at the threshold 0
    assert result.open_set[0].point.realised == 1
    assert result.open_set[0].tpir == pytest.approx(1 / 3)
    assert result.enrolled_ranks == ((1, None),)
    canonical = evaluate_identification([gallery], probes, ranks=(1,), fpirs=(1.0,)).searches[0]
    assert canonical.rank[:3].tolist() == [1, np.inf, np.inf]


def test_the_metrics_need_neither_torch_nor_scipy():
    code = "import sys, retrieval.metrics; print([m for m in ('torch', 'scipy', 'matplotlib') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("rule", PAIR_RULES)
def test_a_pair_that_could_not_be_compared_is_never_a_hit(rule):
    scores = np.array([0.9, -math.inf, 0.5, -math.inf], np.float32)
    result = evaluate_pairs(scores, np.array([True, True, False, False]), fars=[1.0], rule=rule)
    assert result.points[0].tar == 0.5


def test_one_subject_alone_has_no_interval():
    values = np.full(50, 0.22)
    assert percentile_interval(values, subjects=1) is None
    assert percentile_interval(values, subjects=2) is not None
