"""The stub of the CUDA driver: it works, late, and finds what a program does wrong."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from edgepress.targets.cuda.kernel import CudaKernel
from edgepress.targets.program import Array
from tests.cuda.emulation import emulate_kernel
from tests.cuda.gpu import Gpu
from tests.cuda.stub_driver import STUB, stub_driver, write_nvml
from tests.cuda.tiny import stand_in_cubin
from tests.targets.tiny import run

ADD = """extern "C" __global__ void add(const float *x, const float *y, float *z)
{
    int i = blockIdx.x * 32 + threadIdx.x;
    z[i] = x[i] + y[i];
}"""
SHARED = """extern "C" __global__ void much_shared(int *out)
{
    SHARED_MEMORY(memory);
    memory[60 * 1024 - 1] = 5;
    out[0] = memory[60 * 1024 - 1];
}"""
KERNELS = [
    CudaKernel("add", ADD, ("types.cuh",), (2, 1, 1), (32, 1, 1)),
    CudaKernel("much_shared", SHARED, ("types.cuh",), (1, 1, 1), (1, 1, 1), 60 * 1024),
]
SUCCESS, INVALID_VALUE, OUT_OF_MEMORY, NOT_INITIALIZED = 0, 1, 2, 3
NO_DEVICE, INVALID_IMAGE, INVALID_CONTEXT, NO_BINARY, NOT_FOUND = 100, 200, 201, 209, 500
NOT_READY, ILLEGAL_ADDRESS, LAUNCH_FAILED = 600, 700, 719
CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED = 900, 901
MAX_DYNAMIC_SHARED, MULTIPROCESSORS, NON_BLOCKING, EXTERNAL = 8, 16, 1, 1


class Driver:
    """The stub, with a context and a stream; functions raise what they return unless told."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.stream = ctypes.c_void_p()

    def open(self, capability: int = 90) -> None:
        """Make a context, a stream, and a module with all kernels."""
        self("cuInit", 0)
        self.context = self.made("cuDevicePrimaryCtxRetain", 0)
        self("cuCtxPushCurrent_v2", self.context)
        self.stream = self.made("cuStreamCreate", NON_BLOCKING)
        self.image = ctypes.create_string_buffer(stand_in_cubin(["add", "much_shared"], capability))
        self.module = self.made("cuModuleLoadData", self.image)

    def __call__(self, function: str, *arguments: object, code: int = SUCCESS) -> None:
        got = getattr(self.library, function)(*arguments)
        assert got == code, f"{function} returned {got}"

    def made(self, function: str, *arguments: object) -> ctypes.c_void_p:
        """Call a function whose first argument is where it writes a handle."""
        handle = ctypes.c_void_p()
        self(function, ctypes.byref(handle), *arguments)
        return handle

    def memory(self, array: Array) -> ctypes.c_void_p:
        """Allocate on the device, and copy there."""
        place = self.made("cuMemAlloc_v2", ctypes.c_size_t(array.nbytes))
        copied = (place, ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes))
        self("cuMemcpyHtoDAsync_v2", *copied, self.stream)
        self("cuStreamSynchronize", self.stream)
        return place

    def pinned(self, count: int) -> Array:
        """Pinned memory of floats."""
        place = self.made("cuMemHostAlloc", ctypes.c_size_t(4 * count), 0)
        assert place.value is not None
        return np.ctypeslib.as_array((ctypes.c_float * count).from_address(place.value))

    def launch(
        self,
        name: str,
        arguments: Sequence[ctypes.c_void_p],
        blocks: int = 2,
        threads: int = 32,
        shared_bytes: int = 0,
        code: int = SUCCESS,
    ) -> None:
        function = self.made("cuModuleGetFunction", self.module, name.encode())
        addresses = [ctypes.cast(ctypes.byref(each), ctypes.c_void_p) for each in arguments]
        parameters = (ctypes.c_void_p * len(arguments))(*addresses)
        shape = (blocks, 1, 1, threads, 1, 1, shared_bytes)
        self("cuLaunchKernel", function, *shape, self.stream, parameters, None, code=code)

    def read(self, to: Array, place: ctypes.c_void_p) -> None:
        """Copy from the device, some time until the stream is waited for."""
        into, size = ctypes.c_void_p(to.ctypes.data), ctypes.c_size_t(to.nbytes)
        self("cuMemcpyDtoHAsync_v2", into, place, size, self.stream)

    def synchronise(self, code: int = SUCCESS) -> None:
        self("cuStreamSynchronize", self.stream, code=code)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("driver")
    return folder, stub_driver(folder, KERNELS)


