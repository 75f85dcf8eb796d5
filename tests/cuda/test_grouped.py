"""Convolutions and products without tensor cores in CUDA C++, emulated: NumPy's outputs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from edgepress.targets.cuda import grouped as code
from edgepress.targets.cuda.grouped_tile import GroupedTile, choose_tile
from edgepress.targets.cuda.strip_operands import Operands
from edgepress.targets.cuda.window import Window
from edgepress.targets.schedules.epilogue import Added, Clip, Epilogue, Requantise, Shift
from tests.cuda.strip_graphs import check_float_graph, check_integer_graph
from tests.cuda.strip_layers import RELU6, Case, check, layer, values_of
from tests.targets.kernels import shift_to
from tests.targets.qdq import Qdq
from tests.targets.test_grouped import Layer, float_model, integer_model

ALL = (1, 1, 1, 1)
LAYERS = [
    (8, layer((6, 9), 16, 16, (3, 3), pads=ALL)),
    (4, layer((5, 7), 16, 16, (3, 3), pads=ALL, batch=2)),
    (3, layer((6, 9), 12, 24, (3, 3), (2, 1), pads=(0, 2, 1, 0))),
    (6, layer((7, 8), 12, 12, (3, 3), (1, 1), (2, 2), pads=(2, 2, 2, 2))),
    (3, layer((6, 9), 24, 24)),
    (10, layer((6, 9), 10, 20, (3, 3), pads=ALL)),  # two filters a channel
    (4, layer((6, 9), 12, 8, (2, 3), pads=(0, 1, 1, 1))),
    (10, layer((1, 1), 50, 10, (3, 3), pads=ALL)),
    (2, layer((3, 17), 12, 14, (1, 9), pads=(0, 4, 0, 4))),
    (2, layer((6, 5), 80, 6)),
    (1, layer((9, 11), 3, 16, (7, 7), (2, 2), pads=(3, 3, 3, 3))),
    (1, layer((1, 5), 96, 10)),
    (1, layer((4, 5), 32, 24, (3, 3), pads=ALL)),
    (1, layer((3, 3), 1, 1, (2, 2))),
]
ADDED = Added(
    Requantise("int8", 5, -128, 127),
    Requantise("int8", -3, -120, 120),
    "int8",
    9,
    (2**21, -(2**20) - 12345),
    2.0**-22 * 1.37,
)
SHIFTED = Added(shift_to("int16"), Shift("int16", 0, -30000, 32767), "int16", 0, (2**4, 2**3), 4)
INTEGERS: list[tuple[Operands, Epilogue]] = [
    (Operands("int8", "int8", "int8", zero_point=-7), Requantise("int8", 3, -128, 127)),
    (Operands("uint8", "int8", "uint8", zero_point=130), Requantise("uint8", 7, 10, 250)),
    (Operands("int16", "int16", "int16"), shift_to("int16")),
    (Operands("int8", "int8", "int8", zero_point=100, residual="int8"), ADDED),
    (Operands("int16", "int8", "int8", zero_point=-300), shift_to("int8", left=True)),
    (Operands("int16", "int16", "int16", residual="int16"), SHIFTED),
    (Operands("uint8", "int16", "uint8", zero_point=255), Requantise("uint8", 0, 0, 255)),
]
FLOATS: list[tuple[Operands, Epilogue]] = [
    (Operands("float32", "float32", "float32"), Clip()),
    (Operands("float16", "float16", "float16"), RELU6),
    (Operands("float32", "float16", "float16", residual="float16"), Added(Clip(), Clip(0.0))),
    (Operands("float16", "float16", "float32", residual="float32"), Added(RELU6, Clip())),
    (Operands("float32", "float32", "float32", residual="float32"), Added(Clip(), Clip())),
]


def case_of(
    name: str,
    groups: int,
    window: Window,
    operands: Operands,
    epilogue: Epilogue,
    *,
    multiprocessors: int = 132,
    tile: GroupedTile | None = None,
    seed: int = 0,
) -> Case:
    """A layer of random values; 8-bit integers are words where channels allow it."""
    words = operands.x in ("int8", "uint8") and operands.weights == "int8"
    operands = replace(operands, words=words and window.channels // groups % 4 == 0)
    tile = tile or choose_tile(window, groups, operands, multiprocessors)
    strips = code.grouped_strips(window, operands, tile, multiprocessors)
    kernel = code.grouped(name, window, groups, operands, tile, strips, epilogue)
    values = values_of(window, groups, operands, epilogue, seed)
    arguments = [values.x, code.pack_weights(values.weights, operands), values.centred]
    if operands.quantized:
        arguments.append(values.factors)
    if isinstance(epilogue, Added):
        arguments.append(values.residual)
    what = f"{groups} {window} {operands} {tile} {strips} {epilogue}"
    return Case(kernel, tuple(arguments), values.y, what)


@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize("kinds", [INTEGERS, FLOATS], ids=["integers", "floats"])
def test_layers(kinds: list[tuple[Operands, Epilogue]], multiprocessors: int) -> None:
    check(
        [
            case_of(
                f"k{seed}",
                *LAYERS[seed],
                *kinds[(seed + multiprocessors) % len(kinds)],
                multiprocessors=multiprocessors,
                seed=seed,
            )
            for seed in range(len(LAYERS))
        ]
    )


@pytest.mark.parametrize("sharing", [1, 2, 3, 16])
def test_threads_that_share_a_strip(sharing: int) -> None:
    tile = GroupedTile(2, 2, 3, 3, sharing, 2)
    check(
        [
            case_of(f"k{seed}", *LAYERS[12], *kind, tile=tile, seed=seed)
            for seed, kind in enumerate([INTEGERS[0], INTEGERS[5], FLOATS[0]])
        ]
    )


PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def any_layer(draw: st.DrawFn) -> tuple[int, Window]:
    kernel, dilations = draw(st.tuples(st.integers(1, 4), st.integers(1, 4))), draw(PAIRS)
    pads = draw(st.tuples(*(st.integers(0, 3) for _ in range(4))))
    size = tuple(
        draw(st.integers(max(1, (k - 1) * d + 1 - before - after), 10))
        for k, d, before, after in zip(kernel, dilations, pads[:2], pads[2:], strict=True)
    )
    groups = draw(st.integers(1, 5))
    inputs, outputs = draw(st.integers(1, 20)), draw(st.integers(1, 10))
    batch = draw(st.integers(1, 2))
    return groups, layer(
        (size[0], size[1]),
        groups * inputs,
        groups * outputs,
        kernel,
        draw(PAIRS),
        dilations,
        pads,
        batch,
    )


@settings(max_examples=1, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    drawn=st.lists(
        st.tuples(any_layer(), st.sampled_from([*INTEGERS, *FLOATS]), st.sampled_from([1, 8, 500])),
        min_size=10,
        max_size=10,
    )
)
def test_drawn_layers(
    drawn: list[tuple[tuple[int, Window], tuple[Operands, Epilogue], int]],
) -> None:
    check(
        [
            case_of(f"k{seed}", *given_layer, *kind, multiprocessors=multiprocessors, seed=seed)
            for seed, (given_layer, kind, multiprocessors) in enumerate(drawn)
        ]
    )


def test_sums_wrap() -> None:
    """A zero point is folded into the bias, so that sums may leave int32 on the way."""
    window, operands = layer((1, 3), 4, 2), Operands("int16", "int16", "int16")
    epilogue = shift_to("int16", left=True)
    case = case_of("k", 1, window, operands, epilogue)
    x, weights, bias, _ = (array.copy() for array in case.arguments)
    x[...], weights[...], bias[...] = -(2**15), -(2**15), 0
    bias += np.int32(-(2**30))  # 2**32 of products wrap to nothing
    wanted = np.full(case.wanted.shape, -(2**14), np.int16)
    shifts = np.full(2, 16, np.int32)
    check([replace(case, arguments=(x, weights, bias, shifts), wanted=wanted)])


def gemm_model() -> ir.Model:
    """A product of 16-bit integers, and a sum with its input."""
    graph, numbers = Qdq((5, 24), "int16"), np.random.default_rng(0)
    source = graph.pair("x", (2.0**-10, 0))
    weights = numbers.integers(-(2**11), 2**11, (24, 24)).astype(np.int16)
    product = graph.op("MatMul", source, graph.weight(weights, np.full(24, 2.0**-12), 1))
    total = graph.op("Add", graph.pair(product, (2.0**-9, 0)), source)
    return graph.model(graph.pair(total, (2.0**-9, 0)))


INTEGER_GRAPHS = [
    integer_model(Layer(8, 2, 2), 1, ("uint8", "int8")),
    integer_model(Layer(2, 8, 6), 0, ("uint8", "int8")),
    integer_model(Layer(1, 3, 4), 2, ("int16", "int16")),
    gemm_model(),
]


@pytest.mark.parametrize("number", range(len(INTEGER_GRAPHS)))
def test_integer_graphs_are_those_of_the_reference(number: int) -> None:
    check_integer_graph(INTEGER_GRAPHS[number], "grouped_")


@pytest.mark.parametrize(("form", "tolerance"), [("float32", 1e-5), ("float16", 3e-3)])
def test_float_graphs_are_those_of_onnxruntime(form: str, tolerance: float) -> None:
    check_float_graph(float_model(Layer(8, 2, 2), "y = Add (a, x)"), form, "grouped_", tolerance)


def test_one_pixel_windows_are_lines_of_pixels() -> None:
    window = layer((7, 5), 8, 16, batch=3)
    assert code.flattened(window) == replace(
        window, batch=1, height=1, width=105, out_height=1, out_width=105
    )
    for other in (
        layer((7, 5), 8, 16, (1, 3), pads=(0, 1, 0, 1)),
        layer((7, 5), 8, 16, strides=(2, 1)),
        layer((7, 5), 8, 16, pads=ALL),
    ):
        assert code.flattened(other) == other


def test_few_outputs_are_shared_by_many_threads() -> None:
    window = layer((1, 1), 1280, 1000)
    operands = Operands("int16", "int16", "int16")
    tile = choose_tile(window, 1, operands, 132)
    strips = code.grouped_strips(window, operands, tile, 132)
    assert tile.sharing >= 8
    assert strips.block[2] == tile.sharing
    assert choose_tile(replace(window, width=10000, out_width=10000), 1, operands, 8).sharing == 1
