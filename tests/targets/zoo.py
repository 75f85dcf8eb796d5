"""Small graphs that together hold every operator worth a schedule, large enough to matter.

Each is a line or two of ONNX text on an image `[1, 48, 48, 48]` or on tokens `[1, 256, 512]`.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgepress.targets.program import Array
from tests.graphs import net, random
from tests.targets.qdq import shaped

IMAGE, TOKENS = "(float[1,48,48,48] x) => (float y)", "(float[1,256,512] x) => (float y)"
I64 = np.int64
CONSTANTS: dict[str, Array] = {
    "w3": random(48, 48, 3, 3),
    "w1": random(96, 48, 1, 1),
    "w5": random(48, 1, 5, 5),
    "g2": random(48, 2, 3, 3),  # 24 groups of 2 channels
    "g4": random(48, 4, 3, 3),
    "g12": random(96, 12, 3, 3),
    "multiplied": random(96, 1, 3, 3),  # a depthwise convolution of two filters per channel
    "t2": random(48, 24, 2, 2),
    "t3": random(48, 24, 3, 3),
    "t4": random(48, 32, 4, 4),
    "t_groups": random(48, 6, 4, 4),
    "b48": random(48),
    "channel": random(48, 1, 1),
    "positive": np.abs(random(48)) + np.float32(0.5),
    "scales": np.array([1, 1, 2, 2], np.float32),
    "odd_scales": np.array([1, 1, 1.3, 1.7], np.float32),
    "pads": np.array([0, 0, 1, 2, 0, 0, 3, 0], I64),
    "starts": np.array([3, 1], I64),
    "ends": np.array([35, 39], I64),
    "axes": np.array([2, 3], I64),
    "steps": np.array([1, 2], I64),
    "rows": np.array([[3, 1, 4], [1, 5, 9]], I64),
    "table": random(500, 512),
    "sizes": np.array([16, 16, 16], I64),
    "square": random(512, 512),
    "row": random(512),
    "one": np.array(1, np.float32),
    "half": np.array(0.5, np.float32),
    "small": np.array(1e-5, np.float32),
    "low": np.array(-1, np.float32),
    "heads": np.array([1, 256, 8, 64], I64),
    "joined": np.array([1, 256, 512], I64),
    "shuffled": np.array([1, 2, 24, 48, 48], I64),
    "image": np.array([1, 48, 48, 48], I64),
}

CONVOLUTIONS = {
    "3x3": "y = Conv <pads=[1,1,1,1]> (x, w3, b48)",
    "1x1": "y = Conv (x, w1)",
    "strided": "y = Conv <pads=[1,1,1,1], strides=[2,2]> (x, w3)",
    "dilated": "y = Conv <pads=[2,2,2,2], dilations=[2,2]> (x, w3)",
    "depthwise": "y = Conv <pads=[2,2,2,2], group=48> (x, w5)",
    "depthwise with two filters": "y = Conv <pads=[1,1,1,1], group=48> (x, multiplied)",
    "groups of 2": "y = Conv <pads=[1,1,1,1], group=24> (x, g2)",
    "groups of 4": "y = Conv <pads=[1,1,1,1], group=12> (x, g4)",
    "groups of 12": "y = Conv <pads=[1,1,1,1], group=4> (x, g12)",
    "transposed 2x2": "y = ConvTranspose <strides=[2,2]> (x, t2)",
    "transposed 3x3": "y = ConvTranspose <strides=[2,2], pads=[1,1,1,1], output_padding=[1,1]> "
    "(x, t3)",
    "transposed 4x4": "y = ConvTranspose <strides=[2,2], pads=[1,1,1,1]> (x, t4)",
    "transposed, stride 1": "y = ConvTranspose <pads=[1,1,1,1]> (x, t3)",
    "transposed, groups": "y = ConvTranspose <strides=[2,2], pads=[1,1,1,1], group=4> "
    "(x, t_groups)",
}
WINDOWS = {
    "max pool": "y = MaxPool <kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]> (x)",
    "average pool": "y = AveragePool <kernel_shape=[3,3], pads=[1,1,1,1]> (x)",
    "global average": "y = GlobalAveragePool (x)",
    "global max": "y = GlobalMaxPool (x)",
    "mean over space": "y = ReduceMean <axes=[2,3]> (x)",
    "mean over channels": "y = ReduceMean <axes=[1]> (x)",
    "nearest": 'y = Resize <mode="nearest", coordinate_transformation_mode="asymmetric", '
    'nearest_mode="floor"> (x, "", scales)',
    "linear": 'y = Resize <mode="linear"> (x, "", scales)',
    "linear, aligned": 'y = Resize <mode="linear", coordinate_transformation_mode="align_corners"> '
    '(x, "", scales)',
    "linear, odd": 'y = Resize <mode="linear"> (x, "", odd_scales)',
    "cubic": 'y = Resize <mode="cubic"> (x, "", scales)',
    "instance norm": "y = InstanceNormalization (x, positive, b48)",
    "batch norm": "y = BatchNormalization (x, positive, b48, b48, positive)",
    "local response": "y = LRN <size=5> (x)",
    "space to depth": "y = SpaceToDepth <blocksize=2> (x)",
    "depth to space": "y = DepthToSpace <blocksize=2> (x)",
    "softmax of channels": "y = Softmax <axis=1> (x)",
    "pad": "y = Pad (x, pads, half)",
    "reflected": 'y = Pad <mode="reflect"> (x, pads)',
    "slice": "y = Slice (x, starts, ends, axes)",
    "slice with steps": "y = Slice (x, starts, ends, axes, steps)",
    "split and concat": "a, b, c = Split <axis=1> (x, sizes) y = Concat <axis=1> (b, c, a)",
    "channel shuffle": "a = Reshape (x, shuffled) b = Transpose <perm=[0,2,1,3,4]> (a) "
    "y = Reshape (b, image)",
    "to last": "y = Transpose <perm=[0,2,3,1]> (x)",
}
ELEMENTWISE = {
    op: f"y = {op} (x)"
    for op in (
        "Abs", "Ceil", "Cos", "Elu", "Erf", "Exp", "Floor", "HardSigmoid", "HardSwish",
        "LeakyRelu", "Neg", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus",
        "Softsign", "Tanh", "Mish",
    )
}  # fmt: skip
ELEMENTWISE |= {
    "add channels": "y = Add (x, channel)",
    "multiply": "a = Sigmoid (x) y = Mul (a, x)",
    "prelu": "y = PRelu (x, channel)",
    "log and root": "a = Abs (x) b = Log (a) c = Sqrt (a) y = Div (b, c)",
    "power": "a = Abs (x) y = Pow (a, half)",
    "clip": "y = Clip (x, low, one)",
    "where": "a = Greater (x, half) y = Where (a, x, low)",
    "cast": "a = Cast <to=6> (x) y = Cast <to=1> (a)",
    "max": "y = Max (x, channel)",
}
TRANSFORMERS = {
    "dense": "y = MatMul (x, square)",
    "attention": "a = Reshape (x, heads) b = Transpose <perm=[0,2,1,3]> (a) "
    "c = Transpose <perm=[0,2,3,1]> (a) d = MatMul (b, c) e = Softmax (d) f = MatMul (e, b) "
    "g = Transpose <perm=[0,2,1,3]> (f) y = Reshape (g, joined)",
    "layer norm": "y = LayerNormalization (x, row, row)",
    "layer norm, spelled": "a = ReduceMean <axes=[-1]> (x) b = Sub (x, a) c = Mul (b, b) "
    "d = ReduceMean <axes=[-1]> (c) e = Add (d, small) f = Sqrt (e) g = Div (b, f) "
    "h = Mul (g, row) y = Add (h, row)",
    "gelu": "a = Erf (x) b = Add (a, one) c = Mul (x, b) y = Mul (c, half)",
    "embedding": "y = Gather (table, rows)",
    "mean of tokens": "y = ReduceMean <axes=[1]> (x)",
    "largest of rows": "y = ReduceMax <axes=[-1]> (x)",
    "sums": "a = ReduceSum (x) y = ReduceL2 <axes=[-1]> (x)",
    "product of two": "a = Transpose <perm=[0,2,1]> (x) y = MatMul (x, a)",
    "log softmax": "y = LogSoftmax (x)",
    "running sum": "y = CumSum (x, sums_axis)",
}
CONSTANTS["sums_axis"] = np.array(1, I64)
FAMILIES = {
    "convolutions": (IMAGE, CONVOLUTIONS),
    "windows": (IMAGE, WINDOWS),
    "elementwise": (IMAGE, ELEMENTWISE),
    "transformers": (TOKENS, TRANSFORMERS),
}


def graph(signature: str, body: str) -> ir.Model:
    """Build one graph of the zoo."""
    used = {
        name: array for name, array in CONSTANTS.items() if f"{name})" in body or f"{name}," in body
    }
    used = {name: array for name, array in used.items() if f" {name}" in body or f"({name}" in body}
    opset = 18 if "Mish" in body else 17
    return shaped(net(signature, body, used, opset=opset))
