from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings

from edgepress.passes._shapes import refresh_shapes
from edgepress.passes.base import Outcome
from edgepress.passes.fold_batch_norm import GAMMA, FoldBatchNorm
from tests.graphs import Array, apply, conv_nets, net, nodes, random, weight


def norm(channels: int) -> dict[str, Array]:
    return {
        "g": random(channels, seed=1),
        "h": random(channels, seed=2),
        "m": random(channels, seed=3),
        "v": np.abs(random(channels, seed=4)) + np.float32(0.1),
    }


def folded(signature: str, body: str, weights: dict[str, Array], opset: int = 17) -> Outcome:
    model = net(signature, body, weights, opset=opset)
    refresh_shapes(model)
    return apply(FoldBatchNorm(), model)


CONV = "(float[1,3,8,8] x) => (float[1,4,6,6] y)"
BN = "y = BatchNormalization <epsilon=0.01> (c, g, h, m, v)"


@pytest.mark.parametrize(
    ("signature", "body", "shapes", "golden"),
    [
        (CONV, f"c = Conv(x, w) {BN}", {"w": (4, 3, 3, 3)}, "y = Conv(x, w, Conv_0_bias)"),
        (CONV, f"c = Conv(x, w, b) {BN}", {"w": (4, 3, 3, 3), "b": (4,)}, "y = Conv(x, w, b)"),
        (
            "(float[1,4,5,5] x) => (float[1,6,7,7] y)",
            f"c = ConvTranspose <group=2> (x, w, b) {BN}",
            {"w": (4, 3, 3, 3), "b": (6,)},
            "y = ConvTranspose(x, w, b) {group=2}",
        ),
        (
            "(float[2,3] x) => (float[2,4] y)",
            f"c = Gemm <transB=1, alpha=0.5, beta=2.0> (x, w, b) {BN}",
            {"w": (4, 3), "b": (2, 1)},
            "y = Gemm(x, w, b) {alpha=0.5, transB=1}",
        ),
        (
            "(float[2,3] x) => (float[2,4] y)",
            f"c = MatMul(x, w) {BN}",
            {"w": (3, 4)},
            "y = Gemm(x, w, MatMul_0_bias)",
        ),
    ],
)
def test_batch_norm_folds_into_what_is_before_it(
    signature: str, body: str, shapes: dict[str, tuple[int, ...]], golden: str
) -> None:
    weights = {name: random(*shape) for name, shape in shapes.items()}
    channels = 6 if "group" in body else 4
    outcome = folded(signature, body, weights | norm(channels))
    assert nodes(outcome.model) == golden
    assert outcome.stats == {"folded": 1, "rewritten": 0}
    assert not {"g", "h", "m", "v"} & set(outcome.model.graph.initializers)


@pytest.mark.parametrize(
    ("body", "golden"),
    [
        ("c = Conv(x, w) y = Add(c, k)", "y = Conv(x, w, Conv_0_bias)"),
        ("c = Conv(x, w) y = Add(k, c)", "y = Conv(x, w, Conv_0_bias)"),
        ("c = Conv(x, w) y = Sub(c, k)", "y = Conv(x, w, Conv_0_bias)"),
        ("c = Conv(x, w) y = Sub(k, c)", "y = Conv(x, w, Conv_0_bias)"),
        ("c = Conv(x, w) y = Mul(c, k)", "y = Conv(x, w)"),
        ("c = Conv(x, w) y = Div(c, k)", "y = Conv(x, w)"),
        ("c = Conv(x, w) y = Div(k, c)", "c = Conv(x, w)\ny = Div(k, c)"),
        ("c = Conv(x, w) a = Mul(c, k) y = Add(a, k)", "y = Conv(x, w, Conv_0_bias)"),
        ("c = Conv(x, w) y = Add(c, wide)", "c = Conv(x, w)\ny = Add(c, wide)"),
        ("c = Conv(x, w) y = Mul(c, one)", "y = Conv(x, w)"),
    ],
)
def test_constant_arithmetic_folds(body: str, golden: str) -> None:
    weights = {
        "w": random(4, 3, 3, 3),
        "k": random(1, 4, 1, 1),
        "wide": random(6),
        "one": np.array(3, np.float32),
    }
    assert nodes(folded(CONV, body, weights).model) == golden


def test_a_dense_layer_becomes_gemm() -> None:
    weights = {"w": random(3, 4), "k": random(1, 4)}
    body = "c = MatMul(x, w) y = Add(c, k)"
    outcome = folded("(float[2,3] x) => (float[2,4] y)", body, weights)
    assert nodes(outcome.model) == "y = Gemm(x, w, MatMul_0_bias)"
    outcome = folded(
        "(float[5,2,3] x) => (float[5,2,4] y)", "c = MatMul(x, w) y = Add(c, k)", weights
    )
    assert nodes(outcome.model) == "c = MatMul(x, w)\ny = Add(c, k)"


