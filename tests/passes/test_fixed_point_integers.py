"""Fixed-point graphs, computed by hand: no float, no overflow, the same bits everywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.calibration.base import Samples
from edgepress.passes._shapes import refresh_shapes
from edgepress.passes.base import Context, PassRefused
from edgepress.passes.drop_no_ops import DropNoOps
from edgepress.passes.fold_batch_norm import FoldBatchNorm
from edgepress.targets.reference import Reference
from tests.graphs import answers, conv_nets, nodes, random, weight
from tests.passes.fixed_point_interpreter import interpret
from tests.passes.fixed_point_nets import concat, fixed, mixed, parameters, residual
from tests.passes.int8_nets import conv_relu, made, samples_of, sqnr_db


@pytest.mark.parametrize("build", [conv_relu, residual, concat, mixed])
@pytest.mark.parametrize("bits", [8, 16])
def test_integers_computed_by_hand_are_onnxruntimes(build: Any, bits: int) -> None:
    model = fixed(build(), bits=bits).model
    reference = Reference(model)
    assert reference.exact
    name = model.graph.inputs[0].name or ""
    output = model.graph.outputs[0].name or ""
    for sample in samples_of(model).inputs[name][:3]:
        feed = {name: 1.3 * sample[None]}
        by_hand, largest_sum = interpret(model, feed)
        np.testing.assert_array_equal(reference.run(feed)[output], by_hand)
        if largest_sum < 2**24:  # onnxruntime's float sums are exact
            np.testing.assert_array_equal(answers(model, feed)[0], by_hand)
        else:
            scale = parameters(model)[-1][0]
            assert np.abs(answers(model, feed)[0] - by_hand).max() <= 4 * scale


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("first", ["Relu", "Neg"])
def test_no_sum_leaves_int32_even_with_the_worst_input(
    bits: int, per_channel: bool, first: str
) -> None:
    model = made(
        "(float[1,2000] x) => (float[1,3] y)", f"r = {first}(x) y = Gemm(r, w, b)",
        w=np.abs(random(2000, 3)) * np.array([1, 0.001, 1000], np.float32)
        * np.where(np.arange(2000) % 3, 1, -1).astype(np.float32)[:, None],
        b=np.array([1.0, 1e7, -1e-9], np.float32),
    )  # fmt: skip
    outcome = fixed(model, bits=bits, per_channel=per_channel)
    stored = weight(outcome.model, "w_quantized").astype(np.int64)
    bias = weight(outcome.model, "b_quantized").astype(np.int64)
    least, largest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if "r_high" in outcome.model.graph.initializers:
        largest = int(weight(outcome.model, "r_high") / weight(outcome.model, "r_scale"))
        least = -largest
    least = 0 if first == "Relu" else least
    highest = np.maximum(stored * least, stored * largest).sum(axis=0)
    lowest = np.minimum(stored * least, stored * largest).sum(axis=0)
    assert (highest + np.maximum(bias, 0) < 2**31).all()
    assert (lowest + np.minimum(bias, 0) > -(2**31)).all()
    assert Reference(outcome.model).exact
    if bits == 16:  # and no bit is given away
        assert max((highest + bias).max(), -(lowest + bias).min()) >= 2**29
    if bits == 16 or per_channel:
        assert outcome.stats["narrowed_channels"] >= 1
        assert any("fewer bits" in note and "Gemm_1" in note for note in outcome.notes)


def hostile_net(magnitudes: tuple[float, float, float]) -> ir.Model:
    """Convolutions with huge, tiny, zero and equal weights and biases, a sum and an average."""
    first, second, third = magnitudes
    w = random(6, 3, 3, 3)
    w[1] = 0.0
    w[2] *= np.float32(1e-12)
    w[3] = np.float32(third)
    return made(
        "(float[1,3,6,6] x) => (float[1,2] y)",
        "c = Conv <pads=[1,1,1,1]> (x, w, b) r = Relu(c) d = Conv <group=6> (r, v) "
        "m = MaxPool <kernel_shape=[2,2]> (d) a = Add(m, k) g = GlobalAveragePool(a) "
        "f = Flatten(g) y = Gemm(f, u, e)",
        w=w * np.float32(first), b=np.array([0, 1, 1e6, 0, -1e-9, 3], np.float32),
        v=random(6, 1, 2, 2) * np.float32(second), k=random(1, 6, 1, 1) * np.float32(third),
        u=random(6, 2), e=np.array([1e8, 0], np.float32) * np.float32(second),
    )  # fmt: skip


@given(
    magnitudes=st.tuples(*[st.sampled_from([0.0, 1e-30, 1e-6, 1.0, 1e3, 1e7])] * 3),
    samples=st.sampled_from(["normal", "tiny", "huge", "zero", "single", "outlier"]),
    bits=st.sampled_from([8, 16]),
    per_channel=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_hostile_ranges_run_on_integers(
    magnitudes: tuple[float, float, float], samples: str, bits: int, per_channel: bool
) -> None:
    model = hostile_net(magnitudes)
    values = {
        "normal": random(3, 3, 6, 6),
        "tiny": random(3, 3, 6, 6) * np.float32(1e-36),
        "huge": random(3, 3, 6, 6) * np.float32(1e8),
        "zero": np.zeros((3, 3, 6, 6), np.float32),
        "single": np.full((3, 3, 6, 6), 0.7, np.float32),
        "outlier": np.where(np.arange(324) == 5, 1e6, random(324)).reshape(3, 3, 6, 6).astype("f"),
    }[samples]
    outcome = fixed(model, Samples({"x": values}), bits=bits, per_channel=per_channel)
    reference = Reference(outcome.model)
    assert reference.exact
    for sample in values:
        feed = {"x": 3 * sample[None]}
        by_hand, _ = interpret(outcome.model, feed)
        np.testing.assert_array_equal(reference.run(feed)["y"], by_hand)
        assert np.isfinite(by_hand).all()


@given(model=conv_nets(), bits=st.sampled_from([8, 16]), per_channel=st.booleans())
@settings(deadline=None, max_examples=20)
def test_random_nets_have_no_float_left(model: ir.Model, bits: int, per_channel: bool) -> None:
    refresh_shapes(model)
    for step in (FoldBatchNorm(), DropNoOps()):
        model = step.call(model, Context()).model
        refresh_shapes(model)
    if any(node.op_type in ("BatchNormalization", "Identity") for node in model.graph):
        with pytest.raises(PassRefused, match=r"(BatchNormalization|Identity) has no"):
            fixed(model, bits=bits)
        return
    before = model.clone()
    outcome = fixed(model, bits=bits, per_channel=per_channel)
    assert outcome.modified == (nodes(outcome.model) != nodes(before))
    if outcome.modified:
        assert Reference(outcome.model).exact
    assert sqnr_db(before, outcome.model) >= (5 if bits == 8 else 40)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(
    "body",
    [
        "y = Sigmoid(c)",
        "s = Sigmoid(c) y = Mul(c, s)",
        "y = HardSwish(c)",
        "y = LeakyRelu(c)",
        "y = Softmax <axis=-1> (c)",
        "s = Tanh(c) y = Sub(s, x)",
        "y = AveragePool <kernel_shape=[3,3], pads=[1,1,1,1]> (c)",
    ],
)
def test_what_bends_values_has_an_integer_form(body: str, bits: int) -> None:
    signature = "(float[1,4,4,4] x) => (float[1,4,4,4] y)"
    before = made(signature, f"c = Conv(x, w) {body}", w=random(4, 4, 1, 1))
    outcome = fixed(before.clone(), bits=bits)
    reference = Reference(outcome.model)
    assert reference.exact
    feed = {"x": random(1, 4, 4, 4, seed=5)}
    want, got = answers(before, feed)[0], reference.run(feed)["y"]
    noise = np.square(got - want).sum() / np.square(want).sum()
    assert -10 * np.log10(noise) >= {8: 25, 16: 65}[bits]


def test_a_long_softmax_has_an_integer_form() -> None:
    model = made(
        "(float[1,2] x) => (float[1,40000] y)", "m = MatMul(x, w) y = Softmax(m)",
        w=0.01 * random(2, 40000),
    )  # fmt: skip
    outcome = fixed(model)
    assert Reference(outcome.model).exact
