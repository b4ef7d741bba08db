"""The fast metrics against plain loops written from the protocol text, on many small cases full of ties."""

import math

import numpy as np
import pytest

from retrieval.embeddings import EmbeddingSet
from retrieval.metrics import evaluate_identification, evaluate_pairs, operating_point, search_gallery
from retrieval.metrics.rules import accepts
from retrieval.metrics.search import rank_scores

CASES = 1000


def canonical_threshold(negatives, rate):
    ordered = sorted(negatives, reverse=True)
    k = math.floor(rate * len(ordered) + 1e-9)
    return -math.inf if k >= len(ordered) else ordered[k]


def brute_search(scores, gallery, probes, level):
    """(mated, best, rank, optimistic rank) per probe, by definition."""
    rows = []
    for row, subject in zip(scores, probes, strict=True):
        mates = [s for s, g in zip(row, gallery, strict=True) if g == subject]
        if subject not in gallery:
            rows.append((False, max(row), None, None))
            continue
        best = max(mates)
        if best == -math.inf:
            rows.append((True, best, math.inf, math.inf))
            continue
        rivals = {}
        for index, (score, name) in enumerate(zip(row, gallery, strict=True)):
            if name != subject:
                key = index if level == "entry" else name
                rivals[key] = max(score, rivals.get(key, -math.inf))
        rank = 1 + sum(score >= best for score in rivals.values())
        optimistic = 1 + sum(score > best for score in rivals.values())
        rows.append((True, best, rank, optimistic))
    return rows


@pytest.mark.parametrize("level", ["entry", "identity"])
def test_ranks_equal_brute_force_on_tie_heavy_cases(level):
    generator = np.random.default_rng(7)
    for _ in range(CASES):
        probes = generator.integers(0, 5, generator.integers(1, 7))
        gallery = generator.integers(0, 5, generator.integers(1, 8))
        scores = (generator.integers(-2, 3, (len(probes), len(gallery))) / 2).astype(np.float32)
        scores[generator.random(len(probes)) < 0.15] = -np.inf
        scores[:, generator.random(len(gallery)) < 0.15] = -np.inf
        search = rank_scores(scores, gallery, probes, rank_level=level)
        for index, (mated, best, rank, optimistic) in enumerate(brute_search(scores, gallery, probes, level)):
            assert search.is_mated[index] == mated
            assert search.best[index] == best
            if mated:
                assert (search.rank[index], search.optimistic_rank[index]) == (rank, optimistic)


def test_canonical_threshold_equals_the_best_roc_point():
    generator = np.random.default_rng(11)
    for _ in range(CASES):
        genuine = generator.integers(0, 8, generator.integers(1, 12)) / 4
        impostor = generator.integers(0, 8, generator.integers(1, 15)) / 4
        rate = float(generator.choice([0.01, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0]))
        point = operating_point(impostor, rate)
        assert point.threshold == canonical_threshold(impostor, rate)
        assert point.realised <= rate + 1e-9
        candidates = [*np.concatenate([genuine, impostor]), -math.inf]
        reachable = [(genuine > t).mean() for t in candidates if (impostor > t).mean() <= rate + 1e-9]
        assert accepts(genuine, point).mean() == max(reachable)


def random_sets(generator, dim=4):
    """Gallery and probes drawn from a few directions, so that equal scores are common."""
    directions = generator.normal(size=(6, dim))

    def make(count):
        rows = directions[generator.integers(0, 6, count)].astype(np.float32)
        rows[generator.random(count) < 0.1] = 0
        return EmbeddingSet(rows, generator.integers(0, 6, count), fte=generator.random(count) < 0.1)

    return make(int(generator.integers(2, 15))), make(int(generator.integers(2, 15)))


def summary(result):
    open_set = [(p.tpir, p.tpir_rank_l, p.point and (p.point.threshold, p.point.realised)) for p in result.open_set]
    return [(k, v) for k, v, _ in result.ranks], result.num_tied, open_set


def test_order_of_probes_and_gallery_changes_nothing():
    generator = np.random.default_rng(3)
    for _ in range(200):
        gallery, probes = random_sets(generator)
        shuffled = gallery.take(generator.permutation(len(gallery))), probes.take(generator.permutation(len(probes)))
        before = evaluate_identification([gallery], probes, fpirs=(0.1, 0.5))
        after = evaluate_identification([shuffled[0]], shuffled[1], fpirs=(0.1, 0.5))
        assert summary(before) == summary(after)


def test_equal_gallery_entries_rank_last():
    gallery = EmbeddingSet(np.ones((50, 8), np.float32), np.arange(50))
    probes = EmbeddingSet(np.ones((3, 8), np.float32), np.array([0, 20, 49]))
    search = search_gallery(gallery, probes)
    assert search.rank.tolist() == [50, 50, 50]
    assert search.optimistic_rank.tolist() == [1, 1, 1]


def test_equal_vectors_tie_wherever_they_stand_in_a_large_gallery():
    generator = np.random.default_rng(5)
    vector = generator.normal(size=512).astype(np.float32)
    rows = generator.normal(size=(1001, 512)).astype(np.float32)
    copies = [0, 1, 7, 500, 999, 1000]
    rows[copies] = vector
    search = search_gallery(EmbeddingSet(rows, np.arange(1001)), EmbeddingSet(vector[None] * 3, np.array([500])))
    assert search.rank[0] == len(copies)


