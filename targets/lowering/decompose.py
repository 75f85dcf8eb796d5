"""Operators that TVM lacks or imports wrongly → operators that it imports rightly.

A rule of this package replaces a node by others; where there is none, onnx's own definition of the
operator as a function of simpler ones does. Both may need static shapes, and constant operands.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import onnx
import onnx.defs
import onnx_ir as ir

from edgepress.targets.base import UnsupportedModel
from edgepress.targets.lowering import (
    decompose_arrays,
    decompose_math,
    decompose_quantized,
    decompose_recurrent,
    decompose_resize,
    decompose_signal,
    operators,
)
from edgepress.targets.lowering.rewriting import Rewriting, empty_inputs, inferred_types

Rule = Callable[[Rewriting, onnx.NodeProto], bool]  # False: leave the node as it is

# Operators that onnx defines by simpler ones, and TVM lacks or gets wrong.
EXPANDED = frozenset(
    {
        "AffineGrid",
        "Attention",
        "BlackmanWindow",
        "CausalConvWithState",
        "Celu",
        "CenterCropPad",
        "GroupNormalization",
        "HammingWindow",
        "HannWindow",
        "LayerNormalization",
        "MeanVarianceNormalization",
        "NegativeLogLikelihoodLoss",
        "RMSNormalization",
        "RotaryEmbedding",
        "Shrink",
        "SoftmaxCrossEntropyLoss",
        "SwiGLU",
        "Swish",
    }
)
_ROUNDS = 8  # functions within functions, and rules that use them


def simplify(model: ir.Model, kept: Collection[str] = ()) -> ir.Model:
    """Decompose a whole model; the model itself is not changed.

    Args:
        model: canonical, of static shapes.
        kept: operators to leave as they are, because somebody else takes them.

    Returns:
        A model in which every value has a type, and a shape where the data does not decide it.

    Raises:
        UnsupportedModel: lists all nodes that `operators` refuses.
    """
    proto = ir.to_proto(model)
    if reasons := operators.unsupported(proto):
        raise UnsupportedModel(reasons)
    simple = decompose(proto, kept)
    if simple is proto:
        return model
    types = inferred_types(simple)
    del simple.graph.value_info[:]
    for value in simple.graph.output:
        value.type.tensor_type.CopyFrom(types[value.name])
    written = {name for node in simple.graph.node for name in node.output if name}
    written -= {value.name for value in simple.graph.output}
    for name in sorted(written & types.keys()):
        value = simple.graph.value_info.add(name=name)
        value.type.tensor_type.CopyFrom(types[name])
    return ir.from_proto(simple)


def decompose(model: onnx.ModelProto, kept: Collection[str] = ()) -> onnx.ModelProto:
    """Replace nodes until TVM imports each that is left; the model itself is not changed.

    Args:
        model: nodes of the default domain, opset 13 or later; every value has a static shape.
        kept: operators to leave as they are.

    Returns:
        The same object where there is nothing to replace.

    Raises:
        ValueError: functions nest deeper than any of onnx's does.
    """
    replaced = (RULES.keys() | EXPANDED) - set(kept)
    concerned = any(node.op_type in replaced for node in model.graph.node)
    if not concerned and not empty_inputs(model.graph):
        return model
    for _ in range(_ROUNDS):
        rewriting = Rewriting(model, kept)
        for node in rewriting.source.node:
            if node.op_type not in replaced or not _replace(rewriting, node):
                rewriting.add_node(node)
        before, model = model, rewriting.finish()
        if before.graph.node == model.graph.node:
            return model
    raise ValueError("operators are defined by others without end")


def _replace(rewriting: Rewriting, node: onnx.NodeProto) -> bool:
    rule = RULES.get(node.op_type)
    if rule is not None:
        return rewriting.attempt(rule, node)
    body = function_of(rewriting, node)
    if body is None:
        return False
    _inline(rewriting, node, body)
    return True


def function_of(rewriting: Rewriting, node: onnx.NodeProto) -> onnx.FunctionProto | None:
    """Return onnx's definition of an operator by simpler ones; None where it has none."""
    schema: Any = onnx.defs.get_schema(node.op_type, rewriting.opset, node.domain)
    versions = [v for v in schema.function_opset_versions if v <= rewriting.opset]
    if versions:
        return _function(schema.get_function_with_opset_version(max(versions)))
    versions = [v for v in schema.context_dependent_function_opset_versions if v <= rewriting.opset]
    if not versions:
        return None
    types = [rewriting.type_of(name).SerializeToString() for name in node.input]
    text = schema.get_context_dependent_function_with_opset_version(
        max(versions), node.SerializeToString(), types
    )
    return _function(text)


def _function(serialized: bytes) -> onnx.FunctionProto:
    body = onnx.FunctionProto()
    body.ParseFromString(serialized)
    return body


def _inline(rewriting: Rewriting, node: onnx.NodeProto, body: onnx.FunctionProto) -> None:
    """Add the nodes of a function with the names and attributes of this call."""
    names = dict.fromkeys(body.input, "")
    names |= zip(body.input, node.input, strict=False)
    names |= zip(body.output, node.output, strict=False)
    schema = onnx.defs.get_schema(node.op_type, rewriting.opset, node.domain)
    given = {name: attribute.default_value for name, attribute in schema.attributes.items()}
    given = {name: default for name, default in given.items() if default.name}
    given |= {attribute.name: attribute for attribute in body.attribute_proto}
    given |= {attribute.name: attribute for attribute in node.attribute}

    def renamed(name: str) -> str:
        if name and name not in names:
            names[name] = rewriting.fresh(f"{node.output[0]}_{name}")
        return names[name] if name else ""

    for inner in body.node:
        copy = _renamed(inner, renamed, given)
        copy.name = rewriting.fresh(f"{node.name or node.output[0]}/{inner.op_type}")
        rewriting.add_node(copy)


def _renamed(
    node: onnx.NodeProto,
    rename: Callable[[str], str],
    given: Mapping[str, onnx.AttributeProto],
) -> onnx.NodeProto:
    """Copy a node of a function body; the bodies that it holds itself are renamed too."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.input[:] = [rename(name) for name in node.input]
    copy.output[:] = [rename(name) for name in node.output]
    del copy.attribute[:]
    for attribute in node.attribute:
        if attribute.ref_attr_name and attribute.ref_attr_name not in given:
            continue
        value = copy.attribute.add()
        value.CopyFrom(given.get(attribute.ref_attr_name, attribute))
        value.name = attribute.name
        if value.type == onnx.AttributeProto.GRAPH:
            nodes = [_renamed(inner, rename, given) for inner in attribute.g.node]
            del value.g.node[:]
            value.g.node.extend(nodes)
            for output in value.g.output:
                output.name = rename(output.name)
    return copy


def _choose_branch(rewriting: Rewriting, node: onnx.NodeProto) -> bool:
    """Put the branch of an If whose condition is known in its place."""
    condition = rewriting.constant(node.input[0])
    if condition is None:
        return False
    wanted = "then_branch" if condition.item() else "else_branch"
    branch = next(attribute.g for attribute in node.attribute if attribute.name == wanted)
    for inner in branch.node:
        rewriting.add_node(inner)
    for result, output in zip(branch.output, node.output, strict=True):
        rewriting.emit("Identity", result.name, output=output)
    return True


RULES: dict[str, Rule] = {
    "If": _choose_branch,
    **decompose_arrays.RULES,
    **decompose_math.RULES,
    **decompose_quantized.RULES,
    **decompose_recurrent.RULES,
    **decompose_resize.RULES,
    **decompose_signal.RULES,
}
