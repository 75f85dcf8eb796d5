"""An explanation on the terminal: what stands out, two lines per layer, and the changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from edgepress.pipeline._explain_changes import Change
from edgepress.pipeline._explain_islands import Island
from edgepress.pipeline._explain_layers import Layer
from edgepress.pipeline.explain import Explanation
from edgepress.pipeline.oracle import MAX_SQNR_DB
from edgepress.pipeline.report import quantity, size

MARKED = 3  # layers that cost most, and that add most error
LEAST_MARKED = 0.05  # of the cost or the error
MARK = "◀"
FEW = 4  # names in a line


def show_explanation(found: Explanation, screen: Console) -> None:
    """Print the summary, the layers, the changes, and what was not measured."""
    screen.print(_summary(found))
    screen.print(_layer_table(found))
    for warning in found.warnings:
        screen.print(Text(f"! {warning}", style="yellow"))
    if found.changes:
        screen.print(_change_table(found))
        for change in found.changes:
            screen.print(Text(change.name, style="bold"))
            screen.print(Text("\n".join(f"    {line}" for line in change.recipe.splitlines())))
    elif found.tried:
        screen.print(Text(f"None of {found.tried} changes that were tried helps measurably."))
    for note in found.notes:
        screen.print(Text(note, style="dim"))


def _layer_table(found: Explanation) -> Table:
    table = Table(title=f"layers of {found.bundle} for {found.target}", title_justify="left")
    table.add_column("layer", overflow="fold", ratio=1, min_width=24)
    table.add_column("MACs\nmoved", justify="right", no_wrap=True)
    table.add_column("multiply\nin its loops", no_wrap=True)
    table.add_column(_cost_heading(found), justify="right", no_wrap=True)
    if any(layer.error_share is not None for layer in found.layers):
        table.add_column("error\nalone", justify="right", no_wrap=True)
    slow, wrong = (
        _most([getattr(layer, key) for layer in found.layers])
        for key in ("cost_share", "error_share")
    )
    for index, layer in enumerate(found.layers):
        cells = [
            Text(f"{layer.name}\n{layer.title}, {layer.precision}"),
            Text(f"{quantity(layer.macs) if layer.macs else '–'}\n{size(layer.bytes_moved)}"),
            _multiply(layer),
            Text(_cost(layer, index in slow), style="bold" if index in slow else ""),
        ]
        if len(table.columns) > len(cells):
            cells.append(
                Text(_error(layer, index in wrong), style="bold" if index in wrong else "")
            )
        table.add_row(*cells, style="" if layer.macs else "dim")
    return table


def _cost_heading(found: Explanation) -> str:
    if found.unit is None:
        return "time\n"
    return "instructions\nexecuted" if found.unit == "instructions" else "time\nGOP/s"


def _most(shares: Sequence[float | None]) -> set[int]:
    """Return the indices of the largest shares that are worth a mark."""
    known = [(share, index) for index, share in enumerate(shares) if share is not None]
    return {index for share, index in sorted(known, reverse=True)[:MARKED] if share >= LEAST_MARKED}


def _multiply(layer: Layer) -> Text:
    if layer.multiply is None:
        return Text("–\n" if layer.vector else "–\nscalar", style="dim")
    words = Text(f"{layer.multiply} ×{layer.multiply_count}\n")
    if layer.vector:
        words.append("vector", style="dim")
    else:
        words.append("scalar", style="red")
    return words


def _cost(layer: Layer, marked: bool) -> str:
    """Write the cost with its share; below it what is achieved."""
    if layer.cost_share is None:
        return "–"
    share = f"{layer.cost_share:4.0%} {MARK if marked else ' '}"
    if layer.executed_instructions is not None:
        return f"{quantity(layer.executed_instructions)} {share}"
    below = "" if layer.gops is None else f"\n{layer.gops:.3g}       "
    return f"{milliseconds(layer.time_ms)} {share}{below}"


def milliseconds(time_ms: float | None) -> str:
    """Write a time in ms, or in µs where it is short.

    >>> milliseconds(1.234), milliseconds(0.00312), milliseconds(None)
    ('1.23 ms', '3.12 µs', '–')
    """
    if time_ms is None:
        return "–"
    return f"{time_ms:.3g} ms" if time_ms >= 0.1 else f"{1e3 * time_ms:.3g} µs"


def _error(layer: Layer, marked: bool) -> str:
    if layer.sqnr_alone_db is None or layer.error_share is None:
        return "–"
    return f"{_db(layer.sqnr_alone_db)}\n{layer.error_share:.0%} {MARK if marked else ' '}"


def _db(ratio: float | None) -> str:
    if ratio is None:
        return "–"
    return "no error" if ratio >= MAX_SQNR_DB else f"{ratio:.1f} dB"


def _summary(found: Explanation) -> Table:
    summary = found.summary
    grid = Table.grid(padding=(0, 2))
    grid.add_row(
        "arithmetic", Text(f"{summary.arithmetic}; of the MACs {_mix(summary.macs_share)}")
    )
    grid.add_row("islands", Text(_islands(found.islands, summary.island_share)))
    if summary.conversion_share is not None:
        grid.add_row("conversions", f"{summary.conversion_share:.1%} of the cost")
    if summary.sqnr_db is not None:
        grid.add_row("SQNR", f"{_db(summary.sqnr_db)} on {summary.samples} samples")
    if summary.time_ms is not None:
        gops = 2 * summary.macs / summary.time_ms / 1e6 if summary.time_ms else 0.0
        grid.add_row("time", f"{milliseconds(summary.time_ms)} on {found.device}, {gops:.3g} GOP/s")
    elif summary.executed_instructions is not None:
        count = quantity(summary.executed_instructions)
        grid.add_row("time", f"unverified; {count} instructions executed on {found.device}")
    else:
        grid.add_row("time", "unverified")
    grid.add_row("moved", f"{size(summary.bytes_moved)} through {quantity(summary.macs)} MACs")
    whose = "the bundle's own kernels" if summary.code_in_bundle else "kernels compiled now"
    floats = f"{summary.float_instructions or 'none'} of them calculate with floats"
    grid.add_row("instructions", f"counted in the code of {whose}; {floats}")
    return grid


def _mix(shares: Mapping[str, float]) -> str:
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{share:.3g} % {name}" for name, share in
                     ((name, 100 * share) for name, share in ordered)) or "none"  # fmt: skip


def _islands(islands: Sequence[Island], share: float | None) -> str:
    """Say which layers are float and why; of many only the most expensive."""
    if not islands:
        return "none"
    costly = sorted(islands, key=lambda island: -(island.cost_share or 0.0))
    lines = [f"{len(islands)}" + (f", {share:.1%} of the cost" if share is not None else "")]
    for island in costly[:FEW]:
        names = ", ".join(island.layers[:2]) + (", …" if len(island.layers) > 2 else "")
        cost = "" if island.cost_share is None else f" ({island.cost_share:.1%}"
        if island.conversion_share:
            cost += f", its {island.conversions} conversions {island.conversion_share:.1%}"
        lines.append(f"{names}{cost}{')' if cost else ''}: {island.why}")
    if len(costly) > FEW:
        lines.append(f"… and {len(costly) - FEW} more")
    return "\n".join(lines)


def _change_table(found: Explanation) -> Table:
    unit = "instructions" if found.unit == "instructions" else "time"
    table = Table(title=f"what helps most, of {found.tried} changes that were tried")
    table.title_justify = "left"
    table.add_column("change", overflow="fold", ratio=1, min_width=24)
    table.add_column("SQNR", justify="right", no_wrap=True)
    table.add_column(f"{unit} after / before", justify="right", no_wrap=True)
    for change in found.changes:
        table.add_row(
            Text(f"{change.name}\n{change.why}"),
            _gain(change),
            _ratio(change, found.unit),
        )
    return table


def _gain(change: Change) -> str:
    after = _db(change.sqnr_after_db)
    if change.sqnr_before_db is None or change.sqnr_gain_db is None:
        return f"– → {after}"
    gain = "" if change.sqnr_after_db >= MAX_SQNR_DB else f"\n{change.sqnr_gain_db:+.1f} dB"
    return f"{_db(change.sqnr_before_db)} → {after}{gain}"


def _ratio(change: Change, unit: str | None) -> str:
    if change.cost_ratio is None:
        return "not measured"
    if unit == "instructions":
        after = quantity(change.cost_after or 0)
    else:
        after = milliseconds(change.cost_after)
    spread = change.cost_ratio_range
    between = "" if spread is None else f" ({spread[0]:.2f}–{spread[1]:.2f})"
    return f"{change.cost_ratio:.2f}{between}\n{after}"
