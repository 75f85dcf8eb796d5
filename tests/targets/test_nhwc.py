"""Where transposes go."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from edgepress.targets.lowering.dialect import shape_of
from edgepress.targets.lowering.floats import claim_float_operators
from edgepress.targets.lowering.integer_rules import to_integers
from edgepress.targets.lowering.nhwc import to_nhwc
from edgepress.targets.program import Array
from tests.graphs import net, nodes, random
from tests.targets.qdq import Qdq, shaped

W = random(6, 3, 3, 3)


def laid_out(body: str, weights: dict[str, Array], shape: str = "1,3,7,8") -> ir.Model:
    model = shaped(net(f"(float[{shape}] x) => (float y)", body, weights))
    return to_nhwc(claim_float_operators(model))


def count(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def test_a_window_between_two_transposes() -> None:
    model = laid_out("y = Conv(x, w)", {"w": W})
    assert [node.op_type for node in model.graph] == ["Transpose", "Conv", "Transpose"]
    first, conv, last = model.graph
    assert [first.attributes[n].as_int() for n in ("batch", "rows", "columns")] == [1, 3, 56]
    assert [last.attributes[n].as_int() for n in ("batch", "rows", "columns")] == [1, 30, 6]
    assert shape_of(conv.outputs[0]) == (1, 5, 6, 6)
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert conv.outputs[0].name == "y_nhwc"


@pytest.mark.parametrize("shape", ["1,1,7,8", "2,3,3,3"])
def test_one_channel_or_one_pixel_needs_no_transpose(shape: str) -> None:
    channels = int(shape.split(",")[1])
    model = laid_out(
        "y = Conv(x, w)", {"w": random(1 if channels == 1 else 4, channels, 3, 3)}, shape
    )
    kinds = count(model)
    assert kinds["View"] >= 1
    assert kinds["Transpose"] == 2 - kinds["View"]


def test_a_whole_network_pays_twice() -> None:
    body = """a = Conv(x, w) b = HardSwish(a) c = Add(b, k) d = MaxPool <kernel_shape=[2,2]> (c)
    e = Sigmoid(d) f = Mul(d, e) g = Concat <axis=1> (f, e) y = Conv(g, v)"""
    weights = {"w": W, "k": random(6, 1, 1), "v": random(2, 12, 1, 1)}
    model = laid_out(body, weights)
    assert count(model)["Transpose"] == 2
    (concat,) = [node for node in model.graph if node.op_type == "Concat"]
    assert concat.attributes["axis"].as_int() == 3
    (add,) = [node for node in model.graph if node.op_type == "Add"]
    assert [shape_of(v) for v in add.inputs if v is not None] == [(1, 5, 6, 6), (1, 1, 1, 6)]


def test_other_operators_get_their_own_layout() -> None:
    body = "a = Conv(x, w) b = Softmax <axis=1> (a) c = Relu(a) d = Add(b, c) y = Conv(d, v)"
    model = laid_out(body, {"w": W, "v": random(2, 6, 1, 1)})
    (softmax,) = [node for node in model.graph if node.op_type == "Softmax"]
    assert shape_of(softmax.outputs[0]) == (1, 6, 5, 6)


def test_a_value_is_transposed_once() -> None:
    body = "a = Conv(x, w) b = Conv(x, w) c = Softmax(a) d = Softmax(a) e = Add(c, d) y = Add(e, b)"
    model = laid_out(body, {"w": W})
    assert sum(node.inputs[0] is model.graph.inputs[0] for node in model.graph) == 1
    (conv, *_) = [node for node in model.graph if node.op_type == "Conv"]
    assert sum(user.op_type == "Transpose" for user, _ in conv.outputs[0].uses()) == 1


def test_low_rank_constants() -> None:
    weights = {"w": W, "row": random(6), "plane": random(5, 6), "one": np.array(2, np.float32)}
    body = "a = Conv(x, w) b = Mul(a, row) c = Add(b, plane) d = Sub(c, one) y = Abs(d)"
    model = laid_out(body, weights)
    assert count(model)["Transpose"] == 2
    shapes = {
        node.op_type: shape_of(node.inputs[1])
        for node in model.graph
        if len(node.inputs) == 2 and node.inputs[1] is not None
    }
    assert (shapes["Mul"], shapes["Add"], shapes["Sub"]) == ((1, 1, 6, 1), (1, 5, 6, 1), ())


def test_integer_networks() -> None:
    graph = Qdq()
    x = graph.pair("x", (0.05, 128))
    w = np.random.default_rng(0).integers(-127, 128, (3, 3, 1, 1)).astype(np.int8)
    a = graph.pair(graph.op("Conv", x, graph.weight(w, 0.01)), (0.1, 128))
    b = graph.pair(graph.op("Add", a, x), (0.1, 128))
    c = graph.pair(graph.op("Sigmoid", b), (1 / 256, 0))
    y = graph.pair(graph.op("Mul", b, c), (0.1, 128))
    model = to_nhwc(to_integers(graph.model(y), "uint8"))
    assert count(model)["Transpose"] == 2
    names = [value.name for node in model.graph for value in node.outputs]
    assert len(set(names)) == len(names)
    assert "Quantize(x)" in nodes(model).splitlines()[0]
