from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.calibration.base import Samples
from edgepress.passes._shapes import refresh_shapes
from edgepress.passes.base import Context, Outcome, PassRefused
from edgepress.passes.quantize_dynamic import NOTHING, UNINFORMED, QuantizeDynamic
from tests.graphs import Array, answers, apply, net, nodes, random, weight

GOLDEN = """\
x_largest = ReduceMax(x) {axes=[-1], keepdims=1}
x_high = Max(x_largest, dynamic_0)
x_smallest = ReduceMin(x) {axes=[-1], keepdims=1}
x_low = Min(x_smallest, dynamic_0)
x_span = Sub(x_high, x_low)
x_exact_step = Div(x_span, dynamic_255)
x_step = Max(x_exact_step, dynamic_8.67362e-19)
x_inverse = Div(dynamic_1, x_step)
x_below = Neg(x_low)
x_steps_below = Mul(x_below, x_inverse)
x_zero_point = Round(x_steps_below)
x_scaled = Mul(x, x_inverse)
x_rounded = Round(x_scaled)
x_shifted = Add(x_rounded, x_zero_point)
x_clipped = Clip(x_shifted, dynamic_0, dynamic_255)
x_steps = Cast(x_clipped) {to=2}
x_zero_point_int32 = Cast(x_zero_point) {to=6}
p_sums = MatMulInteger(x_steps, v_quantized)
p_shift = Mul(x_zero_point_int32, v_sums)
p_centred = Sub(p_sums, p_shift)
p_centred_float = Cast(p_centred) {to=1}
p_rows = Mul(p_centred_float, x_step)
p_scaled = Mul(p_rows, v_scales)
q_sums = MatMulInteger(x_steps, w_quantized)
q_shift = Mul(x_zero_point_int32, w_sums)
q_centred = Sub(q_sums, q_shift)
q_centred_float = Cast(q_centred) {to=1}
q_rows = Mul(q_centred_float, x_step)
q_scaled = Mul(q_rows, w_scales)
q_biased = Add(q_scaled, b)
y = Add(p_scaled, q_biased)"""


def quantized(
    model: ir.Model, step: QuantizeDynamic | None = None, context: Context | None = None
) -> Outcome:
    refresh_shapes(model, "test")
    return apply(step or QuantizeDynamic(), model, context)


def two_products() -> ir.Model:
    return net(
        "(float[4,6] x) => (float[4,5] y)",
        "p = MatMul(x, v) q = Gemm(x, w, b) y = Add(p, q)",
        {"v": random(6, 5), "w": random(6, 5, seed=1), "b": random(5)},
    )


def product_of(x: Array, w: Array, per_channel: bool = True) -> Array:
    """The same arithmetic in NumPy: rows of uint8, columns of int8."""
    x = x.astype(np.float64)
    high, low = np.maximum(x.max(-1, keepdims=True), 0), np.minimum(x.min(-1, keepdims=True), 0)
    step = (high - low) / 255
    point = np.rint(-low / step)
    rows = (np.clip(np.rint(x / step) + point, 0, 255) - point) * step
    scale = np.abs(w).max(axis=0 if per_channel else None) / 127
    return np.asarray(rows @ (np.rint(w / scale) * scale))


def test_products_of_one_value_share_its_rows() -> None:
    outcome = quantized(two_products())
    assert nodes(outcome.model) == GOLDEN
    products = [node.name for node in outcome.model.graph if node.op_type == "MatMulInteger"]
    assert products == ["MatMul_0", "Gemm_1"]
    assert outcome.stats == {
        "products_quantized": 2,
        "products_compensated": 0,
        "activations_quantized": 1,
        "tables_quantized": 0,
        "weight_bytes_before": 4 * 65,
        "weight_bytes_after": 60 + 4 * (2 * 10 + 5 + 4),
    }
    assert outcome.notes == [UNINFORMED]


def test_axes_are_an_input_since_opset_18() -> None:
    model = net(
        "(float[4,6] x) => (float[4,5] y)", "y = MatMul(x, v)", {"v": random(6, 5)}, opset=18
    )
    text = nodes(quantized(model).model)
    assert "x_largest = ReduceMax(x, dynamic_axes) {keepdims=1}" in text
    assert "x_smallest = ReduceMin(x, dynamic_axes) {keepdims=1}" in text


