from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings

from edgepress.calibration.base import Samples
from edgepress.passes import _moments
from edgepress.passes._layer_models import signature
from edgepress.passes._shapes import refresh_shapes
from edgepress.passes.base import Context, pass_class
from edgepress.passes.low_rank import LowRank
from edgepress.pipeline.driver import Driver
from tests.graphs import answers, apply, conv_nets, feeds, nodes, random, weight
from tests.passes.low_rank_nets import WEIGHTS, by_name, made, samples


class Timer:
    """Measures by a formula, and remembers what it was asked."""

    unit, key = "ms", "fake"

    def __init__(self, cost: Callable[[ir.Model], float]) -> None:
        self.cost, self.calls = cost, list[list[ir.Model]]()

    def __call__(self, layers: Sequence[ir.Model]) -> list[float]:
        self.calls.append(list(layers))
        return [self.cost(layer) for layer in layers]


# What becomes of layers ---------------------------------------------------------------------------

GOLDEN = """\
a_factor_1 = Conv(x, a_factor_1_weight) {dilations=[1,1], group=1, kernel_shape=[3,1], \
pads=[1,0,1,0], strides=[1,1]}
a = Conv(a_factor_1, wide, bias) {dilations=[1,1], group=1, kernel_shape=[1,3], pads=[0,1,0,1], \
strides=[1,1]}
r = Relu(a)
d = Conv(r, depthwise) {group=24, pads=[1,1,1,1]}
p = Conv(d, point)
q = GlobalAveragePool(p)
f = Flatten(q)
g_factor_1 = Gemm(f, g_factor_1_weight) {transB=1}
g = Gemm(g_factor_1, dense) {transB=1}
h = Clip(g, low, high)
m_factor_1 = MatMul(h, m_factor_1_weight)
m = MatMul(m_factor_1, last)
y = Add(m, shift)"""


def test_two_narrow_layers_take_a_layers_place() -> None:
    step = LowRank(layers=("Conv_0", "Gemm.*", "MatMul.*"), method="spatial", rank=4, keep="always")
    outcome = apply(step, made())
    assert outcome.modified
    assert nodes(outcome.model) == GOLDEN
    shapes = {name: weight(outcome.model, name).shape for name in ("wide", "dense", "last")}
    assert shapes == {"wide": (24, 4, 1, 3), "dense": (20, 4), "last": (4, 10)}
    before = 24 * 8 * 9 + 24, 20 * 16, 20 * 10
    after = 4 * 8 * 3 + 24 * 4 * 3 + 24, 4 * (16 + 20), 4 * (20 + 10)
    assert outcome.stats == {
        "decomposed": 3,
        "candidates": 3,
        "parameters_before": sum(before),
        "parameters_after": sum(after),
        "macs_before": 64 * 24 * 8 * 9 + 20 * 16 + 20 * 10,
        "macs_after": 64 * 4 * (8 * 3 + 24 * 3) + after[1] + after[2],
    }
    assert outcome.skipped == []
    assert by_name(outcome)["Conv_0"].startswith("spatial rank 4, 110,592 multiply-acc")


def test_the_best_of_all_methods_is_taken() -> None:
    outcome = apply(LowRank(rank=8, keep="smaller"), made())
    labels = {name: text.partition(",")[0] for name, text in by_name(outcome).items()}
    # 8·72+24·8 = 768, 8·24+24·24 = 768, 8·8+8·72+24·8 = 832; the first of equals is taken
    assert labels["Conv_0"] == "channel rank 8"
    assert labels["Gemm_6"] == "rank 8"
    assert outcome.stats["candidates"] == 3 + 1 + 1 + 1


