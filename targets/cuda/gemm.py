"""Convolutions and products with constant weights on tensor cores: `kernels/gemm.cuh`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepress.targets.cuda.assembly import CudaAssembly
from edgepress.targets.cuda.epilogue import HEADERS, finish_source
from edgepress.targets.cuda.gemm_shape import (
    CHUNK_BYTES,
    ELEMENTS,
    PRODUCTS,
    GemmShape,
    row_elements,
)
from edgepress.targets.cuda.gemm_tile import GemmLayer, GemmTile
from edgepress.targets.cuda.grouped import call_grouped_gemm
from edgepress.targets.cuda.kernel import C_TYPES, CudaKernel, constants_source
from edgepress.targets.lowering.dialect import shape_of
from edgepress.targets.lowering.node_attributes import (
    constant_of,
    epilogue_of,
    integer_of,
    operand_of,
    residual_of,
)
from edgepress.targets.lowering.operands import centred_bias
from edgepress.targets.program import Call
from edgepress.targets.schedules.epilogue import Epilogue, Requantise, first_step

Array = npt.NDArray[Any]


def pack_weights(weights: Array, shape: GemmShape, product: str) -> Array:
    """Order weights `[out, in, kh, kw]` as rows `[out, kh, kw, in]`, each padded with zeros.

    float16 is given as its bits, in int16; for TF32 they are rounded.
    """
    element = ELEMENTS[product]
    if product == "tf32":
        weights = round_tf32(weights)
    rows = weights.transpose(0, 2, 3, 1).astype(element).reshape(weights.shape[0], -1)
    padded = np.pad(rows, ((0, 0), (0, row_elements(shape, element) - rows.shape[1])))
    return padded.view(np.int16) if element == "float16" else padded


def round_tf32(array: Array) -> Array:
    """Round float32 to 10 bits of mantissa, to nearest, ties away from zero."""
    bits = array.astype(np.float32).view(np.uint32)
    rounded = (bits + np.uint32(1 << 12)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(array), rounded, bits).astype(np.uint32).view(np.float32)


def product_of(assembly: CudaAssembly, node: ir.Node) -> str | None:
    """Return how a node's operands are multiplied on tensor cores; None where they cannot be."""
    weights = constant_of(node, 1)
    channels = weights.shape[1]
    if weights.dtype == np.float32:
        product: str = assembly.products
    elif str(weights.dtype) == assembly.storage(operand_of(node.inputs[0])) == "int8":
        product = "int8"
    else:
        return None
    pixel_bytes = channels * np.dtype(ELEMENTS[product]).itemsize
    return product if pixel_bytes % 4 == 0 else None


def call_gemm(assembly: CudaAssembly, node: ir.Node) -> None:
    """Multiply rows by a matrix `[outputs, inputs]`."""
    product, weights = product_of(assembly, node), constant_of(node, 1)
    if product is None:
        call_grouped_gemm(assembly, node)
        return
    rows = math.prod(shape_of(operand_of(node.inputs[0]))) // weights.shape[1]
    shape = GemmShape(
        batch=1,
        height=1,
        width=rows,
        channels=weights.shape[1],
        out_height=1,
        out_width=rows,
        out_channels=weights.shape[0],
    )
    call_product(assembly, node, shape, product, weights[:, :, None, None])


def call_product(
    assembly: CudaAssembly, node: ir.Node, shape: GemmShape, product: str, weights: Array
) -> None:
    """Call the kernel of a convolution or product whose weights are `[out, in, kh, kw]`."""
    epilogue, label = epilogue_of(node), node.name or node.outputs[0].name or "gemm"
    residual = residual_of(node)
    source, element = operand_of(node.inputs[0]), ELEMENTS[product]
    x = assembly.tensor(source)
    if assembly.storage(source) != element:
        narrow = assembly.scratch(f"{label}.{element}", element, shape_of(source))
        assembly.cast(x, narrow, f"{label} (to {element})")
        x = narrow
    bias = constant_of(node, 2)
    quantized = isinstance(first_step(epilogue), Requantise)
    if quantized:
        bias = centred_bias(bias, constant_of(node, 1), integer_of(node, "x_zero_point"))
    arguments = [
        x,
        assembly.constant(f"{label}.weights", pack_weights(weights, shape, product)),
        assembly.constant(f"{label}.bias", bias),
    ]
    if quantized:
        arguments.append(assembly.constant(f"{label}.multipliers", constant_of(node, 3)))
    if residual is not None:
        arguments.append(assembly.tensor(residual))
    layer = GemmLayer(shape, product, assembly.multiprocessors, assembly.architecture)
    tile = assembly.tiles.answer(layer, layer.choose, GemmTile.of_sizes)
    y = assembly.declare(node.outputs[0])
    stored = (
        assembly.program.tensors[y].dtype,
        "float32" if residual is None else assembly.storage(residual),
    )
    kind = f"{'conv' if shape.kernel != (1, 1) else 'gemm'}_{product}"
    together = layer.blocks_together(tile)
    kernel = assembly.kernel(kind, gemm, shape, product, tile, epilogue, stored, together)
    written = [y]
    if tile.split > 1:
        size = math.prod(assembly.program.kernels[kernel].grid) * tile.rows * tile.columns
        dtype = "int32" if product == "int8" else "float32"
        written.insert(0, assembly.scratch(f"{label}.partials", dtype, (size,)))
    call = Call(kernel, (*arguments, *written), tuple(written), label)
    assembly.program.calls.append(call)


