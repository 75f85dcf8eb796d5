"""fold-batch-norm: merge per-channel scales and shifts into the weights before them.

A BatchNormalization at inference is `y = scale * (x - mean) / sqrt(var + epsilon) + bias`, one
multiply and one add per channel (Ioffe and Szegedy, 2015, section 3.1). So are Mul, Div, Add and
Sub with a constant per channel. After a Conv, ConvTranspose, Gemm or two-dimensional MatMul with
constant weights all of them fold away; a BatchNormalization elsewhere becomes a Mul and an Add.

The scale of a folded BatchNormalization tells how much a channel matters (`calibration.importance.
batch_norm`), so its magnitude stays behind as a note on the layer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgepress.passes._constants import (
    Array,
    constant,
    drop_unread,
    free_name,
    new_initializer,
    replace_output,
    set_input,
)
from edgepress.passes._shapes import shape_of, static_shape
from edgepress.passes.base import Context, Outcome, Pass

#: Key of a layer's `metadata_props`: `|scale|` of the BatchNormalization that was folded into it, a
#: JSON list with one number per output channel. Who cuts channels must cut or drop it.
GAMMA = "batch_norm_gamma"
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BFLOAT16)
# Scale and shift per channel, each [channels] float64.
_Affine = tuple[Array, Array]


@dataclass(frozen=True, kw_only=True)
class FoldBatchNorm(Pass):
    """Fold BatchNormalization and constant Mul, Div, Add and Sub into the weights before them.

    Stats: `folded` nodes merged into weights; `rewritten` BatchNormalizations turned into Mul and
    Add.
    """

    def call(self, model: ir.Model, context: Context) -> Outcome:  # noqa: ARG002
        """Fold in execution order, so that chains of such nodes fold one by one."""
        graph = model.graph
        folded = rewritten = 0
        skipped: list[tuple[str, str]] = []
        for node in list(graph):
            found = _affine(node)
            if found is None:
                if node.op_type == "BatchNormalization":
                    skipped.append(
                        (node.name or "", "it trains, or its parameters are not constant")
                    )
                continue
            source, affine = found
            why = _why_not(source)
            if not why:
                _note_gamma(node, source)
                _fold(graph, node, source, affine)
                folded += 1
            elif node.op_type == "BatchNormalization":
                _rewrite(graph, node, affine)
                rewritten += 1
            elif why != _NOT_WEIGHTED:
                skipped.append((node.name or "", why))
        if folded or rewritten:
            drop_unread(graph)
        return Outcome(
            model=model,
            modified=bool(folded or rewritten),
            stats={"folded": folded, "rewritten": rewritten},
            skipped=skipped,
        )


_NOT_WEIGHTED = "nothing before it has weights"


def _affine(node: ir.Node) -> tuple[ir.Value, _Affine] | None:
    """Return the input and the scale and shift per channel that a node applies to it."""
    out = node.outputs[0]
    shape = static_shape(out)
    if shape is None or len(shape) < 2 or out.dtype not in _FLOATS:
        return None
    if node.op_type == "BatchNormalization":
        return _batch_norm(node, shape[1])
    if node.op_type not in ("Mul", "Div", "Add", "Sub"):
        return None
    for index in (0, 1):
        array, source = constant(node.inputs[index]), node.inputs[1 - index]
        if array is None or source is None or static_shape(source) != shape:
            continue
        value = _per_channel(array, shape)
        if value is None:
            continue
        ones, zeros = np.ones(shape[1]), np.zeros(shape[1])
        if node.op_type == "Mul":
            return source, (value, zeros)
        if node.op_type == "Add":
            return source, (ones, value)
        if node.op_type == "Sub":
            return source, ((ones, -value) if index == 1 else (-ones, value))
        if node.op_type == "Div" and index == 1 and np.all(value != 0):
            return source, (1 / value, zeros)
    return None


def _batch_norm(node: ir.Node, channels: int) -> tuple[ir.Value, _Affine] | None:
    """Return what a BatchNormalization at inference does."""
    attributes, source = node.attributes, node.inputs[0]
    training = attributes.get_int("training_mode", 0) or not attributes.get_int("spatial", 1)
    if source is None or training or any(value.uses() for value in node.outputs[1:]):
        return None
    arrays = [constant(value) for value in node.inputs[1:5]]
    known = [a.astype(np.float64) for a in arrays if a is not None and a.shape == (channels,)]
    if len(known) != 4:
        return None
    gamma, beta, mean, variance = known
    scale = gamma / np.sqrt(variance + attributes.get_float("epsilon", 1e-5))
    return source, (scale, beta - mean * scale)


def _per_channel(array: Array, shape: tuple[int, ...]) -> Array | None:
    """Return a constant as [channels] float64 where it only varies along axis 1."""
    if array.ndim > len(shape):
        return None
    full = (1,) * (len(shape) - array.ndim) + array.shape
    if any(extent != 1 for axis, extent in enumerate(full) if axis != 1):
        return None
    return np.broadcast_to(array.reshape(-1).astype(np.float64), shape[1])


def _why_not(source: ir.Value) -> str:
    """Say why a node cannot go into the weights before it, or nothing."""
    before = source.producer()
    if before is None or before.op_type not in _WEIGHTED:
        return _NOT_WEIGHTED
    weight = constant(before.inputs[1])
    if before.op_type == "MatMul" and (
        weight is None or any(len(static_shape(value) or ()) != 2 for value in before.inputs)
    ):
        return _NOT_WEIGHTED
    if len(source.uses()) != 1 or source.is_graph_output():
        return f"{before.name} is read by others too"
    if weight is None:
        return f"the weights of {before.name} are not constant"
    bias = before.inputs[2] if len(before.inputs) > 2 else None
    if bias is not None and constant(bias) is None:
        return f"the bias of {before.name} is not constant"
    return ""


def _note_gamma(node: ir.Node, source: ir.Value) -> None:
    """Leave the magnitude of a BatchNormalization's scale on the layer before it."""
    if node.op_type != "BatchNormalization":
        return
    before, gamma = source.producer(), constant(node.inputs[1])
    if before is not None and gamma is not None:
        # 7 digits rank as well as a float32 does, and keep the text short
        digits = [float(f"{abs(float(g)):.7g}") for g in gamma]
        before.metadata_props[GAMMA] = json.dumps(digits)


