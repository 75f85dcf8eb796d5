"""Random nets of the blocks that networks are made of, for tests of channel groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from edgepress.passes.base import refresh_shapes
from tests.graphs import Array


class Builder:
    """Writes nodes and weights; every method returns the name of the value it made."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def op(self, operator: str, inputs: list[str], outputs: int = 1, **attributes: Any) -> Any:
        name = f"{operator.lower()}_{len(self.nodes)}"
        made = [name] if outputs == 1 else [f"{name}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(operator, inputs, made, name, **attributes))
        return name if outputs == 1 else made

    def weight(self, *shape: int) -> str:
        fan_in = max(1, int(np.prod(shape[1:])))
        return self.constant((self.rng.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32))

    def constant(self, array: Array) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def full(self, number: float, *shape: int) -> str:
        return self.constant(np.full(shape, number, np.float32))

    def ints(self, *numbers: int) -> str:
        return self.constant(np.array(numbers, np.int64))

    def conv(self, x: str, i: int, o: int, k: int = 1, group: int = 1, weight: str = "") -> str:
        weight = weight or self.weight(o, i // group, k, k)
        return str(self.op("Conv", [x, weight, self.weight(o)], group=group, pads=[k // 2] * 4))

    def relu(self, x: str) -> str:
        return str(self.op("Relu", [x]))

    def model(self, x: tuple[int, ...], *y: str, dtype: int = TensorProto.FLOAT) -> ir.Model:
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("x", dtype, x)],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in y],
            self.weights,
        )
        opset = helper.make_opsetid("", 23)
        model = ir.from_proto(helper.make_model(graph, opset_imports=[opset], ir_version=11))
        refresh_shapes(model, "test")
        return model


#: Of all normalisations: large, so that none of them makes rounding errors large.
EPSILON = 0.5

Block = Callable[[Builder, str, int], tuple[str, int]]
"""From a value `[1, c, 6, 6]` and c to the next value and its channels."""


def plain(b: Builder, x: str, c: int) -> tuple[str, int]:
    return b.relu(b.conv(x, c, 12, 3)), 12


def residual(b: Builder, x: str, c: int) -> tuple[str, int]:
    inner = b.conv(b.relu(b.conv(x, c, 10)), 10, c, 3)
    return b.relu(b.op("Add", [x, inner])), c


def concat(b: Builder, x: str, c: int) -> tuple[str, int]:
    return b.op("Concat", [b.conv(x, c, 6), b.relu(b.conv(x, c, 10, 3)), x], axis=1), 16 + c


def concat_residual(b: Builder, x: str, c: int) -> tuple[str, int]:
    joined = b.op("Concat", [b.conv(x, c, 6), b.conv(x, c, 8)], axis=-3)
    return b.op("Add", [joined, b.conv(x, c, 14)]), 14


def concat_input(b: Builder, x: str, c: int) -> tuple[str, int]:
    """Channels of the model's input beside those of a layer."""
    joined = b.op("Concat", ["x", b.conv(x, c, 5)], axis=1)
    return b.op("Add", [joined, b.conv(x, c, 8)]), 8


def concat_constant(b: Builder, x: str, c: int) -> tuple[str, int]:
    """A constant beside channels, and channels beside each other in space."""
    joined = b.op("Concat", [b.conv(x, c, 6), b.weight(1, 3, 6, 6)], axis=1)
    wide = b.op("Concat", [joined, b.conv(x, c, 9)], axis=3)
    return b.op("MaxPool", [wide], kernel_shape=[1, 2], strides=[1, 2]), 9


def split(b: Builder, x: str, c: int) -> tuple[str, int]:
    x = b.conv(x, c, 16)
    one, other = b.op("Split", [x, b.ints(6, 10)], outputs=2, axis=1)
    return b.op("Concat", [b.op("Sigmoid", [one]), b.conv(other, 10, 8, 3)], axis=1), 14


def split_unevenly(b: Builder, x: str, c: int) -> tuple[str, int]:
    one, two, three = b.op("Split", [b.conv(x, c, 11)], outputs=3, axis=-3, num_outputs=3)
    return b.op("Concat", [b.op("Mul", [one, two]), b.relu(three)], axis=1), 7


def slices(b: Builder, x: str, c: int) -> tuple[str, int]:
    x = b.conv(x, c, 16)
    one = b.op("Slice", [x, b.ints(0), b.ints(6), b.ints(1)])
    other = b.op("Slice", [x, b.ints(4), b.ints(2**62), b.ints(1), b.ints(1)])
    last = b.op("Slice", [x, b.ints(0, -9), b.ints(6, -2), b.ints(2, -3)])
    return b.op("Concat", [one, b.op("Mul", [other, other]), last], axis=1), 25


def slices_with_steps(b: Builder, x: str, c: int) -> tuple[str, int]:
    x = b.conv(x, c, 10)
    odd = b.op("Slice", [x, b.ints(1), b.ints(10), b.ints(1), b.ints(2)])
    back = b.op("Slice", [b.conv(x, 10, 5), b.ints(-1), b.ints(-99), b.ints(1), b.ints(-1)])
    return b.op("Add", [odd, back]), 5


def grouped(b: Builder, x: str, c: int) -> tuple[str, int]:
    return b.relu(b.conv(b.relu(b.conv(x, c, 12)), 12, 18, 3, group=3)), 18


def grouped_residual(b: Builder, x: str, c: int) -> tuple[str, int]:
    x = b.conv(x, c, 12)
    x = b.relu(b.op("Add", [x, b.conv(x, 12, 12, 3, group=2)]))
    return b.conv(b.conv(x, 12, 24, 1, group=3), 24, 12, 1, group=2), 12


def depthwise(b: Builder, x: str, c: int) -> tuple[str, int]:
    return b.conv(b.relu(b.conv(b.relu(b.conv(x, c, 9)), 9, 18, 3, group=9)), 18, 8), 8


def transposed(b: Builder, x: str, c: int) -> tuple[str, int]:
    wide = b.op("ConvTranspose", [x, b.weight(c, 7, 1, 1), b.weight(7)])
    deep = b.op("ConvTranspose", [wide, b.weight(7, 2, 3, 3), b.weight(14)], group=7, pads=[1] * 4)
    x = b.conv(deep, 14, 12)
    return b.op("ConvTranspose", [x, b.weight(12, 5, 1, 1), b.weight(10)], group=2), 10


def squeeze_excite(b: Builder, x: str, c: int) -> tuple[str, int]:
    x = b.relu(b.conv(x, c, 12))
    pooled = b.op("GlobalAveragePool", [x])
    gate = b.op("Sigmoid", [b.conv(b.relu(b.conv(pooled, 12, 6)), 6, 12)])
    return b.op("Mul", [x, gate]), 12


def squeeze_excite_dense(b: Builder, x: str, c: int) -> tuple[str, int]:
    x = b.relu(b.conv(x, c, 12))
    pooled = b.op("Squeeze", [b.op("ReduceMean", [x, b.ints(2, -1)]), b.ints(3, 2)])
    hidden = b.relu(b.op("Gemm", [pooled, b.weight(6, 12), b.weight(6)], transB=1, alpha=0.5))
    gate = b.op("HardSigmoid", [b.op("MatMul", [hidden, b.weight(6, 12)])])
    return b.op("Mul", [b.op("Unsqueeze", [gate, b.ints(-1, -2)]), x]), 12


def shared(b: Builder, x: str, c: int) -> tuple[str, int]:
    weight = b.weight(10, 10, 3, 3)
    x = b.conv(x, c, 10)
    return b.conv(b.relu(b.conv(x, 10, 10, 3, weight=weight)), 10, 10, 3, weight=weight), 10


def reused(b: Builder, x: str, c: int) -> tuple[str, int]:
    """A weight that is read as a weight, and as something else."""
    weight = b.weight(10, c, 1, 1)
    total = b.op("ReduceSum", [b.op("Transpose", [weight], perm=[1, 0, 2, 3]), b.ints(0)])
    return b.op("Add", [b.op("Conv", [x, weight]), total]), 10


def computed(b: Builder, x: str, c: int) -> tuple[str, int]:
    """A weight that is the product of constants."""
    weight = b.op("Mul", [b.weight(10, c, 1, 1), b.weight(10, 1, 1, 1)])
    return b.conv(b.op("Conv", [x, weight, b.op("Neg", [b.weight(10)])]), 10, 8), 8


def shuffle(b: Builder, x: str, c: int) -> tuple[str, int]:
    x = b.conv(x, c, 12)
    x = b.op("Reshape", [x, b.ints(1, 2, 6, 36)])
    x = b.op("Transpose", [x], perm=[0, 2, 1, 3])
    return b.conv(b.op("Reshape", [x, b.ints(1, 12, 6, 6)]), 12, 8), 8


def shuffle_net(b: Builder, x: str, c: int) -> tuple[str, int]:
    x = b.relu(b.conv(b.conv(x, c, 12), 12, 12, group=3))
    x = b.op("Reshape", [x, b.ints(0, 3, -1, 6, 6)])
    x = b.op("Transpose", [x], perm=[0, 2, 1, 3, 4])
    return b.conv(b.op("Reshape", [x, b.ints(1, -1, 6, 6)]), 12, 12, group=3), 12


def odd_reshape(b: Builder, x: str, c: int) -> tuple[str, int]:
    """Axes that neither hold nor split channels cleanly."""
    x = b.op("Reshape", [b.conv(x, c, 12), b.ints(1, 4, 3, 36)])
    x = b.op("Reshape", [b.relu(x), b.ints(1, 2, 6, 6, 6)])
    return b.op("Reshape", [x, b.ints(1, 12, 6, 6)]), 12


def channels_last(b: Builder, x: str, c: int) -> tuple[str, int]:
    x = b.op("Transpose", [b.conv(x, c, 9)], perm=[0, 2, 3, 1])
    x = b.op("Mul", [x, b.weight(9)])
    x = b.op("LayerNormalization", [x, b.weight(9), b.weight(9)], epsilon=EPSILON)
    x = b.op("MatMul", [b.op("Gelu", [b.op("MatMul", [x, b.weight(9, 12)])]), b.weight(12, 7)])
    return b.op("Transpose", [x], perm=[0, 3, 1, 2]), 7


def space_to_depth(b: Builder, x: str, c: int) -> tuple[str, int]:
    x = b.op("SpaceToDepth", [b.conv(x, c, 5)], blocksize=2)
    return b.relu(b.op("DepthToSpace", [b.conv(x, 20, 16)], blocksize=2, mode="CRD")), 4


def depth_to_space(b: Builder, x: str, c: int) -> tuple[str, int]:
    x = b.conv(b.op("DepthToSpace", [b.conv(x, c, 20)], blocksize=2), 5, 6)
    return b.op("SpaceToDepth", [x], blocksize=2), 24


def norms(b: Builder, x: str, c: int) -> tuple[str, int]:
    x = b.conv(x, c, 10)
    x = b.op("BatchNormalization", [x, *(b.weight(10) for _ in range(3)), b.full(0.7, 10)])
    x = b.op("PRelu", [x, b.weight(10, 1, 1)])
    return b.op("InstanceNormalization", [x, b.weight(10), b.weight(10)], epsilon=EPSILON), 10


def group_norm(b: Builder, x: str, c: int) -> tuple[str, int]:
    x = b.conv(x, c, 10)
    inputs = [x, b.weight(10), b.weight(10)]
    return b.op("GroupNormalization", inputs, num_groups=2, epsilon=EPSILON), 10


def trained_norm(b: Builder, x: str, c: int) -> tuple[str, int]:
    inputs = [b.conv(x, c, 10), *(b.weight(10) for _ in range(3)), b.full(0.7, 10)]
    y, mean, _ = b.op("BatchNormalization", inputs, 3, training_mode=1, epsilon=EPSILON)
    return b.op("Add", [y, b.op("Unsqueeze", [mean, b.ints(0, 2, 3)])]), 10


def gathered(b: Builder, x: str, c: int) -> tuple[str, int]:
    x = b.conv(x, c, 8)
    return b.op("Gather", [x, b.ints(7, 1, 1, -4, 0, 2)], axis=1), 6


def gathered_one(b: Builder, x: str, c: int) -> tuple[str, int]:
    one = b.op("Gather", [b.conv(x, c, 8), b.constant(np.array(3))], axis=1)
    return b.op("Mul", [b.conv(x, c, 6), b.op("Unsqueeze", [one, b.ints(1)])]), 6


def elementwise(b: Builder, x: str, c: int) -> tuple[str, int]:
    x = b.conv(x, c, 10)
    clipped = b.op("Clip", [x, "", b.full(0.8)])
    large = b.op("Greater", [clipped, b.weight(1, 10, 1, 1)])
    x = b.op("Where", [large, b.op("Pow", [clipped, b.full(2.0)]), b.op("Exp", [clipped])])
    return b.op("Sub", [b.op("Div", [x, b.full(1.5, 10, 1, 1)]), b.weight(6, 6)]), 10


def sums(b: Builder, x: str, c: int) -> tuple[str, int]:
    """What is summed over channels has none."""
    x = b.conv(x, c, 9)
    total = b.op("Tanh", [b.op("ReduceSum", [x, b.ints(1)])])
    norm = b.op("ReduceL2", [b.conv(x, 9, 7), b.ints(-3)], keepdims=0)
    return b.op("Mul", [b.op("Mul", [x, total]), norm]), 9


def means(b: Builder, x: str, c: int) -> tuple[str, int]:
    """The mean, maximum and softmax over channels depend on how many there are."""
    kept = [b.op("Softmax", [b.conv(x, c, 5)], axis=1), b.conv(x, c, 5)]
    kept += [b.op("ReduceMax", [b.conv(x, c, 8), b.ints(1)])]
    kept += [b.op("ReduceMean", [b.conv(x, c, 8), b.ints(-3)])]
    return b.op("Sum", kept), 5


def resized(b: Builder, x: str, c: int) -> tuple[str, int]:
    x = b.conv(x, c, 9)
    x = b.op("Resize", [x, "", "", b.ints(1, 9, 12, 12)], mode="nearest")
    x = b.op("MaxPool", [x], kernel_shape=[2, 2], strides=[2, 2])
    x = b.op("Resize", [x, "", b.full(2.0, 2)], mode="linear", axes=[-1, -2])
    x = b.op("AveragePool", [x], kernel_shape=[2, 2], strides=[2, 2])
    grown = b.op("Pad", [x, b.ints(0, 0, 1, 1, 0, 0, 1, 1)])
    return b.op("Pad", [grown, b.ints(-1, -1, -1, -1), "", b.ints(-2, -1)]), 9


def moved(b: Builder, x: str, c: int) -> tuple[str, int]:
    """Pad and Resize that move channels and keep their number."""
    x = b.op("Pad", [b.conv(x, c, 8), b.ints(0, -1, 0, 0, 0, 1, 0, 0)])
    scales = b.constant(np.array([1, 1.05, 1, 1], np.float32))
    return b.op("Resize", [b.conv(x, 8, 8), "", scales], mode="linear"), 8


def tiled(b: Builder, x: str, c: int) -> tuple[str, int]:
    x = b.conv(x, c, 5)
    mean = b.op("ReduceMean", [x, b.ints(2, 3)])
    x = b.op("Add", [x, b.op("Expand", [mean, b.ints(1, 1, 6, 6)])])
    return b.op("Tile", [x, b.ints(1, 2, 1, 1)]), 10


def left_products(b: Builder, x: str, c: int) -> tuple[str, int]:
    """Constants on the left: for all, and one per head."""
    x = b.op("Reshape", [b.conv(x, c, 9), b.ints(1, 9, 36)], allowzero=1)
    x = b.op("Reshape", [b.op("MatMul", [b.weight(12, 9), x]), b.ints(1, 3, 4, 36)])
    x = b.op("MatMul", [b.weight(3, 5, 4), x])
    return b.op("Reshape", [x, b.ints(1, 15, 6, 6)]), 15


def vector(b: Builder, x: str, c: int) -> tuple[str, int]:
    x = b.conv(x, c, 8)
    pooled = b.op("Flatten", [b.op("GlobalMaxPool", [x])])
    return b.op("Mul", [b.conv(x, 8, 6), b.op("MatMul", [pooled, b.weight(8)])]), 6


def quantized(b: Builder, x: str, c: int) -> tuple[str, int]:
    integers = b.constant(b.rng.integers(-127, 128, (10, c, 1, 1)).astype(np.int8))
    zeros = b.constant(np.zeros(10, np.int8))
    weight = b.op("DequantizeLinear", [integers, b.full(0.01, 10), zeros], axis=0)
    return b.relu(b.op("Conv", [x, weight, b.weight(10)])), 10


def quantized_activations(b: Builder, x: str, c: int) -> tuple[str, int]:
    tensor = [b.full(0.02), b.constant(np.array(100, np.uint8))]
    channels = [b.full(0.02, 8), b.constant(b.rng.integers(90, 150, 8).astype(np.uint8))]
    for name, axis in ((tensor, 1), (channels, 1)):
        x = b.op("QuantizeLinear", [b.conv(x, c, 8), *name], axis=axis)
        x, c = b.op("DequantizeLinear", [x, *name], axis=axis - 4), 8
    return x, c


def quantized_blocks(b: Builder, x: str, c: int) -> tuple[str, int]:
    integers = b.constant(b.rng.integers(-127, 128, (12, 8, 1, 1)).astype(np.int8))
    scale = b.full(0.01, 12, 2, 1, 1)
    weight = b.op("DequantizeLinear", [integers, scale], axis=1, block_size=4)
    return b.op("Conv", [b.conv(x, c, 8), weight]), 12


def quantized_dynamically(b: Builder, x: str, c: int) -> tuple[str, int]:
    x, scale, zero = b.op("DynamicQuantizeLinear", [b.conv(x, c, 8)], outputs=3)
    weight = b.constant(b.rng.integers(0, 255, (6, 8, 1, 1)).astype(np.uint8))
    x = b.op("Cast", [b.op("ConvInteger", [x, weight, zero])], to=TensorProto.FLOAT)
    return b.op("Mul", [b.op("Mul", [x, scale]), b.full(0.01)]), 6


def second_outputs(b: Builder, x: str, c: int) -> tuple[str, int]:
    pool = {"kernel_shape": [3, 3], "pads": [1] * 4}
    y, indices = b.op("MaxPool", [b.conv(x, c, 8)], outputs=2, **pool)
    numbers = b.op("Cast", [indices], to=TensorProto.FLOAT)
    kept, mask = b.op("Dropout", [b.op("Sub", [y, numbers])], outputs=2)
    return b.op("Where", [mask, kept, y]), 8


def branches(b: Builder, x: str, c: int) -> tuple[str, int]:
    x = b.conv(x, c, 8)
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, 8, 6, 6])
    names = {"then_branch": "Relu", "else_branch": "Neg"}
    graphs = {
        name: helper.make_graph([helper.make_node(op, [x], ["out"])], name, [], [output])
        for name, op in names.items()
    }
    wanted = b.op("Greater", [b.op("ReduceMax", ["x"], keepdims=0), b.full(0.0)])
    return b.op("If", [wanted], 1, **graphs), 8


