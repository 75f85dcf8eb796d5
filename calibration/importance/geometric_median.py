"""How far a channel's weights lie from those of the other channels."""

from __future__ import annotations

import numpy as np

from edgepress.calibration.base import Array
from edgepress.calibration.importance.base import GroupEvidence, Importance


class GeometricMedian(Importance):
    """The sum of the distances of a channel's weights to those of all channels of its group.

    The channel nearest the geometric median is the one that the others can replace best: He et al.,
    "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration", 2019,
    section 3.4. The weights of several layers are laid side by side, each divided by the layer's
    norm, so that none outweighs the others. A channel of zeros need not be the first to go.
    """

    def score(self, group: GroupEvidence) -> Array:
        """Return `Σ_d |w_c - w_d|`: `[channels]` float64, relative to the norms of the producers.

        It takes `channels² · parameters` operations and `[channels, channels]` of memory. Raises
        CalibrationError where no producer's weights are known.
        """
        squares = np.zeros((group.channels, group.channels))
        for weights in group.weights():
            rows = weights.astype(np.float64)
            norm = float(np.linalg.norm(rows))
            if norm == 0:
                continue
            rows /= norm
            # Distances do not move with the mean, and without it less cancels in the Gram matrix.
            rows -= rows.mean(axis=0)
            gram = rows @ rows.T
            lengths = gram.diagonal().copy()
            gram *= -2
            squares += gram
            squares += lengths[:, None]
            squares += lengths
        # Rounding leaves squares of equal rows a little off zero, on either side of it.
        np.maximum(squares, 0, out=squares)
        np.fill_diagonal(squares, 0)
        scores: Array = np.sqrt(squares, out=squares).sum(axis=1)
        return scores
