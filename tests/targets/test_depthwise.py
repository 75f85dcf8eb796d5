import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from edgepress.targets.isa.base import load_isa
from edgepress.targets.schedules.depthwise import pack_weights
from edgepress.targets.schedules.epilogue import Clip
from tests.targets.kernels import (
    FLOATS,
    WIDE,
    Window,
    check,
    depthwise_case,
    native_isas,
    requantise_to,
    shift_to,
)

GRID = [
    Window(channels=1, kernel=(3, 3)),
    Window(channels=3, kernel=(1, 1)),
    Window(out=(1, 1), channels=7, kernel=(5, 5)),
    Window(channels=17, kernel=(3, 3), strides=(2, 2)),
    Window(channels=33, kernel=(2, 4), strides=(1, 2), dilations=(2, 1)),
    Window(batch=2, out=(3, 8), channels=24, kernel=(3, 3), dilations=(1, 3), extra=(1, 2)),
    Window(out=(2, 15), channels=40, kernel=(5, 3), strides=(3, 1)),
    Window(out=(1, 22), channels=16, kernel=(1, 5)),
    Window(batch=2, out=(4, 6), channels=63, kernel=(4, 1), strides=(2, 3)),
]
PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def any_window(draw: st.DrawFn) -> Window:
    return Window(
        batch=draw(st.integers(1, 2)),
        out=(draw(st.integers(1, 4)), draw(st.integers(1, 24))),
        channels=draw(st.integers(1, 70)),
        kernel=draw(st.tuples(st.integers(1, 5), st.integers(1, 5))),
        strides=draw(PAIRS),
        dilations=draw(PAIRS),
        extra=draw(st.tuples(st.integers(0, 2), st.integers(0, 2))),
    )


@pytest.mark.parametrize("isa_name", native_isas())
def test_grid(isa_name: str) -> None:
    isa = load_isa(isa_name)
    zero_points = (0, 3, 128, 255)
    check(
        [
            depthwise_case(window, isa, epilogue, seed=seed)
            for seed, window in enumerate(GRID)
            for epilogue in (requantise_to(isa, zero_points[seed % 4], high=250), FLOATS)
        ],
        isa_name,
    )


@pytest.mark.parametrize("isa_name", native_isas())
@settings(max_examples=2, deadline=None, derandomize=True, phases=[Phase.generate])
@given(drawn=st.lists(st.tuples(any_window(), st.booleans()), min_size=8, max_size=8))
def test_drawn_shapes(isa_name: str, drawn: list[tuple[Window, bool]]) -> None:
    isa = load_isa(isa_name)
    cases = []
    for seed, (window, quantized) in enumerate(drawn):
        epilogue = requantise_to(isa, 100, 20, 240) if quantized else Clip(0.0, 2.0)
        cases.append(depthwise_case(window, isa, epilogue, seed=seed))
    check(cases, isa_name)


@pytest.mark.parametrize("isa_name", native_isas())
def test_16_bits_and_shifts(isa_name: str) -> None:
    isa = load_isa(isa_name)
    kinds = [
        (("int16", "int8"), WIDE),
        (("int16", "int16"), shift_to("int16")),
        (("", "int8"), shift_to(isa.storage)),
        (("int16", "int16"), requantise_to(isa, 3)),
        (("", "int8"), shift_to("int16", left=True)),
    ]
    check(
        [
            depthwise_case(window, isa, epilogue, seed=seed, operands=operands)
            for seed, (window, (operands, epilogue)) in enumerate(
                zip(GRID * 2, kinds * 4, strict=False)
            )
        ],
        isa_name,
    )


@pytest.mark.parametrize("isa_name", native_isas()[:1])
def test_threads_share_the_work(isa_name: str) -> None:
    isa = load_isa(isa_name)
    window = Window(batch=2, out=(14, 15), channels=160, kernel=(3, 3))
    check([depthwise_case(window, isa, e) for e in (requantise_to(isa), FLOATS)], isa_name)


def test_packing_follows_the_vectors() -> None:
    weights = np.arange(11 * 4, dtype=np.int8).reshape(11, 1, 2, 2)
    packed = pack_weights(weights, load_isa("avx2"))
    assert packed.dtype == np.int16
    first, second, third = np.split(packed, [8 * 4, 10 * 4])
    np.testing.assert_array_equal(first.reshape(4, 8), weights[:8].reshape(8, 4).T)
    np.testing.assert_array_equal(second.reshape(4, 2), weights[8:10].reshape(2, 4).T)
    np.testing.assert_array_equal(third, weights[10].ravel())
