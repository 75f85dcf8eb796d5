"""How much each channel of a group matters: the contract, and the registry by file name.

An importance is one file in this folder; its stem is its name in recipes. It sees a group (channels
that must be cut together) through a GroupEvidence and answers one score per channel: the channel
with the least score is cut first. What it needs beyond the weights it names in `needs`, and whoever
ranks channels collects only that. One that needs gradients of weights adds its own entry to NEEDS
and a field to GroupEvidence.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import edgepress.calibration.importance
from edgepress.calibration.base import Array, CalibrationError, sole_subclass

#: What an importance may need beyond weights; all but `gammas` need samples.
NEEDS = ("gammas", "contributions", "first_order")


@dataclass(frozen=True, kw_only=True)
class GroupEvidence:
    """What is known of one group of `channels` channels.

    Attributes:
        channels: how many channels the group has.
        producers: one `[channels, parameters]` per layer that makes the channels: all of its
            weights that belong to a channel, in one row.
        gammas: one `[channels]` per BatchNorm that scales them; empty where there is none.
        contributions: `[channels, channels]` float64, or None: the Gram matrix `Σ z_c · z_d` over
            samples, outputs and positions, where `z_c` is what channel c adds to the outputs of a
            layer that reads the group; divided by the energy of the layer's outputs, and summed
            over such layers.
        first_order: `[observations, channels]` float64, or None: the first-order change of a
            random projection of the model's outputs when a channel is removed, one row per sample
            and projection.
        seed: for an importance that draws random numbers.
    """

    channels: int
    producers: list[Array] = field(default_factory=list)
    gammas: list[Array] = field(default_factory=list)
    contributions: Array | None = None
    first_order: Array | None = None
    seed: int = 0

    def weights(self) -> list[Array]:
        """Return the weights of the producers. Raises CalibrationError where none are known."""
        if not self.producers:
            raise CalibrationError(
                "the group has no producers, so its channels have no weights to rank by; "
                "leave it whole."
            )
        return self.producers


class Importance(ABC):
    """Scores the channels of a group; it keeps no state.

    Class attributes:
        needs: entries of NEEDS.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def score(self, group: GroupEvidence) -> Array:
        """Return `[channels]` float64, finite and at least 0; the least is cut first.

        Raises CalibrationError where the evidence it needs is not there.
        """


def importance_names() -> list[str]:
    """Every importance, by file name, sorted."""
    modules = pkgutil.iter_modules(edgepress.calibration.importance.__path__)
    return sorted(module.name for module in modules if module.name != "base")


def importance(name: str) -> Importance:
    """Make the importance of this name. Raises CalibrationError."""
    known = importance_names()
    if name not in known:
        near = difflib.get_close_matches(name, known, 2, 0.3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise CalibrationError(
            f"no importance is called {name!r}.{hint} Known: {', '.join(known)}."
        )
    module = importlib.import_module(f"edgepress.calibration.importance.{name}")
    return sole_subclass(module, Importance)()  # type: ignore[type-abstract]
