"""The whole pipeline, for this machine, with the real compiler."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from edgepress.passes.low_rank import LowRank
from edgepress.pipeline import build as build_module
from edgepress.pipeline import run as run_module
from edgepress.pipeline.bundle import read_bundle
from edgepress.pipeline.oracle import Oracle
from edgepress.pipeline.output import OutputError
from edgepress.pipeline.prepare import UsageError
from edgepress.pipeline.recipe import parse_recipe
from edgepress.pipeline.run import Request, run
from edgepress.targets.base import CompileFailed, DeviceFailed
from edgepress.targets.load import load_target
from edgepress.targets.weights import read_weights, write_weights
from tests.pipeline.conftest import RECIPE, Edgepress, World


def files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths if p.name != "evidence.json"}


def test_an_int8_bundle_is_exact_and_passes(world: World) -> None:
    evidence = world.result.evidence
    assert evidence is not None
    assert evidence.passed
    assert world.result.bundle.manifest.arithmetic == "integer"
    assert evidence.outputs["bit_equal"] is True
    assert evidence.outputs["onnxruntime_steps"] <= 1
    gates = [verdict.gate for verdict in evidence.verdicts]
    assert gates == ["golden", "outputs", "accuracy_drop", "sqnr_db", "size_bytes"]
    assert evidence.accuracy is not None
    assert evidence.accuracy["reference_top1"] == 100.0
    assert evidence.accuracy["sqnr_db"] > 20
    assert evidence.latency is not None
    assert len(evidence.latency["samples_ms"]) >= 100


def test_the_evidence_is_in_the_bundle(world: World) -> None:
    bundle = read_bundle(world.request.output)
    assert bundle.evidence is not None
    assert world.result.evidence is not None
    kept = {k: v for k, v in bundle.evidence.items() if k not in ("schema", "manifest_sha256")}
    assert kept == json.loads(json.dumps(world.result.evidence.to_json()))


def test_golden_files_are_the_reference_of_the_first_samples(world: World) -> None:
    with np.load(world.samples) as data:
        x = data["x"]
    golden = world.request.output / "golden"
    assert (golden / "1.in").read_bytes() == x[1:2].tobytes()
    answer = np.frombuffer((golden / "1.out").read_bytes(), np.float32)
    oracle = Oracle((world.request.output / "graph.onnx").read_bytes())
    scale = world.result.bundle.manifest.outputs[0]["scale"]
    np.testing.assert_allclose(answer, oracle.run({"x": x[1:2]})["y"][0], atol=1.01 * scale)


def test_a_second_build_is_cached_and_the_same(world: World, tmp_path: Path) -> None:
    request = dataclasses.replace(world.request, output=tmp_path / "again", check=False)
    again = run(request, cache=world.cache)
    assert again.cached
    assert all(step.cached for step in again.steps)
    assert files(again.bundle.folder) == files(world.request.output)
    assert again.evidence is None


def test_a_build_without_the_cache_is_the_same(world: World, tmp_path: Path) -> None:
    request = dataclasses.replace(world.request, output=tmp_path / "again", check=False)
    again = run(request)
    assert not again.cached
    assert files(again.bundle.folder) == files(world.request.output)


def test_a_float_bundle_is_held_to_the_original(world: World, float_request: Request) -> None:
    result = run(float_request, cache=world.cache)
    assert result.evidence is not None
    assert result.evidence.passed
    assert result.bundle.manifest.arithmetic == "float"
    assert result.evidence.outputs["max_error"] <= 1e-4
    assert "original" in result.evidence.outputs["reference"]


def test_coded_weights_are_the_same_bits_in_less_space(
    world: World, tmp_path: Path, edgepress: Edgepress
) -> None:
    recipe = parse_recipe(f'{RECIPE}[[pass]]\nname = "encode-huffman"\n', "coded")
    request = dataclasses.replace(world.request, recipe=recipe, output=tmp_path / "coded")
    result = run(request, cache=world.cache)
    assert result.evidence is not None
    assert result.evidence.passed
    assert result.evidence.outputs["bit_equal"] is True
    coded, raw = files(request.output), files(world.request.output)
    assert {n: b for n, b in coded.items() if n.startswith("golden/")} == {
        n: b for n, b in raw.items() if n.startswith("golden/")
    }
    assert result.bundle.has_coded_weights
    totals = [made.bundle.manifest.ledger["total"] for made in (result, world.result)]
    assert totals[0]["coded_bytes"] < totals[1]["coded_bytes"]
    assert len(coded["weights.epw"]) <= len(raw["weights.epw"])
    wanted = read_weights(world.request.output / "weights.epw")
    found = read_weights(request.output / "weights.epw")
    assert {n: (a.dtype, a.tobytes()) for n, a in found.items()} == {
        n: (a.dtype, a.tobytes()) for n, a in wanted.items()
    }
    memory = [read_bundle(r.output).manifest.memory for r in (request, world.request)]
    assert memory[0] == memory[1], "weight_bytes are those of decoded weights"
    write_weights(tmp_path / "again.epw", wanted, coded=True)
    assert (tmp_path / "again.epw").read_bytes() == coded["weights.epw"]
    assert edgepress("unpack", request.output, "-o", tmp_path / "m.onnx")[0] == 0
    with np.load(world.samples) as data:
        feed = {"x": data["x"][:1]}
    models = (tmp_path / "m.onnx", world.request.output / "graph.onnx")
    answers = [Oracle(model.read_bytes()).run(feed)["y"] for model in models]
    np.testing.assert_array_equal(answers[0], answers[1])


def test_calibration_samples_are_asked_for_before_any_work(world: World, tmp_path: Path) -> None:
    request = dataclasses.replace(world.request, output=tmp_path / "b", calib=None)
    with pytest.raises(UsageError, match="--calib"):
        run(request)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_compiler_leaves_nothing(
    float_request: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object) -> None:
        raise CompileFailed("LLVM said no")

    monkeypatch.setattr(build_module, "_compiled", fail)
    with pytest.raises(CompileFailed):
        run(float_request)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_bundle_is_refused_before_any_work(world: World) -> None:
    before = files(world.request.output)
    with pytest.raises(OutputError):
        run(world.request)
    assert files(world.request.output) == before


def test_a_device_that_fails_leaves_an_unverified_bundle(
    world: World, float_request: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise DeviceFailed("the board caught fire")

    monkeypatch.setattr(run_module, "verify", fail)
    result = run(float_request, cache=world.cache)
    assert result.evidence is None
    assert str(result.unverified) == "the board caught fire"
    assert read_bundle(float_request.output).evidence is None


def test_a_device_that_cannot_measure_layers_is_refused_before_any_work(
    float_request: Request, tmp_path: Path
) -> None:
    absent = dataclasses.replace(load_target("raspberry-pi-4"), emulator="absent-qemu")
    timed = dataclasses.replace(float_request.recipe, passes=(LowRank(),))
    with pytest.raises(DeviceFailed, match="absent-qemu"):
        run(dataclasses.replace(float_request, target=absent, recipe=timed))
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_does_not_fit_is_refused_before_any_work(
    float_request: Request, tmp_path: Path
) -> None:
    with pytest.raises(DeviceFailed, match="no emulator"):
        run(dataclasses.replace(float_request, device="qemu"))
    assert list(tmp_path.iterdir()) == []
