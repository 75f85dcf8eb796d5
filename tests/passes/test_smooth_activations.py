from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.calibration.base import Samples
from edgepress.passes._shapes import refresh_shapes
from edgepress.passes.base import Context, Outcome, PassRefused
from edgepress.passes.smooth_activations import SmoothActivations
from tests.graphs import Array, answers, apply, feeds, net, nodes, random, weight

WIDTH = 6


def calibrated(model: ir.Model, seed: int = 0, count: int = 4) -> Context:
    """Normal samples of the input x."""
    shape = feeds(model)["x"].shape
    return Context(samples=Samples({"x": random(count, *shape, seed=seed)}, source="random"))


def smoothed(model: ir.Model, step: SmoothActivations | None = None) -> Outcome:
    """Apply with all checks of a lossless pass."""
    refresh_shapes(model, "test")
    return apply(step or SmoothActivations(), model, calibrated(model))


def outlying(*shape: int, seed: int = 0) -> Array:
    """Weights whose columns differ by up to a factor of 100."""
    spread = 10 ** np.linspace(-1, 1, shape[-1])
    return (random(*shape, seed=seed) * spread).astype(np.float32)


def peaks(model: ir.Model, name: str, context: Context) -> Array:
    """Largest magnitude of every channel of a value over the samples."""
    assert context.samples is not None
    (value,) = (v for node in model.graph for v in node.outputs if v.name == name)
    model = model.clone()
    (copy,) = (v for node in model.graph for v in node.outputs if v.name == value.name)
    model.graph.outputs.clear()
    model.graph.outputs.append(copy)
    found = [np.abs(answers(model, {"x": x})[0]) for x in context.samples.inputs["x"]]
    return np.asarray(np.max([f.reshape(-1, f.shape[-1]).max(axis=0) for f in found], axis=0))


def norm_net() -> ir.Model:
    """LayerNormalization with outlying channels, read by two products."""
    return net(
        "(float[2,3,6] x) => (float[2,3,5] p, float[2,3,4] q)",
        "n = LayerNormalization<axis=-1>(x, g, b) p = MatMul(n, v) q = MatMul(n, w)",
        {"g": outlying(WIDTH), "b": outlying(WIDTH, seed=1), "v": random(6, 5), "w": random(6, 4)},
    )


def test_a_norm_takes_the_factors() -> None:
    model = norm_net()
    before, gamma = nodes(model), weight(model, "g")
    outcome = smoothed(model)
    assert nodes(outcome.model) == before
    assert outcome.stats == {"folded": 1, "multiplications_written": 0}
    factors = gamma / weight(outcome.model, "g")
    assert factors.max() > 5 * factors.min()


def test_the_factors_are_those_of_the_paper() -> None:
    model, alpha = norm_net(), 0.7
    refresh_shapes(model, "test")
    context = calibrated(model)
    rows = np.maximum(*(np.abs(weight(model, n)).max(axis=1) for n in "vw"))
    wanted = peaks(model, "n", context) ** alpha / rows ** (1 - alpha)
    gamma, v = weight(model, "g"), weight(model, "v")
    changed = SmoothActivations(alpha=alpha).call(model, context).model
    factors = gamma / weight(changed, "g")
    np.testing.assert_allclose(factors / wanted, np.full(6, factors[0] / wanted[0]), rtol=1e-5)
    np.testing.assert_allclose(weight(changed, "v"), v * factors[:, None], rtol=1e-5)


def test_alpha_one_half_makes_channels_and_rows_alike() -> None:
    model = norm_net()
    refresh_shapes(model, "test")
    context = calibrated(model)
    changed = SmoothActivations().call(model, context).model
    rows = np.maximum(*(np.abs(weight(changed, n)).max(axis=1) for n in "vw"))
    ratios = peaks(changed, "n", context) / rows
    assert ratios.max() < 1.001 * ratios.min()


def test_elsewhere_a_mul_is_written_that_all_products_share() -> None:
    model = net(
        "(float[2,3,6] x) => (float[2,3,6] y)",
        """n = LayerNormalization<axis=-1>(x, g)
           p = MatMul(n, v) q = MatMul(n, w) s = Add(p, q) y = Add(s, n)""",
        {"g": outlying(WIDTH), "v": random(6, 6), "w": random(6, 6, seed=1)},
    )
    outcome = smoothed(model)
    assert nodes(outcome.model) == "\n".join(
        [
            "n = LayerNormalization(x, g) {axis=-1}",
            "n_smoothed = Mul(n, n_smoothing)",
            "p = MatMul(n_smoothed, v)",
            "q = MatMul(n_smoothed, w)",
            "s = Add(p, q)",
            "y = Add(s, n)",
        ]
    )
    assert outcome.stats == {"folded": 0, "multiplications_written": 1}


@pytest.mark.parametrize(
    ("body", "folded"),
    [
        ("h = MatMul(x, a) y = MatMul(h, w)", 1),
        ("h0 = MatMul(x, a) h = Add(c, h0) y = MatMul(h, w)", 1),
        ("h0 = MatMul(x, a) h1 = Add(h0, c) h = Relu(h1) y = MatMul(h, w)", 1),
        ("h = Gemm<transB=1, alpha=0.5, beta=2.0>(x, d, c) y = Gemm<transB=1>(h, e)", 1),
        ("h0 = Mul(x, c) h = Add(h0, c) y = MatMul(h, w)", 1),
        ("h0 = MatMul(x, a) h = Sigmoid(h0) y = MatMul(h, w)", 0),
        ("h0 = MatMul(x, a) h = Add(h0, h0) y = MatMul(h, w)", 0),
        ("h = MatMul(x, a) y0 = MatMul(h, w) z = Sigmoid(h) z0 = MatMul(z, w) y = Add(y0, z0)", 0),
    ],
)
def test_linear_layers_take_the_factors_where_nobody_else_reads(body: str, folded: int) -> None:
    square = outlying(WIDTH, WIDTH)
    model = net(
        "(float[4,6] x) => (float[4,5] y)",
        body,
        {"a": square, "d": square.T.copy(), "c": outlying(WIDTH, seed=2), "w": random(6, 5),
         "e": random(5, 6)},
    )  # fmt: skip
    for name in [n for n, v in model.graph.initializers.items() if not v.uses()]:
        del model.graph.initializers[name]
    outcome = smoothed(model)
    assert outcome.stats["folded"] == folded
    assert outcome.modified


