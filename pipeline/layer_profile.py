"""What every layer of a bundle costs on a device, and how near it comes to what the machine can do.

Times are those of `model --profile`: the mean of the middle half of a kernel's times, of several
processes the median. Operations are two per multiply-accumulate of the layer as the model defines
it; an algorithm that needs fewer, such as Winograd's, may exceed what the machine can do. Under an
emulator, instructions are counted instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from edgepress.calibration.base import Array
from edgepress.pipeline.bundle import Bundle, BundleError, read_bundle
from edgepress.pipeline.cache import Cache
from edgepress.pipeline.peak import peak_gops
from edgepress.pipeline.progress import Progress
from edgepress.pipeline.report import quantity
from edgepress.pipeline.verify import bundle_target
from edgepress.targets.base import DeviceFailed
from edgepress.targets.devices.base import Device, open_device

PROCESSES, SECONDS, RUNS = 5, 0.3, 10
NOTHING, SHOWN_FUSED = "–", 3


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """One layer.

    Attributes:
        name: of the node, or of the value that is converted.
        operator: of the node.
        fused: what is computed with it.
        kernels: kinds of its kernels.
        precision: what it computes with.
        macs: multiply-accumulates of one inference.
        time_ms: of one inference; None under an emulator.
        instructions: of one inference, where they can be counted; else None.
        share: of the cost of all layers, from 0 to 1.
        gops: operations per second, in 1e9; None without multiply-accumulates or a time.
        peak_share: that as a share of what the machine can do in the layer's arithmetic.
    """

    name: str
    operator: str
    fused: Sequence[str]
    kernels: Sequence[str]
    precision: str
    macs: int
    time_ms: float | None
    instructions: int | None
    share: float
    gops: float | None
    peak_share: float | None


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A bundle, layer by layer.

    Attributes:
        bundle: its folder.
        target: what it was built for.
        device: where it was measured.
        threads: that ran it.
        peak_gops: what the machine can do, by arithmetic; empty under an emulator.
        layers: in order of execution.
        peak_share: of the whole inference: the time that its multiply-accumulates would take at the
            peak, as a share of the time that it takes; None under an emulator.
    """

    bundle: str
    target: str
    device: str
    threads: int
    peak_gops: Mapping[str, float]
    layers: Sequence[LayerCost]
    peak_share: float | None

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {"kind": "profile", **dataclasses.asdict(self)}


