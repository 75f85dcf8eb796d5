"""Attention becomes one node: products, scale, mask and softmax, read from where Q, K and V lie.

Exporters write `softmax(scale * Q K^T + mask) V` between reshapes, transposes and splits of the
projections, which differ from one to the next; what they come to is found by `views`. Recognised is
what lies between the two products: scales, masks (an Add, or a Where that puts a huge negative
number), one softmax over the keys. An `Attention` node of the `edgepress` domain reads the values
that Q, K and V are views of, and writes the value that the heads are joined to; its attributes are
the places of `schedules.attention`. A model that also wants the scores or shares keeps its nodes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from edgepress.targets.lowering.attention_masks import Mask, MaskBuilder, mask_view
from edgepress.targets.lowering.dialect import DOMAIN, array_of, shape_of
from edgepress.targets.lowering.floats import sole_user
from edgepress.targets.lowering.softmax import softmax_axes
from edgepress.targets.lowering.views import (
    View,
    contiguous,
    is_float,
    origins,
    place_of,
    scale_of,
    step_of,
)

Shape = tuple[int, ...]
_HUGE = -1e30  # a Where puts this or less in place of a score: their sum would be the same float32
_MOVES = {"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}


def fuse_attention(model: ir.Model) -> ir.Model:
    """Replace every attention that is recognised. The model is not changed."""
    if not any(_matched(node) for node in model.graph):
        return model
    model = model.clone()
    masks = MaskBuilder(model.graph)
    for node in list(model.graph):
        match = _matched(node)
        if match is not None:
            _replace(match, model.graph, masks)
    return model


@dataclass(frozen=True)
class _Match:
    """An attention.

    Attributes:
        query, key, value: views of the operands of the two products, `[batch, heads, …]`; the key's
            is that of K transposed.
        masks: what is added to the scores; `mask` is the view of their sum, `[batch, heads, …]`.
        output: the value that the node makes; `strides` by batch, head and query.
        scale: of the scores.
        label: name of the product of Q and K, which stands for the whole in profiles.
        zero_rows: whether rows without a finite score are zeros, not NaN.
    """

    query: View
    key: View
    value: View
    masks: tuple[Mask, ...]
    mask: View | None
    output: ir.Value
    strides: Shape
    scale: float
    label: str | None
    zero_rows: bool


@dataclass(frozen=True)
class _Scores:
    """How the scores that a softmax reads are made.

    Attributes:
        product: the MatMul of Q and K.
        scale: of its results.
        masks: what is added then.
        shapes: that the scores have on the way.
    """

    product: ir.Node
    scale: float = 1.0
    masks: tuple[Mask, ...] = ()
    shapes: tuple[Shape, ...] = ()


@dataclass(frozen=True)
class _Mixing:
    """What becomes of the results of a softmax.

    Attributes:
        product: the MatMul with V.
        shapes: that they have on the way.
        zero_rows: whether what is not a number becomes 0.
    """

    product: ir.Node
    shapes: tuple[Shape, ...] = ()
    zero_rows: bool = False


def _matched(softmax: ir.Node) -> _Match | None:
    """Return the attention whose softmax a node is."""
    if not _is(softmax, "Softmax") or not is_float(softmax.outputs[0]):
        return None
    shares = softmax.outputs[0]
    shape = shape_of(shares)
    if len(shape) < 2 or 0 in shape or softmax_axes(softmax) != (len(shape) - 1, len(shape)):
        return None
    scores = _scores(softmax.inputs[0])
    mixing = None if scores is None else _mixing(shares, scores.masks)
    if scores is None or mixing is None:
        return None
    heads = _batch_and_heads([shape, *scores.shapes, *mixing.shapes])
    if heads is None:
        return None
    query = _operand(scores.product, 0, heads, lambda _view: True)
    key = _operand(scores.product, 1, heads, lambda view: view.adjacent(2) or view.adjacent(3))
    value = _operand(mixing.product, 1, heads, lambda view: view.adjacent(3) and view.scale == 1)
    if query is None or key is None or value is None:
        return None
    output = _output(mixing.product.outputs[0], (*heads, query.shape[2], value.shape[3]))
    scale = np.float32(scores.scale * query.scale * key.scale)
    if output is None or not np.isfinite(scale):
        return None
    mask = None
    if scores.masks:
        mask = mask_view(scores.masks, (*heads, *shape[-2:]))
        if mask is None:
            return None
    return _Match(
        query,
        key,
        value,
        scores.masks,
        mask,
        *output,
        float(scale),
        scores.product.name,
        mixing.zero_rows,
    )


def _scores(value: ir.Value | None) -> _Scores | None:
    """Follow scores from a softmax back to the product of Q and K."""
    if value is None or not is_float(value) or len(list(value.uses())) != 1:
        return None
    node = value.producer()
    if node is None or value.is_graph_output() or node.domain not in ("", "ai.onnx"):
        return None
    shape = shape_of(value)
    if len(shape) < 2:
        return None
    if node.op_type == "MatMul":
        return _Scores(node, shapes=(shape,))
    if (factor := scale_of(node)) is not None:
        source = node.inputs[0] if array_of(node.inputs[0]) is None else node.inputs[1]
        found = _scores(source)
        if found is None or found.masks or found.shapes[-1] != shape:
            return None
        return replace(found, scale=found.scale * factor)
    for source, mask in _masked(node, shape):
        found = _scores(source)
        if found is not None and found.shapes[-1] == shape:
            return replace(found, masks=(*found.masks, mask))
    if node.op_type in _MOVES - {"Transpose"} and step_of(value) is not None:
        found = _scores(node.inputs[0])
        if found is not None and found.shapes[-1][-2:] == shape[-2:]:
            return replace(found, shapes=(*found.shapes, shape))
    return None


def _masked(node: ir.Node, shape: Shape) -> list[tuple[ir.Value, Mask]]:
    """Return what a node may take for scores, and for their mask."""
    inputs = [value for value in node.inputs if value is not None]
    if node.op_type == "Add":
        pairs = (inputs, inputs[::-1])
        return [(scores, Mask(mask, shape)) for scores, mask in pairs if is_float(mask)]
    if node.op_type != "Where":
        return []
    condition, first, second = inputs
    found = []
    for scores, fill, kept in ((first, second, True), (second, first, False)):
        number = array_of(fill)
        if number is not None and number.size == 1 and float(number.ravel()[0]) <= _HUGE:
            found.append((scores, Mask(condition, shape, float(number.ravel()[0]), kept)))
    return found


def _mixing(shares: ir.Value, masks: Sequence[Mask]) -> _Mixing | None:
    """Follow the results of a softmax to the product with V."""
    if not is_float(shares) or len(shape_of(shares)) < 2:
        return None
    shape, zero_rows = shape_of(shares), False
    node = sole_user(shares) or _without_nan(shares)
    if node is None or node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "MatMul":
        if node.inputs[0] is not shares or len(shape_of(node.outputs[0])) < 2:
            return None
        return _Mixing(node, (shape_of(node.outputs[0]),))
    output = node.outputs[0]
    if node.op_type == "Where":
        if node.inputs[2] is not shares or shape_of(output) != shape:
            return None
        known = array_of(node.inputs[0])
        zero_rows = known is None or bool(known.any())
        if zero_rows and not (_is_zero(node.inputs[1]) and _marks_empty(node, shares, masks)):
            return None
    elif node.op_type not in _MOVES - {"Transpose"} or step_of(output) is None:
        return None
    found = _mixing(output, masks)
    if found is None or shape_of(output)[-2:] != shape[-2:]:
        return None
    return replace(found, shapes=(*found.shapes, shape), zero_rows=found.zero_rows or zero_rows)


def _without_nan(shares: ir.Value) -> ir.Node | None:
    """Return the Where that alone reads a value, and whether it is NaN."""
    users = [user for user, _ in shares.uses()]
    if shares.is_graph_output() or sorted(user.op_type for user in users) != ["IsNaN", "Where"]:
        return None
    return next(user for user in users if user.op_type == "Where")


def _marks_empty(node: ir.Node, shares: ir.Value, masks: Sequence[Mask]) -> bool:
    """Tell whether a Where chooses rows without a finite score: by NaN, or by the only mask."""
    test = node.inputs[0].producer() if node.inputs[0] is not None else None
    if test is None:
        return False
    if test.op_type == "IsNaN":
        return test.inputs[0] is shares
    if test.op_type != "Equal" or len(masks) != 1 or masks[0].fill is not None:
        return False
    number, largest = array_of(test.inputs[1]), test.inputs[0]
    reduced = largest.producer() if largest is not None else None
    if number is None or number.size != 1 or number.ravel()[0] != -math.inf or reduced is None:
        return False
    if reduced.op_type != "ReduceMax" or reduced.inputs[0] is not masks[0].value:
        return False
    given = reduced.attributes.get_ints("axes", []) or array_of(reduced.inputs[1])
    rank = len(shape_of(masks[0].value))
    kept = reduced.attributes.get_int("keepdims", 1) == 1
    return kept and given is not None and [int(axis) % rank for axis in given] == [rank - 1]


def _batch_and_heads(shapes: Sequence[Shape]) -> tuple[int, int] | None:
    """Return the two batch axes of scores; None where there are more."""
    batches = [[size for size in shape[:-2] if size > 1] for shape in shapes]
    if len({math.prod(batch) for batch in batches}) > 1:
        return None
    finest = max(batches, key=len)
    if len(finest) > 2:
        return None
    batch, heads = [1] * (2 - len(finest)) + finest
    return batch, heads


def _operand(
    product: ir.Node, index: int, heads: Shape, accepts: Callable[[View], bool]
) -> View | None:
    """Return the farthest acceptable view of an operand as `[batch, heads, …]`."""
    value, batch = product.inputs[index], shape_of(product.outputs[0])[:-2]
    if value is None or not is_float(value) or len(shape_of(value)) < 2:
        return None
    if math.prod(shape_of(value)[:-2]) == math.prod(batch):  # nothing to broadcast
        value = _regrouped(value, heads)
        batch = shape_of(value)[:-2]
    for view in reversed(origins(value)):
        whole = view.broadcast((*batch, *view.shape[-2:]))
        whole = None if whole is None else whole.reshaped((*heads, *view.shape[-2:]))
        if whole is not None and accepts(whole):
            return whole
    return None


def _regrouped(value: ir.Value, heads: Shape) -> ir.Value:
    """Return a value in front of a reshape that joins batch and heads, which is no view of it."""
    node = value.producer()
    if node is None or not _is(node, "Reshape") or node.inputs[0] is None:
        return value
    source, kept = node.inputs[0], shape_of(value)[-2:]
    return source if is_float(source) and shape_of(source) == (*heads, *kept) else value


def _output(value: ir.Value, shape: Shape) -> tuple[ir.Value, Shape] | None:
    """Find the last value that a kernel can write in place of `value` by choosing its strides.

    Args:
        value: the product with V.
        shape: batch, heads, queries, width.
    """
    user = sole_user(value)
    if user is not None and _is(user, "Reshape") and shape_of(user.outputs[0]) == shape:
        value = user.outputs[0]  # batch and heads were one axis
    best, furthest = None, -1
    for order in itertools.permutations(range(3)):
        permuted = View(value, 0, shape, contiguous(shape)).transposed((*order, 3)).shape
        strides = View(value, 0, permuted, contiguous(permuted)).transposed(_inverse(order)).strides
        view = View(value, 0, shape, strides).reshaped(shape_of(value))
        current, distance = value, 0
        while view is not None:
            if view.is_contiguous and distance > furthest:
                best, furthest = (current, strides[:3]), distance
            user = sole_user(current)
            if user is None or user.op_type not in _MOVES or user.inputs[0] is not current:
                break
            current, distance = user.outputs[0], distance + 1
            step = step_of(current)
            view = None if step is None else step(view)
    return best


def _inverse(order: Sequence[int]) -> Shape:
    return (*(list(order).index(axis) for axis in range(3)), 3)


def _replace(match: _Match, graph: ir.Graph, masks: MaskBuilder) -> None:
    """Put an `Attention` node where the output is made; what made it before stays without use."""
    last, old = match.output.producer(), match.output
    assert last is not None
    sizes = (*match.query.shape, match.key.shape[3], match.value.shape[3])
    attributes: dict[str, Any] = {
        "sizes": sizes,
        "query": place_of(match.query, 2, 3),
        "key": place_of(match.key, 3, 2),
        "value": place_of(match.value, 2, 3),
        "output": match.strides,
        "scale": match.scale,
        "zero_rows": int(match.zero_rows),
    }
    inputs = [match.query.source, match.key.source, match.value.source]
    if match.mask is not None:
        attributes["mask"] = place_of(match.mask, 2, 3)
        inputs.append(masks.build(match.masks, match.mask, last))
    node = ir.Node(
        DOMAIN,
        "Attention",
        inputs,
        ir.convenience.convert_attributes(attributes),
        name=match.label,
        outputs=[ir.Value(name=old.name, shape=old.shape, type=old.type)],
    )
    ir.convenience.replace_nodes_and_values(graph, last, [last], [node], [old], list(node.outputs))


def _is(node: ir.Node, op_type: str) -> bool:
    return node.op_type == op_type and node.domain in ("", "ai.onnx")


def _is_zero(value: ir.Value | None) -> bool:
    array = array_of(value)
    return array is not None and array.size == 1 and not array.any()
