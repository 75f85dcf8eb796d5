"""The scale that BatchNorm learned for a channel."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from edgepress.calibration.base import Array, CalibrationError
from edgepress.calibration.importance.base import GroupEvidence, Importance


class BatchNorm(Importance):
    """The magnitude of a channel's BatchNorm scale, summed over the BatchNorms that scale it.

    Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", 2017, section
    3. They train with a penalty that drives the scales of idle channels to zero; without it the
    scales say less. It needs a model whose BatchNorms are still there when edgepress reads it.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gammas"})

    def score(self, group: GroupEvidence) -> Array:
        """Return `Σ |gamma|` over BatchNorms: `[channels]` float64, without unit.

        Raises CalibrationError where no BatchNorm scales the group.
        """
        if not group.gammas:
            raise CalibrationError(
                "no gammas are known: no BatchNorm scales these channels, or the exporter folded "
                "it; export the model in training mode, or rank by another importance such as l1."
            )
        scores = np.zeros(group.channels)
        for gamma in group.gammas:
            scores += np.abs(gamma)
        return scores
