"""Where the time and the error of a bundle come from, layer by layer, and what would help.

Every figure is measured or counted: instructions in the code of the bundle's own kernels, costs on
the device, errors by quantizing one layer at a time, and the effect of a change by making it. What
was not measured is None, and `notes` says why.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgepress.calibration.base import Array, Samples
from edgepress.pipeline import feeds
from edgepress.pipeline._explain_changes import Change, measure_changes
from edgepress.pipeline._explain_findings import warnings
from edgepress.pipeline._explain_islands import Island, find_islands
from edgepress.pipeline._explain_layers import Layer, make_layers
from edgepress.pipeline._explain_measure import (
    MOST_SAMPLES,
    Code,
    Errors,
    compile_again,
    measure_errors,
    profile,
)
from edgepress.pipeline._explain_rows import Row, find_rows
from edgepress.pipeline._explain_workbench import Workbench, check_original, open_workbench
from edgepress.pipeline.bundle import Bundle, read_bundle
from edgepress.pipeline.cache import Cache
from edgepress.pipeline.prepare import UsageError
from edgepress.pipeline.progress import Progress
from edgepress.pipeline.recipe import parse_recipe
from edgepress.pipeline.snapshot import Snapshot
from edgepress.pipeline.verify import bundle_target
from edgepress.targets.base import DeviceFailed, Target
from edgepress.targets.devices.base import Device, open_device
from edgepress.targets.kernel_code import KernelCode
from edgepress.targets.lowering.integers import is_quantized

INTEGER_PRODUCTS = ("MatMulInteger", "ConvInteger", "DynamicQuantizeLinear")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Figures of the whole bundle.

    Attributes:
        arithmetic: "integer", "float" or "mixed".
        macs: of one inference.
        macs_share: precision to its share of the MACs, from 0 to 1.
        bytes_moved: of all layers.
        time_ms: of one inference, the sum over layers; None where it was not measured.
        executed_instructions: likewise, under an emulator.
        conversion_share: share of the cost that conversions take, from 0 to 1.
        island_share: share of the cost that float islands take, without their conversions.
        sqnr_db: of the quantized graph's outputs against those in float, on the samples.
        samples: how many.
        layer_samples: how many of them the errors of single layers were measured on.
        float_instructions: in the code of all kernels; 0 where no kernel needs an FPU.
        code_in_bundle: whether the instructions counted are those in the bundle's executable.
    """

    arithmetic: str
    macs: int
    macs_share: Mapping[str, float]
    bytes_moved: int
    time_ms: float | None
    executed_instructions: int | None
    conversion_share: float | None
    island_share: float | None
    sqnr_db: float | None
    samples: int | None
    layer_samples: int | None
    float_instructions: int
    code_in_bundle: bool


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Everything that `edgepress explain` says.

    Attributes:
        bundle: its folder.
        target: what it was built for.
        device: where it was measured, or None.
        unit: "ms", or "instructions" under an emulator; None without a device.
        summary: figures of the whole.
        layers: in order of execution.
        islands: float layers between which nothing is quantized, with their conversions.
        without_code: `(node, operator)` of nodes that cost nothing, such as a Reshape.
        kernels: name to code of each kernel.
        warnings: sentences about what stands out.
        changes: those that help most, the best first; at most three.
        tried: how many changes were measured.
        notes: what was not measured, and why.
    """

    bundle: str
    target: str
    device: str | None
    unit: str | None
    summary: Summary
    layers: list[Layer]
    islands: list[Island]
    without_code: list[tuple[str, str]]
    kernels: Mapping[str, KernelCode]
    warnings: list[str]
    changes: list[Change]
    tried: int
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {"kind": "explanation", **dataclasses.asdict(self)}


def explain(
    folder: Path,
    *,
    calib: Path | None = None,
    original: Path | None = None,
    device: str | None = None,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> Explanation:
    """Explain a bundle.

    Args:
        folder: the bundle.
        calib: samples to measure errors on; those that the bundle was calibrated on, so that
            changes of its recipe compare. None leaves errors and changes out.
        original: the model that the bundle was built from. Without it the bundle's own weights
            stand for the original ones, so only errors of activations are measured.
        device: where to measure; None chooses one by the target, or none where it is not here.
        cache: keeps finished passes; None for one that is removed at the end.
        progress: shows how far the work is.

    Raises:
        BundleError: the folder is no bundle.
        UsageError: `original` is another model, or is given without samples.
        DeviceFailed: the device that was asked for cannot run the bundle, or failed.
        CalibrationError, ModelError: the samples or the model.
        TargetError: the kernels cannot be compiled.
    """
    if cache is None:  # changes share most of their passes
        with tempfile.TemporaryDirectory(prefix="edgepress-") as temporary:
            return explain(
                folder,
                calib=calib,
                original=original,
                device=device,
                cache=Cache(Path(temporary)),
                progress=progress,
            )
    progress = progress or Progress(shown=False)
    if original is not None and calib is None:
        raise UsageError(
            "--model serves to measure errors on samples; give some with --calib DATA.npz."
        )
    bundle = read_bundle(folder)
    target, notes = bundle_target(bundle), list[str]()
    opened = _device(device, target, notes)
    recipe = parse_recipe(
        bundle.manifest.recipe["text"], bundle.manifest.recipe["name"], "the bundle's recipe"
    )
    graph = Snapshot((folder / "graph.onnx").read_bytes())
    if original is not None:
        check_original(bundle, original)
    samples = None
    if calib is not None:  # before any work: a wrong file is better said at once
        samples = feeds.user_samples(graph.load(), calib, recipe.preprocess)
    else:
        notes.append("errors and changes were not measured: give samples with --calib DATA.npz")
    code = compile_again(bundle, graph.load(), target, progress)
    if not code.in_bundle:  # then its calls may be others too, and would be taken for these
        opened = None
        notes.append(
            "the instructions are those of kernels compiled now, and no cost was measured: the "
            "bundle's executable was built by another version of edgepress or of a compiler; build "
            "it again"
        )
    model = graph.load()
    rows = find_rows(code.program, model)
    costs = None if opened is None else _costs(bundle, opened, device, code, notes, progress)
    work, errors = None, None
    if original is None and any(node.op_type in INTEGER_PRODUCTS for node in model.graph):
        notes.append(
            "errors and changes were not measured: the graph computes its scales while it runs, so "
            "there is nothing to compare to without the original model; give it with --model"
        )
    elif samples is not None and calib is not None:
        work = open_workbench(
            bundle, recipe, graph, original, calib, samples, target, cache, progress
        )
        notes += work.notes
        errors = _errors(model, work, samples, notes, progress)
    return _assemble(
        bundle, model, code, rows, costs, opened, errors, work, target, notes, progress
    )


def _device(spec: str | None, target: Target, notes: list[str]) -> Device | None:
    """Open the device; one that nobody asked for may be missing."""
    try:
        return open_device(spec, target)
    except DeviceFailed as error:
        if spec is not None:
            raise
        notes.append(f"no cost was measured: {error}")
        return None


def _costs(
    bundle: Bundle,
    opened: Device,
    spec: str | None,
    code: Code,
    notes: list[str],
    progress: Progress,
) -> Array | None:
    """Measure the calls; an emulator that nobody asked for may be unable to count."""
    try:
        costs = profile(bundle, opened, code.program, progress)
    except DeviceFailed as error:
        if spec is not None or not opened.emulated:
            raise
        notes.append(f"no cost was measured: {error}")
        return None
    if costs is None:
        notes.append(
            "no cost was measured: the executable makes other calls than this version of edgepress "
            "would; build it again"
        )
    return costs


def _errors(
    model: ir.Model, work: Workbench, samples: Samples, notes: list[str], progress: Progress
) -> Errors | None:
    if not is_quantized(model):
        notes.append(
            "layers have no error of their own: nothing in the graph is quantized and dequantized"
        )
        return None
    few = feeds.spread(samples, MOST_SAMPLES)
    floats = None if work.before_quantization is None else work.before_quantization.load()
    try:
        found = measure_errors(model, floats, few, progress)
    except ValueError as error:
        notes.append(f"only errors of activations were measured: {error}")
        found = measure_errors(model, None, few, progress)
    if not found.with_constants:
        notes.append(
            "errors are those of activations: what rounding the weights cost is known only with "
            "the original model; give it with --model"
        )
    return found


def _assemble(
    bundle: Bundle,
    model: ir.Model,
    code: Code,
    rows: Sequence[Row],
    costs: Array | None,
    device: Device | None,
    errors: Errors | None,
    work: Workbench | None,
    target: Target,
    notes: list[str],
    progress: Progress,
) -> Explanation:
    """Put the parts together; measure changes last, since they follow from the rest."""
    emulated = device is not None and device.emulated
    quantized = bundle.manifest.arithmetic != "float"
    islands = find_islands(rows, code.program, model, bundle) if quantized else []
    layers = make_layers(rows, islands, code, costs, emulated, errors)
    changes, tried = list[Change](), 0
    if work is not None:
        weight_bytes = int(bundle.manifest.memory["weight_bytes"])
        changes, tried = measure_changes(
            work, layers, errors, device, bundle.folder, weight_bytes, target, progress
        )
        notes += [note for note in work.notes if note not in notes]
    given = {name for row in rows for name in row.nodes}
    return Explanation(
        bundle=str(bundle.folder),
        target=target.name,
        device=None if device is None else device.name,
        unit=None if costs is None else "instructions" if emulated else "ms",
        summary=_summary(bundle, layers, work, errors, code),
        layers=layers,
        islands=[island.with_shares(layers) for island in islands],
        without_code=[
            (node.name or "", node.op_type)
            for node in model.graph
            if (node.name or node.outputs[0].name) not in given
            and node.op_type not in ("QuantizeLinear", "DequantizeLinear", "Constant")
        ],
        kernels=code.kernels,
        warnings=warnings(layers, code.kernels),
        changes=changes,
        tried=tried,
        notes=notes,
    )


def _summary(
    bundle: Bundle,
    layers: Sequence[Layer],
    work: Workbench | None,
    errors: Errors | None,
    code: Code,
) -> Summary:
    macs = sum(layer.macs for layer in layers)
    shares: dict[str, float] = {}
    for layer in layers:
        if layer.macs:
            shares[layer.precision] = shares.get(layer.precision, 0.0) + layer.macs / macs
    return Summary(
        arithmetic=bundle.manifest.arithmetic,
        macs=macs,
        macs_share=shares,
        bytes_moved=sum(layer.bytes_moved for layer in layers),
        time_ms=_sum([layer.time_ms for layer in layers]),
        executed_instructions=_whole(_sum([layer.executed_instructions for layer in layers])),
        conversion_share=_sum([layer.cost_share for layer in layers if layer.conversion]),
        island_share=_sum([layer.cost_share for layer in layers if layer.float_island]),
        sqnr_db=None if work is None else work.bundle_db,
        samples=None if work is None else len(work.samples),
        layer_samples=None if errors is None else errors.samples,
        float_instructions=sum(kernel.float_instructions for kernel in code.kernels.values()),
        code_in_bundle=code.in_bundle,
    )


def _sum(figures: Sequence[float | None]) -> float | None:
    """Add up what was measured; None where something was not."""
    known = [figure for figure in figures if figure is not None]
    return sum(known) if len(known) == len(figures) else None


def _whole(figure: float | None) -> int | None:
    return None if figure is None else round(figure)
