from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edgepress.passes._constants import constant
from edgepress.passes._layer_models import (
    Layer,
    followers,
    layer_model,
    layer_of,
    macs,
    signature,
)
from edgepress.passes._shapes import refresh_shapes, shape_of
from tests.graphs import Array, answers, feeds, net, nodes, random, weight

CLIP = {"low": np.array(0, np.float32), "high": np.array(6, np.float32)}


def made(signature: str, body: str, weights: dict[str, Array], opset: int = 17) -> ir.Model:
    model = net(signature, body, weights, opset=opset)
    refresh_shapes(model)
    return model


def node_of(model: ir.Model, output: str) -> ir.Node:
    return next(node for node in model.graph if node.outputs[0].name == output)


def value_in(model: ir.Model, name: str, inputs: dict[str, Array]) -> Array:
    tapped = model.clone()
    values = {value.name: value for node in tapped.graph for value in node.outputs}
    if name not in values:
        return inputs[name]
    tapped.graph.outputs.clear()
    tapped.graph.outputs.append(values[name])
    return answers(tapped, inputs)[0]


def with_weights_of(layer: ir.Model, *originals: ir.Node) -> ir.Model:
    """A layer's model with the constants of the nodes that it is a model of, in order."""
    model = layer.clone()
    for copy, original in zip(model.graph, originals, strict=True):
        assert copy.op_type == original.op_type
        for index, value in enumerate(original.inputs):
            array, given = constant(value), copy.inputs[index]
            if array is not None:
                assert given is not None
                assert given.const_value is not None
                assert given.const_value.shape == array.shape
                given.const_value = ir.tensor(array, name=given.name)
    return model


# A layer by itself --------------------------------------------------------------------------------

SIGNATURE = "(float[2,4,9,7] x) => (float[N,M] y)"
BODY = """
a = Conv <pads=[0,1,2,1], strides=[2,1], dilations=[1,2]> (x, w1, b1)
r = Clip(a, low, high)
c = Conv <auto_pad="SAME_UPPER", strides=[2,2], group=2> (r, w2)
d = Conv <auto_pad="SAME_LOWER", strides=[1,2]> (c, w3)
e = Conv <auto_pad="VALID"> (d, w4)
s = Relu(e)
f = Flatten(s)
g = Gemm <transB=1, alpha=0.5, beta=2.0> (f, w5, b5)
t = Gemm <transA=1> (g, w6, b6)
m = MatMul(t, w7)
n = Add(b7, m)
y = Relu(n)
"""
WEIGHTS = {
    "w1": random(6, 4, 3, 2),
    "b1": random(6),
    "w2": random(8, 3, 2, 3),
    "w3": random(4, 8, 2, 3),
    "w4": random(4, 4, 1, 1),
    "w5": random(10, 24),
    "b5": random(10),
    "w6": random(2, 5),
    "b6": random(1, 1),
    "w7": random(5, 3),
    "b7": random(3),
} | CLIP


@pytest.mark.parametrize(
    ("output", "chain"),
    [("a", "ar"), ("c", "c"), ("d", "d"), ("e", "es"), ("g", "g"), ("t", "t"), ("m", "mny")],
)
def test_a_layers_model_is_the_layer_and_what_is_fused_into_it(output: str, chain: str) -> None:
    model = made(SIGNATURE, BODY, WEIGHTS)
    node = node_of(model, output)
    layer = layer_model(node)
    onnx.checker.check_model(ir.to_proto(layer), full_check=True)
    originals = [node_of(model, name) for name in chain]
    assert [node, *followers(node)] == originals
    assert shape_of(layer.graph.inputs[0]) == shape_of(node.inputs[0])
    assert shape_of(layer.graph.outputs[0]) == shape_of(originals[-1].outputs[0])
    inputs = feeds(model)
    source = node.inputs[0]
    assert source is not None
    x = value_in(model, source.name or "", inputs)
    (got,) = answers(with_weights_of(layer, *originals), {"x": x})
    np.testing.assert_allclose(got, value_in(model, chain[-1], inputs), rtol=1e-5, atol=1e-5)


