"""`engine.precision: auto`, and what bf16 means where a processor has no units for it."""

import logging

import pytest
import torch

from aroface import bf16
from aroface.config.load import read_yaml
from aroface.engine import precision
from aroface.engine.precision import with_precision
from aroface.errors import CheckpointError
from aroface.heads import products
from tests.helpers.training import config_of, train

CPU = torch.device("cpu")


def decided(monkeypatch, setting, *, has_units, others_lack=False):
    for module in (precision, bf16):
        monkeypatch.setattr(module, "has_bf16_units", lambda device_type: has_units)
    monkeypatch.setattr(precision, "any_rank", lambda condition: condition or others_lack)
    return with_precision(config_of(f"engine.precision={setting}"), CPU).engine.decided_precision


def test_auto_is_bf16_where_every_rank_has_units_for_it(monkeypatch):
    assert decided(monkeypatch, "auto", has_units=True) == "bf16"
    assert decided(monkeypatch, "auto", has_units=False) == "fp32"
    assert decided(monkeypatch, "auto", has_units=True, others_lack=True) == "fp32"


@pytest.mark.parametrize("setting", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("has_units", [True, False])
def test_what_is_asked_for_is_kept_with_a_warning_where_it_is_slow(monkeypatch, caplog, setting, has_units):
    assert decided(monkeypatch, setting, has_units=has_units) == setting
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert bool(warnings) is (setting == "bf16" and not has_units)
    assert all("Set engine.precision: auto or fp32" in record.getMessage() for record in warnings)


def test_nothing_trains_before_it_is_decided():
    with pytest.raises(ValueError, match="still auto"):
        _ = config_of("engine.precision=auto").engine.decided_precision


def test_a_run_records_what_it_trains_in_and_goes_on_with_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "has_bf16_units", lambda device_type: False)
    settings = ("engine.precision=auto", "alignment={kind: none}")
    auto = train(tmp_path / "auto", *settings, stop_after=3)
    plain = train(tmp_path / "plain", *settings, "engine.precision=fp32", stop_after=3)
    assert auto.losses == plain.losses
    stored = (tmp_path / "auto" / "config.yaml").read_text()
    assert read_yaml(stored, name="stored")["engine"]["precision"] == "fp32"
    monkeypatch.setattr(precision, "has_bf16_units", lambda device_type: True)
    with pytest.raises(CheckpointError, match="engine.precision: 'fp32' -> 'bf16'"):
        train(tmp_path / "auto", *settings)
    train(tmp_path / "auto", *settings, "engine.precision=fp32")


def test_units_are_asked_for_by_device():
    assert bf16.has_bf16_units("cpu") is bf16.has_bf16_units()
    assert bf16.has_bf16_units("mps") is False


@pytest.mark.parametrize("has_units", [True, False])
def test_products_of_rounded_factors_are_those_of_float64(monkeypatch, has_units):
    """With units the result is rounded to bf16 too, by 2^-8 of it at most; without, only sums of float32 are off."""
    monkeypatch.setattr(products, "has_bf16_units", lambda: has_units)
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, generator=generator).bfloat16() for size in ((7, 64), (64, 9)))
    exact = left.double() @ right.double()
    tolerance = 2**-8 + 1e-6 if has_units else 0
    out = torch.empty(7, 9)
    for found in (products.product(left, right), products.product(left, right, out=out)):
        assert found.dtype == torch.float32
        assert torch.allclose(found.double(), exact, rtol=tolerance, atol=1e-4 if has_units else 1e-5)
    assert torch.equal(out, found)
