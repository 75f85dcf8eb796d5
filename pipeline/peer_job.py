"""What peers get of a model: a float model of fixed shapes, samples, and the right answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgepress.calibration.base import Array, Samples
from edgepress.passes.base import Context
from edgepress.passes.fix_shapes import FixShapes
from edgepress.passes.raise_opset import RaiseOpset
from edgepress.pipeline import snapshot
from edgepress.pipeline.cache import content_key, file_sha256
from edgepress.pipeline.feeds import input_dtype, input_shapes, random_samples, spread
from edgepress.pipeline.load import load_model
from edgepress.pipeline.oracle import Oracle, Outputs, sqnr_db
from edgepress.pipeline.peers.base import Job
from edgepress.pipeline.snapshot import Snapshot

MOST_TESTS = 16
RANDOM_SAMPLES = 16


@dataclass(frozen=True, kw_only=True)
class Task:
    """A job, and what is known of it here.

    Attributes:
        job: in its folder.
        feeds: the tests.
        wanted: the float model's answers to them, from onnxruntime without optimisations.
        key: hash of the model and of the calibration samples.
        notes: what a reader of the race must know of the samples.
    """

    job: Job
    feeds: list[dict[str, Array]]
    wanted: Outputs
    key: str
    notes: tuple[str, ...] = ()

    def sqnr_db(self, answers: Mapping[str, Array]) -> float:
        """Compare stacked answers, one array `[tests, *shape]` per output, in order."""
        count = len(self.wanted)
        got = [{name: array[i] for name, array in answers.items()} for i in range(count)]
        return sqnr_db(self.wanted, got)


def fixed_model(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Snapshot:
    """Load a model as its author made it, with fixed shapes and an opset that all peers read.

    Raises:
        ModelError, PassError: the model cannot be used, or not with these shapes.
    """
    model = load_model(path)
    for step, context in ((FixShapes(), Context(input_shapes=dict(shapes))), (RaiseOpset(), None)):
        step.requires(model, context or Context())
        model = step.call(model, context or Context()).model
    return snapshot.take(model)


def make_task(
    model: Snapshot, folder: Path, *, calibration: Samples | None, tests: Samples
) -> Task:
    """Write a job into an empty folder.

    Args:
        model: of fixed shapes.
        folder: where to.
        calibration: for peers that quantize; None takes random samples, and says so.
        tests: what answers are compared on, at most 16 of them.

    Raises:
        CalibrationError: samples do not fit the model.
    """
    graph = model.load()
    shapes = input_shapes(graph) or {}
    dtypes = {value.name or "": input_dtype(value) for value in graph.graph.inputs}
    notes = []
    if calibration is None:
        calibration = random_samples(graph, RANDOM_SAMPLES)
        notes.append(
            "the peers' int8 was calibrated on random samples, so its accuracy says little: give "
            "real ones with --calib"
        )
    for samples in (calibration, tests):
        samples.demand(shapes, dtypes)
    (folder / "model.onnx").write_bytes(model.model)
    feeds = list(spread(tests, MOST_TESTS).feeds(shapes))
    _write(folder / "calibration.npz", list(calibration.feeds(shapes)))
    _write(folder / "tests.npz", feeds)
    oracle = Oracle(model.model)
    wanted = [oracle.run(feed) for feed in feeds]
    job = Job(
        folder=folder,
        inputs={name: (shape, dtypes[name].name) for name, shape in shapes.items()},
        outputs={name: array.shape for name, array in wanted[0].items()},
        attends=any(_attends(node) for node in graph.graph),
        convolves=any(node.op_type == "Conv" for node in graph.graph),
    )
    job.write()
    key = content_key(file_sha256(folder / "model.onnx"), calibration.sha256())
    return Task(job=job, feeds=feeds, wanted=wanted, key=key, notes=tuple(notes))


def _write(path: Path, feeds: list[dict[str, Array]]) -> None:
    arrays: dict[str, Any] = {name: np.stack([feed[name] for feed in feeds]) for name in feeds[0]}
    np.savez(path, **arrays)


def _attends(node: ir.Node) -> bool:
    """Tell whether a node multiplies two matrices that are both computed."""
    if node.op_type != "MatMul":
        return False
    return all(
        value is not None
        and not value.is_initializer()
        and (value.producer() is None or value.producer().op_type != "Constant")  # type: ignore[union-attr]
        for value in node.inputs
    )
