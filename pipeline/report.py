"""What a run did, for people: tables on the terminal. The JSON form has the same figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from edgepress.pipeline.bundle import Bundle, Manifest
from edgepress.pipeline.driver import Equivalence, StepRecord
from edgepress.pipeline.evidence import Evidence
from edgepress.pipeline.gates import PASS, UNVERIFIED
from edgepress.pipeline.latency_words import latency_facts
from edgepress.pipeline.run import Result

PLAIN_WIDTH = 120  # where stdout is no terminal
COLOURS = {PASS: "green", UNVERIFIED: "yellow"}


def console() -> Console:
    """Return a console on stdout; wide enough for the tables where it is a pipe."""
    screen = Console()
    return screen if screen.is_terminal else Console(width=PLAIN_WIDTH)


def steps_table(steps: Sequence[StepRecord]) -> Table:
    """Show per pass what changed, parameters, MACs, bytes, the comparison and the time."""
    table = Table(title="passes", title_justify="left")
    table.add_column("pass")
    table.add_column("what changed")
    for heading in ("parameters", "MACs", "weights", "outputs", "time"):
        table.add_column(heading, justify="right")
    for step in steps:
        table.add_row(
            step.pass_name,
            Text(changes(step)),
            quantity(step.parameters),
            quantity(step.macs),
            size(step.size_bytes),
            comparison(step.equivalence),
            "cached" if step.cached else f"{step.seconds:.1f} s",
        )
    return table


def changes(step: StepRecord) -> str:
    """Say in a few words what a pass did."""
    if not step.modified and not any(step.stats.values()):
        return "nothing"
    figures = [
        f"{name} {f'{value:g}' if abs(value) < 1e5 else quantity(value)}"
        for name, value in step.stats.items()
        if value
    ]
    if step.skipped:
        figures.append(f"skipped {len(step.skipped)}")
    return ", ".join(figures) or "yes"


def comparison(equivalence: Equivalence | None) -> str:
    """Write how the outputs compare to those before the pass."""
    if equivalence is None:
        return "same"
    if equivalence.metric == "sqnr_db":
        return f"{equivalence.value:.1f} dB"
    return f"±{equivalence.value:.1g}"


def verdicts_table(evidence: Evidence | Mapping[str, Any]) -> Table:
    """Show every gate with its figure and limit."""
    data = evidence.to_json() if isinstance(evidence, Evidence) else evidence
    table = Table(title=f"gates, on {data['device'].get('spec', 'the device')}")
    table.title_justify = "left"
    for heading in ("gate", "verdict", "measured", "limit", "what"):
        table.add_column(heading)
    for verdict in data["verdicts"]:
        colour = COLOURS.get(verdict["verdict"], "red")
        table.add_row(
            verdict["gate"],
            Text(verdict["verdict"], style=colour),
            _number(verdict["value"]),
            _number(verdict["limit"]),
            Text(verdict["detail"]),
        )
    return table


def facts(bundle: Bundle, evidence: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """List the figures of a bundle in words: sizes, memory, latency, accuracy."""
    manifest = bundle.manifest
    raw = manifest.source["size_bytes"]
    rows = [
        ("bundle", f"{bundle.folder} for {manifest.target['name']}, {manifest.arithmetic}"),
        ("on the board", f"{size(bundle.deployed_bytes)} (the model file had {size(raw)})"),
        ("memory", f"{size(manifest.memory['arena_bytes'])} for activations{_peak(evidence)}"),
    ]
    if bundle.has_coded_weights:
        rows.append(("weights", _weights(manifest)))
    if evidence is None:
        return [*rows, ("verified", "no: nothing was measured on a device")]
    if "fleet" in evidence:
        from edgepress.pipeline.fleet_table import fleet_summary  # it imports this module

        fleet = evidence["fleet"]
        return [*rows, ("verified", f"on {len(fleet)} boards: {fleet_summary(fleet)}")]
    rows += latency_rows(evidence)
    if found := evidence["accuracy"]:
        parts = [
            f"{label} {found[key]:.4g}{unit}"
            for key, label, unit in (
                ("top1", "top-1", " %"),
                ("reference_top1", "fp32", " %"),
                ("agreement", "agreement with fp32", " %"),
                ("sqnr_db", "SQNR", " dB"),
            )
            if found[key] is not None
        ]
        rows.append(("accuracy", f"{', '.join(parts)} on {found['samples']} samples"))
    return rows


def latency_rows(evidence: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List the figures of a latency in words, or of what an emulator counted instead."""
    if latency := evidence["latency"]:
        return latency_facts(latency)
    if evidence["instructions"]:
        text = f"unverified; {quantity(evidence['instructions'])} instructions per inference"
        return [("latency", f"{text} in the emulator")]
    return []


