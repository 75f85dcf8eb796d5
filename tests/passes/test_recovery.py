from __future__ import annotations

from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.calibration.base import Samples
from edgepress.passes._channels import analyse, cut
from edgepress.passes._recovery import recover
from edgepress.passes.base import Context, PassRefused, refresh_shapes
from tests.graphs import Array, answers, net, random, weight
from tests.passes import channel_nets
from tests.passes.channel_nets import BLOCKS, Attention, Block, cnn, transformer

Method = Literal["least-squares", "bias"]
Remaining = dict[str, list[Array | None]]


def build(signature: str, body: str, weights: dict[str, Array]) -> ir.Model:
    model = net(signature, body, weights)
    refresh_shapes(model, "test")
    return model


def images(count: int, seed: int = 0, shape: tuple[int, ...] = (1, 3, 6, 6)) -> Samples:
    return Samples({"x": random(count, *shape, seed=seed)})


def prune(model: ir.Model, channels: dict[str, list[int]]) -> tuple[ir.Model, Remaining]:
    """Cut channels, by name of the group and place in it; return the result and what remains."""
    result = model.clone()
    axes = analyse(result)
    groups = {group.name: group for group in axes.groups()}
    gone = np.concatenate([groups[name].channels[places] for name, places in channels.items()])
    kept: Remaining = {}
    for node in result.graph:
        for value in node.outputs:
            found = axes.channels_of(value)
            kept[value.name or ""] = [
                None if axis is None else np.flatnonzero(~np.isin(axis, gone)) for axis in found
            ]
    cut(result, axes, gone.tolist())
    refresh_shapes(result, "test")
    return result, kept


def error(original: ir.Model, other: ir.Model, samples: Samples) -> float:
    shape = {"x": original.graph.inputs[0].shape}
    pairs = [
        (answers(original, feed)[0], answers(other, feed)[0])
        for feed in samples.feeds({name: s.numpy() for name, s in shape.items() if s is not None})
    ]
    lost = sum(float(np.square(a - b).sum()) for a, b in pairs)
    return float(np.sqrt(lost / sum(float(np.square(a).sum()) for a, _ in pairs)))


def two_convs() -> ir.Model:
    """A hidden layer of 6 channels, of which channel 4 is twice channel 1."""
    first, bias = random(6, 3, 3, 3, seed=1), random(6, seed=2)
    first[4], bias[4] = 2 * first[1], 2 * bias[1]
    weights = {"w": first, "b": bias, "v": random(4, 6, 3, 3, seed=3), "c": random(4, seed=4)}
    body = "h = Conv <pads=[1,1,1,1]> (x, w, b) r = Relu(h) y = Conv(r, v, c)"
    return build("(float[1,3,6,6] x) => (float[1,4,4,4] y)", body, weights)


def test_a_channel_that_another_replaces_is_made_up_for() -> None:
    original = two_convs()
    pruned, kept = prune(original, {"Conv_0": [4]})
    fresh = images(10, seed=9)
    assert error(original, pruned, fresh) > 0.1
    left = recover("test", original, pruned, kept, images(40), Context())
    assert error(original, pruned, fresh) < 1e-3
    assert left["y"] < 1e-3
    want = weight(original, "v")
    np.testing.assert_allclose(weight(pruned, "v")[:, 1], want[:, 1] + 2 * want[:, 4], atol=0.02)


def test_nothing_changes_where_nothing_is_wrong() -> None:
    original = two_convs()
    same = original.clone()
    left = recover("test", original, same, {}, images(8), Context())
    assert max(left.values()) < 1e-6
    for name in original.graph.initializers:
        np.testing.assert_array_equal(weight(same, name), weight(original, name))


def cut_one_of_each(original: ir.Model) -> tuple[ir.Model, Remaining] | None:
    """Cut the first channel of every group, or None where that leaves something empty."""
    free = {
        group.name: [0]
        for group in analyse(original).groups()
        if not group.frozen[0] and len(group.channels) > 4
    }
    try:
        return prune(original, free) if free else None
    except ValueError:
        return None


@settings(deadline=None, max_examples=6)
@given(
    blocks=st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=2),
    seed=st.integers(0, 999),
    method=st.sampled_from(["least-squares", "bias"]),
)
def test_random_nets_stay_what_they_are(blocks: list[Block], seed: int, method: Method) -> None:
    original = cnn(blocks, seed)
    found = cut_one_of_each(original)
    if found is None:
        return
    pruned, kept = found
    names, shapes = [node.name for node in pruned.graph], sizes(pruned)
    left = recover("test", original, pruned, kept, images(6, seed), Context(), method=method)
    refresh_shapes(pruned, "test")
    onnx.checker.check_model(ir.to_proto(pruned), full_check=True)
    assert [node.name for node in pruned.graph] == names
    assert {name: shape for name, shape in sizes(pruned).items() if name in shapes} == shapes
    assert np.isfinite([*left.values()]).all()


