"""The results of a race on a GPU as Markdown.

python3 benchmarks/cuda/table.py OUT/race.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from contenders import OURS
from machine import throttled

Row = dict[str, Any]
TITLES = {
    "resnet18": "ResNet-18",
    "mobilenetv2": "MobileNetV2",
    "efficientnet-lite0": "EfficientNet-lite0",
    "minilm": "MiniLM 64",
}
PEERS = ("eager", "graph", "compiled")
UNITS = ("float16", "bfloat16", "tf32", "float32", "int8")
HEAD = (
    "| model | precision | ours ms | eager ms | graph ms | compiled ms | ours / fastest "
    "| % of peak |\n|---|---|---:|---:|---:|---:|---:|---:|"
)


def read(path: Path) -> list[Row]:
    """Read a file of JSON lines; of rows that were raced again, the last counts."""
    rows: dict[Any, Row] = {}
    for line in path.read_text("utf-8").splitlines():
        if not line.strip():
            continue
        row = json.loads(line)
        key = row.get("name") or row["kind"]
        if row["kind"] != "left out" or key not in rows:
            rows.pop(key, None)
            rows[key] = row
    return list(rows.values())


def fastest(row: Row) -> str | None:
    """Return PyTorch's fastest mode by the time between events; None where it did not run."""
    found = {name: c for name, c in row["contenders"].items() if name != OURS}
    return min(found, key=lambda name: found[name]["events_ms"]["p50"], default=None)


def ratios(row: Row) -> list[float]:
    """Return our time over that of PyTorch's fastest mode, per round."""
    best = fastest(row)
    if best is None or OURS not in row["contenders"]:
        return []
    ours, theirs = (row["contenders"][name]["events_ms"]["rounds"] for name in (OURS, best))
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def share_of_peak(row: Row, peak: Row) -> float | None:
    """Return the operations of the model over our time, as a share of the unit's peak."""
    tops = peak.get(row["precision"])
    if not tops or OURS not in row["contenders"]:
        return None
    return 2e-9 * row["macs"] / row["contenders"][OURS]["events_ms"]["p50"] / tops


def ms(row: Row, name: str, *, quartiles: bool = False) -> str:
    """Write a contender's median, with its quartiles where asked for."""
    if name not in row["contenders"]:
        return "–"
    found = row["contenders"][name]["events_ms"]
    if not quartiles:
        return f"{found['p50']:.4g}"
    return f"{found['p50']:.4g} ({found['q1']:.4g}–{found['q3']:.4g})"


def line(row: Row, peak: Row) -> str:
    """Write one row of the table."""
    found, share = ratios(row), share_of_peak(row, peak)
    ratio = "–"
    if found:
        middle = statistics.median(found)
        ratio = f"{middle:.2f} ({min(found):.2f}–{max(found):.2f}) {fastest(row)}"
    precision = row["precision"]
    if row["peer_precision"] != precision:
        precision += f" / {row['peer_precision']}"
    cells = [TITLES.get(row["model"], row["model"]), precision, ms(row, OURS, quartiles=True)]
    cells += [ms(row, name) for name in PEERS]
    cells += [ratio, "–" if share is None else f"{100 * share:.1f}"]
    return f"| {' | '.join(cells)} |"


def geometric_means(rows: Iterable[Row]) -> str:
    """Write the mean ratio of each precision and of all, and how many rows that were."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        if found := ratios(row):
            for group in (row["precision"], "all"):
                groups.setdefault(group, []).append(statistics.median(found))
    means = {g: math.exp(statistics.fmean(map(math.log, v))) for g, v in groups.items()}
    order = sorted(groups, key=lambda group: group == "all")
    return ", ".join(f"{group} {means[group]:.2f} (of {len(groups[group])})" for group in order)


def about(machine: Row, peak: Row, rows: Sequence[Row]) -> str:
    """Write what the figures were measured on, and in which state it was."""
    gpu = machine.get("gpu", {})
    clocks = sorted({
        int(state["clocks.sm"])
        for row in rows
        for state in row["state"].values()
        if state.get("clocks.sm", "").isdigit()
    })  # fmt: skip
    reasons = sorted({r for row in rows for s in row["state"].values() for r in throttled(s)})
    parts = [f"GPU: {gpu.get('name', 'not known')}, driver {gpu.get('driver_version', '–')}"]
    parts.append(f"PyTorch {machine.get('torch', '–')} with CUDA {peak.get('cuda', '–')}")
    if clocks:
        most = gpu.get("clocks.max.sm", "–")
        parts.append(f"clocks between rows {clocks[0]}–{clocks[-1]} of {most} MHz")
    parts.append(f"held down by: {', '.join(reasons) or 'nothing'}")
    return "; ".join(parts) + "."


def peak_line(peak: Row) -> str:
    """Write the measured peaks."""
    tops = [f"{unit} {peak[unit]:.0f}" for unit in UNITS if peak.get(unit)]
    copied = f"copy {peak['copy_gb_per_s']:.0f} GB/s; " if peak.get("copy_gb_per_s") else ""
    return f"Measured peaks: {copied}products, TOP/s: {', '.join(tops) or 'not measured'}."


def back_to_back(rows: Iterable[Row]) -> str:
    """Write what PyTorch needs where inferences queue up, which hides its launches."""
    cells = []
    for row in rows:
        found = {
            name: row["contenders"][name]["queued_ms"]
            for name in PEERS
            if "queued_ms" in row["contenders"].get(name, {})
        }
        if found:
            times = ", ".join(f"{name} {time:.4g}" for name, time in found.items())
            cells.append(f"{row['name']}: {times}")
    return f"PyTorch, many inferences in a row, ms each: {'; '.join(cells)}." if cells else ""


def footnotes(rows: Sequence[Row]) -> list[str]:
    """Say how PyTorch compiled, and what did not run."""
    notes, modes = [], {}
    for row in rows:
        if "compiled" in row["contenders"]:
            modes.setdefault(row["torch_mode"], []).append(row["name"])
    if len(modes) == 1:
        notes.append(f"Compiled: torch.compile, {next(iter(modes))}.")
    elif modes:
        parts = (f"{mode}: {', '.join(names)}" for mode, names in modes.items())
        notes.append(f"Compiled: torch.compile, {'; '.join(parts)}.")
    missing = {f"{row['name']} {m}: {why}" for row in rows for m, why in row["skipped"].items()}
    if missing:
        notes.append(f"Did not run: {'; '.join(sorted(missing))}.")
    return notes


def report(lines: Sequence[Row]) -> str:
    """Return everything as Markdown."""
    of = {kind: [row for row in lines if row["kind"] == kind] for kind in ("row", "left out")}
    machine: Row = next((row for row in lines if row["kind"] == "machine"), {})
    peak: Row = next((row for row in lines if row["kind"] == "peak"), {})
    rows = of["row"]
    parts = [about(machine, peak, rows), peak_line(peak)]
    for batch in sorted({row["batch"] for row in rows}):
        found = [row for row in rows if row["batch"] == batch]
        parts.append(f"**Batch {batch}**")
        parts.append("\n".join([HEAD, *(line(row, peak) for row in found)]))
        if means := geometric_means(found):
            parts.append(f"Geometric means of ours / fastest: {means}.")
        parts += [text for text in [back_to_back(found)] if text]
    parts += footnotes(rows)
    if left := [row["name"] for row in of["left out"]]:
        parts.append(f"Not measured: {', '.join(left)}.")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("results", type=Path)
    print(report(read(parser.parse_args().results)))


if __name__ == "__main__":
    main()
