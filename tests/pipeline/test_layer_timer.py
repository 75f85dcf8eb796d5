# ruff: noqa: ARG002 - a device keeps the names of the arguments
"""Layers measured: on a device that makes its figures up, without compiling, and for real."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.calibration.base import Array
from edgepress.passes.base import LayerTimer, PassRefused, refresh_shapes
from edgepress.pipeline import layer_timer
from edgepress.pipeline.cache import Cache
from edgepress.pipeline.layer_timer import DeviceTimer, _chunks, layer_key
from edgepress.targets import compile as compiler
from edgepress.targets import export as exporter
from edgepress.targets.base import CompileFailed, DeviceFailed, Measurement, Target
from edgepress.targets.command_device import CommandDevice
from edgepress.targets.devices.base import open_device
from edgepress.targets.load import load_target
from edgepress.targets.program import Program
from tests.graphs import net, random
from tests.targets.tiny import need

NATIVE = load_target("native")


def model(signature: str, body: str, weights: Mapping[str, Array], opset: int = 17) -> ir.Model:
    made = net(signature, body, weights, opset=opset)
    refresh_shapes(made, "test")
    return made


def dense(inputs: int = 8, outputs: int = 8, *, seed: int = 0, name: str = "dense") -> ir.Model:
    made = model(
        f"(float[1,{inputs}] x) => (float[1,{outputs}] y)",
        "y = Gemm<transB=1>(x, w, b)",
        {"w": random(outputs, inputs, seed=seed), "b": random(outputs, seed=0)},
    )
    next(iter(made.graph)).name = name
    return made


def conv(channels: int = 8, extent: int = 6, attributes: str = "pads=[1,1,1,1]") -> ir.Model:
    return model(
        f"(float[1,{channels},{extent},{extent}] x) => (float[N,C,H,W] y)",
        f"y = Conv<{attributes}>(x, w)",
        {"w": random(channels, channels, 3, 3)},
    )


@dataclasses.dataclass
class Made:
    """A device that makes its figures up: call `i` costs `i`.

    Attributes:
        emulated: whether it counts instructions.
        disturbed: processes in which one call after the other costs 1000 more.
        missing: calls that it says nothing about.
        folders: what it was asked to profile, in order.
        machine: which one it is.
    """

    emulated: bool = False
    disturbed: int = 0
    missing: int = 0
    folders: list[Path] = dataclasses.field(default_factory=list)
    machine: str = "one"

    @property
    def name(self) -> str:
        return "made"

    def profile(
        self, folder: Path, *, threads: int | None, seconds: float, runs: int
    ) -> list[float]:
        assert threads is None
        assert seconds > 0
        self.folders.append(folder)
        count = int((folder / "calls").read_text())
        figures = [float(call) for call in range(count)]
        if len(self.folders) <= self.disturbed:
            figures[len(self.folders) % count] += 1000
        return figures[self.missing :]

    def info(self, folder: Path) -> dict[str, Any]:
        raise NotImplementedError

    def selftest(self, folder: Path) -> dict[str, Any]:
        raise NotImplementedError

    def infer(self, folder: Path, feeds: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
        raise NotImplementedError

    def bench(
        self,
        folder: Path,
        *,
        threads: int | None,
        seconds: float,
        runs: int,
        cores: str | None = None,
        defended: bool = False,
        sustained_minutes: float | None = None,
        mlperf: bool = False,
    ) -> Measurement:
        raise NotImplementedError


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Made:
    """A device that makes its figures up; nothing is compiled for it."""

    def note(program: Program, _code: bytes, _target: Target, folder: Path, **_: object) -> None:
        folder.mkdir()
        (folder / "calls").write_text(str(len(program.calls)))

    monkeypatch.setattr(compiler, "compile_kernels", lambda _program, _target: b"")
    monkeypatch.setattr(exporter, "export", note)
    return Made()


# Figures ----------------------------------------------------------------------------------------


def test_a_layer_costs_what_its_calls_cost_more_than_an_idle_one(device: Made) -> None:
    timer: LayerTimer = DeviceTimer(NATIVE, device)
    # calls 0, 1, 2 and 5 are no layer's: the frame's, and those that write the layers' inputs
    assert timer([conv(), dense()]) == [(3 - 1) + (4 - 1), 6 - 1]
    assert timer.unit == "ms"


def test_the_median_of_processes_counts(device: Made) -> None:
    device.disturbed = 3
    assert DeviceTimer(NATIVE, device)([conv(), dense()]) == [5, 5]
    assert len(device.folders) == layer_timer.PROCESSES
    assert 2 * device.disturbed < layer_timer.PROCESSES


def test_processes_take_turns(device: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_timer, "CHUNK_LAYERS", 2)
    layers = [dense(outputs=outputs) for outputs in (8, 16, 24)]
    assert DeviceTimer(NATIVE, device)(layers) == [2, 2, 4]  # one layer in one, two in the other
    first, second = device.folders[:2]
    assert first != second
    assert device.folders == [first, second] * layer_timer.PROCESSES


def test_an_emulator_counts_once(device: Made) -> None:
    device.emulated = True
    timer = DeviceTimer(NATIVE, device)
    assert timer.unit == "instructions"
    assert timer([dense()]) == [2]
    assert len(device.folders) == 1


def test_equal_layers_are_measured_once_and_every_layer_has_its_figure(device: Made) -> None:
    layers = [dense(), conv(), dense(seed=1, name="another"), dense(outputs=16)]
    assert DeviceTimer(NATIVE, device)(layers) == [2, 9, 2, 7]


def test_layers_without_calls_and_no_layers_at_all(device: Made) -> None:
    flat = model("(float[1,16] x) => (float[4,4] y)", "y = Reshape(x, s)", {"s": np.array([4, 4])})
    assert DeviceTimer(NATIVE, device)([flat, dense()]) == [0, 2]
    device.folders.clear()
    assert DeviceTimer(NATIVE, device)([]) == []
    assert device.folders == []


@pytest.mark.parametrize(("quantized", "kernel"), [(False, "gemm"), (True, "qgemm")])
def test_layers_are_lowered_as_they_will_run(
    device: Made, monkeypatch: pytest.MonkeyPatch, quantized: bool, kernel: str
) -> None:
    compiled: list[str] = []

    def note(program: Program, _target: Target) -> bytes:
        compiled.extend(program.kernels)
        return b""

    monkeypatch.setattr(compiler, "compile_kernels", note)
    DeviceTimer(NATIVE, device, quantized=quantized)([dense()])
    assert kernel in {name.removeprefix("layer_0_").rpartition("_")[0] for name in compiled}


@pytest.mark.usefixtures("device")
def test_a_figure_is_never_negative() -> None:
    class Cheaper(Made):
        def profile(self, *arguments: Any, **options: Any) -> list[float]:
            return [-cost for cost in super().profile(*arguments, **options)]

    assert DeviceTimer(NATIVE, Cheaper())([dense()]) == [0]


def test_a_profile_of_another_program_is_an_error(device: Made) -> None:
    device.missing = 1
    with pytest.raises(DeviceFailed, match="should report 4 calls, but reported 3"):
        DeviceTimer(NATIVE, device)([dense()])


def test_progress_is_reported(device: Made) -> None:
    said: list[tuple[str, int, int]] = []
    timer = DeviceTimer(NATIVE, device, progress=lambda *progress: said.append(progress))
    timer([dense(), conv()])
    assert said[:2] == [("compile 2 layers", 0, 2), ("compile 2 layers", 1, 2)]
    total = layer_timer.PROCESSES
    assert said[2:] == [("measure 2 layers", done, total) for done in range(total)]


# Executables --------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from([1, 4, 40]), min_size=1, max_size=30), st.integers(1, 8))
def test_executables_are_equally_full(widths: list[int], most: int) -> None:
    """Neighbours stay together, nothing is lost, and none holds more than its share."""
    layers = [dense(8, width) for width in widths]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_timer, "CHUNK_LAYERS", most)
        patch.setattr(layer_timer, "CHUNK_BYTES", 1200)  # 40 outputs take 1440
        chunks = list(_chunks(layers))
    assert [number for chunk in chunks for number in chunk] == list(range(len(layers)))
    shares = [max(1 / most, 9 * 4 * width / 1200) for width in widths]
    loads = [sum(shares[number] for number in chunk) for chunk in chunks]
    assert len(chunks) <= math.ceil(sum(shares))
    assert all(load <= 1 + max(shares) for load in loads)
    if len(set(widths)) == 1 and widths[0] == 1:
        sizes = [len(chunk) for chunk in chunks]
        assert max(sizes) <= most
        assert max(sizes) - min(sizes) <= 1


def test_many_small_layers_fill_one_executable() -> None:
    layer = dense()
    assert [len(chunk) for chunk in _chunks([layer] * 64)] == [64]
    assert sorted(len(chunk) for chunk in _chunks([layer] * 65)) == [32, 33]


# Keys ---------------------------------------------------------------------------------------------


def clipped(high: float) -> ir.Model:
    bounds = {"low": np.array(0, np.float32), "high": np.array(high, np.float32)}
    return model("(float[1,8] x) => (float[1,8] y)", "y = Clip(x, low, high)", bounds)


def reshaped(*shape: int) -> ir.Model:
    body = "(float[1,16] x) => (float[N,M] y)"
    return model(body, "y = Reshape(x, s)", {"s": np.array(shape)})


def summed(body: str) -> ir.Model:
    return model("(float[1,8] a, float[1,8] b) => (float[1,8] y)", body, {})


def test_names_and_weights_are_not_in_the_key() -> None:
    assert layer_key(dense()) == layer_key(dense(seed=7, name="another"))
    renamed = dense()
    for value in (*renamed.graph.inputs, *renamed.graph.outputs):
        value.name = f"{value.name}_renamed"
    assert layer_key(renamed) == layer_key(dense())


DIFFERENT = [
    dense(),
    dense(inputs=9),
    dense(outputs=9),
    model("(float[1,8] x) => (float[1,8] y)", "y = Gemm<transB=1>(x, w)", {"w": random(8, 8)}),
    model("(float[1,8] x) => (float[1,8] y)", "y = Gemm(x, w)", {"w": random(8, 8)}),
    model("(float[1,8] x) => (float[1,8] y)", "y = MatMul(x, w)", {"w": random(8, 8)}),
    model("(float[1,8] x) => (float[1,8] y)", "y = MatMul(x, w)", {"w": random(8, 8)}, opset=18),
    model("(float[1,8] x) => (float[1,8] y)", "m = MatMul(x, w) y = Relu(m)", {"w": random(8, 8)}),
    conv(),
    conv(extent=7),
    conv(attributes="pads=[2,2,2,2]"),
    conv(attributes="pads=[1,1,1,1], strides=[2,2]"),
    conv(attributes="pads=[1,1,1,1], strides=[1,2]"),
    conv(attributes="pads=[1,1,1,1], dilations=[2,2]"),
    clipped(1.0),
    clipped(6.0),
    reshaped(4, 4),
    reshaped(2, 8),
    summed("y = Sub(a, b)"),
    summed("y = Sub(b, a)"),
    summed("y = Sub(a, a)"),
    summed("y = Add(a, b)"),
]


def test_everything_that_decides_the_cost_is_in_the_key() -> None:
    keys = [layer_key(layer) for layer in DIFFERENT]
    assert len(set(keys)) == len(keys)


def test_an_equal_layer_is_equal_in_another_process() -> None:
    """The key must not depend on the order of a set or on addresses."""
    copies = [ir.from_proto(ir.to_proto(layer)) for layer in DIFFERENT]
    assert [layer_key(layer) for layer in copies] == [layer_key(layer) for layer in DIFFERENT]


def test_what_figures_depend_on_is_in_the_key_of_the_timer() -> None:
    other = dataclasses.replace(NATIVE, cpu="another")
    timers = [
        DeviceTimer(NATIVE, Made()),
        DeviceTimer(other, Made()),
        DeviceTimer(NATIVE, Made(machine="another")),
        DeviceTimer(NATIVE, CommandDevice("local")),
        DeviceTimer(NATIVE, Made(), quantized=True),
    ]
    keys = [timer.key for timer in timers]
    assert len(set(keys)) == len(keys)
    assert DeviceTimer(NATIVE, Made()).key == keys[0]


# Cache --------------------------------------------------------------------------------------------


def test_layers_are_not_measured_twice(device: Made, tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    layers = [dense(), conv()]
    figures = DeviceTimer(NATIVE, device, cache=cache)(layers)
    device.folders.clear()
    again = DeviceTimer(NATIVE, device, cache=cache)
    assert again(layers) == figures
    assert again([*reversed(layers), layers[0]]) == [*reversed(figures), figures[0]]
    assert device.folders == []
    again([*layers, dense(outputs=16)])
    assert device.folders, "figures taken at different times do not compare"


def test_without_a_cache_layers_are_measured_anew(device: Made) -> None:
    timer = DeviceTimer(NATIVE, device)
    timer([dense()])
    device.folders.clear()
    timer([dense()])
    assert device.folders


def test_another_machine_is_measured_itself(device: Made, tmp_path: Path) -> None:
    DeviceTimer(NATIVE, device, cache=Cache(tmp_path))([dense()])
    other = Made(machine="another")
    DeviceTimer(NATIVE, other, cache=Cache(tmp_path))([dense()])
    assert other.folders


def test_figures_are_kept_as_json(device: Made, tmp_path: Path) -> None:
    layer = dense()
    DeviceTimer(NATIVE, device, cache=Cache(tmp_path))([layer])
    (path,) = tmp_path.rglob("figures.json")
    assert json.loads(path.read_text()) == {layer_key(layer): 2.0}


# Refusals -----------------------------------------------------------------------------------------


def test_a_layer_that_the_target_cannot_run_is_named(device: Made) -> None:
    layer = model("(float[1,8] x) => (float[1,8] y)", "y = RandomNormalLike(x)", {})
    next(iter(layer.graph)).name = "noise"
    with pytest.raises(PassRefused, match=r"noise: RandomNormalLike.*random.*Leave it out"):
        DeviceTimer(NATIVE, device)([dense(), layer])


def test_a_layer_that_cannot_be_quantized_is_named(device: Made) -> None:
    layer = dense(name="poisoned")
    weights = layer.graph.initializers["w"]
    weights.const_value = ir.tensor(np.full((8, 8), np.nan, np.float32), name="w")
    with pytest.raises(PassRefused, match="poisoned: Gemm"):
        DeviceTimer(NATIVE, device, quantized=True)([dense(outputs=16), layer])


def test_a_layer_whose_kernels_do_not_compile_is_named(
    device: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(program: Program, _target: Target) -> bytes:
        if any("gemm" in kernel for kernel in program.kernels):
            raise CompileFailed("LLVM said no")
        return b""

    monkeypatch.setattr(compiler, "compile_kernels", fail)
    with pytest.raises(PassRefused, match=r"culprit: Gemm.*LLVM said no"):
        DeviceTimer(NATIVE, device)([conv(), dense(name="culprit")])


def test_a_missing_compiler_is_no_layers_fault() -> None:
    target = dataclasses.replace(NATIVE, compiler="absent-gcc", compiler_package="absent")
    with pytest.raises(CompileFailed, match="absent-gcc"):
        DeviceTimer(target, Made())([dense()])


# For real -----------------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_timer, "PROCESSES", 3)
    monkeypatch.setattr(layer_timer, "SECONDS", 0.02)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("quantized", [False, True], ids=["float", "int8"])
def test_on_this_machine(quantized: bool) -> None:
    timer = DeviceTimer(NATIVE, open_device(None, NATIVE), quantized)
    large, small = timer([conv(64, 20), conv(16, 5)])
    assert large > 20 * small > 0, "it multiplies 256 times as often"
    assert large < 50, "ms"


@pytest.mark.parametrize(
    ("name", "quantized"),
    [("raspberry-pi-4", False), ("raspberry-pi-4", True), ("armv7-neon", True)],
)
def test_under_qemu(name: str, quantized: bool) -> None:
    target = load_target(name)
    need(target.compiler, target.compiler_package)
    need(target.emulator, "qemu-user")
    timer = DeviceTimer(target, open_device(None, target), quantized)
    assert timer.unit == "instructions"
    figures = timer([dense(64, 64), dense(64, 128), dense(128, 128)])
    assert all(figure == int(figure) for figure in figures)
    assert figures[1] == pytest.approx(2 * figures[0], rel=0.2)
    assert figures[2] == pytest.approx(4 * figures[0], rel=0.3)
    assert 128 * 128 / 8 < figures[2] < 128 * 128 * 2, "an instruction multiplies 4 or 8 numbers"


def test_counts_do_not_depend_on_what_else_is_counted() -> None:
    target = load_target("raspberry-pi-4")
    need(target.compiler, target.compiler_package)
    need(target.emulator, "qemu-user")
    timer = DeviceTimer(target, open_device(None, target))
    layers = [dense(64, 64), conv()]
    # which call it is decides how many instructions lead to it
    assert timer(layers)[::-1] == pytest.approx(timer(layers[::-1]), abs=8)
