"""Max and average pools: small windows one per thread, large ones by whole blocks."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgepress.targets.cuda.assembly import CudaAssembly
from edgepress.targets.cuda.epilogue import HEADERS, finish_source
from edgepress.targets.cuda.kernel import C_TYPES, MOST_THREADS, CudaKernel, constants_source
from edgepress.targets.cuda.launch import (
    blocks_for,
    common_lanes,
    flat_kernel,
    lanes_of,
    spread_lanes,
)
from edgepress.targets.lowering.dialect import shape_of
from edgepress.targets.lowering.node_attributes import (
    constant_of,
    epilogue_of,
    integer_of,
    operand_of,
    pair_of,
)
from edgepress.targets.lowering.quantization import LIMITS
from edgepress.targets.schedules.epilogue import Epilogue, Requantise, Shift
from edgepress.targets.schedules.window import WindowShape

_HEADERS = (*HEADERS, "vectors.cuh", "pool.cuh")
_LARGE = 32  # taps from which several threads share a window
_TAPS = 4  # that a thread takes of a shared window
_TOGETHER = 8  # neighbouring threads that read one run of memory
_LEAST_BYTES = 4  # that each of them reads
_ENOUGH_THREADS = 512  # on a multiprocessor: nothing needs to be shared
_BLOCKS_AT_ONCE = 8  # of those that share, on a multiprocessor


def max_pool(
    name: str,
    shape: WindowShape,
    pads: tuple[int, int],
    dtypes: tuple[str, str],
    processors: int,
) -> CudaKernel:
    """Generate the kernel: arguments x, not padded, and y; `dtypes` are those in memory."""
    held, made = _held(dtypes[0]), C_TYPES[dtypes[1]]
    operation, result = "LargestFloat", f"from_float<{made}>(held)"
    if dtypes[0] in LIMITS:
        operation, result = f"LargestInteger<{LIMITS[dtypes[0]][0]}>", f"({made})held"
    value = f"[]({C_TYPES[dtypes[0]]} x) {{ return held_value(x); }}"
    finish = f"[]({held} held, int) -> {made} {{ return {result}; }}"
    parameters = [(dtypes[0], "x"), (dtypes[1], "y")]
    return _pool(name, shape, pads, operation, (value, finish), parameters, processors)


def average_pool(
    name: str,
    shape: WindowShape,
    pads: tuple[int, int],
    dtypes: tuple[str, str],
    zero_point: int,
    epilogue: Epilogue,
    places: int,
    processors: int,
) -> CudaKernel:
    """Generate the kernel.

    Arguments of the kernel: x, not padded, factors `[out_height * out_width]`, y. The factors are
    int32 for a `Shift`, and then products are divided by `2**places`; float32 otherwise.
    """
    held, made = _held(dtypes[0]), C_TYPES[dtypes[1]]
    before, factor = finish_source("Finish", epilogue, dtypes[1]), "float32"
    if isinstance(epilogue, Shift):
        low, high = epilogue.low - epilogue.zero_point, epilogue.high - epilogue.zero_point
        sums = f"averaged(held, factors[pixel], {places}, {low}, {high})"
        before, factor = "", "int32"
        result = f"({made})({sums} + ({epilogue.zero_point}))"
    elif isinstance(epilogue, Requantise):
        result = "Finish::of(held, factors[pixel], 0.0f)"
    else:
        result = "Finish::of(held * factors[pixel], 0.0f, 0.0f)"
    centred = f"held_value(x) - ({zero_point})" if zero_point else "held_value(x)"
    value = f"[]({C_TYPES[dtypes[0]]} x) {{ return {centred}; }}"
    finish = f"[&]({held} held, int pixel) -> {made} {{ return {result}; }}"
    parameters = [(dtypes[0], "x"), (factor, "factors"), (dtypes[1], "y")]
    lambdas = (value, finish)
    return _pool(name, shape, pads, f"Sum<{held}>", lambdas, parameters, processors, before)


def _held(dtype: str) -> str:
    """Return the type in which values are compared or added up."""
    return "int32_t" if dtype in LIMITS else "float"


def _pool(
    name: str,
    shape: WindowShape,
    pads: tuple[int, int],
    operation: str,
    lambdas: tuple[str, str],
    parameters: list[tuple[str, str]],
    processors: int,
    before: str = "",
) -> CudaKernel:
    pixels, taps = shape.lines * shape.out_width, shape.kernel[0] * shape.kernel[1]
    dtypes = (parameters[0][0], parameters[-1][0])
    lanes = common_lanes(lanes_of(*dtypes), shape.channels)
    threads = pixels * shape.channels // lanes
    before = _constants(shape, pads) + before
    arguments = f"(x, y,\n        {lambdas[0]},\n        {lambdas[1]});"
    if taps < _LARGE or threads >= processors * _ENOUGH_THREADS:
        lanes = min(lanes, spread_lanes(lanes, pixels * shape.channels, dtypes[0], processors))
        body = f"pool<Shape, {operation}, {lanes}>{arguments}"
        blocks = blocks_for(pixels * shape.channels // lanes, processors)
        return flat_kernel(name, parameters, body, _HEADERS, blocks, before=before)
    least = common_lanes(max(_LEAST_BYTES // np.dtype(dtypes[0]).itemsize, 1), shape.channels)
    blocks = pixels * _runs(shape.channels, lanes)
    while lanes > least and blocks < processors:
        lanes //= 2
        blocks = pixels * _runs(shape.channels, lanes)
    together = min(_TOGETHER, _power_of_two(shape.channels // lanes))
    shares = min(_power_of_two(-(-taps // _TAPS)), MOST_THREADS // together)
    size = max(together * shares, 32)
    return flat_kernel(
        name,
        parameters,
        f"pool_shared<Shape, {operation}, {lanes}, {together}, {size}>{arguments}",
        _HEADERS,
        min(blocks, processors * _BLOCKS_AT_ONCE),
        before=before,
        threads=size,
    )


def _runs(channels: int, lanes: int) -> int:
    """Return how many blocks share the channels of a pixel."""
    return -(-channels // (lanes * _TOGETHER))


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _constants(shape: WindowShape, pads: tuple[int, int]) -> str:
    """Write the struct of a window's geometry."""
    values = {
        "BATCH": shape.batch,
        "HEIGHT": shape.height,
        "WIDTH": shape.width,
        "CHANNELS": shape.channels,
        "OUT_HEIGHT": shape.out_height,
        "OUT_WIDTH": shape.out_width,
    }
    pairs = {
        "KERNEL": shape.kernel,
        "STRIDE": shape.strides,
        "DILATION": shape.dilations,
        "PAD": pads,
    }
    for name, (down, across) in pairs.items():
        values |= {f"{name}_DOWN": down, f"{name}_ACROSS": across}
    return constants_source("Shape", values)


