"""Sensitivities made by hand, a timer that needs no device, and a net with heads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from edgepress.passes.base import refresh_shapes
from edgepress.pipeline.sensitivity import Cut, GroupSensitivity, Sensitivity
from tests.graphs import net, random


class ElementTimer:
    """A layer costs as many units as its weights have elements.

    Attributes:
        calls: what it was asked to measure.
    """

    unit, key = "ms", "elements"

    def __init__(self) -> None:
        self.calls: list[Sequence[ir.Model]] = []

    def __call__(self, layers: Sequence[ir.Model]) -> list[float]:
        self.calls.append(layers)
        return [
            float(
                sum(np.prod(v.shape.numpy()) for v in layer.graph.initializers.values() if v.shape)
            )
            for layer in layers
        ]


def of_cuts(name: str, *figures: tuple[float, float | None]) -> GroupSensitivity:
    """A group of 16 channels that loses 4 more per cut; figures are SQNR in dB and cost saved."""
    cuts = [
        Cut(channels=4 * i, sqnr_db=db, agreement=None, macs_saved=100 * i, saved=saved)
        for i, (db, saved) in enumerate(figures, 1)
    ]
    return GroupSensitivity(name=name, channels=16, free=16, layers=[name], cuts=cuts)


def measured(*groups: GroupSensitivity, unit: str | None = "ms") -> Sensitivity:
    """A model of 10 units and 1000 multiply-accumulates."""
    return Sensitivity(
        target="native" if unit else None,
        device="local" if unit else None,
        unit=unit,
        cost=10.0 if unit else None,
        macs=1000,
        samples=4,
        groups=list(groups),
        kept=[],
        unknown=[],
        unmeasured=[],
    )


def attention() -> ir.Model:
    """Two heads of 8 elements on 5 tokens of 7: MatMul_0, _1 and _2 make queries, keys, values."""
    split, heads = np.array([1, 5, 2, 8]), "Transpose<perm=[0, 2, 1, 3]>"
    model = net(
        "(float[1,5,7] x) => (float[1,5,3] y)",
        f"""q = MatMul(x, wq)
            k = MatMul(x, wk)
            v = MatMul(x, wv)
            q4 = Reshape(q, split)
            k4 = Reshape(k, split)
            v4 = Reshape(v, split)
            qh = {heads}(q4)
            kh = Transpose<perm=[0, 2, 3, 1]>(k4)
            vh = {heads}(v4)
            scores = MatMul(qh, kh)
            shares = Softmax(scores)
            mixed = MatMul(shares, vh)
            back = {heads}(mixed)
            flat = Reshape(back, join)
            y = MatMul(flat, wo)""",
        {
            "wq": random(7, 16, seed=1),
            "wk": random(7, 16, seed=2),
            "wv": random(7, 16, seed=3),
            "wo": random(16, 3),
            "split": split,
            "join": np.array([1, 5, 16]),
        },
    )
    refresh_shapes(model, "test")
    return model
