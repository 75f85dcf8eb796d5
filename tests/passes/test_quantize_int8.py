from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime import quantization as ort_quantization

from edgepress.calibration.base import Range, Samples
from edgepress.passes._int8_rules import plan
from edgepress.passes._shapes import refresh_shapes
from edgepress.passes.base import Context, PassRefused, pass_class
from edgepress.passes.calibrate import Calibrate
from edgepress.passes.quantize_int8 import QuantizeInt8
from tests.graphs import conv_nets, nodes, random, weight
from tests.passes.int8_nets import (
    PAIR,
    SQNR_BUDGET_DB,
    consumers,
    conv_relu,
    made,
    maker,
    quantized,
    samples_of,
    small_cnn,
    sqnr_db,
)


def residual() -> ir.Model:
    return made(
        "(float[1,4,6,6] x) => (float[1,4,6,6] y)",
        "c = Conv <pads=[1,1,1,1]> (x, w) a = Add(c, x) y = Relu(a)",
        w=random(4, 4, 3, 3),
    )


def concat() -> ir.Model:
    return made(
        "(float[1,4,6,6] x) => (float[1,6,6,6] k)",
        "a = Conv(x, v) b = Conv(x, w) r = Relu(b) k = Concat <axis=1> (a, r)",
        v=random(4, 4, 1, 1),
        w=random(2, 4, 1, 1),
    )


def depthwise() -> ir.Model:
    return made(
        "(float[1,4,6,6] x) => (float[1,4] y)",
        "c = Conv <group=4> (x, w) l = Clip(c, zero, six) g = GlobalAveragePool(l) y = Flatten(g)",
        w=random(4, 1, 3, 3),
        zero=np.array(0, np.float32),
        six=np.array(6, np.float32),
    )


def gemm_net() -> ir.Model:
    return made(
        "(float[1,2,4,4] x) => (float[1,5] y)",
        "m = MaxPool <kernel_shape=[2,2], strides=[2,2]> (x) f = Flatten(m) h = MatMul(f, v) "
        "s = Sigmoid(h) y = Gemm <transB=1> (s, w, b)",
        v=random(8, 6),
        w=random(5, 6),
        b=random(1, 5),
    )


def short(model: ir.Model) -> str:
    """The nodes, with the long names of quantized values cut: v_q, v_dq, Q and DQ."""
    text = nodes(model)
    for long, cut in (
        ("_QuantizeLinear_Output", "_q"),
        ("_DequantizeLinear_Output", "_dq"),
        ("_QuantizeLinear_Input", "_raw"),
        ("DequantizeLinear", "DQ"),
        ("QuantizeLinear", "Q"),
        ("_quantized", "_int"),
        ("_zero_point", "_zp"),
        ("_scale", "_s"),
    ):
        text = text.replace(long, cut)
    return text


