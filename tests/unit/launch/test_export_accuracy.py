"""The rates of the accuracy gate, against plain loops."""

import numpy as np
import pytest

from aroface.errors import ConfigError, DataError
from launch.export_accuracy import measure_rates
from retrieval.embeddings import EmbeddingSet


def drawn(people: int, images: int, *, noise: float, seed: int = 0) -> EmbeddingSet:
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(people, 16))
    subjects = np.repeat(np.arange(people), images)
    values = centres[subjects] + noise * generator.normal(size=(len(subjects), 16))
    order = generator.permutation(len(subjects))
    keys = np.array([f"{subject:03d}/{number}" for number, subject in enumerate(subjects)])
    names = np.array([f"{subject:03d}" for subject in subjects])
    return EmbeddingSet(values.astype(np.float32)[order], names[order], keys=keys[order])


def test_rank_1_is_what_a_loop_finds() -> None:
    faces = drawn(30, 4, noise=0.8)
    first = {subject: min(faces.keys[faces.subject_ids == subject]) for subject in set(faces.subject_ids)}
    unit = faces.unit()
    gallery = [row for row in range(len(faces)) if faces.keys[row] in first.values()]
    hits = searches = 0
    for row in set(range(len(faces))) - set(gallery):
        best = max(gallery, key=lambda entry: unit[entry] @ unit[row])
        searches += 1
        hits += faces.subject_ids[best] == faces.subject_ids[row]
    rates = measure_rates(faces, far=0.01, fpir=0.1)
    assert list(rates) == ["rank_1", "tar@far=0.01", "tpir@fpir=0.1"]
    assert rates["rank_1"] == hits / searches
    assert 0 < rates["rank_1"] < 1


def test_perfect_embeddings_reach_everything_and_noise_nothing() -> None:
    assert set(measure_rates(drawn(30, 4, noise=1e-3), far=0.001, fpir=0.05).values()) == {1.0}
    assert max(measure_rates(drawn(60, 4, noise=1e3), far=0.001, fpir=0.02).values()) < 0.15


def test_half_of_the_identities_are_strangers() -> None:
    """Of 30 identities 15 are, with 45 images beside their first; a rate below 1 in 45 allows no false alarm."""
    faces = drawn(30, 4, noise=0.5)
    measure_rates(faces, far=0.01, fpir=1 / 44)
    with pytest.raises(ConfigError, match=r"--fpir 0\.0217391 does not exist .* name a larger set"):
        measure_rates(faces, far=0.01, fpir=1 / 46)
    with pytest.raises(ConfigError, match="--far 1e-06 does not exist"):
        measure_rates(faces, far=1e-6, fpir=0.1)


def test_a_waived_rate_that_does_not_exist_is_left_out() -> None:
    faces = drawn(30, 4, noise=0.5)
    whole = measure_rates(faces, far=0.01, fpir=0.1, waived=("tar", "tpir"))
    assert whole == measure_rates(faces, far=0.01, fpir=0.1)
    assert measure_rates(faces, far=0.01, fpir=1 / 46, waived=["tpir"]) == {
        name: rate for name, rate in whole.items() if not name.startswith("tpir")
    }
    assert list(measure_rates(faces, far=1e-6, fpir=1 / 46, waived=["tar", "tpir"])) == ["rank_1"]
    with pytest.raises(ConfigError, match="--far 1e-06 does not exist .* or waive it .--max-tar-drop 1."):
        measure_rates(faces, far=1e-6, fpir=1 / 46, waived=["tpir"])


def test_a_rate_on_few_false_accepts_is_said_to_be_unsteady(caplog: pytest.LogCaptureFixture) -> None:
    measure_rates(drawn(30, 4, noise=0.5), far=0.01, fpir=0.1)
    assert "--fpir 0.1 rests on 4 false accepts" in caplog.text
    assert "--far" not in caplog.text


def test_the_order_of_the_set_does_not_matter_for_rank_1_and_tpir() -> None:
    faces = drawn(30, 4, noise=0.8)
    shuffled = faces.take(np.random.default_rng(3).permutation(len(faces)))
    one, two = (measure_rates(each, far=0.01, fpir=0.1) for each in (faces, shuffled))
    assert (one["rank_1"], one["tpir@fpir=0.1"]) == (two["rank_1"], two["tpir@fpir=0.1"])


@pytest.mark.parametrize(("people", "images"), [(1, 5), (8, 1)])
def test_sets_without_pairs_are_refused(people: int, images: int) -> None:
    with pytest.raises(DataError, match="two identities at least, and several images of each"):
        measure_rates(drawn(people, images, noise=0.1), far=0.1, fpir=0.1)
