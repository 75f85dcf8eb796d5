"""The magnitude of the weights that make a channel."""

from __future__ import annotations

import numpy as np

from edgepress.calibration.base import Array
from edgepress.calibration.importance.base import GroupEvidence, Importance


class L1(Importance):
    """The mean magnitude of a channel's weights, summed over the layers that make it.

    Li et al., "Pruning Filters for Efficient ConvNets", 2017, section 3.1. They sum magnitudes
    within one layer; the mean lets the layers of a residual connection count the same, whatever
    the number of their inputs.
    """

    def score(self, group: GroupEvidence) -> Array:
        """Return `Σ mean|w|` over producers: `[channels]` float64, in units of the weights.

        Raises CalibrationError where no producer's weights are known.
        """
        scores = np.zeros(group.channels)
        for weights in group.weights():
            scores += np.abs(weights).mean(axis=1, dtype=np.float64)
        return scores
