"""Refills the databases of GPU tiles that ship with edgepress: targets/tiles/cuda_sm*.json.

    python benchmarks/cuda/tiles.py prepare build/cuda/models/*.onnx -t cuda-sm90 -o tiles
    python tiles/measure_tiles.py tiles -o costs.json           (on the machine with the GPU)
    python benchmarks/cuda/tiles.py write tiles costs.json -t cuda-sm90

`prepare` takes canonical float models of fixed batch, finds their distinct layers, and writes the
CUDA C++ of each layer with each tile worth trying; measuring needs nothing but that folder, nvcc
and Python. `write` takes into the database what is more than 2 % better than the model's choice,
and keeps what was not measured again.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx_ir as ir

from edgepress.pipeline.tile_search import find_sites
from edgepress.targets.base import Target
from edgepress.targets.cuda.compile import units_of
from edgepress.targets.cuda.gemm import gemm
from edgepress.targets.cuda.gemm_shape import ELEMENTS, row_elements
from edgepress.targets.cuda.gemm_tile import GemmLayer, GemmTile
from edgepress.targets.cuda.kernel import CudaKernel
from edgepress.targets.load import load_target
from edgepress.targets.schedules.epilogue import Clip, Requantise
from edgepress.targets.tile_files import format_tiles, parse_tiles

TILES = Path(__file__).parents[2] / "targets/tiles"
WORTH = 0.02


@dataclass(frozen=True)
class Trial:
    """A layer with a tile, as a kernel, and the bytes of its arguments."""

    layer: GemmLayer
    tile: GemmTile
    kernel: CudaKernel
    argument_bytes: tuple[int, ...]


@click.group()
def main() -> None:
    """Refill the databases of GPU tiles."""


@main.command()
@click.argument("models", nargs=-1, type=click.Path(path_type=Path))
@click.option("-t", "--target", "name", required=True)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--product", multiple=True, default=tuple(ELEMENTS))
@click.option("--tries", default=12, help="tiles per layer, the model's best")
def prepare(
    models: Sequence[Path], name: str, output: Path, product: Sequence[str], tries: int
) -> None:
    """Write the CUDA C++ of every layer with every tile worth trying."""
    target = load_target(name)
    layers: dict[str, GemmLayer] = {}
    for path in models:
        # MiniLM's products of integers are others: quantized while it runs
        kinds = [kind for kind in product if kind != "int8" or "minilm" not in path.name]
        for layer in _layers(path, kinds, target):
            layers[layer.key] = layer
        print(f"{path.stem}: {len(layers)} layers", flush=True)
    trials = [
        trial
        for number, layer in enumerate(layers.values())
        for trial in _trials(layer, number, tries)
    ]
    _write_pack(trials, target, output)
    print(f"{len(layers)} layers, {len(trials)} kernels")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("costs", type=click.Path(path_type=Path))
@click.option("-t", "--target", "name", required=True)
def write(folder: Path, costs: Path, name: str) -> None:
    """Merge what was measured into the database, and show it."""
    target = load_target(name)
    isa = f"cuda_{target.gpu_arch.replace('_', '')}"
    path = TILES / f"{isa}.json"
    tiles = parse_tiles(path.read_text("utf-8"), isa) if path.exists() else {}
    index, measured = _read(folder / "index.json"), _read(costs)
    before = after = 0.0
    by_layer: dict[str, list[dict[str, Any]]] = {}
    for trial in index["trials"]:
        trial["us"] = measured["us"].get(trial["name"])
        if trial["us"] is not None:
            by_layer.setdefault(trial["layer"], []).append(trial)
    for key, found in by_layer.items():
        first, best = found[0], min(found, key=lambda trial: trial["us"])
        tiles.pop(key, None)
        if best["us"] < (1 - WORTH) * first["us"]:
            tiles[key] = tuple(best["tile"])
        else:
            best = first
        before, after = before + first["us"], after + best["us"]
        print(f"{first['us']:8.2f} {best['us']:8.2f} µs  {first['tile']} → {best['tile']}  {key}")
    path.write_text(format_tiles(isa, measured["machine"], tiles), "utf-8")
    print(f"{len(by_layer)} layers: {before:.0f} → {after:.0f} µs; {path}")


def _layers(path: Path, products: Sequence[str], target: Target) -> Iterator[GemmLayer]:
    """Yield the layers of a float model, as they are in every kind of product."""
    for site in find_sites(ir.load(path), target, {}, shipped=False):
        if isinstance(site.layer, GemmLayer):
            for product in products:
                yield replace(site.layer, product=product)


def _trials(layer: GemmLayer, number: int, tries: int) -> Iterator[Trial]:
    """Yield the model's choice first, then what else is worth it."""
    choice = layer.choose()
    others = sorted(layer.candidates(), key=layer.estimate_ns)
    for place, tile in enumerate(dict.fromkeys([choice, *others][: tries + 1])):
        yield _trial(layer, tile, f"layer{number}_tile{place}")


def _trial(layer: GemmLayer, tile: GemmTile, name: str) -> Trial:
    shape, product = layer.shape, layer.product
    element = ELEMENTS[product]
    integer = product == "int8"
    epilogue = Requantise("int8", 0, -128, 127) if integer else Clip(0.0)
    together = layer.blocks_together(tile)
    kernel = gemm(name, shape, product, tile, epilogue, (element, "float32"), together)
    item = np.dtype(element).itemsize
    pixels = shape.batch * shape.height * shape.width * shape.channels
    sizes = [pixels * item, shape.out_channels * row_elements(shape, element) * item]
    sizes += [4 * shape.out_channels] * (2 if integer else 1)
    if tile.split > 1:
        sizes.append(4 * math.prod(kernel.grid) * tile.rows * tile.columns)
    sizes.append(shape.rows * shape.out_channels * item)
    return Trial(layer, tile, kernel, tuple(sizes))


def _write_pack(trials: Sequence[Trial], target: Target, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    headers = resources.files("edgepress.targets.cuda.kernels")
    for header in headers.iterdir():
        if header.name.endswith(".cuh"):
            (output / header.name).write_text(header.read_text("utf-8"), "utf-8")
    units = units_of(trial.kernel for trial in trials)
    for number, unit in enumerate(units):
        (output / f"unit{number}.cu").write_text(unit.source, "utf-8")
    unit_of = {name: number for number, unit in enumerate(units) for name in unit.names}
    document = {
        "arch": target.gpu_arch,
        "trials": [
            {
                "name": trial.kernel.name,
                "unit": unit_of[trial.kernel.name],
                "layer": trial.layer.key,
                "tile": list(trial.tile.sizes),
                "macs": trial.layer.shape.macs,
                "estimate_ns": trial.layer.estimate_ns(trial.tile),
                "grid": list(trial.kernel.grid),
                "block": list(trial.kernel.block),
                "shared_bytes": trial.kernel.shared_bytes,
                "counters": trial.kernel.counters,
                "argument_bytes": list(trial.argument_bytes),
            }
            for trial in trials
        ],
    }
    (output / "index.json").write_text(json.dumps(document), "utf-8")
    shutil.copy(Path(__file__).parent / "measure_tiles.py", output)


def _read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


if __name__ == "__main__":
    sys.exit(main())
