import dataclasses

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from edgepress.targets.isa.base import load_isa
from edgepress.targets.schedules.depthwise_layout import (
    DepthwiseShape,
    border_size,
    channel_blocks,
    pack_channels,
    pack_weights,
)
from edgepress.targets.schedules.depthwise_taps import Columns, Rows, Taps, Weights
from edgepress.targets.schedules.epilogue import Clip
from edgepress.targets.schedules.interleave import lane_order
from tests.targets.kernels import (
    FLOATS,
    ISAS,
    WIDE,
    check,
    depthwise_case,
    native_isas,
    requantise_to,
    shift_to,
)


def layer(
    size: tuple[int, int],
    channels: int,
    kernel: tuple[int, int],
    strides: tuple[int, int] = (1, 1),
    dilations: tuple[int, int] = (1, 1),
    pads: tuple[int, int, int, int] = (0, 0, 0, 0),
    batch: int = 1,
) -> DepthwiseShape:
    """A layer whose pads are given as ONNX does: top, left, bottom, right."""
    out = [
        (n + before + after - (k - 1) * d - 1) // s + 1
        for n, before, after, k, d, s in zip(
            size, pads[:2], pads[2:], kernel, dilations, strides, strict=True
        )
    ]
    assert min(out) > 0
    return DepthwiseShape(
        batch, *size, channels, out[0], out[1], kernel, strides, dilations, pads[:2]
    )


ALL = (1, 1, 1, 1)
GRID = [
    layer((5, 6), 1, (3, 3), pads=ALL),
    layer((3, 4), 3, (1, 1)),
    layer((1, 1), 7, (5, 5), pads=(2, 2, 2, 2)),
    layer((1, 1), 70, (3, 3), pads=ALL),
    layer((9, 30), 17, (3, 3), (2, 2), pads=(0, 0, 1, 1)),
    layer((8, 7), 33, (2, 4), (1, 2), (2, 1), (1, 0, 2, 3)),
    layer((6, 20), 24, (3, 3), (1, 1), (1, 3), (1, 3, 1, 3), batch=2),
    layer((7, 29), 40, (5, 3), (3, 1), pads=(2, 1, 0, 1)),
    layer((2, 47), 16, (1, 5), pads=(0, 2, 0, 2)),
    layer((9, 11), 63, (4, 1), (2, 3), pads=(1, 0, 2, 0), batch=2),
    layer((7, 7), 96, (5, 5), pads=(2, 2, 2, 2)),
    layer((14, 15), 144, (5, 5), (2, 2), pads=(1, 1, 2, 2)),
    layer((9, 8), 48, (7, 7), pads=(3, 3, 3, 3)),
    layer((5, 45), 80, (3, 3), pads=ALL),
    layer((3, 3), 20, (3, 3), (1, 1), (6, 6), (6, 6, 6, 6)),
    layer((3, 3), 20, (3, 1), (2, 1), pads=(5, 4, 5, 4)),
    layer((4, 9), 34, (3, 3), (1, 4), pads=(1, 2, 0, 0)),
]
PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def any_layer(draw: st.DrawFn) -> DepthwiseShape:
    kernel, dilations = draw(st.tuples(st.integers(1, 5), st.integers(1, 5))), draw(PAIRS)
    pads = draw(st.tuples(*(st.integers(0, 5) for _ in range(4))))
    size = tuple(
        draw(st.integers(max(1, (k - 1) * d + 1 - before - after), most))
        for k, d, before, after, most in zip(
            kernel, dilations, pads[:2], pads[2:], (9, 30), strict=True
        )
    )
    channels, batch = draw(st.integers(1, 150)), draw(st.integers(1, 2))
    return layer((size[0], size[1]), channels, kernel, draw(PAIRS), dilations, pads, batch)


@pytest.mark.parametrize("isa_name", native_isas())
def test_grid(isa_name: str) -> None:
    isa = load_isa(isa_name)
    check(
        [
            depthwise_case(shape, isa, epilogue, seed=seed)
            for seed, shape in enumerate(GRID)
            for epilogue in (requantise_to(isa, (0, 3, 128, 255)[seed % 4], high=250), FLOATS)
            if seed % 3 == 0 or epilogue is not FLOATS
        ],
        isa_name,
    )


