from __future__ import annotations

import re

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgepress.passes._channel_axes import Group
from edgepress.passes._channels import analyse
from edgepress.passes.base import refresh_shapes
from tests.graphs import Array, net, random
from tests.passes import channel_nets as nets
from tests.passes.channel_nets import Builder, cnn


def described(groups: list[Group]) -> list[tuple[int, int]]:
    return [(len(group.channels), len(group.free)) for group in groups]


#: Operators on constants, whose axes all have channels: an operator and its weights, and per weight
#: which of its axes are frozen. ReduceSum hides the output.
FROZEN_AXES = [
    ("Conv(x, w)", {"w": (4, 2, 3, 3)}, {"w": [1, 2, 3]}),
    ("Conv(w, v)", {"w": (1, 2, 3, 3), "v": (4, 2, 1, 2)}, {"w": [2, 3], "v": [2, 3]}),
    ("ConvTranspose(w, v)", {"w": (1, 2, 3, 3), "v": (2, 4, 1, 2)}, {"w": [2, 3], "v": [2, 3]}),
    ("MaxPool <kernel_shape=[2]> (w)", {"w": (1, 4, 3)}, {"w": [2]}),
    ("InstanceNormalization(w, v, v)", {"w": (1, 4, 3), "v": (4,)}, {"w": [2], "v": []}),
    ("LayerNormalization <axis=1> (w, v)", {"w": (2, 4, 3), "v": (4, 3)}, {"w": [], "v": []}),
    ("Softmax <axis=-2> (w)", {"w": (2, 4, 3)}, {"w": [1]}),
    ("ReduceMax <axes=[-1], keepdims=0> (w)", {"w": (2, 4)}, {"w": [1]}),
    ("ReduceMean (w)", {"w": (2, 4)}, {"w": [0, 1]}),
    ("ReduceL1 <axes=[1]> (w)", {"w": (2, 4)}, {"w": []}),
    ("Add(w, v)", {"w": (4, 1), "v": (2, 4, 5)}, {"w": [1], "v": []}),
    ("Add(w, x)", {"w": (2, 1, 1)}, {"w": [0, 1, 2]}),
    ("MatMul(w, v)", {"w": (1, 4, 3), "v": (2, 3, 5)}, {"w": [0], "v": []}),
    ("MatMul(w, x)", {"w": (2, 6)}, {"w": [1]}),
    ("Gemm(w, v, u)", {"w": (4, 3), "v": (3, 5), "u": (4, 1)}, {"w": [], "v": [], "u": [1]}),
    ("Clip(w, v)", {"w": (4, 3), "v": (1,)}, {"w": [], "v": [0]}),
    ("Concat <axis=0> (w, v)", {"w": (4, 3), "v": (2, 3)}, {"w": [], "v": []}),
    ("Flatten(w)", {"w": (1, 4)}, {"w": [0]}),
    ("Flatten(w)", {"w": (2, 4, 3)}, {"w": [1, 2]}),
    ("Transpose(w)", {"w": (4, 3)}, {"w": []}),
    ("DepthToSpace <blocksize=2> (w)", {"w": (1, 8, 2, 3)}, {"w": [2, 3]}),
    ("SpaceToDepth <blocksize=2> (w)", {"w": (1, 8, 2, 4)}, {"w": [2, 3]}),
    ("DequantizeLinear(w, v)", {"w": (4, 3), "v": (1,)}, {"w": [], "v": [0]}),
    ("DequantizeLinear <axis=0> (w, v)", {"w": (4, 3), "v": (4,)}, {"w": [], "v": []}),
]


@pytest.mark.parametrize(("operator", "shapes", "frozen"), FROZEN_AXES)
def test_axes_that_must_stay(
    operator: str, shapes: dict[str, tuple[int, ...]], frozen: dict[str, list[int]]
) -> None:
    weights: dict[str, Array] = {name: random(*shape) for name, shape in shapes.items()}
    if operator.startswith("Dequantize"):
        weights["w"] = weights["w"].astype(np.int8)
    body = f"z = {operator} y = ReduceSum <keepdims=0> (z)"
    model = net("(float[1,2,6,6] x) => (float y)", body, weights)
    refresh_shapes(model, "test")
    axes = analyse(model)
    assert axes.unknown == []
    found = {}
    for name in shapes:
        channels = axes.channels_of(model.graph.initializers[name])
        stays = [[int(c) in axes.frozen for c in axis] for axis in channels if axis is not None]
        assert all(all(axis) or not any(axis) for axis in stays)
        found[name] = [place for place, axis in enumerate(stays) if all(axis)]
    assert found == frozen


NUMBERS = {"s": np.array([0, 1]), "e": np.array([2, 2]), "r": np.array([2, 8])}


