"""Small image collections on disk."""

from pathlib import Path

import numpy as np

from aroface.images import encode_jpeg


def write_faces(root: Path, images_of: dict[str, int], *, size: int = 16) -> Path:
    """Write `identity/NNN.jpg`, each image another random colour field."""
    rng = np.random.default_rng(len(images_of))
    for identity, count in images_of.items():
        (root / identity).mkdir(parents=True)
        for number in range(count):
            pixels = np.broadcast_to(rng.integers(0, 256, 3, dtype=np.uint8), (size, size, 3))
            (root / identity / f"{number:03d}.jpg").write_bytes(encode_jpeg(np.ascontiguousarray(pixels)))
    return root
