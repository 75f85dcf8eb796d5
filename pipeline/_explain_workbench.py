"""The model that a bundle was quantized from, and how its recipe quantized it.

The bundle holds only the quantized graph. Where the original model is given, the passes before
quantization are run on it again. Where it is not, the quantized graph is brought back to float:
weights are what the rounded ones stand for, so what rounding them cost is not seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgepress.calibration.base import Array, Samples
from edgepress.calibration.qparams import dequantize
from edgepress.passes.base import Context, Pass, UnknownPass, pass_class
from edgepress.pipeline import feeds, snapshot
from edgepress.pipeline.bundle import Bundle
from edgepress.pipeline.cache import Cache
from edgepress.pipeline.driver import Driver
from edgepress.pipeline.load import load_model, model_sha256
from edgepress.pipeline.oracle import Oracle, Outputs, sqnr_db
from edgepress.pipeline.prepare import UsageError, prepare, simd_bytes
from edgepress.pipeline.progress import Progress
from edgepress.pipeline.recipe import Recipe
from edgepress.pipeline.snapshot import Snapshot
from edgepress.targets.base import Target

#: Passes that are run again with changes; the first of them in a recipe begins the quantization.
QUANTIZING = ("equalize-layers", "smooth-activations", "calibrate", "quantize-int8",
              "quantize-fixed-point", "quantize-dynamic")  # fmt: skip
MOST_SAMPLES = 64  # that outputs are compared on


@dataclass(kw_only=True)
class Workbench:
    """What changes are tried on.

    Attributes:
        base: the float model right before the first pass of `passes`.
        passes: those that quantized the bundle; none for a float one.
        from_original: whether `base` comes from the original model.
        before_quantization: the model right before the pass that writes integers, with the original
            weights; None without the original model.
        calibration: all samples, for the passes.
        samples: those that outputs are compared on.
        expected: outputs that every model is compared to.
        bundle_db: SQNR of the bundle's graph against `expected`; None for a float bundle.
        notes: what could not be done, and why.
    """

    base: Snapshot
    passes: list[Pass]
    from_original: bool
    before_quantization: Snapshot | None
    calibration: Samples
    samples: Samples
    expected: Outputs
    bundle_db: float | None
    notes: list[str] = field(default_factory=list)
    context: Context
    cache: Cache | None = None

    def quantized(self, passes: Sequence[Pass]) -> Snapshot:
        """Run passes on the float model. Raises what passes raise."""
        driver = Driver(self.base.load(), cache=self.cache)
        driver.run(passes, self.context)
        return driver.snapshot

    def sqnr_db(self, model: Snapshot) -> float:
        """Compare a model's outputs, as onnxruntime computes them, to those in float."""
        return sqnr_db(self.expected, _answers(model, self.samples))


def check_original(bundle: Bundle, original: Path) -> None:
    """Raise UsageError where a model is not the one that the bundle was built from."""
    load_model(original)  # what is no model at all is said as such
    if model_sha256(original) != bundle.manifest.source["sha256"]:
        raise UsageError(
            f"{original} is not the model that {bundle.folder} was built from "
            f"({bundle.manifest.source['file']}); give that one."
        )


def open_workbench(
    bundle: Bundle,
    recipe: Recipe,
    graph: Snapshot,
    original: Path | None,
    calib: Path,
    samples: Samples,
    target: Target,
    cache: Cache | None,
    progress: Progress,
) -> Workbench:
    """Prepare the float model of a bundle.

    Raises:
        ModelError, PassError, CalibrationError: as `prepare` raises them.
    """
    notes: list[str] = []
    passes = _quantizing_passes(bundle, notes)
    first = next((i for i, p in enumerate(recipe.passes) if p.name in QUANTIZING), None)
    before = recipe.passes[:first]
    if original is not None and any(step.needs_timer for step in before):
        notes.append(
            "the recipe measures layers before it quantizes, which is not done again: the bundle's "
            "own graph stands for the original model"
        )
        original = None
    context = Context(samples=samples, simd_bytes=simd_bytes(target))
    if original is not None:
        prepared = prepare(
            original,
            dataclasses.replace(recipe, passes=before),
            target=target,
            calib=calib,
            input_shapes=_shapes(original, bundle),
            cache=cache,
            progress=progress,
        )
        base, reference = prepared.compressed, prepared.original
    else:
        base = reference = snapshot.take(to_float(graph.load()))
    few = feeds.spread(samples, MOST_SAMPLES)
    with progress.step("outputs in float"):
        expected = _answers(reference, few, base.load())
        quantized = bundle.manifest.arithmetic != "float"
        bundle_db = sqnr_db(expected, _answers(graph, few)) if quantized else None
    found = bundle.manifest.calibration
    if quantized and found is not None and found["sha256"] != samples.sha256():
        notes.append(
            "these are not the samples that the bundle was calibrated on, so every change of its "
            "recipe changes its samples too"
        )
    bench = Workbench(
        base=base,
        passes=passes,
        from_original=original is not None,
        before_quantization=None,
        calibration=samples,
        samples=few,
        expected=expected,
        bundle_db=bundle_db,
        notes=notes,
        context=context,
        cache=cache,
    )
    writer = next((i for i, p in enumerate(passes) if p.name.startswith("quantize")), None)
    if original is not None and writer is not None:
        with progress.step("passes before quantization"):
            bench.before_quantization = bench.quantized(passes[:writer])
    return bench


