"""Which kernel calls of a program compute which nodes of its graph, and in what precision.

A row is what a user calls a layer: the calls that carry a node's name, its padding included, or the
run of calls that TVM made of neighbouring nodes, or a conversion between number formats or layouts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from edgepress.passes.analysis import node_macs
from edgepress.targets.program import Call, Program

CONVERSIONS = {"quantise": "Quantize", "dequantise": "Dequantize", "rescale": "Rescale",
               "transpose": "Layout", "copy": "Copy", "intake": "Input"}  # fmt: skip
_QDQ = ("QuantizeLinear", "DequantizeLinear")
_CONVERTING = (
    "quantise",
    "dequantise",
    "transpose",
    "copy",
    "intake",
)  # whatever node they are called after
_CLAMPS = ("Relu", "Clip", "Add")
_VIEWS = ("Reshape", "Flatten", "Identity", "Squeeze", "Unsqueeze", "Constant")
_GATHER = re.compile(r"take|gather")
_PART = re.compile(r" \((padding|broadcast)\)$")
_REGION = re.compile(r"region_(\d+)(?=[A-Za-z_])")
_MOST_OPERATORS = 3  # of a run of nodes, in the name of its operator


@dataclass(kw_only=True)
class Row:
    """Calls that belong together.

    Attributes:
        name: of the node, or of the value that is converted.
        operator: of the node, such as "Conv"; several joined by "+"; or what is converted.
        conversion: whether it only changes number format or layout.
        calls: their numbers in `Program.calls`.
        reads: names of the tensors that its calls read.
        nodes: names of the graph's nodes that it computes, in graph order.
        fused: operators and steps beside the one that gives the name, such as "Relu".
        precision: "float32", "int8", "int16 × int8", "Q3.4" (the format of what it writes, where
            all scales are powers of two), "dynamic int8", or the dtype of other integers.
        macs: multiply-accumulates of one inference.
        bytes_moved: of all that its calls read and write, weights included.
        working_set_bytes: the most that one of its calls touches.
    """

    name: str
    operator: str
    conversion: bool = False
    calls: list[int] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)
    nodes: list[str] = field(default_factory=list)
    fused: list[str] = field(default_factory=list)
    precision: str = ""
    macs: int = 0
    bytes_moved: int = 0
    working_set_bytes: int = 0

    @property
    def is_float(self) -> bool:
        """Whether it computes with floats."""
        return self.precision == "float32"


def node_name(node: ir.Node) -> str:
    """Return the name of a node; that of its output where it has none."""
    return node.name or node.outputs[0].name or ""


def find_rows(program: Program, model: ir.Model) -> list[Row]:
    """Return the rows of a program that was lowered from a model, in order of execution."""
    finder = _Finder(program, model)
    rows = [finder.row(number) for number in range(len(program.calls))]
    distinct = list({id(row): row for row in rows}.values())
    finder.give_nodes(distinct)
    for row in distinct:
        _measure(row, program)
        row.precision = finder.precision(row)
    return distinct


class _Finder:
    """Finds the row of every call; rows are in `_rows`, by what makes calls belong together."""

    def __init__(self, program: Program, model: ir.Model) -> None:
        self._program = program
        self._nodes = list(model.graph)
        self._by_name = {node_name(node): node for node in self._nodes}
        self._makers = {v.name: node for node in self._nodes for v in node.outputs}
        self._known = {*self._makers, *(value.name for value in model.graph.inputs)}
        self._rows: dict[tuple[str, ...], Row] = {}

    def row(self, number: int) -> Row:
        """Return the row of a call, with that call in it."""
        call = self._program.calls[number]
        key, row = self._identify(call)
        row = self._rows.setdefault(key, row)
        row.calls.append(number)
        tensors = self._program.tensors
        row.reads += [n for n in call.arguments if n in tensors and n not in call.outputs]
        part = _PART.search(call.node)
        if part is not None and part[1] not in row.fused:
            row.fused.append(part[1])
        return row

    def _identify(self, call: Call) -> tuple[tuple[str, ...], Row]:
        """Return what identifies the row of a call, and a new row for it."""
        if found := _REGION.match(call.kernel):
            return ("region", found[1]), Row(name=call.node, operator="")
        label = _PART.sub("", call.node)
        kind = call.kernel.rpartition("_")[0]
        node = None if kind in _CONVERTING else self._by_name.get(label)
        if node is None and kind not in CONVERSIONS:
            node = self._maker(label) or self._maker(call.outputs[0])
        if node is not None and node.op_type not in _QDQ:
            return ("node", node_name(node)), Row(name=node_name(node), operator=node.op_type)
        moved = call.arguments[0] if kind == "intake" else call.outputs[0]
        name = self._value_name(label if label in self._known else moved)
        operator = CONVERSIONS.get(kind, kind)
        row = Row(name=name, operator=operator, conversion=kind in CONVERSIONS)
        return ("conversion", operator, call.outputs[0]), row

    def _maker(self, name: str) -> ir.Node | None:
        """Return the node that computes a tensor's value, behind what quantizes it."""
        node = self._makers.get(self._stripped(name))
        while node is not None and node.op_type in _QDQ:
            source = node.inputs[0]
            node = None if source is None else source.producer()
        return node

    def _value_name(self, name: str) -> str:
        """Return the name of the float value behind a tensor."""
        name = self._stripped(name)
        node = self._makers.get(name)
        if node is not None and node.op_type == "QuantizeLinear" and node.inputs[0] is not None:
            return node.inputs[0].name or name
        if node is not None and node.op_type == "DequantizeLinear":
            source = node.inputs[0]
            quantize = None if source is None else source.producer()
            if node.outputs[0].is_graph_output():
                return node.outputs[0].name or name
            if quantize is not None and quantize.inputs[0] is not None:
                return quantize.inputs[0].name or name
        return name

    def _stripped(self, name: str) -> str:
        """Remove what the lowering appended to a value's name, such as `_nhwc_staged`."""
        known = name
        while known and known not in self._known:
            known = known.rpartition("_")[0]
        return known or name

    # Nodes ---------------------------------------------------------------------------------------

    def give_nodes(self, rows: Sequence[Row]) -> None:
        """Give every node to the row that computes it; views and constants have none."""
        owner = {row.name: row for row in rows if not row.conversion and row.name in self._by_name}
        for row in rows:
            if row.conversion or row.name in self._by_name:
                continue
            for node in self._slice(row, owner):
                owner.setdefault(node_name(node), row)
        for node in self._nodes:  # a clamp belongs to what it clamps
            if node_name(node) in owner or node.op_type not in _CLAMPS or node.inputs[0] is None:
                continue
            before = node.inputs[0].producer()
            if before is not None and node_name(before) in owner:
                owner[node_name(node)] = owner[node_name(before)]
        for node in reversed(self._nodes):  # a function that became a table, by its last node
            if node_name(node) in owner or node.op_type in (*_QDQ, *_VIEWS):
                continue
            users = {node_name(user) for value in node.outputs for user in value.consumers()}
            rows_after = [owner[name] for name in users if name in owner]
            if rows_after and all(row is rows_after[0] for row in rows_after):
                owner[node_name(node)] = rows_after[0]
        for node in self._nodes:
            if (holder := owner.get(node_name(node))) is not None:
                holder.nodes.append(node_name(node))
                holder.macs += _macs(node)
        for row in rows:
            self._name_run(row)
            operators = [self._by_name[name].op_type for name in row.nodes if name != row.name]
            if "+" not in row.operator:
                row.fused = [*dict.fromkeys(operators), *row.fused]

    def _slice(self, row: Row, owner: Mapping[str, Row]) -> list[ir.Node]:
        """Return the nodes before what a run of calls writes, up to those of other rows."""
        written = [name for number in row.calls for name in self._program.calls[number].outputs]
        waiting = [node for name in written if (node := self._maker(name)) is not None]
        found: dict[ir.Node, None] = {}
        while waiting:
            node = waiting.pop()
            if node in found or node_name(node) in owner or node.op_type in _QDQ:
                continue
            found[node] = None
            producers = (value.producer() for value in node.inputs if value is not None)
            waiting += [producer for producer in producers if producer is not None]
        return list(found)

    def _name_run(self, row: Row) -> None:
        """Name a run of nodes after its last one, and its operator after the first few."""
        if row.operator:
            return
        operators = list(dict.fromkeys(self._by_name[name].op_type for name in row.nodes))
        more = ["…"] if len(operators) > _MOST_OPERATORS else []
        row.operator = "+".join([*operators[:_MOST_OPERATORS], *more]) or row.name
        row.name = row.nodes[-1] if row.nodes else row.name

    # Precision -----------------------------------------------------------------------------------

    def precision(self, row: Row) -> str:
        """Say what a row computes with."""
        call = self._program.calls[row.calls[-1]]
        tensors = self._program.tensors
        dtypes = [tensors[name].dtype for name in call.arguments if name in tensors]
        nodes = [self._by_name[name] for name in row.nodes if name in self._by_name]
        if any(node.op_type == "MatMulInteger" for node in nodes):
            return "dynamic int8"
        if row.conversion:
            return " → ".join(dict.fromkeys([dtypes[0], dtypes[-1]]))
        if "float32" in dtypes:
            return "float32"
        scales = [found for node in nodes for found in _quantizations(node)]
        reads = [dtype for dtype, _, _, role in scales if role == "read"]
        weights = [dtype for dtype, _, _, role in scales if role == "weight"]
        if not scales or not (widths := [_bits(dtype) for dtype in reads]):
            return _generic(dtypes[-1])
        activations = f"int{max(widths)}"
        format_ = _fixed_point(scales)
        if format_ is not None:
            return format_
        if weights and (weight := f"int{max(map(_bits, weights))}") != activations:
            return f"{activations} × {weight}"
        return activations


