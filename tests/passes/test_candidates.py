from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.passes import _moments
from edgepress.passes._candidates import (
    is_factor,
    itself,
    largest_rank,
    methods_for,
    why_not,
)
from edgepress.passes._factors import decomposition
from edgepress.passes._shapes import shape_of
from tests.graphs import Array, answers, feeds, nodes, random, weight
from tests.passes.int8_nets import quantized
from tests.passes.low_rank_nets import (
    best,
    conv,
    first_layer,
    made,
    mixtures,
    moments_of,
    replaced,
)


def assert_close(got: Array, want: Array, share: float = 1e-5) -> None:
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=share * max(float(np.abs(want).max()), 1e-3))


# A layer of full rank is the layer ----------------------------------------------------------------


@st.composite
def convolutions(draw: st.DrawFn) -> ir.Model:
    kernel, strides = (draw(st.tuples(st.integers(1, 3), st.integers(1, 3))) for _ in range(2))
    padding = draw(st.sampled_from(["pads", "VALID", "SAME_UPPER", "SAME_LOWER", "none"]))
    dilations = (1, 1)
    if not padding.startswith("SAME"):  # onnxruntime has no dilation with these
        dilations = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    attributes = f"strides={list(strides)}, dilations={list(dilations)}"
    if padding == "pads":
        pads = draw(st.lists(st.integers(0, 2), min_size=4, max_size=4))
        attributes += f", pads={pads}"
    elif padding != "none":
        attributes += f', auto_pad="{padding}"'
    batch, into, out = draw(st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 6)))
    height, width = draw(st.tuples(st.integers(5, 8), st.integers(5, 8)))
    weights: dict[str, Array] = {"w": random(out, into, *kernel)}
    bias = ""
    if draw(st.booleans()):
        bias, weights["b"] = ", b", random(out)
    return made(
        f"(float[{batch},{into},{height},{width}] x) => (float[N,M,K,L] y)",
        f"y = Conv <{attributes}> (x, w{bias})",
        weights,
    )


@given(
    model=convolutions(),
    method=st.sampled_from(["channel", "spatial", "tucker"]),
    how=st.sampled_from(["rank", "lost", "samples"]),
)
@settings(deadline=None, max_examples=100)
def test_a_convolution_of_full_rank_is_the_convolution(
    model: ir.Model, method: str, how: str
) -> None:
    node = first_layer(model)
    inputs = feeds(model)
    moments = moments_of(model, inputs["x"][None]) if how == "samples" else None
    if how == "rank":
        shape = shape_of(node.inputs[1])
        # tucker has two ranks; one number for both is rounded up to the larger, and cut
        align = max(shape)
        chosen = best(node, method, rank=1, align=align * max(shape[2:]) ** 2)
    else:
        chosen = best(node, method, moments)
    assert chosen.lost <= 1e-12
    (want,), (got,) = answers(model, inputs), answers(replaced(model, chosen), inputs)
    assert_close(got, want)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(
    ("rows", "body", "weights"),
    [
        ("4,5", "y = Gemm(x, w)", {"w": (5, 7)}),
        ("4,5", "y = Gemm <alpha=0.5> (x, w, b)", {"w": (5, 7), "b": (7,)}),
        ("4,5", "y = Gemm <transB=1, beta=3.0> (x, w, b)", {"w": (7, 5), "b": (1, 7)}),
        ("4,5", "y = Gemm <transB=1, alpha=-2.0, beta=0.5> (x, w, b)", {"w": (7, 5), "b": ()}),
        ("4,5", "y = Gemm(x, w, b)", {"w": (5, 7), "b": (1,)}),
        ("4,7", "y = Gemm(x, w, b)", {"w": (7, 3), "b": (1, 1)}),
        ("4,5", "y = MatMul(x, w)", {"w": (5, 7)}),
        ("2,4,9", "y = MatMul(x, w)", {"w": (9, 3)}),
        ("5", "y = MatMul(x, w)", {"w": (5, 7)}),
    ],
)
def test_a_dense_layer_of_full_rank_is_the_layer(
    rows: str, body: str, weights: dict[str, tuple[int, ...]], sampled: bool
) -> None:
    out = ",".join("NMK"[: len(rows.split(","))])
    arrays = {name: np.asarray(random(*shape)) for name, shape in weights.items()}
    model = made(f"(float[{rows}] x) => (float[{out}] y)", body, arrays)
    inputs = feeds(model)
    moments = moments_of(model, inputs["x"][None]) if sampled else None
    chosen = best(first_layer(model), "channel", moments)
    assert chosen.label == f"rank {min(weights['w'])}"
    (want,), (got,) = answers(model, inputs), answers(replaced(model, chosen), inputs)
    assert_close(got, want)


