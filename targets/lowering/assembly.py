"""A Program while it grows: tensors, constants, calls, and kernels without duplicates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepress.targets.isa.base import Isa
from edgepress.targets.lowering.dialect import array_of, dtype_of, shape_of
from edgepress.targets.program import Call, Program, Tensor
from edgepress.targets.schedules.stage import StageShape, stage
from edgepress.targets.tiling import Tiles

Array = npt.NDArray[Any]


class Assembly:
    """A Program while it grows: tensors, constants, calls, and kernels without duplicates."""

    def __init__(self, isa: Isa, tiles: Tiles | None = None) -> None:
        self.isa = isa
        self.tiles = tiles or Tiles()
        self.program = Program()
        self._tensors: dict[ir.Value, str] = {}
        self._kernels: dict[tuple[Any, ...], str] = {}
        self._taken: set[str] = set()
        self._repeated: dict[tuple[str, int], str] = {}
        # rows that are quantized at run time, see dynamic_kernels
        self.quantized_rows: dict[tuple[object, ...], tuple[str, str, str]] = {}

    def begin(self, model: ir.Model) -> None:
        """Declare the inputs; no constant or scratch tensor takes the name of a value."""
        produced = (value for node in model.graph for value in node.outputs)
        self._taken.update(value.name or "" for value in (*model.graph.inputs, *produced))
        for value in model.graph.inputs:
            self.declare(value)
        self.program.inputs = tuple(value.name or "" for value in model.graph.inputs)

    def end(self, model: ir.Model) -> None:
        """Name the outputs; one that is an input, a constant or another's bytes is copied."""
        names = []
        for value in model.graph.outputs:
            name = value.name or ""
            if self.tensor(value) != name or name in self.program.inputs:
                self.copy(value, name)
            names.append(name)
        self.program.outputs = tuple(names)

    def declare(self, value: ir.Value) -> str:
        """Give a value memory of its own."""
        name = value.name or ""
        self.program.tensors[name] = Tensor(name, dtype_of(value), shape_of(value))
        self._tensors[value] = name
        return name

    def alias(self, value: ir.Value, same: ir.Value) -> None:
        """Let a value share the bytes of another."""
        self._tensors[value] = self.tensor(same)

    def tensor(self, value: ir.Value) -> str:
        """Return the name of the tensor or constant that holds a value."""
        if value not in self._tensors:
            array = array_of(value)
            if array is None:
                raise ValueError(f"{value.name!r} has no producer")
            self._tensors[value] = self.constant(value.name or "constant", array)
        return self._tensors[value]

    def constant(self, name: str, array: Array) -> str:
        """Add a constant, under its name or a free variation: nodes may share a name."""
        name = self._unique(name)
        self.program.constants[name] = np.ascontiguousarray(array)
        return name

    def repeated(self, dtype: str, value: int, size: int) -> str:
        """Return the name of a constant of at least `size` equal elements: all who ask share it."""
        key = (dtype, value)
        if key not in self._repeated:
            self._repeated[key] = self.constant(f"{dtype} {value}", np.zeros(0, dtype))
        name = self._repeated[key]
        if self.program.constants[name].size < size:
            self.program.constants[name] = np.full(size, value, dtype)
        return name

    def scratch(self, name: str, dtype: str, shape: tuple[int, ...]) -> str:
        """Add a tensor that is no value of the graph."""
        name = self._unique(name)
        self.program.tensors[name] = Tensor(name, dtype, shape)
        return name

    def _unique(self, name: str) -> str:
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name

    def kernel(self, kind: str, generate: Callable[..., Any], *arguments: Any) -> str:
        """Return the name of a kernel, generating it where the same one does not exist yet."""
        key = (generate, *arguments)
        if key not in self._kernels:
            name = f"{kind}_{len(self._kernels)}"
            self._kernels[key] = name
            self.program.kernels[name] = generate(name, *arguments)
        return self._kernels[key]

    def call(self, kernel: str, inputs: list[str], output: str, node: str) -> None:
        """Append a call with one output, its last argument."""
        self.program.calls.append(Call(kernel, (*inputs, output), (output,), node))

    def copy(self, value: ir.Value, name: str) -> None:
        """Copy a value's bytes into a tensor of its own."""
        shape, dtype = shape_of(value), dtype_of(value)
        source = self.tensor(value)
        size = math.prod(shape)
        line = StageShape(1, 1, size, 1, 0, 0, 1, size, 1)
        kernel = self.kernel("copy", stage, line, self.isa, (dtype, dtype), 0)
        self.program.tensors[name] = Tensor(name, dtype, shape)
        self.call(kernel, [source], name, name)

    def include(self, part: Program, values: dict[str, ir.Value]) -> None:
        """Append a region that was lowered on its own; `values` maps its interface to the graph."""
        self.append(
            part,
            {
                name: self.tensor(value) if name in part.inputs else self.declare(value)
                for name, value in values.items()
            },
        )

    def append(self, part: Program, renamed: dict[str, str]) -> None:
        """Append the calls of a program; `renamed` maps its interface to tensors that exist."""
        for name, tensor in part.tensors.items():
            if name not in renamed:
                self.program.tensors[name] = tensor
        self.program.constants.update(part.constants)
        self.program.kernels.update(part.kernels)
        for call in part.calls:
            self.program.calls.append(
                replace(
                    call,
                    arguments=tuple(renamed.get(name, name) for name in call.arguments),
                    outputs=tuple(renamed.get(name, name) for name in call.outputs),
                )
            )
