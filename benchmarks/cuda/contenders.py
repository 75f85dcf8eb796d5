"""Who races: a bundle's own executable, and a process that holds the model in PyTorch."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

OURS = "edgepress"
VISIT_LIMIT_S = 60.0
Visit = dict[str, Any]  # events_ms, and what else was measured


class ContenderFailed(Exception):
    """Why a contender cannot be raced."""


def run_bundle(folder: Path, *options: str, limit_s: float = VISIT_LIMIT_S) -> dict[str, Any]:
    """Run a command of a bundle's executable and return what it prints."""
    command = [str(folder / "model"), *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ContenderFailed(f"{options[0]}: {error}") from error
    if done.returncode:
        said = f"{done.stderr.strip()} {done.stdout.strip()}".strip()[:600]
        raise ContenderFailed(f"{options[0]} ended with {done.returncode}: {said}")
    try:
        found: dict[str, Any] = json.loads(done.stdout)
    except ValueError as error:
        raise ContenderFailed(f"{options[0]} printed no JSON: {done.stdout[:100]!r}") from error
    return found


def visit_bundle(folder: Path, seconds: float, runs: int, warm_up_seconds: float) -> Visit:
    """Time a bundle in a process of its own."""
    found = run_bundle(
        folder, "--bench", "--anyway", "--seconds", str(seconds), "--runs", str(runs),
        "--warmup", str(warm_up_seconds),
    )  # fmt: skip
    return {"events_ms": found["samples_ms"]}


@dataclass
class Worker:
    """A process that prepares modes and times them when asked, over lines of JSON.

    Attributes:
        ready: what it said when all modes were prepared, or None.
        told: the modes that it has told of so far.
    """

    command: list[str]
    environment: dict[str, str]
    log: Path
    ready: dict[str, Any] | None = None
    told: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lines: queue.Queue[str | None] = queue.Queue()
        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | self.environment,
                process_group=0,  # it starts compilers of its own, which end with it
            )
        assert self._process.stdout is not None
        self._reader = threading.Thread(
            target=self._read, args=(self._process.stdout,), daemon=True
        )
        self._reader.start()

    def _read(self, stdout: IO[str]) -> None:
        with stdout:
            for line in stdout:
                self._lines.put(line)
        self._lines.put(None)

    def wait_ready(self, until: float) -> bool:
        """Wait until it is ready, at most until that time of `time.monotonic`. It may fail."""
        while self.ready is None:
            try:
                document = self._next(until - time.monotonic())
            except TimeoutError:
                return False
            if document.get("event") == "ready":
                self.ready = document
            else:
                self.told.append(document)
        return True

    def visit(self, mode: str, seconds: float, runs: int, warm_up_seconds: float) -> Visit:
        """Time one of its modes."""
        request = {
            "mode": mode,
            "seconds": seconds,
            "runs": runs,
            "warm_up_seconds": warm_up_seconds,
        }
        assert self._process.stdin is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
        except OSError as error:
            raise ContenderFailed(f"{mode}: the process is gone, see {self.log.name}") from error
        try:
            found = self._next(VISIT_LIMIT_S)
        except TimeoutError as error:
            raise ContenderFailed(f"{mode}: no answer in {VISIT_LIMIT_S:.0f} s") from error
        if "failed" in found:
            raise ContenderFailed(f"{mode}: {found['failed']}")
        return found

    def close(self) -> None:
        """End it, and whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # there may be a request that nobody read
            self._process.stdin.close()

    def _next(self, seconds: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=max(seconds, 0))
        except queue.Empty:
            raise TimeoutError from None
        if line is None:
            raise ContenderFailed(f"the process ended early, see {self.log.name}")
        document: dict[str, Any] = json.loads(line)
        return document


def torch_worker(
    row: dict[str, Any],
    precision: str,
    compile_mode: str,
    bundles: Path,
    work: Path,
    device: str = "cuda",
    threads: int = 8,
    modes: tuple[str, ...] = ("eager", "graph", "compiled"),
) -> Worker:
    """Start the process that holds a row's model in PyTorch.

    What it compiles is kept in WORK/artifacts, and found there by a later process.
    """
    name = f"{row['model']}-{precision}-b{row['batch']}"
    task = {
        "model": row["model"],
        "precision": precision,
        "batch": row["batch"],
        "inputs": row["inputs"],
        "data": str(bundles / row["name"] / "golden/0.in"),
        "device": device,
        "compile": compile_mode,
        "modes": modes,
        "artifacts": str(work / "artifacts" / f"{name}.{compile_mode}"),
        "lock": str(work / "lock"),
    }
    environment = {
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": str(threads),
        "OMP_NUM_THREADS": "2",
    }
    script = Path(__file__).with_name("torch_peer.py")
    command = [sys.executable, str(script), json.dumps(task)]
    return Worker(command, environment, work / f"{name}.log")
