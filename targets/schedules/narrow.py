"""Four vectors of accumulators become one vector of 8-bit outputs: wide stores for small channels.

Instructions that narrow with saturation (`vpackssdw` and `vpackuswb`, `sqxtn`) clamp to the limits
of the dtype for nothing, and one store takes what four would. Rounding is that of docs/integer.md
to the bit: clamping to integers before rounding or after it is the same, as rounding is monotone
and leaves integers alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm import tirx

from edgepress.targets.isa.base import Isa
from edgepress.targets.schedules.emit import Expr, cast, splat
from edgepress.targets.schedules.epilogue import (
    Added,
    Epilogue,
    Requantise,
    Shift,
    divided,
    shifted,
    weighted_sum,
)

LIMITS = {"uint8": (0, 255), "int8": (-128, 127)}


def can_narrow(epilogue: Epilogue, isa: Isa) -> bool:
    """Tell whether `narrowed` can make these outputs."""
    final = epilogue.final if isinstance(epilogue, Added) else epilogue
    if not isinstance(final, Requantise) or final.dtype not in LIMITS:
        return False
    return final.dtype == isa.storage and isa.narrow is not None


def narrowed(
    accumulators: Sequence[Expr],
    factors: Sequence[Expr],
    epilogue: Epilogue,
    isa: Isa,
    residuals: Sequence[Expr] = (),
) -> Expr:
    """Turn up to four vectors of int32 accumulators into one vector with the outputs in order.

    Where there are fewer than four, the rest of the result means nothing.

    Args:
        accumulators: whole vectors.
        factors: of every vector, as `finish` takes them.
        epilogue: one that `can_narrow`.
        isa: the instruction set.
        residuals: of every vector, for `Added`.
    """
    assert isa.narrow is not None
    final = epilogue.final if isinstance(epilogue, Added) else epilogue
    assert isinstance(final, Requantise)
    if isinstance(epilogue, Added):
        vectors = [
            _sum(_centred(a, f, epilogue.inner, isa), r, epilogue, isa)
            for a, f, r in zip(accumulators, factors, residuals, strict=True)
        ]
    else:
        vectors = [_rounded(a, f, final, isa) for a, f in zip(accumulators, factors, strict=True)]
    vectors += vectors[-1:] * (4 - len(vectors))
    outputs = isa.narrow(vectors, final.zero_point)
    lanes, (least, most) = 4 * isa.lanes, LIMITS[final.dtype]
    if final.low > least:
        outputs = tirx.Max(outputs, splat(final.low, final.dtype, lanes))
    if final.high < most:
        outputs = tirx.Min(outputs, splat(final.high, final.dtype, lanes))
    return outputs


def _rounded(accumulator: Expr, factor: Expr, epilogue: Requantise, isa: Isa) -> Expr:
    """Scale and round; clamped no more than rounding needs."""
    if isinstance(epilogue, Shift):
        return shifted(accumulator, factor, epilogue.left, isa.lanes)
    return _nearest(cast(accumulator, "float32", isa.lanes) * factor, epilogue, isa)


def _nearest(scaled: Expr, epilogue: Requantise, isa: Isa) -> Expr:
    assert isa.nearest is not None
    if not epilogue.fits:  # `nearest` answers anything beyond int32
        high = splat(float(epilogue.high - epilogue.zero_point), "float32", isa.lanes)
        scaled = tirx.Min(scaled, high)
    return isa.nearest(scaled)


def _centred(accumulator: Expr, factor: Expr, inner: Epilogue, isa: Isa) -> Expr:
    """Return the output that a residual is added to, less its zero point."""
    assert isinstance(inner, Requantise)
    low, high = (
        splat(limit - inner.zero_point, "int32", isa.lanes) for limit in (inner.low, inner.high)
    )
    return tirx.Max(tirx.Min(_rounded(accumulator, factor, inner, isa), high), low)


def _sum(own: Expr, residual: Expr, epilogue: Added, isa: Isa) -> Expr:
    """Add the residual, scale and round."""
    lanes, final = isa.lanes, epilogue.final
    assert isinstance(final, Requantise)
    other = cast(residual, "int32", lanes) - splat(epilogue.residual_zero_point, "int32", lanes)
    total = weighted_sum([own, other], epilogue.factors, lanes)
    if isinstance(final, Shift):
        return divided(total, int(epilogue.factor), lanes)
    scaled = cast(total, "float32", lanes) * splat(epilogue.factor, "float32", lanes)
    return _nearest(scaled, final, isa)
