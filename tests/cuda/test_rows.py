"""Kernels along rows on CUDA: softmax of floats and of integers, layer normalisation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from edgepress.targets.cuda.quantised_rows import padded_width
from edgepress.targets.cuda.row_walk import walk_columns, walk_rows
from edgepress.targets.cuda.rows import integer_softmax, layer_norm, softmax
from edgepress.targets.load import load_target
from edgepress.targets.lowering.build import lower
from edgepress.targets.lowering.dynamic_reference import quantised_rows
from edgepress.targets.lowering.softmax import divisor_factor, exponentials
from edgepress.targets.program import Array, Call, Program, Tensor
from edgepress.targets.reference import Reference
from edgepress.targets.schedules.epilogue import Requantise
from edgepress.targets.schedules.layer_norm import LayerNormShape
from tests.cuda.cases import MULTIPROCESSORS, check
from tests.cuda.emulation import emulate
from tests.graphs import answers, feeds, net
from tests.targets.kernels import Case
from tests.targets.qdq import Qdq, drawn, shaped
from tests.targets.test_layer_norm import random_inputs
from tests.targets.test_softmax import rows_of, rows_to_steps

TOLERANCE = 2e-6  # of the largest value of a row
HALF = 2.0**-11  # relative, of what is rounded to float16
TARGET = load_target("cuda-sm90")

# Softmax -------------------------------------------------------------------------------------

SIZES = [
    (1, 1, 1), (3, 7, 1), (9, 384, 1), (40, 128, 1), (2, 1000, 1), (2, 5003, 1), (1, 40000, 1),
    (2, 3, 5), (1, 77, 130),
]  # fmt: skip


def float_case(size: tuple[int, int, int], dtypes: tuple[str, str]) -> Case:
    outer, length, inner = size
    x = np.random.default_rng(length).standard_normal(size) * 8
    x[0, : length // 2, 0] = -np.inf
    x = x.astype(dtypes[0])
    walk = (
        walk_columns(*size)
        if inner > 1
        else walk_rows(outer, length, 2 if "float16" in dtypes else 4, MULTIPROCESSORS)
    )
    powers = np.exp(x.astype(np.float64) - x.max(axis=1, keepdims=True))
    wanted = (powers / powers.sum(axis=1, keepdims=True)).astype(dtypes[1])
    return Case(lambda name: softmax(name, walk, dtypes), (x,), wanted, f"{size} {dtypes}")


def compared(cases: Sequence[Case]) -> None:
    """Run cases together; floats may err by a few units in the last place."""
    program, given = program_of(cases)
    got = emulate(program, given)
    for index, case in enumerate(cases):
        tolerance = HALF if case.wanted.dtype == np.float16 else 5e-6  # x - max rounds
        np.testing.assert_allclose(
            got[f"k{index}_out"].astype(np.float64),
            case.wanted.astype(np.float64),
            tolerance,
            2.0**-24 if case.wanted.dtype == np.float16 else 1e-30,
            err_msg=case.what,
        )


def program_of(cases: Sequence[Case]) -> tuple[Program, dict[str, Array]]:
    """One program that calls every kernel once."""
    program, given = Program(), dict[str, Array]()
    for index, case in enumerate(cases):
        arguments = {f"k{index}_a{i}": array for i, array in enumerate(case.arguments)}
        given |= arguments
        output = f"k{index}_out"
        for name, array in {**arguments, output: case.wanted}.items():
            program.tensors[name] = Tensor(name, str(array.dtype), array.shape)
        program.kernels[f"k{index}"] = case.kernel(f"k{index}")
        program.calls.append(Call(f"k{index}", (*arguments, output), (output,), case.what))
        program.outputs += (output,)
    program.inputs = tuple(given)
    return program, given


def test_softmax_of_floats() -> None:
    cases = [float_case(size, ("float32", "float32")) for size in SIZES]
    cases += [float_case(size, ("float16", "float16")) for size in SIZES[1:5]]
    cases.append(float_case((3, 8, 1), ("float16", "float32")))
    compared(cases)


def test_a_row_with_nan_is_nan() -> None:
    case = float_case((3, 70, 1), ("float32", "float32"))
    (x,) = case.arguments
    x[1, 5], x[2] = np.nan, -np.inf
    program, given = program_of([case])
    (got,) = emulate(program, given).values()
    assert not np.isnan(got[0]).any()
    assert np.isnan(got[1:]).all()


def integer_case(
    size: tuple[int, int, int], scales: tuple[float, float], dtype: str, result: str, point: int = 0
) -> Case:
    outer, length, inner = size
    x = rows_of(np.random.default_rng(length), outer * inner, length, dtype)
    x = np.ascontiguousarray(np.moveaxis(x.reshape(outer, inner, length), 1, 2))
    low, high = np.iinfo(result).min, np.iinfo(result).max
    zero = low + point if result != "int16" else 0
    epilogue = Requantise(result, zero, low + point // 2, high - point)
    table, scaling = exponentials(scales[0], dtype), divisor_factor(scales[1])
    walk = walk_columns(*size) if inner > 1 else walk_rows(outer, length, 4, MULTIPROCESSORS)
    return Case(
        lambda name: integer_softmax(name, walk, dtype, *scaling, epilogue),
        (x, table),
        rows_to_steps(x, table, scaling, epilogue, 1),
        f"{size} {scales} {dtype}",
    )


def test_softmax_of_integers() -> None:
    sizes = [(4, 10, 1), (1, 1, 1), (5, 33, 1), (3, 2001, 1), (2, 21, 6), (40, 3, 1)]
    scales = [(0.1, 1 / 256), (0.02, 1 / 255), (2.0**-100, 0.3), (30.0, 2.0**-28), (1e-3, 200.0)]
    cases = [
        integer_case((20, 8, 1), (0.08, 1.3 * 2.0**-28), "int8", "int8"),
        integer_case((20, 30, 1), (2e-4, 1.3 * 2.0**-28), "int16", "int16"),
        integer_case((20, 30, 1), (0.03, 2.0**-15), "uint8", "int16"),
    ]
    for number, size in enumerate(sizes):
        chosen = scales[number % len(scales)]
        for dtype in ("int8", "uint8", "int16"):
            chosen = chosen if dtype != "int16" else (chosen[0] / 200, 1 / 256)
            result = "int8" if dtype == "int16" else dtype
            cases.append(integer_case(size, chosen, dtype, result, 7 * (number % 3)))
    check(cases)


@pytest.mark.parametrize(("shape", "axis"), [((3, 40), 1), ((2, 5, 6), 1)])
def test_a_quantized_graph(shape: tuple[int, ...], axis: int) -> None:
    graph = Qdq(shape, "uint8")
    y = graph.op("Softmax", graph.pair("x", (0.08, 128)), attributes=f"axis={axis}")
    model = graph.model(graph.pair(y, (1 / 256, 0)))
    given = feeds(model)
    (wanted,) = Reference(model).run(given).values()
    (got,) = emulate(lower(model, TARGET), given).values()
    np.testing.assert_array_equal(got, wanted)


# Layer normalisation -------------------------------------------------------------------------


def call_of(
    shape: LayerNormShape, given: Mapping[str, Array], dtypes: tuple[str, str, str]
) -> Program:
    """One call; what it reads are inputs, what it writes are outputs. `dtypes`: x, residual, y."""
    program = Program()
    kinds = (*dtypes, *(("float32",) if shape.sum_read else ()))
    program.kernels["k"] = layer_norm("k", shape, kinds, MULTIPROCESSORS)
    outputs: dict[str, tuple[str, tuple[int, ...]]] = {"y": (dtypes[2], (shape.rows, shape.width))}
    if shape.sum_read:
        outputs["sum"] = ("float32", (shape.rows, shape.width))
    if shape.padded:
        outputs["q"] = ("int8", (shape.rows, shape.padded))
        outputs["step"], outputs["point"] = ("float32", (shape.rows,)), ("int32", (shape.rows,))
    for name, array in given.items():
        program.tensors[name] = Tensor(name, str(array.dtype), array.shape)
    for name, (dtype, size) in outputs.items():
        program.tensors[name] = Tensor(name, dtype, size)
    program.calls.append(Call("k", (*given, *outputs), tuple(outputs), "norm"))
    program.inputs, program.outputs = tuple(given), tuple(outputs)
    return program


def check_norm(shape: LayerNormShape, seed: int = 0, **dtypes: Any) -> None:
    """Run a normalisation; compare it with float64, and its rows with NumPy, to the bit."""
    kinds = {"x": "float32", "residual": "float32", "y": "float32", **dtypes}
    given = random_inputs(shape, seed)
    for name in ("x", "residual"):
        if name in given:
            given[name] = given[name].astype(kinds[name])
    program = call_of(shape, given, (kinds["x"], kinds["residual"], kinds["y"]))
    got = emulate(program, given)
    total = given["x"].astype(np.float32)
    if shape.residual:
        total = total + given["residual"]
    if shape.sum_read:
        np.testing.assert_array_equal(got["sum"], total)
    exact = total.astype(np.float64)
    centred = exact - exact.mean(axis=1, keepdims=True) * shape.centred
    deviation = np.sqrt((centred**2).mean(axis=1, keepdims=True) + shape.epsilon)
    wanted = centred / deviation * given.get("scale", 1) + given.get("shift", 0)
    # what float32 loses of a value that is small beside the mean cannot come back
    lost = 1 + np.abs(exact).max(axis=1, keepdims=True) / deviation
    size = np.abs(given.get("scale", np.ones(1))).max() * lost + np.abs(wanted).max()
    y = got["y"].astype(np.float32)
    tolerance = HALF if kinds["y"] == "float16" else TOLERANCE
    assert (np.abs(y - wanted) / size).max() < tolerance, shape
    if not shape.padded:
        return
    steps, step, point = quantised_rows(y * given.get("factors", np.float32(1)))
    np.testing.assert_array_equal(got["step"], step[:, 0])
    np.testing.assert_array_equal(got["point"], point[:, 0] - 128)
    np.testing.assert_array_equal(got["q"][:, : shape.width], steps.astype(np.int32) - 128)
    assert not got["q"][:, shape.width :].any()


PLAIN = LayerNormShape(rows=1, width=1, epsilon=1e-3)
NORMS = [
    PLAIN,
    dataclasses.replace(PLAIN, rows=9, width=37, epsilon=1e-12),
    dataclasses.replace(PLAIN, rows=17, width=384, residual=True, sum_read=True),
    dataclasses.replace(PLAIN, rows=7, width=129, centred=False, shifted=False),
    dataclasses.replace(PLAIN, rows=3, width=16, centred=False, scaled=False, residual=True),
    dataclasses.replace(PLAIN, rows=2, width=1536, residual=True, sum_read=True),
    dataclasses.replace(PLAIN, rows=1, width=20004, residual=True),  # does not fit the registers
]


@pytest.mark.parametrize("index", range(len(NORMS)))
def test_every_form(index: int) -> None:
    shape = NORMS[index]
    check_norm(shape, index)
    if index:
        padded = padded_width(shape.width)
        check_norm(dataclasses.replace(shape, padded=padded, factors=index % 2 == 0), index)


def test_float16_in_memory() -> None:
    shape = NORMS[2]
    check_norm(shape, x="float16", residual="float16", y="float16")
    shape = dataclasses.replace(shape, width=512, padded=512, factors=True, sum_read=False)
    check_norm(shape, x="float16", y="float16")


FORMS = st.builds(
    LayerNormShape,
    rows=st.integers(1, 13),
    width=st.integers(1, 70),
    epsilon=st.just(1e-5),
    centred=st.booleans(),
    scaled=st.booleans(),
    shifted=st.booleans(),
    residual=st.booleans(),
)


def test_any_form() -> None:
    for seed, shape in enumerate(drawn(FORMS, 6)):
        check_norm(shape, seed)


def test_a_graph_with_a_residual() -> None:
    constants = {
        "s": np.linspace(1, 2, 24, dtype=np.float32),
        "b": np.linspace(-1, 1, 24, dtype=np.float32),
    }
    body = """t = Add(a, c) y = LayerNormalization <axis=-1> (t, s, b)
        p = Softmax <axis=1> (y) u = Add(t, p)"""
    signature = "(float[2,5,24] a, float[2,5,24] c) => (float y, float u)"
    model = shaped(net(signature, body, constants, opset=17))
    given = feeds(model)
    got = emulate(lower(model, TARGET), given)
    for want, name in zip(answers(model, given), ("y", "u"), strict=True):
        np.testing.assert_allclose(got[name], want, rtol=1e-5, atol=1e-5)