# What it takes and what it loses ------------------------------------------------------------------

GOLDEN = {
    "channel": """\
y_factor_1 = Conv(x, y_factor_1_weight) {dilations=[1,2], group=1, kernel_shape=[3,3], \
pads=[1,1,1,1], strides=[2,1]}
y = Conv(y_factor_1, w, b) {dilations=[1,1], group=1, kernel_shape=[1,1], pads=[0,0,0,0], \
strides=[1,1]}""",
    "spatial": """\
y_factor_1 = Conv(x, y_factor_1_weight) {dilations=[1,1], group=1, kernel_shape=[3,1], \
pads=[1,0,1,0], strides=[2,1]}
y = Conv(y_factor_1, w, b) {dilations=[1,2], group=1, kernel_shape=[1,3], pads=[0,1,0,1], \
strides=[1,1]}""",
    "tucker": """\
y_factor_1 = Conv(x, y_factor_1_weight) {dilations=[1,1], group=1, kernel_shape=[1,1], \
pads=[0,0,0,0], strides=[1,1]}
y_factor_2 = Conv(y_factor_1, y_factor_2_weight) {dilations=[1,2], group=1, kernel_shape=[3,3], \
pads=[1,1,1,1], strides=[2,1]}
y = Conv(y_factor_2, w, b) {dilations=[1,1], group=1, kernel_shape=[1,1], pads=[0,0,0,0], \
strides=[1,1]}""",
}
SHAPES = {
    "channel": [(4, 6, 3, 3), (8, 4, 1, 1)],
    "spatial": [(4, 6, 3, 1), (8, 4, 1, 3)],
    "tucker": [(4, 6, 1, 1), (4, 4, 3, 3), (8, 4, 1, 1)],
}


@pytest.mark.parametrize("method", GOLDEN)
def test_factors_of_a_convolution_share_its_geometry(method: str) -> None:
    model = conv()
    chosen = best(first_layer(model), method, rank=3, align=4)
    after = replaced(model, chosen)
    assert nodes(after) == GOLDEN[method]
    shapes = [shape_of(node.inputs[1]) for node in after.graph]
    assert shapes == SHAPES[method]
    assert chosen.label == ("tucker ranks 4 and 4" if method == "tucker" else f"{method} rank 4")
    assert chosen.parameters == sum(map(math.prod, shapes)) + 8
    outputs = [shape_of(node.outputs[0]) for node in after.graph]
    work = zip(outputs, shapes, strict=True)
    assert chosen.macs == sum(math.prod(y) * math.prod(w[1:]) for y, w in work)
    assert all(map(is_factor, after.graph))


GEMM_TRANSPOSED = """\
y_factor_1 = Gemm(x, y_factor_1_weight) {transB=1}
y = Gemm(y_factor_1, v, b) {transB=1}"""
GEMM = """\
y_factor_1 = Gemm(x, y_factor_1_weight)
y = Gemm(y_factor_1, w, b)"""
MATMUL = """\
m_factor_1 = MatMul(x, m_factor_1_weight)
m = MatMul(m_factor_1, w)
y = Add(m, b)"""


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("y = Gemm <alpha=2.0, transB=1> (x, v, b)", GEMM_TRANSPOSED),
        ("y = Gemm <beta=2.0> (x, w, b)", GEMM),
        ("m = MatMul(x, w) y = Add(m, b)", MATMUL),
    ],
)
def test_factors_of_a_dense_layer(body: str, text: str) -> None:
    weights = {"w": random(6, 8), "v": random(8, 6), "b": random(8)}
    model = made("(float[3,6] x) => (float[3,8] y)", body, weights)
    chosen = best(first_layer(model), "channel", rank=2)
    after = replaced(model, chosen)
    assert nodes(after) == text
    value = after.graph[0].inputs[1]
    assert shape_of(value) == ((2, 6) if "transB" in body else (6, 2))
    assert chosen.macs == 3 * 2 * (6 + 8)


