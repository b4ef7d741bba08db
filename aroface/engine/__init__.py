"""The training engine: the loop, DeepSpeed, checkpoints, metrics."""
