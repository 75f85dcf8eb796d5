"""The onnx package's own node tests as (model, feeds, wanted) with weights baked in.

Selected is every node test of the default domain in which all tensors are dense, of static shape
and of a dtype that a Program has, and no node holds a subgraph. The first float32 input (the first
input, where none is float32) stays an input; all others become initializers, as weights, axes and
shapes are in real models.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.backend.test.loader import load_model_tests

from edgepress.passes.base import Context, PassError
from edgepress.pipeline.driver import canonical_passes
from edgepress.targets.base import CompileFailed, Target, UnsupportedModel
from edgepress.targets.lowering.build import lower
from edgepress.targets.program import DTYPES, Array
from tests.targets.interpret import run_program

RELATIVE_TOLERANCE, ABSOLUTE_TOLERANCE = 1e-3, 1e-7  # the onnx backend tests' own
# Where large terms cancel, a float32 sum is only known to roundings of the largest.
ROUNDINGS_OF_LARGEST = 4 * 2.0**-24


@dataclass(frozen=True)
class NodeTest:
    """One case: a model whose other inputs are baked in, what it gets and what it must answer."""

    name: str
    model: onnx.ModelProto
    feeds: dict[str, Array]
    wanted: dict[str, Array]

    @property
    def operators(self) -> list[str]:
        return sorted({node.op_type for node in self.model.graph.node})

    @property
    def opset(self) -> int:
        return int(next(o.version for o in self.model.opset_import if o.domain in ("", "ai.onnx")))


@dataclass(frozen=True)
class Result:
    """How a case ended: `right`, `wrong` or `refused`, and why."""

    status: str
    why: str = ""


@functools.cache
def node_tests(variant: str = "baked") -> dict[str, NodeTest]:
    """Every selected case by name.

    Variants: `baked` as said above; `live` keeps every float32 input an input; `inside` has the
    node between others: float32 inputs and outputs are negated in the model and in the data.
    """
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        cases = load_model_tests(kind="node")
    tests = {case.name: _baked(case, variant == "live") for case in cases if _selected(case)}
    return {n: _between(t) for n, t in tests.items()} if variant == "inside" else tests


def check(case: NodeTest, target: Target) -> Result:
    """Lower, compile, run and compare one case."""
    try:
        program = lower(canonical(case.model), target)
        answers = run_program(program, target, case.feeds)
    except UnsupportedModel as refusal:
        return Result("refused", "; ".join(dict.fromkeys(why for _, why in refusal.reasons)))
    except PassError as refusal:
        return Result("refused", str(refusal))
    except (CompileFailed, AssertionError) as error:
        return Result("wrong", str(error)[-300:])
    except Exception as error:  # what no caller expects is a crash
        return Result("crashed", f"{type(error).__name__}: {error}"[-300:])
    for name, wanted in case.wanted.items():
        if why := difference(answers[name], wanted):
            return Result("wrong", f"{name}: {why}")
    return Result("right")


def canonical(proto: onnx.ModelProto) -> ir.Model:
    """Do to a model what the pipeline does before it lowers one."""
    model = ir.from_proto(proto)
    for each in canonical_passes():
        model = each.call(model, Context()).model
    return model


def difference(answer: Array, wanted: Array) -> str:
    """Say how an answer differs from what is wanted; empty where it does not."""
    if (answer.dtype, answer.shape) != (wanted.dtype, wanted.shape):
        return f"{answer.dtype}{answer.shape}, wanted {wanted.dtype}{wanted.shape}"
    if wanted.dtype.kind != "f":
        wrong = answer != wanted
    else:
        largest = np.abs(wanted[np.isfinite(wanted)]).max(initial=0)
        absolute = max(ABSOLUTE_TOLERANCE, ROUNDINGS_OF_LARGEST * float(largest))
        wrong = ~np.isclose(answer, wanted, RELATIVE_TOLERANCE, absolute, equal_nan=True)
    if not wrong.any():
        return ""
    where = tuple(np.argwhere(wrong)[0])
    return f"{wrong.sum()} of {wrong.size} differ, at {where}: {answer[where]} for {wanted[where]}"


def _selected(case: Any) -> bool:
    graph = case.model.graph
    values = [*graph.input, *graph.output]
    return (
        all(node.domain in ("", "ai.onnx") for node in graph.node)
        and not any(_has_subgraph(node) for node in graph.node)
        and all(value.type.HasField("tensor_type") for value in values)
        and all(_dtype(value) in DTYPES for value in values)
        and all(_is_static(value) for value in values)
    )


def _has_subgraph(node: onnx.NodeProto) -> bool:
    return any(a.type in (a.GRAPH, a.GRAPHS) for a in node.attribute)


def _dtype(value: onnx.ValueInfoProto) -> str:
    element = value.type.tensor_type.elem_type
    return ir.DataType(element).name.lower().replace("float", "float32", element == 1)


def _is_static(value: onnx.ValueInfoProto) -> bool:
    tensor = value.type.tensor_type
    return tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim)


def _baked(case: Any, all_floats: bool) -> NodeTest:
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    inputs, outputs = case.data_sets[0]
    names = [value.name for value in model.graph.input]
    arrays = dict(zip(names, map(_array, inputs), strict=True))
    floats = [value.name for value in model.graph.input if _dtype(value) == "float32"]
    live = floats if floats and all_floats else (floats or list(arrays))[:1]
    kept = [value for value in model.graph.input if value.name in live]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    for name, array in arrays.items():
        if name not in live:
            model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    names = [value.name for value in model.graph.output]
    wanted = dict(zip(names, map(_array, outputs), strict=True))
    return NodeTest(case.name, model, {name: arrays[name] for name in live}, wanted)


def _between(case: NodeTest) -> NodeTest:
    """Negate what goes in and what comes out."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    graph, feeds, wanted = model.graph, dict(case.feeds), dict(case.wanted)
    new_inputs, new_outputs = {}, {}
    for value in graph.input:
        if _dtype(value) == "float32":
            new_inputs[value.name] = f"{value.name}_inside"
            feeds[value.name] = -feeds[value.name]
    for value in graph.output:
        if _dtype(value) == "float32":
            new_outputs[value.name] = f"{value.name}_inside"
            wanted[value.name] = -wanted[value.name]
    names = new_inputs | new_outputs
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in graph.value_info:
        value.name = names.get(value.name, value.name)
    nodes = [onnx.helper.make_node("Neg", [old], [new]) for old, new in new_inputs.items()]
    nodes += list(graph.node)
    nodes += [onnx.helper.make_node("Neg", [new], [old]) for old, new in new_outputs.items()]
    del graph.node[:]
    graph.node.extend(nodes)
    return NodeTest(case.name, model, feeds, wanted)


def _array(value: Any) -> Array:
    if isinstance(value, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value)
    return np.asarray(value)
