import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from edgepress.targets.isa.base import load_isa
from edgepress.targets.schedules import conv
from edgepress.targets.schedules.epilogue import Added, Clip
from tests.targets.kernels import (
    FLOATS,
    ISAS,
    WIDE,
    Window,
    added_to,
    check,
    conv_case,
    native_isas,
    requantise_to,
    shift_to,
)

GRID = [
    Window(),
    Window(out=(1, 1), channels=1, out_channels=1),
    Window(out=(1, 1), channels=33, out_channels=17, kernel=(3, 3)),
    Window(channels=3, out_channels=7, kernel=(3, 3), strides=(2, 2)),
    Window(channels=17, out_channels=33, kernel=(1, 5), strides=(1, 3), dilations=(1, 2)),
    Window(channels=7, out_channels=3, kernel=(4, 2), dilations=(3, 2), extra=(2, 1)),
    Window(batch=2, out=(4, 4), channels=7, out_channels=17),
    Window(batch=2, out=(2, 3), channels=3, out_channels=65, kernel=(2, 3), strides=(2, 1)),
    Window(channels=6, out_channels=10, kernel=(3, 3), groups=2),
    Window(channels=9, out_channels=51, kernel=(2, 2), dilations=(2, 2), groups=3),
    Window(batch=2, channels=5, out_channels=15, kernel=(3, 1), groups=5),
    Window(out=(1, 31), channels=4, out_channels=16),
    Window(out=(1, 1), channels=130, out_channels=101),
    Window(out=(2, 29), channels=8, out_channels=129, kernel=(1, 3)),
]
SIZES = st.integers(1, 5)
PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def any_window(draw: st.DrawFn) -> Window:
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    return Window(
        batch=draw(st.integers(1, 2)),
        out=(draw(SIZES), draw(st.integers(1, 19))),
        channels=groups * draw(st.sampled_from([1, 2, 3, 5, 7, 16, 17, 33])),
        out_channels=groups * draw(st.sampled_from([1, 3, 7, 8, 15, 17, 33, 70])),
        kernel=(draw(SIZES), draw(SIZES)),
        strides=draw(PAIRS),
        dilations=draw(PAIRS),
        groups=groups,
        extra=draw(st.tuples(st.integers(0, 2), st.integers(0, 2))),
    )


@pytest.mark.parametrize("isa_name", native_isas())
def test_grid(isa_name: str) -> None:
    isa = load_isa(isa_name)
    zero_points = (0, 3, 128, 255)
    check(
        [
            conv_case(window, isa, epilogue, seed=seed)
            for seed, window in enumerate(GRID)
            for epilogue in (requantise_to(isa, zero_points[seed % 4], high=250), FLOATS)
        ],
        isa_name,
    )


@pytest.mark.parametrize("isa_name", native_isas())
@settings(max_examples=3, deadline=None, derandomize=True, phases=[Phase.generate])
@given(drawn=st.lists(st.tuples(any_window(), st.booleans()), min_size=8, max_size=8))
def test_drawn_shapes(isa_name: str, drawn: list[tuple[Window, bool]]) -> None:
    isa = load_isa(isa_name)
    cases = []
    for seed, (window, quantized) in enumerate(drawn):
        epilogue = requantise_to(isa, 100, 20, 240) if quantized else Clip(-1.0, 2.0)
        cases.append(conv_case(window, isa, epilogue, seed=seed))
    check(cases, isa_name)


@pytest.mark.parametrize("isa_name", native_isas())
def test_extremes(isa_name: str) -> None:
    isa = load_isa(isa_name)
    window = Window(channels=17, out_channels=19, kernel=(2, 3))
    long = Window(out=(1, 2), channels=2000, out_channels=5)
    tiny = conv_case(window, isa, requantise_to(isa, 77), multiplier=1e-9)
    huge = conv_case(window, isa, requantise_to(isa, 77), multiplier=1e9)
    assert set(np.unique(tiny.wanted - np.int16(requantise_to(isa, 77).zero_point))) == {0}
    assert len(np.unique(huge.wanted)) == 2
    cases = [tiny, huge]
    for multiplier in (0.0, 2.0**-17, 2.0**96):
        cases.append(conv_case(window, isa, requantise_to(isa, 255), multiplier=multiplier))
    for weight in (-128, 127):  # the largest sums that 8 bits make
        cases.append(conv_case(long, isa, requantise_to(isa, 0), weight=weight, multiplier=1e-6))
    ties = conv_case(window, isa, requantise_to(isa, 128), weight=1, multiplier=2.0**-9)
    cases.append(ties)
    check(cases, isa_name)


@pytest.mark.parametrize("isa_name", native_isas())
def test_16_bits_and_shifts(isa_name: str) -> None:
    isa = load_isa(isa_name)
    wide = [("int16", "int8"), ("int16", "int16"), ("", "int16")]
    epilogues = [WIDE, requantise_to(isa, 77), shift_to("int16", left=True), shift_to(isa.storage)]
    cases = [
        conv_case(window, isa, epilogue, seed=seed, operands=operands)
        for seed, (window, operands) in enumerate(zip(GRID, itertools.cycle(wide), strict=False))
        for epilogue in (epilogues[seed % 4], epilogues[(seed + 1) % 4])
    ]
    cases += [conv_case(w, isa, shift_to(isa.storage, left=True)) for w in GRID[2:9:3]]
    check(cases, isa_name)