def sizes(model: ir.Model) -> dict[str, tuple[int, ...]]:
    return {name: weight(model, name).shape for name in model.graph.initializers}


@pytest.mark.parametrize(
    "block",
    [channel_nets.residual, channel_nets.concat, channel_nets.depthwise, channel_nets.grouped],
)
def test_blocks_get_better_on_samples_that_were_not_seen(block: Block) -> None:
    original = cnn([channel_nets.plain, block], 1)
    found = cut_one_of_each(original)
    assert found is not None
    pruned, kept = found
    fresh = images(8, seed=99)
    before = error(original, pruned, fresh)
    recover("test", original, pruned, kept, images(60), Context())
    assert error(original, pruned, fresh) < 0.9 * before


def tokens(count: int, seed: int = 0) -> Samples:
    return Samples({"x": np.random.default_rng(seed).integers(0, 7, (count, 5))})


@pytest.mark.parametrize("attention", ["separate", "fused"])
def test_a_transformer_gets_better(attention: Attention) -> None:
    original = transformer(attention, 0)
    groups = {group.name: group for group in analyse(original).groups() if len(group.free)}
    hidden = next(name for name, group in groups.items() if len(group.channels) == 40)
    heads = next(name for name, group in groups.items() if group.width > 1)
    pruned, kept = prune(original, {hidden: list(range(12)), heads: [1]})
    fresh = tokens(16, seed=5)
    before = error(original, pruned, fresh)
    recover("test", original, pruned, kept, tokens(100), Context())
    assert error(original, pruned, fresh) < 0.8 * before


RESIDUAL = """
    a = Conv(x, w1, b1) r = Relu(a) s = Conv(r, w2, b2)
    c = Conv <pads=[1,1,1,1]> (s, w3, b3) d = Relu(c) e = Conv(d, w4, b4) y = Add(e, s)
"""


def residual() -> ir.Model:
    weights = {
        "w1": random(8, 3, 1, 1, seed=1), "b1": random(8, seed=2),
        "w2": random(4, 8, 1, 1, seed=3), "b2": random(4, seed=4),
        "w3": random(30, 4, 3, 3, seed=5), "b3": random(30, seed=6),
        "w4": random(4, 30, 1, 1, seed=7), "b4": random(4, seed=8),
    }  # fmt: skip
    return build("(float[1,3,6,6] x) => (float[1,4,6,6] y)", RESIDUAL, weights)


def test_the_last_layer_of_a_block_makes_up_for_the_shortcut() -> None:
    original = residual()
    pruned, kept = prune(original, {"Conv_0": [0, 1, 2, 3, 4]})
    alone = pruned.clone()
    left = recover("test", original, pruned, kept, images(60), Context())
    # the shortcut keeps an error that only the layer behind it can lower
    recover("test", original, alone, kept, images(60), Context(), method="bias")
    assert left["s"] > 0.1
    assert left["e"] == pytest.approx(error(original, pruned, images(60)), rel=1e-3)
    assert left["e"] < 0.9 * error(original, alone, images(60))


@pytest.mark.parametrize("method", ["bias", "least-squares"])
def test_means_are_right_afterwards(method: Method) -> None:
    original = residual()
    pruned, kept = prune(original, {"Conv_3": [0, 1, 2, 3, 4, 5, 6, 7]})
    samples = images(12)
    recover("test", original, pruned, kept, samples, Context(), method=method)
    means = []
    for model in (original, pruned):
        found = [answers(model, feed)[0] for feed in samples.feeds({"x": (1, 3, 6, 6)})]
        means.append(np.mean(found, axis=(0, 1, 3, 4)))
    np.testing.assert_allclose(means[0], means[1], atol=1e-4)


def test_bias_leaves_weights_alone() -> None:
    original = residual()
    pruned, kept = prune(original, {"Conv_3": [0, 1, 2]})
    before = {name: weight(pruned, name) for name in pruned.graph.initializers}
    recover("test", original, pruned, kept, images(12), Context(), method="bias")
    changed = {n for n, old in before.items() if not np.array_equal(weight(pruned, n), old)}
    assert changed == {"b4"}


