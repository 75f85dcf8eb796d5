from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings

from edgepress.passes._shapes import refresh_shapes, shape_of, static_shape, without_big_tensors
from edgepress.passes.base import PassRefused
from tests.graphs import answers, conv_nets, feeds, net, random


def inner(model: ir.Model) -> dict[str | None, str]:
    return {value.name: str(value.shape) for node in model.graph for value in node.outputs}


def test_an_edited_weight_leaves_no_stale_shape() -> None:
    model = net(
        "(float[1,3,8,8] x) => (float[1,4,6,6] y)",
        "c = Conv(x, w) y = Relu(c)",
        {"w": random(4, 3, 3, 3)},
    )
    assert refresh_shapes(model)
    assert not refresh_shapes(model)
    model.graph.initializers["w"].const_value = ir.tensor(random(2, 3, 5, 5), name="w")
    assert refresh_shapes(model)
    assert inner(model) == {"c": "[1,2,4,4]", "y": "[1,2,4,4]"}
    assert shape_of(model.graph.initializers["w"]) == (2, 3, 5, 5)


def test_a_contradiction_is_raised_and_blames_the_pass() -> None:
    model = net("(float[1,3] x) => (float[1,2] y)", "y = MatMul(x, w)", {"w": random(3, 2)})
    model.graph.initializers["w"].const_value = ir.tensor(random(4, 2), name="w")
    with pytest.raises(PassRefused, match=r"^cut: shape inference: .*contradict"):
        refresh_shapes(model, "cut")


def test_an_output_keeps_its_dtype() -> None:
    model = net("(float[2] x) => (float[2] y)", "y = Cast <to=7> (x)")
    with pytest.raises(PassRefused, match="output y: it was declared FLOAT and computes INT64"):
        refresh_shapes(model)


def test_static_names_every_value_that_is_not() -> None:
    model = net("(float[4] x) => (int64[1,N] z)", "y = NonZero(x) z = Neg(y)")
    with pytest.raises(PassRefused, match=r"y .*, z ") as caught:
        refresh_shapes(model, static=True)
    assert "x" not in caught.value.where
    model = net(
        "(float[1,1,2,2] x) => (float[1,1,0,0] y)", "y = Conv(x, w)", {"w": random(1, 1, 3, 3)}
    )
    with pytest.raises(PassRefused, match=r"y \[1,1,0,0\]: these values have no elements"):
        refresh_shapes(model, static=True)


@pytest.mark.parametrize(
    ("opset", "body"),
    [
        (21, "a = GroupNormalization <num_groups=2> (x, s, s) y = Relu(a)"),
        (13, "a = MeanVarianceNormalization(x) y = Relu(a)"),
    ],
)
def test_what_onnx_does_not_infer(opset: int, body: str) -> None:
    model = net("(float[1,4,5,5] x) => (float[A,B,C,D] y)", body, {"s": random(4)}, opset=opset)
    refresh_shapes(model, static=True)
    assert inner(model) == {"a": "[1,4,5,5]", "y": "[1,4,5,5]"}


def test_big_tensors_are_left_out_and_come_to_no_harm() -> None:
    model = net(
        "(float[1,64] x) => (float[1,64] y)",
        "m = MatMul(x, w) y = Reshape(m, s)",
        {"w": random(64, 64), "s": np.array([1, 64])},
    )
    proto = without_big_tensors(model)
    assert [tensor.name for tensor in proto.graph.initializer] == ["s"]
    assert [value.name for value in proto.graph.input] == ["x", "w"]
    assert set(model.graph.initializers) == {"w", "s"}
    assert len(model.graph.inputs) == 1


def test_static_shape_of_nothing() -> None:
    assert static_shape(None) is None
    with pytest.raises(ValueError, match="no fixed shape"):
        shape_of(ir.val("x", ir.DataType.FLOAT, ["N"]))


@settings(deadline=None, max_examples=25)
@given(conv_nets())
def test_inferred_shapes_are_what_onnxruntime_computes(model: ir.Model) -> None:
    refresh_shapes(model, static=True)
    model.graph.outputs.extend(
        value for node in model.graph for value in node.outputs if not value.is_graph_output()
    )
    shapes = [shape_of(value) for value in model.graph.outputs]
    assert shapes == [array.shape for array in answers(model, feeds(model))]
