from __future__ import annotations

import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.passes._shapes import shape_of
from edgepress.passes.base import Context, PassRefused
from edgepress.passes.fix_shapes import FixShapes
from tests.graphs import apply, net, nodes, random


def shapes(model: ir.Model, names: str) -> list[str]:
    values = {v.name: v for node in model.graph for v in node.outputs}
    values |= {v.name: v for v in model.graph.inputs}
    return [str(values[name].shape) for name in names.split()]


def conv(signature: str = "(float[N,3,8,8] x) => (float[N,4,H,W] y)") -> ir.Model:
    return net(signature, "c = Conv(x, w) y = Relu(c)", {"w": random(4, 3, 3, 3)})


def test_a_dynamic_batch_becomes_one_and_says_so() -> None:
    outcome = apply(FixShapes(), conv())
    assert shapes(outcome.model, "x c y") == ["[1,3,8,8]", "[1,4,6,6]", "[1,4,6,6]"]
    assert outcome.stats == {"fixed": 1, "removed_inputs": 0}
    assert "batch was dynamic and is now 1" in outcome.notes[0]


def test_a_given_shape_wins() -> None:
    context = Context(input_shapes={"x": (2, 3, 5, 7)})
    outcome = apply(FixShapes(), conv("(float[N,3,H,W] x) => (float[N,4,A,B] y)"), context)
    assert shapes(outcome.model, "x y") == ["[2,3,5,7]", "[2,4,3,5]"]
    assert outcome.notes == []


def test_one_name_is_one_number() -> None:
    model = net(
        "(int64[batch,seq] ids, int64[batch,seq] mask) => (int64[batch,seq] y)",
        "y = Mul(ids, mask)",
    )
    outcome = apply(FixShapes(), model, Context(input_shapes={"ids": (2, 5)}))
    assert shapes(outcome.model, "ids mask y") == ["[2,5]"] * 3


def test_an_extent_of_zero_is_asked_for() -> None:
    model = net("(float[N,3] x) => (float[N,3] y)", "y = Relu(x)")
    model.graph.inputs[0].shape = ir.Shape([0, 3])
    with pytest.raises(PassRefused, match=r"axis 0 has no elements.*--input-shape x:1x3"):
        apply(FixShapes(), model)


def test_an_extent_below_zero_is_open() -> None:
    model = net("(float[N,3] x) => (float[N,3] y)", "y = Relu(x)")
    model.graph.inputs[0].shape = ir.Shape([-1, 3])
    assert shapes(apply(FixShapes(), model).model, "x y") == ["[1,3]", "[1,3]"]


def test_weights_leave_the_inputs() -> None:
    model = net(
        "(float[1,3,8,8] x, float[4,3,3,3] w) => (float[1,4,6,6] y)",
        "y = Conv(x, w)",
        {"w": random(4, 3, 3, 3)},
        opset=8,
        ir_version=3,
    )
    outcome = apply(FixShapes(), model)
    assert [v.name for v in outcome.model.graph.inputs] == ["x"]
    assert outcome.stats == {"fixed": 0, "removed_inputs": 1}
    assert outcome.model.ir_version >= 4
    assert nodes(outcome.model) == "y = Conv(x, w)"


@pytest.mark.parametrize(
    ("given_shapes", "message"),
    [
        ({}, "--input-shape x:1x3x224x224"),
        ({"image": (1, 3, 8, 8)}, "has no input 'image'"),
        ({"x": (1, 3, 8)}, "has 4 axes"),
        ({"x": (1, 4, 8, 8)}, "axis 1 is fixed at 3"),
        ({"x": (1, 3, 0, 8)}, "at least 1"),
    ],
)
def test_refuses_and_names_the_flag(given_shapes: dict[str, tuple[int, ...]], message: str) -> None:
    model = conv("(float[N,3,H,W] x) => (float[N,4,A,B] y)")
    context = Context(input_shapes=given_shapes)
    with pytest.raises(PassRefused, match=message):
        apply(FixShapes(), model, context)


def test_refuses_a_shape_that_the_graph_contradicts() -> None:
    model = net("(float[1,N] x) => (float[1,2] y)", "y = MatMul(x, w)", {"w": random(3, 2)})
    context = Context(input_shapes={"x": (1, 4)})
    with pytest.raises(PassRefused, match=r"with the input shapes x:1x4: .*contradict"):
        FixShapes().call(model, context)


def test_refuses_two_numbers_for_one_name() -> None:
    model = net("(float[N,2] a, float[N,2] b) => (float[N,2] y)", "y = Add(a, b)")
    with pytest.raises(PassRefused, match="calls this dimension 'N'"):
        FixShapes().call(model, Context(input_shapes={"a": (2, 2), "b": (3, 2)}))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_any_mask_of_open_dimensions(extents: list[int], data: st.DataObject) -> None:
    opened = data.draw(st.lists(st.booleans(), min_size=len(extents), max_size=len(extents)))
    text = ",".join(
        f"d{i}" if o else str(e) for i, (e, o) in enumerate(zip(extents, opened, strict=True))
    )
    model = net(f"(float[{text}] x) => (float[{text}] y)", "y = Relu(x)")
    outcome = apply(FixShapes(), model, Context(input_shapes={"x": tuple(extents)}))
    assert shape_of(outcome.model.graph.outputs[0]) == tuple(extents)
    assert outcome.stats["fixed"] == int(any(opened))
