"""QDQ graphs: written by hand operator by operator, or drawn at random with hostile scales."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import onnx_ir as ir
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from edgepress.passes.base import Context
from edgepress.passes.fix_shapes import FixShapes
from edgepress.targets.base import Target
from edgepress.targets.cuda.kernel import CudaKernel
from edgepress.targets.lowering.build import lower
from edgepress.targets.program import Array, Program
from edgepress.targets.reference import Reference
from tests.graphs import feeds, net
from tests.targets.kernels import HIGHEST, LOWEST, largest_weight

Scale = tuple[float, int]  # a scale, and a zero point counted from the lowest value


class Qdq:
    """A graph that grows from a float input `x`."""

    def __init__(self, shape: Sequence[int] = (1, 3, 6, 6), dtype: str = "uint8") -> None:
        self.shape, self.dtype = tuple(shape), dtype
        self.lines: list[str] = []
        self.constants: dict[str, Array] = {}
        self.outputs: list[str] = []

    def name(self, kind: str) -> str:
        return f"{kind}{len(self.lines) + len(self.constants)}"

    def constant(self, array: Array | np.generic, kind: str = "c") -> str:
        name = self.name(kind)
        self.constants[name] = np.asarray(array)
        return name

    def op(self, op_type: str, *inputs: str, attributes: str = "", outputs: int = 1) -> str:
        """Add a node and return its (first) output."""
        name = self.name("v")
        names = ", ".join([name, *(f"{name}_{i}" for i in range(1, outputs))])
        brackets = f"<{attributes}>" if attributes else ""
        self.lines.append(f"{names} = {op_type} {brackets} ({', '.join(inputs)})")
        return name

    def pair(self, value: str, scale: Scale, dtype: str = "") -> str:
        """QuantizeLinear and DequantizeLinear; 16-bit values have no zero point but 0."""
        dtype = dtype or self.dtype
        point = 0 if dtype == "int16" else scale[1] + LOWEST[dtype]
        parameters = (
            self.constant(np.float32(scale[0]), "s"),
            self.constant(np.dtype(dtype).type(point), "z"),
        )
        quantized = self.op("QuantizeLinear", value, *parameters)
        return self.op("DequantizeLinear", quantized, *parameters)

    def weight(self, array: Array, scale: Array | np.generic | float, axis: int = 0) -> str:
        """A constant of whole numbers behind a DequantizeLinear."""
        scales = np.asarray(scale, np.float32)
        zeros = np.zeros(scales.shape, array.dtype)
        parameters = (self.constant(scales, "s"), self.constant(zeros, "z"))
        stored = self.constant(array, "w")
        return self.op("DequantizeLinear", stored, *parameters, attributes=f"axis={axis}")

    def model(self, *outputs: str, opset: int = 0) -> ir.Model:
        if not opset:  # 21 is the first that quantizes to 16 bits
            wide = any(array.dtype == np.int16 for array in self.constants.values())
            opset = 21 if wide else 17
        results = ", ".join(f"float {name}" for name in outputs)
        dims = ", ".join(map(str, self.shape))
        model = net(
            f"(float[{dims}] x) => ({results})",
            " ".join(self.lines),
            self.constants,
            opset=opset,
            ir_version=8 if opset < 19 else 10,
        )
        return shaped(model)


def shaped(model: ir.Model) -> ir.Model:
    """Give every value a static shape."""
    return FixShapes().call(model, Context()).model


def merged(programs: Sequence[Program]) -> Program:
    """Many programs in one; the names of number `i` start with `gi_`."""
    whole = Program()
    for i, program in enumerate(programs):
        prefix = f"g{i}_"

        def renamed(names: Sequence[str], prefix: str = prefix) -> tuple[str, ...]:
            return tuple(prefix + name for name in names)

        whole.inputs += renamed(program.inputs)
        whole.outputs += renamed(program.outputs)
        for name, tensor in program.tensors.items():
            whole.tensors[prefix + name] = replace(tensor, name=prefix + name)
        whole.constants.update({prefix + n: a for n, a in program.constants.items()})
        for name, kernel in program.kernels.items():
            cuda = isinstance(kernel, CudaKernel)
            whole.kernels[prefix + name] = kernel.renamed(prefix + name) if cuda else kernel
        for call in program.calls:
            whole.calls.append(
                replace(
                    call,
                    kernel=prefix + call.kernel,
                    arguments=renamed(call.arguments),
                    outputs=renamed(call.outputs),
                )
            )
    return whole


def merged_graphs(
    models: Sequence[ir.Model], target: Target, feeds: Sequence[Mapping[str, Array]]
) -> tuple[Program, dict[str, Array]]:
    """Lower models into one program, and join their feeds."""
    program = merged([lower(model, target) for model in models])
    joined = {f"g{i}_{n}": a for i, feed in enumerate(feeds) for n, a in feed.items()}
    return program, joined


#: What inputs look like, in turn: as usual, and what samples on a board may be at worst.
HOSTILE = (1.0, 1.0, 0.0, 1e-38, 1e30)


def inputs_of(models: Sequence[ir.Model]) -> list[dict[str, Array]]:
    """Normal values, a few of them far out; some all zero, tiny, huge, or a single value."""
    result = []
    for seed, model in enumerate(models):
        feed = feeds(model, seed)
        for array in feed.values():
            array *= 3
            array.flat[:: max(array.size // 5, 1)] *= 1e4
            array *= np.float32(HOSTILE[seed % len(HOSTILE)])
            if seed % 7 == 6:
                array[...] = array.flat[0]
        result.append(feed)
    return result


def check_graphs(
    models: Sequence[ir.Model], inputs: Sequence[dict[str, Array]], results: dict[str, Array]
) -> int:
    """Compare with the reference; return how many graphs are integers throughout."""
    exact = 0
    for index, (model, feed) in enumerate(zip(models, inputs, strict=True)):
        reference = Reference(model)
        exact += reference.exact
        for name, wanted in reference.run(feed).items():
            answer = results[f"g{index}_{name}"]
            assert (answer.dtype, answer.shape) == (wanted.dtype, wanted.shape)
            if reference.exact:
                np.testing.assert_array_equal(answer, wanted, f"graph {index}: {name}")
    return exact


# Random graphs -------------------------------------------------------------------------------

SCALES = [0.02, 0.05, 0.3, 1.0, 1e-6, 40.0]  # the last two saturate, or leave zeros only
POINTS = [0, 3, 128, 200, 255]
TABLES = ["Sigmoid", "Tanh", "HardSigmoid", "LeakyRelu", "Elu", "Softplus", "Abs", "Neg"]
STEPS = [
    "conv", "conv", "conv", "depthwise", "add", "residual", "sub", "mul", "concat", "max_pool",
    "average_pool", "global_pool", "relu", "clip", "table", "broadcast", "rescale",
]  # fmt: skip
MOVES = ["transpose", "slice", "pad", "resize"]


@dataclass(frozen=True)
class Style:
    """How the values of a drawn graph are stored.

    Attributes:
        dtypes: of the values; one is drawn for each.
        fixed_point: all scales are powers of two and all zero points mean 0.
        weights: dtypes of the weights.
    """

    dtypes: tuple[str, ...]
    fixed_point: bool = False
    weights: tuple[str, ...] = ("int8",)

    def scale(self, scale: float, dtype: str) -> float:
        """A scale like this one: 256 times finer for 16 bits."""
        scale = scale / 256 if dtype == "int16" else scale
        return 2.0 ** round(math.log2(scale)) if self.fixed_point else scale

    @property
    def widest(self) -> str:
        """The widest dtype of a value."""
        return "int16" if "int16" in self.dtypes else "uint8"


NARROW = (Style(("uint8",)), Style(("int8",)))
WIDE = (
    Style(("int16",)),
    Style(("int16",), weights=("int16",)),
    Style(("uint8", "int16")),
    Style(("int8", "int16"), weights=("int8", "int16")),
)
FIXED_POINT = (
    Style(("int8",), True),
    Style(("int16",), True, weights=("int16",)),
    Style(("int8", "int16"), True, weights=("int8", "int16")),
)


def draw_pair(draw: st.DrawFn, graph: Qdq, style: Style, value: str) -> str:
    """Quantize a value somehow."""
    dtype = draw(st.sampled_from(style.dtypes))
    scale, point = draw(st.sampled_from(SCALES)), draw(st.sampled_from(POINTS))
    return graph.pair(
        value, (style.scale(scale, dtype), 128 if style.fixed_point else point), dtype
    )


@st.composite
def qdq_nets(
    draw: st.DrawFn, most_steps: int = 4, moves: bool = False, styles: Sequence[Style] = NARROW
) -> ir.Model:
    """Random quantized CNNs with whole-integer interiors."""
    style = draw(st.sampled_from(list(styles)))
    batch, channels = draw(st.sampled_from([1, 1, 2])), draw(st.sampled_from([1, 3, 5, 8]))
    graph = Qdq((batch, channels, 5, 6), style.dtypes[0])
    random = np.random.default_rng(draw(st.integers(0, 2**16)))
    values = [(graph.pair("x", (style.scale(0.03, graph.dtype), 128)), graph.shape)]
    steps = draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=most_steps))
    if moves:
        steps.append(draw(st.sampled_from(MOVES)))
    for step in steps:
        values.append(_step(draw, graph, style, step, values, random))
    last, shape = values[-1]
    if draw(st.booleans()):
        flat = draw_pair(draw, graph, style, graph.op("Flatten", last))
        named = _weight(draw, graph, style, (7, math.prod(shape[1:])), random)
        gemm = graph.op("Gemm", flat, named, attributes="transB=1")
        last = draw_pair(draw, graph, style, gemm)
    return graph.model(last)


def _step(
    draw: st.DrawFn,
    graph: Qdq,
    style: Style,
    step: str,
    values: list[tuple[str, tuple[int, ...]]],
    random: np.random.Generator,
) -> tuple[str, tuple[int, ...]]:
    source, shape = values[-1]
    made = shape
    if step in ("conv", "depthwise"):
        out, made = _conv(draw, graph, style, source, shape, step == "depthwise", random)
    elif step in ("add", "sub", "mul", "residual", "concat"):
        same = [v for v, s in values if s == shape]
        other = draw(st.sampled_from(same))
        if other == source or step == "residual":
            other = draw_pair(draw, graph, style, graph.op("Relu", source))
        kind = {"residual": "Add", "concat": "Concat"}.get(step, step.capitalize())
        out = graph.op(kind, source, other, attributes="axis=1" if step == "concat" else "")
        if step == "concat":
            made = (shape[0], 2 * shape[1], *shape[2:])
    elif step == "broadcast":
        dtype = draw(st.sampled_from(style.dtypes))
        array = random.integers(LOWEST[dtype], HIGHEST[dtype] + 1, (shape[1], 1, 1))
        named = graph.weight(array.astype(dtype), style.scale(0.01, dtype))
        out = graph.op(draw(st.sampled_from(["Add", "Mul", "Sub"])), source, named)
    elif step in ("max_pool", "average_pool") and shape[3] >= 2:
        stride = draw(st.integers(1, 2))
        include = ", count_include_pad=1" if step == "average_pool" and draw(st.booleans()) else ""
        text = f"kernel_shape=[2,3], strides=[{stride},{stride}], pads=[1,0,0,1]{include}"
        out = graph.op({"max_pool": "MaxPool"}.get(step, "AveragePool"), source, attributes=text)
        made = (*shape[:2], (shape[2] - 1) // stride + 1, (shape[3] - 2) // stride + 1)
    elif step == "global_pool":
        out, made = graph.op("GlobalAveragePool", source), (*shape[:2], 1, 1)
    elif step == "table":
        out = graph.op(draw(st.sampled_from(TABLES)), source)
    elif step == "rescale":
        out = source
    elif step in MOVES:
        out, made = _move(graph, step, source, shape)
    else:
        out = _clamp(draw, graph, source)
    if step not in ("relu", "clip", "rescale") and draw(st.booleans()):
        out = _clamp(draw, graph, out)
    return draw_pair(draw, graph, style, out), made


def _clamp(draw: st.DrawFn, graph: Qdq, source: str) -> str:
    if draw(st.booleans()):
        return graph.op("Relu", source)
    low, high = draw(st.sampled_from([(0, 6), (-1, 1), (2, 3), (-9, -2), (0.5, 0.4)]))
    bounds = (graph.constant(np.float32(bound)) for bound in (low, high))
    return graph.op("Clip", source, *bounds)


def _conv(
    draw: st.DrawFn,
    graph: Qdq,
    style: Style,
    source: str,
    shape: tuple[int, ...],
    depthwise: bool,
    random: np.random.Generator,
) -> tuple[str, tuple[int, ...]]:
    channels = shape[1]
    groups = channels if depthwise or draw(st.integers(0, 5)) == 0 else 1
    out = channels if depthwise else groups * draw(st.sampled_from([1, 2, 4, 9]))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (1, 3), (2, 2)]))
    inputs = [source, _weight(draw, graph, style, (out, channels // groups, *kernel), random)]
    if draw(st.booleans()):
        inputs.append(graph.constant(random.uniform(-1, 1, out).astype(np.float32)))
    pads = [int(random.integers(0, k)) for k in (*kernel, *kernel)]
    stride = draw(st.integers(1, 2))
    text = f"group={groups}, pads=[{','.join(map(str, pads))}], strides=[{stride},{stride}]"
    made = [
        (size + pads[i] + pads[i + 2] - kernel[i]) // stride + 1 for i, size in enumerate(shape[2:])
    ]
    if min(made) < 1:
        return graph.op("Relu", source), shape
    return graph.op("Conv", *inputs, attributes=text), (shape[0], out, *made)


def _weight(
    draw: st.DrawFn,
    graph: Qdq,
    style: Style,
    shape: tuple[int, ...],
    random: np.random.Generator,
) -> str:
    """Weights that no sum overflows with, per channel or not, some at a scale far off."""
    dtype = draw(st.sampled_from(style.weights))
    largest = largest_weight(style.widest, dtype, math.prod(shape[1:]))
    w = random.integers(-largest, largest + 1, shape).astype(dtype)
    if draw(st.integers(0, 4)) == 0:
        w[0] = 0  # a dead channel
    per_channel = draw(st.booleans())
    scales = random.uniform(0.2, 2, shape[:1] if per_channel else ()) / max(largest, 1)
    if style.fixed_point:
        scales = 2.0 ** np.rint(np.log2(scales))
        if draw(st.integers(0, 4)) == 0:  # shifts to the left, or of everything
            scales = scales * 2.0 ** draw(st.sampled_from([-30, 14, 30]))
    return graph.weight(w, scales.astype(np.float32))


def _move(
    graph: Qdq, step: str, source: str, shape: tuple[int, ...]
) -> tuple[str, tuple[int, ...]]:
    if step == "transpose":
        out = graph.op("Transpose", source, attributes="perm=[0,1,3,2]")
        return out, (*shape[:2], shape[3], shape[2])
    if step == "slice":
        bounds = [graph.constant(np.array([n])) for n in (0, -1, 1)]
        made = (shape[0], max(shape[1] - 1, 0), *shape[2:])
        return (graph.op("Slice", source, *bounds), made) if made[1] else (source, shape)
    if step == "pad":
        pads = graph.constant(np.array([0, 0, 1, 0, 0, 0, 0, 2]))
        return graph.op("Pad", source, pads), (*shape[:2], shape[2] + 1, shape[3] + 2)
    scales = graph.constant(np.array([1, 1, 2, 1], np.float32))
    text = 'mode="nearest", nearest_mode="floor", coordinate_transformation_mode="asymmetric"'
    out = graph.op("Resize", source, "", scales, attributes=text)
    return out, (*shape[:2], shape[2] * 2, shape[3])


Drawn = TypeVar("Drawn")


def drawn(strategy: st.SearchStrategy[Drawn], count: int) -> list[Drawn]:
    """The same models, or whatever it is, in every run."""
    models: list[Drawn] = []

    @settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=(HealthCheck.too_slow, HealthCheck.data_too_large),
    )
    @given(strategy)
    def collect(model: Drawn) -> None:
        models.append(model)

    collect()
    return models
