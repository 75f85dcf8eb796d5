"""Rounds weights one input at a time and lets the inputs that follow make up for the error.

A layer's output error is `(w - ŵ)·p`, and its mean square over samples depends on them only through
`H = E[p·pᵀ]`. After the weights of one input are rounded, the best correction of all weights not
rounded yet is known in closed form: Frantar et al., "GPTQ: Accurate Post-Training Quantization for
Generative Pre-trained Transformers", ICLR 2023, section 3.
"""

from __future__ import annotations

import numpy as np

from edgepress.calibration.base import Array

DAMPING = 0.01  # of the mean of H's diagonal, as the paper has it
BLOCK = 64  # inputs whose errors reach the rest of the weights in one product


def compensated_steps(weights: Array, scales: Array, second: Array, most: int) -> Array:
    """Round weights to whole steps so that outputs, not weights, change least.

    Args:
        weights: `[inputs, outputs]`.
        scales: size of a step, `[outputs]`.
        second: E[p·pᵀ], `[inputs, inputs]`.
        most: largest magnitude of a step.

    Returns:
        int8 `[inputs, outputs]` in [-most, most].
    """
    count = len(weights)
    moments = second.astype(np.float64)
    energy = np.diag(moments).copy()
    moments[np.diag_indices(count)] += max(DAMPING * energy.mean(), np.finfo(np.float64).tiny)
    # what matters most is rounded first, while many weights can still make up for it
    order = np.argsort(-energy, kind="stable")
    upper = np.linalg.cholesky(np.linalg.inv(moments[np.ix_(order, order)])).T
    left = weights[order].astype(np.float64) / scales
    steps = np.empty(left.shape, np.int8)
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        errors = np.empty((stop - start, left.shape[1]))
        for i in range(start, stop):
            rounded = np.clip(np.rint(left[i]), -most, most)
            steps[order[i]] = rounded
            errors[i - start] = (left[i] - rounded) / upper[i, i]
            left[i + 1 : stop] -= np.outer(upper[i, i + 1 : stop], errors[i - start])
        left[stop:] -= upper[start:stop, stop:].T @ errors
    return steps
