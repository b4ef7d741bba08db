"""Options of every command that runs a model of any kind."""

import argparse

__all__ = ["add_runtime_options"]


def add_runtime_options(parser: argparse.ArgumentParser) -> None:
    """Declare --precision and --runtime, as `launch.embedders.open_embedder` takes them."""
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="arithmetic of PyTorch (checkpoints) and OpenVINO; the others keep their own",
    )
    parser.add_argument(
        "--runtime",
        choices=("onnxruntime", "openvino"),
        default="onnxruntime",
        help="what runs an .onnx file",
    )
