"""What the kernels of sliding windows multiply: dtypes in memory, and 8-bit integers as words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgepress.targets.cuda.assembly import CudaAssembly
from edgepress.targets.cuda.kernel import C_TYPES
from edgepress.targets.lowering.node_attributes import constant_of, operand_of

WORD_BYTES = 4


@dataclass(frozen=True)
class Operands:
    """Dtypes in memory.

    Attributes:
        x, weights, y: of the tensors.
        words: whether 8-bit integers are multiplied four at a time. Unsigned ones become signed by
            taking 128 from them.
        zero_point: what stands beyond the image.
        residual: of the tensor that is added, if there is one.
    """

    x: str
    weights: str
    y: str
    words: bool = False
    zero_point: int = 0
    residual: str = "float32"

    @property
    def quantized(self) -> bool:
        """Whether integers are multiplied."""
        return "int" in self.x

    @property
    def x_bytes(self) -> int:
        """Bytes of an input."""
        return int(np.dtype(self.x).itemsize)

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight."""
        return int(np.dtype(self.weights).itemsize)

    @property
    def per_x(self) -> int:
        """Inputs that are multiplied at once."""
        return WORD_BYTES if self.words else 1

    @property
    def centred_at(self) -> int:
        """The zero point of what is multiplied."""
        return self.zero_point - 128 * (self.words and self.x == "uint8")

    @property
    def signs(self) -> int:
        """What turns a word of unsigned bytes into signed ones by an exclusive or."""
        return 0x80808080 if self.words and self.x == "uint8" else 0

    @property
    def fill_source(self) -> str:
        """A word of what stands beyond the image, as CUDA C++."""
        if not self.quantized:
            return "0u"
        repeated = np.full(WORD_BYTES // self.x_bytes, self.zero_point).astype(self.x)
        return f"0x{int(repeated.view(np.uint32)[0]):08X}u"

    @property
    def x_source(self) -> str:
        """The pointer to inputs, as CUDA C++."""
        return "(const uint32_t *)x" if self.words else "x"

    @property
    def weights_type(self) -> str:
        """What CUDA C++ calls the type of weights."""
        return "int32_t" if self.words else C_TYPES[self.weights]


def operands_of(assembly: CudaAssembly, node: ir.Node, y: str, words: bool) -> Operands:
    """Return what a convolution or product multiplies; `y` is its output's dtype in memory.

    `words` tells whether four inputs may be multiplied at once.
    """
    weights = constant_of(node, 1)
    narrow = weights.dtype == np.float32 and assembly.products == "float16"
    kind = "float16" if narrow else str(weights.dtype)
    x = assembly.storage(operand_of(node.inputs[0]))
    point = node.attributes.get_int("x_zero_point", 0)
    words = words and x in ("int8", "uint8") and kind == "int8"
    return Operands(x, kind, y, words, point)