def gemm(
    name: str,
    shape: GemmShape,
    product: str,
    tile: GemmTile,
    epilogue: Epilogue,
    stored: tuple[str, str],
    together: int = 1,
) -> CudaKernel:
    """Return the kernel of a product.

    Args:
        name: of the function.
        shape: what it computes.
        product: `float32`, `tf32`, `float16` or `int8`.
        tile: how it is cut.
        epilogue: how outputs leave the accumulators.
        stored: dtypes in memory of the output and of the residual.
        together: blocks that a multiprocessor is to run at a time, at least.
    """
    element = ELEMENTS[product]
    total = row_elements(shape, element)
    finish = finish_source(f"{name}_finish", epilogue, *stored)
    accumulator = "int32_t" if product == "int8" else "float"
    parameters = [
        ("const {} *__restrict__", C_TYPES[element], "x"),
        ("const {} *__restrict__", C_TYPES[element], "weights"),
        ("const {} *__restrict__", accumulator, "bias"),
        ("const {} *__restrict__", f"{name}_finish::Factor", "factors"),
        ("const {} *__restrict__", f"{name}_finish::Residual", "residual"),
        ("{} *__restrict__", accumulator, "partials"),
        ("{} *__restrict__", f"{name}_finish::Output", "y"),
        ("{} *__restrict__", "uint32_t", "counters"),
    ]
    first = first_step(epilogue)
    absent = {
        "factors": not isinstance(first, Requantise),
        "residual": first is epilogue,
        "partials": tile.split == 1,
        "counters": tile.split == 1,
    }
    given = [
        f"{kind.format(dtype)} {parameter}"
        for kind, dtype, parameter in parameters
        if not absent.get(parameter, False)
    ]
    passed = ["nullptr" if absent.get(p, False) else p for _, _, p in parameters]
    grid = (
        -(-shape.out_channels // tile.columns),
        -(-shape.rows // tile.rows),
        tile.split,
    )
    source = "\n".join(
        [
            finish.rstrip(),
            constants_source(f"{name}_shape", _shape_constants(shape, total)),
            constants_source(f"{name}_tile", _tile_constants(tile, shape, element)),
            f'extern "C" __global__ void __launch_bounds__({tile.threads}, {together})',
            f"{name}({', '.join(given)})",
            "{",
            f"    Gemm<{PRODUCTS[product]}, {name}_shape, {name}_tile, {name}_finish>::run("
            f"{', '.join(passed)});",
            "}",
            "",
        ]
    )
    return CudaKernel(
        name,
        source,
        (*HEADERS, "gemm.cuh"),
        grid,
        (tile.threads, 1, 1),
        shared_bytes=tile.shared_bytes,
        counters=grid[0] * grid[1] if tile.split > 1 else 0,
        overlaps=True,
    )


def _shape_constants(shape: GemmShape, total: int) -> dict[str, int]:
    constants = {
        "BATCH": shape.batch,
        "HEIGHT": shape.height,
        "WIDTH": shape.width,
        "CHANNELS": shape.channels,
        "OUT_HEIGHT": shape.out_height,
        "OUT_WIDTH": shape.out_width,
        "OUT_CHANNELS": shape.out_channels,
        "TOP": shape.pads[0],
        "LEFT": shape.pads[1],
        "PADDED": int(shape.is_padded),
        "FILL": shape.fill,
        "K": total,
    }
    for name in ("kernel", "strides", "dilations"):
        height, width = getattr(shape, name)
        stem = name.upper().removesuffix("S")
        constants |= {f"{stem}_HEIGHT": height, f"{stem}_WIDTH": width}
    return constants


def _tile_constants(tile: GemmTile, shape: GemmShape, element: str) -> dict[str, int]:
    pixel_bytes = shape.channels * np.dtype(element).itemsize
    return {
        "BM": tile.rows,
        "BN": tile.columns,
        "BK": tile.slice_bytes,
        "WARPS_M": tile.warps[0],
        "WARPS_N": tile.warps[1],
        "WARPS_K": tile.warps[2],
        "STAGES": tile.stages,
        "SPLIT": tile.split,
        "PIECE": math.gcd(pixel_bytes, CHUNK_BYTES),
    }
