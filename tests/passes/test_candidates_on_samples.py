from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.graphs import Array, answers, random
from tests.passes.low_rank_nets import (
    best,
    conv,
    first_layer,
    made,
    mixtures,
    moments_of,
    replaced,
)


def outputs_of(model: ir.Model, data: Array) -> Array:
    """Outputs on all samples, [samples, positions, channels] float64."""
    found = np.array([answers(model, {"x": x[None]})[0][0] for x in data], np.float64)
    channels_last = np.moveaxis(found, 1, -1) if found.ndim == 4 else found
    return np.asarray(channels_last.reshape(len(data), -1, channels_last.shape[-1]))


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("method", ["channel", "spatial", "tucker"])
def test_the_error_on_the_samples_is_the_one_that_was_foretold(method: str, biased: bool) -> None:
    """So patches are in the order of the weights, and the bias takes up the mean error."""
    weights: dict[str, Array] = {"w": random(8, 6, 3, 2)}
    if biased:
        weights["b"] = random(8)
    model = made(
        "(float[1,6,7,6] x) => (float[N,M,K,L] y)",
        f"y = Conv <pads=[1,0,0,1], strides=[1,2]> (x, w{', b' * biased})",
        weights,
    )
    data = mixtures(100, 6, 7, 6)
    chosen = best(first_layer(model), method, moments_of(model, data), rank=4)
    want, got = outputs_of(model, data), outputs_of(replaced(model, chosen), data)
    np.testing.assert_allclose(got.mean(axis=(0, 1)), want.mean(axis=(0, 1)), atol=1e-3)
    lost = np.sum((want - got) ** 2) / np.sum((want - want.mean(axis=(0, 1))) ** 2)
    assert lost == pytest.approx(chosen.lost, rel=0.05)
    assert 0.001 < lost < 0.3


def test_without_a_bias_the_mean_is_kept_with_the_rest() -> None:
    text = "(float[1,50,9] x) => (float[1,50,7] y)"
    model = made(text, "y = MatMul(x, w)", {"w": random(9, 7)})
    data = mixtures(3000, 9).reshape(60, 50, 9)
    chosen = best(first_layer(model), "channel", moments_of(model, data), rank=2)
    assert [layer.bias for layer in chosen.layers] == [None, None]
    want, got = outputs_of(model, data), outputs_of(replaced(model, chosen), data)
    lost = np.sum((want - got) ** 2) / np.sum(want**2)
    assert lost == pytest.approx(chosen.lost, rel=0.05)


@pytest.mark.parametrize("method", ["channel", "spatial", "tucker"])
def test_samples_tell_more_than_weights(method: str) -> None:
    model = conv(16, 12)
    data = mixtures(60, 12, 9, 8)
    node = first_layer(model)
    want = outputs_of(model, data)
    errors = []
    for moments in (None, moments_of(model, data)):
        chosen = best(node, method, moments, rank=6)
        got = outputs_of(replaced(model, chosen), data)
        got += (want - got).mean(axis=(0, 1))  # the bias is not what makes the difference
        errors.append(np.linalg.norm(want - got) / np.linalg.norm(want - want.mean(axis=(0, 1))))
    assert errors[1] < 0.75 * errors[0]


def test_a_gemms_bias_is_scaled_before_it_takes_up_the_error() -> None:
    body = "y = Gemm <alpha=0.5, beta=4.0, transB=1> (x, w, b)"
    model = made("(float[1,9] x) => (float[1,7] y)", body, {"w": random(7, 9), "b": random(7)})
    data = mixtures(200, 9)
    chosen = best(first_layer(model), "channel", moments_of(model, data), rank=2)
    want, got = outputs_of(model, data), outputs_of(replaced(model, chosen), data)
    np.testing.assert_allclose(got.mean(axis=(0, 1)), want.mean(axis=(0, 1)), atol=1e-3)
