"""Latency and what disturbed it, in words for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def latency_facts(latency: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List what was measured: the percentiles or why there are none, the curve, MLPerf's figure."""
    runs = f"{len(latency['samples_ms'])} runs, {_threads(latency['threads'])}"
    refused = "; ".join(latency["refused"])
    if latency["p50_ms"] is None:
        text = f"refused: {refused} (fastest of {runs}: {latency['min_ms']:.3g} ms)"
    else:
        spread = [f"min {latency['min_ms']:.3g}"]
        for name in ("p90", "p99"):
            spread.append(f"{name} {latency[f'{name}_ms']:.3g}{_between(latency, name)}")
        text = f"{median(latency)} median ({', '.join(spread)}; {runs})"
        if refused:
            text += f", not defended: {refused}"
    rows = [("latency", text)]
    if latency["sustained"]:
        rows.append(("sustained", _sustained(latency["sustained"])))
    if latency["mlperf"]:
        rows.append(("MLPerf", _mlperf(latency["mlperf"])))
    return rows


def median(latency: Mapping[str, Any]) -> str:
    """Write the median with its 95 % interval, or that it was refused.

    >>> median({"p50_ms": 3.714, "intervals_ms": {"p50": [3.681, 3.749]}})
    '3.71 ms [3.68–3.75]'
    """
    if latency["p50_ms"] is None:
        return "refused"
    return f"{latency['p50_ms']:.3g} ms{_between(latency, 'p50')}"


def _between(latency: Mapping[str, Any], name: str) -> str:
    """Write an interval; nothing where there were too few runs for one."""
    pair = latency["intervals_ms"].get(name)
    if pair is None:
        return ""
    low, high = pair
    return f" [{low:.3g}–{'' if high is None else f'{high:.3g}'}]"


def _sustained(points: list[Mapping[str, Any]]) -> str:
    """Say how the median changed over the minutes, and since when the board was throttled."""
    first, last = points[0], points[-1]
    slowest = max(points, key=lambda point: point["p50_ms"])
    text = (
        f"{first['p50_ms']:.3g} ms median at first, {last['p50_ms']:.3g} ms after "
        f"{_minutes(last)}, slowest {slowest['p50_ms']:.3g} ms after {_minutes(slowest)}"
    )
    throttled = next((point for point in points if point.get("throttled")), None)
    return text if throttled is None else f"{text}; throttled after {_minutes(throttled)}"


def _mlperf(figures: Mapping[str, Any]) -> str:
    """Write the figure of the single-stream rule, which stands for the 90th percentile."""
    queries = f"{figures['queries']} queries in {figures['duration_s']:.0f} s"
    found = figures["early_stopping_p90_ms"]
    if found is not None:
        return f"single-stream: {found:.3g} ms at 90 % ({queries})"
    reasons = "; ".join(figures["refused"]) or "too few queries"
    return f"single-stream: refused: {reasons} ({queries})"


def _minutes(point: Mapping[str, Any]) -> str:
    return f"{point['at_s'] / 60:.3g} min"


def _threads(count: int) -> str:
    return f"{count} thread" if count == 1 else f"{count} threads"
