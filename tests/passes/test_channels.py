from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.passes._channel_axes import Group
from edgepress.passes._channels import analyse, cut
from edgepress.passes.base import refresh_shapes
from tests.graphs import Array, answers, feeds, net, nodes, random, weight
from tests.passes import channel_nets as nets
from tests.passes.channel_nets import BLOCKS, SMOOTH, Attention, Block, Builder, cnn, transformer
from tests.passes.channel_oracle import assert_pruned_equals_masked, masked

ATTENTIONS: tuple[Attention, ...] = (
    "separate", "fused", "stacked", "paired", "grouped", "tiled", "single",
)  # fmt: skip


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_a_pruned_block_equals_the_masked_one(block: Block) -> None:
    assert sum(assert_pruned_equals_masked(cnn([block], seed), seed) for seed in range(3)) > 8


@settings(max_examples=30, deadline=None)
@given(
    first=st.sampled_from(BLOCKS),
    others=st.lists(st.sampled_from(SMOOTH), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
)
def test_a_pruned_net_equals_the_masked_one(first: Block, others: list[Block], seed: int) -> None:
    assert_pruned_equals_masked(cnn([first, *others], seed), seed)


@pytest.mark.parametrize("norm", ["LayerNormalization", "RMSNormalization"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_pruned_transformer_equals_the_masked_one(attention: Attention, norm: str) -> None:
    models = [(transformer(attention, seed, norm), seed) for seed in range(3)]
    assert sum(assert_pruned_equals_masked(model, seed) for model, seed in models) > 40


def described(groups: list[Group]) -> list[tuple[int, int, int]]:
    return [(len(group.channels), len(group.free), group.width) for group in groups]


@pytest.mark.parametrize(
    ("block", "groups"),
    [
        (nets.plain, [(12, 12, 1)]),
        (nets.residual, [(10, 10, 1)]),
        (nets.concat, [(6, 6, 1), (10, 10, 1)]),
        (nets.concat_residual, [(14, 14, 1)]),
        (nets.concat_input, [(8, 5, 1)]),
        (nets.concat_constant, [(9, 9, 1)]),
        (nets.split, [(16, 16, 1), (8, 8, 1)]),
        (nets.split_unevenly, [(7, 7, 1)]),  # 4 and 4 go together, 3
        (nets.slices, [(16, 16, 1)]),
        (nets.slices_with_steps, [(10, 0, 1), (5, 0, 1)]),
        (nets.grouped, [(4, 4, 3), (6, 6, 3)]),
        # 12 in groups of 6 and of 4, 24 in groups of 8 and of 12, 12 in groups of 6
        (nets.grouped_residual, [(2, 2, 6), (4, 4, 6), (6, 6, 2)]),
        (nets.depthwise, [(9, 9, 2), (8, 8, 1)]),
        (nets.transposed, [(7, 7, 2), (6, 6, 2), (5, 5, 2)]),
        (nets.squeeze_excite, [(12, 12, 1), (6, 6, 1)]),
        (nets.squeeze_excite_dense, [(12, 12, 1), (6, 6, 1)]),
        (nets.shared, [(10, 10, 1)]),
        (nets.reused, [(10, 10, 1)]),
        (nets.computed, [(8, 8, 1)]),  # the computed weight is no layer's own
        (nets.shuffle, [(6, 6, 2), (8, 8, 1)]),
        (nets.odd_reshape, [(2, 2, 6)]),
        (nets.channels_last, [(9, 9, 1), (12, 12, 1), (7, 7, 1)]),
        (nets.space_to_depth, [(5, 5, 1), (4, 4, 4)]),
        (nets.depth_to_space, [(5, 5, 4), (6, 6, 1)]),
        (nets.norms, [(10, 10, 1)]),
        (nets.group_norm, [(10, 0, 1)]),
        (nets.trained_norm, [(10, 0, 1)]),
        (nets.gathered, [(8, 8, 1)]),
        (nets.gathered_one, [(8, 0, 1), (6, 6, 1)]),
        (nets.elementwise, [(10, 10, 1)]),
        (nets.sums, [(9, 9, 1), (7, 7, 1)]),
        (nets.means, [(5, 0, 1), (5, 0, 1), (8, 0, 1), (8, 0, 1)]),
        (nets.resized, [(9, 9, 1)]),
        (nets.moved, [(8, 0, 1), (8, 0, 1)]),
        (nets.tiled, [(5, 5, 1)]),
        (nets.left_products, [(9, 9, 1), (3, 0, 4), (5, 0, 1)]),
        (nets.vector, [(8, 0, 1), (6, 6, 1)]),
        (nets.quantized, [(10, 10, 1)]),
        (nets.quantized_activations, [(8, 8, 1), (8, 8, 1)]),
        (nets.quantized_blocks, [(8, 0, 1), (12, 0, 1)]),
        (nets.quantized_dynamically, [(8, 0, 1)]),
        (nets.second_outputs, [(8, 0, 1)]),
        (nets.branches, [(8, 0, 1)]),
        (nets.unknown, [(8, 0, 1), (8, 8, 1)]),
    ],
    ids=lambda case: case.__name__ if callable(case) else "",
)
def test_the_groups_of_a_block(block: Block, groups: list[tuple[int, int, int]]) -> None:
    found = analyse(cnn([block], 0)).groups()
    assert described(found) == [(8, 8, 1), *groups, (11, 11, 1), (4, 0, 1)]


@pytest.mark.parametrize(
    ("attention", "groups"),
    [
        ("separate", [(4, 4, 6)]),
        ("fused", [(4, 4, 18)]),
        ("stacked", [(4, 4, 18)]),
        ("paired", [(4, 4, 12)]),
        ("grouped", [(2, 2, 12)]),
        ("tiled", [(2, 2, 12)]),
        # query and key, value and output; the position biases of the only head
        ("single", [(24, 24, 1), (24, 24, 1), (1, 0, 1)]),
    ],
)
def test_the_groups_of_a_transformer(
    attention: Attention, groups: list[tuple[int, int, int]]
) -> None:
    found = analyse(transformer(attention, 0)).groups()
    assert described(found) == [(24, 24, 1), *groups, (40, 40, 1)]


def test_an_axis_that_a_layer_reads_before_it_is_split_is_one_of_channels() -> None:
    b = Builder(0)
    x = b.op("Reshape", [b.op("Gemm", ["x", b.weight(3, 96)]), b.ints(1, 4, 4, 6)])
    halves = b.op("Split", [b.relu(b.conv(x, 4, 4, 3)), b.ints(2, 2)], outputs=2, axis=1)
    groups = analyse(b.model((1, 3), b.conv(b.op("Mul", halves), 2, 3))).groups()
    # pixels are no channels: the Gemm can lose the images that the convolution reads
    assert described(groups) == [(4, 4, 24), (2, 2, 2), (3, 0, 1)]


def names(group: Group) -> tuple[list[str], list[str]]:
    readers = dict.fromkeys(member.node.name or "" for member in group.readers)
    return [node.name or "" for node in group.layers], list(readers)


def test_the_layers_of_a_residual_stage() -> None:
    stem, inner, head, _ = analyse(cnn([nets.residual], 0)).groups()
    assert names(stem) == (["conv_0", "conv_3"], ["conv_1", "gemm_7"])
    assert names(inner) == (["conv_1"], ["conv_3"])
    assert names(head) == (["gemm_7"], ["gemm_9"])


def test_the_layers_of_squeeze_and_excite() -> None:
    _, wide, squeezed, *_ = analyse(cnn([nets.squeeze_excite], 0)).groups()
    assert names(wide) == (["conv_1", "conv_6"], ["conv_4", "gemm_10"])
    assert names(squeezed) == (["conv_4"], ["conv_6"])


def test_the_layers_of_attention_and_of_the_embedding() -> None:
    width, heads, hidden = analyse(transformer("separate", 0)).groups()
    query, key, value, biases, out = "matmul_3", "matmul_7", "matmul_11", "gather_17", "matmul_24"
    assert names(heads) == ([query, key, value, biases], [out])
    assert names(hidden) == (["matmul_26"], ["matmul_30"])
    # the head is the transposed table, so its product has no weight of its own
    assert names(width) == (["gather_0", out, "matmul_30"], [query, key, value, "matmul_26"])


def test_heads_are_whole() -> None:
    _, heads, _ = analyse(transformer("fused", 0)).groups()
    qkv = heads.producers[0]
    by_head = heads.places(qkv.channels).reshape(3, 4, 6)
    assert (by_head == np.arange(4)[:, None]).all()


def test_channels_of_a_group_are_in_the_order_of_its_first_layer() -> None:
    group = analyse(cnn([nets.gathered], 0)).groups()[1]
    assert group.channels.tolist() == group.producers[0].channels.tolist()
    assert group.places(np.array([group.channels[3], -5, 10**6])).tolist() == [3, -1, -1]


@pytest.mark.parametrize(
    ("block", "unknown"),
    [
        (nets.unknown, [("lrn_2", "LRN")]),
        (nets.vector, [("matmul_5", "MatMul of a vector")]),
        (nets.branches, [("if_4", "If")]),
        (nets.quantized_blocks, [("dequantizelinear_1", "DequantizeLinear of blocks")]),
        (
            nets.second_outputs,
            [
                ("maxpool_2", "MaxPool whose second output is read"),
                ("dropout_5", "Dropout whose second output is read"),
            ],
        ),
    ],
)
def test_what_has_no_rule_is_named(block: Block, unknown: list[tuple[str, str]]) -> None:
    axes = analyse(cnn([block], 0))
    assert axes.unknown == unknown
    why = f"{unknown[0][0]} is an? {unknown[0][1]}, which has no rule for channels"
    assert any(re.search(why, group.why) for group in axes.groups())


FORMS = [(False, False), (True, False), (False, True), (True, True)]


@pytest.mark.parametrize(("trans_a", "trans_b"), FORMS)
@pytest.mark.parametrize(
    "bias", [None, (), (1,), (9,), (1, 9), (36, 1), (1, 1), (36, 9), "computed"]
)
def test_a_pruned_gemm_equals_the_masked_one(
    trans_a: bool, trans_b: bool, bias: tuple[int, ...] | str | None
) -> None:
    def model(seed: int) -> ir.Model:
        b = Builder(seed)
        x = b.op("Reshape", [b.conv("x", 3, 8), b.ints(8, 36)])
        x = x if trans_a else b.op("Transpose", [x])
        inputs = [x, b.weight(9, 8) if trans_b else b.weight(8, 9)]
        if bias == "computed":
            inputs.append(b.op("Flatten", [b.op("GlobalMaxPool", [b.conv("x", 3, 9)])]))
        elif bias is not None:
            assert not isinstance(bias, str)
            inputs.append(b.weight(*bias))
        y = b.op("Gemm", inputs, transA=int(trans_a), transB=int(trans_b), alpha=0.5, beta=2.0)
        return b.model((1, 3, 6, 6), b.op("MatMul", [b.op("Tanh", [y]), b.weight(9, 4)]))

    assert described(analyse(model(0)).groups())[:2] == [(8, 8, 1), (9, 9, 1)]
    assert sum(assert_pruned_equals_masked(model(seed), seed) for seed in range(4)) > 8


@pytest.mark.parametrize("groups", [1, 2, 4, 12])
@pytest.mark.parametrize("operator", ["Conv", "ConvTranspose"])
def test_a_pruned_convolution_of_any_groups_equals_the_masked_one(
    operator: str, groups: int
) -> None:
    def model(seed: int) -> ir.Model:
        b = Builder(seed)
        x = b.conv("x", 3, 12)
        shape = (24, 12 // groups, 2, 2) if operator == "Conv" else (12, 24 // groups, 2, 2)
        x = b.op(operator, [x, b.weight(*shape), b.weight(24)], group=groups, strides=[2, 2])
        return b.model((1, 3, 6, 6), b.conv(x, 24, 4))

    found = analyse(model(0)).groups()
    assert all(len(group.free) == len(group.channels) for group in found[:-1])
    # a depthwise convolution makes two channels of each; others as many as a group has
    last = found[0] if groups == 12 else found[1]
    assert (len(last.channels), last.width) == ((12, 2) if groups == 12 else (24 // groups, groups))
    assert sum(assert_pruned_equals_masked(model(seed), seed) for seed in range(4)) > 4


def test_weights_that_a_user_gives_or_reads_stay() -> None:
    weights = {"w": random(4, 3, 1, 1), "v": random(4, 4, 1, 1), "u": random(5, 4, 1, 1)}
    body = "a = Conv(x, w) b = Conv(a, v) c = Conv(b, u) y = Conv(c, z)"
    weights["z"] = random(2, 5, 1, 1)
    model = net(
        "(float[1,3,2,2] x, float[4,4,1,1] v) => (float[1,2,2,2] y, float[5,4,1,1] u)",
        body,
        weights,
    )
    refresh_shapes(model, "test")
    groups = analyse(model).groups()
    assert [(g.name, len(g.free)) for g in groups] == [("Conv_0", 0), ("Conv_2", 0), ("Conv_3", 0)]
    assert groups[0].why == "v is an input of the model"
    assert groups[1].why == "u is an output of the model"


def test_channels_that_are_an_output_stay() -> None:
    b = Builder(0)
    inner = b.relu(b.conv("x", 3, 8))
    axes = analyse(b.model((1, 3, 6, 6), b.conv(b.conv(inner, 8, 5), 5, 2), inner))
    assert described(axes.groups()) == [(8, 0, 1), (5, 5, 1), (2, 0, 1)]
    assert axes.groups()[0].why == f"{inner} is an output of the model"


def test_a_shape_that_is_not_known_freezes() -> None:
    weights = {"w": random(4, 3, 1, 1), "v": random(2, 4, 1, 1)}
    model = net(
        "(float[N,3,4,4] x) => (float[N,2,4,4] y)", "a = Conv(x, w) y = Conv(a, v)", weights
    )
    refresh_shapes(model, "test")
    axes = analyse(model)
    assert axes.groups() == []
    assert axes.unknown == [(f"Conv_{i}", "Conv of unknown shape") for i in range(2)]


def test_nodes_out_of_order_are_refused() -> None:
    model = cnn([], 0)
    model.graph.append(model.graph[0])
    with pytest.raises(ValueError, match="flatten_1 comes before what it reads"):
        analyse(model)


def small() -> ir.Model:
    weights = {
        "wa": random(4, 2, 1, 1),
        "ba": random(4),
        "wd": random(4, 1, 3, 3),
        "wy": random(2, 4, 1, 1),
        "sizes": np.array([1, 3]),
    }
    body = """
    a = Conv(x, wa, ba)
    d = Conv <group=4, pads=[1,1,1,1]> (a, wd)
    one, three = Split <axis=1> (d, sizes)
    c = Concat <axis=1> (three, one)
    y = Conv(c, wy)
    """
    model = net("(float[1,2,4,4] x) => (float[1,2,4,4] y)", body, weights)
    refresh_shapes(model, "test")
    return model


def test_a_small_net_is_cut_as_by_hand() -> None:
    model = small()
    before = {name: weight(model, name) for name in model.graph.initializers}
    axes = analyse(model)
    group, _ = axes.groups()
    cut(model, axes, group.channels[[1, 2]].tolist())
    assert nodes(model) == "\n".join(
        [
            "a = Conv(x, wa, ba)",
            "d = Conv(a, wd) {group=2, pads=[1,1,1,1]}",
            "one, three = Split(d, sizes) {axis=1}",
            "c = Concat(three, one) {axis=1}",
            "y = Conv(c, wy)",
        ]
    )
    kept: list[int] = [0, 3]
    expected: dict[str, Array] = {
        "wa": before["wa"][kept],
        "ba": before["ba"][kept],
        "wd": before["wd"][kept],
        "wy": before["wy"][:, [2, 3]],  # c has the channels in the order 1, 2, 3, 0
        "sizes": np.array([1, 1]),
    }
    assert set(model.graph.initializers) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(weight(model, name), array)
        assert model.graph.initializers[name].shape == ir.Shape(array.shape)
    refresh_shapes(model, "test")
    assert model.graph[2].outputs[1].shape == ir.Shape([1, 1, 4, 4])
    assert answers(model, feeds(model))[0].shape == (1, 2, 4, 4)


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ([-1], "a frozen channel cannot be cut: y is an output of the model"),
        ([0, 1, 2, 3], "would be empty"),
        ([1, 2, 3], "would be empty"),  # the second output of the Split
        ([0], "would be empty"),  # its first
    ],
)
def test_cuts_that_cannot_be_are_refused_and_change_nothing(places: list[int], words: str) -> None:
    model = small()
    axes = analyse(model)
    channels = np.concatenate([group.channels for group in axes.groups()])
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    with pytest.raises(ValueError, match=words):
        cut(model, axes, channels[places].tolist())
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("operator", ["Slice(a, one, two, one)", "Gather <axis=1> (a, one)"])
def test_a_part_of_an_axis_is_not_emptied(operator: str) -> None:
    weights = {"w": random(4, 3, 1, 1), "one": np.array([1]), "two": np.array([2])}
    weights = {name: array for name, array in weights.items() if name in f"w {operator}"}
    body = f"a = Conv(x, w) b = {operator} y = ReduceSum <keepdims=0> (b)"
    model = net("(float[1,3,2,2] x) => (float y)", body, weights)
    refresh_shapes(model, "test")
    axes = analyse(model)
    (group,) = axes.groups()
    with pytest.raises(ValueError, match="would be empty"):
        cut(model, axes, [int(group.channels[1])])
    cut(model, axes, group.channels[[0, 2, 3]].tolist())
    refresh_shapes(model, "test")
    assert model.graph[1].outputs[0].shape == ir.Shape([1, 1, 2, 2])


def test_a_constant_is_not_emptied() -> None:
    axes = analyse(model := cnn([nets.concat_constant], 0))
    group = axes.groups()[1]
    beside = model.graph[2].inputs[1]
    assert beside is not None
    assert beside.is_initializer()
    channels = axes.channels_of(beside)[1]
    assert channels is not None
    assert set(channels.tolist()) < set(group.free.tolist())
    with pytest.raises(ValueError, match="would be empty"):
        cut(model, axes, channels.tolist())


def test_numbers_that_are_no_channels_are_refused() -> None:
    model = small()
    axes = analyse(model)
    group = axes.groups()[0]
    tied = next(i for i in range(10**6) if axes.channel[i] != i)
    for number in (tied, -1, 10**6):
        with pytest.raises(ValueError, match="is no channel"):
            cut(model, axes, [number])
    cut(model, axes, [int(group.channels[1])])
    with pytest.raises(ValueError, match="another shape now"):
        cut(model, axes, [int(group.channels[2])])


@pytest.mark.parametrize("dtype", [ir.DataType.BFLOAT16, ir.DataType.FLOAT16, ir.DataType.INT4])
def test_what_remains_has_the_dtype_it_had(dtype: ir.DataType) -> None:
    model = small()
    value = model.graph.initializers["wd"]
    array = np.arange(36).reshape(4, 1, 3, 3) % 8
    value.const_value = ir.tensor(array.astype(dtype.numpy()), dtype=dtype, name="wd")
    value.dtype = dtype
    axes = analyse(model)
    cut(model, axes, [int(axes.groups()[0].channels[1])])
    assert value.const_value is not None
    assert value.const_value.dtype == dtype
    np.testing.assert_array_equal(weight(model, "wd").astype(int), array[[0, 2, 3]])


def test_a_shape_that_two_nodes_share_is_split() -> None:
    b = Builder(0)
    shape = b.ints(1, 6, 36)
    parts = [b.op("Reshape", [b.conv("x", 3, 6), shape]) for _ in range(2)]
    y = b.op("Concat", [b.op("MatMul", [b.weight(1, 4, 6), x]) for x in parts], axis=1)
    model = b.model((1, 3, 6, 6), y)
    axes = analyse(model)
    first, second, _, _ = axes.groups()
    cut(model, axes, [*first.channels[:2].tolist(), int(second.channels[0])])
    refresh_shapes(model, "test")
    shapes = [node.outputs[0].shape for node in model.graph if node.op_type == "Reshape"]
    assert shapes == [ir.Shape([1, 4, 36]), ir.Shape([1, 5, 36])]


@pytest.mark.parametrize("bounds", [(-9, -2), (2, -2), (-9, 12), (0, -1)])
def test_a_cut_behind_a_slice_moves_bounds_from_the_end(bounds: tuple[int, int]) -> None:
    b = Builder(0)
    x = b.conv("x", 3, 16)
    start, end = (b.ints(bound) for bound in bounds)
    y = b.conv(b.op("Slice", [x, start, end, b.ints(1)]), len(range(16)[slice(*bounds)]), 4)
    original = b.model((1, 3, 6, 6), y)
    axes = analyse(original)
    behind = {int(axes.groups()[0].channels[15])}
    oracle, pruned = masked(original, axes, behind), original.clone()
    cut(pruned, analyse(pruned), behind)
    refresh_shapes(pruned, "test")
    feed = feeds(pruned)
    np.testing.assert_allclose(answers(pruned, feed)[0], answers(oracle, feed)[0], atol=1e-5)
