"""Resizes on channels-last images: every mode, against onnxruntime and by hand."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from edgepress.targets.lowering.build import lower
from edgepress.targets.program import Array, Program
from edgepress.targets.reference import Reference
from tests.graphs import answers, feeds, net
from tests.targets.interpret import run_program
from tests.targets.kernels import native_isas, target_of
from tests.targets.qdq import Qdq, merged_graphs, shaped

MODES = [
    'mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"',
    'mode="nearest", nearest_mode="round_prefer_ceil"',
    'mode="linear"',
    'mode="linear", coordinate_transformation_mode="align_corners"',
    'mode="linear", coordinate_transformation_mode="asymmetric"',
    'mode="cubic", cubic_coeff_a=-0.5',
    'mode="linear", coordinate_transformation_mode="pytorch_half_pixel"',
]
SHAPES: list[tuple[tuple[int, ...], tuple[float, ...]]] = [
    ((1, 20, 4, 5), (1, 1, 2, 2)),
    ((2, 3, 6, 8), (1, 1, 1.5, 0.75)),
    ((1, 1, 6, 3), (1, 1, 3, 1)),
    ((1, 17, 1, 1), (1, 1, 4, 5)),
]


def model(shape: tuple[int, ...], scales: tuple[float, ...], attributes: str) -> ir.Model:
    dims = ",".join(map(str, shape))
    body = f'y = Resize <{attributes}> (x, "", scales)'
    constants = {"scales": np.array(scales, np.float32)}
    return shaped(net(f"(float[{dims}] x) => (float y)", body, constants))


def resizes(program: Program) -> int:
    return sum("resize_" in call.kernel for call in program.calls)


@pytest.mark.parametrize("isa", native_isas())
def test_floats_are_those_of_onnxruntime(isa: str) -> None:
    models = [model(*shape, mode) for mode in MODES for shape in SHAPES]
    inputs = [feeds(each) for each in models]
    program, given = merged_graphs(models, target_of(isa), inputs)
    assert resizes(program) == len(models)
    results = run_program(program, target_of(isa), given)
    for index, (each, feed) in enumerate(zip(models, inputs, strict=True)):
        wanted = answers(each, feed)[0]
        np.testing.assert_allclose(results[f"g{index}_y"], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("isa", native_isas())
@pytest.mark.parametrize("dtype", ["uint8", "int16"])
def test_integers_are_copied(isa: str, dtype: str) -> None:
    graph = Qdq((2, 18, 3, 5), dtype)
    scales = graph.constant(np.array([1, 1, 2, 3], np.float32))
    out = graph.op("Resize", graph.pair("x", (0.03, 100)), "", scales, attributes=MODES[0])
    made = graph.model(graph.pair(out, (0.03, 100)))
    feed: dict[str, Array] = feeds(made)
    program = lower(made, target_of(isa))
    assert resizes(program) == 1
    reference = Reference(made)
    assert reference.exact
    for name, wanted in reference.run(feed).items():
        np.testing.assert_array_equal(run_program(program, target_of(isa), feed)[name], wanted)


@pytest.mark.parametrize(
    ("shape", "scales", "attributes"),
    [
        ((1, 4, 6, 6), (1, 2, 1, 1), 'mode="linear"'),  # channels
        ((1, 4, 60, 60), (1, 1, 0.1, 0.1), 'mode="linear", antialias=1'),  # many taps
        ((4, 6, 6), (1, 2, 2), 'mode="linear"'),
    ],
)
def test_what_the_kernel_does_not_do_is_still_right(
    shape: tuple[int, ...], scales: tuple[float, ...], attributes: str
) -> None:
    made = shaped(
        net(
            f"(float[{','.join(map(str, shape))}] x) => (float y)",
            f'y = Resize <{attributes}> (x, "", scales)',
            {"scales": np.array(scales, np.float32)},
            opset=18,
        )
    )
    feed = feeds(made)
    program = lower(made, target_of("avx2"))
    assert resizes(program) == 0
    result = run_program(program, target_of("avx2"), feed)["y"]
    np.testing.assert_allclose(result, answers(made, feed)[0], rtol=1e-4, atol=1e-4)
