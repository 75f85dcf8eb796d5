"""Bundles for a GPU, on a driver that needs none: what they answer and measure."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepress.targets.cuda.images import images_object
from edgepress.targets.export import export
from edgepress.targets.program import Call, Program, Tensor
from tests.cuda.bundles import QUICK, Bundle
from tests.cuda.stub_driver import write_nvml
from tests.cuda.test_driver_source import copying_program
from tests.cuda.tiny import (
    COMPILER,
    TARGET,
    export_tiny_cuda,
    stand_in_cubin,
    tiny_kernels,
)
from tests.targets.tiny import HOST, PI4, export_tiny, need, run, tiny_answer, tiny_feed


def test_it_answers_as_the_golden_samples_say(bundle: Bundle) -> None:
    said = bundle.ask("--selftest")
    assert said["passed"]
    assert said["samples"] == 2
    assert [output["different_elements"] for output in said["outputs"]] == [0, 0]
    assert bundle.called("cuGraphLaunch") == 2, "a graph per inference"
    assert bundle.called("cuLaunchKernel") == 3, "once, to capture"


@pytest.mark.parametrize(
    "variables", [{"CUDA_STUB_VERSION": "12020"}, {"EDGEPRESS_CUDA_OVERLAP": "0"}]
)
def test_it_answers_where_kernels_wait_for_each_other(
    bundle: Bundle, variables: Mapping[str, str]
) -> None:
    assert bundle.ask("--selftest", **variables)["passed"]


def test_it_answers_samples(bundle: Bundle) -> None:
    feeds = [tiny_feed(seed) for seed in range(5)]
    samples = b"".join(array.tobytes() for feed in feeds for array in feed.values())
    wanted = [array for feed in feeds for array in tiny_answer(feed).values()]
    assert bundle.answer(samples) == b"".join(array.tobytes() for array in wanted)


def test_info_says_what_it_needs(bundle: Bundle) -> None:
    said = bundle.ask("--info", "--threads", "3")
    assert said["gpu"] == {
        "architecture": "sm_90",
        "compiler": COMPILER,
        "usable": True,
        "why": None,
        "name": "Emulated GPU",
        "compute_capability": "9.0",
        "multiprocessors": 132,
        "memory_bytes": 4 << 30,
        "integrated": False,
        "pci_bus_id": "0000:01:00.0",
        "driver_cuda": "13.0",
    }
    assert said["supported"] is True
    assert said["threads"] == 1, "whatever is asked for"
    assert said["arena_bytes"] == 256


def test_info_answers_without_a_gpu(bundle: Bundle) -> None:
    said = bundle.ask("--info", CUDA_STUB_DEVICES="0")
    assert said["supported"] is False
    assert said["gpu"]["usable"] is False
    assert "CUDA_ERROR_NO_DEVICE: no CUDA-capable device is detected" in said["gpu"]["why"]
    assert "name" not in said["gpu"]


def test_bench_times_kernels_on_the_gpu(bundle: Bundle) -> None:
    said = bundle.ask("--bench", "--anyway", *QUICK)
    assert len(said["samples_ms"]) >= 20
    assert said["min_ms"] > 0
    assert said["threads"] == 1
    device = said["device"]
    assert device["gpu"]["name"] == "Emulated GPU"
    assert device["gpu"]["driver"] == "580.65.06"
    assert device["gpu"]["used_bytes"] > said["device"]["gpu"]["multiprocessors"]
    assert device["wall_p50_ms"] > said["min_ms"]
    assert 0 < device["copies_ms"] < device["wall_p50_ms"]
    assert said["conditions"]["gpu"]["after"] == {
        "frequency_khz": 1.5e6,
        "highest_khz": 1.98e6,
        "memory_khz": 2.6e6,
        "temperature_celsius": 40,
        "power_watts": 70,
        "performance_state": 0,
        "throttle_reasons": "0x0",
        "cooling_level": None,
    }
    assert said["conditions"]["gpu"]["hottest_celsius"] == 40


def of_the_gpu(said: Mapping[str, Any]) -> list[str]:
    """Reasons that this machine's own load did not add."""
    return [reason for reason in said["refused"] if "GPU" in reason]


