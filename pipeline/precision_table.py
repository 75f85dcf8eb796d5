"""The table of a search for mixed precision: what each step raised, won and cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from edgepress.pipeline.report import size

NAMED = 3  # layers of a step that are named; the others are counted


def precision_table(
    trials: Sequence[Mapping[str, Any]], costs: Sequence[Mapping[str, Any]] | None
) -> Table:
    """Show every model that was tried.

    Args:
        trials: of the step's record.
        costs: what the device said of each, or None where it was not asked.
    """
    table = Table(title="mixed precision", title_justify="left")
    table.add_column("step", justify="right")
    table.add_column("raised", overflow="fold")
    for heading in ("int16", "float", "SQNR", "drop", "latency", "size"):
        table.add_column(heading, justify="right")
    table.add_column("")
    before: Mapping[str, Any] = {"int16": [], "float": []}
    for index, trial in enumerate(trials):
        cost = costs[index] if costs else {"latency_ms": None, "deployed_bytes": None}
        table.add_row(
            str(index),
            Text(_changes(before, trial)),
            str(len(trial["int16"])),
            str(len(trial["float"])),
            "–" if trial["sqnr_db"] is None else f"{trial['sqnr_db']:.1f} dB",
            "–" if trial["drop"] is None else f"{trial['drop']:.4g}",
            "–" if cost["latency_ms"] is None else f"{cost['latency_ms']:.3g} ms",
            size(cost["deployed_bytes"] or trial["size_bytes"]),
            "kept" if trial["chosen"] else "",
        )
        before = trial
    return table


def _changes(before: Mapping[str, Any], trial: Mapping[str, Any]) -> str:
    """Name what a step raised or lowered, compared to the one before it."""
    parts = []
    for kind in ("int16", "float"):
        old, new = before[kind], trial[kind]
        for sign, names in (
            ("+", [name for name in new if name not in old]),
            ("−", [name for name in old if name not in new]),
        ):
            if names:
                more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
                parts.append(f"{sign}{kind} {', '.join(names[:NAMED])}{more}")
    return "; ".join(parts) or "nothing"
