"""Small nets, and what the tests of 8-bit quantization share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from edgepress.calibration.base import Array, Samples
from edgepress.passes._shapes import refresh_shapes
from edgepress.passes.base import Context, Outcome
from edgepress.passes.calibrate import Calibrate
from edgepress.passes.quantize_int8 import QuantizeInt8
from tests.graphs import answers, apply, net, random

#: 8-bit weights and activations on a net of random weights, a few layers deep.
SQNR_BUDGET_DB = 25.0
PAIR = ("QuantizeLinear", "DequantizeLinear")


def made(signature: str, body: str, *, opset: int = 17, **weights: Array) -> ir.Model:
    model = net(signature, body, weights, opset=opset)
    refresh_shapes(model)
    return model


def samples_of(model: ir.Model, n: int = 8) -> Samples:
    shapes = {v.name or "": v.shape.numpy()[1:] for v in model.graph.inputs if v.shape}
    return Samples({name: random(n, *shape, seed=7) for name, shape in shapes.items()})


def quantized(model: ir.Model, *, samples: Samples | None = None, **options: Any) -> Outcome:
    """Calibrate, quantize, and check what every pass promises.

    The model is changed in place, unless 16 bits bring it to another opset.
    """
    context = Context(samples=samples or samples_of(model))
    Calibrate().call(model, context)
    outcome = apply(QuantizeInt8(**options), model, context)
    refresh_shapes(outcome.model)
    return outcome


def sqnr_db(before: ir.Model, after: ir.Model) -> float:
    """Signal to quantization noise over the samples that were calibrated with."""
    shapes = {v.name or "": v.shape.numpy() for v in before.graph.inputs if v.shape}
    signal = noise = 0.0
    for feed in samples_of(before).feeds(shapes):
        for want, got in zip(answers(before, feed), answers(after, feed), strict=True):
            signal += float(np.sum(want.astype(float) ** 2))
            noise += float(np.sum((want - got).astype(float) ** 2))
    return 10 * np.log10(signal / noise) if noise else np.inf


def consumers(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Value]]:
    """Every node that computes, with each of its float inputs."""
    for node in model.graph:
        if node.op_type not in PAIR:
            yield from ((node, v) for v in node.inputs if v and v.dtype == ir.DataType.FLOAT)


def maker(value: ir.Value) -> str:
    """The operator that makes a value, or "" for inputs and constants."""
    producer = value.producer()
    return producer.op_type if producer else ""


def parameters(model: ir.Model, name: str) -> tuple[str, str]:
    """The names of the scale and zero point that quantize a value."""
    by_name = [v for n in model.graph for v in n.outputs if v.name == name]
    by_name += [v for v in model.graph.inputs if v.name == name]
    (node,) = (n for n in model.graph if n.op_type == PAIR[0] and n.inputs[0] in by_name)
    scale, zero_point = node.inputs[1:]
    assert scale is not None
    assert zero_point is not None
    return str(scale.name), str(zero_point.name)


def conv_relu() -> ir.Model:
    return made(
        "(float[1,3,6,6] x) => (float[1,4,4,4] y)",
        "c = Conv(x, w, b) y = Relu(c)",
        w=random(4, 3, 3, 3),
        b=random(4),
    )


def small_cnn() -> ir.Model:
    return made(
        "(float[1,3,8,8] x) => (float[1,5] y)",
        "c = Conv <pads=[1,1,1,1]> (x, w1, b1) r = Relu(c) "
        "d = Conv <pads=[1,1,1,1], group=6> (r, w2, b2) e = Clip(d, zero, six) a = Add(r, e) "
        "m = MaxPool <kernel_shape=[2,2], strides=[2,2]> (a) t = Conv(m, w3) h = HardSigmoid(t) "
        "u = Mul(h, half) g = GlobalAveragePool(u) f = Flatten(g) y = Gemm(f, w4, b4)",
        w1=random(6, 3, 3, 3), b1=random(6), w2=random(6, 1, 3, 3), b2=random(6, seed=1),
        w3=random(4, 6, 1, 1), w4=random(4, 5), b4=random(5),
        half=np.full((4, 1, 1), 0.5, np.float32), zero=np.array(0, np.float32),
        six=np.array(6, np.float32),
    )  # fmt: skip
