"""The slow oracle for channel cuts: the original model with the channels masked everywhere."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from edgepress.passes._channel_axes import Axes
from edgepress.passes._channels import analyse, cut
from edgepress.passes.base import refresh_shapes
from tests.graphs import Array, answers, feeds, weight

_NORMS = ("LayerNormalization", "RMSNormalization")


def masked(model: ir.Model, axes: Axes, channels: set[int]) -> ir.Model:
    """Set every float that belongs to one of these channels to zero, wherever it is computed.

    A normalisation over such an axis is written out, with statistics over what remains.
    """
    found = {v.name: axes.channels_of(v) for node in model.graph for v in node.outputs}
    result = model.clone()
    for node in list(result.graph):
        for value in node.outputs:
            stays = mask_of(found[value.name], channels)
            if stays.all() or value.dtype != ir.DataType.FLOAT:
                continue
            if node.op_type in _NORMS:
                _write_out(result.graph, node, stays)
            else:
                _multiply(result.graph, node, value, stays)
    return result


def mask_of(found: list[Array | None], channels: set[int]) -> Array:
    """`[1, …, extent, …, 1]` products of the masks of all axes."""
    result = np.ones((1,) * len(found), bool)
    for place, axis in enumerate(found):
        if axis is not None:
            line = ~np.isin(axis, list(channels))
            result = result & line.reshape([-1 if i == place else 1 for i in range(len(found))])
    return result


def _constant(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value


def _multiply(graph: ir.Graph, node: ir.Node, value: ir.Value, stays: Array) -> None:
    mask = _constant(graph, f"{value.name}_mask", stays)
    zero = _constant(graph, f"{value.name}_zero", np.zeros((), np.float32))
    uses = tuple(value.uses())
    # no multiplication: what is masked may be infinite
    chosen = ir.node("Where", [mask, value, zero])
    chosen.outputs[0].name = f"{value.name}_masked"
    graph.insert_after(node, chosen)
    for user, index in uses:
        user.replace_input_with(index, chosen.outputs[0])


def _write_out(graph: ir.Graph, node: ir.Node, stays: Array) -> None:
    """`(x - mean) / sqrt(variance + epsilon) * scale + shift`, over what stays of the last axis."""
    x, scale, shift = (*node.inputs, None)[:3]
    name = node.outputs[0].name
    mask = _constant(graph, f"{name}_mask", stays.astype(np.float32))
    divisor = stays.sum(axis=-1, keepdims=True)
    share = _constant(graph, f"{name}_share", (1 / divisor).astype(np.float32))
    number = np.array(node.attributes.get_float("epsilon", 1e-5), np.float32)
    epsilon = _constant(graph, f"{name}_epsilon", number)
    last = _constant(graph, f"{name}_axis", np.array([-1], np.int64))
    made: list[ir.Node] = []

    def op(operator: str, *inputs: ir.Value | None) -> ir.Value:
        made.append(ir.node(operator, list(inputs)))
        made[-1].outputs[0].name = f"{name}_{len(made)}"
        return made[-1].outputs[0]

    kept = op("Mul", x, mask)
    if node.op_type == "LayerNormalization":
        mean = op("Mul", op("ReduceSum", kept, last), share)
        kept = op("Mul", op("Sub", x, mean), mask)
    variance = op("Mul", op("ReduceSum", op("Mul", kept, kept), last), share)
    result = op("Mul", op("Div", kept, op("Sqrt", op("Add", variance, epsilon))), scale)
    if shift is not None:
        result = op("Add", result, op("Mul", shift, mask))
    graph.insert_after(node, made)
    for user, index in tuple(node.outputs[0].uses()):
        user.replace_input_with(index, result)


def choose(axes: Axes, rng: np.random.Generator) -> set[int]:
    """Random free channels, so that at least one of every group and part stays."""
    cuts: set[int] = set()
    for group in axes.groups():
        free = group.free
        most = len(group.channels) - 1 if len(free) == len(group.channels) else len(free)
        count = int(rng.integers(0, most + 1))
        cuts |= set(rng.choice(free, count, replace=False).tolist()) if count else set()
    for part in axes.parts:
        if cuts.issuperset(part.tolist()):
            cuts.discard(int(part[0]))
    return cuts


def assert_pruned_equals_masked(model: ir.Model, seed: int) -> int:
    """Cut random channels; return how many."""
    axes = analyse(model)
    cuts = choose(axes, np.random.default_rng(seed))
    before, oracle = model.clone(), masked(model, axes, cuts)
    cut(model, axes, cuts)
    refresh_shapes(model, "test")
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    _assert_nothing_else_changed(before, model, axes, cuts)
    feed = feeds(model, seed)
    for got, expected in zip(answers(model, feed), answers(oracle, feed), strict=True):
        scale = float(np.abs(expected).max())
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * scale + 1e-8)
    return len(cuts)


#: Attributes that count channels.
_COUNTS = {"Conv": {"group"}, "ConvTranspose": {"group"}, "Split": {"num_outputs"}}
#: Inputs that count channels or number them.
_NUMBERS = {"Reshape": 1, "Expand": 1, "Split": 1, "Gather": 1, "Slice": 2, "Resize": 3}


def _assert_nothing_else_changed(
    before: ir.Model, after: ir.Model, axes: Axes, cuts: set[int]
) -> None:
    kept = {value.name: axes.channels_of(value) for value in after.graph.initializers.values()}
    for old, new in zip(before.graph, after.graph, strict=True):
        assert (new.name, new.op_type) == (old.name, old.op_type)
        assert [v.name for v in new.outputs] == [v.name for v in old.outputs]
        counts = _COUNTS.get(new.op_type, set())
        for name in (old.attributes.keys() | new.attributes.keys()) - counts:
            attribute, other = old.attributes[name], new.attributes[name]
            assert attribute.type == ir.AttributeType.GRAPH or attribute.value == other.value
        last = _NUMBERS.get(new.op_type, 0)
        for index, read in enumerate(new.inputs):
            numbers = 0 < index <= last and read is not None and read.is_initializer()
            assert numbers or _name(read) == _name(old.inputs[index])
    for name, value in before.graph.initializers.items():
        if name not in after.graph.initializers or value.dtype == ir.DataType.INT64:
            continue
        expected = weight(before, name)
        for place, axis in enumerate(kept[name]):
            assert axis is not None, "constants have channels on every axis"
            expected = np.compress(~np.isin(axis, list(cuts)), expected, axis=place)
        np.testing.assert_array_equal(weight(after, name), expected)
        assert after.graph.initializers[name].dtype == value.dtype
    was_given, given = (
        [*before.graph.inputs, *before.graph.outputs],
        [*after.graph.inputs, *after.graph.outputs],
    )
    for old_value, new_value in zip(was_given, given, strict=True):
        assert new_value.name == old_value.name
        assert (new_value.shape, new_value.dtype) == (old_value.shape, old_value.dtype)


def _name(value: ir.Value | None) -> str | None:
    return None if value is None else value.name