@pytest.mark.parametrize(
    ("operator", "numbers"),
    [
        ("Slice(w, s, e)", "se"),
        ("Reshape(w, r)", "r"),
        ("Pad(w, pads)", "pads"),
        ("Tile(w, e)", "e"),
        ("Gather(w, e)", "e"),
        ("Expand(w, shape)", "shape"),
    ],
)
def test_numbers_that_another_node_reads_as_data_stay(operator: str, numbers: str) -> None:
    """They are cut by nobody: the node that takes them as numbers has read them."""
    weights = NUMBERS | {"w": random(4, 4), "pads": np.zeros(4, int), "shape": np.array([4, 4])}
    names = [numbers] if numbers in weights else list(numbers)
    used = {name: array for name, array in weights.items() if name in (*names, "w")}
    model = net("(float x) => (float y)", f"z = {operator} y = ReduceSum <keepdims=0> (z)", used)
    refresh_shapes(model, "test")
    axes = analyse(model)
    for name in names:
        (channels,) = axes.channels_of(model.graph.initializers[name])
        assert channels is not None
        assert {*channels.tolist()} <= set(axes.frozen)


#: The shape of `large` is known when shapes are inferred, and no constant all the same.
SHAPES: dict[str, tuple[int, ...]] = {
    "large": (1, 2, 12, 12),
    "w": (1, 2, 6, 6),
    "v": (2,),
    "roi": (8,),
}


@pytest.mark.parametrize(
    ("operator", "form"),
    [
        ("j = Shape(large) z = Resize(w, roi, , j)", "Resize whose input j is computed"),
        (
            'z = Resize <coordinate_transformation_mode="tf_crop_and_resize"> (w, roi, , n)',
            "Resize that crops",
        ),
        (
            'z = Resize <keep_aspect_ratio_policy="not_larger"> (w, , , n)',
            "Resize that keeps the aspect ratio",
        ),
        (
            "z, m, s = BatchNormalization <training_mode=1> (w, v, v, v, v)",
            "BatchNormalization in training mode",
        ),
        ("z = Add(w, q)", "Add of unknown shape"),
    ],
)
def test_forms_without_a_rule_are_named(operator: str, form: str) -> None:
    weights: dict[str, Array] = {name: random(*shape) for name, shape in SHAPES.items()}
    weights["n"] = np.array([1, 2, 12, 12])
    used = {name: w for name, w in weights.items() if re.search(rf"[(, ]{name}[,)]", operator)}
    body = f"{operator} y = ReduceSum <keepdims=0> (z)"
    model = net("(float[1,2,N,N] q) => (float y)", body, used, opset=18)
    refresh_shapes(model, "test")
    axes = analyse(model)
    assert form in [operator for _, operator in axes.unknown]
    channels = axes.channels_of(model.graph.initializers["w"])[1]
    assert channels is not None
    assert {*channels.tolist()} <= set(axes.frozen)


def test_an_operator_of_another_domain_has_no_rule() -> None:
    model = cnn([nets.plain], 0)
    assert model.graph[2].op_type == "Relu"
    model.graph[2].domain = "com.example"
    axes = analyse(model)
    assert axes.unknown == [("relu_2", "Relu")]
    assert described(axes.groups())[1] == (12, 0)


def test_what_subgraphs_read_stays() -> None:
    """In a node of a branch of a branch, and as the output of a branch itself."""
    b = Builder(0)
    deep, deeper, direct, other = (b.relu(b.conv("x", 3, n)) for n in (8, 8, 6, 5))

    def branch(node: onnx.NodeProto) -> onnx.GraphProto:
        value = helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, [1, 8, 6, 6])
        return helper.make_graph([node], "branch", [], [value])

    wanted = b.constant(np.array(True))
    relu, neg = (branch(helper.make_node(op, [deeper], [op])) for op in ("Relu", "Neg"))
    inner = helper.make_node("If", [wanted], ["i"], then_branch=relu, else_branch=neg)
    other_branch = branch(helper.make_node("Abs", [deep], ["e"]))
    b.op("If", [wanted], 1, then_branch=branch(inner), else_branch=other_branch)
    model = b.model((1, 3, 6, 6), b.conv(other, 5, 2))
    assert described(analyse(model).groups()) == [(8, 0), (8, 0), (6, 6), (5, 5), (2, 0)]
    (node,) = (node for node in model.graph if node.op_type == "If")
    (value,) = (v for n in model.graph for v in n.outputs if v.name == direct)
    node.attributes["else_branch"].as_graph().outputs.append(value)
    assert described(analyse(model).groups()) == [(8, 0), (8, 0), (6, 0), (5, 5), (2, 0)]