def to_float(model: ir.Model) -> ir.Model:
    """Take every pair of QuantizeLinear and DequantizeLinear out of a model, in place.

    Constants become the floats that their integers stand for. Integers that other operators read
    stay.
    """
    graph = model.graph
    for node in list(graph):
        if node.op_type != "DequantizeLinear" or node.domain:
            continue
        stored, output = node.inputs[0], node.outputs[0]
        if stored is None:
            continue
        if stored.const_value is not None:
            array = _dequantized(node)
            if array is None:
                continue
            new = ir.Value(
                name=f"{output.name}_float",
                const_value=ir.tensor(array, name=f"{output.name}_float"),
                shape=ir.Shape(array.shape),
                type=ir.TensorType(ir.DataType.FLOAT),
            )
            graph.register_initializer(new)
        else:
            quantize = stored.producer()
            if quantize is None or quantize.op_type != "QuantizeLinear":
                continue
            source = quantize.inputs[0]
            if source is None:
                continue
            new = source
        _replace(graph, output, new)
    _drop_unused(graph)
    return model


def _replace(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let all readers of a value read another one; an output keeps its name."""
    for user, index in tuple(old.uses()):
        user.replace_input_with(index, new)
    for index, value in enumerate(graph.outputs):
        if value is old:
            name, old.name = old.name, f"{old.name}_dequantized"
            if new.is_graph_input() or new.is_graph_output():
                node = ir.node("Identity", [new])
                graph.append(node)
                node.outputs[0].type, node.outputs[0].shape = new.type, new.shape
                new = node.outputs[0]
            new.name = name
            graph.outputs[index] = new


def _drop_unused(graph: ir.Graph) -> None:
    """Remove quantizing nodes and constants that nothing reads any more."""
    for node in reversed(list(graph)):
        read = any(value.uses() or value.is_graph_output() for value in node.outputs)
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and not read:
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            graph.initializers.pop(name)


def _dequantized(node: ir.Node) -> Array | None:
    """Compute what a DequantizeLinear makes of a constant; None for scales per block."""
    given = [None if v is None or v.const_value is None else v.const_value.numpy()
             for v in node.inputs]  # fmt: skip
    integers, scale = given[:2]
    if integers is None or scale is None or node.attributes.get_int("block_size", 0) != 0:
        return None
    zero = given[2] if len(given) > 2 and given[2] is not None else np.zeros_like(scale, np.int64)
    axis = node.attributes.get_int("axis", 1) if scale.ndim else None
    return dequantize(integers, scale, zero.astype(integers.dtype), axis)


def _quantizing_passes(bundle: Bundle, notes: list[str]) -> list[Pass]:
    """Return the passes that quantized a bundle, with the options that they had."""
    passes: list[Pass] = []
    for step in bundle.manifest.steps:
        if step["pass_name"] not in QUANTIZING:
            continue
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in step["options"].items()}
        try:
            passes.append(pass_class(step["pass_name"])(**options))
        except (TypeError, UnknownPass) as error:
            notes.append(f"changes were not tried: the bundle's {step['pass_name']}: {error}")
            return []
    return passes


def _shapes(original: Path, bundle: Bundle) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes that open inputs of the original have in the bundle."""
    shapes = {tensor["name"]: tuple(tensor["shape"]) for tensor in bundle.manifest.inputs}
    return {
        value.name or "": shapes[value.name]
        for value in feeds.true_inputs(load_model(original))
        if value.name in shapes and (value.shape is None or not value.shape.is_static())
    }


def _answers(
    model: Snapshot, samples: Samples, shapes_of: ir.Model | None = None
) -> list[dict[str, Any]]:
    """Return the outputs of a model; `shapes_of` says the shapes of its inputs if it does not."""
    oracle = Oracle(model.model)
    shapes = feeds.input_shapes(shapes_of or model.load()) or {}
    return [oracle.run(feed) for feed in samples.feeds(shapes)]
