"""Explaining a bundle: figures that must add up, what is left out and why, errors, the command."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from rich.console import Console

from edgepress.pipeline import _explain_changes, _explain_measure, explain
from edgepress.pipeline.bundle import BundleError
from edgepress.pipeline.explain import Explanation
from edgepress.pipeline.explain_table import show_explanation
from edgepress.pipeline.oracle import Oracle, sqnr_db
from edgepress.pipeline.prepare import UsageError
from edgepress.pipeline.recipe import parse_recipe
from edgepress.pipeline.run import Request, run
from edgepress.targets.base import DeviceFailed, Measurement
from edgepress.targets.command_device import CommandDevice
from tests.pipeline.conftest import Edgepress, World, cnn


@dataclasses.dataclass(frozen=True)
class Still(CommandDevice):
    """A device whose calls and inferences take what they always take."""

    name: str = "local"
    emulates: bool = False

    @property
    def emulated(self) -> bool:
        return self.emulates

    def profile(
        self,
        folder: Path,
        *,
        threads: int | None,  # noqa: ARG002
        seconds: float,  # noqa: ARG002
        runs: int,  # noqa: ARG002
    ) -> list[float]:
        return [float(number + 1) for number in range(int(self.info(folder)["calls"]))]

    def bench(
        self,
        folder: Path,
        *,
        threads: int | None,  # noqa: ARG002
        seconds: float,  # noqa: ARG002
        runs: int,  # noqa: ARG002
        warm_up_seconds: float | None = None,  # noqa: ARG002
        cores: str | None = None,  # noqa: ARG002
        defended: bool = False,  # noqa: ARG002
        sustained_minutes: float | None = None,  # noqa: ARG002
        mlperf: bool = False,  # noqa: ARG002
    ) -> Measurement:
        cost = 2.0 if folder.name == "bundle" else 3.0
        if self.emulates:
            return Measurement(samples_ms=(), threads=1, instructions=int(cost))
        return Measurement(samples_ms=(cost, cost), threads=1)


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain, "open_device", lambda _spec, _target: Still())
    monkeypatch.setattr(_explain_measure, "PROCESSES", 1)
    monkeypatch.setattr(_explain_changes, "ROUNDS", 1)
    monkeypatch.setattr(_explain_changes, "CALIBRATIONS", ("mse",))


@pytest.fixture
def without_building(monkeypatch: pytest.MonkeyPatch) -> None:
    """Race changed models without compiling them."""

    def build(_race: Any, _model: Any, folder: Path) -> None:
        folder.mkdir()

    monkeypatch.setattr(_explain_changes._Race, "_build", build)


@pytest.fixture(scope="module")
def full(world: World) -> Explanation:
    """Everything but costs, of the small CNN."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explain, "open_device", lambda _spec, _target: Still())
        patch.setattr(_explain_measure, "PROCESSES", 1)
        patch.setattr(_explain_changes, "ROUNDS", 2)
        patch.setattr(_explain_changes, "CALIBRATIONS", ("mse",))
        patch.setattr(
            _explain_changes._Race, "_build", lambda _race, _model, folder: folder.mkdir()
        )
        return explain.explain(
            world.request.output, calib=world.samples, original=world.model, cache=world.cache
        )


def printed(found: Explanation, width: int = 100) -> str:
    screen = Console(width=width, file=io.StringIO(), record=True)
    show_explanation(found, screen)
    return screen.export_text()


def test_layers_are_in_order_and_named_as_in_the_graph(full: Explanation) -> None:
    operators = [layer.operator for layer in full.layers if not layer.conversion]
    assert operators == ["Conv", "GlobalAveragePool", "Gemm"]
    conv = full.layers[[layer.operator for layer in full.layers].index("Conv")]
    assert conv.fused == ["Relu"]
    assert conv.precision == "int8"
    assert conv.macs == 8 * 8 * 8 * 3 * 9
    assert full.without_code == [("Flatten_3", "Flatten")]


def test_shares_sum_to_one_and_costs_are_those_of_the_calls(full: Explanation) -> None:
    costs = [layer.time_ms for layer in full.layers]
    calls = sum(len(layer.kernels) for layer in full.layers)
    assert sum(cost or 0 for cost in costs) == calls * (calls + 1) / 2
    assert sum(layer.cost_share or 0 for layer in full.layers) == pytest.approx(1)
    assert sum(layer.error_share or 0 for layer in full.layers) == pytest.approx(1)
    assert full.summary.time_ms == calls * (calls + 1) / 2
    for layer in full.layers:
        if layer.macs:
            assert layer.time_ms is not None
            assert layer.gops == pytest.approx(2 * layer.macs / layer.time_ms / 1e6)
        else:
            assert layer.gops is None


