from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.calibration.base import CalibrationError, Samples
from edgepress.passes import _moments
from edgepress.passes._moments import (
    input_moments,
    is_layer,
    is_weighted,
    moments_bytes,
    patches,
    spread,
    with_ones,
)
from edgepress.passes._shapes import refresh_shapes
from edgepress.passes.base import Context, PassRefused
from tests.graphs import Array, answers, net, random

# Patches ------------------------------------------------------------------------------------------


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[ir.Model, Array]:
    """A Conv of one to three axes with whatever attributes fit, and an input."""
    axes = draw(st.integers(1, 3))

    def each(low: int, high: int) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=axes, max_size=axes))

    padding = draw(st.sampled_from(["pads", "VALID", "SAME_UPPER", "SAME_LOWER", "none"]))
    kernel, strides = each(1, 3), each(1, 3)
    # onnxruntime has no dilation with these
    dilations = [1] * axes if padding.startswith("SAME") else each(1, 2)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    extents = [r + more for r, more in zip(reach, each(0, 4), strict=True)]
    group, per_group, outputs = draw(st.tuples(*[st.integers(1, 3)] * 3))
    batch = draw(st.integers(1, 2))
    given_attributes = f"strides={strides}, dilations={dilations}, group={group}"
    if padding == "pads":
        given_attributes += f", pads={each(0, 2) + each(0, 2)}"
    elif padding != "none":
        given_attributes += f', auto_pad="{padding}"'
    channels = group * per_group
    dims = ",".join(map(str, (batch, channels, *extents)))
    weight = random(group * outputs, per_group, *kernel)
    out = "N," * (axes + 1) + "N"
    model = net(
        f"(float[{dims}] x) => (float[{out}] y)", f"y = Conv <{given_attributes}> (x, w)",
        {"w": weight},
    )  # fmt: skip
    return model, random(batch, channels, *extents, seed=1)


@given(made=convolutions())
@settings(deadline=None, max_examples=80)
def test_weights_times_patches_are_what_a_convolution_computes(
    made: tuple[ir.Model, Array],
) -> None:
    model, x = made
    (node,) = model.graph
    (want,) = answers(model, {"x": x})
    found = patches(node, x)
    groups, positions, columns = found.shape
    weight = node.inputs[1].const_value.numpy()  # type: ignore[union-attr]
    assert found.dtype == np.float32
    assert groups == node.attributes.get_int("group", 1)
    assert positions == want.shape[0] * math.prod(want.shape[2:])
    assert moments_bytes(node) == 8 * groups * (columns + 1) ** 2
    got = weight.reshape(groups, -1, columns) @ found.swapaxes(1, 2)
    got = got.reshape(want.shape[1], want.shape[0], *want.shape[2:]).swapaxes(0, 1)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("upper", "pads"), [(True, [1, 1, 2, 1]), (False, [2, 1, 1, 1])])
def test_automatic_padding_counts_dilations(upper: bool, pads: list[int]) -> None:
    """6 rows in steps of 2 with a reach of 5 lack 3; 5 columns with a reach of 3 lack 2."""
    kind = "SAME_UPPER" if upper else "SAME_LOWER"
    shared = "strides=[2,1], dilations=[2,2]"
    signature, w = "(float[1,2,6,5] x) => (float[N,M,K,L] y)", random(3, 2, 3, 2)
    x = random(1, 2, 6, 5, seed=1)
    automatic, explicit = (
        patches(next(iter(net(signature, f"y = Conv <{a}, {shared}> (x, w)", {"w": w}).graph)), x)
        for a in (f'auto_pad="{kind}"', f"pads={pads}")
    )
    assert automatic.shape == (1, 15, 12)
    np.testing.assert_array_equal(automatic, explicit)


@pytest.mark.parametrize(
    ("shapes", "body"),
    [
        (((5, 3), (3, 4)), "y = Gemm(x, w)"),
        (((5, 3), (4, 3)), "y = Gemm <transB=1> (x, w)"),
        (((3, 5), (3, 4)), "y = Gemm <transA=1> (x, w)"),
        (((3, 5), (4, 3)), "y = Gemm <transA=1, transB=1> (x, w)"),
        (((5, 3), (3, 4)), "y = MatMul(x, w)"),
        (((2, 5, 3), (3, 4)), "y = MatMul(x, w)"),
        (((3,), (3, 4)), "y = MatMul(x, w)"),
    ],
)
def test_weights_times_patches_are_what_a_dense_layer_computes(
    shapes: tuple[tuple[int, ...], ...], body: str
) -> None:
    dims = ",".join(map(str, shapes[0]))
    out = ",".join("N" * max(len(shapes[0]), 1))
    model = net(f"(float[{dims}] x) => (float[{out}] y)", body, {"w": random(*shapes[1])})
    (node,) = model.graph
    x = random(*shapes[0], seed=1)
    (want,) = answers(model, {"x": x})
    (found,) = patches(node, x)
    weight = random(*shapes[1])
    got = found @ (weight.T if node.attributes.get_int("transB", 0) else weight)
    np.testing.assert_allclose(got, want.reshape(-1, want.shape[-1]), rtol=1e-5, atol=1e-6)