def _measure(row: Row, program: Program) -> None:
    """Count the bytes that a row moves and its largest working set."""
    for number in row.calls:
        call = program.calls[number]
        sizes = {name: _size_bytes(program, name) for name in call.arguments}
        if _GATHER.search(call.kernel):  # it reads as many rows of a table as it writes
            most = sum(sizes[name] for name in call.outputs)
            sizes |= {name: min(size, most) for name, size in sizes.items()}
        size = sum(sizes.values())
        row.bytes_moved += size
        row.working_set_bytes = max(row.working_set_bytes, size)


def _size_bytes(program: Program, name: str) -> int:
    if name in program.constants:
        return int(program.constants[name].nbytes)
    return program.tensors[name].size_bytes


def _macs(node: ir.Node) -> int:
    """Count multiply-accumulates; of products of integers too."""
    if node.op_type != "MatMulInteger":
        return node_macs(node)
    shapes = [value.shape for value in (node.inputs[0], node.outputs[0]) if value is not None]
    if any(shape is None or not shape.is_static() for shape in shapes):
        return 0
    depth, out = (tuple(int(str(dim)) for dim in shape) for shape in shapes if shape is not None)
    return math.prod(out) * depth[-1]


_Scale = tuple[str, Any, Any, str]  # dtype, scale, zero point, role


