"""Run a Program on this machine: link its object, call its kernels one by one through ctypes.

What the exported C driver does, but in Python and with every tensor in memory of its own, between
guards, so that a kernel that writes outside its tensor or leaves a part of it unwritten is caught.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edgepress.targets.base import Target
from edgepress.targets.compile import compile_kernels
from edgepress.targets.program import Array, Program

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
  for (int i = 0; i < env.num_task; ++i) { int code = lambda(i, &env, data); if (code) return code; }
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


def _run(
    program: Program, library: ctypes.CDLL, feeds: Mapping[str, Array]
) -> dict[str, Array]:
    assert set(feeds) == set(program.inputs), f"wanted {program.inputs}, got {sorted(feeds)}"
    memory = {name: _guarded(np.asarray(array)) for name, array in program.constants.items()}
    for name, tensor in program.tensors.items():
        memory[name] = _guarded(np.zeros(tensor.shape, tensor.dtype))
        memory[name].reshape(-1).view(np.uint8)[:] = _GARBAGE
    for name in program.inputs:
        feed, tensor = feeds[name], program.tensors[name]
        assert (feed.dtype, feed.shape) == (tensor.dtype, tensor.shape), f"{name}: {feed.dtype}"
        memory[name][...] = feed
    for call in program.calls:
        pointers = [ctypes.c_void_p(memory[name].ctypes.data) for name in call.arguments]
        before = {
            name: memory[name].tobytes() for name in call.arguments if name not in call.outputs
        }
        code = getattr(library, call.kernel)(*pointers)
        assert code == 0, f"{call.kernel} ({call.node}) returned {code}"
        for name in call.arguments:
            _check_guards(memory[name], f"{call.kernel} ({call.node}) wrote outside {name}")
        for name, content in before.items():
            assert memory[name].tobytes() == content, f"{call.kernel} wrote to its input {name}"
    live, peak = (
        ctypes.c_uint64.in_dll(library, f"workspace_{which}").value for which in ("live", "peak")
    )
    assert live == 0, f"{live} bytes of workspace were not given back"
    assert peak <= program.workspace_bytes, f"workspace: {peak} > {program.workspace_bytes} bytes"
    return {name: memory[name].copy() for name in program.outputs}


def _guarded(array: Array) -> Array:
    """Copy an array to 64-byte aligned memory between guards."""
    room = np.full(array.nbytes + 2 * _GUARD_BYTES + _ALIGNMENT_BYTES, _GARBAGE, np.uint8)
    start = _GUARD_BYTES + -(room.ctypes.data + _GUARD_BYTES) % _ALIGNMENT_BYTES
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _check_guards(array: Array, message: str) -> None:
    address = array.ctypes.data
    for start in (address - _GUARD_BYTES, address + array.nbytes):
        guard = ctypes.string_at(start, _GUARD_BYTES)
        assert guard == bytes([_GARBAGE]) * _GUARD_BYTES, message