@pytest.mark.parametrize(
    ("reasons", "sentences"),
    [
        (0x3, []),
        (0x4, ["throttled: the GPU's clock was held down by the power cap (0x4)"]),
        (0x61, ["throttled: the GPU's clock was held down by heat, by software; "
                "heat, by hardware (0x60)"]),
        (0x400, ["throttled: the GPU's clock was held down by a reason without a name here "
                 "(0x400)"]),
    ],
)  # fmt: skip
def test_what_holds_the_clock_down_refuses_figures(
    bundle: Bundle, reasons: int, sentences: list[str]
) -> None:
    write_nvml(Path(bundle.environment["NVML_STUB"]).parent, reasons=reasons)
    said = bundle.ask("--bench", *QUICK)
    assert of_the_gpu(said) == sentences
    if sentences:
        assert said["attempts"] == 1, "which passes less soon"
        assert said["p50_ms"] is None
        assert said["device"]["wall_p50_ms"] is None
        assert said["device"]["copies_ms"] is None
    assert said["conditions"]["gpu"]["throttle_reasons"] == hex(reasons)


def test_sustained_shows_the_clock_of_the_gpu(bundle: Bundle) -> None:
    write_nvml(Path(bundle.environment["NVML_STUB"]).parent, reasons=8)
    said = bundle.ask("--bench", "--anyway", "--sustained", "0.01", *QUICK)
    window = said["sustained"][0]
    assert window["frequency_khz"] == 1.5e6
    assert window["temperature_celsius"] == 40
    assert window["throttled"] is True


def test_bench_without_nvml(bundle: Bundle) -> None:
    write_nvml(Path(bundle.environment["NVML_STUB"]).parent, init_error=9)
    said = bundle.ask("--bench", *QUICK)
    assert of_the_gpu(said) == []
    assert set(said["conditions"]["gpu"]["before"].values()) == {None}


def test_profile_times_every_call(bundle: Bundle) -> None:
    said = bundle.ask("--profile", *QUICK)
    assert [call["node"] for call in said["calls"]] == ['first */ "node"', "zweitér", "third"]
    assert all(call["midmean_ms"] > 0 for call in said["calls"])
    assert said["runs"] == 20


LIBRARY = """
import ctypes, os, sys
import numpy as np

library = ctypes.CDLL(sys.argv[1])
library.model_last_error.restype = ctypes.c_char_p
inputs = (ctypes.c_void_p * 2)()
outputs = (ctypes.c_void_p * 2)()
memory = np.zeros(1024, np.uint8)
start = -memory.ctypes.data % 64
for index in range(2):
    inputs[index] = memory.ctypes.data + start + 64 * index
    outputs[index] = memory.ctypes.data + start + 128 + 64 * index
x = memory[start:][:24].view(np.float32)
scaled = memory[start + 128:][:24].view(np.float32)

def say(code):
    print(code, library.model_last_error().decode())

say(library.model_run(inputs, outputs))
say(library.model_set_threads(4))
for times in range(3):
    say(library.model_open(sys.argv[2].encode()))
    say(library.model_open(sys.argv[2].encode()))
    x[:] = times
    say(library.model_run(inputs, outputs))
    print(scaled.tolist())
    library.model_close()
say(library.model_run(inputs, outputs))
inputs[0] += 1
say(library.model_open(sys.argv[2].encode()))
say(library.model_run(inputs, outputs))
library.model_close()
os.environ["CUDA_STUB_FAIL"] = "cuMemAlloc_v2:2"
say(library.model_open(sys.argv[2].encode()))
del os.environ["CUDA_STUB_FAIL"]
inputs[0] -= 1
say(library.model_open(sys.argv[2].encode()))
say(library.model_run(inputs, outputs))
library.model_close()
library.model_close()
"""


