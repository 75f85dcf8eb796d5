"""What the model's outputs lose without a channel, to first order."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from edgepress.calibration.base import Array, CalibrationError
from edgepress.calibration.importance.base import GroupEvidence, Importance


class Taylor(Importance):
    """The first-order change of the model's outputs when a channel is removed.

    Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference",
    2017, section 2.2, with the square in place of the magnitude as in "Importance Estimation for
    Neural Network Pruning", 2019, section 3. It looks at the outputs themselves and not at a
    loss, so samples need no labels.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"first_order"})

    def score(self, group: GroupEvidence) -> Array:
        """Return the root of the mean squared change: `[channels]` float64, in units of the output.

        Raises CalibrationError where no change was observed.
        """
        if group.first_order is None or not len(group.first_order):
            raise CalibrationError(
                "no first_order changes are known: there are no samples, or some channels are read "
                "by other operators than Conv, Gemm and MatMul with constant weights; give "
                "calibration samples (--calib), or rank by an importance that needs weights only, "
                "such as l1."
            )
        scores: Array = np.sqrt(np.square(group.first_order, dtype=np.float64).mean(axis=0))
        return scores
