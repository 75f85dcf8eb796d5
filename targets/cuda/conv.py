"""Convolutions on a GPU: which algorithm, and its call."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from edgepress.targets.cuda.assembly import CudaAssembly
from edgepress.targets.cuda.depthwise import call_depthwise
from edgepress.targets.cuda.gemm import call_product, product_of
from edgepress.targets.cuda.gemm_shape import GemmShape
from edgepress.targets.cuda.grouped import call_grouped
from edgepress.targets.cuda.window import window_of
from edgepress.targets.lowering.depthwise_kernels import is_depthwise
from edgepress.targets.lowering.node_attributes import (
    constant_of,
    integer_of,
)


def call_conv(assembly: CudaAssembly, node: ir.Node) -> None:
    """Convolve by the algorithm that suits the layer."""
    if is_depthwise(node):
        call_depthwise(assembly, node)
        return
    product = product_of(assembly, node) if integer_of(node, "group") == 1 else None
    if product is None:
        call_grouped(assembly, node)
        return
    fill = integer_of(node, "x_zero_point") if product == "int8" else 0
    shape = GemmShape(**dataclasses.asdict(window_of(node)), fill=fill)
    call_product(assembly, node, shape, product, constant_of(node, 1))