@given(model=conv_nets())
@settings(deadline=None, max_examples=15)
def test_any_net_of_full_rank_is_the_net(model: ir.Model) -> None:
    refresh_shapes(model)
    inputs = feeds(model)
    want = answers(model, inputs)
    convolutions = {node.name for node in model.graph if node.op_type == "Conv"}
    readers = Counter(node.inputs[1] for node in model.graph if node.op_type == "Conv")
    whole = {
        node.name
        for node in model.graph
        if node.op_type == "Conv"
        and node.attributes.get_int("group", 1) == 1
        and readers[node.inputs[1]] == 1
    }
    outcome = apply(LowRank(error=0, keep="always", recover=False), model)
    got = answers(outcome.model, inputs)
    scale = max(1.0, float(np.abs(want[0]).max()))
    np.testing.assert_allclose(got[0], want[0], rtol=0, atol=1e-5 * scale)
    assert outcome.stats["decomposed"] == len(whole)
    assert {name for name, _ in outcome.skipped} == convolutions - whole


def test_nothing_else_changes() -> None:
    model = made()
    outcome = apply(LowRank(layers=("Conv_0",), rank=4, keep="always"), model)
    for name, array in WEIGHTS.items():
        if name not in ("wide", "bias"):
            np.testing.assert_array_equal(weight(outcome.model, name), array)
    others = [line for line in nodes(made()).splitlines() if not line.startswith("a = ")]
    assert [line for line in nodes(outcome.model).splitlines() if line in others] == others


# What is kept -------------------------------------------------------------------------------------


def test_only_what_is_measured_faster_is_taken() -> None:
    """The timer says that a second layer is worth it for the Gemm alone."""
    costs = {"Conv": 1.0, "Gemm": 0.96, "MatMul": 0.98}

    def cost(layer: ir.Model) -> float:
        op = layer.graph[0].op_type
        chain = sum(node.op_type == op for node in layer.graph)
        return 10.0 if chain == 1 else 10 * costs[op]

    timer = Timer(cost)
    context = Context(timer=timer)
    outcome = apply(LowRank(rank=4, keep="faster"), made(), context)
    assert set(by_name(outcome)) == {"Gemm_6"}
    assert by_name(outcome)["Gemm_6"].startswith("rank 4, 10 ms → 9.6 ms, weight error ")
    skipped = dict(outcome.skipped)
    assert skipped["Conv_0"] == "the best, channel rank 4, takes 10 ms, the layer itself 10 ms"
    assert skipped["MatMul_8"] == "the best, rank 4, takes 9.8 ms, the layer itself 10 ms"
    assert skipped["Conv_2"].startswith("it has 24 groups")
    assert list(skipped) == ["Conv_0", "Conv_2", "Conv_3", "MatMul_8"]
    assert outcome.stats["ms_before"] == 10.0
    assert outcome.stats["ms_after"] == 9.6
    # one call, so that all are measured under the same conditions
    assert len(timer.calls) == 2  # `apply` runs twice
    asked = [signature(layer) for layer in timer.calls[0]]
    assert len(asked) == len(set(asked))
    # Conv_0 and three rivals, and the other three layers with one each
    assert len(asked) == 4 + 3 * 2


def test_layers_are_measured_with_what_is_fused_into_them() -> None:
    timer = Timer(lambda layer: float(len(layer.graph)))
    LowRank(rank=4).call(made(), Context(timer=timer))
    chains = {tuple(node.op_type for node in layer.graph) for layer in timer.calls[0]}
    assert chains == {
        ("Conv", "Relu"),
        ("Conv", "Conv", "Relu"),
        ("Conv", "Conv", "Conv", "Relu"),
        ("Conv",),
        ("Conv", "Conv"),
        ("Gemm", "Clip"),
        ("Gemm", "Gemm", "Clip"),
        ("MatMul", "Add"),
        ("MatMul", "MatMul", "Add"),
    }


def test_the_fastest_candidate_is_taken_even_where_it_multiplies_more() -> None:
    def cost(layer: ir.Model) -> float:
        kernels = [n.attributes.get_ints("kernel_shape", [1]) for n in layer.graph]
        return {1: 9.0, 2: 5.0, 3: 2.0}.get(len(kernels) - 1, 9.0)  # the Relu does not count

    outcome = LowRank(layers=("Conv_0",), rank=8).call(made(), Context(timer=Timer(cost)))
    assert by_name(outcome)["Conv_0"].startswith("tucker ranks 8 and 8, 9 ms → 2 ms")