def profile(
    folder: Path,
    *,
    device: str | None = None,
    threads: int = 1,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Measure the layers of a bundle, and the peak of the machine right before.

    Args:
        folder: the bundle.
        device: where; None chooses by the target.
        threads: to run it on; an emulator counts on one.
        cache: keeps the compiled kernels of the peak, or None.
        progress: where to say how far it is.

    Raises:
        BundleError: the folder is no bundle, or an old one that does not say what its calls are.
        CompileFailed, DeviceFailed: the peak or the bundle cannot be measured.
    """
    progress = progress or Progress(shown=False)
    bundle = read_bundle(folder)
    if not bundle.manifest.layers:
        raise BundleError(f"{folder} does not say what its layers are: build the bundle again.")
    target = bundle_target(bundle)
    opened = open_device(device, target)
    peak: dict[str, float] = {}
    if opened.emulated:
        threads = 1
    else:
        peak = peak_gops(target, opened, threads=threads, cache=cache, progress=progress)
    costs = _costs(bundle, opened, threads, progress)
    layers = _layers(bundle, costs, peak, emulated=opened.emulated)
    return Profile(
        bundle=str(folder),
        target=target.name,
        device=opened.name,
        threads=threads,
        peak_gops=peak,
        layers=layers,
        peak_share=_peak_share(bundle, layers, peak),
    )


def _costs(bundle: Bundle, device: Device, threads: int, progress: Progress) -> Array:
    """Measure every call: in ms, or in instructions under an emulator."""
    processes = 1 if device.emulated else PROCESSES
    visits = []
    what = f"profile on {device.name}"
    with progress.step(what):
        for done in range(processes):
            progress.update(what, done, processes)
            visits.append(
                device.profile(bundle.folder, threads=threads, seconds=SECONDS, runs=RUNS)
            )
    costs: Array = np.median(np.asarray(visits, np.float64), axis=0)
    calls = 1 + max(number for layer in bundle.manifest.layers for number in layer["calls"])
    if len(costs) < calls:
        raise DeviceFailed(
            f"{device.name}: `model --profile` reported {len(costs)} calls instead of {calls}."
        )
    return costs


def _layers(
    bundle: Bundle, costs: Array, peak: Mapping[str, float], *, emulated: bool
) -> list[LayerCost]:
    facts = [*bundle.manifest.layers]
    known = {number for layer in facts for number in layer["calls"]}
    if left := [number for number in range(len(costs)) if number not in known]:
        facts.append(
            {"name": "outputs", "operator": "Copy", "fused": [], "precision": "", "arithmetic": "",
             "macs": 0, "kernels": ["copy"], "calls": left}
        )  # fmt: skip
    total = float(costs.sum())
    layers = []
    for fact in facts:
        cost = float(costs[fact["calls"]].sum())
        gops = None
        if fact["macs"] and cost and not emulated:
            gops = 2e-6 * fact["macs"] / cost
        most = peak.get(fact["arithmetic"])
        layers.append(
            LayerCost(
                name=fact["name"],
                operator=fact["operator"],
                fused=fact["fused"],
                kernels=fact["kernels"],
                precision=fact["precision"],
                macs=fact["macs"],
                time_ms=None if emulated else cost,
                instructions=round(cost) if emulated else None,
                share=cost / total if total else 0.0,
                gops=gops,
                peak_share=gops / most if gops is not None and most else None,
            )
        )
    return layers


def _peak_share(
    bundle: Bundle, layers: Sequence[LayerCost], peak: Mapping[str, float]
) -> float | None:
    total = sum(layer.time_ms or 0.0 for layer in layers)
    if not peak or not total:
        return None
    least: float = sum(
        2e-6 * fact["macs"] / peak[fact["arithmetic"]]
        for fact in bundle.manifest.layers
        if fact["arithmetic"]
    )
    return least / total


def show_profile(found: Profile, screen: Console) -> None:
    """Print the table, and what its shares are of."""
    screen.print(profile_table(found))
    if found.peak_gops:
        peaks = ", ".join(f"{name} {gops:.0f}" for name, gops in found.peak_gops.items())
        screen.print(Text(f"peak of this machine on {found.threads} thread(s), GOP/s: {peaks}"))


def profile_table(found: Profile) -> Table:
    """Show every layer, and the whole."""
    where = f"{found.device}, {found.threads} thread(s)"
    table = Table(title=f"layers of {found.bundle} on {where}", title_justify="left")
    table.add_column("layer", overflow="fold")
    table.add_column("kernels", overflow="fold")
    table.add_column("precision")
    for heading in ("MACs", "ms", "share", "GOP/s", "% of peak", "instructions"):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in found.layers:
        table.add_row(
            Text(f"{layer.name} {_title(layer)}"),
            Text(" ".join(layer.kernels)),
            layer.precision,
            quantity(layer.macs) if layer.macs else NOTHING,
            *_figures(layer.time_ms, layer.share, layer.gops, layer.peak_share),
            NOTHING if layer.instructions is None else quantity(layer.instructions),
            style="" if layer.macs else "dim",
        )
    macs = sum(layer.macs for layer in found.layers)
    times = [layer.time_ms for layer in found.layers if layer.time_ms is not None]
    counts = [layer.instructions for layer in found.layers if layer.instructions is not None]
    total_ms = sum(times) if times else None
    table.add_section()
    table.add_row(
        "all layers",
        "",
        "",
        quantity(macs),
        *_figures(total_ms, 1.0, 2e-6 * macs / total_ms if total_ms else None, found.peak_share),
        quantity(sum(counts)) if counts else NOTHING,
    )
    return table


def _title(layer: LayerCost) -> str:
    """Name the operator, and the first few that are fused into it."""
    more = ["…"] if len(layer.fused) > SHOWN_FUSED else []
    return " + ".join([layer.operator, *layer.fused[:SHOWN_FUSED], *more])


def _figures(
    time_ms: float | None, share: float, gops: float | None, peak_share: float | None
) -> list[str]:
    """Write a time, its share of the whole, operations per second, and their share of the peak."""
    return [
        NOTHING if time_ms is None else f"{time_ms:.4g}",
        f"{100 * share:.1f} %",
        NOTHING if gops is None else f"{gops:.1f}",
        NOTHING if peak_share is None else f"{100 * peak_share:.0f} %",
    ]
