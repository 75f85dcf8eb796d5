from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.calibration.base import (
    Array,
    CalibrationError,
    Range,
    Samples,
    calibrator_class,
    calibrator_names,
)
from edgepress.passes import _taps
from edgepress.passes._shapes import refresh_shapes
from edgepress.passes.base import Context, PassRefused, pass_class
from edgepress.passes.calibrate import Calibrate
from tests.graphs import answers, apply, net, random

BODY = "c = Conv <pads=[1,1,1,1]> (x, w) r = Relu(c) g = GlobalAveragePool(r) y = Flatten(g)"


def model() -> ir.Model:
    made = net("(float[1,3,6,6] x) => (float[1,4] y)", BODY, {"w": random(4, 3, 3, 3)})
    refresh_shapes(made)
    return made


def context(n: int = 5, **inputs: Array) -> Context:
    return Context(samples=Samples({"x": random(n, 3, 6, 6)} | inputs))


def ranges(model: ir.Model) -> dict[str, Range]:
    values = [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]
    return {v.name or "": v.meta["range"] for v in values if "range" in v.meta}


def every_value(made: ir.Model, name: str, samples: Array) -> Array:
    """What a value is over all samples, by a model that outputs it."""
    copy = made.clone()
    copy.graph.outputs[:] = [v for n in copy.graph for v in n.outputs if v.name == name]
    return np.stack([answers(copy, {"x": sample[None]})[0] for sample in samples])


def test_it_is_found_by_name() -> None:
    assert pass_class("calibrate") is Calibrate


@pytest.mark.parametrize("method", calibrator_names())
def test_every_activation_gets_what_the_calibrator_answers(method: str) -> None:
    given_context = context()
    assert given_context.samples is not None
    made = model()
    outcome = apply(Calibrate(method=method), made, given_context)
    assert not outcome.modified
    assert outcome.stats == {"ranges": 5, "samples": 5}
    found = ranges(made)
    assert list(found) == ["x", "c", "r", "g", "y"]
    samples = given_context.samples.inputs["x"]
    for name in found:
        calibrator = calibrator_class(method)()
        values = samples if name == "x" else every_value(made, name, samples)
        for sweep in range(calibrator.sweeps):
            calibrator.observe(values, sweep)
        assert found[name] == calibrator.range()


def test_the_percentile_is_passed_on() -> None:
    wide, narrow = model(), model()
    apply(Calibrate(method="percentile"), wide, context())
    apply(Calibrate(method="percentile", percentile=50.0), narrow, context())
    assert ranges(narrow)["x"].high < 0.5 * ranges(wide)["x"].high


def test_ranges_survive_a_clone() -> None:
    made = model()
    apply(Calibrate(), made, context())
    assert ranges(made.clone()) == ranges(made)


@given(order=st.permutations(range(5)), method=st.sampled_from(calibrator_names()))
@settings(deadline=None, max_examples=12)
def test_the_order_of_samples_does_not_matter(order: list[int], method: str) -> None:
    one, other = model(), model()
    Calibrate(method=method).call(one, context())
    Calibrate(method=method).call(other, context(x=random(5, 3, 6, 6)[order]))
    assert ranges(one) == ranges(other)


