"""A model that misses its gate on accuracy is raised until it holds: figures by onnxruntime."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgepress.calibration.base import Samples
from edgepress.passes.analysis import QuantizationSwitches
from edgepress.passes.base import Context, Outcome, Pass, PassRefused, refresh_shapes
from edgepress.passes.calibrate import Calibrate
from edgepress.passes.quantize_int8 import QuantizeInt8
from edgepress.pipeline import mixed_precision, oracle
from edgepress.pipeline.cache import Cache
from edgepress.pipeline.driver import Driver
from edgepress.pipeline.mixed_precision import (
    MixedPrecision,
    Task,
    Trial,
    has_accuracy_gate,
    raise_precision,
    shortfall,
)
from edgepress.pipeline.oracle import Oracle
from edgepress.pipeline.precision_moves import LayerError
from edgepress.pipeline.progress import Progress
from edgepress.pipeline.recipe import FLOAT, INT16, Budget
from tests.graphs import answers, net, random


def hostile(*, scores: bool = True) -> ir.Model:
    """Four layers; one value of the first is eight times as large as the others."""
    large = random(12, 6, seed=1)
    large[0] *= 8
    small = random(12, 12, seed=2)
    small[:, 0] /= 8
    model = net(
        f"(float[1,6] x) => (float[{'1,5' if scores else '5,1'}] y)",
        """a = Gemm<transB=1>(x, w1) b = Relu(a)
           c = Gemm<transB=1>(b, w2) d = Tanh(c)
           e = Gemm<transB=1>(d, w3) y = """
        + ("Relu(e)" if scores else "Transpose(e)"),
        {"w1": large, "w2": small, "w3": random(5, 12, seed=3)},
    )
    for node in model.graph:
        # names that are regular expressions of something else
        node.name = f"net.{node.name}(1+)"
    refresh_shapes(model, "test")
    return model


def samples() -> Samples:
    """What the model is calibrated with."""
    return Samples({"x": random(24, 6, seed=4)})


def others(count: int = 24, *, labels: bool = False) -> Samples:
    """What decides: within what calibration saw, or else 16 bits saturate just as 8 do."""
    rng = np.random.default_rng(7)
    x = samples().inputs["x"][rng.integers(0, 24, count)]
    x = x * rng.uniform(0.6, 1, (count, 1)).astype(np.float32)
    if not labels:
        return Samples({"x": x})
    found = [int(np.argmax(answers(hostile(), {"x": row[None]})[0])) for row in x]
    return Samples({"x": x}, np.array(found))


def task(
    budget: Budget,
    model: ir.Model | None = None,
    *,
    evaluation: Samples | None = None,
    quantize: QuantizeInt8 | None = None,
    cache: Cache | None = None,
) -> tuple[Task, Driver]:
    """Calibrate and quantize, as `prepare` does before anything is raised."""
    context = Context(samples=samples())
    driver = Driver(model or hostile())
    original = driver.snapshot
    driver.run([Calibrate()], context)
    base = driver.snapshot
    passes = (quantize or QuantizeInt8(),)
    driver.run(passes, context)
    made = Task(
        base=base,
        passes=passes,
        timers=(None,),
        context=context,
        budget=budget,
        original=original,
        evaluation=evaluation,
        cache=cache,
        progress=Progress(shown=False),
    )
    return made, driver


def raised(budget: Budget, model: ir.Model | None = None, **how: Any) -> MixedPrecision | None:
    made, driver = task(budget, model, **how)
    return raise_precision(made, driver.snapshot, driver.records[1:])


def found(budget: Budget, model: ir.Model | None = None, **how: Any) -> MixedPrecision:
    result = raised(budget, model, **how)
    assert result is not None
    return result


def sqnr_db(trial: Trial, data: Samples) -> float:
    """The figure of a trial, in NumPy."""
    signal = noise = 0.0
    for row in data.inputs["x"]:
        (want,) = answers(hostile(), {"x": row[None]})
        (got,) = answers(trial.model.load(), {"x": row[None]})
        signal += float(np.sum(np.square(want, dtype=np.float64)))
        noise += float(np.sum(np.square(want.astype(np.float64) - got)))
    return float(10 * np.log10(signal / noise)) if noise else 200.0


def test_nothing_is_raised_where_the_gate_holds() -> None:
    assert raised(Budget(sqnr_db=1.0)) is None
    assert raised(Budget(accuracy_drop=100.0)) is None


@pytest.mark.parametrize("limit_db", [30.0, 35.0, 45.0, 60.0])
def test_layers_are_raised_until_the_gate_holds(limit_db: float) -> None:
    data = others()
    result = found(Budget(sqnr_db=limit_db), evaluation=data)
    first, best = result.trials[0], result.best
    assert (first.int16, first.floats, first.holds) == ((), (), False)
    assert best.holds
    assert best.figures["sqnr_db"] >= limit_db
    for trial in result.trials:
        assert trial.figures["sqnr_db"] == pytest.approx(sqnr_db(trial, data), abs=0.01)
        assert trial.holds == (trial.figures["sqnr_db"] >= limit_db)
        raised_layers = len(trial.int16) + len(trial.floats)
        assert not trial.holds or raised_layers >= len(best.int16) + len(best.floats)
    assert not result.notes


def test_the_layer_that_costs_most_is_raised_first() -> None:
    reached = {}
    for node in hostile().graph:
        _, driver = task(Budget(), quantize=QuantizeInt8(int16=(re.escape(node.name or ""),)))
        alone = Oracle(driver.snapshot.model)
        got = [alone.run({"x": row[None]}) for row in samples().inputs["x"]]
        want = [{"y": answers(hostile(), {"x": row[None]})[0]} for row in samples().inputs["x"]]
        reached[node.name] = oracle.sqnr_db(want, got)
    first = found(Budget(sqnr_db=30.0), evaluation=others()).trials[1].int16[0]
    assert reached[first] == max(reached.values())


def test_what_is_raised_is_quantized_so_for_real() -> None:
    result = found(Budget(sqnr_db=60.0))
    graph = result.best.model.load().graph
    assert "net.Gemm_0(1+)" in result.best.floats
    weights = [v.producer() for v in graph.node("net.Gemm_0(1+)").inputs if v is not None]
    assert all(node is None or node.op_type != "DequantizeLinear" for node in weights[1:])
    options = result.best.records[0].options
    assert re.escape("net.Gemm_0(1+)") in options["skip"]
    only16 = found(Budget(sqnr_db=60.0, raise_to=(INT16,))).trials[-1].model.load().graph
    integers = {v.dtype for n in only16 if n.op_type == "QuantizeLinear" for v in n.outputs}
    assert integers == {ir.DataType.INT16}


def test_nothing_is_raised_to_float_where_16_bits_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def weights_cost_all(switches: QuantizationSwitches, *_: object) -> dict[str, LayerError]:
        return {layer.name: LayerError(1e-3, 1.0) for layer in switches.layers}

    monkeypatch.setattr(mixed_precision, "layer_errors", weights_cost_all)
    result = found(Budget(sqnr_db=29.0), evaluation=others())
    assert result.best.holds
    assert result.best.floats == ()
    result = found(Budget(sqnr_db=36.0), evaluation=others())
    assert result.best.holds
    assert result.best.floats != ()


def test_the_search_aims_higher_than_the_budget() -> None:
    reached = found(Budget(sqnr_db=30.0), evaluation=others()).trials[0].figures["sqnr_db"]
    result = found(Budget(sqnr_db=reached - 0.1), evaluation=others())
    assert result.trials[0].holds
    assert result.best.figures["sqnr_db"] >= reached + 0.15
    assert raised(Budget(sqnr_db=reached - 0.3), evaluation=others()) is None


def test_only_what_the_budget_names_is_raised() -> None:
    for kind, other in ((INT16, "floats"), (FLOAT, "int16")):
        result = found(Budget(sqnr_db=29.0, raise_to=(kind,)))
        assert result.best.holds
        assert all(getattr(trial, other) == () for trial in result.trials)
    assert not has_accuracy_gate(Budget(sqnr_db=30.0, raise_to=()))
    assert not has_accuracy_gate(Budget(latency_ms=1.0, size_bytes=1))
    assert has_accuracy_gate(Budget(accuracy_drop=0.0))


def test_the_best_is_kept_where_nothing_holds() -> None:
    result = found(Budget(sqnr_db=90.0, raise_to=(INT16,)), evaluation=others())
    assert not result.best.holds
    best = max(trial.figures["sqnr_db"] for trial in result.trials)
    assert result.best.figures["sqnr_db"] == best
    assert len(result.trials[-1].int16) == 4, "every layer was raised"
    assert "best" in result.notes[-1]
    record = result.record()
    assert record.modified
    assert [trial["chosen"] for trial in record.trials].count(True) == 1


def test_everything_in_float_is_the_original_model() -> None:
    result = found(Budget(sqnr_db=150.0, raise_to=(FLOAT,)))
    assert result.best.figures["sqnr_db"] > 100
    assert "QuantizeLinear" not in [node.op_type for node in result.best.model.load().graph]


def test_few_models_are_made() -> None:
    for limit_db in (30.0, 40.0, 60.0, 150.0):
        assert len(found(Budget(sqnr_db=limit_db)).trials) <= 7


def test_a_loss_of_top1_is_held_down_too() -> None:
    data = others(200, labels=True)
    result = found(Budget(accuracy_drop=0.0), evaluation=data)
    assert result.trials[0].figures["drop"] > 0
    assert result.best.figures["drop"] <= 0
    want = [int(np.argmax(answers(hostile(), {"x": row[None]})[0])) for row in data.inputs["x"]]
    model = result.best.model.load()
    got = [int(np.argmax(answers(model, {"x": row[None]})[0])) for row in data.inputs["x"]]
    assert want == got


def test_both_gates_have_to_hold() -> None:
    data = others(200)
    result = found(Budget(accuracy_drop=0.0, sqnr_db=40.0), evaluation=data)
    assert result.best.figures["agreement"] == 100
    assert result.best.figures["sqnr_db"] >= 40


def test_calibration_samples_stand_in_and_that_is_said() -> None:
    result = found(Budget(sqnr_db=40.0))
    assert result.best.figures["samples"] == 24
    assert ["--eval" in note for note in result.notes] == [True]
    assert result.record().notes == result.notes


def test_a_gate_that_cannot_be_measured_raises_nothing() -> None:
    result = found(Budget(accuracy_drop=0.0), hostile_matrix(), evaluation=others())
    assert len(result.trials) == 1
    assert result.chosen == 0
    assert "sqnr_db" in result.notes[0]
    assert not result.record().modified


def hostile_matrix() -> ir.Model:
    """An output that is no vector of scores."""
    model = net(
        "(float[1,6] x) => (float[6,6] y)", "a = Gemm(x, w) t = Transpose(a) y = MatMul(t, a)",
        {"w": random(6, 6)},
    )  # fmt: skip
    refresh_shapes(model, "test")
    return model


def test_a_model_that_was_quantized_before_is_left_alone() -> None:
    driver = Driver(hostile())
    driver.run([Calibrate(), QuantizeInt8()], Context(samples=samples()))
    result = raised(Budget(sqnr_db=199.0), driver.model)
    assert result is None, "it answers as itself"


def test_the_users_own_options_stay() -> None:
    quantize = QuantizeInt8(
        skip=(re.escape("net.Tanh_3(1+)"),), int16=(re.escape("net.Gemm_4(1+)"),)
    )
    result = found(Budget(sqnr_db=60.0), quantize=quantize)
    options = result.best.records[0].options
    assert options["skip"][0] == quantize.skip[0]
    assert options["int16"][0] == quantize.int16[0]


def test_float_has_to_do_where_a_model_cannot_have_16_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    call = QuantizeInt8.call

    def no_int16(self: QuantizeInt8, model: ir.Model, context: Context) -> Outcome:
        if self.int16:
            raise PassRefused(self.name, "int16", "onnx cannot convert the model")
        return call(self, model, context)

    monkeypatch.setattr(QuantizeInt8, "call", no_int16)
    result = found(Budget(sqnr_db=60.0))
    assert result.best.holds
    assert all(trial.int16 == () for trial in result.trials)
    assert result.notes[-1] == "nothing is raised to int16: onnx cannot convert the model"
    with pytest.raises(PassRefused, match="convert"):
        raised(Budget(sqnr_db=60.0, raise_to=(INT16,)))


def test_the_same_is_raised_every_time_and_errors_are_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path)
    first = found(Budget(sqnr_db=45.0), cache=cache)
    monkeypatch.setattr(mixed_precision, "layer_errors", None)
    again = found(Budget(sqnr_db=45.0), cache=cache)
    assert again.record().facts() == first.record().facts()
    assert [t.model.digest for t in again.trials] == [t.model.digest for t in first.trials]
    monkeypatch.undo()
    anew = found(Budget(sqnr_db=45.0))
    assert anew.record().facts() == first.record().facts()


def test_passes_behind_quantize_int8_run_again() -> None:
    ran: list[int] = []

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Counting(Pass):
        @property
        def name(self) -> str:
            return "counting"

        def call(self, model: ir.Model, context: Context) -> Outcome:  # noqa: ARG002
            ran.append(sum(node.op_type == "QuantizeLinear" for node in model.graph))
            return Outcome(model=model, modified=False, stats={"ran": len(ran)})

    made, driver = task(Budget(sqnr_db=60.0))
    driver.run([Counting()], made.context)
    made = dataclasses.replace(made, passes=(*made.passes, Counting()), timers=(None, None))
    result = raise_precision(made, driver.snapshot, driver.records[1:])
    assert result is not None
    assert len(ran) == len(result.trials)
    assert [record.pass_name for record in result.best.records] == ["quantize-int8", "counting"]


@pytest.mark.parametrize(
    ("budget", "figures", "want"),
    [
        (Budget(), (1.0, 9.0), (0, 0.0)),
        (Budget(sqnr_db=20.0), (20.0, None), (0, 0.0)),
        (Budget(sqnr_db=20.0), (18.5, None), (1, 1.5)),
        (Budget(accuracy_drop=0.5), (None, 0.5), (0, 0.0)),
        (Budget(accuracy_drop=0.5), (None, 2.0), (1, 1.5)),
        (Budget(accuracy_drop=0.5), (None, -1.0), (0, 0.0)),
        (Budget(accuracy_drop=0.5, sqnr_db=20.0), (19.0, 1.0), (2, 1.5)),
        (Budget(accuracy_drop=0.5), (20.0, None), (1, float("inf"))),
    ],
)
def test_shortfall(
    budget: Budget, figures: tuple[float | None, float | None], want: tuple[int, float]
) -> None:
    assert shortfall(budget, dict(zip(("sqnr_db", "drop"), figures, strict=True))) == want
