from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.calibration.base import Samples
from edgepress.calibration.qparams import weight_qparams
from edgepress.passes import _adaptive_rounding
from edgepress.passes._adaptive_rounding import (
    adaptive_steps,
    error_weights,
    round_rows,
)
from edgepress.passes._moments import Moments
from edgepress.passes._quantized_layer import quantize_layer
from edgepress.passes.base import Context
from tests.graphs import random, weight
from tests.passes.int8_nets import made, quantized, samples_of, small_cnn, sqnr_db


def moments_of(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows.T @ rows / len(rows))[None]


def cost(steps: np.ndarray, weights: np.ndarray, scale: float, importance: np.ndarray) -> float:
    error = steps * scale - weights
    return float(np.einsum("i,ij,j->", error, importance, error))


def test_a_few_weights_are_rounded_as_well_as_trying_all_ways_does() -> None:
    found = better = 0
    for seed in range(20):
        weights = random(5, seed=seed).astype(np.float64)
        importance = moments_of(random(40, 5, seed=seed).astype(np.float64) @ random(5, 5))[0]
        scale = 0.4
        real = weights / scale
        ways = itertools.product(*zip(np.floor(real), np.ceil(real), strict=True))
        best = min(cost(np.array(way), weights, scale, importance) for way in ways)
        scales = np.full((1, 1, 1), scale)
        got = round_rows(weights[None, None], scales, importance[None])[0, 0]
        ours = cost(got, weights, scale, importance)
        nearest = cost(np.rint(real), weights, scale, importance)
        assert best - 1e-12 <= ours <= nearest + 1e-12
        found += ours <= best * 1.05 + 1e-12
        better += ours < nearest - 1e-12
    assert found >= 10
    assert better >= 10


def test_inputs_that_do_not_mix_are_rounded_to_the_nearest_step() -> None:
    weights = random(2, 3, 70).astype(np.float64)
    scales = np.full((2, 3, 1), 0.05)
    importance = np.stack([np.diag(np.abs(random(70, seed=seed)) + 0.1) for seed in (1, 2)])
    got = round_rows(weights, scales, importance.astype(np.float64))
    np.testing.assert_array_equal(got, np.rint(weights / scales).astype(np.int8))


def test_weights_that_nothing_reads_are_rounded_to_the_nearest_step() -> None:
    weights = random(1, 2, 4).astype(np.float64)
    got = round_rows(weights, np.full((1, 2, 1), 0.03), np.zeros((1, 4, 4)))
    np.testing.assert_array_equal(got, np.rint(weights / 0.03).astype(np.int8))


@given(st.integers(0, 1000), st.integers(1, 3), st.integers(1, 4), st.integers(1, 150))
@settings(deadline=None, max_examples=30)
def test_no_row_gets_worse_and_no_weight_moves_by_a_step(
    seed: int, groups: int, rows: int, count: int
) -> None:
    weights = random(groups, rows, count, seed=seed).astype(np.float64)
    scales = np.abs(weights).max(axis=2, keepdims=True) / 127 + 1e-9
    read = random(groups, 9, count, seed=seed).astype(np.float64)
    importance = read.swapaxes(1, 2) @ read
    got = round_rows(weights, scales, importance)
    assert got.dtype == np.int8
    assert np.abs(got).max() <= 127
    assert (np.abs(got - weights / scales) < 1 + 1e-9).all()
    for error, worst in ((got * scales - weights, np.rint(weights / scales) * scales - weights),):
        ours = np.einsum("gri,gij,grj->gr", error, importance, error)
        nearest = np.einsum("gri,gij,grj->gr", worst, importance, worst)
        assert (ours <= nearest * (1 + 1e-9) + 1e-12).all()


def test_few_positions_leave_little_but_the_diagonal() -> None:
    read = random(50, 4).astype(np.float64) + 3.0
    ones = np.concatenate([read, np.ones((50, 1))], axis=1)
    few, many = (
        error_weights(Moments(moments_of(ones), count), centred=True)[0] for count in (1, 10**9)
    )
    covariance = np.cov(read.T, bias=True)
    np.testing.assert_allclose(many, covariance, rtol=1e-6)
    np.testing.assert_allclose(np.diag(few), np.diag(covariance), rtol=1e-9)
    off = ~np.eye(4, dtype=bool)
    np.testing.assert_allclose(few[off], covariance[off] / 5, rtol=1e-9)
    plain = error_weights(Moments(moments_of(ones), 10**9), centred=False)[0]
    np.testing.assert_allclose(plain, read.T @ read / 50, rtol=1e-6)


