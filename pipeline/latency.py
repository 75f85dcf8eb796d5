"""Latency: how it is asked for, which of its figures are given, and what a limit makes of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgepress.targets.base import Measurement

Latency = Mapping[str, Any]

MOST_WAITED_SHARE = 0.25  # of the time, by a thread for a core: `MOST_WAITED` of the runtime


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """How a latency is to be measured.

    Attributes:
        threads: None takes as many as the target has cores.
        cores: to pin them to: `big`, `little`, or a list such as `0,2-3`; None pins none.
        sustained_minutes: how long to run without a pause afterwards, for the curve; or None.
        mlperf: whether to measure as long as the single-stream rule of MLPerf wants.
        anyway: whether to give figures that cannot be defended.
    """

    threads: int | None = None
    cores: str | None = None
    sustained_minutes: float | None = None
    mlperf: bool = False
    anyway: bool = False


def latency_figures(measured: Measurement, *, anyway: bool = False) -> dict[str, Any] | None:
    """Summarise a measurement; None where it holds no times, as under an emulator.

    Percentiles are linear between neighbours, as those of `model --bench`. They are None where the
    device refused them, unless they are wanted `anyway`; raw samples and the fastest are not.
    """
    if not measured.samples_ms:
        return None
    shares = {"p50_ms": 0.5, "p90_ms": 0.9, "p99_ms": 0.99}
    given = anyway or not measured.refused
    cuts = np.quantile(measured.samples_ms, list(shares.values()))
    return {
        "samples_ms": [round(sample, 6) for sample in measured.samples_ms],
        "min_ms": min(measured.samples_ms),
        **{
            name: round(float(cut), 6) if given else None
            for name, cut in zip(shares, cuts, strict=True)
        },
        "intervals_ms": {
            name: None if pair is None or not given else list(pair)
            for name, pair in measured.intervals_ms.items()
        },
        "refused": list(measured.refused),
        "windows_ms": list(measured.windows_ms),
        "conditions": measured.conditions,
        "sustained": measured.sustained,
        "mlperf": measured.mlperf,
        "threads": measured.threads,
        "device": measured.device,
    }


def gated_latency(
    latency: Latency | None, limit_ms: float | None, device: str
) -> tuple[float | None, str]:
    """Return the figure that is held to a limit, None where none can be, and a sentence about it.

    A disturbance only makes inferences slower. So a limit that the slowest tenth of the runs holds
    is held, whatever else was wrong; otherwise only a median that can be defended counts. Of a
    sustained measurement the slowest window in the last quarter counts: a throttled one too, since
    that is what the board does, but none that waited for other programs.

    Args:
        latency: what `latency_figures` returned.
        limit_ms: of the gate.
        device: its name.
    """
    if latency is None:
        return None, f"{device} is an emulator, whose times say nothing about the board"
    limit_ms = math.inf if limit_ms is None else limit_ms
    if latency["sustained"]:
        return _gated_curve(latency["sustained"], limit_ms, device)
    samples = latency["samples_ms"]
    if not latency["refused"]:
        return float(np.median(samples)), f"median of {len(samples)} runs on {device}"
    slowest = max(latency["windows_ms"], default=max(samples))
    if slowest <= limit_ms:
        return slowest, f"even the slowest tenth of {len(samples)} runs on {device}"
    return None, f"no figure that can be defended: {'; '.join(latency['refused'])}"


def _gated_curve(
    points: Sequence[Mapping[str, Any]], limit_ms: float, device: str
) -> tuple[float | None, str]:
    """The same for the windows of a sustained measurement."""
    late = points[3 * len(points) // 4 :]
    detail = f"slowest window in the last quarter of {points[-1]['at_s'] / 60:.3g} min on {device}"
    slowest = max(point["p50_ms"] for point in late)
    if slowest <= limit_ms:
        return slowest, detail
    own = [p["p50_ms"] for p in late if (p.get("waited_share") or 0) <= MOST_WAITED_SHARE]
    if max(own, default=0.0) > limit_ms:
        return max(own), detail
    return None, f"no figure that can be defended: other programs ran at the end, on {device}"
