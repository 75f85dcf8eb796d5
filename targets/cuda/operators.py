"""Nodes of the `edgepress` domain become calls of CUDA kernels: one function per operator."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from edgepress.targets.cuda.assembly import CudaAssembly
from edgepress.targets.cuda.attention import call_attention
from edgepress.targets.cuda.conv import call_conv
from edgepress.targets.cuda.dynamic_gemm import call_dynamic_gemm
from edgepress.targets.cuda.elementwise import (
    call_activation,
    call_add,
    call_dequantise,
    call_mul,
    call_quantise,
    call_rescale,
    call_table,
)
from edgepress.targets.cuda.gemm import call_gemm
from edgepress.targets.cuda.intake import call_intake
from edgepress.targets.cuda.layout import call_concat, call_interlace, call_transpose
from edgepress.targets.cuda.matmul import call_matmul
from edgepress.targets.cuda.pool import call_average_pool, call_max_pool
from edgepress.targets.cuda.resize import call_resize
from edgepress.targets.cuda.rows import call_layer_norm, call_qsoftmax, call_softmax
from edgepress.targets.lowering.node_attributes import operand_of


def _view(assembly: CudaAssembly, node: ir.Node) -> None:
    assembly.alias(node.outputs[0], operand_of(node.inputs[0]))


CUDA_KERNELS: dict[str, Callable[[CudaAssembly, ir.Node], None]] = {
    "Activation": call_activation,
    "Attention": call_attention,
    "AveragePool": call_average_pool,
    "Concat": call_concat,
    "Conv": call_conv,
    "Dequantize": call_dequantise,
    "DynamicGemm": call_dynamic_gemm,
    "Gemm": call_gemm,
    "Intake": call_intake,
    "Interlace": call_interlace,
    "LayerNorm": call_layer_norm,
    "MatMul": call_matmul,
    "MaxPool": call_max_pool,
    "QAdd": call_add,
    "QAveragePool": call_average_pool,
    "QConv": call_conv,
    "QGemm": call_gemm,
    "QMul": call_mul,
    "QSoftmax": call_qsoftmax,
    "Quantize": call_quantise,
    "Rescale": call_rescale,
    "Resize": call_resize,
    "Softmax": call_softmax,
    "Table": call_table,
    "Transpose": call_transpose,
    "View": _view,
}
