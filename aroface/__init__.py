"""The core of aroface: models, heads, the alignment attack, the training engine and its configuration."""

__version__ = "0.1.0"
