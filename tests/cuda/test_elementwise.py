"""Element by element on CUDA: integers and casts to the bit, activation functions closely."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from edgepress.targets.cuda import elementwise
from edgepress.targets.cuda.cast import cast
from edgepress.targets.cuda.elementwise import Repeated, repeats
from edgepress.targets.cuda.kernel import CudaKernel
from edgepress.targets.program import Array
from edgepress.targets.schedules.activations import Activation
from edgepress.targets.schedules.epilogue import Requantise, Shift
from tests.cuda.cases import MULTIPROCESSORS, check, check_halves, run_exact
from tests.graphs import random
from tests.targets.kernels import LOWEST, WIDE, Case, eight_bit, requantised
from tests.targets.qdq import Qdq, Scale
from tests.targets.test_elementwise import every_value
from tests.targets.test_float_bits import hostile_floats
from tests.targets.test_interpolate import EVERY, KINDS, random_entries, read

SIZES = (1, 7, 16, 33, 100, 4097)
BYTES = [Requantise("uint8", 7, 5, 250), Requantise("int8", -9, -128, 100)]
SHIFTS = [
    Shift("int8", 0, -128, 127),
    Shift("uint8", 128, 0, 255),
    Shift("int16", 0, -9000, 2**15 - 1),
]


def cast_case(array: Array, dtype: str) -> Case:
    dtypes = (str(array.dtype), dtype)
    with np.errstate(over="ignore"):
        wanted = array.astype(dtype)
    return Case(
        lambda name: cast(name, array.size, dtypes, MULTIPROCESSORS),
        (array,),
        wanted,
        f"cast {array.size} {dtypes}",
    )


def quantise_case(x: Array, scale: float, out: Requantise) -> Case:
    """The rule of docs/integer.md in NumPy; x is float32 or float16."""
    low, high = (np.float32(limit - out.zero_point) for limit in (out.low, out.high))
    with np.errstate(over="ignore", invalid="ignore"):
        steps = np.clip(x.astype(np.float32) / np.float32(scale), low, high)
    steps = np.rint(np.where(np.isnan(steps), high, steps)).astype(np.int64)
    return Case(
        lambda name: elementwise.quantise(name, x.size, str(x.dtype), scale, out, MULTIPROCESSORS),
        (x,),
        (steps + out.zero_point).astype(out.dtype),
        f"quantise {x.size} {x.dtype} / {scale} to {out}",
    )


def dequantise_case(size: int, dtypes: tuple[str, str], scale: float, point: int) -> Case:
    x = every_value(size, dtypes[0])
    with np.errstate(over="ignore"):
        wanted = (x.astype(np.float32) - np.float32(point)) * np.float32(scale)
        wanted = wanted.astype(dtypes[1])
    bits = np.uint16 if dtypes[1] == "float16" else np.uint32  # compared exactly
    return Case(
        lambda name: elementwise.dequantise(name, size, dtypes, scale, point, MULTIPROCESSORS),
        (x,),
        wanted.view(bits),
        f"dequantise {size} {dtypes} * {scale}",
    )


def rescale_case(size: int, dtype: str, factor: float, out: Requantise) -> Case:
    x, point = every_value(size, dtype), 0 if dtype == "int16" else LOWEST[dtype] + 50
    return Case(
        lambda name: elementwise.rescale(name, size, dtype, point, factor, out, MULTIPROCESSORS),
        (x,),
        requantised(x.astype(np.int64) - point, factor, out),
        f"rescale {size} {dtype} * {factor} to {out}",
    )


def binary_case(
    kind: str,
    size: int,
    periods: tuple[int, int],
    out: Requantise,
    factor: float,
    dtypes: tuple[str, str] = ("uint8", "int8"),
    factors: tuple[int, int] = (1, 1),
    chunks: int = 1,
) -> Case:
    """Two operands of which a part of `periods` elements repeats in each of some chunks."""
    source = np.random.default_rng(size)
    operands, values, centred = [], [], []
    for dtype, period, offset in zip(dtypes, periods, (255, 3), strict=True):
        point = 0 if dtype == "int16" else LOWEST[dtype] + offset
        parts = 1 if period == size else chunks
        values.append(eight_bit(source, (parts, period), dtype))
        operands.append(Repeated(dtype, point, period, size // parts))
        whole = np.tile(values[-1], (1, size // parts // period)).ravel()
        centred.append(whole.astype(np.int64) - point)
    pair = (operands[0], operands[1])
    if kind == "add":
        total = centred[0] * factors[0] + centred[1] * factors[1]
    else:
        total = centred[0] * centred[1]

    def kernel(name: str) -> CudaKernel:
        if kind == "add":
            return elementwise.add(name, size, pair, factors, factor, out, MULTIPROCESSORS)
        return elementwise.multiply(name, size, pair, factor, out, MULTIPROCESSORS)

    what = f"{kind} {size} {periods} {factors} {factor} {dtypes} {out}"
    return Case(kernel, (values[0], values[1]), requantised(total, factor, out), what)


def test_casts() -> None:
    floats = np.concatenate([hostile_floats(0), [np.float32(65519.99), np.float32(65520)]])
    floats = floats[~np.isnan(floats)]
    cases = [cast_case(floats[:size], "float16") for size in (1, 7, 100, len(floats))]
    every_half = np.arange(2**16).astype(np.uint16).view(np.float16)
    cases.append(cast_case(every_half[~np.isnan(every_half)], "float32"))
    for dtype in ("bool", "uint8", "int16", "int32", "int64", "float32", "float16"):
        cases += [cast_case((np.arange(size) % 2).astype(dtype), dtype) for size in (3, 35, 4099)]
    check(cases)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_quantise_rounds_half_to_even_and_saturates(dtype: str) -> None:
    ties = (np.arange(-600, 601) / 2).astype(np.float32)
    ends = np.array([np.inf, -np.inf, 6e4, -6e4, 6e-8, 0.0, -0.0, np.nan], np.float32)
    x = np.concatenate([ties, np.nextafter(ties, np.float32(1e9)), ends])
    cases = [
        quantise_case((x * np.float32(scale)).astype(dtype), scale, out)
        for scale, out in itertools.product((1.0, float(np.float32(0.1))), [*BYTES, WIDE])
    ]
    cases += [quantise_case(x[:size].astype(dtype), 0.5, BYTES[0]) for size in SIZES[:5]]
    check(cases)


def test_quantise_in_fixed_point() -> None:
    outputs = itertools.cycle([WIDE, *SHIFTS, *BYTES])
    exponents = (-100, -24, -7, 0, 1, 100, 127)
    check(
        [
            quantise_case(hostile_floats(exponent, seed), 2.0**exponent, out)
            for seed, (exponent, out) in enumerate(zip(exponents, outputs, strict=False))
        ]
    )


def test_dequantise_is_exact() -> None:
    cases = [
        dequantise_case(size, dtypes, float(np.float32(scale)), point)
        for size, dtypes, scale, point in [
            (1, ("uint8", "float32"), 0.1, 0),
            (257, ("uint8", "float32"), 0.37, 255),
            (4099, ("int8", "float32"), 2.0**-100, -128),
            (256, ("int8", "float32"), 2.0**122, 3),
            (301, ("int16", "float32"), 2.0**-7, 0),
            (4099, ("uint8", "float16"), 0.013, 128),
            (300, ("int16", "float16"), 2.5, 0),
        ]
    ]
    check(cases)


def test_rescale() -> None:
    multipliers = (0.0, 1e-9, 0.5, 1.0, 0.7231, 1.5, 1e9, 2.0**96)
    kinds = itertools.cycle(["uint8", "int8", "int16"])
    cases = [
        rescale_case(size, dtype, float(np.float32(multiplier)), out)
        for size, dtype, multiplier, out in zip(
            itertools.cycle(SIZES), kinds, multipliers, itertools.cycle([*BYTES, WIDE, BYTES[0]]),
            strict=False,
        )
    ]  # fmt: skip
    places = (-17, -8, -1, 0, 1, 8, 15, 16, 31, 32)
    for shift, out in itertools.product(places, SHIFTS):
        cases.append(rescale_case(300, "uint8" if shift % 2 else "int16", shift, out))
    check(cases)


def test_add_and_multiply() -> None:
    periods = [(size, (size, size)) for size in SIZES]
    periods += [(35, (35, 7)), (35, (7, 35)), (5040, (5040, 1)), (66, (1, 66)), (8192, (64, 8192))]
    periods += [(48, (24, 8)), (48, (1, 3)), (6, (1, 1))]
    cases = [
        binary_case("multiply", size, pair, BYTES[0], 0.0078125, chunks=chunks)
        for size, pair, chunks in [
            (640, (640, 16), 4), (640, (32, 640), 2), (90, (90, 3), 3), (80, (1, 80), 5),
            (224, (224, 1), 7), (60, (5, 2), 3),
        ]
    ]  # fmt: skip
    for i, (size, pair) in enumerate(periods):
        factors, out = (2**21, -(2**20) - 12345), BYTES[i % 2]
        cases.append(binary_case("add", size, pair, out, 2.0**-22, factors=factors))
        multiplier = float(np.float32(0.0042))
        cases.append(binary_case("multiply", size, pair, out, multiplier, ("int8", "int8")))
    check(cases)


def test_16_bits_and_shifts() -> None:
    wide, mixed, cases = ("int16", "int16"), ("uint8", "int16"), []
    for size, periods in ((100, (100, 100)), (100, (100, 10)), (64, (1, 64))):
        for out, places in itertools.product(SHIFTS, (0, 16, 23)):
            cases.append(binary_case("add", size, periods, out, places, mixed, (2**15, 2**14)))
            cases.append(binary_case("multiply", size, periods, out, places, wide))
        largest = (2**15, 2**15 - 1)
        cases.append(binary_case("add", size, periods, WIDE, 2.0**-16, wide, largest))
        cases.append(binary_case("multiply", size, periods, WIDE, float(np.float32(5e-5)), wide))
    check(cases)


@settings(max_examples=2, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    drawn=st.lists(
        st.tuples(st.integers(1, 20), st.integers(1, 40), st.booleans(), st.booleans()),
        min_size=8,
        max_size=8,
    )
)
def test_drawn_periods(drawn: list[tuple[int, int, bool, bool]]) -> None:
    cases = []
    for lines, period, swapped, sums in drawn:
        size = lines * period
        periods = (period, size) if swapped else (size, period)
        kind, out = ("add", SHIFTS[1]) if sums else ("multiply", BYTES[0])
        factor = 7 if sums else 0.25
        cases.append(binary_case(kind, size, periods, out, factor, factors=(3000, -500)))
    check(cases)


def test_tables_see_every_value() -> None:
    source, cases = np.random.default_rng(0), []
    for given_dtype, made in itertools.product(("uint8", "int8"), ("uint8", "int8", "int16")):
        table = eight_bit(source, (256,), made)
        for size in (256, 1, 4100):
            x = every_value(size, given_dtype)

            def kernel(
                name: str, size: int = size, dtypes: tuple[str, str] = (given_dtype, made)
            ) -> CudaKernel:
                return elementwise.look_up(name, size, dtypes, MULTIPROCESSORS)

            wanted = table[x.astype(np.int64) - LOWEST[given_dtype]]
            cases.append(Case(kernel, (x, table), wanted, f"{size} {given_dtype} {made}"))
    check(cases)


def test_tables_are_interpolated() -> None:
    cases = []
    for seed, (size, options) in enumerate(zip((2**16, 1, 37, 4099), KINDS, strict=True)):
        bits, fraction, dtype = options
        entries = random_entries(bits, fraction, dtype, seed)
        x = np.random.default_rng(seed).permutation(EVERY)[:size]
        wanted = np.array([read(entries, bits, fraction, int(value)) for value in x])

        def kernel(
            name: str, size: int = size, options: tuple[int, int, str] = options
        ) -> CudaKernel:
            return elementwise.interpolate(name, size, *options, MULTIPROCESSORS)

        cases.append(Case(kernel, (x, entries), wanted.astype(dtype), f"{size} {options}"))
    check(cases)


ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    Activation("gelu"): lambda x: x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    Activation("silu", (1.5,)): lambda x: x / (1 + np.exp(-1.5 * x)),
    Activation("tanh"): np.tanh,
    Activation("leaky_relu", (0.25,)): lambda x: np.where(x < 0, x / 4, x),
    Activation("hard_swish"): lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
}


@pytest.mark.parametrize("dtypes", list(itertools.product(("float32", "float16"), repeat=2)))
def test_activations(dtypes: tuple[str, str]) -> None:
    x = (random(1001) * 4).astype(dtypes[0])
    cases = []
    for activation, function in ACTIVATIONS.items():

        def kernel(name: str, activation: Activation = activation) -> CudaKernel:
            return elementwise.activate(name, x.size, dtypes, activation, MULTIPROCESSORS)

        wanted = function(x.astype(np.float64)).astype(np.float32)
        cases.append(Case(kernel, (x,), wanted, f"{activation} {dtypes}"))
    if dtypes[1] == "float32":
        check(cases)
    else:
        check_halves(cases)


SCALES: dict[str, tuple[Scale, Scale, Scale]] = {
    "any": ((0.031, 100), (0.017, 140), (0.049, 120)),
    "powers of two": ((2.0**-5, 128), (2.0**-6, 128), (2.0**-4, 128)),
}


@pytest.mark.parametrize("dtype", ["uint8", "int16"])
@pytest.mark.parametrize("scales", SCALES)
def test_every_node_of_a_graph(dtype: str, scales: str) -> None:
    """Quantize, Rescale, Table, QAdd, QMul and Dequantize, broadcasts in every form."""
    first, second, third = SCALES[scales]
    graph, source = Qdq((2, 6, 3, 5), dtype), np.random.default_rng(0)
    x = graph.pair("x", first)
    clamped = graph.pair(graph.op("Relu", x), second)
    everywhere = graph.pair(graph.op("Add", x, clamped), third)
    for shape in ((6, 1, 1), (1, 6, 3, 1), (2, 1, 1, 5), (1,)):
        given = graph.constant(source.standard_normal(shape).astype(np.float32))
        other = graph.pair(given, second)
        everywhere = graph.pair(graph.op("Add", other, everywhere), third)
    pooled = graph.pair(graph.op("GlobalAveragePool", everywhere), second)
    gate = graph.pair(graph.op("Sigmoid", pooled), first)
    gated = graph.pair(graph.op("Mul", everywhere, gate), third)
    column = graph.op("AveragePool", gated, attributes="kernel_shape=[3,1]")
    columns = graph.pair(column, second)
    sums = graph.pair(graph.op("Add", gated, columns), third)
    ends = [graph.constant(np.array([at], np.int64)) for at in (0, 1, 1)]
    channel = graph.pair(graph.op("Slice", columns, *ends), second)
    program = run_exact(graph.model(graph.pair(graph.op("Mul", channel, sums), third)))
    # three of the seven smaller operands repeat in more than one place
    assert sum("broadcast" in call.node for call in program.calls) == 3


@pytest.mark.parametrize(
    ("given", "shape", "found"),
    [
        ((2, 3, 4), (2, 3, 4), (24, 24)),
        ((), (2, 3, 4), (1, 24)),
        ((1, 1, 1), (2, 3, 4), (1, 24)),
        ((4,), (2, 3, 4), (4, 24)),
        ((3, 4), (2, 3, 4), (12, 24)),
        ((2, 1, 4), (2, 3, 4), (4, 12)),
        ((2, 3, 1), (2, 3, 4), (1, 4)),
        ((2, 1, 1), (2, 3, 4), (1, 12)),
        ((1, 3, 1), (2, 3, 4), None),
        ((1, 3, 1), (1, 3, 4), (1, 4)),
        ((1, 1, 1), (1, 1, 1), (1, 1)),
    ],
)
def test_where_operands_repeat(
    given: tuple[int, ...], shape: tuple[int, ...], found: tuple[int, int] | None
) -> None:
    assert repeats(given, shape) == found
