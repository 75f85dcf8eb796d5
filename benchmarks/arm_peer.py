"""Runs a model in another runtime, in the Python of an emulated board, for arm_instructions.py.

    python arm_peer.py onnxruntime|ncnn MODEL SAMPLE.npz

Writes to stderr before and after the second inference; the plugin that counts instructions prints
its counts then. One thread. ncnn's model is MODEL.param and MODEL.bin, in 32-bit floats throughout.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

Feeds = dict[str, Any]


def onnxruntime(model: str, feeds: Feeds) -> Callable[[], object]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feeds)


def ncnn(model: str, feeds: Feeds) -> Callable[[], object]:
    import ncnn as runtime

    net = runtime.Net()
    net.opt.num_threads = 1
    for flag in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage"):
        setattr(net.opt, f"use_{flag}", False)
    if net.load_param(f"{model}.param") or net.load_model(f"{model}.bin"):
        raise SystemExit("ncnn cannot load the model")
    matrices = []
    for feed in feeds.values():
        array = feed.astype(np.int32 if feed.dtype.kind == "i" else np.float32)
        matrices.append(runtime.Mat(np.ascontiguousarray(array[0])).clone())  # it knows no batch

    def call() -> object:
        extractor = net.create_extractor()
        for name, matrix in zip(net.input_names(), matrices, strict=True):
            extractor.input(name, matrix)
        return [extractor.extract(name)[1] for name in net.output_names()]

    return call


def main() -> None:
    runtime, model, sample = sys.argv[1:]
    feeds = dict(np.load(sample))
    call = (onnxruntime if runtime == "onnxruntime" else ncnn)(model, feeds)
    call()
    os.write(2, b"edgepress-start\n")
    call()
    os.write(2, b"edgepress-end\n")


if __name__ == "__main__":
    main()
