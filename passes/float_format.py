"""float-format: store and multiply the model's floats as TF32 or float16 where it will run.

Micikevicius and others, "Mixed Precision Training", 2018, section 3 (float16 operands, float32
sums).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from edgepress.passes.base import Context, Outcome, Pass

#: Key of the model's `metadata_props`.
KEY = "edgepress.float_format"


@dataclass(frozen=True, kw_only=True)
class FloatFormat(Pass):
    """Mark the floats of the model to be computed in less than float32, on GPUs.

    It marks the model, and may stand anywhere in a recipe: the graph stays float32, and so do its
    inputs and outputs. `float16` stores weights, and all that lies between kernels, in half the
    bytes; `tf32` keeps float32 in memory and multiplies 10 bits of mantissa. Products are always
    summed in float32. Targets without a GPU refuse the mark. What it costs in accuracy is measured
    on the device, so let the recipe's `[budget]` name a limit.

    Stats: none.
    """

    format: Literal["float32", "tf32", "float16"] = "float16"

    def call(self, model: ir.Model, context: Context) -> Outcome:  # noqa: ARG002
        """Mark the model."""
        modified = model.metadata_props.get(KEY, "float32") != self.format
        model.metadata_props[KEY] = self.format
        return Outcome(model=model, modified=modified)
