"""Raising layers from the command line: gates, exit codes, and what each step costs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgepress.pipeline import precision_cost
from edgepress.pipeline.bundle import Bundle, read_bundle
from edgepress.pipeline.cache import Cache
from edgepress.pipeline.precision_cost import trial_costs
from edgepress.pipeline.prepare import Prepared, prepare
from edgepress.pipeline.recipe import Recipe, parse_recipe
from edgepress.targets.base import CompileFailed, Measurement
from edgepress.targets.devices.base import Device, open_device
from edgepress.targets.load import load_target
from tests.graphs import net, random
from tests.pipeline.conftest import Edgepress, World

RECIPE = """schema = 1
[[pass]]
name = "calibrate"
[[pass]]
name = "quantize-int8"
[budget]
"""


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision_cost, "SECONDS", 0.01)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A model of two layers and its samples."""
    model = net(
        "(float[1,6] x) => (float[1,5] y)",
        "a = Gemm<transB=1>(x, w1) b = Relu(a) y = Gemm<transB=1>(b, w2)",
        {"w1": random(8, 6), "w2": random(5, 8)},
    )
    ir.save(model, tmp_path / "net.onnx")
    np.savez(tmp_path / "x.npz", x=random(32, 6))
    return {"model": tmp_path / "net.onnx", "samples": tmp_path / "x.npz", "folder": tmp_path}


