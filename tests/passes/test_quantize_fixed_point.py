from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgepress.calibration.base import Samples
from edgepress.passes.base import Context, pass_class
from edgepress.passes.calibrate import Calibrate
from edgepress.passes.quantize_fixed_point import QuantizeFixedPoint
from edgepress.targets.reference import Reference
from tests.graphs import answers, nodes, random, weight
from tests.passes.fixed_point_nets import (
    SQNR_BUDGET_DB,
    concat,
    fixed,
    parameters,
    residual,
    serialized,
)
from tests.passes.int8_nets import conv_relu, made, samples_of, small_cnn, sqnr_db


def short(model: ir.Model) -> str:
    """The nodes, with the long names of quantized values cut: v_q, v_dq, Q and DQ."""
    text = nodes(model)
    for long, cut in (
        ("_QuantizeLinear_Output", "_q"),
        ("_DequantizeLinear_Output", "_dq"),
        ("_QuantizeLinear_Input", "_raw"),
        ("_Clip_Output", "_limited"),
        ("DequantizeLinear", "DQ"),
        ("QuantizeLinear", "Q"),
        ("_quantized", "_int"),
        ("_zero_point", "_zp"),
        ("_scale", "_s"),
    ):
        text = text.replace(long, cut)
    return text


RESIDUAL = """\
x_q = Q(x, x_s, x_zp)
x_dq = DQ(x_q, x_s, x_zp)
w_dq = DQ(w_int, w_s, w_zp) {axis=0}
c = Conv(x_dq, w_dq) {pads=[1,1,1,1]}
c_q = Q(c, c_s, c_zp)
c_dq = DQ(c_q, c_s, c_zp)
a = Add(c_dq, x_dq)
r = Relu(a)
r_q = Q(r, r_s, r_zp)
r_dq = DQ(r_q, r_s, r_zp)
g = GlobalAveragePool(r_dq)
g_q = Q(g, g_s, g_zp)
g_dq = DQ(g_q, g_s, g_zp)
y_raw = Flatten(g_dq)
y_q = Q(y_raw, g_s, g_zp)
y = DQ(y_q, g_s, g_zp)"""

NARROWED = """\
x_q = Q(x, x_s, x_zp)
x_dq = DQ(x_q, x_s, x_zp)
v_dq = DQ(v_int, v_s, v_zp) {axis=0}
a = Conv(x_dq, v_dq)
w_dq = DQ(w_int, w_s, w_zp) {axis=0}
b = Conv(x_dq, w_dq)
r = Relu(b)
r_limited = Clip(r, r_low, r_high)
r_q = Q(r_limited, k_s, k_zp)
r_dq = DQ(r_q, k_s, k_zp)
s = Relu(a)
s_limited = Clip(s, s_low, s_high)
s_q = Q(s_limited, k_s, k_zp)
s_dq = DQ(s_q, k_s, k_zp)
k = Concat(s_dq, r_dq) {axis=1}
k_q = Q(k, k_s, k_zp)
k_dq = DQ(k_q, k_s, k_zp)
u_dq = DQ(u_int, u_s, u_zp) {axis=0}
y_raw = Conv(k_dq, u_dq)
y_q = Q(y_raw, y_s, y_zp)
y = DQ(y_q, y_s, y_zp)"""


def test_it_is_found_by_name() -> None:
    assert pass_class("quantize-fixed-point") is QuantizeFixedPoint


def test_the_graph_is_one_of_pairs() -> None:
    outcome = fixed(residual(), bits=8, bias_correction=False)
    assert short(outcome.model) == RESIDUAL
    assert outcome.model.graph.opset_imports[""] == 17
    assert outcome.modified
    assert outcome.skipped == []


def test_activations_that_give_up_bits_are_clamped_where_they_are_made() -> None:
    outcome = fixed(concat(), bias_correction=False)
    assert short(outcome.model) == NARROWED
    assert outcome.model.graph.opset_imports[""] == 21
    limit, scale = weight(outcome.model, "r_high"), weight(outcome.model, "k_scale")
    steps = float(limit / scale)
    assert np.log2(steps + 1) in (11, 12, 13, 14)
    assert weight(outcome.model, "r_low") == -limit


