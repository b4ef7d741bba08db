"""Batch norms of an inference graph, folded exactly into the layers beside them, so that none is left.

In evaluation mode a batch norm is `y = a x + b` with one `a` and `b` per channel. There are four places for it:

- behind a convolution or linear layer: into the weights and the bias;
- in front of a linear layer that reads the flattened map: into the weights and the bias;
- in front of a convolution: `a` into the weights. `b` cannot become a bias, since the zeros of the padding lie behind
  the batch norm: at the border fewer taps see `b`. What the convolution makes of an image that is `b` everywhere is a
  constant map, (1, C_out, H_out, W_out), and that is added behind it;
- anywhere else: a multiplication and an addition.

All arithmetic is done in float64, and the results are rounded once.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

__all__ = ["fold_batch_norms"]

_DEFAULT_EPSILON = 1e-5
_T = TypeVar("_T")


@dataclass(frozen=True)
class _Affine:
    """`y = scale x + shift`, (C,) float64 each."""

    scale: NDArray[np.float64]
    shift: NDArray[np.float64]


def fold_batch_norms(proto: onnx.ModelProto) -> int:
    """Replace every BatchNormalization node of `proto`, in place; the function of the graph stays the same.

    Args:
        proto: a graph for inference, fp32, with constant weights; the side of the maps is fixed, the batch is not.

    Returns:
        How many there were.
    """
    graph = _Graph(proto)
    norms = [node for node in proto.graph.node if node.op_type == "BatchNormalization"]
    for node in norms:
        affine = graph.affine(node)
        if not (
            graph.fold_into_producer(node, affine)
            or graph.fold_into_linear(node, affine)
            or graph.fold_into_convolutions(node, affine)
        ):
            graph.replace_by_arithmetic(node, affine)
    graph.finish()
    return len(norms)


class _Graph:
    """The graph with what the folding asks for: constants, shapes, and who reads a value."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self._graph = proto.graph
        self._constants = {tensor.name: tensor for tensor in self._graph.initializer}
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
        self._shapes = {
            value.name: _shape(value) for value in (*inferred.value_info, *inferred.input, *inferred.output)
        }
        self._results = {value.name for value in self._graph.output}

    def affine(self, node: onnx.NodeProto) -> _Affine:
        """What a batch norm computes."""
        weight, bias, mean, variance = (self._constant(name) for name in node.input[1:5])
        epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), _DEFAULT_EPSILON)
        scale = weight / np.sqrt(variance + epsilon)
        return _Affine(scale, bias - mean * scale)

    def fold_into_producer(self, node: onnx.NodeProto, affine: _Affine) -> bool:
        """Fold into the convolution or linear layer in front, if nobody else reads it."""
        producer = next((other for other in self._graph.node if node.input[0] in other.output), None)
        if producer is None or len(self._readers(node.input[0])) != 1 or node.input[0] in self._results:
            return False
        if producer.op_type not in ("Conv", "Gemm") or not self._is_constant(producer.input[1:]):
            return False
        weight = self._constant(producer.input[1])
        if producer.op_type == "Conv":
            weight = weight * affine.scale[:, None, None, None]
        elif not _is_plain_gemm(producer):
            return False
        else:
            weight = weight * (affine.scale[:, None] if _attribute(producer, "transB", 0) else affine.scale)
        self._set_layer(producer, weight, self._bias(producer, len(affine.scale)) * affine.scale + affine.shift)
        producer.output[0] = node.output[0]
        self._graph.node.remove(node)
        return True

    def fold_into_linear(self, node: onnx.NodeProto, affine: _Affine) -> bool:
        """Fold into a linear layer behind, that reads the values directly or flattened."""
        readers = self._only_readers(node)
        before = node
        if len(readers) == 1 and readers[0].op_type in ("Reshape", "Flatten"):
            before = readers[0]
            shape, flat = self._shapes.get(node.input[0]), self._shapes.get(before.output[0])
            if shape is None or flat is None or len(flat) != 2 or flat[1] != _product(shape[1:]):
                return False
            readers = self._only_readers(before)
        if len(readers) != 1 or readers[0].op_type != "Gemm" or readers[0].input[0] != before.output[0]:
            return False
        layer = readers[0]
        if not _is_plain_gemm(layer) or not self._is_constant(layer.input[1:]):
            return False
        weight = self._constant(layer.input[1])
        by_output = weight if _attribute(layer, "transB", 0) else weight.T
        repeats = by_output.shape[1] // len(affine.scale)
        scale, shift = np.repeat(affine.scale, repeats), np.repeat(affine.shift, repeats)
        folded = by_output * scale
        bias = self._bias(layer, len(by_output)) + by_output @ shift
        self._set_layer(layer, folded if _attribute(layer, "transB", 0) else folded.T, bias)
        self._bypass(node)
        return True

    def fold_into_convolutions(self, node: onnx.NodeProto, affine: _Affine) -> bool:
        """Fold into every convolution behind, if there is nothing but convolutions."""
        readers = self._only_readers(node)
        shape = self._shapes.get(node.input[0])
        if not readers or shape is None or len(shape) != 4 or None in shape[1:]:
            return False
        if not all(self._is_convolution_of(reader, node.output[0]) for reader in readers):
            return False
        for layer in readers:
            weight = self._constant(layer.input[1])
            constant_map = _response(layer, weight, affine.shift, (shape[2] or 0, shape[3] or 0))
            constant_map += self._bias(layer, len(weight))[:, None, None]
            self._set_layer(layer, weight * _by_input(affine.scale, weight, _attribute(layer, "group", 1)), None)
            if any(_ints(layer, "pads")):
                self._add_map(layer, constant_map[None])
            else:
                self._set_bias(layer, constant_map[:, 0, 0])
        self._bypass(node)
        return True

    def replace_by_arithmetic(self, node: onnx.NodeProto, affine: _Affine) -> None:
        """The batch norm as a multiplication and an addition."""
        rank = len(self._shapes.get(node.input[0]) or (0, 0, 0, 0))
        per_channel = (-1, *(1,) * (rank - 2))
        scaled = f"{node.output[0]}_scaled"
        names = [f"{node.output[0]}_{part}" for part in ("scale", "shift")]
        self._add_constant(names[0], affine.scale.reshape(per_channel))
        self._add_constant(names[1], affine.shift.reshape(per_channel))
        position = list(self._graph.node).index(node)
        multiply = onnx.helper.make_node("Mul", [node.input[0], names[0]], [scaled], name=f"{node.name}_scale")
        add = onnx.helper.make_node("Add", [scaled, names[1]], [node.output[0]], name=f"{node.name}_shift")
        self._graph.node.remove(node)
        self._graph.node.insert(position, add)
        self._graph.node.insert(position, multiply)

    def finish(self) -> None:
        """Drop constants that nobody reads any more, and notes on values that are gone."""
        read = {name for node in self._graph.node for name in node.input} | self._results
        for tensor in [tensor for tensor in self._graph.initializer if tensor.name not in read]:
            self._graph.initializer.remove(tensor)
        made = {name for node in self._graph.node for name in node.output}
        for value in [value for value in self._graph.value_info if value.name not in made]:
            self._graph.value_info.remove(value)

    def _readers(self, name: str) -> list[onnx.NodeProto]:
        return [node for node in self._graph.node if name in node.input]

    def _only_readers(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Who reads the result of a node; nobody, if it is a result of the graph as well."""
        return [] if node.output[0] in self._results else self._readers(node.output[0])

    def _is_constant(self, names: Iterable[str]) -> bool:
        return all(name in self._constants or not name for name in names)

    def _is_convolution_of(self, layer: onnx.NodeProto, value: str) -> bool:
        return (
            layer.op_type == "Conv"
            and layer.input[0] == value
            and self._is_constant(layer.input[1:])
            and _attribute(layer, "auto_pad", b"NOTSET") == b"NOTSET"
        )

    def _constant(self, name: str) -> NDArray[np.float64]:
        values: NDArray[np.float64] = numpy_helper.to_array(self._constants[name]).astype(np.float64)
        return values

    def _bias(self, layer: onnx.NodeProto, channels: int) -> NDArray[np.float64]:
        has_bias = len(layer.input) > 2 and bool(layer.input[2])
        return np.broadcast_to(self._constant(layer.input[2]), (channels,)) if has_bias else np.zeros(channels)

    def _set_layer(self, layer: onnx.NodeProto, weight: NDArray[np.float64], bias: NDArray[np.float64] | None) -> None:
        """Give a layer weights of its own: other layers may share the old ones."""
        name = f"{layer.name or layer.output[0]}_folded_weight"
        self._add_constant(name, weight)
        layer.input[1] = name
        self._set_bias(layer, bias)

    def _set_bias(self, layer: onnx.NodeProto, bias: NDArray[np.float64] | None) -> None:
        del layer.input[2:]
        if bias is not None:
            name = f"{layer.name or layer.output[0]}_folded_bias"
            self._add_constant(name, bias)
            layer.input.append(name)

    def _add_map(self, layer: onnx.NodeProto, constant_map: NDArray[np.float64]) -> None:
        result, bare = layer.output[0], f"{layer.output[0]}_bare"
        name = f"{layer.name or result}_border_map"
        self._add_constant(name, constant_map)
        layer.output[0] = bare
        add = onnx.helper.make_node("Add", [bare, name], [result], name=f"{name}_add")
        self._graph.node.insert(list(self._graph.node).index(layer) + 1, add)

    def _add_constant(self, name: str, values: NDArray[np.float64]) -> None:
        tensor = numpy_helper.from_array(np.ascontiguousarray(values, np.float32), name)
        if name in self._constants:
            self._graph.initializer.remove(self._constants[name])
        self._graph.initializer.append(tensor)
        self._constants[name] = self._graph.initializer[-1]

    def _bypass(self, node: onnx.NodeProto) -> None:
        for reader in self._readers(node.output[0]):
            reader.input[:] = [node.input[0] if name == node.output[0] else name for name in reader.input]
        self._graph.node.remove(node)


def _response(
    layer: onnx.NodeProto, weight: NDArray[np.float64], shift: NDArray[np.float64], side: tuple[int, int]
) -> NDArray[np.float64]:
    """(C_out, H_out, W_out): what a convolution without bias makes of an image that is `shift` everywhere."""
    image = torch.from_numpy(shift)[None, :, None, None].expand(1, -1, *side)
    top, left, bottom, right = _ints(layer, "pads") or (0, 0, 0, 0)
    padded = torch.nn.functional.pad(image, (left, right, top, bottom))
    result = torch.nn.functional.conv2d(
        padded,
        torch.from_numpy(weight),
        stride=_pair(_ints(layer, "strides")),
        dilation=_pair(_ints(layer, "dilations")),
        groups=_attribute(layer, "group", 1),
    )
    response: NDArray[np.float64] = result[0].numpy()
    return response


def _by_input(scale: NDArray[np.float64], weight: NDArray[np.float64], groups: int) -> NDArray[np.float64]:
    """(C_out, C_in / groups, 1, 1): the scale of the input channel that each weight reads."""
    by_group = scale.reshape(groups, 1, weight.shape[1])
    return np.repeat(by_group, len(weight) // groups, axis=1).reshape(len(weight), weight.shape[1], 1, 1)


def _pair(values: Sequence[int]) -> tuple[int, int]:
    return (values[0], values[1]) if values else (1, 1)


def _shape(value: onnx.ValueInfoProto) -> tuple[int | None, ...] | None:
    if not value.type.tensor_type.HasField("shape"):
        return None
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in value.type.tensor_type.shape.dim)


def _product(sizes: Sequence[int | None]) -> int | None:
    return None if None in sizes else int(np.prod([size or 0 for size in sizes]))


def _attribute(node: onnx.NodeProto, name: str, default: _T) -> _T:
    found = next((a for a in node.attribute if a.name == name), None)
    if found is None:
        return default
    value: _T = onnx.helper.get_attribute_value(found)
    return value


def _ints(node: onnx.NodeProto, name: str) -> tuple[int, ...]:
    return tuple(_attribute(node, name, ()))


def _is_plain_gemm(node: onnx.NodeProto) -> bool:
    return all(
        _attribute(node, name, default) == default for name, default in (("alpha", 1.0), ("beta", 1.0), ("transA", 0))
    )
