"""Pools on CUDA: small windows, whole images, any padding; integers to the bit."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from edgepress.targets.cuda import pool
from edgepress.targets.cuda.kernel import CudaKernel
from edgepress.targets.float_format import FloatFormat
from edgepress.targets.program import Array
from edgepress.targets.schedules.epilogue import Clip, Epilogue, Requantise, Shift
from edgepress.targets.schedules.window import WindowShape
from tests.cuda.cases import MULTIPROCESSORS, check, check_halves, run_exact, run_floats
from tests.graphs import net
from tests.targets.kernels import LOWEST, WIDE, Case, eight_bit, finished, windows
from tests.targets.qdq import Qdq, shaped
from tests.targets.test_pool import divided_sums

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Padded:
    """A window over an image, and the border in front of it; there may be more behind it."""

    size: tuple[int, int]
    channels: int
    out: tuple[int, int]
    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    pads: tuple[int, int] = (0, 0)
    batch: int = 1

    @property
    def shape(self) -> WindowShape:
        return WindowShape(
            self.batch, *self.size, self.channels, *self.out,
            self.kernel, self.strides, self.dilations,
        )  # fmt: skip

    def seen(self, x: Array, fill: float) -> Array:
        """What every tap sees: `[taps, batch, height, width, channels]`."""
        border = [
            (pad, max((out - 1) * stride + (kernel - 1) * dilation + 1 - pad - size, 0))
            for pad, out, stride, kernel, dilation, size in zip(
                self.pads, self.out, self.strides, self.kernel, self.dilations, self.size,
                strict=True,
            )
        ]  # fmt: skip
        given = np.pad(x, [(0, 0), *border, (0, 0)], constant_values=fill)
        taps = windows(given, self.out, self.kernel, self.strides, self.dilations)
        return np.stack([values for _, _, values in taps])


GRID = [
    Padded((3, 5), 4, (3, 5), (1, 1)),
    Padded((6, 10), 3, (3, 5), (2, 2), (2, 2)),
    Padded((7, 8), 32, (4, 4), (3, 3), (2, 2), pads=(1, 1)),
    Padded((5, 6), 7, (5, 7), (3, 4), dilations=(2, 1), pads=(2, 2), batch=2),
    Padded((2, 2), 17, (4, 4), (2, 2), pads=(2, 2)),  # some windows lie outside
    Padded((9, 9), 16, (3, 3), (5, 7), (2, 1), pads=(1, 0)),
    Padded((7, 7), 100, (1, 1), (7, 7)),
    Padded((7, 7), 512, (1, 1), (7, 7)),
    Padded((40, 33), 24, (1, 1), (40, 33), batch=2),
    Padded((12, 12), 9, (2, 3), (6, 6), dilations=(2, 2), pads=(3, 3)),
]


def mixed(kinds: Sequence[Kind]) -> list[tuple[Padded, Kind]]:
    """Every window with two of the kinds, and every kind with some windows."""
    twice = [window for window in GRID for _ in range(2)]
    return list(zip(twice, itertools.cycle(kinds), strict=False))


def drawn_values(window: Padded, dtype: str, seed: int) -> Array:
    source = np.random.default_rng(seed)
    size = (window.batch, *window.size, window.channels)
    if dtype in LOWEST:
        return eight_bit(source, size, dtype)
    return np.asarray(source.standard_normal(size).astype(dtype))


def max_pool_case(
    window: Padded, dtypes: tuple[str, str], seed: int = 0, processors: int = MULTIPROCESSORS
) -> Case:
    x = drawn_values(window, dtypes[0], seed)
    lowest = LOWEST.get(dtypes[0], -np.inf)

    def kernel(name: str) -> CudaKernel:
        return pool.max_pool(name, window.shape, window.pads, dtypes, processors)

    wanted = window.seen(x, lowest).max(0).astype(dtypes[1])
    return Case(kernel, (x,), wanted, f"max {window} {dtypes}")


def average_pool_case(
    window: Padded,
    dtypes: tuple[str, str],
    epilogue: Epilogue,
    seed: int = 0,
    processors: int = MULTIPROCESSORS,
) -> Case:
    """Sums times random factors; of a `Shift` they are int32 and divided by a power of two."""
    source, x = np.random.default_rng(seed), drawn_values(window, dtypes[0], seed)
    point = int(source.integers(LOWEST[dtypes[0]], 100)) if dtypes[0] in LOWEST else 0
    point = 0 if dtypes[0] == "int16" else point
    total = (window.seen(x, point).astype(np.float64) - point).sum(0)
    places = int(source.integers(20, 33))
    count = window.kernel[0] * window.kernel[1]
    factors = (source.uniform(0.5, 2, window.out) / count).astype(np.float32)
    if isinstance(epilogue, Shift):
        quarters = source.random(window.out) < 0.5  # many of these sums are ties
        ratios = np.where(quarters, 0.25, factors.astype(np.float64))
        factors = np.minimum(ratios * 2.0**places, 2**31 - 1).astype(np.int32)
        wanted = divided_sums(total, factors, places, epilogue)
    else:
        each = factors[:, :, None]
        given = total if isinstance(epilogue, Requantise) else total * each
        wanted = finished(given, each, epilogue)

    def kernel(name: str) -> CudaKernel:
        options = (dtypes, point, epilogue, places)
        return pool.average_pool(name, window.shape, window.pads, *options, processors)

    return Case(kernel, (x, factors.ravel()), wanted, f"average {window} {dtypes} {epilogue}")


@pytest.mark.parametrize("processors", [1, 132])
def test_max_pools(processors: int) -> None:
    pairs = [("int8", "int8"), ("uint8", "uint8"), ("int16", "int16"), ("float32", "float32")]
    pairs += [("float16", "float16"), ("float32", "float16")]
    check(
        [
            max_pool_case(window, pair, seed, processors)
            for seed, (window, pair) in enumerate(mixed(pairs))
        ]
    )


INTEGERS: list[tuple[tuple[str, str], Requantise]] = [
    (("uint8", "uint8"), Requantise("uint8", 9, 0, 240)),
    (("int8", "int8"), Requantise("int8", -20, -128, 127, fits=True)),
    (("int8", "int16"), WIDE),
    (("int16", "int16"), WIDE),
    (("int8", "int8"), Shift("int8", 0, -128, 127)),
    (("uint8", "uint8"), Shift("uint8", 128, 100, 255)),
    (("int16", "int16"), Shift("int16", 0, LOWEST["int16"], 2**15 - 1)),
]


@pytest.mark.parametrize("processors", [1, 132])
def test_average_pools_of_integers(processors: int) -> None:
    check(
        [
            average_pool_case(window, dtypes, epilogue, seed, processors)
            for seed, (window, (dtypes, epilogue)) in enumerate(mixed(INTEGERS))
        ]
    )


def test_average_pools_of_floats() -> None:
    epilogues, pair = [Clip(), Clip(0.0, 0.3)], ("float16", "float16")
    check([average_pool_case(w, ("float32", "float32"), e) for w, e in mixed(epilogues)])
    check_halves([average_pool_case(w, pair, e) for w, e in mixed(epilogues)])


def test_pools_of_a_quantized_graph() -> None:
    graph = Qdq((2, 8, 9, 9))
    x = graph.pair("x", (0.03, 100))
    attributes = "kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]"
    highest = graph.pair(graph.op("MaxPool", x, attributes=attributes), (0.03, 100))
    mean = graph.op("AveragePool", highest, attributes="kernel_shape=[2,3], pads=[1,1,0,1]")
    means = graph.pair(mean, (0.021, 90))
    program = run_exact(graph.model(graph.pair(graph.op("GlobalAveragePool", means), (0.01, 99))))
    assert not any("padding" in call.node for call in program.calls)


@pytest.mark.parametrize(("floats", "tolerance"), [("float32", 1e-6), ("float16", 2e-3)])
def test_pools_of_a_float_graph(floats: FloatFormat, tolerance: float) -> None:
    body = """
        a = MaxPool <kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1], ceil_mode=1> (x)
        b = AveragePool <kernel_shape=[3,2], pads=[1,0,1,1], count_include_pad=1> (a)
        c = AveragePool <kernel_shape=[3,3], pads=[1,1,1,1]> (b)
        y = GlobalAveragePool (c)
    """
    model = shaped(net("(float[2,12,10,14] x) => (float c, float y)", body))
    run_floats(model, floats, rtol=tolerance, atol=tolerance)


SMALL = st.integers(1, 5)
PAIRS = st.tuples(SMALL, SMALL)


@settings(max_examples=2, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    drawn=st.lists(
        st.builds(
            Padded, PAIRS, st.sampled_from([1, 2, 6, 16, 20]), PAIRS, st.tuples(SMALL, st.just(9)),
            PAIRS, PAIRS, PAIRS, st.integers(1, 2),
        ),
        min_size=8,
        max_size=8,
    )
)  # fmt: skip
def test_drawn_windows(drawn: list[Padded]) -> None:
    cases = []
    for seed, window in enumerate(drawn):
        cases.append(max_pool_case(window, ("uint8", "uint8"), seed, 1 + 131 * (seed % 2)))
        cases.append(average_pool_case(window, *INTEGERS[seed % len(INTEGERS)], seed))
    check(cases)
