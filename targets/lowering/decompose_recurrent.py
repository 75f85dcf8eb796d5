"""RNN, GRU and LSTM → their steps, one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from edgepress.targets.lowering.rewriting import Rewriting, attributes_of
from edgepress.targets.program import Array

MOST_STEPS = 128
_ACTIVATIONS = frozenset({"Relu", "Sigmoid", "Softplus", "Softsign", "Tanh"})
_DEFAULTS = {"RNN": ["Tanh"], "GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}
_GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


@dataclass(frozen=True)
class _Direction:
    """Weights of one direction: `[gates * hidden, …]` each, or names of parts of them."""

    graph: Rewriting
    inputs: str  # x W', [steps, batch, gates * hidden]
    recurrent: str  # R', [hidden, gates * hidden]
    input_bias: str
    recurrent_bias: str
    peepholes: list[str]
    activations: list[str]
    hidden: int
    linear_before_reset: bool

    def part(self, value: str, place: int) -> str:
        """Take one gate's part of the last axis."""
        start, end = place * self.hidden, (place + 1) * self.hidden
        bounds = (self.graph.add_constant([i], np.int64) for i in (start, end, -1))
        return self.graph.emit("Slice", value, *bounds)

    def add(self, *values: str) -> str:
        """Sum up."""
        total = values[0]
        for value in values[1:]:
            total = self.graph.emit("Add", total, value)
        return total


def why_not(node: onnx.NodeProto, steps: int, lengths: Array | None) -> str | None:
    """Say why a recurrent node cannot be lowered; None where it can."""
    attributes = attributes_of(node)
    for activation in map(_text, attributes.get("activations", [])):
        if activation not in _ACTIVATIONS:
            return f"the activation {activation} is not supported"
    for name in ("activation_alpha", "activation_beta", "clip"):
        if attributes.get(name):
            return f"the attribute {name} is not supported"
    if attributes.get("input_forget", 0):
        return "coupled input and forget gates are not supported"
    if len(node.input) > 4 and node.input[4] and (lengths is None or (lengths != steps).any()):
        return "sequences of different lengths (sequence_lens) are not supported"
    if steps > MOST_STEPS:
        return f"{steps} steps are more than the {MOST_STEPS} that are unrolled"
    return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _recurrent(
    step: Callable[[_Direction, str, list[str]], list[str]],
) -> Callable[[Rewriting, onnx.NodeProto], bool]:
    def rule(graph: Rewriting, node: onnx.NodeProto) -> bool:
        attributes = attributes_of(node)
        x, w, r, *optional = node.input
        bias, _, *states, peepholes = [*optional, "", "", "", "", ""][:5]
        if attributes.get("layout", 0):
            x = graph.emit("Transpose", x, perm=[1, 0, 2])
            states = [graph.emit("Transpose", s, perm=[1, 0, 2]) if s else "" for s in states]
            batch, steps = graph.shape(node.input[0])[:2]
        else:
            steps, batch = graph.shape(node.input[0])[:2]
        lengths = graph.constant(node.input[4]) if len(node.input) > 4 else None
        if why_not(node, steps, lengths):
            return False
        gates = _GATES[node.op_type]
        directions, _, hidden = graph.shape(r)
        chosen = [_text(a) for a in attributes.get("activations", [])]
        chosen = chosen or _DEFAULTS[node.op_type] * directions
        per = len(chosen) // directions
        zeros = graph.add_constant(np.zeros((batch, hidden)), np.float32)
        rows: list[list[str]] = []
        finals: list[list[str]] = []
        for number in range(directions):

            def pick(name: str, number: int = number) -> str:
                return graph.emit("Gather", name, graph.add_constant(number, np.int64), axis=0)

            def cut(name: str, start: int, end: int) -> str:
                bounds = (graph.add_constant([i], np.int64) for i in (start, end, 0))
                return graph.emit("Slice", name, *bounds)

            biases = [graph.add_constant(np.zeros(gates * hidden), np.float32)] * 2
            if bias:
                whole = pick(bias)
                size = gates * hidden
                biases = [cut(whole, 0, size), cut(whole, size, 2 * size)]
            direction = _Direction(
                graph=graph,
                inputs=graph.emit("MatMul", x, graph.emit("Transpose", pick(w), perm=[1, 0])),
                recurrent=graph.emit("Transpose", pick(r), perm=[1, 0]),
                input_bias=biases[0],
                recurrent_bias=biases[1],
                peepholes=[cut(pick(peepholes), i * hidden, (i + 1) * hidden) for i in range(3)]
                if peepholes
                else [],
                activations=chosen[number * per : (number + 1) * per],
                hidden=hidden,
                linear_before_reset=bool(attributes.get("linear_before_reset", 0)),
            )
            state = [pick(s) if s else zeros for s in states]
            backwards = attributes.get("direction") == "reverse" or number == 1
            outputs = {}
            for time in reversed(range(steps)) if backwards else range(steps):
                moment = graph.emit(
                    "Gather", direction.inputs, graph.add_constant(time, np.int64), axis=0
                )
                state = step(direction, moment, state)
                outputs[time] = state[0]
            rows.append([outputs[time] for time in range(steps)])
            finals.append(state)
        _write(graph, node, rows, finals, bool(attributes.get("layout", 0)))
        return True

    return rule