@pytest.mark.parametrize("isa_name", native_isas())
def test_largest_16_bit_sums(isa_name: str) -> None:
    """Sums next to the ends of int32, pairs of the largest products, and the farthest shifts."""
    isa, cases = load_isa(isa_name), []
    window = Window(out=(1, 2), channels=2, out_channels=5)
    for weight in (1 - 2**15, 2**15 - 1):
        cases.append(conv_case(window, isa, WIDE, weight=weight, multiplier=2.0**-17, seed=3,
                               operands=("int16", "int16"), extremes=True))  # fmt: skip
    for shift in (-17, 0, 15, 16, 31):
        out = shift_to("int16", left=shift < 0)
        cases.append(conv_case(window, isa, out, multiplier=shift, operands=("int16", "int16")))
    check(cases, isa_name)


@pytest.mark.parametrize("isa_name", native_isas())
def test_residuals(isa_name: str) -> None:
    """Integers of every width and floats, in whole vectors and in what is left over."""
    isa = load_isa(isa_name)
    wide = Added(WIDE, shift_to(isa.storage), "int16", 0, (77, 2**15 - 1), 15)
    shifts = Added(shift_to("int16", left=True), WIDE, isa.storage, 3, (2**14, -9), 1.7e-5)
    integers = [added_to(isa), added_to(isa, shift_to(isa.storage)), wide, shifts]
    floats = [Added(Clip(), Clip()), Added(Clip(0.0), Clip(-0.5, 6.0))]
    cases = [
        conv_case(window, isa, epilogues[seed % len(epilogues)], seed=seed)
        for seed, window in enumerate(GRID)
        for epilogues in (integers, floats)
    ]
    cases += [conv_case(GRID[-1], isa, epilogue) for epilogue in integers]
    check(cases, isa_name)


@pytest.mark.parametrize("isa_name", native_isas())
def test_float_clamps(isa_name: str) -> None:
    isa = load_isa(isa_name)
    window = Window(channels=5, out_channels=9, kernel=(3, 3))
    clips = [Clip(0.0), Clip(0.0, 6.0), Clip(high=0.5), Clip(-1.0, -0.25)]
    check([conv_case(window, isa, clip) for clip in clips], isa_name)


@pytest.mark.parametrize("isa_name", native_isas()[:1])
def test_threads_share_the_work(isa_name: str) -> None:
    """Large enough for parallel lines, parallel tiles and parallel blocks of channels."""
    isa = load_isa(isa_name)
    lines = Window(out=(12, 20), channels=33, out_channels=33, kernel=(3, 3))
    row = Window(out=(16, 16), channels=128, out_channels=72)
    vector = Window(out=(1, 1), channels=2048, out_channels=1100)
    windows = [lines, row, vector]
    for window in windows:
        height, width = window.size
        shape = conv.ConvShape(
            1, height, width, window.channels, *window.out, window.out_channels, window.kernel
        )
        assert shape.macs >= conv._PARALLEL_MACS
    check([conv_case(w, isa, e) for w in windows for e in (requantise_to(isa), FLOATS)], isa_name)


@pytest.mark.parametrize("isa_name", ISAS)
@pytest.mark.parametrize("quantized", [True, False])
def test_tiles_fit_the_registers(isa_name: str, quantized: bool) -> None:
    isa = load_isa(isa_name)
    for width in (1, 7, 14, 28, 56, 112):
        for channels in (1, 16, 24, 64, 96, 1000):
            shape = conv.ConvShape(1, 8, width, 64, 8, width, channels, (3, 3))
            tile = conv.choose_tile(shape, isa, quantized)
            assert 1 <= tile.rows <= width
            held = tile.rows * tile.columns + tile.columns
            assert held < isa.vector_registers


def test_packing_keeps_every_weight() -> None:
    isa = load_isa("avx2")
    shape = conv.ConvShape(1, 3, 3, 4, 2, 2, 10, (2, 2), groups=2)
    weights = np.arange(1, 1 + 10 * 3 * 4, dtype=np.int8).reshape(10, 3, 2, 2)
    packed = conv.pack_weights(weights, shape, isa, conv.Tile(2, 1))
    lanes = 2 * isa.lanes  # a whole vector per group
    assert packed.shape == (lanes * 2 * 2 * 4,)
    assert sorted(packed[packed != 0]) == sorted(weights.ravel())
    blocks = packed.reshape(2, 2, 4, isa.lanes, 2)  # group, row, step, lane, pair of inputs
    assert blocks[1, 1, 2, 4].tolist() == weights[9, :2, 1, 1].tolist()  # column 1, inputs 0 and 1
    assert blocks[1, 1, 3, 4].tolist() == [weights[9, 2, 1, 1], 0]
    channels = conv.pack_channels(np.arange(10, dtype=np.int32), shape, isa)
    assert channels.tolist() == [0, 1, 2, 3, 4, 0, 0, 0, 5, 6, 7, 8, 9, 0, 0, 0]


def test_one_long_row() -> None:
    shape = conv.ConvShape(2, 5, 7, 8, 5, 7, 16)
    flat = shape.flattened()
    assert (flat.batch, flat.out_height, flat.out_width, flat.macs) == (1, 1, 70, shape.macs)
    for change in ({"strides": (2, 1)}, {"kernel": (1, 3)}, {"out_height": 4}):
        other = dataclasses.replace(shape, **change)
        assert other.flattened() == other
