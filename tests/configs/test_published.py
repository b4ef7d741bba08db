"""configs/published: one complete file for every cell of data x head x alignment, whose header says what is known."""

import re
from pathlib import Path

import pytest
import yaml

from aroface.config import TrainConfig, load_config

FOLDER = Path(__file__).parents[2] / "configs" / "published"
FILES = sorted(FOLDER.glob("*.yaml"))

#: name of the data, images, identities, epochs, from the configurations of the release
DATA = {
    "ms1mv2": ("MS1MV2", 5_822_653, 85_742, 28),
    "ms1mv3": ("MS1MV3", 5_179_510, 93_431, 20),
    "wf4m": ("WebFace4M", 4_235_242, 205_990, 20),
    "wf12m": ("WebFace12M", 12_720_066, 617_970, 20),
}
#: rows of the README of the ARoFace release: TinyFace Rank-1 and Rank-5
TINYFACE = {
    "ms1mv2_r100_arcface_aroface": ("67.32", "72.45"),
    "ms1mv3_r100_arcface": ("63.81", "68.80"),
    "ms1mv3_r100_arcface_aroface": ("67.54", "71.05"),
    "wf4m_r100_adaface": ("72.02", "74.52"),
    "wf4m_r100_adaface_aroface": ("73.98", "76.47"),
    "wf12m_r100_adaface": ("72.29", "74.97"),
    "wf12m_r100_adaface_aroface": ("74.00", "76.87"),
}
#: IJB-S Rank-1, Rank-5 and TPIR of surveillance to single, to booking, to surveillance
IJB_S = {
    "ms1mv2_r100_arcface": ("57.35/64.42/41.85", "57.36/64.95/41.23"),
    "ms1mv2_r100_arcface_aroface": ("61.65/67.6/47.87", "60.66/67.33/46.34", "18.31/32.07/2.23"),
    "wf4m_r100_arcface": ("69.26/74.31/57.06", "70.31/75.15/56.89", "32.13/46.67/5.32"),
    "wf4m_r100_arcface_aroface": ("70.96/75.54/58.67", "71.70/75.24/58.06", "32.95/50.30/6.81"),
    "wf12m_r100_adaface": ("71.35/76.24/59.40", "71.93/76.56/59.37", "36.71/50.03/4.62"),
    "wf12m_r100_adaface_aroface": ("72.28/77.93/61.43", "73.01/79.11/60.02", "40.51/50.90/6.37"),
}
#: What other projects publish of the same data, head and network, where those tables have no cell
ELSEWHERE = {
    "ms1mv2_r100_adaface": (
        *("AdaFace README", "68.21", "71.54"),
        *("65.26/70.53/51.66", "66.27/71.61/50.87", "23.74/37.47/2.50"),
    ),
    "wf4m_r100_adaface": ("AdaFace README", "70.42/75.29/58.27", "70.93/76.11/58.02", "35.05/48.22/4.96"),
    "wf4m_r100_arcface": ("AdaFace paper", "71.11", "CVLface", "71.03", "74.41"),
}
NAME = re.compile(r"(ms1mv2|ms1mv3|wf4m|wf12m)_r100_(arcface|adaface)(_aroface)?")
published = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def header(path: Path) -> str:
    lines = path.read_text().splitlines()
    return "\n".join(line for line in lines if line.startswith("#"))


def test_every_cell_has_a_file():
    cells = {f"{d}_r100_{h}{a}" for d in DATA for h in ("arcface", "adaface") for a in ("", "_aroface")}
    assert {path.stem for path in FILES} == cells
    assert TINYFACE.keys() | IJB_S.keys() <= cells


@published
def test_the_settings_are_what_the_name_says(path):
    data, head, attack = NAME.fullmatch(path.stem).groups()
    config = load_config(path, TrainConfig)
    assert (config.model.kind, config.model.depth, config.model.width, config.model.image_size) == (
        "iresnet",
        100,
        1.0,
        112,
    )
    assert config.head.kind == head
    assert config.head.margin == {"arcface": 0.5, "adaface": 0.4}[head]
    assert config.alignment.kind == ("adversarial" if attack else "none")
    if attack:
        assert (config.alignment.share, config.alignment.steps) == (0.25, 1)
    assert config.schedule.epochs == DATA[data][3]


