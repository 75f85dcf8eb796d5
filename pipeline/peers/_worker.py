"""Runs one peer in a process of its own, under any Python; started as a script.

`ROLE NAME …`, and answers in lines of JSON on stdout:
    check NAME                                 what is missing, versions, precisions
    prepare NAME JOB PRECISION INTO            convert and quantize
    serve NAME JOB MODEL THREADS               load, then one answer for every line of stdin:
        {"answers": FILE}                      the outputs of all tests, into an .npz
        {"seconds": S, "runs": N}              times of single inferences

The races' clocks are the same for all: one call with the inputs at hand, outputs as arrays.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

WARM_UP_SHARE, LONGEST_WARM_UP_S = 0.25, 0.1
Reply = Callable[[dict[str, Any]], None]


def _only_peers() -> None:
    """Make the files of this folder importable by their names, and nothing else of edgepress.

    This Python need not have edgepress, and its own `openvino` must not be our `openvino.py`.
    """
    folder = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != folder]
    for name in ("edgepress", "edgepress.pipeline", "edgepress.pipeline.peers"):
        module = types.ModuleType(name)
        module.__path__ = [str(folder)] if name.endswith("peers") else []
        sys.modules[name] = module


def _check(name: str) -> dict[str, Any]:
    peer = _peer(name)
    missing = peer.available()
    return {
        "missing": missing,
        "versions": {} if missing else peer.versions(),
        "precisions": list(peer.precisions),
        "unable": dict(peer.unable),
    }


def _prepare(name: str, job: str, precision: str, into: str) -> dict[str, Any]:
    from edgepress.pipeline.peers.base import read_job

    _peer(name).prepare(read_job(Path(job)), precision, Path(into))
    return {}


def _serve(reply: Reply, name: str, job_folder: str, model: str, threads: str) -> None:
    from edgepress.pipeline.peers.base import read_job

    job = read_job(Path(job_folder))
    loaded = _peer(name).start(job, Path(model), int(threads))
    feeds = job.samples("tests")
    native = loaded.convert(feeds[0])
    loaded.call(native)
    reply({})
    for line in sys.stdin:
        request = json.loads(line)
        if "answers" in request:
            rows = [_outputs(job.outputs, loaded.call(loaded.convert(feed))) for feed in feeds]
            stacked: dict[str, Any] = {k: np.stack([row[k] for row in rows]) for k in rows[0]}
            np.savez(request["answers"], **stacked)
            reply({})
        else:
            reply(_visit(lambda: loaded.call(native), request["seconds"], request["runs"]))


def _visit(call: Callable[[], Any], seconds: float, runs: int) -> dict[str, Any]:
    """Warm up, then run for at least `seconds` and `runs`."""
    clock = time.perf_counter
    until = clock() + min(WARM_UP_SHARE * seconds, LONGEST_WARM_UP_S)
    while clock() < until:
        call()
    samples_ms: list[float] = []
    cpu_s, begin = time.process_time(), clock()
    while clock() < begin + seconds or len(samples_ms) < runs:
        started = clock()
        call()
        samples_ms.append((clock() - started) * 1e3)
    cores = (time.process_time() - cpu_s) / (clock() - begin)
    return {"samples_ms": samples_ms, "cores": cores}


def _outputs(wanted: Any, got: Sequence[Any]) -> dict[str, Any]:
    """Name outputs and give them the model's shapes: some runtimes move channels last."""
    arrays = {}
    for (name, shape), array in zip(wanted.items(), got, strict=True):
        array = np.array(array)
        moved = array.ndim == len(shape) == 4 and array.shape != tuple(shape)
        arrays[name] = (np.moveaxis(array, -1, 1) if moved else array).reshape(shape)
    return arrays


def _peer(name: str) -> Any:
    return importlib.import_module(f"edgepress.pipeline.peers.{name}").PEER


def main(role: str, *arguments: str) -> None:
    """Play a role; whatever goes wrong is an answer too."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what runtimes print themselves goes to the log

    def reply(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    try:
        if role == "serve":
            _serve(reply, *arguments)
        else:
            reply(_check(*arguments) if role == "check" else _prepare(*arguments))
    except Exception as error:  # a runtime may raise anything
        traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0][:300]
        known = type(error).__name__ == "CannotRun"
        reply({"error": first if known else f"{type(error).__name__}: {first}"})
        answers.flush()
        os._exit(1)  # threads of a runtime may not end by themselves


if __name__ == "__main__":
    _only_peers()
    main(*sys.argv[1:])
