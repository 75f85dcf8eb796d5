"""Writes 8-bit quantization into the graph, as pairs of QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from edgepress.calibration.base import Array, CalibrationError, Range
from edgepress.calibration.qparams import SMALLEST_SCALE, activation_qparams, quantize
from edgepress.passes._accumulators import LARGEST, fitting_limit
from edgepress.passes._adaptive_rounding import adaptive_steps
from edgepress.passes._best_ranges import best_ranges
from edgepress.passes._bias_correction import channel_means
from edgepress.passes._flat_ends import without_flat_ends
from edgepress.passes._int8_rules import Plan, activations, constant, is_carrier, plan, results
from edgepress.passes._opset import raised_for_int16
from edgepress.passes._patterns import chosen_nodes
from edgepress.passes._qdq import Parameters, QdqWriter, scalar
from edgepress.passes._qdq_graph import (
    calibrated_range,
    demand_opset,
    input_name,
    islands,
    quantizing_nodes,
    weight_bytes,
    write_layer,
)
from edgepress.passes._quantized_layer import QuantizedLayer, quantize_layer
from edgepress.passes._scales import sources, touched
from edgepress.passes.base import Context, Outcome, Pass, PassRefused

LAYERS = ("Conv", "Gemm", "MatMul")
CHOICES = {
    "activation": ("uint8", "int8"),
    "method": ("calibrated", "best"),
    "rounding": ("nearest", "adaptive"),
}
#: An int16 activation may grow to this many times its range: it has bits to spare for values that
#: no sample showed.
HEADROOM = 4
UNCORRECTED = "biases are not corrected: there are no samples to measure means on"


@dataclass(frozen=True, kw_only=True)
class QuantizeInt8(Pass):
    """Quantizes weights and activations to 8 bits, as onnxruntime's static quantization writes it.

    Weights are symmetric int8 in [-127, 127] with one scale per output channel, activations have
    one scale and zero point per tensor, biases are int32 at the scale of the products. Operators
    that only move values pass their input's scale on. Convolutions that a Concat alone reads take
    the Concat's scale, so that it copies bytes. Element-wise operators that together are a
    function of one activation (GELU, SiLU, hard-swish, however they are written) are quantized as
    one, without scales inside. The model's inputs and outputs stay float.

    Attributes:
        activation: "uint8" or "int8".
        per_channel: one weight scale per output channel; false for one per weight.
        skip: regular expressions; a node stays float where one matches its whole name.
        int16: regular expressions; where one matches a node's whole name, what the node reads and
            writes has 16 bits instead of 8, symmetric. Fewer of them are used where sums in int32
            could overflow. The model is brought to opset 21.
        int16_outputs: give the model's outputs 16 bits as well: they are few and end the rounding.
        method: "calibrated" takes the ranges that `calibrate` noted; "best" chooses them anew, for
            every activation the one with the least squared error on samples that it was not taken
            from; where only functions such as hard-swish read it, without ends at which they are
            flat.
        symmetric: put the zero point of activations in the middle of their dtype.
        rounding: "nearest", or "adaptive": weights are rounded up or down so that the layer's
            outputs, over the calibration samples, change least.
        bias_correction: subtract from every bias the mean error that rounding the weights left,
            measured on the calibration samples.
    """

    lossless: ClassVar[bool] = False

    activation: str = "uint8"
    per_channel: bool = True
    skip: tuple[str, ...] = ()
    int16: tuple[str, ...] = ()
    int16_outputs: bool = False
    method: str = "calibrated"
    symmetric: bool = False
    rounding: str = "nearest"
    bias_correction: bool = True

    @property
    def needs_samples(self) -> bool:
        """Always."""
        return True

    def requires(self, model: ir.Model, context: Context) -> None:
        """Refuse wrong options, an old opset, and activations without a calibrated range."""
        for option, (one, other) in CHOICES.items():
            if (chosen := getattr(self, option)) not in (one, other):
                why = f"it is {chosen!r}; choose {one!r} or {other!r}."
                raise PassRefused(self.name, option, why)
        demand_opset(self.name, model)
        if not quantizing_nodes(model):
            planned = plan(model, self._matched(model, "skip", self.skip))
            self._matched(model, "int16", self.int16)
            if self.method == "calibrated":
                for root in dict.fromkeys(sources(planned).values()):
                    calibrated_range(self.name, root)
            self._demand_samples(context)

    def call(self, model: ir.Model, context: Context) -> Outcome:
        """Plan, then write pairs and quantized constants."""
        if count := quantizing_nodes(model):
            note = f"the model is quantized already, by {count} nodes that quantize or dequantize"
            return Outcome(model=model, modified=False, notes=[note])
        if self.int16 or self.int16_outputs:
            model = raised_for_int16(model, self.name)
        planned = plan(model, self._matched(model, "skip", self.skip))
        means = self._means(model, planned, context)
        before, originals = weight_bytes(model), list(model.graph.initializers)
        roots = sources(planned)
        layers = _Layers(roots, means, self._steps(model, planned, context), self.per_channel)
        wide = touched(planned, roots, self._matched(model, "int16", self.int16))
        if self.int16_outputs:
            wide |= {roots[value] for value in model.graph.outputs if value in roots}
        ranges = self._ranges(model, list(dict.fromkeys(roots.values())), context)
        if self.method == "best":
            ranges = without_flat_ends(ranges, roots, planned, model.graph.opset_imports[""], wide)
        scales = {
            root: self._scale(root, found, wide, layers, planned) for root, found in ranges.items()
        }
        writer = QdqWriter(model.graph)
        written = {root: _write(writer, root.name or "", scale) for root, scale in scales.items()}
        constants = rescaled = 0
        for node in planned.nodes:
            at = {index: a for index, v in enumerate(node.inputs) if (a := constant(v)) is not None}
            if node.op_type in LAYERS and at:
                layer = layers(node, scales[roots[activations(node)[0]]].scale)
                write_layer(writer, node, layer)
                constants, rescaled = constants + len(at), rescaled + layer.rescaled
            elif planned.quantizes_operands(node):
                for index, array in at.items():
                    self._operand(writer, node, index, array, roots, scales)
                constants += len(at)
        made = {value for node in planned.nodes for value in results(node)}
        moved = {v for node in planned.nodes if is_carrier(node) for v in results(node)}
        for value, root in roots.items():
            limit = None if value in moved else scales[root].limit
            writer.activation(value, written[root], output=value in made, limit=limit)
        writer.drop_unused(originals)
        return Outcome(
            model=model,
            modified=bool(planned.nodes),
            stats={
                "nodes_quantized": len(planned.nodes),
                "activations_quantized": len(roots),
                "activations_int16": sum(root in wide for root in roots.values()),
                "constants_quantized": constants,
                "rescaled_channels": rescaled,
                "float_nodes": len(planned.floats),
                "float_islands": islands([node for node, _ in planned.floats]),
                "weight_bytes_before": before,
                "weight_bytes_after": weight_bytes(model),
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

    def _matched(
        self, model: ir.Model, option: str, patterns: tuple[str, ...]
    ) -> dict[ir.Node, str]:
        """Return the nodes that an option names, and why. Refuses a pattern without a match."""
        found = chosen_nodes(self.name, option, patterns, list(model.graph))
        return {node: f"skipped by {pattern!r}" for node, pattern in found.items()}

    def _demand_samples(self, context: Context) -> None:
        """Refuse an option that looks at samples where there are none."""
        for option in ("method", "rounding"):
            chosen, plain = getattr(self, option), CHOICES[option][0]
            if chosen != plain and (context.samples is None or not len(context.samples)):
                why = f"{chosen!r} needs samples; give some with --calib, or choose {plain!r}."
                raise PassRefused(self.name, option, why)

    def _ranges(
        self, model: ir.Model, values: list[ir.Value], context: Context
    ) -> dict[ir.Value, Range]:
        """Return the range of every value that decides a scale."""
        if self.method == "calibrated":
            return {value: calibrated_range(self.name, value) for value in values}
        assert context.samples is not None, "`requires` looked"
        return best_ranges(
            self.name, model, values, context.samples, context, symmetric=self.symmetric
        )

    def _steps(self, model: ir.Model, planned: Plan, context: Context) -> dict[ir.Node, Array]:
        """Round weights by what they do to outputs; nothing where the nearest step is asked for."""
        if self.rounding == "nearest":
            return {}
        assert context.samples is not None, "`requires` looked"
        return adaptive_steps(
            self.name,
            model,
            [node for node in planned.nodes if node.op_type in LAYERS],
            context.samples,
            context,
            per_channel=self.per_channel,
            corrected=self.bias_correction,
        )

    def _scale(
        self,
        root: ir.Value,
        found: Range,
        wide: set[ir.Value],
        layers: _Layers,
        planned: Plan,
    ) -> _Scale:
        """Choose the scale and zero point of all activations that share them with this one."""
        if root not in wide:
            chosen = activation_qparams(found, self.activation, symmetric=self.symmetric)
            return _Scale(*chosen, self.activation)
        found = Range(HEADROOM * found.low, HEADROOM * found.high)
        sharing = {value for value, other in layers.roots.items() if other is root}
        readers = [n for n in planned.nodes if activations(n) and activations(n)[0] in sharing]

        def layer(node: ir.Node, limit: int) -> QuantizedLayer:
            return layers(node, _symmetric_scale(found, limit))

        limit = fitting_limit([n for n in readers if _sums(n)], layer)
        scale = _symmetric_scale(found, limit)
        clamp = None
        if limit < LARGEST:
            clamp = min(limit * float(scale), float(np.finfo(np.float32).max))
        return _Scale(scale, 0, "int16", clamp)

    def _operand(
        self,
        writer: QdqWriter,
        node: ir.Node,
        index: int,
        array: Array,
        roots: dict[ir.Value, ir.Value],
        scales: dict[ir.Value, _Scale],
    ) -> None:
        """Quantize a constant operand like an activation, by its own range or a Concat's scale."""
        name = owner = input_name(node, index)
        own = Range(float(array.min(initial=0)), float(array.max(initial=0)))
        if node.op_type == "Concat":
            root = roots[node.outputs[0]]
            scale, owner = scales[root], root.name or ""
        else:
            dtype = scales[roots[activations(node)[0]]].dtype
            try:
                symmetric = self.symmetric or dtype == "int16"
                scale = _Scale(*activation_qparams(own, dtype, symmetric=symmetric), dtype)
            except CalibrationError as error:
                raise PassRefused(self.name, f"constant {name!r}", str(error)) from error
        integers = quantize(array, scale.scale, scale.zero_point, scale.dtype)
        writer.constant(node, index, name, integers, _write(writer, owner, scale), None)


