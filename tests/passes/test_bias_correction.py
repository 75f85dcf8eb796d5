from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from edgepress.calibration.base import Samples
from edgepress.passes._bias_correction import channel_means, mean_shift
from edgepress.passes.base import Context
from edgepress.passes.calibrate import Calibrate
from edgepress.passes.quantize_int8 import QuantizeInt8
from tests.graphs import answers, random
from tests.passes.int8_nets import (
    conv_relu,
    made,
    quantized,
    samples_of,
)


@pytest.mark.parametrize("biases", [(), (", b", ", d")])
def test_bias_correction_takes_back_the_mean_error(biases: tuple[str, ...]) -> None:
    b, d = biases or ("", "")
    before = made(
        "(float[1,4,9,9] x) => (float[1,6] y)",
        f"c = Conv(x, w{b}) r = Relu(c) v = Conv <group=6> (r, u{b}) p = GlobalAveragePool(v) "
        f"f = Flatten(p) y = Gemm(f, g{d})",
        w=random(6, 4, 3, 3), u=random(6, 1, 3, 3), g=random(6, 6), b=random(6), d=random(1, 6),
    )  # fmt: skip
    errors = {}
    for corrected in (True, False):
        after = before.clone()
        quantized(after, bias_correction=corrected)
        feeds = list(samples_of(before, 8).feeds({"x": (1, 4, 9, 9)}))
        shifts = [answers(after, feed)[0] - answers(before, feed)[0] for feed in feeds]
        errors[corrected] = np.abs(np.mean(shifts, axis=(0, 1))).sum()
    assert errors[True] < 0.5 * errors[False]


@pytest.mark.parametrize("transposed", [0, 1])
def test_the_shift_of_a_gemm_is_the_error_times_the_mean(transposed: int) -> None:
    error, mean = random(3, 5).astype(float), random(3).astype(float)
    node = ir.node("Gemm", [ir.val("x")], {"transB": transposed})
    shift = mean_shift(node, error.T if transposed else error, mean)
    np.testing.assert_allclose(shift, mean @ error)


def test_the_shift_of_a_grouped_convolution_stays_in_its_group() -> None:
    error, mean = random(4, 2, 3, 3).astype(float), random(4).astype(float)
    node = ir.node("Conv", [ir.val("x")], {"group": 2})
    taps = error.sum(axis=(2, 3))
    expected = [*(taps[:2] @ mean[:2]), *(taps[2:] @ mean[2:])]
    np.testing.assert_allclose(mean_shift(node, error, mean), expected)


def test_without_samples_biases_are_left_and_it_says_so() -> None:
    model = conv_relu()
    Calibrate().call(model, Context(samples=samples_of(model)))
    outcome = QuantizeInt8().call(model, Context())
    assert "biases are not corrected" in outcome.notes[0]


def test_means_are_the_same_for_every_order_of_the_samples() -> None:
    model = conv_relu()
    values = random(9, 3, 6, 6) * np.float32(10) ** np.arange(-4, 5).reshape(9, 1, 1, 1)
    (layer,) = (node for node in model.graph if node.op_type == "Conv")
    found = []
    for seed in range(10):
        order = np.random.default_rng(seed).permutation(9)
        samples = Samples({"x": values[order].astype(np.float32)})
        (means,) = channel_means("p", model, [layer], samples, Context()).values()
        found.append(means)
    np.testing.assert_allclose(found[0], values.mean(axis=(0, 2, 3)), rtol=1e-4)
    for means in found[1:]:
        np.testing.assert_array_equal(means, found[0])
