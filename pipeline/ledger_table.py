"""The size ledger for people: a table on the terminal, and a table and a picture in HTML."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from edgepress.pipeline.report import quantity, size
from edgepress.pipeline.size_ledger import OTHER, SUMS

#: Layers of the table after a run; `edgepress inspect` shows all of them.
FEW_LAYERS = 10
HEADINGS = ("layer", "weights", "zeros", "fp32", "pruned", "shared", "payload", "container",
            "bound", "bits", "ratio")  # fmt: skip
STAGES = {
    "fp32": ("fp32_bytes",),
    "pruned": ("pruned_bytes",),
    "shared": ("shared_bytes",),
    "weights.epw": ("coded_bytes", "container_bytes"),
}
_COLOURS = ("#3b6ea5", "#d98032", "#5a9a57", "#a5506b", "#8a7bb5", "#b0a03c")
_REST, _CONTAINER = "#b8b8b8", "#555555"
_BAR_PIXELS, _ROW_PIXELS, _LABEL_PIXELS, _NUMBER_PIXELS, _KEY_PIXELS = 420, 26, 90, 90, 17
_NOTHING = "–"

Entry = Mapping[str, Any]


def ledger_table(ledger: Mapping[str, Any], most: int | None = None) -> Table:
    """Show what the weights of each layer take; of many layers, the `most` that are largest."""
    table = Table(title="weights, stage by stage", title_justify="left")
    table.add_column(HEADINGS[0], overflow="fold")
    for heading in HEADINGS[1:]:
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in shortened(ledger["layers"], most):
        name, *figures = cells(entry)
        table.add_row(Text(name), *figures, style="" if entry["weights"] else "dim")
    table.add_section()
    table.add_row("all weights", *cells(ledger["total"])[1:])
    return table


def cells(entry: Entry) -> list[str]:
    """Write the figures of a layer, or of all of them."""
    weights = entry["weights"]
    return [
        entry.get("name", ""),
        quantity(weights) if weights else _NOTHING,
        f"{100 * entry['zeros'] / weights:.0f} %" if weights else _NOTHING,
        *(size(entry[key]) for key in SUMS[2:]),
        f"{8 * entry['coded_bytes'] / weights:.2f}" if weights else _NOTHING,
        _NOTHING if entry["ratio"] is None else f"{entry['ratio']:.1f}×",
    ]


def shortened(layers: Sequence[Entry], most: int | None) -> list[Entry]:
    """Keep the layers that are largest in the file, and make one entry of the rest."""
    named = [entry for entry in layers if entry["name"] != OTHER]
    if most is None or len(named) <= most + 1:
        return [*layers]
    largest = sorted(named, key=lambda entry: -int(entry["coded_bytes"]))[:most]
    rest = [entry for entry in named if entry not in largest]
    sums = {key: sum(entry[key] for entry in rest) for key in SUMS}
    ratio = sums["fp32_bytes"] / max(sums["coded_bytes"] + sums["container_bytes"], 1)
    merged = {"name": f"{len(rest)} smaller layers", "operator": "", **sums, "ratio": ratio}
    kept = [entry for entry in named if entry in largest]
    return [*kept, merged, *(entry for entry in layers if entry["name"] == OTHER)]


def ledger_picture(ledger: Mapping[str, Any]) -> str:
    """Draw a bar per stage, of the largest layers, the rest, and the container, as SVG."""
    largest = max(_stage_bytes(ledger["total"], stage) for stage in STAGES) or 1
    entries = shortened(ledger["layers"], len(_COLOURS))
    names = [*(entry["name"] for entry in entries), "header, table and padding"]
    rest = max(len(entries) - len(_COLOURS), 0)
    colours = [*_COLOURS[: len(entries)], *[_REST] * rest, _CONTAINER]
    marks = []
    for row, (stage, (payload, *container)) in enumerate(STAGES.items()):
        y, x = row * _ROW_PIXELS, float(_LABEL_PIXELS)
        marks.append(f'<text x="0" y="{y + 17}">{stage}</text>')
        counts = [entry[payload] for entry in entries]
        counts.append(sum(ledger["total"][key] for key in container))
        for name, count, colour in zip(names, counts, colours, strict=True):
            if count:
                width = _BAR_PIXELS * count / largest
                title = html.escape(f"{stage}, {name}: {size(count)}")
                marks.append(
                    f'<rect x="{x:.2f}" y="{y + 3}" width="{width:.2f}" height="19" '
                    f'fill="{colour}"><title>{title}</title></rect>'
                )
                x += width
        total = size(_stage_bytes(ledger["total"], stage))
        marks.append(f'<text x="{x + 6:.2f}" y="{y + 17}">{total}</text>')
    y = len(STAGES) * _ROW_PIXELS + 6
    for name, colour in dict(zip(names, colours, strict=True)).items():
        marks.append(f'<circle cx="{_LABEL_PIXELS + 6}" cy="{y + 7}" r="6" fill="{colour}"/>')
        marks.append(f'<text x="{_LABEL_PIXELS + 18}" y="{y + 12}">{html.escape(name)}</text>')
        y += _KEY_PIXELS
    width = _LABEL_PIXELS + _BAR_PIXELS + _NUMBER_PIXELS
    return f'<svg width="{width}" height="{y + 4}" role="img">{"".join(marks)}</svg>'


def _stage_bytes(entry: Entry, stage: str) -> int:
    return sum(int(entry[key]) for key in STAGES[stage])
