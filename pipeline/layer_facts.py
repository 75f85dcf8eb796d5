"""What a manifest keeps of each layer, so that a profile can say what its calls compute."""

from __future__ import annotations

import inspect
import re
from typing import Any

import onnx_ir as ir

from edgepress.pipeline import _explain_rows
from edgepress.pipeline._explain_rows import find_rows
from edgepress.targets.program import Program

_FIXED_POINT = re.compile(r"Q(-?\d+)\.(-?\d+)")
_NUMBERED = re.compile(r"_\d+$")


def layer_facts(program: Program, model: ir.Model) -> list[dict[str, Any]]:
    """Describe the layers of a program that was lowered from a model, in order of execution.

    Returns:
        Per layer: `name`, `operator`, `fused`, `precision`, `arithmetic` ("fp32", "int8", "int16":
        what its multiplications are made of; "" where it has none), `macs`, `kernels` (their
        kinds), and `calls`: their numbers.
    """
    return [
        {
            "name": row.name,
            "operator": row.operator,
            "fused": row.fused,
            "precision": row.precision,
            "arithmetic": arithmetic(row.precision) if row.macs else "",
            "macs": row.macs,
            "kernels": list(
                dict.fromkeys(kernel_kind(program.calls[number].kernel) for number in row.calls)
            ),
            "calls": row.calls,
        }
        for row in find_rows(program, model)
    ]


def facts_version() -> str:
    """Return the code that the facts depend on beside the program: what is cached may be older."""
    return inspect.getsource(_explain_rows) + inspect.getsource(layer_facts)


def arithmetic(precision: str) -> str:
    """Return the operands that a layer of this precision multiplies.

    >>> arithmetic("Q3.4"), arithmetic("int16 × int8"), arithmetic("dynamic int8")
    ('int8', 'int16', 'int8')
    """
    if precision.startswith("float"):
        return "fp32"
    if found := _FIXED_POINT.fullmatch(precision):
        return "int8" if 1 + int(found[1]) + int(found[2]) <= 8 else "int16"
    return "int16" if "int16" in precision else "int8"


def kernel_kind(kernel: str) -> str:
    """Return the kind of a kernel by its name; "tvm" for one that TVM generates.

    >>> kernel_kind("conv_12"), kernel_kind("region_3_fused_take")
    ('conv', 'tvm')
    """
    return "tvm" if kernel.startswith("region_") else _NUMBERED.sub("", kernel)
