from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.passes._gradient_rules import GRADIENTS
from edgepress.passes._gradients import open_gradients
from edgepress.passes._shapes import refresh_shapes, shape_of
from edgepress.passes.base import PassRefused
from tests.graphs import Array, answers, conv_nets, feeds, net, random
from tests.passes.channel_nets import FREE, Attention, Block, cnn, transformer
from tests.passes.finite_differences import projection, slope


def made(signature: str, body: str, *, opset: int = 17, **weights: Array) -> ir.Model:
    model = net(signature, body, weights, opset=opset, ir_version=8 if opset < 20 else 10)
    refresh_shapes(model)
    return model


def named(model: ir.Model, *names: str) -> list[ir.Value]:
    by_name = ir.convenience.create_value_mapping(model.graph)
    return [by_name[name] for name in names]


def gradients(
    model: ir.Model, names: Sequence[str], feed: dict[str, Array], **directions: Array
) -> dict[str, Array]:
    """The gradients of these values, and nothing else."""
    found = open_gradients("test", model, named(model, *names))(feed, directions)
    assert list(found) == list(names)
    return {name: gradient for name, (_, gradient) in found.items()}


def refusal(model: ir.Model, *names: str) -> str:
    with pytest.raises(PassRefused) as refused:
        open_gradients("prune-channels", model, named(model, *names))
    return str(refused.value)


def test_the_rules_are_tested_where_they_are_defined() -> None:
    modules = {rule.__module__.rpartition(".")[2] for rule in GRADIENTS.values()}
    assert modules == {"_gradient_axes", "_gradient_rules", "_gradient_windows"}


def test_values_come_with_their_gradients() -> None:
    model = made("(float[2,3] x) => (float[2,3] y)", "h = Mul(x, w) y = Exp(h)", w=random(3))
    x, v = random(2, 3), random(2, 3, seed=1)
    found = open_gradients("test", model, named(model, "x", "h"))({"x": x}, {"y": v})
    h = x * random(3)
    np.testing.assert_array_equal(found["x"][0], x)
    np.testing.assert_allclose(found["h"][0], h, rtol=1e-6)
    np.testing.assert_allclose(found["h"][1], v * np.exp(h), rtol=1e-5)
    np.testing.assert_allclose(found["x"][1], v * np.exp(h) * random(3), rtol=1e-5)


def test_a_value_that_several_nodes_read_sums_what_they_give_back() -> None:
    model = made(
        "(float[3] x) => (float[3] y, float[3] z)", "a = Mul(x, x) y = Mul(a, x) z = Neg(x)"
    )
    x, v, w = random(3), random(3, seed=1), random(3, seed=2)
    found = gradients(model, ["x", "a"], {"x": x}, y=v, z=w)
    np.testing.assert_allclose(found["x"], v * 3 * x**2 - w, rtol=1e-5)
    np.testing.assert_allclose(found["a"], v * x, rtol=1e-5)


def test_an_output_that_is_read_on_gets_its_direction_and_more() -> None:
    model = made("(float[3] x) => (float[3] y, float[3] z)", "y = Exp(x) z = Mul(y, y)")
    x, v, w = random(3), random(3, seed=1), random(3, seed=2)
    found = gradients(model, ["y", "z"], {"x": x}, y=v, z=w)
    np.testing.assert_allclose(found["y"], v + 2 * w * np.exp(x), rtol=1e-5)
    np.testing.assert_array_equal(found["z"], w)


def test_what_reaches_no_output_has_a_gradient_of_zeros() -> None:
    model = made(
        "(float[3] x, float[3] idle) => (float[3] y)", "y = Exp(x) dead = Neg(x) deader = Neg(dead)"
    )
    feed = {"x": random(3), "idle": random(3)}
    found = gradients(model, ["dead", "idle", "x"], feed, y=np.ones(3))
    assert not found["dead"].any()
    assert not found["idle"].any()
    np.testing.assert_allclose(found["x"], np.exp(feed["x"]), rtol=1e-6)
    assert not gradients(model, ["idle"], feed)["idle"].any()
    assert gradients(model, [], feed) == {}


def test_only_floating_outputs_that_depend_on_a_value_need_a_direction() -> None:
    model = made(
        "(float[3] x, float[3] other) => (float[3] y, float[3] free, int64[1] best)",
        "y = Neg(x) free = Exp(other) best = ArgMax(x)",
    )
    feed = {"x": random(3), "other": random(3)}
    found = gradients(model, ["x"], feed, y=np.ones(3))
    np.testing.assert_array_equal(found["x"], -np.ones(3))


