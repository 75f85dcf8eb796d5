"""What goes into a model: the user's samples, or random ones where there are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgepress.calibration.base import Array, Samples
from edgepress.calibration.samples import Preprocess, load_samples

SEED = 20
# operators between an input and the table that it indexes
TRANSPARENT = ("Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")


def input_shapes(model: ir.Model) -> dict[str, tuple[int, ...]] | None:
    """Return the shape of every input, or None where one is not fixed."""
    shapes: dict[str, tuple[int, ...]] = {}
    for value in true_inputs(model):
        if value.shape is None or not value.shape.is_static():
            return None
        shapes[value.name or ""] = tuple(int(str(dim)) for dim in value.shape)
    return shapes


def user_samples(model: ir.Model, path: Path, preprocess: Preprocess | None = None) -> Samples:
    """Read the user's samples for a model of fixed shapes. Raises CalibrationError."""
    inputs = true_inputs(model)
    dtypes = {value.name or "": input_dtype(value) for value in inputs}
    # one recipe serves arrays for evaluation and photos for calibration
    preprocess = preprocess if path.is_dir() else None
    return load_samples(path, input_shapes(model) or {}, dtypes, preprocess)


def input_dtype(value: ir.Value) -> np.dtype[Any]:
    """Return the dtype of an input; float32 where the model says nothing."""
    return np.dtype(np.float32) if value.dtype is None else np.dtype(value.dtype.numpy())


def true_inputs(model: ir.Model) -> list[ir.Value]:
    """Return the inputs that are no initializers (before IR version 4, a model lists both)."""
    return [value for value in model.graph.inputs if value.name not in model.graph.initializers]


def random_samples(model: ir.Model, count: int, seed: int = SEED) -> Samples:
    """Make samples that any model accepts: normal floats, integers that are valid indices.

    An integer that indexes a table (Gather) is below the length of the table; others are 0 or 1,
    which serves masks and token types; uint8 and int8 take their whole range, as pixels do.
    """
    rng = np.random.default_rng(seed)
    shapes = input_shapes(model) or {}
    arrays: dict[str, Array] = {}
    for value in true_inputs(model):
        shape = shapes[value.name or ""]
        size = (count, *(shape[1:] if shape[:1] == (1,) else shape))
        dtype = input_dtype(value)
        if dtype.kind == "b":
            arrays[value.name or ""] = rng.integers(0, 2, size).astype(bool)
        elif dtype.kind in "iu":
            bound = _index_bound(value, set())
            low, high = (0, bound) if bound else (0, 2)
            if not bound and dtype.itemsize == 1:
                low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max) + 1
            arrays[value.name or ""] = rng.integers(low, high, size).astype(dtype)
        else:
            arrays[value.name or ""] = rng.standard_normal(size).astype(dtype)
    return Samples(inputs=arrays, source="random samples")


def spread(samples: Samples, most: int) -> Samples:
    """Return at most this many samples, spread evenly over all of them."""
    if len(samples) <= most:
        return samples
    chosen = np.arange(most) * len(samples) // most
    return Samples(
        inputs={name: array[chosen] for name, array in samples.inputs.items()},
        labels=None if samples.labels is None else samples.labels[chosen],
        source=samples.source,
    )


def _index_bound(value: ir.Value, seen: set[ir.Node]) -> int:
    """Return the length of the shortest table that this value indexes, 0 where there is none."""
    bounds = []
    for use in value.uses():
        node = use.node
        if node in seen:
            continue
        seen.add(node)
        if node.op_type == "Gather" and use.idx == 1 and node.inputs[0] is not None:
            table = node.inputs[0].shape
            axis = node.attributes.get_int("axis", 0)
            if table is not None and len(table) and isinstance(table[axis], int):
                bounds.append(int(str(table[axis])))
        elif node.op_type in TRANSPARENT and use.idx == 0:
            bounds.append(_index_bound(node.outputs[0], seen))
    return min((bound for bound in bounds if bound), default=0)