def test_a_layer_competes_as_it_is() -> None:
    node = first_layer(conv())
    found = itself(node)
    assert found.label == "the layer itself"
    assert found.lost == 0
    assert found.parameters == 8 * 6 * 9 + 8
    assert found.macs == math.prod(shape_of(node.outputs[0])) * 6 * 9


@given(
    method=st.sampled_from(["channel", "spatial", "tucker"]),
    lost=st.floats(0, 1),
    align=st.sampled_from([1, 4]),
)
@settings(deadline=None, max_examples=40)
def test_ranks_are_the_least_that_lose_no_more(method: str, lost: float, align: int) -> None:
    node = first_layer(conv())
    chosen = best(node, method, lost=lost, align=align)
    assert chosen.lost <= max(lost, 1e-12)
    if method == "tucker":
        return
    rank = len(chosen.layers[0].weight)
    assert rank % align == 0 or rank == largest_rank(node, method)
    if rank > align:
        assert best(node, method, rank=rank - align, align=align).lost > lost


@pytest.mark.parametrize("lost", [0.1, 0.3, 0.6])
def test_tuckers_ranks_are_those_of_the_least_work(lost: float) -> None:
    """With strides, the first factor has four times as many positions as the others."""
    w = random(10, 10, 3, 4)
    text = "(float[1,10,12,12] x) => (float[1,10,6,6] y)"
    node = first_layer(made(text, "y = Conv <strides=[2,2], pads=[1,1,1,1]> (x, w)", {"w": w}))
    found = decomposition("tucker", w.astype(np.float64), None)
    work = {
        (r, q): 144 * 10 * q + 36 * (12 * q * r + r * 10)
        for r in range(1, 11)
        for q in range(1, 11)
        if found.lost((r, q)) <= lost
    }
    assert best(node, "tucker", lost=lost).macs == min(work.values())


# Which layers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("y = Conv(x, w, b)", ""),
        ("y = Conv <group=2> (x, half)", "it has 2 groups; only"),
        ("y = Conv(x, w) z = Conv(y, w)", "its weight 'w' is read by others too"),
        ("v = Relu(w) y = Conv(x, v)", "its weight is not constant"),
        ("y = Conv(w, w1)", "its input is constant"),
        ("c = ReduceMean <axes=[0,2,3], keepdims=0> (x) y = Conv(x, w, c)", "its bias is not"),
        ("y = Conv(x, poisoned)", "its weight is not finite"),
        ("y = MatMul(x, deep)", "its weight has 4 axes, not 2"),
    ],
)
def test_layers_that_stay_say_why(body: str, why: str) -> None:
    weights = {
        "w": random(4, 4, 1, 1),
        "w1": random(4, 4, 1, 1),
        "half": random(4, 2, 1, 1),
        "b": random(4),
        "poisoned": np.full((4, 4, 1, 1), np.nan, np.float32),
        "deep": random(1, 1, 6, 4),
    }
    model = made("(float[1,4,6,6] x) => (float[N,M,K,L] y)", body, weights)
    node = next(node for node in model.graph if node.outputs[0].name == "y")
    assert why_not(node).startswith(why)
    assert bool(why_not(node)) == bool(why)


def test_other_reasons_to_stay() -> None:
    def why(signature: str, body: str, **weights: Array) -> str:
        return why_not(first_layer(made(signature, body, weights)))

    w, dense = random(4, 4), "(float[4,4] x) => (float[N,M] y)"
    assert why(dense, "y = Gemm <transA=1> (x, w)", w=w) == "it transposes its input"
    assert why(dense, "y = Gemm(x, w, b)", w=w, b=random(4, 1)) == "its bias differs per row"
    assert why(dense, "y = Gemm(x, w, b)", w=w, b=random(4, 4)) == "its bias differs per row"
    assert why("(float[1,4,9] x) => (float[N,M,K] y)", "y = Conv(x, w)", w=random(4, 4, 3)) == (
        "its kernel has 1 axes, not 2"
    )
    assert why("(float[N,4] x) => (float[N,M] y)", "y = MatMul(x, w)", w=w) == (
        "a shape is empty or not fixed"
    )
    halves = "(float16[4,4] x) => (float16[N,M] y)"
    assert why(halves, "y = MatMul(x, w)", w=w.astype(np.float16)) == (
        "its weight is FLOAT16, not float32"
    )
    output = "(float[4,4] x) => (float[4,4] y, float[4,4] w)"
    assert why(output, "y = MatMul(x, w)", w=w) == "its weight 'w' is read by others too"


