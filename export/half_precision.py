"""An fp32 graph with its body in fp16 or bf16, and its neck in fp32. The precision stands in the graph itself.

The neck is what computes on one vector per face, from the last flattening to the two outputs. The linear layer there
sums up to 25,088 products and the norm sums squares: in fp16 both can overflow, and they cost next to nothing.

Own code because the converter of ONNX Runtime knows no bf16, passes the outputs through fp16 whatever is excluded, and
leaves nodes out of order.
"""

from typing import Literal

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import DTypeLike, NDArray
from onnx import TensorProto, numpy_helper

__all__ = ["HalfType", "neck_nodes", "to_half_precision"]

HalfType = Literal["fp16", "bf16"]

_ELEMENT_TYPES: dict[HalfType, tuple[int, DTypeLike]] = {
    "fp16": (TensorProto.FLOAT16, np.float16),
    "bf16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
}
_VECTOR_RANK = 2


def neck_nodes(proto: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes between the last tensor of rank above 2 and the outputs, whose results are all of rank 2 or less."""
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    ranks = {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in (*inferred.value_info, *inferred.output)
        if value.type.tensor_type.HasField("shape")
    }
    wanted = {value.name for value in proto.graph.output}
    found = []
    for node in reversed(proto.graph.node):
        is_vector = all(ranks.get(name, _VECTOR_RANK + 1) <= _VECTOR_RANK for name in node.output if name)
        if is_vector and wanted.intersection(node.output):
            found.append(node)
            wanted.update(node.input)
    # A reshape only passes on what the body made; it stays with the body, so that half the bytes are copied.
    return [node for node in reversed(found) if node.op_type not in ("Reshape", "Flatten", "Shape")]


def to_half_precision(proto: onnx.ModelProto, kind: HalfType) -> onnx.ModelProto:
    """A copy of an fp32 graph that computes its body in `kind`.

    Args:
        proto: an fp32 graph without subgraphs, in order of computation.
        kind: the type of the body. Input and outputs keep their types.

    Returns:
        The graph, with casts where the two types meet.
    """
    return _Converter(proto, kind).convert()


class _Converter:
    def __init__(self, proto: onnx.ModelProto, kind: HalfType) -> None:
        self._proto = onnx.ModelProto()
        self._proto.CopyFrom(proto)
        self._element_type, self._dtype = _ELEMENT_TYPES[kind]
        self._neck = {node.output[0] for node in neck_nodes(proto)}
        self._floats = _float_values(proto)
        self._constants = {tensor.name: tensor for tensor in self._proto.graph.initializer}
        self._types: dict[str, int] = dict.fromkeys(self._floats, TensorProto.FLOAT)  #: as it is made
        self._nodes: list[onnx.NodeProto] = []
        self._copies: dict[tuple[str, int], str] = {}

    def convert(self) -> onnx.ModelProto:
        graph = self._proto.graph
        outputs = {value.name for value in graph.output}
        for node in graph.node:
            element_type = TensorProto.FLOAT if node.output[0] in self._neck else self._element_type
            for position, name in enumerate(node.input):
                if name in self._floats:
                    node.input[position] = self._as(name, element_type)
            self._retype(node, element_type)
            self._nodes.append(node)
            for position, name in enumerate(node.output):
                if name not in self._floats:
                    continue
                self._types[name] = element_type
                if name in outputs and element_type != TensorProto.FLOAT:
                    node.output[position] = f"{name}_{self._suffix(element_type)}"
                    self._types[node.output[position]] = element_type
                    self._nodes.append(self._cast(node.output[position], name, TensorProto.FLOAT))
                    self._types[name] = TensorProto.FLOAT
        del graph.node[:]
        graph.node.extend(self._nodes)
        _drop_unread(graph)
        del graph.value_info[:]  # the types have changed; whoever needs them infers them
        return self._proto

    def _as(self, name: str, element_type: int) -> str:
        """The name of `name` as the wanted type, made when it is asked for first."""
        if self._types[name] == element_type:
            return name
        key = (name, element_type)
        if key not in self._copies:
            copy = f"{name}_{self._suffix(element_type)}"
            if name in self._constants:
                self._proto.graph.initializer.append(self._converted(self._constants[name], copy))
            else:
                self._nodes.append(self._cast(name, copy, element_type))
            self._copies[key] = copy
        return self._copies[key]

    def _converted(self, tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
        return numpy_helper.from_array(_rounded(numpy_helper.to_array(tensor), self._dtype), name)

    def _retype(self, node: onnx.NodeProto, element_type: int) -> None:
        """Where a node says itself that it makes fp32 (a cast, a constant), let it make the wanted type."""
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == TensorProto.FLOAT:
                attribute.i = element_type
            if attribute.name == "value" and attribute.t.data_type == TensorProto.FLOAT != element_type:
                attribute.t.CopyFrom(self._converted(attribute.t, attribute.t.name))

    def _cast(self, source: str, result: str, element_type: int) -> onnx.NodeProto:
        return onnx.helper.make_node("Cast", [source], [result], name=f"{result}_cast", to=element_type)

    def _suffix(self, element_type: int) -> str:
        return str(TensorProto.DataType.Name(element_type)).lower()


def _rounded(values: NDArray[np.float32], dtype: DTypeLike) -> NDArray[np.generic]:
    """To the nearest value of the type; infinite where its range ends, which the gates then see."""
    with np.errstate(over="ignore"):
        return values.astype(dtype)


def _float_values(proto: onnx.ModelProto) -> set[str]:
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    values = {
        value.name
        for value in (*inferred.value_info, *inferred.input, *inferred.output)
        if value.type.tensor_type.elem_type == TensorProto.FLOAT
    }
    return values | {tensor.name for tensor in proto.graph.initializer if tensor.data_type == TensorProto.FLOAT}


def _drop_unread(graph: onnx.GraphProto) -> None:
    read = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in read]:
        graph.initializer.remove(tensor)
