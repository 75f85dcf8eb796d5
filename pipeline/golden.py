"""Golden samples: inputs and the answers that the compiled model must give on any device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgepress.calibration.base import Array
from edgepress.pipeline.oracle import Oracle, Outputs, relative_error
from edgepress.pipeline.snapshot import Snapshot
from edgepress.targets.float_format import FloatFormat, float_format
from edgepress.targets.lowering.dynamic import computes_integers
from edgepress.targets.reference import Reference

COUNT = 3
# Of the output range. Ten bits of mantissa are 0.05 % of every product and every tensor; what a
# deep network makes of that is measured by rounding its weights so.
FLOAT_LIMITS: dict[FloatFormat, float] = {"float32": 1e-4, "tf32": 5e-3, "float16": 5e-3}
# Rounding of a float island may move a later quantized value by one step, and that one many more in
# a deep network: how far is measured by moving the islands of the reference.
MIXED_LIMIT = 1e-2
SPREADS = 3.0
_NARROW = np.float32(2**11)  # a mantissa from 0.5 to 1 with ten more bits
LOOSEST_LIMIT = 0.1  # beyond that an answer says nothing, whatever the reason


@dataclass(frozen=True, kw_only=True)
class Golden:
    """Inputs and reference outputs.

    Attributes:
        feeds: one per sample, by input name.
        answers: one per sample, by output name.
        arithmetic: `float`, `integer` (exact) or `mixed`.
        reference: what gave the answers, in words.
        limit: the largest error that is allowed, as a share of the range of an output; 0 where
            bits count.
        tolerances: the same per output, absolute.
    """

    feeds: Sequence[Mapping[str, Array]]
    answers: Outputs
    arithmetic: str
    reference: str
    limit: float
    tolerances: tuple[float, ...]

    def write(self, folder: Path) -> None:
        """Write `golden/N.in` and `golden/N.out`: the raw tensors one after another."""
        (folder / "golden").mkdir()
        for i, (feed, answer) in enumerate(zip(self.feeds, self.answers, strict=True)):
            (folder / "golden" / f"{i}.in").write_bytes(raw(feed))
            (folder / "golden" / f"{i}.out").write_bytes(raw(answer))


def raw(tensors: Mapping[str, Array]) -> bytes:
    """Concatenate tensors, row-major and little-endian."""
    arrays = [np.ascontiguousarray(array) for array in tensors.values()]
    return b"".join(a.astype(a.dtype.newbyteorder("<"), copy=False).tobytes() for a in arrays)


def make_golden(
    compressed: Snapshot, original: Snapshot | None, feeds: Sequence[Mapping[str, Array]]
) -> Golden:
    """Answer the feeds with the reference of the model's arithmetic.

    A float model is held to `original` (None where a lossy pass changed it, then to itself) in
    onnxruntime, a quantized one to the NumPy integer reference. What the last bits of float islands
    change in the reference's answers is allowed `SPREADS` times, where that is more than
    `MIXED_LIMIT`, but never more than `LOOSEST_LIMIT`.
    """
    model = compressed.load()
    names = [output.name or "" for output in model.graph.outputs]
    arithmetic, reference = "float", "onnxruntime, optimisations off, on the original model"
    limit = FLOAT_LIMITS[float_format(model)]
    if computes_integers(model):
        integers = Reference(model)
        arithmetic = "integer" if integers.exact else "mixed"
        reference = "the NumPy integer reference on the quantized model"
        answers = [integers.run(dict(feed)) for feed in feeds]
        limit = 0.0
        if not integers.exact:
            moved = [integers.run(dict(feed), nudged=True) for feed in feeds]
            spread = SPREADS * relative_error(answers, moved)
            limit = min(max(MIXED_LIMIT, spread), LOOSEST_LIMIT)
    else:
        if original is None:
            reference = "onnxruntime, optimisations off, on the compressed model"
        oracle = Oracle((original or compressed).model)
        answers = [oracle.run(feed) for feed in feeds]
        if float_format(model) != "float32":
            narrow = Oracle(_narrowed(compressed.load()))
            moved = [narrow.run(feed) for feed in feeds]
            spread = SPREADS * relative_error(answers, moved)
            limit = min(max(limit, spread), LOOSEST_LIMIT)
    # by position: a pass may rename an output
    answers = [dict(zip(names, answer.values(), strict=True)) for answer in answers]
    return Golden(
        feeds=[{name: feed[name] for name in feed} for feed in feeds],
        answers=answers,
        arithmetic=arithmetic,
        reference=reference,
        limit=limit,
        tolerances=tuple(_tolerance(limit, [a[name] for a in answers]) for name in names),
    )


def _narrowed(model: ir.Model) -> ir.Model:
    """Round all float32 constants to 10 bits of mantissa."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype == ir.DataType.FLOAT:
            array = tensor.numpy()
            mantissa, power = np.frexp(array)
            with np.errstate(over="ignore"):
                rounded = np.ldexp(np.rint(mantissa * _NARROW) / _NARROW, power)
            rounded = np.where(np.isfinite(rounded), rounded, array)  # the largest stay
            value.const_value = ir.Tensor(rounded.astype(np.float32), name=value.name)
    return model


def _tolerance(limit: float, answers: Sequence[Array]) -> float:
    values = np.stack(answers)
    if values.dtype.kind in "biu":
        return 0.0
    values = values[np.isfinite(values)].astype(np.float64)
    scale = max(values.max(initial=0.0), 0.0) - min(values.min(initial=0.0), 0.0)
    return float(np.float32(limit * scale))
