"""Programs that run layers for their cost alone, many side by side.

A layer is lowered as a model of its own, which converts between what users pass (NCHW, float) and
what a network passes from layer to layer (NHWC, 8-bit integers). Those conversions at both ends
are cut off: inside a network the layer before has done them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir

from edgepress.targets.base import Target
from edgepress.targets.cuda.fill import fill
from edgepress.targets.cuda.kernel import CudaKernel
from edgepress.targets.program import Call, Program, Tensor

_ENTRY = ("transpose", "quantise")
_EXIT = ("transpose", "dequantise", "copy")
_INPUT, _OUTPUT, _IDLE = "x", "y", "idle"


def layer_program(model: ir.Model, target: Target) -> Program:
    """Lower one layer, without the conversions at its ends. Raises UnsupportedModel.

    What it reads from the layer before is in `inputs`, what the next layer reads in `outputs`.
    """
    from edgepress.targets.lowering.build import lower  # imports TVM

    program = lower(model, target)
    calls = list(program.calls)
    given, wanted = set(program.inputs), set(program.outputs)
    for call in program.calls:
        read = _reads(call, program)
        if _kind(call) in _ENTRY and read and given.issuperset(read):
            calls.remove(call)
            given.update(call.outputs)
    for call in reversed(program.calls):
        used = {name for other in calls for name in _reads(other, program)}
        last = wanted.issuperset(call.outputs) and used.isdisjoint(call.outputs)
        if call in calls and _kind(call) in _EXIT and last:
            calls.remove(call)
            wanted.update(_reads(call, program))
    return _only(program, calls, wanted)


@dataclass(frozen=True)
class Joined:
    """Layers side by side in one program.

    Attributes:
        program: what to compile.
        owners: per call, the number of its layer, or None where it belongs to none.
        idle: the number of a call that does next to nothing and whose code is warm: what it costs
            is the cost of calling and of looking at the clock, which is in that of every call.
    """

    program: Program
    owners: tuple[int | None, ...]
    idle: int


def side_by_side(layers: Mapping[int, Program], target: Target) -> Joined:
    """Join numbered layers into one program that runs one after the other.

    Right before each layer, a call of no layer writes its inputs, so that they are as warm in the
    caches as the output of a layer before. The program reads and writes one number, whatever the
    layers read and write, so nothing else is copied.
    """
    program = Program(inputs=(_INPUT,), outputs=(_OUTPUT,))
    program.tensors[_INPUT] = Tensor(_INPUT, "float32", (1,))
    for name in (_OUTPUT, _IDLE):  # the first call of an inference costs more than others
        _fill(program, Tensor(name, "float32", (1,)), target)
    owners: list[int | None] = [None, None]
    for number, layer in layers.items():
        prefix = f"layer_{number}_"
        for name in layer.inputs:
            tensor = layer.tensors[name]
            _fill(program, Tensor(prefix + name, tensor.dtype, tensor.shape), target)
            owners.append(None)
        _include(program, layer, prefix)
        owners += [number] * len(layer.calls)
    program.validate()
    return Joined(program, tuple(owners), idle=1)


def _kind(call: Call) -> str:
    """Return the kind of a kernel that edgepress generates; TVM's are named after a region."""
    return call.kernel.rpartition("_")[0]


def _reads(call: Call, program: Program) -> list[str]:
    """Return the tensors that a call reads."""
    known = {*call.outputs, *program.constants}
    return [name for name in call.arguments if name not in known]


def _only(program: Program, calls: list[Call], wanted: set[str]) -> Program:
    """Return a program of some of the calls, and of what they touch."""
    written = [name for call in calls for name in call.outputs]
    read = [name for call in calls for name in _reads(call, program)]
    touched = {name for call in calls for name in call.arguments}
    return Program(
        inputs=tuple(dict.fromkeys(name for name in read if name not in written)),
        outputs=tuple(name for name in written if name in wanted),
        tensors={name: t for name, t in program.tensors.items() if name in touched},
        constants={name: a for name, a in program.constants.items() if name in touched},
        calls=calls,
        kernels={call.kernel: program.kernels[call.kernel] for call in calls},
    )


def _fill(program: Program, tensor: Tensor, target: Target) -> None:
    """Append a call that writes zeros."""
    size = math.prod(tensor.shape)
    kernel = f"fill_{tensor.dtype}_{size}"
    if kernel not in program.kernels:
        program.kernels[kernel] = _fill_kernel(kernel, size, tensor.dtype, target)
    program.tensors[tensor.name] = tensor
    program.calls.append(Call(kernel, (tensor.name,), (tensor.name,), kernel))


def _fill_kernel(name: str, size: int, dtype: str, target: Target) -> Any:
    if target.is_cuda:
        return fill(name, size, dtype, target.gpu_multiprocessors)
    from tvm import te, tirx

    from edgepress.targets.schedules import generic

    zeros = te.compute((size,), lambda _index: tirx.const(0, dtype), "zeros")
    return generic.schedule(te.create_prim_func([zeros]), target)


def _include(program: Program, layer: Program, prefix: str) -> None:
    """Append the calls of a layer, under names that no other layer has."""
    program.tensors.update(
        {prefix + name: replace(t, name=prefix + name) for name, t in layer.tensors.items()}
    )
    program.constants.update({prefix + name: a for name, a in layer.constants.items()})
    program.kernels.update(
        {prefix + name: _renamed(kernel, prefix + name) for name, kernel in layer.kernels.items()}
    )
    for call in layer.calls:
        program.calls.append(
            Call(
                prefix + call.kernel,
                tuple(_prefixed(prefix, call.arguments)),
                tuple(_prefixed(prefix, call.outputs)),
                call.node,
            )
        )


def _renamed(kernel: Any, name: str) -> Any:
    """Return a kernel under another name, where its text has one."""
    return kernel.renamed(name) if isinstance(kernel, CudaKernel) else kernel


def _prefixed(prefix: str, names: Iterable[str]) -> Iterator[str]:
    return (prefix + name for name in names)
