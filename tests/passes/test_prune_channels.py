from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.calibration.base import Samples
from edgepress.calibration.importance.base import importance_names
from edgepress.passes._channels import analyse
from edgepress.passes.base import Context, Outcome, PassRefused, refresh_shapes
from edgepress.passes.fold_batch_norm import GAMMA, FoldBatchNorm
from edgepress.passes.prune_channels import PruneChannels
from tests.graphs import Array, answers, feeds, net, nodes, random, weight
from tests.passes.channel_nets import SMOOTH, Block, cnn, transformer
from tests.passes.channel_oracle import masked

SIGNATURE = "(float[1,3,8,8] x) => (float[1,10] y)"
BODY = """
    a = Conv <pads=[1,1,1,1]> (x, w1, b1) ar = Relu(a)
    d = Conv <pads=[1,1,1,1], group=32> (ar, w2) dr = Relu(d)
    p = Conv(dr, w3, b3) q = Conv <pads=[1,1,1,1]> (p, w4, b4) s = Add(p, q)
    g = GlobalAveragePool(s) f = Flatten(g) y = Gemm <transB=1> (f, w5, b5)
"""


def small(**changed: Array) -> ir.Model:
    """A depthwise and a residual block: groups of 32 and 16 channels, and a head that stays."""
    weights = {
        "w1": random(32, 3, 3, 3, seed=1), "b1": random(32, seed=2),
        "w2": random(32, 1, 3, 3, seed=3),
        "w3": random(16, 32, 1, 1, seed=4), "b3": random(16, seed=5),
        "w4": random(16, 16, 3, 3, seed=6), "b4": random(16, seed=7),
        "w5": random(10, 16, seed=8), "b5": random(10, seed=9),
    }  # fmt: skip
    model = net(SIGNATURE, BODY, weights | changed)
    refresh_shapes(model, "test")
    return model


def images(count: int, seed: int = 0) -> Samples:
    return Samples({"x": random(count, 1, 3, 8, 8, seed=seed)})


def prune(model: ir.Model, context: Context | None = None, **options: Any) -> Outcome:
    step, context = PruneChannels(**options), context or Context()
    step.requires(model, context)
    outcome = step.call(model, context)
    step.ensures(outcome.model)
    if outcome.modified:
        refresh_shapes(outcome.model, "test")
    proto = ir.to_proto(outcome.model)
    onnx.checker.check_model(proto, full_check=True)
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    return outcome


def widths(model: ir.Model) -> list[int]:
    return [weight(model, name).shape[0] for name in ("w1", "w2", "w3", "w4", "w5")]


GOLDEN = """a = Conv(x, w1, b1) {pads=[1,1,1,1]}
ar = Relu(a)
d = Conv(ar, w2) {group=24,pads=[1,1,1,1]}
dr = Relu(d)
p = Conv(dr, w3, b3)
q = Conv(p, w4, b4) {pads=[1,1,1,1]}
s = Add(p, q)
g = GlobalAveragePool(s)
f = Flatten(g)
y = Gemm(f, w5, b5) {transB=1}"""


def test_golden() -> None:
    model = small()
    before = {name: weight(model, name) for name in model.graph.initializers}
    outcome = prune(model, ranking="local", amount=0.25, recover="none")
    text = nodes(outcome.model).replace("group=24, ", "group=24,")
    assert text == GOLDEN
    shapes = {name: weight(outcome.model, name).shape for name in before}
    assert shapes == {
        "w1": (24, 3, 3, 3), "b1": (24,), "w2": (24, 1, 3, 3), "w3": (12, 24, 1, 1), "b3": (12,),
        "w4": (12, 12, 3, 3), "b4": (12,), "w5": (10, 12), "b5": (10,),
    }  # fmt: skip
    kept = np.flatnonzero((before["b1"][:, None] == weight(outcome.model, "b1")).any(axis=1))
    np.testing.assert_array_equal(weight(outcome.model, "w1"), before["w1"][kept])
    np.testing.assert_array_equal(weight(outcome.model, "b5"), before["b5"])
    macs = outcome.stats["macs_before"], outcome.stats["macs_after"]
    assert macs == (
        64 * (32 * 27 + 32 * 9 + 16 * 32 + 16 * 16 * 9) + 160,
        64 * (24 * 27 + 24 * 9 + 12 * 24 + 12 * 12 * 9) + 120,
    )
    assert outcome.stats["groups"] == 2
    assert (outcome.stats["channels"], outcome.stats["channels_before"]) == (12, 58)


