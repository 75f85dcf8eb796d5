"""fold-constants: compute once, now, what does not depend on the model's inputs.

With fixed input shapes that includes `Shape` of anything, and so the arithmetic by which exporters
compute paddings, target shapes and masks. Constants are evaluated by onnxruntime with its
optimisations off, or by onnx's reference implementation where onnxruntime lacks an operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import onnxruntime

from edgepress.passes._constants import (
    Array,
    constant,
    drop_unread,
    new_initializer,
    replace_output,
    size_bytes,
)
from edgepress.passes._shapes import refresh_shapes, static_shape
from edgepress.passes.base import Context, Outcome, Pass

# Random operators differ each time, and quantizers carry what later passes must see.
_KEPT = frozenset(
    {
        "Bernoulli",
        "DequantizeLinear",
        "Dropout",
        "DynamicQuantizeLinear",
        "Multinomial",
        "QuantizeLinear",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    }
)


@dataclass(frozen=True, kw_only=True)
class FoldConstants(Pass):
    """Replace every node whose result is known by that result.

    Options:
        limit_bytes: a result above this size is only folded where its inputs are larger still.

    Stats: `folded` nodes.
    """

    limit_bytes: int = 64 << 20

    def call(self, model: ir.Model, context: Context) -> Outcome:
        """Fold and infer shapes in turns until nothing changes."""
        graph = model.graph
        modified = refresh_shapes(model, self.name)
        folded, total = 0, len(graph)
        skipped: dict[str, str] = {}
        while True:
            context.progress("fold constants", folded, total)
            given_up = len(skipped)
            results, nodes = self._evaluate(model, skipped)
            if not results and len(skipped) == given_up:
                break
            folded += _substitute(graph, results, nodes)
            refresh_shapes(model, self.name)
        if folded:
            drop_unread(graph)
        return Outcome(
            model=model,
            modified=modified or bool(folded),
            stats={"folded": folded},
            skipped=sorted(skipped.items()),
        )

    def _evaluate(
        self, model: ir.Model, skipped: dict[str, str]
    ) -> tuple[dict[ir.Value, Array], list[ir.Node]]:
        """Return the values that are known and needed by others, and the nodes behind them."""
        known: dict[ir.Value, Array] = {}
        nodes: list[ir.Node] = []
        results: set[ir.Value] = set()
        for node in model.graph:
            shape = _answer_from_shape(node)
            if shape is not None:
                known[node.outputs[0]] = shape
            elif node.name in skipped or not self._foldable(node, results, skipped):
                continue
            nodes.append(node)
            results.update(node.outputs)
        inside = set(nodes)
        wanted = [
            value
            for node in nodes
            for value in node.outputs
            if value.is_graph_output() or any(user not in inside for user, _ in value.uses())
        ]
        return _compute(model, nodes, known, wanted, skipped), nodes

    def _foldable(self, node: ir.Node, results: set[ir.Value], skipped: dict[str, str]) -> bool:
        """Whether all inputs are known and the result is worth keeping."""
        inputs = [value for value in node.inputs if value is not None]
        if not inputs or node.op_type in _KEPT:
            return False
        if any(value not in results and constant(value) is None for value in inputs):
            return False
        if node.op_type == "Identity" and node.outputs[0].is_graph_output():
            return False
        before, after = _bytes(inputs), _bytes(node.outputs)
        if after > self.limit_bytes and after > before:
            skipped[node.name or ""] = f"its result would take {after >> 20} MiB of weights"
            return False
        return True


def _answer_from_shape(node: ir.Node) -> Array | None:
    """Return what Shape or Size answer, where the shape they ask for is fixed."""
    if node.op_type not in ("Shape", "Size"):
        return None
    shape = static_shape(node.inputs[0])
    if shape is None:
        return None
    if node.op_type == "Size":
        return np.array(np.prod(shape, dtype=np.int64), np.int64)
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(shape))
    return np.array(shape[start:end], np.int64)


def _bytes(values: Sequence[ir.Value]) -> int:
    """Bytes of all values whose size is known."""
    total = 0
    for value in values:
        shape = static_shape(value)
        if shape is not None and value.dtype is not None:
            total += size_bytes(shape, value.dtype)
    return total


def _compute(
    model: ir.Model,
    nodes: list[ir.Node],
    known: dict[ir.Value, Array],
    wanted: list[ir.Value],
    skipped: dict[str, str],
) -> dict[ir.Value, Array]:
    """Run the nodes in one session, or one by one where that fails."""
    arrays = {value.name: array for value, array in known.items()}
    for value in {value for node in nodes for value in node.inputs}:
        array = constant(value)
        if value is not None and array is not None:
            arrays[value.name] = array
    nodes = [node for node in nodes if node.outputs[0] not in known]
    names = [value.name for value in wanted if value not in known and value.name]
    try:
        if names:
            arrays |= zip(names, _run(model, nodes, names, arrays), strict=True)
    except Exception:  # onnxruntime's errors share no base; the culprit is found one by one
        for node in nodes:
            if any(value is not None and value.name not in arrays for value in node.inputs):
                continue
            try:
                written = [value.name for value in node.outputs if value.name]
                arrays |= zip(written, _run_alone(model, node, written, arrays), strict=True)
            except Exception as error:
                text = str(error).strip().splitlines() or [type(error).__name__]
                skipped[node.name or ""] = f"it cannot be evaluated: {text[0]}"
    return {value: arrays[value.name] for value in wanted if value.name in arrays}


def _run_alone(
    model: ir.Model, node: ir.Node, names: list[str], arrays: dict[str | None, Array]
) -> list[Array]:
    """Run one node, by onnx's reference implementation where onnxruntime cannot."""
    try:
        return _run(model, [node], names, arrays)
    except Exception:  # any failure of onnxruntime is a reason to ask the reference
        proto = _model_of(model, [node], names, arrays)
        feeds = {value.name: arrays[value.name] for value in proto.graph.input}
        answers = onnx.reference.ReferenceEvaluator(proto).run(None, feeds)
    results = [np.asarray(answer) for answer in answers]
    for value, result in zip(node.outputs, results, strict=False):
        if value.dtype is not None and value.dtype.numpy() != result.dtype:
            raise TypeError(f"the reference answers {result.dtype} where {value.dtype} is due")
    return results


