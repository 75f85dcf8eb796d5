"""The transforms of Winograd's minimal filtering F(m×m, 3×3) along one axis.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2016), section 4: with
`n = m + 2`, the `m` outputs of a filter of 3 taps on `n` inputs are `Aᵀ[(G g) ⊙ (Bᵀ d)]`, so that
in two dimensions n² products replace 9 m². The matrices are those of Toom and Cook: data and filter
are evaluated as polynomials at 0, at pairs ±p and at infinity (Barabasz, Anderson, Soodhalter and
Gregg, "Error Analysis and Improving the Accuracy of Winograd Convolution for Deep Neural Networks",
2020, section 2). Both points of a pair share the even and the odd part of their polynomial, which
keeps the number of operations down.

**Errors.** F(4×4) takes ±3/4 and ±3/2 instead of the usual ±1 and ±2: largest error as a share of
the largest output against float64, inputs half zeros as behind a ReLU, normal weights:

| input channels | direct | F(2×2) | F(4×4) at ±1, ±2 | F(4×4) at ±3/4, ±3/2 |
|---:|---:|---:|---:|---:|
| 16 | 2.9e-7 | 1.6e-7 | 2.9e-6 | 8.6e-7 |
| 128 | 7.7e-7 | 2.5e-7 | 5.6e-6 | 1.4e-6 |

All numbers in Bᵀ and G are then exact in float32, as they were, at the price of four additions that
become multiply-adds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Value = Any  # an expression of the kernel under construction, or a NumPy array


@dataclass(frozen=True)
class Arithmetic:
    """How values are computed.

    Attributes:
        scale: multiplies a value by a constant.
        keep: binds a value that is used more than once.
    """

    scale: Callable[[float, Value], Value]
    keep: Callable[[Value], Value]


@dataclass(frozen=True)
class Transform:
    """F(m×m, 3×3).

    Values may be None, which stands for zero: what lies outside the image costs nothing.

    Attributes:
        outputs: m, outputs of a tile along one axis.
        points: the positive point of every pair; there are m / 2.
    """

    outputs: int
    points: tuple[float, ...]

    @property
    def inputs(self) -> int:
        """Inputs of a tile along one axis, n."""
        return self.outputs + 2

    @property
    def products(self) -> int:
        """Products of one tile: its positions, n²."""
        return self.inputs**2

    def data(self, d: Sequence[Value], arithmetic: Arithmetic) -> list[Value]:
        """Return Bᵀ d: n values of n."""
        whole = _polynomial(self.points)
        transformed = [_sum(zip(whole, d[0::2], strict=True), arithmetic)]
        for point in self.points:
            others = _polynomial([p for p in self.points if p != point])
            even = _sum(zip(others, d[2::2], strict=True), arithmetic)
            odd = _sum(zip(others, d[1:-2:2], strict=True), arithmetic)
            transformed += _pair(even, odd, point, arithmetic)
        return [*transformed, _sum(zip(whole, d[1::2], strict=True), arithmetic)]

    def weights(self, g: Sequence[Value], arithmetic: Arithmetic) -> list[Value]:
        """Return G g: n values of 3."""
        transformed = [g[0]]
        for point in self.points:
            even = _sum([(1.0, g[0]), (point**2, g[2])], arithmetic)
            transformed += _pair(even, g[1], point, arithmetic)
        return [*transformed, g[2]]

    def result(self, products: Sequence[Value], arithmetic: Arithmetic, count: int) -> list[Value]:
        """Return the first `count` of the m values Aᵀ of n products.

        Here lies the normalisation of all three transforms.
        """
        first, *pairs, last = products
        norms = [2 * p**2 * math.prod(p**2 - q**2 for q in self.points if q != p)
                 for p in self.points]  # fmt: skip
        sums = [_sum([(1.0, a), (1.0, b)], arithmetic) for a, b in _twos(pairs)]
        differences = [_sum([(1.0, a), (-1.0, b)], arithmetic) for a, b in _twos(pairs)]
        values = []
        for k in range(count):
            parts = differences if k % 2 else sums
            terms = [
                (point**k / norm, part)
                for point, norm, part in zip(self.points, norms, parts, strict=True)
            ]
            if k == 0:
                terms.append((1 / math.prod(-(p**2) for p in self.points), first))
            if k == self.outputs - 1:
                terms.append((1.0, last))
            values.append(_sum(terms, arithmetic))
        return values


F2 = Transform(2, (1.0,))
F4 = Transform(4, (0.75, 1.5))


def _polynomial(points: Sequence[float]) -> list[float]:
    """Coefficients, from the lowest, of the product of all (y - p²)."""
    coefficients = [1.0]
    for point in points:
        shifted = [0.0, *coefficients]
        for power, coefficient in enumerate(coefficients):
            shifted[power] -= point**2 * coefficient
        coefficients = shifted
    return coefficients


def _pair(even: Value, odd: Value, point: float, arithmetic: Arithmetic) -> list[Value]:
    """Return a polynomial at `point` and at `-point`."""
    return [_sum([(1.0, even), (sign * point, odd)], arithmetic) for sign in (1, -1)]


def _twos(values: Sequence[Value]) -> list[tuple[Value, Value]]:
    return list(zip(values[0::2], values[1::2], strict=True))


def _sum(terms: Any, arithmetic: Arithmetic) -> Value:
    """Add `(coefficient, value)` terms: each is one multiply-add, or an addition where it can."""
    # One that needs no multiplication comes first, so that the others need no addition beside it.
    ordered = sorted(
        ((c, value) for c, value in terms if value is not None), key=lambda term: term[0] != 1
    )
    total = None
    for coefficient, value in ordered:
        if total is None:
            total = value if coefficient == 1 else arithmetic.scale(coefficient, value)
        elif abs(coefficient) == 1:
            total = total + value if coefficient == 1 else total - value
        else:
            total = total + arithmetic.scale(coefficient, value)
    return None if total is None else arithmetic.keep(total)