def test_gallery_with_one_entry():
    gallery = EmbeddingSet(np.array([[1.0, 0.0]], np.float32), np.array(["A"]))
    probes = EmbeddingSet(np.array([[1.0, 1.0], [0.0, 1.0]], np.float32), np.array(["A", "B"]))
    result = evaluate_identification([gallery], probes, ranks=(1,), fpirs=(1.0,))
    assert result.ranks[0][1] == 1.0
    assert result.open_set[0].tpir == 1.0


def test_failures_count_as_the_protocol_says():
    scores = np.array([0.9, -np.inf, 0.2, -np.inf], np.float32)
    result = evaluate_pairs(scores, np.array([True, True, False, False]), fars=(0.5,))
    assert result.points[0].tar == 0.5  # the failed genuine pair is a false reject
    assert result.points[0].point.realised == 0.5  # the failed impostor pair is a true reject
    assert result.num_failed == 2
    assert result.points[0].tar_enrolled == 1.0


def test_rates_of_enrolled_pairs_are_those_of_a_list_without_failures():
    generator = np.random.default_rng(19)
    differ = 0
    for _ in range(200):
        scores = (generator.integers(0, 8, 30) / 8).astype(np.float32)
        scores[generator.random(30) < 0.3] = -np.inf
        same = generator.random(30) < 0.4
        fars = (0.05, 0.2, 0.5)
        whole = evaluate_pairs(scores, same, fars=fars, resamples=0)
        known = np.isfinite(scores)
        rest = evaluate_pairs(scores[known], same[known], fars=fars, resamples=0)
        assert [p.tar_enrolled for p in whole.points] == [p.tar for p in rest.points]
        assert [p.is_extrapolated for p in rest.points] == [math.floor(f * rest.num_impostor + 1e-9) < 1 for f in fars]
        differ += any(p.tar != p.tar_enrolled for p in whole.points)
    assert differ > 100


def test_bootstrap_interval_covers_the_value_and_shrinks_with_more_subjects():
    widths = []
    for subjects in (40, 400):
        generator = np.random.default_rng(subjects)
        centres = generator.normal(size=(subjects, 16))
        rows = (np.repeat(centres, 3, 0) + 1.1 * generator.normal(size=(3 * subjects, 16))).astype(np.float32)
        ids = np.repeat(np.arange(subjects), 3)
        first = generator.integers(0, len(ids), 20 * subjects)
        second = np.where(
            generator.random(len(first)) < 0.3, first // 3 * 3, generator.integers(0, len(ids), len(first))
        )
        from retrieval.metrics import evaluate_verification

        result = evaluate_verification(
            EmbeddingSet(rows, ids), (first, second, ids[first] == ids[second]), fars=(0.05,), resamples=300
        )
        point = result.points[0]
        assert point.interval.low <= point.tar <= point.interval.high
        widths.append(point.interval.high - point.interval.low)
    assert widths[1] < widths[0]


def test_open_set_rates_equal_plain_loops_with_ties_and_failures():
    generator = np.random.default_rng(17)
    compared = 0
    for _ in range(CASES):
        gallery, probes = random_sets(generator)
        rate, listed = float(generator.choice([0.1, 0.25, 0.5])), int(generator.integers(1, 4))
        result = evaluate_identification([gallery], probes, ranks=(listed,), fpirs=(rate,), candidates=listed)
        point = result.open_set[0]
        scores = (probes.unit() @ gallery.unit().T).astype(np.float32)
        scores[~probes.enrolled] = -np.inf
        scores[:, ~gallery.enrolled] = -np.inf
        rows = brute_search(scores, gallery.subject_ids.tolist(), probes.subject_ids.tolist(), "entry")
        mated, strangers = [row for row in rows if row[0]], [row[1] for row in rows if not row[0]]
        enrolled = [row[2] for row in mated if row[1] > -np.inf]
        share = sum(rank <= listed for rank in enrolled) / len(enrolled) if enrolled else None
        assert result.enrolled_ranks == ((listed, share),)
        if not mated or not strangers:
            assert point.tpir is None
            continue
        threshold = canonical_threshold(strangers, rate)
        hits = [rank for _, best, rank, _ in mated if best > threshold]
        assert point.tpir == sum(rank <= 1 for rank in hits) / len(mated)
        assert point.tpir_rank_l == sum(rank <= listed for rank in hits) / len(mated)
        assert point.point.realised == sum(score > threshold for score in strangers) / len(strangers)
        assert point.is_extrapolated == (math.floor(rate * len(strangers) + 1e-9) == 0)
        mated, strangers = [row for row in mated if row[1] > -np.inf], [s for s in strangers if s > -np.inf]
        if not mated or not strangers:
            assert point.tpir_enrolled is None
            continue
        threshold = canonical_threshold(strangers, rate)
        assert point.tpir_enrolled == sum(row[1] > threshold and row[2] <= 1 for row in mated) / len(mated)
        compared += 1
    assert compared > CASES / 4
