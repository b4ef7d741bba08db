"""Embeddings, galleries, metrics, protocols and reports."""