GOLDEN = {
    conv_relu: """\
x_q = Q(x, x_s, x_zp)
x_dq = DQ(x_q, x_s, x_zp)
w_dq = DQ(w_int, w_s, w_zp) {axis=0}
b_dq = DQ(b_int, b_int_s, b_int_zp) {axis=0}
c = Conv(x_dq, w_dq, b_dq)
y_raw = Relu(c)
y_q = Q(y_raw, y_s, y_zp)
y = DQ(y_q, y_s, y_zp)""",
    residual: """\
x_q = Q(x, x_s, x_zp)
x_dq = DQ(x_q, x_s, x_zp)
w_dq = DQ(w_int, w_s, w_zp) {axis=0}
c = Conv(x_dq, w_dq) {pads=[1,1,1,1]}
c_q = Q(c, c_s, c_zp)
c_dq = DQ(c_q, c_s, c_zp)
a = Add(c_dq, x_dq)
y_raw = Relu(a)
y_q = Q(y_raw, y_s, y_zp)
y = DQ(y_q, y_s, y_zp)""",
    concat: """\
x_q = Q(x, x_s, x_zp)
x_dq = DQ(x_q, x_s, x_zp)
v_dq = DQ(v_int, v_s, v_zp) {axis=0}
a = Conv(x_dq, v_dq)
a_q = Q(a, k_s, k_zp)
a_dq = DQ(a_q, k_s, k_zp)
w_dq = DQ(w_int, w_s, w_zp) {axis=0}
b = Conv(x_dq, w_dq)
r = Relu(b)
r_q = Q(r, k_s, k_zp)
r_dq = DQ(r_q, k_s, k_zp)
k_raw = Concat(a_dq, r_dq) {axis=1}
k_q = Q(k_raw, k_s, k_zp)
k = DQ(k_q, k_s, k_zp)""",
    depthwise: """\
x_q = Q(x, x_s, x_zp)
x_dq = DQ(x_q, x_s, x_zp)
w_dq = DQ(w_int, w_s, w_zp) {axis=0}
c = Conv(x_dq, w_dq) {group=4}
l = Clip(c, zero, six)
l_q = Q(l, l_s, l_zp)
l_dq = DQ(l_q, l_s, l_zp)
g = GlobalAveragePool(l_dq)
g_q = Q(g, g_s, g_zp)
g_dq = DQ(g_q, g_s, g_zp)
y_raw = Flatten(g_dq)
y_q = Q(y_raw, g_s, g_zp)
y = DQ(y_q, g_s, g_zp)""",
    gemm_net: """\
x_q = Q(x, x_s, x_zp)
x_dq = DQ(x_q, x_s, x_zp)
m = MaxPool(x_dq) {kernel_shape=[2,2], strides=[2,2]}
m_q = Q(m, x_s, x_zp)
m_dq = DQ(m_q, x_s, x_zp)
f = Flatten(m_dq)
f_q = Q(f, x_s, x_zp)
f_dq = DQ(f_q, x_s, x_zp)
v_dq = DQ(v_int, v_s, v_zp) {axis=1}
h = MatMul(f_dq, v_dq)
h_q = Q(h, h_s, h_zp)
h_dq = DQ(h_q, h_s, h_zp)
s = Sigmoid(h_dq)
s_q = Q(s, s_s, s_zp)
s_dq = DQ(s_q, s_s, s_zp)
w_dq = DQ(w_int, w_s, w_zp) {axis=0}
b_dq = DQ(b_int, b_int_s, b_int_zp) {axis=0}
y_raw = Gemm(s_dq, w_dq, b_dq) {transB=1}
y_q = Q(y_raw, y_s, y_zp)
y = DQ(y_q, y_s, y_zp)""",
}


def test_it_is_found_by_name() -> None:
    assert pass_class("quantize-int8") is QuantizeInt8


@pytest.mark.parametrize("build", GOLDEN, ids=lambda build: build.__name__)
def test_the_graph_is_written_as_onnxruntime_writes_it(build: Any) -> None:
    model = build()
    outcome = quantized(model, bias_correction=False)
    assert short(model) == GOLDEN[build]
    assert outcome.modified
    assert outcome.skipped == []
    assert outcome.stats["float_nodes"] == outcome.stats["float_islands"] == 0


