from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgepress.passes._channel_scales import ChannelScales, analyse
from tests.graphs import random
from tests.passes.int8_nets import made


def free(scales: ChannelScales, model: ir.Model, name: str) -> list[bool]:
    """Which channels of a value may be scaled."""
    (value,) = (v for node in model.graph for v in node.outputs if v.name == name)
    return [scales.why(int(n)) is None for n in scales.find(scales.channels[value])]


WEIGHTS: dict[str, Any] = {
    "w": random(4, 4, 1, 1), "v": random(4, 4, 1, 1, seed=1), "u": random(3, 4, 1, 1),
    "g": random(16, 5), "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64),
    "one": np.array(1, np.float32), "slope": np.full((4, 1, 1), 0.1, np.float32),
    "flat": np.array([1, 16], np.int64), "swap": np.array([1, 2, 2, 4], np.int64),
}  # fmt: skip


@pytest.mark.parametrize(
    ("between", "scalable"),
    [
        ("t = Relu(c)", True),
        ("t = LeakyRelu <alpha=0.2> (c)", True),
        ("t = PRelu(c, slope)", True),
        ("t = AveragePool <kernel_shape=[1,1]> (c)", True),
        ("p = Pad(c, pads) t = MaxPool <kernel_shape=[3,3]> (p)", True),
        ("p = Pad(c, pads, one) t = MaxPool <kernel_shape=[3,3]> (p)", False),
        ("t = Tanh(c)", False),
        ("t = Add(c, one)", False),
        ("t = Mul(c, c)", False),
        ("q = Transpose <perm=[0,2,3,1]> (c) t = Transpose <perm=[0,3,1,2]> (q)", False),
    ],
)
def test_what_lets_a_factor_through(between: str, scalable: bool) -> None:
    model = made(
        "(float[1,4,2,2] x) => (float[1,3,2,2] y)",
        f"c = Conv(x, w) {between} y = Conv(t, u)",
        **WEIGHTS,
    )
    assert free(analyse(model), model, "c") == [scalable] * 4


def test_channels_become_parts_of_a_vector() -> None:
    model = made(
        "(float[1,4,2,2] x) => (float[1,5] y)",
        "c = Conv(x, w) f = Reshape(c, flat) y = Gemm(f, g)",
        **WEIGHTS,
    )
    scales = analyse(model)
    assert free(scales, model, "c") == [True] * 4
    (gemm,) = (layer for layer in scales.layers if layer.node.op_type == "Gemm")
    (conv,) = (layer for layer in scales.layers if layer.node.op_type == "Conv")
    np.testing.assert_array_equal(gemm.read, np.repeat(conv.written, 4))


def test_one_frozen_operand_freezes_an_addition() -> None:
    model = made(
        "(float[1,4,2,2] x) => (float[1,4,2,2] y)",
        "c = Conv(x, w) d = Conv(c, v) s = Add(d, x) y = Conv(s, z)",
        z=random(4, 4, 1, 1, seed=2),
        **WEIGHTS,
    )
    scales = analyse(model)
    assert free(scales, model, "d") == [False] * 4
    assert free(scales, model, "c") == [True] * 4


def test_what_a_subgraph_reads_is_frozen() -> None:
    model = made(
        "(float[1,4,2,2] x, bool b) => (float[1,4,2,2] y)",
        "c = Conv(x, w) y = If (b) <then_branch = t () => (float[1,4,2,2] r) { r = Relu(c) }, "
        "else_branch = e () => (float[1,4,2,2] r) { r = Tanh(c) }>",
        **WEIGHTS,
    )
    assert free(analyse(model), model, "c") == [False] * 4


def test_a_mean_over_channels_is_no_pool() -> None:
    model = made(
        "(float[1,4,4,4] x) => (float[1,4,4] y)",
        "c = Conv(x, w) y = ReduceMean <axes=[1], keepdims=0> (c)",
        **WEIGHTS,
    )
    assert free(analyse(model), model, "c") == [False] * 4
