"""What operators that move elements about do to channels; see `_channel_rules.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from edgepress.calibration.base import Array
from edgepress.passes._channel_axes import Axes, Axis, Ids, Kept, NoRule
from edgepress.passes._constants import constant, set_input
from edgepress.passes._shapes import shape_of

Rule = Callable[[Axes, ir.Node], None]
#: What fused query, key and value pass on their way to where they are taken apart.
_IN_ORDER = (
    "Add",
    "Cast",
    "DequantizeLinear",
    "Div",
    "Mul",
    "QuantizeLinear",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
)
#: The axes of an operand, and its shape.
Operand = tuple[Sequence[Axis], tuple[int, ...]]


def operand(node: ir.Node, index: int) -> ir.Value:
    """Return an input that is not optional."""
    value = node.inputs[index]
    assert value is not None, f"{node.op_type} needs input {index}"
    return value


def parameter(axes: Axes, node: ir.Node, index: int) -> Array | None:
    """Return an input that must be constant, and freeze it; None where it is left out.

    Raises NoRule where it is computed.
    """
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        return None
    found = constant(value)
    if found is None:
        raise NoRule(f" whose input {value.name} is computed")
    axes.freeze(*axes.of(value), why=f"{node.name} takes its values as they are")
    return found


def freeze_inputs(axes: Axes, node: ir.Node, first: int) -> None:
    """Freeze the inputs from this one on: what they say is known from shapes, or is a scalar."""
    for value in node.inputs[first:]:
        if value is not None:
            axes.freeze(*axes.of(value), why=f"{node.name} takes its values as they are")


def broadcast(
    axes: Axes, node: ir.Node, operands: Sequence[Operand], extents: Sequence[int]
) -> list[Axis]:
    """Tie operands that NumPy's rules broadcast to these extents, aligned at the last axis."""
    result: list[Axis] = []
    for place, extent in enumerate(extents):
        parts: list[Axis] = []
        for found, shape in operands:
            index = place - (len(extents) - len(shape))
            if index < 0:
                continue
            if shape[index] == extent:
                parts.append(found[index])
            else:
                axes.freeze(found[index], why=f"{node.name} broadcasts it")
        result.append(_tied(axes, node, parts))
    return result


def _tied(axes: Axes, node: ir.Node, parts: Sequence[Axis]) -> Axis:
    """Cut these axes alike; None where one of them must not be cut."""
    why = f"{node.name} joins it with an axis that must stay"
    if not parts or any(part is None for part in parts):
        axes.freeze(*parts, why=why)
        return None
    for part in parts[1:]:
        axes.tie(parts[0], part, why)
    return parts[0]


def _concat(axes: Axes, node: ir.Node) -> None:
    values = [value for value in node.inputs if value is not None]
    rank = len(shape_of(node.outputs[0]))
    along = node.attributes.get_int("axis", 1) % rank
    result: list[Axis] = []
    for place in range(rank):
        parts = [axes.of(value)[place] for value in values]
        if place != along:
            result.append(_tied(axes, node, parts))
        elif all(part is None for part in parts):
            result.append(None)
        else:
            whole = [
                _fixed(axes, node, shape_of(value)[place]) if part is None else part
                for value, part in zip(values, parts, strict=True)
            ]
            result.append(np.concatenate(whole))
    axes.set(node.outputs[0], result)


def _fixed(axes: Axes, node: ir.Node, extent: int) -> Ids:
    """Return identities of elements that stay."""
    ids = axes.fresh(extent)
    axes.freeze(ids, why=f"{node.name} joins it with an axis that must stay")
    return ids


def _split(axes: Axes, node: ir.Node) -> None:
    inputs = axes.of(operand(node, 0))
    freeze_inputs(axes, node, 1)
    along = node.attributes.get_int("axis", 0) % len(inputs)
    axis = inputs[along]
    ends = np.cumsum([shape_of(value)[along] for value in node.outputs])
    parts: Sequence[Axis] = [None] * len(ends)
    if axis is not None:
        parts = np.split(axis, ends[:-1])
    for value, part in zip(node.outputs, parts, strict=True):
        axes.part(part)
        axes.set(value, [*inputs[:along], part, *inputs[along + 1 :]])

    def fix(kept: Kept) -> None:
        if axis is not None and not kept(axis).all():
            sizes = np.array([kept(part).sum() for part in parts if part is not None], np.int64)
            node.attributes.pop("num_outputs", None)
            set_input(node, 1, sizes, f"{node.name}_split")

    axes.on_cut(fix)


