"""Import networks of other projects and hold our embeddings against theirs, computed by their own code.

    python -m tests.peers.compare_weights CHECKOUTS --out docs/results/import-parity.json

CHECKOUTS holds `insightface` (deepinsight/insightface), `AdaFace` (mk-minchul/AdaFace) and `CVLface`
(mk-minchul/CVLface), as far as they are there. Every network gets random weights and statistics, is saved as its
project saves it, goes through `aroface import`, and embeds the same images. Then it goes back with `--to arcface_torch`
into the network of arcface_torch.
"""

import argparse
import contextlib
import io
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from aroface import __version__
from aroface.files import write_json
from aroface.inference import load_embedder
from launch.cli import main as aroface
from tests.peers.public_code import Peer, arcface_torch, peers, randomise

LIMIT = 1e-6  #: largest 1 - cosine


def faces(count: int = 4) -> NDArray[np.uint8]:
    """Smooth coloured images, (count, 112, 112, 3) uint8 RGB."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (count, 9, 9, 3), dtype=np.uint8)
    return np.stack([cv2.resize(image, (112, 112), interpolation=cv2.INTER_CUBIC) for image in small])


def compare(root: Path, peer: Peer, folder: Path) -> dict[str, Any]:
    """Figures of one network, there and back."""
    theirs = peer.build()
    randomise(theirs, seed=len(peer.name))
    images = faces()
    expected = embed(theirs, images, peer.colour_order)
    file = peer.save(theirs, folder)
    run, back = folder / "run", folder / "back.pt"
    _quietly(["import", str(file), "--out", str(run)])
    embedder = load_embedder(run)
    found = embedder.embed(images)
    result: dict[str, Any] = {
        "project": peer.project,
        "network": peer.name,
        "imported_as": embedder.model_id.rsplit("-", 1)[0],
        "colour_order": embedder.contract.colour_order,
        "parameters": sum(p.numel() for p in theirs.parameters()),
        **_difference(found, expected),
    }
    if peer.arcface_name is not None:
        _quietly(["import", str(run), "--to", "arcface_torch", "--out", str(back)])
        network = arcface_torch(root, peer.arcface_name)
        network.load_state_dict(torch.load(back, weights_only=True))
        returned = embed(network.eval(), images, "rgb")
        result["back_in_arcface_torch"] = {"network": peer.arcface_name, **_difference(returned, expected)}
    return result


def embed(network: torch.nn.Module, images: NDArray[np.uint8], colour_order: str) -> NDArray[np.float32]:
    """What their inference code does: channel order, [-1, 1], channels first."""
    pixels = images[..., ::-1] if colour_order == "bgr" else images
    batch = torch.from_numpy(((pixels / 255.0) - 0.5) / 0.5).float().permute(0, 3, 1, 2).contiguous()
    with torch.no_grad():
        embeddings: NDArray[np.float32] = network(batch).numpy()
    return embeddings


def _difference(found: NDArray[np.float32], expected: NDArray[np.float32]) -> dict[str, float]:
    a, b = found.astype(np.float64), expected.astype(np.float64)
    norms = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    cosines = (a @ b.T) / np.outer(*norms)
    own = np.diag(cosines)
    others = cosines[~np.eye(len(a), dtype=bool)]
    return {
        "largest_1_minus_cosine": float(max(0.0, (1 - own).max())),
        "largest_relative_difference_of_norms": float(np.abs(norms[0] / norms[1] - 1).max()),
        "mean_1_minus_cosine_between_images": float((1 - others).mean()),
    }


def _quietly(arguments: list[str]) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        code = aroface(arguments)
    if code:
        raise SystemExit(f"aroface {shlex.join(arguments)} failed")


def _commit(folder: Path) -> str:
    result = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else "not a git checkout"


def main() -> int:
    """Compare everything that is there; 1 if a network exceeds the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--networks", default="", metavar="REGEX", help="only those whose project and name match")
    parser.add_argument("--commit", action="append", default=[], metavar="PROJECT=SHA", help="of a folder without git")
    args = parser.parse_args()
    stated = dict(item.split("=", 1) for item in args.commit)
    rows, failed = [], []
    for peer in peers(args.checkouts):
        if not re.search(args.networks, f"{peer.project} {peer.name}"):
            continue
        with tempfile.TemporaryDirectory() as folder:
            row = compare(args.checkouts, peer, Path(folder))
        rows.append(row)
        there_and_back = [row, *([row["back_in_arcface_torch"]] if peer.arcface_name else [])]
        worst = max(part["largest_1_minus_cosine"] for part in there_and_back)
        if not worst <= LIMIT or row["mean_1_minus_cosine_between_images"] < 1e-3:  # else any network would pass
            failed.append(peer.name)
        line = f"{peer.project:<12} {peer.name:<32} -> {row['imported_as']:<22} 1 - cosine {worst:.1e}"
        print(line, flush=True)  # noqa: T201
    projects = sorted({row["project"] for row in rows})
    write_json(
        args.out,
        {
            "what": "embeddings of imported networks against the code of their projects; random weights, 4 images",
            "limit": LIMIT,
            "within_limit": not failed,
            "command": "python -m tests.peers.compare_weights CHECKOUTS --out FILE",
            "commits": {project: stated.get(project) or _commit(args.checkouts / project) for project in projects},
            "versions": {"aroface": __version__, "torch": torch.__version__, "python": platform.python_version()},
            "hardware": f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s), fp32",
            "networks": rows,
        },
    )
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
