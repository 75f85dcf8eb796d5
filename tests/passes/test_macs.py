from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.passes._channel_axes import Axes
from edgepress.passes._channels import analyse, cut
from edgepress.passes._macs import macs_after, node_macs
from edgepress.passes.base import refresh_shapes
from tests.graphs import Array, answers, feeds, net, random
from tests.passes.channel_nets import BLOCKS, Attention, Block, cnn, transformer
from tests.passes.channel_oracle import choose

NOTHING = np.empty(0, np.int64)


def products(model: ir.Model) -> float:
    """Count the products of a model with one layer by their sum: all factors are 1."""
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        ones = np.ones(value.const_value.shape.numpy(), np.float32)
        value.const_value = ir.tensor(ones, name=value.name)
    feed = {name: np.ones_like(array) for name, array in feeds(model).items()}
    return float(answers(model, feed)[0].sum())


@pytest.mark.parametrize(
    ("body", "x", "w", "y"),
    [
        ("y = Conv(x, w)", (1, 4, 5, 6), (8, 4, 3, 2), (1, 8, 3, 5)),
        ("y = Conv <strides=[2, 2], group=2> (x, w)", (2, 4, 5, 7), (6, 2, 3, 3), (2, 6, 2, 3)),
        ("y = Conv <group=4> (x, w)", (1, 4, 5, 5), (8, 1, 3, 3), (1, 8, 3, 3)),
        ("y = ConvTranspose(x, w)", (1, 4, 3, 3), (4, 5, 2, 2), (1, 5, 4, 4)),
        ("y = ConvTranspose <group=2> (x, w)", (1, 4, 3, 3), (4, 3, 2, 2), (1, 6, 4, 4)),
        ("y = Gemm <transB=1> (x, w)", (3, 4), (5, 4), (3, 5)),
        ("y = Gemm <transA=1> (x, w)", (4, 3), (4, 5), (3, 5)),
        ("y = MatMul(x, w)", (2, 3, 4), (4, 5), (2, 3, 5)),
        ("y = MatMul(w, x)", (2, 4, 3), (5, 4), (2, 5, 3)),
        ("y = MatMul(x, w)", (3, 4), (4,), (3,)),
    ],
)
def test_macs_are_the_products_that_are_summed(
    body: str, x: tuple[int, ...], w: tuple[int, ...], y: tuple[int, ...]
) -> None:
    lists = (",".join(map(str, shape)) for shape in (x, y))
    model = net("(float[{}] x) => (float[{}] y)".format(*lists), body, {"w": random(*w)})
    refresh_shapes(model, "test")
    assert node_macs(model.graph[0]) == products(model)


def test_other_operators_have_no_macs() -> None:
    model = net("(float[1,4] x) => (float[1,4] y)", "y = Relu(x)")
    assert node_macs(model.graph[0]) == 0
    model.graph[0].op_type, model.graph[0].domain = "MatMul", "com.example"
    assert node_macs(model.graph[0]) == 0


def assert_counted(model: ir.Model, axes: Axes, seed: int) -> None:
    count = macs_after(model, axes)
    assert count(NOTHING) == sum(map(node_macs, model.graph))
    cuts = choose(axes, np.random.default_rng(seed))
    counted: Array = np.array(sorted(cuts), np.int64)
    expected = count(counted)
    cut(model, axes, cuts)
    refresh_shapes(model, "test")
    assert expected == pytest.approx(sum(map(node_macs, model.graph)), rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(blocks=st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=5), seed=st.integers(0, 2**16))
def test_macs_after_a_cut_are_those_of_the_cut_model(blocks: list[Block], seed: int) -> None:
    model = cnn(blocks, seed)
    assert_counted(model, analyse(model), seed)


@pytest.mark.parametrize("attention", ["separate", "grouped"])
def test_macs_after_a_cut_of_a_transformer(attention: Attention) -> None:
    for seed in range(3):
        model = transformer(attention, seed)
        assert_counted(model, analyse(model), seed)


def test_a_model_without_layers_has_no_macs() -> None:
    model = net("(float[1,4] x) => (float[1,4] y)", "y = Relu(x)")
    refresh_shapes(model, "test")
    assert macs_after(model, analyse(model))(NOTHING) == 0
