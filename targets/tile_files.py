"""Files of tiles: one JSON object per instruction set, which people can read and compare.

A tile is a pair: rows (neighbouring pixels) and columns (vectors of output channels).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

TileSizes = tuple[int, int]
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
    return {layer: _sizes(value) for layer, value in document["tiles"].items()}


def format_tiles(isa: str, measured: str, tiles: Mapping[str, TileSizes]) -> str:
    """Write a file, one layer a line, sorted."""
    head = f' "isa": {json.dumps(isa)},\n "measured": {json.dumps(measured)},\n "tiles": {{'
    lines = (f"  {json.dumps(layer)}: {list(sizes)}" for layer, sizes in sorted(tiles.items()))
    return "{\n" + head + "\n" + ",\n".join(lines) + "\n }\n}\n"


def _sizes(value: Any) -> TileSizes:
    fits = isinstance(value, list) and len(value) == 2
    if not fits or not all(type(size) is int and size > 0 for size in value):
        raise ValueError(f"a tile is [rows, columns], not {value!r}")
    return value[0], value[1]
