"""LiteRT (TensorFlow Lite) with XNNPACK: float, and 8 bits by TensorFlow's quantizer.

onnx2tf converts. It pins TensorFlow and old versions of its other parts, so it wants an environment
of its own: `$EDGEPRESS_ONNX2TF` names the program there.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from edgepress.pipeline.peers.base import Array, CannotRun, Feed, Job, Loaded, Peer, part, run_tool

FILE = "model.tflite"
# Where a file of this name lies, onnx2tf does not download pictures for a trial run.
_PICTURES = "calibration_image_sample_data_20x128x128x3_float32.npy"
# LiteRT has no erf: it is written as operators that there are.
_ALWAYS = ("-n", "-dsm", "-rtpo", "Erf")
_OPTIONS = {
    "fp32": (),
    "int8": ("-oiqt", "-qt", "per-channel", "-iqd", "float32", "-oqd", "float32"),
    "int8 dynamic": ("-odrqt",),
}
_ENDINGS = {"fp32": "_float32", "int8": "_integer_quant", "int8 dynamic": "_dynamic_range_quant"}


def _prepare(job: Job, precision: str, folder: Path) -> None:
    if precision == "int8 dynamic" and job.convolves:
        raise CannotRun("for models with convolutions its static quantization is the faster one")
    if precision == "int8" and any(dtype != "float32" for _, dtype in job.inputs.values()):
        raise CannotRun("onnx2tf calibrates models whose inputs are all float32, and no others")
    with tempfile.TemporaryDirectory(prefix="edgepress-") as temporary:
        work = Path(temporary)
        shutil.copyfile(job.model, work / "model.onnx")  # onnx2tf simplifies it in its place
        np.save(work / _PICTURES, np.zeros((20, 128, 128, 3), np.float32))
        # inputs that are no pictures keep their axes
        options = [
            word
            for name, (shape, _) in job.inputs.items()
            if len(shape) != 4
            for word in ("-kat", name)
        ]
        options += [*_ALWAYS, *_OPTIONS[precision]]
        if precision == "int8":
            options += _calibration(job, work)
        run_tool("onnx2tf", "-i", "model.onnx", "-o", "out", *options, folder=work)
        ending = f"{_ENDINGS[precision]}.tflite"
        # the other one of that ending, `_full_integer_quant`, is the same for inputs in float
        made = [p for p in (work / "out").glob(f"*{ending}") if "_full_" not in p.name]
        if not made:
            raise CannotRun(f"onnx2tf made no *{ending}")
        shutil.copyfile(made[0], folder / FILE)


def _calibration(job: Job, work: Path) -> list[str]:
    """Write the samples as onnx2tf reads them; return the options that name them."""
    options = []
    samples = job.samples("calibration")
    for index, name in enumerate(job.inputs):
        array = np.concatenate([feed[name] for feed in samples])
        np.save(work / f"{index}.npy", _channels_last(array) if array.ndim == 4 else array)
        options += ["-cind", name, f"{index}.npy", "[0.0]", "[1.0]"]  # mean and deviation
    return options


def _channels_last(array: Array) -> Array:
    return np.ascontiguousarray(np.moveaxis(array, 1, -1))


def _start(job: Job, folder: Path, threads: int) -> Loaded:  # noqa: ARG001
    interpreter = part("ai_edge_litert.interpreter").Interpreter
    net = interpreter(str(folder / FILE), num_threads=threads)  # with XNNPACK by default
    net.allocate_tensors()
    outputs = [output["index"] for output in net.get_output_details()]

    def convert(feed: Feed) -> list[tuple[int, Array]]:
        rows = []
        for spec in net.get_input_details():
            array = feed[_input_name(spec["name"], feed)]
            if tuple(spec["shape"]) != array.shape:
                array = _channels_last(array)
            rows.append((spec["index"], np.ascontiguousarray(array, spec["dtype"])))
        return rows

    def call(rows: list[tuple[int, Array]]) -> list[Any]:
        for index, array in rows:
            net.set_tensor(index, array)
        net.invoke()
        return [net.get_tensor(index) for index in outputs]

    return Loaded(convert=convert, call=call)


def _input_name(given: str, feed: Feed) -> str:
    """Return the model's name of an input, which onnx2tf wraps, as in `serving_default_x:0`."""
    if len(feed) == 1:
        return next(iter(feed))
    return max((name for name in feed if name in given), key=len)


PEER = Peer(
    name="litert",
    extra="litert",
    packages={"ai_edge_litert": "ai-edge-litert"},
    precisions=("fp32", "int8", "int8 dynamic"),
    unable={},
    tools={
        "onnx2tf": "python -m venv tf && tf/bin/pip install onnx2tf, then set "
        "EDGEPRESS_ONNX2TF=tf/bin/onnx2tf"
    },
    prepare=_prepare,
    start=_start,
)
