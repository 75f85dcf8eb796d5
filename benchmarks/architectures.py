"""ResNet-18, MobileNetV2 and a transformer encoder as ONNX with random weights: for speed and size.

A network is written down as its paper's table says, with BatchNorm in place. Convolutions are
He-initialised, the statistics of every BatchNorm are measured on real images, so that activations
keep the spread that they have in a trained network, and the classifier's bias takes the mean of its
outputs away, so that answers differ from image to image. They still mean nothing. The encoder is
initialised as PyTorch does it, and nothing is measured.

    model = resnet18(images)    # float32 [n, 3, 224, 224]
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import helper, numpy_helper

Floats = npt.NDArray[np.float32]

PIXELS, CLASSES, OPSET = 224, 1000, 17
IMAGE_SHAPES: dict[str, list[str | int]] = {
    "input": ["N", 3, PIXELS, PIXELS],
    "logits": ["N", CLASSES],
}
TOKENS, WIDTH, HEADS, LAYERS, ANSWERS = 128, 384, 6, 4, 100
BATCH_NORM_WEIGHTS = ("gamma", "beta", "mean", "variance")
# expansion, output channels, repeats, stride of the first: Sandler et al., table 2
MOBILENETV2_ROWS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def resnet18(images: Floats, seed: int = 0) -> onnx.ModelProto:
    """Build ResNet-18: 11.69 M parameters, 1.81 G multiply-accumulates, batch dynamic.

    `images` [n, 3, 224, 224] sets the statistics. `input` [N, 3, 224, 224] float32 ->
    `logits` [N, 1000]. Shortcuts are projected by 1x1 convolutions where the shape changes.

    He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, table 1 and option B.
    """
    net = _Net(seed)
    x = net.relu(net.conv_norm("input", "stem", 3, 64, 7, stride=2))
    x = net.node("MaxPool", [x], "stem_pool", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    inputs = 64
    for stage, outputs in enumerate((64, 128, 256, 512), 1):
        for block in (1, 2):
            name, stride = f"stage{stage}_block{block}", 1 + (stage > 1 and block == 1)
            y = net.relu(net.conv_norm(x, f"{name}_conv1", inputs, outputs, 3, stride=stride))
            y = net.conv_norm(y, f"{name}_conv2", outputs, outputs, 3)
            if stride > 1:
                x = net.conv_norm(x, f"{name}_shortcut", inputs, outputs, 1, stride=stride)
            x = net.relu(net.node("Add", [y, x], f"{name}_add"))
            inputs = outputs
    return net.finish(x, inputs, "resnet18", images)


def mobilenetv2(images: Floats, seed: int = 0) -> onnx.ModelProto:
    """Build MobileNetV2 1.0: 3.50 M parameters, 0.30 G multiply-accumulates, batch dynamic.

    `images` [n, 3, 224, 224] sets the statistics. `input` [N, 3, 224, 224] float32 ->
    `logits` [N, 1000].

    Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018, table 2.
    """
    net = _Net(seed)
    x, inputs, block = net.relu6(net.conv_norm("input", "stem", 3, 32, 3, stride=2)), 32, 0
    for expansion, outputs, repeats, first_stride in MOBILENETV2_ROWS:
        for repeat in range(repeats):
            block += 1
            name, wide = f"block{block}", inputs * expansion
            stride, y = first_stride if repeat == 0 else 1, x
            if expansion > 1:
                y = net.relu6(net.conv_norm(y, f"{name}_expand", inputs, wide, 1))
            y = net.conv_norm(y, f"{name}_depthwise", wide, wide, 3, stride=stride, group=wide)
            y = net.conv_norm(net.relu6(y), f"{name}_project", wide, outputs, 1)
            same = stride == 1 and inputs == outputs
            x, inputs = net.node("Add", [y, x], f"{name}_add") if same else y, outputs
    x = net.relu6(net.conv_norm(x, "head", inputs, 1280, 1))
    return net.finish(x, 1280, "mobilenetv2", images)


def encoder(seed: int = 0) -> onnx.ModelProto:
    """Build a transformer encoder: 7.14 M parameters, 0.96 G multiply-accumulates, batch dynamic.

    `x` [N, 128, 384] float32 -> `y` [N, 100]: 4 layers that normalise first, 6 heads, 1536 hidden
    channels with GELU, then the mean over all tokens and a linear layer. Weights and biases are
    uniform within 1 / sqrt(inputs), as in PyTorch's `nn.Linear`.

    Vaswani et al., "Attention Is All You Need", NeurIPS 2017, with the normalisation in front of
    every block: Xiong et al., "On Layer Normalization in the Transformer Architecture", ICML 2020.
    """
    net = _Net(seed)
    net.weights |= {
        "heads": np.array([0, TOKENS, HEADS, WIDTH // HEADS], np.int64),
        "joined": np.array([0, TOKENS, WIDTH], np.int64),
        "temperature": np.array((WIDTH / HEADS) ** -0.5, np.float32),
        "sqrt_2": np.array(math.sqrt(2), np.float32),
        "one": np.ones((), np.float32),
        "half": np.array(0.5, np.float32),
    }
    x = "x"
    for layer in range(LAYERS):
        x = net.attention(x, f"layer{layer}_attention")
        name = f"layer{layer}_feed_forward"
        hidden = net.linear(net.layer_norm(x, name), f"{name}_up", WIDTH, 4 * WIDTH)
        y = net.linear(net.gelu(hidden), f"{name}_down", 4 * WIDTH, WIDTH)
        x = net.node("Add", [x, y], f"{name}_sum")
    pooled = net.node("ReduceMean", [net.layer_norm(x, "last")], "pooled", axes=[1], keepdims=0)
    weights = {"answer_weight": (ANSWERS, WIDTH), "answer_bias": (ANSWERS,)}
    net.weights |= {name: net.uniform(shape, WIDTH) for name, shape in weights.items()}
    net.node("Gemm", [pooled, *weights], "y", transB=1)
    model = net.model("encoder", {"x": ["N", TOKENS, WIDTH], "y": ["N", ANSWERS]})
    onnx.checker.check_model(model, full_check=True)
    return model


@dataclass
class _Net:
    """A graph that grows node by node; every method returns the name of the new value."""

    seed: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, npt.NDArray[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)

    def node(self, operator: str, inputs: list[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [name], name, **attributes))
        return name

    def normal(self, shape: tuple[int, ...], spread: float) -> Floats:
        return self.random.standard_normal(shape, np.float32) * np.float32(spread)

    def uniform(self, shape: tuple[int, ...], inputs: int) -> Floats:
        """Weights or biases as PyTorch starts a linear layer with so many inputs."""
        bound = 1 / math.sqrt(inputs)
        return self.random.uniform(-bound, bound, shape).astype(np.float32)

    def relu(self, x: str) -> str:
        return self.node("Relu", [x], f"{x}_relu")

    def relu6(self, x: str) -> str:
        self.weights |= {"zero": np.zeros((), np.float32), "six": np.full((), 6, np.float32)}
        return self.node("Clip", [x, "zero", "six"], f"{x}_relu6")

    def conv_norm(
        self, x: str, name: str, inputs: int, outputs: int, size: int, stride: int = 1,
        group: int = 1,
    ) -> str:  # fmt: skip
        """Add a Conv [outputs, inputs/group, size, size] without bias, and its BatchNorm."""
        shape = (outputs, inputs // group, size, size)
        # He et al., "Delving Deep into Rectifiers", 2015: spread sqrt(2 / fan in)
        self.weights[f"{name}_weight"] = self.normal(shape, math.sqrt(2 / math.prod(shape[1:])))
        self.node(
            "Conv", [x, f"{name}_weight"], name, kernel_shape=[size, size],
            strides=[stride, stride], pads=[size // 2] * 4, group=group,
        )  # fmt: skip
        names = [f"{name}_{weight}" for weight in BATCH_NORM_WEIGHTS]
        # channels differ in scale, as they do after training
        gamma = self.random.uniform(0.5, 1.5, outputs).astype(np.float32)
        beta = self.normal((outputs,), 0.2)
        placeholders = np.zeros(outputs, np.float32), np.ones(outputs, np.float32)
        self.weights |= dict(zip(names, (gamma, beta, *placeholders), strict=True))
        return self.node("BatchNormalization", [name, *names], f"{name}_norm")

    def linear(self, x: str, name: str, inputs: int, outputs: int) -> str:
        """Add a MatMul with a weight [inputs, outputs] and the Add of its bias."""
        weight, bias = f"{name}_weight", f"{name}_bias"
        self.weights[weight] = self.uniform((outputs, inputs), inputs).T
        self.weights[bias] = self.uniform((outputs,), inputs)
        return self.node("Add", [self.node("MatMul", [x, weight], name), bias], f"{name}_biased")

    def layer_norm(self, x: str, name: str) -> str:
        names = f"{name}_gamma", f"{name}_beta"
        ends = np.ones(WIDTH, np.float32), np.zeros(WIDTH, np.float32)
        self.weights |= dict(zip(names, ends, strict=True))
        return self.node("LayerNormalization", [x, *names], f"{name}_norm", epsilon=1e-5)

    def gelu(self, x: str) -> str:
        """Add x (1 + erf(x / sqrt 2)) / 2, in the steps in which PyTorch exports it."""
        inner = self.node("Erf", [self.node("Div", [x, "sqrt_2"], f"{x}_scaled")], f"{x}_erf")
        product = self.node("Mul", [x, self.node("Add", [inner, "one"], f"{x}_gate")], f"{x}_gated")
        return self.node("Mul", [product, "half"], f"{x}_gelu")

    def attention(self, x: str, name: str) -> str:
        """Add normalisation, self-attention over all tokens, and the sum with x."""
        normed = self.layer_norm(x, name)
        split = {}
        for part, order in (
            ("query", (0, 2, 1, 3)),
            ("key", (0, 2, 3, 1)),
            ("value", (0, 2, 1, 3)),
        ):
            projected = self.linear(normed, f"{name}_{part}", WIDTH, WIDTH)
            headed = self.node("Reshape", [projected, "heads"], f"{name}_{part}_heads")
            split[part] = self.node("Transpose", [headed], f"{name}_{part}_split", perm=order)
        scores = self.node("MatMul", [split["query"], split["key"]], f"{name}_products")
        scores = self.node("Mul", [scores, "temperature"], f"{name}_scores")
        shares = self.node("Softmax", [scores], f"{name}_shares", axis=-1)
        mixed = self.node("MatMul", [shares, split["value"]], f"{name}_mixed")
        ordered = self.node("Transpose", [mixed], f"{name}_ordered", perm=[0, 2, 1, 3])
        joined = self.node("Reshape", [ordered, "joined"], f"{name}_joined")
        output = self.linear(joined, f"{name}_output", WIDTH, WIDTH)
        return self.node("Add", [x, output], f"{name}_sum")

    def finish(self, x: str, channels: int, name: str, images: Floats) -> onnx.ModelProto:
        """Add pooling and the classifier, and set what is measured on the images."""
        self.node("Flatten", [self.node("GlobalAveragePool", [x], "pool")], "features")
        weight = self.normal((CLASSES, channels), math.sqrt(1 / channels))
        bias = np.zeros(CLASSES, np.float32)
        self.weights |= {"classifier_weight": weight, "classifier_bias": bias}
        self.node("Gemm", ["features", "classifier_weight", "classifier_bias"], "logits", transB=1)
        measured = self.measure(images)
        # untrained features are alike on all images; without this one class would win on most
        bias -= weight @ measured.pop("features").mean(0)
        self.weights |= measured
        model = self.model(name, IMAGE_SHAPES)
        onnx.checker.check_model(model, full_check=True)
        return model

    def model(self, name: str, shapes: dict[str, list[str | int]]) -> onnx.ModelProto:
        x, y = (
            helper.make_tensor_value_info(end, onnx.TensorProto.FLOAT, shape)
            for end, shape in shapes.items()
        )
        initializers = [numpy_helper.from_array(array, w) for w, array in self.weights.items()]
        graph = helper.make_graph(self.nodes, name, [x], [y], initializers)
        opset = helper.make_opsetid("", OPSET)
        return helper.make_model(graph, opset_imports=[opset], ir_version=8)

    def measure(self, images: Floats) -> dict[str, Floats]:
        """Return mean and variance of every BatchNorm's input, and the features [n, channels].

        In training mode BatchNormalization normalises with the statistics of the batch and hands
        them out; with momentum 0 nothing of the old ones is left in them.
        """
        training = self.model("training", IMAGE_SHAPES)
        values = {"features": "features"}
        for node in training.graph.node:
            if node.op_type == "BatchNormalization":
                node.attribute.append(helper.make_attribute("training_mode", 1))
                node.attribute.append(helper.make_attribute("momentum", 0.0))
                measured = {weight: f"{weight}_measured" for weight in node.input[3:5]}
                node.output.extend(measured.values())
                values |= measured
        del training.graph.output[:]
        training.graph.output.extend(
            helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, None)
            for value in values.values()
        )
        session = onnxruntime.InferenceSession(
            training.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        answers: Any = session.run(None, {"input": images})
        return dict(zip(values, answers, strict=True))