@pytest.fixture
def driver(
    built: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Driver:
    """A copy of the library, so that each test has one that nobody has used."""
    folder, environment = built
    for name in ("CUDA_STUB_KERNELS", "NVML_STUB"):
        monkeypatch.setenv(name, environment[name])
    monkeypatch.setenv("CUDA_STUB_LOG", str(tmp_path / "log"))
    return Driver(Path(shutil.copy(folder / "libcuda.so.1", tmp_path)))


X, Y = np.arange(64, dtype=np.float32), np.full(64, 0.5, np.float32)
NOTHING = np.zeros(64, np.float32)


def test_a_kernel_runs_when_it_is_waited_for(driver: Driver) -> None:
    driver.open()
    out, z = driver.pinned(64), driver.memory(NOTHING)
    driver.launch("add", [driver.memory(X), driver.memory(Y), z])
    driver.read(out, z)
    assert np.isnan(out).all()
    driver.synchronise()
    np.testing.assert_array_equal(out, X + Y)


def test_kernels_run_beside_those_of_the_tests_themselves(driver: Driver) -> None:
    """Each library has its own scheduler, whatever else the process has loaded."""
    for checked in (False, True):
        z = NOTHING.copy()
        emulate_kernel(KERNELS[0], [X, Y, z], checked=checked)
        np.testing.assert_array_equal(z, X + Y)
        if not checked:
            test_a_kernel_runs_when_it_is_waited_for(driver)


def test_an_input_is_read_as_late_as_may_be(driver: Driver) -> None:
    """A host that changes pinned memory before the stream is done finds out."""
    driver.open()
    given, out, x = driver.pinned(64), driver.pinned(64), driver.memory(X)
    given[:] = 7
    place = ctypes.c_void_p(given.ctypes.data)
    driver("cuMemcpyHtoDAsync_v2", x, place, ctypes.c_size_t(given.nbytes), driver.stream)
    given[:] = 8
    driver.read(out, x)
    driver.synchronise()
    assert set(out) == {8}


def test_a_graph_does_its_work_every_time(driver: Driver) -> None:
    driver.open()
    out, x, z = driver.pinned(64), driver.memory(X), driver.memory(NOTHING)
    y, graph = driver.memory(Y), ctypes.c_void_p()
    driver("cuStreamBeginCapture_v2", driver.stream, 1)
    driver.launch("add", [x, y, z])
    driver.launch("add", [z, y, x])
    driver.read(out, x)
    driver("cuStreamEndCapture", driver.stream, ctypes.byref(graph))
    runnable = driver.made("cuGraphInstantiateWithFlags", graph, ctypes.c_ulonglong(0))
    driver("cuGraphDestroy", graph)
    driver.synchronise()
    assert np.isnan(out).all()
    for times in (1, 2):
        driver("cuGraphLaunch", runnable, driver.stream)
        driver.synchronise()
        np.testing.assert_array_equal(out, X + times)


def test_what_is_not_allowed_in_a_capture(driver: Driver) -> None:
    driver.open()
    memory, graph = ctypes.c_void_p(), ctypes.c_void_p()
    driver("cuStreamBeginCapture_v2", driver.stream, 1)
    size = ctypes.c_size_t(4)
    driver("cuMemAlloc_v2", ctypes.byref(memory), size, code=CAPTURE_UNSUPPORTED)
    driver.synchronise(code=CAPTURE_UNSUPPORTED)
    driver("cuStreamEndCapture", driver.stream, ctypes.byref(graph), code=CAPTURE_INVALIDATED)
    assert graph.value is None


def test_the_host_cannot_read_device_memory(driver: Driver) -> None:
    driver.open()
    address = driver.memory(X).value
    assert address is not None
    assert address % 256 == 0
    reading, writing = os.pipe()
    with pytest.raises(OSError, match="Bad address"):
        os.write(writing, (ctypes.c_char * 4).from_address(address))
    os.close(reading)
    os.close(writing)


def wrong_arguments(driver: Driver) -> dict[str, ctypes.c_void_p]:
    freed = driver.memory(X)
    driver("cuMemFree_v2", freed)
    return {
        "freed": freed,
        "the host's": ctypes.c_void_p(X.ctypes.data),
        "null": ctypes.c_void_p(),
        "too small": driver.memory(X[:60]),
    }


@pytest.mark.parametrize("which", ["freed", "the host's", "null", "too small"])
def test_wrong_arguments_are_found(driver: Driver, which: str) -> None:
    driver.open()
    wrong = wrong_arguments(driver)[which]
    x, y = driver.memory(X), driver.memory(Y)
    driver.launch("add", [x, y, wrong])
    driver.synchronise(code=ILLEGAL_ADDRESS)
    size = ctypes.c_size_t(4)
    driver("cuMemAlloc_v2", ctypes.byref(x), size, code=ILLEGAL_ADDRESS)  # as every call from now


@pytest.mark.parametrize(
    ("capability", "architecture", "code"),
    [("9.0", 90, SUCCESS), ("8.7", 80, SUCCESS), ("8.0", 87, NO_BINARY), ("9.0", 80, NO_BINARY)],
)
def test_images_are_for_one_architecture(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, capability: str, architecture: int, code: int
) -> None:
    driver.open()
    monkeypatch.setenv("CUDA_STUB_CAPABILITY", capability)
    image = ctypes.create_string_buffer(stand_in_cubin(["add"], architecture))
    driver("cuModuleLoadData", ctypes.byref(ctypes.c_void_p()), image, code=code)


def test_an_image_must_be_a_cubin_and_have_the_function(driver: Driver) -> None:
    driver.open()
    handle = ctypes.byref(ctypes.c_void_p())
    driver("cuModuleLoadData", handle, ctypes.create_string_buffer(64), code=INVALID_IMAGE)
    driver("cuModuleGetFunction", handle, driver.module, b"subtract", code=NOT_FOUND)


def test_much_shared_memory_must_be_asked_for(driver: Driver) -> None:
    driver.open()
    out = driver.memory(np.zeros(1, np.int32))
    driver.launch("much_shared", [out], 1, 1, 60 * 1024, code=INVALID_VALUE)
    function = driver.made("cuModuleGetFunction", driver.module, b"much_shared")
    limit = 227 * 1024
    driver("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED, limit + 1, code=INVALID_VALUE)
    driver("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED, 60 * 1024)
    out = driver.memory(np.zeros(1, np.int32))
    parameters = (ctypes.c_void_p * 1)(ctypes.cast(ctypes.byref(out), ctypes.c_void_p))
    shape = (1, 1, 1, 1, 1, 1, 60 * 1024)
    driver("cuLaunchKernel", function, *shape, driver.stream, parameters, None)
    result = np.zeros(1, np.int32)
    driver.read(result, out)
    driver.synchronise()
    assert result[0] == 5


def test_the_order_of_opening(driver: Driver) -> None:
    handle = ctypes.byref(ctypes.c_void_p())
    driver("cuDeviceGetCount", handle, code=NOT_INITIALIZED)
    driver("cuInit", 0)
    driver("cuStreamCreate", handle, 0, code=INVALID_CONTEXT)


def test_failures_on_demand(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.open()
    x, y, z = driver.memory(X), driver.memory(Y), driver.memory(NOTHING)
    monkeypatch.setenv("CUDA_STUB_FAIL", "cuMemAlloc_v2:2:5,execute:719:2")
    handle = ctypes.byref(ctypes.c_void_p())
    driver("cuMemAlloc_v2", handle, ctypes.c_size_t(4))
    driver("cuMemAlloc_v2", handle, ctypes.c_size_t(4), code=OUT_OF_MEMORY)
    driver("cuMemAlloc_v2", handle, ctypes.c_size_t(4))
    driver.launch("add", [x, y, z])
    driver.synchronise()
    driver.launch("add", [x, y, z])
    driver.synchronise(code=LAUNCH_FAILED)


def test_the_device_is_what_the_environment_says(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_STUB_DEVICES", "0")
    driver("cuInit", 0, code=NO_DEVICE)
    monkeypatch.setenv("CUDA_STUB_DEVICES", "1")
    monkeypatch.setenv("CUDA_STUB_MEMORY_BYTES", "1000")
    monkeypatch.setenv("CUDA_STUB_MULTIPROCESSORS", "16")
    driver.open()
    count = ctypes.c_int()
    driver("cuDeviceGetAttribute", ctypes.byref(count), MULTIPROCESSORS, 0)
    assert count.value == 16
    memory = driver.made("cuMemAlloc_v2", ctypes.c_size_t(900))
    handle = ctypes.byref(ctypes.c_void_p())
    driver("cuMemAlloc_v2", handle, ctypes.c_size_t(101), code=OUT_OF_MEMORY)
    driver("cuMemFree_v2", memory)
    driver("cuMemAlloc_v2", handle, ctypes.c_size_t(1000))


def test_events_have_a_time_once_their_stream_is_there(driver: Driver) -> None:
    driver.open()
    start, end = (driver.made("cuEventCreate", 0) for _ in range(2))
    x, z = driver.memory(X), driver.memory(NOTHING)
    ms = ctypes.c_float(-1)
    driver("cuEventRecordWithFlags", start, driver.stream, 0)
    driver.launch("add", [x, x, z])
    driver("cuEventRecordWithFlags", end, driver.stream, 0)
    driver("cuEventElapsedTime", ctypes.byref(ms), start, end, code=NOT_READY)
    driver.synchronise()
    driver("cuEventElapsedTime", ctypes.byref(ms), start, end)
    assert ms.value > 0


def test_events_in_a_graph_must_be_external(driver: Driver) -> None:
    driver.open()
    start, end = (driver.made("cuEventCreate", 0) for _ in range(2))
    graph, ms = ctypes.c_void_p(), ctypes.c_float(-1)
    driver("cuEventRecordWithFlags", start, driver.stream, EXTERNAL, code=INVALID_VALUE)
    driver("cuStreamBeginCapture_v2", driver.stream, 1)
    driver("cuEventRecordWithFlags", start, driver.stream, EXTERNAL)
    driver("cuEventRecordWithFlags", end, driver.stream, EXTERNAL)
    driver("cuStreamEndCapture", driver.stream, ctypes.byref(graph))
    runnable = driver.made("cuGraphInstantiateWithFlags", graph, ctypes.c_ulonglong(0))
    driver("cuGraphLaunch", runnable, driver.stream)
    driver("cuEventElapsedTime", ctypes.byref(ms), start, end, code=NOT_READY)
    driver.synchronise()
    driver("cuEventElapsedTime", ctypes.byref(ms), start, end)
    assert ms.value >= 0


def test_the_log_has_every_call(driver: Driver, tmp_path: Path) -> None:
    driver.open()
    driver.synchronise()
    lines = (tmp_path / "log").read_text(encoding="utf-8").split()
    assert lines[0] == "cuInit"
    assert lines[-1] == "cuStreamSynchronize"


def test_a_driver_may_lack_functions(tmp_path: Path) -> None:
    stub_driver(tmp_path, KERNELS[:1], without=["cuGraphLaunch"], nvml=False)
    library = ctypes.CDLL(str(tmp_path / "libcuda.so.1"))
    assert hasattr(library, "cuGraphDestroy")
    assert not hasattr(library, "cuGraphLaunch")
    assert not (tmp_path / "libnvidia-ml.so.1").exists()


def test_nvml_answers_what_its_file_says(
    built: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, environment = built
    monkeypatch.setenv("NVML_STUB", environment["NVML_STUB"])
    nvml = ctypes.CDLL(str(folder / "libnvidia-ml.so.1"))
    device, value = ctypes.c_void_p(), ctypes.c_uint()
    assert nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)) == 1  # not initialised
    assert nvml.nvmlInit_v2() == 0
    assert nvml.nvmlDeviceGetHandleByPciBusId_v2(b"0000:01:00.0", ctypes.byref(device)) == 0
    write_nvml(folder, clock_mhz=1234, power_milliwatts=None)
    assert nvml.nvmlDeviceGetClockInfo(device, 1, ctypes.byref(value)) == 0
    assert value.value == 1234
    assert nvml.nvmlDeviceGetPowerUsage(device, ctypes.byref(value)) == 3  # not supported


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_what_nvcc_makes_is_a_module(driver: Driver) -> None:
    """And what runs kernels on a GPU for other tests can run them here."""
    z = NOTHING.copy()
    gpu = Gpu(driver.library._name)
    assert gpu.architecture == "sm_90"
    gpu.run(KERNELS[0], [X, Y, z])
    np.testing.assert_array_equal(z, X + Y)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs NVIDIA's cuda.h")
def test_functions_are_declared_as_nvidias_are(tmp_path: Path) -> None:
    flags = ("-c", "-DSTUB_WITH_CUDA_H", "-Xcompiler=-std=c11,-Wall,-Wextra,-Werror")
    for source in STUB.glob("*.c"):
        command = ("nvcc", *flags, str(source), "-o", str(tmp_path / f"{source.stem}.o"))
        assert run(command) == ""