def test_no_gradient_goes_through_integers_and_conditions() -> None:
    model = made(
        "(float[4] x) => (float[4] y)",
        "whole = Cast <to=7> (x) back = Cast <to=1> (whole) here = Less(x, zero) "
        "size = Shape(x) ones = ConstantOfShape(size) best = ArgMax(x) most = Gather(table, best) "
        "a = Where(here, x, ones) b = Add(a, back) c = Add(b, most) y = Add(c, ones)",
        zero=np.zeros(4, np.float32), table=random(4),
    )  # fmt: skip
    x = np.array([-1.5, 0.5, -0.25, 2.5], np.float32)
    found = gradients(model, ["x", "back"], {"x": x}, y=np.ones(4))
    np.testing.assert_array_equal(found["x"], x < 0)
    np.testing.assert_array_equal(found["back"], np.ones(4))


def test_only_some_parts_of_a_split_reach_an_output() -> None:
    model = made(
        "(float[2,6] x) => (float[2,2] y)",
        "a, b, c = Split <axis=1> (x) unread = Exp(b) y = Mul(a, c)",
    )
    x, v = random(2, 6), random(2, 2, seed=1)
    found = gradients(model, ["x", "b"], {"x": x}, y=v)
    parts = [v * x[:, 4:], np.zeros((2, 2)), v * x[:, :2]]
    np.testing.assert_allclose(found["x"], np.concatenate(parts, axis=1), rtol=1e-5)
    assert not found["b"].any()


def test_a_value_may_be_named_twice_and_the_model_stays_as_it_was() -> None:
    model = made(
        "(float[1,1,4,4] x) => (float[1,1,2,2] y)",
        "h = Exp(x) y = MaxPool <kernel_shape=[2,2], strides=[2,2]> (h)",
        opset=13,
    )
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    found = gradients(model, ["h"], feeds(model), y=np.ones((1, 1, 2, 2)))
    twice = open_gradients("test", model, named(model, "h", "h"))
    assert list(twice(feeds(model), {"y": np.ones((1, 1, 2, 2))})) == ["h"]
    assert found["h"].sum() == 4
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_names_that_the_model_took_are_left_alone() -> None:
    model = made(
        "(float[3] gradient_0) => (float[3] _gradient_1)",
        "gradient_1 = Exp(gradient_0) _gradient_1 = Mul(gradient_1, gradient_2)",
        gradient_2=random(3),
    )
    feed, v = {"gradient_0": random(3, seed=1)}, random(3, seed=2)
    found = gradients(model, ["gradient_0", "gradient_1"], feed, _gradient_1=v)
    np.testing.assert_allclose(found["gradient_1"], v * random(3), rtol=1e-6)
    want = v * random(3) * np.exp(feed["gradient_0"])
    np.testing.assert_allclose(found["gradient_0"], want, rtol=1e-5)


@pytest.mark.parametrize("opset", [13, 15, 16])
def test_an_older_model_keeps_its_meaning(opset: int) -> None:
    """RoiAlign shifts its grid by half a pixel from opset 16 on."""
    model = made(
        "(float[1,1,6,6] x, float[1,1,6,6] image, float[1,4] boxes) => (float[1,1,2,2] y)",
        "m = MaxPool <kernel_shape=[3,3], strides=[3,3]> (x) "
        "r = RoiAlign <output_height=2, output_width=2> (image, boxes, batch) y = Mul(m, r)",
        opset=opset, batch=np.zeros(1, np.int64),
    )  # fmt: skip
    feed = feeds(model) | {"boxes": np.array([[0.7, 1.2, 4.4, 5.1]], np.float32)}
    aligned = model.clone()
    aligned.graph.outputs[:] = named(aligned, "r")
    found = gradients(model, ["m"], feed, y=np.ones((1, 1, 2, 2)))
    np.testing.assert_allclose(found["m"], answers(aligned, feed)[0], rtol=1e-5)


def test_half_precision() -> None:
    body = (
        "c = Conv <pads=[1,1,1,1]> (x, w) m = MaxPool <kernel_shape=[2,2], strides=[1,1]> (c) "
        "g = Gather <axis=1> (m, places) s = Sigmoid(g) y = GlobalAveragePool(s)"
    )
    places, v = np.array([1, 0, 1]), random(1, 3, 1, 1)
    feed = {"x": random(1, 2, 5, 5)}
    found = []
    for kind, dtype in (("float", np.float32), ("float16", np.float16)):
        signature = f"({kind}[1,2,5,5] x) => ({kind}[1,3,1,1] y)"
        weight = random(2, 2, 3, 3).astype(dtype)
        model = made(signature, body, w=weight, places=places)
        half = {"x": feed["x"].astype(dtype)}
        found.append(gradients(model, ["x", "c"], half, y=v))
    for name in ("x", "c"):
        assert found[1][name].dtype == np.float32
        np.testing.assert_allclose(found[1][name], found[0][name], atol=1e-3)


