"""What bundles for a GPU say where the driver fails, and what they do not forget then."""

import dataclasses
from pathlib import Path

import pytest

from tests.cuda.bundles import QUICK, Bundle
from tests.cuda.stub_driver import stub_driver, write_nvml
from tests.cuda.tiny import (
    TARGET,
    export_tiny_cuda,
    stand_in_cubin,
    tiny_cuda_program,
    tiny_kernels,
)
from tests.targets.test_runtime_c import SANITIZERS

NO_CPU = "Run it where there is one, or build for a CPU: edgepress run -t native."
FOR_SM90 = "This bundle is for GPUs of architecture sm_90."
FAILURES: dict[str, tuple[dict[str, str], int, list[str]]] = {
    "no GPU": (
        {"CUDA_STUB_DEVICES": "0"},
        3,
        ["cuInit failed: CUDA_ERROR_NO_DEVICE: no CUDA-capable", FOR_SM90, NO_CPU],
    ),
    "a driver of another version than its module": (
        {"CUDA_STUB_FAIL": "cuInit:803"},
        3,
        ["CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", FOR_SM90, "Install a driver for it"],
    ),
    "no count of GPUs": (
        {"CUDA_STUB_FAIL": "cuDeviceGetCount:999"},
        3,
        ["cuDeviceGetCount failed: CUDA_ERROR_UNKNOWN: unknown error", FOR_SM90],
    ),
    "a GPU that says nothing": (
        {"CUDA_STUB_FAIL": "cuDeviceGetAttribute:101:2"},
        3,
        ["cuDeviceGetAttribute failed: CUDA_ERROR_INVALID_DEVICE"],
    ),
    "no context": (
        {"CUDA_STUB_FAIL": "cuDevicePrimaryCtxRetain:2"},
        2,
        ["cuDevicePrimaryCtxRetain failed: CUDA_ERROR_OUT_OF_MEMORY"],
    ),
    "a context that cannot be entered": (
        {"CUDA_STUB_FAIL": "cuCtxPushCurrent_v2:201"},
        2,
        ["cuCtxPushCurrent_v2 failed: CUDA_ERROR_INVALID_CONTEXT"],
    ),
    "no stream": ({"CUDA_STUB_FAIL": "cuStreamCreate:2"}, 2, ["cuStreamCreate failed"]),
    "code that the driver does not know": (
        {"CUDA_STUB_FAIL": "cuModuleLoadData:209", "CUDA_STUB_VERSION": "11040"},
        3,
        ["CUDA_ERROR_NO_BINARY_FOR_GPU", "is of CUDA 11.4", "for sm_90, which nvcc 13.0.48 made",
         "Install a newer driver."],
    ),
    "no memory for code": (
        {"CUDA_STUB_FAIL": "cuModuleLoadData:2:2"},
        2,
        ["cuModuleLoadData failed: CUDA_ERROR_OUT_OF_MEMORY", " of the GPU's memory are free"],
    ),
    "a kernel that is not there": (
        {"CUDA_STUB_FAIL": "cuModuleGetFunction:500"},
        2,
        ['the kernel add_one of first */ "node": cuModuleGetFunction failed: CUDA_ERROR_NOT_FOUND'],
    ),
    "no shared memory": (
        {"CUDA_STUB_FAIL": "cuFuncSetAttribute:1"},
        2,
        ["the kernel sum of third: cuFuncSetAttribute failed: CUDA_ERROR_INVALID_VALUE"],
    ),
    "no memory for weights": (
        {"CUDA_STUB_FAIL": "cuMemAlloc_v2:2:1"},
        2,
        ["no memory on the GPU for 256 bytes of weights", "bytes are free"],
    ),
    "no memory for activations": (
        {"CUDA_STUB_FAIL": "cuMemAlloc_v2:2:2"},
        2,
        ["256 bytes of activations", "the model has 256 by now", "End other programs that use it"],
    ),
    "no memory for inputs": ({"CUDA_STUB_FAIL": "cuMemAlloc_v2:2:3"}, 2, ["512 bytes of inputs"]),
    "no memory for outputs": ({"CUDA_STUB_FAIL": "cuMemAlloc_v2:2:4"}, 2, ["bytes of outputs"]),
    "no memory for counters": ({"CUDA_STUB_FAIL": "cuMemAlloc_v2:2:5"}, 2, ["8 bytes of counters"]),
    "no memory that the GPU can read": (
        {"CUDA_STUB_FAIL": "cuMemHostAlloc:2:2"},
        2,
        ["cuMemHostAlloc failed: CUDA_ERROR_OUT_OF_MEMORY"],
    ),
    "weights that do not arrive": (
        {"CUDA_STUB_FAIL": "cuMemcpyHtoDAsync_v2:999:1"},
        2,
        ["cuMemcpyHtoDAsync_v2 failed: CUDA_ERROR_UNKNOWN"],
    ),
    "counters that are not zeroed": ({"CUDA_STUB_FAIL": "cuMemsetD8Async:1"}, 2, ["cuMemsetD8"]),
    "no capture": ({"CUDA_STUB_FAIL": "cuStreamBeginCapture_v2:900"}, 2, ["cuStreamBeginCapture"]),
    "a kernel that cannot be launched": (
        {"CUDA_STUB_FAIL": "cuLaunchKernel:701:2"},
        2,
        ["zweitér: cuLaunchKernel failed: CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES: too many"],
    ),
    "a kernel that cannot start early": (
        {"CUDA_STUB_FAIL": "cuLaunchKernel:701:3"},
        2,
        ["third: cuLaunchKernelEx failed: CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES: too many"],
    ),
    "a broken capture": ({"CUDA_STUB_FAIL": "cuStreamEndCapture:901"}, 2, ["cuStreamEndCapture"]),
    "no graph": (
        {"CUDA_STUB_FAIL": "cuGraphInstantiateWithFlags:2"},
        2,
        ["cuGraphInstantiateWithFlags failed: CUDA_ERROR_OUT_OF_MEMORY"],
    ),
    "a graph that does not start": (
        {"CUDA_STUB_FAIL": "cuGraphLaunch:719:2"},
        1,
        ["cuGraphLaunch failed: CUDA_ERROR_LAUNCH_FAILED: unspecified launch failure"],
    ),
    "a kernel that fails": (
        {"CUDA_STUB_FAIL": "execute:700:4"},
        1,
        ["cuStreamSynchronize failed: CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access"],
    ),
    "an error that nobody knows": (
        {"CUDA_STUB_FAIL": "cuGraphLaunch:12345"},
        1,
        ["cuGraphLaunch failed: an error that the driver has no name for"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("failure", FAILURES)
def test_failures_of_the_driver(bundle: Bundle, failure: str) -> None:
    variables, code, words = FAILURES[failure]
    got, said = bundle.fail("--selftest", **variables)
    assert got == code, said
    assert said.startswith("model: ")
    assert said.count("\n") == 1
    for part in words:
        assert part in said
    keeps = ("a kernel that fails", "a broken capture", "a context that cannot be entered")
    assert failure in keeps or bundle.left() == []


@pytest.mark.parametrize(
    ("fail", "words"),
    [
        ("cuEventCreate:2:2", "cuEventCreate failed: CUDA_ERROR_OUT_OF_MEMORY"),
        ("cuEventRecordWithFlags:1:3", "cuEventRecordWithFlags failed"),
        ("cuEventElapsedTime:600:2", "cuEventElapsedTime failed: CUDA_ERROR_NOT_READY"),
        ("cuStreamBeginCapture_v2:900:2", "cuStreamBeginCapture_v2 failed"),
    ],
)
def test_failures_while_it_measures(bundle: Bundle, fail: str, words: str) -> None:
    code, said = bundle.fail("--profile", *QUICK, CUDA_STUB_FAIL=fail)
    assert code in (1, 2)
    assert words in said
    assert bundle.left() == []


@pytest.mark.parametrize(
    ("capability", "words"),
    [
        ("8.6", "has architecture sm_86, but this bundle is for sm_90. Build it for the target "
                "cuda-sm80."),
        ("8.7", "Build it for the target jetson-orin-nano or jetson-agx-orin."),
        ("7.5", "has architecture sm_75, but this bundle is for sm_90. No target of edgepress is "
                "for it."),
        ("12.0", "has architecture sm_120"),
    ],
)  # fmt: skip
def test_another_gpu_is_refused(bundle: Bundle, capability: str, words: str) -> None:
    code, said = bundle.fail("--selftest", CUDA_STUB_CAPABILITY=capability)
    assert code == 3
    assert "the GPU Emulated GPU " in said
    assert words in said
    assert "CUDA_VISIBLE_DEVICES" not in said
    _, said = bundle.fail("--selftest", CUDA_STUB_CAPABILITY=capability, CUDA_STUB_DEVICES="2")
    assert "CUDA_VISIBLE_DEVICES chooses another GPU." in said


@pytest.mark.parametrize(
    ("architecture", "runs_on", "not_on"),
    [
        ("sm_80", ("8.0", "8.6", "8.9"), ("8.7", "9.0")),
        ("sm_86", ("8.6", "8.9"), ("8.0", "8.7")),
        ("sm_87", ("8.7",), ("8.9", "8.0", "9.0")),
        ("sm_90", ("9.0",), ("10.0", "8.9")),
        ("sm_90a", ("9.0",), ("9.1",)),
        ("sm_100", ("10.0", "10.3"), ("10.1", "9.0", "11.0")),
    ],
)
def test_which_gpus_run_which_code(
    driver: dict[str, str],
    tmp_path: Path,
    architecture: str,
    runs_on: tuple[str, ...],
    not_on: tuple[str, ...],
) -> None:
    target = dataclasses.replace(TARGET, gpu_arch=architecture)
    folder = export_tiny_cuda(tmp_path / "bundle", target).folder
    bundle = Bundle(folder, driver, tmp_path / "log")
    for capability in (*runs_on, *not_on):
        said = bundle.ask("--info", CUDA_STUB_CAPABILITY=capability)
        assert said["gpu"]["usable"] is (capability in runs_on), (capability, said["gpu"]["why"])


def test_more_shared_memory_than_the_gpu_has(driver: dict[str, str], tmp_path: Path) -> None:
    cubin = stand_in_cubin(list(tiny_kernels()), 80)
    target = dataclasses.replace(TARGET, name="cuda-sm80", gpu_arch="sm_80")
    folder = export_tiny_cuda(tmp_path / "bundle", target, [cubin]).folder
    bundle = Bundle(folder, driver, tmp_path / "log")
    assert bundle.ask("--selftest", CUDA_STUB_CAPABILITY="8.0")["passed"]
    code, said = bundle.fail("--selftest", CUDA_STUB_CAPABILITY="8.6")
    assert code == 2
    assert "the kernel sum of third: a block needs 102400 bytes of shared memory" in said
    assert "has 101376 at most" in said


def test_without_a_driver(bundle: Bundle, tmp_path: Path) -> None:
    code, said = bundle.fail("--selftest", LD_LIBRARY_PATH=str(tmp_path))
    assert code == 3
    assert said.startswith("model: no NVIDIA driver: libcuda.so.1: cannot open shared object file")
    assert said.endswith(
        f"{FOR_SM90} Install a driver for it, or build for a CPU: edgepress run -t native.\n"
    )
    info = bundle.ask("--info", LD_LIBRARY_PATH=str(tmp_path))
    assert info["supported"] is False
    assert info["gpu"]["why"].startswith("no NVIDIA driver")


def test_it_answers_on_a_driver_that_cannot_overlap_kernels(exported: Path, tmp_path: Path) -> None:
    driver = stub_driver(tmp_path / "driver", tiny_cuda_program(), without=["cuLaunchKernelEx"])
    assert Bundle(exported, driver, tmp_path / "log").ask("--selftest")["passed"]


def test_a_driver_that_is_too_old(exported: Path, tmp_path: Path) -> None:
    missing = "cuGraphInstantiateWithFlags"
    driver = stub_driver(tmp_path / "driver", tiny_cuda_program(), without=[missing])
    bundle = Bundle(exported, driver, tmp_path / "log")
    code, said = bundle.fail("--selftest", CUDA_STUB_VERSION="11020")
    assert code == 3
    assert f"the NVIDIA driver is too old: it is of CUDA 11.2 and has no {missing}" in said


@pytest.fixture(scope="module")
def leaks(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What is no leak of ours: the stand-in driver keeps functions, to find out who uses them."""
    path = tmp_path_factory.mktemp("leaks") / "suppressions"
    path.write_text("leak:cuModuleGetFunction\n")
    return f"suppressions={path}:print_suppressions=0"


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle's executable once more, with sanitizers."""
    flags = (*SANITIZERS, "-fno-omit-frame-pointer")
    target = dataclasses.replace(TARGET, compiler_flags=flags)
    return export_tiny_cuda(tmp_path_factory.mktemp("sanitized") / "bundle", target).folder


@pytest.mark.parametrize(
    "arguments", [("--selftest",), ("--bench", "--anyway", *QUICK), ("--profile", *QUICK)]
)
def test_no_sanitizer_complains(
    sanitized: Path, driver: dict[str, str], leaks: str, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    write_nvml(Path(driver["NVML_STUB"]).parent)
    bundle = Bundle(sanitized, driver, tmp_path / "log")
    bundle.ask(*arguments, LSAN_OPTIONS=leaks)


@pytest.mark.parametrize("failure", ["no memory for counters", "no graph", "a broken capture"])
def test_no_sanitizer_complains_of_failures(
    sanitized: Path, driver: dict[str, str], leaks: str, tmp_path: Path, failure: str
) -> None:
    bundle = Bundle(sanitized, driver, tmp_path / "log")
    variables, code, words = FAILURES[failure]
    got, said = bundle.fail("--selftest", LSAN_OPTIONS=leaks, **variables)
    assert got == code, said
    assert said.count("\n") == 1
    assert words[0] in said
