"""Runs samples through a model in onnxruntime and hands out what its values were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from edgepress.calibration.base import Array, CalibrationError
from edgepress.passes import _constants
from edgepress.passes._shapes import static_shape
from edgepress.passes.base import PassRefused

#: Activations that are alive at once; a model with more of them is run several times.
TAPPED_BYTES = 256 * 2**20


def input_shapes(pass_name: str, model: ir.Model) -> dict[str, tuple[int, ...]]:
    """Return the fixed shape of every model input, or refuse."""
    shapes = {}
    for value in model.graph.inputs:
        shape = static_shape(value)
        if shape is None:
            raise PassRefused(
                pass_name,
                f"input {value.name!r}",
                f"its shape {value.shape} is not fixed; give one with --input-shape.",
            )
        shapes[value.name or ""] = shape
    return shapes


def grouped(values: list[ir.Value]) -> Iterator[list[ir.Value]]:
    """Split into groups that together take at most TAPPED_BYTES, or hold a single value."""
    group: list[ir.Value] = []
    used = 0
    for value in values:
        if group and used + size_bytes(value) > TAPPED_BYTES:
            yield group
            group, used = [], 0
        group.append(value)
        used += size_bytes(value)
    if group:
        yield group


def size_bytes(value: ir.Value) -> int:
    """Bytes of a value, of a float32 where its dtype is not known; a safe guess without a shape."""
    shape = static_shape(value)
    if shape is None:
        return TAPPED_BYTES // 16
    return _constants.size_bytes(shape, value.dtype or ir.DataType.FLOAT)


def open_taps(
    pass_name: str, model: ir.Model, values: list[ir.Value]
) -> Callable[[dict[str, Array], int], dict[str, Array]]:
    """Return a function that maps a feed, and the sample's number for messages, to these values.

    The model runs unoptimised on a copy whose outputs are these values, so they are exactly what
    the graph names. Values that the feed holds, such as model inputs, are handed back as they are.

    Raises:
        PassRefused: onnxruntime cannot load the model; from the function: it cannot run it, or a
            value that it computes is NaN or infinite.
        CalibrationError: from the function: an input is NaN or infinite.
    """
    inner = [value for value in values if value.producer() is not None]
    session = open_session(pass_name, model, inner) if inner else None
    names = [value.name or "" for value in inner]
    wanted = [value.name or "" for value in values]

    def tap(feed: dict[str, Array], index: int) -> dict[str, Array]:
        found = dict(feed)
        if session:
            try:
                answers: Any = session.run(names, feed)
            except Exception as error:  # onnxruntime's errors have no class of their own
                why = f"onnxruntime cannot run the model on it: {error}"
                raise PassRefused(pass_name, f"sample {index}", why) from error
            found |= dict(zip(names, answers, strict=True))
        for value, name in zip(values, wanted, strict=True):
            if not np.isfinite(found[name]).all():
                raise _non_finite(pass_name, value, index, found[name])
        return {name: found[name] for name in wanted}

    return tap


def open_session(pass_name: str, model: ir.Model, values: list[ir.Value]) -> ort.InferenceSession:
    """Open a session, without optimisations, on a copy of the model that answers these values.

    Raises:
        PassRefused: onnxruntime cannot load the model.
    """
    copy = model.clone()
    by_name = {value.name: value for node in copy.graph for value in node.outputs}
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(by_name[value.name] for value in values)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    # with more threads onnxruntime adds up in another order, so ranges would depend on the machine
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    content = ir.to_proto(copy).SerializeToString()
    try:
        return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # as above
        why = f"onnxruntime cannot load it, so nothing is measured: {error}"
        raise PassRefused(pass_name, "model", why) from error


def _non_finite(
    pass_name: str, value: ir.Value, index: int, values: Array
) -> PassRefused | CalibrationError:
    """Say which value is not finite, which node computes it, and for which sample."""
    what = "NaN" if np.isnan(values).any() else "infinite"
    node = value.producer()
    if node is None:
        return CalibrationError(
            f"samples: {value.name!r} is {what} in sample {index}; "
            "remove the sample or mend its preprocessing."
        )
    return PassRefused(
        pass_name,
        f"value {value.name!r}",
        f"node {node.name or node.op_type!r} ({node.op_type}) makes it {what} for sample {index}, "
        "so it has no range; check the sample's preprocessing, or replace infinities in the model "
        "by large numbers.",
    )
