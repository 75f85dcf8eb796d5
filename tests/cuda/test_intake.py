"""Images that are quantized, transposed and padded in one pass on CUDA."""

import dataclasses
import itertools

import numpy as np

from edgepress.targets.cuda.intake import intake
from edgepress.targets.cuda.kernel import CudaKernel
from edgepress.targets.schedules.epilogue import Requantise
from edgepress.targets.schedules.stage import StageShape
from tests.cuda.cases import MULTIPROCESSORS, check
from tests.targets.kernels import HIGHEST, LOWEST, Case
from tests.targets.test_intake import SHAPES, padded

DTYPES = ("float32", "float16", "int8", "uint8")
WIDE_PIXELS = StageShape(1, 5, 6, 3, 1, 1, 7, 8, 8)


def moved_case(shape: StageShape, dtypes: tuple[str, str], fill: int) -> Case:
    """Pixels as they are, or in another type of floats."""
    size = (shape.batch, shape.channels, shape.height, shape.width)
    x = np.random.default_rng(0).integers(0, 100, size).astype(dtypes[0])

    def kernel(name: str) -> CudaKernel:
        return intake(name, shape, dtypes, fill, None, None, MULTIPROCESSORS)

    wanted = padded(x.transpose(0, 2, 3, 1).astype(dtypes[1]), shape, fill)
    return Case(kernel, (x,), wanted, f"{shape} {dtypes}")


def quantised_case(shape: StageShape, dtypes: tuple[str, str]) -> Case:
    size = (shape.batch, shape.channels, shape.height, shape.width)
    low, high = LOWEST[dtypes[1]] + 3, HIGHEST[dtypes[1]] - 40
    scale, fill = np.float32(0.7), LOWEST[dtypes[1]] + 150
    x = np.random.default_rng(1).uniform(-150, 150, size).astype(dtypes[0])
    ends = [np.nan, np.inf, -np.inf, 0.5 * 0.7, -1.5 * 0.7][: x.size]
    x.flat[: len(ends)] = ends
    rule = Requantise(dtypes[1], fill, low, high)
    with np.errstate(invalid="ignore"):
        steps = np.clip(np.rint(x.astype(np.float32) / scale), low - fill, high - fill)
    q = (np.where(np.isnan(x), high - fill, steps) + fill).astype(dtypes[1])

    def kernel(name: str) -> CudaKernel:
        return intake(name, shape, dtypes, fill, float(scale), rule, MULTIPROCESSORS)

    wanted = padded(q.transpose(0, 2, 3, 1), shape, fill)
    return Case(kernel, (x,), wanted, f"{shape} {dtypes} quantised")


def test_planes_become_pixels() -> None:
    shapes = [*SHAPES, WIDE_PIXELS]
    shapes += [dataclasses.replace(shape, out_channels=shape.channels) for shape in SHAPES]
    cases = [moved_case(shape, (dtype, dtype), 7) for shape in shapes for dtype in DTYPES]
    pairs = list(itertools.permutations(DTYPES[:2], 2))
    check([*cases, *(moved_case(shape, pair, 0) for shape in shapes for pair in pairs)])


def test_planes_are_quantized_on_the_way() -> None:
    pairs = list(itertools.product(DTYPES[:2], DTYPES[2:]))
    check([quantised_case(shape, pair) for shape in SHAPES for pair in pairs])
