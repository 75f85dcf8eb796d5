"""Which float operators edgepress takes over, and that they still answer what ONNX says."""

import numpy as np
import onnx_ir as ir
import pytest

from edgepress.targets.lowering.build import lower
from edgepress.targets.lowering.floats import claim_float_operators
from edgepress.targets.lowering.nhwc import to_nhwc
from edgepress.targets.program import Array
from tests.graphs import answers, feeds, net, nodes, random
from tests.targets.interpret import run_program
from tests.targets.kernels import native_isas, target_of
from tests.targets.qdq import merged_graphs, shaped

ISAS = native_isas()[:1]
X4, X2 = "(float[1,3,7,8] x) => (float y)", "(float[4,5] x) => (float y)"
W = random(6, 3, 3, 2)


def claimed(signature: str, body: str, weights: dict[str, Array] | None = None) -> list[str]:
    model = claim_float_operators(shaped(net(signature, body, weights, opset=19)))
    return nodes(model).splitlines()


def test_a_convolution_takes_bias_and_clamp() -> None:
    bounds = {"low": np.array(0.5, np.float32), "high": np.array(6, np.float32)}
    body = "c = Conv <pads=[1,0,1,1]> (x, w, b) y = Clip(c, low, high)"
    assert claimed(X4, body, {"w": W, "b": random(6), **bounds}) == [
        "y = Conv(x, Conv_0_weights, Conv_0_bias) {dilations=[1,1], group=1, high=6.0, "
        "kernel=[3,2], low=0.5, pads=[1,0,1,1], strides=[1,1]}"
    ]
    (line,) = claimed(X4, "c = Conv(x, w) y = Relu(c)", {"w": W})
    assert "high=inf" in line
    assert "low=0.0" in line


def test_a_clamp_stays_where_the_sum_is_wanted_too() -> None:
    lines = claimed(X4, "c = Conv(x, w) r = Relu(c) y = Add(c, r)", {"w": W})
    assert [line.split("(")[0] for line in lines] == ["c = Conv", "r = Relu", "y = Add"]
    signature = "(float[1,3,7,8] x) => (float y, float c)"
    lines = claimed(signature, "c = Conv(x, w) y = Relu(c)", {"w": W})
    assert [line.split("(")[0] for line in lines] == ["c = Conv", "y = Relu"]


def test_matrix_products() -> None:
    weights = {"w": random(5, 6), "b": random(6)}
    assert claimed(X2, "m = MatMul(x, w) a = Add(b, m) y = Relu(a)", weights) == [
        "y = Gemm(x, MatMul_0_weights, MatMul_0_bias) {high=inf, low=0.0}"
    ]
    body = "y = Gemm <transB=1, alpha=2.0, beta=0.5> (x, w, b)"
    assert len(claimed(X2, body, {"w": random(6, 5), "b": random(6)})) == 1


@pytest.mark.parametrize(
    ("signature", "body", "weights"),
    [
        ("(float[5,4] x) => (float y)", "y = Gemm <transA=1> (x, w)", {"w": random(5, 6)}),
        (X2, "y = Gemm(x, w, b)", {"w": random(5, 6), "b": random(4, 1)}),
        (X2, "y = Gemm(x, w, b)", {"w": random(5, 6), "b": random(4, 6)}),
        ("(float[5,4] x, float[4,3] w) => (float y)", "y = MatMul(x, w)", {}),
        ("(float[1,3,9] x) => (float y)", "y = Conv(x, w)", {"w": random(2, 3, 3)}),
        (X4, "y = AveragePool <kernel_shape=[3,3], strides=[3,3], ceil_mode=1> (x)", {}),
        (X4, "y = ReduceMean <axes=[1]> (x)", {}),
        (X4, "y = ReduceMean <axes=[2,3], keepdims=0> (x)", {}),
    ],
)
def test_what_is_left_to_tvm(signature: str, body: str, weights: dict[str, Array]) -> None:
    model = claim_float_operators(shaped(net(signature, body, weights)))
    assert all(node.domain == "" for node in model.graph)