@pytest.mark.parametrize(
    ("kernel", "methods"),
    [
        ((1, 1), ["channel"]),
        ((3, 3), ["channel", "spatial", "tucker"]),
        ((1, 3), ["channel", "spatial", "tucker"]),
        ((3, 1), ["channel", "tucker"]),
    ],
)
def test_methods_that_a_kernel_has(kernel: tuple[int, int], methods: list[str]) -> None:
    weights = {"w": random(4, 4, *kernel)}
    model = made("(float[1,4,6,6] x) => (float[N,M,K,L] y)", "y = Conv(x, w)", weights)
    node = first_layer(model)
    assert methods_for(node, "best") == methods
    for method in ("channel", "spatial", "tucker"):
        assert methods_for(node, method) == [name for name in methods if name == method]


def test_a_dense_layer_has_one_way_whatever_convolutions_get() -> None:
    model = made("(float[3,6] x) => (float[3,8] y)", "y = MatMul(x, w)", {"w": random(6, 8)})
    node = first_layer(model)
    assert [methods_for(node, name) for name in ("best", "tucker")] == [["channel"]] * 2
    assert largest_rank(node, "channel") == 6


def test_the_largest_rank_of_tucker_is_that_of_the_narrower_mode() -> None:
    node = first_layer(conv(out=8, into=3))
    assert [largest_rank(node, m) for m in ("channel", "spatial", "tucker")] == [8, 9, 3]


# In the graph -------------------------------------------------------------------------------------


def test_names_that_are_taken_stay() -> None:
    weights = {
        "w": random(4, 3, 3, 3),
        "y_factor_1_weight": random(3, 1, 1),
        "k": random(2, 4, 1, 1),
    }
    model = made(
        "(float[1,3,6,6] x) => (float[N,M,K,L] z)",
        "y_factor_1 = Mul(x, y_factor_1_weight) y = Conv(y_factor_1, w) z = Conv(y, k)",
        weights,
    )  # fmt: skip
    model.graph[0].name = "Conv_1_factor_1"
    chosen = best(first_layer(model), "tucker", rank=2)
    after = replaced(model, chosen)
    assert [node.name for node in after.graph] == [
        "Conv_1_factor_1", "Conv_1_factor_1_1", "Conv_1_factor_2", "Conv_1", "Conv_2",
    ]  # fmt: skip
    np.testing.assert_array_equal(weight(after, "y_factor_1_weight"), weights["y_factor_1_weight"])
    assert "y_factor_1_1" in nodes(after)


def test_a_bias_that_others_read_stays_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_moments, "POSITIONS", 4)
    model = made(
        "(float[1,3,6,6] x) => (float[N,M,K,L] z)",
        "y = Conv(x, w, b) z = Conv(y, k, b)",
        {"w": random(4, 3, 3, 3), "k": random(4, 4, 1, 1), "b": random(4)},
    )
    moments = moments_of(model, mixtures(10, 3, 6, 6))
    after = replaced(model, best(first_layer(model), "channel", moments, rank=2))
    *_, last = after.graph
    np.testing.assert_array_equal(weight(after, str(last.inputs[2].name)), random(4))  # type: ignore[union-attr]
    assert "y = Conv(y_factor_1, w, y_bias)" in nodes(after)


@pytest.mark.parametrize("method", ["channel", "spatial", "tucker"])
def test_factors_can_be_quantized(method: str) -> None:
    model = made(
        "(float[1,6,8,8] x) => (float[1,5] y)",
        "a = Conv <pads=[1,1,1,1]> (x, w, b) r = Relu(a) p = GlobalAveragePool(r) "
        "f = Flatten(p) y = Gemm(f, v)",
        {"w": random(8, 6, 3, 3), "b": random(8), "v": random(8, 5)},
    )
    factored = replaced(model, best(first_layer(model), method, rank=4))
    outcome = quantized(factored.clone())
    assert outcome.skipped == []
    inputs = feeds(model)
    (want,), (got,) = answers(factored, inputs), answers(outcome.model, inputs)
    assert np.linalg.norm(want - got) < 0.06 * np.linalg.norm(want)


@pytest.mark.parametrize("method", GOLDEN)
def test_no_weight_is_left_that_nothing_reads(method: str) -> None:
    model = conv()
    after = replaced(model, best(first_layer(model), method, rank=2))
    assert all(value.uses() for value in after.graph.initializers.values())
