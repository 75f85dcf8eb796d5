"""Which layer to raise first, by what each alone adds to the error of a quantized model.

There are two moves per layer. To int16: what the layer reads and writes has 16 bits, which spares
all but a trace of the error of the pairs behind these values. To float: the layer's weights are
spared, and the pair behind a value where all that touch it are float.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgepress.calibration.base import Array
from edgepress.passes.analysis import QuantizationSwitches, QuantizedLayer
from edgepress.pipeline.oracle import TINY
from edgepress.pipeline.progress import Progress
from edgepress.pipeline.recipe import FLOAT, INT16

SIGNIFICANT_DIGITS = 4  # the order of moves shall not hang on the last bits of a sum


@dataclass(frozen=True)
class Move:
    """One layer, and what it is raised to: "int16" or "float"."""

    layer: str
    to: str


@dataclass(frozen=True)
class LayerError:
    """What one layer alone adds to the outputs: noise power as a share of their power.

    Attributes:
        activations: of the pairs that it owns.
        constants: of its weights and bias.
    """

    activations: float
    constants: float


def layer_errors(
    switches: QuantizationSwitches, feeds: Sequence[Mapping[str, Array]], progress: Progress
) -> dict[str, LayerError]:
    """Measure every layer alone, all others in float, over all feeds; by name, in graph order."""
    exact = [switches.run(feed, ()) for feed in feeds]
    power = sum(_power(answer) for answer in exact) or TINY

    def noise(on: Collection[str], constants: Collection[str]) -> float:
        pairs = zip(feeds, exact, strict=True)
        got = (_noise(want, switches.run(feed, on, constants=constants)) for feed, want in pairs)
        return float(f"{sum(got) / power:.{SIGNIFICANT_DIGITS}g}")

    errors = {}
    for done, layer in enumerate(switches.layers):
        progress.update("rank layers", done, len(switches.layers))
        alone = (layer.name,)
        errors[layer.name] = LayerError(
            noise(alone, ()) if layer.writes else 0.0, noise((), alone) if layer.constants else 0.0
        )
    return errors


def _power(answer: Mapping[str, Array]) -> float:
    floats = (array for array in answer.values() if array.dtype.kind == "f")
    return sum(float(np.sum(np.square(array, dtype=np.float64))) for array in floats)


def _noise(want: Mapping[str, Array], got: Mapping[str, Array]) -> float:
    pairs = ((want[name], got[name]) for name in want if want[name].dtype.kind == "f")
    return sum(float(np.sum(np.square(a.astype(np.float64) - b))) for a, b in pairs)


class Layers:
    """Layers of a quantized model, and which of them touch the same values."""

    def __init__(self, layers: Sequence[QuantizedLayer], movable: Collection[str]) -> None:
        """Take the layers in graph order; `movable` names those that can be raised."""
        self.movable = [layer.name for layer in layers if layer.name in movable]
        makers: dict[str, set[str]] = {}
        scales: dict[str, set[str]] = {}
        for layer in layers:
            for name in layer.writes:
                makers.setdefault(name, set()).add(layer.name)
            for name in layer.scales:
                scales.setdefault(name, set()).add(layer.name)
        self._users: dict[str, set[str]] = {}  # of each layer's pairs, itself included
        self._covers: dict[str, set[str]] = {}  # whose pairs int16 at a layer spares
        for layer in layers:
            near = {layer.name}.union(*(makers.get(name, ()) for name in layer.reads))
            for other in near:
                self._users.setdefault(other, set()).add(layer.name)
            named = {name for other in layers if other.name in near for name in other.scales}
            self._covers[layer.name] = near.union(*(scales[name] for name in named))
        self._names = [layer.name for layer in layers]

    def order(self, errors: Mapping[str, LayerError], kinds: Collection[str]) -> list[Move]:
        """Return all moves, each the one that takes away most of what those before it left.

        Where nothing may be int16, the error of a pair is shared out among the layers that have to
        be float to spare it. What takes nothing away comes last, in graph order.
        """
        gains: dict[Move, float] = {}
        if FLOAT in kinds:
            for name in self.movable:
                gains[Move(name, FLOAT)] = errors[name].constants + (
                    0.0 if INT16 in kinds else self._share(name, errors)
                )
        waiting = {Move(name, INT16): self._covers[name] for name in self.movable}
        if INT16 not in kinds:
            waiting = {}
        spared: set[str] = set()
        place = {name: index for index, name in enumerate(self._names)}
        found: list[Move] = []
        while gains or waiting:
            left = {
                move: sum(errors[name].activations for name in covers - spared)
                for move, covers in waiting.items()
            }
            left |= gains
            best = min(left, key=lambda move: (-left[move], move.to != INT16, place[move.layer]))
            found.append(best)
            gains.pop(best, None)
            spared |= waiting.pop(best, set())
        return found

    def _share(self, name: str, errors: Mapping[str, LayerError]) -> float:
        """Return a layer's share of the error of the pairs that it touches."""
        return sum(
            errors[other].activations / len(users & set(self.movable))
            for other, users in self._users.items()
            if name in users
        )

    def quantized(self, moves: Collection[Move]) -> tuple[set[str], set[str]]:
        """Return the layers whose pairs, and those whose constants, still have 8 bits."""
        floats = {move.layer for move in moves if move.to == FLOAT}
        spared = set().union(*(self._covers[m.layer] for m in moves if m.to == INT16))
        for name, users in self._users.items():
            if users & set(self.movable) <= floats:
                spared.add(name)
        return set(self._names) - spared, set(self._names) - floats