def unknown(b: Builder, x: str, c: int) -> tuple[str, int]:
    x = b.conv(x, c, 8)
    return b.conv(b.op("LRN", [x], size=3), 8, 8), 8


#: Blocks some of whose channels may be cut.
FREE: tuple[Block, ...] = (
    plain, residual, concat, concat_residual, concat_input, concat_constant, split, split_unevenly,
    slices, grouped, grouped_residual, depthwise, transposed, squeeze_excite, squeeze_excite_dense,
    shared, shuffle, shuffle_net, channels_last, space_to_depth, depth_to_space, norms, gathered,
    gathered_one, elementwise, sums, resized, tiled, left_products, vector, quantized,
    quantized_activations, quantized_blocks, quantized_dynamically, reused, computed,
    slices_with_steps, means, moved, odd_reshape,
)  # fmt: skip
#: Blocks that freeze what they are given.
FROZEN: tuple[Block, ...] = (group_norm, trained_norm, second_outputs, branches, unknown)
BLOCKS = FREE + FROZEN
#: All but the one whose outputs jump: rounding says which of two equal numbers is larger.
SMOOTH = tuple(block for block in BLOCKS if block is not second_outputs)


def cnn(blocks: list[Block], seed: int) -> ir.Model:
    """Chain blocks on an image `[1, 3, 6, 6]`; a dense head reads the flattened end."""
    b = Builder(seed)
    x, c = b.conv("x", 3, 8, 3), 8
    for block in blocks:
        x, c = block(b, x, c)
    x = b.op("Flatten", [x])
    x = b.relu(b.op("Gemm", [x, b.weight(c * 36, 11), b.weight(11)]))
    return b.model((1, 3, 6, 6), b.op("Gemm", [x, b.weight(4, 11), b.weight(4)], transB=1))


