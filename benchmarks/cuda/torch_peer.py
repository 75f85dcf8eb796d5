"""One model in PyTorch, in a process that stays: prepares its modes, then times them when asked.

    python3 torch_peer.py '{"model": "resnet18", "precision": "float16", …}'

Modes: `eager` is the model as it is; `graph` has its BatchNorm folded and is replayed as one CUDA
graph; `compiled` is the folded model through `torch.compile`. Requests and answers are JSON, a line
each, on stdin and stdout. The process ends when stdin does.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networks
import numpy as np
import torch

MODES = ("eager", "graph", "compiled")
WARM_UP_CALLS = 5
QUEUED_SECONDS, QUEUED_MOST = 0.03, 500


@dataclass(frozen=True)
class Task:
    """What is raced.

    Attributes:
        inputs: `name`, `dtype` and `shape` of each input.
        data: file with all inputs one behind another, as in `golden/0.in`; None for random ones.
        compile: mode of torch.compile, or "none".
        modes: of MODES, those to prepare.
        artifacts: file that keeps what was compiled for a later process, or None.
        lock: file that is locked while kernels are timed to choose among them, or None.
    """

    model: str
    precision: str
    batch: int
    inputs: list[dict[str, Any]]
    data: str | None = None
    device: str = "cuda"
    compile: str = "max-autotune"
    modes: tuple[str, ...] = MODES
    artifacts: str | None = None
    lock: str | None = None


def read_inputs(task: Task) -> tuple[torch.Tensor, ...]:
    """Return the inputs on the device, in the layout and type that PyTorch is fastest with."""
    raw = Path(task.data).read_bytes() if task.data else None
    at, found = 0, []
    random = np.random.default_rng(0)
    for end in task.inputs:
        dtype, shape = np.dtype(end["dtype"]), tuple(end["shape"])
        count = int(np.prod(shape))
        if raw is None:
            array = random.standard_normal(shape) if dtype.kind == "f" else np.ones(shape)
        else:
            array = np.frombuffer(raw, dtype, count, at).reshape(shape)
            at += count * dtype.itemsize
        tensor = torch.from_numpy(array.astype(dtype)).to(task.device)
        if tensor.is_floating_point():
            tensor = tensor.to(_dtype(task))
        if tensor.ndim == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        found.append(tensor)
    return tuple(found)


def _dtype(task: Task) -> torch.dtype:
    return torch.float16 if task.precision == "float16" else torch.float32


def configure(precision: str) -> None:
    """Let float32 products use TF32 or not, and cuDNN choose by measuring."""
    tf32 = precision == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True


def settled(model: torch.nn.Module, task: Task) -> torch.nn.Module:
    """Move a model to the device, in the precision and layout of the task."""
    model = model.to(task.device, _dtype(task))
    layout = torch.channels_last if task.model != "minilm" else torch.preserve_format
    return model.to(memory_format=layout)


class Peer:
    """The prepared modes: a call of each that takes no arguments and leaves its answer behind."""

    def __init__(self, task: Task) -> None:
        configure(task.precision)
        self.task = task
        self.model = networks.network(task.model)
        self.folded = networks.folded(copy.deepcopy(self.model))
        sizes = [(1, *end["shape"][1:]) for end in task.inputs]
        kinds = [np.dtype(end["dtype"]).kind for end in task.inputs]
        single = tuple(
            torch.randn(size) if kind == "f" else torch.ones(size, dtype=torch.int64)
            for size, kind in zip(sizes, kinds, strict=True)
        )
        self.macs = task.batch * networks.macs(self.model, single)
        self.model, self.folded = (settled(m, task) for m in (self.model, self.folded))
        self.inputs = read_inputs(task)
        self.calls: dict[str, Callable[[], Any]] = {}

    def prepare(self, mode: str) -> dict[str, Any]:
        """Make a mode ready; return how long that took and how far its answer is from eager's."""
        start = time.monotonic()
        call = {"eager": self._eager, "graph": self._graph, "compiled": self._compiled}[mode]()
        for _ in range(WARM_UP_CALLS):
            answer = call()
        self.synchronize()
        self.calls[mode] = call
        eager = self.model(*self.inputs)
        spread = float(eager.float().abs().max())
        error = float((answer.float() - eager.float()).abs().max()) / spread
        return {"seconds": time.monotonic() - start, "error": error}

    def _eager(self) -> Callable[[], Any]:
        return lambda: self.model(*self.inputs)

    def _graph(self) -> Callable[[], Any]:
        if self.task.device != "cuda":
            raise RuntimeError("a CUDA graph needs CUDA")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_CALLS):
                self.folded(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            answer = self.folded(*self.inputs)

        def replay() -> Any:
            graph.replay()
            return answer

        return replay

    def _compiled(self) -> Callable[[], Any]:
        if self.task.compile == "none":
            raise RuntimeError("not compiled")
        kept = Path(self.task.artifacts) if self.task.artifacts else None
        if kept and kept.exists():
            torch.compiler.load_cache_artifacts(kept.read_bytes())
        compiled = torch.compile(self.folded, mode=self.task.compile, dynamic=False)
        with turns(self.task.lock):
            for _ in range(WARM_UP_CALLS):
                compiled(*self.inputs)
            self.synchronize()
        if kept and not kept.exists():
            made = torch.compiler.save_cache_artifacts()
            if made is not None:
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_bytes(made[0])
        return lambda: compiled(*self.inputs)

    def synchronize(self) -> None:
        if self.task.device == "cuda":
            torch.cuda.synchronize()

    def run(self, mode: str, seconds: float, runs: int, warm_up_seconds: float) -> dict[str, Any]:
        """Time a mode: single inferences between events and on the clock, and many in a row.

        Returns `events_ms` and `wall_ms`, a list each, and `queued_ms`, a number: the time of each
        of many inferences of which none waits for the one before it to be answered.
        """
        call = self.calls[mode]
        until(warm_up_seconds, 3, lambda: (call(), self.synchronize()))
        events_ms: list[float] = []
        wall_ms: list[float] = []

        def once() -> None:
            before = time.perf_counter()
            finish = self.clock()
            call()
            events_ms.append(finish())
            wall_ms.append((time.perf_counter() - before) * 1e3)

        until(seconds, runs, once)
        typical_s = sorted(wall_ms)[len(wall_ms) // 2] / 1e3
        count = int(min(max(QUEUED_SECONDS / typical_s, 2), QUEUED_MOST))
        finish = self.clock()
        for _ in range(count):
            call()
        return {"events_ms": events_ms, "wall_ms": wall_ms, "queued_ms": finish() / count}

    def clock(self) -> Callable[[], float]:
        """Start a clock; what is returned waits for the device and tells the milliseconds."""
        if self.task.device != "cuda":
            begin = time.perf_counter()
            return lambda: (time.perf_counter() - begin) * 1e3
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()

        def finish() -> float:
            last.record()
            torch.cuda.synchronize()
            return float(first.elapsed_time(last))

        return finish


def until(seconds: float, runs: int, call: Callable[[], Any]) -> None:
    """Call for so long, and so many times at least."""
    end, done = time.monotonic() + seconds, 0
    while done < runs or time.monotonic() < end:
        call()
        done += 1


@contextlib.contextmanager
def turns(lock: str | None) -> Iterator[None]:
    """While kernels are compiled, let only one process at a time measure which is the fastest.

    Processes compile beside each other; on the GPU they would disturb each other's measurements.
    """
    patched = []
    if lock is not None:
        for owner, name in _measuring():
            old = owner.__dict__[name]
            wrapped = _locked(old.__func__ if isinstance(old, classmethod) else old, lock)
            setattr(owner, name, classmethod(wrapped) if isinstance(old, classmethod) else wrapped)
            patched.append((owner, name, old))
    try:
        yield
    finally:
        for owner, name, old in patched:
            setattr(owner, name, old)


def _measuring() -> Iterator[tuple[Any, str]]:
    """Yield the functions of this PyTorch that measure kernels; none where it has others."""
    with contextlib.suppress(ImportError, AttributeError):
        from torch._inductor.select_algorithm import AlgorithmSelectorCache

        if "benchmark_choices" in AlgorithmSelectorCache.__dict__:
            yield AlgorithmSelectorCache, "benchmark_choices"
    with contextlib.suppress(ImportError, AttributeError):
        from torch._inductor.runtime.triton_heuristics import CachingAutotuner

        if "benchmark_all_configs" in CachingAutotuner.__dict__:
            yield CachingAutotuner, "benchmark_all_configs"


def _locked(function: Callable[..., Any], lock: str) -> Callable[..., Any]:
    def locked(*arguments: Any, **options: Any) -> Any:
        with _turn(lock):
            return function(*arguments, **options)

    return locked


_THREADS, _DEPTH = threading.RLock(), [0]


@contextlib.contextmanager
def _turn(lock: str) -> Iterator[None]:
    """Hold the lock against other processes; what measures may call another that does."""
    with _THREADS, contextlib.ExitStack() as stack:
        if _DEPTH[0] == 0:
            file = stack.enter_context(Path(lock).open("a"))
            fcntl.flock(file, fcntl.LOCK_EX)
        _DEPTH[0] += 1
        try:
            yield
        finally:
            _DEPTH[0] -= 1


def serve(task: Task, say: Callable[[dict[str, Any]], None], requests: Iterator[str]) -> None:
    """Prepare all modes, say which are ready, and answer requests until there are none."""
    peer = Peer(task)
    skipped: dict[str, str] = {}
    modes: dict[str, dict[str, Any]] = {}
    for mode in task.modes:
        try:
            modes[mode] = peer.prepare(mode)
        except Exception as error:  # the other modes can still be raced
            skipped[mode] = f"{type(error).__name__}: {str(error).strip()[:300]}"
        say({"event": "mode", "mode": mode, **modes.get(mode, {"skipped": skipped.get(mode)})})
    say({"event": "ready", "modes": modes, "skipped": skipped, "macs": peer.macs})
    for line in requests:
        request = json.loads(line)
        try:
            say(peer.run(**request))
        except Exception as error:
            say({"failed": f"{type(error).__name__}: {str(error).strip()[:300]}"})


def lines_of_stdin() -> Iterator[str]:
    """Yield requests; the process ends with stdin, even while it compiles."""
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return iter(lines.get, "")


def main() -> None:
    """Serve one task."""
    requests = lines_of_stdin()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def say(document: dict[str, Any]) -> None:
        print(json.dumps(document), file=answers, flush=True)

    options = json.loads(sys.argv[1])
    if "modes" in options:
        options["modes"] = tuple(options["modes"])
    with torch.inference_mode():
        serve(Task(**options), say, requests)


if __name__ == "__main__":
    main()
