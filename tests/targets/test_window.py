import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edgepress.targets.lowering.window import (
    clip_bounds,
    global_window,
    overhangs,
    pool_factors,
    reduces_space,
    window_attributes,
)
from tests.graphs import answers, net, random
from tests.targets.qdq import shaped


def node_of(model: ir.Model) -> ir.Node:
    return next(iter(shaped(model).graph))


def pool(attributes: str, size: str = "6,7", op_type: str = "AveragePool") -> ir.Node:
    body = f"y = {op_type} <{attributes}> (x)"
    return node_of(net(f"(float[1,2,{size}] x) => (float y)", body, opset=19))


def test_clips() -> None:
    low, high = np.array(-1, np.float32), np.array([6], np.float32)
    weights = {"low": low, "high": high}
    model = net(
        "(float[3] x, float d) => (float[3] f)",
        "a = Relu(x) b = Clip(a, low, high) c = Clip(b, , high) e = Clip(c) f = Clip(e, d)",
        weights,
    )
    bounds = [clip_bounds(node) for node in model.graph]
    assert bounds == [(0, np.inf), (-1, 6), (-np.inf, 6), (-np.inf, np.inf), None]
    old = net("(float[3] x) => (float[3] y)", "y = Clip <min=0.5> (x)", opset=6)
    assert clip_bounds(next(iter(old.graph))) == (0.5, np.inf)


def test_defaults() -> None:
    node = pool("kernel_shape=[2,3]")
    wanted = {"kernel": [2, 3], "strides": [1, 1], "dilations": [1, 1], "pads": [0] * 4}
    assert window_attributes(node, [2, 3]) == wanted
    assert global_window((1, 2, 6, 7)) == {**wanted, "kernel": [6, 7]}


@pytest.mark.parametrize(
    ("text", "pads"),
    [
        ('auto_pad="SAME_UPPER"', [0, 1, 1, 1]),
        ('auto_pad="SAME_LOWER"', [1, 1, 0, 1]),
        ('auto_pad="VALID"', [0, 0, 0, 0]),
        ('auto_pad="SAME_UPPER", strides=[2,2]', [0, 1, 0, 1]),
        ('auto_pad="SAME_LOWER", strides=[3,3]', [0, 1, 0, 1]),
        ("pads=[1,2,0,1]", [1, 2, 0, 1]),
    ],
)
def test_automatic_pads(text: str, pads: list[int]) -> None:
    node = pool(f"kernel_shape=[2,3], {text}", op_type="MaxPool")
    assert window_attributes(node, [2, 3])["pads"] == pads


def test_overhanging_windows() -> None:
    kernel = "kernel_shape=[3,3], strides=[2,2]"
    assert not overhangs(pool(kernel, "6,7"))
    assert overhangs(pool(f"{kernel}, ceil_mode=1", "6,7"))
    assert not overhangs(pool(f"{kernel}, ceil_mode=1", "7,9"))
    assert not overhangs(pool(f"{kernel}, ceil_mode=1, pads=[0,0,1,0]", "6,7"))


@pytest.mark.parametrize(
    ("axes", "wanted"), [([2, 3], True), ([-1, -2], True), ([1, 2], False), ([2], False)]
)
def test_spatial_means(axes: list[int], wanted: bool) -> None:
    old = net("(float[1,2,3,4] x) => (float y)", f"y = ReduceMean <axes={axes}> (x)")
    assert reduces_space(next(iter(old.graph))) == wanted
    weights = {"axes": np.array(axes)}
    new = net("(float[1,2,3,4] x) => (float y)", "y = ReduceMean(x, axes)", weights, opset=18)
    assert reduces_space(next(iter(new.graph))) == wanted


def test_means_over_everything_or_unknown_axes() -> None:
    everything = net("(float[1,2,3,4] x) => (float y)", "y = ReduceMean(x)")
    assert not reduces_space(next(iter(everything.graph)))
    text = "(float[1,2,3,4] x, int64[2] axes) => (float y)"
    assert not reduces_space(next(iter(net(text, "y = ReduceMean(x, axes)", opset=18).graph)))


SMALL = st.integers(1, 4)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    kernel=st.tuples(SMALL, SMALL),
    strides=st.tuples(SMALL, SMALL),
    dilations=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    pads=st.tuples(*[st.integers(0, 3)] * 4),
    include=st.booleans(),
)
def test_factors_count_what_onnx_averages(
    kernel: tuple[int, int],
    strides: tuple[int, int],
    dilations: tuple[int, int],
    pads: tuple[int, int, int, int],
    include: bool,
) -> None:
    for i in range(2):
        span = (kernel[i] - 1) * dilations[i] + 1
        assume(max(pads[i], pads[i + 2]) < kernel[i] and span <= 6 + pads[i] + pads[i + 2])
    attributes = (
        f"kernel_shape={list(kernel)}, strides={list(strides)}, dilations={list(dilations)}, "
        f"pads={list(pads)}, count_include_pad={int(include)}"
    )
    body = f"y = AveragePool <{attributes}> (x)"
    model = shaped(net("(float[1,1,6,6] x) => (float y)", body, opset=19))
    node, x = next(iter(model.graph)), random(1, 1, 6, 6)
    factors = pool_factors(node, window_attributes(node, list(kernel)))
    padded = np.pad(x[0, 0], ((pads[0], pads[2] + 9), (pads[1], pads[3] + 9)))
    rows, columns = (
        [np.arange(n)[:, None] * s + np.arange(k) * d for n, s, k, d in each]
        for each in (
            [(factors.shape[0], strides[0], kernel[0], dilations[0])],
            [(factors.shape[1], strides[1], kernel[1], dilations[1])],
        )
    )
    sums = padded[rows[0]][:, :, columns[0]].sum(axis=(1, 3))
    np.testing.assert_allclose(sums * factors, answers(model, {"x": x})[0][0, 0], atol=1e-5)
