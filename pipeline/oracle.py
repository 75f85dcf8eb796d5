"""The reference that every figure is held against: onnxruntime with graph optimisations off."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from edgepress.calibration.base import Array

Outputs = Sequence[Mapping[str, Array]]
MAX_SQNR_DB = 200.0  # reported for equal outputs too: JSON knows no infinity
WORST_ERROR = 1e9  # for the same reason; also where shapes, NaN or infinities disagree
TINY = 1e-30


class Oracle:
    """A model in onnxruntime, exactly as written: no fusion, no reordering."""

    def __init__(self, model: ir.Model | bytes, threads: int = 0) -> None:
        """Load a model; what onnxruntime raises for a model that it cannot load is raised."""
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4  # errors are raised; warnings about old models help nobody
        options.intra_op_num_threads = threads
        data = model if isinstance(model, bytes) else ir.to_proto(model).SerializeToString()
        self._session = onnxruntime.InferenceSession(
            data, options, providers=["CPUExecutionProvider"]
        )
        self.outputs = [output.name for output in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs of one sample by name."""
        answers: Sequence[Any] = self._session.run(self.outputs, dict(feeds))
        return dict(zip(self.outputs, answers, strict=True))


def relative_error(expected: Outputs, got: Outputs) -> float:
    """Return the largest error of any element, as a share of the range of its output.

    The range is taken over all samples and includes zero. Integers and booleans count as the share
    of elements that differ. NaN and infinity equal themselves. Outputs pair by position: names may
    change.
    """
    worst = 0.0
    for want, have in _pairs(expected, got):
        if want.shape != have.shape:
            return WORST_ERROR
        if want.dtype.kind in "biu":
            worst = max(worst, float(np.mean(want != have)) if want.size else 0.0)
            continue
        want, have = want.astype(np.float64), have.astype(np.float64)
        finite = np.isfinite(want)
        if not np.array_equal(want[~finite], have[~finite], equal_nan=True):
            return WORST_ERROR
        want, have = want[finite], have[finite]
        if not want.size:
            continue
        scale = max(max(float(want.max()), 0.0) - min(float(want.min()), 0.0), TINY)
        error = float(np.abs(want - have).max()) / scale
        worst = max(worst, min(error, WORST_ERROR) if math.isfinite(error) else WORST_ERROR)
    return worst


def sqnr_db(expected: Outputs, got: Outputs) -> float:
    """Return the signal to quantization noise ratio of all float outputs and samples, in dB."""
    signal = noise = 0.0
    for want, have in _pairs(expected, got):
        if want.dtype.kind == "f" and want.shape == have.shape:
            signal += float(np.sum(np.square(want, dtype=np.float64)))
            noise += float(np.sum(np.square(want.astype(np.float64) - have)))
    if noise == 0:
        return MAX_SQNR_DB
    if not math.isfinite(noise) or signal == 0:
        return -MAX_SQNR_DB
    return min(MAX_SQNR_DB, 10 * math.log10(signal / noise))


def _pairs(expected: Outputs, got: Outputs) -> list[tuple[Array, Array]]:
    """Stack the samples of each output."""
    wants = [list(sample.values()) for sample in expected]
    haves = [list(sample.values()) for sample in got]
    return [
        (np.stack(want), np.stack(have))
        for want, have in zip(zip(*wants, strict=True), zip(*haves, strict=True), strict=True)
    ]
