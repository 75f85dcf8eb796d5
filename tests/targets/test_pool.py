from fractions import Fraction

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from edgepress.targets.isa.base import Isa, load_isa
from edgepress.targets.program import Array
from edgepress.targets.schedules import pool
from edgepress.targets.schedules.epilogue import Epilogue, Requantise, Shift
from edgepress.targets.schedules.window import WindowShape
from tests.targets.kernels import (
    FLOATS,
    LOWEST,
    WIDE,
    Case,
    Window,
    check,
    eight_bit,
    finished,
    native_isas,
    requantise_to,
    shift_to,
    windows,
)

GRID = [
    Window(out=(1, 1), channels=1),
    Window(channels=3, kernel=(2, 2), strides=(2, 2)),
    Window(channels=7, kernel=(3, 3), strides=(2, 1), extra=(1, 1)),
    Window(batch=2, channels=17, kernel=(1, 4), dilations=(1, 2)),
    Window(batch=2, out=(4, 3), channels=33, kernel=(5, 2), strides=(3, 2), dilations=(2, 3)),
    Window(out=(1, 1), channels=100, kernel=(7, 7)),
]


def max_pool_case(window: Window, isa: Isa, dtype: str, *, seed: int = 0) -> Case:
    """The largest of random values under each window."""
    random = np.random.default_rng(seed)
    shape = _pool_shape(window)
    given = (window.batch, *window.size, window.channels)
    if dtype == "float32":
        x = random.standard_normal(given).astype(np.float32)
        x[random.random(given) < 0.5] = -np.inf
    else:
        x = eight_bit(random, given, dtype)
    seen = windows(x, window.out, window.kernel, window.strides, window.dilations)
    return Case(
        lambda name: pool.max_pool(name, shape, isa, dtype),
        (x,),
        np.maximum.reduce([values for _, _, values in seen]),
        f"{isa.name} max pool {window} {dtype}",
    )


def average_pool_case(
    window: Window,
    isa: Isa,
    epilogue: Epilogue,
    zero_point: int = 0,
    *,
    seed: int = 0,
    dtype: str = "",
    places: int = 34,
) -> Case:
    """The sum under each window times a random factor for its pixel.

    Of a `Shift`, the factors are int32 and divided by `2**places`.
    """
    random = np.random.default_rng(seed)
    shape = _pool_shape(window)
    given = (window.batch, *window.size, window.channels)
    quantized = isinstance(epilogue, Requantise)
    dtype = (dtype or isa.storage) if quantized else "float32"
    x = (
        eight_bit(random, given, dtype)
        if quantized
        else random.standard_normal(given).astype(np.float32)
    )
    factors = random.uniform(0.02, 0.3, window.out).astype(np.float32)
    total = np.zeros((window.batch, *window.out, window.channels))
    for _, _, values in windows(x, window.out, window.kernel, window.strides, window.dilations):
        total += values.astype(np.float64) - zero_point
    if isinstance(epilogue, Shift):
        factors = (factors * 2.0**31 / 0.3).astype(np.int64).clip(0, 2**31 - 1).astype(np.int32)
        wanted = divided_sums(total, factors, places, epilogue)
    else:
        each = factors[:, :, None]
        wanted = finished(total if quantized else total * each, each, epilogue)
    return Case(
        lambda name: pool.average_pool(name, shape, isa, dtype, zero_point, epilogue, places),
        (x, factors.ravel()),
        wanted,
        f"{isa.name} average pool {window} {epilogue}",
    )


def divided_sums(total: Array, factors: Array, places: int, epilogue: Shift) -> Array:
    """`total * factors / 2**places` in Python's integers; Fractions round half to even."""
    each = np.broadcast_to(factors[:, :, None], total.shape)
    low, high = epilogue.low - epilogue.zero_point, epilogue.high - epilogue.zero_point
    steps = [
        min(max(round(Fraction(int(a) * int(m), 2**places)), low), high)
        for a, m in zip(total.ravel(), each.ravel(), strict=True)
    ]
    return (np.array(steps).reshape(total.shape) + epilogue.zero_point).astype(epilogue.dtype)


def _pool_shape(window: Window) -> WindowShape:
    height, width = window.size
    return WindowShape(
        window.batch, height, width, window.channels, *window.out,
        window.kernel, window.strides, window.dilations,
    )  # fmt: skip


def cases(window: Window, isa_name: str, seed: int) -> list[Case]:
    isa = load_isa(isa_name)
    lowest = LOWEST[isa.storage]
    zero_point = (0, 255, 100)[seed % 3] + lowest
    quantized = requantise_to(isa, (255, 0, 17)[seed % 3])
    return [
        max_pool_case(window, isa, isa.storage, seed=seed),
        max_pool_case(window, isa, "float32", seed=seed),
        average_pool_case(window, isa, quantized, zero_point, seed=seed),
        average_pool_case(window, isa, FLOATS, seed=seed),
    ]


@pytest.mark.parametrize("isa_name", native_isas())
def test_grid(isa_name: str) -> None:
    check([case for seed, w in enumerate(GRID) for case in cases(w, isa_name, seed)], isa_name)


@pytest.mark.parametrize("isa_name", native_isas())
def test_16_bits_and_shifts(isa_name: str) -> None:
    isa, made = load_isa(isa_name), []
    narrow, wide = shift_to(isa.storage), shift_to("int16", low=0)
    point = 128 if isa.storage == "uint8" else 0
    for seed, window in enumerate(GRID):
        made.append(max_pool_case(window, isa, "int16", seed=seed))
        made.append(average_pool_case(window, isa, WIDE, seed=seed, dtype="int16"))
        made.append(average_pool_case(window, isa, narrow, point, seed=seed, places=33))
        made.append(average_pool_case(window, isa, wide, seed=seed, dtype="int16"))
    for places in (1, 31, 32, 62):
        made.append(average_pool_case(GRID[2], isa, wide, dtype="int16", places=places))
    check(made, isa_name)


@st.composite
def any_window(draw: st.DrawFn) -> Window:
    return Window(
        batch=draw(st.integers(1, 2)),
        out=draw(st.tuples(st.integers(1, 5), st.integers(1, 6))),
        channels=draw(st.integers(1, 70)),
        kernel=draw(st.tuples(st.integers(1, 5), st.integers(1, 5))),
        strides=draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        dilations=draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
    )


@pytest.mark.parametrize("isa_name", native_isas())
@settings(max_examples=2, deadline=None, derandomize=True, phases=[Phase.generate])
@given(drawn=st.lists(any_window(), min_size=4, max_size=4))
def test_drawn_shapes(isa_name: str, drawn: list[Window]) -> None:
    check([c for seed, w in enumerate(drawn) for c in cases(w, isa_name, seed)], isa_name)


@pytest.mark.parametrize("isa_name", native_isas()[:1])
def test_threads_share_the_work(isa_name: str) -> None:
    window = Window(batch=2, out=(15, 16), channels=256, kernel=(3, 3))
    assert WindowShape(2, 17, 18, 256, 15, 16, (3, 3)).reads >= pool.PARALLEL_READS
    check(cases(window, isa_name, 1), isa_name)


@pytest.mark.parametrize("isa_name", native_isas())
def test_int8_max_pools_compare_signed_values(isa_name: str) -> None:
    isa = load_isa(isa_name)
    case = max_pool_case(Window(channels=20, kernel=(2, 2)), isa, "int8")
    assert np.any(case.wanted > 0)
    check([case], isa_name)