def test_the_text_of_a_layers_model() -> None:
    model = made(SIGNATURE, BODY, WEIGHTS)
    assert nodes(layer_model(node_of(model, "c"))) == (
        "y = Conv(x, w1) {dilations=[1,1], group=2, kernel_shape=[2,3], pads=[0,1,1,1], "
        "strides=[2,2]}"
    )
    assert nodes(layer_model(node_of(model, "m"))) == (
        "layer_1_output = MatMul(x, w1)\nfused_1_output = Add(c1, layer_1_output)\n"
        "y = Relu(fused_1_output)"
    )
    assert nodes(layer_model(node_of(model, "a"))).endswith("\ny = Clip(layer_1_output, c1, c1_1)")


def test_bounds_of_a_clip_keep_their_numbers() -> None:
    layer = layer_model(node_of(made(SIGNATURE, BODY, WEIGHTS), "a"))
    assert [float(weight(layer, name)) for name in ("c1", "c1_1")] == [0.0, 6.0]


@pytest.mark.parametrize(("kind", "pads"), [("UPPER", (1, 1, 2, 1)), ("LOWER", (2, 1, 1, 1))])
def test_automatic_padding_counts_dilations(kind: str, pads: tuple[int, ...]) -> None:
    """6 rows in steps of 2 with a reach of 5 lack 3; 5 columns with a reach of 3 lack 2."""
    model = made(
        "(float[1,2,6,5] x) => (float[1,3,3,5] y)",
        f'y = Conv <auto_pad="SAME_{kind}", strides=[2,1], dilations=[2,2]> (x, w)',
        {"w": random(3, 2, 3, 2)},
    )
    layer = layer_model(node_of(model, "y"))
    assert layer.graph[0].attributes.get_ints("pads") == pads
    assert shape_of(layer.graph.outputs[0]) == (1, 3, 3, 5)


def test_layers_can_take_a_layers_place() -> None:
    model = made(SIGNATURE, BODY, WEIGHTS)
    chain = [
        Layer(op_type="MatMul", attributes={}, weight=random(5, 2)),
        Layer(op_type="MatMul", attributes={}, weight=random(2, 3)),
    ]
    layer = layer_model(node_of(model, "m"), chain)
    assert nodes(layer) == (
        "layer_1_output = MatMul(x, w1)\nlayer_2_output = MatMul(layer_1_output, w2)\n"
        "fused_1_output = Add(c1, layer_2_output)\ny = Relu(fused_1_output)"
    )
    assert weight(layer, "w1").shape == (5, 2)
    assert weight(layer, "w2").shape == (2, 3)


def test_the_graphs_opset_stays() -> None:
    model = made("(float[1,2] x) => (float[1,3] y)", "y = MatMul(x, w)", {"w": random(2, 3)}, 13)
    assert layer_model(node_of(model, "y")).graph.opset_imports == {"": 13}


def test_weights_depend_on_shapes_alone() -> None:
    text = "(float[1,4,5,5] x) => (float[1,M,K,L] y)"
    body = "a = Conv(x, w1, b1) y = Conv(a, w2, b2)"
    layers = []
    for seed in (0, 1):
        weights = {"w1": random(4, 4, 1, 1, seed=seed), "w2": random(4, 4, 1, 1, seed=seed + 9)}
        biases = {"b1": random(4, seed=seed), "b2": random(4, seed=seed + 9)}
        model = made(text, body, weights | biases)
        layers += [layer_model(node) for node in model.graph]
    assert len({ir.to_proto(layer).SerializeToString() for layer in layers}) == 1
    assert len(set(map(signature, layers))) == 1
    (first, *_) = layers
    assert not np.array_equal(weight(first, "w1"), random(4, 4, 1, 1))
    # outputs stay as large as inputs
    (y,) = answers(first, {"x": random(1, 4, 5, 5)})
    assert 0.2 < np.std(y) < 5


