"""quantize-dynamic: int8 matrix products whose activations are quantized row by row at run time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from edgepress.calibration.base import Array
from edgepress.passes._compensated_rounding import compensated_steps
from edgepress.passes._constants import constant, drop_unread, replace_output
from edgepress.passes._moments import input_moments, is_layer
from edgepress.passes._patterns import chosen_nodes
from edgepress.passes._qdq_graph import weight_bytes
from edgepress.passes._row_quantization import (
    LARGEST_WEIGHT,
    MOST_INPUTS,
    QuantizedColumns,
    RowQuantizer,
    column_scales,
    to_steps,
)
from edgepress.passes.base import Context, Outcome, Pass, PassRefused

OLDEST_OPSET = 13
SMALLEST_TABLE_BYTES = 64 * 1024  # what is smaller costs more accuracy than it saves
UNINFORMED = "weights are rounded to nearest: there are no samples to measure their inputs on"
NOTHING = "there is no product with a constant weight and no embedding table to quantize"


@dataclass(frozen=True, kw_only=True)
class QuantizeDynamic(Pass):
    """Quantizes MatMul and Gemm with constant weights, and embedding tables, to 8 bits.

    Weights become int8 with one scale per column. Activations get a scale and a zero point per row
    (per token) while the model runs, so no calibration is needed and an outlier in one row costs
    the others nothing. Products that read the same value share its quantization. Biases and all
    other operators stay float. An embedding table becomes int8 with one scale per row.

    Rows of activations: Yao et al., "ZeroQuant", NeurIPS 2022, section 4.1. Compensated rounding:
    Frantar et al., "GPTQ", ICLR 2023.

    Attributes:
        per_channel: one weight scale per column; false for one per weight.
        rounding: "compensated": weights are rounded one input after another, and those that follow
            make up for the error, as far as calibration samples tell how; without samples, and with
            "nearest", each is rounded to the nearest step.
        embeddings: quantize the tables of Gather nodes too.
        skip: regular expressions; a node stays float where one matches its whole name.
    """

    lossless: ClassVar[bool] = False

    per_channel: bool = True
    rounding: str = "compensated"
    embeddings: bool = True
    skip: tuple[str, ...] = ()

    def requires(self, model: ir.Model, context: Context) -> None:  # noqa: ARG002
        """Refuse wrong options, an old opset, and patterns that are none or match nothing."""
        if self.rounding not in ("compensated", "nearest"):
            why = f"it is {self.rounding!r}; choose 'compensated' or 'nearest'."
            raise PassRefused(self.name, "rounding", why)
        opset = model.graph.opset_imports.get("", 0)
        if opset < OLDEST_OPSET:
            raise PassRefused(
                self.name,
                "model",
                f"it has opset {opset}, dynamic quantization needs {OLDEST_OPSET}; "
                "put `raise-opset` before `quantize-dynamic`.",
            )
        if any(_candidates(model)):
            self._skipped(model)

    def call(self, model: ir.Model, context: Context) -> Outcome:
        """Replace the products and tables that can be quantized."""
        candidates = list(_candidates(model))
        if not candidates:
            return Outcome(model=model, modified=False, notes=[NOTHING])
        before, user_skips = weight_bytes(model), self._skipped(model)
        reasons = {node: user_skips.get(node) or self._why_not(node) for node in candidates}
        products = [n for n, why in reasons.items() if not why and n.op_type != "Gather"]
        rounded = self._compensated(model, products, context)
        writer = RowQuantizer(model)
        columns: dict[tuple[ir.Value, bool, float], QuantizedColumns] = {}
        skipped: list[tuple[str, str]] = []
        counts = {"MatMul": 0, "Gemm": 0, "Gather": 0}
        for node, why in reasons.items():
            if why:
                skipped.append((node.name or node.op_type, why))
                continue
            if node.op_type == "Gather":
                _quantize_table(writer, node)
            else:
                self._quantize_product(writer, node, columns, rounded.get(node))
            counts[node.op_type] += 1
        drop_unread(model.graph)
        quantized = counts["MatMul"] + counts["Gemm"]
        return Outcome(
            model=model,
            modified=any(counts.values()),
            stats={
                "products_quantized": quantized,
                "products_compensated": len(rounded),
                "activations_quantized": len(writer.rows_of),
                "tables_quantized": counts["Gather"],
                "weight_bytes_before": before,
                "weight_bytes_after": weight_bytes(model),
            },
            skipped=skipped,
            notes=self._notes(bool(products), any(counts.values()), context),
        )

    def _notes(self, has_products: bool, modified: bool, context: Context) -> list[str]:
        if not modified:
            return [NOTHING]
        uninformed = self.rounding == "compensated" and context.samples is None
        return [UNINFORMED] if has_products and uninformed else []

    def _compensated(
        self, model: ir.Model, products: list[ir.Node], context: Context
    ) -> dict[ir.Node, Array]:
        """Round the weights of products by what they read on the samples; {} without samples.

        A weight that several nodes read is rounded by what the first of them reads.
        """
        if self.rounding == "nearest" or context.samples is None:
            return {}
        readers: dict[ir.Value | None, list[ir.Node]] = {}
        for node in products:
            if is_layer(node):
                readers.setdefault(node.inputs[0], []).append(node)
        firsts = [nodes[0] for nodes in readers.values()]
        found: dict[ir.Node, Array] = {}
        for first, moments in input_moments(self.name, model, firsts, context.samples, context):
            layers = readers[first.inputs[0]]
            weights = [_weights(layer) for layer in layers]
            scales = [column_scales(weight, self.per_channel) for weight in weights]
            # rounded, so that the order of the samples does not show
            second = moments.second[0, :-1, :-1].astype(np.float32)
            steps = compensated_steps(
                np.hstack(weights), np.concatenate(scales), second, LARGEST_WEIGHT
            )
            ends = np.cumsum([weight.shape[1] for weight in weights])[:-1]
            found |= zip(layers, np.split(steps, ends, axis=1), strict=True)
        return found

    def _skipped(self, model: ir.Model) -> dict[ir.Node, str]:
        """Return the nodes that the user wants left float. Refuses a pattern without a match."""
        found = chosen_nodes(self.name, "skip", self.skip, list(model.graph))
        return {node: f"skipped by {pattern!r}" for node, pattern in found.items()}

    def _why_not(self, node: ir.Node) -> str | None:
        """Say why a node stays float, or None where it does not."""
        if node.op_type == "Gather":
            return _why_no_table(node, self.embeddings)
        return _why_no_product(node)

    def _quantize_product(
        self,
        writer: RowQuantizer,
        node: ir.Node,
        columns: dict[tuple[ir.Value, bool, float], QuantizedColumns],
        steps: Array | None,
    ) -> None:
        x, weight, output = node.inputs[0], node.inputs[1], node.outputs[0]
        assert x is not None
        assert weight is not None
        name = output.name or "product"
        key = (weight, _is_turned(node), _factor(node, "alpha"))
        if key not in columns:
            array = _weights(node)
            scales = column_scales(array, self.per_channel)
            steps = to_steps(array, scales) if steps is None else steps
            columns[key] = writer.columns(weight.name or name, steps, scales)
        product = writer.product(writer.rows(x, node), columns[key], node, name)
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            bias = node.inputs[2]
            if (factor := _factor(node, "beta")) != 1:
                known = constant(bias)
                assert known is not None
                bias = writer.constant(f"{bias.name}_scaled", known * np.float32(factor))
            product = writer.emit(node, "Add", (product, bias), f"{name}_biased")
        _replace(node, product)


def _candidates(model: ir.Model) -> Iterator[ir.Node]:
    """Yield the nodes that multiply float activations, and those that look rows of a table up."""
    for node in model.graph:
        first = node.inputs[0] if node.inputs else None
        if node.domain not in ("", "ai.onnx") or first is None:
            continue
        if first.dtype != ir.DataType.FLOAT:
            continue
        is_table = node.op_type == "Gather" and constant(first) is not None
        if node.op_type in ("MatMul", "Gemm") or is_table:
            yield node


def _why_no_product(node: ir.Node) -> str | None:
    """Say why a MatMul or Gemm stays float, or None where it does not."""
    x, weights = node.inputs[0], constant(node.inputs[1])
    if weights is None:
        return "its second operand is no constant"
    if constant(x) is not None:
        return "its first operand is a constant"
    if weights.ndim != 2:
        return f"its weight has {weights.ndim} dimensions, not 2"
    if x is None or x.shape is None or len(x.shape) < 2:
        return "its first operand has no rows"
    if node.op_type == "Gemm" and node.attributes.get_int("transA", 0) != 0:
        return "its first operand is transposed"
    has_bias = len(node.inputs) > 2 and node.inputs[2] is not None
    if has_bias and _factor(node, "beta") != 1 and constant(node.inputs[2]) is None:
        return "its bias is no constant and has a factor"
    inputs = weights.shape[1 if _is_turned(node) else 0]
    if inputs > MOST_INPUTS:
        return f"sums of {inputs} products may not fit 32 bits; {MOST_INPUTS} do"
    if weights.size == 0:
        return "its weight is empty"
    if not np.isfinite(weights).all():
        return "its weight holds NaN or infinity"
    return None


def _why_no_table(node: ir.Node, wanted: bool) -> str | None:
    """Say why a Gather stays float, or None where it does not."""
    if not wanted:
        return "`embeddings` is off"
    table = node.inputs[0]
    array = constant(table)
    assert array is not None
    assert table is not None
    if array.ndim != 2 or node.attributes.get_int("axis", 0) not in (0, -2):
        return "it does not look up rows of a matrix"
    if array.nbytes < SMALLEST_TABLE_BYTES:
        return f"its table has only {array.nbytes} bytes"
    if len(table.uses()) > 1 or table.is_graph_output():
        return "something else reads its table too"
    if not np.isfinite(array).all():
        return "its table holds NaN or infinity"
    return None


def _quantize_table(writer: RowQuantizer, node: ir.Node) -> None:
    """Let a Gather look int8 rows up, and their scales."""
    table, indices = node.inputs[0], node.inputs[1]
    assert table is not None
    assert indices is not None
    array = constant(table)
    assert array is not None
    scales = column_scales(array.T)
    rows = writer.constant(f"{table.name}_quantized", to_steps(array.T, scales).T)
    column = writer.constant(f"{table.name}_scales", scales[:, None])
    name = node.outputs[0].name or "row"
    found = writer.emit(node, "Gather", (rows, indices), f"{name}_steps", axis=0)
    scale = writer.emit(node, "Gather", (column, indices), f"{name}_scale", axis=0)
    real = writer.emit(node, "Cast", (found,), f"{name}_float", to=ir.DataType.FLOAT)
    _replace(node, writer.emit(node, "Mul", (real, scale), f"{name}_scaled"))


def _is_turned(node: ir.Node) -> bool:
    return node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1


def _factor(node: ir.Node, name: str) -> float:
    """Return alpha or beta of a Gemm; 1 for a MatMul."""
    return node.attributes.get_float(name, 1.0) if node.op_type == "Gemm" else 1.0


def _weights(node: ir.Node) -> Array:
    """Return the weights of a product as `[inputs, outputs]`, alpha included."""
    array = constant(node.inputs[1])
    assert array is not None
    return (array.T if _is_turned(node) else array) * np.float32(_factor(node, "alpha"))


def _replace(node: ir.Node, new: ir.Value) -> None:
    """Put a value in the place of a node's only output, and remove the node."""
    graph, old = node.graph, node.outputs[0]
    assert graph is not None
    new.shape, new.type = old.shape, old.type
    replace_output(graph, old, new)
    graph.remove(node, safe=True)