@given(
    st.sampled_from([(1, 3), (5, 16), (2, 3, 7)]),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**16),
)
@settings(max_examples=30, deadline=None)
def test_it_computes_what_numpy_does(
    shape: tuple[int, ...], outputs: int, per_channel: bool, gemm: bool, seed: int
) -> None:
    w = random(shape[-1], outputs, seed=seed)
    dims = ",".join(map(str, shape))
    body = "y = MatMul(x, w)"
    if gemm and len(shape) == 2:
        body, w = "y = Gemm<transB=1, alpha=-0.5>(x, w)", w.T.copy()
    model = net(f"(float[{dims}] x) => (float y)", body, {"w": w})
    outcome = quantized(model, QuantizeDynamic(per_channel=per_channel))
    x = random(*shape, seed=seed + 1) * np.linspace(0.1, 50, shape[-2])[:, None].astype(np.float32)
    used = -0.5 * w.T if "Gemm" in body else w
    wanted = product_of(x, used, per_channel)
    (got,) = answers(outcome.model, {"x": x})
    # a value just between two steps may fall to either side
    steps = np.abs(x).max(axis=-1, keepdims=True) / 127 * np.abs(used).max()
    assert np.all(np.abs(got - wanted) <= 1.01 * steps)
    assert np.mean(np.abs(got - wanted) > 1e-3 * steps) < 0.2


def test_bias_factors_and_shapes() -> None:
    model = net(
        "(float[4,6] x) => (float[4,5] y)",
        "y = Gemm<beta=2.0>(x, w, b)",
        {"w": random(6, 5), "b": random(1, 5)},
    )
    outcome = quantized(model)
    x = random(4, 6, seed=3)
    wanted = product_of(x, random(6, 5)) + 2 * random(1, 5)
    np.testing.assert_allclose(answers(outcome.model, {"x": x})[0], wanted, atol=0.05)
    np.testing.assert_array_equal(weight(outcome.model, "b_scaled"), 2 * random(1, 5))


def test_one_weight_read_in_three_ways() -> None:
    model = net(
        "(float[4,6] x) => (float[4,6] p, float[4,6] q, float[4,6] r, float[4,6] s)",
        """p = MatMul(x, w) q = Gemm<alpha=3.0>(x, w) r = Gemm<transB=1>(x, w)
           s = MatMul(x, w)""",
        {"w": random(6, 6)},
    )
    outcome = quantized(model)
    x, w = random(4, 6, seed=3), random(6, 6)
    found = answers(outcome.model, {"x": x})
    for got, used in zip(found, (w, 3 * w, w.T, w), strict=True):
        np.testing.assert_allclose(got, product_of(x, used), atol=0.1)
    stored = [n for n in outcome.model.graph.initializers if n.startswith("w_quantized")]
    assert len(stored) == 3


def test_a_row_of_zeros_answers_zeros() -> None:
    outcome = quantized(two_products())
    (got,) = answers(outcome.model, {"x": np.zeros((4, 6), np.float32)})
    np.testing.assert_array_equal(got, np.broadcast_to(random(5), (4, 5)))


def test_an_outlier_spoils_only_its_own_row() -> None:
    model = net("(float[2,64] x) => (float[2,8] y)", "y = MatMul(x, w)", {"w": random(64, 8)})
    outcome = quantized(model)
    x = random(2, 64)
    before = answers(outcome.model, {"x": x})[0][1]
    x[0, 0] = 1e6
    np.testing.assert_array_equal(answers(outcome.model, {"x": x})[0][1], before)


def test_a_table_of_embeddings() -> None:
    table = random(600, 32) * np.linspace(1e-3, 10, 600, dtype=np.float32)[:, None]
    model = net(
        "(int64[3] x) => (float[3,32] y)", "y = Gather(t, x)", {"t": table.astype(np.float32)}
    )
    outcome = quantized(model)
    assert nodes(outcome.model) == "\n".join(
        [
            "y_steps = Gather(t_quantized, x) {axis=0}",
            "y_scale = Gather(t_scales, x) {axis=0}",
            "y_float = Cast(y_steps) {to=1}",
            "y = Mul(y_float, y_scale)",
        ]
    )
    assert outcome.stats["tables_quantized"] == 1
    assert outcome.notes == []
    chosen = np.array([0, 599, -2])
    (got,) = answers(outcome.model, {"x": chosen})
    error = np.abs(got - table[chosen]).max(axis=1)
    assert np.all(error <= np.abs(table[chosen]).max(axis=1) / 253)


