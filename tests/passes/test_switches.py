"""Switches: all on is the quantized model bit for bit, all off the float one, one is one."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings

from edgepress.calibration.base import Array
from edgepress.passes._shapes import refresh_shapes
from edgepress.passes.analysis import QuantizationSwitches, quantization_switches
from edgepress.passes.base import Context
from edgepress.passes.calibrate import Calibrate
from edgepress.passes.quantize_int8 import QuantizeInt8
from tests.graphs import answers, conv_nets, feeds, random, weight
from tests.passes.int8_nets import conv_relu, made, samples_of


def quantized(model: ir.Model, **options: object) -> ir.Model:
    """Calibrate and quantize a copy."""
    copy = model.clone()
    context = Context(samples=samples_of(copy))
    Calibrate().call(copy, context)
    result = QuantizeInt8(**options).call(copy, context).model  # type: ignore[arg-type]
    refresh_shapes(result)
    return result


def ran(
    switches: QuantizationSwitches,
    feed: dict[str, Array],
    on: Collection[str] | None = None,
    constants: Collection[str] | None = None,
) -> list[Array]:
    return list(switches.run(feed, on, constants=constants).values())


def residual() -> ir.Model:
    """A convolution with a rectifier, a pool that only moves values, an addition, a classifier."""
    return made(
        "(float[1,3,8,8] x) => (float[1,5] y)",
        """
        a = Conv <pads=[1,1,1,1]> (x, w1, b1)
        r = Relu(a)
        p = MaxPool <kernel_shape=[2,2], strides=[2,2]> (r)
        c = Conv <pads=[1,1,1,1]> (p, w2)
        s = Add(c, p)
        f = Flatten(s)
        y = Gemm(f, w3, b3)
        """,
        w1=random(4, 3, 3, 3), b1=random(4), w2=random(4, 4, 3, 3, seed=1),
        w3=random(64, 5), b3=random(5, seed=3),
    )  # fmt: skip


def concat() -> ir.Model:
    """A Concat of one convolution with its scale, one value with another, and a constant."""
    return made(
        "(float[1,2,6,6] x) => (float[1,2,6,6] y, float[1,2,6,6] z)",
        """
        a = Conv(x, w1)
        b = Mul(x, k)
        c = Concat <axis=1> (a, b, fill)
        y = Conv(c, w2)
        z = Relu(b)
        """,
        w1=random(2, 2, 1, 1), k=np.array([0.1], np.float32), fill=random(1, 1, 6, 6),
        w2=random(2, 5, 1, 1, seed=2),
    )  # fmt: skip


def test_layers_are_listed_with_what_belongs_to_them() -> None:
    model = residual()
    layers = quantization_switches(quantized(model), model).layers
    assert [(x.name, x.op_type, x.nodes, x.reads, x.writes) for x in layers] == [
        ("input x", "input", (), (), ("x",)),
        ("Conv_0", "Conv", ("Conv_0", "Relu_1"), ("x",), ("r",)),
        ("Conv_3", "Conv", ("Conv_3",), ("r",), ("c",)),
        ("Add_4", "Add", ("Add_4",), ("c", "r"), ("s",)),
        ("Gemm_6", "Gemm", ("Gemm_6",), ("s",), ("y",)),
    ]  # fmt: skip
    assert [layer.constants for layer in layers] == [
        (),
        ("w1_quantized", "b1_quantized"),
        # its bias came with bias correction
        ("w2_quantized", "c_bias_quantized"),
        (),
        ("w3_quantized", "b3_quantized"),
    ]
    assert {dtype for layer in layers for dtype in layer.dtypes} == {"uint8"}
    assert layers[1].scales == ("r_scale",)


@pytest.mark.parametrize("activation", ["uint8", "int8"])
@pytest.mark.parametrize("net", [conv_relu, residual, concat])
def test_all_on_is_onnxruntime_and_all_off_is_float(net: object, activation: str) -> None:
    model = net()  # type: ignore[operator]
    after = quantized(model, activation=activation)
    switches = quantization_switches(after, model)
    for seed in range(3):
        feed = feeds(model, seed)
        for want, got in zip(answers(after, feed), ran(switches, feed), strict=True):
            assert want.tobytes() == got.tobytes()
        for want, got in zip(answers(model, feed), ran(switches, feed, ()), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=25)
@given(model=conv_nets())
def test_random_nets_keep_both_ends(model: ir.Model) -> None:
    refresh_shapes(model)
    after = quantized(model)
    switches = quantization_switches(after, model)
    feed = feeds(model, 5)
    for want, got in zip(answers(after, feed), ran(switches, feed), strict=True):
        assert want.tobytes() == got.tobytes()
    for want, got in zip(answers(model, feed), ran(switches, feed, ()), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def affine(array: Array, model: ir.Model, name: str) -> Array:
    """Quantize and dequantize with the scale and zero point that the model has for a value."""
    scale, zero_point = (weight(model, f"{name}_{what}").item() for what in ("scale", "zero_point"))
    steps = np.clip(np.rint(array / np.float32(scale)) + zero_point, 0, 255)
    real: Array = ((steps - zero_point) * scale).astype(np.float32)
    return real


def constant(model: ir.Model, name: str) -> Array:
    """Dequantize a weight or bias, per channel along its last or only axis."""
    integers = weight(model, f"{name}_quantized").astype(np.float64)
    stem = f"{name}_quantized" if integers.ndim == 1 else name
    real: Array = (integers * weight(model, f"{stem}_scale")).astype(np.float32)
    return real


def test_one_layer_on_is_that_layer_in_numpy() -> None:
    model = residual()
    after = quantized(model)
    switches = quantization_switches(after, model)
    feed = feeds(model, 1)
    body = residual()
    body.graph.outputs[0] = body.graph.node("Flatten_5").outputs[0]
    (hidden,) = answers(body, feed)
    w, b = constant(after, "w3"), constant(after, "b3")
    exact = hidden @ weight(model, "w3") + weight(model, "b3")
    rounded = hidden @ w + b
    step = weight(after, "y_scale").item()
    for on, constants, want in (
        (("Gemm_6",), None, affine(rounded, after, "y")),
        (("Gemm_6",), (), affine(exact, after, "y")),
        ((), ("Gemm_6",), rounded),
    ):
        (got,) = ran(switches, feed, on, constants)
        # a float sum in another order may fall on the other side of half a step
        assert np.abs(got - want).max() < (1.01 * step if on else 1e-4)
        assert np.median(np.abs(got - want)) < 1e-4
        assert np.abs(got - exact).max() > 1e-3
    (want,) = answers(model, {"x": affine(feed["x"], after, "x")})
    (got,) = ran(switches, feed, ("input x",))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_values_that_are_only_moved_are_switched_where_they_are_made() -> None:
    model = residual()
    switches = quantization_switches(quantized(model), model)
    feed = feeds(model, 2)
    everything = {layer.name for layer in switches.layers}
    (exact,) = ran(switches, feed, everything - {"Conv_0"}, ())
    (other,) = ran(switches, feed, everything, ())
    assert exact.tobytes() != other.tobytes()
    # the pool behind Conv_0 would quantize its values if it had a pair of its own
    (alone,) = ran(switches, feed, (), ())
    np.testing.assert_allclose(alone, answers(model, feed)[0], rtol=1e-5, atol=1e-5)


def test_a_concat_owns_what_brings_values_to_its_scale() -> None:
    model = concat()
    layers = {x.name: x for x in quantization_switches(quantized(model), model).layers}
    owner = layers["Concat_2"]
    assert owner.reads == ("a", "b")
    assert owner.constants == ("fill_quantized",)
    assert len(owner.writes) == 1, "a has the scale of the Concat already"
    assert owner.scales == layers["Conv_0"].scales == ("c_scale",)
    assert set(layers["Conv_3"].reads) == {"a", *owner.writes}


def test_without_the_float_model_constants_stay_quantized() -> None:
    model = residual()
    after = quantized(model)
    switches = quantization_switches(after)
    feed = feeds(model, 3)
    assert ran(switches, feed)[0].tobytes() == answers(after, feed)[0].tobytes()
    (bare,) = ran(switches, feed, ())
    (kept,) = ran(quantization_switches(after, model), feed, (), {x.name for x in switches.layers})
    assert bare.tobytes() == kept.tobytes()


def test_activations_of_16_bits_and_their_limits_are_switched() -> None:
    model = residual()
    after = quantized(model, int16=("Conv_3", "Gemm_6"), activation="int8")
    switches = quantization_switches(after, model)
    dtypes = {x.name: x.dtypes for x in switches.layers}
    assert dtypes["Conv_3"] == dtypes["Add_4"] == ("int16",)
    assert dtypes["input x"] == ("int8",)
    feed = feeds(model, 4)
    assert ran(switches, feed)[0].tobytes() == answers(after, feed)[0].tobytes()
    np.testing.assert_allclose(
        ran(switches, feed, ())[0], answers(model, feed)[0], rtol=1e-5, atol=1e-5
    )


def test_a_limit_before_16_bits_belongs_to_the_pair() -> None:
    model = made(
        "(float[1,900] x) => (float[1,3] y)",
        "y = Gemm(x, w)",
        w=np.full((900, 3), 0.01, np.float32) * np.arange(1, 4, dtype=np.float32),
    )
    after = quantized(model, int16=("Gemm_0",))
    assert "Clip" in [node.op_type for node in after.graph], "900 products of 127 overflow"
    switches = quantization_switches(after, model)
    assert [(x.name, x.nodes) for x in switches.layers] == [
        ("input x", ()),
        ("Gemm_0", ("Gemm_0",)),
    ]
    feed = {"x": 50 * feeds(model, 4)["x"]}  # beyond what was calibrated
    assert ran(switches, feed)[0].tobytes() == answers(after, feed)[0].tobytes()
    np.testing.assert_allclose(
        ran(switches, feed, ())[0], answers(model, feed)[0], rtol=1e-5, atol=1e-4
    )


def test_a_value_of_two_layers_in_float_belongs_to_both_of_them_together() -> None:
    model = made(
        "(float[1,4] x) => (float[1,4] y)",
        "a = Gemm(x, w) b = Hardmax(a) c = CumSum(a, axis) d = Mul(b, c) y = Gemm(d, w)",
        w=random(4, 4),
        axis=np.array(1, np.int64),
    )
    after = quantized(model)
    switches = quantization_switches(after, model)
    names = {x.name: x.nodes for x in switches.layers}
    assert names["Hardmax_1"] == ("Hardmax_1", "CumSum_2", "Mul_3")
    feed = feeds(model, 6)
    assert ran(switches, feed)[0].tobytes() == answers(after, feed)[0].tobytes()
    np.testing.assert_allclose(
        ran(switches, feed, ())[0], answers(model, feed)[0], rtol=1e-5, atol=1e-5
    )


def test_a_model_without_quantization_has_no_layers() -> None:
    model = residual()
    switches = quantization_switches(model, model)
    assert switches.layers == []
    feed = feeds(model)
    assert ran(switches, feed)[0].tobytes() == answers(model, feed)[0].tobytes()


def test_layers_have_unique_names() -> None:
    model = made("(float[1,4] x) => (float[1,4] y)", "y = Gemm(x, w)", w=random(4, 4))
    model.graph[0].name = "input x"
    after = quantized(model)
    names = [x.name for x in quantization_switches(after, model).layers]
    assert names == ["input x", "input x_"]


def test_an_unknown_layer_and_another_model_are_refused() -> None:
    model = residual()
    after = quantized(model)
    switches = quantization_switches(after, model)
    with pytest.raises(ValueError, match="'Conv_9'"):
        switches.run(feeds(model), {"Conv_9"})
    with pytest.raises(ValueError, match="'Nope'"):
        switches.run(feeds(model), (), constants={"Nope"})
    with pytest.raises(ValueError, match="no node 'Conv_3'"):
        quantization_switches(after, conv_relu())
    other = residual()
    other.graph.node("Conv_3").replace_input_with(1, other.graph.initializers["w1"])
    with pytest.raises(ValueError, match=r"\[4, 3, 3, 3\].*\[4, 4, 3, 3\]"):
        quantization_switches(after, other)
    other.graph.node("Conv_3").replace_input_with(1, other.graph.inputs[0])
    with pytest.raises(ValueError, match="no constant"):
        quantization_switches(after, other)
    assert answers(after, feeds(model))[0].shape == (1, 5), "the model is left as it was"


def test_padding_off_the_grid_is_quantized_by_a_pair_of_its_own() -> None:
    model = made(
        "(float[1,4] x) => (float[1,6] y)",
        """q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)
           p = Pad(d, pads, fill)
           pq = QuantizeLinear(p, s, z) pd = DequantizeLinear(pq, s, z)
           y = Relu(pd)""",
        s=np.array(0.1, np.float32), z=np.array(100, np.uint8),
        pads=np.array([0, 1, 0, 1], np.int64), fill=np.array(0.36, np.float32),
    )  # fmt: skip
    switches = quantization_switches(model)
    assert [x.name for x in switches.layers] == ["input x", "Pad_2"]
    feed = feeds(model)
    assert ran(switches, feed)[0].tobytes() == answers(model, feed)[0].tobytes()
    assert ran(switches, feed)[0][0, 0] == pytest.approx(0.4)
    assert ran(switches, feed, {"input x"})[0][0, 0] == pytest.approx(0.36)


def test_pairs_per_channel_and_integers_that_others_read_stay_quantized() -> None:
    model = made(
        "(float[1,2,3] x) => (float[1,2,3] y, uint8[1,2,3] r)",
        """q = QuantizeLinear <axis=1> (x, s, z) d = DequantizeLinear <axis=1> (q, s, z)
           e = Relu(d) f = QuantizeLinear(e, t, u) y = DequantizeLinear(f, t, u)
           r = Identity(f)""",
        s=np.array([0.1, 0.2], np.float32), z=np.array([100, 90], np.uint8),
        t=np.array(0.3, np.float32), u=np.array(3, np.uint8),
    )  # fmt: skip
    switches = quantization_switches(model)
    assert switches.layers == []
    feed = feeds(model)
    for want, got in zip(answers(model, feed), ran(switches, feed, ()), strict=True):
        assert want.tobytes() == got.tobytes()
