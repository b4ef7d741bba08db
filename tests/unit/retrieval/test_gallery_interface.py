"""What every gallery promises, on both implementations, against float64 brute force."""

from collections.abc import Iterator
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest

from aroface.contract import InputContract
from aroface.errors import DataError, ShapeError
from retrieval.embeddings import EmbeddingSet
from retrieval.gallery import FaceGallery, Gallery, MilvusGallery, segments
from tests.helpers.drawn_vectors import drawn, exact_cosines
from tests.helpers.milvus_places import milvus_place

Array = np.ndarray[Any, Any]
RGB, BGR = (InputContract(image_size=112, colour_order=order) for order in ("rgb", "bgr"))
DIM = 16


class Maker(Protocol):
    def __call__(self, embeddings: Array, subjects: Any, names: Any = None, **more: Any) -> FaceGallery: ...


@pytest.fixture(params=["directory", "small segments", "milvus lite", "milvus server"])
def make(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Maker]:
    where, _, kind = request.param.partition(" ")
    if where == "small":
        monkeypatch.setattr(segments, "SEGMENT_ROWS", 16)
    made: list[FaceGallery] = []
    with milvus_place(kind, tmp_path) if where == "milvus" else nullcontext() as place:

        def maker(embeddings: Array, subjects: Any, names: Any = None, **more: Any) -> FaceGallery:
            if place:
                more |= {"collection": place.collection}
                made.append(MilvusGallery.build(place.uri, embeddings, subjects, names, **more))
            else:
                made.append(Gallery.build(tmp_path / "g", embeddings, subjects, names, **more))
            return made[-1]

        yield maker
        for gallery in made:
            gallery.close()


def _order(scores: Array) -> list[int]:
    return sorted(range(len(scores)), key=lambda row: (-scores[row], row))


def test_entries_subjects_and_templates_equal_brute_force(make: Maker) -> None:
    enrolled = np.tile(drawn(30), (2, 1))  # every vector twice: ties everywhere
    subjects = [f"s{row % 9}" for row in range(60)]
    gallery = make(enrolled, subjects, [f"e{row}" for row in range(60)])
    probes = np.concatenate([enrolled[:3], drawn(5, seed=1)])
    by_entry, by_subject, pooled = (gallery.search(probes, top=7, level=level) for level in LEVELS)
    templates = np.stack([enrolled[[s == f"s{i}" for s in subjects]].sum(axis=0) for i in range(9)])
    for place, probe in enumerate(probes):
        scores = exact_cosines(enrolled, probe)
        assert [(c.entry_id, c.score) for c in by_entry[place]] == [(f"e{r}", scores[r]) for r in _order(scores)[:7]]
        best: dict[str, float] = {}
        for row in _order(scores):
            best.setdefault(subjects[row], scores[row])
        assert [(c.subject_id, c.score) for c in by_subject[place]] == list(best.items())[:7]
        expected = exact_cosines(templates, probe)
        assert [c.subject_id for c in pooled[place]] == [f"s{i}" for i in _order(expected)[:7]]
        np.testing.assert_allclose([c.score for c in pooled[place]], sorted(expected)[::-1][:7], atol=1e-6)
        assert [c.rank for c in by_entry[place]] == [c.rank for c in pooled[place]] == list(range(1, 8))


LEVELS = ("entry", "subject", "pooled")


def test_one_by_one_equals_together(make: Maker) -> None:
    gallery = make(drawn(50), np.arange(50))
    probes = drawn(6, seed=3)
    assert gallery.search(probes, top=5) == [gallery.search(probe, top=5)[0] for probe in probes]


