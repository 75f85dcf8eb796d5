"""What the layers that read a channel lose without it."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from edgepress.calibration.base import Array, CalibrationError
from edgepress.calibration.importance.base import GroupEvidence, Importance

#: By how much a score is raised where the greedy order would not show in it otherwise; far above
#: the rounding of float64, so that a division of all scores keeps the order.
_STEP = 2.0**-40


class Thinet(Importance):
    """The error in the next layers' outputs when channels are cut one by one, the cheapest first.

    Luo et al., "ThiNet: A Filter Level Pruning Method for Deep Neural Network Compression", 2017,
    section 3.2, algorithm 1. With `z_c` what channel c adds to the outputs, the error of cutting a
    set T is `|Σ_T z_c|²`, so channels that cancel each other go together.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"contributions"})

    def score(self, group: GroupEvidence) -> Array:
        """Return the error at the moment when a channel is cut: `[channels]` float64.

        It is a share of the energy of the outputs. The error may fall again when a channel is cut;
        the score then stays, so that scores in ascending order, equal ones by index, are the greedy
        order. It takes `channels²` operations. Raises CalibrationError where the contributions are
        not known.
        """
        if group.contributions is None:
            raise CalibrationError(
                "no contributions are known: there are no samples, or some channels are read by "
                "other operators than Conv, Gemm and MatMul with constant weights; give "
                "calibration samples (--calib), or rank by an importance that needs weights only, "
                "such as l1."
            )
        gram = group.contributions
        # To cut channel c after the set T adds G_cc + 2 Σ_T G_cd to the error; T is empty at first.
        added = gram.diagonal().astype(np.float64)
        scores = np.empty(group.channels)
        error = score = 0.0
        last = -1
        for _ in range(group.channels):
            cut = int(np.argmin(added))
            error += float(added[cut])
            if error > score:
                score = error
            elif cut < last:
                score = max(score * (1 + _STEP), float(np.nextafter(score, np.inf)))
            scores[cut], last = score, cut
            added += 2 * gram[cut]
            added[cut] = np.inf
        return scores
