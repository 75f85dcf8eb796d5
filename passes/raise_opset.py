"""raise-opset: bring an old model to opset 17, so that later passes meet one form of each operator.

onnx's version converter does the work. A newer model stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from edgepress.passes._opset import converted
from edgepress.passes._shapes import refresh_shapes
from edgepress.passes.base import Context, Outcome, Pass, PassRefused

OPSET = 17
IR_VERSION = 8
# From here on, operators read what they once took as attributes as inputs, as later passes expect.
TOLERABLE_OPSET = 13


@dataclass(frozen=True, kw_only=True)
class RaiseOpset(Pass):
    """Convert a model below opset 17 to opset 17, and its IR version to at least 8.

    Refuses a model below opset 13 that onnx cannot convert; from 13 on such a model stays.
    Stats: `opset_before` and `opset`.
    """

    def call(self, model: ir.Model, context: Context) -> Outcome:  # noqa: ARG002
        """Convert the graph; names of inputs, outputs, weights and metadata stay."""
        opset = model.graph.opset_imports[""]
        modified, notes = False, []
        if opset < OPSET:
            try:
                model = converted(model, OPSET)
                modified = True
            except Exception as error:  # the converter raises RuntimeError and onnx's own errors
                notes.append(self._excuse(opset, error))
        if model.ir_version is None or model.ir_version < IR_VERSION:
            model.ir_version = IR_VERSION
            modified = True
        if modified:
            refresh_shapes(model, self.name)
        return Outcome(
            model=model,
            modified=modified,
            stats={"opset_before": opset, "opset": model.graph.opset_imports[""]},
            notes=notes,
        )

    def _excuse(self, opset: int, error: Exception) -> str:
        """Say that the model stays, or raise PassRefused where it cannot."""
        text = " ".join(str(error).split())
        if opset < TOLERABLE_OPSET:
            raise PassRefused(
                self.name,
                f"opset {opset}",
                f"onnx cannot convert this model to opset {OPSET} ({text}); export it again with "
                f"opset {TOLERABLE_OPSET} or newer",
            ) from error
        return f"The model stays at opset {opset}: onnx cannot convert it to {OPSET} ({text})."
