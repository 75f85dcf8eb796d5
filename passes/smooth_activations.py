"""smooth-activations: move outliers from activation channels into the weights that read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgepress.calibration.base import Array, Samples
from edgepress.passes._constants import constant, new_initializer, set_input
from edgepress.passes._patterns import chosen_nodes
from edgepress.passes._taps import grouped, input_shapes, open_taps
from edgepress.passes.base import Context, Outcome, Pass, PassRefused

SMOOTH = 0.02  # factors this close to each other change nothing worth a node
NOTHING = "there is no product of a float activation with a constant matrix to smooth"
LEAST = 2.0**-12  # of the largest channel's part in the outputs; what adds less is left alone


@dataclass(frozen=True, kw_only=True)
class SmoothActivations(Pass):
    """Divide the channels of what MatMul and Gemm layers read, and multiply their weights by it.

    A channel whose values are far larger than the others' makes the steps of int8 coarse for all
    of them. Channel j is divided by `max|x_j|^alpha / max|w_j|^(1 - alpha)` and row j of every
    weight that reads it is multiplied by that, so the model computes the same. Where these layers
    alone read the output of a LayerNormalization (or of the Mul and Add at the end of one that is
    written out), the division goes into its scale and bias, and where they alone read a linear
    layer, into its weights, also through a Relu. Elsewhere a Mul is written in front of the layers;
    `quantize-dynamic` takes it along at no cost.

    Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
    Models", ICML 2023, section 4.

    Attributes:
        alpha: how much of the outliers moves: 0 nothing that activations say, 1 all of it.
        skip: regular expressions; a layer is left alone where one matches its whole name.
    """

    alpha: float = 0.5
    skip: tuple[str, ...] = ()

    @property
    def needs_samples(self) -> bool:
        """Always."""
        return True

    def requires(self, model: ir.Model, context: Context) -> None:
        """Refuse wrong options and missing samples."""
        if not 0 <= self.alpha <= 1:
            raise PassRefused(self.name, "alpha", f"it is {self.alpha}; it must be from 0 to 1.")
        if context.samples is None or not len(context.samples):
            why = "there are none; channels are measured on them, so give some with --calib."
            raise PassRefused(self.name, "samples", why)
        self._unwanted(model)

    def call(self, model: ir.Model, context: Context) -> Outcome:
        """Measure all activations, then smooth one after another."""
        assert context.samples is not None
        groups, skipped = self._groups(model)
        peaks = _channel_peaks(self.name, model, list(groups), context.samples, context)
        folded = written = 0
        # from the end: dividing a linear layer's columns changes what its own input is divided by
        for value, layers in reversed(groups.items()):
            factors = self._factors(peaks[value], layers)
            if factors is None:
                skipped.append((layers[0].name or "", "its channels are smooth already"))
                continue
            if _fold(value, layers, factors):
                folded += 1
            else:
                _write(model.graph, value, layers, factors)
                written += 1
            for layer in layers:
                _multiply_rows(layer, factors)
        return Outcome(
            model=model,
            modified=bool(folded + written),
            stats={"folded": folded, "multiplications_written": written},
            skipped=skipped,
            notes=[] if groups or skipped else [NOTHING],
        )

    def _groups(
        self, model: ir.Model
    ) -> tuple[dict[ir.Value, list[ir.Node]], list[tuple[str, str]]]:
        """Return the layers to smooth by what they read, in order, and those left alone."""
        groups: dict[ir.Value, list[ir.Node]] = {}
        skipped = []
        unwanted = self._unwanted(model)
        for node in _layers(model):
            value, weight = node.inputs[0], constant(node.inputs[1])
            name = node.name or ""
            if node in unwanted:
                skipped.append((name, f"skipped by {unwanted[node]!r}"))
            elif weight is None or not np.isfinite(weight).all():
                skipped.append((name, "its weight holds NaN or infinity"))
            elif value is not None:
                groups.setdefault(value, []).append(node)
        return groups, skipped

    def _unwanted(self, model: ir.Model) -> dict[ir.Node, str]:
        """Return the layers to leave alone, each with its pattern. Refuses one without a match."""
        return chosen_nodes(self.name, "skip", self.skip, _layers(model), what="layer")

    def _factors(self, peaks: Array, layers: Sequence[ir.Node]) -> Array | None:
        """Return what each channel is divided by, float32; None where they are all alike."""
        rows = np.max([np.abs(_rows(layer)).max(axis=1) for layer in layers], axis=0)
        parts = peaks.astype(np.float64) * rows  # a factor does not change these
        used = parts > LEAST * parts.max()
        if not used.any():
            return None
        logs = self.alpha * np.log2(peaks[used], dtype=np.float64)
        logs -= (1 - self.alpha) * np.log2(rows[used], dtype=np.float64)
        logs -= np.median(logs)
        if np.ptp(logs) <= np.log2(1 + SMOOTH):
            return None
        factors = np.ones(len(peaks), np.float32)
        factors[used] = np.exp2(logs)
        return factors


def _layers(model: ir.Model) -> list[ir.Node]:
    """Return the products of a float activation `[…, rows, channels]` with a constant matrix."""
    return [node for node in model.graph if _is_layer(node)]


def _is_layer(node: ir.Node) -> bool:
    if node.op_type not in ("MatMul", "Gemm") or node.domain not in ("", "ai.onnx"):
        return False
    x, weight = node.inputs[0], constant(node.inputs[1])
    if x is None or weight is None or constant(x) is not None or weight.ndim != 2:
        return False
    if x.shape is None or len(x.shape) < 2 or not weight.size or weight.dtype != np.float32:
        return False
    return not node.attributes.get_int("transA", 0)


def _is_turned(node: ir.Node) -> bool:
    """Tell whether a layer's weight is `[outputs, inputs]`."""
    return node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1