def _slice(axes: Axes, node: ir.Node) -> None:
    x = operand(node, 0)
    inputs = list(axes.of(x))
    starts, ends, given, stepped = (parameter(axes, node, index) for index in range(1, 5))
    assert starts is not None, "Slice needs starts"
    assert ends is not None, "Slice needs ends"
    along = range(len(starts)) if given is None else given.tolist()
    steps = [1] * len(starts) if stepped is None else stepped.tolist()
    #: index among starts, the axis, the start and the end of the slice
    cuts: list[tuple[int, Ids, int, int]] = []
    for index, (place, step) in enumerate(zip(along, steps, strict=True)):
        axis, extent = inputs[place], shape_of(x)[place]
        first, last, _ = slice(int(starts[index]), int(ends[index]), step).indices(extent)
        if axis is None or (step == 1 and (first, last) == (0, extent)):
            continue
        if step != 1:
            axes.freeze(axis, why=f"{node.name} takes every {step}th element of it")
            inputs[place] = None
            continue
        axes.part(axis[first:last])
        cuts.append((index, axis, first, last))
        inputs[place] = axis[first:last]
    axes.set(node.outputs[0], inputs)

    def fix(kept: Kept) -> None:
        new_starts, new_ends = starts.copy(), ends.copy()
        for index, axis, first, last in cuts:
            # a cut behind the slice moves bounds that are counted from the end
            if not kept(axis).all():
                new_starts[index] = kept(axis[:first]).sum()
                new_ends[index] = new_starts[index] + kept(axis[first:last]).sum()
        for place, new, old, name in (
            (1, new_starts, starts, "starts"),
            (2, new_ends, ends, "ends"),
        ):
            if not np.array_equal(new, old):
                set_input(node, place, new, f"{node.name}_{name}")

    axes.on_cut(fix)


def _gather(axes: Axes, node: ir.Node) -> None:
    data, indices = operand(node, 0), operand(node, 1)
    inputs = axes.of(data)
    along = node.attributes.get_int("axis", 0) % len(inputs)
    axis, chosen = inputs[along], constant(indices)
    freeze_inputs(axes, node, 1)
    picked: list[Axis] = [None] * len(shape_of(indices))
    if axis is not None and chosen is not None and chosen.ndim == 1 and not data.is_initializer():
        places = chosen.astype(np.int64)
        picked = [axis[places]]
        axes.part(axis[places])

        def fix(kept: Kept) -> None:
            stays = kept(axis)
            if not stays.all():
                renumbered = np.cumsum(stays) - 1
                new = renumbered[places[stays[places]]].astype(chosen.dtype)
                set_input(node, 1, new, f"{node.name}_indices")

        axes.on_cut(fix)
    else:
        axes.freeze(axis, why=f"{node.name} looks rows up in it")
    for place in set(range(len(inputs))) - {along}:
        axes.makes(node, data, place)
    axes.set(node.outputs[0], [*inputs[:along], *picked, *inputs[along + 1 :]])


def _transpose(axes: Axes, node: ir.Node) -> None:
    inputs = axes.of(operand(node, 0))
    axes.set(node.outputs[0], [inputs[index] for index in _order(node)])


def _order(node: ir.Node) -> list[int]:
    """Return which input axis each output axis of a Transpose is."""
    rank = len(shape_of(node.outputs[0]))
    return list(node.attributes.get_ints("perm", tuple(reversed(range(rank)))))


def _reshape(axes: Axes, node: ir.Node) -> None:
    """Follow identities through Reshape, Flatten, Squeeze and Unsqueeze, by shapes alone."""
    x, y = operand(node, 0), node.outputs[0]
    freeze_inputs(axes, node, 1)
    inputs, before, after = axes.of(x), shape_of(x), shape_of(y)
    result: list[Axis] = []
    for old, new in _factors(before, after):
        result += _regroup(axes, node, inputs[old], before[old], new)
    axes.set(y, result)
    if node.op_type == "Reshape":
        _count_again(axes, node, result, after)


def _count_again(axes: Axes, node: ir.Node, result: list[Axis], after: tuple[int, ...]) -> None:
    """Let the shape that a node takes as input 1 count what remains."""

    def fix(kept: Kept) -> None:
        shape = [n if a is None else int(kept(a).sum()) for a, n in zip(result, after, strict=True)]
        if tuple(shape) != after:
            set_input(node, 1, np.array(shape, np.int64), f"{node.name}_shape")

    axes.on_cut(fix)


