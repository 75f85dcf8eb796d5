"""From a compressed ONNX model to a Program of kernels for a target."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from edgepress.targets.base import Target, UnsupportedModel
from edgepress.targets.cuda.assembly import CudaAssembly
from edgepress.targets.cuda.operators import CUDA_KERNELS
from edgepress.targets.float_format import FloatFormat, float_format
from edgepress.targets.isa.base import load_isa
from edgepress.targets.lowering.activations import fuse_activations
from edgepress.targets.lowering.assembly import Assembly
from edgepress.targets.lowering.attention import fuse_attention
from edgepress.targets.lowering.composite import OPERATORS
from edgepress.targets.lowering.decompose import simplify
from edgepress.targets.lowering.dialect import DOMAIN, VIEWS, array_of, shape_of
from edgepress.targets.lowering.dynamic import claim_dynamic_products
from edgepress.targets.lowering.floats import claim_float_operators
from edgepress.targets.lowering.fusion import fuse_residuals
from edgepress.targets.lowering.intake import fuse_intakes
from edgepress.targets.lowering.integer_rules import RULES, to_integers
from edgepress.targets.lowering.integers import is_quantized
from edgepress.targets.lowering.joined_products import join_products
from edgepress.targets.lowering.kernels import KERNELS
from edgepress.targets.lowering.nhwc import to_nhwc
from edgepress.targets.lowering.normalization import (
    NORMALIZATIONS,
    fuse_normalizations,
    fuse_summed_rows,
)
from edgepress.targets.lowering.products import fuse_products
from edgepress.targets.lowering.relax import lower_region
from edgepress.targets.lowering.resize import claim_resizes
from edgepress.targets.lowering.transposed_conv import split_transposed
from edgepress.targets.program import Program
from edgepress.targets.tiling import Tiles

Progress = Callable[[str, int, int], None]
# Operators of a QDQ graph that stay whole until its integer form is found.
_QUANTIZED = {"QuantizeLinear", "DequantizeLinear", *RULES, *OPERATORS, *NORMALIZATIONS}


def _silent(_what: str, _done: int, _total: int) -> None:
    """Report no progress."""


def lower(
    model: ir.Model,
    target: Target,
    progress: Progress = _silent,
    tiles: Tiles | None = None,
) -> Program:
    """Lower a canonical model, float or QDQ, for a target. The model is not changed.

    `tiles` answers which tile each layer gets, and knows afterwards which layers there are; without
    it the tiles that ship with edgepress are taken.

    Raises:
        UnsupportedModel: some operators can be run neither by kernels of edgepress nor by TVM;
            all of them are listed. Or the model wants a float format that the target has not.
    """
    floats = float_format(model)
    if floats != "float32" and not target.is_cuda:
        what = f"a CPU computes in float32; leave the pass float-format out for {target.name}"
        raise UnsupportedModel([(floats, what)])
    model = lowered_graph(model, target)
    segments = _segments(model)
    regions = [_region(segment, model) for segment in segments if isinstance(segment, list)]
    assembly = _assembly(target, floats, tiles)
    refused, remaining = list[tuple[str, str]](), iter(regions)
    assembly.begin(model)
    for done, segment in enumerate(segments):
        progress("lowering", done, len(segments))
        if isinstance(segment, ir.Node):
            _call(assembly, segment)
            continue
        region = next(remaining)
        try:
            part = lower_region(region.model, target, f"region_{done}")
        except UnsupportedModel as error:
            refused += error.reasons
            for value in region.outputs:
                assembly.declare(value)
        else:
            assembly.include(part, {v.name or "": v for v in [*region.inputs, *region.outputs]})
    _refuse(refused)
    assembly.end(model)
    progress("lowering", len(segments), len(segments))
    assembly.program.validate()
    return assembly.program


def lowered_graph(model: ir.Model, target: Target) -> ir.Model:
    """Rewrite a canonical model into nodes of kernels, and what TVM's own kernels will compute.

    Raises UnsupportedModel for a graph that no rewriting makes sense of.
    """
    isa = load_isa(target.isa)
    both = "an output that is an input too has no memory of its own; put an Identity between them"
    _refuse([(v.name or "", both) for v in model.graph.outputs if v.is_graph_input()])
    _refuse(
        [
            (n.name or n.op_type, f"the domain {DOMAIN} is not for models")
            for n in model.graph
            if n.domain == DOMAIN
        ]
    )
    model = claim_dynamic_products(model)
    if is_quantized(model):
        model = to_integers(simplify(model, _QUANTIZED), isa.storage)
    else:
        model = simplify(model, {*NORMALIZATIONS, "Resize"})
    model = claim_resizes(claim_float_operators(fuse_products(fuse_attention(model))))
    model = split_transposed(model, isa)
    model = fuse_normalizations(model)
    model = to_nhwc(fuse_activations(model))
    model = fuse_summed_rows(fuse_residuals(fuse_intakes(model, widen_floats=target.is_cuda)))
    return join_products(model) if target.is_cuda else model


def node_program(
    node: ir.Node, target: Target, tiles: Tiles, floats: FloatFormat = "float32"
) -> Program:
    """Return the calls of one node of a lowered graph that has a kernel generator, as a program.

    Its inputs are what the node reads of other nodes.
    """
    assembly = _assembly(target, floats, tiles)
    for value in node.inputs:
        if value is not None and array_of(value) is None:
            assembly.declare(value)
    assembly.program.inputs = tuple(assembly.program.tensors)
    _call(assembly, node)
    assembly.program.outputs = tuple(value.name or "" for value in node.outputs)
    return assembly.program


def _assembly(target: Target, floats: FloatFormat, tiles: Tiles | None) -> Assembly:
    if target.is_cuda:
        return CudaAssembly(target, floats, tiles)
    return Assembly(load_isa(target.isa), tiles)


def _call(assembly: Assembly, node: ir.Node) -> None:
    operator = "View" if _is_view(node) else node.op_type
    if isinstance(assembly, CudaAssembly):
        CUDA_KERNELS[operator](assembly, node)
    else:
        KERNELS[operator](assembly, node)


def _refuse(reasons: list[tuple[str, str]]) -> None:
    if reasons:
        raise UnsupportedModel(reasons)


def _is_view(node: ir.Node) -> bool:
    """Tell whether a node only gives the same bytes another shape."""
    if node.domain != "" or node.op_type not in VIEWS or node.inputs[0] is None:
        return False
    return array_of(node.inputs[0]) is None


def _is_concat(node: ir.Node) -> bool:
    """Tell whether a node is a Concat of values that hold something."""
    if node.domain != "" or node.op_type != "Concat":
        return False
    return all(math.prod(shape_of(value)) > 0 for value in node.inputs if value is not None)


def _segments(model: ir.Model) -> list[ir.Node | list[ir.Node]]:
    """Split the graph, in order, into nodes with kernels and runs of plain ONNX nodes."""
    segments: list[ir.Node | list[ir.Node]] = []
    for node in model.graph:
        if node.domain == DOMAIN or _is_view(node) or _is_concat(node):
            segments.append(node)
        elif segments and isinstance(segments[-1], list):
            segments[-1].append(node)
        else:
            segments.append([node])
    return segments


@dataclass(frozen=True)
class _Region:
    """A run of ONNX nodes as a model of its own, and the values it shares with the graph."""

    model: ir.Model
    inputs: list[ir.Value]
    outputs: list[ir.Value]


def _region(nodes: list[ir.Node], model: ir.Model) -> _Region:
    members = set(nodes)
    inside = {value for node in nodes for value in node.outputs}
    copies: dict[ir.Value, ir.Value] = {}

    def copy(value: ir.Value) -> ir.Value:
        if value not in copies:
            copies[value] = ir.Value(
                name=value.name,
                shape=ir.Shape(shape_of(value)),
                type=value.type,
                const_value=value.const_value,
            )
        return copies[value]

    clones = [
        ir.Node(
            node.domain,
            node.op_type,
            [None if value is None else copy(value) for value in node.inputs],
            list(node.attributes.values()),
            outputs=[copy(value) for value in node.outputs],
            name=node.name,
        )
        for node in nodes
    ]
    inputs = [v for v in copies if v not in inside and array_of(v) is None]
    outputs = [
        value
        for value in copies
        if value in inside
        and (value.is_graph_output() or any(user not in members for user, _ in value.uses()))
    ]
    graph = ir.Graph(
        inputs=[copies[value] for value in inputs],
        outputs=[copies[value] for value in outputs],
        nodes=clones,
        initializers=[v for v in copies.values() if v.const_value is not None],
        opset_imports={d: v for d, v in model.graph.opset_imports.items() if d != DOMAIN},
        name="region",
    )
    return _Region(ir.Model(graph, ir_version=model.ir_version), inputs, outputs)
