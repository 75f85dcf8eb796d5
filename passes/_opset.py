"""Brings a model to a newer opset with onnx's version converter, without losing what it drops."""

from __future__ import annotations

import onnx.version_converter
import onnx_ir as ir

from edgepress.passes._shapes import refresh_shapes, static_shape, without_big_tensors
from edgepress.passes.base import Context, PassRefused
from edgepress.passes.lift_constants import LiftConstants

#: The first opset with int16 in QuantizeLinear, and the IR version that goes with it.
INT16_OPSET, INT16_IR_VERSION = 21, 10

# Resize got its coordinate_transformation_mode and nearest_mode here.
_RESIZE_OPSET = 11


def converted(model: ir.Model, opset: int) -> ir.Model:
    """Return the model at this opset, with the same big weights, names, ranges and metadata.

    Raises what the converter raises: RuntimeError and onnx's own errors.
    """
    proto = onnx.version_converter.convert_version(without_big_tensors(model), opset)
    result = ir.from_proto(proto)
    graph = result.graph
    weights = {n: v for n, v in model.graph.initializers.items() if n not in graph.initializers}
    inputs = {value.name for value in model.graph.inputs}
    for value in [value for value in graph.inputs if value.name not in inputs]:
        graph.inputs.remove(value)
        if value.name in weights:
            value.const_value = weights[value.name].const_value
            graph.register_initializer(value)
    if model.graph.opset_imports[""] < _RESIZE_OPSET:
        refresh_shapes(result)
        _keep_resize_grid(result)
    _restore_notes(model, result)
    _name_nodes(result)
    return result


def raised_for_int16(model: ir.Model, pass_name: str) -> ir.Model:
    """Return the model at an opset that knows int16, constants as initializers; ranges stay.

    Raises PassRefused where onnx cannot convert it.
    """
    if model.graph.opset_imports[""] < INT16_OPSET:
        try:
            model = converted(model, INT16_OPSET)
        except Exception as error:  # the converter raises RuntimeError and onnx's own errors
            why = f"int16 needs opset {INT16_OPSET}, and onnx cannot convert the model: {error}"
            raise PassRefused(pass_name, "model", why) from error
        LiftConstants().call(model, Context())
        refresh_shapes(model, pass_name)
    model.ir_version = max(model.ir_version or 0, INT16_IR_VERSION)
    return model


def _keep_resize_grid(model: ir.Model) -> None:
    """Give every Resize the sampling grid that Upsample and Resize had before opset 11.

    The converter leaves the attributes out, and their defaults mean another grid. Before, index `i`
    read `i / scale`, rounded up where the axis shrinks and down where it grows (onnxruntime).
    """
    for node in model.graph:
        if node.op_type != "Resize":
            continue
        source, target = static_shape(node.inputs[0]), static_shape(node.outputs[0])
        shrinks = source is not None and target is not None and target < source
        node.attributes.add(ir.AttrString("coordinate_transformation_mode", "asymmetric"))
        node.attributes.add(ir.AttrString("nearest_mode", "ceil" if shrinks else "floor"))


def _restore_notes(before: ir.Model, after: ir.Model) -> None:
    """Carry over what the converter loses: metadata, ranges, documentation, the producer."""
    after.metadata_props.update(before.metadata_props)
    after.graph.metadata_props.update(before.graph.metadata_props)
    after.doc_string = before.doc_string
    after.graph.doc_string = before.graph.doc_string
    after.producer_name, after.producer_version = before.producer_name, before.producer_version
    after.domain, after.model_version = before.domain, before.model_version
    old = {node.name: node for node in before.graph}
    for node in after.graph:
        if node.name in old:
            node.metadata_props.update(old[node.name].metadata_props)
    values = {value.name: value for value in _values(before.graph)}
    for value in _values(after.graph):
        if value.name in values:
            value.meta.update(values[value.name].meta)


def _values(graph: ir.Graph) -> list[ir.Value]:
    return [*graph.inputs, *(value for node in graph for value in node.outputs)]


def _name_nodes(model: ir.Model) -> None:
    """Name the nodes that the converter added, after the operator and what they write."""
    taken: set[str | None] = {None, ""}
    for node in model.graph:
        if node.name in taken:
            node.name = f"{node.op_type}_{node.outputs[0].name}"
            while node.name in taken:
                node.name += "_"
        taken.add(node.name)