@dataclass(frozen=True)
class _Scale:
    """How an activation is quantized: its dtype, and the magnitude it is clamped to if any."""

    scale: np.float32
    zero_point: int
    dtype: str
    limit: float | None = None


@dataclass(frozen=True)
class _Layers:
    """Quantizes layers.

    Attributes:
        roots: the activations' sources.
        means: of the layers' inputs, per channel.
        steps: weights that are rounded already, by layer.
        per_channel: one weight scale per output channel.
    """

    roots: dict[ir.Value, ir.Value]
    means: dict[ir.Value, Array]
    steps: dict[ir.Node, Array]
    per_channel: bool

    def __call__(self, node: ir.Node, scale: np.float32) -> QuantizedLayer:
        """Quantize a layer for an input of this scale."""
        weight, bias = (constant(v) for v in (*node.inputs[1:3], None)[:2])
        assert weight is not None, "only layers with constant weights are planned"
        mean = self.means.get(activations(node)[0]) if node.op_type != "MatMul" else None
        return quantize_layer(
            node,
            weight,
            bias,
            scale,
            per_channel=self.per_channel,
            mean=mean,
            steps=self.steps.get(node),
        )


def _symmetric_scale(found: Range, limit: int) -> np.float32:
    """Return the scale of `limit` steps on either side of 0."""
    largest = max(-found.low, found.high)
    return np.float32(max(largest / limit, SMALLEST_SCALE)) if largest > 0 else np.float32(1.0)


def _sums(node: ir.Node) -> bool:
    """Whether the node is no product of two activations, which runs in float."""
    return node.op_type not in LAYERS or constant(node.inputs[1]) is not None


def _write(writer: QdqWriter, name: str, scale: _Scale) -> Parameters:
    return writer.parameters(
        name, scalar(scale.scale, "float32"), scalar(scale.zero_point, scale.dtype)
    )
