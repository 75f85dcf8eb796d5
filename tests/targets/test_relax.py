"""ONNX regions become programs through TVM Relax."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgepress.targets.base import UnsupportedModel
from edgepress.targets.load import load_target
from edgepress.targets.lowering.relax import lower_region
from edgepress.targets.program import Array, Program
from tests.targets.interpret import run_program

X86 = load_target("x86-64-v3")


def region(text: str, opset: int = 17) -> ir.Model:
    head = f'<ir_version: 8, opset_import: ["":{opset}]> '
    return ir.from_proto(onnx.parser.parse_model(head + text))


def lower(text: str, prefix: str = "r_") -> Program:
    return lower_region(region(text), X86, prefix)


def run(program: Program, **feeds: Array) -> dict[str, Array]:
    return run_program(program, X86, feeds)


def normal(*shape: int) -> Array:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_neighbours_are_fused_into_one_kernel() -> None:
    program = lower("g (float[2,6] x) => (float[2,6] y) { a = Exp(x) b = Neg(a) y = Tanh(b) }")
    x = normal(2, 6)
    np.testing.assert_allclose(run(program, x=x)["y"], np.tanh(-np.exp(x)), rtol=1e-5)
    assert len(program.calls) == 1


def test_a_reshape_between_kernels_costs_nothing() -> None:
    program = lower(
        "g (float[2,3,4] x) => (float[4,6] y) <int64[2] s = {6, 4}> "
        "{ a = Softmax(x) b = Reshape(a, s) y = Transpose<perm=[1,0]>(b) }"
    )
    x = normal(2, 3, 4)
    parts = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    np.testing.assert_allclose(run(program, x=x)["y"], parts.reshape(6, 4).T, rtol=1e-5)
    assert len(program.calls) == 2


def test_a_reshape_before_an_output_costs_nothing() -> None:
    program = lower(
        "g (float[2,3] x) => (float[6] y) <int64[1] s = {6}> { a=Exp(x) y=Reshape(a,s)}"
    )
    x = normal(2, 3)
    np.testing.assert_allclose(run(program, x=x)["y"], np.exp(x).reshape(6), rtol=1e-5)
    assert len(program.calls) == 1


def test_outputs_that_are_inputs_constants_or_each_other_are_copied() -> None:
    program = lower(
        "g (float[2,3] x) => (float[2,3] same, float[2] known, float[2,3] y, float[2,3] again, "
        "float[3,2] flat) <float[2] k = {1.0, 2.0}, int64[2] s = {3, 2}> { same = Identity(x) "
        "known = Identity(k) y = Neg(x) again = Identity(y) flat = Reshape(x, s) }"
    )
    x = normal(2, 3)
    answers = run(program, x=x)
    wanted = {"same": x, "known": [1, 2], "y": -x, "again": -x, "flat": x.reshape(3, 2)}
    for name, value in wanted.items():
        np.testing.assert_array_equal(answers[name], np.array(value, np.float32))


def test_several_outputs_of_one_node() -> None:
    program = lower(
        "g (float[5,4] x) => (float[2,4] a, float[3,4] b) <int64[2] s = {2, 3}> "
        "{ a, b = Split<axis=0>(x, s) }"
    )
    x = normal(5, 4)
    answers = run(program, x=x)
    np.testing.assert_array_equal(answers["a"], x[:2])
    np.testing.assert_array_equal(answers["b"], x[2:])


def test_scalars_integers_and_booleans() -> None:
    program = lower(
        "g (float x, int64[3] i, bool[3] c) => (float y, int64[3] j, bool[3] d) "
        "<int64 one = {1}> { y = Abs(x) j = Add(i, one) d = Not(c) }"
    )
    answers = run(
        program,
        x=np.array(-2, np.float32),
        i=np.array([1, 2**40, -3]),
        c=np.array([True, False, True]),
    )
    assert answers["y"] == 2
    np.testing.assert_array_equal(answers["j"], [2, 2**40 + 1, -2])
    np.testing.assert_array_equal(answers["d"], [False, True, False])


def test_equal_kernels_are_compiled_once() -> None:
    program = lower(
        "g (float[2,8] x) => (float[2,8] y) { a = Softmax(x) b = Softmax(a) y = Softmax(b) }"
    )
    assert len(program.calls) == 3
    assert len(program.kernels) == 1


def test_inner_names_carry_the_prefix() -> None:
    program = lower(
        "g (float[2,3] x) => (float[2] y) <int64[1] axes = {1}> "
        "{ a = Softmax(x) y = ReduceSum<keepdims=0>(a, axes) }",
        "part3_",
    )
    inner = {*program.tensors, *program.constants, *program.kernels} - {"x", "y"}
    assert inner
    assert all(name.startswith("part3_") for name in inner)


def test_indices_outside_the_data_stay_inside_the_memory() -> None:
    program = lower("g (float[3,2] x, int64[4] i) => (float[4,2] y) { y = Gather(x, i) }")
    x = normal(3, 2)
    places = np.array([-1, 2, 10**12, -(10**12)])
    np.testing.assert_array_equal(run(program, x=x, i=places)["y"], x[[2, 2, 2, 0]])


def test_every_node_that_cannot_be_lowered_is_named() -> None:
    with pytest.raises(UnsupportedModel) as refusal:
        lower(
            "g (float[2,3] x) => (float[2,3] y, int64[2,N] z, double[2,3] w) "
            "{ [first] y = Bernoulli(x) [second] z = NonZero(x) [third] w = Cast<to=11>(x) }"
        )
    reasons = dict(refusal.value.reasons)
    assert reasons["first (Bernoulli)"] == "its result is random"
    assert "depends on the data" in reasons["second (NonZero)"]
    assert "float64" in reasons["third (Cast)"]


def test_what_only_tvm_knows_to_refuse_is_named_too() -> None:
    with pytest.raises(UnsupportedModel) as refusal:
        lower(
            "g (float[1,1,3,3,3,3] x, float[1,1,2,2,2,2] w) => (float[1,1,2,2,2,2] y) "
            "{ a = Exp(x) [four] y = Conv(a, w) }"
        )
    assert [node for node, _ in refusal.value.reasons] == ["four (Conv)"]


def test_an_input_without_elements_is_known() -> None:
    program = lower(
        "g (float[2,0,4] x) => (float[2,4] y) <int64[1] axes = {1}> "
        "{ y = ReduceSum<keepdims=0>(x, axes) }"
    )
    np.testing.assert_array_equal(run(program, x=normal(2, 0, 4))["y"], np.zeros((2, 4)))