def test_the_weakest_channels_go() -> None:
    first, depthwise = random(32, 3, 3, 3, seed=1), random(32, 1, 3, 3, seed=3)
    weak = [3, 4, 9, 10, 17, 20, 30, 31]
    for array in (first, depthwise):
        array[weak] *= 0.01
    before = small(w1=first, w2=depthwise)
    bias = weight(before, "b1")
    outcome = prune(before, amount={"Conv_0": 0.25}, recover="none")
    stay = np.setdiff1d(np.arange(32), weak)
    np.testing.assert_array_equal(weight(outcome.model, "b1"), bias[stay])


@settings(deadline=None, max_examples=20)
@given(
    blocks=st.lists(st.sampled_from(SMOOTH), min_size=1, max_size=3),
    seed=st.integers(0, 999),
    amount=st.sampled_from([0.1, 0.3, 0.6]),
    ranking=st.sampled_from(["global", "local"]),
    of=st.sampled_from(["channels", "macs"]),
    align=st.sampled_from([1, 2, 4]),
)
def test_what_is_left_equals_the_masked_original(
    blocks: list[Block], seed: int, amount: float, ranking: str, of: str, align: int
) -> None:
    model = cnn(blocks, seed)
    assert_masked(
        model, amount=amount, ranking=ranking, of=of, align=align, importance="random", seed=seed
    )


@pytest.mark.parametrize("attention", ["separate", "fused", "grouped"])
@pytest.mark.parametrize("ranking", ["global", "local"])
def test_transformers_equal_the_masked_original(attention: Any, ranking: str) -> None:
    assert assert_masked(transformer(attention, 0), amount=0.4, ranking=ranking, align=1) > 5


def assert_masked(model: ir.Model, **options: Any) -> int:
    original = model.clone()
    outcome = prune(model, recover="none", **options)
    again = analyse(original)
    cuts, _ = PruneChannels(recover="none", **options)._plan(original, again, Context())
    gone = set(cuts.tolist())
    assert len(gone) == outcome.stats["channels"]
    oracle = masked(original, again, gone)
    feed = feeds(original)
    for got, want in zip(answers(outcome.model, feed), answers(oracle, feed), strict=True):
        scale = max(1e-3, float(np.abs(want).max()))
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * scale)
    return len(gone)


@pytest.mark.parametrize("simd_bytes", [16, 32, 64])
def test_widths_fill_the_vectors_of_the_target(simd_bytes: int) -> None:
    outcome = prune(small(), Context(simd_bytes=simd_bytes), amount=0.4, recover="none")
    step = simd_bytes // 4
    assert all(width % step == 0 for width in widths(outcome.model)[:4])
    assert outcome.modified


def test_align_and_min_channels_are_kept() -> None:
    outcome = prune(small(), amount=0.9, align=3, min_channels=10, recover="none")
    assert all(width >= 10 and width % 3 == 0 for width in widths(outcome.model)[:4])


def test_half_of_the_macs() -> None:
    for ranking in ("global", "local"):
        outcome = prune(small(), amount=0.5, of="macs", ranking=ranking, align=1, recover="none")
        left = outcome.stats["macs_after"] / outcome.stats["macs_before"]
        assert 0.4 < left <= 0.5


def test_macs_are_cut_where_they_are() -> None:
    """Of two groups that matter alike, the one that saves more work is cut."""
    body = """g = GlobalAveragePool(x) c = Conv(g, w3) s = Relu(c) d = Conv(s, w4)
              a = Conv <pads=[1,1,1,1]> (x, w1) r = Relu(a) b = Conv <pads=[1,1,1,1]> (r, w2)
              h = GlobalAveragePool(b) e = Add(d, h) y = Flatten(e)"""
    weights = {
        "w1": np.ones((32, 3, 3, 3), np.float32), "w2": np.ones((10, 32, 3, 3), np.float32),
        "w3": np.ones((32, 3, 1, 1), np.float32), "w4": np.ones((10, 32, 1, 1), np.float32),
    }  # fmt: skip
    model = net(SIGNATURE, body, weights)
    refresh_shapes(model, "test")
    outcome = prune(model, amount=0.24, of="macs", recover="none")
    assert weight(outcome.model, "w1").shape[0] == 24
    assert weight(outcome.model, "w3").shape[0] == 32


@pytest.mark.parametrize("name", importance_names())
def test_every_importance(name: str) -> None:
    model = small()
    for node in model.graph:
        if node.op_type == "Conv":
            count = int(weight(model, (node.inputs[1] or ir.Value()).name or "").shape[0])
            node.metadata_props[GAMMA] = str([float(i + 1) for i in range(count)])
    outcome = prune(model, Context(samples=images(8)), amount=0.3, importance=name)
    assert outcome.stats["channels"] >= 8
    assert not any(GAMMA in node.metadata_props for node in outcome.model.graph)


