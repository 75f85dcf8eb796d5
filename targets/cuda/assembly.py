"""A program for CUDA while it grows."""

from __future__ import annotations

import math

import onnx_ir as ir

from edgepress.targets.base import Target
from edgepress.targets.cuda.cast import cast
from edgepress.targets.float_format import FloatFormat
from edgepress.targets.isa.base import load_isa
from edgepress.targets.lowering.assembly import Assembly
from edgepress.targets.lowering.dialect import VIEWS, dtype_of, shape_of
from edgepress.targets.program import Program, Tensor
from edgepress.targets.tiling import Tiles

_MASK = 3  # the input of Attention


class CudaAssembly(Assembly):
    """A program for CUDA while it grows.

    Attributes:
        products: how products of floats are computed: `float32`, `tf32` or `float16`.
        multiprocessors: how many the GPU has.
        architecture: its compute capability, such as 87 for 8.7.
    """

    def __init__(
        self, target: Target, products: FloatFormat = "float32", tiles: Tiles | None = None
    ) -> None:
        super().__init__(load_isa(target.isa), tiles)
        self.products: FloatFormat = products
        self.multiprocessors = target.gpu_multiprocessors
        self.architecture = int(target.gpu_arch.removeprefix("sm_").rstrip("af"))

    def declare(self, value: ir.Value) -> str:
        """Give a value memory of its own: float16 in that mode, unless the user sees it."""
        name = super().declare(value)
        self.program.tensors[name] = Tensor(name, self._stored(value), shape_of(value))
        return name

    def storage(self, value: ir.Value) -> str:
        """Return the dtype that a value has in memory."""
        name = self.tensor(value)
        if name in self.program.constants:
            return str(self.program.constants[name].dtype)
        return self.program.tensors[name].dtype

    def copy(self, value: ir.Value, name: str) -> None:
        """Copy a value into a tensor of its own, which has the value's dtype."""
        self.program.tensors[name] = Tensor(name, dtype_of(value), shape_of(value))
        self.cast(self.tensor(value), name, name)

    def include(self, part: Program, values: dict[str, ir.Value]) -> None:
        """Append a region that was lowered on its own; it reads and writes float32."""
        renamed, narrowed = dict[str, str](), list[tuple[str, ir.Value]]()
        for name, value in values.items():
            if name in part.inputs and self.storage(value) != "float16":
                renamed[name] = self.tensor(value)
            elif name in part.inputs:
                renamed[name] = self.scratch(f"{name}_float32", "float32", shape_of(value))
                self.cast(self.tensor(value), renamed[name], f"{name} (to float32)")
            elif self._stored(value) != "float16":
                renamed[name] = self.declare(value)
            else:
                renamed[name] = self.scratch(f"{name}_float32", "float32", shape_of(value))
                narrowed.append((renamed[name], value))
        self.append(part, renamed)
        for wide, value in narrowed:
            self.cast(wide, self.declare(value), f"{value.name} (to float16)")

    def cast(self, source: str, target: str, label: str) -> None:
        """Copy a tensor or constant into a tensor of the same shape, in the latter's dtype."""
        program, tensor = self.program, self.program.tensors[target]
        constant = program.constants.get(source)
        given = program.tensors[source].dtype if constant is None else str(constant.dtype)
        arguments = (math.prod(tensor.shape), (given, tensor.dtype), self.multiprocessors)
        self.call(self.kernel("cast", cast, *arguments), [source], target, label)

    def _stored(self, value: ir.Value) -> str:
        """Return the dtype that a value is to have in memory."""
        dtype = dtype_of(value)
        seen = value.is_graph_input() or value.is_graph_output() or _is_mask(value)
        narrow = self.products == "float16" and dtype == "float32" and not seen
        return "float16" if narrow else dtype


def _is_mask(value: ir.Value) -> bool:
    """Tell whether a value is only added to scores of Attention: float16 may not hold its -1e9."""
    uses = value.uses()
    return bool(uses) and all(
        _is_mask(use.node.outputs[0])
        if use.node.op_type in VIEWS
        else use.node.op_type == "Attention" and use.idx == _MASK
        for use in uses
    )