Attention = Literal["separate", "fused", "stacked", "paired", "grouped", "tiled", "single"]
TOKENS, WIDTH, HEADS = 5, 24, 4


def transformer(attention: Attention, seed: int, norm: str = "LayerNormalization") -> ir.Model:
    """Embed tokens, one encoder block, and the embedding again as head.

    Heads, hidden units and the width of the embedding can be cut. "grouped" and "tiled" have half
    as many heads for keys and values, "single" has one head in all. "stacked" takes query, key and
    value apart before it splits them into heads, as torch's MultiheadAttention does; "paired" fuses
    keys and values only.
    """
    b = Builder(seed)
    table = b.weight(7, WIDTH)
    x = b.op("Add", [b.op("Gather", [table, "x"]), b.weight(TOKENS, WIDTH)])
    scales = [b.weight(WIDTH) for _ in range(2 if norm == "LayerNormalization" else 1)]
    normed = b.op(norm, [x, *scales], axis=-1, epsilon=EPSILON)
    q, k, v = _query_key_value(b, normed, attention)
    heads = 1 if attention == "single" else HEADS
    scores = b.op("MatMul", [q, b.op("Transpose", [k], perm=[0, 1, 3, 2])])
    nearer = b.op("Gather", [b.weight(3, heads), b.constant(np.eye(TOKENS, dtype=np.int64))])
    scores = b.op("Add", [scores, b.op("Transpose", [nearer], perm=[2, 0, 1])])
    mixed = b.op("MatMul", [b.op("Softmax", [scores], axis=-1), v])
    mixed = b.op("Transpose", [mixed], perm=[0, 2, 1, 3])
    mixed = b.op("Reshape", [mixed, b.ints(1, TOKENS, WIDTH)])
    x = b.op("Add", [x, b.op("MatMul", [mixed, b.weight(WIDTH, WIDTH)])])
    hidden = b.op("Add", [b.op("MatMul", [x, b.weight(WIDTH, 40)]), b.weight(40)])
    hidden = b.op("Mul", [hidden, b.op("Sigmoid", [hidden])])
    x = b.op("Add", [x, b.op("MatMul", [hidden, b.weight(40, WIDTH)])])
    logits = b.op("MatMul", [x, b.op("Transpose", [table], perm=[1, 0])])
    return b.model((1, TOKENS), logits, dtype=TensorProto.INT64)


