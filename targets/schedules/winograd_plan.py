"""Which layers Winograd's filtering suits, and how each is computed: a model of its cost.

The model counts vector operations. A matrix product costs one multiply-add per vector of output
channels, input channel, tile and position, and more where its accumulators are few; the transforms
cost what was measured. It depends on the layer and the instruction set alone, so that the same
model always gives the same kernels.
"""

from __future__ import annotations

from edgepress.targets.isa.base import Isa
from edgepress.targets.schedules.conv import ConvShape, Tile, choose_tile
from edgepress.targets.schedules.winograd_layout import WinogradPlan, WinogradShape
from edgepress.targets.schedules.winograd_transforms import F2, F4, Transform

# Vector operations per vector of one tile, or of one filter, and position: measured times on Zen 4
# (stores are what they cost there), and instructions on Arm.
_INPUTS, _WEIGHTS, _RESULTS = 6.0, 5.0, 5.0
_INPUTS_ARM, _WEIGHTS_ARM, _RESULTS_ARM = 7.0, 6.5, 6.0
_PADDING = 1.05  # of the direct way, for its padding copy
_ARM_BYTES = 16  # of a vector
_MARGIN = 1.15  # how much faster the model must find a layer to leave the direct way
_NEAR_BYTES = 640 * 1024  # what may lie in the L2 cache beside the rest
_LINES_BYTES = 320 * 1024  # transformed inputs and results of some rows of tiles
_HELD_BYTES = 1024 * 1024  # transformed inputs where tiles come first
_ROW_BYTES = 16 * 1024  # transformed weights of one row of positions, in the L1 cache
_FEW_TILES = 12


def choose_plan(shape: WinogradShape, isa: Isa) -> WinogradPlan | None:
    """Return how to compute a layer, or None where the direct way is as fast.

    Scalar instruction sets have no use for it: there are no vectors of channels.
    """
    if isa.lanes == 1 or min(shape.channels, shape.out_channels) < isa.lanes:
        return None
    plans = [plan for transform in (F2, F4) for plan in _plans(shape, isa, transform)]
    best = min(plans, key=lambda plan: cost(shape, isa, plan))
    return best if cost(shape, isa, best) * _MARGIN < direct_cost(shape, isa) else None


def best_plan(shape: WinogradShape, isa: Isa, transform: Transform) -> WinogradPlan:
    """Return the best way to compute a layer by a transform."""
    return min(_plans(shape, isa, transform), key=lambda plan: cost(shape, isa, plan))


def direct_cost(shape: WinogradShape, isa: Isa) -> float:
    """Estimate the vector operations of the direct way."""
    padded = (shape.out_height + 2, shape.out_width + 2, shape.channels)
    out = (shape.out_height, shape.out_width, shape.out_channels)
    layer = ConvShape(shape.batch, *padded, *out, (3, 3))
    tile = choose_tile(layer, isa, quantized=False)
    step = _step(tile.rows, tile.columns, isa) / (tile.rows * tile.columns)
    pixels = shape.batch * shape.out_height * shape.out_width
    return _PADDING * step * 9 * pixels * shape.channels * _vectors(shape.out_channels, isa)


def cost(shape: WinogradShape, isa: Isa, plan: WinogradPlan) -> float:
    """Estimate the vector operations of a plan."""
    rows, columns = shape.tiles(plan.transform)
    groups = -(-rows // plan.lines)
    tiles, positions = plan.lines * columns, plan.transform.products
    inputs, outputs = _vectors(shape.channels, isa), _vectors(shape.out_channels, isa)
    filters = shape.channels * outputs * (1 if plan.weights_first else groups)
    products = groups * shape.channels * _product_cost(tiles, outputs, isa, plan)
    per_input, per_filter, per_result = _INPUTS, _WEIGHTS, _RESULTS
    if isa.vector_bytes <= _ARM_BYTES:
        per_input, per_filter, per_result = _INPUTS_ARM, _WEIGHTS_ARM, _RESULTS_ARM
    transforms = groups * tiles * (per_input * inputs + per_result * outputs) + per_filter * filters
    return positions * (products + transforms)


def _vectors(channels: int, isa: Isa) -> int:
    return -(-channels // isa.lanes)


def _product_cost(tiles: int, vectors: int, isa: Isa, plan: WinogradPlan) -> float:
    """Estimate the operations of a matrix product for one input channel."""
    tile, total = plan.tile, 0.0
    for height, count in ((tile.rows, tiles // tile.rows), (tiles % tile.rows, 1)):
        for width, blocks in ((tile.columns, vectors // tile.columns), (vectors % tile.columns, 1)):
            if not height or not width:
                continue
            # Accumulators come and go once for `depth` input channels.
            total += count * blocks * (_step(height, width, isa) + 3 * height * width / plan.depth)
    return total


def _step(height: int, width: int, isa: Isa) -> float:
    """Estimate the operations of one step of a product, height × width multiply-adds."""
    if isa.vector_bytes <= _ARM_BYTES:  # an instruction each; weights come two vectors a load
        return height * width + height + width / 2 + 2
    loads = 0.55 * (height + width)
    return max(height * width, loads, 5) + 0.1 * loads


def _plans(shape: WinogradShape, isa: Isa, transform: Transform) -> list[WinogradPlan]:
    """Return the plans of a transform that are worth comparing."""
    rows, columns = shape.tiles(transform)
    line_bytes = 4 * transform.products * columns * shape.channels
    weights_bytes = 4 * transform.products * shape.channels * shape.out_channels
    vectors = _vectors(shape.out_channels, isa)
    plans = []
    if weights_bytes <= _NEAR_BYTES:
        lines = min(max(-(-_FEW_TILES // columns), 1), rows)
        plans += [
            WinogradPlan(transform, True, lines, shape.channels, tile)
            for tile in _tiles(lines * columns, vectors, isa)
        ]
    most = max(1, min(_HELD_BYTES // line_bytes, rows))
    lines = -(-rows // -(-rows // most))  # groups of one size
    for tile in _tiles(lines * columns, vectors, isa):
        fitting = _ROW_BYTES // (4 * transform.inputs * tile.columns * isa.lanes)
        depth = _part(shape.channels, max(fitting, 4))
        plans.append(WinogradPlan(transform, False, lines, depth, tile))
    return plans


def _part(channels: int, most: int) -> int:
    """Return how many channels to take at a time: parts of one size, if there are any."""
    parts = -(-channels // most)
    return next((channels // n for n in range(parts, 2 * parts) if channels % n == 0),
                -(-channels // parts))  # fmt: skip


def _tiles(tiles: int, vectors: int, isa: Isa) -> list[Tile]:
    """Return the accumulators that fit the registers, for so many tiles."""
    fitting = []
    for columns in range(1, min(vectors, 4) + 1):
        free = isa.vector_registers - columns - (2 if isa.vector_bytes <= _ARM_BYTES else 1)
        counts = {-(-tiles // most) for most in range(1, free // columns + 1)}
        fitting += [Tile(-(-tiles // count), columns) for count in sorted(counts)]
    return fitting
