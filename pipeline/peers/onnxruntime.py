"""onnxruntime: float, and quantized by its own tools, static (QDQ) and dynamic."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from edgepress.pipeline.peers.base import CannotRun, Feed, Job, Loaded, Peer, part

FILE = "model.onnx"


def _prepare(job: Job, precision: str, folder: Path) -> None:
    logging.disable(logging.WARNING)  # advice on models and tensors that cannot be quantized
    made = folder / FILE
    if precision == "fp32":
        shutil.copyfile(job.model, made)
    elif precision == "int8 static":
        _quantize(job, folder)
    elif job.convolves:
        raise CannotRun("it has no fast convolution that quantizes its input while it runs")
    else:
        quantization = part("onnxruntime.quantization")
        quantization.quantize_dynamic(
            job.model, made, per_channel=True, weight_type=quantization.QuantType.QInt8
        )


def _quantize(job: Job, folder: Path) -> None:
    """Quantize as its documentation recommends for x86: u8 activations, s8 weights per channel."""
    quantization = part("onnxruntime.quantization")
    preprocess = part("onnxruntime.quantization.shape_inference").quant_pre_process
    feeds = iter(job.samples("calibration"))
    reader = type(
        "Reader",
        (quantization.CalibrationDataReader,),
        {"get_next": lambda _self: next(feeds, None)},
    )
    simplified = folder / "simplified.onnx"
    preprocess(str(job.model), str(simplified), skip_symbolic_shape=True)
    quantization.quantize_static(
        str(simplified),
        str(folder / FILE),
        reader(),
        per_channel=True,
        quant_format=quantization.QuantFormat.QDQ,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )
    simplified.unlink()


def _start(job: Job, folder: Path, threads: int) -> Loaded:
    onnxruntime = part("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        str(folder / FILE), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    wanted = [name for name in job.outputs if name in names] or names

    def call(feed: Feed) -> Any:
        return session.run(wanted, feed)

    return Loaded(convert=lambda feed: feed, call=call)


PEER = Peer(
    name="onnxruntime",
    extra="",  # edgepress itself depends on it
    packages={"onnxruntime": "onnxruntime"},
    precisions=("fp32", "int8 static", "int8 dynamic"),
    unable={},
    tools={},
    prepare=_prepare,
    start=_start,
)
