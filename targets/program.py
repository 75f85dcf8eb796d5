"""A lowered model: kernels, the tensors between them, and the order of calls.

Everything the exporter needs and nothing else. A kernel is a TIR function with a plain C signature
(`int32_t kernel(void *a, void *b, …)`, one pointer per argument, 0 on success), so neither the
generated C nor the board needs a TVM runtime.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
DTYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float32")
"""Of graphs and constants. On GPUs tensors between kernels may be float16 besides."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of fixed shape in memory, row-major."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Call:
    """One call of a kernel.

    Attributes:
        kernel: name in `Program.kernels`.
        arguments: tensor or constant names in the order of the kernel's parameters.
        outputs: the arguments it writes, scratch memory included.
        node: the ONNX node (or nodes) it computes, for profiles and messages.
    """

    kernel: str
    arguments: tuple[str, ...]
    outputs: tuple[str, ...]
    node: str = ""


@dataclass
class Program:
    """Calls in execution order over named tensors and constants.

    Attributes:
        inputs: names of the model inputs, in order; they are in `tensors`.
        outputs: names of the model outputs, in order; each is written by a call.
        tensors: every tensor that is not constant: inputs, outputs, intermediates, scratch.
        constants: weights and tables in the layout that the kernels read.
        calls: in execution order.
        kernels: name to TIR function.
        workspace_bytes: the most memory that any kernel asks for while it runs (through
            `TVMBackendAllocWorkspace`), per thread.
    """

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    tensors: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, Array] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    kernels: dict[str, Any] = field(default_factory=dict)
    workspace_bytes: int = 0

    def validate(self) -> None:
        """Raise ValueError where a call reads what nobody wrote, or a name is unknown."""
        written = set(self.inputs)
        for call in self.calls:
            if call.kernel not in self.kernels:
                raise ValueError(f"{call.node}: no kernel is called {call.kernel!r}")
            for name in call.arguments:
                if name in self.constants or name in call.outputs:
                    continue
                if name not in self.tensors:
                    raise ValueError(f"{call.node}: no tensor is called {name!r}")
                if name not in written:
                    raise ValueError(f"{call.node}: {name!r} is read before it is written")
            for name in call.outputs:
                if name in written or name in self.constants:
                    raise ValueError(f"{call.node}: {name!r} is written twice")
                written.add(name)
        if missing := [name for name in self.outputs if name not in written]:
            raise ValueError(f"nothing writes the outputs {', '.join(missing)}")