def _rows(layer: ir.Node) -> Array:
    """Return the weight as `[inputs, outputs]`."""
    weight = constant(layer.inputs[1])
    assert weight is not None
    return weight.T if _is_turned(layer) else weight


def _channel_peaks(
    pass_name: str, model: ir.Model, values: list[ir.Value], samples: Samples, context: Context
) -> dict[ir.Value, Array]:
    """Measure the largest magnitude of every channel, float32 `[channels]` by value."""
    shapes = input_shapes(pass_name, model)
    peaks: dict[ir.Value, Array] = {}
    batches = list(grouped(values))
    for number, batch in enumerate(batches):
        tap = open_taps(pass_name, model, batch)
        for index, feed in enumerate(samples.feeds(shapes)):
            found = tap(feed, index)
            for value in batch:
                array = found[value.name or ""]
                peak = np.abs(array).reshape(-1, array.shape[-1]).max(axis=0)
                peaks[value] = peak if value not in peaks else np.maximum(peaks[value], peak)
            done = number * len(samples) + index + 1
            context.progress("measure channels", done, len(batches) * len(samples))
    return peaks


def _multiply_rows(layer: ir.Node, factors: Array) -> None:
    """Multiply the rows of a layer's weight `[inputs, outputs]`."""
    rows = _rows(layer) * factors[:, None]
    stem = layer.inputs[1].name if layer.inputs[1] is not None else None
    set_input(layer, 1, rows.T if _is_turned(layer) else rows, f"{stem}_smooth")


def _write(graph: ir.Graph, value: ir.Value, layers: Sequence[ir.Node], factors: Array) -> None:
    """Put a Mul between a value and the layers."""
    inverse = new_initializer(graph, f"{value.name}_smoothing", 1 / factors)
    node = ir.node("Mul", [value, inverse], name=f"{value.name}_smooth")
    node.outputs[0].name = f"{value.name}_smoothed"
    node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
    graph.insert_before(layers[0], node)
    for layer in layers:
        layer.replace_input_with(0, node.outputs[0])


# Folding --------------------------------------------------------------------------------------


def _fold(value: ir.Value, layers: Sequence[ir.Node], factors: Array) -> bool:
    """Let what makes a value divide its channels; False where it cannot, or others read it."""
    if not _only_read_by(value, layers):
        return False
    node = value.producer()
    if node is not None and node.op_type == "Relu" and node.domain == "":
        source = node.inputs[0]
        if source is None or not _only_read_by(source, [node]):
            return False
        node = source.producer()
    if node is None or node.domain not in ("", "ai.onnx"):
        return False
    width = len(factors)
    if node.op_type == "LayerNormalization":
        return len(node.outputs) == 1 and _divide_constants(node, (1, 2), width, factors)
    return _fold_linear(node, width, factors)


def _fold_linear(node: ir.Node, width: int, factors: Array) -> bool:
    """Divide the columns of a linear layer, or the constant of a Mul, and the bias behind it."""
    sum_node, added = node, None
    if node.op_type == "Add":
        added = _constant_operand(node, width)
        product = node.inputs[1 - added] if added is not None else None
        maker = product.producer() if product is not None else None
        if product is None or maker is None or not _only_read_by(product, [node]):
            return False
        node = maker
    if _is_layer(node):
        weight = _rows(node)
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if weight.shape[1] != width:
            return False
        if bias is not None and not _divide_constants(node, (2,), width, factors):
            return False
        columns = weight / factors
        stem = node.inputs[1].name if node.inputs[1] is not None else None
        set_input(node, 1, columns.T if _is_turned(node) else columns, f"{stem}_smooth")
    elif node.op_type == "Mul" and added is not None:
        scale = _constant_operand(node, width)
        if scale is None:
            return False
        _divide_constants(node, (scale,), width, factors)
    else:
        return False
    if added is not None:
        _divide_constants(sum_node, (added,), width, factors)
    return True


def _only_read_by(value: ir.Value, nodes: Sequence[ir.Node]) -> bool:
    """Tell whether nothing but these nodes reads a value."""
    return not value.is_graph_output() and all(user in nodes for user in value.consumers())


def _constant_operand(node: ir.Node, width: int) -> int | None:
    """Return the place of the operand that is a constant per channel."""
    for index in (0, 1):
        array = constant(node.inputs[index])
        if array is not None and array.shape == (width,) and array.dtype == np.float32:
            return index
    return None


def _divide_constants(node: ir.Node, places: Sequence[int], width: int, factors: Array) -> bool:
    """Divide constant operands per channel; False, and nothing done, where one is none."""
    given = [i for i in places if i < len(node.inputs) and node.inputs[i] is not None]
    arrays = [constant(node.inputs[i]) for i in given]
    if any(a is None or a.shape != (width,) or a.dtype != np.float32 for a in arrays):
        return False
    for index, array in zip(given, arrays, strict=True):
        operand = node.inputs[index]
        assert array is not None
        assert operand is not None
        set_input(node, index, array / factors, f"{operand.name}_smooth")
    return True