def test_a_batch_norm_gets_its_moments_back() -> None:
    weights = {
        "w": random(8, 3, 3, 3, seed=1), "g": np.ones(8, np.float32), "h": random(8, seed=2),
        "m": random(8, seed=3), "q": np.full(8, 2.0, np.float32), "v": random(4, 8, 1, 1, seed=4),
        "g2": random(4, seed=5), "h2": random(4, seed=6), "m2": random(4),
        "q2": np.ones(4, np.float32),
    }  # fmt: skip
    body = """a = Conv(x, w) r = Relu(a) n = BatchNormalization(r, g, h, m, q) s = Relu(n)
              t = Conv(s, v) u = Relu(t) y = BatchNormalization(u, g2, h2, m2, q2)"""
    original = build("(float[1,3,6,6] x) => (float[1,4,4,4] y)", body, weights)
    pruned, kept = prune(original, {"Conv_0": [0, 3, 5]})
    samples = images(20)
    recover("test", original, pruned, kept, samples, Context(), method="least-squares")
    found = [
        np.stack([answers(model, feed)[0] for feed in samples.feeds({"x": (1, 3, 6, 6)})])
        for model in (original, pruned)
    ]
    for moment in (np.mean, np.std):
        want, got = (moment(values, axis=(0, 1, 3, 4)) for values in found)
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Gemm <transB=1> (x, w)", "y = Gemm <transB=1, alpha=0.5, beta=2.0> (r, v, c)"),
        ("Gemm(x, w)", "y = Gemm(r, v)"),
        ("MatMul(x, w)", "m = MatMul(r, v) y = Add(c, m)"),
    ],
)
def test_dense_layers(first: str, second: str) -> None:
    weights = {"w": random(5, 12, seed=1), "v": random(12, 3, seed=2)}
    weights["w"][:, 7] = -weights["w"][:, 2] + weights["w"][:, 4]
    if "transB" in first:
        weights = {name: array.T for name, array in weights.items()}
    if "c" in second:
        weights["c"] = random(3, seed=3)
    body = f"h = {first} r = Relu(h) {second}"
    original = build("(float[2,5] x) => (float[2,3] y)", body, weights)
    name = next(iter(original.graph)).name or ""
    pruned, kept = prune(original, {name: [7]})
    samples, fresh = images(80, shape=(2, 5)), images(20, seed=8, shape=(2, 5))
    before = error(original, pruned, fresh)
    recover("test", original, pruned, kept, samples, Context())
    assert error(original, pruned, fresh) < 0.75 * before


def test_the_order_of_samples_does_not_matter() -> None:
    original = residual()
    found = []
    samples = images(12).inputs["x"]
    for order in (np.arange(12), np.random.default_rng(0).permutation(12)):
        pruned, kept = prune(original, {"Conv_0": [0, 1]})
        recover("test", original, pruned, kept, Samples({"x": samples[order]}), Context())
        found.append({name: weight(pruned, name) for name in pruned.graph.initializers})
    for name, array in found[0].items():
        np.testing.assert_array_equal(array, found[1][name])


def test_few_samples_set_only_means_right() -> None:
    original = residual()
    pruned, kept = prune(original, {"Conv_3": [0, 1, 2]})
    before = weight(pruned, "w4")
    recover("test", original, pruned, kept, images(3), Context())
    np.testing.assert_array_equal(weight(pruned, "w4"), before)
    assert not np.array_equal(weight(pruned, "b4"), weight(original, "b4"))


def test_a_shared_weight_stays() -> None:
    weights = {"w": random(3, 3, 1, 1, seed=1), "v": random(6, 3, 1, 1), "u": random(2, 6, 1, 1)}
    body = "a = Conv(x, w) r = Relu(a) b = Conv(r, w) c = Conv(b, v) d = Relu(c) y = Conv(d, u)"
    original = build("(float[1,3,6,6] x) => (float[1,2,6,6] y)", body, weights)
    pruned, kept = prune(original, {"Conv_3": [0, 1]})
    recover("test", original, pruned, kept, images(12), Context())
    np.testing.assert_array_equal(weight(pruned, "w"), weights["w"])


def test_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    context = Context(progress=lambda _what, done, total: told.append((done, total)))
    original = two_convs()
    pruned, kept = prune(original, {"Conv_0": [4]})
    recover("test", original, pruned, kept, images(4), context)
    assert told == [(0, 2), (1, 2)]


def test_samples_with_nan_are_refused() -> None:
    original = two_convs()
    pruned, kept = prune(original, {"Conv_0": [4]})
    broken = Samples({"x": np.full((4, 1, 3, 6, 6), np.nan, np.float32)})
    with pytest.raises(PassRefused, match="NaN"):
        recover("test", original, pruned, kept, broken, Context())