def _shape_of(node: ir.Node) -> tuple[WindowShape, tuple[int, int]]:
    """Return the geometry of a node's window, and its padding above and to the left."""
    _, height, width, _ = shape_of(operand_of(node.inputs[0]))
    batch, out_height, out_width, channels = shape_of(node.outputs[0])
    window = [pair_of(node, name) for name in ("kernel", "strides", "dilations")]
    top, left, _, _ = (int(pad) for pad in node.attributes["pads"].as_ints())
    shape = WindowShape(batch, height, width, channels, out_height, out_width, *window)
    return shape, (top, left)


def call_max_pool(assembly: CudaAssembly, node: ir.Node) -> None:
    """Take the largest value under each window."""
    x, y = operand_of(node.inputs[0]), assembly.declare(node.outputs[0])
    dtypes = (assembly.storage(x), assembly.storage(node.outputs[0]))
    arguments = (*_shape_of(node), dtypes, assembly.multiprocessors)
    name = assembly.kernel("max_pool", max_pool, *arguments)
    assembly.call(name, [assembly.tensor(x)], y, node.name or name)


def call_average_pool(assembly: CudaAssembly, node: ir.Node) -> None:
    """Average what lies under each window."""
    x, y, epilogue = (
        operand_of(node.inputs[0]),
        assembly.declare(node.outputs[0]),
        epilogue_of(node),
    )
    dtypes = (assembly.storage(x), assembly.storage(node.outputs[0]))
    zero_point = integer_of(node, "x_zero_point") if isinstance(epilogue, Requantise) else 0
    places = integer_of(node, "shift") if isinstance(epilogue, Shift) else 0
    arguments = (*_shape_of(node), dtypes, zero_point, epilogue, places, assembly.multiprocessors)
    name = assembly.kernel("average_pool", average_pool, *arguments)
    label = node.name or name
    factors = assembly.constant(f"{label}.factors", constant_of(node, 1).ravel())
    assembly.call(name, [assembly.tensor(x), factors], y, label)