def test_alone_it_becomes_mul_and_add() -> None:
    outcome = folded("(float[1,4,6,6] c) => (float[1,4,6,6] y)", BN, norm(4))
    assert nodes(outcome.model) == (
        "BatchNormalization_0_scaled = Mul(c, BatchNormalization_0_scale)\n"
        "y = Add(BatchNormalization_0_scaled, BatchNormalization_0_shift)"
    )
    assert weight(outcome.model, "BatchNormalization_0_scale").shape == (4, 1, 1)
    assert outcome.stats == {"folded": 0, "rewritten": 1}


def test_a_value_that_others_read_stays() -> None:
    outcome = folded(
        "(float[1,3,8,8] x) => (float[1,4,6,6] y, float[1,4,6,6] z)",
        f"c = Conv(x, w) {BN} z = Relu(c)",
        {"w": random(4, 3, 3, 3)} | norm(4),
    )
    assert [node.op_type for node in outcome.model.graph] == ["Conv", "Mul", "Add", "Relu"]
    outcome = folded(
        "(float[1,3,8,8] x) => (float[1,4,6,6] c, float[1,4,6,6] y)",
        "c = Conv(x, w) y = Add(c, k)",
        {"w": random(4, 3, 3, 3), "k": random(4, 1, 1)},
    )
    assert outcome.skipped == [("Add_1", "Conv_0 is read by others too")]


def test_shared_weights_are_copied() -> None:
    outcome = folded(
        "(float[1,4,6,6] x) => (float[1,4,6,6] y)",
        f"d = Conv(x, w) e = Relu(d) c = Conv(e, w) {BN}",
        {"w": random(4, 4, 1, 1)} | norm(4),
    )
    assert nodes(outcome.model) == (
        "d = Conv(x, w)\ne = Relu(d)\ny = Conv(e, Conv_2_weight, Conv_2_bias)"
    )
    np.testing.assert_array_equal(weight(outcome.model, "w"), random(4, 4, 1, 1))


def test_quantized_weights_stay() -> None:
    weights = norm(4)
    weights |= {"q": np.ones((4, 3, 3, 3), np.int8), "s": np.array(0.5, np.float32)}
    outcome = folded(CONV, f"w = DequantizeLinear(q, s) c = Conv(x, w) {BN}", weights)
    kinds = [node.op_type for node in outcome.model.graph]
    assert kinds == ["DequantizeLinear", "Conv", "Mul", "Add"]


def test_training_stays_and_says_so() -> None:
    model = net(
        "(float[2,4,6,6] c) => (float[2,4,6,6] y)",
        "y, a, b = BatchNormalization <training_mode=1> (c, g, h, m, v)",
        norm(4),
    )
    refresh_shapes(model)
    outcome = apply(FoldBatchNorm(), model)
    assert not outcome.modified
    why = "it trains, or its parameters are not constant"
    assert outcome.skipped == [("BatchNormalization_0", why)]


def test_the_scale_stays_behind_as_a_note() -> None:
    outcome = folded(CONV, f"c = Conv(x, w) {BN}", {"w": random(4, 3, 3, 3)} | norm(4))
    (layer,) = ir.from_proto(ir.to_proto(outcome.model)).graph
    noted = json.loads(layer.metadata_props[GAMMA])
    np.testing.assert_allclose(noted, np.abs(norm(4)["g"]), rtol=1e-6)
    assert min(norm(4)["g"]) < 0 < min(noted)
    assert all(float(f"{number:.7g}") == number for number in noted)


@pytest.mark.parametrize(
    "body",
    ["c = Conv(x, w) y = Mul(c, g1)", "c = Conv(x, w) r = Relu(c) " + BN.replace("(c", "(r")],
)
def test_only_a_folded_batch_norm_leaves_a_note(body: str) -> None:
    weights = {"w": random(4, 3, 3, 3), "g1": random(4, 1, 1)} | norm(4)
    outcome = folded(CONV, body, weights)
    assert not any(node.metadata_props for node in outcome.model.graph)


def test_the_note_keeps_the_last_of_two() -> None:
    body = (
        "c = Conv(x, w) d = BatchNormalization(c, g, h, m, v) y = BatchNormalization(d, h, g, m, v)"
    )
    outcome = folded(CONV, body, {"w": random(4, 3, 3, 3)} | norm(4))
    (layer,) = outcome.model.graph
    noted = json.loads(layer.metadata_props[GAMMA])
    np.testing.assert_allclose(noted, np.abs(norm(4)["h"]), rtol=1e-6)


@settings(deadline=None, max_examples=50)
@given(conv_nets())
def test_random_nets(model: ir.Model) -> None:
    refresh_shapes(model)
    outcome = apply(FoldBatchNorm(), model)
    assert not any(node.op_type == "BatchNormalization" for node in outcome.model.graph)
