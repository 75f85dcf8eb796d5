"""The size ledger: what the weights of every layer take, stage by stage, down to real bytes.

The stages are those of Han, Mao and Dally, "Deep Compression", 2016: float32, pruned, shared and
coded. The first three are computed from the compressed graph; the last is what `weights.epw` holds,
where kernels have constants of their own and pad weights to whole vectors.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edgepress.pipeline import _stage_sizes
from edgepress.pipeline._explain_rows import find_rows, node_name
from edgepress.pipeline._stage_sizes import (
    CONV_INDEX_BITS,
    FLOAT_BITS,
    INDEX_BITS,
    pruned_bits,
    shared_bits,
)
from edgepress.pipeline.cost import is_parameter
from edgepress.targets.program import Program
from edgepress.targets.weights import HEADER_BYTES, entry_bytes

OTHER = "other"
SUMS = ("weights", "zeros", "fp32_bytes", "pruned_bytes", "shared_bytes", "coded_bytes",
        "container_bytes", "entropy_bytes")  # fmt: skip
_CONVOLUTIONS = ("Conv", "ConvTranspose")
_QDQ = ("QuantizeLinear", "DequantizeLinear")


def size_ledger(
    program: Program, model: ir.Model, weights: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Account for every weight of a graph and every byte of its weights file.

    Args:
        program: lowered from the model.
        model: the compressed graph.
        weights: what `write_weights` said of the program's constants.

    Returns:
        `layers`: one entry per layer that has weights, in order of execution, then one called
        "other" for all else: `name`, `operator`, `SUMS` and `ratio`. `total`: their sums, and the
        ratio. What several layers read belongs to the first of them.
    """
    rows = find_rows(program, model)
    other = len(rows)
    figures: list[dict[str, float]] = [dict.fromkeys(SUMS, 0) for _ in range(other + 1)]
    owners = {name: number for number, row in enumerate(rows) for name in row.nodes}
    for value in model.graph.initializers.values():
        if value.const_value is not None and is_parameter(value):
            readers = list(_readers(value, owners))
            first = min((owners[node_name(node)] for node in readers), default=other)
            _add(figures[first], _stages(value, readers))
    layers = [number for number in range(other) if figures[number]["weights"]]
    first_reader: dict[str, int] = {}
    for number in layers:
        for call in rows[number].calls:
            for name in program.calls[call].arguments:
                first_reader.setdefault(name, number)
    _add_file(figures, weights, [first_reader.get(row["name"], other) for row in weights])
    entries = [
        {"name": rows[number].name, "operator": rows[number].operator, **_finished(figures[number])}
        for number in layers
    ]
    if any(figures[other].values()):
        entries.append({"name": OTHER, "operator": "", **_finished(figures[other])})
    total: dict[str, float] = dict.fromkeys(SUMS, 0)
    for entry in entries:
        _add(total, {key: entry[key] for key in SUMS})
    return {"layers": entries, "total": _finished(total)}


def ledger_version() -> str:
    """Return the code that a ledger depends on: what is cached may be older."""
    return inspect.getsource(_stage_sizes) + inspect.getsource(sys.modules[__name__])


def _readers(value: ir.Value, owners: Mapping[str, int]) -> Iterator[ir.Node]:
    """Yield the nodes of layers that read a constant, be it through nodes that belong to none."""
    waiting, seen = [value], {value}
    while waiting:
        for node in waiting.pop().consumers():
            if node_name(node) in owners:
                yield node
                continue
            new = [output for output in node.outputs if output not in seen]
            waiting += new
            seen.update(new)


def _stages(value: ir.Value, readers: Sequence[ir.Node]) -> dict[str, int]:
    """Return what a constant of the graph takes in each stage before it is coded."""
    assert value.const_value is not None
    array = value.const_value.numpy()
    convolved = any(node.op_type in _CONVOLUTIONS for node in readers)
    index_bits = CONV_INDEX_BITS if convolved else INDEX_BITS
    return {
        "weights": array.size,
        "zeros": array.size - int(np.count_nonzero(array)),
        "fp32_bytes": array.size * FLOAT_BITS // 8,
        "pruned_bytes": -(-pruned_bits(array, index_bits) // 8),
        "shared_bytes": -(-shared_bits(array, index_bits, _scales(value)) // 8),
    }


def _scales(value: ir.Value) -> int:
    """Count the scales that 8-bit weights have; wider ones are biases, whose scales follow."""
    count = 0
    for node in value.consumers():
        scale = node.inputs[1] if node.op_type in _QDQ else None
        if value.dtype is not None and value.dtype.itemsize == 1 and scale is not None:
            count += 0 if scale.const_value is None else scale.const_value.size
    return count


def _add_file(
    figures: Sequence[dict[str, float]], weights: Sequence[Mapping[str, Any]], owners: Sequence[int]
) -> None:
    """Add every byte of the weights file; the header belongs to no layer.

    A payload that several constants share belongs to the first layer that owns one of them, and so
    do the zeros before it.
    """
    end = HEADER_BYTES
    figures[-1]["container_bytes"] += HEADER_BYTES
    payloads: dict[int, tuple[int, Mapping[str, Any]]] = {}
    for row, owner in zip(weights, owners, strict=True):
        size = entry_bytes(len(row["name"].encode()), len(row["shape"]))
        figures[owner]["container_bytes"] += size
        end += size
        if row["encoded_bytes"]:
            first, _ = payloads.get(row["offset"], (owner, row))
            payloads[row["offset"]] = min(first, owner), row
    for offset, (owner, row) in sorted(payloads.items(), key=lambda item: item[0]):
        figures[owner]["container_bytes"] += offset - end
        figures[owner]["coded_bytes"] += row["encoded_bytes"]
        figures[owner]["entropy_bytes"] += row["entropy_bytes"]
        end = offset + row["encoded_bytes"]


def _add(sums: dict[str, float], more: Mapping[str, float]) -> None:
    for key, value in more.items():
        sums[key] += value


def _finished(sums: Mapping[str, float]) -> dict[str, Any]:
    """Add how many times smaller the real bytes are than float32; None without weights."""
    real = sums["coded_bytes"] + sums["container_bytes"]
    ratio = round(sums["fp32_bytes"] / real, 2) if sums["weights"] and real else None
    return {key: round(value) for key, value in sums.items()} | {"ratio": ratio}