# What is fused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "fused"),
    [
        ("a = Relu(m) y = Identity(a)", ["Relu"]),
        ("a = Clip(m, low, high) y = Identity(a)", ["Clip"]),
        ("a = Clip(m, , high) y = Identity(a)", ["Clip"]),
        ("s = ReduceMax <keepdims=0> (x) a = Clip(m, low, s) y = Identity(a)", []),
        ("a = Sigmoid(m) y = Identity(a)", []),
        ("a = Add(m, bias) b = Relu(a) y = Identity(b)", ["Add", "Relu"]),
        ("a = Add(row, m) b = Clip(a, low) y = Identity(b)", ["Add", "Clip"]),
        ("a = Add(m, low) b = Relu(a) y = Identity(b)", []),
        ("a = Add(m, column) b = Relu(a) y = Identity(b)", []),
        ("a = Add(m, deep) b = Relu(a) y = Squeeze(b)", []),
        ("a = Add(m, m) y = Relu(a)", []),
        ("a = Relu(m) b = Tanh(m) y = Add(a, b)", []),
        ("a = Add(m, bias) b = Relu(a) c = Tanh(a) y = Add(b, c)", ["Add"]),
        ("y = Relu(m)", ["Relu"]),
    ],
)
def test_followers(body: str, fused: list[str]) -> None:
    weights = {"w": random(3, 3), "bias": random(3), "row": random(1, 3), "column": random(3, 1)}
    weights |= {"deep": random(1, 1, 3)} | CLIP
    model = made("(float[3,3] x) => (float[N,M] y)", f"m = MatMul(x, w) {body}", weights)
    node = node_of(model, "m")
    assert [follower.op_type for follower in followers(node)] == fused
    assert [node.op_type for node in layer_model(node).graph] == ["MatMul", *fused]


def test_only_a_matmul_takes_an_add() -> None:
    text = "(float[1,3,3,3] x) => (float[1,3,3,3] y)"
    weights = {"w": random(3, 3, 1, 1), "bias": random(1, 1, 1, 3)}
    model = made(text, "m = Conv(x, w) y = Add(m, bias)", weights)
    assert followers(node_of(model, "m")) == []


def test_an_output_of_the_model_is_not_fused_away() -> None:
    text = "(float[3,3] x) => (float[3,3] m, float[3,3] y)"
    model = made(text, "m = MatMul(x, w) y = Relu(m)", {"w": random(3, 3)})
    assert followers(node_of(model, "m")) == []


def test_a_scalar_is_no_bias_though_there_is_one_output() -> None:
    text = "(float[3,3] x) => (float[3,1] y)"
    weights: dict[str, Array] = {"w": random(3, 1), "one": np.array(1, np.float32)}
    model = made(text, "m = MatMul(x, w) y = Add(m, one)", weights)
    assert followers(node_of(model, "m")) == []


# Reading layers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        "y = Relu(x)",
        "w2 = Relu(w) y = MatMul(x, w2)",
        "y = MatMul(x, deep)",
        "y = Gemm(x, w, x)",
        "y = MatMul(w, x)",
    ],
)
def test_what_is_no_layer_with_constant_weights_is_refused(body: str) -> None:
    weights = {"w": random(3, 3), "deep": random(1, 3, 3)}
    model = made("(float[3,3] x) => (float[3,3] y)", body, weights)
    with pytest.raises(ValueError, match=r"is no Conv, Gemm|bias that is computed"):
        layer_of(node_of(model, "y"))


