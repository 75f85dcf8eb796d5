"""Small nets in fixed point, and what the tests of quantize-fixed-point share."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from edgepress.calibration.base import Array, Samples
from edgepress.passes._shapes import refresh_shapes
from edgepress.passes.base import Context, Outcome
from edgepress.passes.calibrate import Calibrate
from edgepress.passes.quantize_fixed_point import QuantizeFixedPoint
from tests.graphs import apply, random, weight
from tests.passes.int8_nets import made, samples_of

SQNR_BUDGET_DB = {8: 20.0, 16: 50.0}


def fixed(model: ir.Model, samples: Samples | None = None, **options: Any) -> Outcome:
    """Calibrate, quantize, and check what every pass promises."""
    context = Context(samples=samples or samples_of(model))
    Calibrate().call(model, context)
    outcome = apply(QuantizeFixedPoint(**options), model, context)
    refresh_shapes(outcome.model)
    return outcome


def serialized(model: ir.Model) -> bytes:
    content: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return content


def residual() -> ir.Model:
    return made(
        "(float[1,4,4,4] x) => (float[1,4] y)",
        "c = Conv <pads=[1,1,1,1]> (x, w) a = Add(c, x) r = Relu(a) "
        "g = GlobalAveragePool(r) y = Flatten(g)",
        w=random(4, 4, 3, 3),
    )


def concat() -> ir.Model:
    return made(
        "(float[1,8,6,6] x) => (float[1,4,6,6] y)",
        "a = Conv(x, v) b = Conv(x, w) r = Relu(b) s = Relu(a) k = Concat <axis=1> (s, r) "
        "y = Conv(k, u)",
        v=random(64, 8, 1, 1),
        w=random(64, 8, 1, 1),
        u=random(4, 128, 1, 1),
    )


def mixed() -> ir.Model:
    """small_cnn with a product of activations in place of the table of a HardSigmoid."""
    return made(
        "(float[1,3,8,8] x) => (float[1,5] y)",
        "c = Conv <pads=[1,1,1,1]> (x, w1, b1) r = Relu(c) "
        "d = Conv <pads=[1,1,1,1], group=6> (r, w2, b2) e = Clip(d, zero, six) a = Add(r, e) "
        "m = MaxPool <kernel_shape=[2,2], strides=[2,2]> (a) t = Conv(m, w3) h = Mul(t, t) "
        "u = Mul(h, half) g = GlobalAveragePool(u) f = Flatten(g) y = Gemm(f, w4, b4)",
        w1=random(6, 3, 3, 3), b1=random(6), w2=random(6, 1, 3, 3), b2=random(6, seed=1),
        w3=random(4, 6, 1, 1), w4=random(4, 5), b4=random(5), half=random(4, 1, 1),
        zero=np.array(0, np.float32), six=np.array(6, np.float32),
    )  # fmt: skip


def parameters(model: ir.Model) -> list[tuple[Array, Array, Array | None]]:
    """Scale, zero point and stored integers of all quantizing nodes."""
    found = []
    for node in model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            source, scale, zero = node.inputs
            assert source is not None
            assert scale is not None
            assert zero is not None
            stored = weight(model, source.name or "") if source.is_initializer() else None
            found.append((weight(model, scale.name or ""), weight(model, zero.name or ""), stored))
    return found
