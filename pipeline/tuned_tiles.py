"""The tiles that `run --tune` found, kept beside the cache for later builds on the same machine.

One file per machine, CPU and version of the kernel generators, in the format of the databases that
ship with edgepress. It is replaced in one step, so an interrupted search loses nothing that it had
found. Unlike the cache's entries it is never evicted: measuring again would take minutes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edgepress.pipeline.cache import Cache, code_version, content_key
from edgepress.targets.base import DeviceFailed, Target
from edgepress.targets.devices.base import Device, open_device
from edgepress.targets.tile_files import TileSizes, format_tiles, parse_tiles

_GENERATORS = ("edgepress.targets.isa", "edgepress.targets.schedules", "edgepress.targets.cuda")


@dataclass
class TunedTiles:
    """The tiles found on one device, in memory and in a file.

    Attributes:
        isa: the target's instruction set.
        measured: where and how, for whoever reads the file.
        path: the file, or None where nothing is kept.
        tiles: what was found, by `Layer.key`.
    """

    isa: str
    measured: str
    path: Path | None = None
    tiles: dict[str, TileSizes] = field(default_factory=dict)

    def add(self, key: str, tile: TileSizes) -> None:
        """Note a tile and keep it. A disk that is full or read-only means it is not kept."""
        self.tiles[key] = tile
        if self.path is None:
            return
        kept = _read(self.path, self.isa) | self.tiles  # another process may have added some
        partial = self.path.with_name(f".{self.path.name}-{os.getpid()}")
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(format_tiles(self.isa, self.measured, kept), "utf-8")
            partial.replace(self.path)


def tuned_tiles(target: Target, device: Device, cache: Cache | None) -> TunedTiles:
    """Read what was found for a target on a device; nothing without a cache."""
    unit = "instructions" if device.emulated else "time"
    tuned = TunedTiles(target.isa, f"{device.name}, {device.machine}, {unit}".replace(", ,", ","))
    if cache is None:
        return tuned
    key = content_key(
        "tiles",
        code_version(*_GENERATORS),
        [target.triple, target.cpu, list(target.features), target.isa, target.cores],
        target.gpu_arch,
        device.name,
        device.machine,
    )
    tuned.path = cache.folder / "tiles" / f"{key}.json"
    tuned.tiles = _read(tuned.path, target.isa)
    return tuned


def known_tiles(target: Target, device: str | None, cache: Cache | None) -> Mapping[str, TileSizes]:
    """Return what was found for a target on its device before; nothing where it has none here."""
    try:
        return tuned_tiles(target, open_device(device, target), cache).tiles
    except DeviceFailed:
        return {}


def _read(path: Path, isa: str) -> dict[str, TileSizes]:
    """Read a file of our own; one that is missing or damaged holds nothing."""
    try:
        return parse_tiles(path.read_text("utf-8"), isa)
    except (OSError, ValueError, AttributeError):
        return {}
