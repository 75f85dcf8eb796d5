"""Writes 8-bit quantization into the graph, as pairs of QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from edgepress.calibration.base import Array, CalibrationError, Range
from edgepress.calibration.qparams import (
    activation_qparams,
    dequantize,
    fit_bias,
    quantize,
    quantize_bias,
    weight_qparams,
)
from edgepress.passes._bias_correction import channel_means, mean_shift
from edgepress.passes._int8_rules import Plan, activations, constant, is_carrier, plan, results
from edgepress.passes._patterns import demand_match, demand_regular_expressions
from edgepress.passes._qdq import Parameters, QdqWriter, scalar
from edgepress.passes.base import Context, Outcome, Pass, PassRefused

OLDEST_OPSET = 13  # the first with one scale per channel
UNCORRECTED = "biases are not corrected: there are no samples to measure means on"


@dataclass(frozen=True, kw_only=True)
class QuantizeInt8(Pass):
    """Quantizes weights and activations to 8 bits, as onnxruntime's static quantization writes it.

    Weights are symmetric int8 in [-127, 127] with one scale per output channel, activations have
    one scale and zero point per tensor, biases are int32 at the scale of the products. Operators
    that only move values pass their input's scale on. Convolutions that a Concat alone reads take
    the Concat's scale, so that it copies bytes. The model's inputs and outputs stay float.

    Attributes:
        activation: "uint8" or "int8".
        per_channel: one weight scale per output channel; false for one per weight.
        skip: regular expressions; a node stays float where one matches its whole name.
        bias_correction: subtract from every bias the mean error that rounding the weights left,
            measured on the calibration samples.
    """

    lossless: ClassVar[bool] = False

    activation: str = "uint8"
    per_channel: bool = True
    skip: tuple[str, ...] = ()
    bias_correction: bool = True

    @property
    def needs_samples(self) -> bool:
        """Always."""
        return True

    def requires(self, model: ir.Model, context: Context) -> None:  # noqa: ARG002
        """Refuse wrong options, an old opset, and activations without a calibrated range."""
        if self.activation not in ("uint8", "int8"):
            raise PassRefused(
                self.name, "activation", f"it is {self.activation!r}; choose 'uint8' or 'int8'."
            )
        opset = model.graph.opset_imports.get("", 0)
        if opset < OLDEST_OPSET:
            raise PassRefused(
                self.name,
                "model",
                f"it has opset {opset}, per-channel scales need {OLDEST_OPSET}; "
                "put `raise-opset` before `quantize-int8`.",
            )
        if not _is_quantized(model):
            planned = plan(model, self._skipped(model))
            for root in dict.fromkeys(_sources(planned).values()):
                self._range(root)

    def call(self, model: ir.Model, context: Context) -> Outcome:
        """Plan, then write pairs and quantized constants."""
        if count := _is_quantized(model):
            note = f"the model is quantized already, by {count} nodes that quantize or dequantize"
            return Outcome(model=model, modified=False, notes=[note])
        planned = plan(model, self._skipped(model))
        means = self._means(model, planned, context)
        before, originals = _weight_bytes(model), list(model.graph.initializers)
        writer = QdqWriter(model.graph)
        sources = _sources(planned)
        written: dict[ir.Value, Parameters] = {}
        scales: dict[ir.Value, tuple[np.float32, int]] = {}
        for root in dict.fromkeys(sources.values()):
            scales[root] = activation_qparams(self._range(root), self.activation)
            written[root] = self._write(writer, root.name or "", *scales[root])
        constants = rescaled = 0
        for node in planned.nodes:
            at = {index: a for index, v in enumerate(node.inputs) if (a := constant(v)) is not None}
            if node.op_type in ("Conv", "Gemm", "MatMul") and at:
                scale = scales[sources[activations(node)[0]]][0]
                mean = means.get(activations(node)[0]) if node.op_type != "MatMul" else None
                rescaled += self._weights(writer, node, at, scale, mean)
                constants += len(at)
            elif node.op_type in ("Add", "Mul", "Concat"):
                shared = None
                if node.op_type == "Concat":
                    root = sources[node.outputs[0]]
                    shared = (*scales[root], root.name or "")
                for index, array in at.items():
                    self._operand(writer, node, index, array, shared)
                constants += len(at)
        made = {value for node in planned.nodes for value in results(node)}
        for value, root in sources.items():
            writer.activation(value, written[root], output=value in made)
        writer.drop_unused(originals)
        return Outcome(
            model=model,
            modified=bool(planned.nodes),
            stats={
                "nodes_quantized": len(planned.nodes),
                "activations_quantized": len(sources),
                "constants_quantized": constants,
                "rescaled_channels": rescaled,
                "float_nodes": len(planned.floats),
                "float_islands": _islands([node for node, _ in planned.floats]),
                "weight_bytes_before": before,
                "weight_bytes_after": _weight_bytes(model),
            },
            skipped=[(node.name or node.op_type, why) for node, why in planned.floats],
            notes=[UNCORRECTED] if self.bias_correction and context.samples is None else [],
        )

    def _means(self, model: ir.Model, planned: Plan, context: Context) -> dict[ir.Value, Array]:
        """Measure what bias correction needs to know; nothing where it is off."""
        if not self.bias_correction or context.samples is None:
            return {}
        layers = [node for node in planned.nodes if node.op_type in ("Conv", "Gemm")]
        return channel_means(self.name, model, layers, context.samples, context)

    def _skipped(self, model: ir.Model) -> dict[ir.Node, str]:
        """Return the nodes that the user wants left float. Refuses a pattern without a match."""
        found: dict[ir.Node, str] = {}
        demand_regular_expressions(self.name, "skip", self.skip)
        names = [node.name or "" for node in model.graph]
        for pattern in self.skip:
            matched = set(demand_match(self.name, "skip", pattern, names, what="node"))
            nodes = [node for node in model.graph if (node.name or "") in matched]
            found |= dict.fromkeys(nodes, f"skipped by {pattern!r}")
        return found

    def _range(self, value: ir.Value) -> Range:
        """Return the calibrated range of a value, or refuse."""
        found = value.meta.get("range")
        if not isinstance(found, Range):
            raise PassRefused(
                self.name,
                f"value {value.name!r}",
                f"no calibrated range for value {value.name!r}; "
                "put `calibrate` right before `quantize-int8`: passes between may drop ranges.",
            )
        return found

    def _write(
        self, writer: QdqWriter, name: str, scale: np.float32, zero_point: int
    ) -> Parameters:
        return writer.parameters(
            name, scalar(scale, "float32"), scalar(zero_point, self.activation)
        )

    def _operand(
        self,
        writer: QdqWriter,
        node: ir.Node,
        index: int,
        array: Array,
        shared: tuple[np.float32, int, str] | None,
    ) -> None:
        """Quantize a constant operand like an activation, by its own range or a shared scale."""
        name = _input_name(node, index)
        try:
            own = Range(float(array.min(initial=0)), float(array.max(initial=0)))
            scale, zero_point, owner = shared or (*activation_qparams(own, self.activation), name)
        except CalibrationError as error:
            raise PassRefused(self.name, f"constant {name!r}", str(error)) from error
        parameters = self._write(writer, owner, scale, zero_point)
        integers = quantize(array, scale, zero_point, self.activation)
        writer.constant(node, index, name, integers, parameters, None)

    def _weights(
        self,
        writer: QdqWriter,
        node: ir.Node,
        at: dict[int, Array],
        input_scale: np.float32,
        mean: Array | None,
    ) -> int:
        """Quantize weight and bias; return how many channels were rescaled to fit the bias."""
        weight, bias = at[1], at.get(2)
        channels = _channel_axis(node, weight)
        axis = channels if self.per_channel else None
        scales, zeros = weight_qparams(weight, axis)
        if bias is not None:
            bias = np.broadcast_to(bias.reshape(-1), (weight.shape[channels or 0],))
        fitted = fit_bias(scales, input_scale, bias)
        integers = quantize(weight, fitted, zeros, "int8", axis)
        name = _input_name(node, 1)
        parameters = writer.parameters(name, fitted, zeros)
        writer.constant(node, 1, name, integers, parameters, axis)
        if mean is not None:
            error = dequantize(integers, fitted, zeros, axis).astype(np.float64) - weight
            shift = mean_shift(node, error, mean)
            bias = -shift if bias is None else bias - shift
        if bias is not None:
            products = (fitted * input_scale).astype(np.float32)
            name = _input_name(node, 2) or f"{node.outputs[0].name}_bias"
            parameters = writer.parameters(
                f"{name}_quantized", products, np.zeros(products.shape, np.int32)
            )
            steps = quantize_bias(bias, products)
            writer.constant(node, 2, name, steps, parameters, 0 if products.ndim else None)
        return int(np.count_nonzero(fitted != scales))


def _input_name(node: ir.Node, index: int) -> str:
    """Return the name of an input, or "" where the node has none there."""
    value = node.inputs[index] if index < len(node.inputs) else None
    return (value.name or "") if value is not None else ""


def _channel_axis(node: ir.Node, weight: Array) -> int | None:
    """Return the axis of output channels, or None where a single scale must do."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        return 0 if node.attributes.get_int("transB", 0) else 1
    return 1 if weight.ndim == 2 else None


