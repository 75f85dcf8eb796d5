"""The public face of channel groups and layers: plain data, by names."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import onnx_ir as ir

from edgepress.passes.analysis import (
    ChannelGroup,
    changed_layers,
    channel_groups,
    layer_signature,
    layers,
)
from edgepress.passes.base import refresh_shapes
from tests.graphs import answers, net, random, weight


def block(width: int = 8, *, reader_rows: int = 6) -> ir.Model:
    """An inverted bottleneck with a residual connection, and a classifier.

    Conv_0 (6) → Conv_1 (width) → Relu → depthwise Conv_3 → Conv_4 (6) + Conv_0's → Gemm_8
    """
    model = net(
        "(float[1,3,4,4] x) => (float[1,5] y)",
        f"""a = Conv(x, w0)
            b = Conv(a, w1, b1)
            c = Relu(b)
            d = Conv<group={width}, pads=[1,1,1,1]>(c, w3)
            e = Conv(d, w4)
            f = Add(e, a)
            g = GlobalAveragePool(f)
            h = Flatten(g)
            y = Gemm<transB=1>(h, w8)""",
        {
            "w0": random(reader_rows, 3, 1, 1),
            "w1": random(width, reader_rows, 1, 1),
            "b1": random(width),
            "w3": random(width, 1, 3, 3),
            "w4": random(reader_rows, width, 1, 1),
            "w8": random(5, reader_rows),
        },
    )
    refresh_shapes(model, "test")
    return model


def test_groups_are_plain_data() -> None:
    found = channel_groups(block())
    assert found.groups == [
        ChannelGroup(
            name="Conv_0",
            channels=6,
            free=6,
            width=1,
            layers=["Conv_0", "Conv_4"],
            readers=["Conv_1", "Gemm_8"],
            why="",
        ),
        ChannelGroup(
            name="Conv_1",
            channels=8,
            free=8,
            width=1,
            layers=["Conv_1", "Conv_3"],
            readers=["Conv_4"],
            why="",
        ),
        ChannelGroup(
            name="Gemm_8",
            channels=5,
            free=0,
            width=1,
            layers=["Gemm_8"],
            readers=[],
            why="y is an output of the model",
        ),
    ]
    assert found.unknown == []
    json.dumps(dataclasses.asdict(found))


def test_an_operator_without_a_rule_is_named_and_keeps_its_channels() -> None:
    model = net(
        "(float[1,3,4,4] x) => (float[1,5,4,4] y)",
        "a = Conv(x, w0) b = LpNormalization<axis=1>(a) y = Conv(b, w1)",
        {"w0": random(4, 3, 1, 1), "w1": random(5, 4, 1, 1)},
    )
    refresh_shapes(model, "test")
    found = channel_groups(model)
    assert found.unknown == [("LpNormalization_1", "LpNormalization")]
    (group, _) = found.groups
    assert (group.name, group.free) == ("Conv_0", 0)
    assert "LpNormalization_1" in group.why


def test_the_groups_of_a_model_do_not_change_it() -> None:
    model = block()
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    channel_groups(model)
    layers(model)
    changed_layers(model, block(4))
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_layers_are_those_with_constant_weights() -> None:
    model = net(
        "(float[1,3,4,4] x, float[4,6] v) => (float[1,6] y, float[1,6] z)",
        """a = Conv(x, w0)
           r = Relu(a)
           g = GlobalAveragePool(r)
           f = Flatten(g)
           y = MatMul(f, v)
           z = Gemm(f, w5)""",
        {"w0": random(4, 3, 3, 3), "w5": random(4, 6)},
    )
    refresh_shapes(model, "test")
    found = dict(layers(model))
    assert list(found) == ["Conv_0", "Gemm_5"]  # the MatMul of two activations is none
    assert [node.op_type for node in found["Conv_0"].graph] == ["Conv", "Relu"]
    (made,) = answers(found["Conv_0"], {"x": random(1, 3, 4, 4)})
    assert made.shape == (1, 4, 2, 2)
    assert weight(found["Gemm_5"], "w1").shape == (4, 6)
    assert not np.array_equal(weight(found["Gemm_5"], "w1"), weight(model, "w5"))


def shapes(model: ir.Model) -> tuple[object, object]:
    (x,), (y,) = model.graph.inputs, model.graph.outputs
    assert x.shape is not None
    assert y.shape is not None
    return x.shape.numpy(), y.shape.numpy()


def test_changed_layers_are_the_makers_filters_and_readers_of_what_was_cut() -> None:
    found = changed_layers(block(8), block(4))
    assert [name for name, _, _ in found] == ["Conv_1", "Conv_3", "Conv_4"]
    assert [(shapes(before), shapes(after)) for _, before, after in found] == [
        (((1, 6, 4, 4), (1, 8, 4, 4)), ((1, 6, 4, 4), (1, 4, 4, 4))),
        (((1, 8, 4, 4), (1, 8, 4, 4)), ((1, 4, 4, 4), (1, 4, 4, 4))),
        (((1, 8, 4, 4), (1, 6, 4, 4)), ((1, 4, 4, 4), (1, 6, 4, 4))),
    ]
    assert changed_layers(block(8), block(8)) == []


def test_a_layer_that_has_fewer_rows_to_multiply_has_changed() -> None:
    def dense(rows: int) -> ir.Model:
        text = f"(float[1,{rows},16] x) => (float[1,{rows},5] y)"
        model = net(text, "y = MatMul(x, w)", {"w": random(16, 5)})
        refresh_shapes(model, "test")
        return model

    ((name, before, after),) = changed_layers(dense(8), dense(4))
    assert name == "MatMul_0"
    assert shapes(before) == ((1, 8, 16), (1, 8, 5))
    assert shapes(after) == ((1, 4, 16), (1, 4, 5))


def test_layers_that_are_gone_or_became_something_else_are_left_out() -> None:
    after = block(4)
    after.graph.node("Conv_1").name = "renamed"
    assert [name for name, _, _ in changed_layers(block(8), after)] == ["Conv_3", "Conv_4"]
    signature = "(float[1,4] x) => (float[1,3] y)"
    gemm = net(signature, "y = Gemm(x, w, b)", {"w": random(4, 3), "b": random(3)})
    matmul = net(signature, "y = MatMul(x, w)", {"w": random(4, 3)})
    gemm.graph[0].name = matmul.graph[0].name = "dense"
    assert changed_layers(gemm, matmul) == []


def test_equal_layers_have_equal_signatures() -> None:
    signatures = {name: layer_signature(layer) for name, layer in layers(block(6))}
    assert len(set(signatures.values())) == len(signatures)  # bias, group and kernel tell apart
    again = {name: layer_signature(layer) for name, layer in layers(block(6))}
    assert signatures == again
    twins = net(
        "(float[1,4,4,4] x) => (float[1,4,4,4] y)",
        "a = Conv(x, w0) y = Conv(a, w1)",
        {"w0": random(4, 4, 1, 1, seed=1), "w1": random(4, 4, 1, 1, seed=2)},
    )
    refresh_shapes(twins, "test")
    assert len({layer_signature(layer) for _, layer in layers(twins)}) == 1
