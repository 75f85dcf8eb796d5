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
from edgepress.targets.lowering.dynamic import claim_dynamic_products, computes_integers
from edgepress.targets.lowering.dynamic_reference import dynamic_gemm
from edgepress.targets.lowering.integer_moves import MOVES
from edgepress.targets.lowering.integer_rules import to_integers
from edgepress.targets.lowering.interpolation import InterpolatedTable
from edgepress.targets.lowering.quantization import LIMITS
from edgepress.targets.lowering.softmax import EXPONENTIAL_BITS

Array = npt.NDArray[Any]
_INT32 = 2**31
_EXACT_MOVES = {*MOVES, "Concat"} - {"Resize"}  # they move float32 as it is
_NUDGE = 4  # units in the last place


class Reference:
    """Runs a quantized model as integers.

    Attributes:
        exact: whether all arithmetic between the inputs' Quantize and the outputs' Dequantize is
            integer, so that outputs are the same bits on every target.
        islands: ONNX nodes that compute in float.
    """

    def __init__(self, model: ir.Model) -> None:
        if not computes_integers(model):
            raise ValueError("the model has no QuantizeLinear nodes: nothing to run as integers")
        self.model = to_integers(claim_dynamic_products(model), "uint8")
        islands = float_islands(self.model)
        self.islands = [node.name or node.op_type for island in islands for node in island]
        self.exact = not self.islands
        self._sessions: dict[str, ort.InferenceSession] = {}

    def run(self, feeds: Mapping[str, Array], *, nudged: bool = False) -> dict[str, Array]:
        """Return the outputs for one set of inputs, both by name.

        Where `nudged`, what float islands answer is moved by a few units in the last place, at
        random but always the same, as a compiler's other order of operations moves it.
        """
        random = np.random.default_rng(0)
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
                if nudged and node.op_type not in MOVES:
                    results = [_nudged(result, random) for result in results]
            for output, result in zip(node.outputs, results, strict=True):
                values[output.name or ""] = result
        return {v.name or "": values[v.name or ""] for v in self.model.graph.outputs}

    def _run_onnx(self, node: ir.Node, inputs: list[Array | None]) -> list[Array]:
        key = node.outputs[0].name or ""
        names = [f"i{i}" if array is not None else "" for i, array in enumerate(inputs)]
        feeds = {n: a for n, a in zip(names, inputs, strict=True) if a is not None}
        widened = node.op_type in {*MOVES, "Concat"} and node.outputs[0].dtype == ir.DataType.INT16
        if widened:  # onnxruntime moves float32, which holds 16 bits, but not every int16
            feeds = {
                n: a.astype(np.float32) if a.dtype == np.int16 else a for n, a in feeds.items()
            }
        if key not in self._sessions:
            self._sessions[key] = _session(node, names, feeds, self.model)
        outputs = self._sessions[key].run(None, feeds)
        return [np.asarray(output, np.int16 if widened else None) for output in outputs]


def _nudged(array: Array, random: np.random.Generator) -> Array:
    """Move float32 values by up to _NUDGE units in the last place."""
    if array.dtype != np.float32:
        return array
    units = random.integers(-_NUDGE, _NUDGE + 1, array.shape)
    with np.errstate(all="ignore"):
        moved = array * (1 + units * np.finfo(np.float32).eps).astype(np.float32)
    return np.where(np.isfinite(moved), moved, array)  # a mask may hold the largest number


def float_islands(model: ir.Model) -> list[list[ir.Node]]:
    """Return the ONNX nodes of an integer graph that compute in float: groups without integers."""
    floats = {
        node
        for node in model.graph
        if node.domain != DOMAIN and any(v.dtype == ir.DataType.FLOAT for v in node.outputs)
    }
    islands: list[list[ir.Node]] = []
    for node in (n for n in model.graph if n in floats):
        makers = {value.producer() for value in node.inputs if value is not None}
        joined = [island for island in islands if not makers.isdisjoint(island)]
        islands = [island for island in islands if island not in joined]
        islands.append([*(member for island in joined for member in island), node])
    computing = ([n for n in island if n.op_type not in _EXACT_MOVES] for island in islands)
    return [island for island in computing if island]


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
    options.intra_op_num_threads = 1  # starting threads for each node takes longer than running it
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
    return _checked(total).astype(np.int32).astype(np.float32)


def _checked(total: Array) -> Array:
    """Check that exact sums fit int32."""
    if total.size and (total.min() < -_INT32 or total.max() >= _INT32):
        raise OverflowError("an int32 accumulator would overflow")
    return total.astype(np.int64)


def shifted(total: Array, shifts: Array | int, node: ir.Node, dtype: Any) -> Array:
    """Apply the shift rule: `total / 2**shifts` exactly, rounded half to even, then clamped.

    Args:
        total: int64 below 2**62.
        shifts: at most 62; negative ones multiply.
        node: has the zero point and the clamp.
        dtype: of the result.
    """
    n = np.asarray(shifts, np.int64)
    divisor = np.int64(1) << np.maximum(n, 0)
    quotient, rest = np.divmod(total, divisor)
    twice = 2 * rest
    quotient = quotient + ((twice > divisor) | ((twice == divisor) & (quotient % 2 == 1)))
    result = quotient * (np.int64(1) << np.maximum(-n, 0))
    zero_point, low, high = (node.attributes[n].as_int() for n in ("zero_point", "low", "high"))
    return np.asarray(np.clip(result, low - zero_point, high - zero_point) + zero_point, dtype)


