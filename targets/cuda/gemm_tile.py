"""Which tile a matrix product gets on a GPU: what a model of its time finds quickest.

The model counts, for one multiprocessor, what its blocks read, multiply and write, and how often
they wait. Its constants are those of one H100 and are rough; what counts is that a small product
is cut into as many blocks as there are multiprocessors, and a large one reads little.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from edgepress.targets.cuda.gemm_shape import ELEMENTS, GemmShape, row_elements
from edgepress.targets.tile_files import TileSizes

_BYTES_PER_NS = 50.0  # that one multiprocessor reads from the L2 cache
_MULTIPLICATIONS_PER_NS = {"float16": 2200.0, "tf32": 1100.0, "float32": 366.0, "int8": 4400.0}
_SHARED_BYTES_PER_NS = 200.0  # that its warps read of slices
_INSTRUCTIONS_PER_NS = 3.0  # that its warps issue, waiting as much as they do
_START_NS = 900.0  # until the first slice is there
_LATENCY_NS = 650.0  # from a slice's copy to its arrival
_SLICE_NS = 25.0  # barriers and addresses
_COMBINE_NS = 1500.0  # the last of several blocks waits, and reads what the others wrote
# Shared memory of a block at most, and threads of a multiprocessor: CUDA C++ Programming Guide,
# "Technical Specifications per Compute Capability".
_LIMITS = {
    80: (163 * 1024, 2048),
    87: (163 * 1024, 1536),
    90: (227 * 1024, 2048),
    100: (227 * 1024, 2048),
}
_OTHER_LIMITS = (99 * 1024, 1536)  # 8.6, 8.9, 12.0: what every GPU from 8.0 on has
_REGISTERS = 65536
_MOST_SPLIT = 16
_SMALLEST_SLICE_BYTES, _STEP_BYTES = 64, 32
_CANDIDATES_PER_BLOCK = 3
_HOPELESS = 2.0  # times the model's least time


@dataclass(frozen=True)
class GemmTile:
    """How a matrix product is cut.

    Attributes:
        rows, columns: outputs of a block.
        slice_bytes: of a row of K that are in shared memory at a time: 64, 128 or 256.
        warps: along rows, columns and K.
        stages: slices under way at a time.
        split: blocks that share the K of one tile.
    """

    rows: int
    columns: int
    slice_bytes: int
    warps: tuple[int, int, int]
    stages: int
    split: int = 1

    @classmethod
    def of_sizes(cls, sizes: TileSizes) -> GemmTile:
        """Return the tile that a file of tiles means."""
        rows, columns, slice_bytes, along_rows, along_columns, along_k, stages, split = sizes
        warps = (along_rows, along_columns, along_k)
        return cls(rows, columns, slice_bytes, warps, stages, split)

    @property
    def sizes(self) -> TileSizes:
        """What a file of tiles says."""
        return (self.rows, self.columns, self.slice_bytes, *self.warps, self.stages, self.split)

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * math.prod(self.warps)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: slices, and later the sums."""
        slices = self.stages * (self.rows + self.columns) * self.slice_bytes
        return max(slices, self.rows * (self.columns + 4) * 4)


# Outputs of a block and its warps.
_SHAPES = (
    (256, 128, (4, 2, 1)),
    (128, 256, (2, 4, 1)),
    (128, 128, (2, 2, 1)),
    (128, 128, (2, 4, 1)),
    (128, 64, (2, 2, 1)),
    (128, 64, (4, 2, 1)),
    (64, 128, (2, 2, 1)),
    (64, 128, (2, 4, 1)),
    (128, 32, (4, 1, 1)),
    (64, 64, (2, 2, 1)),
    (64, 64, (2, 2, 2)),
    (64, 32, (2, 1, 2)),
    (64, 32, (2, 2, 2)),
    (32, 128, (1, 4, 1)),
    (32, 64, (1, 2, 2)),
    (32, 64, (1, 2, 4)),
    (32, 32, (1, 2, 4)),
    (32, 32, (1, 1, 4)),
    (16, 64, (1, 2, 2)),
    (16, 32, (1, 1, 4)),
)


