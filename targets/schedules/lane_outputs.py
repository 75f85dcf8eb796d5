"""The last step of integer kernels whose lanes are in an order of their own: one wide store.

The rules are those of `schedules.epilogue`, to the bit. Where the instruction set packs with
saturation, that also brings the lanes which `schedules.interleave` made into the order of memory,
and of all clamps only that of a fused activation is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx

from edgepress.targets.isa.base import Isa
from edgepress.targets.schedules.emit import Expr, cast, lanes_of, splat
from edgepress.targets.schedules.epilogue import Requantise, Shift, finish, shifted


def outputs_of(
    values: Sequence[Expr],
    factors: Sequence[Expr],
    order: npt.NDArray[np.int64],
    isa: Isa,
    epilogue: Requantise,
) -> Expr:
    """Turn accumulators of neighbouring channels into one vector of outputs.

    Args:
        values: int32 vectors of equal length.
        factors: multipliers or shifts of the same lanes.
        order: which output each lane becomes, over all vectors: where there are `isa.group` > 1 of
            them, the order that `isa.pack` undoes.
        isa: the instruction set.
        epilogue: what to do.
    """
    lanes, size = len(order) // len(values), len(order)
    in_order = bool((order == np.arange(size)).all())
    narrow = isa.narrow if in_order and lanes == isa.lanes else None
    if len(values) == isa.group > 1:
        narrow = isa.pack
    bytes_ = epilogue.dtype != "int16" and epilogue.dtype == isa.storage
    if bytes_ and narrow is not None and isa.nearest is not None:
        rounded = [
            _rounded(value, factor, lanes, isa, epilogue)
            for value, factor in zip(values, factors, strict=True)
        ]
        if narrow is isa.narrow:
            rounded += rounded[-1:] * (4 - len(rounded))
        outputs = lanes_of(narrow(rounded, epilogue.zero_point), 0, size, lanes * len(rounded))
        return _clamped(outputs, epilogue, size)
    if in_order:
        return finish(_joined(values), _joined(factors), epilogue, size)
    finished = [
        finish(value, factor, epilogue, lanes)
        for value, factor in zip(values, factors, strict=True)
    ]
    return tirx.Shuffle(finished, [tirx.const(int(i), "int32") for i in np.argsort(order)])


def _rounded(value: Expr, factor: Expr, lanes: int, isa: Isa, epilogue: Requantise) -> Expr:
    """Scale and round; clamped no more than rounding needs."""
    if isinstance(epilogue, Shift):
        return shifted(value, factor, epilogue.left, lanes)
    scaled = cast(value, "float32", lanes) * factor
    if not epilogue.fits:  # `nearest` answers anything beyond int32
        highest = splat(float(epilogue.high - epilogue.zero_point), "float32", lanes)
        scaled = tirx.Min(scaled, highest)
    assert isa.nearest is not None
    return isa.nearest(scaled)


def _clamped(outputs: Expr, epilogue: Requantise, lanes: int) -> Expr:
    """Clamp outputs to what a fused activation leaves of their dtype."""
    limits: Any = np.iinfo(epilogue.dtype)
    if epilogue.low > limits.min:
        outputs = tirx.Max(outputs, splat(epilogue.low, epilogue.dtype, lanes))
    if epilogue.high < limits.max:
        outputs = tirx.Min(outputs, splat(epilogue.high, epilogue.dtype, lanes))
    return outputs


def _joined(vectors: Sequence[Expr]) -> Expr:
    if len(vectors) == 1:
        return vectors[0]
    lanes = len(vectors) * int(vectors[0].ty.dtype.lanes)
    return tirx.Shuffle(list(vectors), [tirx.const(i, "int32") for i in range(lanes)])
