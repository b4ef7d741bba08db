"""What a configuration costs on N GPUs, on paper: memory, communication and time. docs/scaling.md has the formulas."""