@pytest.mark.parametrize("method", ["min_max", "mse"])
def test_activations_that_do_not_fit_are_watched_in_groups(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = model(), model()
    apply(Calibrate(method=method), whole, context())
    monkeypatch.setattr(_taps, "TAPPED_BYTES", 700)
    seen: list[tuple[int, int]] = []
    samples = context().samples
    watched = Context(samples=samples, progress=lambda _, done, total: seen.append((done, total)))
    Calibrate(method=method).call(parts, watched)
    assert ranges(parts) == ranges(whole)
    rounds = 3 * 5 * (2 if method == "mse" else 1)
    assert seen == [(done, rounds) for done in range(1, rounds + 1)]


def test_integer_values_and_constants_have_no_range() -> None:
    made = net(
        "(int64[1,4] ids) => (float[1,4,2] y)",
        "e = Gather(table, ids) y = Add(e, b)",
        {"table": random(9, 2), "b": random(2)},
    )
    refresh_shapes(made)
    apply(Calibrate(), made, Context(samples=Samples({"ids": np.arange(12).reshape(3, 4) % 9})))
    assert list(ranges(made)) == ["e", "y"]


@pytest.mark.parametrize(
    ("step", "given_context", "message"),
    [
        (Calibrate(method="minmax"), context(), "no calibration method is called 'minmax'. Did"),
        (Calibrate(percentile=99.0), context(), "method 'min_max' takes none"),
        (Calibrate(method="percentile", percentile=0.0), context(), "above 0 and at most 100"),
        (Calibrate(), Context(), "there are none; give some with --calib"),
        (Calibrate(), context(0), "there are none"),
        (Calibrate(), Context(samples=Samples({"z": random(2, 3)})), "no samples of it, only of z"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(
    step: Calibrate, given_context: Context, message: str
) -> None:
    with pytest.raises(PassRefused, match=message):
        step.requires(model(), given_context)


def test_shapes_must_be_fixed() -> None:
    made = net("(float[N,3] x) => (float[N,3] y)", "y = Relu(x)")
    with pytest.raises(PassRefused, match=r"input 'x': its shape \[N,3\] is not fixed"):
        Calibrate().requires(made, Context(samples=Samples({"x": random(2, 3)})))


@pytest.mark.parametrize(("value", "what"), [(0.0, "infinite"), (-1.0, "NaN")])
def test_values_that_are_not_finite_are_refused_by_name_and_sample(value: float, what: str) -> None:
    made = net("(float[1,2] x) => (float[1,2] y)", "l = Log(x) y = Relu(l)")
    refresh_shapes(made)
    samples = np.ones((4, 2), np.float32)
    samples[2, 1] = value
    with pytest.raises(
        PassRefused, match=rf"value 'l': node 'Log_0' \(Log\) makes it {what} for sample 2"
    ):
        Calibrate().call(made, Context(samples=Samples({"x": samples})))


def test_a_model_that_onnxruntime_cannot_run_is_refused() -> None:
    made = net("(float[1,2] x) => (float[1,2] y)", "y = Nonsense(x)")
    made.graph.node(0).outputs[0].dtype = ir.DataType.FLOAT
    with pytest.raises(PassRefused, match="model: onnxruntime cannot load it"):
        Calibrate().call(made, Context(samples=Samples({"x": random(2, 2)})))
    made = net(
        "(int64[1,2] x) => (float[1,2,3] y)", "y = Gather(table, x)", {"table": random(4, 3)}
    )
    refresh_shapes(made)
    with pytest.raises(PassRefused, match="sample 1: onnxruntime cannot run the model on it"):
        Calibrate().call(made, Context(samples=Samples({"x": np.array([[0, 3], [0, 4]])})))


def test_samples_that_do_not_fit_are_errors_of_the_samples() -> None:
    good = random(3, 3, 6, 6)
    nan, inf = good.copy(), good.copy()
    nan[1, 0, 0, 0], inf[2, 2, 5, 5] = np.nan, -np.inf
    for samples, message in (
        ({"x": nan}, "photos: 'x' is NaN in sample 1; remove the sample"),
        ({"x": inf}, "photos: 'x' is infinite in sample 2"),
        ({"x": good.astype(np.float64)}, r"'x' has dtype float64, .* is float32; convert"),
        ({"x": good[:, :, :5]}, r"shape \[3, 3, 5, 6\], expected \[n, 3, 6, 6\]"),
        ({"x": good.transpose(0, 2, 3, 1)}, r"shape \[3, 6, 6, 3\], expected"),
    ):
        with pytest.raises(CalibrationError, match=message):
            Calibrate().requires(model(), Context(samples=Samples(samples, source="photos")))


def test_a_calibrator_without_a_driver_refuses_what_has_no_range() -> None:
    for name in calibrator_names():
        with pytest.raises(CalibrationError, match="a value is NaN"):
            calibrator_class(name)().observe(np.array([1, np.nan], np.float32), 0)
        with pytest.raises(CalibrationError, match="a value is infinite"):
            calibrator_class(name)().observe(np.array([1, np.inf], np.float32), 0)


@pytest.mark.parametrize("method", calibrator_names())
def test_tensors_that_never_change_are_named(method: str) -> None:
    made = net(
        "(float[1,2,4,4] x) => (float[1,2,4,4] y, float[1,2,4,4] z)",
        "n = Neg(x) dead = Relu(n) c = Clip(x, six, six) y = Add(dead, x) z = Add(c, x)",
        {"six": np.array(6, np.float32)},
    )
    refresh_shapes(made)
    samples = Samples({"x": np.abs(random(3, 2, 4, 4))})
    (note,) = Calibrate(method=method).call(made, Context(samples=samples)).notes
    assert "one number in all samples: dead (0), c (6);" in note
    assert ranges(made)["dead"] == Range(0.0, 0.0)
    assert ranges(made)["c"] == Range(6.0, 6.0)


def test_many_tensors_that_never_change_are_counted() -> None:
    body = " ".join(f"v{i} = Relu({'x' if i == 0 else f'v{i - 1}'})" for i in range(12))
    made = net("(float[1,2] x) => (float[1,2] v11)", body)
    refresh_shapes(made)
    samples = Samples({"x": -np.abs(random(3, 2))})
    (note,) = Calibrate().call(made, Context(samples=samples)).notes
    assert "v0 (0), v1 (0)" in note
    assert "v7 (0) and 4 more" in note


def test_a_single_sample_or_equal_ones_are_noted() -> None:
    (note,) = Calibrate().call(model(), context(1)).notes
    assert note.startswith("all ranges come from a single sample")
    (note,) = Calibrate().call(model(), context(x=np.repeat(random(1, 3, 6, 6), 4, 0))).notes
    assert note.startswith("all 4 samples are equal")
    assert Calibrate().call(model(), context()).notes == []


def test_the_number_of_cores_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = ort.InferenceSession

    def session(content: bytes, options: ort.SessionOptions, **rest: Any) -> ort.InferenceSession:
        seen.append(options.intra_op_num_threads)
        return real(content, options, **rest)

    monkeypatch.setattr(ort, "InferenceSession", session)
    Calibrate().call(model(), context())
    assert seen == [1]
