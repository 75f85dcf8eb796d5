"""3×3 float convolutions of a lowered graph that Winograd's filtering makes faster."""

from __future__ import annotations

import onnx_ir as ir

from edgepress.targets.lowering.assembly import Assembly
from edgepress.targets.lowering.dialect import dtype_of, shape_of
from edgepress.targets.lowering.node_attributes import (
    constant_of,
    epilogue_of,
    integer_of,
    operand_of,
    pair_of,
    residual_of,
)
from edgepress.targets.program import Call
from edgepress.targets.schedules.conv import ConvShape
from edgepress.targets.schedules.epilogue import Requantise, first_step
from edgepress.targets.schedules.winograd import winograd
from edgepress.targets.schedules.winograd_layout import (
    WinogradPlan,
    WinogradShape,
    pack_weights,
    scratch_size,
)
from edgepress.targets.schedules.winograd_plan import best_plan, choose_plan
from edgepress.targets.schedules.winograd_transforms import F2, F4


def winograd_plan(assembly: Assembly, node: ir.Node) -> WinogradPlan | None:
    """Return how to compute a convolution by Winograd's filtering; None where it doesn't suit."""
    geometry = [pair_of(node, name) for name in ("kernel", "strides", "dilations")]
    if geometry != [(3, 3), (1, 1), (1, 1)] or integer_of(node, "group") != 1:
        return None
    if isinstance(first_step(epilogue_of(node)), Requantise):
        return None
    if dtype_of(operand_of(node.inputs[0])) != "float32":
        return None
    shape, isa = _shape(node), assembly.isa
    plan = choose_plan(shape, isa)
    if isa.lanes == 1 or min(shape.channels, shape.out_channels) < isa.lanes:
        return plan
    side = 1 if plan is None else plan.transform.outputs
    measured = assembly.tiles.outputs(_direct_shape(shape), isa, side)
    if measured == side:
        return plan
    transform = {2: F2, 4: F4}.get(measured)
    return None if transform is None else best_plan(shape, isa, transform)


def _direct_shape(shape: WinogradShape) -> ConvShape:
    """Return the same layer as the direct way sees it."""
    return ConvShape(
        shape.batch,
        shape.out_height + 2,
        shape.out_width + 2,
        shape.channels,
        shape.out_height,
        shape.out_width,
        shape.out_channels,
        (3, 3),
    )


def call_winograd(assembly: Assembly, node: ir.Node, plan: WinogradPlan) -> None:
    """Convolve by a plan."""
    shape, isa = _shape(node), assembly.isa
    label = node.name or node.outputs[0].name or "conv"
    constants = {
        "weights": pack_weights(constant_of(node, 1), isa, plan.tile.columns),
        "bias": constant_of(node, 2),
    }
    kernel = assembly.kernel("winograd", winograd, shape, isa, epilogue_of(node), plan)
    arguments = [assembly.tensor(operand_of(node.inputs[0]))]
    arguments += [assembly.constant(f"{label}.{key}", array) for key, array in constants.items()]
    residual = residual_of(node)
    if residual is not None:
        arguments.append(assembly.tensor(residual))
    size = (scratch_size(shape, isa, plan),)
    outputs = (
        assembly.scratch(f"{node.outputs[0].name}_transformed", "float32", size),
        assembly.declare(node.outputs[0]),
    )
    assembly.program.calls.append(Call(kernel, (*arguments, *outputs), outputs, label))


def _shape(node: ir.Node) -> WinogradShape:
    """Return the geometry of a 3×3 convolution."""
    top, left, _, _ = (int(pad) for pad in node.attributes["pads"].as_ints())
    batch, height, width, channels = shape_of(operand_of(node.inputs[0]))
    _, out_height, out_width, out_channels = shape_of(node.outputs[0])
    return WinogradShape(
        batch, height, width, channels, top, left, out_height, out_width, out_channels
    )
