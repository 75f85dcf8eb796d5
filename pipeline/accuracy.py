"""What compression costs in answers: top-1, agreement with the original model, SQNR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgepress.calibration.base import Array, Samples
from edgepress.pipeline.oracle import Outputs, sqnr_db


def accuracy(
    samples: Samples, got: Outputs, original: Outputs | None, known_top1: float | None = None
) -> dict[str, Any]:
    """Compare a compiled model's answers to the labels and to the original model's.

    Args:
        samples: what was asked, with labels or without.
        got: the compiled model's answers.
        original: the original model's answers to the same samples, or None where it is not here.
        known_top1: the original model's top-1 in per cent, from an earlier measurement.

    Returns:
        samples, samples_sha256; top1 and reference_top1 in per cent; drop in percentage points (of
        top-1, or of agreement where there are no labels); agreement in per cent; sqnr_db. What
        could not be measured is None. Classes are taken from the first output.
    """
    result: dict[str, Any] = {
        "samples": len(samples),
        "samples_sha256": samples.sha256(),
        "top1": None,
        "reference_top1": known_top1,
        "agreement": None,
        "drop": None,
        "sqnr_db": None if original is None else round(sqnr_db(original, got), 2),
    }
    chosen = classes(got)
    expected = None if original is None else classes(original)
    if chosen is None:
        return result
    if expected is not None:
        result["agreement"] = _percent(chosen == expected)
    if samples.labels is not None:
        result["top1"] = _percent(chosen == samples.labels)
        if expected is not None:
            result["reference_top1"] = _percent(expected == samples.labels)
        if result["reference_top1"] is not None:
            result["drop"] = round(result["reference_top1"] - result["top1"], 4)
    elif result["agreement"] is not None:
        result["drop"] = round(100 - result["agreement"], 4)
    return result


def classes(outputs: Outputs) -> Array | None:
    """Return the class of every sample, or None where the first output is no vector of scores."""
    first: Sequence[Array] = [next(iter(answer.values())) for answer in outputs]
    if first[0].dtype.kind not in "fiu" or first[0].size < 2:
        return None
    if max(first[0].shape, default=0) != first[0].size:  # more than one axis has an extent
        return None
    return np.array([int(np.argmax(answer)) for answer in first])


def _percent(hits: Array) -> float:
    return round(100 * float(np.mean(hits)), 4)


def stack(outputs: Outputs) -> Mapping[str, Array]:
    """Stack the answers as samples are: `[n, *shape without its batch axis of 1]`, by name."""
    return {name: np.stack([_sample(answer[name]) for answer in outputs]) for name in outputs[0]}


def _sample(array: Array) -> Array:
    return array[0] if array.shape[:1] == (1,) else array
