"""OpenVINO: float, and quantized by NNCF with its defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgepress.pipeline.peers.base import Feed, Job, Loaded, Peer, part

FILE = "model.xml"


def _prepare(job: Job, precision: str, folder: Path) -> None:
    openvino = part("openvino")

    model = openvino.Core().read_model(job.model)
    if precision == "int8":
        nncf = part("nncf")

        samples = job.samples("calibration")
        kind = nncf.ModelType.TRANSFORMER if job.attends else None
        dataset = nncf.Dataset(samples)
        model = nncf.quantize(model, dataset, subset_size=len(samples), model_type=kind)
    openvino.save_model(model, folder / FILE, compress_to_fp16=False)


def _start(job: Job, folder: Path, threads: int) -> Loaded:
    openvino = part("openvino")

    config = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        # Without it a CPU that has bfloat16 computes in that.
        "INFERENCE_PRECISION_HINT": "f32",
    }
    model = openvino.Core().compile_model(folder / FILE, "CPU", config)
    request = model.create_infer_request()

    def convert(feed: Feed) -> list[Any]:
        return [feed[name] for name in job.inputs]

    def call(rows: list[Any]) -> list[Any]:
        return list(request.infer(rows, share_inputs=True, share_outputs=True).values())

    return Loaded(convert=convert, call=call)


PEER = Peer(
    name="openvino",
    extra="openvino",
    packages={"openvino": "openvino", "nncf": "nncf"},
    precisions=("fp32", "int8"),
    unable={},
    tools={},
    prepare=_prepare,
    start=_start,
)
