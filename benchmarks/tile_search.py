"""Refills the databases of tiles that ship with edgepress: targets/tiles/*.json.

    python benchmarks/tile_search.py prepare bundle/graph.onnx … -t raspberry-pi-4 -o search
    python benchmarks/tile_search.py measure search --seconds 20
    python benchmarks/tile_search.py write search

`prepare` takes canonical graphs, as bundles hold them, finds the layers whose tiles could matter,
and compiles the candidates of each side by side; what is there already is not made again. `measure`
runs these programs in turn, one process of each after the other, for some seconds, and goes on
where it stopped: measure in short slices while the machine is at rest. Where the board is another
machine, its emulator counts instructions, once. `write` takes into the database what is surely
better than the model's choice by more than 2 %, and keeps what was not measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgepress.pipeline.cache import content_key
from edgepress.pipeline.tile_search import (
    SideBySide,
    Site,
    best_of,
    compile_side_by_side,
    find_sites,
    site_costs,
    site_program,
    tiles_to_try,
)
from edgepress.targets.base import Target
from edgepress.targets.devices.base import Device, open_device
from edgepress.targets.load import load_target
from edgepress.targets.tile_files import TileSizes, format_tiles, parse_tiles

TILES = Path(__file__).parent.parent / "targets/tiles"
LEAST_SHARE = 0.01  # of a model's tiled layers: a smaller one is not worth a search
AT_BEST = 0.95  # of the rate of the model's best layer: there is nothing to gain
PROCESSES = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    steps = parser.add_subparsers(dest="step", required=True)
    preparing = steps.add_parser("prepare")
    preparing.add_argument("graphs", nargs="+", type=Path)
    preparing.add_argument("-t", "--target", required=True)
    preparing.add_argument("-o", "--output", required=True, type=Path)
    measuring = steps.add_parser("measure")
    measuring.add_argument("folder", type=Path)
    measuring.add_argument("--seconds", type=float, default=20)
    writing = steps.add_parser("write")
    writing.add_argument("folder", type=Path)
    writing.add_argument("--machine", default="", help="what was measured, in words")
    options = parser.parse_args()
    if options.step == "prepare":
        prepare(options.graphs, load_target(options.target), options.output)
    elif options.step == "measure":
        measure(options.folder, options.seconds)
    else:
        write(options.folder, options.machine)
    return 0


def prepare(graphs: list[Path], target: Target, output: Path) -> None:
    """Compile the candidates of every layer worth it, each layer into a folder of its own."""
    device = open_device(None, target)
    output.mkdir(parents=True, exist_ok=True)
    (output / "target.json").write_text(json.dumps(target.name))
    for graph in graphs:
        sites = find_sites(ir.load(graph), target, {}, shipped=False)
        costs = site_costs(sites, target, device, lambda *_: None)
        for site in _worth(sites, costs):
            folder = output / content_key(site.layer.key)[:16]
            if (folder / "layer.json").exists():
                continue
            tiles = tiles_to_try(site)
            if len(tiles) < 2:
                continue
            programs = [site_program(site, tile, target) for tile in tiles]
            made = compile_side_by_side(programs, target, folder)
            document = {
                "key": site.layer.key,
                "tiles": [[tile.rows, tile.columns] for tile in tiles],
                "bench": {**dataclasses.asdict(made), "folder": str(folder)},
            }
            (folder / "layer.json").write_text(json.dumps(document))
            print(f"{graph.parent.name}: {site.layer.key}: {len(tiles)} tiles", flush=True)


def _worth(sites: list[Site], costs: list[float]) -> list[Site]:
    """Leave out what takes little time, or is as fast as the fastest of its precision."""
    rates = [
        site.layer.shape.macs / cost if cost > 0 else 0.0
        for site, cost in zip(sites, costs, strict=True)
    ]
    best = {
        quantized: max(
            (r for s, r in zip(sites, rates, strict=True) if s.layer.quantized == quantized),
            default=0.0,
        )
        for quantized in (False, True)
    }
    total = sum(site.count * cost for site, cost in zip(sites, costs, strict=True))
    return [
        site
        for site, cost, rate in zip(sites, costs, rates, strict=True)
        if site.count * cost >= LEAST_SHARE * total and rate < AT_BEST * best[site.layer.quantized]
    ]


def measure(folder: Path, seconds: float) -> None:
    """Visit the layers that were visited least, until the time is up."""
    device = _device(folder)
    processes = 1 if device.emulated else PROCESSES
    until = time.monotonic() + seconds
    layers = [(path.parent, _read(path)) for path in sorted(folder.glob("*/layer.json"))]
    visits = {place: _visits(place) for place, _ in layers}
    while time.monotonic() < until:
        place, layer = min(layers, key=lambda pair: len(visits[pair[0]]))
        if len(visits[place]) >= processes:
            break
        bench = SideBySide(**layer["bench"] | {"folder": place})
        visits[place].append(bench.visit(device, threads=1))
        (place / "costs.json").write_text(json.dumps(visits[place]))
    left = sum(max(0, processes - len(found)) for found in visits.values())
    print(f"{len(layers)} layers; {left} processes left")


def write(folder: Path, machine: str) -> None:
    """Merge what was found into the database of the target's instruction set, and show it."""
    target, device = load_target(_read(folder / "target.json")), _device(folder)
    unit = "instructions under qemu" if device.emulated else "time, one thread"
    path = TILES / f"{target.isa}.json"
    tiles: dict[str, TileSizes] = {}
    if path.exists():
        tiles = parse_tiles(path.read_text("utf-8"), target.isa)
    gains = []
    for file in sorted(folder.glob("*/layer.json")):
        layer, costs = _read(file), np.array(_visits(file.parent))
        if len(costs) < (1 if device.emulated else PROCESSES):
            continue
        best, medians = best_of(costs), np.median(costs, axis=0)
        tiles.pop(layer["key"], None)
        if best:
            rows, columns = layer["tiles"][best]
            tiles[layer["key"]] = (rows, columns)
        gains.append(medians[0] / medians[best])
        old, new = layer["tiles"][0], layer["tiles"][best]
        print(f"{medians[0] / medians[best]:5.2f} {old} → {new}  {layer['key']}")
    measured = f"{machine or target.name}, {unit}"
    path.write_text(format_tiles(target.isa, measured, tiles), "utf-8")
    if gains:
        print(f"{len(gains)} layers, {np.mean(gains):.3f} of the model's speed; {path}")


def _device(folder: Path) -> Device:
    return open_device(None, load_target(_read(folder / "target.json")))


def _visits(place: Path) -> list[list[float]]:
    path = place / "costs.json"
    found: list[list[float]] = _read(path) if path.exists() else []
    return found


def _read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


if __name__ == "__main__":
    sys.exit(main())