@pytest.mark.parametrize("isa_name", native_isas())
@settings(max_examples=1, deadline=None, derandomize=True, phases=[Phase.generate])
@given(drawn=st.lists(st.tuples(any_layer(), st.booleans()), min_size=8, max_size=8))
def test_drawn_shapes(isa_name: str, drawn: list[tuple[DepthwiseShape, bool]]) -> None:
    isa = load_isa(isa_name)
    cases = []
    for seed, (shape, quantized) in enumerate(drawn):
        epilogue = requantise_to(isa, 100, 20, 240) if quantized else Clip(0.0, 2.0)
        cases.append(depthwise_case(shape, isa, epilogue, seed=seed))
    check(cases, isa_name)


@pytest.mark.parametrize("isa_name", native_isas())
def test_16_bits_and_shifts(isa_name: str) -> None:
    isa = load_isa(isa_name)
    kinds = [
        (("int16", "int8"), WIDE),
        (("int16", "int16"), shift_to("int16")),
        (("", "int8"), shift_to(isa.storage)),
        (("int16", "int16"), requantise_to(isa, 3)),
        (("", "int16"), requantise_to(isa, 3)),
        (("", "int8"), shift_to("int16", left=True)),
        (("", "int8"), shift_to(isa.storage, left=True)),
    ]
    check(
        [
            depthwise_case(GRID[seed % len(GRID)], isa, epilogue, seed=seed, operands=operands)
            for seed, (operands, epilogue) in enumerate(kinds * 2)
        ],
        isa_name,
    )


@pytest.mark.parametrize("isa_name", native_isas())
def test_outputs_saturate(isa_name: str) -> None:
    isa = load_isa(isa_name)
    shape = layer((4, 9), 80, (3, 3), pads=ALL)
    check(
        [
            depthwise_case(shape, isa, requantise_to(isa, point), multiplier=multiplier, seed=seed)
            for seed, (point, multiplier) in enumerate(
                [(0, 2.0**40), (200, 2.0**96), (255, 1.0), (7, 0.25), (9, 2.0**-90)]
            )
        ],
        isa_name,
    )


@pytest.mark.parametrize("isa_name", native_isas()[:1])
def test_threads_share_the_work(isa_name: str) -> None:
    isa = load_isa(isa_name)
    shapes = [
        layer((14, 15), 160, (3, 3), pads=ALL, batch=2),
        layer((3, 60), 976, (3, 3), pads=ALL),
        layer((1, 60), 2000, (3, 3), pads=ALL),
    ]
    kinds = (requantise_to(isa), FLOATS)
    check([depthwise_case(shape, isa, e) for shape in shapes for e in kinds], isa_name)


def test_borders_need_memory_only_above_and_below() -> None:
    assert border_size(layer((4, 9), 8, (3, 3), pads=(0, 1, 0, 1))) == 0
    assert border_size(layer((4, 9), 8, (3, 3), pads=(0, 0, 1, 0))) > 0
    assert border_size(layer((5, 5), 8, (3, 3), (2, 2), pads=(0, 0, 1, 1))) == 0  # never read


@pytest.mark.parametrize("isa_name", ISAS)
@given(channels=st.integers(1, 300), quantized=st.booleans())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_blocks_cover_every_channel(isa_name: str, channels: int, quantized: bool) -> None:
    isa = load_isa(isa_name)
    covered = np.zeros(channels, int)
    for block in channel_blocks(channels, isa, quantized):
        covered[block.first : block.first + block.channels * block.count] += 1
    assert covered.min() == 1
    assert covered.max() <= 2
    packed = pack_channels(np.arange(channels), isa, quantized)
    assert set(packed) == set(range(channels))


