"""ResNet-18 and MobileNetV2 as ONNX with random weights: for speed and size, not for accuracy.

A network is written down as its paper's table says, with BatchNorm in place. Convolutions are
He-initialised, the statistics of every BatchNorm are measured on real images, so that activations
keep the spread that they have in a trained network, and the classifier's bias takes the mean of its
outputs away, so that answers differ from image to image. They still mean nothing.

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


@dataclass
class _Net:
    """A graph that grows node by node; every method returns the name of the new value."""

    seed: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, Floats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)

    def node(self, operator: str, inputs: list[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [name], name, **attributes))
        return name

    def normal(self, shape: tuple[int, ...], spread: float) -> Floats:
        return self.random.standard_normal(shape, np.float32) * np.float32(spread)

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
        model = self.model(name)
        onnx.checker.check_model(model, full_check=True)
        return model

    def model(self, name: str) -> onnx.ModelProto:
        shapes: dict[str, list[str | int]] = {
            "input": ["N", 3, PIXELS, PIXELS],
            "logits": ["N", CLASSES],
        }
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
        training = self.model("training")
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