@published
def test_the_rate_is_derived_from_the_batch(path):
    config = load_config(path, TrainConfig)
    assert config.batch.global_batch == 2048
    assert config.peak_lr == pytest.approx(0.1 * config.batch.global_batch / 1024)
    halved = load_config(path, TrainConfig, ["batch.global_batch=1024"])
    assert halved.peak_lr == pytest.approx(config.peak_lr / 2)
    assert "lr" not in yaml.safe_load(path.read_text())["optim"]


@published
def test_the_header_names_row_values_hardware_and_state(path):
    data, head, attack = NAME.fullmatch(path.stem).groups()
    text, name = header(path), path.stem
    title, images, identities, _ = DATA[data]
    method = {"arcface": "ArcFace", "adaface": "AdaFace"}[head] + ("+ARoFace" if attack else "")
    assert f"{images:,} images of {identities:,} identities" in text
    assert f"{method} on {title}" in text
    assert "Not yet run here." in text
    assert "RTX 6000 Ada" in text
    assert f"configs/published/{path.name}" in text
    expected = [*TINYFACE.get(name, ()), *IJB_S.get(name, ())]
    assert [value for value in expected if value not in text] == []
    assert [value for value in ELSEWHERE.get(name, ()) if value not in text] == []
    numbers = re.findall(r"\d+\.\d\d(?=[ ,./])", "\n".join(re.findall(r"# Expected:.*(?:\n#   .*)*", text)))
    assert len(numbers) >= len(expected) if expected else "completes the grid" in text


@published
def test_where_table_and_release_disagree_the_header_says_which_is_followed(path):
    text = header(path)
    assert "global batch 2048 as the README says; the release's configs say 128 x 4 = 512" in text
    if path.stem.startswith("wf"):
        assert "is CosFace (m3 = 0.4)" in text
    if path.stem == "wf12m_r100_adaface_aroface":
        assert "The TinyFace cell says WebFace4M" in text


@published
def test_nothing_that_changes_the_result_is_left_to_a_default(path):
    written = yaml.safe_load(path.read_text())
    decisive = {
        "model": {"depth", "embedding_dim", "image_size", "width", "dropout"},
        "head": {"logit_scale", "margin", "margin_gradient", "sample_rate", "interclass_filter", "logit_precision"},
        "batch": {"global_batch", "micro_batch"},
        "optim": {"lr_per_1024", "momentum", "weight_decay", "clip_norm"},
        "schedule": {"epochs", "warmup_epochs", "power"},
        "engine": {"precision"},
        "data": {"colour_order", "augment", "min_images_per_identity", "max_bad_samples"},
    }
    if written["head"]["kind"] == "adaface":
        decisive["head"] |= {"h", "statistics_momentum"}
    else:
        decisive["head"] |= {"continuation"}
        assert written["head"]["continuation"] == "plain"  # the release's losses.py: cos(theta + m) under no_grad
    if written["alignment"]["kind"] != "none":
        steps = {f"{name}_step{unit}" for name, unit in (("scale", ""), ("angle", "_rad"), ("shift", ""))}
        boxes = {f"{name}_box{unit}" for name, unit in (("scale", ""), ("angle", "_rad"), ("shift", ""))}
        others = {"share", "steps", "start_noise", "landmark_budget_px", "batch_statistics"}
        decisive["alignment"] = others | steps | boxes
    assert [(key, name) for key, names in decisive.items() for name in names if name not in written[key]] == []


@pytest.mark.parametrize("head", ["arcface", "adaface"])
@pytest.mark.parametrize("data", DATA)
def test_the_two_files_of_a_pair_differ_in_the_alignment_alone(data, head):
    without, with_it = (
        yaml.safe_load((FOLDER / f"{data}_r100_{head}{suffix}.yaml").read_text()) for suffix in ("", "_aroface")
    )
    assert without.pop("alignment") == {"kind": "none"}
    with_it.pop("alignment")
    assert without == with_it