def test_instructions_are_those_of_the_executable(full: Explanation) -> None:
    assert full.summary.code_in_bundle
    conv = next(layer for layer in full.layers if layer.operator == "Conv")
    assert conv.vector
    assert conv.multiply is not None
    assert full.kernels[conv.main_kernel].loop_multiplies[conv.multiply] == conv.multiply_count > 0
    assert {name for layer in full.layers for name in layer.kernels} == set(full.kernels)
    assert conv.float_instructions > 0  # products leave their accumulators by a float multiplier
    assert full.summary.float_instructions >= max(x.float_instructions for x in full.layers)


def _sqnr_db(world: World, bundle: Path) -> float:
    """Of a bundle's graph in onnxruntime against the original model."""
    data = np.load(world.samples)["x"]
    answers = [
        [oracle.run({"x": x[None]}) for x in data]
        for oracle in map(Oracle, (world.model.read_bytes(), (bundle / "graph.onnx").read_bytes()))
    ]
    return sqnr_db(*answers)


def test_the_error_of_the_whole_is_that_of_onnxruntime(full: Explanation, world: World) -> None:
    assert full.summary.samples == full.summary.layer_samples == 8
    assert full.summary.sqnr_db == pytest.approx(_sqnr_db(world, world.request.output), abs=1e-6)


def test_every_quantized_layer_has_an_error_and_no_other(full: Explanation) -> None:
    with_error = [layer.operator for layer in full.layers if layer.error_share is not None]
    assert with_error[0] == "Input"
    assert {"Conv", "GlobalAveragePool", "Gemm"} <= set(with_error)
    assert "Dequantize" not in with_error
    for layer in full.layers:
        assert (layer.sqnr_alone_db is None) == (layer.error_share is None)


def test_changes_are_made_and_measured(full: Explanation) -> None:
    assert full.tried > len(full.changes) > 0
    assert len(full.changes) <= 3
    gains = [change.sqnr_gain_db or 0 for change in full.changes]
    assert gains == sorted(gains, reverse=True)
    for change in full.changes:
        assert change.sqnr_before_db == pytest.approx(full.summary.sqnr_db, abs=0.01)
        assert change.sqnr_after_db - (change.sqnr_before_db or 0) == change.sqnr_gain_db
        assert (change.cost_before, change.cost_after) == (2.0, 3.0)
        assert (change.cost_ratio, change.cost_ratio_range) == (1.5, (1.5, 1.5))


def test_a_change_gives_what_it_says_when_its_recipe_is_run(
    full: Explanation, world: World, tmp_path: Path
) -> None:
    change = next(c for c in full.changes if 'name = "quantize-int8"' in c.recipe)
    text = 'schema = 1\n[[pass]]\nname = "calibrate"\n' + change.recipe
    request = dataclasses.replace(
        world.request, recipe=parse_recipe(text, "changed"), output=tmp_path / "b", check=False
    )
    run(request, cache=world.cache)
    assert _sqnr_db(world, tmp_path / "b") == pytest.approx(change.sqnr_after_db, abs=1e-6)


def test_one_json_document_without_nan(full: Explanation) -> None:
    document = json.loads(json.dumps(full.to_json(), allow_nan=False))
    assert document["kind"] == "explanation"
    assert list(document) == [
        "kind", "bundle", "target", "device", "unit", "summary", "layers", "islands",
        "without_code", "kernels", "warnings", "changes", "tried", "notes",
    ]  # fmt: skip
    assert document["layers"][0]["bytes_moved"] > 0


def test_the_table_fits_100_columns_and_says_all(full: Explanation) -> None:
    text = printed(full)
    assert max(map(len, text.splitlines())) <= 100
    for layer in full.layers:
        assert layer.title in text
    for change in full.changes:
        assert change.name in text
        assert "1.50 (1.50–1.50)" in text
        assert all(line in text for line in change.recipe.splitlines())
    assert "◀" in text
    assert "the bundle's own kernels" in text


def test_long_names_do_not_widen_the_table(full: Explanation) -> None:
    long = [
        dataclasses.replace(layer, name="/a/very/long/name" * 12, fused=["Relu"] * 9)
        for layer in full.layers
    ]
    text = printed(dataclasses.replace(full, layers=long))
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.usefixtures("still")
def test_without_samples_nothing_is_said_of_errors(world: World) -> None:
    found = explain.explain(world.request.output)
    assert {layer.error_share for layer in found.layers} == {None}
    assert (found.summary.sqnr_db, found.changes, found.tried) == (None, [], 0)
    assert any("--calib" in note for note in found.notes)
    assert "error" not in printed(found).partition("└")[0].partition("┏")[2]


