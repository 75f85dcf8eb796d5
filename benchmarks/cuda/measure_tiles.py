"""Measures kernels on a GPU: the half of tiles.py that needs Python, nvcc and a driver alone.

    python measure_tiles.py FOLDER -o costs.json [--budget-s 120]

Every kernel is launched several times in one CUDA Graph, as in a network; the figure is the least
of a few graphs, in microseconds per launch. Layers are visited in turn and what there was no time
for is left out.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

LAUNCHES, REPEATS, GRAPHS = 20, 3, 3
POOL_BYTES = 1 << 30
SHARED_ATTRIBUTE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class Driver:
    """The CUDA driver, every call checked."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")
        self("cuInit", 0)
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self("cuDeviceGet", ctypes.byref(device), 0)
        self("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self("cuCtxSetCurrent", context)
        name = ctypes.create_string_buffer(100)
        self("cuDeviceGetName", name, 100, device)
        self.device_name = name.value.decode()

    def __call__(self, function: str, *arguments: Any) -> None:
        code = getattr(self.library, function)(*arguments)
        if code != 0:
            text = ctypes.c_char_p()
            self.library.cuGetErrorName(code, ctypes.byref(text))
            raise RuntimeError(f"{function}: {(text.value or b'?').decode()}")

    def handle(self, function: str, *arguments: Any) -> ctypes.c_void_p:
        """Call what returns a handle through its first parameter."""
        handle = ctypes.c_void_p()
        self(function, ctypes.byref(handle), *arguments)
        return handle


def compile_units(folder: Path, index: dict[str, Any]) -> dict[int, str]:
    """Compile every unit, all cores at work; return what nvcc said against one."""

    def compile_unit(unit: int) -> str:
        source, cubin = folder / f"unit{unit}.cu", folder / f"unit{unit}.cubin"
        if cubin.exists():
            return ""
        command = ["nvcc", "-std=c++17", "-cubin", f"-arch={index['arch']}", "-I", str(folder)]
        done = subprocess.run(
            [*command, str(source), "-o", str(cubin)], capture_output=True, text=True, check=False
        )
        return done.stderr if done.returncode else ""

    units = sorted({trial["unit"] for trial in index["trials"]})
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        said = dict(zip(units, threads.map(compile_unit, units), strict=True))
    return {unit: text for unit, text in said.items() if text}


class Bench:
    """Launches kernels on one stream over one pool of memory."""

    def __init__(self) -> None:
        self.driver = Driver()
        self.pool = ctypes.c_uint64()
        self.driver("cuMemAlloc_v2", ctypes.byref(self.pool), ctypes.c_size_t(POOL_BYTES))
        noise = os.urandom(1 << 20).replace(b"\x7f", b"\x3b").replace(b"\xff", b"\xbb")
        for start in range(0, POOL_BYTES, len(noise)):
            self.driver("cuMemcpyHtoD_v2", ctypes.c_uint64(self.pool.value + start), noise,
                        ctypes.c_size_t(len(noise)))  # fmt: skip
        self.counters = ctypes.c_uint64()
        self.driver("cuMemAlloc_v2", ctypes.byref(self.counters), ctypes.c_size_t(1 << 22))
        self.driver("cuMemsetD8_v2", self.counters, ctypes.c_ubyte(0), ctypes.c_size_t(1 << 22))
        self.stream = self.driver.handle("cuStreamCreate", 1)
        self.events = [self.driver.handle("cuEventCreate", 0) for _ in range(2)]
        self.modules: dict[int, ctypes.c_void_p] = {}

    def measure(self, trial: dict[str, Any], folder: Path) -> float:
        """Return the microseconds of one launch."""
        driver, unit = self.driver, trial["unit"]
        if unit not in self.modules:
            image = (folder / f"unit{unit}.cubin").read_bytes()
            self.modules[unit] = driver.handle("cuModuleLoadData", image)
        function = driver.handle("cuModuleGetFunction", self.modules[unit], trial["name"].encode())
        driver("cuFuncSetAttribute", function, SHARED_ATTRIBUTE, trial["shared_bytes"])
        place, values = self.pool.value, []
        for size in trial["argument_bytes"]:
            values.append(ctypes.c_uint64(place))
            place += -(-size // 256) * 256
        if place > self.pool.value + POOL_BYTES:
            raise RuntimeError("the arguments do not fit the pool")
        if trial["counters"]:
            values.append(self.counters)
        arguments = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        driver("cuStreamBeginCapture_v2", self.stream, 0)
        for _ in range(LAUNCHES):
            driver("cuLaunchKernel", function, *trial["grid"], *trial["block"],
                   trial["shared_bytes"], self.stream, arguments, None)  # fmt: skip
        graph = ctypes.c_void_p()
        driver("cuStreamEndCapture", self.stream, ctypes.byref(graph))
        ready = ctypes.c_void_p()
        driver("cuGraphInstantiateWithFlags", ctypes.byref(ready), graph, ctypes.c_ulonglong(0))
        least = float("inf")
        for _ in range(GRAPHS):
            driver("cuEventRecord", self.events[0], self.stream)
            for _ in range(REPEATS):
                driver("cuGraphLaunch", ready, self.stream)
            driver("cuEventRecord", self.events[1], self.stream)
            driver("cuEventSynchronize", self.events[1])
            ms = ctypes.c_float()
            driver("cuEventElapsedTime", ctypes.byref(ms), *self.events)
            least = min(least, ms.value * 1e3 / (LAUNCHES * REPEATS))
        driver("cuGraphExecDestroy", ready)
        driver("cuGraphDestroy", graph)
        return least


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--budget-s", type=float, default=120)
    options = parser.parse_args()
    started = time.monotonic()
    index = json.loads((options.folder / "index.json").read_text())
    broken = compile_units(options.folder, index)
    for unit, text in broken.items():
        print(f"unit{unit}.cu: {text[:500]}")
    print(f"compiled in {time.monotonic() - started:.0f} s", flush=True)
    bench, costs, failed = Bench(), {}, {}
    for trial in index["trials"]:
        if time.monotonic() - started > options.budget_s:
            print("no time for the rest")
            break
        if trial["unit"] in broken:
            continue
        try:
            costs[trial["name"]] = bench.measure(trial, options.folder)
        except RuntimeError as error:
            failed[trial["name"]] = str(error)
            if "LAUNCH" in str(error) or "ILLEGAL" in str(error):
                print(f"{trial['layer']} {trial['tile']}: {error}; the context is lost")
                break
    document = {"machine": bench.driver.device_name, "us": costs, "failed": failed}
    options.output.write_text(json.dumps(document))
    print(f"{len(costs)} of {len(index['trials'])} kernels in {time.monotonic() - started:.0f} s; "
          f"{len(failed)} failed: {list(failed.values())[:3]}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