def _sources(planned: Plan) -> dict[ir.Value, ir.Value]:
    """Map every activation to quantize to the value whose range decides its scale, in order."""
    chosen = set(planned.nodes)
    provider: dict[ir.Value, ir.Value] = {}
    values: dict[ir.Value, None] = {}
    for node in planned.nodes:
        values |= dict.fromkeys((*activations(node), *results(node)))
        if is_carrier(node):
            provider |= dict.fromkeys(results(node), activations(node)[0])
        if node.op_type == "Concat":
            for value in activations(node):
                maker = value.producer()
                if maker in chosen and not is_carrier(maker) and _only_reader(value, node):
                    provider[value] = node.outputs[0]
    sources: dict[ir.Value, ir.Value] = {}
    for value in values:
        if value in planned.fused:
            continue
        root = value
        while root in provider:
            root = provider[root]
        sources[value] = root
    return sources


def _only_reader(value: ir.Value, node: ir.Node) -> bool:
    """Whether nothing but this node reads the value."""
    return set(value.consumers()) == {node} and not value.is_graph_output()


def _is_quantized(model: ir.Model) -> int:
    """Count the nodes that quantize or dequantize."""
    return sum(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph)


def _weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _islands(nodes: list[ir.Node]) -> int:
    """Count groups of float nodes that are connected by values between them."""
    group = {node: node for node in nodes}

    def find(node: ir.Node) -> ir.Node:
        while group[node] is not node:
            node = group[node]
        return node

    for node in nodes:
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            if producer in group:
                group[find(node)] = find(producer)
    return len({find(node) for node in nodes})