def test_gammas_of_folded_batch_norms_rank() -> None:
    weights = {
        "w": random(8, 3, 3, 3), "g": np.array([5, -6, 1, 7, -0.5, 8, 9, 4], np.float32),
        "h": random(8), "m": random(8), "q": np.ones(8, np.float32), "v": random(10, 8, seed=3),
    }  # fmt: skip
    body = """a = Conv(x, w) n = BatchNormalization(a, g, h, m, q) r = Relu(n)
              p = GlobalAveragePool(r) f = Flatten(p) y = Gemm <transB=1> (f, v)"""
    model = net(SIGNATURE, body, weights)
    refresh_shapes(model, "test")
    model = FoldBatchNorm().call(model, Context()).model
    refresh_shapes(model, "test")
    folded = weight(model, "w")
    outcome = prune(model, amount=0.25, align=1, importance="batch_norm", recover="none")
    np.testing.assert_array_equal(weight(outcome.model, "w"), np.delete(folded, [2, 4], axis=0))


def test_groups_without_gammas_stay_and_say_so() -> None:
    model = small()
    next(iter(model.graph)).metadata_props[GAMMA] = str([1.0] * 32)
    outcome = prune(model, amount=0.3, importance="batch_norm", recover="none")
    assert widths(outcome.model)[2] == 16
    assert any(name == "Conv_4" and "no gammas" in why for name, why in outcome.skipped)


def test_recovery_lowers_the_error() -> None:
    original, fresh = small(), images(20, seed=5)
    errors = {}
    for method in ("none", "bias", "least-squares", "auto"):
        outcome = prune(original.clone(), Context(samples=images(60)), recover=method)
        pairs = [
            (answers(original, feed)[0], answers(outcome.model, feed)[0])
            for feed in fresh.feeds({"x": (1, 3, 8, 8)})
        ]
        errors[method] = float(np.mean([np.square(a - b).mean() for a, b in pairs]))
    assert errors["least-squares"] < errors["bias"] < errors["none"]
    assert errors["auto"] == errors["least-squares"]


def test_notes_say_what_recovery_did() -> None:
    (note,) = prune(small()).notes
    assert note.startswith("without samples nothing was refitted")
    (note,) = prune(small(), Context(samples=images(8))).notes
    assert re.match(r"refitted by least-squares; the largest relative errors .*: \w+ \d+%", note)
    assert prune(small(), Context(samples=images(8)), recover="none").notes == []


def test_macs_that_could_not_be_cut_are_told() -> None:
    outcome = prune(small(), amount=0.9, of="macs", align=16, recover="none")
    assert outcome.modified
    (note,) = outcome.notes
    assert re.match(r"only \d\d% of the multiply-accumulates could be cut, 90% were asked", note)


def test_quantized_weights_are_cut_and_not_refitted() -> None:
    body = """w = DequantizeLinear <axis=0> (wq, s) v = DequantizeLinear <axis=0> (vq, t)
              a = Conv(x, w) r = Relu(a) b = Conv(r, v) g = GlobalAveragePool(b) y = Flatten(g)"""
    integers = np.random.default_rng(0).integers(-127, 128, 500).astype(np.int8)
    weights: dict[str, Array] = {
        "wq": integers[:24].reshape(8, 3, 1, 1), "s": np.full(8, 0.01, np.float32),
        "vq": integers[:80].reshape(10, 8, 1, 1), "t": np.full(10, 0.01, np.float32),
    }  # fmt: skip
    model = net(SIGNATURE, body, weights)
    refresh_shapes(model, "test")
    outcome = prune(model, Context(samples=images(8)), amount=0.5)
    assert weight(outcome.model, "wq").shape == (4, 3, 1, 1)
    assert weight(outcome.model, "s").shape == (4,)
    assert outcome.notes == ["nothing could be refitted: no layer has float weights of its own."]


class WidthTimer:
    """A fake: an inference takes as many ms as the layer's weight is wide, 16 at least."""

    unit, key = "ms", "fake"

    def __call__(self, layers: Sequence[ir.Model]) -> list[float]:
        return [max(16.0, shape[0]) for shape in map(self.shape, layers)]

    @staticmethod
    def shape(layer: ir.Model) -> tuple[int, ...]:
        return max((weight(layer, name).shape for name in layer.graph.initializers), key=len)


