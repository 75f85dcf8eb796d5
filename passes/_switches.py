"""A quantized model with a switch per layer: what each of them adds to the error, in one session.

Every pair of QuantizeLinear and DequantizeLinear gets a way around it, `on ? dq(q(x)) : x`, and
every quantized constant a twin in float32. Both are extra inputs of one onnxruntime session, so any
choice of layers runs without building anything anew. `_qdq_layers` says what a layer is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from edgepress.calibration.base import Array
from edgepress.calibration.qparams import dequantize
from edgepress.passes._constants import constant, free_name
from edgepress.passes._qdq_layers import Pair, Use, find_layers


class QuantizationSwitches:
    """A quantized model whose layers can each be run quantized or in float.

    Attributes:
        layers: in graph order, those of model inputs first; names are unique.
    """

    def __init__(self, model: ir.Model, float_model: ir.Model | None, threads: int) -> None:
        """Put the switches in; `quantization_switches` says what the arguments are."""
        copy = model.clone()
        before = None if float_model is None else {n.name or "": n for n in float_model.graph}
        groups, redundant = find_layers(copy.graph, None if before is None else set(before))
        self.layers = [group.layer for group in groups]
        self._names = {layer.name for layer in self.layers}
        self._switches: dict[str, str] = {}
        self._twins: dict[str, list[_Twins]] = {}
        for group in groups:
            name = group.layer.name
            if before is not None:
                self._twins[name] = [_give_twins(copy.graph, use, before) for use in group.uses]
            if group.pairs:
                switch = _new_input(copy.graph, f"quantize {name}", ir.DataType.BOOL, ())
                self._switches[name] = switch.name or ""
                for pair in group.pairs:
                    _bypass(copy.graph, pair, switch)
        for value, source in redundant:
            _replace(copy.graph, value, source)
        self._outputs = [value.name or "" for value in model.graph.outputs]
        self._session = _session(copy, threads)

    def run(
        self,
        feed: Mapping[str, Array],
        on: Collection[str] | None = None,
        *,
        constants: Collection[str] | None = None,
    ) -> dict[str, Array]:
        """Return the model's outputs by name, with some of its layers quantized.

        Args:
            feed: the model's inputs.
            on: names of the layers that are quantized; None for all.
            constants: names of those whose constants are quantized, where these are others than
                `on`, which then is about activations alone.

        Raises:
            ValueError: there is no layer of such a name.
        """
        on = self._names if on is None else self._known(on)
        constants = on if constants is None else self._known(constants)
        feeds: dict[str, Any] = dict(feed)
        feeds |= {switch: np.array(layer in on) for layer, switch in self._switches.items()}
        for layer, twins in self._twins.items():
            feeds |= {t.name: t.quantized if layer in constants else t.exact for t in twins}
        answers: Sequence[Any] = self._session.run(None, feeds)
        return dict(zip(self._outputs, answers, strict=True))

    def _known(self, names: Collection[str]) -> set[str]:
        if unknown := sorted(set(names) - self._names):
            raise ValueError(f"no quantized layer is called {unknown[0]!r}")
        return set(names)


def quantization_switches(
    model: ir.Model, float_model: ir.Model | None = None, *, threads: int = 0
) -> QuantizationSwitches:
    """Give every layer of a quantized model a switch.

    With all layers on, the answers are those of onnxruntime for `model`, bit for bit; with all off
    they are those of `float_model`, to rounding. The same choice gives the same answers.

    Args:
        model: a canonical model with pairs of QuantizeLinear and DequantizeLinear behind its
            activations and with quantized constants; it is left as it is. Pairs with one scale per
            channel and integers that other operators read stay quantized always.
        float_model: the model before it was quantized, with the same names of nodes. Without it,
            only activations are switched: constants stay quantized always, and so does a limit
            that clamps an activation right before it is quantized.
        threads: of onnxruntime; 0 for its default.

    Raises:
        ValueError: `float_model` is another model: it lacks a node that has a quantized constant,
            or has a constant of another shape there, or none.
    """
    return QuantizationSwitches(model, float_model, threads)


@dataclass(frozen=True)
class _Twins:
    """Both forms of a constant: the name of the session's input, dequantized integers, floats."""

    name: str
    quantized: Array
    exact: Array


