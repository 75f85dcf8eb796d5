"""From a compressed ONNX model to a Program of kernels for a target."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from edgepress.targets.base import Target, UnsupportedModel
from edgepress.targets.isa.base import load_isa
from edgepress.targets.lowering.dialect import DOMAIN, array_of, dtype_of, shape_of
from edgepress.targets.lowering.floats import claim_float_operators
from edgepress.targets.lowering.integer_rules import to_integers
from edgepress.targets.lowering.integers import is_quantized
from edgepress.targets.lowering.kernels import Assembly, KERNELS
from edgepress.targets.lowering.nhwc import to_nhwc
from edgepress.targets.lowering.operators import unsupported
from edgepress.targets.lowering.relax import lower_region
from edgepress.targets.program import Program

Progress = Callable[[str, int, int], None]
_VIEWS = {"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"}


def _silent(_what: str, _done: int, _total: int) -> None:
    """Report no progress."""


def lower(model: ir.Model, target: Target, progress: Progress = _silent) -> Program:
    """Lower a canonical model, float or QDQ, for a target. The model is not changed.

    Raises:
        UnsupportedModel: some operators can be run neither by kernels of edgepress nor by TVM;
            all of them are listed.
    """
    if reasons := unsupported(model):
        raise UnsupportedModel(reasons)
    isa = load_isa(target.isa)
    if is_quantized(model):
        model = to_integers(model, isa.storage)
    model = to_nhwc(claim_float_operators(model))
    assembly = Assembly(isa)
    assembly.begin(model)
    nodes = list(model.graph)
    region: list[ir.Node] = []
    for done, node in enumerate(nodes):
        progress("lowering", done, len(nodes))
        if node.domain == DOMAIN or _is_view(node):
            _flush(region, model, target, assembly)
            KERNELS["View" if node.domain != DOMAIN else node.op_type](assembly, node)
        else:
            region.append(node)
    _flush(region, model, target, assembly)
    assembly.end(model)
    progress("lowering", len(nodes), len(nodes))
    assembly.program.validate()
    return assembly.program


def _is_view(node: ir.Node) -> bool:
    """Tell whether a node only gives the same bytes another shape."""
    return node.op_type in _VIEWS and node.inputs[0] is not None and array_of(node.inputs[0]) is None


def _flush(region: list[ir.Node], model: ir.Model, target: Target, assembly: Assembly) -> None:
    """Compile the collected ONNX nodes through Relax as one region."""
    if not region:
        return
    inside = {value for node in region for value in node.outputs}
    members = set(region)
    inputs: dict[ir.Value, ir.Value] = {}
    copies: dict[ir.Value, ir.Value] = {}

    def operand(value: ir.Value | None) -> ir.Value | None:
        if value is None:
            return None
        if value not in copies:
            copies[value] = ir.Value(
                name=value.name,
                shape=ir.Shape(shape_of(value)),
                type=value.type,
                const_value=value.const_value,
            )
            if value not in inside and array_of(value) is None:
                inputs[value] = copies[value]
        return copies[value]

    nodes = []
    for node in region:
        given = [operand(value) for value in node.inputs]
        made = [operand(value) for value in node.outputs]
        attributes = list(node.attributes.values())
        outputs = [value for value in made if value is not None]
        nodes.append(
            ir.Node(node.domain, node.op_type, given, attributes, outputs=outputs, name=node.name)
        )
    wanted = [
        value
        for value in (v for node in region for v in node.outputs)
        if value.is_graph_output() or any(user not in members for user, _ in value.uses())
    ]
    graph = ir.Graph(
        inputs=list(inputs.values()),
        outputs=[copies[value] for value in wanted],
        nodes=nodes,
        initializers=[v for v in copies.values() if v.const_value is not None],
        opset_imports={d: v for d, v in model.graph.opset_imports.items() if d != DOMAIN},
        name="region",
    )
    prefix = f"region_{assembly.regions}"
    assembly.regions += 1
    part = lower_region(ir.Model(graph, ir_version=model.ir_version), target, prefix)
    assembly.include(part, {copies[v].name or "": v for v in [*inputs, *wanted]})
    region.clear()


__all__ = ["dtype_of", "lower"]
