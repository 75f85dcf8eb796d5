"""Standard ONNX operators → kernels, through TVM Relax.

The way for every operator that has no kernel generator of its own: TVM imports the nodes, makes
each a TIR function, folds constants and fuses neighbours; `schedules/generic.py` schedules what
comes out, and for GPUs `cuda/regions.py` writes it as CUDA C++. What TVM imports wrongly,
`operators.py` refuses and `decompose.py` avoids.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import onnx
import onnx_ir as ir
import tvm
import tvm_ffi
from tvm import relax
from tvm.relax.frontend.onnx import from_onnx

from edgepress.targets.base import Target, UnsupportedModel
from edgepress.targets.cuda.region_rewrites import ease_fusion
from edgepress.targets.load import tvm_target
from edgepress.targets.lowering import operators
from edgepress.targets.lowering.decompose import decompose
from edgepress.targets.lowering.relax_operators import LEGALIZATIONS
from edgepress.targets.lowering.relax_program import program_from_relax
from edgepress.targets.program import Program, Tensor

_RUNTIME_CALLS = ("tirx.tvm_call_packed", "tirx.tvm_call_cpacked")


def lower_region(model: ir.Model, target: Target, prefix: str) -> Program:
    """Lower a model of standard ONNX nodes.

    Args:
        model: standalone; every value has a static shape and a dtype of `program.DTYPES`.
        target: where the kernels will run.
        prefix: of the names of all kernels, constants and inner tensors, so that programs of
            several regions can be joined. Inputs and outputs keep their ONNX names.

    Returns:
        A valid program. An output that is an input, a constant or another output is copied.

    Raises:
        UnsupportedModel: lists every node that cannot be lowered, and why.
    """
    proto = ir.to_proto(model)
    if reasons := operators.unsupported(proto):
        raise UnsupportedModel(reasons)
    proto = decompose(proto)
    try:
        program = _lower(proto, target, prefix)
    except Exception as error:  # TVM raises every kind, AssertionError included
        raise UnsupportedModel(_blame(proto, target, error)) from error
    program.validate()
    return program


def _lower(proto: onnx.ModelProto, target: Target, prefix: str) -> Program:
    initializers = {tensor.name for tensor in proto.graph.initializer}
    inputs = [_tensor(value) for value in proto.graph.input if value.name not in initializers]
    outputs = [value.name for value in proto.graph.output]
    with _without_native_warnings():
        module = _legalize(_import(proto), target)
        return program_from_relax(module, inputs, outputs, target, prefix)


@contextlib.contextmanager
def _without_native_warnings() -> Iterator[None]:
    """Keep from the user what TVM's C++ prints on stderr.

    It warns of indices out of bounds, which `decompose` has bounded; errors are exceptions.
    """
    kept = os.dup(2)
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _tensor(value: onnx.ValueInfoProto) -> Tensor:
    kind = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    return Tensor(value.name, str(dtype), tuple(d.dim_value for d in kind.shape.dim))


def _import(proto: onnx.ModelProto) -> Any:
    """Import with TVM, which warns and prints about what it also raises."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return from_onnx(proto, keep_params_in_input=False)


def _legalize(module: Any, target: Target) -> Any:
    """Turn Relax operators into calls of fused TIR functions."""
    if target.is_cuda:
        module = ease_fusion(module)
    passes = [
        relax.transform.DecomposeOpsForInference(),
        relax.transform.LegalizeOps(LEGALIZATIONS),
        relax.transform.FoldConstant(),
        relax.transform.RewriteDataflowReshape(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(),
    ]
    with tvm_target(target):
        module = tvm.ir.transform.Sequential(passes)(module)
    for function in module.functions.values():
        tvm_ffi.structural_walk(function, (tvm.ir.Call, _refuse_runtime_call))
    return module


def _refuse_runtime_call(call: Any) -> None:
    if getattr(call.op, "name", "") in _RUNTIME_CALLS:
        raise NotImplementedError(f"it needs {call.args[0]} of TVM's runtime")


def _blame(proto: onnx.ModelProto, target: Target, error: Exception) -> list[tuple[str, str]]:
    """Find the nodes that TVM cannot lower, by lowering each alone."""
    reasons = []
    for node, alone in operators.single_node_models(proto):
        try:
            _lower(alone, target, "")
        except Exception as why:
            reasons.append((node, f"TVM cannot lower it: {_last_line(why)}"))
    return reasons or [(proto.graph.name or "the graph", f"TVM: {_last_line(error)}")]


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