def _give_twins(graph: ir.Graph, use: Use, before: Mapping[str, ir.Node]) -> _Twins:
    """Make a constant an input of the session where this node reads it."""
    quantized = _dequantized(use.value)
    value = _new_input(graph, f"constant {use.value.name}", ir.DataType.FLOAT, quantized.shape)
    exact = _exact(use.node, use.index, quantized.shape, before)
    if use.quantize is None:
        use.node.replace_input_with(use.index, value)
    else:
        use.quantize.replace_input_with(0, value)
    return _Twins(value.name or "", quantized, exact)


def _dequantized(value: ir.Value) -> Array:
    """Compute what DequantizeLinear makes of a constant."""
    node = value.producer()
    assert node is not None, "a use is of a dequantized constant"
    integers, scale = (constant(given) for given in node.inputs[:2])
    assert integers is not None, "as above"
    assert scale is not None, "as above"
    zero_point = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    axis = node.attributes.get_int("axis", 1) if scale.ndim else None
    if zero_point is None:
        zero_point = np.zeros(scale.shape, integers.dtype)
    return dequantize(integers, scale, zero_point, axis)


def _exact(
    node: ir.Node, index: int, shape: tuple[int, ...], before: Mapping[str, ir.Node]
) -> Array:
    """Return the float constant that a node read before it was quantized; zeros for no bias."""
    old = before.get(node.name or "")
    where = f"node {node.name!r} ({node.op_type})"
    if old is None or old.op_type != node.op_type:
        raise ValueError(f"the float model has no {where}; give the model before quantization")
    value = old.inputs[index] if index < len(old.inputs) else None
    if value is None:
        return np.zeros(shape, np.float32)
    array = constant(value)
    if array is None:
        raise ValueError(f"input {index} of {where} is no constant of the float model")
    if array.shape == shape:
        return np.ascontiguousarray(array, np.float32)
    try:  # a bias may be written as one number, or with axes of 1
        return np.ascontiguousarray(np.broadcast_to(array.reshape(-1), shape), np.float32)
    except ValueError:
        raise ValueError(
            f"input {index} of {where} has shape {list(array.shape)} in the float model, "
            f"but {list(shape)} in the quantized one"
        ) from None


def _bypass(graph: ir.Graph, pair: Pair, switch: ir.Value) -> None:
    """Let all readers of a pair read the value itself while the switch is off."""
    value = pair.first.inputs[0]  # no longer pair.value where that has a switch or a twin itself
    for node in pair.dequantize:
        quantized = node.outputs[0]
        choice = ir.node("Where", [switch, quantized, value])
        chosen = choice.outputs[0]
        chosen.name = free_name(graph, f"{quantized.name} or not")
        chosen.type, chosen.shape = ir.TensorType(ir.DataType.FLOAT), quantized.shape
        graph.insert_after(node, choice)
        _replace(graph, quantized, chosen, but=choice)


def _replace(graph: ir.Graph, old: ir.Value, new: ir.Value, but: ir.Node | None = None) -> None:
    """Let all readers of a value read another one, except for one node."""
    for user, index in tuple(old.uses()):
        if user is not but:
            user.replace_input_with(index, new)
    for index, value in enumerate(graph.outputs):
        if value is old:
            graph.outputs[index] = new


def _new_input(graph: ir.Graph, name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
    value = ir.Value(name=free_name(graph, name), type=ir.TensorType(dtype), shape=ir.Shape(shape))
    graph.inputs.append(value)
    return value


def _session(model: ir.Model, threads: int) -> ort.InferenceSession:
    """Open a session that computes what the graph says, in the order it says."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    content = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
