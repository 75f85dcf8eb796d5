"""raise-opset: bring an old model to opset 17, so that later passes meet one form of each operator.

onnx's version converter does the work. A newer model stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx.version_converter
import onnx_ir as ir

from edgepress.passes._shapes import refresh_shapes, static_shape, without_big_tensors
from edgepress.passes.base import Context, Outcome, Pass, PassRefused

OPSET = 17
IR_VERSION = 8
# From here on, operators read what they once took as attributes as inputs, as later passes expect.
TOLERABLE_OPSET = 13
# Resize got its coordinate_transformation_mode and nearest_mode here.
RESIZE_OPSET = 11


@dataclass(frozen=True, kw_only=True)
class RaiseOpset(Pass):
    """Convert a model below opset 17 to opset 17, and its IR version to at least 8.

    Refuses a model below opset 13 that onnx cannot convert; from 13 on such a model stays.
    Stats: `opset_before` and `opset`.
    """

    def call(self, model: ir.Model, context: Context) -> Outcome:  # noqa: ARG002
        """Convert the graph; names of inputs, outputs, weights and metadata stay."""
        opset = model.graph.opset_imports[""]
        modified, notes = False, []
        if opset < OPSET:
            try:
                model = _converted(model)
                modified = True
            except Exception as error:  # the converter raises RuntimeError and onnx's own errors
                notes.append(self._excuse(opset, error))
        if model.ir_version is None or model.ir_version < IR_VERSION:
            model.ir_version = IR_VERSION
            modified = True
        if modified:
            refresh_shapes(model, self.name)
        return Outcome(
            model=model,
            modified=modified,
            stats={"opset_before": opset, "opset": model.graph.opset_imports[""]},
            notes=notes,
        )

    def _excuse(self, opset: int, error: Exception) -> str:
        """Say that the model stays, or raise PassRefused where it cannot."""
        text = " ".join(str(error).split())
        if opset < TOLERABLE_OPSET:
            raise PassRefused(
                self.name,
                f"opset {opset}",
                f"onnx cannot convert this model to opset {OPSET} ({text}); export it again with "
                f"opset {TOLERABLE_OPSET} or newer",
            ) from error
        return f"The model stays at opset {opset}: onnx cannot convert it to {OPSET} ({text})."


def _converted(model: ir.Model) -> ir.Model:
    """Return the model at OPSET, with the same big weights, names and metadata."""
    proto = onnx.version_converter.convert_version(without_big_tensors(model), OPSET)
    result = ir.from_proto(proto)
    graph = result.graph
    weights = {n: v for n, v in model.graph.initializers.items() if n not in graph.initializers}
    inputs = {value.name for value in model.graph.inputs}
    for value in [value for value in graph.inputs if value.name not in inputs]:
        graph.inputs.remove(value)
        if value.name in weights:
            value.const_value = weights[value.name].const_value
            graph.register_initializer(value)
    if model.graph.opset_imports[""] < RESIZE_OPSET:
        refresh_shapes(result)
        _keep_resize_grid(result)
    _restore_notes(model, result)
    _name_nodes(result)
    return result


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
    """Carry over what the converter loses: metadata, documentation, the producer."""
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


def _name_nodes(model: ir.Model) -> None:
    """Name the nodes that the converter added, after the operator and what they write."""
    taken: set[str | None] = {None, ""}
    for node in model.graph:
        if node.name in taken:
            node.name = f"{node.op_type}_{node.outputs[0].name}"
            while node.name in taken:
                node.name += "_"
        taken.add(node.name)
