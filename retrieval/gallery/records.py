"""What galleries take and give out: kinds, levels, candidates, measured recall, calibrated thresholds."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field

from aroface.contract import InputContract
from retrieval.metrics.rules import MIN_SUPPORTED

__all__ = [
    "INDEX_KINDS",
    "Calibration",
    "Candidate",
    "Fusion",
    "GalleryInfo",
    "IndexKind",
    "Level",
    "Recall",
]

#: Ways to search. `flat` compares with every entry. fp16, sq8, pq: compare with every entry in a shorter form that fits
#: in less memory; ivf visits the nearest clusters, hnsw walks a graph of neighbours, each over one of these forms.
#: Whatever the kind, its candidates are compared again with the float32 vectors.
IndexKind = Literal[
    "flat", "fp16", "sq8", "pq", "ivf", "ivf-fp16", "ivf-sq8", "ivf-pq", "hnsw", "hnsw-fp16", "hnsw-sq8"
]
INDEX_KINDS: tuple[IndexKind, ...] = get_args(IndexKind)

#: `entry`: every enrolled entry is a candidate. `subject`: one per subject, with its best entry. `pooled`: one per
#: subject, with its template: the sum of its embeddings as they were before normalisation, scaled to length 1.
Level = Literal["entry", "subject", "pooled"]

#: How several probes of one person are searched together. `best`: each alone, the best score counts. `pooled`: fused
#: into one vector first.
Fusion = Literal["best", "pooled"]


class Candidate(NamedTuple):
    """One line of a candidate list. A tuple, because a search makes thousands of them."""

    entry_id: str  #: empty at the level `pooled`, where no single entry stands behind the score
    subject_id: str
    score: float  #: cosine similarity
    rank: int  #: 1 is the best; equal scores are ordered by enrolment, the earlier first


class Recall(BaseModel):
    """How much of an exact search an index finds, measured on a sample."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    at_1: float = Field(ge=0, le=1, description="share of probes whose first candidate scores as the exact one")
    at_10: float = Field(ge=0, le=1, description="share of the exact first ten that are found, mean over probes")
    probes: int = Field(ge=1, description="searches in the sample")
    source: str = Field(description="where the probes came from")


class Calibration(BaseModel):
    """The threshold of one false-positive identification rate, found by the canonical rule without interpolation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fpir: float = Field(gt=0, lt=1, description="wanted: share of searches for a stranger that give any candidate")
    threshold: float = Field(description="accept a candidate when its score is greater")
    k: int = Field(ge=0, description="false alarms that the rate allows among the searches")
    realised: float = Field(ge=0, le=1, description="rate of false alarms at the threshold")
    non_mated: int = Field(ge=1, description="searches for people who are not enrolled, failed probes included")
    mated: int = Field(ge=0, description="searches for people who are enrolled, failed probes included")
    tpir: float | None = Field(default=None, description="share of those whose mate is first and accepted")
    level: Level = Field(description="level of the searches")
    count: int = Field(ge=1, description="entries in the gallery then; the rate grows with the gallery")

    @property
    def is_supported(self) -> bool:
        """At least 30 false alarms stand behind the rate."""
        return self.k >= MIN_SUPPORTED

    def doubts(self, count: int) -> list[str]:
        """Why the threshold may not hold in a gallery of `count` entries, in words."""
        found = [] if self.is_supported else [f"not supported: {self.k} false alarms allowed, {MIN_SUPPORTED} needed"]
        return found if self.count == count else [*found, f"{self.count} entries then, {count} now"]


@dataclass(frozen=True)
class GalleryInfo:
    """What a gallery holds."""

    name: str  #: directory, or collection and address
    backend: Literal["faiss", "milvus"]
    count: int
    num_subjects: int | None  #: None where counting them would read the whole gallery
    dimension: int
    index: str
    model_id: str | None
    contract: InputContract | None
    recall: Recall | None  #: None where search is exact, or where nobody measured it
    how: str  #: what is searched, and with which effort; empty where every entry is compared
    calibration: tuple[Calibration, ...]