def test_ranges_hold_all_above_the_threshold_and_nothing_else(make: Maker) -> None:
    enrolled = drawn(80)
    gallery = make(enrolled, np.arange(80) // 4)
    for probe in drawn(4, seed=5):
        scores = exact_cosines(enrolled, probe)
        for threshold in (-2.0, 0.0, 0.2, float(np.sort(scores)[-5]), 2.0):
            expected = [str(row) for row in _order(scores) if scores[row] > threshold]
            assert [c.entry_id for c in gallery.search_range(probe, threshold=threshold)[0]] == expected
            assert [c.entry_id for c in gallery.search(probe, top=3, threshold=threshold)[0]] == expected[:3]


def test_templates_of_probes(make: Maker) -> None:
    enrolled = drawn(40)
    gallery = make(enrolled, np.arange(40) % 10)
    probes, templates = drawn(6, seed=6), np.array(["b", "a", "b", "a", "b", "c"])
    pooled = gallery.search_templates(probes, templates, top=4)
    best = gallery.search_templates(probes, templates, top=4, fusion="best", level="entry")
    assert list(pooled) == list(best) == ["b", "a", "c"]
    for name in "abc":
        own = probes[templates == name]
        fused = gallery.search(own.astype(np.float64).sum(axis=0), top=4, level="subject")[0]
        assert [c.subject_id for c in pooled[name]] == [c.subject_id for c in fused]
        np.testing.assert_allclose([c.score for c in pooled[name]], [c.score for c in fused], atol=1e-6)
        scores = np.max([exact_cosines(enrolled, probe) for probe in own], axis=0)
        assert [(int(c.entry_id), c.score) for c in best[name]] == [(r, scores[r]) for r in _order(scores)[:4]]
        assert [c.rank for c in best[name]] == [1, 2, 3, 4]


def test_the_best_of_several_probes_names_a_subject_once(make: Maker) -> None:
    enrolled, subjects = drawn(40), np.arange(40) % 10
    gallery = make(enrolled, subjects)
    probes, templates = drawn(6, seed=6), np.array(["b", "a", "b", "a", "b", "c"])
    by_subject = gallery.search_templates(probes, templates, top=7, fusion="best", level="subject")
    pooled = gallery.search_templates(probes, templates, top=7, fusion="best", level="pooled")
    sums = np.stack([enrolled[subjects == s].astype(np.float64).sum(axis=0) for s in range(10)])
    for name in "abc":
        own = probes[templates == name]
        scores = np.max([exact_cosines(enrolled, probe) for probe in own], axis=0)
        order = list(dict.fromkeys(row % 10 for row in _order(scores)))[:7]
        best_rows = [max(range(s, 40, 10), key=lambda row: scores[row]) for s in order]
        assert [(c.rank, c.subject_id, int(c.entry_id), c.score) for c in by_subject[name]] == [
            (rank, str(row % 10), row, scores[row]) for rank, row in enumerate(best_rows, start=1)
        ]
        of_sums = np.max([exact_cosines(sums.astype(np.float32), probe) for probe in own], axis=0)
        assert [c.subject_id for c in pooled[name]] == [str(s) for s in _order(of_sums)[:7]]


def test_changes(make: Maker) -> None:
    vectors = drawn(30)
    gallery = make(vectors[:20], np.arange(20) // 2, [f"e{i}" for i in range(20)], model_id="m1", contract=RGB)
    gallery = gallery.add(vectors[20:], np.arange(20, 30) // 2, [f"e{i}" for i in range(20, 30)], model_id="m1")
    gallery = gallery.remove(entry_ids=["e0", "e25"], subject_ids=["3"])
    gallery = gallery.add(vectors[[1, 0]], ["1000", "1001"], ["e10", "new"], upsert=True)
    left = [i for i in range(30) if i not in (0, 25, 6, 7, 10)]
    assert len(gallery) == gallery.info.count == len(left) + 2
    found = gallery.search(vectors[1], top=40)[0]
    assert {c.entry_id for c in found} == {f"e{i}" for i in left} | {"e10", "new"}
    assert [(c.entry_id, c.subject_id) for c in found[:2]] == [("e1", "0"), ("e10", "1000")]  # the older one first
    assert gallery.has_subjects(["3", "1001", "0"]).tolist() == [False, True, True]
    assert (gallery.info.model_id, gallery.info.contract) == ("m1", RGB)


def test_free_names_are_new(make: Maker) -> None:
    gallery = make(drawn(3), ["a", "b", "c"], ["3", "x", "0"])
    gallery = gallery.add(drawn(2, seed=1), ["d", "e"])
    assert len({c.entry_id for c in gallery.search(drawn(1), top=9)[0]}) == 5


def test_bad_input_is_refused_and_changes_nothing(make: Maker) -> None:
    gallery = make(drawn(4), list("abcd"), list("wxyz"), model_id="m1", contract=RGB)
    nan = drawn(2)
    nan[1, 3] = np.nan
    refusals: list[tuple[Any, str]] = [
        (lambda: gallery.search(drawn(1)[:, :8], top=1), "have 8 dimensions, the gallery has 16"),
        (lambda: gallery.add(drawn(1)[:, :8], ["e"]), "have 8 dimensions, the gallery has 16"),
        (lambda: gallery.add(nan, ["e", "f"]), "Rows 1 of the embeddings have no direction"),
        (lambda: gallery.search(nan, top=1), "Rows 1 of the embeddings have no direction"),
        (lambda: gallery.add(drawn(1), ["e"], ["z"]), "Entry ids z are enrolled already.*--upsert"),
        (
            lambda: gallery.add(drawn(2), ["e", "f"], ["q", "q"]),
            "Entry ids q occur more than once in the input",
        ),
        (
            lambda: gallery.add(drawn(3), ["e", "f", "g"], ["q", "q", "z"]),
            "Entry ids q occur more than once in",
        ),
        (
            lambda: gallery.add(drawn(2), ["e", "f"], ["q", "q"], upsert=True),
            "Entry ids q occur more than once",
        ),
        (lambda: gallery.search(drawn(1), top=1, model_id="m2"), "model m1; these are of m2"),
        (lambda: gallery.add(drawn(1), ["e"], ["q"], contract=BGR), "embed both with the same one"),
        (lambda: gallery.remove(subject_ids=["a", "nobody"]), "has no subject nobody"),
        (lambda: gallery.remove(entry_ids=["w", "nothing"]), "has no entry nothing"),
        (lambda: gallery.search(drawn(1), top=0), "at least 1 entry"),
        (lambda: gallery.search_templates(drawn(2), ["t"], top=1), "one for each is needed"),
    ]
    for call, message in refusals:
        with pytest.raises(DataError, match=message):
            call()
    with pytest.raises(ShapeError, match="one for each is needed"):
        gallery.add(drawn(2), ["e"])
    with pytest.raises(ShapeError, match="float"):
        gallery.search(np.ones((1, DIM), np.int64), top=1)
    with pytest.raises(DataError, match="exists already"):
        make(drawn(1), ["a"])
    assert {c.entry_id for c in gallery.search(drawn(1), top=9)[0]} == set("wxyz")


def test_ids_may_be_any_text(make: Maker) -> None:
    odd = ['"', "'", "\\", "a b", "名前", "%", "x in [1]", "\t"]
    gallery = make(drawn(8), odd, odd)
    assert gallery.has_subjects(odd).all()
    for name in odd:
        gallery = gallery.remove(subject_ids=[name]) if odd.index(name) % 2 else gallery.remove(entry_ids=[name])
    assert len(gallery) == 0
    with pytest.raises(DataError, match="is empty; enrol someone"):
        gallery.search(drawn(1), top=1)


def test_calibrated_thresholds_keep_their_promise(make: Maker) -> None:
    enrolled = drawn(40)
    gallery = make(enrolled, np.arange(40))
    strangers, mates = drawn(400, seed=8), enrolled + drawn(40, seed=9) / 4
    zero = np.zeros((1, DIM), np.float32)
    probes = EmbeddingSet(
        np.concatenate([strangers, mates, zero]), np.concatenate([np.arange(1000, 1400), np.arange(40), [2000]])
    )
    gallery = gallery.calibrate(probes, [0.1, 0.01])
    tops = np.array([exact_cosines(enrolled, probe).max() for probe in strangers])
    for point, k in zip(gallery.info.calibration, (4, 40), strict=True):
        assert (point.k, point.non_mated, point.mated, point.count) == (k, 401, 40, 40)
        assert point.threshold == np.sort(tops)[::-1][k]  # no interpolation: the largest score that is not accepted
        assert point.realised == (tops > point.threshold).sum() / 401 == k / 401
        assert point.is_supported == (k >= 30)
        hits = sum(
            exact_cosines(enrolled, mate).argmax() == row and exact_cosines(enrolled, mate).max() > point.threshold
            for row, mate in enumerate(mates)
        )
        assert point.tpir == hits / 40
    strict, loose = (point.threshold for point in gallery.info.calibration)
    for level in ("entry", "subject"):
        rates = [gallery.fpir_of(s, level) for s in (strict + 1e-3, strict, loose + 1e-3, loose)]
        assert rates == [0.01, 0.1, 0.1, None]
    assert gallery.fpir_of(1.0, "pooled") is None
    with pytest.raises(DataError, match="outside"):
        gallery.calibrate(probes, [1.0])
    with pytest.raises(DataError, match="Add faces of other people"):
        gallery.calibrate(probes.take(np.arange(400, 440)), [0.1])
    assert gallery.add(drawn(1), ["new"]).info.calibration == gallery.info.calibration


@pytest.mark.parametrize("seed", [0, 1])
def test_failed_probes_stay_in_the_counts(make: Maker, seed: int) -> None:
    """Strangers among them raise no alarm, mates are misses; thresholds by counting alarms at every score."""
    enrolled, subjects = drawn(30, seed=seed), np.arange(30) % 10
    gallery = make(enrolled, subjects)
    noise = drawn(350, seed=seed + 20)
    values = np.concatenate([noise[:300], np.tile(enrolled, (2, 1))[:50] + noise[300:] / 3]).astype(np.float32)
    who = np.concatenate([np.arange(1000, 1300), np.tile(subjects, 2)[:50]])
    is_mate, draw = who < 1000, np.random.default_rng(seed)
    is_marked, is_zero = draw.random(350) < 0.2, draw.random(350) < 0.1
    values[is_zero] = 0
    has_failed = is_marked | is_zero
    gallery = gallery.calibrate(EmbeddingSet(values, who, fte=is_marked), [0.02, 0.3])

    best = [
        None if failed else exact_cosines(enrolled, probe) for probe, failed in zip(values, has_failed, strict=True)
    ]
    for point, rate in zip(gallery.info.calibration, (Fraction(2, 100), Fraction(3, 10)), strict=True):

        def alarms(threshold: float) -> int:
            return sum(scores is not None and scores.max() > threshold for scores in best[:300])

        allowed = [s.max() for s in best[:300] if s is not None and Fraction(alarms(s.max()), 300) <= rate]
        assert point.threshold == min(allowed)  # the lowest that keeps the rate
        assert (point.k, point.non_mated, point.mated) == (int(rate * 300), 300, 50)
        assert point.realised == alarms(point.threshold) / 300
        found = [
            scores is not None and scores.max() > point.threshold and subjects[scores.argmax()] == own
            for scores, own in zip(best[300:], who[300:], strict=True)
        ]
        assert point.tpir == sum(found) / 50
        assert point.doubts(30) == (["not supported: 6 false alarms allowed, 30 needed"] if point.k < 30 else [])
    assert has_failed[is_mate].any()
    assert has_failed[~is_mate].any()


def test_a_rate_that_allows_more_alarms_than_there_are_scores_is_refused(make: Maker) -> None:
    gallery = make(drawn(5), np.arange(5))
    values, who = drawn(10, seed=3), np.arange(100, 110)
    values[:8] = 0
    assert gallery.calibrate(EmbeddingSet(values, who), [0.15]).info.calibration[0].k == 1
    with pytest.raises(DataError, match=r"allows 2 false alarms in 10 .* only 2 of them found anybody.*lower rate"):
        gallery.calibrate(EmbeddingSet(values, who), [0.2])
    with pytest.raises(DataError, match="only 0 of them found anybody"):
        gallery.calibrate(EmbeddingSet(np.zeros_like(values), who), [0.1])


def test_a_threshold_holds_at_the_level_that_it_was_found_at(make: Maker) -> None:
    enrolled = np.repeat(drawn(30), 4, axis=0) + drawn(120, seed=1)
    gallery = make(enrolled, np.arange(120) // 4)
    strangers = EmbeddingSet(drawn(50, seed=8), np.arange(1000, 1050))
    for level in LEVELS:
        gallery = gallery.calibrate(strangers, [0.1], level=level)
        for other in LEVELS:
            alarms = [near[0].score for near in gallery.search(strangers.embeddings, top=1, level=other)]
            rate = np.mean([gallery.fpir_of(score, other) is not None for score in alarms])
            assert rate == (0.1 if (level == "pooled") == (other == "pooled") else 0.0)
            assert bool(gallery.calibration_at(other)) == bool(rate)