def test_layers_are_measured_and_the_slow_ones_named() -> None:
    options: dict[str, Any] = {"amount": 0.5, "ranking": "local", "recover": "none"}
    outcome = prune(small(), Context(timer=WidthTimer()), measure=True, **options)
    # 32 and 32 become 16; 16 and 16 become 8, which takes as long; the head reads fewer
    assert (outcome.stats["ms_before"], outcome.stats["ms_after"]) == (112, 80)
    assert outcome.notes == [
        "measured on the target, the layers that changed take 112 → 80 ms.",
        "not faster: Conv_4 16 → 16 ms, Conv_5 16 → 16 ms, Gemm_9 16 → 16 ms.",
    ]
    quiet = prune(small(), Context(timer=WidthTimer()), **options)
    assert not quiet.notes
    assert "ms_before" not in quiet.stats


def test_measuring_needs_a_target() -> None:
    assert PruneChannels(measure=True).needs_timer
    assert not PruneChannels().needs_timer
    with pytest.raises(PassRefused, match="measure: only a target can tell what is faster"):
        prune(small(), measure=True)


def test_nothing_to_cut_changes_nothing() -> None:
    model = small()
    text = ir.to_proto(model).SerializeToString(deterministic=True)
    assert not prune(model, amount=0.0).modified
    outcome = prune(model, align=64)
    assert not outcome.modified
    assert ir.to_proto(outcome.model).SerializeToString(deterministic=True) == text
    assert ("Conv_0", "its 32 channels fill no more than one vector of 64") in outcome.skipped
    (note,) = outcome.notes
    assert note == "no channel could be cut: Gemm_9: y is an output of the model."


def test_operators_without_a_rule_are_named() -> None:
    body = BODY.replace("ar = Relu(a)", "ar = LRN <size=3> (a)")
    original = small()
    weights = {name: weight(original, name) for name in original.graph.initializers}
    model = net(SIGNATURE, body, weights)
    refresh_shapes(model, "test")
    outcome = prune(model, amount=0.3, recover="none")
    assert widths(outcome.model)[:2] == [32, 32]
    assert outcome.skipped[0] == ("LRN_1", "LRN has no rule for channels")
    assert any(name == "Conv_0" and "LRN_1 is a" in why for name, why in outcome.skipped)


def test_a_table_cuts_only_what_it_names() -> None:
    outcome = prune(small(), amount={"Conv_[02]": 0.5}, recover="none")
    assert widths(outcome.model) == [16, 16, 16, 16, 10]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"amount": 1.0}, "amount: it is 1, which would empty a group"),
    ({"amount": -0.1}, "amount: it is -0.1, which is no share"),
    ({"amount": float("nan")}, "amount: it is nan, which is no share"),
    ({"amount": {}}, "amount: the table is empty"),
    ({"amount": {"Conv_0": 1.5}}, "would empty a group"),
    ({"amount": {"Conv_0": 0.5}, "of": "macs"}, "of: 'macs' takes a single amount"),
    ({"align": 0}, "align: it is 0; it must be at least 1"),
    ({"min_channels": 0}, "min_channels: it is 0"),
    ({"seed": -1}, "seed: it is -1; it must be at least 0"),
    ({"importance": "l3"}, "importance: no importance is called 'l3'. Did you mean"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_options_that_no_model_could_make_right(options: dict[str, Any], words: str) -> None:
    with pytest.raises(PassRefused, match=re.escape(words)):
        PruneChannels(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"amount": 0.99}, "0.99 would empty Conv_0, which has 32 channels; give less"),
        (
            {"amount": {"Conf_0": 0.5}},
            "'Conf_0': it matches no layer's whole name. Near it: Conv_0",
        ),
        ({"amount": {"(": 0.5}}, "not a regular expression"),
        ({"amount": {"Gemm_9": 0.5}}, "'Gemm_9': y is an output of the model"),
        (
            {"amount": {"Conv_4": 0.5, "Conv_5": 0.25}},
            "are cut together; give them the same amount",
        ),
        ({"importance": "batch_norm"}, "no gammas are known"),
    ],
)
def test_what_this_model_cannot_do(options: dict[str, Any], words: str) -> None:
    with pytest.raises(PassRefused, match=re.escape(words)):
        prune(small(), **options)


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({}, False),
        ({"recover": "bias"}, True),
        ({"recover": "least-squares"}, True),
        ({"importance": "thinet", "recover": "none"}, True),
        ({"importance": "taylor"}, True),
        ({"importance": "batch_norm"}, False),
    ],
)
def test_samples_are_needed_where_they_are_looked_at(options: dict[str, Any], needed: bool) -> None:
    assert PruneChannels(**options).needs_samples == needed


def test_it_is_deterministic() -> None:
    results = [
        ir.to_proto(
            prune(small(), Context(samples=images(8)), importance=name, amount=0.3).model
        ).SerializeToString(deterministic=True)
        for name in ("taylor", "taylor", "random", "random")
    ]
    assert results[0] == results[1]
    assert results[2] == results[3]
    assert dataclasses.asdict(PruneChannels())["seed"] == 0