@pytest.mark.usefixtures("still", "without_building")
def test_without_the_original_only_activations_are_measured(
    world: World, full: Explanation
) -> None:
    found = explain.explain(world.request.output, calib=world.samples, cache=world.cache)
    assert any("--model" in note for note in found.notes)
    assert (found.summary.sqnr_db or 0) > (full.summary.sqnr_db or 0)
    names = {change.name for change in found.changes}
    assert not names & {"adaptive rounding of weights", "equalize-layers"}


@pytest.mark.usefixtures("still", "without_building")
def test_a_float_bundle_has_no_errors_and_may_be_quantized(
    world: World, float_request: Request
) -> None:
    run(dataclasses.replace(float_request, check=False), cache=world.cache)
    found = explain.explain(float_request.output, calib=world.samples, cache=world.cache)
    assert {layer.precision for layer in found.layers if layer.macs} == {"float32"}
    assert {layer.error_share for layer in found.layers} == {None}
    assert found.islands == []
    assert found.tried == 1
    assert found.changes == []  # 3 ms are no less than 2


def test_a_float_bundle_that_int8_makes_faster(
    world: World, float_request: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(dataclasses.replace(float_request, check=False), cache=world.cache)
    monkeypatch.setattr(explain, "open_device", lambda _spec, _target: Still())
    monkeypatch.setattr(_explain_changes._Race, "_build", lambda *_: None)
    monkeypatch.setattr(_explain_changes._Race, "_measure", lambda *_: ([4.0], [1.0]))
    found = explain.explain(float_request.output, calib=world.samples, cache=world.cache)
    (change,) = found.changes
    assert change.name == "quantize to int8"
    assert (change.cost_ratio, change.sqnr_gain_db) == (0.25, None)
    assert change.sqnr_after_db > 20
    assert "not measured" not in printed(found)


def test_under_an_emulator_there_are_no_milliseconds(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explain, "open_device", lambda _spec, _target: Still(emulates=True))
    found = explain.explain(world.request.output)
    assert {layer.time_ms for layer in found.layers} == {None}
    assert found.summary.time_ms is None
    assert found.unit == "instructions"
    calls = sum(len(layer.kernels) for layer in found.layers)
    assert found.summary.executed_instructions == calls * (calls + 1) / 2
    text = printed(found)
    assert "unverified" in text
    assert " ms" not in text


def test_a_device_that_nobody_asked_for_may_be_missing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_spec: str | None, _target: Any) -> Any:
        raise DeviceFailed("qemu-arm is not installed.")

    monkeypatch.setattr(explain, "open_device", missing)
    found = explain.explain(world.request.output)
    assert (found.device, found.unit, found.summary.time_ms) == (None, None, None)
    assert any("qemu-arm" in note for note in found.notes)
    assert "unverified" in printed(found)
    with pytest.raises(DeviceFailed, match="qemu-arm"):
        explain.explain(world.request.output, device="qemu")


@pytest.mark.usefixtures("still")
def test_an_executable_of_other_code_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgepress.targets.object_code.holds", lambda _executable, _code: False)
    found = explain.explain(world.request.output)
    assert not found.summary.code_in_bundle
    assert any("another version" in note for note in found.notes)
    assert "kernels compiled now" in printed(found)
    assert (found.unit, found.summary.time_ms) == (None, None)


def test_an_executable_of_other_calls_has_no_costs(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(Still):
        def info(self, folder: Path) -> dict[str, Any]:
            return super().info(folder) | {"calls": 1}

    monkeypatch.setattr(explain, "open_device", lambda _spec, _target: Other())
    found = explain.explain(world.request.output)
    assert (found.unit, found.summary.time_ms) == (None, None)
    assert any("other calls" in note for note in found.notes)


def test_usage_errors(world: World, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="manifest"):
        explain.explain(tmp_path)
    with pytest.raises(UsageError, match="--calib"):
        explain.explain(world.request.output, original=world.model)
    other = tmp_path / "other.onnx"
    changed = cnn()
    changed.doc_string = "another"
    ir.save(changed, other)
    with pytest.raises(UsageError, match="not the model"):
        explain.explain(world.request.output, calib=world.samples, original=other)


@pytest.mark.usefixtures("still")
def test_the_command_prints_one_document(edgepress: Edgepress, world: World) -> None:
    code, out, err = edgepress("explain", world.request.output, "--json")
    assert code == 0
    assert json.loads(out)["kind"] == "explanation"
    assert "compile its kernels again" in err
    code, out, _ = edgepress("explain", world.request.output)
    assert code == 0
    assert "GlobalAveragePool" in out


def test_the_command_says_what_is_wrong(edgepress: Edgepress, tmp_path: Path) -> None:
    code, _, err = edgepress("explain", tmp_path)
    assert code == 2
    assert "manifest.json" in err