def _factors(before: Sequence[int], after: Sequence[int]) -> list[tuple[slice, slice]]:
    """Pair the shortest runs of axes that hold equally many elements.

    >>> _factors((1, 64, 384), (1, 64, 12, 32))[2]
    (slice(2, 3, None), slice(2, 4, None))
    """
    pairs, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        first, second = i, j
        here = there = 1
        if i < len(before):
            here, i = before[i], i + 1
        if j < len(after):
            there, j = after[j], j + 1
        while here != there:
            if here < there:
                here, i = here * before[i], i + 1
            else:
                there, j = there * after[j], j + 1
        pairs.append((slice(first, i), slice(second, j)))
    return pairs


def _regroup(
    axes: Axes, node: ir.Node, inputs: Sequence[Axis], before: Sequence[int], new: slice
) -> list[Axis]:
    """Return the axes `new` of the output of a node that reshapes a run of axes to them.

    Reshaping keeps the order of elements. So what remains of a tensor after a cut is in place again
    where an axis is found in the output whose every position holds elements of one channel alone.
    """
    after = shape_of(node.outputs[0])[new]
    result: list[Axis] = [None] * len(after)
    wide = [i for i, axis in enumerate(inputs) if axis is not None and before[i] > 1]
    if len(wide) != 1:
        axes.freeze(*inputs, why=f"{node.name} merges it with another axis")
        return result
    (index,) = wide
    axes.freeze(*inputs[:index], *inputs[index + 1 :], why=f"{node.name} drops it")
    axis = inputs[index]
    assert axis is not None, "it is wide"
    column = axis.reshape(-1, *(1,) * (len(before) - 1 - index))
    elements = np.broadcast_to(column, before).reshape(after)
    rows = [np.moveaxis(elements, i, 0).reshape(extent, -1) for i, extent in enumerate(after)]
    alike = [bool((row == row[:, :1]).all()) for row in rows]
    # else a split, such as 384 channels into 12 heads of 32: whole heads go
    place = alike.index(True) if any(alike) else _split_axis(node, new)
    axes.merge(rows[place])
    result[place] = rows[place][:, 0]
    return result


def _split_axis(node: ir.Node, new: slice) -> int:
    """Return which of the axes `new`, that a node splits channels into, may be cut.

    That is the first, which counts heads, or the one behind fused query, key and value. In a
    channel shuffle it is the second: equal positions of all groups go, as in the grouped
    convolution before it.
    """
    y = node.outputs[0]
    after = shape_of(y)
    first, _, _ = new.indices(len(after))
    wide = [place for place in range(*new.indices(len(after))) if after[place] > 1]
    if len(wide) == 2 and _is_shuffle(node, *wide):
        return wide[1] - first
    whole = [place for place in wide if not _is_taken_apart(y, place)]
    return (whole or wide)[0] - first


def _is_taken_apart(value: ir.Value, place: int) -> bool:
    """Whether every reader picks from this axis: it holds things side by side, no channels.

    Looks through Transposes, and through what leaves the axes that are wider than 1 in order.
    """
    extents = shape_of(value)

    def picks(user: ir.Node) -> bool:
        y = user.outputs[0]
        if user.op_type in ("Gather", "Split"):
            return user.attributes.get_int("axis", 0) % len(extents) == place
        if user.op_type == "Slice":
            along = constant(user.inputs[3]) if len(user.inputs) > 3 else None
            listed = range(len(extents)) if along is None else along.tolist()
            return [axis % len(extents) for axis in listed] == [place]
        if user.op_type == "Transpose":
            return _is_taken_apart(y, _order(user).index(place))
        computed = [given for given in user.inputs if given and constant(given) is None]
        if user.op_type not in _IN_ORDER or len(computed) > 1:
            return False
        before, after = _wide(extents), _wide(shape_of(y))
        same = [extents[axis] for axis in before] == [shape_of(y)[axis] for axis in after]
        return same and _is_taken_apart(y, after[before.index(place)])

    users = value.consumers()
    return bool(users) and all(map(picks, users))


def _wide(extents: Sequence[int]) -> list[int]:
    """Return the axes that hold more than one element."""
    return [place for place, extent in enumerate(extents) if extent > 1]


def _is_shuffle(node: ir.Node, one: int, other: int) -> bool:
    """Whether the output of a node goes through a Transpose of these axes and is merged again."""
    y = node.outputs[0]
    swapped = list(range(len(shape_of(y))))
    swapped[one], swapped[other] = other, one
    users = y.consumers()
    if any(u.op_type != "Transpose" or _order(u) != swapped for u in users):
        return False
    again = [node for user in users for node in user.outputs[0].consumers()]
    shape = shape_of(operand(node, 0))
    return all(u.op_type == "Reshape" and shape_of(u.outputs[0]) == shape for u in again)