def test_equal_layers_are_measured_once() -> None:
    model = made(
        "(float[1,16,6,6] x) => (float[1,16,6,6] y)",
        "a = Conv(x, w1) b = Conv(a, w2) y = Conv(b, w3)",
        {f"w{i}": random(16, 16, 1, 1, seed=i) for i in (1, 2, 3)},
    )
    timer = Timer(lambda layer: 1.0 / len(layer.graph))
    outcome = LowRank(rank=4).call(model, Context(timer=timer))
    assert [len(call) for call in timer.calls] == [2]
    assert outcome.stats["decomposed"] == 3
    assert outcome.stats["ms_before"] == 3.0
    assert outcome.stats["ms_after"] == 1.5


def test_what_multiplies_as_often_is_not_measured() -> None:
    timer = Timer(lambda _layer: 1.0)
    outcome = LowRank(error=0).call(made(), Context(timer=timer))
    assert not outcome.modified
    assert timer.calls == []
    reason = dict(outcome.skipped)["Gemm_6"]
    assert reason == (
        "the best, rank 16, has 576 multiply-accumulates, the layer itself 320 multiply-accumulates"
    )


def test_smaller_means_fewer_parameters() -> None:
    outcome = apply(LowRank(layers=("Gemm.*", "MatMul.*"), rank=8, keep="smaller"), made())
    assert by_name(outcome)["Gemm_6"].startswith("rank 8, 320 parameters → 288 parameters")
    assert dict(outcome.skipped) == {
        "MatMul_8": "the best, rank 8, has 240 parameters, the layer itself 200 parameters"
    }
    assert outcome.stats["parameters_before"] == 320
    assert outcome.stats["parameters_after"] == 288


def test_as_many_parameters_are_not_fewer() -> None:
    model = made("(float[1,8] x) => (float[1,8] y)", "y = MatMul(x, w)", {"w": random(8, 8)})
    outcome = apply(LowRank(rank=4, keep="smaller"), model)
    assert outcome.skipped == [
        ("MatMul_0", "the best, rank 4, has 64 parameters, the layer itself 64 parameters")
    ]


def test_always_takes_the_fewest_multiplications() -> None:
    outcome = apply(LowRank(layers=("Conv_0",), rank=8, keep="always"), made())
    # per position: channel 72·8+8·24, spatial 24·8+8·72, tucker 8·8+8·8·9+8·24
    assert by_name(outcome)["Conv_0"].startswith("channel rank 8, 110,592 ")


# Ranks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("simd_bytes", "align", "rank"), [(16, None, 4), (32, None, 8), (32, 1, 3), (16, 5, 5)]
)
def test_ranks_are_multiples_of_the_vector_width(
    simd_bytes: int, align: int | None, rank: int
) -> None:
    step = LowRank(layers=("Gemm_6",), rank=3, align=align, keep="always")
    outcome = step.call(made(), Context(simd_bytes=simd_bytes))
    assert weight(outcome.model, "dense").shape == (20, rank)


def test_energy_and_error_mean_the_same() -> None:
    found = []
    options: list[dict[str, float]] = [{"error": 0.3}, {"energy": 1 - 0.3**2}]
    for option in options:
        step = LowRank(layers=("Gemm_6",), align=1, keep="always", **option)  # type: ignore[arg-type]
        found.append(weight(step.call(made(), Context()).model, "dense").shape)
    assert found[0] == found[1]
    values = np.linalg.svd(WEIGHTS["dense"], compute_uv=False) ** 2
    rank = found[0][1]
    assert values[rank:].sum() <= 0.09 * values.sum() < values[rank - 1 :].sum()


