"""`edgepress run --tune MINUTES`: searches tiles for a model's layers on its device.

The layers that could gain most come first: those whose work, at the rate of the model's best layer,
would take the least of the time that they take. What is found is kept at once, so that Ctrl-C, or
the end of the time, loses nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from edgepress.pipeline.progress import Progress
from edgepress.pipeline.tile_search import Found, Site, find_sites, search_site, site_costs
from edgepress.pipeline.tuned_tiles import TunedTiles
from edgepress.targets.base import Target
from edgepress.targets.devices.base import Device


@dataclass(frozen=True)
class Tuning:
    """What a search found.

    Attributes:
        unit: `ms`, or `instructions` under an emulator.
        layers: how many distinct layers have a tile.
        searched: for how many of them there was time.
        changed: how many got a better tile.
        before, after: cost per inference of the layers that were searched.
        seconds: what the search took.
    """

    unit: str
    layers: int
    searched: int
    changed: int
    before: float
    after: float
    seconds: float

    def __str__(self) -> str:
        gain = f"{self.before:.4g} → {self.after:.4g} {self.unit}"
        return (
            f"{self.changed} of {self.searched} layers got other tiles; together {gain} per "
            f"inference ({self.layers} layers have tiles; {self.seconds:.0f} s)"
        )


def tune(
    model: ir.Model,
    target: Target,
    device: Device,
    tuned: TunedTiles,
    *,
    minutes: float,
    progress: Progress,
) -> Tuning:
    """Search tiles for the layers of a canonical model until the time is up; keep what is better.

    Raises:
        UnsupportedModel, CompileFailed, DeviceFailed: the model, the compiler or the device failed.
    """
    started = time.monotonic()
    found: list[Found] = []
    with progress.step("tune"):
        sites = find_sites(model, target, tuned.tiles)
        costs = site_costs(sites, target, device, progress.update)
        order = by_promise(sites, costs)
        for done, site in enumerate(order):
            if time.monotonic() - started >= 60 * minutes:
                break
            progress.update(f"tune {site.layer.key}", done, len(order))
            result = search_site(site, target, device)
            found.append(result)
            if result.better:
                tuned.add(site.layer.key, result.tile.sizes)
    return Tuning(
        unit="instructions" if device.emulated else "ms",
        layers=len(sites),
        searched=len(found),
        changed=sum(result.better for result in found),
        before=sum(result.site.count * result.before for result in found),
        after=sum(result.site.count * result.after for result in found),
        seconds=time.monotonic() - started,
    )


def by_promise(sites: Sequence[Site], costs: Sequence[float]) -> list[Site]:
    """Order sites by what they could gain at the rate of the best layer of the same precision."""
    macs = [site.layer.shape.macs for site in sites]
    rates: dict[bool, float] = {}
    for site, work, cost in zip(sites, macs, costs, strict=True):
        rate = work / cost if cost > 0 else 0.0
        rates[site.layer.quantized] = max(rates.get(site.layer.quantized, 0.0), rate)
    gains = [
        site.count * (cost - work / (rates[site.layer.quantized] or 1.0))
        for site, work, cost in zip(sites, macs, costs, strict=True)
    ]
    order = sorted(range(len(sites)), key=lambda i: -gains[i])
    return [sites[i] for i in order]
