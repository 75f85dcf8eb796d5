"""Softmax in integers: how near it is to the real one, and that every kernel answers the same."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from edgepress.targets.compile import kernel_assembly
from edgepress.targets.isa.base import Isa, load_isa
from edgepress.targets.lowering.build import lower
from edgepress.targets.lowering.softmax import divisor_factor, exponentials
from edgepress.targets.program import Array
from edgepress.targets.reference import Reference
from edgepress.targets.schedules.epilogue import Requantise
from edgepress.targets.schedules.softmax import SoftmaxShape, softmax
from tests.graphs import answers, nodes
from tests.targets.interpret import run_program
from tests.targets.kernels import ISAS, LOWEST, Case, check, native_isas, target_of
from tests.targets.qdq import Qdq, Scale, check_graphs, drawn, inputs_of, merged_graphs
from tests.targets.test_fixed_point_code import float_code

X: Scale = (0.08, 128)


def rows_to_steps(
    x: Array, table: Array, scaling: tuple[int, int], epilogue: Requantise, axis: int
) -> Array:
    """The rule of docs/integer.md element by element, in Python's own integers."""
    moved = np.moveaxis(x, axis, -1)
    result = np.empty(moved.shape, epilogue.dtype)
    factor, shift = scaling
    for index in np.ndindex(moved.shape[:-1]):
        row = [int(value) for value in moved[index]]
        below = [max(row) - value for value in row]
        if x.dtype == np.int16:
            powers = [
                (int(table[d // 256]) * int(table[256 + d % 256]) + 2**28) // 2**29 for d in below
            ]
        else:
            powers = [int(table[d]) for d in below]
        divisor = min((sum(powers) * factor + 2 ** (shift - 1)) // 2**shift, 2**31 - 1)
        for i, power in enumerate(powers):
            steps = (power + divisor // 2) // divisor + epilogue.zero_point
            result[(*index, i)] = min(max(steps, epilogue.low), epilogue.high)
    return np.moveaxis(result, -1, axis)


def rows_of(random: np.random.Generator, rows: int, length: int, dtype: str) -> Array:
    """Random rows, and hostile ones: all equal, one above all others, both ends only."""
    lowest, highest = np.iinfo(dtype).min, np.iinfo(dtype).max
    x = random.integers(lowest, highest + 1, (rows, length)).astype(dtype)
    x[0] = random.integers(lowest, highest)
    if rows > 2:
        x[1], x[1, 0] = lowest, highest
        x[2] = np.where(np.arange(length) % 2, lowest, highest)
    return x


def softmax_case(
    isa: Isa, shape: SoftmaxShape, scales: tuple[float, float], dtype: str, point: int = 0
) -> Case:
    x = rows_of(
        np.random.default_rng(shape.length), shape.outer * shape.inner, shape.length, dtype
    ).reshape(shape.outer, shape.inner, shape.length)
    x = np.ascontiguousarray(np.moveaxis(x, 1, 2))
    low = LOWEST[isa.storage]
    epilogue = Requantise(isa.storage, low + point, low + point // 2, low + 255 - point)
    table, scaling = exponentials(scales[0], dtype), divisor_factor(scales[1])
    return Case(
        lambda name: softmax(name, shape, dtype, *scaling, epilogue),
        (x, table),
        rows_to_steps(x, table, scaling, epilogue, 1),
        f"{isa.name} softmax {shape} {scales} {dtype}",
    )


def softmax_cases(isa: Isa) -> list[Case]:
    shapes = [
        SoftmaxShape(4, 10), SoftmaxShape(1, 1), SoftmaxShape(3, 2), SoftmaxShape(5, 33),
        SoftmaxShape(3, 1001), SoftmaxShape(2, 21, 6), SoftmaxShape(1, 3, 1), SoftmaxShape(1, 4, 3),
    ]  # fmt: skip
    scales = [(0.1, 1 / 256), (0.02, 1 / 255), (2.0**-100, 0.3), (30.0, 2.0**-28), (1e-3, 200.0)]
    cases = [  # the divisor is 3 or 4, and its rounding counts
        softmax_case(isa, SoftmaxShape(20, 8), (0.08, 1.3 * 2.0**-28), isa.storage),
    ]
    for number, shape in enumerate(shapes):
        for pair in (scales[number % len(scales)], scales[(number + 2) % len(scales)]):
            cases.append(softmax_case(isa, shape, pair, isa.storage, point=7 * (number % 3)))
        cases.append(softmax_case(isa, shape, (scales[number % 5][0] / 200, 1 / 256), "int16"))
    return cases


@pytest.mark.parametrize("isa", native_isas())
def test_kernels(isa: str) -> None:
    check(softmax_cases(load_isa(isa)), isa)


@pytest.mark.parametrize("isa", native_isas()[:1])
def test_threads_share_the_rows(isa: str) -> None:
    check([softmax_case(load_isa(isa), SoftmaxShape(3300, 10), (0.1, 1 / 255), "uint8")], isa)


@pytest.mark.parametrize(
    ("length", "limit", "dtype", "result"),
    [(1, 0.51, "uint8", "uint8"), (10, 0.51, "uint8", "uint8"), (1000, 0.51, "int8", "uint8"),
     (2**17, 0.6, "uint8", "uint8"), (10, 0.51, "int16", "uint8"), (1000, 0.51, "int16", "uint8"),
     (10, 1.5, "int16", "int16"), (1000, 1.5, "uint8", "int16")],
)  # fmt: skip
def test_how_far_it_is_from_the_real_one(
    length: int, limit: float, dtype: str, result: str
) -> None:
    random = np.random.default_rng(length)
    for x_scale in (0.001, 0.03, 0.2, 3.0):
        x_scale = float(np.float32(x_scale * (1 / 256 if dtype == "int16" else 1.0)))
        x = rows_of(random, 4, length, dtype)
        powers = np.exp((x.astype(np.float64) - x.max(axis=1, keepdims=True)) * x_scale)
        real = powers / powers.sum(axis=1, keepdims=True)
        y_scale = float(np.float32(real.max() / (255 if result == "uint8" else 2**15 - 1)))
        graph = Qdq(x.shape, dtype)
        source = graph.pair("x", (x_scale, -LOWEST[dtype]))
        y = graph.pair(graph.op("Softmax", source), (y_scale, -min(LOWEST[result], 0)), result)
        reference = Reference(graph.model(y, opset=21))
        assert reference.exact
        (answer,) = reference.run({"x": (x * np.float32(x_scale)).astype(np.float32)}).values()
        assert np.abs(answer - real).max() <= limit * y_scale


def test_exponentials() -> None:
    table = exponentials(0.1, "uint8")
    assert (table[0], table[1], table[255]) == (2**29, round(2**29 * np.exp(-0.1)), 0)
    wide = exponentials(0.001, "int16")
    assert wide.shape == (512,)
    assert (wide[1], wide[257]) == (round(2**29 * np.exp(-0.256)), round(2**29 * np.exp(-0.001)))


@given(scale=st.floats(2.0**-28, 2.0**8))
def test_factors_have_16_bits_and_powers_of_two_are_exact(scale: float) -> None:
    factor, shift = divisor_factor(scale)
    assert 2**15 <= factor <= 2**16
    assert 1 <= shift <= 43
    assert abs(factor / 2**shift / scale - 1) <= 2.0**-16
    assert (2**17 * 2**29) * factor + 2 ** (shift - 1) < 2**63
    factor, shift = divisor_factor(2.0 ** np.floor(np.log2(scale)))
    assert factor == 2**15


def start(shape: tuple[int, ...] = (3, 10), scale: Scale = X) -> tuple[Qdq, str]:
    graph = Qdq(shape)
    return graph, graph.pair("x", scale)


def test_a_softmax_is_one_node() -> None:
    graph, x = start()
    y = graph.op("Relu", graph.op("Softmax", x))
    reference = Reference(graph.model(graph.pair(y, (1 / 256, 3))))
    assert reference.exact
    assert nodes(reference.model).splitlines()[1] == (
        "v8 = QSoftmax(v2, v8_exponentials) "
        "{axis=1, factor=32768, factor_shift=23, high=255, low=3, zero_point=3}"
    )


@pytest.mark.parametrize(
    ("opset", "axis", "exact"), [(13, 0, True), (13, -2, True), (12, 0, False), (12, 1, True)]
)
def test_axes(opset: int, axis: int, exact: bool) -> None:
    graph, x = start()
    y = graph.op("Softmax", x, attributes=f"axis={axis}")
    model = graph.model(graph.pair(y, (1 / 256, 0)), opset=opset)
    assert Reference(model).exact == exact
    feed = {"x": np.random.default_rng(0).standard_normal((3, 10)).astype(np.float32) * 4}
    (answer,), (wanted,) = Reference(model).run(feed).values(), answers(model, feed)
    assert np.abs(answer - wanted).max() <= 1.01 / 256


@pytest.mark.parametrize(
    ("shape", "scale"), [((1, 2**17 + 1), 0.01), ((2, 3), 2.0**-29), ((2, 3), 1000.0)]
)
def test_what_stays_float(shape: tuple[int, ...], scale: float) -> None:
    graph, x = start(shape)
    reference = Reference(graph.model(graph.pair(graph.op("Softmax", x), (scale, 0))))
    assert reference.islands == ["Softmax_2"]


@settings(max_examples=30, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    x_scale=st.sampled_from([1e-6, 0.01, 0.07, 0.4, 20.0]),
    y_scale=st.sampled_from([1 / 256, 1 / 255, 0.0031, 0.01, 1.0]),
    zero=st.sampled_from([0, 1, 128, 255]),
    dtype=st.sampled_from(["uint8", "int8"]),
    length=st.sampled_from([1, 2, 7, 300]),
)
def test_within_one_step_of_onnxruntime(
    x_scale: float, y_scale: float, zero: int, dtype: str, length: int
) -> None:
    graph = Qdq((4, length), dtype)
    x = graph.pair("x", (x_scale, 100))
    model = graph.model(graph.pair(graph.op("Softmax", x), (y_scale, zero)))
    random = np.random.default_rng(length)
    feed = {"x": (random.standard_normal((4, length)) * 70 * x_scale).astype(np.float32)}
    (answer,), (wanted,) = Reference(model).run(feed).values(), answers(model, feed)
    assert np.abs(answer - wanted).max() <= 1.01 * y_scale


@st.composite
def softmax_nets(draw: st.DrawFn) -> ir.Model:
    """A convolution or nothing, a softmax along any axis, sometimes clamped, sometimes followed."""
    graph, wide = Qdq((2, 4, 3, 5), draw(st.sampled_from(["uint8", "int8"]))), (2.0**-12, 2**15)
    scales = st.tuples(st.sampled_from([0.02, 0.3, 1e-6, 40.0, 2.0**-5]), st.sampled_from([0, 128]))
    x = graph.pair("x", draw(scales))
    if draw(st.booleans()):
        w = np.random.default_rng(0).integers(-127, 128, (7, 4, 1, 1)).astype(np.int8)
        x = graph.pair(graph.op("Conv", x, graph.weight(w, 0.01)), draw(scales))
    if draw(st.booleans()):
        x = graph.pair(x, wide, "int16")
    y = graph.op("Softmax", x, attributes=f"axis={draw(st.integers(-4, 3))}")
    if draw(st.booleans()):
        y = graph.op("Clip", y, graph.constant(np.float32(0.01)), graph.constant(np.float32(0.5)))
    results = st.tuples(st.sampled_from([1 / 256, 1 / 255, 1e-6, 1.0]), st.sampled_from([0, 9]))
    y = graph.pair(y, wide, "int16") if draw(st.booleans()) else graph.pair(y, draw(results))
    if draw(st.booleans()):
        y = graph.pair(graph.op("Mul", y, x), draw(scales))
    return graph.model(y, opset=21)


@pytest.mark.parametrize("isa", native_isas())
def test_compiled_softmaxes_are_the_references(isa: str) -> None:
    models = drawn(softmax_nets(), 24 if isa == native_isas()[-1] else 6)
    inputs = inputs_of(models)
    program, joined = merged_graphs(models, target_of(isa), inputs)
    results = run_program(program, target_of(isa), joined)
    assert check_graphs(models, inputs, results) == len(models)


def test_a_softmax_over_channels_stays_in_place() -> None:
    """Behind a convolution it runs over NHWC, without a transpose before it."""
    graph = Qdq((1, 4, 3, 5))
    x = graph.pair("x", (0.05, 128))
    w = np.ones((7, 4, 1, 1), np.int8)
    conv = graph.pair(graph.op("Conv", x, graph.weight(w, 0.01)), X)
    y = graph.pair(graph.op("Softmax", conv, attributes="axis=1"), (1 / 256, 0))
    program = lower(graph.model(y), target_of(native_isas()[0]))
    kinds = [call.kernel.rsplit("_", 1)[0] for call in program.calls]
    assert kinds[-3:] == ["softmax", "dequantise", "transpose"]


@pytest.mark.parametrize("isa", [*ISAS, "scalar"])
def test_powers_of_two_need_no_floats(isa: str) -> None:
    """Neither the softmax nor a function before it holds a float instruction."""
    target = target_of(isa)
    graph = Qdq((3, 10), "int8")
    x = graph.pair("x", (2.0**-4, 128))  # the zero point is 0: 128 above the lowest
    gate = graph.pair(graph.op("Mul", graph.op("Sigmoid", x), x), (2.0**-5, 128))
    y = graph.pair(graph.op("Softmax", gate), (2.0**-7, 128))
    code = kernel_assembly(lower(graph.model(y), target), target)
    assert "softmax_" in code
    assert float_code(code, target) == []