def _expand(axes: Axes, node: ir.Node) -> None:
    x, y = operand(node, 0), node.outputs[0]
    freeze_inputs(axes, node, 1)
    result = broadcast(axes, node, [(axes.of(x), shape_of(x))], shape_of(y))
    axes.set(y, result)
    _count_again(axes, node, result, shape_of(y))


def _tile(axes: Axes, node: ir.Node) -> None:
    x, y = operand(node, 0), node.outputs[0]
    freeze_inputs(axes, node, 1)
    result: list[Axis] = []
    for axis, before, after in zip(axes.of(x), shape_of(x), shape_of(y), strict=True):
        result.append(None if axis is None else np.tile(axis, after // before))
    axes.set(y, result)


def _pad(axes: Axes, node: ir.Node) -> None:
    inputs = axes.of(operand(node, 0))
    freeze_inputs(axes, node, 1)
    pads, listed = parameter(axes, node, 1), parameter(axes, node, 3)
    assert pads is not None, "Pad needs pads"
    result = list(inputs)
    along = range(len(inputs)) if listed is None else listed.tolist()
    for place, both in zip(along, pads.reshape(2, -1).T, strict=True):
        if both.any():
            axes.freeze(inputs[place], why=f"{node.name} pads it")
            result[place] = None
    axes.set(node.outputs[0], result)


def _resize(axes: Axes, node: ir.Node) -> None:
    if node.attributes.get_string("coordinate_transformation_mode", "") == "tf_crop_and_resize":
        raise NoRule(" that crops")
    if node.attributes.get_string("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise NoRule(" that keeps the aspect ratio")
    x, y = operand(node, 0), node.outputs[0]
    result = list(axes.of(x))
    freeze_inputs(axes, node, 1)
    scales, sizes = parameter(axes, node, 2), parameter(axes, node, 3)
    if scales is not None and not scales.size:  # that is how old models leave it out
        scales = None
    along = node.attributes.get_ints("axes", tuple(range(len(result))))
    #: index among sizes, and an axis that keeps its extent
    kept_axes: list[tuple[int, Ids]] = []
    for index, place in enumerate(along):
        axis = result[place]
        if axis is None:
            continue
        if shape_of(x)[place] == shape_of(y)[place] and (scales is None or scales[index] == 1):
            kept_axes.append((index, axis))
        else:
            axes.freeze(axis, why=f"{node.name} resizes it")
            result[place] = None
    axes.set(y, result)

    def fix(kept: Kept) -> None:
        if sizes is None or all(kept(axis).all() for _, axis in kept_axes):
            return
        new = sizes.copy()
        for index, axis in kept_axes:
            new[index] = kept(axis).sum()
        set_input(node, 3, new, f"{node.name}_sizes")

    axes.on_cut(fix)


def _depth_to_space(axes: Axes, node: ir.Node) -> None:
    """Spread the channels of every block over space: cut all that become one channel."""
    inputs = axes.of(operand(node, 0))
    axes.freeze(*inputs[2:], why=f"{node.name} spreads channels over it")
    block = node.attributes.get_int("blocksize", 0) ** 2
    channels: Axis = None
    if inputs[1] is not None:
        column_row = node.attributes.get_string("mode", "DCR") == "CRD"
        rows = inputs[1].reshape(-1, block) if column_row else inputs[1].reshape(block, -1).T
        axes.merge(rows)
        channels = rows[:, 0]
    axes.set(node.outputs[0], [inputs[0], channels, None, None])


def _space_to_depth(axes: Axes, node: ir.Node) -> None:
    """Repeat the channels for every position of a block."""
    inputs = axes.of(operand(node, 0))
    axes.freeze(*inputs[2:], why=f"{node.name} gathers channels from it")
    block = node.attributes.get_int("blocksize", 0) ** 2
    channels = None if inputs[1] is None else np.tile(inputs[1], block)
    axes.set(node.outputs[0], [inputs[0], channels, None, None])


SHAPE_RULES: dict[str, Rule] = {
    **dict.fromkeys(("Flatten", "Reshape", "Squeeze", "Unsqueeze"), _reshape),
    "Concat": _concat,
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "Gather": _gather,
    "Pad": _pad,
    "Resize": _resize,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Tile": _tile,
    "Transpose": _transpose,
}
