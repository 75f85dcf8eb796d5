"""How much each channel group matters: what cutting it alone does to outputs and latency.

Every group loses its least important channels (l1) at several shares, as `prune-channels` would cut
it for the target and without recovery. The outputs of each cut model are compared to those of the
uncut one. What it saves on the target is the cost of the layers that changed, before minus after,
each measured as a model of its own. All layers of the model and of all cuts are measured in one
sweep, since figures of different sweeps do not compare.

Everything is measured in float. Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017,
section 3.2, have such curves for accuracy.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgepress.calibration.base import CalibrationError, Samples
from edgepress.passes.analysis import (
    ChannelGroup,
    changed_layers,
    channel_groups,
    layer_signature,
    layers,
    node_macs,
)
from edgepress.passes.base import Context, LayerTimer, Outcome, PassRefused
from edgepress.passes.prune_channels import PruneChannels
from edgepress.pipeline import feeds, snapshot
from edgepress.pipeline.accuracy import classes
from edgepress.pipeline.cache import Cache, code_version, content_key
from edgepress.pipeline.driver import Driver, canonical_passes
from edgepress.pipeline.layer_timer import DeviceTimer
from edgepress.pipeline.load import ModelError, load_model
from edgepress.pipeline.oracle import Oracle, Outputs, sqnr_db
from edgepress.pipeline.prepare import UsageError, simd_bytes
from edgepress.pipeline.progress import Progress
from edgepress.pipeline.snapshot import Snapshot
from edgepress.targets.base import Target
from edgepress.targets.devices.base import open_device
from edgepress.targets.lowering.integers import is_quantized

SHARES = (0.25, 0.5, 0.75)
MOST_SAMPLES = 64


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A model with one group cut, compared to the model with none.

    Attributes:
        channels: how many the group loses; a multiple of the target's vector width remains.
        sqnr_db: signal to noise ratio of the outputs, over all samples.
        agreement: per cent of the samples whose highest score stays at its place; None where the
            first output is no vector of scores.
        macs_saved: multiply-accumulates of one inference.
        saved: cost of one inference, in the unit of the measurement; negative where the layers
            became slower. None where nothing was measured.
    """

    channels: int
    sqnr_db: float
    agreement: float | None
    macs_saved: int
    saved: float | None = None


@dataclass(frozen=True, kw_only=True)
class GroupSensitivity:
    """What cutting one channel group does.

    Attributes:
        name: of the first layer that makes the channels, a key of `amount` for `prune-channels`.
        channels: how many there are.
        free: how many of them may be cut.
        layers: names of the layers that make them.
        cuts: by rising number of channels; never empty.
    """

    name: str
    channels: int
    free: int
    layers: list[str]
    cuts: list[Cut]


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """The sensitivity of a model to cuts of its channel groups.

    Attributes:
        target: what was measured for, or None.
        device: where, or None.
        unit: "ms", or "instructions" under an emulator; None where nothing was measured.
        cost: of all measured layers of the uncut model together, in `unit`.
        macs: multiply-accumulates of the uncut model.
        samples: how many the outputs were compared on.
        groups: the best first, by `merit`.
        kept: `(group, why)` of those that cannot be cut.
        unknown: `(node, operator)` of nodes without a rule; they keep every channel they touch.
        unmeasured: `(node, operator)` of nodes that have multiply-accumulates but no constant
            weight to be measured with; they are in neither `cost` nor `saved`.
    """

    target: str | None = None
    device: str | None = None
    unit: str | None = None
    cost: float | None = None
    macs: int
    samples: int
    groups: list[GroupSensitivity]
    kept: list[tuple[str, str]]
    unknown: list[tuple[str, str]]
    unmeasured: list[tuple[str, str]]

    def share(self, cut: Cut) -> float | None:
        """Return the share that a cut saves: of the cost, or of the MACs without a measurement."""
        if self.unit is None:
            return cut.macs_saved / max(self.macs, 1)
        return cut.saved / self.cost if cut.saved is not None and self.cost else None

    def merit(self, group: GroupSensitivity) -> float:
        """Return what the smallest cut of this group saves for the error that it makes.

        That is the share saved over the relative error of the outputs, the root of noise over
        signal power. Larger cuts say less: an error cannot grow far beyond the signal, so the more
        a cut ruins, the cheaper it looks.
        """
        smallest = group.cuts[0]
        return (self.share(smallest) or 0.0) * 10 ** (smallest.sqnr_db / 20)

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain data, with the share of the cost that every cut saves."""
        document = {"kind": "sensitivity", **dataclasses.asdict(self)}
        for group, written in zip(self.groups, document["groups"], strict=True):
            for cut, entry in zip(group.cuts, written["cuts"], strict=True):
                entry["saved_share"] = None if self.unit is None else self.share(cut)
        return document


def inspect_sensitivity(
    path: Path,
    *,
    calib: Path,
    input_shapes: Mapping[str, tuple[int, ...]],
    target: Target | None = None,
    device: str | None = None,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Load a float model and its samples and measure; `edgepress inspect MODEL --sensitivity`.

    Raises:
        UsageError: `path` is a bundle, or `calib` no file.
        ModelError: the model is quantized, or has no float output to compare.
        PassError, CalibrationError, TargetError: as the passes, samples and measurements do.
    """
    progress = progress or Progress(shown=False)
    if path.is_dir():
        raise UsageError(
            f"{path} is a folder; --sensitivity cuts channels of float models, so name the .onnx "
            "file that a bundle was made of."
        )
    if calib.is_dir():
        raise CalibrationError(
            f"{calib} is a folder; --sensitivity has no recipe that says how to preprocess images, "
            "so write the model's inputs into an .npz."
        )
    chosen = None if target is None else open_device(device, target)
    with progress.step("load"):
        driver = Driver(load_model(path), cache=cache, progress=progress)
    driver.run(canonical_passes(), Context(input_shapes=dict(input_shapes)))
    model = driver.model
    if is_quantized(model):
        raise ModelError(f"{path} is quantized already; --sensitivity needs the float model.")
    if not any(v.dtype is not None and v.dtype.numpy().kind == "f" for v in model.graph.outputs):
        raise ModelError(
            f"{path} has no float output, so the error of a cut cannot be measured; cut off what "
            "turns its scores into integers, such as an ArgMax."
        )
    samples = feeds.spread(feeds.user_samples(model, calib), MOST_SAMPLES)
    if target is None or chosen is None:
        return measure_sensitivity(model, samples, cache=cache, progress=progress)
    found = measure_sensitivity(
        model,
        samples,
        timer=DeviceTimer(target=target, device=chosen, cache=cache, progress=progress.update),
        vector_bytes=simd_bytes(target),
        cache=cache,
        progress=progress,
    )
    return dataclasses.replace(found, target=target.name, device=chosen.name)