def _run(
    model: ir.Model, nodes: list[ir.Node], names: list[str], arrays: dict[str | None, Array]
) -> list[Array]:
    """Run nodes in onnxruntime with its optimisations off."""
    proto = _model_of(model, nodes, names, arrays)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    answers = session.run(names, {value.name: arrays[value.name] for value in proto.graph.input})
    return [np.asarray(answer) for answer in answers]


def _model_of(
    model: ir.Model, nodes: list[ir.Node], names: list[str], arrays: dict[str | None, Array]
) -> onnx.ModelProto:
    """Make a model of some nodes whose constants are its inputs, so that its size never matters."""
    read = {value.name: value for node in nodes for value in node.inputs if value is not None}
    inputs = [
        onnx.helper.make_tensor_value_info(
            name, int(ir.DataType.from_numpy(arrays[name].dtype)), arrays[name].shape
        )
        for name in read
        if name in arrays and name is not None
    ]
    outputs = [onnx.ValueInfoProto(name=name) for name in names]
    protos = [ir.serde.serialize_node(node) for node in nodes]
    graph = onnx.helper.make_graph(protos, "constants", inputs, outputs)
    opsets = [onnx.helper.make_opsetid("", model.graph.opset_imports[""])]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=model.ir_version)


def _substitute(graph: ir.Graph, results: dict[ir.Value, Array], nodes: list[ir.Node]) -> int:
    """Put initializers where the values were; return how many nodes nobody needs now."""
    for value, array in results.items():
        name = value.name or ""
        if value.is_graph_output():
            replace_output(graph, value, new_initializer(graph, f"{name}_value", array))
        else:
            value.name = None
            value.replace_all_uses_with(new_initializer(graph, name, array))
    removed = 0
    for node in reversed(nodes):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
            removed += 1
    return removed
