"""One page about a shard directory: how many images whom, how large, and what they look like.

It holds face images in its contact sheet: treat it as the images themselves.
"""

import base64
import html
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aroface.errors import DataError
from aroface.files import atomic_path, write_json
from aroface.images import decode_rgb, encode_jpeg, resize_face
from shards.dataset import ShardDataset
from shards.manifest import read_identities
from shards.permutation import permute
from shards.prepare import image_size

__all__ = ["Summary", "summarise", "write_summary"]

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_SIZED_IMAGES = 2000
_CONTACTS, _CONTACT_PX = 60, 96
_LISTED_IDENTITIES = 10


@dataclass(frozen=True)
class Summary:
    """Numbers about a shard directory. Memory: the lengths of all images, 4 bytes each, while it is made."""

    images: int
    identities: int
    shards: int
    bytes: int
    skipped: int
    duplicates: int
    conflicts: int
    source: str
    licence: str
    images_per_identity: dict[str, float]  #: quantiles, mean, smallest and largest
    identities_by_images: list[tuple[int, int, int]]  #: (from, to, identities) in bins that double
    image_bytes: dict[str, float]  #: quantiles and mean
    image_sizes: list[tuple[str, int]]  #: (`112 x 112`, images) among the first 2000 of a random order
    largest: list[tuple[str, int]]  #: (identity, images)


def summarise(directory: Path) -> Summary:
    """Count and measure.

    Raises:
        DataError: not a shard directory.
    """
    data = ShardDataset(directory, image_size=_CONTACT_PX)
    manifest = data.manifest
    identities = read_identities(directory)
    counts = np.array([identity.images for identity in identities])
    order = np.argsort(-counts, kind="stable")[:_LISTED_IDENTITIES]
    sizes = Counter(_size(bytes(data.read(sample)[0])) for sample in _chosen(data, _SIZED_IMAGES))
    return Summary(
        images=manifest.num_samples,
        identities=manifest.num_classes,
        shards=len(manifest.shards),
        bytes=sum(entry.bytes for entry in manifest.shards),
        skipped=manifest.skipped,
        duplicates=manifest.duplicates,
        conflicts=manifest.conflicts,
        source=manifest.source,
        licence=manifest.licence,
        images_per_identity=_spread(counts) | {"smallest": float(counts.min()), "largest": float(counts.max())},
        identities_by_images=_doubling(counts),
        image_bytes=_spread(data.image_bytes()),
        image_sizes=sizes.most_common(),
        largest=[(identities[i].name, identities[i].images) for i in order.tolist()],
    )


def write_summary(directory: Path, out: Path | None = None) -> Path:
    """Write `summary.json` and `summary.html`.

    Args:
        directory: of the shards.
        out: folder of the two files; None: `directory`.

    Returns:
        Path of the page.
    """
    out = directory if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    summary = summarise(directory)
    write_json(out / "summary.json", asdict(summary))
    page = out / "summary.html"
    with atomic_path(page) as temporary:
        temporary.write_text(_page(directory, summary), encoding="utf-8", errors="replace")
    return page


def _chosen(data: ShardDataset, count: int) -> list[int]:
    places = np.arange(min(count, data.num_stored))
    chosen: list[int] = permute(places, size=data.num_stored, seed=0, epoch=0, purpose="summary").tolist()
    return chosen


def _size(content: bytes) -> str:
    try:
        return "{} x {}".format(*image_size(content, name="image"))
    except DataError:
        return "unreadable"


def _spread(values: NDArray[Any]) -> dict[str, float]:
    quantiles = np.quantile(values, _QUANTILES)
    named = {f"{round(100 * q)} %": float(value) for q, value in zip(_QUANTILES, quantiles, strict=True)}
    return named | {"mean": float(values.mean())}


