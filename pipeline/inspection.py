"""What is in a model or a bundle, without running it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from rich.console import Console
from rich.table import Table
from rich.text import Text

from edgepress.passes.analysis import channel_groups, node_macs
from edgepress.passes.base import Context, PassError
from edgepress.pipeline.build import describe
from edgepress.pipeline.bundle import read_bundle
from edgepress.pipeline.cost import cost
from edgepress.pipeline.driver import Driver, canonical_passes
from edgepress.pipeline.feeds import true_inputs
from edgepress.pipeline.ledger_table import ledger_table
from edgepress.pipeline.load import load_model
from edgepress.pipeline.report import facts, quantity, size
from edgepress.pipeline.snapshot import Snapshot
from edgepress.targets.lowering.dynamic import computes_integers
from edgepress.targets.reference import Reference, float_islands

FEW = 6  # names in a cell of a table


def inspect(
    path: Path, input_shapes: Mapping[str, tuple[int, ...]], *, channels: bool = False
) -> dict[str, Any]:
    """Describe a model (made canonical where its shapes allow it) or a bundle as plain data.

    With `channels` its channel groups are in it; for that, shapes must be fixed.
    """
    if path.is_dir():
        bundle = read_bundle(path)
        model = Snapshot((path / "graph.onnx").read_bytes()).load()
        return {
            "kind": "bundle",
            "facts": dict(facts(bundle, bundle.evidence)),
            "files": bundle.manifest.files,
            "weights": bundle.manifest.weights,
            "ledger": bundle.manifest.ledger,
            **_describe(model, "", channels),
        }
    model, note = load_model(path), ""
    try:
        driver = Driver(model)
        driver.run(canonical_passes(), Context(input_shapes=dict(input_shapes)))
        model = driver.model
    except PassError as error:
        if channels:
            raise
        note = f"shown as the file has it, sizes and float islands may be unknown: {error}"
    return {"kind": "model", **_describe(model, note, channels)}


def _describe(model: ir.Model, note: str, channels: bool) -> dict[str, Any]:
    figures = cost(model)
    return {
        "note": note,
        "opset": model.opset_imports.get("", 0),
        "inputs": [_tensor(value) for value in true_inputs(model)],
        "outputs": [_tensor(value) for value in model.graph.outputs],
        "parameters": figures.parameters,
        "macs": figures.macs,
        "size_bytes": figures.size_bytes,
        "operators": dict(Counter(node.op_type for node in model.graph).most_common()),
        "float_islands": _islands(model) if computes_integers(model) and not note else None,
        "nodes": [
            {
                "name": node.name,
                "operator": node.op_type,
                "output": str(node.outputs[0].shape or "?"),
                "dtype": str(node.outputs[0].dtype or "?"),
                "macs": node_macs(node),
            }
            for node in model.graph
        ],
        "channels": dataclasses.asdict(channel_groups(model)) if channels else None,
    }


def _islands(model: ir.Model) -> list[list[dict[str, str]]]:
    """Describe what computes in float between integers: connected nodes, by name and operator."""
    return [
        [{"name": node.name or "", "operator": node.op_type} for node in island]
        for island in float_islands(Reference(model).model)
    ]


def _tensor(value: ir.Value) -> dict[str, Any]:
    """Describe an input or output; open dimensions by their names."""
    if value.shape is not None and value.shape.is_static():
        return describe(value)
    return {"name": value.name, "dtype": str(value.dtype), "shape": str(value.shape)}


def show(found: Mapping[str, Any], screen: Console) -> None:
    """Print what `inspect` found: the channel groups where they are asked for, else the nodes."""
    if found["channels"] is not None:
        _show_channels(found["channels"], screen)
        return
    grid = Table.grid(padding=(0, 2))
    for name, text in found.get("facts", {}).items():
        grid.add_row(name, Text(text))
    for kind in ("inputs", "outputs"):
        for tensor in found[kind]:
            grid.add_row(kind[:-1], Text(f"{tensor['name']} {tensor['dtype']} {tensor['shape']}"))
    grid.add_row("parameters", quantity(found["parameters"]))
    grid.add_row("MACs", quantity(found["macs"]))
    grid.add_row("weights", size(found["size_bytes"]))
    operators = ", ".join(f"{count} {name}" for name, count in found["operators"].items())
    grid.add_row("operators", Text(operators))
    if found["float_islands"] is not None:
        grid.add_row("float islands", Text(_island_lines(found["float_islands"])))
    table = Table()
    for heading in ("node", "operator", "output", "dtype"):
        table.add_column(heading)
    table.add_column("MACs", justify="right")
    for node in found["nodes"]:
        texts = (Text(str(node[key])) for key in ("name", "operator", "output", "dtype"))
        table.add_row(*texts, quantity(node["macs"]) if node["macs"] else "")
    screen.print(table)
    if found.get("ledger"):  # of a bundle that is not older than ledgers
        screen.print(ledger_table(found["ledger"]))
    screen.print(grid)
    if found["note"]:
        screen.print(Text(found["note"]))


def _island_lines(islands: Sequence[Sequence[Mapping[str, str]]]) -> str:
    """Write an island a line: the names of its nodes, and their operators where they tell none."""
    lines = []
    for island in islands:
        names = [
            node["name"]
            if node["operator"] in node["name"]
            else f"{node['name']} ({node['operator']})".strip()
            for node in island[:FEW]
        ]
        more = f" and {len(island) - FEW} more" if len(island) > FEW else ""
        lines.append(", ".join(names) + more)
    return _few(lines) or "none"


def _few(names: Sequence[str]) -> str:
    """Write names one a line; of many only the first, since `--json` has them all."""
    shown = names if len(names) <= FEW else names[: FEW - 1]
    more = [f"… and {len(names) - len(shown)} more"] if len(shown) < len(names) else []
    return "\n".join([*shown, *more])


def _show_channels(found: Mapping[str, Any], screen: Console) -> None:
    """Print a row per group; the first of its layers is its name."""
    table = Table(show_lines=True)
    table.add_column("group", overflow="fold")
    table.add_column("channels", justify="right")
    for heading in ("may go", "cut together", "read by"):
        table.add_column(heading, overflow="fold")
    for group in found["groups"]:
        count, free, width = group["channels"], group["free"], group["width"]
        much = "all" if free == count else str(free or "none")
        table.add_row(
            Text(group["name"]),
            f"{count} × {width}" if width > 1 else str(count),
            Text(f"{much}: {group['why']}" if group["why"] else much),
            Text(_few(group["layers"][1:])),
            Text(_few(group["readers"])),
        )
    screen.print(table)
    free = sum(group["free"] > 0 for group in found["groups"])
    screen.print(f"{len(found['groups'])} groups, {free} of which may lose channels")
    for node, operator in found["unknown"]:
        screen.print(Text(f"{node}: {operator} has no rule, so it keeps every channel it touches"))
