"""Evaluation protocols: which images meet which, and what is counted."""
