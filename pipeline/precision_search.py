"""Finds the shortest prefix of a list of moves that holds a gate, with few models made for real.

A prediction is cheap and nearly right, a model is dear and decides. The prediction chooses the
first length. What it was off by at the lengths that were made is interpolated, and the next length
is chosen with that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

#: Figures of `accuracy`; some may be None.
Figures = Mapping[str, Any]
COMPARED = ("sqnr_db", "drop")
#: How many models are made after the first that holds, to see whether less will do.
LOWERED = 3


class PrefixSearch:
    """Says which length to make next, and learns from what became of it.

    While all models miss, each is longer than the last by at least twice as much as that was.

    Attributes:
        found: whether a model that was made holds.
    """

    def __init__(
        self,
        count: int,
        none: Figures,
        predict: Callable[[int], Figures],
        holds: Callable[[Figures], bool],
    ) -> None:
        """Begin with the model without any moves, which does not hold.

        Args:
            count: how many moves there are.
            none: figures of that model.
            predict: says what figures should be, for any length from 0 to `count`.
            holds: whether figures are good enough.
        """
        self.found = False
        self._count, self._predict, self._holds = count, predict, holds
        self._predicted: dict[int, Figures] = {}
        self._off: dict[str, dict[int, float]] = {key: {} for key in COMPARED}
        self._missed, self._holding, self._jump, self._lowered = 0, count, 1, 0
        self._correct(0, none)

    def hopeless(self) -> bool:
        """Whether even all moves together should not do."""
        return not self._should_hold(self._count)

    def next(self) -> int | None:
        """Return the length to make next, or None where nothing is left to find out."""
        if not self.found:
            if self._missed == self._count:
                return None
            least = min(self._missed + self._jump, self._count)
            return max(self._shortest(self._missed + 1, self._count), least)
        if self._lowered == LOWERED:
            return None
        length = self._shortest(self._missed + 1, self._holding)
        return None if length == self._holding else length

    def tell(self, length: int, figures: Figures) -> None:
        """Learn the figures of a model that was made."""
        self._correct(length, figures)
        self._lowered += self.found
        if self._holds(figures):
            self._holding, self.found = length, True
        else:
            self._missed, self._jump = length, 2 * self._jump

    def _figures(self, length: int) -> Figures:
        if length not in self._predicted:
            self._predicted[length] = self._predict(length)
        return self._predicted[length]

    def _correct(self, length: int, real: Figures) -> None:
        said = self._figures(length)
        for key in COMPARED:
            if real[key] is not None and said[key] is not None:
                self._off[key][length] = real[key] - said[key]

    def _should_hold(self, length: int) -> bool:
        corrected: dict[str, float | None] = {}
        for key, off in self._off.items():
            said = self._figures(length)[key]
            if said is not None and off:
                lengths = sorted(off)
                said += float(np.interp(length, lengths, [off[known] for known in lengths]))
            corrected[key] = said
        return self._holds(corrected)

    def _shortest(self, low: int, high: int) -> int:
        """Return the shortest length from `low` on that should hold, `high` where none should."""
        while low < high:
            middle = (low + high) // 2
            if self._should_hold(middle):
                high = middle
            else:
                low = middle + 1
        return low
