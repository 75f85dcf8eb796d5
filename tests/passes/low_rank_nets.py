"""Small nets, and what the tests of low rank share."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir

from edgepress.calibration.base import Samples
from edgepress.passes._candidates import Candidate, candidates, put
from edgepress.passes._moments import Moments, input_moments
from edgepress.passes._shapes import refresh_shapes
from edgepress.passes.base import Context, Outcome
from tests.graphs import Array, net, random

SIGNATURE = "(float[1,8,8,8] x) => (float[1,10] y)"
BODY = """
a = Conv <pads=[1,1,1,1]> (x, wide, bias)
r = Relu(a)
d = Conv <group=24, pads=[1,1,1,1]> (r, depthwise)
p = Conv (d, point)
q = GlobalAveragePool(p)
f = Flatten(q)
g = Gemm <transB=1> (f, dense)
h = Clip(g, low, high)
m = MatMul(h, last)
y = Add(m, shift)
"""
WEIGHTS: dict[str, Array] = {
    "wide": random(24, 8, 3, 3),
    "bias": random(24),
    "depthwise": random(24, 1, 3, 3),
    "point": random(16, 24, 1, 1),
    "dense": random(20, 16),
    "last": random(20, 10),
    "shift": random(10),
    "low": np.array(-9, np.float32),
    "high": np.array(9, np.float32),
}
LAYERS = ["Conv_0", "Conv_3", "Gemm_6", "MatMul_8"]  # those that can be decomposed


def samples(count: int = 24) -> Samples:
    """Channels that are mixtures of four, with a mean."""
    rng = np.random.default_rng(0)
    mixed = np.einsum("ic,ncab->niab", rng.random((8, 4)), rng.random((count, 4, 8, 8)))
    return Samples({"x": mixed.astype(np.float32)})


def by_name(outcome: Outcome) -> dict[str, str]:
    """What was said about each layer that was replaced."""
    lines = (note.partition(": ") for note in outcome.notes)
    return {name: text for name, _, text in lines if name in LAYERS}


def made(
    signature: str = SIGNATURE, body: str = BODY, weights: Mapping[str, Array] | None = None
) -> ir.Model:
    model = net(signature, body, WEIGHTS if weights is None else weights)
    refresh_shapes(model)
    return model


def first_layer(model: ir.Model) -> ir.Node:
    return next(n for n in model.graph if n.op_type in ("Conv", "Gemm", "MatMul"))


def best(
    node: ir.Node,
    method: str,
    moments: Moments | None = None,
    *,
    align: int = 1,
    rank: int | None = None,
    lost: float = 0.0,
) -> Candidate:
    (found,) = candidates(node, [method], moments, align=align, rank=rank, lost=lost)
    return found


def replaced(model: ir.Model, chosen: Candidate) -> ir.Model:
    """A copy with its first layer replaced, which is valid."""
    copy = model.clone()
    put(first_layer(copy), chosen)
    refresh_shapes(copy)
    onnx.checker.check_model(ir.to_proto(copy), full_check=True)
    names = [node.name for node in copy.graph]
    assert len(set(names)) == len(names)
    return copy


def moments_of(model: ir.Model, data: Array) -> Moments:
    node = first_layer(model)
    ((_, found),) = input_moments("p", model, [node], Samples({"x": data}), Context())
    return found


CONV = "y = Conv <strides=[2,1], pads=[1,1,1,1], dilations=[1,2]> (x, w, b)"


def conv(out: int = 8, into: int = 6) -> ir.Model:
    return made(
        f"(float[1,{into},9,8] x) => (float[N,M,K,L] y)",
        CONV,
        {"w": random(out, into, 3, 3), "b": random(out)},
    )


def mixtures(count: int, channels: int, *extents: int) -> Array:
    """Inputs whose channels are mixtures of three, with a mean."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((channels, 3))
    found = np.tensordot(mixing, rng.standard_normal((3, count, *extents)), 1)
    found += 0.1 * rng.standard_normal(found.shape) + 2 * rng.standard_normal((channels,)).reshape(
        -1, *[1] * (1 + len(extents))
    )
    return np.ascontiguousarray(found.swapaxes(0, 1), np.float32)
