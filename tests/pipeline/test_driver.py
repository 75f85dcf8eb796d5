# ruff: noqa: ARG002 - overriding keeps the names of the arguments
"""The driver, with passes of its own that break one promise each."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest

from edgepress.calibration.base import Range, Samples
from edgepress.passes.base import Context, NotEquivalent, Outcome, Pass, PassError, PassRefused
from edgepress.pipeline import snapshot
from edgepress.pipeline.cache import Cache
from edgepress.pipeline.driver import Driver

TEXT = """
<ir_version: 8, opset_import: ["" : 13]>
g (float[1, 4] x) => (float[1, 3] y)
{
   h = MatMul(x, w)
   y = Relu(h)
}
"""
CALLS: list[str] = []
TIMED: list[float] = []


def net() -> ir.Model:
    weights = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
    return ir.from_onnx_text(TEXT, initializers=[ir.tensor(weights, name="w")])


def scale_weights(model: ir.Model, factor: float) -> None:
    value = model.graph.initializers["w"]
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(factor), name="w")


@dataclass(frozen=True, kw_only=True)
class Scale(Pass):
    lossless: ClassVar[bool] = False
    factor: float = 1.0

    def call(self, model: ir.Model, context: Context) -> Outcome:
        CALLS.append("scale")
        scale_weights(model, self.factor)
        notes, skipped = ["read me"], [("h", "why")]
        return Outcome(model=model, modified=True, stats={"n": 1}, notes=notes, skipped=skipped)


@dataclass(frozen=True, kw_only=True)
class Wrong(Pass):
    factor: float = 1.01

    def call(self, model: ir.Model, context: Context) -> Outcome:
        scale_weights(model, self.factor)
        return Outcome(model=model, modified=True)


@dataclass(frozen=True, kw_only=True)
class Observe(Pass):
    @property
    def needs_samples(self) -> bool:
        return True

    def call(self, model: ir.Model, context: Context) -> Outcome:
        CALLS.append("observe")
        for value in (*model.graph.inputs, *model.graph.outputs):
            value.meta["range"] = Range(-1.5, float(np.float32(0.1)))
        return Outcome(model=model, modified=False)


@dataclass(frozen=True, kw_only=True)
class Mark(Pass):
    """Notes something in the metadata, and may break its promise at that."""

    factor: float = 1.0

    def call(self, model: ir.Model, context: Context) -> Outcome:
        scale_weights(model, self.factor)
        model.metadata_props["mark"] = "set"
        return Outcome(model=model, modified=True)


@dataclass(frozen=True, kw_only=True)
class Train(Pass):
    lossless: ClassVar[bool] = False

    @property
    def needs_training(self) -> bool:
        return True

    def call(self, model: ir.Model, context: Context) -> Outcome:
        CALLS.append("train")
        assert context.training is not None
        scale_weights(model, float(context.training.inputs["x"].mean()))
        return Outcome(model=model, modified=True)


@dataclass(frozen=True, kw_only=True)
class Timing(Pass):
    """Notes what the timer that it got says of its model."""

    @property
    def needs_timer(self) -> bool:
        return True

    def call(self, model: ir.Model, context: Context) -> Outcome:
        assert context.timer is not None
        CALLS.append("time")
        TIMED.extend(context.timer([model]))
        return Outcome(model=model, modified=False)


@dataclass(frozen=True)
class Timer:
    """A timer for which every layer costs the same."""

    cost: float
    key: str = "key"
    unit: str = "ms"

    def __call__(self, layers: Sequence[ir.Model]) -> list[float]:
        return [self.cost] * len(layers)


@dataclass(frozen=True, kw_only=True)
class Invalid(Pass):
    def call(self, model: ir.Model, context: Context) -> Outcome:
        next(iter(model.graph)).op_type = "NoSuchOperator"
        return Outcome(model=model, modified=True)


@dataclass(frozen=True, kw_only=True)
class Refusing(Pass):
    def requires(self, model: ir.Model, context: Context) -> None:
        raise PassRefused(self.name, "h", "it is blue; paint it")

    def call(self, model: ir.Model, context: Context) -> Outcome:
        raise AssertionError


SAMPLES = Samples({"x": np.ones((2, 4), np.float32)})
OTHERS = Samples({"x": np.zeros((2, 4), np.float32)})


def ranges(model: ir.Model) -> dict[str | None, Range]:
    return {v.name: v.meta["range"] for v in snapshot.values(model) if "range" in v.meta}


def test_a_lossy_pass_is_recorded() -> None:
    driver = Driver(net())
    driver.run([Scale(factor=1.01)], Context())
    (record,) = driver.records
    assert record.pass_name == "test-driver"
    assert record.options == {"factor": 1.01}
    assert (record.parameters, record.macs, record.size_bytes) == (12, 12, 48)
    assert record.equivalence is not None
    assert record.equivalence.metric == "sqnr_db"
    assert record.equivalence.value == pytest.approx(40.0, abs=0.1)  # 1 % of noise
    assert record.skipped == [("h", "why")]


def test_a_lossless_pass_must_be_lossless() -> None:
    driver = Driver(net())
    before = driver.snapshot
    with pytest.raises(NotEquivalent) as caught:
        driver.run([Wrong()], Context())
    assert caught.value.got == pytest.approx(0.01, rel=0.01)
    assert driver.snapshot == before
    assert snapshot.take(driver.model) == before, "the model before the pass must not change"


def test_rounding_is_lossless() -> None:
    driver = Driver(net())
    driver.run([Wrong(factor=1 + 1e-6)], Context())
    equivalence = driver.records[0].equivalence
    assert equivalence is not None
    assert equivalence.metric == "max_error"
    assert 0 < equivalence.value < 1e-5


def test_metadata_alone_is_not_compared_and_keeps_ranges() -> None:
    driver = Driver(net())
    driver.run([Observe(), Mark()], Context(samples=SAMPLES))
    (_, record) = driver.records
    assert record.modified
    assert record.equivalence is None
    assert ranges(driver.model) == ranges(driver.snapshot.load())
    assert set(ranges(driver.model)) == {"x", "y"}
    assert driver.snapshot.load().metadata_props == {"mark": "set"}


def test_metadata_hides_no_other_change() -> None:
    driver = Driver(net())
    with pytest.raises(NotEquivalent):
        driver.run([Mark(factor=1.01)], Context())
    driver = Driver(net())
    driver.run([Observe(), Mark(factor=1 + 1e-6)], Context(samples=SAMPLES))
    assert driver.records[-1].equivalence is not None
    assert ranges(driver.model) == {}


def test_an_invalid_model_is_refused() -> None:
    with pytest.raises(PassError):
        Driver(net()).run([Invalid()], Context())


def test_a_refusal_is_passed_on() -> None:
    with pytest.raises(PassRefused, match="it is blue"):
        Driver(net()).run([Refusing()], Context())


def test_samples_are_demanded() -> None:
    with pytest.raises(PassRefused, match="--calib"):
        Driver(net()).run([Observe()], Context())


def test_training_samples_are_demanded() -> None:
    with pytest.raises(PassRefused, match="--train"):
        Driver(net()).run([Train()], Context())


def test_what_was_trained_on_other_samples_is_trained_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    ones = Samples(inputs={"x": np.ones((3, 4), np.float32)})
    contexts = [
        Context(training=ones),
        Context(training=ones),
        Context(training=Samples(inputs={"x": 2 * ones.inputs["x"]})),
        Context(training=ones, original=net()),
    ]
    CALLS.clear()
    digests = []
    for context in contexts:
        driver = Driver(net(), cache=cache)
        driver.run([Train()], context)
        digests.append(driver.snapshot.digest)
    assert CALLS == ["train"] * 3
    assert digests[0] == digests[1] == digests[3] != digests[2]


def test_training_samples_are_nothing_to_other_passes(tmp_path: Path) -> None:
    cache, driver = Cache(tmp_path), Driver(net())
    samples = Samples(inputs={"x": np.ones((3, 4), np.float32)})
    for training in (None, samples):
        driver = Driver(net(), cache=cache)
        driver.run([Scale(factor=2.0)], Context(training=training))
    assert driver.records[0].cached


def test_ranges_live_until_the_model_changes() -> None:
    driver = Driver(net())
    driver.run([Observe()], Context(samples=SAMPLES))
    assert ranges(driver.model) == {
        name: Range(-1.5, float(np.float32(0.1))) for name in ("x", "y")
    }
    assert ranges(driver.snapshot.load()) == ranges(driver.model)
    driver.run([Scale(factor=2.0)], Context(samples=SAMPLES))
    assert ranges(driver.model) == {}


def test_a_finished_step_is_not_run_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    steps = [Scale(factor=1.5), Observe(), Scale(factor=0.5)]
    context = Context(samples=SAMPLES)
    first = Driver(net(), cache=cache)
    first.run(steps, context)
    CALLS.clear()
    second = Driver(net(), cache=cache)
    second.run(steps, context)
    assert CALLS == []
    assert all(record.cached for record in second.records)
    assert [r.facts() for r in second.records] == [r.facts() for r in first.records]
    assert second.snapshot == first.snapshot
    assert snapshot.take(second.model) == first.snapshot


@pytest.mark.parametrize(
    ("steps", "context", "again"),
    [
        ([Scale(factor=1.5), Observe()], Context(samples=SAMPLES), []),
        ([Scale(factor=1.25), Observe()], Context(samples=SAMPLES), ["scale", "observe"]),
        # a pass that ignores samples is judged on them all the same
        ([Scale(factor=1.5), Observe()], Context(samples=OTHERS), ["scale", "observe"]),
        (
            [Scale(factor=1.5), Observe()],
            Context(samples=SAMPLES, simd_bytes=64),
            ["scale", "observe"],
        ),
        (
            [Scale(factor=1.5), Observe()],
            Context(samples=SAMPLES, input_shapes={"x": (1, 4)}),
            ["scale", "observe"],
        ),
    ],
)
def test_only_what_changed_runs_again(
    tmp_path: Path, steps: list[Pass], context: Context, again: list[str]
) -> None:
    cache = Cache(tmp_path)
    Driver(net(), cache=cache).run([Scale(factor=1.5), Observe()], Context(samples=SAMPLES))
    CALLS.clear()
    Driver(net(), cache=cache).run(steps, context)
    assert again == CALLS


def test_the_judgement_is_that_of_the_samples_that_were_given(tmp_path: Path) -> None:
    """Not of those that a cached step was judged on."""
    cache, step = Cache(tmp_path), Scale(factor=1.01)
    figures = []
    for samples in (SAMPLES, Samples({"x": np.eye(4, dtype=np.float32)}), None):
        driver = Driver(net(), cache=cache)
        driver.run([step], Context(samples=samples))
        assert driver.records[0].equivalence is not None
        assert not driver.records[0].cached
        figures.append(driver.snapshot.digest)
    assert len(set(figures)) == 1


def test_every_pass_gets_its_own_timer() -> None:
    TIMED.clear()
    driver = Driver(net())
    driver.run([Timing(), Scale(), Timing()], Context(), [Timer(1.5), None, Timer(2.5)])
    assert TIMED == [1.5, 2.5]
    driver.run([Timing()], Context(timer=Timer(3.5)))
    assert TIMED == [1.5, 2.5, 3.5]
    with pytest.raises(ValueError, match="zip"):
        driver.run([Timing()], Context(), [])


def test_what_was_measured_with_another_timer_is_measured_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path)

    def runs(timer: Timer) -> list[str]:
        CALLS.clear()
        Driver(net(), cache=cache).run([Timing()], Context(timer=timer))
        return list(CALLS)

    assert runs(Timer(1.0)) == ["time"]
    assert runs(Timer(2.0)) == []
    assert runs(Timer(1.0, key="another")) == ["time"]


def test_ranges_are_in_the_key() -> None:
    observed = net()
    observed.graph.inputs[0].meta["range"] = Range(0.0, 1.0)
    assert snapshot.take(observed).digest != snapshot.take(net()).digest
    assert snapshot.take(observed).model == snapshot.take(net()).model