@pytest.mark.parametrize(
    ("body", "operator", "why"),
    [
        ("y = LRN <size=3> (h)", "LRN", "there is no rule for it"),
        (
            "q = QuantizeLinear(h, scale, zero) p = MaxPool <kernel_shape=[1,1]> (q) "
            "y = DequantizeLinear(p, scale, zero)",
            "DequantizeLinear",
            "'p' holds quantized numbers",
        ),
        (
            "q = QuantizeLinear(h, scale, zero) c = ConvInteger(q, w) f = Cast <to=1> (c) "
            "y = Mul(f, scale)",
            "Cast",
            "'c' holds quantized numbers",
        ),
        ("q = Cast <to=3> (h) y = Cast <to=1> (q)", "Cast", "'q' holds quantized numbers"),
        (
            "y = If (yes) <then_branch = t () => (float[1,2,3,3] a) { a = Neg(h) }, "
            "else_branch = e () => (float[1,2,3,3] b) { b = Abs(h) }>",
            "If",
            "there is no rule for it",
        ),
    ],
)
def test_an_operator_without_a_gradient_is_named(body: str, operator: str, why: str) -> None:
    model = made(
        "(float[1,2,3,3] x) => (float[1,2,3,3] y)", f"h = Exp(x) {body}",
        scale=np.array(0.1, np.float32), zero=np.array(0, np.int8), yes=np.array(True),
        w=np.ones((2, 2, 1, 1), np.int8),
    )  # fmt: skip
    *_, node = (node for node in model.graph if node.op_type == operator)
    assert refusal(model, "h") == (
        f"prune-channels: node {node.name!r}: it lies on the way to an output, and "
        f"the gradient of {operator} is not known ({why}); choose an importance without "
        "gradients, such as l1"
    )


def test_what_has_no_gradient_may_lie_beside_the_way() -> None:
    model = made(
        "(float[1,2,3,3] x, float[1,2,3,3] other) => (float[1,2,3,3] y, uint8[1,2,3,3] image)",
        "h = Exp(x) l = LRN <size=3> (other) y = Mul(h, l) image = Cast <to=2> (h) "
        "dead = If (yes) <then_branch = t () => (float[1,2,3,3] a) { a = Neg(h) }, "
        "else_branch = e () => (float[1,2,3,3] b) { b = Abs(h) }>",
        yes=np.array(True),
    )
    feed = feeds(model)
    found = gradients(model, ["h"], feed, y=np.ones((1, 2, 3, 3)))
    probe = model.clone()
    probe.graph.outputs[:] = named(probe, "l")
    np.testing.assert_allclose(found["h"], answers(probe, feed)[0], rtol=1e-5)


def test_what_lies_before_the_values_needs_no_gradient() -> None:
    model = made("(float[1,2,3,3] x) => (float[1,2,3,3] y)", "h = LRN <size=3> (x) y = Neg(h)")
    found = gradients(model, ["h", "y"], feeds(model), y=np.ones((1, 2, 3, 3)))
    np.testing.assert_array_equal(found["h"], -found["y"])


def test_an_operator_of_another_domain_is_refused() -> None:
    model = made("(float[3] x) => (float[3] y)", "y = Neg(x)")
    (node,) = model.graph
    node.domain = "com.microsoft"
    assert "(it is an operator of com.microsoft)" in refusal(model, "x")


def test_a_shape_that_is_not_fixed_is_refused() -> None:
    model = made("(float[N,3] x) => (float[N,3] y)", "h = Exp(x) y = Add(h, h)")
    assert "(the shape of 'h' is not fixed)" in refusal(model, "h")


def test_a_model_without_a_floating_output_is_refused() -> None:
    model = made("(float[3] x) => (int64[1] y)", "h = Exp(x) y = ArgMax(h)")
    assert "model: none of its outputs is a float" in refusal(model, "h")


@pytest.mark.parametrize(
    ("body", "x", "value"),
    [
        ("h = Sqrt(x) y = Neg(h)", -1.0, "'h'"),
        ("h = Identity(x) y = Sqrt(h)", 0.0, "'h'"),
        ("h = Log(x) y = Neg(h)", 0.0, "'h'"),
    ],
)
def test_a_value_or_gradient_that_is_not_finite_is_refused(body: str, x: float, value: str) -> None:
    model = made("(float[2] x) => (float[2] y)", body)
    differentiate = open_gradients("test", model, named(model, "h"))
    with pytest.raises(PassRefused, match=f"value {value}: it or its gradient is NaN or infinite"):
        differentiate({"x": np.array([1, x], np.float32)}, {"y": np.ones(2)})