def _query_key_value(b: Builder, x: str, attention: Attention) -> list[str]:
    """`[1, heads, tokens, width of a head]` each."""
    if attention == "fused":
        qkv = b.op("MatMul", [x, b.weight(WIDTH, 3 * WIDTH)])
        qkv = b.op("Reshape", [qkv, b.ints(1, TOKENS, 3, HEADS, WIDTH // HEADS)])
        qkv = b.op("Transpose", [qkv], perm=[2, 0, 3, 1, 4])
        return [b.op("Gather", [qkv, b.constant(np.array(i))], axis=0) for i in range(3)]
    if attention == "stacked":
        qkv = b.op("MatMul", [x, b.weight(WIDTH, 3 * WIDTH)])
        qkv = b.op("Unsqueeze", [b.op("Reshape", [qkv, b.ints(TOKENS, 1, 3, WIDTH)]), b.ints(0)])
        qkv = b.op("Squeeze", [b.op("Transpose", [qkv], perm=[3, 1, 2, 0, 4]), b.ints(-2)])
        parts = [b.op("Gather", [qkv, b.constant(np.array(i))], axis=0) for i in range(3)]
        split_up = [b.op("Reshape", [part, b.ints(1, TOKENS, HEADS, -1)]) for part in parts]
        return [b.op("Transpose", [part], perm=[0, 2, 1, 3]) for part in split_up]
    if attention == "paired":
        kv = b.op("MatMul", [x, b.weight(WIDTH, 2 * WIDTH)])
        kv = b.op("Reshape", [kv, b.ints(TOKENS, 2, HEADS, WIDTH // HEADS)])
        kv = b.op("Mul", [b.op("Transpose", [kv], perm=[1, 2, 0, 3]), b.full(0.5, 1)])
        ends = ((0, 1), (1, 2))
        cut = [b.op("Slice", [kv, *(b.ints(n) for n in (*end, 0))]) for end in ends]
        return [_heads(b, x, HEADS, WIDTH // HEADS), *cut]
    if attention == "single":
        return [_heads(b, x, 1, WIDTH) for _ in range(3)]
    if attention == "separate":
        return [_heads(b, x, HEADS, WIDTH // HEADS) for _ in range(3)]
    few, size = HEADS // 2, WIDTH // HEADS
    q, *others = _heads(b, x, HEADS, size), _heads(b, x, few, size), _heads(b, x, few, size)
    if attention == "tiled":
        return [q, *(b.op("Tile", [kv, b.ints(1, 2, 1, 1)]) for kv in others)]
    for index, kv in enumerate(others):
        wide = b.op("Expand", [b.op("Unsqueeze", [kv, b.ints(2)]), b.ints(1, few, 2, TOKENS, size)])
        others[index] = b.op("Reshape", [wide, b.ints(1, HEADS, TOKENS, size)])
    return [q, *others]


def _heads(b: Builder, x: str, heads: int, size: int) -> str:
    projected = b.op("MatMul", [x, b.weight(WIDTH, heads * size)])
    projected = b.op("Add", [projected, b.weight(heads * size)])
    split_up = b.op("Reshape", [projected, b.ints(1, TOKENS, heads, size)])
    return str(b.op("Transpose", [split_up], perm=[0, 2, 1, 3]))