@pytest.mark.parametrize(
    ("body", "channels", "parameters"),
    [
        ("y = Gemm(x, w)", (2, 5), 10),
        ("y = Gemm <transB=1> (x, v, b)", (2, 5), 15),
        ("y = MatMul(x, w)", (2, 5), 10),
    ],
)
def test_channels_and_parameters_of_dense_layers(
    body: str, channels: tuple[int, int], parameters: int
) -> None:
    weights = {"w": random(2, 5), "v": random(5, 2), "b": random(5)}
    layer = layer_of(node_of(made("(float[3,2] x) => (float[3,5] y)", body, weights), "y"))
    assert layer.channels == channels
    assert layer.parameters == parameters


def test_channels_of_a_grouped_convolution() -> None:
    model = made(SIGNATURE, BODY, WEIGHTS)
    layer = layer_of(node_of(model, "c"))
    assert layer.channels == (6, 8)
    assert layer.parameters == 8 * 3 * 2 * 3


@given(
    size=st.tuples(st.integers(4, 9), st.integers(4, 9)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pads=st.lists(st.integers(0, 2), min_size=4, max_size=4),
    dilations=st.tuples(st.integers(1, 1), st.integers(1, 2)),
    group=st.integers(1, 2),
)
@settings(deadline=None, max_examples=30)
def test_work_is_one_multiplication_per_output_weight_and_position(
    size: tuple[int, int],
    kernel: tuple[int, int],
    strides: tuple[int, int],
    pads: list[int],
    dilations: tuple[int, int],
    group: int,
) -> None:
    # where a window is wider than the image, onnx's shape inference says 1 and runtimes refuse
    assume(all(size[i] + pads[i] + pads[2 + i] > (kernel[i] - 1) * dilations[i] for i in range(2)))
    attributes = f"strides={list(strides)}, pads={pads}, dilations={list(dilations)}, group={group}"
    model = made(
        f"(float[1,4,{size[0]},{size[1]}] x) => (float[1,N,M,K] y)",
        f"a = Conv <{attributes}> (x, w1) y = Conv(a, w2)",
        {"w1": random(6, 4 // group, *kernel), "w2": random(3, 6, 1, 1)},
    )
    first, second = (layer_of(node) for node in model.graph)
    places = math.prod(shape_of(node_of(model, "a").outputs[0])[2:])
    work = places * 6 * (4 // group) * math.prod(kernel)
    assert macs((1, 4, *size), [first]) == work
    assert macs((1, 4, *size), [first, second]) == work + places * 6 * 3


def test_work_of_dense_layers() -> None:
    model = made(SIGNATURE, BODY, WEIGHTS)
    work = {
        node.outputs[0].name: macs(shape_of(node.inputs[0]), [layer_of(node)])
        for node in model.graph
        if node.op_type in ("Gemm", "MatMul")
    }
    assert work == {"g": 2 * 24 * 10, "t": 10 * 2 * 5, "m": 10 * 5 * 3}


def test_signatures_tell_what_speed_depends_on() -> None:
    def text(body: str, extent: int = 5) -> str:
        weights = {"w": random(4, 4, 3, 3), "v": random(6, 4, 3, 3), "b": random(4)} | CLIP
        model = made(f"(float[1,4,{extent},5] x) => (float[1,M,K,L] y)", body, weights)
        return signature(layer_model(next(iter(model.graph))))

    seen = {
        text("y = Conv(x, w)"),
        text("y = Conv(x, w)", 6),
        text("y = Conv(x, v)"),
        text("y = Conv(x, w, b)"),
        text("y = Conv <strides=[2,1]> (x, w)"),
        text("a = Conv(x, w) y = Relu(a)"),
        text("a = Conv(x, w) y = Clip(a, low, high)"),
    }
    assert len(seen) == 7
    assert text("y = Conv(x, w)") == text('y = Conv <auto_pad="VALID"> (x, w)')
    assert text("y = Conv(x, w)") == (
        "Conv(FLOAT[1,4,5,5],FLOAT[4,4,3,3]) dilations=(1, 1) group=1 kernel_shape=(3, 3) "
        "pads=(0, 0, 0, 0) strides=(1, 1)"
    )