def test_compensated_rounding_needs_samples_and_pays() -> None:
    w = random(48, 16)
    mixing = random(48, 48, seed=2)
    samples = (random(64, 8, 48, seed=4) @ mixing).astype(np.float32)
    fresh = (random(8, 48, seed=5) @ mixing).astype(np.float32)
    errors = {}
    for rounding in ("nearest", "compensated"):
        model = net("(float[8,48] x) => (float[8,16] y)", "y = MatMul(x, w)", {"w": w})
        context = Context(samples=Samples({"x": samples}, source="random"))
        outcome = quantized(model, QuantizeDynamic(rounding=rounding, per_channel=False), context)
        assert outcome.notes == []
        assert outcome.stats["products_compensated"] == (rounding == "compensated")
        steps = weight(outcome.model, "w_quantized") * weight(outcome.model, "w_scales")
        errors[rounding] = np.abs(fresh @ (steps - w)).mean()
    assert errors["compensated"] < 0.75 * errors["nearest"]


def test_the_order_of_samples_does_not_matter() -> None:
    texts = []
    for order in (slice(None), slice(None, None, -1)):
        samples = Samples({"x": random(9, 4, 6)[order]}, source="random")
        changed = quantized(two_products(), context=Context(samples=samples)).model
        texts.append(ir.to_proto(changed).SerializeToString(deterministic=True))
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("y = MatMul(x, x)", "its second operand is no constant"),
        ("y = MatMul(w, x)", "its second operand is no constant"),
        ("y = MatMul(x, batched)", "its weight has 3 dimensions, not 2"),
        ("y = Gemm<transA=1>(x, w)", "its first operand is transposed"),
        ("y = Gemm<beta=2.0>(x, w, x)", "its bias is no constant and has a factor"),
        ("y = MatMul(x, nan)", "its weight holds NaN or infinity"),
        ("y = Gather(w, i)", "its table has only 64 bytes"),
        ("y = Gather<axis=1>(large, i)", "it does not look up rows of a matrix"),
        ("y0 = Gather(large, i) y = MatMul(x, large)", "something else reads its table too"),
        ("y = MatMul(x, long)", "sums of 66312 products may not fit 32 bits; 66311 do"),
    ],
)
def test_what_stays_float(body: str, why: str) -> None:
    width = 66312 if "long" in body else 4
    weights = {
        "w": random(4, 4),
        "batched": random(2, 4, 4),
        "nan": np.full((4, 4), np.nan, np.float32),
        "large": random(4, 5000),
        "long": np.ones((66312, 1), np.float32),
    }
    model = net(
        f"(float[4,{width}] x, int64[3] i) => (float y)",
        body,
        {name: array for name, array in weights.items() if name in body.replace("(", " ")},
    )
    for name in [n for n, v in model.graph.initializers.items() if not v.uses()]:
        del model.graph.initializers[name]
    refresh_shapes(model, "test")
    outcome = QuantizeDynamic().call(model, Context())
    assert why in [reason for _, reason in outcome.skipped]
    assert outcome.modified == ("large" in body and "MatMul" in body)


def test_nothing_to_quantize() -> None:
    model = net("(float[1,3,8,8] x) => (float[1,3,8,8] y)", "y = Relu(x)")
    outcome = quantized(model)
    assert not outcome.modified
    assert outcome.notes == [NOTHING]


def test_skip_and_embeddings_off() -> None:
    model = net(
        "(float[4,6] x, int64[2] i) => (float[4,5] y, float[2,100] z)",
        "y = MatMul(x, w) z = Gather(t, i)",
        {"w": random(6, 5), "t": random(200, 100)},
    )
    step = QuantizeDynamic(skip=("Mat.*",), embeddings=False)
    outcome = quantized(model, step)
    assert not outcome.modified
    assert outcome.skipped == [
        ("MatMul_0", "skipped by 'Mat.*'"),
        ("Gather_1", "`embeddings` is off"),
    ]


def test_refusals() -> None:
    model = two_products()
    with pytest.raises(PassRefused, match="choose 'compensated' or 'nearest'"):
        QuantizeDynamic(rounding="up").requires(model, Context())
    with pytest.raises(PassRefused, match="matches no node"):
        QuantizeDynamic(skip=("nothing",)).requires(model, Context())
    old = net("(float[4,6] x) => (float[4,5] y)", "y = MatMul(x, v)", {"v": random(6, 5)}, opset=12)
    with pytest.raises(PassRefused, match="put `raise-opset` before `quantize-dynamic`"):
        QuantizeDynamic().requires(old, Context())
    assert not QuantizeDynamic().needs_samples