def test_what_onnxruntime_cannot_run_is_refused() -> None:
    model = made(
        "(float[3] x, int64[2] ids) => (float[2] y)", "h = Exp(x) g = Gather(h, ids) y = Neg(g)"
    )
    differentiate = open_gradients("test", model, named(model, "h"))
    feed = {"x": random(3), "ids": np.array([0, 9])}
    with pytest.raises(PassRefused, match="model: onnxruntime cannot compute its gradients"):
        differentiate(feed, {"y": np.ones(2)})
    feed["ids"] = np.array([-1, 2])
    np.testing.assert_array_equal(differentiate(feed, {"y": np.ones(2)})["h"][1], [0, 0, -2])


def test_what_onnxruntime_cannot_load_is_refused() -> None:
    model = made("(double[1,1,3] x) => (double[1,1,3] y)", "y = Conv(x, w)", w=np.ones((1, 1, 1)))
    assert "onnxruntime cannot load it" in refusal(model, "x")


#: Operators with kinks, near which differences tell nothing, and others for a test to put there.
SMOOTH = {
    "GlobalMaxPool": "GlobalAveragePool", "HardSigmoid": "Sigmoid", "MaxPool": "AveragePool",
    "PRelu": "Mul", "ReduceMax": "ReduceMean", "Relu": "Softplus",
}  # fmt: skip
KINKED = {"Abs", "Clip", "HardSwish", "LeakyRelu", "Max", "Min", "ReduceMin", "Selu"}


def smooth(model: ir.Model) -> ir.Model:
    for node in model.graph:
        node.op_type = SMOOTH.get(node.op_type, node.op_type)
    refresh_shapes(model)
    return model


def dependent_nodes(model: ir.Model) -> list[ir.Node]:
    values, nodes = set(model.graph.inputs), []
    for node in model.graph:
        if not values.isdisjoint(node.inputs):
            values.update(node.outputs)
            nodes.append(node)
    return nodes


def is_smooth(block: Block) -> bool:
    operators = {node.op_type for node in dependent_nodes(smooth(cnn([block], 0)))}
    return operators <= GRADIENTS.keys() - KINKED


BLOCKS = [block for block in FREE if is_smooth(block)]
CNNS = st.builds(cnn, st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=3), st.integers(0, 99))
TRANSFORMERS = st.builds(
    transformer,
    st.sampled_from(get_args(Attention)),
    st.integers(0, 99),
    st.sampled_from(["LayerNormalization", "RMSNormalization"]),
)


def test_most_blocks_are_differentiable() -> None:
    assert len(BLOCKS) > 0.8 * len(FREE)


@given(made_net=st.one_of(conv_nets(), CNNS, TRANSFORMERS), data=st.data())
@settings(deadline=None, max_examples=40)
def test_a_net_changes_by_gradient_times_step(made_net: ir.Model, data: st.DataObject) -> None:
    """As a value moves along d, the slope of `Σ v·y` is `Σ gradient·d`."""
    model = smooth(made_net)
    feed, (output,) = feeds(model), model.graph.outputs
    v = random(*shape_of(output), seed=1)
    inner = [value for node in dependent_nodes(model) for value in node.outputs]
    values = [
        value
        for value in (*model.graph.inputs, *inner)
        if value.dtype == ir.DataType.FLOAT and not value.is_graph_output()
    ]
    found = open_gradients("test", model, values)(feed, {output.name or "": v})
    assert list(found) == [value.name for value in values]
    value = data.draw(st.sampled_from(values), label="value")
    at, gradient = found[value.name or ""]
    assert gradient.shape == at.shape == shape_of(value)
    d = at * random(*at.shape, seed=2)  # relative steps, as some values are of tiny variance
    entry = entered(model, value)
    projected = projection(entry, v)

    def moved(distance: float) -> float:
        return projected({**feed, "entry": at + np.float32(distance) * d})

    # small steps drown in rounding where values are large, large ones in curvature elsewhere
    want = float((gradient * d).sum())
    error = min(abs(slope(moved, step) - want) for step in (2**-6, 2**-8, 2**-10))
    assert error <= 0.02 * np.linalg.norm(gradient * d) + 1e-3


def entered(model: ir.Model, value: ir.Value) -> ir.Model:
    """Let the readers of a value read an input instead, the model's last."""
    part = model.clone()
    (old,) = named(part, value.name or "")
    new = ir.Value(name="entry", shape=value.shape, type=value.type)
    old.replace_all_uses_with(new)
    part.graph.inputs.append(new)
    return part