def _quantizations(node: ir.Node) -> Iterator[_Scale]:
    """Yield how the inputs and outputs of a node are quantized in the graph."""
    for index, value in enumerate(node.inputs):
        maker = None if value is None else value.producer()
        if maker is None or maker.op_type != "DequantizeLinear":
            continue
        stored = maker.inputs[0]
        constant = stored is not None and stored.const_value is not None
        role = "read" if not constant else "weight" if index == 1 else "bias"
        yield from _parameters(maker, stored, role)
    for value in node.outputs:
        for user in value.consumers():
            if user.op_type == "QuantizeLinear":
                yield from _parameters(user, user.outputs[0], "written")


def _parameters(node: ir.Node, integers: ir.Value | None, role: str) -> Iterator[_Scale]:
    scale, zero = ([*node.inputs, None][index] for index in (1, 2))
    dtype = zero.dtype if zero is not None else None if integers is None else integers.dtype
    if scale is None or scale.const_value is None or dtype is None:
        return
    point = None if zero is None or zero.const_value is None else zero.const_value.numpy()
    yield dtype.numpy().name, scale.const_value.numpy(), point, role


def _bits(dtype: str) -> int:
    return np.dtype(dtype).itemsize * 8


def _generic(dtype: str) -> str:
    """Return the precision of 8-bit values that only move, or of other integers."""
    return {"uint8": "int8"}.get(dtype, dtype)


def _fixed_point(scales: Sequence[_Scale]) -> str | None:
    """Return the Qm.n format of what is written, where all scales are powers of two."""
    for _, scale, point, _ in scales:
        mantissas, _ = np.frexp(np.asarray(scale, np.float64))
        if not np.all(mantissas == 0.5) or (point is not None and np.any(point)):
            return None
    kept = [one for one in scales if one[3] == "written"] or [o for o in scales if o[3] == "read"]
    dtype, scale, _, _ = kept[-1]
    fraction = -int(np.log2(np.asarray(scale, np.float64).ravel()[0]))
    return f"Q{_bits(dtype) - 1 - fraction}.{fraction}"
