from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest

from edgepress.passes._rescale import match_moments, rescale, scaling_nodes
from edgepress.passes.base import refresh_shapes
from tests.graphs import Array, answers, net, random

NORM = "y = BatchNormalization(x, g, h, m, v)"
MUL_ADD = "t = Mul(x, g) y = Add(t, h)"


def build(body: str, **weights: Array) -> ir.Model:
    given = {
        "g": random(3, 1, 1, seed=1),
        "h": random(3, 1, 1, seed=2),
        "m": random(3),
        "v": np.abs(random(3)) + np.float32(0.1),
    }
    if "BatchNorm" in body:
        given |= {"g": random(3, seed=1), "h": random(3, seed=2)}
    given |= weights
    used = {name: array for name, array in given.items() if re.search(rf"\b{name}\b", body)}
    model = net("(float[1,3,4,4] x) => (float[1,3,4,4] y)", body, used)
    refresh_shapes(model, "test")
    return model


def last(model: ir.Model) -> ir.Node:
    return list(model.graph)[-1]


@pytest.mark.parametrize("body", [NORM, MUL_ADD, "t = Mul(g, x) y = Add(h, t)"])
def test_outputs_are_scaled_and_shifted(body: str) -> None:
    model = build(body)
    feed = {"x": random(1, 3, 4, 4, seed=7)}
    before = answers(model, feed)[0]
    nodes = scaling_nodes(last(model))
    assert nodes is not None
    scale, shift = np.array([2.0, -1.0, 0.5]), np.array([0.0, 3.0, -1.0])
    rescale(nodes, scale, shift)
    want = before * scale.reshape(1, 3, 1, 1) + shift.reshape(1, 3, 1, 1)
    np.testing.assert_allclose(answers(model, feed)[0], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "body",
    [
        "t = Mul(x, x) y = Add(t, h)",
        "y = Add(x, h)",
        "t = Mul(x, g) y = Sub(t, h)",
        "t = Mul(x, g) s = Relu(t) u = Add(t, h) y = Add(u, s)",
        "t = Mul(x, g) u = Add(t, h) y = Add(u, g)",
        "t = Mul(x, row) y = Add(t, h)",
    ],
)
def test_other_nodes_are_no_scale(body: str) -> None:
    model = build(body, row=random(1, 4))
    assert scaling_nodes(last(model)) is None


def test_moments_match_afterwards() -> None:
    rng = np.random.default_rng(0)
    pairs = [
        (3 * rng.standard_normal((50, 4)) + 1, 0.5 * rng.standard_normal((50, 4)) - 2)
        for _ in range(5)
    ]
    scale, shift = match_moments(pairs)
    wanted, found = (np.concatenate(part) for part in zip(*pairs, strict=True))
    mended = found * scale + shift
    np.testing.assert_allclose(mended.mean(axis=0), wanted.mean(axis=0), atol=1e-9)
    np.testing.assert_allclose(mended.std(axis=0), wanted.std(axis=0), rtol=1e-9)


def test_a_constant_channel_is_only_shifted() -> None:
    varying = np.random.default_rng(0).standard_normal((20, 1))
    pair = np.hstack([varying, np.full((20, 1), 7.0)]), np.hstack([np.full((20, 1), 2.0), varying])
    scale, shift = match_moments([pair])
    assert scale.tolist() == [1, 1]
    np.testing.assert_allclose(shift, [varying.mean() - 2, 7 - varying.mean()])