def _finish(total: Array, node: ir.Node, factors: Array | None = None) -> Array:
    """Turn exact sums into outputs, by multipliers or by shifts.

    Args:
        total: int64.
        node: has the output's attributes, and `multiplier` or `shift` where there are no factors.
        factors: float32 multipliers or int32 shifts.
    """
    if factors is None:
        shift = "shift" in node.attributes
        factors = np.asarray(_integer(node, "shift") if shift else _factor(node))
    if factors.dtype != np.float32:
        return shifted(_checked(total), factors, node, _dtype(node))
    with np.errstate(over="ignore"):
        return requantise(_accumulate(total) * factors, node, _dtype(node))


def _dtype(node: ir.Node) -> Any:
    dtype = node.outputs[0].dtype
    assert dtype is not None
    return dtype.numpy()


def _integer(node: ir.Node, name: str) -> int:
    return int(node.attributes[name].as_int())


def _factor(node: ir.Node, name: str = "multiplier") -> np.float32:
    return np.float32(node.attributes[name].as_float())


def _quantise(node: ir.Node, x: Array) -> Array:
    zero_point = _integer(node, "zero_point")
    least, most = LIMITS[_dtype(node).name]
    least, most = (node.attributes.get_int(n, m) for n, m in (("low", least), ("high", most)))
    with np.errstate(over="ignore"):
        scaled = x / _factor(node, "scale")
    low, high = np.float32(least - zero_point), np.float32(most - zero_point)
    scaled = np.where(np.isnan(scaled), high, scaled)  # as the kernels do everywhere
    return (np.rint(np.clip(scaled, low, high)).astype(np.int32) + zero_point).astype(_dtype(node))


def _dequantise(node: ir.Node, x: Array) -> Array:
    centred = x.astype(np.int32) - _integer(node, "zero_point")
    return np.asarray(centred.astype(np.float32) * _factor(node, "scale"))


def _rescale(node: ir.Node, x: Array) -> Array:
    centred = x.astype(np.int64) - _integer(node, "x_zero_point")
    return _finish(centred, node)


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


def _conv(node: ir.Node, x: Array, w: Array, bias: Array, factors: Array) -> Array:
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
    return _finish(total + bias.astype(np.int64)[:, None, None], node, factors[:, None, None])


def _gemm(node: ir.Node, x: Array, w: Array, bias: Array, factors: Array) -> Array:
    centred = (x.astype(np.int32) - _integer(node, "x_zero_point")).astype(np.float64)
    total = (centred @ w.T.astype(np.float64)).astype(np.int64) + bias.astype(np.int64)
    return _finish(total, node, factors)


def _add(node: ir.Node, a: Array, b: Array) -> Array:
    left = (a.astype(np.int64) - _integer(node, "a_zero_point")) * _integer(node, "a_factor")
    right = (b.astype(np.int64) - _integer(node, "b_zero_point")) * _integer(node, "b_factor")
    return _finish(left + right, node)


def _mul(node: ir.Node, a: Array, b: Array) -> Array:
    left = a.astype(np.int64) - _integer(node, "a_zero_point")
    right = b.astype(np.int64) - _integer(node, "b_zero_point")
    return _finish(left * right, node)


def _average_pool(node: ir.Node, x: Array, factors: Array) -> Array:
    centred = x.astype(np.int64) - _integer(node, "x_zero_point")
    views, _ = _windows(node, centred, 0)
    total = views.sum(axis=(4, 5))
    if "shift" in node.attributes:
        product = _checked(total) * factors.astype(np.int64)
        return shifted(product, _integer(node, "shift"), node, _dtype(node))
    return _finish(total, node, factors)


def _max_pool(node: ir.Node, x: Array) -> Array:
    views, _ = _windows(node, x, LIMITS[x.dtype.name][0])
    return np.asarray(views.max(axis=(4, 5)))


def _table(node: ir.Node, x: Array, entries: Array) -> Array:
    if x.dtype == np.int16:
        table = InterpolatedTable(entries, _integer(node, "bits"), _integer(node, "fraction"))
        return table.look_up(x).astype(_dtype(node))
    return np.asarray(entries[x.astype(np.int32) - LIMITS[x.dtype.name][0]])


def _softmax(node: ir.Node, x: Array, table: Array) -> Array:
    axis, values = _integer(node, "axis"), x.astype(np.int64)
    below = values.max(axis=axis, keepdims=True) - values
    exponentials, half = table.astype(np.int64), 1 << (EXPONENTIAL_BITS - 1)
    if x.dtype == np.int16:
        product = exponentials[below >> 8] * exponentials[256 + (below & 255)]
        powers = (product + half) >> EXPONENTIAL_BITS
    else:
        powers = exponentials[below]
    factor, shift = _integer(node, "factor"), _integer(node, "factor_shift")
    total = powers.sum(axis=axis, keepdims=True)
    divisor = np.minimum((total * factor + (1 << (shift - 1))) >> shift, _INT32 - 1)
    steps = (powers + divisor // 2) // divisor + _integer(node, "zero_point")
    limited = np.clip(steps, _integer(node, "low"), _integer(node, "high"))
    return np.asarray(limited, _dtype(node))


_OPERATORS: dict[str, Callable[..., Array]] = {
    "Quantize": _quantise,
    "Dequantize": _dequantise,
    "DynamicGemm": dynamic_gemm,
    "Rescale": _rescale,
    "QConv": _conv,
    "QGemm": _gemm,
    "QAdd": _add,
    "QMul": _mul,
    "QAveragePool": _average_pool,
    "MaxPool": _max_pool,
    "QSoftmax": _softmax,
    "Table": _table,
}
