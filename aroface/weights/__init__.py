"""Weights of other projects: their files to a checkpoint of ours, and back to the layout of arcface_torch."""

from aroface.weights.arcface_torch import write_arcface_torch
from aroface.weights.importing import ImportedWeights, read_weights, write_weights

__all__ = ["ImportedWeights", "read_weights", "write_arcface_torch", "write_weights"]
