"""Who races against a bundle: what each starts from, and how good its answers are."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgepress.calibration.base import Array, Samples
from edgepress.pipeline.bundle import Bundle
from edgepress.pipeline.cache import Cache
from edgepress.pipeline.feeds import user_samples
from edgepress.pipeline.oracle import sqnr_db
from edgepress.pipeline.peer_job import Task, fixed_model, make_task
from edgepress.pipeline.peer_process import Installed, Racer, convert
from edgepress.pipeline.peers.base import CannotRun
from edgepress.pipeline.prepare import UsageError
from edgepress.pipeline.progress import Progress
from edgepress.pipeline.recipe import parse_recipe
from edgepress.pipeline.snapshot import Snapshot
from edgepress.targets.devices.base import Device

OURS, ONNXRUNTIME = "edgepress", "onnxruntime"


class Field:
    """The bundle, and what its rivals start from."""

    def __init__(
        self,
        bundle: Bundle,
        model: Path | None,
        folder: Path,
        calib: Path | None,
        evaluation: Path | None,
    ) -> None:
        self.bundle, self.model, self.folder = bundle, model, folder
        self.floating = bundle.manifest.arithmetic == "float"
        graph = Snapshot((bundle.folder / "graph.onnx").read_bytes())
        shapes = {tensor["name"]: tuple(tensor["shape"]) for tensor in bundle.manifest.inputs}
        #: whether the job's model is in float, so that peers can start from it
        self.has_floats = model is not None or self.floating
        floats = graph if model is None else fixed_model(model, shapes)
        text, name = bundle.manifest.recipe["text"], bundle.manifest.recipe["name"]
        pictures = parse_recipe(text, name, "the bundle's recipe").preprocess
        calibration, given = (
            None if path is None else user_samples(floats.load(), path, pictures)
            for path in (calib, evaluation)
        )
        (folder / "job").mkdir()
        self.task = make_task(
            floats, folder / "job", calibration=calibration, tests=given or golden_samples(bundle)
        )

    def plans(self, peers: Sequence[Installed]) -> dict[str, tuple[Installed, str | Path]]:
        """Return the rivals by name: a peer with a precision to convert to, or a model as it is.

        Raises:
            UsageError: a peer has to start from the float model, and it is not here.
        """
        plans: dict[str, tuple[Installed, str | Path]] = {}
        for peer in peers:
            if peer.name == ONNXRUNTIME:
                rivals = onnxruntime_rivals(self.bundle, self.model, self.folder)
                plans |= {name: (peer, graph) for name, graph in rivals.items()}
            elif not self.has_floats:
                raise UsageError(
                    f"{peer.name} converts the float model, and the bundle {self.bundle.folder} "
                    "is quantized; give the original with --model MODEL.onnx."
                )
            if not self.has_floats:
                continue
            for precision in peer.precisions:
                asked = not self.floating if precision != "fp32" else peer.name != ONNXRUNTIME
                if asked:
                    plans[f"{peer.name} {precision}"] = (peer, precision)
        return plans

    @property
    def notes(self) -> Sequence[str]:
        """What to know of the samples."""
        return () if self.floating or not self.has_floats else self.task.notes


def onnxruntime_rivals(bundle: Bundle, model: Path | None, folder: Path) -> dict[str, Path]:
    """Return what onnxruntime shall run against a bundle, by name; files are written to `folder`.

    Args:
        bundle: decides the precision.
        model: the model that it was made from, or None.
        folder: for a model that onnxruntime quantizes itself: where activations are quantized while
            the model runs, it has faster operators for that than the bundle's own graph.
    """
    graph = bundle.folder / "graph.onnx"
    if bundle.manifest.arithmetic == "float":
        return {"onnxruntime fp32": model or graph}
    if not any(node.op_type == "MatMulInteger" for node in ir.load(graph).graph):
        return {"onnxruntime int8": graph} | ({} if model is None else {"onnxruntime fp32": model})
    if model is None:
        return {"onnxruntime, the same graph": graph}
    from onnxruntime.quantization import quantize_dynamic  # takes long to import

    logging.getLogger().addFilter(_no_advice)
    try:
        quantize_dynamic(model, folder / "dynamic.onnx")
    finally:
        logging.getLogger().removeFilter(_no_advice)
    return {"onnxruntime int8": folder / "dynamic.onnx", "onnxruntime fp32": model}


def _no_advice(record: logging.LogRecord) -> bool:
    """Drop onnxruntime's advice to preprocess models, which changes nothing here."""
    return "pre-processing" not in record.getMessage()


def golden_samples(bundle: Bundle) -> Samples:
    """Read the golden inputs of a bundle back."""
    count = int(bundle.manifest.golden["samples"])
    inputs: dict[str, list[Array]] = {tensor["name"]: [] for tensor in bundle.manifest.inputs}
    for index in range(count):
        data = (bundle.folder / "golden" / f"{index}.in").read_bytes()
        at = 0
        for tensor in bundle.manifest.inputs:
            shape, dtype = tuple(tensor["shape"]), np.dtype(tensor["dtype"])
            size = int(np.prod(shape, dtype=np.int64))
            array = np.frombuffer(data, dtype.newbyteorder("<"), size, at).astype(dtype)
            inputs[tensor["name"]].append(array.reshape(shape[1:] if shape[:1] == (1,) else shape))
            at += size * dtype.itemsize
    return Samples(
        inputs={name: np.stack(arrays) for name, arrays in inputs.items()},
        source="the bundle's golden inputs",
    )


def prepared(
    peer: Installed,
    source: str | Path,
    task: Task,
    folder: Path,
    cache: Cache | None,
    progress: Progress,
) -> Path:
    """Return a folder with a model as a peer loads it. Raises CannotRun.

    Args:
        peer: whose.
        source: a precision that it shall convert the job's model to, or a model for onnxruntime.
        task: the model and the samples.
        folder: to be made.
        cache: keeps what peers made, or None.
        progress: where to say how far it is.
    """
    folder.mkdir()
    if isinstance(source, Path):
        shutil.copyfile(source, folder / "model.onnx")
    else:
        with progress.step(f"convert for {peer.name} {source}"):
            convert(peer, source, task, folder, cache)
    return folder


def signal_to_noise(
    bundle: Bundle,
    device: Device,
    racers: Mapping[str, Racer],
    task: Task,
    skipped: dict[str, str],
    progress: Progress,
) -> dict[str, float]:
    """Compare everybody's answers to the float model's, in dB; who cannot answer is skipped."""
    with progress.step("compare answers"):
        found = {OURS: sqnr_db(task.wanted, device.infer(bundle.folder, task.feeds))}
        for name, racer in racers.items():
            try:
                found[name] = task.sqnr_db(racer.answers())
            except CannotRun as error:
                skipped[name] = str(error)
    return found
