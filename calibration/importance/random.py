"""Channels in random order, which every other importance must beat."""

from __future__ import annotations

import numpy as np

from edgepress.calibration.base import Array
from edgepress.calibration.importance.base import GroupEvidence, Importance


class Random(Importance):
    """Random numbers: the baseline that every other importance must beat.

    Mittal et al., "Recovering from Random Pruning", 2018, show how near it comes after training.
    """

    def score(self, group: GroupEvidence) -> Array:
        """Return uniform numbers in [0, 1) drawn from `group.seed`: `[channels]` float64."""
        return np.random.default_rng(group.seed).random(group.channels)