@given(made=convolutions(), limit=st.integers(1, 9))
@settings(deadline=None, max_examples=30)
def test_a_limit_looks_at_some_of_the_positions(made: tuple[ir.Model, Array], limit: int) -> None:
    model, x = made
    (node,) = model.graph
    every = patches(node, x)
    some = patches(node, x, limit)
    np.testing.assert_array_equal(some, every[:, spread(every.shape[1], limit)])


@given(total=st.integers(1, 3000), limit=st.integers(1, 600))
@settings(deadline=None, max_examples=100)
def test_positions_are_spread_evenly(total: int, limit: int) -> None:
    found = spread(total, limit)
    assert (np.diff(found) > 0).all()
    assert found[0] >= 0
    assert found[-1] < total
    if total <= limit:
        np.testing.assert_array_equal(found, np.arange(total))
    elif total >= 2 * limit:
        borders = np.arange(limit + 1) * total / limit
        assert (found >= np.floor(borders[:-1])).all()
        assert (found < borders[1:]).all()
    else:
        assert limit / 2 <= len(found) <= limit


def test_positions_of_an_image_fall_into_all_of_its_columns() -> None:
    columns = spread(64 * 64, 512) % 64
    assert len(set(columns.tolist())) == 64


def test_a_one_is_appended_for_the_bias() -> None:
    found = with_ones(random(2, 3, 4))
    assert found.shape == (2, 3, 5)
    assert found.dtype == np.float32
    assert (found[..., -1] == 1).all()
    np.testing.assert_array_equal(found[..., :-1], random(2, 3, 4))


# Layers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        ("y = Conv(x, w)", True),
        ("y = Conv <group=2> (x, half)", True),
        ("y = MatMul(x, square)", True),
        ("y = MatMul(square, x)", False),
        ("y = MatMul(x, x)", False),
        ("y = MatMul(x, deep)", False),
        ("y = Relu(x)", False),
        ("y = Mul(x, w)", False),
    ],
)
def test_layers_have_constant_weights_on_the_right(body: str, answer: bool) -> None:
    weights = {
        "w": random(4, 4, 1, 1),
        "half": random(4, 2, 1, 1),
        "square": random(4, 4),
        "deep": random(1, 4, 4, 4),
    }
    model = net("(float[1,4,4,4] x) => (float[N,M,K,L] y)", body, weights)
    (node,) = model.graph
    assert is_weighted(node) == answer
    assert is_layer(node) == answer


def test_integers_and_hidden_weights_are_no_layers() -> None:
    signature = "(float[3,4] x) => (float[N,M] y)"
    (hidden,) = net(signature, "y = Gemm <alpha=0.0> (x, w)", {"w": random(4, 2)}).graph
    assert not is_weighted(hidden)
    integers = "(int32[3,4] x) => (int32[N,M] y)"
    (whole,) = net(integers, "y = MatMul(x, w)", {"w": np.ones((4, 2), np.int32)}).graph
    assert not is_weighted(whole)


def test_a_layer_of_too_many_inputs_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    (node,) = net("(float[3,4] x) => (float[3,2] y)", "y = MatMul(x, w)", {"w": random(4, 2)}).graph
    monkeypatch.setattr(_moments, "LAYER_BYTES", moments_bytes(node))
    assert is_layer(node)
    monkeypatch.setattr(_moments, "LAYER_BYTES", moments_bytes(node) - 1)
    assert not is_layer(node)
    assert is_weighted(node)


# Moments ------------------------------------------------------------------------------------------

SIGNATURE = "(float[1,4,6,6] x) => (float[1,5] y)"
BODY = """
a = Conv <pads=[1,1,1,1]> (x, w1)
b = Relu(a)
c = Conv <group=2> (b, w2)
d = Conv <strides=[2,2]> (b, w3)
m = GlobalAveragePool(c)
f = Flatten(m)
y = Gemm <transB=1> (f, w4)
"""
WEIGHTS = {
    "w1": random(6, 4, 3, 3),
    "w2": random(4, 3, 1, 1),
    "w3": random(2, 6, 3, 3),
    "w4": random(5, 4),
}


