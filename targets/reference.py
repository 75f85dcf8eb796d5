"""The NumPy reference of integer execution: what every board must answer, bit for bit.

It runs the integer graph of `edgepress.targets.lowering.integers` node by node: plain NumPy for the
`edgepress` operators (sums in int64 or exactly in float64), onnxruntime without optimisations for
the ONNX operators in between, which either move values or are declared float islands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort

from edgepress.targets.lowering.dialect import DOMAIN, array_of, shape_of
from edgepress.targets.lowering.integer_rules import to_integers
from edgepress.targets.lowering.integers import is_quantized

Array = npt.NDArray[Any]
_INT32 = 2**31


class Reference:
    """Runs a quantized model as integers.

    Attributes:
        exact: whether all arithmetic between the inputs' Quantize and the outputs' Dequantize is
            integer, so that outputs are the same bits on every target.
        islands: ONNX nodes that compute in float.
    """

    def __init__(self, model: ir.Model) -> None:
        if not is_quantized(model):
            raise ValueError("the model has no QuantizeLinear nodes: nothing to run as integers")
        self.model = to_integers(model, "uint8")
        self.islands = float_islands(self.model)
        self.exact = not self.islands
        self._sessions: dict[str, ort.InferenceSession] = {}

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs for one set of inputs, both by name."""
        values: dict[str, Array] = {}
        for value in self.model.graph.inputs:
            values[value.name or ""] = feeds[value.name or ""]
        for name, value in self.model.graph.initializers.items():
            array = array_of(value)
            assert array is not None
            values[name] = array
        for node in self.model.graph:
            inputs = [None if v is None else values[v.name or ""] for v in node.inputs]
            if node.domain == DOMAIN:
                results = [_OPERATORS[node.op_type](node, *inputs)]
            else:
                results = self._run_onnx(node, inputs)
            for output, result in zip(node.outputs, results, strict=True):
                values[output.name or ""] = result
        return {v.name or "": values[v.name or ""] for v in self.model.graph.outputs}

    def _run_onnx(self, node: ir.Node, inputs: list[Array | None]) -> list[Array]:
        key = node.outputs[0].name or ""
        names = [f"i{i}" if array is not None else "" for i, array in enumerate(inputs)]
        feeds = {n: a for n, a in zip(names, inputs, strict=True) if a is not None}
        if key not in self._sessions:
            self._sessions[key] = _session(node, names, feeds, self.model)
        return [np.asarray(output) for output in self._sessions[key].run(None, feeds)]


def float_islands(model: ir.Model) -> list[str]:
    """Name the ONNX nodes of an integer graph that compute in float."""
    return [
        node.name or node.op_type
        for node in model.graph
        if node.domain != DOMAIN
        and node.op_type not in ("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze")
        and any(v.dtype == ir.DataType.FLOAT for v in node.outputs)
    ]


def _session(
    node: ir.Node, names: list[str], feeds: Mapping[str, Array], model: ir.Model
) -> ort.InferenceSession:
    proto = ir.to_proto(node)
    del proto.input[:]
    proto.input.extend(names)
    graph = onnx.helper.make_graph(
        [proto],
        "node",
        [
            onnx.helper.make_tensor_value_info(
                name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
            )
            for name, array in feeds.items()
        ],
        [onnx.ValueInfoProto(name=name) for name in proto.output],
    )
    opsets = [
        onnx.helper.make_opsetid(domain, version)
        for domain, version in model.graph.opset_imports.items()
        if domain != DOMAIN
    ]
    single = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    single = onnx.shape_inference.infer_shapes(single)
    return ort.InferenceSession(
        single.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def requantise(scaled: Array, node: ir.Node, dtype: Any) -> Array:
    """Apply the requantisation rule to float32 values that are already multiplied."""
    zero_point, low, high = (node.attributes[n].as_int() for n in ("zero_point", "low", "high"))
    clamped = np.clip(scaled, np.float32(low - zero_point), np.float32(high - zero_point))
    return np.asarray(np.rint(clamped).astype(np.int32) + zero_point).astype(dtype)


def _accumulate(total: Array) -> Array:
    """Check that exact sums fit int32 and return them as float32, correctly rounded."""
    if total.size and (total.min() < -_INT32 or total.max() >= _INT32):
        raise OverflowError("an int32 accumulator would overflow")
    return total.astype(np.int32).astype(np.float32)


def _dtype(node: ir.Node) -> Any:
    dtype = node.outputs[0].dtype
    assert dtype is not None
    return dtype.numpy()


def _integer(node: ir.Node, name: str) -> int:
    return int(node.attributes[name].as_int())


def _factor(node: ir.Node, name: str = "multiplier") -> np.float32:
    return np.float32(node.attributes[name].as_float())


def _quantise(node: ir.Node, x: Array) -> Array:
    lowest = 0 if _dtype(node) == np.uint8 else -128
    zero_point = _integer(node, "zero_point")
    with np.errstate(over="ignore"):
        scaled = x / _factor(node, "scale")
    low, high = np.float32(lowest - zero_point), np.float32(lowest + 255 - zero_point)
    scaled = np.where(np.isnan(scaled), high, scaled)  # as the kernels do everywhere
    return (np.rint(np.clip(scaled, low, high)).astype(np.int32) + zero_point).astype(_dtype(node))


def _dequantise(node: ir.Node, x: Array) -> Array:
    centred = x.astype(np.int32) - _integer(node, "zero_point")
    return np.asarray(centred.astype(np.float32) * _factor(node, "scale"))


def _rescale(node: ir.Node, x: Array) -> Array:
    centred = x.astype(np.int64) - _integer(node, "x_zero_point")
    return requantise(_accumulate(centred) * _factor(node), node, _dtype(node))


def _windows(node: ir.Node, x: Array, fill: int) -> tuple[Array, tuple[int, int]]:
    """Return `[n, c, out_h, out_w, kh, kw]` views of the padded input, and the output size."""
    kernel = node.attributes["kernel"].as_ints()
    strides, dilations = (
        node.attributes["strides"].as_ints(),
        node.attributes["dilations"].as_ints(),
    )
    top, left, bottom, right = node.attributes["pads"].as_ints()
    out = (shape_of(node.outputs[0])[2], shape_of(node.outputs[0])[3])
    reach = [
        (o - 1) * s + (k - 1) * d + 1
        for o, s, k, d in zip(out, strides, kernel, dilations, strict=True)
    ]
    bottom = max(bottom, reach[0] - x.shape[2] - top)
    right = max(right, reach[1] - x.shape[3] - left)
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=fill)
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    views = np.lib.stride_tricks.sliding_window_view(padded, spans, axis=(2, 3))
    views = views[:, :, :: strides[0], :: strides[1], :: dilations[0], :: dilations[1]]
    return views[:, :, : out[0], : out[1]], out