@pytest.mark.parametrize("build", [conv_relu, residual, concat, small_cnn])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_it_answers_nearly_as_before(
    build: Any, bits: int, per_channel: bool, rounding: str
) -> None:
    before = build()
    outcome = fixed(before.clone(), bits=bits, per_channel=per_channel, rounding=rounding)
    assert sqnr_db(before, outcome.model) >= SQNR_BUDGET_DB[bits] - 5 * (rounding != "nearest")
    for scale, zero, stored in parameters(outcome.model):
        assert (np.frexp(scale)[0] == 0.5).all(), "a power of two"
        assert not zero.any()
        assert zero.dtype in (np.int32, f"int{bits}")
        if stored is not None and stored.dtype != np.int32:
            assert stored.min() > -(2 ** (bits - 1))


def test_formats_are_those_that_fit() -> None:
    model = made(
        "(float[1,3] x) => (float[1,2] y)", "y = Gemm(x, w, b)",
        w=np.array([[0.5, 100.0], [-0.25, 3.0], [0.125, 0.0]], np.float32),
        b=np.array([0.75, -2.0], np.float32),
    )  # fmt: skip
    samples = Samples({"x": np.array([[1.0, -2.5, 3.5], [0.5, 0.25, -4.0]], np.float32)})
    outcome = fixed(model, samples, bits=8, bias_correction=False)
    assert weight(outcome.model, "x_scale") == 2**-5  # Q2.5 ends at 3.97
    assert weight(outcome.model, "w_scale").tolist() == [2**-7, 1]
    assert weight(outcome.model, "w_quantized").tolist() == [[64, 100], [-32, 3], [16, 0]]
    assert weight(outcome.model, "b_quantized").tolist() == [0.75 * 2**12, -2 * 2**5]
    assert weight(outcome.model, "y_scale") == 1
    assert outcome.notes == ["Gemm_0: input Q2.5, weights Q7.0 to Q0.7, output Q7.0"]


def test_a_format_that_saturates_wins_where_it_errs_less() -> None:
    model = made("(float[1,64] x) => (float[1,1] y)", "y = MatMul(x, w)", w=random(64, 1))
    # with Q1.6 the 63 others would be rounded to twice the step, for the sake of one value
    values = np.tile(np.linspace(-0.49, 0.48, 64, dtype=np.float32) + 1 / 600, (3, 1))
    values[1, 5] = 1.0
    before = model.clone()
    outcome = fixed(model, Samples({"x": values}), bits=8)
    assert weight(outcome.model, "x_scale") == 2**-7
    assert outcome.stats["saturated_activations"] == 1
    assert outcome.stats["saturated_activations_percent"] == round(100 / (3 * 65), 6)
    assert outcome.notes[1] == "values saturate on the samples: x 0.52 % in Q0.7"
    values[1, 5] = 1.9
    outcome = fixed(before, Samples({"x": values}), bits=8)
    assert weight(outcome.model, "x_scale") == 2**-6
    assert outcome.stats["saturated_activations"] == 0
    assert len(outcome.notes) == 1


def test_sixteen_bits_leave_room_for_unseen_values() -> None:
    model = made("(float[1,2] x) => (float[1,2] y)", "y = Relu(x)")
    samples = Samples({"x": np.array([[-1.0, 0.950037]], np.float32)})
    outcome = fixed(model, samples)
    assert weight(outcome.model, "x_scale") == 2**-14
    assert weight(outcome.model, "y_scale") == 2**-14
    assert answers(outcome.model, {"x": np.array([[1.5, -1.5]], np.float32)})[0].tolist() == [
        [1.5, 0.0]
    ]


def test_a_clip_needs_no_room() -> None:
    model = made(
        "(float[1,2] x) => (float[1,2] y)", "y = Clip(x, zero, six)",
        zero=np.array(0, np.float32), six=np.array(6, np.float32),
    )  # fmt: skip
    outcome = fixed(model, Samples({"x": np.array([[-1.0, 9.0]], np.float32)}))
    assert weight(outcome.model, "y_scale") == 2**-12