def test_a_value_that_is_an_output_too_keeps_its_channels() -> None:
    model = net(
        "(float[2,3,6] x) => (float[2,3,6] n, float[2,3,5] y)",
        "n = LayerNormalization<axis=-1>(x, g) y = MatMul(n, w)",
        {"g": outlying(WIDTH), "w": random(6, 5)},
    )
    assert smoothed(model).stats == {"folded": 0, "multiplications_written": 1}


def test_a_channel_that_adds_nothing_is_left_alone() -> None:
    """Magnified, it would drown all others as soon as it did hold something."""
    gamma = outlying(WIDTH)
    gamma[2] *= np.float32(1e-12)
    model = net(
        "(float[2,3,6] x) => (float[2,3,5] y)",
        "n = LayerNormalization<axis=-1>(x, g) y = MatMul(n, w)",
        {"g": gamma, "w": random(6, 5)},
    )
    changed = smoothed(model).model
    assert weight(changed, "g")[2] == gamma[2]


def test_smooth_channels_are_left_alone() -> None:
    model = net(
        "(float[2,3,6] x) => (float[2,3,5] y)",
        "y = MatMul(x, w)",
        {"w": np.ones((6, 5), np.float32)},
    )
    refresh_shapes(model, "test")
    samples = Samples({"x": np.ones((2, 2, 3, 6), np.float32)}, source="ones")
    outcome = SmoothActivations().call(model, Context(samples=samples))
    assert not outcome.modified
    assert outcome.skipped == [("MatMul_0", "its channels are smooth already")]


def test_a_model_without_products_says_so() -> None:
    outcome = smoothed(net("(float[2,6] x) => (float[2,6] y)", "y = Relu(x)"))
    assert not outcome.modified
    assert "no product" in outcome.notes[0]


def test_skipped_layers_keep_their_weights() -> None:
    model = norm_net()
    outcome = smoothed(model, SmoothActivations(skip=("MatMul_1",)))
    assert outcome.stats == {"folded": 0, "multiplications_written": 1}
    assert ("MatMul_1", "skipped by 'MatMul_1'") in outcome.skipped
    np.testing.assert_array_equal(weight(outcome.model, "v"), random(6, 5))


def test_the_order_of_samples_does_not_matter() -> None:
    texts = []
    for order in (slice(None), slice(None, None, -1)):
        model = norm_net()
        refresh_shapes(model, "test")
        samples = Samples({"x": random(5, 2, 3, 6)[order]}, source="random")
        changed = SmoothActivations().call(model, Context(samples=samples)).model
        texts.append(ir.to_proto(changed).SerializeToString(deterministic=True))
    assert texts[0] == texts[1]


@st.composite
def encoders(draw: st.DrawFn) -> ir.Model:
    """Chains of norms, linear layers, Relu and residual sums."""
    weights: dict[str, Array] = {}
    lines, value = [], "x"
    for i in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["norm", "linear", "bias", "relu", "residual", "gemm"]))
        out = f"v{i}"
        weights[f"w{i}"] = outlying(WIDTH, WIDTH, seed=i)
        weights[f"b{i}"] = outlying(WIDTH, seed=i)
        if kind == "norm":
            lines.append(f"{out} = LayerNormalization<axis=-1>({value}, b{i}, b{i})")
        elif kind == "linear":
            lines.append(f"{out} = MatMul({value}, w{i})")
        elif kind == "bias":
            lines.append(f"{out} = Add({value}, b{i})")
        elif kind == "relu":
            lines.append(f"{out} = Relu({value})")
        elif kind == "gemm":
            lines.append(f"{out} = Gemm({value}, w{i}, b{i})")
        else:
            lines.append(f"{out}_p = MatMul({value}, w{i}) {out} = Add({out}_p, {value})")
        value = out
    lines.append(f"y = MatMul({value}, w0)")
    model = net("(float[3,6] x) => (float[3,6] y)", " ".join(lines), weights)
    for name in [n for n, v in model.graph.initializers.items() if not v.uses()]:
        del model.graph.initializers[name]
    return model


@given(encoders())
@settings(max_examples=30, deadline=None)
def test_any_chain_computes_the_same_and_stays_smooth(model: ir.Model) -> None:
    smoothed(model)


def test_refusals() -> None:
    model = norm_net()
    refresh_shapes(model, "test")
    context = calibrated(model)
    with pytest.raises(PassRefused, match=r"alpha: it is 1\.5; it must be from 0 to 1"):
        SmoothActivations(alpha=1.5).requires(model, context)
    with pytest.raises(PassRefused, match="give some with --calib"):
        SmoothActivations().requires(model, Context())
    with pytest.raises(PassRefused, match="matches no layer"):
        SmoothActivations(skip=("nothing",)).requires(model, context)
    samples = Samples({"x": np.full((1, 2, 3, 6), np.nan, np.float32)}, source="nan")
    with pytest.raises(PassRefused, match="NaN"):
        SmoothActivations().call(model, Context(samples=samples))
    assert SmoothActivations().needs_samples
