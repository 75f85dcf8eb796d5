"""Products of rows that are quantized while the model runs, as calls of kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgepress.targets.cuda.assembly import CudaAssembly
from edgepress.targets.cuda.epilogue import HEADERS, finish_source
from edgepress.targets.cuda.kernel import C_TYPES, CudaKernel
from edgepress.targets.cuda.quantised_rows import padded_width, quantised_rows
from edgepress.targets.lowering.dialect import shape_of
from edgepress.targets.lowering.dynamic_kernels import factors_of
from edgepress.targets.lowering.node_attributes import clip_of, constant_of, operand_of
from edgepress.targets.schedules.epilogue import Clip


@dataclass(frozen=True)
class Tile:
    """What a block computes.

    Attributes:
        row_parts, column_parts: pieces of 16 rows and of 8 columns that a warp has.
        row_warps, column_warps: along the outputs.
        depth_warps: that share the depth.
    """

    row_parts: int
    column_parts: int
    row_warps: int
    column_warps: int
    depth_warps: int

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return 16 * self.row_parts * self.row_warps

    @property
    def columns(self) -> int:
        """Columns of a block."""
        return 8 * self.column_parts * self.column_warps

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.row_warps * self.column_warps * self.depth_warps

    @property
    def source(self) -> str:
        """The type in CUDA C++."""
        numbers = (self.row_parts, self.column_parts, self.row_warps, self.column_warps)
        return f"DynamicTile<{', '.join(map(str, (*numbers, self.depth_warps)))}>"


_TILES = (Tile(2, 4, 2, 2, 1), Tile(2, 4, 1, 1, 4), Tile(1, 4, 1, 1, 4))  # from large to small


@dataclass(frozen=True)
class DynamicProduct:
    """A product `[rows, inputs] x [inputs, outputs]`; `inputs` is that of the padded rows."""

    rows: int
    inputs: int
    outputs: int
    clip: Clip

    def blocks(self, tile: Tile) -> int:
        """Return how many blocks of a tile cover the outputs."""
        return -(-self.rows // tile.rows) * -(-self.outputs // tile.columns)


def call_dynamic_gemm(assembly: CudaAssembly, node: ir.Node) -> None:
    """Emit the calls of a `DynamicGemm` node."""
    x = operand_of(node.inputs[0])
    weights, scales, bias = (constant_of(node, index) for index in (1, 2, 3))
    outputs, inputs = weights.shape
    rows, padded = math.prod(shape_of(x)[:-1]), padded_width(inputs)
    quantised = quantised_rows(assembly, x, factors_of(node), (rows, inputs))
    output = assembly.declare(node.outputs[0])
    size = DynamicProduct(rows, padded, outputs, clip_of(node))
    kernel = assembly.kernel(
        "dynamic_gemm",
        dynamic_gemm,
        size,
        assembly.storage(node.outputs[0]),
        assembly.multiprocessors,
    )
    packed = {
        "weights": np.pad(weights, ((0, 0), (0, padded - inputs))),
        "sums": weights.astype(np.int64).sum(axis=1).astype(np.int32),
        "scales": scales,
        "bias": bias,
    }
    label = node.name or kernel
    names = [assembly.constant(f"{label}.{key}", array) for key, array in packed.items()]
    assembly.call(kernel, [*quantised, *names], output, label)


def dynamic_gemm(name: str, size: DynamicProduct, dtype: str, multiprocessors: int) -> CudaKernel:
    """Generate the product.

    Arguments of the kernel: q `[rows, inputs]` int8, step `[rows]`, zero point `[rows]`, weights
    `[outputs, inputs]` int8, sums int32, scales and bias float32 `[outputs]`, and y
    `[rows, outputs]` of `dtype`.
    """
    tile = next((t for t in _TILES if size.blocks(t) >= multiprocessors), _TILES[-1])
    source = (
        f"{finish_source(f'{name}_finish', size.clip, dtype)}"
        f'extern "C" __global__ void __launch_bounds__({tile.threads})\n'
        f"{name}(const int8_t *q, const float *step, const int32_t *zero_point, "
        "const int8_t *weights, const int32_t *sums, const float *scales, const float *bias, "
        f"{C_TYPES[dtype]} *y)\n{{\n"
        "    DynamicOperands of = {q, step, zero_point, weights, sums, scales, bias};\n"
        f"    dynamic_gemm<{tile.source}, {name}_finish, {size.rows}, {size.inputs}, "
        f"{size.outputs}>(of, y);\n}}\n"
    )
    headers = (*HEADERS, "dynamic_gemm.cuh")
    grid, block = (size.blocks(tile), 1, 1), (tile.threads, 1, 1)
    return CudaKernel(name, source, headers, grid, block, overlaps=True)
