"""Runs one kernel on this machine's GPU, as `emulate_kernel` does without one."""

from __future__ import annotations

import ctypes
import functools
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from edgepress.targets.cuda.compile import units_of
from edgepress.targets.cuda.kernel import CudaKernel
from edgepress.targets.program import Array
from tests.cuda.emulated_code import KERNELS
from tests.targets.tiny import run

_CAPABILITY_MAJOR, _CAPABILITY_MINOR, _MAX_DYNAMIC_SHARED = 75, 76, 8


class Gpu:
    """The first GPU, through NVIDIA's driver.

    Attributes:
        architecture: such as `sm_90`.
    """

    def __init__(self, library: str = "libcuda.so.1") -> None:
        """Open it; raises OSError where there is none."""
        self._driver = ctypes.CDLL(library)
        self._context = ctypes.c_void_p()
        self._call("cuInit", 0)
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(major), _CAPABILITY_MAJOR, 0)
        self._call("cuDeviceGetAttribute", ctypes.byref(minor), _CAPABILITY_MINOR, 0)
        self.architecture = f"sm_{major.value}{minor.value}"
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), 0)

    def run(self, kernel: CudaKernel, arguments: Sequence[Array]) -> None:
        """Compile a kernel with nvcc and run it; it writes into the arrays that it gets."""
        counters = [np.zeros(kernel.counters, np.uint32)] if kernel.counters else []
        arrays = [*arguments, *counters]
        self._call("cuCtxPushCurrent_v2", self._context)
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), _cubin(kernel, self.architecture))
        self._call("cuModuleGetFunction", ctypes.byref(function), module, kernel.name.encode())
        shared = kernel.shared_bytes
        self._call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, shared)
        places = [self._copied(array) for array in arrays]
        parameters = (ctypes.c_void_p * len(places))(*map(ctypes.addressof, places))
        shape = (*kernel.grid, *kernel.block, shared)
        self._call("cuLaunchKernel", function, *shape, None, parameters, None)
        for place, array in zip(places, arrays, strict=True):
            into, size = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
            self._call("cuMemcpyDtoH_v2", into, place, size)
            self._call("cuMemFree_v2", place)
        self._call("cuModuleUnload", module)
        self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
        assert not any(array.any() for array in counters)

    def _copied(self, array: Array) -> ctypes.c_void_p:
        place, size = ctypes.c_void_p(), ctypes.c_size_t(array.nbytes)
        self._call("cuMemAlloc_v2", ctypes.byref(place), size)
        self._call("cuMemcpyHtoD_v2", place, ctypes.c_void_p(array.ctypes.data), size)
        return place

    def _call(self, function: str, *arguments: object) -> None:
        if code := getattr(self._driver, function)(*arguments):
            raise OSError(f"{function} returned {code}")


@functools.cache
def this_gpu() -> Gpu:
    """Return this machine's GPU; skip the test where it or nvcc is missing."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is missing")
    try:
        return Gpu()
    except OSError as error:
        pytest.skip(f"no GPU: {error}")


@functools.lru_cache(maxsize=8)
def _cubin(kernel: CudaKernel, architecture: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.cu"), Path(folder, "kernel.cubin")
        source.write_text(units_of([kernel])[0].source, encoding="utf-8")
        flags = ("-std=c++17", f"-arch={architecture}", "-cubin", f"-I{KERNELS}")
        run(("nvcc", *flags, str(source), "-o", str(cubin)))
        return cubin.read_bytes()