def measure_sensitivity(
    model: ir.Model,
    samples: Samples,
    *,
    timer: LayerTimer | None = None,
    vector_bytes: int = Context().simd_bytes,
    shares: Sequence[float] = SHARES,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Cut every group of a canonical float model by itself and measure what that does.

    Args:
        model: it is left as it is.
        samples: all of them are used.
        timer: measures layers; None leaves costs out.
        vector_bytes: what remains of a group fills whole vectors of this many bytes.
        shares: of each group's channels, each above 0 and below 1. Two that round to the same
            number of channels give one cut.
        cache: keeps the errors of cut models, or None.
        progress: shows how far the work is.

    Raises:
        ModelError: onnxruntime cannot run the model.
        PassRefused: a layer cannot be measured.
        TargetError: compiling or measuring layers failed.
    """
    progress = progress or Progress(shown=False)
    channels = channel_groups(model)
    compare, bill = _Comparison(model, samples, cache), _Bill(model, timer)
    kept: list[tuple[str, str]] = []
    trials: list[_Trial] = []
    what = f"cut {len(channels.groups)} groups"
    with progress.step(what):
        for number, group in enumerate(channels.groups):
            progress.update(what, number, len(channels.groups))
            outcomes, why = _outcomes(model, group, shares, vector_bytes)
            if not outcomes:
                kept.append((group.name, why))
            for outcome in outcomes:
                error = compare(outcome.model)
                trials.append(_Trial(group, outcome.stats, *error, bill.changes(outcome.model)))
    costs = bill.measure(progress)
    groups = [
        GroupSensitivity(
            name=group.name,
            channels=group.channels,
            free=group.free,
            layers=group.layers,
            cuts=cuts,
        )
        for group in channels.groups
        if (cuts := [trial.cut(costs) for trial in trials if trial.group is group])
    ]
    found = Sensitivity(
        unit=timer.unit if timer and costs else None,
        cost=sum(costs[signature] for signature in bill.layers.values()) if costs else None,
        macs=sum(map(node_macs, model.graph)),
        samples=len(samples),
        groups=groups,
        kept=kept,
        unknown=channels.unknown,
        unmeasured=[
            (node.name or "", node.op_type)
            for node in model.graph
            if timer and node_macs(node) and node.name not in bill.layers
        ],
    )
    return dataclasses.replace(found, groups=sorted(groups, key=found.merit, reverse=True))


def _outcomes(
    model: ir.Model, group: ChannelGroup, shares: Sequence[float], vector_bytes: int
) -> tuple[list[Outcome], str]:
    """Cut a group; return what came out, by rising number of channels, and why nothing did."""
    if not group.free:
        return [], group.why
    found: dict[int | float, Outcome] = {}
    why = ""
    for share in sorted(shares):
        step = PruneChannels(amount={re.escape(group.name): share}, recover="none")
        try:
            outcome = step.call(model.clone(), Context(simd_bytes=vector_bytes))
        except PassRefused as error:
            why = error.why
            continue
        if outcome.modified:
            found.setdefault(outcome.stats["channels"], outcome)
        else:
            why = dict(outcome.skipped).get(group.name, f"{share:.0%} of it rounds to no channel")
    return list(found.values()), why


class _Bill:
    """The layers whose costs are asked for.

    Equal ones have equal signatures and are measured once, such as the layers that many cuts leave
    behind alike.

    Attributes:
        layers: signature of every layer of the uncut model, by name; empty without a timer.
    """

    def __init__(self, model: ir.Model, timer: LayerTimer | None) -> None:
        self._model, self._timer = model, timer
        self._distinct: dict[str, ir.Model] = {}
        self.layers = {name: self._add(layer) for name, layer in layers(model)} if timer else {}

    def _add(self, layer: ir.Model) -> str:
        signature = layer_signature(layer)
        self._distinct.setdefault(signature, layer)
        return signature

    def changes(self, cut: ir.Model) -> list[tuple[str, str]]:
        """Add the layers that a cut changes; return their signatures before and after."""
        changed = changed_layers(self._model, cut) if self._timer else []
        return [(self._add(before), self._add(after)) for _, before, after in changed]

    def measure(self, progress: Progress) -> dict[str, float]:
        """Return the costs by signature, all measured in one sweep; none without a timer."""
        if self._timer is None or not self.layers:
            return {}
        with progress.step(f"measure {len(self._distinct)} layers"):
            return dict(
                zip(self._distinct, self._timer(list(self._distinct.values())), strict=True)
            )


@dataclass(frozen=True)
class _Trial:
    """One cut before the costs are known.

    Attributes:
        group: what was cut.
        stats: of the pass that did it.
        sqnr_db: as in Cut.
        agreement: as in Cut.
        changes: signatures of the layers that changed, before and after.
    """

    group: ChannelGroup
    stats: Mapping[str, int | float]
    sqnr_db: float
    agreement: float | None
    changes: Sequence[tuple[str, str]]

    def cut(self, costs: Mapping[str, float]) -> Cut:
        """Add what the cut saves; nothing is known of it where no measured layer changed."""
        known = bool(costs) and bool(self.changes)
        return Cut(
            channels=int(self.stats["channels"]),
            sqnr_db=self.sqnr_db,
            agreement=self.agreement,
            macs_saved=int(self.stats["macs_before"] - self.stats["macs_after"]),
            saved=sum(costs[old] - costs[new] for old, new in self.changes) if known else None,
        )


class _Comparison:
    """Compares the outputs of models to those of an uncut one, on the same samples."""

    def __init__(self, model: ir.Model, samples: Samples, cache: Cache | None) -> None:
        self._uncut, self._cache = snapshot.take(model), cache
        self._feeds = list(samples.feeds(feeds.input_shapes(model) or {}))
        self._key = (code_version("edgepress.pipeline"), self._uncut.digest, samples.sha256())

    def __call__(self, model: ir.Model) -> tuple[float, float | None]:
        """Return SQNR in dB, and agreement of the highest score in per cent or None."""
        cut = snapshot.take(model)
        key = content_key("sensitivity", *self._key, cut.digest)
        entry = self._cache.get(key) if self._cache else None
        if entry is not None:
            sqnr, agreement = json.loads((entry / "error.json").read_text("utf-8"))
            return sqnr, agreement
        expected, got = self._expected, self._answers(cut)
        highest, others = classes(expected), classes(got)
        agreement = None
        if highest is not None and others is not None:
            agreement = round(100 * float(np.mean(highest == others)), 2)
        error = round(sqnr_db(expected, got), 2), agreement

        def fill(folder: Path) -> None:
            (folder / "error.json").write_text(json.dumps(error), "utf-8")

        if self._cache:
            self._cache.put(key, fill)
        return error

    @cached_property
    def _expected(self) -> Outputs:
        try:
            return self._answers(self._uncut)
        except Exception as error:  # onnxruntime's own exceptions have no base of their own
            raise ModelError(
                f"onnxruntime, which is the reference, cannot run this model: {error}. "
                "Export it again."
            ) from error

    def _answers(self, model: Snapshot) -> Outputs:
        oracle = Oracle(model.model)
        return [oracle.run(feed) for feed in self._feeds]
