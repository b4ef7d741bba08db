"""Strict YAML and typed settings."""

import pytest

from aroface.config import TrainConfig, apply_overrides, parse_config
from aroface.config.load import load_config, read_yaml
from aroface.errors import ConfigError
from tests.helpers.checkpoints import tiny_config


def values():
    return tiny_config().model_dump(mode="json")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-4", 1e-4),
        ("1.0e4", 1e4),
        ("5", 5),
        (".5", 0.5),
        ("-3.", -3.0),
        ("010", "010"),
        ("12:30:00", "12:30:00"),
        ("off", "off"),
        ("yes", "yes"),
        ("true", True),
        ("null", None),
        ("2026-01-01", "2026-01-01"),
    ],
)
def test_scalars_are_what_they_look_like(text, expected):
    found = read_yaml(f"value: {text}", name="x")["value"]
    assert found == expected
    assert type(found) is type(expected)


def test_duplicate_keys_and_broken_yaml_are_refused():
    with pytest.raises(ConfigError, match="the key 'a' stands twice"):
        read_yaml("a: 1\na: 2", name="x.yaml")
    with pytest.raises(ConfigError, match="x.yaml is not valid YAML"):
        read_yaml("a: [1", name="x.yaml")
    for text in (
        "a: !!python/object/apply:os.system [ls]",
        "shards: {{DATA}}",  # a template that nobody filled in
        "? [a]\n: 1",
        "seed: !!int abc",
        "[" * 5000,
    ):
        with pytest.raises(ConfigError, match="x.yaml is not valid YAML"):
            read_yaml(text, name="x.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("head.marginn=0.5", "head.marginn is not a setting; did you mean head.margin?"),
        ("optm.momentum=0.5", "optm is not a setting; did you mean optim?"),
        ("data.augment.flp=0.5", "data.augment.flp is not a setting; did you mean data.augment.flip?"),
        ("model.depth=51", "model.depth = 51: input should be 18, 34, 50, 100 or 200."),
        ("head.margin=2", "head.margin = 2: input should be less than or equal to 1.57."),
        ("head.kind=foo", "head.kind = 'foo' is unknown; choose from 'arcface', 'cosface', 'combined', 'adaface',"),
        ("model.kind=resnet", "model.kind = 'resnet' is unknown; choose from 'iresnet', 'ir', 'mobilefacenet', 'vit'."),
        ("batch.global_batch=010", "batch.global_batch = '010': input should be a valid integer."),
        ("schedule.warmup_epochs=3", "leaves nothing of schedule.epochs"),
    ],
)
def test_wrong_settings_are_named(override, message):
    with pytest.raises(ConfigError) as error:
        parse_config(apply_overrides(values(), [override]), TrainConfig, name="run.yaml")
    assert message in str(error.value)


def test_all_errors_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        parse_config(apply_overrides(values(), ["seed=-1", "optim.momentum=2"]), TrainConfig, name="run.yaml")
    assert "seed = -1" in str(error.value)
    assert "optim.momentum = 2" in str(error.value)


def test_overrides_of_another_form_are_refused():
    with pytest.raises(ConfigError, match=r"not of the form key\.path=value"):
        apply_overrides(values(), ["seed"])
    with pytest.raises(ConfigError, match="seed is a value"):
        apply_overrides(values(), ["seed.x=1"])


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(ValueError, match="frozen"):
        tiny_config().seed = 3


def test_missing_file_and_wrong_kind_of_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.yaml", TrainConfig)
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="holds list, not settings"):
        load_config(tmp_path / "list.yaml", TrainConfig)