def elements(taps: Taps, weights: Weights) -> list[tuple[int, int] | None]:
    """The taps that each element of a lane is multiplied with."""
    nothing = (None,) * taps.group
    stored, before = (
        nothing if index is None else taps.weight_sets[index]
        for index in (weights.stored, weights.before)
    )
    return list((before + stored)[taps.group - weights.shift :][: taps.group])


@given(
    kernel=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    stride=st.integers(1, 5),
    dilation=st.integers(1, 3),
    group=st.sampled_from([1, 2, 4]),
    pixel=st.integers(0, 20),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_products_are_the_window(
    kernel: tuple[int, int], stride: int, dilation: int, group: int, pixel: int
) -> None:
    taps = Taps(kernel, stride, dilation, group)
    seen: list[tuple[int, int, int, int]] = []
    for source, weights in taps.products(pixel):
        for i, tap in enumerate(elements(taps, weights)):
            if tap is not None:
                if isinstance(source, Columns):
                    seen.append((*tap, source.row, source.column + i))
                else:
                    seen.append((*tap, source.first + i, source.column))
    wanted = [
        (r, c, r, pixel * stride + c * dilation) for r in range(kernel[0]) for c in range(kernel[1])
    ]
    assert sorted(seen) == wanted


def test_products_of_four_taps() -> None:
    assert len(Taps((3, 3), 1, 1, 4).products(0)) == 3
    assert len(Taps((5, 5), 1, 1, 4).products(3)) == 7
    assert Taps((1, 5), 1, 1, 4).products(2) == [
        (Columns(0, 0), Weights(0, 2)),
        (Columns(0, 4), Weights(1, 2, 0)),
    ]
    assert Taps((1, 7), 1, 1, 4).products(2)[-1] == (Columns(0, 8), Weights(None, 2, 1))
    assert Taps((3, 1), 2, 1, 4).products(2) == [(Rows(0, 4), Weights(0))]


def test_packing_follows_the_lanes() -> None:
    weights = np.arange(32 * 9).reshape(32, 1, 3, 3) % 100
    isa, shape = load_isa("avx512_vnni"), layer((4, 4), 32, (3, 3), pads=ALL)
    packed = pack_weights(weights.astype(np.int8), shape, isa)
    assert packed.dtype == np.int8
    lanes = packed.reshape(3, 32, 4)  # a column of the window, a channel, its rows and a zero
    order = lane_order(32, 4, 1)
    np.testing.assert_array_equal(lanes[..., 3], 0)
    np.testing.assert_array_equal(lanes[:, :, :3], weights[order, 0].transpose(2, 0, 1))


def test_packing_of_single_taps_and_a_tail() -> None:
    weights = np.arange(11 * 4, dtype=np.int8).reshape(11, 1, 2, 2)
    shape = layer((4, 4), 11, (2, 2))
    packed = pack_weights(weights, shape, load_isa("neon"))
    assert packed.dtype == np.int8
    first, last = np.split(packed, [8 * 4])
    np.testing.assert_array_equal(first.reshape(4, 8), weights[:8].reshape(8, 4).T)
    np.testing.assert_array_equal(last.reshape(4, 4), weights[7:].reshape(4, 4).T)


@pytest.mark.parametrize("isa_name", native_isas()[-1:])
def test_sets_without_packing_instructions(isa_name: str) -> None:
    isa = dataclasses.replace(load_isa(isa_name), nearest=None, pack=None, narrow=None)
    check([depthwise_case(shape, isa, requantise_to(isa, 7)) for shape in GRID[4:6]], isa_name)


@pytest.mark.parametrize("least_weight", [-128, -127])
def test_sums_of_two_products_in_16_bits(least_weight: int) -> None:
    """Generic arithmetic, so that what 128-bit Arm sets do runs here too."""
    full = load_isa("neon").all_weights
    assert full is not None
    full = dataclasses.replace(full, nearest=None, pack=None, narrow=None)
    isa = dataclasses.replace(full, all_weights=full)
    shapes = [GRID[i] for i in (1, 2, 5)]
    check(
        [depthwise_case(s, isa, requantise_to(isa), least_weight=least_weight) for s in shapes],
        native_isas()[0],
    )
