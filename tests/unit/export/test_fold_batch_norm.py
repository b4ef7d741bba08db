"""The folded graph is the graph, on hand-made networks that hold one case each."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from export.fold_batch_norm import fold_batch_norms

CHANNELS, SIDE = 4, 7


class Network:
    """Collects nodes and constants; every constant is drawn."""

    def __init__(self, seed: int = 0) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self._generator = np.random.default_rng(seed)

    def constant(self, name: str, *shape: int, low: float = -1.0, high: float = 1.0) -> str:
        self.constants[name] = self._generator.uniform(low, high, shape).astype(np.float32)
        return name

    def norm(self, source: str, result: str, channels: int = CHANNELS) -> str:
        statistics = [self.constant(f"{result}_{part}", channels) for part in ("weight", "bias", "mean")]
        variance = self.constant(f"{result}_variance", channels, low=0.3, high=2.0)
        return self.node("BatchNormalization", [source, *statistics, variance], result, epsilon=1e-3)

    def node(self, kind: str, sources: Sequence[str], result: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, sources, [result], name=f"n_{result}", **attributes))
        return result

    def model(
        self, outputs: Sequence[str], shape: Sequence[int | str] = ("b", CHANNELS, SIDE, SIDE)
    ) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "network",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            [numpy_helper.from_array(values, name) for name, values in self.constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        return onnx.shape_inference.infer_shapes(model)


def check(model: onnx.ModelProto, *, norms: int = 1, shape: Sequence[int] = (CHANNELS, SIDE, SIDE)) -> list[str]:
    """Fold, compare by ONNX's own evaluator, and return the operators that are left."""
    before = onnx.load_from_string(model.SerializeToString())
    assert fold_batch_norms(model) == norms
    onnx.checker.check_model(model, full_check=True)
    x = np.random.default_rng(1).normal(size=(3, *shape)).astype(np.float32)
    for expected, got in zip(
        ReferenceEvaluator(before).run(None, {"x": x}), ReferenceEvaluator(model).run(None, {"x": x}), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)
    operators = [node.op_type for node in model.graph.node]
    assert "BatchNormalization" not in operators
    return operators


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "attributes",
    [
        {"pads": [1, 1, 1, 1]},
        {"pads": [1, 1, 1, 1], "strides": [2, 2]},
        {"pads": [0, 1, 2, 1], "strides": [2, 1]},
        {"pads": [2, 2, 2, 2], "dilations": [2, 2]},
        {"pads": [1, 1, 1, 1], "group": 2},
        {"pads": [1, 1, 1, 1], "group": 4},
    ],
)
def test_in_front_of_a_padded_convolution(attributes: dict[str, Any], bias: bool) -> None:
    network = Network()
    network.norm("x", "normed")
    weight = network.constant("w", 8, CHANNELS // attributes.get("group", 1), 3, 3)
    biases = [network.constant("c", 8)] if bias else []
    network.node("Conv", ["normed", weight, *biases], "y", kernel_shape=[3, 3], **attributes)
    assert check(network.model(["y"])) == ["Conv", "Add"]


def test_a_bias_alone_would_be_wrong_at_the_border() -> None:
    """What the map is for: with the shift in the bias only the inside is right."""
    network = Network()
    network.norm("x", "normed")
    network.node("Conv", ["normed", network.constant("w", 8, CHANNELS, 3, 3)], "y", pads=[1, 1, 1, 1])
    model = network.model(["y"])
    fold_batch_norms(model)
    border_map = next(
        numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.name.endswith("_border_map")
    )
    assert border_map.shape == (1, 8, SIDE, SIDE)
    inside = border_map[..., 1:-1, 1:-1]
    np.testing.assert_allclose(inside, np.broadcast_to(inside[..., :1, :1], inside.shape), rtol=1e-6)
    assert np.abs(border_map[..., 0, :] - inside[..., :1, 0]).max() > 0.05


def test_without_padding_a_bias_is_enough() -> None:
    network = Network()
    network.norm("x", "normed")
    network.node("Conv", ["normed", network.constant("w", 8, CHANNELS, 3, 3)], "y", strides=[2, 2])
    assert check(network.model(["y"])) == ["Conv"]


def test_behind_a_convolution_and_behind_a_linear_layer() -> None:
    network = Network()
    network.node("Conv", ["x", network.constant("w", 6, CHANNELS, 3, 3)], "mapped", pads=[1, 1, 1, 1])
    network.norm("mapped", "normed", 6)
    network.node("Flatten", ["normed"], "flat")
    weight, bias = network.constant("v", 5, 6 * SIDE * SIDE, low=-0.1, high=0.1), network.constant("c", 5)
    network.node("Gemm", ["flat", weight, bias], "linear", transB=1)
    network.norm("linear", "y", 5)
    assert check(network.model(["y"]), norms=2) == ["Conv", "Flatten", "Gemm"]


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("flatten", ["Flatten", "Reshape"])
def test_in_front_of_a_linear_layer_that_reads_the_flattened_map(flatten: str, transposed: int) -> None:
    network = Network()
    network.norm("x", "normed")
    features = CHANNELS * SIDE * SIDE
    if flatten == "Reshape":
        network.constants["shape"] = np.array([-1, features], np.int64)
        network.node("Reshape", ["normed", "shape"], "flat")
    else:
        network.node("Flatten", ["normed"], "flat")
    shape = (5, features) if transposed else (features, 5)
    network.node("Gemm", ["flat", network.constant("w", *shape), network.constant("c", 5)], "y", transB=transposed)
    assert check(network.model(["y"])) == [flatten, "Gemm"]


def test_two_convolutions_behind_one_norm_that_share_their_weights_with_a_third() -> None:
    network = Network()
    network.norm("x", "normed")
    weight = network.constant("w", CHANNELS, CHANNELS, 3, 3)
    network.node("Conv", ["normed", weight], "a", pads=[1, 1, 1, 1])
    network.node("Conv", ["normed", weight], "b", pads=[1, 1, 1, 1], strides=[1, 1])
    network.node("Conv", ["x", weight], "c", pads=[1, 1, 1, 1])
    network.node("Sum", ["a", "b", "c"], "y")
    assert sorted(check(network.model(["y"]))) == ["Add", "Add", "Conv", "Conv", "Conv", "Sum"]


def test_read_by_something_else_as_well_it_becomes_arithmetic() -> None:
    network = Network()
    network.norm("x", "normed")
    network.node("Conv", ["normed", network.constant("w", CHANNELS, CHANNELS, 3, 3)], "mapped", pads=[1, 1, 1, 1])
    network.node("Add", ["mapped", "normed"], "y")
    assert check(network.model(["y"])) == ["Mul", "Add", "Conv", "Add"]


def test_a_convolution_that_something_else_reads_is_left_alone() -> None:
    network = Network()
    network.node("Conv", ["x", network.constant("w", CHANNELS, CHANNELS, 3, 3)], "mapped", pads=[1, 1, 1, 1])
    network.norm("mapped", "normed")
    network.node("Relu", ["normed"], "active")
    network.node("Add", ["mapped", "active"], "y")
    assert check(network.model(["y"])) == ["Conv", "Mul", "Add", "Relu", "Add"]


def test_a_norm_that_is_a_result_itself() -> None:
    network = Network()
    network.norm("x", "y")
    network.node("Conv", ["y", network.constant("w", CHANNELS, CHANNELS, 3, 3)], "z", pads=[1, 1, 1, 1])
    assert check(network.model(["y", "z"])) == ["Mul", "Add", "Conv"]


def test_a_chain_of_norms_ends_in_the_convolution() -> None:
    network = Network()
    network.norm("x", "first")
    network.norm("first", "second")
    network.node("Conv", ["second", network.constant("w", 8, CHANNELS, 3, 3)], "y", pads=[1, 1, 1, 1])
    operators = check(network.model(["y"]), norms=2)
    assert operators == ["Mul", "Add", "Conv", "Add"]


def test_vectors() -> None:
    network = Network()
    network.norm("x", "normed")
    network.node("Relu", ["normed"], "y")
    assert check(network.model(["y"], ("b", CHANNELS)), shape=(CHANNELS,)) == ["Mul", "Add", "Relu"]