def peak_memory(evidence: Mapping[str, Any]) -> str:
    """Write what the process took on a device at its peak; empty where that is not known."""
    peak = evidence["device"].get("peak_memory_bytes")
    return size(peak) if isinstance(peak, int) and peak else ""


def _peak(evidence: Mapping[str, Any] | None) -> str:
    """Say so for the one device that a bundle was measured on."""
    if evidence is None or "fleet" in evidence:
        return ""
    peak = peak_memory(evidence)
    return f"; all of the process at its peak {peak}" if peak else ""


def _weights(manifest: Manifest) -> str:
    """Say what coded weights take in the file, and once they are decoded."""
    total, decoded = manifest.ledger["total"], manifest.memory["weight_bytes"]
    text = f"{quantity(total['weights'])} in {size(total['coded_bytes'])}"
    if total["ratio"]:
        text += f", the file {total['ratio']:.1f} times smaller than their float32"
    return f"{text}; decoded, {size(decoded)}"


def show_result(result: Result, screen: Console) -> None:
    """Print the tables of a run."""
    evidence = result.evidence
    show_steps(result.steps, screen, None if evidence is None else evidence.trials)
    if result.tuning is not None:
        screen.print(Text(f"tune: {result.tuning}"))
    if result.bundle.has_coded_weights:
        from edgepress.pipeline.ledger_table import FEW_LAYERS, ledger_table  # it imports this

        screen.print(ledger_table(result.bundle.manifest.ledger, FEW_LAYERS))
    show_bundle(result.bundle, None if evidence is None else evidence.to_json(), screen)


def show_steps(
    steps: Sequence[StepRecord],
    screen: Console,
    costs: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Print what passes did, what they tried, and the sentences that they want to be read.

    Args:
        steps: one record per pass.
        screen: where to.
        costs: what the device said of every model that was tried, or None.
    """
    from edgepress.pipeline.precision_table import precision_table  # it imports this module

    screen.print(steps_table(steps))
    for step in steps:
        if step.trials:
            screen.print(precision_table(step.trials, costs))
    show_notes(steps, screen)


def show_notes(steps: Sequence[StepRecord], screen: Console) -> None:
    """Print the sentences that passes want to be read."""
    for step in steps:
        for note in step.notes:
            screen.print(Text(f"{step.pass_name}: {note}"))


def show_bundle(bundle: Bundle, evidence: Mapping[str, Any] | None, screen: Console) -> None:
    """Print the gates and figures of a bundle, or a row for each board of a fleet."""
    if evidence is not None and "fleet" in evidence:
        from edgepress.pipeline.fleet_table import fleet_table  # it imports this module

        screen.print(fleet_table(evidence["fleet"]))
    elif evidence is not None:
        screen.print(verdicts_table(evidence))
    grid = Table.grid(padding=(0, 2))
    for name, text in facts(bundle, evidence):
        grid.add_row(name, Text(text))
    screen.print(grid)


def result_json(result: Result) -> dict[str, Any]:
    """Return everything about a run as plain data."""
    return {
        "bundle": str(result.bundle.folder),
        "deployed_bytes": result.bundle.deployed_bytes,
        "arithmetic": result.bundle.manifest.arithmetic,
        "ledger": result.bundle.manifest.ledger,
        "target": result.bundle.manifest.target["name"],
        "steps": [dataclasses.asdict(step) for step in result.steps],
        "seconds": dict(result.seconds),
        "compile_cached": result.cached,
        "evidence": None if result.evidence is None else result.evidence.to_json(),
        "unverified": None if result.unverified is None else str(result.unverified),
        "tuning": None if result.tuning is None else dataclasses.asdict(result.tuning),
        "passed": result.evidence is not None and result.evidence.passed,
    }


def size(count: float) -> str:
    """Write a number of bytes.

    >>> size(1536), size(300_000)
    ('1.54 kB', '300 kB')
    """
    return f"{quantity(count)}B" if count >= 999.5 else f"{count:.0f} B"


def quantity(count: float) -> str:
    """Write a number with three digits and a prefix.

    >>> quantity(999), quantity(390_000_000)
    ('999', '390 M')
    """
    prefixes = ["", " k", " M", " G", " T"]
    while count >= 999.5 and len(prefixes) > 1:
        count /= 1000
        del prefixes[0]
    return f"{count:.3g}{prefixes[0]}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
