"""Products of two tensors, neither of them constant weights, as calls of a kernel."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from edgepress.targets.cuda.assembly import CudaAssembly
from edgepress.targets.cuda.gemm_shape import PRODUCTS
from edgepress.targets.cuda.kernel import C_TYPES, CudaKernel
from edgepress.targets.cuda.places import CudaPlace, operand_place
from edgepress.targets.float_format import FloatFormat
from edgepress.targets.lowering.node_attributes import operand_of

_THREADS = 128
_SIDES = (64, 32)  # of the square of results that a block computes


@dataclass(frozen=True)
class MatMulShape:
    """Sizes of `[batch, heads, rows, depth] x [batch, heads, depth, width]`, and the places.

    Attributes:
        batch, heads, rows, depth, width: sizes.
        left: place of the left operand.
        right: place of the right one, as `[depth, width]` where `upright`, else `[width, depth]`.
        upright: whether neighbouring columns of the right operand are neighbours in memory.
        dtype: of the product in memory.
    """

    batch: int
    heads: int
    rows: int
    depth: int
    width: int
    left: CudaPlace
    right: CudaPlace
    upright: bool
    dtype: str

    def blocks(self, side: int) -> int:
        """Return how many blocks cover all products."""
        return self.batch * self.heads * -(-self.rows // side) * -(-self.width // side)


def call_matmul(assembly: CudaAssembly, node: ir.Node) -> None:
    """Emit the call of a `MatMul` node."""
    batch, heads, rows, depth, width = (int(n) for n in node.attributes["sizes"].as_ints())
    left, right = (operand_of(value) for value in node.inputs)
    upright = int(node.attributes["right"].as_ints()[4]) == 1
    output = assembly.declare(node.outputs[0])
    shape = MatMulShape(
        batch,
        heads,
        rows,
        depth,
        width,
        operand_place(assembly, node, "left", left, (batch, heads, rows, depth)),
        operand_place(
            assembly, node, "right", right, (batch, heads, depth, width), turned=not upright
        ),
        upright,
        assembly.storage(node.outputs[0]),
    )
    kernel = assembly.kernel("matmul", matmul, shape, assembly.products, assembly.multiprocessors)
    sources = [assembly.tensor(left), assembly.tensor(right)]
    assembly.call(kernel, sources, output, node.name or kernel)


def matmul(
    name: str, shape: MatMulShape, products: FloatFormat, multiprocessors: int
) -> CudaKernel:
    """Generate the kernel: arguments left, right and y `[batch, heads, rows, width]`."""
    side = next((s for s in _SIDES if shape.blocks(s) >= multiprocessors), _SIDES[-1])
    integers = {
        "HEADS": shape.heads,
        "ROWS": shape.rows,
        "DEPTH": shape.depth,
        "WIDTH": shape.width,
        "SIDE": side,
    }
    lines = [
        f"struct {name}_shape {{",
        *(f"    static const int {key} = {value};" for key, value in integers.items()),
        f"    static const bool UPRIGHT = {str(shape.upright).lower()};",
        f"    typedef {shape.left.source} Left;",
        f"    typedef {shape.right.source} Right;",
        "};",
        f'extern "C" __global__ void __launch_bounds__({_THREADS})',
        f"{name}(const {C_TYPES[shape.left.dtype]} *left, "
        f"const {C_TYPES[shape.right.dtype]} *right, {C_TYPES[shape.dtype]} *y)",
        "{",
        f"    matmul<{PRODUCTS[products]}, {name}_shape>(left, right, y);",
        "}",
    ]
    return CudaKernel(
        name,
        "\n".join(lines) + "\n",
        ("matmul.cuh",),
        (shape.blocks(side), 1, 1),
        (_THREADS, 1, 1),
        _shared_bytes(side, shape.upright, 2 if products == "float16" else 4),
        overlaps=True,
    )


def _shared_bytes(side: int, upright: bool, itemsize: int) -> int:
    """Return the bytes of two slices of both operands, as `matmul.cuh` lays them out."""
    columns, pad = 64 // itemsize, 16 // itemsize
    pitch = columns + pad
    right = columns * (side + 8) if upright else side * pitch
    return 2 * (side * pitch + right) * itemsize
