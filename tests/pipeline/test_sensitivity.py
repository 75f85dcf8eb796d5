"""What cutting a channel group alone does: against NumPy, with a timer that counts weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.calibration.base import Samples
from edgepress.passes.base import Context, Outcome, PassRefused, refresh_shapes
from edgepress.passes.prune_channels import PruneChannels
from edgepress.pipeline import sensitivity
from edgepress.pipeline.cache import Cache
from edgepress.pipeline.load import ModelError
from edgepress.pipeline.sensitivity import GroupSensitivity, Sensitivity, measure_sensitivity
from tests.graphs import Array, answers, net, random, weight
from tests.pipeline.sensitivities import ElementTimer, attention, measured, of_cuts

RANKED = np.random.default_rng(1).permutation(16)  # hidden units, the least important first


def dense_weights() -> dict[str, Array]:
    """Hidden unit RANKED[i] has weights i+1 times as large, so any norm ranks the units so."""
    scale = np.empty(16, np.float32)
    scale[RANKED] = np.arange(1, 17, dtype=np.float32) / 8
    return {
        "w0": np.sign(random(6, 16)) * scale,
        "b0": random(16),
        "w1": random(16, 8),
        "b1": random(8),
        "w2": random(8, 5),
        "b2": random(5),
    }


def dense() -> ir.Model:
    """6 → 16 → 8 → 5, all dense."""
    model = net(
        "(float[1,6] x) => (float[1,5] y)",
        """a = Gemm(x, w0, b0)
           r = Relu(a)
           b = Gemm(r, w1, b1)
           s = Relu(b)
           y = Gemm(s, w2, b2)""",
        dense_weights(),
    )
    refresh_shapes(model, "test")
    return model


def dense_answers(x: Array, cut: Array) -> Array:
    """The net in NumPy without the hidden units of `cut`: `[n, 5]`."""
    w = {name: array.astype(np.float64) for name, array in dense_weights().items()}
    hidden = np.maximum(x @ w["w0"] + w["b0"], 0)
    hidden[:, cut] = 0
    return np.maximum(hidden @ w["w1"] + w["b1"], 0) @ w["w2"] + w["b2"]


def decibels(expected: Array, got: Array) -> float:
    return float(10 * np.log10(np.sum(expected**2) / np.sum((got - expected) ** 2)))


def by_name(found: Sensitivity) -> dict[str, GroupSensitivity]:
    return {group.name: group for group in found.groups}


def test_errors_are_those_of_the_net_without_its_least_channels() -> None:
    x = random(12, 6)
    found = measure_sensitivity(dense(), Samples({"x": x}))
    group = by_name(found)["Gemm_0"]
    assert (group.channels, group.free, group.layers) == (16, 16, ["Gemm_0"])
    assert [cut.channels for cut in group.cuts] == [4, 8, 12]
    whole = dense_answers(x, RANKED[:0])
    for cut in group.cuts:
        left = dense_answers(x, RANKED[: cut.channels])
        assert cut.sqnr_db == pytest.approx(decibels(whole, left), abs=0.01)
        same = np.mean(whole.argmax(axis=1) == left.argmax(axis=1))
        assert cut.agreement == pytest.approx(100 * same, abs=0.01)
        assert cut.macs_saved == cut.channels * (6 + 8)
        assert cut.saved is None
    assert found.samples == 12
    assert found.macs == 6 * 16 + 16 * 8 + 8 * 5
    assert (found.unit, found.cost, found.unmeasured) == (None, None, [])


def test_saved_is_the_cost_of_the_changed_layers_before_minus_after() -> None:
    timer = ElementTimer()
    found = measure_sensitivity(dense(), Samples({"x": random(4, 6)}), timer=timer)
    assert (found.unit, found.cost) == ("ms", 6 * 16 + 16 + 16 * 8 + 8 + 8 * 5 + 5)
    groups = by_name(found)
    # a unit of the first layer: 6 weights and a bias, and 8 weights that read it
    assert [cut.saved for cut in groups["Gemm_0"].cuts] == [4 * 15, 8 * 15, 12 * 15]
    assert [cut.saved for cut in groups["Gemm_2"].cuts] == [4 * (16 + 1 + 5)]
    assert found.share(groups["Gemm_2"].cuts[0]) == pytest.approx(4 * 22 / 293)


def test_all_layers_are_measured_in_one_call_each_once() -> None:
    timer = ElementTimer()
    measure_sensitivity(dense(), Samples({"x": random(4, 6)}), timer=timer)
    (asked,) = timer.calls
    shapes = [tuple(weight(layer, "w1").shape) for layer in asked]
    expected = {(6, 16), (16, 8), (8, 5)}  # the net
    expected |= {(6, 12), (6, 8), (6, 4), (12, 8), (8, 8), (4, 8)}  # without units of the first
    expected |= {(16, 4), (4, 5)}  # without units of the second
    assert set(shapes) == expected
    assert len(shapes) == len(expected)


def test_widths_are_whole_vectors_and_equal_ones_are_one_cut() -> None:
    found = measure_sensitivity(dense(), Samples({"x": random(4, 6)}), vector_bytes=32)
    assert [cut.channels for cut in by_name(found)["Gemm_0"].cuts] == [8]  # of 4, 8 and 12
    assert found.kept == [
        ("Gemm_2", "its 8 channels fill no more than one vector of 8"),
        ("Gemm_4", "y is an output of the model"),
    ]


def test_shares_that_round_to_no_channel_say_so() -> None:
    found = measure_sensitivity(dense(), Samples({"x": random(4, 6)}), shares=(0.05,))
    assert found.groups == []
    assert dict(found.kept)["Gemm_0"] == "5% of it rounds to no channel"


def test_a_group_that_the_pass_refuses_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    call = PruneChannels.call

    def refuse(step: PruneChannels, model: ir.Model, context: Context) -> Outcome:
        if step.amount == {"Gemm_2": 0.5}:
            raise PassRefused(step.name, "Gemm_2", "it is dear to me")
        return call(step, model, context)

    monkeypatch.setattr(PruneChannels, "call", refuse)
    samples = Samples({"x": random(4, 6)})
    found = measure_sensitivity(dense(), samples, shares=(0.5,))
    assert list(by_name(found)) == ["Gemm_0"]
    assert found.kept[0] == ("Gemm_2", "it is dear to me")


def test_the_model_is_left_as_it_is() -> None:
    model = dense()
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    measure_sensitivity(model, Samples({"x": random(4, 6)}), timer=ElementTimer())
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def residual(seed: int) -> ir.Model:
    """Conv_0 and Conv_3 make 8 channels that are added; Conv_1 makes 16 that Conv_2 filters."""
    model = net(
        "(float[1,3,6,6] x) => (float[1,4] y)",
        """a = Conv(x, w0, b0)
           b = Conv(a, w1, b1)
           c = Conv<group=16, pads=[1,1,1,1]>(b, w2, b2)
           d = Conv(c, w3, b3)
           e = Add(d, a)
           f = Relu(e)
           g = GlobalAveragePool(f)
           h = Flatten(g)
           y = Gemm(h, w8)""",
        {
            "w0": random(8, 3, 1, 1, seed=seed),
            "b0": random(8, seed=seed),
            "w1": random(16, 8, 1, 1, seed=seed),
            "b1": random(16, seed=seed),
            "w2": random(16, 1, 3, 3, seed=seed),
            "b2": random(16, seed=seed + 1),
            "w3": random(8, 16, 1, 1, seed=seed),
            "b3": random(8, seed=seed + 1),
            "w8": random(8, 4, seed=seed),
        },
    )
    refresh_shapes(model, "test")
    return model


def without(model: ir.Model, makers: str, cut: int) -> ir.Model:
    """Zero the channels of least mean magnitude in all weights and biases that make them."""
    masked = model.clone()
    scores = sum(
        np.abs(weight(model, f"w{i}")).reshape(len(weight(model, f"w{i}")), -1).mean(axis=1)
        for i in makers
    )
    least = np.argsort(scores)[:cut]
    for i in makers:
        for kind in "wb":
            array = weight(model, f"{kind}{i}").copy()
            array[least] = 0
            masked.graph.initializers[f"{kind}{i}"].const_value = ir.tensor(array)
    return masked


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**16))
def test_cutting_a_group_is_masking_all_its_layers(seed: int) -> None:
    model, x = residual(seed), random(5, 3, 6, 6, seed=seed)
    found = measure_sensitivity(model, Samples({"x": x}))
    groups = by_name(found)
    assert {name: group.layers for name, group in groups.items()} == {
        "Conv_0": ["Conv_0", "Conv_3"],
        "Conv_1": ["Conv_1", "Conv_2"],
    }
    for name, makers in (("Conv_0", "03"), ("Conv_1", "12")):
        for cut in groups[name].cuts:
            masked = without(model, makers, cut.channels)
            whole = np.stack([answers(model, {"x": one[None]})[0] for one in x])
            left = np.stack([answers(masked, {"x": one[None]})[0] for one in x])
            assert cut.sqnr_db == pytest.approx(decibels(whole, left), abs=0.02)


def test_every_output_and_input_counts() -> None:
    """Two outputs that hang on different channels, one of them on tokens."""
    model = net(
        "(int64[1,3] ids, float[1,6] x) => (float[1,3,2] u, float[1,2] v, int64[1] top)",
        """e = Gather(table, ids)
           u = MatMul(e, w1)
           h = MatMul(x, w2)
           v = MatMul(h, w4)
           top = ArgMax<axis=1, keepdims=0>(v)""",
        {
            "table": random(9, 8),
            "w1": random(8, 2),
            "w2": random(6, 8),
            "w4": random(8, 2),
        },
    )
    refresh_shapes(model, "test")
    ids = np.random.default_rng(0).integers(0, 9, (6, 3))
    found = measure_sensitivity(
        model, Samples({"ids": ids, "x": random(6, 6)}), timer=ElementTimer(), shares=(0.5,)
    )
    groups = by_name(found)
    assert set(groups) == {"Gather_0", "MatMul_2"}
    table, w1, w2, w4 = (weight(model, name) for name in ("table", "w1", "w2", "w4"))
    u, v = table[ids] @ w1, random(6, 6) @ w2 @ w4
    signal = np.sum(u**2) + np.sum(v**2)
    least = np.argsort(np.abs(table).sum(axis=0))[:4]
    noise = np.sum((table[:, least][ids] @ w1[least]) ** 2)
    (cut,) = groups["Gather_0"].cuts
    assert cut.sqnr_db == pytest.approx(10 * np.log10(signal / noise), abs=0.01)
    assert cut.agreement is None  # u is no vector of scores
    assert cut.saved == 4 * 2  # the table is no layer
    least = np.argsort(np.abs(w2).sum(axis=0))[:4]
    noise = np.sum((random(6, 6) @ w2[:, least] @ w4[least]) ** 2)
    (cut,) = groups["MatMul_2"].cuts
    assert cut.sqnr_db == pytest.approx(10 * np.log10(signal / noise), abs=0.01)
    assert cut.saved == 4 * (6 + 2)


def test_products_of_activations_are_named_and_not_counted() -> None:
    found = measure_sensitivity(
        attention(), Samples({"x": random(2, 5, 7)}), timer=ElementTimer(), shares=(0.5,)
    )
    assert found.unmeasured == [("MatMul_9", "MatMul"), ("MatMul_11", "MatMul")]
    assert found.cost == 3 * 7 * 16 + 16 * 3
    ((group, cut),) = [(group, cut) for group in found.groups for cut in group.cuts]
    assert (group.name, group.layers) == ("MatMul_0", ["MatMul_0", "MatMul_1", "MatMul_2"])
    assert (group.channels, cut.channels) == (2, 1)
    assert cut.saved == 3 * 7 * 8 + 8 * 3
    assert cut.macs_saved == 5 * (3 * 7 * 8 + 8 * 3) + 2 * 5 * 5 * 8


def test_nothing_is_known_of_a_cut_that_changes_no_measured_layer() -> None:
    model = net(
        "(float[1,3,4,4] x) => (float[1,2,4,4] y, float[1,2,4,4] z)",
        "a = ConvTranspose(x, w0) y = ConvTranspose(a, w1) z = Conv(x, w2)",
        {"w0": random(3, 8, 1, 1), "w1": random(8, 2, 1, 1), "w2": random(2, 3, 1, 1)},
    )
    refresh_shapes(model, "test")
    samples = Samples({"x": random(2, 3, 4, 4)})
    found = measure_sensitivity(model, samples, timer=ElementTimer())
    (group,) = found.groups
    assert [cut.saved for cut in group.cuts] == [None]
    assert found.cost == 6
    assert found.unmeasured == [
        ("ConvTranspose_0", "ConvTranspose"),
        ("ConvTranspose_1", "ConvTranspose"),
    ]
    assert found.merit(group) == 0
    written = found.to_json()["groups"][0]["cuts"][0]
    assert (written["saved"], written["saved_share"]) == (None, None)


def test_without_any_layer_the_timer_is_not_asked() -> None:
    text = "(float[1,3,4,4] x) => (float[1,2,4,4] y)"
    model = net(text, "y = ConvTranspose(x, w)", {"w": random(3, 2, 1, 1)})
    refresh_shapes(model, "test")
    timer = ElementTimer()
    found = measure_sensitivity(model, Samples({"x": random(2, 3, 4, 4)}), timer=timer)
    assert timer.calls == []
    assert (found.unit, found.cost) == (None, None)


def test_operators_without_a_rule_are_named() -> None:
    model = net(
        "(float[1,3,4,4] x) => (float[1,2,4,4] y)",
        "a = Conv(x, w0) b = LpNormalization<axis=1>(a) y = Conv(b, w1)",
        {"w0": random(8, 3, 1, 1), "w1": random(2, 8, 1, 1)},
    )
    refresh_shapes(model, "test")
    found = measure_sensitivity(model, Samples({"x": random(2, 3, 4, 4)}))
    assert found.unknown == [("LpNormalization_1", "LpNormalization")]
    assert "LpNormalization_1" in dict(found.kept)["Conv_0"]


def test_merit_is_the_share_saved_per_relative_error_of_the_smallest_cut() -> None:
    group = of_cuts("a", (20.0, 2.0), (0.0, 9.0))
    assert measured(group).merit(group) == pytest.approx(0.2 / 0.1)
    assert measured(group, unit=None).merit(group) == pytest.approx(0.1 / 0.1)  # of the MACs


def test_the_best_groups_come_first() -> None:
    """Equal layers side by side; the second hardly reaches the output."""
    weights = {f"w{i}": random(6, 8, seed=i) for i in range(3)}
    weights |= {f"v{i}": random(8, 5, seed=i) * s for i, s in enumerate((1.0, 0.01, 0.1))}
    body = "".join(f"h{i} = MatMul(x, w{i}) o{i} = MatMul(h{i}, v{i}) " for i in range(3))
    model = net("(float[1,6] x) => (float[1,5] y)", f"{body} y = Sum(o0, o1, o2)", weights)
    refresh_shapes(model, "test")
    found = measure_sensitivity(model, Samples({"x": random(8, 6)}), timer=ElementTimer())
    assert [group.name for group in found.groups] == ["MatMul_2", "MatMul_4", "MatMul_0"]
    merits = [found.merit(group) for group in found.groups]
    assert merits == sorted(merits, reverse=True)
    json_names = [group["name"] for group in found.to_json()["groups"]]
    assert json_names == [group.name for group in found.groups]


def test_json_has_all_figures_and_the_shares() -> None:
    document = measured(of_cuts("a", (20.0, 2.0), (3.0, -1.0))).to_json()
    assert document == {
        "kind": "sensitivity",
        "target": "native",
        "device": "local",
        "unit": "ms",
        "cost": 10.0,
        "macs": 1000,
        "samples": 4,
        "groups": [
            {
                "name": "a",
                "channels": 16,
                "free": 16,
                "layers": ["a"],
                "cuts": [
                    {
                        "channels": 4,
                        "sqnr_db": 20.0,
                        "agreement": None,
                        "macs_saved": 100,
                        "saved": 2.0,
                        "saved_share": 0.2,
                    },
                    {
                        "channels": 8,
                        "sqnr_db": 3.0,
                        "agreement": None,
                        "macs_saved": 200,
                        "saved": -1.0,
                        "saved_share": -0.1,
                    },
                ],
            }
        ],
        "kept": [],
        "unknown": [],
        "unmeasured": [],
    }
    (group,) = measured(of_cuts("a", (20.0, None)), unit=None).to_json()["groups"]
    assert group["cuts"][0]["saved_share"] is None


def test_errors_come_from_the_cache_the_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, samples = Cache(tmp_path), Samples({"x": random(4, 6)})
    found = measure_sensitivity(dense(), samples, cache=cache)
    assert found == measure_sensitivity(dense(), samples)

    class NoOracle:
        def __init__(self, *_arguments: object) -> None:
            raise AssertionError("the model is run again")

    with monkeypatch.context() as patch:
        patch.setattr(sensitivity, "Oracle", NoOracle)
        again = measure_sensitivity(dense(), samples, cache=cache)
        assert again == found
        with pytest.raises(ModelError, match="run again"):  # for other samples
            measure_sensitivity(dense(), Samples({"x": random(4, 6, seed=1)}), cache=cache)
    other = measure_sensitivity(dense(), Samples({"x": random(4, 6, seed=1)}), cache=cache)
    assert other.groups != found.groups


def test_a_model_that_the_reference_cannot_run_is_refused() -> None:
    model = dense()
    model.ir_version = 999
    with pytest.raises(ModelError, match="onnxruntime"):
        measure_sensitivity(model, Samples({"x": random(4, 6)}))