def _fold(graph: ir.Graph, node: ir.Node, source: ir.Value, affine: _Affine) -> None:
    """Apply the scale and shift to the weights and bias before a node, and remove the node."""
    before = source.producer()
    assert before is not None
    scale, shift = affine
    weight = constant(before.inputs[1])
    assert weight is not None
    old_bias = constant(before.inputs[2]) if len(before.inputs) > 2 else None
    bias = np.zeros(1) if old_bias is None else old_bias.astype(np.float64)
    attributes = before.attributes
    needs_bias = old_bias is not None or bool(np.any(shift))
    if before.op_type in ("Gemm", "MatMul"):
        along = scale[:, None] if attributes.get_int("transB", 0) else scale[None, :]
        bias = bias * attributes.get_float("beta", 1.0)
        attributes.pop("beta", None)
        if needs_bias:
            before.op_type = "Gemm"
    elif before.op_type == "Conv":
        along = scale.reshape(-1, *(1,) * (weight.ndim - 1))
    else:
        # ConvTranspose keeps [in, out / group, …]: the groups lie along the input axis.
        groups = attributes.get_int("group", 1)
        rows = np.repeat(scale.reshape(groups, -1), weight.shape[0] // groups, axis=0)
        along = rows.reshape(weight.shape[0], -1, *(1,) * (weight.ndim - 2))
    if np.any(scale != 1):
        folded = (weight.astype(np.float64) * along).astype(weight.dtype)
        set_input(before, 1, folded, f"{before.name}_weight")
    if needs_bias:
        bias = (bias * scale + shift).astype(weight.dtype)
        set_input(before, 2, bias, f"{before.name}_bias")
    replace_output(graph, node.outputs[0], source)
    graph.remove(node, safe=True)


def _rewrite(graph: ir.Graph, node: ir.Node, affine: _Affine) -> None:
    """Turn a BatchNormalization that no weights precede into a Mul and an Add."""
    out, source = node.outputs[0], node.inputs[0]
    shape, dtype = shape_of(out), out.dtype
    assert dtype is not None
    per_channel = (-1, *(1,) * (len(shape) - 2))
    scale, shift = (a.reshape(per_channel).astype(dtype.numpy()) for a in affine)
    mul = ir.node(
        "Mul",
        [source, new_initializer(graph, f"{node.name}_scale", scale)],
        name=f"{node.name}_scale",
    )
    scaled = mul.outputs[0]
    scaled.name = free_name(graph, f"{node.name}_scaled")
    scaled.shape, scaled.type = out.shape, out.type
    add = ir.node(
        "Add",
        [scaled, new_initializer(graph, f"{node.name}_shift", shift)],
        outputs=[ir.Value(shape=out.shape, type=out.type)],
        name=f"{node.name}_shift",
    )
    graph.insert_after(node, [mul, add])
    name = out.name
    replace_output(graph, out, add.outputs[0])
    graph.remove(node, safe=True)
    add.outputs[0].name = name