def _conv(node: ir.Node, x: Array, w: Array, bias: Array, multiplier: Array) -> Array:
    groups, zero = _integer(node, "group"), _integer(node, "x_zero_point")
    centred = x.astype(np.int32) - zero
    views, (height, width) = _windows(node, centred, 0)
    batch, out = x.shape[0], w.shape[0]
    per_in, per_out = w.shape[1], out // groups
    if per_in == 1 and per_out == 1:
        total = np.einsum("nchwij,cij->nchw", views.astype(np.int64), w[:, 0].astype(np.int64))
    else:
        total = np.empty((batch, out, height, width), np.float64)
        for g in range(groups):
            part = views[:, g * per_in : (g + 1) * per_in].transpose(0, 2, 3, 1, 4, 5)
            # float64 holds these sums exactly: they stay far below 2**53.
            columns = part.reshape(batch * height * width, -1).astype(np.float64)
            rows = w[g * per_out : (g + 1) * per_out].reshape(per_out, -1).astype(np.float64)
            product = (columns @ rows.T).reshape(batch, height, width, per_out)
            total[:, g * per_out : (g + 1) * per_out] = product.transpose(0, 3, 1, 2)
        total = total.astype(np.int64)
    accumulated = _accumulate(total + bias.astype(np.int64)[:, None, None])
    return requantise(accumulated * multiplier[:, None, None], node, _dtype(node))


def _gemm(node: ir.Node, x: Array, w: Array, bias: Array, multiplier: Array) -> Array:
    centred = (x.astype(np.int32) - _integer(node, "x_zero_point")).astype(np.float64)
    total = (centred @ w.T.astype(np.float64)).astype(np.int64) + bias.astype(np.int64)
    return requantise(_accumulate(total) * multiplier, node, _dtype(node))


def _add(node: ir.Node, a: Array, b: Array) -> Array:
    left = (a.astype(np.int64) - _integer(node, "a_zero_point")) * _integer(node, "a_factor")
    right = (b.astype(np.int64) - _integer(node, "b_zero_point")) * _integer(node, "b_factor")
    return requantise(_accumulate(left + right) * _factor(node), node, _dtype(node))


def _mul(node: ir.Node, a: Array, b: Array) -> Array:
    left = a.astype(np.int64) - _integer(node, "a_zero_point")
    right = b.astype(np.int64) - _integer(node, "b_zero_point")
    return requantise(_accumulate(left * right) * _factor(node), node, _dtype(node))


def _average_pool(node: ir.Node, x: Array, factors: Array) -> Array:
    centred = x.astype(np.int64) - _integer(node, "x_zero_point")
    views, _ = _windows(node, centred, 0)
    return requantise(_accumulate(views.sum(axis=(4, 5))) * factors, node, _dtype(node))


def _max_pool(node: ir.Node, x: Array) -> Array:
    lowest = 0 if x.dtype == np.uint8 else -128
    views, _ = _windows(node, x, lowest)
    return np.asarray(views.max(axis=(4, 5)))


def _table(_node: ir.Node, x: Array, entries: Array) -> Array:
    offset = 128 if x.dtype == np.int8 else 0
    return np.asarray(entries[x.astype(np.int32) + offset])


_OPERATORS: dict[str, Callable[..., Array]] = {
    "Quantize": _quantise,
    "Dequantize": _dequantise,
    "Rescale": _rescale,
    "QConv": _conv,
    "QGemm": _gemm,
    "QAdd": _add,
    "QMul": _mul,
    "QAveragePool": _average_pool,
    "MaxPool": _max_pool,
    "Table": _table,
}
