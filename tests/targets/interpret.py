"""Run a Program on this machine: link its object, call its kernels one by one through ctypes.

What the exported C driver does, but in Python and with every tensor in memory of its own, between
guards, so that a kernel that writes outside its tensor or leaves a part of it unwritten is caught.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgepress.targets.base import Target
from edgepress.targets.compile import compile_kernels
from edgepress.targets.program import Array, Call, Program

_ALIGNMENT_BYTES = 64
_GUARD_BYTES = 128
_GARBAGE = 0xA5

_RUNTIME_C = """
#include <stdint.h>
#include <stdlib.h>
typedef struct { void *sync_handle; int32_t num_task; } group_env;
typedef int (*parallel_lambda)(int task_id, group_env *env, void *data);
uint64_t workspace_peak, workspace_live;
static void *allocate(int device_type, int device_id, uint64_t bytes, int code, int bits) {
  (void)device_type; (void)device_id; (void)code; (void)bits;
  uint64_t size = (bytes + 63) / 64 * 64;
  char *memory = aligned_alloc(64, size + 64);
  *(uint64_t *)memory = size;
  workspace_live += size;
  if (workspace_live > workspace_peak) workspace_peak = workspace_live;
  return memory + 64;
}
static int release(int device_type, int device_id, void *data) {
  (void)device_type; (void)device_id;
  workspace_live -= *(uint64_t *)((char *)data - 64);
  free((char *)data - 64);
  return 0;
}
static int launch(parallel_lambda lambda, void *data, int num_task) {
  group_env env = {0, num_task ? num_task : 3};
  for (int i = 0; i < env.num_task; ++i) {
    int code = lambda(i, &env, data);
    if (code) return code;
  }
  return 0;
}
void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = allocate;
int (*__TVMBackendFreeWorkspace)(int, int, void *) = release;
int (*__TVMBackendParallelLaunch)(parallel_lambda, void *, int) = launch;
"""


def run_program(program: Program, target: Target, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Compile, link and run a program on the host.

    Args:
        program: what to run; it is validated first.
        target: one whose instructions this machine has.
        feeds: one array per program input, of its exact dtype and shape.

    Returns:
        Program outputs by name.

    Raises:
        AssertionError: a feed does not fit, a kernel failed, or it wrote outside its tensor.
    """
    program.validate()
    with tempfile.TemporaryDirectory() as name:
        library = _link(compile_kernels(program, target), Path(name))
        return _run(program, library, feeds)


def _link(object_code: bytes, folder: Path) -> ctypes.CDLL:
    (folder / "kernels.o").write_bytes(object_code)
    (folder / "runtime.c").write_text(_RUNTIME_C)
    command = ["gcc", "-O1", "-shared", "-fPIC", "-o", "kernels.so", "runtime.c", "kernels.o"]
    command += ["-Wl,-z,defs", "-lm"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "kernels.so"))


@dataclass
class _Memory:
    """An aligned copy of an array between guards. numpy gives empty arrays no address of theirs."""

    array: Array
    address: int

    @classmethod
    def holding(cls, array: Array) -> _Memory:
        room = np.full(array.nbytes + 2 * _GUARD_BYTES + _ALIGNMENT_BYTES, _GARBAGE, np.uint8)
        start = _GUARD_BYTES + -(room.ctypes.data + _GUARD_BYTES) % _ALIGNMENT_BYTES
        copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        copy[...] = array
        return cls(copy, room.ctypes.data + start)

    def check_guards(self, message: str) -> None:
        for start in (self.address - _GUARD_BYTES, self.address + self.array.nbytes):
            guard = ctypes.string_at(start, _GUARD_BYTES)
            assert guard == bytes([_GARBAGE]) * _GUARD_BYTES, message


def _run(program: Program, library: ctypes.CDLL, feeds: Mapping[str, Array]) -> dict[str, Array]:
    assert set(feeds) == set(program.inputs), f"wanted {program.inputs}, got {sorted(feeds)}"
    memory = {name: _Memory.holding(np.asarray(a)) for name, a in program.constants.items()}
    for name, tensor in program.tensors.items():
        memory[name] = _Memory.holding(np.zeros(tensor.shape, tensor.dtype))
        memory[name].array.reshape(-1).view(np.uint8)[:] = _GARBAGE
    for name in program.inputs:
        feed, tensor = feeds[name], program.tensors[name]
        assert (str(feed.dtype), feed.shape) == (tensor.dtype, tensor.shape), (
            f"{name}: {feed.dtype}"
        )
        memory[name].array[...] = feed
    for call in program.calls:
        _call(call, library, memory)
    live, peak = (
        ctypes.c_uint64.in_dll(library, f"workspace_{which}").value for which in ("live", "peak")
    )
    assert live == 0, f"{live} bytes of workspace were not given back"
    assert peak <= program.workspace_bytes, f"workspace: {peak} > {program.workspace_bytes} bytes"
    return {name: memory[name].array.copy() for name in program.outputs}


def _call(call: Call, library: ctypes.CDLL, memory: Mapping[str, _Memory]) -> None:
    where = f"{call.kernel} ({call.node})"
    read = [name for name in call.arguments if name not in call.outputs]
    before = {name: memory[name].array.tobytes() for name in read}
    pointers = [ctypes.c_void_p(memory[name].address) for name in call.arguments]
    code = getattr(library, call.kernel)(*pointers)
    assert code == 0, f"{where} returned {code}"
    for name in call.arguments:
        memory[name].check_guards(f"{where} wrote outside {name}")
    for name, content in before.items():
        assert memory[name].array.tobytes() == content, f"{where} wrote to its input {name}"
