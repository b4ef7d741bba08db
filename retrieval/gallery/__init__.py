"""Galleries: enrolled embeddings, searched by cosine.

`FaceGallery` is the interface; `Gallery` keeps its embeddings in one directory of this machine and searches them with
Faiss, `MilvusGallery` in a collection of Milvus.
"""

from retrieval.gallery.gallery import Gallery
from retrieval.gallery.interface import FaceGallery
from retrieval.gallery.milvus_gallery import Consistency, MilvusGallery
from retrieval.gallery.recall import IndexWish
from retrieval.gallery.records import (
    INDEX_KINDS,
    Calibration,
    Candidate,
    Fusion,
    GalleryInfo,
    IndexKind,
    Level,
    Recall,
)
from retrieval.gallery.store import GalleryBusyError, Manifest
from retrieval.gallery.vectors import EnrolledIdError

__all__ = [
    "INDEX_KINDS",
    "Calibration",
    "Candidate",
    "Consistency",
    "EnrolledIdError",
    "FaceGallery",
    "Fusion",
    "Gallery",
    "GalleryBusyError",
    "GalleryInfo",
    "IndexKind",
    "IndexWish",
    "Level",
    "Manifest",
    "MilvusGallery",
    "Recall",
]
