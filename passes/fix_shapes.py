"""fix-shapes: give every model input one fixed shape.

Compiled code has no dynamic dimensions. The shapes come from `Context.input_shapes`; a dynamic
first axis alone is a batch, and becomes 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from edgepress.passes._shapes import refresh_shapes, static_shape
from edgepress.passes.base import Context, Outcome, Pass, PassRefused

# Dimensions that share a name, such as "batch" or "seq", are one number.
_Known = dict[str, int]


@dataclass(frozen=True, kw_only=True)
class FixShapes(Pass):
    """Give every input a fixed shape, and drop weights from the list of inputs.

    Stats: `fixed` inputs whose shape was open; `removed_inputs` that only carried a weight.
    """

    def requires(self, model: ir.Model, context: Context) -> None:
        """Refuse shapes for inputs that do not exist or have another rank or extent."""
        inputs = {value.name or "": value for value in _true_inputs(model)}
        for name, shape in context.input_shapes.items():
            if name not in inputs:
                near = difflib.get_close_matches(name, inputs, 1, 0.4)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise PassRefused(
                    self.name,
                    f"--input-shape {name}:{_by(shape)}",
                    f"the model has no input {name!r}.{hint} Its inputs: {', '.join(inputs)}",
                )
            self._check(inputs[name], shape)

    def call(self, model: ir.Model, context: Context) -> Outcome:
        """Fix the shapes, then infer those of all values."""
        inputs = _true_inputs(model)
        removed = len(model.graph.inputs) - len(inputs)
        # Before version 4, every initializer had to be an input.
        old = model.ir_version is None or model.ir_version < 4
        if old:
            model.ir_version = 8
        if removed:
            model.graph.inputs[:] = inputs
        known = self._given(inputs, context)
        notes: list[str] = []
        fixed = 0
        for value in inputs:
            shape = self._shape(value, known, context.input_shapes, notes)
            if static_shape(value) != shape:
                value.shape = ir.Shape(shape)
                fixed += 1
        inferred = self._infer(model, inputs)
        return Outcome(
            model=model,
            modified=bool(fixed or removed or inferred or old),
            stats={"fixed": fixed, "removed_inputs": removed},
            notes=notes,
        )

    def ensures(self, model: ir.Model) -> None:
        """Refuse inputs without elements or without a dtype."""
        for value in model.graph.inputs:
            if value.dtype is None or value.shape is None or 0 in value.shape.numpy():
                raise PassRefused(
                    self.name,
                    f"input {value.name} {value.shape}",
                    "it has no elements or no dtype, so there is nothing to compute; export the "
                    "model with a typed input of at least one element",
                )

    def _infer(self, model: ir.Model, inputs: list[ir.Value]) -> bool:
        """Refresh all shapes and say whether any changed; blame the chosen ones on failure."""
        try:
            return refresh_shapes(model, self.name)
        except PassRefused as error:
            chosen = ", ".join(f"{value.name}:{_by(value.shape or ())}" for value in inputs)
            raise PassRefused(self.name, f"with the input shapes {chosen}", error.why) from error

    def _check(self, value: ir.Value, shape: tuple[int, ...]) -> None:
        """Refuse a shape that contradicts the declared one."""
        where = f"--input-shape {value.name}:{_by(shape)}"
        if any(extent < 1 for extent in shape):
            raise PassRefused(self.name, where, "every extent must be at least 1")
        if value.shape is None:
            return
        if len(shape) != len(value.shape):
            why = f"the input has {len(value.shape)} axes ({value.shape}), not {len(shape)}"
            raise PassRefused(self.name, where, why)
        for axis, (extent, declared) in enumerate(zip(shape, value.shape, strict=True)):
            if not _is_open(declared) and declared != extent:
                why = f"axis {axis} is fixed at {declared} in the model ({value.shape})"
                raise PassRefused(self.name, where, why)

    def _given(self, inputs: list[ir.Value], context: Context) -> _Known:
        """Collect what the given shapes say about named dimensions."""
        known: _Known = {}
        for value in inputs:
            shape = context.input_shapes.get(value.name or "", ())
            for extent, declared in zip(shape, value.shape or (), strict=False):
                name = _dimension_name(declared)
                if name and known.setdefault(name, extent) != extent:
                    raise PassRefused(
                        self.name,
                        f"--input-shape {value.name}:{_by(shape)}",
                        f"the model calls this dimension {name!r}, and another input shape gives "
                        f"it {known[name]}; give both the same number",
                    )
        return known

    def _shape(
        self,
        value: ir.Value,
        known: _Known,
        given: dict[str, tuple[int, ...]],
        notes: list[str],
    ) -> tuple[int, ...]:
        """Decide the shape of one input. Raises PassRefused where only the user can know it."""
        if value.name in given:
            return given[value.name]
        if value.shape is None:
            raise self._open(value, "its rank is unknown", "1x3x224x224")
        shape: list[int] = []
        for axis, declared in enumerate(value.shape):
            name = _dimension_name(declared)
            extent = declared if isinstance(declared, int) and declared > 0 else known.get(name)
            if declared == 0:  # nothing to compute, or how an exporter wrote "unknown": ask
                example = _by([*(1 if d == 0 else d for d in value.shape)])
                raise self._open(value, f"axis {axis} has no elements", example)
            if extent is None and axis == 0:
                extent = 1
                if name:
                    known[name] = extent
                notes.append(
                    f"input {value.name}: the batch was dynamic and is now 1; "
                    f"--input-shape {value.name}:… sets another."
                )
            if extent is None:
                example = _by([1, *(224 if _is_open(d) else d for d in value.shape[1:])])
                raise self._open(value, f"axis {axis} ({name or '?'}) is open", example)
            shape.append(extent)
        return tuple(shape)

    def _open(self, value: ir.Value, what: str, example: str) -> PassRefused:
        """Say which flag to give."""
        return PassRefused(
            self.name,
            f"input {value.name} {value.shape if value.shape is not None else '[?]'}",
            f"{what}, and compiled code needs fixed shapes; give one, such as "
            f"--input-shape {value.name}:{example}",
        )


def _true_inputs(model: ir.Model) -> list[ir.Value]:
    """Return the inputs that no initializer fills; before ONNX 1.4 weights were inputs too."""
    return [value for value in model.graph.inputs if not value.is_initializer()]


def _is_open(dimension: int | ir.SymbolicDim) -> bool:
    """Whether an extent is unknown; some exporters write 0 or -1 for that."""
    return not isinstance(dimension, int) or dimension < 1


def _dimension_name(dimension: int | ir.SymbolicDim) -> str:
    """Return the name of a symbolic dimension, or nothing."""
    return "" if isinstance(dimension, int) else dimension.value or ""


def _by(shape: Iterable[object]) -> str:
    """Write a shape as on the command line: 1x3x224x224."""
    return "x".join(str(extent) for extent in shape)