def test_stochastic_rounding_depends_on_the_seed_and_names_alone() -> None:
    model = small_cnn()
    options: dict[str, Any] = {"rounding": "stochastic", "bits": 8}
    one = serialized(fixed(model.clone(), **options).model)
    assert serialized(fixed(model.clone(), **options).model) == one
    assert serialized(fixed(model.clone(), seed=1, **options).model) != one
    assert serialized(fixed(model.clone(), bits=8).model) != one
    # another layer beside it: its weights are drawn the same
    one_layer = made(
        "(float[1,6] x) => (float[1,5] y)", "y = Gemm(x, w4, b4)", w4=random(6, 5), b4=random(5)
    )
    two_layers = made(
        "(float[1,6] x) => (float[1,5] y, float[1,3] z)", "z = Gemm(x, w3) y = Gemm(x, w4, b4)",
        w3=random(6, 3), w4=random(6, 5), b4=random(5),
    )  # fmt: skip
    options["bias_correction"] = False
    pair = [fixed(model, **options).model for model in (one_layer, two_layers)]
    for name in ("w4_quantized", "b4_quantized"):
        np.testing.assert_array_equal(weight(pair[0], name), weight(pair[1], name))


def test_tensors_draw_independently() -> None:
    model = made(
        "(float[1,6] x) => (float[1,5] y, float[1,5] z)", "y = MatMul(x, v) z = MatMul(x, w)",
        v=random(6, 5), w=random(6, 5),
    )  # fmt: skip
    after = fixed(model, bits=8, rounding="stochastic").model
    assert (weight(after, "v_quantized") != weight(after, "w_quantized")).any()


def test_stochastic_rounding_is_right_in_the_mean() -> None:
    weights = random(20, 10)
    samples = Samples({"x": random(2, 20)})
    total, scale = np.zeros((20, 10)), np.ones(10)
    for seed in range(64):
        model = made("(float[1,20] x) => (float[1,10] y)", "y = MatMul(x, w)", w=weights)
        after = fixed(model, samples, bits=8, rounding="stochastic", seed=seed).model
        scale = weight(after, "w_scale").astype(float)
        integers = weight(after, "w_quantized")
        assert (np.abs(integers * scale - weights) < scale).all()
        total += integers
    error = total / 64 - weights / scale
    saturated = np.abs(weights / scale) > 126
    # the mean of 64 draws, each off by at most 1 and by 1/2 in the deviation
    assert np.abs(error[~saturated]).max() < 5 * 0.5 / 8
    assert abs(error[~saturated].mean()) < 5 * 0.5 / np.sqrt(64 * 200)


def test_the_order_of_samples_does_not_matter() -> None:
    model = small_cnn()
    values = samples_of(model, 9).inputs["x"]
    order = np.random.default_rng(0).permutation(9)
    for bits in (8, 16):
        one, other = (
            serialized(fixed(model.clone(), Samples({"x": given}), bits=bits).model)
            for given in (values, values[order])
        )
        assert one == other


def test_a_model_that_only_moves_values_is_quantized_too() -> None:
    model = made(
        "(float[1,2,4,4] x) => (float[1,8] y)",
        "m = MaxPool <kernel_shape=[2,2], strides=[2,2]> (x) y = Flatten(m)",
    )
    outcome = fixed(model, bits=8)
    assert Reference(outcome.model).exact
    assert [node.op_type for node in outcome.model.graph].count("QuantizeLinear") == 3


def test_without_samples_formats_hold_the_ranges() -> None:
    model = conv_relu()
    Calibrate().call(model, Context(samples=samples_of(model)))
    outcome = QuantizeFixedPoint(bits=8).call(model, Context())
    assert "saturation is not counted" in outcome.notes[0]
    assert outcome.stats["saturated_activations"] == 0


def test_a_model_in_fixed_point_is_left_alone_and_it_says_so() -> None:
    outcome = fixed(conv_relu())
    QuantizeFixedPoint().requires(outcome.model, Context())
    again = QuantizeFixedPoint().call(outcome.model, Context())
    assert not again.modified
    assert "quantized already" in again.notes[0]