GRAPHS: list[tuple[str, str, dict[str, Array]]] = [
    (X4, "y = Conv <strides=[2,1], dilations=[2,3]> (x, w)", {"w": W}),
    (X4, 'y = Conv <auto_pad="SAME_LOWER"> (x, w, b)', {"w": W, "b": random(6)}),
    (X4, "y = Conv <group=3> (x, w)", {"w": random(6, 1, 2, 2)}),
    (X4, "c = Conv <group=3, pads=[1,1,1,1]> (x, w) y = Relu(c)", {"w": random(3, 1, 3, 3)}),
    (X4, "y = Conv <pads=[0,3,0,3], strides=[1,9]> (x, w)", {"w": random(2, 3, 1, 1)}),
    (X4, "y = MaxPool <kernel_shape=[3,3], strides=[2,2], ceil_mode=1> (x)", {}),
    (X4, "y = MaxPool <kernel_shape=[2,3], pads=[1,1,0,2], dilations=[2,1]> (x)", {}),
    (X4, "y = AveragePool <kernel_shape=[2,3], pads=[1,1,0,2]> (x)", {}),
    (X4, "y = AveragePool <kernel_shape=[3,3], strides=[2,3], ceil_mode=1> (x)", {}),
    (X4, "y = AveragePool <kernel_shape=[2,3], pads=[1,1,0,2], count_include_pad=1> (x)", {}),
    (X4, "y = GlobalAveragePool(x)", {}),
    (X4, "y = ReduceMean <axes=[-2,-1]> (x)", {}),
    (X4, "a = Conv(x, w) b = Conv(x, w) y = Concat <axis=-3> (a, b)", {"w": W}),
    (X4, "a = Conv(x, w) b = Add(a, k) y = PRelu(b, s)", {"w": W, "k": random(6, 1, 1),
                                                          "s": random(6, 1, 1)}),
    (X4, "a = Conv(x, w) y = Reshape(a, r)", {"w": W, "r": np.array([2, -1])}),
    (X4, "a = Conv(x, w) b = Softmax <axis=1> (a) y = MaxPool <kernel_shape=[2,2]> (b)", {"w": W}),
    (X2, "y = Gemm <alpha=2.0, beta=0.5> (x, w, b)", {"w": random(5, 6), "b": random(1, 6)}),
    (X2, "y = Gemm(x, w, b)", {"w": random(5, 6), "b": random(4, 1)}),
    (X2, "y = Gemm(x, w, b)", {"w": random(5, 6), "b": np.array(3, np.float32)}),
    (X2, "m = MatMul(x, w) a = Add(m, b) y = Clip(a, , h)", {"w": random(5, 6), "b": random(6),
                                                            "h": np.array(0.1, np.float32)}),
    ("(float[2,3,5] x) => (float y)", "y = MatMul(x, w)", {"w": random(5, 17)}),
    (X2, "m = MatMul(x, w) y = Add(m, m)", {"w": random(5, 6)}),
]  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
def test_compiled_answers_are_those_of_onnxruntime(isa: str) -> None:
    models = [shaped(net(*graph)) for graph in GRAPHS]
    inputs = [feeds(model, seed) for seed, model in enumerate(models)]
    program, joined = merged_graphs(models, target_of(isa), inputs)
    results = run_program(program, target_of(isa), joined)
    for index, (model, each) in enumerate(zip(models, inputs, strict=True)):
        (wanted,) = answers(model, each)
        answer = results[f"g{index}_y"]
        assert answer.shape == wanted.shape
        np.testing.assert_allclose(answer, wanted, rtol=1e-4, atol=1e-5, err_msg=nodes(model))


INTERFACES: list[tuple[str, str, dict[str, Array]]] = [
    ("(float[1,3,7,8] x) => (float y, float c)", "c = Conv(x, w) y = Relu(c)", {"w": W}),
    ("(float[1,3,7,8] x) => (float c, float y)", "c = Conv(x, w) y = Conv(c, v)",
     {"w": W, "v": random(2, 6, 1, 1)}),
    ("(float[1,3,7,8] x) => (float y, float y)", "y = Conv(x, w)", {"w": W}),
    ("(float[1,3,7,8] x) => (float y, float z)", "c = Conv(x, w) y = Identity(c) z = Identity(c)",
     {"w": W}),
    ("(float[1,3,7,8] x) => (float y)", "y = Identity(x)", {}),
    ("(float[1,3,7,8] x) => (float y, float[2] k)", "y = Relu(x)", {"k": random(2)}),
    ("(float[1,3,1,8] x) => (float y)", "c = MaxPool <kernel_shape=[1,1]> (x) y = Flatten(c)", {}),
    ("(float[1,3,7,8] x, int64[2] unused) => (float y)", "y = Relu(x)", {}),
    ("(float[1,3,7,8] x) => (float y, int64 i)", "c = Conv(x, w) y = Relu(c) i = ArgMax(c)",
     {"w": W}),
    ("(float[1,3,7,8] x) => (float Conv_0_bias, float y)",
     "Conv_0_bias = Relu(x) y = Conv(x, w)", {"w": W}),
]  # fmt: skip


@pytest.mark.parametrize("graph", INTERFACES, ids=[body for _, body, _ in INTERFACES])
def test_outputs_keep_their_names(graph: tuple[str, str, dict[str, Array]]) -> None:
    model = shaped(net(*graph))
    names, kinds = _interface(model)
    for lowered in (claim_float_operators(model), to_nhwc(claim_float_operators(model))):
        assert _interface(lowered) == (names, kinds)
    if not ISAS:
        return
    inputs, target = feeds(model), target_of(ISAS[0])
    program = lower(model, target)
    assert list(program.outputs) == names
    results = run_program(program, target, inputs)
    for name, wanted in zip(names, answers(model, inputs), strict=True):
        assert results[name].dtype == wanted.dtype
        np.testing.assert_allclose(results[name], wanted, rtol=1e-4, atol=1e-5)


def _interface(model: ir.Model) -> tuple[list[str], list[object]]:
    outputs = model.graph.outputs
    return [v.name or "" for v in outputs], [(v.dtype, str(v.shape)) for v in outputs]
