"""Resizes of images on CUDA: every mode against onnxruntime, and copies of any dtype."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from edgepress.targets.cuda.kernel import CudaKernel
from edgepress.targets.cuda.resize import resize
from edgepress.targets.float_format import KEY, FloatFormat
from edgepress.targets.load import load_target
from edgepress.targets.schedules.resize import ResizeShape
from tests.cuda.cases import MULTIPROCESSORS, check, run_exact
from tests.cuda.emulation import emulate
from tests.graphs import answers, feeds
from tests.targets.kernels import Case
from tests.targets.qdq import Qdq, merged_graphs
from tests.targets.test_resize import MODES, SHAPES, model, resizes


def compare(floats: FloatFormat, modes: Sequence[str], *, rtol: float, atol: float) -> None:
    models = [model(*shape, mode) for shape, mode in itertools.product(SHAPES, modes)]
    for each in models:
        each.metadata_props[KEY] = floats
    inputs = [feeds(each) for each in models]
    program, given = merged_graphs(models, load_target("cuda-sm90"), inputs)
    program.kernels = {name: kernel.renamed(name) for name, kernel in program.kernels.items()}
    assert resizes(program) == len(models)
    results = emulate(program, given)
    for index, (each, feed) in enumerate(zip(models, inputs, strict=True)):
        wanted = answers(each, feed)[0]
        np.testing.assert_allclose(results[f"g{index}_y"], wanted, rtol, atol)


def test_floats_are_those_of_onnxruntime() -> None:
    compare("float32", MODES, rtol=1e-4, atol=1e-5)


def test_halves_are_close_to_onnxruntime() -> None:
    compare("float16", [MODES[0], MODES[2], MODES[5]], rtol=3e-3, atol=3e-3)


@pytest.mark.parametrize("dtype", ["uint8", "int16"])
def test_integers_are_copied(dtype: str) -> None:
    graph = Qdq((2, 18, 3, 5), dtype)
    scales = graph.constant(np.array([1, 1, 2, 3], np.float32))
    out = graph.op("Resize", graph.pair("x", (0.03, 100)), "", scales, attributes=MODES[0])
    assert resizes(run_exact(graph.model(graph.pair(out, (0.03, 100))))) == 1


def test_channels_of_any_alignment() -> None:
    """Copies of chosen pixels, whole vectors of channels at once where they are aligned."""
    cases = []
    for channels, dtype in itertools.product((1, 3, 8, 48), ("int8", "int16", "float16")):
        shape = ResizeShape(2, 3, 4, channels, 5, 6, (1, 1))
        source = np.random.default_rng(channels)
        x = source.integers(0, 100, (2, 3, 4, channels)).astype(dtype)
        rows, columns = source.integers(0, 3, 5), source.integers(0, 4, 6)
        tables = [(rows * 4 * channels).astype(np.int32), (columns * channels).astype(np.int32)]

        def kernel(name: str, shape: ResizeShape = shape, dtype: str = dtype) -> CudaKernel:
            return resize(name, shape, (dtype, dtype), MULTIPROCESSORS)

        wanted = np.ascontiguousarray(x[:, rows][:, :, columns])
        cases.append(Case(kernel, (x, *tables), wanted, f"{channels} {dtype}"))
    check(cases)