def _doubling(counts: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """Identities with 1, 2-3, 4-7, ... images."""
    bins = np.bincount(np.floor(np.log2(np.maximum(counts, 1))).astype(int))
    return [(1 << i, (2 << i) - 1, int(number)) for i, number in enumerate(bins)]


def _page(directory: Path, summary: Summary) -> str:
    data = ShardDataset(directory, image_size=_CONTACT_PX)
    names = [identity.name for identity in read_identities(directory)]
    title = f"{summary.images:,} images of {summary.identities:,} identities"  # no path: equal shards, equal page
    rows = [
        ("images", f"{summary.images:,}"),
        ("identities", f"{summary.identities:,}"),
        ("shards", f"{summary.shards:,}, {summary.bytes / 2**20:,.1f} MiB"),
        ("unreadable, left out", f"{summary.skipped:,}"),
        ("equal to another image", f"{summary.duplicates:,}"),
        ("images that two identities share", f"{summary.conflicts:,}"),
        ("source", summary.source),
        ("licence", summary.licence),
    ]
    sizes = [(size, f"{count:,}") for size, count in summary.image_sizes]
    largest = [(name, f"{count:,}") for name, count in summary.largest]
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>{_STYLE}</style>
<h1>{title}</h1>
{_table(rows)}
<h2>Images per identity</h2>
<div class="chart">{_bars(summary.identities_by_images)}</div>
{_table(_written(summary.images_per_identity))}
<h2>Image files</h2>
<div class="side"><div><h3>Bytes</h3>{_table(_written(summary.image_bytes))}</div>
<div><h3>Pixels, of {min(_SIZED_IMAGES, summary.images):,} images</h3>{_table(sizes)}</div>
<div><h3>Largest identities</h3>{_table(largest)}</div></div>
<h2>Some images</h2>
<div class="contacts">{"".join(_contact(data, names, sample) for sample in _chosen(data, _CONTACTS))}</div>
</html>
"""


def _written(values: dict[str, float]) -> list[tuple[str, str]]:
    return [(name, f"{value:,.1f}".removesuffix(".0")) for name, value in values.items()]


def _table(rows: Sequence[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"


def _contact(data: ShardDataset, names: Sequence[str], sample: int) -> str:
    content, label = data.read(sample)
    name = html.escape(names[label])
    try:
        pixels = resize_face(decode_rgb(content), _CONTACT_PX)
    except DataError:
        return f"<figure>unreadable<figcaption>{name}</figcaption></figure>"
    source = base64.b64encode(encode_jpeg(pixels, quality=85)).decode()
    return f'<figure><img src="data:image/jpeg;base64,{source}" alt=""><figcaption>{name}</figcaption></figure>'


def _bars(bins: Sequence[tuple[int, int, int]]) -> str:
    """A bar chart as SVG: identities by number of images, in bins that double."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "aroface", "font.family": "sans-serif", "font.size": 9}):
        figure = Figure(figsize=(7, 2.8), layout="constrained")
        axes = figure.subplots()
        labels = [str(low) if low == high else f"{low}-{high}" for low, high, _ in bins]
        drawn = axes.bar(range(len(bins)), [number for *_, number in bins], color="#3b73b9", width=0.8)
        axes.set_xticks(range(len(bins)), labels)
        axes.bar_label(drawn, [f"{number:,}" for *_, number in bins], padding=2)
        axes.set_xlabel("images of an identity")
        axes.set_ylabel("identities")
        axes.set_yscale("log")
        axes.set_ylim(0.5, 3 * max(number for *_, number in bins))
        axes.spines[["top", "right"]].set_visible(False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1c1f23;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}h3{font-size:1rem;margin:.2rem 0}
table{border-collapse:collapse}th{font-weight:400;text-align:left;color:#555;padding:.15rem 1.5rem .15rem 0}
td{font-variant-numeric:tabular-nums}.side{display:flex;flex-wrap:wrap;gap:2rem 4rem}
.chart{background:#fff;max-width:46rem}.chart svg{width:100%;height:auto}
.contacts{display:grid;grid-template-columns:repeat(auto-fill,minmax(6.2rem,1fr));gap:.7rem}
figure{margin:0}figure img{width:100%;display:block;border-radius:4px}
figcaption{font-size:.75rem;color:#555;overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
@media(prefers-color-scheme:dark){body{background:#16181b;color:#e6e6e6}th,figcaption{color:#a5a9ae}
.chart{border-radius:6px;padding:.5rem}}
"""
