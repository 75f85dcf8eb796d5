"""Profiles: what each layer is, its share, operations per second, and the share of the peak."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from edgepress.pipeline import layer_profile, peak
from edgepress.pipeline.bundle import BundleError
from edgepress.pipeline.cache import Cache
from edgepress.pipeline.layer_facts import arithmetic, kernel_kind
from edgepress.pipeline.layer_profile import Profile, profile, show_profile
from edgepress.pipeline.peak import peak_gops
from edgepress.targets.base import DeviceFailed
from edgepress.targets.command_device import CommandDevice
from edgepress.targets.isa.base import load_isa
from edgepress.targets.load import load_target
from edgepress.targets.schedules.peak import peak_macs
from tests.pipeline import bundles
from tests.pipeline.conftest import Edgepress, World

PEAK = {"fp32": 100.0, "int8": 400.0, "int16": 200.0}


@dataclasses.dataclass(frozen=True)
class Still(CommandDevice):
    """A device whose call number n always takes n + 1: milliseconds, or thousands of them."""

    name: str = "local"
    emulates: bool = False
    more: int = 0

    @property
    def emulated(self) -> bool:
        return self.emulates

    def profile(
        self,
        folder: Path,
        *,
        threads: int | None,
        seconds: float,  # noqa: ARG002
        runs: int,  # noqa: ARG002
    ) -> list[float]:
        count = int(self.info(folder)["calls"]) + self.more
        factor = 1000 if self.emulates else 1 / (threads or 1)
        return [factor * (number + 1) for number in range(count)]


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_profile, "open_device", lambda _spec, _target: Still())
    monkeypatch.setattr(layer_profile, "peak_gops", lambda *_, **__: PEAK)


def text_of(found: Profile) -> str:
    screen = Console(file=io.StringIO(), width=160)
    show_profile(found, screen)
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def test_the_manifest_says_what_every_call_computes(world: World) -> None:
    layers = world.result.bundle.manifest.layers
    calls = [number for layer in layers for number in layer["calls"]]
    assert sorted(calls) == list(range(len(calls)))
    by_operator = {layer["operator"]: layer for layer in layers}
    conv, gemm = by_operator["Conv"], by_operator["Gemm"]
    assert (conv["macs"], gemm["macs"]) == (8 * 8 * 8 * 3 * 9, 80)
    assert "Relu" in conv["fused"]
    assert any("qconv" in kernel for kernel in conv["kernels"])
    assert {layer["arithmetic"] for layer in layers if layer["macs"]} == {"int8"}
    assert {layer["arithmetic"] for layer in layers if not layer["macs"]} == {""}


def test_arithmetic_and_kinds() -> None:
    named = {"float32": "fp32", "int8": "int8", "dynamic int8": "int8", "int16": "int16",
             "int16 × int8": "int16", "Q3.4": "int8", "Q-1.8": "int8", "Q3.12": "int16",
             "uint8": "int8"}  # fmt: skip
    assert {precision: arithmetic(precision) for precision in named} == named
    kinds = {"qconv_3": "qconv", "max_pool_1": "max_pool", "region_1_fused_take_2": "tvm"}
    assert {kernel: kernel_kind(kernel) for kernel in kinds} == kinds


@pytest.mark.usefixtures("still")
def test_figures_add_up(world: World) -> None:
    found = profile(world.request.output, threads=2)
    facts = world.result.bundle.manifest.layers
    assert (found.threads, found.device, found.peak_gops) == (2, "local", PEAK)
    assert sum(layer.share for layer in found.layers) == pytest.approx(1)
    for fact, layer in zip(facts, found.layers, strict=False):
        assert layer.time_ms == pytest.approx(sum(n + 1 for n in fact["calls"]) / 2)
        assert layer.instructions is None
        if fact["macs"]:
            gops = 2e-6 * fact["macs"] / (layer.time_ms or 0)
            assert layer.gops == pytest.approx(gops)
            assert layer.peak_share == pytest.approx(gops / 400)
        else:
            assert (layer.gops, layer.peak_share) == (None, None)
    total = sum(layer.time_ms or 0 for layer in found.layers)
    macs = sum(layer.macs for layer in found.layers)
    assert found.peak_share == pytest.approx(2e-6 * macs / 400 / total)
    said = text_of(found)
    for part in ("Conv", "all layers", "% of peak", "peak of this machine", "int8 400"):
        assert part in said


def test_a_float_layer_is_held_to_the_peak_of_floats(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bundle = bundles.write(tmp_path / "b")
    layer = {"name": "m", "operator": "MatMul", "fused": [], "precision": "float32",
             "arithmetic": "fp32", "macs": 12, "kernels": ["gemm"], "calls": [0, 2]}  # fmt: skip
    rest = layer | {"name": "s", "operator": "Softmax", "macs": 0, "arithmetic": "", "calls": [1]}
    manifest = dataclasses.replace(bundle.manifest, layers=[layer, rest])
    monkeypatch.setattr(
        layer_profile, "read_bundle", lambda _folder: dataclasses.replace(bundle, manifest=manifest)
    )
    monkeypatch.setattr(layer_profile, "bundle_target", lambda _bundle: load_target("native"))
    monkeypatch.setattr(layer_profile, "open_device", lambda _spec, _target: Still())
    monkeypatch.setattr(layer_profile, "peak_gops", lambda *_, **__: PEAK)
    monkeypatch.setattr(Still, "info", lambda *_: {"calls": 4})
    found = profile(tmp_path / "b")
    one, two, left = found.layers
    assert (one.time_ms, two.time_ms, left.time_ms) == (4, 2, 4)
    assert (left.name, left.operator) == ("outputs", "Copy")
    assert one.peak_share == pytest.approx(2e-6 * 12 / 4 / 100)
    assert found.peak_share == pytest.approx(2e-6 * 12 / 100 / 10)
    monkeypatch.setattr(Still, "info", lambda *_: {"calls": 2})
    with pytest.raises(DeviceFailed, match="2 calls instead of 3"):
        profile(tmp_path / "b")


def test_an_emulator_counts_instructions_on_one_thread(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_profile, "open_device", lambda _s, _t: Still(emulates=True))
    found = profile(world.request.output, threads=2)
    assert (found.threads, found.peak_gops, found.peak_share) == (1, {}, None)
    first = found.layers[0]
    calls = world.result.bundle.manifest.layers[0]["calls"]
    assert first.instructions == sum(1000 * (number + 1) for number in calls)
    assert (first.time_ms, first.gops, first.peak_share) == (None, None, None)
    assert "peak of this machine" not in text_of(found)


def test_an_old_bundle_does_not_know_its_layers(tmp_path: Path) -> None:
    folder = bundles.write(tmp_path / "b").folder
    data = json.loads((folder / "manifest.json").read_text())
    del data["layers"]  # as older versions wrote it
    (folder / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(BundleError, match="build the bundle again"):
        profile(folder)


def test_the_command_prints_the_table_and_the_document(
    edgepress: Edgepress, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_profile, "SECONDS", 0.01)
    monkeypatch.setattr(layer_profile, "PROCESSES", 1)
    monkeypatch.setattr(peak, "SECONDS", 0.01)
    monkeypatch.setattr(peak, "PROCESSES", 1)
    code, out, _ = edgepress("bench", world.request.output, "--profile", "--threads", "2", "--json")
    assert code == 0
    document = json.loads(out)
    assert document["kind"] == "profile"
    assert document["threads"] == 2
    assert set(document["peak_gops"]) == {"fp32", "int8", "int16"}
    assert min(document["peak_gops"].values()) > 0
    assert any(layer["gops"] for layer in document["layers"])
    code, out, _ = edgepress("bench", world.request.output, "--profile")
    assert code == 0
    assert "% of peak" in out


def test_the_peak_is_compiled_once_and_measured_every_time(tmp_path: Path) -> None:
    target, cache = load_target("native"), Cache(tmp_path)
    seen: list[int | None] = []

    class Counting(Still):
        def profile(
            self, folder: Path, *, threads: int | None, seconds: float, runs: int
        ) -> list[float]:
            seen.append(threads)
            return super().profile(folder, threads=threads, seconds=seconds, runs=runs)

    found, again = (peak_gops(target, Counting(), threads=2, cache=cache) for _ in range(2))
    assert found == again
    assert seen == [2] * 2 * peak.PROCESSES
    assert len(list(tmp_path.glob("??/*"))) == 1
    isa = load_isa(target.isa)
    assert found["fp32"] == pytest.approx(2e-6 * peak_macs(isa, quantized=False) / 0.5)
    assert found["int8"] == pytest.approx(2e-6 * peak_macs(isa, quantized=True) / 1.0)