@pytest.mark.parametrize("build", GOLDEN, ids=lambda build: build.__name__)
@pytest.mark.parametrize("activation", ["uint8", "int8"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_it_answers_nearly_as_before(build: Any, activation: str, per_channel: bool) -> None:
    before = build()
    after = before.clone()
    quantized(after, activation=activation, per_channel=per_channel)
    assert sqnr_db(before, after) >= SQNR_BUDGET_DB
    for value in after.graph.initializers.values():
        if (value.name or "").endswith("_quantized"):
            assert value.dtype in (ir.DataType.INT8, ir.DataType.INT32)


class Reader(ort_quantization.CalibrationDataReader):  # type: ignore[misc]
    """Hands our samples to onnxruntime's quantizer."""

    def __init__(self, samples: Samples) -> None:
        self.feeds = samples.feeds({"x": (1, 3, 8, 8)})

    def get_next(self) -> Any:
        return next(self.feeds, None)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_integer_is_onnxruntimes(tmp_path: Path, per_channel: bool) -> None:
    model = small_cnn()
    ir.save(model, tmp_path / "float.onnx")
    ort_quantization.quantize_static(
        tmp_path / "float.onnx",
        tmp_path / "int8.onnx",
        Reader(samples_of(model)),
        per_channel=per_channel,
        activation_type=ort_quantization.QuantType.QUInt8,
        weight_type=ort_quantization.QuantType.QInt8,
        extra_options={"QDQKeepRemovableActivations": True},
    )
    theirs = {
        name: np.asarray(value.const_value.numpy())
        for name, value in ir.load(tmp_path / "int8.onnx").graph.initializers.items()
        if value.const_value is not None
    }
    quantized(model, per_channel=per_channel, bias_correction=False)
    compared = 0
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        if name in theirs and name not in ("zero", "six"):
            ours = value.const_value.numpy()
            np.testing.assert_array_equal(ours.reshape(-1), theirs[name].reshape(-1), name)
            compared += 1
    # 4 weights and 1 constant, 3 biases, 9 activations with scales of their own
    assert compared == 3 * (4 + 1 + 3) + 2 * 9


def test_a_dead_channel_with_a_large_bias_is_rescaled() -> None:
    model = conv_relu()
    values, bias = weight(model, "w").copy(), weight(model, "b").copy()
    values[1], bias[1] = 1e-12, 3.0
    values[2], bias[2] = 0.0, 2.0
    for name, array in (("w", values), ("b", bias)):
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    before = model.clone()
    assert quantized(model).stats["rescaled_channels"] == 1
    biases = weight(model, "b_quantized")
    assert np.abs(biases.astype(np.int64)).max() <= 2**30
    assert sqnr_db(before, model) >= SQNR_BUDGET_DB


def test_shared_weights_and_biases_are_quantized_per_reader() -> None:
    model = made(
        "(float[1,4,6,6] x) => (float[1,4,6,6] y, float[1,4,6,6] z)",
        "c = Conv(x, w, b) s = Sigmoid(c) y = Conv(s, w, b) z = Conv(s, w, b)",
        w=random(4, 4, 1, 1),
        b=random(4),
    )
    before = model.clone()
    quantized(model, bias_correction=False)
    assert [n for n in model.graph.initializers if n.startswith("w")] == [
        "w_scale", "w_zero_point", "w_quantized"
    ]  # fmt: skip
    stored = [n for n in model.graph.initializers if n.startswith("b_quantized")]
    assert len([n for n in stored if "scale" in n]) == 2
    assert [n.op_type for n in model.graph].count("Conv") == 3
    assert sqnr_db(before, model) >= SQNR_BUDGET_DB


def test_the_figures_count_bytes() -> None:
    stats = quantized(conv_relu()).stats
    assert stats["weight_bytes_before"] == 4 * (4 * 27 + 4)
    # int8 weights, int32 biases, and a scale and a zero point per channel or activation
    expected = 4 * 27 + 4 * 4 + 4 * (4 + 1) + 4 * (4 + 4) + 2 * (4 + 1)
    assert stats["weight_bytes_after"] == expected
    assert (stats["nodes_quantized"], stats["activations_quantized"]) == (2, 2)


def test_a_model_without_anything_to_quantize_is_left_alone() -> None:
    model = made("(float[1,4] x) => (float[1,4] y)", "y = LogSoftmax(x)")
    outcome = quantized(model)
    assert not outcome.modified
    assert nodes(model) == "y = LogSoftmax(x)"


def test_a_quantized_model_is_left_alone_and_it_says_so() -> None:
    model = conv_relu()
    quantized(model)
    again = QuantizeInt8().call(model, Context())
    assert not again.modified
    assert "quantized already" in again.notes[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "int16"}, "choose 'uint8' or 'int8'"),
        ({"method": "bets"}, "choose 'calibrated' or 'best'"),
        ({"rounding": "up"}, "choose 'nearest' or 'adaptive'"),
        ({"skip": ("conv_0",)}, "matches no node's whole name. Near it: Conv_0"),
        ({"skip": ("Con",)}, "matches no node's whole name"),
        ({"skip": ("(",)}, "not a regular expression"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PassRefused, match=message):
        quantized(conv_relu(), **options)


def test_a_missing_range_is_refused_by_name() -> None:
    model = conv_relu()
    with pytest.raises(
        PassRefused, match="no calibrated range for value 'x'; put `calibrate` right"
    ):
        QuantizeInt8().requires(model, Context())
    model.graph.inputs[0].meta["range"] = Range(-1.0, 1.0)
    with pytest.raises(PassRefused, match="no calibrated range for value 'y'"):
        QuantizeInt8().requires(model, Context())


@pytest.mark.parametrize("options", [{"method": "best"}, {"rounding": "adaptive"}])
def test_what_looks_at_samples_is_refused_without(options: dict[str, Any]) -> None:
    model = conv_relu()
    Calibrate().call(model, Context(samples=samples_of(model)))
    with pytest.raises(PassRefused, match="needs samples; give some with --calib"):
        QuantizeInt8(**options).requires(model, Context())


@pytest.mark.parametrize(("activation", "middle"), [("uint8", 128), ("int8", 0)])
def test_symmetric_activations_have_their_zero_in_the_middle(activation: str, middle: int) -> None:
    before = small_cnn()
    after = before.clone()
    quantized(after, activation=activation, symmetric=True)
    points = [n for n in after.graph.initializers if n.endswith("_zero_point")]
    floats = [n for n in points if str(weight(after, n).dtype) == activation and n[0] not in "wb"]
    assert {int(weight(after, n)) for n in floats} == {middle}
    assert sqnr_db(before, after) >= SQNR_BUDGET_DB


def test_an_old_opset_is_refused() -> None:
    model = made("(float[1,4] x) => (float[1,4] y)", "y = Gemm(x, w)", opset=12, w=random(4, 4))
    with pytest.raises(PassRefused, match="it has opset 12, per-channel scales need 13"):
        quantized(model)


def test_a_constant_that_is_not_finite_is_refused() -> None:
    model = made(
        "(float[1,4] x) => (float[1,4] y)", "h = Gemm(x, w) y = Mul(h, c)",
        w=random(4, 4), c=np.array([1, 2, np.inf, 0], np.float32),
    )  # fmt: skip
    for value in (*model.graph.inputs, *(v for n in model.graph for v in n.outputs)):
        value.meta["range"] = Range(-1.0, 1.0)
    with pytest.raises(PassRefused, match=r"constant 'c': the range 0.0 to inf is not finite"):
        QuantizeInt8().call(model, Context())


@given(
    model=conv_nets(),
    activation=st.sampled_from(["uint8", "int8"]),
    per_channel=st.booleans(),
)
@settings(deadline=None, max_examples=25)
def test_random_nets_run_on_integers(model: ir.Model, activation: str, per_channel: bool) -> None:
    refresh_shapes(model)
    before = model.clone()
    fused = {value.name for value in plan(before, {}).fused}
    outcome = quantized(model, activation=activation, per_channel=per_channel)
    floats = {name for name, _ in outcome.skipped}
    for node, value in consumers(model):
        if node.name in floats or value.name in fused:
            continue
        assert maker(value) == PAIR[1], f"{node.name} reads {value.name}"
    assert outcome.modified == (nodes(model) != nodes(before))
    assert sqnr_db(before, model) >= 10 or floats
