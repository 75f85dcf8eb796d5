"""A report of a bundle as one HTML file: no script, nothing loaded from elsewhere."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from edgepress.pipeline.bundle import Bundle
from edgepress.pipeline.fleet_table import HEADINGS as BOARD_HEADINGS
from edgepress.pipeline.fleet_table import board_cells
from edgepress.pipeline.latency_picture import sustained_picture, windows_picture
from edgepress.pipeline.ledger_table import HEADINGS, cells, ledger_picture
from edgepress.pipeline.printable import one_line
from edgepress.pipeline.report import facts, latency_rows, quantity, size

BAR_PIXELS, ROW_PIXELS, LABEL_PIXELS = 360, 22, 170
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 62em; padding: 0 1em }
table { border-collapse: collapse; margin: 0.5em 0 1.5em }
td, th { border-bottom: 1px solid #ccc; padding: 0.25em 0.8em; text-align: left }
td.number { text-align: right }
.pass { color: #06702c } .fail, .error { color: #b00020 } .unverified { color: #8a5a00 }
pre { background: #f4f4f4; padding: 0.8em; overflow-x: auto }
svg text { font: 12px system-ui, sans-serif }
"""


def html_report(bundle: Bundle, evidence: Mapping[str, Any] | None) -> str:
    """Return a page with the figures, gates, passes, charts and the recipe of a bundle."""
    manifest = bundle.manifest
    title = f"{manifest.name} for {manifest.target.get('name', '?')}"
    parts = [f"<h1>{html.escape(title)}</h1>", _table((), facts(bundle, evidence))]
    if evidence is not None:
        parts += _fleet(evidence["fleet"]) if "fleet" in evidence else _measured(evidence)
    steps = manifest.steps
    parts.append("<h2>Passes</h2>")
    parts.append(_table(("pass", "parameters", "MACs", "weights", "outputs"), map(_step, steps)))
    parts.append("<h3>Bytes of all constants after each pass</h3>")
    parts.append(_bars([(step["pass_name"], step["size_bytes"]) for step in steps], size))
    if manifest.ledger:  # bundles of older versions have none
        layers = [*manifest.ledger["layers"], {"name": "all weights", **manifest.ledger["total"]}]
        parts.append("<h2>Weights, stage by stage</h2>")
        parts.append(ledger_picture(manifest.ledger))
        parts.append(_table(HEADINGS, map(cells, layers)))
    files = [(file["path"], file["size_bytes"]) for file in manifest.files]
    parts.append("<h2>Files</h2>")
    parts.append(_bars(files, size))
    parts.append(f"<h2>Recipe</h2><pre>{html.escape(manifest.recipe['text'])}</pre>")
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>"


def _fleet(fleet: Sequence[Mapping[str, Any]]) -> list[str]:
    """Show a row per board, and below what was measured on each that answered."""
    parts = ["<h2>Boards</h2>", _table(BOARD_HEADINGS, map(board_cells, fleet))]
    for entry in fleet:
        if entry["evidence"] is not None:
            name = html.escape(one_line(entry["device"]))
            measured = _table((), latency_rows(entry["evidence"]))
            inside = "".join([measured, *_measured(entry["evidence"])])
            parts.append(f"<details><summary>{name}</summary>{inside}</details>")
    return parts


def _measured(evidence: Mapping[str, Any]) -> list[str]:
    """Show the gates of one board, and its latency run by run and over time."""
    rows = [
        (v["gate"], v["verdict"], _number(v["value"]), _number(v["limit"]), v["detail"])
        for v in evidence["verdicts"]
    ]
    parts = ["<h2>Gates</h2>", _table(("gate", "verdict", "measured", "limit", "what"), rows)]
    if latency := evidence["latency"]:
        parts.append("<h2>Latency of every run, ms</h2>")
        parts.append(_histogram(latency["samples_ms"]))
        if picture := windows_picture(latency):
            parts.append("<h3>Medians of consecutive tenths of the runs</h3>")
            parts.append(picture)
        if picture := sustained_picture(latency):
            parts.append("<h2>Sustained: median and 90th percentile (grey); throttled in red</h2>")
            parts.append(picture)
    return parts


def _step(step: Mapping[str, Any]) -> Sequence[str]:
    compared = step["equivalence"]
    text = "same" if compared is None else f"{compared['metric']} {compared['value']:g}"
    counts = (quantity(step["parameters"]), quantity(step["macs"]), size(step["size_bytes"]))
    return (step["pass_name"], *counts, text)


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(text: str) -> str:
    kind = text if text in ("pass", "fail", "unverified", "error") else ""
    return f'<td class="{kind}">{html.escape(text)}</td>'


def _bars(rows: Sequence[tuple[str, float]], label: Any) -> str:
    """Draw one bar per row, the longest as wide as the chart."""
    largest = max((value for _, value in rows), default=0) or 1
    marks = []
    for index, (name, value) in enumerate(rows):
        y, width = index * ROW_PIXELS, round(BAR_PIXELS * value / largest, 1)
        marks.append(
            f'<text x="0" y="{y + 15}">{html.escape(name)}</text>'
            f'<rect x="{LABEL_PIXELS}" y="{y + 3}" width="{width}" height="16" fill="#3b6ea5"/>'
            f'<text x="{LABEL_PIXELS + width + 6}" y="{y + 15}">{html.escape(label(value))}</text>'
        )
    return _svg(marks, len(rows))


def _histogram(samples: Sequence[float], bins: int = 12) -> str:
    """Draw how many runs fell into each of equal steps between the fastest and the slowest."""
    low, high = min(samples), max(samples)
    step = (high - low) / bins or 1.0
    counts = [0] * bins
    for value in samples:
        counts[min(bins - 1, int((value - low) / step))] += 1
    rows = [(f"from {low + i * step:.4g}", float(count)) for i, count in enumerate(counts)]
    return _bars(rows, lambda count: f"{count:.0f}")


def _svg(marks: Sequence[str], rows: int) -> str:
    width, height = LABEL_PIXELS + BAR_PIXELS + 90, rows * ROW_PIXELS + 4
    return f'<svg width="{width}" height="{height}" role="img">{"".join(marks)}</svg>'


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"
