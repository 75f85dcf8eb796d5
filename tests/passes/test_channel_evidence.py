from __future__ import annotations

import json
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest

from edgepress.calibration.base import Samples
from edgepress.calibration.importance.base import GroupEvidence, Importance
from edgepress.passes._channel_axes import Group
from edgepress.passes._channel_evidence import collect
from edgepress.passes._channels import analyse
from edgepress.passes.base import Context
from edgepress.passes.fold_batch_norm import GAMMA
from tests.graphs import Array, answers, weight
from tests.passes import channel_nets as nets
from tests.passes.channel_nets import Builder, cnn, transformer

COUNT = 3


class Wish(Importance):
    """An importance that needs everything."""

    needs: ClassVar[frozenset[str]] = frozenset({"gammas", "contributions", "first_order"})

    def score(self, group: GroupEvidence) -> Array:
        return np.zeros(group.channels)


class Contributions(Wish):
    needs: ClassVar[frozenset[str]] = frozenset({"contributions"})


class Gammas(Wish):
    needs: ClassVar[frozenset[str]] = frozenset({"gammas"})


class Gradients(Wish):
    needs: ClassVar[frozenset[str]] = frozenset({"first_order"})


def samples(model: ir.Model) -> Samples:
    (value,) = model.graph.inputs
    assert value.shape is not None
    shape = (COUNT, *value.shape.numpy()[1:])
    rng = np.random.default_rng(7)
    if value.dtype == ir.DataType.INT64:
        return Samples({"x": rng.integers(0, 7, shape)})
    return Samples({"x": rng.standard_normal(shape).astype(np.float32)})


def gather(model: ir.Model, wish: Importance, seed: int = 0) -> list[tuple[Group, GroupEvidence]]:
    groups = [group for group in analyse(model).groups() if len(group.free)]
    context = Context(samples=samples(model))
    return list(zip(groups, collect("test", model, groups, wish, context, seed), strict=True))


def run(model: ir.Model, sample: int) -> list[Array]:
    return answers(model, {"x": samples(model).inputs["x"][sample : sample + 1]})


def scaled(model: ir.Model, group: Group, place: int, factor: float) -> ir.Model:
    """The model whose layers read one channel of a group times a factor."""
    result = model.clone()
    by_name = {node.name: node for node in result.graph}
    for member in group.readers:
        node = by_name[member.node.name]
        x = node.inputs[0]
        assert x is not None
        assert x.shape is not None
        _scale_input(result.graph, node, x, member.elements == group.channels[place], factor)
    return result


def _scale_input(graph: ir.Graph, node: ir.Node, x: ir.Value, chosen: Array, factor: float) -> None:
    dense = node.op_type in ("Gemm", "MatMul")
    array = np.where(chosen, np.float32(factor), np.float32(1))
    array = array if dense else array.reshape(-1, 1, 1)
    name = f"{node.name}_factors"
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    product = ir.node("Mul", [x, value])
    product.outputs[0].name = f"{name}_product"
    graph.insert_before(node, product)
    node.replace_input_with(0, product.outputs[0])


def slow_contributions(model: ir.Model, group: Group) -> Array:
    """Measure what each channel adds to the outputs of its readers, by masking it."""
    names = list(dict.fromkeys(member.node.name for member in group.readers))
    result = np.zeros((len(group.channels),) * 2)
    for name in names:
        added: list[Array] = []
        total = 0.0
        for sample in range(COUNT):
            whole = _output(model, str(name), sample)
            parts = [
                whole - _output(scaled(model, group, place, 0.0), str(name), sample)
                for place in range(len(group.channels))
            ]
            added.append(np.stack(parts).reshape(len(parts), -1))
            # of the channels of this group alone, which are all that these layers read
            total += float(np.square(added[-1].sum(axis=0)).sum())
        z = np.concatenate(added, axis=1)
        result += z @ z.T / total
    return result


def _output(model: ir.Model, name: str, sample: int) -> Array:
    copy = model.clone()
    node = next(node for node in copy.graph if node.name == name)
    copy.graph.outputs.clear()
    copy.graph.outputs.append(node.outputs[0])
    return run(copy, sample)[0].astype(np.float64)


def two_readers(b: Builder) -> str:
    """Channels that a 3x3 and a strided convolution read, the first in two groups."""
    x = b.op("Sigmoid", [b.conv("x", 3, 6)])
    one = b.op("Tanh", [b.conv(x, 6, 8, 3, group=2)])
    bias = b.weight(8)
    other = b.op("Conv", [x, b.weight(8, 6, 2, 2), bias], strides=[5, 5], dilations=[2, 2])
    y = b.op("Mul", [b.op("GlobalAveragePool", [one]), b.op("GlobalMaxPool", [other])])
    return _number(b, b.op("Flatten", [y]), 8)


