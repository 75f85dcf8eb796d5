"""Writes fixed point into the graph: every scale a power of two, every zero point 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from edgepress.calibration.base import Array, CalibrationError, Range
from edgepress.calibration.fixed_point import (
    Format,
    Rounding,
    fitting_format,
    stochastic,
    to_fixed,
)
from edgepress.passes._bias_correction import channel_means
from edgepress.passes._fixed_point_layer import FixedPointLayer, FloatLayer
from edgepress.passes._fixed_point_rules import (
    bounds,
    computes_in_float,
    is_fixed_point,
    reach,
    shares_format,
    stored_limits,
    without_form,
)
from edgepress.passes._formats import Observed, narrowed, observe
from edgepress.passes._int8_rules import Plan, activations, constant, is_carrier, plan, results
from edgepress.passes._opset import raised_for_int16
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
from edgepress.passes._scales import sources
from edgepress.passes.base import Context, Outcome, Pass, PassRefused

LAYERS = ("Conv", "Gemm", "MatMul")
LISTED = 8  # layers and tensors that notes list
#: What a 16-bit format holds beyond the calibrated range. One unseen value that saturates costs
#: more than all rounding at 16 bits: 51 against 66 dB on SqueezeNet, where 1.25 was best of 1 to 2.
ROOM = 1.25
#: Integer softmax takes scales down to 2**-28, and one bit is left for a finer format.
MOST_SOFTMAX_BITS = 27


@dataclass(frozen=True, kw_only=True)
class QuantizeFixedPoint(Pass):
    """Quantizes weights and activations to Qm.n fixed point, for boards without a float unit.

    All scales are powers of two and all zero points 0, so that the compiled model shifts where
    int8 with free scales multiplies, and no instruction computes in float. With 8 bits, a tensor
    gets the format that holds its calibrated range or the one with a bit more fraction, which
    saturates: the one with the smaller squared error. With 16 bits, activations keep room for
    ranges a quarter larger than the calibrated ones. No int32 sum can overflow: where many
    products of 16 bits are summed up, weights and activations give up bits. Biases are int32 at
    the scale of the products. The model's inputs and outputs stay float; with 16 bits it gets
    opset 21.

    Attributes:
        bits: 16 or 8, of activations and weights.
        per_channel: one weight format per output channel; false for one per weight.
        rounding: of weights and biases: "nearest" or "stochastic", which rounds up with the
            probability of the fraction.
        seed: of stochastic rounding.
        bias_correction: subtract from every bias the mean error that rounding the weights left,
            measured on the calibration samples.
        floats: what to do with nodes that have no integer form: "refuse" the model, or "allow"
            them as float islands.
    """

    lossless: ClassVar[bool] = False

    bits: int = 16
    per_channel: bool = True
    rounding: str = "nearest"
    seed: int = 0
    bias_correction: bool = True
    floats: str = "refuse"

    @property
    def needs_samples(self) -> bool:
        """Always."""
        return True

    def requires(self, model: ir.Model, context: Context) -> None:  # noqa: ARG002
        """Refuse wrong options, an old opset, missing ranges and nodes without integer form."""
        for option, value, choices in (
            ("bits", self.bits, (8, 16)),
            ("rounding", self.rounding, ("nearest", "stochastic")),
            ("floats", self.floats, ("refuse", "allow")),
        ):
            if value not in choices:
                raise PassRefused(
                    self.name, option, f"it is {value!r}; choose {choices[0]!r} or {choices[1]!r}."
                )
        demand_opset(self.name, model)
        if count := quantizing_nodes(model):
            if not is_fixed_point(model):
                why = (
                    f"{count} nodes quantize it already, not in fixed point; give the float model."
                )
                raise PassRefused(self.name, "model", why)
            return
        planned = self._plan(model)
        if self.floats == "refuse":
            self._demand_integers(model, planned)
        for root in dict.fromkeys(sources(planned).values()):
            calibrated_range(self.name, root)

    def call(self, model: ir.Model, context: Context) -> Outcome:
        """Choose formats, then write pairs and quantized constants."""
        if count := quantizing_nodes(model):
            note = f"the model is quantized already, by {count} nodes that quantize or dequantize"
            return Outcome(model=model, modified=False, notes=[note])
        if self.bits == 16:
            model = raised_for_int16(model, self.name)
        planned = self._plan(model)
        before, originals = weight_bytes(model), list(model.graph.initializers)
        work = _Work(self, model, planned, context)
        work.choose_formats()
        work.write()
        work.writer.drop_unused(originals)
        floats = [node for node, _ in planned.floats]
        return Outcome(
            model=model,
            modified=bool(planned.nodes),
            stats={
                "nodes_quantized": len(planned.nodes),
                "activations_quantized": len(work.roots),
                "constants_quantized": work.constants,
                **work.saturation(),
                "narrowed_channels": sum(layer.rescaled for _, _, layer in work.layers),
                "narrowed_activations": sum(f.bits < self.bits for f in work.formats.values()),
                "float_nodes": len(floats),
                "float_islands": islands(floats),
                "weight_bytes_before": before,
                "weight_bytes_after": weight_bytes(model),
            },
            skipped=[(node.name or node.op_type, why) for node, why in planned.floats],
            notes=work.notes(),
        )

    def _plan(self, model: ir.Model) -> Plan:
        return plan(model, without_form(model, self.bits), everywhere=True)

    def _demand_integers(self, model: ir.Model, planned: Plan) -> None:
        """Refuse a model that would execute float instructions, naming every such node."""
        reasons = dict(planned.floats)
        floats = [n for n in model.graph if n not in set(planned.nodes) and computes_in_float(n)]
        if floats:
            named = ", ".join(
                f"{node.name or node.op_type} ({reasons.get(node, 'not float32')})"
                for node in floats
            )
            raise PassRefused(
                self.name,
                f"{len(floats)} of {len(model.graph)} nodes have no integer form",
                f"{named}; replace them or cut them off, or keep them in float with "
                'floats = "allow".',
            )

    def fitting(self, value: ir.Value, roots: Mapping[ir.Value, ir.Value]) -> Format:
        """Return the finest format that holds the calibrated range of a value, and some room."""
        found = calibrated_range(self.name, value)
        if self.bits == 16:
            low, high = bounds(value, roots)
            found = Range(max(found.low * ROOM, low), min(found.high * ROOM, high))
        try:
            fits = fitting_format(found, self.bits)
        except CalibrationError as error:
            raise PassRefused(self.name, f"value {value.name!r}", str(error)) from error
        producer = value.producer()
        if producer is not None and producer.op_type == "Softmax":
            return Format(fits.bits, min(fits.fraction_bits, MOST_SOFTMAX_BITS))
        return fits

    def rounding_of(self, name: str) -> Rounding:
        """Return how the constant of this name is rounded."""
        return np.rint if self.rounding == "nearest" else stochastic(self.seed, name)


@dataclass
class _Work:
    """One model on its way to fixed point.

    Attributes:
        roots: every activation to quantize, and the one whose format it shares.
        formats: of the roots.
        observed: what the samples said about the roots; empty without samples.
        layers: each layer with its input's format.
    """

    step: QuantizeFixedPoint
    model: ir.Model
    planned: Plan
    context: Context
    roots: dict[ir.Value, ir.Value] = field(init=False)
    writer: QdqWriter = field(init=False)
    formats: dict[ir.Value, Format] = field(default_factory=dict)
    observed: dict[ir.Value, Observed] = field(default_factory=dict)
    layers: list[tuple[ir.Node, Format, FixedPointLayer]] = field(default_factory=list)
    constants: int = 0
    saturated_constants: int = 0
    means: dict[ir.Value, Array] = field(default_factory=dict)
    float_layers: dict[ir.Node, FloatLayer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.roots = sources(self.planned)
        self.writer = QdqWriter(self.model.graph)

    def choose_formats(self) -> None:
        """Choose the format of every root."""
        step, samples = self.step, self.context.samples
        fitting = {
            root: step.fitting(root, self.roots) for root in dict.fromkeys(self.roots.values())
        }
        if samples is not None:
            if step.bias_correction:
                layers = [node for node in self._layers() if node.op_type != "MatMul"]
                self.means = channel_means(step.name, self.model, layers, samples, self.context)
            self.observed = observe(
                step.name, self.model, fitting, samples, self.context, finer=step.bits == 8
            )
        for root, fits in fitting.items():
            observed = self.observed.get(root) or Observed(fits)
            readers = self._readers(root) if step.bits == 16 else []
            self.formats[root] = narrowed(observed, readers, self._layer)

    def write(self) -> None:
        """Write pairs and quantized constants."""
        for node in self.planned.nodes:
            at = {index: a for index, v in enumerate(node.inputs) if (a := constant(v)) is not None}
            if node.op_type in LAYERS and at:
                source = self.formats[self.roots[activations(node)[0]]]
                layer = self._layer(node, source)
                self.layers.append((node, source, layer))
                write_layer(self.writer, node, layer)
            elif self.planned.quantizes_operands(node):
                for index, array in at.items():
                    self._operand(node, index, array)
            else:
                continue
            self.constants += len(at)
        written = {
            root: self._parameters(root.name or "", chosen) for root, chosen in self.formats.items()
        }
        made = {value for node in self.planned.nodes for value in results(node)}
        moved = {value for value in self.roots if self._is_moved(value)}
        for value, root in self.roots.items():
            chosen = self.formats[root]
            narrow = chosen.bits < self.step.bits and value not in moved
            limit = chosen.limits[1] * float(chosen.scale) if narrow else None
            self.writer.activation(value, written[root], output=value in made, limit=limit)

    def _is_moved(self, value: ir.Value) -> bool:
        """Whether all that a value holds is in its format and clamped already."""
        node = value.producer()
        if node is None or not (is_carrier(node) or node.op_type == "Concat"):
            return False
        read = node.inputs if node.op_type == "Concat" else activations(node)
        return all(shares_format(v, value, self.roots) for v in read)

    def saturation(self) -> dict[str, int | float]:
        """Count what does not fit its format."""
        seen = sum(observed.values for observed in self.observed.values())
        lost = sum(observed.saturated for observed in self.observed.values())
        return {
            "saturated_weights": sum(layer.saturated for _, _, layer in self.layers),
            "saturated_biases": sum(layer.saturated_biases for _, _, layer in self.layers),
            "saturated_constants": self.saturated_constants,
            "saturated_activations": lost,
            "saturated_activations_percent": round(100 * lost / seen, 6) if seen else 0.0,
        }

    def notes(self) -> list[str]:
        """Say which formats were chosen, where values saturate, and where sums took bits."""
        found = []
        if self.context.samples is None:
            found.append(
                "no samples: formats hold the calibrated ranges, saturation is not counted"
            )
        lines = [self._described(node, source, layer) for node, source, layer in self.layers]
        found += lines[:LISTED]
        if len(lines) > LISTED:
            found.append(f"and {len(lines) - LISTED} more layers")
        worst = sorted(
            (v for v, observed in self.observed.items() if observed.saturated),
            key=lambda v: (-self.observed[v].saturated / self.observed[v].values, v.name or ""),
        )
        if worst:
            each = [
                f"{v.name} {100 * self.observed[v].saturated / self.observed[v].values:.2g} % "
                f"in {self.formats[v]}"
                for v in worst[:LISTED]
            ]
            more = f" and {len(worst) - LISTED} more" if len(worst) > LISTED else ""
            found.append(f"values saturate on the samples: {', '.join(each)}{more}")
        bound = [node.name or node.op_type for node, _, layer in self.layers if layer.rescaled]
        if bound:
            more = f" and {len(bound) - LISTED} more" if len(bound) > LISTED else ""
            found.append(
                "weights have fewer bits than their formats hold, so that int32 sums and biases "
                f"fit: {', '.join(bound[:LISTED])}{more}"
            )
        return found

    def _layers(self) -> list[ir.Node]:
        """Every layer with constant weights."""
        nodes = (node for node in self.planned.nodes if node.op_type in LAYERS)
        return [node for node in nodes if constant(node.inputs[1]) is not None]

    def _readers(self, root: ir.Value) -> list[ir.Node]:
        """Every layer that sums up values of this root's format."""
        return [n for n in self._layers() if self.roots[activations(n)[0]] is root]

    def _float_layer(self, node: ir.Node) -> FloatLayer:
        """Collect what a layer is quantized from; the means are known by now."""
        weight, bias = constant(node.inputs[1]), None
        assert weight is not None
        if len(node.inputs) > 2:
            bias = constant(node.inputs[2])
        names = input_name(node, 1), input_name(node, 2) or f"{node.outputs[0].name}_bias"
        return FloatLayer(
            node=node,
            weight=weight,
            bias=bias,
            bits=self.step.bits,
            per_channel=self.step.per_channel,
            rounding=(self.step.rounding_of(names[0]), self.step.rounding_of(names[1])),
            mean=self.means.get(activations(node)[0]) if node.op_type != "MatMul" else None,
        )

    def _layer(self, node: ir.Node, source: Format) -> FixedPointLayer:
        """Quantize a layer for an input of this format."""
        if node not in self.float_layers:
            self.float_layers[node] = self._float_layer(node)
        limits = reach(activations(node)[0], source, self.step.bits, self.roots)
        try:
            return self.float_layers[node].fixed(source, limits)
        except (CalibrationError, OverflowError) as error:
            raise PassRefused(
                self.step.name, f"node {node.name!r}", f"{error}; check its weights."
            ) from error

    def _operand(self, node: ir.Node, index: int, array: Array) -> None:
        """Quantize a constant operand by its own range, or by a Concat's format."""
        name = owner = input_name(node, index)
        if node.op_type == "Concat":
            root = self.roots[node.outputs[0]]
            chosen, owner = self.formats[root], root.name or ""
        else:
            own = Range(float(array.min(initial=0)), float(array.max(initial=0)))
            try:
                chosen = fitting_format(own, self.step.bits)
            except CalibrationError as error:
                raise PassRefused(self.step.name, f"constant {name!r}", str(error)) from error
        rounding = self.step.rounding_of(name)
        limits = stored_limits(chosen, self.step.bits)
        integers, saturated = to_fixed(array, chosen.fraction_bits, limits, rounding)
        self.saturated_constants += saturated
        stored = integers.astype(f"int{self.step.bits}")
        self.writer.constant(node, index, name, stored, self._parameters(owner, chosen), None)

    def _parameters(self, name: str, chosen: Format) -> Parameters:
        return self.writer.parameters(
            name, scalar(chosen.scale, "float32"), scalar(0, f"int{self.step.bits}")
        )

    def _described(self, node: ir.Node, source: Format, layer: FixedPointLayer) -> str:
        """Say the formats of a layer, as `conv_1: input Q3.12, weights Q1.14, output Q4.11`."""
        output = node.outputs[0]
        while output in self.planned.fused:
            output = output.consumers()[0].outputs[0]
        weights = _span(self.step.bits, layer.fraction_bits.reshape(-1).tolist())
        target = self.formats[self.roots[output]]
        return f"{node.name or node.op_type}: input {source}, weights {weights}, output {target}"


def _span(bits: int, fraction_bits: Sequence[int]) -> str:
    """Name the coarsest and the finest format of several."""
    coarsest, finest = (Format(bits, f(fraction_bits)) for f in (min, max))
    return str(coarsest) if coarsest == finest else f"{coarsest} to {finest}"
