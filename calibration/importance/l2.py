"""The energy of the weights that make a channel."""

from __future__ import annotations

import numpy as np

from edgepress.calibration.base import Array
from edgepress.calibration.importance.base import GroupEvidence, Importance


class L2(Importance):
    """The root of a channel's mean squared weights, over the layers that make it.

    Li et al., "Pruning Filters for Efficient ConvNets", 2017, appendix 6.1, who find it as good as
    the sum of magnitudes. The mean lets the layers of a residual connection count the same,
    whatever the number of their inputs; squares are summed over layers, then the root is taken.
    """

    def score(self, group: GroupEvidence) -> Array:
        """Return `√Σ mean(w²)` over producers: `[channels]` float64, in units of the weights.

        Raises CalibrationError where no producer's weights are known.
        """
        squares = np.zeros(group.channels)
        for weights in group.weights():
            squares += np.square(weights, dtype=np.float64).mean(axis=1)
        return np.sqrt(squares)