def test_the_library_opens_again(bundle: Bundle) -> None:
    environment = {**os.environ, **bundle.environment, "CUDA_STUB_LOG": str(bundle.log)}
    library, weights = bundle.folder / "libmodel.so", bundle.folder / "weights.epw"
    result = subprocess.run(
        [sys.executable, "-c", LIBRARY, str(library), str(weights)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == "2 the model is not open: call model_open first"
    assert lines[1].startswith("0 ")
    for times in range(3):
        answer = ((times + 1) * np.arange(6, dtype=np.float32)).tolist()
        opened, twice, ran, scaled = lines[2 + 4 * times :][:4]
        assert (opened, twice) == ("0 ", "2 the model is open already")
        assert ran == "0 "
        assert scaled == str(answer)
    assert lines[14] == "2 the model is not open: call model_open first"
    assert lines[16] == "2 the memory of input x must be aligned to 64 bytes"
    assert lines[17].startswith("2 no memory on the GPU for 256 bytes of weights")
    assert lines[18:] == ["0 ", "0 "]
    assert bundle.left() == []


def test_outputs_are_copied(driver: dict[str, str], tmp_path: Path) -> None:
    program = copying_program()
    program.kernels["add_one"] = tiny_kernels()["add_one"]
    code = images_object([stand_in_cubin(["add_one"])], TARGET, COMPILER)
    export(program, code, TARGET, tmp_path / "bundle", name="copies", tolerances=(0, 0, 0))
    bundle = Bundle(tmp_path / "bundle", driver, tmp_path / "log")
    x = np.arange(6, dtype=np.float32)
    y = (x + 1).tobytes()
    assert bundle.answer(x.tobytes()) == y + x.tobytes() + y
    said = bundle.ask("--profile", *QUICK)
    assert [call["node"] for call in said["calls"]] == ["add", "copy to x", "copy to y"]


def test_every_weight_arrives(driver: dict[str, str], tmp_path: Path) -> None:
    factors = {
        "a": np.arange(6),
        "b": np.arange(6) + 10,
        "empty": np.zeros(0),
        "same": np.arange(6),
    }
    tensors = {name: Tensor(name, "float32", (6,)) for name in ("x0", "x1", "x2", "x3")}
    calls = [
        Call("scale", (f"x{i}", name, f"x{i + 1}"), (f"x{i + 1}",), f"times {name}")
        for i, name in enumerate(("a", "b", "same"))
    ]
    constants = {name: factor.astype(np.float32) for name, factor in factors.items()}
    program = Program(("x0",), ("x3",), tensors, constants, calls, dict(tiny_kernels()))
    code = images_object([stand_in_cubin(["scale"])], TARGET, COMPILER)
    export(program, code, TARGET, tmp_path / "bundle", name="weights", tolerances=(0,))
    bundle = Bundle(tmp_path / "bundle", driver, tmp_path / "log")
    x = np.array([1, 2, 3, -4, 5, 6], np.float32)
    answer = np.frombuffer(bundle.answer(x.tobytes()), np.float32)
    assert answer.tolist() == (x * factors["a"] * factors["b"] * factors["a"]).tolist()


def test_each_kind_of_bundle_has_its_own_runtime(exported: Path, tmp_path: Path) -> None:
    cpu = export_tiny(HOST, tmp_path / "cpu").folder
    for file in ("model", "libmodel.so"):
        assert b"libcuda.so.1" not in (cpu / file).read_bytes()
        assert b"bytes of workspace" not in (exported / file).read_bytes()
        assert b"cannot start thread" not in (exported / file).read_bytes()
    assert b"libnvidia-ml" not in (exported / "libmodel.so").read_bytes()


def test_the_host_may_be_an_arm_board(tmp_path: Path) -> None:
    need(PI4.compiler, PI4.compiler_package)
    need(PI4.emulator, "qemu-user")
    target = dataclasses.replace(PI4, isa="cuda", gpu_arch="sm_87", gpu_multiprocessors=8)
    cubin = stand_in_cubin(list(tiny_kernels()), 87)
    folder = export_tiny_cuda(tmp_path / "bundle", target, [cubin]).folder
    emulator = [PI4.emulator, "-L", PI4.sysroot]
    said = json.loads(run([*emulator, str(folder / "model"), "--info"]))
    assert said["gpu"]["architecture"] == "sm_87"
    assert said["gpu"]["why"].startswith("no NVIDIA driver: libcuda.so.1")
