"""What goes over the wire; the OpenAPI description is made from it."""

from pydantic import BaseModel, Field

__all__ = [
    "Comparison",
    "EnrolledEntry",
    "GalleryState",
    "Health",
    "Match",
    "Matches",
    "Problem",
    "Removed",
    "Status",
    "Threshold",
]


class Problem(BaseModel):
    """An answer other than success."""

    error: str = Field(description="what was wrong, and what to do")


class Match(BaseModel):
    """One candidate."""

    rank: int = Field(description="1 is the best")
    subject_id: str
    entry_id: str = Field(description="empty at the level `pooled`")
    score: float = Field(description="cosine of the two embeddings")
    fpir: float | None = Field(
        description="lowest calibrated false-positive identification rate at which this score is accepted: the share "
        "of searches for a stranger that give any candidate. null: at none, or the gallery is not calibrated"
    )
    meaning: str = Field(description="the same in words")


class Matches(BaseModel):
    """The best candidates of a search."""

    matches: list[Match]
    is_calibrated: bool = Field(description="whether the gallery has thresholds for this level")


class Comparison(BaseModel):
    """Two faces."""

    score: float = Field(description="cosine of the two embeddings")


class EnrolledEntry(BaseModel):
    """A new entry."""

    entry_id: str
    subject_id: str
    norm: float = Field(description="length of the embedding; low for faces that are hard to recognise")


class Removed(BaseModel):
    """What a deletion took away."""

    entries: int


class Threshold(BaseModel):
    """A calibrated rate of false alarms."""

    fpir: float = Field(description="share of searches for a stranger that give any candidate")
    score: float = Field(description="accepted is what scores higher")
    level: str = Field(description="`entry` holds for `subject` too")
    doubts: list[str] = Field(description="why it may not hold: too few strangers, another number of entries by now")


class GalleryState(BaseModel):
    """What is searched, and with what."""

    name: str
    entries: int
    subjects: int | None
    dimension: int
    index: str
    model: str
    image_size: int = Field(description="side of an aligned crop, pixels")
    thresholds: list[Threshold] = Field(description="of every calibrated rate and level")
    detects_faces: bool = Field(description="whether photographs that are not aligned are accepted")


class Health(BaseModel):
    """The service is up."""

    status: str


class Status(BaseModel):
    """Load and speed of the last half minute."""

    waiting: dict[str, int] = Field(description="requests in each queue")
    requests_per_s: float
    median_ms: float | None
    p99_ms: float | None
