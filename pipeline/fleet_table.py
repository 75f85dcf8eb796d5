"""What a fleet of boards said, a row each; for the terminal and the HTML report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from edgepress.pipeline.evidence import overall
from edgepress.pipeline.gates import FAIL, PASS, UNVERIFIED
from edgepress.pipeline.latency_words import median
from edgepress.pipeline.printable import one_line
from edgepress.pipeline.report import peak_memory

HEADINGS = ("board", "verdict", "median latency", "peak memory", "temperature", "accuracy", "what")
ERROR = "error"
_COLOURS = {PASS: "green", UNVERIFIED: "yellow", FAIL: "red", ERROR: "red"}
_NOTHING = "–"


def fleet_table(fleet: Sequence[Mapping[str, Any]]) -> Table:
    """Show every board: its verdict, its figures, and what went wrong there."""
    rows = [board_cells(entry) for entry in fleet]
    table = Table(title=f"boards: {fleet_summary(fleet)}", title_justify="left")
    shown = [  # columns that say nothing would take the room of the last one
        column
        for column in range(len(HEADINGS))
        if any(row[column] not in ("", _NOTHING) for row in rows)
    ]
    for column in shown:
        table.add_column(HEADINGS[column], overflow="fold")
    for row in rows:
        texts = [Text(row[column]) for column in shown]
        texts[1].stylize(_COLOURS[row[1]])
        table.add_row(*texts)
    return table


def fleet_summary(fleet: Sequence[Mapping[str, Any]]) -> str:
    """Count the boards by how they ended.

    >>> fleet_summary([{"device": "a", "error": "no route", "evidence": None}])
    '1 error'
    """
    verdicts = [_verdict(entry) for entry in fleet]
    counts = {kind: verdicts.count(kind) for kind in (PASS, FAIL, UNVERIFIED, ERROR)}
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)


def board_cells(entry: Mapping[str, Any]) -> list[str]:
    """Write the row of a board, below `HEADINGS`."""
    name, found = one_line(entry["device"]), entry["evidence"]
    if found is None:
        error = entry["error"].removeprefix(f"{entry['device']}: ")
        return [name, ERROR, *[_NOTHING] * 4, one_line(error)]
    latency = found["latency"]
    return [
        name,
        _verdict(entry),
        _NOTHING if latency is None else median(latency),
        peak_memory(found) or _NOTHING,
        _temperature(latency),
        _accuracy(found["accuracy"]),
        one_line(_what(found)),
    ]


def _verdict(entry: Mapping[str, Any]) -> str:
    if entry["evidence"] is None:
        return ERROR
    return overall(entry["evidence"]["verdicts"]).partition(":")[0]


def _what(found: Mapping[str, Any]) -> str:
    """Say which gates did not pass and why, and the first reason why there are no figures."""
    parts = []
    for verdict in found["verdicts"]:
        if verdict["verdict"] != PASS:
            measured = "" if verdict["value"] is None else f" {verdict['value']:.4g}"
            limit = "" if verdict["limit"] is None else f", limit {verdict['limit']:.4g}"
            parts.append(f"{verdict['gate']}{measured}{limit}: {verdict['detail']}")
    latency = found["latency"]
    if latency is not None and latency["refused"] and not any("latency_ms" in p for p in parts):
        first, *others = latency["refused"]
        more = f" (and {len(others)} more)" if others else ""
        what = "refused" if latency["p50_ms"] is None else "not defended"
        parts.append(f"latency {what}: {first}{more}")
    return "; ".join(parts)


def _temperature(latency: Mapping[str, Any] | None) -> str:
    """Write the highest temperature that was seen."""
    hottest = None if latency is None else latency["conditions"].get("hottest_celsius")
    return f"{hottest:.0f} °C" if isinstance(hottest, (int, float)) else _NOTHING


def _accuracy(found: Mapping[str, Any] | None) -> str:
    """Write top-1, or the agreement with the original model where there are no labels."""
    if found is None:
        return _NOTHING
    if found["top1"] is not None:
        return f"top-1 {found['top1']:.4g} %"
    if found["agreement"] is not None:
        return f"{found['agreement']:.4g} % as fp32"
    return _NOTHING if found["sqnr_db"] is None else f"{found['sqnr_db']:.4g} dB"
