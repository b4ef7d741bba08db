"""Checkpoint to ONNX and TensorRT, each behind a parity gate; run either one."""
