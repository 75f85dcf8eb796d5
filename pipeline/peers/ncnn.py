"""ncnn: float, converted by pnnx. Its quantizer is a C++ program that no pip package holds."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from edgepress.pipeline.peers.base import CannotRun, Feed, Job, Loaded, Peer, part, run_tool

_SHORT = {"float32": "f32", "float16": "f16", "int64": "i64", "int32": "i32", "uint8": "u8"}
_FOREIGN = ("pnnx.", "aten::", "onnx::")  # operators that pnnx could not translate


def _prepare(job: Job, precision: str, folder: Path) -> None:  # noqa: ARG001
    shapes = ",".join(
        f"[{','.join(map(str, shape))}]{_SHORT[dtype]}" for shape, dtype in job.inputs.values()
    )
    with tempfile.TemporaryDirectory(prefix="edgepress-") as temporary:
        work = Path(temporary)
        shutil.copyfile(job.model, work / "model.onnx")
        run_tool("pnnx", "model.onnx", f"inputshape={shapes}", "fp16=0", folder=work)
        text = (work / "model.ncnn.param").read_text("utf-8")
        left = sorted({line.split()[0] for line in text.splitlines() if line.startswith(_FOREIGN)})
        if left:
            raise CannotRun(f"pnnx leaves operators that ncnn has not: {' '.join(left)[:120]}")
        for suffix in ("param", "bin"):
            shutil.copyfile(work / f"model.ncnn.{suffix}", folder / f"model.{suffix}")


def _start(job: Job, folder: Path, threads: int) -> Loaded:
    ncnn = part("ncnn")

    net = ncnn.Net()
    net.opt.num_threads = threads
    for narrow in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage"):
        setattr(net.opt, f"use_{narrow}", False)
    if net.load_param(str(folder / "model.param")) or net.load_model(str(folder / "model.bin")):
        raise CannotRun("ncnn cannot load what pnnx wrote")

    def convert(feed: Feed) -> list[Any]:
        return [_mat(feed[name]) for name in job.inputs]

    def call(rows: list[Any]) -> list[Any]:
        extractor = net.create_extractor()
        for index, row in enumerate(rows):
            extractor.input(f"in{index}", row)
        got = [extractor.extract(f"out{index}") for index in range(len(job.outputs))]
        if any(code for code, _ in got):
            raise CannotRun("ncnn fails while it runs")
        return [np.array(row) for _, row in got]

    return Loaded(convert=convert, call=call)


def _mat(array: Any) -> Any:
    """Make one of ncnn's tensors, which have no batch axis."""
    ncnn = part("ncnn")

    plain = array.astype(np.int32 if array.dtype.kind in "iu" else np.float32)
    return ncnn.Mat(plain[0] if plain.ndim > 1 else plain).clone()


PEER = Peer(
    name="ncnn",
    extra="ncnn",
    packages={"ncnn": "ncnn", "pnnx": "pnnx"},
    precisions=("fp32",),
    unable={"int8": "its quantizer (ncnn2table, ncnn2int8) is in no pip package"},
    tools={"pnnx": "it comes with the pip package pnnx"},
    prepare=_prepare,
    start=_start,
)
