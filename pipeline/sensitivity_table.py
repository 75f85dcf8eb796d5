"""The sensitivity of channel groups as a table on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from edgepress.pipeline.oracle import MAX_SQNR_DB
from edgepress.pipeline.report import quantity
from edgepress.pipeline.sensitivity import Cut, GroupSensitivity, Sensitivity

UNITS = {"instructions": "instr."}  # short, for the narrow columns of figures


def show_sensitivity(found: Sensitivity, screen: Console) -> None:
    """Print a row per group and a line per cut, then what the figures are of and leave out."""
    table = Table(show_lines=True)
    table.add_column("group", overflow="fold")
    headings = ["cut", "SQNR", "top-1 same", "MACs saved"]
    if found.unit is not None:
        headings += [f"{UNITS.get(found.unit, found.unit)} saved", "of all layers"]
    for heading in headings:
        table.add_column(heading, justify="right")
    for group in found.groups:
        columns = zip(*(_figures(found, group, cut) for cut in group.cuts), strict=True)
        table.add_row(Text(group.name), *("\n".join(column) for column in columns))
    screen.print(table)
    for line in _notes(found):
        screen.print(Text(line))


def _figures(found: Sensitivity, group: GroupSensitivity, cut: Cut) -> list[str]:
    figures = [
        f"{cut.channels} of {group.channels}, {_percent(cut.channels / group.channels, 0)}",
        "no error" if cut.sqnr_db >= MAX_SQNR_DB else f"{cut.sqnr_db:.1f} dB",
        "–" if cut.agreement is None else f"{cut.agreement:.1f} %",
        _percent(cut.macs_saved / max(found.macs, 1)),
    ]
    if found.unit is None:
        return figures
    share = found.share(cut)
    if cut.saved is None or share is None:
        return [*figures, "–", "–"]
    return [*figures, _cost(found, cut.saved), _percent(share)]


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def _cost(found: Sensitivity, cost: float) -> str:
    if found.unit == "ms":
        return f"{cost:.3g}"
    return f"{'-' if cost < 0 else ''}{quantity(abs(cost))}"


def _notes(found: Sensitivity) -> list[str]:
    """Say what was measured, how the groups are sorted, and what was left out and why."""
    if found.cost is None:
        what, lines = "MACs", ["No latency was measured; for that, give a target with -t."]
        if found.target is not None:
            lines = ["No layer could be measured by itself."]
    else:
        what = found.unit or ""
        lines = [
            f"All layers with constant weights cost, in float, {_cost(found, found.cost)} {what} "
            f"for {found.target}, measured on {found.device}."
        ]
    lines.append(f"Outputs are compared on {found.samples} samples, without recovery.")
    if found.groups:
        lines.append(f"Sorted by the {what} that the smallest cut saves, divided by its error.")
    lines += [f"{name} stays whole: {why}" for name, why in found.kept]
    lines += [
        f"{node}: {operator} has no rule, so it keeps every channel it touches"
        for node, operator in found.unknown
    ]
    lines += [
        f"{node}: {operator} has no constant weight of its own, so it is not measured"
        for node, operator in found.unmeasured
    ]
    return lines
