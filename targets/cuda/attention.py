"""Attention nodes as calls of one fused kernel on tensor cores; see `attention.cuh`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgepress.targets.cuda.assembly import CudaAssembly
from edgepress.targets.cuda.gemm_shape import PRODUCTS
from edgepress.targets.cuda.kernel import C_TYPES, CudaKernel, float_literal
from edgepress.targets.cuda.places import CudaPlace, operand_place, place
from edgepress.targets.float_format import FloatFormat
from edgepress.targets.lowering.node_attributes import float_of, integer_of, operand_of

_SLICE = 128  # value columns of a block, whose results fit the registers
_WARPS = 4
_LEAST_KEYS = 16  # of a warp at a time: a step of the product with V
_MOST_SHARED_BYTES = 99 * 1024  # of a block, on every architecture
_BLOCKS_PER_MULTIPROCESSOR = 2  # from here on a block takes more rows, and reads keys less often


@dataclass(frozen=True)
class AttentionShape:
    """Sizes and places; as in `schedules.attention`.

    Attributes:
        batch, heads, queries, keys, width, value_width: sizes.
        query, key, value, mask, output: places.
        scale: of the scores, before the mask is added.
        zero_rows: whether rows all of whose scores are -inf are zeros, not NaN.
    """

    batch: int
    heads: int
    queries: int
    keys: int
    width: int
    value_width: int
    query: CudaPlace
    key: CudaPlace
    value: CudaPlace
    mask: CudaPlace | None
    output: CudaPlace
    scale: float
    zero_rows: bool = False

    @property
    def slice(self) -> int:
        """Value columns of a block."""
        return min(self.value_width, _SLICE)

    @property
    def slices(self) -> int:
        """Blocks that share the value columns of a query row."""
        return -(-self.value_width // self.slice)


@dataclass(frozen=True)
class Arrangement:
    """How the warps of a block share rows and keys.

    Attributes:
        row_warps: each has 16 query rows.
        key_warps: each has `tile_keys` of the keys in shared memory.
        tile_keys: a multiple of 16.
    """

    row_warps: int
    key_warps: int
    tile_keys: int

    def shared_bytes(self, shape: AttentionShape, itemsize: int) -> int:
        """Return the bytes of the tiles, or of what warps join in their place."""
        pad, depth = 16 // itemsize, 32 // itemsize
        pitch = -(-shape.width // depth) * depth + pad
        values = -(-shape.slice // 16) * 16
        rows, keys = 16 * self.row_warps, self.key_warps * self.tile_keys
        tiles = ((rows + keys) * pitch + keys * (values + pad)) * itemsize
        joined = self.key_warps * rows * (values + 4 + 2) * 4 if self.key_warps > 1 else 0
        return max(tiles, joined)


def call_attention(assembly: CudaAssembly, node: ir.Node) -> None:
    """Emit the call of an `Attention` node."""
    batch, heads, queries, width, keys, value_width = _integers(node, "sizes")
    operands = [operand_of(value) for value in node.inputs]
    output = assembly.declare(node.outputs[0])
    sizes = {
        "query": (batch, heads, queries, width),
        "key": (batch, heads, keys, width),
        "value": (batch, heads, keys, value_width),
        "mask": (batch, heads, queries, keys),
    }
    places = [
        operand_place(assembly, node, name, value, sizes[name])
        for name, value in zip(sizes, operands, strict=False)
    ]
    by_batch, by_head, by_query = _integers(node, "output")
    shape = AttentionShape(
        batch=batch,
        heads=heads,
        queries=queries,
        keys=keys,
        width=width,
        value_width=value_width,
        query=places[0],
        key=places[1],
        value=places[2],
        mask=places[3] if len(places) > 3 else None,
        output=place(
            assembly.storage(node.outputs[0]),
            0,
            (by_batch, by_head, by_query, 1),
            (batch, heads, queries, value_width),
        ),
        scale=float_of(node, "scale"),
        zero_rows=bool(integer_of(node, "zero_rows")),
    )
    kernel = assembly.kernel(
        "attention", attention, shape, assembly.products, assembly.multiprocessors
    )
    sources = [assembly.tensor(value) for value in operands]
    assembly.call(kernel, sources, output, node.name or kernel)


def attention(
    name: str, shape: AttentionShape, products: FloatFormat, multiprocessors: int
) -> CudaKernel:
    """Generate the kernel: arguments q, k, v, the mask where there is one, and y."""
    itemsize = 2 if products == "float16" else 4
    chosen = arrange(shape, itemsize, multiprocessors)
    plain = chosen is None
    if chosen is None:
        chosen = Arrangement(1, 1, _LEAST_KEYS)
    places = {"q": shape.query, "k": shape.key, "v": shape.value, "m": shape.mask}
    given = {key: where for key, where in places.items() if where is not None}
    parameters = [f"const {C_TYPES[where.dtype]} *{key}" for key, where in given.items()]
    parameters.append(f"{C_TYPES[shape.output.dtype]} *y")
    mask = "m" if shape.mask is not None else "(const float *)nullptr"
    tasks = shape.batch * shape.heads * shape.slices
    if plain:
        threads, blocks = _SLICE, tasks * shape.queries
        call = f"plain_attention<{name}_shape>"
    else:
        threads = 32 * chosen.row_warps * chosen.key_warps
        blocks = tasks * -(-shape.queries // (16 * chosen.row_warps))
        call = f"attention<{PRODUCTS[products]}, {name}_shape>"
    source = (
        f"{_shape_source(name, shape, chosen, threads if plain else shape.slice)}"
        f'extern "C" __global__ void __launch_bounds__({threads})\n'
        f"{name}({', '.join(parameters)})\n{{\n    {call}(q, k, v, {mask}, y);\n}}\n"
    )
    return CudaKernel(
        name,
        source,
        ("plain_attention.cuh",) if plain else ("attention.cuh",),
        (blocks, 1, 1),
        (threads, 1, 1),
        0 if plain else chosen.shared_bytes(shape, itemsize),
        overlaps=True,
    )


def arrange(shape: AttentionShape, itemsize: int, multiprocessors: int) -> Arrangement | None:
    """Choose how warps share the work; None where no tile fits shared memory.

    Few rows are shared by warps that have different keys; of many, every warp has its own, so that
    keys are read once for all of them.
    """
    tasks, row_warps = shape.batch * shape.heads * shape.slices, _WARPS
    while row_warps > 1 and (
        row_warps * 16 >= 2 * shape.queries
        or tasks * -(-shape.queries // (16 * row_warps))
        < _BLOCKS_PER_MULTIPROCESSOR * multiprocessors
    ):
        row_warps //= 2
    key_warps = _WARPS // row_warps
    while key_warps > 1 and key_warps * _LEAST_KEYS >= 2 * shape.keys:
        key_warps //= 2
    tile_keys = 64 if key_warps == 1 and shape.width <= 64 and shape.slice <= 64 else 32
    while tile_keys > _LEAST_KEYS and key_warps * tile_keys >= 2 * shape.keys:
        tile_keys //= 2
    while True:
        chosen = Arrangement(row_warps, key_warps, tile_keys)
        if chosen.shared_bytes(shape, itemsize) <= _MOST_SHARED_BYTES:
            return chosen
        if tile_keys > _LEAST_KEYS:
            tile_keys //= 2
        elif key_warps > 1:
            key_warps //= 2
        elif row_warps > 1:
            row_warps //= 2
        else:
            return None


def _shape_source(name: str, shape: AttentionShape, chosen: Arrangement, columns: int) -> str:
    """Return the struct `Shape` of `attention.cuh`."""
    integers = {
        "HEADS": shape.heads,
        "QUERIES": shape.queries,
        "KEYS": shape.keys,
        "WIDTH": shape.width,
        "VALUE_WIDTH": shape.value_width,
        "SLICE": columns,
        "ROW_WARPS": chosen.row_warps,
        "KEY_WARPS": chosen.key_warps,
        "TILE_KEYS": chosen.tile_keys,
    }
    flags = {"MASKED": shape.mask is not None, "ZERO_ROWS": shape.zero_rows}
    places = {
        "Query": shape.query,
        "Key": shape.key,
        "Value": shape.value,
        "Mask": shape.mask or shape.output,
        "Output": shape.output,
    }
    lines = [
        f"struct {name}_shape {{",
        *(f"    static const int {key} = {value};" for key, value in integers.items()),
        *(f"    static const bool {key} = {str(value).lower()};" for key, value in flags.items()),
        *(f"    typedef {where.source} {key};" for key, where in places.items()),
        "    static __device__ __forceinline__ float scale() { "
        f"return {float_literal(float(np.float32(shape.scale)))}; }}",
        "};",
    ]
    return "\n".join(lines) + "\n"


def _integers(node: ir.Node, name: str) -> list[int]:
    return [int(number) for number in node.attributes[name].as_ints()]
