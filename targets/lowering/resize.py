"""Resizes of images get a kernel of their own, on channels-last tensors."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgepress.targets.lowering.assembly import Assembly
from edgepress.targets.lowering.decompose_resize import axes_of, taps
from edgepress.targets.lowering.dialect import array_of, dtype_of, shape_of
from edgepress.targets.lowering.floats import Claim, claim
from edgepress.targets.lowering.node_attributes import constant_of, operand_of
from edgepress.targets.lowering.operands import call_window
from edgepress.targets.program import Array
from edgepress.targets.schedules.resize import ResizeShape, resize

_MOST_TAPS = 16  # cubic; more are loops that decompose better axis by axis


def claim_resizes(model: ir.Model) -> ir.Model:
    """Replace what the kernel can do. The model is not changed."""
    return claim(model, {"Resize": _claim})


def _claim(node: ir.Node) -> Claim | None:
    """Take a Resize of rows and columns: of any dtype by copying, of floats by weighting."""
    x = node.inputs[0]
    if x is None or len(shape_of(x)) != 4 or 0 in shape_of(node.outputs[0]):
        return None
    attributes = {
        name: attribute.value for name, attribute in node.attributes.items() if attribute.value
    }
    roi, scales, sizes = (_known(node, place) for place in (1, 2, 3))
    axes = axes_of(shape_of(x), attributes, roi, scales, sizes)
    crops = attributes.get("coordinate_transformation_mode") == "tf_crop_and_resize"
    if axes is None or crops:
        return None
    tables = {}
    for axis, name in ((2, "rows"), (3, "columns")):
        size = shape_of(x)[axis]
        places, weights = np.arange(size)[:, None], np.ones((size, 1))
        if axis in axes:
            places, weights, _ = taps(axes[axis], attributes)
        if (np.sort(weights, axis=1)[:, :-1] == 0).all():  # one element each, of weight 1
            chosen = weights.argmax(axis=1)[:, None]
            places, weights = np.take_along_axis(places, chosen, 1), np.ones((len(chosen), 1))
        tables[name] = (places, weights)
    same = [axis for axis in axes if axis < 2]
    if any(shape_of(x)[axis] != shape_of(node.outputs[0])[axis] for axis in same):
        return None
    count = tables["rows"][0].shape[1] * tables["columns"][0].shape[1]
    if count > _MOST_TAPS or (count > 1 and dtype_of(x) != "float32"):
        return None
    constants = {name: places.astype(np.int32) for name, (places, _) in tables.items()}
    if count > 1:
        constants |= {
            f"{name}_weights": weights.astype(np.float32) for name, (_, weights) in tables.items()
        }
    return Claim("Resize", x, constants, {}, node, [])


def call_resize(assembly: Assembly, node: ir.Node) -> None:
    """Emit the call of a `Resize` node."""
    batch, height, width, channels = shape_of(operand_of(node.inputs[0]))
    _, out_height, out_width, _ = shape_of(node.outputs[0])
    rows, columns = constant_of(node, 1), constant_of(node, 2)
    shape = ResizeShape(
        batch, height, width, channels, out_height, out_width, (rows.shape[1], columns.shape[1])
    )
    dtype = dtype_of(node.outputs[0])
    name = assembly.kernel("resize", resize, shape, dtype, assembly.isa)
    packed = {"rows": rows * (width * channels), "columns": columns * channels}
    if len(node.inputs) > 3:
        packed |= {"row_weights": constant_of(node, 3), "column_weights": constant_of(node, 4)}
    x = assembly.tensor(operand_of(node.inputs[0]))
    call_window(assembly, node, name, x, node.name or name, packed)


def _known(node: ir.Node, place: int) -> Array | None:
    array = array_of(node.inputs[place]) if len(node.inputs) > place else None
    return array if array is not None and array.size else None
