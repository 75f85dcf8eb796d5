"""Which tile a convolution or matrix product gets: what was measured, else what the model says.

`schedules/conv.py` has a model that counts instructions. Where a measurement disagreed with it, the
better tile stands in `tiles/ISA.json`, which ships with the package; `run --tune` finds more on the
device at hand. A layer is known by its geometry, so what was found for one network serves others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from edgepress.targets.isa.base import Isa
from edgepress.targets.schedules.conv import ConvShape, Tile, choose_tile, tile_costs
from edgepress.targets.tile_files import TileSizes, shipped_tiles

_CANDIDATES_PER_COLUMNS = 2
_HOPELESS = 1.25  # times the model's least count of instructions


class AnyTile(Protocol):
    """A tile of a CPU or of a GPU."""

    @property
    def sizes(self) -> TileSizes:
        """What a file of tiles says."""
        ...


class TiledLayer(Protocol):
    """A layer that has a tile, as far as it depends on the layer."""

    @property
    def key(self) -> str:
        """The layer in words, as files of tiles name it."""
        ...

    @property
    def database(self) -> str:
        """The file in `targets/tiles/` that may know the layer."""
        ...

    @property
    def quantized(self) -> bool:
        """Whether it multiplies integers."""
        ...

    @property
    def shape(self) -> Any:
        """Its geometry, which has `macs`."""
        ...

    def candidates(self) -> Sequence[AnyTile]:
        """Return the tiles worth measuring."""
        ...


_Tile = TypeVar("_Tile", bound=AnyTile)


@dataclass(frozen=True)
class Layer:
    """A convolution or matrix product, as far as its tile depends on it.

    Attributes:
        kind: `conv`, `rows` where rows are quantized while the model runs, or `winograd`, whose
            tile is that of outputs: 4×4 or 2×2 by Winograd's filtering, 1×1 for the direct way.
        shape: its geometry.
        isa: the instruction set for its operands.
        quantized: whether it multiplies integers.
    """

    kind: str
    shape: ConvShape
    isa: Isa
    quantized: bool

    def candidates(self) -> list[Tile]:
        """Return the tiles worth measuring: the best of the model for every number of columns.

        Those that the model finds much worse than the best are left out.
        """
        if self.kind == "winograd":
            return [Tile(side, side) for side in (1, 2, 4)]
        costs = tile_costs(self.shape, self.isa, self.quantized)
        limit = _HOPELESS * min(costs.values(), default=0.0)
        found = []
        for columns in sorted({tile.columns for tile in costs}):
            same = [t for t in costs if t.columns == columns and costs[t] <= limit]
            found += sorted(same, key=costs.__getitem__)[:_CANDIDATES_PER_COLUMNS]
        return found

    @property
    def database(self) -> str:
        """The file in `targets/tiles/` that may know the layer."""
        return self.isa.name

    @property
    def key(self) -> str:
        """The layer in words, as files of tiles name it.

        `conv int8 3x3 64 > 128, 28x28, strides 2x2` is a window of 3×3 over 64 channels (per group)
        with 128 outputs of 28×28.
        """
        shape = self.shape.flattened()
        integers = "int16" if self.isa.storage == "int16" else "int8"
        parts = [
            f"{self.kind} {integers if self.quantized else 'float32'} {_pair(shape.kernel)} "
            f"{shape.channels} > {shape.out_channels}",
            _pair((shape.out_height, shape.out_width)),
        ]
        if shape.batch > 1:
            parts.append(f"batch {shape.batch}")
        for name, value in (("strides", shape.strides), ("dilations", shape.dilations)):
            if value != (1, 1):
                parts.append(f"{name} {_pair(value)}")
        if shape.groups > 1:
            parts.append(f"groups {shape.groups}")
        return ", ".join(parts)


@dataclass
class Tiles:
    """Answers which tile a layer gets, and remembers who asked.

    Attributes:
        tuned: what was measured on the device at hand, by `Layer.key`; goes before what ships.
        asked: every layer that was asked for, by its key.
        answers: the tile that each got.
        shipped: whether the files that ship count; what is searched for them must not.
    """

    tuned: Mapping[str, TileSizes] = field(default_factory=dict)
    asked: dict[str, TiledLayer] = field(default_factory=dict)
    answers: dict[str, AnyTile] = field(default_factory=dict)
    shipped: bool = True

    def choose(self, kind: str, shape: ConvShape, isa: Isa, quantized: bool) -> Tile:
        """Return the tile of a layer."""
        layer = Layer(kind, shape, isa, quantized)
        return self.answer(layer, lambda: choose_tile(shape, isa, quantized), _cpu_tile)

    def outputs(self, shape: ConvShape, isa: Isa, model: int) -> int:
        """Return the side of a tile of outputs of a 3×3 convolution; `model` where none is known.

        1 means the direct way.
        """
        layer = Layer("winograd", shape, isa, False)
        return self.answer(layer, lambda: Tile(model, model), _cpu_tile).rows

    def answer(
        self, layer: TiledLayer, model: Callable[[], _Tile], of_sizes: Callable[[TileSizes], _Tile]
    ) -> _Tile:
        """Return the tile of any layer: the measured one, or what the model says."""
        key = layer.key
        sizes = self.tuned.get(key)
        if sizes is None and self.shipped:
            sizes = shipped_tiles(layer.database).get(key)
        tile = of_sizes(sizes) if sizes else model()
        self.asked[key], self.answers[key] = layer, tile
        return tile

    def used(self) -> dict[str, TileSizes]:
        """Return the tuned tiles that some layer got."""
        return {key: self.tuned[key] for key in sorted(self.asked) if key in self.tuned}


def _cpu_tile(sizes: TileSizes) -> Tile:
    rows, columns = sizes
    return Tile(rows, columns)


def _pair(sizes: tuple[int, int]) -> str:
    return f"{sizes[0]}x{sizes[1]}"