def made() -> ir.Model:
    model = net(SIGNATURE, BODY, WEIGHTS)
    refresh_shapes(model)
    return model


def layers_of(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if is_layer(node)]


def samples(count: int = 7) -> Samples:
    return Samples({"x": random(count, 4, 6, 6) * 2 + 3})


def slow(model: ir.Model, node: ir.Node, given_samples: Samples, limit: int) -> tuple[Array, int]:
    """The moments by loops over samples, groups and positions."""
    tapped = model.clone()
    source = node.inputs[0].name  # type: ignore[union-attr]
    if source != "x":
        values = {v.name: v for n in tapped.graph for v in n.outputs}
        tapped.graph.outputs.clear()
        tapped.graph.outputs.append(values[source])
    total: Any = 0
    count = 0
    for sample in given_samples.inputs["x"]:
        x = sample[None] if source == "x" else answers(tapped, {"x": sample[None]})[0]
        found = patches(node, x, limit).astype(np.float64)
        outer = [
            sum(np.outer(v, v) for v in ([*p, 1.0] for p in group)) for group in found
        ]  # per group
        total = total + np.array(outer)
        count += found.shape[1]
    return total / count, count


@pytest.mark.parametrize("budget", [1, 3000, 2**23])
def test_moments_are_the_mean_of_outer_products(
    budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where patches wait to be multiplied together, and layers come in several batches."""
    monkeypatch.setattr(_moments, "PATCH_BYTES", budget)
    monkeypatch.setattr(_moments, "BATCH_BYTES", 3000 if budget == 3000 else 2**29)
    monkeypatch.setattr(_moments, "POSITIONS", 9)
    model = made()
    layers = layers_of(model)
    assert len(layers) == 4
    done: list[tuple[str, int, int]] = []
    context = Context(progress=lambda *step: done.append(step))
    got = list(input_moments("p", model, layers, samples(), context))
    assert [node for node, _ in got] == layers
    for node, moments in got:
        second, count = slow(model, node, samples(), 9)
        assert moments.count == count
        assert moments.second.dtype == np.float64
        np.testing.assert_allclose(moments.second, second, rtol=1e-5, atol=1e-6)
    # some layers' moments alone are larger than 3000 bytes
    assert done[-1] == ("measure moments", done[-1][2], done[-1][2])
    assert len(done) == (28 if budget == 3000 else 7)


def test_a_small_variance_beside_a_large_mean_is_kept() -> None:
    """In float32 it would drown."""
    model = net("(float[1,2] x) => (float[1,2] y)", "y = MatMul(x, w)", {"w": random(2, 2)})
    data = (random(500, 2) + 4000).astype(np.float32)
    ((_, moments),) = input_moments("p", model, list(model.graph), Samples({"x": data}), Context())
    second = moments.second[0]
    got = second[:2, :2] - np.outer(second[2, :2], second[2, :2])
    np.testing.assert_allclose(got, np.cov(data.T.astype(np.float64), bias=True), atol=1e-6)


def test_samples_that_do_not_fit_are_refused() -> None:
    model = made()
    layers = layers_of(model)

    def refusal(given_samples: Samples) -> str:
        with pytest.raises(PassRefused) as caught:
            list(input_moments("low-rank", model, layers, given_samples, Context()))
        assert str(caught.value).startswith("low-rank: ")
        return str(caught.value)

    assert "there are none; give some with --calib" in refusal(Samples({}))
    assert "there are none" in refusal(Samples({"x": np.zeros((0, 4, 6, 6), np.float32)}))
    text = refusal(Samples({"image": random(2, 4, 6, 6)}, source="cats.npz"))
    assert "input 'x': cats.npz has none for this input, only for image" in text
    text = refusal(Samples({"x": random(2, 4, 6, 5)}, source="cats.npz"))
    assert "a sample in cats.npz is [4, 6, 5], the model reads [1, 4, 6, 6]" in text
    poisoned = samples(3).inputs["x"].copy()
    poisoned[1, 0, 0, 0] = np.nan
    with pytest.raises(CalibrationError, match="'x' is NaN in sample 1"):
        list(input_moments("low-rank", model, layers, Samples({"x": poisoned}), Context()))
    assert "onnxruntime cannot run the model" in refusal(
        Samples({"x": samples(1).inputs["x"].astype(np.float64)})
    )


def test_a_model_without_fixed_shapes_is_refused() -> None:
    model = net("(float[N,2] x) => (float[N,2] y)", "y = MatMul(x, w)", {"w": random(2, 2)})
    with pytest.raises(PassRefused, match=r"p: input 'x': its shape \[N,2\] is not fixed"):
        list(input_moments("p", model, list(model.graph), Samples({"x": random(1, 2)}), Context()))
