"""A legalised Relax module → a program: `main`'s calls in order, with flat tuples and no copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import relax, te

from edgepress.targets.base import Target
from edgepress.targets.cuda.regions import RegionKernels, region_kernels
from edgepress.targets.program import DTYPES, Array, Call, Program, Tensor
from edgepress.targets.schedules import generic

_Place = str | tuple["_Place", ...]  # a tensor or constant, or what a Relax tuple holds


def program_from_relax(
    module: Any, inputs: Sequence[Tensor], outputs: Sequence[str], target: Target, prefix: str
) -> Program:
    """Write the program of a module whose `main` only calls TIR functions and reshapes.

    Args:
        module: an `IRModule` of static shapes.
        inputs: the parameters of `main`. TVM itself takes a size of 0 for an unknown one.
        outputs: names for its results.
        target: which the kernels are scheduled for.
        prefix: of all other names.

    Raises:
        NotImplementedError: `main` does something else, or uses a dtype that a program has not.
    """
    return _Walk(module, target, prefix).run(inputs, outputs)


class _Walk:
    """The state of one translation."""

    def __init__(self, module: Any, target: Target, prefix: str) -> None:
        self.module = module
        self.target = target
        self.prefix = prefix
        self.program = Program()
        self.places: dict[Any, _Place] = {}
        self.kernels: dict[int, list[tuple[Any, str]]] = {}
        self.launches: dict[str, RegionKernels] = {}  # of each kernel, on a GPU

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[str]) -> Program:
        main = self.module["main"]
        self.program.inputs = tuple(tensor.name for tensor in inputs)
        for variable, tensor in zip(main.params, inputs, strict=True):
            _check_dtype(tensor.dtype)
            self.places[variable] = tensor.name
            self.program.tensors[tensor.name] = tensor
        for block in main.body.blocks:
            for binding in block.bindings:
                self.places[binding.var] = self._place(binding.value)
        place, kind = self._place(main.body.body), main.body.body.ty
        places, kinds = ((place,), (kind,)) if isinstance(place, str) else (place, kind.fields)
        self._write_outputs([_tensor(*pair) for pair in zip(outputs, kinds, strict=True)], places)
        return self.program

    def _place(self, value: Any) -> _Place:
        if isinstance(value, tvm.ir.Var):
            return self.places[value]
        if isinstance(value, relax.Tuple):
            return tuple(self._place(item) for item in value.fields)
        if isinstance(value, relax.TupleGetItem):
            return self._place(value.tuple_value)[value.index]
        if isinstance(value, tvm.ir.GenericConst):
            return self._constant(value.value.numpy())
        if isinstance(value, relax.ShapeExpr):
            return self._constant(np.array([int(size) for size in value.values], np.int64))
        operator = getattr(getattr(value, "op", None), "name", type(value).__name__)
        if operator == "relax.reshape":
            return self._place(value.args[0])  # the same bytes
        if operator == "relax.call_tir":
            return self._call(value)
        raise NotImplementedError(f"{operator} has no kernel")

    def _call(self, value: Any) -> _Place:
        many = isinstance(value.ty, relax.TupleType)
        arguments = [self._place(argument) for argument in value.args[1].fields]
        outputs = []
        for kind in value.ty.fields if many else [value.ty]:
            name = f"{self.prefix}t{len(self.program.tensors)}"
            self.program.tensors[name] = _tensor(name, kind)
            outputs.append(name)
        function = value.args[0]
        kernel = self._kernel(self.module[function], function.name_hint, len(outputs))
        self._add_call(kernel, arguments, outputs)
        return tuple(outputs) if many else outputs[0]

    def _add_call(self, kernel: str, arguments: Sequence[Any], outputs: Sequence[str]) -> None:
        node = kernel.removeprefix(self.prefix)
        if not self.target.is_cuda:
            self.program.calls.append(Call(kernel, (*arguments, *outputs), tuple(outputs), node))
            return
        places = [*arguments, *outputs]
        for dtype, shape in self.launches[kernel].scratch:
            name = f"{self.prefix}t{len(self.program.tensors)}"
            self.program.tensors[name] = Tensor(name, dtype, shape)
            places.append(name)
        for launch in self.launches[kernel].launches:
            given = tuple(places[place] for place in launch.arguments)
            written = tuple(places[place] for place in launch.written)
            self.program.calls.append(Call(launch.kernel.name, given, written, node))

    def _kernel(self, function: Any, hint: str, outputs: int = 1) -> str:
        """Schedule a function, unless an equal one was scheduled before."""
        equal = self.kernels.setdefault(tvm_ffi.structural_hash(function), [])
        for known, name in equal:
            if tvm_ffi.structural_equal(known, function):
                return name
        name = f"{self.prefix}{hint}"
        equal.append((function, name))
        if self.target.is_cuda:
            self.launches[name] = region_kernels(name, function, outputs)
            kernels = [launch.kernel for launch in self.launches[name].launches]
            self.program.kernels.update({kernel.name: kernel for kernel in kernels})
        else:
            self.program.kernels[name] = generic.schedule(function, self.target)
        return name

    def _constant(self, array: Array) -> str:
        _check_dtype(str(array.dtype))
        name = f"{self.prefix}c{len(self.program.constants)}"
        self.program.constants[name] = array
        return name

    def _write_outputs(self, outputs: Sequence[Tensor], places: Sequence[_Place]) -> None:
        """Rename what becomes an output; copy inputs, constants and what already is an output."""
        renamed: dict[_Place, str] = {}
        copies: list[tuple[_Place, Tensor]] = []
        for output, place in zip(outputs, places, strict=True):
            inner = place in self.program.tensors and place not in self.program.inputs
            if inner and place not in renamed:
                renamed[place] = output.name
            else:
                copies.append((place, output))
        self._rename(renamed)
        for output in outputs:
            self.program.tensors[output.name] = output
        for place, output in copies:
            kernel = self._kernel(_copy(output), f"copy_{output.dtype}_{len(self.kernels)}")
            self._add_call(kernel, [renamed.get(place, place)], [output.name])
        self.program.outputs = tuple(output.name for output in outputs)

    def _rename(self, names: dict[Any, str]) -> None:
        for place in names:
            del self.program.tensors[place]
        self.program.calls = [
            replace(
                call,
                arguments=tuple(names.get(name, name) for name in call.arguments),
                outputs=tuple(names.get(name, name) for name in call.outputs),
            )
            for call in self.program.calls
        ]


def _tensor(name: str, kind: Any) -> Tensor:
    """Describe a tensor of this Relax type; a Relax shape is a vector of int64."""
    if isinstance(kind, relax.ShapeType):
        return Tensor(name, "int64", (int(kind.ndim),))
    dtype = str(kind.dtype)
    _check_dtype(dtype)
    try:
        return Tensor(name, dtype, tuple(int(size) for size in kind.shape))
    except TypeError:
        raise NotImplementedError(f"the shape {kind.shape} depends on data") from None


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise NotImplementedError(f"{dtype} tensors are not supported, only {', '.join(DTYPES)}")


def _copy(tensor: Tensor) -> Any:
    source = te.placeholder(tensor.shape, tensor.dtype, "source")
    copy = te.compute(tensor.shape, lambda *index: source[index], "copy")
    return te.create_prim_func([source, copy])
