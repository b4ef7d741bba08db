"""Run the attack of the ARoFace release beside `release_compat`, on the same draws, and compare what comes out.

    python -m tests.peers.compare_attack CHECKOUT --out docs/results/release-parity.json

CHECKOUT is msed-Ebrahimi/ARoFace. Its `AdvWarp.py` has two versions: 69995a1 with fixed step sizes, and f4093b0, which
draws them around 0.1 and which ours follows. The file is run as it is: `.cuda()` does nothing, and what it asks numpy
and torch for at random is what `draw_release` drew. It calls a network and a loss of ours, in training mode.
"""

import argparse
import copy
import importlib.util
import itertools
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from aroface import __version__
from aroface.alignment import draw_release, release_mix
from aroface.alignment.release import ReleaseDraws
from aroface.config.alignment import AlignmentConfig
from aroface.config.model import IResNetConfig
from aroface.files import write_json
from aroface.models import build_backbone

STEPS, BATCHES = (1, 3, 10), (16, 32)
SIZE, CLASSES = 112, 10


def load_release(checkout: Path) -> ModuleType:
    """Their module, from its file."""
    spec = importlib.util.spec_from_file_location("release_adv_warp", checkout / "AdvWarp.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"{checkout} has no AdvWarp.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def given(module: ModuleType, draws: ReleaseDraws, batch: int) -> Iterator[None]:
    """Let their file find our draws where it asks for random numbers; all of them have to be asked for."""
    start = draws.start
    normals: list[Any] = [*draws.etas, start.scale[:, None].numpy(), start.angle_rad[:, None].numpy()]
    normals.append(start.shift.numpy())
    orders = [_completed(chosen, batch) for chosen in (draws.clean, draws.warped)]

    def normal(_mean: float, _deviation: float, shape: tuple[int, ...] = ()) -> Any:
        value = normals.pop(0)
        if np.shape(value) != shape:
            raise SystemExit(f"AdvWarp.py asks for {shape} where f4093b0 asks for {np.shape(value)}: another version")
        return value

    patches = (
        mock.patch.object(module, "np", SimpleNamespace(random=SimpleNamespace(normal=normal))),
        mock.patch.object(torch, "randperm", side_effect=orders),
        mock.patch.object(torch.Tensor, "cuda", lambda tensor, **_: tensor),
    )
    with patches[0], patches[1] as randperm, patches[2]:
        yield
    if normals or randperm.call_count != len(orders):
        raise SystemExit("AdvWarp.py did not ask for everything that was drawn: another version")


def _completed(chosen: Tensor, batch: int) -> Tensor:
    """A permutation that begins with the chosen places."""
    rest = [place for place in range(batch) if place not in set(chosen.tolist())]
    return torch.cat([chosen, torch.tensor(rest, dtype=torch.int64)])


def compare(module: ModuleType, *, batch: int, steps: int) -> dict[str, Any]:
    """Both attacks from the same network, images and draws; largest absolute differences."""
    torch.manual_seed(batch + steps)
    network = build_backbone(
        IResNetConfig(kind="iresnet", depth=18, width=0.125, embedding_dim=16, image_size=SIZE)
    ).train()
    head = nn.Linear(16, CLASSES)
    images = nn.functional.interpolate(torch.rand(batch, 3, 9, 9) * 2 - 1, size=(SIZE, SIZE), mode="bicubic").clamp(
        -1, 1
    )
    labels = torch.randint(0, CLASSES, (batch,))
    config = AlignmentConfig(kind="adversarial", release_compat=True, steps=steps)
    draws = draw_release(batch, config, torch.Generator().manual_seed(steps))

    def losses(embeddings: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(16 * head(embeddings), targets, reduction="none")

    own, theirs = copy.deepcopy(network), copy.deepcopy(network)
    found = release_mix(images, labels, loss_of=lambda x, y: losses(own(x), y), config=config, draws=draws)
    with given(module, draws, batch):
        expected = module.adversarial_img_warping(
            theirs, images, lambda e, y: losses(e, y).mean(), labels, ratio=1 - config.share, k=steps
        )
    buffers = zip(own.buffers(), theirs.buffers(), strict=True)
    before = zip(own.buffers(), network.buffers(), strict=True)
    return {
        "batch": batch,
        "steps": steps,
        "bit_for_bit": torch.equal(found.images, expected[0]) and torch.equal(found.labels, expected[1]),
        "largest_difference_of_pixels": float((found.images - expected[0]).abs().max()),
        "largest_difference_of_statistics": max(float((a.double() - b.double()).abs().max()) for a, b in buffers),
        "largest_change_of_statistics": max(float((a.double() - b.double()).abs().max()) for a, b in before),
        "share_of_pixels_changed": float(
            (found.images != images[torch.cat([draws.clean, draws.warped])]).float().mean()
        ),
    }


def _commit(checkout: Path, *path: str) -> str:
    command = ["git", "-C", str(checkout), "log", "-1", "--format=%H", "--", *path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    """Compare every number of steps and batch; 1 if one of them is not equal bit for bit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    module = load_release(args.checkout)
    rows = [compare(module, batch=batch, steps=steps) for batch, steps in itertools.product(BATCHES, STEPS)]
    is_equal = all(row["bit_for_bit"] and row["largest_difference_of_statistics"] == 0 for row in rows)
    write_json(
        args.out,
        {
            "what": "AdvWarp.py of the ARoFace release against release_compat: same draws, network, images and loss",
            "network": f"iresnet18 of width 0.125, {SIZE} px, random weights, training mode",
            "equal_bit_for_bit": is_equal,
            "command": "python -m tests.peers.compare_attack CHECKOUT --out FILE",
            "repository": "msed-Ebrahimi/ARoFace",
            "commits": {"checkout": _commit(args.checkout), "AdvWarp.py": _commit(args.checkout, "AdvWarp.py")},
            "versions": {"aroface": __version__, "torch": torch.__version__, "python": platform.python_version()},
            "hardware": f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s), fp32",
            "runs": rows,
        },
    )
    return 0 if is_equal else 1


if __name__ == "__main__":
    sys.exit(main())
