from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from edgepress.calibration.base import Samples
from edgepress.passes import _curvature
from edgepress.passes._curvature import DAMPING, Curvature, output_curvature
from edgepress.passes._shapes import refresh_shapes
from edgepress.passes.base import Context, PassRefused
from tests.graphs import Array, answers, net, random, weight


def made(signature: str, body: str, **weights: Array) -> ir.Model:
    model = net(signature, body, weights)
    refresh_shapes(model)
    return model


def measured(model: ir.Model, inputs: Array, *names: str, seed: int = 0) -> Curvature:
    values = [model.graph.initializers[name] for name in names]
    context = Context(samples=Samples(inputs={"x": inputs}))
    return output_curvature("test", model, values, context, seed)


def undamped(found: Curvature, model: ir.Model, name: str) -> Array:
    """Take the share of the mean away that was added."""
    diagonal = found.diagonals[model.graph.initializers[name]]
    return np.asarray(diagonal - diagonal.mean() * DAMPING / (1 + DAMPING))


def slopes(model: ir.Model, name: str, x: Array) -> Array:
    """`Σ (∂y/∂w)²` over outputs, by central differences of what onnxruntime answers."""
    array = weight(model, name).astype(np.float32)
    result = np.zeros(array.shape)
    step = np.float32(2.0**-7)
    for index in np.ndindex(array.shape):
        found = []
        for sign in (1, -1):
            moved = array.copy()
            moved[index] += sign * step
            model.graph.initializers[name].const_value = ir.tensor(moved, name=name)
            found.append(answers(model, {"x": x})[0].astype(np.float64))
        result[index] = np.square((found[0] - found[1]) / (2 * float(step))).sum()
    model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    return result


def test_of_a_linear_layer_it_is_the_second_moment_of_the_input() -> None:
    model = made(
        "(float[1,4] x) => (float[1,3] y)",
        "y = Gemm<transB=1>(x, w, b)",
        w=random(3, 4),
        b=random(3),
    )
    x = random(10, 4)
    found = measured(model, x, "w", "b")
    expected = np.tile(np.square(x, dtype=np.float64).mean(axis=0), (3, 1))
    np.testing.assert_allclose(undamped(found, model, "w"), expected, rtol=1e-5)
    np.testing.assert_allclose(undamped(found, model, "b"), 1, rtol=1e-5)
    outputs = x.astype(np.float64) @ random(3, 4).T + random(3)
    assert found.energy == pytest.approx(np.square(outputs).sum(axis=1).mean(), rel=1e-5)


CNN = (
    "a = Conv<pads=[1,1,1,1], strides=[2,2]>(x, u, c) r = Sigmoid(a) "
    "d = ConvTranspose<group=2>(r, v) g = GlobalAveragePool(d) f = Flatten(g) y = MatMul(f, w)"
)
WEIGHTS: dict[str, Array] = {
    "u": random(4, 2, 3, 3), "c": random(4), "v": random(4, 2, 2, 2), "w": random(4, 1)
}  # fmt: skip


def test_of_one_output_it_is_the_mean_squared_gradient() -> None:
    model = made("(float[1,2,5,5] x) => (float[1,1] y)", CNN, **WEIGHTS)
    x = random(3, 2, 5, 5)
    found = measured(model, x, *WEIGHTS)
    for name in WEIGHTS:
        expected = np.mean([slopes(model, name, sample[None]) for sample in x], axis=0)
        np.testing.assert_allclose(
            undamped(found, model, name), expected, rtol=1e-2, atol=1e-3 * expected.max()
        )


def test_of_several_outputs_projections_estimate_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_curvature, "PROJECTIONS", 3000)
    model = made(
        "(float[1,3] x) => (float[1,5] y)", "h = MatMul(x, v) a = Tanh(h) y = MatMul(a, w)",
        v=random(3, 2), w=random(2, 5),
    )  # fmt: skip
    x = random(1, 3)
    found = measured(model, x, "v")
    np.testing.assert_allclose(undamped(found, model, "v"), slopes(model, "v", x), rtol=0.15)


def test_layers_that_share_a_weight_add_their_gradients() -> None:
    model = made("(float[1,1] x) => (float[1,1] y)", "a = MatMul(x, w) y = MatMul(a, w)",
                 w=np.array([[3]], np.float32))  # fmt: skip
    found = measured(model, np.array([[2]], np.float32), "w")
    # y = x w², so ∂y/∂w = 2 x w
    np.testing.assert_allclose(undamped(found, model, "w"), [[144]])


def test_order_of_samples_does_not_matter_but_the_seed_does() -> None:
    model = made(
        "(float[1,3] x) => (float[1,5] y)", "h = MatMul(x, v) a = Relu(h) y = MatMul(a, w)",
        v=random(3, 2), w=random(2, 5),
    )  # fmt: skip
    value, x = model.graph.initializers["v"], random(5, 3)
    first, turned, other = (
        measured(model, array, "v", seed=seed).diagonals[value]
        for array, seed in ((x, 0), (x[::-1], 0), (x, 1))
    )
    np.testing.assert_array_equal(first, turned)
    assert not np.array_equal(first, other)


def test_what_samples_do_not_touch_keeps_a_share_of_the_mean() -> None:
    model = made("(float[1,2] x) => (float[1,1] y)", "y = MatMul(x, w)", w=random(2, 1))
    found = measured(model, np.array([[2, 0]], np.float32), "w")
    diagonal = found.diagonals[model.graph.initializers["w"]]
    np.testing.assert_allclose(diagonal, [[4 + 2 * DAMPING], [2 * DAMPING]])


def test_a_weight_without_influence_counts_evenly() -> None:
    model = made(
        "(float[1,2] x) => (float[1,2] y)", "m = MatMul(x, w) z = Sub(m, m) y = Add(x, z)",
        w=random(2, 2),
    )  # fmt: skip
    found = measured(model, random(3, 2), "w")
    np.testing.assert_array_equal(found.diagonals[model.graph.initializers["w"]], 1)


def test_the_model_is_not_changed() -> None:
    model = made("(float[1,2,5,5] x) => (float[1,1] y)", CNN, **WEIGHTS)
    before = ir.to_proto(model)
    measured(model, random(2, 2, 5, 5), "u", "w")
    assert ir.to_proto(model) == before


def test_an_operator_without_gradient_says_how_to_go_on() -> None:
    model = made(
        "(float[1,2] x) => (float[1,2] y)", "m = MatMul(x, w) y = CumSum(m, a)",
        w=random(2, 2), a=np.array(1, np.int64),
    )  # fmt: skip
    with pytest.raises(PassRefused, match=r'gradient of CumSum is not known.*weighting = "none"'):
        measured(model, random(1, 2), "w")