def layered() -> ir.Model:
    return made(
        "(float[1,4,9,9] x) => (float[1,5] y)",
        "c = Conv <pads=[1,1,1,1]> (x, w, b) r = Relu(c) d = Conv <group=8> (r, u) "
        "p = GlobalAveragePool(d) f = Flatten(p) m = MatMul(f, v) y = Gemm <transB=1> (m, g)",
        w=random(8, 4, 3, 3), b=random(8), u=random(8, 1, 3, 3), v=random(8, 6), g=random(5, 6),
    )  # fmt: skip


def test_every_kind_of_layer_keeps_the_shape_of_its_weight() -> None:
    model = layered()
    layers = [n for n in model.graph if n.op_type in ("Conv", "Gemm", "MatMul")]
    samples = samples_of(model)
    found = adaptive_steps(
        "test", model, layers, samples, Context(), per_channel=True, corrected=True
    )
    assert len(found) == 4
    for node, axis in zip(layers, (0, 0, 1, 0), strict=True):
        values = weight(model, str(node.inputs[1] and node.inputs[1].name))
        scales, _ = weight_qparams(values, axis)
        shape = [-1 if i == axis else 1 for i in range(values.ndim)]
        assert found[node].shape == values.shape
        assert np.abs(found[node] - values / scales.reshape(shape)).max() < 1 + 1e-4


def test_outputs_change_less() -> None:
    gains = []
    for seed in range(3):
        before = made(
            "(float[1,16,9,9] x) => (float[1,16,7,7] y)",
            "m = Conv(x, mix) r = Relu(m) c = Conv(r, w) y = Relu(c)",
            mix=random(16, 16, 1, 1), w=random(16, 16, 3, 3, seed=seed),
        )  # fmt: skip
        results = []
        for rounding in ("nearest", "adaptive"):
            after = before.clone()
            quantized(after, rounding=rounding, activation="uint8", per_channel=False)
            results.append(sqnr_db(before, after))
        gains.append(results[1] - results[0])
    assert np.mean(gains) > 0.2


def test_a_channel_that_its_bias_makes_coarser_is_rounded_to_the_nearest_step() -> None:
    node = ir.node("Conv", [ir.val("x"), ir.val("w"), ir.val("b")])
    weights = random(2, 3, 1, 1)
    weights[1] *= np.float32(1e-9)
    steps = np.full(weights.shape, 5, np.int8)
    layer = quantize_layer(
        node, weights, np.array([0, 4], np.float32), np.float32(0.01), per_channel=True, steps=steps
    )
    assert layer.rescaled == 1
    np.testing.assert_array_equal(layer.weight[0], steps[0])
    expected = np.rint(weights[1] / layer.scales[1])
    np.testing.assert_array_equal(layer.weight[1], expected.astype(np.int8))


def test_sums_are_taken_in_the_order_that_contents_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(_name: str, _model: object, _layers: object, samples: Samples, _c: object) -> list[Any]:
        seen.append(samples.inputs["x"].tobytes())
        return []

    monkeypatch.setattr(_adaptive_rounding, "input_moments", spy)
    for order in (1, -1):
        samples = Samples({"x": random(5, 3)[::order]})
        model = small_cnn()
        adaptive_steps("test", model, [], samples, Context(), per_channel=True, corrected=True)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("options", [{"rounding": "adaptive"}, {"method": "best"}])
def test_the_order_of_the_samples_changes_no_byte(options: dict[str, str]) -> None:
    texts = set()
    for shift in (0, 3, 5):
        model = small_cnn()
        samples = samples_of(model)
        rolled = Samples({n: np.roll(a, shift, axis=0) for n, a in samples.inputs.items()})
        quantized(model, samples=rolled, **options)
        texts.add(ir.to_proto(model).SerializeToString(deterministic=True))
    assert len(texts) == 1
