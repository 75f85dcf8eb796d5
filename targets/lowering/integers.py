"""A QDQ graph becomes integer arithmetic.

ONNX writes a quantized operator as DequantizeLinear → float operator → QuantizeLinear. This step
replaces every such group by one node of the `edgepress` domain that works on 8-bit and 16-bit
tensors: exact int32 sums, then a requantisation rule (docs/integer.md). ReLU and Clip between an
operator and its QuantizeLinear become the clamp of that rule. What has no integer form stays float
between `Dequantize` and `Quantize`: a float island.

The result is still NCHW and still an ONNX graph; the NumPy reference
(`edgepress.targets.reference`) and the kernel generators both start from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepress.targets.lowering.composite import Function, function_of
from edgepress.targets.lowering.dialect import Builder, array_of, dtype_of, shape_of
from edgepress.targets.lowering.look_up import emit_function
from edgepress.targets.lowering.quantization import (
    LIMITS,
    Quantization,
    Quantized,
    Weight,
    factor_attribute,
    output_attributes,
    usable,
)
from edgepress.targets.lowering.window import clip_bounds

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Pending:
    """An operator that becomes an integer node as soon as its QuantizeLinear tells the scale."""

    node: ir.Node
    output: int
    low: float = -np.inf
    high: float = np.inf


@dataclass(frozen=True)
class Clamped:
    """A float value behind a ReLU or Clip that becomes the clamp of its Quantize."""

    source: ir.Value
    low: float
    high: float


def is_quantized(model: ir.Model) -> bool:
    """Tell whether the graph holds QuantizeLinear or DequantizeLinear nodes."""
    return any(n.op_type in ("QuantizeLinear", "DequantizeLinear") for n in model.graph)


@dataclass(frozen=True)
class Rule:
    """Whether an operator has an integer form, and how to write it."""

    accepts: Callable[[Integers, ir.Node], bool]
    emit: Callable[[Integers, Pending, Quantization, str], ir.Value]


class Integers:
    """The new graph while it grows, and what is known of the old one's values."""

    def __init__(self, model: ir.Model, storage: str, rules: Mapping[str, Rule]) -> None:
        self.source, self.storage, self.rules = model, storage, rules
        self.builder = Builder()
        self.floats: dict[ir.Value, ir.Value] = {}
        self.quantized: dict[ir.Value, Quantized] = {}  # integer and dequantized values
        self.weights: dict[ir.Value, Weight] = {}
        self.pending: dict[ir.Value, Pending] = {}
        self.functions: dict[ir.Value, Function] = {}
        self.clamped: dict[ir.Value, Clamped] = {}
        self.moved: dict[ir.Node, list[ir.Value]] = {}

    def run(self) -> ir.Model:
        """Lower every node in order and return the new model."""
        graph = self.source.graph
        inputs = []
        for value in graph.inputs:
            copy = ir.Value(name=value.name, shape=value.shape, type=value.type)
            self.builder.unique(value.name or "input")
            inputs.append(copy)
            self.floats[value] = copy
        for name, value in graph.initializers.items():
            array = array_of(value)
            if array is not None and value not in self.floats:
                self.builder.unique(name)
        for node in graph:
            self.lower(node)
        outputs = []
        for value in graph.outputs:
            result = self.graph_output(value)
            outputs.append(result)
        return self.builder.model(self.source, inputs, outputs)

    # Values ---------------------------------------------------------------------------------

    def float_of(self, value: ir.Value | None) -> ir.Value | None:
        """Return the value in the new graph in its original dtype, dequantizing it if need be."""
        if value is None:
            return None
        if value in self.floats:
            return self.floats[value]
        if value in self.pending:
            raise AssertionError(f"{value.name}: a pending value has a float user")
        if value in self.functions:
            for node in self.functions[value].nodes:
                if node.outputs[0] not in self.floats:
                    self.copy(node)
            return self.floats[value]
        if value in self.weights:
            result = self.builder.constant(value.name or "weight", self.weights[value].real())
        elif value in self.quantized:
            result = self.dequantize(value)
        elif (array := array_of(value)) is not None:
            result = self.constant_named(value, array)
        else:
            raise ValueError(f"{value.name!r} has no producer")
        self.floats[value] = result
        return result

    def constant_named(self, value: ir.Value, array: Array) -> ir.Value:
        """Add an initializer under its own name, once."""
        name = value.name or "constant"
        if name not in self.builder.initializers:
            self.builder.release(name)
            return self.builder.constant(name, array)
        return self.builder.initializers[name]

    def dequantize(self, value: ir.Value) -> ir.Value:
        """Emit the float form of a quantized value."""
        quantized = self.quantized[value]
        if dtype_of(value) != "float32":  # the integers, wanted as they were
            return self.convert(quantized, dtype_of(value), value.name or "quantized")
        attributes = {
            "scale": float(quantized.quantization.scale),
            "zero_point": quantized.quantization.zero_point,
        }
        name = value.name or "dequantized"
        return self.builder.node(
            "Dequantize", [quantized.value], attributes, name, "float32", shape_of(value)
        )

    def convert(self, quantized: Quantized, dtype: str, name: str) -> ir.Value:
        """Return the same 8-bit integers in the other 8-bit dtype; 16-bit ones have but one."""
        q = quantized.quantization
        if q.dtype == dtype:
            return quantized.value
        shift = LIMITS[dtype][0] - q.lowest
        target = Quantization(q.scale, q.zero_point + shift, dtype)
        return self.rescale(quantized, target, name)

    def graph_output(self, value: ir.Value) -> ir.Value:
        """Return the value of a graph output, under the output's own name."""
        result = self.float_of(value)
        assert result is not None
        if value.is_graph_input():
            return result
        if result.producer() is None or result.name != value.name:
            self.builder.free(value.name or "")
            result = self.builder.node(
                "Identity", [result], {}, value.name or "out", dtype_of(value), shape_of(value), ""
            )
        return result

    def stored_as(self, dtype: str) -> str:
        """Return the dtype that a target keeps values of this dtype in."""
        return dtype if dtype == "int16" else self.storage

    def quantization(self, node: ir.Node) -> Quantization | None:
        """Return the per-tensor parameters of a Q or DQ node, in storage form; None for others."""
        scale, zero = array_of(node.inputs[1]), None
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            zero = array_of(node.inputs[2])
            if zero is None:
                return None
        if scale is None or scale.size != 1 or scale.dtype != np.float32 or not usable(scale):
            return None
        writes = node.op_type == "QuantizeLinear"
        stored = node.outputs[0] if writes else node.inputs[0]
        assert stored is not None
        dtype = dtype_of(stored) if zero is None else str(zero.dtype)
        if dtype not in LIMITS or (zero is not None and zero.size != 1):
            return None
        point = 0 if zero is None else int(zero.item())
        if dtype == "int16" and point != 0:
            return None
        storage = self.stored_as(dtype)
        point += LIMITS[storage][0] - LIMITS[dtype][0]
        return Quantization(np.float32(scale.item()), point, storage)

    # Nodes ----------------------------------------------------------------------------------

    def lower(self, node: ir.Node) -> None:
        """Lower one node: as integers, as a promise of integers, or as it was."""
        if node.op_type == "QuantizeLinear" and self.lower_quantize(node):
            return
        if node.op_type == "DequantizeLinear" and self.lower_dequantize(node):
            return
        if node.op_type in ("Relu", "Clip") and self.join_clamp(node):
            return
        rule = self.rules.get(node.op_type)
        used = [v for v in node.outputs if v.uses() or v.is_graph_output()]
        only = all(self.only_quantized(v) for v in used)
        if rule and only and rule.accepts(self, node):
            for index, output in enumerate(node.outputs):
                self.pending[output] = Pending(node, index)
            return
        function = function_of(node, self.functions, self.is_source, self.number)
        if function is not None:
            self.functions[function.result] = function  # emitted where somebody reads it
            return
        self.copy(node)

    def copy(self, node: ir.Node) -> None:
        """Emit a node as it was, on float values."""
        inputs = [self.float_of(value) for value in node.inputs]
        for old, new in zip(node.outputs, self.builder.copy(node, inputs), strict=True):
            self.floats[old] = new

    def is_source(self, value: ir.Value) -> bool:
        """Tell whether a value is what a table can be looked up with."""
        return value in self.quantized and dtype_of(value) == "float32"

    def number(self, value: ir.Value) -> float | None:
        """Return the only element of a constant, quantized or not; None for anything else."""
        array = array_of(value)
        if value in self.weights:
            array = self.weights[value].real()
        return None if array is None or array.size != 1 else float(array.item())

    def join_clamp(self, node: ir.Node) -> bool:
        """Fold a ReLU or Clip into the pending operator before it, or into the Quantize behind."""
        source, output = node.inputs[0], node.outputs[0]
        bounds = clip_bounds(node)
        if source is None or bounds is None or not self.only_quantized(output):
            return False
        before: Pending | Clamped
        if source in self.pending:
            before = self.pending[source]
        elif source in self.clamped:
            before = self.clamped[source]
        elif self.is_float(source) and self.only_int16(output):
            before = Clamped(source, -np.inf, np.inf)
        else:
            return False
        low, high = (min(max(bound, bounds[0]), bounds[1]) for bound in (before.low, before.high))
        if isinstance(before, Pending):
            self.pending[output] = Pending(before.node, before.output, low, high)
        else:
            self.clamped[output] = Clamped(before.source, low, high)
        return True

    def is_float(self, value: ir.Value) -> bool:
        """Tell whether a value has no form in integers, nor will have one."""
        return value not in self.functions and not self.has_operand(value)

    def only_int16(self, value: ir.Value) -> bool:
        """Tell whether all that quantizes a value, maybe behind a ReLU or Clip, makes it int16.

        8-bit values keep the float clamp: dividing by the scale may round its ends otherwise.
        """
        for user, _ in value.uses():
            if user.op_type == "QuantizeLinear":
                target = self.quantization(user)
                if target is None or target.dtype != "int16":
                    return False
            elif not self.only_int16(user.outputs[0]):
                return False
        return dtype_of(value) == "float32"

    def only_quantized(self, value: ir.Value) -> bool:
        """Tell whether a float value is only ever quantized, maybe behind a ReLU or Clip."""
        if value.is_graph_output() or not value.uses():
            return False
        uses = list(value.uses())
        if all(user.op_type == "QuantizeLinear" and index == 0 for user, index in uses):
            return all(self.quantization(user) is not None for user, _ in uses)
        user, index = uses[0]
        clamp = user.op_type in ("Relu", "Clip") and index == 0 and clip_bounds(user) is not None
        return len(uses) == 1 and clamp and self.only_quantized(user.outputs[0])

    def lower_quantize(self, node: ir.Node) -> bool:
        """Emit what a QuantizeLinear ends; False where it stays a float operator."""
        source, target = node.inputs[0], self.quantization(node)
        if source is None or target is None or dtype_of(source) != "float32":
            return False
        name = node.outputs[0].name or "quantized"
        if source in self.pending:
            pending = self.pending[source]
            value = self.rules[pending.node.op_type].emit(self, pending, target, name)
        elif source in self.quantized:
            value = self.rescale(self.quantized[source], target, name)
        elif source in self.functions:
            value = self.look_up(self.functions[source], target, name)
        else:
            value = self.quantize(source, target, name)
        self.quantized[node.outputs[0]] = Quantized(value, target)
        return True

    def quantize(self, source: ir.Value, target: Quantization, name: str) -> ir.Value:
        """Emit the integer form of a float value."""
        attributes: dict[str, Any] = {
            "scale": float(target.scale),
            "zero_point": target.zero_point,
        }
        if source in self.clamped:
            clamped = self.clamped[source]
            source = clamped.source
            low, high = target.clamp(clamped.low, clamped.high)
            attributes |= {"low": low, "high": high}
        return self.builder.node(
            "Quantize", [self.float_of(source)], attributes, name, target.dtype, shape_of(source)
        )

    def lower_dequantize(self, node: ir.Node) -> bool:
        """Note what a DequantizeLinear stands for; False where it stays a float operator."""
        source, output = node.inputs[0], node.outputs[0]
        assert source is not None
        array = array_of(source)
        if array is not None:
            scale = array_of(node.inputs[1])
            zero = array_of(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else None
            if scale is None or node.attributes.get_int("block_size", 0) != 0:
                return False
            zero = np.zeros(scale.shape, np.int64) if zero is None else zero.astype(np.int64)
            axis = node.attributes.get_int("axis", 1) % max(array.ndim, 1)
            weight = Weight(array, scale.astype(np.float32).ravel(), zero.ravel(), axis)
            self.weights[output] = weight
            return True
        quantization = self.quantization(node)
        if quantization is None:
            return False
        if source in self.quantized:
            known = self.quantized[source]
            self.quantized[output] = Quantized(known.value, quantization)
            return True
        if source in self.floats and dtype_of(source) in LIMITS:  # a graph input of integers
            dtype = dtype_of(source)
            shift = LIMITS[dtype][0] - quantization.lowest
            given = Quantization(quantization.scale, quantization.zero_point + shift, dtype)
            value = self.convert(
                Quantized(self.floats[source], given), quantization.dtype, f"{source.name}_stored"
            )
            self.quantized[output] = Quantized(value, quantization)
            return True
        return False

    # Emitting -------------------------------------------------------------------------------

    def operand(self, value: ir.Value | None) -> Quantized | None:
        """Return the integers of an input, constants included; None where it has none."""
        if value is None:
            return None
        if value in self.quantized:
            return self.quantized[value] if dtype_of(value) == "float32" else None
        weight = self.weights.get(value)
        if weight is None or weight.scale.size != 1 or str(weight.array.dtype) not in LIMITS:
            return None
        dtype = str(weight.array.dtype)
        if not usable(weight.scale) or (dtype == "int16" and weight.zero_point.any()):
            return None
        storage = self.stored_as(dtype)
        shift = LIMITS[storage][0] - LIMITS[dtype][0]
        stored = (weight.array.astype(np.int64) + shift).astype(storage)
        constant = self.builder.constant(f"{value.name}_stored", stored)
        point = int(weight.zero_point[0]) + shift
        self.quantized[value] = Quantized(constant, Quantization(weight.scale[0], point, storage))
        return self.quantized[value]

    def has_operand(self, value: ir.Value | None) -> bool:
        """Tell whether an input has a form in integers."""
        return self.operand(value) is not None

    def bias(self, value: ir.Value | None, scales: Array) -> Array | None:
        """Return an int32 bias for products with these scales; None where it is not constant."""
        if value is None:
            return np.zeros(scales.size, np.int32)
        if value in self.weights and self.weights[value].array.dtype == np.int32:
            weight = self.weights[value]
            same = np.array_equal(np.broadcast_to(weight.scale, scales.shape), scales)
            if same and not weight.zero_point.any():
                return weight.array.ravel()
            real = (weight.array.ravel() - weight.zero_point) * weight.scale.astype(np.float64)
        else:
            array = array_of(value)
            if array is None or array.dtype != np.float32:
                return None
            real = array.ravel().astype(np.float64)
        real = np.broadcast_to(real, scales.shape)
        limit = 2.0**31 - 1
        return np.rint(np.clip(real / scales.astype(np.float64), -limit, limit)).astype(np.int32)

    def look_up(self, function: Function, target: Quantization, name: str) -> ir.Value:
        """Emit a function of one quantized value."""
        x, label = self.quantized[function.source], function.nodes[-1].name
        return emit_function(self.builder, function.evaluate, x, target, name, label=label)

    def rescale(
        self,
        source: Quantized,
        target: Quantization,
        name: str,
        low: float = -np.inf,
        high: float = np.inf,
    ) -> ir.Value:
        """Return the value at another scale, clamped; itself where nothing changes."""
        bounds = target.clamp(low, high)
        if source.quantization == target and bounds == target.clamp(-np.inf, np.inf):
            return source.value
        q = source.quantization
        return self.builder.node(
            "Rescale",
            [source.value],
            {
                "x_zero_point": q.zero_point,
                **factor_attribute(
                    np.float64(q.scale) / np.float64(target.scale), q.scale, target.scale
                ),
                **output_attributes(target, bounds),
            },
            name,
            target.dtype,
            shape_of(source.value),
        )
