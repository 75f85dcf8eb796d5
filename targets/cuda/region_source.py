"""TIR of one thread → CUDA C++, by TVM's code generator, in words that every compiler knows.

TVM's prologue includes files of the CUDA toolkit; what it is needed for is written otherwise here,
by calls of functions of `kernels/regions.cuh`, which the generator copies as they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import s_tir, tirx

HEADERS = ("regions.cuh",)
_TARGET = {"kind": "cuda", "arch": "sm_80"}  # the text is the same for every architecture
_DEVICE_CALLING_CONVENTION = 2
_TYPES = {
    r"signed char": "int8_t",
    r"uchar": "uint8_t",
    r"short": "int16_t",
    r"ushort": "uint16_t",
    r"uint": "uint32_t",
}
_START = "wait_for_previous(); let_next_start();"  # so that launches cost no time
_NAME = re.compile(r"[A-Za-z_]\w*|(threadIdx|blockIdx)\.[xyz]", re.ASCII)
_FUNCTIONS = {"nearbyintf": "rintf", "rsqrtf": "inverse_root"}
_NARROW = ("int8", "int16", "uint8", "uint16")


def kernel_sources(functions: Mapping[str, Any]) -> dict[str, str]:
    """Write functions as `extern "C" __global__ void`, one text each.

    Args:
        functions: name to a flat `PrimFunc` over pointers, whose body binds its threads.

    Raises:
        RuntimeError, ValueError: TVM cannot write one of them.
    """
    target = tvm.target.Target(_TARGET)
    attributes = {
        "calling_conv": _DEVICE_CALLING_CONVENTION,
        "target": target,
        "tirx.is_global_func": True,
        "tirx.noalias": True,
    }
    named = {
        name: function.with_attrs({"global_symbol": name, **attributes})
        for name, function in functions.items()
    }
    module = tvm.ir.transform.Sequential(_passes())(tvm.IRModule(named))
    build = tvm_ffi.get_global_func("target.build.cuda")
    text = str(build(module, target).inspect_source())  # nothing is compiled before it is run
    for theirs, ours in _identifiers(named.values()).items():
        text = text.replace(theirs, ours)
    return {name: _definition(text, name) for name in functions}


def _identifiers(functions: Iterable[Any]) -> dict[str, str]:
    """Map names of variables that C++ does not take, longest first: ONNX has such."""
    found: set[str] = set()
    for function in functions:
        variables = list(function.params)
        note = (tvm.ir.Var, variables.append)
        tvm_ffi.structural_walk(function.body, note)
        found.update(str(variable.name) for variable in variables)
    odd = sorted((name for name in found if not _NAME.fullmatch(name)), key=len)
    return {name: f"v{len(odd) - place}" for place, name in reversed(list(enumerate(odd)))}


def _passes() -> list[Any]:
    return [
        tirx.transform.VectorizeLoop(False),
        s_tir.transform.HoistIfThenElse(),
        tirx.transform.UnrollLoop(),
        s_tir.transform.RenormalizeSplitPattern(),
        tirx.transform.StmtSimplify(),
        tirx.transform.RemoveNoOp(),
        s_tir.transform.RewriteUnsafeSelect(),
        tirx.transform.CommonSubexprElim(),
        tirx.transform.LowerIntrin(),
        tirx.transform.prim_func_pass(_portable, opt_level=0, name="edgepress.portable"),
    ]


def _definition(text: str, name: str) -> str:
    """Cut a function out of what TVM wrote, and name things as `kernels/types.cuh` does."""
    start = re.search(rf'^extern "C" __global__ [^;{{]*\b{name}\([^;{{]*\) {{$', text, re.MULTILINE)
    if start is None:
        raise ValueError(f"TVM wrote no kernel {name}")
    end = text.index("\n}\n", start.start())
    source = f"{start[0]}\n  {_START}{text[start.end() : end + 3]}"
    for theirs, ours in (_TYPES | _FUNCTIONS).items():
        source = re.sub(rf"\b{theirs}\b", ours, source)
    return source


def _portable(function: Any, _module: Any, _context: Any) -> Any:
    changes = [
        (tirx.FloatImm, _as_written),
        (tirx.Max, _call_of("larger")),
        (tirx.Min, _call_of("smaller")),
        *[(kind, _wrapped) for kind in (tirx.Add, tirx.Sub, tirx.Mul)],
        (tvm.ir.Call, _reinterpreted),
    ]
    return function.with_body(tvm_ffi.structural_map(function.body, changes))


def _as_written(number: Any) -> Any:
    """Write infinities and NaN by their bits, and no more bits than a float32 has."""
    dtype, value = str(number.ty.dtype), float(number.value)
    if math.isfinite(value):
        return tirx.const(float(np.float32(value)), dtype) if dtype == "float32" else number
    bits = 0x7FC00000 if math.isnan(value) else 0x7F800000 if value > 0 else 0xFF800000
    found = tirx.call_pure_extern("float32", "bits_as_float", tirx.const(bits, "uint32"))
    return found if dtype == "float32" else tirx.Cast(dtype, found)


def _call_of(name: str) -> Callable[[Any], Any]:
    def call(node: Any) -> Any:
        dtype = str(node.ty.dtype)
        return tirx.call_pure_extern(dtype, f"{name}<{_c_type(dtype)}>", node.a, node.b)

    return call


def _wrapped(node: Any) -> Any:
    """Keep the bits of a narrow integer: C++ computes with 32."""
    dtype = str(node.ty.dtype)
    return tirx.call_pure_extern(dtype, _c_type(dtype), node) if dtype in _NARROW else node


def _reinterpreted(call: Any) -> Any:
    if getattr(call.op, "name", "") != "tirx.reinterpret":
        return call
    to, source = str(call.ty.dtype), str(call.args[0].ty.dtype)
    if to == "float32":
        return tirx.call_pure_extern(to, "bits_as_float", call.args[0])
    if source == "float32":
        return tirx.call_pure_extern(to, f"({_c_type(to)})float_as_bits", call.args[0])
    return call


def _c_type(dtype: str) -> str:
    return {"bool": "bool", "float32": "float"}.get(dtype, f"{dtype}_t")
