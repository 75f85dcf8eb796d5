"""Codebooks for many tensors at once that together keep a budget of bits or of error.

The least error for some bits, and the fewest bits for some error, minimise `error + λ·bits` for
one λ that holds for all tensors, whatever the codebooks of the others: Shoham and Gersho,
"Efficient bit allocation for an arbitrary set of quantizers", 1988. So λ is bisected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np

from edgepress.passes._kmeans import Fit, Points

#: Sizes of codebooks that are tried, each refined for the price of bits; and the largest allowed.
RUNGS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
#: Bits make some clusters vanish, so the best size without a price is less than the best to start.
_MORE_RUNGS = 2
#: Bounds of log2 λ, how near it is bisected, and in how many steps.
_LEAST, _MOST, _FINE, _STEPS = -100.0, 20.0, 0.01, 16
#: The share of the budget that may be left, and the least share that is worth a change.
_NEAR, _GAIN = 0.002, 1e-3
#: A share of the budget that counts as nothing.
_LITTLE = 1e-9


class BudgetTooSmall(Exception):
    """No choice keeps to the budget; carries the least bits that there are."""

    def __init__(self, bits: float) -> None:
        self.bits = bits
        super().__init__(f"at least {bits:.0f} bits are needed")


@dataclass
class Item:
    """Points that get a codebook of their own, or stay as they are.

    Attributes:
        points: to be clustered.
        fit: clusters them without a price on bits.
        worth: what one unit of their error is in the error of all.
        raw_bits: what they take as they are, with zeros.
        zero_bits: what is added to the bits of a codebook and its indices, for zeros.
        most: clusters that they may have.
    """

    points: Points
    fit: Callable[[int], Fit]
    worth: float
    raw_bits: float
    zero_bits: float = 0.0
    most: int = 255
    _rungs: list[Fit] = field(default_factory=list)
    _seen: list[Fit] = field(default_factory=list)

    def ladder(self) -> list[Fit]:
        """Return fits of all sizes, those without a price on bits."""
        if not self._rungs:
            # points that share values already may keep them
            most = min(self.most, self.points.distinct)
            self._rungs = [self.fit(size) for size in (*takewhile(most.__gt__, RUNGS), most)]
        return self._rungs

    def best(self, price: float, *, refine: bool) -> Fit | None:
        """Return the fit of least error plus price times bits; None leaves the points alone.

        Args:
            price: of a bit, in units of the error of all.
            refine: look also at fits whose points mind the price.
        """
        rungs = self.ladder()
        costs = [self.cost(fit, price) for fit in rungs]
        index = costs.index(min(costs))
        tried = [rungs[index]]
        if refine:
            local = price / self.worth
            starts = [fit.codebook for fit in rungs[index : index + 1 + _MORE_RUNGS]]
            starts += [grid for grid in self.points.grids(local) if len(grid) <= self.most]
            tried += [self.points.lloyd(start, local) for start in starts]
        best = min(tried, key=lambda fit: self.cost(fit, price))
        if refine:
            self._seen.append(best)
        return best if self.cost(best, price) < self.cost(None, price) else None

    def seen(self) -> list[Fit | None]:
        """Return all fits that were the best for some price, and those of the ladder."""
        return [None, *self.ladder(), *self._seen]

    def bits(self, fit: Fit | None) -> float:
        """Return what the points take with this fit."""
        return self.raw_bits if fit is None else fit.bits + self.zero_bits

    def error(self, fit: Fit | None) -> float:
        """Return their share in the error of all."""
        return 0.0 if fit is None else fit.error * self.worth

    def cost(self, fit: Fit | None, price: float) -> float:
        """Return error plus price times bits."""
        return self.error(fit) + price * self.bits(fit)


def fits_within(
    items: Sequence[Item],
    *,
    bits: float | None = None,
    error: float | None = None,
    progress: Callable[[str, int, int], None],
) -> list[Fit | None]:
    """Return a fit for every item: least error within so many bits, or fewest bits within an error.

    Args:
        items: what gets codebooks.
        bits: the budget for all of them together; or
        error: the largest sum of their errors.
        progress: told of every step.

    Raises:
        BudgetTooSmall: even one cluster per codebook takes more bits.
    """
    for number, item in enumerate(items, 1):
        item.ladder()
        progress("cluster weights", number, len(items))
    least = sum(min(item.bits(None), item.bits(item.ladder()[0])) for item in items)
    if bits is not None and least > bits:
        raise BudgetTooSmall(least)

    of_bits = bits is not None
    limit = (error or 0.0) if bits is None else bits

    def choose(log_price: float, *, refine: bool) -> tuple[list[Fit | None], bool, bool]:
        """Return fits for a price, whether they keep to the budget, and whether they use it up."""
        fits = [item.best(2.0**log_price, refine=refine) for item in items]
        pairs = zip(items, fits, strict=True)
        used = sum(item.bits(fit) if of_bits else item.error(fit) for item, fit in pairs)
        return fits, used <= limit, limit * (1 - _NEAR) <= used <= limit

    # the price for codebooks as they are is near the one for refined ones, and found in no time
    low, high = _LEAST, _MOST
    while high - low > _FINE:
        middle = (low + high) / 2
        keeps = choose(middle, refine=False)[1]
        # a higher price leads to fewer bits and more error
        low, high = (low, middle) if keeps == of_bits else (middle, high)
    price, stride, best = (low + high) / 2, 1.0, None
    low, high = _LEAST, _MOST
    for step in range(_STEPS):
        fits, keeps, used_up = choose(price, refine=True)
        progress("choose clusters", step + 1, _STEPS)
        best = fits if keeps else best
        if used_up or high - low <= _FINE:
            break
        if keeps == of_bits:
            high = price
            price = (low + high) / 2 if low > _LEAST else max(price - stride, _LEAST)
        else:
            low = price
            price = (low + high) / 2 if high < _MOST else min(price + stride, _MOST)
        stride *= 2
    best = best if best is not None else [None] * len(items)
    return _with_the_rest(items, best, limit, of_bits=of_bits)


def _with_the_rest(
    items: Sequence[Item], fits: Sequence[Fit | None], limit: float, *, of_bits: bool
) -> list[Fit | None]:
    """Use up what is left of a budget, which may be much where there are few items.

    One price leaves out fits that are the best for none. Step by step, the item changes its fit
    that gains most of the one for what it takes of the other.
    """
    fits = list(fits)
    options = [(index, fit) for index, item in enumerate(items) for fit in item.seen()]
    owners = np.array([index for index, _ in options])
    bits_of = np.array([items[index].bits(fit) for index, fit in options])
    error_of = np.array([items[index].error(fit) for index, fit in options])
    gains_of, costs_of = (error_of, bits_of) if of_bits else (bits_of, error_of)
    while True:
        used = np.array([item.bits(fit) for item, fit in zip(items, fits, strict=True)])
        lost = np.array([item.error(fit) for item, fit in zip(items, fits, strict=True)])
        gains, costs = (lost, used) if of_bits else (used, lost)
        gained, taken = gains[owners] - gains_of, costs_of - costs[owners]
        allowed = (gained > _GAIN * gains[owners]) & (taken <= limit - costs.sum())
        if not allowed.any():
            return fits
        # what takes less of both comes first
        rates = np.where(allowed, gained / np.maximum(taken, _LITTLE * limit), 0.0)
        owner, fit = options[int(rates.argmax())]
        fits[owner] = fit
