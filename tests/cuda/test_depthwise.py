"""Depthwise convolutions in CUDA C++, emulated: NumPy's outputs, and how the work is split."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from edgepress.targets.cuda import depthwise as code
from edgepress.targets.cuda.depthwise_tile import DepthwiseTile, choose_tile
from edgepress.targets.cuda.strip_operands import Operands
from edgepress.targets.cuda.window import Window
from edgepress.targets.schedules.activations import Activation
from edgepress.targets.schedules.epilogue import Clip, Epilogue, Requantise
from tests.cuda.strip_graphs import check_float_graph, check_integer_graph
from tests.cuda.strip_layers import RELU6, Case, check, layer, values_of
from tests.targets.kernels import shift_to
from tests.targets.test_grouped import Layer, float_model, integer_model

ALL = (1, 1, 1, 1)


def depthwise_layer(
    size: tuple[int, int],
    channels: int,
    kernel: tuple[int, int],
    strides: tuple[int, int] = (1, 1),
    dilations: tuple[int, int] = (1, 1),
    pads: tuple[int, int, int, int] = (0, 0, 0, 0),
    batch: int = 1,
) -> Window:
    return layer(size, channels, channels, kernel, strides, dilations, pads, batch)


GRID = [
    depthwise_layer((5, 6), 2, (3, 3), pads=ALL),
    depthwise_layer((3, 4), 3, (1, 1)),
    depthwise_layer((1, 1), 8, (5, 5), pads=(2, 2, 2, 2)),
    depthwise_layer((9, 14), 20, (3, 3), (2, 2), pads=(0, 0, 1, 1)),
    depthwise_layer((8, 7), 32, (2, 4), (1, 2), (2, 1), (1, 0, 2, 3)),
    depthwise_layer((6, 20), 24, (3, 3), (1, 1), (1, 3), (1, 3, 1, 3), batch=2),
    depthwise_layer((7, 12), 36, (5, 3), (3, 1), pads=(2, 1, 0, 1)),
    depthwise_layer((2, 17), 16, (1, 5), pads=(0, 2, 0, 2)),
    depthwise_layer((9, 11), 63, (4, 1), (2, 3), pads=(1, 0, 2, 0), batch=2),
    depthwise_layer((7, 7), 48, (7, 7), pads=(3, 3, 3, 3)),
    depthwise_layer((6, 13), 8, (9, 11), pads=(4, 5, 4, 5)),
    depthwise_layer((3, 3), 20, (3, 3), (1, 1), (6, 6), (6, 6, 6, 6)),
    depthwise_layer((3, 3), 20, (3, 1), (2, 1), pads=(5, 4, 5, 4)),
]
INTEGERS: list[tuple[Operands, Epilogue]] = [
    (Operands("int8", "int8", "int8", zero_point=-7), Requantise("int8", 3, -128, 127)),
    (Operands("uint8", "int8", "uint8", zero_point=130), Requantise("uint8", 7, 10, 250)),
    (Operands("int8", "int8", "int8", zero_point=100), shift_to("int8", left=True)),
    (Operands("uint8", "int8", "int16", zero_point=0), shift_to("int16")),
    (Operands("int16", "int16", "int16"), shift_to("int16")),
    (Operands("int16", "int8", "int8", zero_point=-300), Requantise("int8", 0, -128, 127)),
    (Operands("uint8", "int16", "uint8", zero_point=255), Requantise("uint8", 0, 0, 255)),
]
FLOATS: list[tuple[Operands, Epilogue]] = [
    (Operands("float32", "float32", "float32"), Clip()),
    (Operands("float16", "float16", "float16"), RELU6),
    (Operands("float32", "float16", "float16"), Clip()),
    (Operands("float16", "float16", "float32"), Clip(-1.0, 2.0)),
]


def case_of(
    name: str,
    window: Window,
    operands: Operands,
    epilogue: Epilogue,
    *,
    multiprocessors: int = 132,
    tile: DepthwiseTile | None = None,
    seed: int = 0,
) -> Case:
    """A layer of random values; 8-bit integers are words where channels allow it."""
    words = operands.x in ("int8", "uint8") and operands.weights == "int8"
    operands = replace(operands, words=words and window.channels % 4 == 0)
    tile = tile or choose_tile(window, operands, multiprocessors)
    strips = code.depthwise_strips(window, operands, tile, multiprocessors)
    kernel = code.depthwise(name, window, operands, tile, strips, epilogue)
    values = values_of(window, window.channels, operands, epilogue, seed)
    weights = code.pack_weights(values.weights, window, operands, tile)
    arguments = [values.x, weights, values.centred]
    if operands.quantized:
        arguments.append(values.factors)
    what = f"{window} {operands} {tile} {strips} {epilogue}"
    return Case(kernel, tuple(arguments), values.y, what)


@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_integers(multiprocessors: int) -> None:
    check(
        [
            case_of(
                f"k{seed}",
                window,
                *INTEGERS[seed % len(INTEGERS)],
                multiprocessors=multiprocessors,
                seed=seed,
            )
            for seed, window in enumerate([*GRID, *GRID[3:10]])
        ]
    )


@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_floats(multiprocessors: int) -> None:
    check(
        [
            case_of(
                f"k{seed}",
                window,
                *FLOATS[seed % len(FLOATS)],
                multiprocessors=multiprocessors,
                seed=seed,
            )
            for seed, window in enumerate(GRID)
        ]
    )


PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def any_layer(draw: st.DrawFn) -> Window:
    kernel, dilations = draw(st.tuples(st.integers(1, 5), st.integers(1, 5))), draw(PAIRS)
    pads = draw(st.tuples(*(st.integers(0, 4) for _ in range(4))))
    size = tuple(
        draw(st.integers(max(1, (k - 1) * d + 1 - before - after), most))
        for k, d, before, after, most in zip(
            kernel, dilations, pads[:2], pads[2:], (13, 16), strict=True
        )
    )
    channels, batch = draw(st.integers(1, 70)), draw(st.integers(1, 2))
    return depthwise_layer(
        (size[0], size[1]), channels, kernel, draw(PAIRS), dilations, pads, batch
    )


@settings(max_examples=1, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    drawn=st.lists(
        st.tuples(any_layer(), st.sampled_from([*INTEGERS, *FLOATS]), st.sampled_from([1, 8, 500])),
        min_size=10,
        max_size=10,
    )
)
def test_drawn_layers(drawn: list[tuple[Window, tuple[Operands, Epilogue], int]]) -> None:
    check(
        [
            case_of(f"k{seed}", window, *kind, multiprocessors=multiprocessors, seed=seed)
            for seed, (window, kind, multiprocessors) in enumerate(drawn)
        ]
    )


def test_activations() -> None:
    epilogue = Clip(activation=Activation("hard_sigmoid", (0.2, 0.5)))
    operands = Operands("float32", "float32", "float32")
    case = case_of("k", GRID[4], operands, Clip())
    kernel = case_of("k", GRID[4], operands, epilogue).kernel
    wanted = np.clip(0.2 * case.wanted + 0.5, 0, 1)
    check([replace(case, kernel=kernel, wanted=wanted.astype(np.float32))])


@pytest.mark.parametrize("columns", [1, 2, 3, 7])
@pytest.mark.parametrize("rows", [1, 2])
def test_every_strip_of_words(rows: int, columns: int) -> None:
    """Five rows of the window: groups of four rows, and of one or two."""
    window = depthwise_layer((9, 10), 16, (5, 5), pads=(2, 2, 2, 2))
    tile = DepthwiseTile(8, rows, columns, 5, True)
    check([case_of("k", window, *INTEGERS[1], tile=tile)])


@pytest.mark.parametrize("dtypes", [("uint8", "int8"), ("int16", "int16")])
def test_integer_graphs_are_those_of_the_reference(dtypes: tuple[str, str]) -> None:
    check_integer_graph(integer_model(Layer(12, 1, 1), 2, dtypes), "qdepthwise_")


@pytest.mark.parametrize(("form", "tolerance"), [("float32", 1e-5), ("float16", 3e-3)])
def test_float_graphs_are_those_of_onnxruntime(form: str, tolerance: float) -> None:
    check_float_graph(float_model(Layer(12, 1, 1), "y = Relu (a)"), form, "depthwise_", tolerance)


WIDE = [
    depthwise_layer((112, 112), 32, (3, 3), pads=ALL),
    depthwise_layer((56, 56), 144, (3, 3), pads=ALL),
    depthwise_layer((28, 28), 192, (5, 5), (2, 2), pads=(2, 2, 2, 2)),
    depthwise_layer((14, 14), 576, (3, 3), pads=ALL),
    depthwise_layer((7, 7), 960, (3, 3), pads=ALL),
]
TYPES = [
    Operands("float32", "float32", "float32"),
    Operands("float16", "float16", "float16"),
    Operands("int8", "int8", "int8", words=True),
]


@pytest.mark.parametrize("operands", TYPES, ids=lambda operands: str(operands.x))
@pytest.mark.parametrize("window", WIDE, ids=lambda window: f"{window.width}x{window.channels}")
def test_one_image_keeps_a_large_gpu_busy(window: Window, operands: Operands) -> None:
    tile = choose_tile(window, operands, 132)
    strips = code.depthwise_strips(window, operands, tile, 132)
    blocks = np.prod(strips.grid(window))
    outputs = window.out_height * window.out_width * window.channels
    threads = outputs / (tile.lanes * tile.rows * tile.columns)
    assert blocks >= 100
    assert threads >= min(64 * 132, outputs / 8)
    batch = replace(window, batch=32)
    larger = choose_tile(batch, operands, 132)
    assert larger.lanes * larger.rows * larger.columns >= tile.lanes * tile.rows * tile.columns
    assert larger.lanes * larger.rows * larger.columns >= 8