def recipe(folder: Path, budget: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(RECIPE + budget)
    return path


def test_compress_holds_the_gate_and_says_how(edgepress: Edgepress, files: dict[str, Path]) -> None:
    out = files["folder"] / "out.onnx"
    arguments = ("compress", files["model"], "--calib", files["samples"], "-o", out, "--overwrite")
    given = recipe(files["folder"], "sqnr_db = 10\n")
    code, text, _ = edgepress(*arguments, "-r", given, "--json")
    assert code == 0
    steps = json.loads(text)["steps"]
    assert steps[-1]["pass_name"] == "quantize-int8", "nothing had to be raised"
    given = recipe(files["folder"], "sqnr_db = 43\n")
    code, text, _ = edgepress(*arguments, "-r", given, "--eval", files["samples"], "--json")
    assert code == 0
    step = json.loads(text)["steps"][-1]
    assert step["pass_name"] == "mixed-precision"
    assert step["notes"] == []
    kept = [trial for trial in step["trials"] if trial["chosen"]]
    assert kept[0]["sqnr_db"] >= 43
    onnx.checker.check_model(onnx.load(out))
    code, text, _ = edgepress(*arguments, "-r", given)
    assert "mixed precision" in text
    assert "--eval" in text


def test_compress_keeps_the_best_of_an_impossible_gate_and_exits_with_6(
    edgepress: Edgepress, files: dict[str, Path]
) -> None:
    out = files["folder"] / "out.onnx"
    given = recipe(files["folder"], 'sqnr_db = 190\nraise_to = ["int16"]\n')
    code, text, _ = edgepress(
        "compress", files["model"], "--calib", files["samples"], "-r", given, "-o", out, "--json"
    )
    assert code == 6
    step = json.loads(text)["steps"][-1]
    assert max(t["sqnr_db"] for t in step["trials"]) == step["equivalence"]["value"]
    types = {node.op_type for node in onnx.load(out).graph.node}
    assert "QuantizeLinear" in types
    given = recipe(files["folder"], "sqnr_db = 190\nraise_to = []\n")
    code, text, _ = edgepress(
        "compress", files["model"], "--calib", files["samples"], "-r", given, "-o", out, "--json",
        "--overwrite",
    )  # fmt: skip
    assert code == 0, "without raising, compress judges nothing"
    assert json.loads(text)["steps"][-1]["pass_name"] == "quantize-int8"


def test_run_measures_what_each_step_costs(edgepress: Edgepress, files: dict[str, Path]) -> None:
    out = files["folder"] / "bundle"
    given = recipe(files["folder"], "sqnr_db = 43\n")
    code, text, err = edgepress(
        "run", files["model"], "-t", "native", "-r", given, "--calib", files["samples"],
        "--eval", files["samples"], "-o", out, "--json",
    )  # fmt: skip
    assert code == 0, err
    document = json.loads(text)
    steps = document["steps"][-1]["trials"]
    costs = document["evidence"]["trials"]
    assert len(costs) == len(steps) >= 2
    assert all(cost["latency_ms"] > 0 for cost in costs)
    bundle = read_bundle(out)
    assert bundle.evidence is not None
    assert bundle.evidence["trials"] == costs
    number = next(i for i, step in enumerate(steps) if step["chosen"])
    assert costs[number]["deployed_bytes"] == bundle.deployed_bytes
    manifest = (out / "manifest.json").read_text()
    assert "latency_ms" not in json.dumps(json.loads(manifest)["steps"]), "it differs every time"
    assert json.loads(manifest)["steps"][-1]["trials"] == steps
    verdicts = {v["gate"]: v["verdict"] for v in document["evidence"]["verdicts"]}
    assert verdicts["sqnr_db"] == "pass"


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """Takes as many ms as a model has bytes; only `bench` is called."""

    emulated: bool = False
    name: str = "fake"

    def bench(
        self,
        folder: Path,
        *,
        threads: int | None,  # noqa: ARG002
        seconds: float,  # noqa: ARG002
        runs: int,  # noqa: ARG002
        cores: str | None = None,  # noqa: ARG002
        defended: bool = False,  # noqa: ARG002
        sustained_minutes: float | None = None,  # noqa: ARG002
        mlperf: bool = False,  # noqa: ARG002
    ) -> Measurement:
        size = float((folder / "weights.epw").stat().st_size)
        return Measurement(samples_ms=(size, size, 9e9), threads=1, device={})


@pytest.fixture
def raised(world: World, files: dict[str, Path]) -> tuple[Prepared, Recipe, Bundle, Cache]:
    """A model whose layers were raised, and any bundle in place of its own."""
    given = parse_recipe(RECIPE + "sqnr_db = 60\n")
    cache = Cache(files["folder"] / "cache")
    prepared = prepare(files["model"], given, calib=files["samples"], cache=cache)
    assert prepared.precision is not None
    assert len(prepared.precision.trials) > 1
    return prepared, given, world.result.bundle, cache


def cost(raised: tuple[Prepared, Recipe, Bundle, Cache], device: Any) -> list[Any]:
    prepared, given, bundle, cache = raised
    typed: Device = device
    return trial_costs(prepared, given, load_target("native"), typed, bundle, cache=cache)


def test_an_emulators_times_are_no_latency(
    raised: tuple[Prepared, Recipe, Bundle, Cache], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision_cost, "build", None)  # nothing is built for that
    costs = cost(raised, FakeDevice(emulated=True))
    assert all(each.latency_ms is None for each in costs)
    assert all("unverified" in each.detail for each in costs)
    chosen = raised[0].precision.chosen  # type: ignore[union-attr]
    assert costs[chosen].deployed_bytes == raised[2].deployed_bytes
    assert all(each.deployed_bytes is None for i, each in enumerate(costs) if i != chosen)


def test_latency_is_the_median_of_medians(raised: tuple[Prepared, Recipe, Bundle, Cache]) -> None:
    costs = cost(raised, FakeDevice())
    prepared, _, bundle, _ = raised
    assert prepared.precision is not None
    chosen = prepared.precision.chosen
    assert costs[chosen].latency_ms == (bundle.folder / "weights.epw").stat().st_size
    assert all(each.latency_ms and each.deployed_bytes for each in costs)


def test_what_cannot_be_built_has_no_latency(
    raised: tuple[Prepared, Recipe, Bundle, Cache], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: Any, **_options: Any) -> None:
        raise CompileFailed("no kernel")

    monkeypatch.setattr(precision_cost, "build", fail)
    costs = cost(raised, FakeDevice())
    chosen = raised[0].precision.chosen  # type: ignore[union-attr]
    for number, each in enumerate(costs):
        assert (each.latency_ms is None) == (number != chosen)
        assert ("no kernel" in each.detail) == (number != chosen)
    assert open_device(None, load_target("native")).name == "local"
