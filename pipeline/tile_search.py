"""Measures the tiles of layers on a device, one against the other.

The candidates of a layer are compiled side by side into one executable, and every one of several
processes runs all of them, so a disturbance hits all alike. Under an emulator instructions are
counted, once. A tile counts as better than the one that would be taken without it where it costs at
least `WORTH` less in the median over the processes, and less in nearly all of them: the best of
eight noisy figures is low by chance.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepress.pipeline._layer_programs import side_by_side
from edgepress.targets.base import DeviceFailed, Target
from edgepress.targets.devices.base import Device
from edgepress.targets.float_format import FloatFormat, float_format
from edgepress.targets.program import Program
from edgepress.targets.tile_files import TileSizes
from edgepress.targets.tiling import AnyTile, TiledLayer, Tiles

PROCESSES, SECONDS, RUNS = 7, 0.2, 10
SURE = 0.8  # of the processes have to agree
WORTH = 0.02  # of the cost
_SIDE_BY_SIDE = 64
_TILED = {"Conv", "QConv", "Gemm", "QGemm", "DynamicGemm"}
_NAME = "tile-search"

Update = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Site:
    """A layer of a network that has a tile.

    Attributes:
        node: of the lowered graph; one of those with this layer.
        layer: what its tile depends on.
        count: how many nodes of the graph have the same layer.
        tile: what it gets now.
        floats: how the network's floats are computed.
    """

    node: ir.Node
    layer: TiledLayer
    count: int
    tile: AnyTile
    floats: FloatFormat = "float32"


@dataclass(frozen=True)
class Found:
    """What the search found for one site.

    Attributes:
        site: which.
        tile: the best of those measured; `site.tile` where none is surely better.
        before, after: cost of one call with the old and the new tile, in the unit of the device.
    """

    site: Site
    tile: AnyTile
    before: float
    after: float

    @property
    def better(self) -> bool:
        """Whether another tile than the present one is worth it."""
        return self.tile != self.site.tile


def find_sites(
    model: ir.Model, target: Target, tuned: Mapping[str, TileSizes], *, shipped: bool = True
) -> list[Site]:
    """Find the distinct layers of a canonical model that have a tile, in order.

    Their present tiles are the tuned ones, those that ship unless not `shipped`, the model's.
    """
    from edgepress.targets.lowering.build import lowered_graph, node_program
    from edgepress.targets.lowering.dialect import DOMAIN

    sites: dict[str, Site] = {}
    floats = float_format(model)
    for node in lowered_graph(model, target).graph:
        if node.domain != DOMAIN or node.op_type not in _TILED:
            continue
        tiles = Tiles(tuned, shipped=shipped)
        node_program(node, target, tiles, floats)
        for key, layer in tiles.asked.items():
            known = sites.get(key)
            count = known.count + 1 if known else 1
            kept = known.node if known else node
            sites[key] = Site(kept, layer, count, tiles.answers[key], floats)
    return list(sites.values())


def site_program(site: Site, tile: AnyTile, target: Target) -> Program:
    """Return the calls of a site's node with some tile."""
    from edgepress.targets.lowering.build import node_program

    tiles = Tiles({site.layer.key: tile.sizes})
    return node_program(site.node, target, tiles, site.floats)


def site_costs(
    sites: Sequence[Site], target: Target, device: Device, update: Update
) -> list[float]:
    """Measure one call of every site as it is now, in the unit of the device.

    Raises:
        CompileFailed, DeviceFailed: by the compiler, on the device.
    """
    costs: list[float] = []
    for first in range(0, len(sites), _SIDE_BY_SIDE):
        update("measure layers", first, len(sites))
        chunk = sites[first : first + _SIDE_BY_SIDE]
        programs = [site_program(site, site.tile, target) for site in chunk]
        with tempfile.TemporaryDirectory(prefix="edgepress-") as temporary:
            bench = compile_side_by_side(programs, target, Path(temporary) / "layers")
            costs += np.median(list(bench.visits(device)), axis=0).tolist()
    return costs


def search_site(site: Site, target: Target, device: Device) -> Found:
    """Measure the candidates of a site.

    Raises:
        CompileFailed, DeviceFailed: by the compiler, on the device.
    """
    tiles = tiles_to_try(site)
    programs = [site_program(site, tile, target) for tile in tiles]
    with tempfile.TemporaryDirectory(prefix="edgepress-") as temporary:
        bench = compile_side_by_side(programs, target, Path(temporary) / "tiles")
        costs = np.array(list(bench.visits(device)))
    best, medians = best_of(costs), np.median(costs, axis=0)
    return Found(site, tiles[best], float(medians[0]), float(medians[best]))


def tiles_to_try(site: Site) -> list[AnyTile]:
    """Return the present tile of a site, first, and its candidates."""
    return list(dict.fromkeys([site.tile, *site.layer.candidates()]))


def best_of(costs: npt.NDArray[np.float64]) -> int:
    """Choose by costs `[processes, tiles]`; 0 where none is surely better than the first."""
    medians = np.median(costs, axis=0)
    best = int(np.argmin(medians))
    agreeing = np.count_nonzero(costs[:, best] < costs[:, 0])
    sure = agreeing >= np.ceil(len(costs) * SURE) and medians[best] <= (1 - WORTH) * medians[0]
    return best if sure else 0


@dataclass(frozen=True)
class SideBySide:
    """Programs in one executable.

    Attributes:
        folder: holds `model`.
        owners: per call of a profile, the number of the program it belongs to, or None.
        idle: the number of a call that does next to nothing.
        count: how many programs there are.
    """

    folder: Path
    owners: tuple[int | None, ...]
    idle: int
    count: int

    def visits(self, device: Device) -> Iterator[list[float]]:
        """Run processes, and yield for each what every program costs."""
        for _ in range(1 if device.emulated else PROCESSES):
            yield self.visit(device)

    def visit(self, device: Device, threads: int | None = None) -> list[float]:
        """Run one process; return what every program costs."""
        calls = device.profile(self.folder, threads=threads, seconds=SECONDS, runs=RUNS)
        if len(calls) != len(self.owners):
            raise DeviceFailed(
                f"{device.name}: `model --profile` should report {len(self.owners)} calls, "
                f"but reported {len(calls)}."
            )
        costs = [0.0] * self.count
        for owner, cost in zip(self.owners, calls, strict=True):
            if owner is not None:
                costs[owner] += max(cost - calls[self.idle], 0.0)
        return costs


def compile_side_by_side(programs: Sequence[Program], target: Target, folder: Path) -> SideBySide:
    """Compile programs into one executable. Raises CompileFailed."""
    from edgepress.targets.compile import compile_kernels
    from edgepress.targets.export import export

    joined = side_by_side(dict(enumerate(programs)), target)
    code = compile_kernels(joined.program, target)
    export(joined.program, code, target, folder, name=_NAME, tolerances=(0.0,))
    return SideBySide(folder, joined.owners, joined.idle, len(programs))
