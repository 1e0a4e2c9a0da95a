"""Embeddings -> an index on disk -> the nearest ones."""

from nbvision.search.index import Hits, Index

__all__ = ["Hits", "Index"]