@dataclass(frozen=True)
class GemmLayer:
    """A convolution or product, as far as its tile depends on it.

    Attributes:
        shape: its geometry.
        product: `float32`, `tf32`, `float16` or `int8`.
        multiprocessors: of the GPU.
        architecture: its compute capability, such as 87 for 8.7.
    """

    shape: GemmShape
    product: str
    multiprocessors: int
    architecture: int

    @property
    def database(self) -> str:
        """The file in `targets/tiles/` that may know the layer."""
        return f"cuda_sm{self.architecture}"

    @property
    def quantized(self) -> bool:
        """Whether it multiplies integers."""
        return self.product == "int8"

    @property
    def key(self) -> str:
        """The layer in words, as files of tiles name it."""
        shape = self.shape
        size = f"{shape.out_height}x{shape.out_width}"
        words = f"{self.product} {_pair(shape.kernel)} {shape.channels} > {shape.out_channels}"
        parts = [f"{'gemm' if shape.kernel == (1, 1) else 'conv'} {words}, {size}"]
        if shape.batch > 1:
            parts.append(f"batch {shape.batch}")
        for name, value in (("strides", shape.strides), ("dilations", shape.dilations)):
            if value != (1, 1):
                parts.append(f"{name} {_pair(value)}")
        return ", ".join(parts)

    def choose(self) -> GemmTile:
        """Return the tile that the model finds quickest."""
        return min(self._tiles(), key=self.estimate_ns)

    def candidates(self) -> list[GemmTile]:
        """Return the tiles worth measuring: the best of the model for every shape of a block."""
        tiles = sorted(self._tiles(), key=self.estimate_ns)
        limit = _HOPELESS * self.estimate_ns(tiles[0])
        found = dict[tuple[object, ...], list[GemmTile]]()
        for tile in tiles:
            alike = found.setdefault((tile.rows, tile.columns, tile.warps), [])
            if self.estimate_ns(tile) <= limit and len(alike) < _CANDIDATES_PER_BLOCK:
                alike.append(tile)
        return [tile for alike in found.values() for tile in alike]

    def estimate_ns(self, tile: GemmTile) -> float:
        """Estimate the time with a tile, in nanoseconds of an H100."""
        return tile_ns(
            tile,
            self.shape.rows,
            self.shape.out_channels,
            self._row_bytes,
            self.product,
            self.multiprocessors,
            self.architecture,
        )

    def blocks_together(self, tile: GemmTile) -> int:
        """Return how many blocks of a tile a multiprocessor is to run at a time."""
        tiles = -(-self.shape.rows // tile.rows) * -(-self.shape.out_channels // tile.columns)
        blocks = tiles * tile.split
        return blocks_together(tile, blocks, self.multiprocessors, self.architecture)

    @property
    def _row_bytes(self) -> int:
        element = ELEMENTS[self.product]
        return row_elements(self.shape, element) * np.dtype(element).itemsize

    def _tiles(self) -> list[GemmTile]:
        """Return every tile that fits; where a product is small, those with less waste."""
        shape = self.shape
        return list(_candidates(shape.rows, shape.out_channels, self._row_bytes, self.architecture))


def _candidates(rows: int, columns: int, row_bytes: int, architecture: int) -> Iterator[GemmTile]:
    shared_bytes, _ = _LIMITS.get(architecture, _OTHER_LIMITS)
    for height, width, warps in _SHAPES:
        if (height > 32 and height >= 2 * rows) or (width > 32 and width >= 2 * columns):
            continue
        for slice_bytes in (64, 128, 256):
            threads = 32 * math.prod(warps)
            at_once = threads // (slice_bytes // 16)
            if slice_bytes < _STEP_BYTES * warps[2] or height % at_once:
                continue
            if _is_empty(slice_bytes, row_bytes, warps[2]):
                continue
            slices = -(-row_bytes // slice_bytes)
            for stages in (2, 3, 4, 5):
                for split in range(1, _MOST_SPLIT + 1):
                    share = -(-slices // split)
                    if split > 1 and (share < 2 or share * (split - 1) >= slices):
                        continue
                    if stages > max(2, share + 1):
                        continue
                    tile = GemmTile(height, width, slice_bytes, warps, stages, split)
                    if tile.shared_bytes <= shared_bytes:
                        yield tile


def tile_ns(
    tile: GemmTile,
    rows: int,
    columns: int,
    row_bytes: int,
    product: str,
    multiprocessors: int,
    architecture: int,
) -> float:
    """Estimate the time of a product with a tile, in nanoseconds of an H100."""
    tiles = -(-rows // tile.rows) * -(-columns // tile.columns)
    blocks = tiles * tile.split
    together = blocks_together(tile, blocks, multiprocessors, architecture)
    waves = -(-blocks // (multiprocessors * together))
    slices = math.ceil(math.ceil(row_bytes / tile.slice_bytes) / tile.split)
    element = {"float16": 2, "int8": 1}.get(product, 4)
    read = (tile.rows + tile.columns) * tile.slice_bytes / _BYTES_PER_NS
    macs = tile.rows * tile.columns * tile.slice_bytes / element
    # One warp alone cannot keep its part of the tensor cores busy.
    busy = min(1.0, tile.threads * together / 512)
    multiply = macs / (_MULTIPLICATIONS_PER_NS[product] * busy)
    height, width = tile.rows // tile.warps[0], tile.columns // tile.warps[1]
    share = tile.warps[0] * tile.warps[1] * (height + width) * tile.slice_bytes
    issue = _instructions(tile, product) * tile.threads / 32 / _INSTRUCTIONS_PER_NS
    work = max(read, multiply, share / _SHARED_BYTES_PER_NS, issue)
    wait = (_LATENCY_NS + read) / max(1, tile.stages - 1)
    slice_ns = max(wait, together * work) + _SLICE_NS
    write = together * tile.rows * tile.columns * 8 / _BYTES_PER_NS
    combine = 0.0
    if tile.split > 1:
        combine = _COMBINE_NS + tile.split * tile.rows * tile.columns * 4 / _BYTES_PER_NS
    return waves * (_START_NS + slices * slice_ns + write) + combine


def _instructions(tile: GemmTile, product: str) -> float:
    """Count the instructions of a warp in one slice, roughly."""
    copies = (tile.rows + tile.columns) * tile.slice_bytes / 16 / tile.threads
    height, width = tile.rows // tile.warps[0] / 16, tile.columns // tile.warps[1] / 8
    step = height + width / 2 + height * width + 4
    if product == "float32":
        step += 2 * height * width + 8 * height + 4 * width
    return 30 + 12 * copies + tile.slice_bytes / 32 / tile.warps[2] * step


def _is_empty(slice_bytes: int, row_bytes: int, along_k: int) -> bool:
    """Tell whether half of the only slice would be zeros, and a smaller one would do."""
    smallest = max(_SMALLEST_SLICE_BYTES, _STEP_BYTES * along_k)
    return slice_bytes > smallest and slice_bytes >= 2 * row_bytes


def blocks_together(tile: GemmTile, blocks: int, multiprocessors: int, architecture: int) -> int:
    """Return how many of some blocks a multiprocessor runs at a time."""
    shared_bytes, threads = _LIMITS.get(architecture, _OTHER_LIMITS)
    resident = min(
        shared_bytes // (tile.shared_bytes + 1024),
        threads // tile.threads,
        _REGISTERS // (_registers(tile) * tile.threads),
    )
    return max(1, min(resident, -(-blocks // multiprocessors)))


def _registers(tile: GemmTile) -> int:
    """Estimate the registers of a thread."""
    along_rows, along_columns, _ = tile.warps
    height, width = tile.rows // along_rows, tile.columns // along_columns
    sums = height * width // 32
    operands = height // 4 + width // 4
    return min(255, 48 + sums + 2 * operands)


def _pair(sizes: tuple[int, int]) -> str:
    return f"{sizes[0]}x{sizes[1]}"
