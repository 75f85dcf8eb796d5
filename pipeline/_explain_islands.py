"""Float islands of a quantized bundle: what runs in float, why, and what converts around it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir

from edgepress.pipeline._explain_rows import Row, node_name
from edgepress.pipeline.bundle import Bundle
from edgepress.targets.program import Program


class _Costed(Protocol):
    @property
    def cost_share(self) -> float | None: ...


@dataclass(frozen=True, kw_only=True)
class Island:
    """Layers in float that pass floats to each other.

    Attributes:
        layers: their names, in order of execution.
        why: why the first of them is float.
        conversions: how many conversions read what it writes or write what it reads.
        cost_share: of its layers, from 0 to 1; None where it was not measured.
        conversion_share: of its conversions; one between two islands counts for both.
        rows: indices of its layers.
        around: indices of its conversions.
    """

    layers: list[str]
    why: str
    conversions: int
    cost_share: float | None = None
    conversion_share: float | None = None
    rows: list[int]
    around: list[int]

    def with_shares(self, layers: Sequence[_Costed]) -> Island:
        """Return the island with its share of the cost; `layers` are in the order of rows."""
        shares = [
            [layers[index].cost_share for index in indices] for indices in (self.rows, self.around)
        ]
        inside, around = (
            None if any(share is None for share in one) else sum(share or 0.0 for share in one)
            for one in shares
        )
        return dataclasses.replace(self, cost_share=inside, conversion_share=around)


def find_islands(
    rows: Sequence[Row], program: Program, model: ir.Model, bundle: Bundle
) -> list[Island]:
    """Return the float islands of a quantized bundle, in order of execution."""
    touched = [_tensors(row, program) for row in rows]
    floats = [index for index, row in enumerate(rows) if row.is_float and not row.conversion]
    group = {index: index for index in floats}

    def find(index: int) -> int:
        while group[index] != index:
            index = group[index]
        return index

    for index in floats:
        for other in floats:
            if other < index and touched[index][0] & touched[other][1]:
                group[find(index)] = find(other)
    islands: dict[int, list[int]] = {}
    for index in floats:
        islands.setdefault(find(index), []).append(index)
    reasons = _Reasons(model, bundle)
    found = []
    for members in sorted(islands.values()):
        reads = {name for index in members for name in touched[index][0]}
        writes = {name for index in members for name in touched[index][1]}
        around = [
            index
            for index, row in enumerate(rows)
            if row.conversion
            and index not in members
            and (touched[index][1] & reads or touched[index][0] & writes)
        ]
        found.append(
            Island(
                layers=[rows[index].name for index in members],
                why=reasons.of(rows[members[0]]),
                conversions=len(around),
                rows=members,
                around=around,
            )
        )
    return found


def _tensors(row: Row, program: Program) -> tuple[set[str], set[str]]:
    """Return the tensors that a row reads from others, and those that it writes."""
    calls = [program.calls[number] for number in row.calls]
    writes = {name for call in calls for name in call.outputs}
    reads = {name for call in calls for name in call.arguments if name in program.tensors}
    return reads - writes, writes


class _Reasons:
    """Why nodes are float: the pass that quantized said so, or the lowering has no integers."""

    def __init__(self, model: ir.Model, bundle: Bundle) -> None:
        self._nodes = {node_name(node): node for node in model.graph}
        self._skipped = {
            str(what): str(why)
            for step in bundle.manifest.steps
            if str(step.get("pass_name", "")).startswith("quantize")
            for what, why in step.get("skipped", [])
        }

    def of(self, row: Row) -> str:
        """Say why a row is float."""
        names = row.nodes or [row.name]
        for name in names:
            if name in self._skipped:
                return self._skipped[name]
        nodes = [self._nodes[name] for name in names if name in self._nodes]
        if nodes and all(_between_pairs(node) for node in nodes):
            return (
                f"it is quantized in the graph, but {row.operator} has no integer form there "
                "(docs/integer.md says which do)"
            )
        return "nothing quantizes what it reads and writes in the graph"


def _between_pairs(node: ir.Node) -> bool:
    """Whether a node reads what was dequantized, and what it writes is quantized."""
    read = [value for value in node.inputs if value is not None and value.const_value is None]
    makers = [value.producer() for value in read]
    users = [user for value in node.outputs for user in value.consumers()]
    return (
        bool(makers)
        and bool(users)
        and all(maker is not None and maker.op_type == "DequantizeLinear" for maker in makers)
        and all(user.op_type == "QuantizeLinear" for user in users)
    )