def _write(
    graph: Rewriting,
    node: onnx.NodeProto,
    rows: list[list[str]],
    finals: list[list[str]],
    batch_first: bool,
) -> None:
    """Stack the outputs: all steps `[steps, directions, …]`, then the last states."""

    def stack(values: Sequence[str], output: str, axes: list[int]) -> str:
        parts = [graph.emit_axes("Unsqueeze", value, axes) for value in values]
        return graph.emit("Concat", *parts, output=output, axis=axes[0])

    names = [*node.output, "", "", ""]
    if names[0]:
        times = [
            stack([row[time] for row in rows], graph.fresh("step"), [0])
            for time in range(len(rows[0]))
        ]
        if batch_first:
            whole = stack(times, graph.fresh("steps"), [0])
            graph.emit("Transpose", whole, output=names[0], perm=[2, 0, 1, 3])
        else:
            stack(times, names[0], [0])
    for place in range(len(finals[0])):
        if not names[1 + place]:
            continue
        last = [state[place] for state in finals]
        if batch_first:
            whole = stack(last, graph.fresh("state"), [0])
            graph.emit("Transpose", whole, output=names[1 + place], perm=[1, 0, 2])
        else:
            stack(last, names[1 + place], [0])


def _rnn_step(d: _Direction, x: str, state: list[str]) -> list[str]:
    product = d.graph.emit("MatMul", state[0], d.recurrent)
    total = d.add(x, d.input_bias, product, d.recurrent_bias)
    return [d.graph.emit(d.activations[0], total)]


def _gru_step(d: _Direction, x: str, state: list[str]) -> list[str]:
    emit, (h, *_) = d.graph.emit, state
    products = d.add(emit("MatMul", h, d.recurrent), d.recurrent_bias)
    inputs = d.add(x, d.input_bias)
    z, r = (emit(d.activations[0], d.add(d.part(inputs, i), d.part(products, i))) for i in (0, 1))
    if d.linear_before_reset:
        reset = emit("Mul", r, d.part(products, 2))
    else:
        weights, bias = d.part(d.recurrent, 2), d.part(d.recurrent_bias, 2)
        reset = d.add(emit("MatMul", emit("Mul", r, h), weights), bias)
    new = emit(d.activations[1], d.add(d.part(inputs, 2), reset))
    return [d.add(new, emit("Mul", z, emit("Sub", h, new)))]


def _lstm_step(d: _Direction, x: str, state: list[str]) -> list[str]:
    emit, (h, c) = d.graph.emit, state
    total = d.add(x, d.input_bias, emit("MatMul", h, d.recurrent), d.recurrent_bias)
    i, o, f, new = (d.part(total, place) for place in range(4))
    if d.peepholes:
        i = d.add(i, emit("Mul", d.peepholes[0], c))
        f = d.add(f, emit("Mul", d.peepholes[2], c))
    kept = emit("Mul", emit(d.activations[0], f), c)
    c = d.add(kept, emit("Mul", emit(d.activations[0], i), emit(d.activations[1], new)))
    if d.peepholes:
        o = d.add(o, emit("Mul", d.peepholes[1], c))
    return [emit("Mul", emit(d.activations[0], o), emit(d.activations[2], c)), c]


RULES = {
    "GRU": _recurrent(_gru_step),
    "LSTM": _recurrent(_lstm_step),
    "RNN": _recurrent(_rnn_step),
}
