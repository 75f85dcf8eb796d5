"""Runs CUDA kernels without a GPU: compiled by g++, with a block's threads as fibers.

`emulator/scheduler.cpp` and `emulator/warp.cpp` say what is emulated and what is not. Every tensor
is between guards; what nobody has written yet is NaN.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgepress.targets.cuda.kernel import CudaKernel
from edgepress.targets.program import Array, Call, Program
from tests.cuda.emulated_code import (
    compile_emulated,
    compiled_scheduler,
    library_of,
    source_line,
)

__all__ = ["EmulationError", "Guarded", "compile_emulated", "emulate", "emulate_kernel"]

CHECKED = bool(os.environ.get("CUDA_EMULATION_CHECKED"))
ORDERS = ("alternating", "forward", "backward", "shuffled")
SHARED_LIMIT_BYTES = {"sm_80": 163 * 1024, "sm_87": 163 * 1024, "sm_90": 227 * 1024}
_ALIGNMENT_BYTES = 256
_GUARD_BYTES = 1024
_GARBAGE = np.array([0xA5, 0xFF], np.uint8)  # NaN as float16 and as float32


class EmulationError(Exception):
    """A kernel did what a GPU would not have done, or wrote where it must not."""


class Guarded:
    """Memory of a tensor between guards, at a multiple of 256 bytes and of nothing larger.

    Attributes:
        array: the tensor, in that memory.
    """

    def __init__(self, dtype: np.dtype[np.generic], shape: Sequence[int]) -> None:
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        self._memory = garbage(2 * _GUARD_BYTES + size + 2 * _ALIGNMENT_BYTES)
        start = _GUARD_BYTES
        start += (_ALIGNMENT_BYTES - self._memory[start:].ctypes.data) % (2 * _ALIGNMENT_BYTES)
        self._before = self._memory[:start]
        self._after = self._memory[start + size :]
        self._guards = self._before.copy(), self._after.copy()
        self.array = self._memory[start : start + size].view(dtype).reshape(shape)

    @property
    def address(self) -> int:
        """Where the tensor is."""
        return self._before.ctypes.data + self._before.size

    def damage(self) -> str:
        """Return where something wrote outside the tensor, or nothing."""
        before, after = self._guards
        if (wrong := np.flatnonzero(self._after != after)).size:
            return f"byte {self.array.nbytes + int(wrong[0])} of {self.array.nbytes}"
        if (wrong := np.flatnonzero(self._before != before)).size:
            return f"byte {int(wrong[-1]) - self._before.size} of {self.array.nbytes}"
        return ""


def garbage(size_bytes: int) -> Array:
    """Return bytes that are NaN as floats of 16 and 32 bits, and conspicuous as integers."""
    return np.tile(_GARBAGE, size_bytes // 2 + 1)[:size_bytes].copy()


@dataclass(frozen=True)
class _Settings:
    """How to run; see `emulate`."""

    order: str
    seed: int
    checked: bool
    shared_limit_bytes: int = SHARED_LIMIT_BYTES["sm_90"]

    def library(self, kernels: Sequence[CudaKernel]) -> ctypes.CDLL:
        """Return the library with some kernels."""
        return _loaded(library_of(kernels, checked=self.checked))


class _Range(ctypes.Structure):
    """An argument, as `emulator/scheduler.h` has it."""

    _fields_ = (
        ("start", ctypes.c_size_t),
        ("bytes", ctypes.c_size_t),
        ("constant", ctypes.c_int),
        ("cells", ctypes.c_void_p),
    )


def emulate(
    program: Program,
    inputs: Mapping[str, Array],
    *,
    order: str = "alternating",
    seed: int = 0,
    checked: bool = CHECKED,
) -> dict[str, Array]:
    """Run a program; returns its outputs.

    Args:
        program: its kernels are `CudaKernel`s.
        inputs: one array for each of the program's inputs.
        order: in which order threads and blocks run, of `ORDERS`; alternating is forward and
            backward by turns.
        seed: for the order `shuffled`.
        checked: whether to check every load and store, as `emulator/checks.cpp` says, which takes
            some ten times as long. The environment variable CUDA_EMULATION_CHECKED makes it so.

    Raises:
        EmulationError: a kernel wrote outside its outputs, or did what a GPU would not have done.
    """
    program.validate()
    if set(inputs) != set(program.inputs):
        raise ValueError(f"inputs are {', '.join(program.inputs)}, not {', '.join(inputs)}")
    memory = {
        name: Guarded(np.dtype(tensor.dtype), tensor.shape)
        for name, tensor in program.tensors.items()
    }
    for name, value in (*program.constants.items(), *inputs.items()):
        array = np.asarray(value)
        if name in memory:
            _same_form(name, memory[name].array, array)
        else:
            memory[name] = Guarded(array.dtype, array.shape)
        memory[name].array[...] = array
    counters = _counters(list(program.kernels.values()))
    settings = _Settings(order, seed, checked)
    for call in program.calls:
        _run_call(program, call, memory, counters, settings)
    return {name: memory[name].array.copy() for name in program.outputs}


def emulate_kernel(
    kernel: CudaKernel,
    arguments: Sequence[Array],
    *,
    order: str = "alternating",
    seed: int = 0,
    checked: bool = CHECKED,
    shared_limit_bytes: int = SHARED_LIMIT_BYTES["sm_90"],
) -> None:
    """Run one kernel, which writes into the arrays that it gets; see `emulate`."""
    buffers: dict[int, Guarded] = {}
    for array in arguments:
        if not array.flags.c_contiguous:
            raise ValueError(f"{kernel.name}: arguments must be contiguous")
        if array.ctypes.data not in buffers:
            buffers[array.ctypes.data] = Guarded(array.dtype, array.shape)
            buffers[array.ctypes.data].array[...] = array
    used = [buffers[array.ctypes.data] for array in arguments]
    counters = _counters([kernel])
    settings = _Settings(order, seed, checked, shared_limit_bytes)
    _launch(settings.library([kernel]), kernel, used, counters, settings)
    for number, (array, buffer) in enumerate(zip(arguments, used, strict=True)):
        _check(kernel.name, f"argument {number}", buffer)
        if array.flags.writeable:
            array[...] = buffer.array


def _run_call(
    program: Program,
    call: Call,
    memory: Mapping[str, Guarded],
    counters: Guarded,
    settings: _Settings,
) -> None:
    """Run one call, and see that it has changed nothing but its outputs."""
    kernel = program.kernels[call.kernel]
    only_read = [name for name in call.arguments if name not in call.outputs]
    earlier = {name: memory[name].array.tobytes() for name in only_read}
    used = [memory[name] for name in call.arguments]
    written = {name for each in program.calls for name in each.outputs}
    constant = [name not in written for name in call.arguments]
    library = settings.library(list(program.kernels.values()))
    _launch(library, kernel, used, counters, settings, constant)
    for name in call.arguments:
        _check(f"{kernel.name} ({call.node})", name, memory[name])
    for name, before in earlier.items():
        if memory[name].array.tobytes() != before:
            raise EmulationError(f"{kernel.name} ({call.node}): wrote into {name}, an input")


def _launch(
    library: ctypes.CDLL,
    kernel: CudaKernel,
    arguments: Sequence[Guarded],
    counters: Guarded,
    settings: _Settings,
    constant: Sequence[bool] | None = None,
) -> None:
    """Launch a kernel; `constant` says of which arguments it is known that nothing writes them."""
    used = [*arguments, counters] if kernel.counters else arguments
    addresses = [each.address for each in used]
    parameters = ctypes.c_uint.in_dll(library, f"parameters_{kernel.name}").value
    if parameters != len(addresses):
        raise EmulationError(
            f"{kernel.name}: {parameters} parameters, but {len(addresses)} arguments"
        )
    _scheduler().emulator_configure(
        ORDERS.index(settings.order),
        settings.seed,
        len(os.sched_getaffinity(0)),
        settings.shared_limit_bytes,
    )
    ranges = (_Range * len(used))()
    if settings.checked:
        for number, each in enumerate(used):
            known = constant is not None and number < len(constant) and constant[number]
            ranges[number] = _Range(each.address, each.array.nbytes, known)
        overlaps = kernel.overlaps and constant is not None
        _scheduler().emulator_check(ranges, len(ranges), kernel.counters > 0, overlaps)
    run = getattr(library, f"run_{kernel.name}")
    run.restype = ctypes.c_char_p
    pointers = (ctypes.c_void_p * max(len(addresses), 1))(*addresses)
    three = ctypes.c_uint * 3
    error = run(pointers, three(*kernel.grid), three(*kernel.block), kernel.shared_bytes)
    if error:
        raise EmulationError(_with_lines(error.decode(), Path(library._name)))
    if kernel.counters and counters.array.any():
        raise EmulationError(f"{kernel.name}: left its counters at {counters.array}")
    _check(kernel.name, "its counters", counters)


def _counters(kernels: Sequence[CudaKernel]) -> Guarded:
    """Return zeros, as many as the kernel with the most wants."""
    most = max((kernel.counters for kernel in kernels), default=0)
    counters = Guarded(np.dtype(np.uint32), (most,))
    counters.array[...] = 0
    return counters


def _check(kernel: str, name: str, buffer: Guarded) -> None:
    if where := buffer.damage():
        raise EmulationError(f"{kernel}: wrote outside {name}, at {where}")


def _same_form(name: str, wanted: Array, given: Array) -> None:
    if (wanted.dtype, wanted.shape) != (given.dtype, given.shape):
        raise ValueError(
            f"{name} is {wanted.dtype}{list(wanted.shape)}, not {given.dtype}{list(given.shape)}"
        )


def _with_lines(message: str, library: Path) -> str:
    """Replace addresses by lines of the source; the emulator's own have none."""
    message = message.replace(" [+0x0]", "")
    return re.sub(r"\[\+(0x\w+)\]", lambda found: f"({source_line(library, found[1])})", message)


@functools.cache
def _loaded(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


@functools.cache
def _scheduler() -> ctypes.CDLL:
    """Return the part that all libraries share."""
    return ctypes.CDLL(str(compiled_scheduler().resolve()))