def dense(b: Builder) -> str:
    """A flattened image, and a hidden layer behind it."""
    x = b.op("Flatten", [b.op("Sigmoid", [b.conv("x", 3, 5)])])
    x = b.op("Gemm", [x, b.weight(7, 180), b.weight(7)], transB=1, alpha=0.25)
    return _number(b, b.op("Tanh", [x]), 7)


def dense_beside(b: Builder) -> str:
    """The same channels read by layers of another scale."""
    x = b.op("Sigmoid", [b.op("Flatten", [b.op("GlobalAveragePool", [b.conv("x", 3, 5)])])])
    one = b.op("Gemm", [x, b.weight(5, 4)], alpha=4.0)
    return _number(b, b.op("Tanh", [b.op("Add", [one, b.op("MatMul", [x, b.weight(5, 4)])])]), 4)


def linear(b: Builder) -> str:
    x = b.op("Flatten", [b.op("AveragePool", [b.conv("x", 3, 4)], kernel_shape=[6, 6])])
    return _number(b, b.op("Gemm", [x, b.weight(4, 3), b.weight(3)]), 3)


def _number(b: Builder, x: str, c: int) -> str:
    """A single number as output, whose only projections are itself and its negative."""
    return str(b.op("MatMul", [x, b.weight(c, 1)]))


NETS = [two_readers, dense, dense_beside]


def built(write: Callable[[Builder], str], seed: int = 0) -> ir.Model:
    b = Builder(seed)
    return b.model((1, 3, 6, 6), write(b))


@pytest.mark.parametrize("write", NETS, ids=lambda write: write.__name__)
def test_contributions_are_what_masking_a_channel_changes(
    write: Callable[[Builder], str],
) -> None:
    model = built(write)
    for group, found in gather(model, Contributions()):
        assert found.contributions is not None
        expected = slow_contributions(model, group)
        # float32 in onnxruntime, and differences of outputs
        tolerance = 1e-4 * float(np.abs(expected).max())
        np.testing.assert_allclose(found.contributions, expected, rtol=0, atol=tolerance)


def test_contributions_of_heads_and_hidden_units() -> None:
    model = transformer("separate", 0)
    _, *others = gather(model, Contributions())
    for group, found in others:
        assert found.contributions is not None
        expected = slow_contributions(model, group)
        tolerance = 1e-4 * float(np.abs(expected).max())
        np.testing.assert_allclose(found.contributions, expected, rtol=0, atol=tolerance)


def test_contributions_of_one_reader_add_up_to_its_outputs() -> None:
    for group, found in gather(built(dense), Contributions()):
        assert len(group.readers) == 1
        assert found.contributions is not None
        assert found.contributions.sum() == pytest.approx(1)


def slow_change(model: ir.Model, group: Group, sample: int) -> Array:
    """The change of the output per share of a channel that is removed, by central differences."""
    step = 2.0**-6
    ends = [
        [
            run(scaled(model, group, place, factor), sample)[0].item()
            for place in range(len(group.channels))
        ]
        for factor in (1 - step, 1 + step)
    ]
    less, more = np.array(ends)
    return np.asarray((less - more) / (2 * step))


@pytest.mark.parametrize("write", [*NETS, linear], ids=lambda write: write.__name__)
def test_first_order_changes_are_the_slope_of_masking(write: Callable[[Builder], str]) -> None:
    model = built(write)
    for group, found in gather(model, Gradients()):
        assert found.first_order is not None
        assert found.first_order.shape == (COUNT, len(group.channels))
        for sample, change in enumerate(found.first_order):
            expected = slow_change(model, group, sample)
            # the output is projected onto 1 or -1
            sign = np.sign(change @ expected)
            tolerance = 3e-3 * float(np.abs(expected).max())
            np.testing.assert_allclose(sign * change, expected, rtol=0, atol=tolerance)


def test_a_linear_model_changes_by_its_first_order() -> None:
    model = built(linear)
    group, found = gather(model, Gradients())[0]
    assert found.first_order is not None
    for sample, change in enumerate(found.first_order):
        whole = run(model, sample)[0].item()
        masked = [run(scaled(model, group, c, 0.0), sample)[0].item() for c in range(4)]
        expected = np.array(masked) - whole
        np.testing.assert_allclose(np.abs(change), np.abs(expected), rtol=1e-4, atol=1e-6)


def test_every_sample_has_a_projection_that_the_seed_decides() -> None:
    model = cnn([nets.plain], 0)
    one, same, other = (gather(model, Gradients(), seed)[1][1] for seed in (1, 1, 2))
    assert one.first_order is not None
    assert same.first_order is not None
    assert other.first_order is not None
    np.testing.assert_array_equal(one.first_order, same.first_order)
    assert not np.allclose(np.abs(one.first_order), np.abs(other.first_order))


def test_only_what_is_needed_is_collected() -> None:
    model = cnn([nets.plain], 0)
    _, found = gather(model, Gammas())[0]
    assert found.contributions is None
    assert found.first_order is None
    assert [evidence.seed for _, evidence in gather(model, Gammas(), 5)] == [5, 6, 7]


