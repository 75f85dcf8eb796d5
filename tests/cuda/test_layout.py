"""What moves elements on CUDA: transposes, concatenations, phases of convolutions, broadcasts."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from edgepress.targets.cuda import layout
from edgepress.targets.cuda.kernel import CudaKernel
from edgepress.targets.cuda.layout import Axis, Box
from edgepress.targets.float_format import FloatFormat
from edgepress.targets.program import Array
from edgepress.targets.schedules.interlace import InterlaceShape
from tests.cuda.cases import MULTIPROCESSORS, check, run_floats
from tests.graphs import net, random
from tests.targets.kernels import Case
from tests.targets.qdq import shaped
from tests.targets.test_transposed_conv import CASES
from tests.targets.test_transposed_conv import model as transposed

DTYPES = ("uint8", "int8", "bool", "int16", "float16", "float32", "int32", "int64")
SIZES = st.sampled_from([1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 32, 36, 50, 64, 100])


def values(shape: tuple[int, ...], dtype: str, seed: int = 0) -> Array:
    drawn = np.random.default_rng(seed).integers(0, 2 if dtype == "bool" else 120, shape)
    return np.asarray(drawn.astype(dtype))


def transpose_case(sizes: tuple[int, int, int], dtypes: tuple[str, str], processors: int) -> Case:
    x = values(sizes, dtypes[0], sum(sizes))
    return Case(
        lambda name: layout.transpose(name, *sizes, dtypes, processors),
        (x,),
        np.ascontiguousarray(x.transpose(0, 2, 1)).astype(dtypes[1]),
        f"transpose {sizes} {dtypes} {processors}",
    )


@settings(max_examples=3, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    drawn=st.lists(
        st.tuples(
            st.integers(1, 3), SIZES, SIZES, st.sampled_from(DTYPES), st.sampled_from([1, 132])
        ),
        min_size=12,
        max_size=12,
    )
)
def test_drawn_transposes(drawn: list[tuple[int, int, int, str, int]]) -> None:
    check([transpose_case(each[:3], (each[3], each[3]), each[4]) for each in drawn])


def test_transposes_of_images() -> None:
    sizes = [(1, 3, 700), (2, 700, 3), (1, 4, 300), (2, 300, 4), (1, 64, 49), (2, 49, 64)]
    sizes += [(1, 128, 260), (3, 12, 20)]
    pairs = [("float32", "float16"), ("float16", "float32"), ("int8", "int8")]
    cases = [transpose_case(each, pair, 1) for each, pair in itertools.product(sizes, pairs)]
    check([*cases, *(transpose_case((1, 128, 260), pair, 132) for pair in pairs)])


def concat_case(outer: int, runs: tuple[int, ...], dtypes: tuple[str, ...]) -> Case:
    parts = [values((outer, run), dtype, run) for run, dtype in zip(runs, dtypes, strict=False)]
    return Case(
        lambda name: layout.concat(name, outer, runs, dtypes, MULTIPROCESSORS),
        tuple(parts),
        np.concatenate(parts, axis=1).astype(dtypes[-1]),
        f"concat {outer} x {runs} {dtypes}",
    )


def test_concat() -> None:
    kinds = [("uint8", (3,)), ("float32", (7, 1, 33)), ("int64", (2, 5)), ("bool", (70, 3, 1))]
    kinds += [("int8", (64, 32, 16)), ("float16", (24, 40)), ("int16", (1,) * 40)]
    cases = [
        concat_case(outer, runs, (dtype,) * (len(runs) + 1))
        for outer, (dtype, runs) in itertools.product((1, 5), kinds)
    ]
    cases.append(concat_case(9, (16, 8, 3), ("float32", "float16", "float32", "float16")))
    check([*cases, concat_case(300, (256, 64), ("int8",) * 3)])


def interlace_case(shape: InterlaceShape, dtype: str) -> Case:
    """Phases cut out of a random tensor; what lies beyond it must not matter."""
    down, across = shape.strides
    whole = values((shape.batch, shape.height, shape.width, shape.channels), dtype)
    phases = []
    for i, j in np.ndindex(down, across):
        size = (shape.batch, shape.rows(i), shape.columns(j), shape.channels)
        phase = np.full(size, 99, dtype)
        seen = whole[:, i::down, j::across]
        phase[:, :, : seen.shape[2]] = seen
        phases.append(phase)
    return Case(
        lambda name: layout.interlace(name, shape, (dtype,) * (len(phases) + 1), MULTIPROCESSORS),
        tuple(phases),
        whole,
        f"{shape} {dtype}",
    )


def test_interlace() -> None:
    shapes = [
        InterlaceShape(1, 8, 6, 16, (2, 2)),
        InterlaceShape(2, 7, 9, 5, (2, 2)),
        InterlaceShape(2, 5, 9, 4, (3, 1), 4),
        InterlaceShape(1, 4, 7, 1, (1, 1), 3),
        InterlaceShape(2, 1, 5, 3, (3, 2)),  # phases without rows
    ]
    check([interlace_case(*each) for each in itertools.product(shapes, ("int8", "float32"))])


def expand_case(given: tuple[int, ...], shape: tuple[int, ...], dtype: str) -> Case:
    x = np.arange(math.prod(given)).reshape(given).astype(dtype)

    def kernel(name: str) -> CudaKernel:
        return layout.expand(name, given, shape, dtype, MULTIPROCESSORS)

    wanted = np.ascontiguousarray(np.broadcast_to(x, shape))
    return Case(kernel, (x,), wanted, f"expand {given} to {shape}")


def test_expand_broadcasts() -> None:
    shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
        ((), (2, 3)),
        ((3,), (2, 3)),
        ((2, 1), (2, 3)),
        ((1, 3, 1, 2), (2, 3, 4, 2)),
        ((2, 1, 1, 1), (2, 3, 1, 5)),
        ((2, 1, 1, 64), (2, 5, 7, 64)),
        ((1, 1), (1, 1)),
    ]
    check([expand_case(*each, dtype) for each in shapes for dtype in ("uint8", "int16")])


def test_axes_that_lie_as_one_are_joined() -> None:
    whole = Box((Axis(2, 105, 105), Axis(3, 35, 35), Axis(1, 0, 0), Axis(5, 7, 7), Axis(7, 1, 1)))
    assert whole.joined().axes == (Axis(210, 1, 1),)
    broadcast = Box((Axis(2, 7, 105), Axis(3, 0, 35), Axis(5, 0, 7), Axis(7, 1, 1)))
    assert broadcast.joined().axes == (Axis(2, 7, 105), Axis(15, 0, 7), Axis(7, 1, 1))
    assert Box((Axis(1, 1, 1),)).joined().axes == (Axis(1, 1, 1),)


@pytest.mark.parametrize(
    ("axes", "start", "lanes"),
    [
        ((Axis(5, 48, 96), Axis(48, 1, 1)), 16, 16),
        ((Axis(5, 48, 96), Axis(48, 1, 1)), 4, 4),
        ((Axis(5, 48, 97), Axis(48, 1, 1)), 0, 1),
        ((Axis(5, 0, 8), Axis(8, 1, 1)), 0, 8),
        ((Axis(5, 0, 1),), 0, 1),
    ],
)
def test_lanes_keep_accesses_aligned(axes: tuple[Axis, ...], start: int, lanes: int) -> None:
    assert Box(axes, start).lanes(16) == lanes


@pytest.mark.parametrize("case", ["even kernel", "joined, cropped"])
def test_phases_of_a_transposed_convolution(case: str) -> None:
    program = run_floats(transposed(*CASES[case]), "float32", rtol=1e-4, atol=1e-4)
    assert any("interlace" in call.kernel for call in program.calls)


@pytest.mark.parametrize(("floats", "tolerance"), [("float32", 1e-6), ("float16", 2e-3)])
def test_concat_of_images_and_constants(floats: FloatFormat, tolerance: float) -> None:
    """What is stored as float16 beside float32, into outputs that are float32."""
    body = """
        a = MaxPool <kernel_shape=[3,3], strides=[2,2]> (x)
        b = Concat <axis=1> (a, k)
        c = Gelu (b)
        y = AveragePool <kernel_shape=[2,2]> (c)
    """
    model = net(
        "(float[1,6,11,9] x) => (float b, float y)", body, {"k": random(1, 3, 5, 4)}, opset=20
    )
    program = run_floats(shaped(model), floats, rtol=tolerance, atol=tolerance)
    assert any("concat" in call.kernel for call in program.calls)
    stored = {tensor.dtype for tensor in program.tensors.values()}
    assert ("float16" in stored) == (floats == "float16")
