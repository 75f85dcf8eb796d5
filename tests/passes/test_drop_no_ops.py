from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.passes.base import PassRefused
from edgepress.passes.drop_no_ops import DropNoOps
from tests.graphs import Array, apply, conv_nets, net, nodes, random

WEIGHTS: dict[str, Array] = {
    "shape": np.array([2, 3, 1, 4]),
    "flat": np.array([24]),
    "no": np.array([0] * 8),
    "yes": np.array([0, 0, 0, 1, 0, 0, 0, -1]),
    "zero": np.zeros((1, 1), np.float32),
    "one": np.array(1, np.float32),
    "start": np.array([0]),
    "back": np.array([-1]),
    "end": np.array([100]),
    "first": np.array([-100]),
    "ones": np.array([1, 1, 1, 1]),
    "axis": np.array([0]),
    "third": np.array([2]),
    "rate": np.array(0.5, np.float32),
    "false": np.array(False),
    "true": np.array(True),
    "tall": random(5, 1, 1, 1, 1),
    "taller": np.array([5, 1, 1, 1, 1]),
    "zero_d": np.array(0, np.float32),
}
SIGNATURE = "(float[2,3,1,4] x) => (float[2,3,1,4] y)"


def cleaned(body: str, signature: str = SIGNATURE) -> str:
    model = net(signature, body, WEIGHTS)
    outcome = apply(DropNoOps(), model)
    read = {v.name for node in outcome.model.graph for v in node.inputs if v is not None}
    assert set(outcome.model.graph.initializers) <= read
    return nodes(outcome.model)


@pytest.mark.parametrize(
    "body",
    [
        "b = Identity(a)",
        "b = Dropout(a)",
        "b, m = Dropout(a, rate, false)",
        "b = Cast <to=1> (a)",
        "b = CastLike(a, one)",
        "b = Transpose <perm=[0,1,2,3]> (a)",
        "t = Transpose <perm=[0,3,1,2]> (a) b = Transpose <perm=[0,2,3,1]> (t)",
        "t = Transpose(a) b = Transpose(t)",
        "b = Reshape(a, shape)",
        "f = Flatten(a) b = Reshape(f, shape)",
        "s = Squeeze(a, third) b = Unsqueeze(s, third)",
        "b = Pad(a, no)",
        "b = Slice(a, start, end, third)",
        "b = Concat <axis=1> (a)",
        "b = Sum(a)",
        "b = Split <axis=0> (a)",
        "b = Add(a, zero)",
        "b = Add(zero, a)",
        "b = Sub(a, zero)",
        "b = Mul(one, a)",
        "b = Div(a, one)",
        "b = Pow(a, one)",
        "b = Expand(a, ones)",
        "b = Tile(a, ones)",
        "b = Clip(a)",
    ],
)
def test_drops(body: str) -> None:
    assert cleaned(f"a = Neg(x) {body} y = Neg(b)") == "a = Neg(x)\ny = Neg(a)"
    # as the last node, it hands its name to what is before it
    last = body.replace("b = ", "y = ").replace("b, m = ", "y, m = ")
    assert cleaned(f"a = Neg(x) {last}") == "y = Neg(x)"
    # between an input and an output something must stand
    assert cleaned(last.replace("(a", "(x").replace("a)", "x)")) == "y = Identity(x)"


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        ("y = Transpose <perm=[1,0,2,3]> (x)", "3,2,1,4"),
        ("y = Slice(x, back, first, third, back)", "2,3,1,4"),
        ("y = Sub(zero, x)", "2,3,1,4"),
        ("y = Div(one, x)", "2,3,1,4"),
        ("y = Mul(x, zero)", "2,3,1,4"),
        ("y = Pad(x, yes)", "2,3,1,4"),
        ("y = Concat <axis=0> (x, x)", "4,3,1,4"),
        ("y = Expand(x, taller)", "5,2,3,1,4"),
        ("y = Add(x, tall)", "5,2,3,1,4"),
        ("y = Cast <to=11> (x)", "2,3,1,4"),
        ("y = Reshape(x, flat)", "24"),
        ("y = Clip(x, zero_d)", "2,3,1,4"),
    ],
)
def test_keeps(body: str, shape: str) -> None:
    dtype = "double" if "Cast" in body else "float"
    model = net(f"(float[2,3,1,4] x) => ({dtype}[{shape}] y)", body, WEIGHTS)
    assert nodes(apply(DropNoOps(), model).model) == nodes(model)
    assert "Identity" not in nodes(model)


def test_a_transpose_of_a_transpose_is_one() -> None:
    body = "t = Transpose <perm=[1,2,3,0]> (x) y = Transpose <perm=[1,2,3,0]> (t)"
    golden = "y = Transpose(x) {perm=[2,3,0,1]}"
    assert cleaned(body, "(float[2,3,1,4] x) => (float[1,4,2,3] y)") == golden


def test_an_empty_part_of_a_concat_goes() -> None:
    body = "e = Slice(x, end, end) n = Neg(x) y = Concat <axis=0> (e, n, x)"
    signature = "(float[2,3,1,4] x) => (float[4,3,1,4] y)"
    assert cleaned(body, signature) == "n = Neg(x)\ny = Concat(n, x) {axis=0}"


def test_two_outputs_that_are_one_value_stay_two() -> None:
    signature = "(float[2] x) => (float[2] y, float[2] z)"
    assert cleaned("y = Neg(x) z = Identity(y)", signature) == "y = Neg(x)\nz = Identity(y)"
    assert (
        cleaned("a = Neg(x) y = Identity(a) z = Identity(a)", signature)
        == "y = Neg(x)\nz = Identity(y)"
    )


def test_what_nobody_reads_goes_and_inputs_stay() -> None:
    signature = "(float[1,2,4,4] x, float[2] unread) => (float[1,2,2,2] y)"
    body = "a = Neg(x) b = Neg(a) y, i = MaxPool <kernel_shape=[2,2], strides=[2,2]> (x)"
    model = net(signature, body, {"w": random(3)})
    outcome = apply(DropNoOps(), model)
    assert nodes(outcome.model) == "y = MaxPool(x) {kernel_shape=[2,2], strides=[2,2]}"
    assert outcome.stats == {"dropped": 0, "merged": 0, "unread": 4}
    assert [value.name for value in outcome.model.graph.inputs] == ["x", "unread"]


def test_a_shape_that_depends_on_data_is_refused_by_name() -> None:
    model = net("(float[4] x) => (int64[1,N] y)", "y = NonZero(x)")
    with pytest.raises(PassRefused, match=r"y .*no fixed shape"):
        apply(DropNoOps(), model)
    model = net("(float[4] x) => (float[4] y)", "z = NonZero(x) y = Relu(x)")
    assert nodes(apply(DropNoOps(), model).model) == "y = Relu(x)"


@settings(deadline=None, max_examples=40)
@given(conv_nets(), st.data())
def test_random_nets(model: ir.Model, data: st.DataObject) -> None:
    """No-ops put anywhere go again."""
    golden = nodes(apply(DropNoOps(), model.clone()).model)
    for node in list(model.graph):
        value = node.outputs[0]
        if value.is_graph_output() or not data.draw(st.booleans()):
            continue
        kind = data.draw(st.sampled_from(["Identity", "Dropout", "Sum"]))
        extra = ir.node(kind, [value], name=f"{node.name}_extra")
        extra.outputs[0].name = f"{value.name}_extra"
        value.replace_all_uses_with(extra.outputs[0])
        extra.replace_input_with(0, value)
        model.graph.insert_after(node, extra)
    assert nodes(apply(DropNoOps(), model).model) == golden