@pytest.mark.parametrize("wish", [Contributions(), Gradients()])
def test_channels_that_no_layer_reads_are_not_guessed(wish: Importance) -> None:
    def write(b: Builder) -> str:
        parts = b.op("Split", [b.conv("x", 3, 8), b.ints(4, 4)], outputs=2, axis=1)
        up = b.op("ConvTranspose", [parts[1], b.weight(4, 2, 1, 1)])
        return str(b.op("Add", [b.conv(parts[0], 4, 2), up]))

    ((_, found),) = gather(built(write), wish)
    assert found.contributions is None
    assert found.first_order is None


def rows(group: Group, weights: list[Array], axes: list[int]) -> list[Array]:
    """Gather the weights of every channel, one by one."""
    result = []
    for member, array, axis in zip(group.producers, weights, axes, strict=True):
        lines = [
            np.concatenate(
                [
                    np.take(array, i, axis).ravel()
                    for i in np.flatnonzero(member.channels == channel)
                ]
                or [np.empty(0)]
            )
            for channel in group.channels
        ]
        longest = max(len(line) for line in lines)
        result.append(np.stack([np.pad(line, (0, longest - len(line))) for line in lines]))
    return result


def test_rows_are_the_weights_of_a_channel() -> None:
    model = transformer("fused", 0)
    _, (heads, found), _ = gather(model, Gammas())
    weights = [weight(model, str(member.weight.name)) for member in heads.producers]
    for got, expected in zip(found.producers, rows(heads, weights, [1, 1]), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert [array.shape for array in found.producers] == [(4, 18 * 24), (4, 3)]


def test_rows_of_layers_side_by_side_have_zeros_for_the_channels_of_others() -> None:
    model = cnn([nets.concat_residual], 0)
    group, found = gather(model, Gammas())[1]
    weights = [weight(model, str(member.weight.name)) for member in group.producers]
    for got, expected in zip(found.producers, rows(group, weights, [0, 0, 0]), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert not found.producers[0][6:].any()
    assert found.producers[0][:6].all()


@pytest.mark.parametrize("axis", [0, -4])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_rows_of_quantized_weights_are_real_numbers(
    axis: int, zero: bool, per_channel: bool
) -> None:
    rng = np.random.default_rng(0)
    shape = (10,) if per_channel else ()

    def write(b: Builder) -> str:
        integers = b.constant(rng.integers(-127, 128, (10, 3, 1, 1)).astype(np.int8))
        scale = b.constant(rng.uniform(0.01, 0.02, shape).astype(np.float32))
        zeros = [b.constant(rng.integers(-9, 9, shape).astype(np.int8))] if zero else []
        made = b.op("DequantizeLinear", [integers, scale, *zeros], axis=axis)
        return b.conv(b.op("Conv", ["x", made]), 10, 2)

    model = built(write)
    ((_, found),) = gather(model, Gammas())
    copy = model.clone()
    copy.graph.outputs.clear()
    copy.graph.outputs.append(copy.graph[0].outputs[0])
    np.testing.assert_allclose(found.producers[0], run(copy, 0)[0].reshape(10, 3), rtol=1e-6)


def test_gammas_are_those_of_all_elements_of_a_channel() -> None:
    model = cnn([nets.depthwise], 0)
    group, before = gather(model, Gammas())[1]
    assert before.gammas == []
    first, second = group.layers
    first.metadata_props[GAMMA] = json.dumps(list(range(9)))
    _, one = gather(model, Gammas())[1]
    np.testing.assert_array_equal(one.gammas, [np.arange(9)])
    second.metadata_props[GAMMA] = json.dumps(list(range(18)))
    _, both = gather(model, Gammas())[1]
    np.testing.assert_array_equal(both.gammas[1], np.arange(18).reshape(9, 2).sum(axis=1))
    second.metadata_props[GAMMA] = json.dumps([1.0])  # of another width: not these channels'
    _, stale = gather(model, Gammas())[1]
    np.testing.assert_array_equal(stale.gammas, [np.arange(9)])


def test_gammas_of_some_channels_are_none() -> None:
    def write(b: Builder) -> str:
        x = b.op("Concat", [b.conv("x", 3, 4), b.conv("x", 3, 5)], axis=1)
        return b.conv(b.op("Add", [x, b.conv("x", 3, 9)]), 9, 2)

    model = built(write)
    convs = [node for node in model.graph if node.op_type == "Conv"]
    convs[0].metadata_props[GAMMA] = json.dumps([1.0] * 4)
    assert gather(model, Gammas())[0][1].gammas == []
    convs[1].metadata_props[GAMMA] = json.dumps([2.0] * 5)
    found = gather(model, Gammas())[0][1].gammas
    np.testing.assert_array_equal(found, [[1] * 4 + [0] * 5, [0] * 4 + [2] * 5])
