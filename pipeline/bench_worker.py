"""Times one model in onnxruntime, in a process of its own (`python -m`).

Arguments: model, `.npz` with one sample, threads, seconds, runs. Prints `{"samples_ms": […]}`.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import onnxruntime

WARM_UP_SHARE = 0.25


def main(model: str, sample: str, threads: str, seconds: str, runs: str) -> None:
    """Warm up, then run for at least `seconds` and `runs`, with onnxruntime's own best settings."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = int(threads), 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    with np.load(sample) as arrays:
        feeds = {name: arrays[name] for name in arrays.files}
    clock = time.perf_counter
    until = clock() + WARM_UP_SHARE * float(seconds)
    while clock() < until:
        session.run(None, feeds)
    samples_ms: list[float] = []
    until = clock() + float(seconds)
    while clock() < until or len(samples_ms) < int(runs):
        started = clock()
        session.run(None, feeds)
        samples_ms.append((clock() - started) * 1e3)
    json.dump({"samples_ms": samples_ms}, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
