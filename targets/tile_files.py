"""Files of tiles: one JSON object per instruction set, which people can read and compare.

On CPUs a tile is a pair: rows (neighbouring pixels) and columns (vectors of output channels). On
GPUs it is eight numbers: rows, columns and bytes of K of a block, its warps along these three,
stages, and blocks that share one tile.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

TileSizes = tuple[int, ...]
_CPU_SIZES, _GPU_SIZES = 2, 8
_KEYS = {"isa", "measured", "tiles"}


@functools.cache
def shipped_tiles(isa: str) -> Mapping[str, TileSizes]:
    """Read `tiles/ISA.json`; nothing where there is no such file.

    Raises ValueError where the file breaks its format.
    """
    file = resources.files("edgepress.targets.tiles") / f"{isa}.json"
    return parse_tiles(file.read_text("utf-8"), isa) if file.is_file() else {}


def parse_tiles(text: str, isa: str) -> dict[str, TileSizes]:
    """Read a file: an object of `isa`, `measured` (where and how) and `tiles`, layer to tile.

    Raises ValueError, naming what is wrong.
    """
    document = json.loads(text)
    if not isinstance(document, dict) or set(document) != _KEYS or document["isa"] != isa:
        raise ValueError(f"the tiles of {isa} must be an object of {', '.join(sorted(_KEYS))}")
    if not isinstance(document["tiles"], dict):
        raise ValueError(f"the tiles of {isa} must be an object, layer to [rows, columns]")
    count = _GPU_SIZES if isa.startswith("cuda") else _CPU_SIZES
    return {layer: _sizes(value, count) for layer, value in document["tiles"].items()}


def format_tiles(isa: str, measured: str, tiles: Mapping[str, TileSizes]) -> str:
    """Write a file, one layer a line, sorted."""
    head = f' "isa": {json.dumps(isa)},\n "measured": {json.dumps(measured)},\n "tiles": {{'
    lines = (f"  {json.dumps(layer)}: {list(sizes)}" for layer, sizes in sorted(tiles.items()))
    return "{\n" + head + "\n" + ",\n".join(lines) + "\n }\n}\n"


def _sizes(value: Any, count: int) -> TileSizes:
    fits = isinstance(value, list) and len(value) == count
    if not fits or not all(type(size) is int and size > 0 for size in value):
        wanted = "[rows, columns]" if count == _CPU_SIZES else f"{count} numbers above 0"
        raise ValueError(f"a tile is {wanted}, not {value!r}")
    return tuple(value)