def test_the_default_is_said() -> None:
    outcome = LowRank(keep="smaller").call(made(), Context())
    assert outcome.notes[:2] == [
        "layers may be off by 10% of their output; `error` sets a share",
        "the weights alone decided; give samples with --calib to keep outputs",
    ]
    outcome = LowRank(error=0.1, keep="smaller", recover=False).call(
        made(), Context(samples=samples())
    )
    assert all(": " in note for note in outcome.notes)


# Samples ------------------------------------------------------------------------------------------


def relative_error(before: ir.Model, after: ir.Model, data: Samples) -> float:
    pairs = [
        (answers(before, {"x": x[None]})[0], answers(after, {"x": x[None]})[0])
        for x in data.inputs["x"]
    ]
    lost = sum(float(np.sum((want - got) ** 2)) for want, got in pairs)
    return math.sqrt(lost / sum(float(np.sum(want**2)) for want, _ in pairs))


def one_conv() -> ir.Model:
    weights = {"w": random(24, 8, 3, 3), "b": random(24)}
    text = "(float[1,8,8,8] x) => (float[1,24,8,8] y)"
    return made(text, "y = Conv <pads=[1,1,1,1]> (x, w, b)", weights)


@pytest.mark.parametrize("method", ["channel", "spatial", "tucker"])
@pytest.mark.parametrize("error", [0.05, 0.2])
def test_outputs_are_off_by_no_more_than_the_error(method: Any, error: float) -> None:
    step = LowRank(method=method, error=error, align=1, keep="always", recover=False)
    outcome = step.call(one_conv(), Context(samples=samples()))
    got = relative_error(one_conv(), outcome.model, samples())
    assert got <= error
    assert outcome.modified
    said = float(outcome.notes[-1].rpartition("output error ")[2].rstrip("%")) / 100
    assert said <= error
    # what is said is a share of the variation; the mean makes the output larger
    assert got < said


def test_samples_make_outputs_better_at_the_same_rank() -> None:
    step = LowRank(rank=4, keep="always", recover=False)
    blind, seeing = (
        relative_error(made(), step.call(made(), context).model, samples())
        for context in (Context(), Context(samples=samples()))
    )
    assert seeing < 0.7 * blind


def test_layers_make_up_for_those_before() -> None:
    without, with_recovery = (
        LowRank(rank=4, keep="always", recover=recover).call(made(), Context(samples=samples()))
        for recover in (False, True)
    )
    assert without.modified
    assert with_recovery.stats == without.stats
    assert by_name(with_recovery) == by_name(without)
    assert with_recovery.notes[-1].startswith("refitted by least-squares; the largest")
    before, after = (
        relative_error(made(), outcome.model, samples()) for outcome in (without, with_recovery)
    )
    assert after < 0.9 * before


def test_a_layer_that_is_too_wide_for_samples_goes_by_its_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_moments, "LAYER_BYTES", 8 * 40**2)  # Conv_0 reads 72 numbers
    outcome = LowRank(rank=4, keep="always", recover=False).call(made(), Context(samples=samples()))
    assert "too wide to look at samples, so their weights decided: Conv_0" in outcome.notes
    assert " weight error " in by_name(outcome)["Conv_0"]
    assert " output error " in by_name(outcome)["Gemm_6"]


def test_progress_is_told() -> None:
    told: list[tuple[str, int, int]] = []
    context = Context(samples=samples(), progress=lambda *step: told.append(step))
    LowRank(rank=4, keep="always", recover=False).call(made(), context)
    assert ("measure moments", 24, 24) in told
    assert [step for step in told if step[0] == "decompose layers"] == [
        ("decompose layers", done, 4) for done in (1, 2, 3, 4)
    ]


def test_the_driver_judges_it_by_its_noise() -> None:
    assert pass_class("low-rank") is LowRank
    driver = Driver(made())
    driver.run([LowRank(rank=8, keep="smaller", recover=False)], Context(samples=samples()))
    (record,) = driver.records
    assert record.equivalence is not None
    assert record.equivalence.metric == "sqnr_db"
    assert record.stats["decomposed"] == 3
    assert ("Conv_2", "it has 24 groups; only convolutions of one group are decomposed") in (
        record.skipped
    )
