"""Galleries: enrolled embeddings in one directory, searched by cosine.

`Gallery` is the interface; `store` keeps the files whole, `index` builds the Faiss index, `search` orders candidates.
"""

from retrieval.gallery.gallery import Gallery
from retrieval.gallery.search import Candidate, Level
from retrieval.gallery.store import IndexKind, Manifest

__all__ = ["Candidate", "Gallery", "IndexKind", "Level", "Manifest"]
