"""Fast paths of a training step beside their plain twins, and what a step asks of the host."""

import traceback
import weakref
from pathlib import Path

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch.utils._python_dispatch import TorchDispatchMode

import aroface
from aroface import augment
from aroface.engine import deepspeed_engine
from aroface.engine.trainer import Trainer
from aroface.later import Later
from aroface.models.prelu import PReLU
from tests.helpers.training import ADAFACE, train

aten = torch.ops.aten
#: Folders of the packages: a checkout may itself lie in a folder named aroface.
_WATCHED = tuple(f"{Path(package.__file__).parent}/" for package in (aroface, deepspeed))


@pytest.mark.parametrize("stage", [0, 1])
def test_the_fused_optimiser_is_the_plain_one(tmp_path, monkeypatch, stage):
    """Six steps with momentum, decay and clipping; the fused kernel may round a product and a sum once."""
    settings = (f"engine.zero_stage={stage}", "engine.precision=fp32", "engine.batch_norm=frozen", ADAFACE)
    fused = train(tmp_path / "fused", *settings)
    kinds = []

    class Plain(deepspeed_engine._RestingSGD):
        def __init__(self, parameters, **options):
            kinds.append(options.pop("fused"))
            super().__init__(parameters, **options, fused=False, foreach=False)

        def step(self, closure=None):
            gate = self.found_inf, self.grad_scale
            assert float(gate[0]) == 0
            for parameter in self.param_groups[0]["params"]:
                if parameter.grad is not None:
                    parameter.grad /= gate[1]
            self.found_inf = self.grad_scale = None
            super().step(closure)

    monkeypatch.setattr(deepspeed_engine, "_RestingSGD", Plain)
    plain = train(tmp_path / "plain", *settings)
    assert kinds == [True]
    assert fused.losses == pytest.approx(plain.losses, rel=1e-5)
    for name, value in plain.tensors.items():
        torch.testing.assert_close(fused.tensors[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


EVERYTHING = "data.augment={flip: 0.5, crop: 0.5, low_resolution: 0.9, photometric: 0.5, grey: 0.5, erase: 0.5}"


@pytest.mark.parametrize(
    "settings",
    [
        ("alignment={kind: none}", "engine.zero_stage=0"),
        (
            "alignment={kind: adversarial, share: 0.5, consistency_weight: 1.0}",
            EVERYTHING,
            ADAFACE,
            "batch.micro_batch=6",
        ),
        ("alignment={kind: delayed, share: 0.25}", "engine.zero_stage=2"),
        ("alignment={kind: best_of, share: 0.5, candidates: 2}", "engine.precision=fp16"),
        ("alignment={kind: elastic, share: 0.5}", "head={kind: magface, logit_scale: 16.0}"),
        ("alignment={kind: adversarial, share: 0.5, release_compat: true}",),
        ("alignment={kind: random, share: 0.5}", "head={kind: curricularface, logit_scale: 16.0}"),
    ],
    ids=lambda settings: settings[0][11:],
)
def test_a_step_asks_the_host_nothing(tmp_path, monkeypatch, settings):
    """Between log lines the host waits for the step before alone; in fp16 for this one, whose scale the next needs."""
    as_on_a_gpu(monkeypatch)
    asked = Asked(monkeypatch)
    step = Trainer._step

    def watched(trainer, *args):
        asked.step = trainer.position.step
        if trainer.position.step == 0:  # DeepSpeed sets itself up
            return step(trainer, *args)
        with asked:
            return step(trainer, *args)

    monkeypatch.setattr(Trainer, "_step", watched)
    train(tmp_path / "run", "log.every_steps=100", "checkpoint.every_steps=100", *settings)
    published = ["release.py"] if "release_compat" in settings[0] else []  # draws its sizes on the host, as theirs does
    waited = "this step" if "engine.precision=fp16" in settings else "the step before"
    assert asked.places == [*published, waited] * 5


def test_the_watch_sees_every_way_of_asking(monkeypatch):
    x = torch.tensor([1.0, 2.0])
    ways = [
        lambda: x[0].item(),
        lambda: float(x[0]),
        lambda: bool((x > 0).all()),
        lambda: x.tolist(),
        lambda: x.cpu(),
        lambda: x.numpy(),
        lambda: x.nonzero(),
        lambda: x[x > 1],
        lambda: x.unique(),
        lambda: x.masked_select(x > 1),
        lambda: x.to("cpu", copy=True),
        lambda: torch.as_tensor(0.5, device=x.device),
        lambda: x.__setitem__(torch.tensor([1]), -1.0),
        lambda: get_accelerator().synchronize(),
    ]
    for way in ways:
        asked = Asked(monkeypatch)
        with asked:
            way()
        assert len(asked.places) >= 1


def as_on_a_gpu(monkeypatch):
    """Take the branches of a GPU: what is CPU only may ask, for there is nobody to wait for."""
    monkeypatch.setattr(PReLU, "forward", torch.nn.PReLU.forward)
    monkeypatch.setattr(augment, "_shrink_chosen", augment._shrink_all)


class Asked(TorchDispatchMode):
    """Collects the files of this project or of DeepSpeed that make the host wait for numbers of the device."""

    _OPERATIONS = frozenset(
        {
            *(aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default, aten.nonzero.default),
            *(aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default),
            *(aten.masked_select.default, aten.bincount.default, aten.repeat_interleave.Tensor),
            aten.lift_fresh.default,  # numbers of Python become a tensor: sent to a device, they are waited for
        }
    )
    _INDEXING = frozenset({aten.index.Tensor, aten.index_put.default, aten.index_put_.default})

    def __init__(self, monkeypatch):
        super().__init__()
        self.places = []
        self.step = 0  #: set from outside
        self._is_watching = False
        accelerator = type(get_accelerator())
        for owner, name in (
            (torch.Tensor, "tolist"),
            (torch.Tensor, "cpu"),
            (torch.Tensor, "numpy"),
            (accelerator, "synchronize"),
        ):
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))
        self._sent, send, read = weakref.WeakKeyDictionary(), Later.__init__, Later.read
        monkeypatch.setattr(Later, "__init__", lambda later, values: self._send(later) or send(later, values))
        monkeypatch.setattr(Later, "read", lambda later: self._read(later, read))

    def _send(self, later):
        self._sent[later] = self.step

    def _read(self, later, read):
        """Waits for the step in which the numbers were sent, not for what was asked since."""
        was_watching, self._is_watching = self._is_watching, False
        if was_watching and later._found is None:
            self.places.append("this step" if self._sent[later] == self.step else "the step before")
        found = read(later)
        self._is_watching = was_watching
        return found

    def _counted(self, method):
        def counted(*args, **options):
            if self._is_watching:
                self._note()
            return method(*args, **options)

        return counted

    def __enter__(self):
        self._is_watching = True
        return super().__enter__()

    def __exit__(self, *error):
        self._is_watching = False
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        by_mask = func in self._INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1])
        # Everything is on the CPU here, so a copy that keeps the type is taken for one from the device.
        to_cpu = (
            func is aten._to_copy.default
            and kwargs.get("device") == torch.device("cpu")
            and kwargs.get("dtype") in (None, args[0].dtype)
        )
        if self._is_watching and (func in self._OPERATIONS or by_mask or to_cpu):
            self._note()
        return func(*args, **kwargs)

    def _note(self):
        frames = [f.filename for f in traceback.extract_stack() if f.filename.startswith(_WATCHED)]
        place = Path(frames[-1]).name if frames else "elsewhere"
        if place != "prefetch.py":  # batches are made on the host
            self.places.append(place)
