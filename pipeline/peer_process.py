"""Peers in processes of their own: found, asked to convert, and kept between the visits of a race.

A process whose turn it is not is stopped (SIGSTOP), so that threads of a runtime that spin between
inferences take no time from the others.
"""

from __future__ import annotations

import hashlib
import json
import os
import pkgutil
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import edgepress.pipeline.peers
from edgepress.calibration.base import Array
from edgepress.pipeline.cache import Cache, content_key
from edgepress.pipeline.peer_job import Task
from edgepress.pipeline.peers.base import CONVERSION_S, CannotRun
from edgepress.pipeline.prepare import UsageError

WORKER = Path(edgepress.pipeline.peers.__file__).with_name("_worker.py")
START_S, ANSWERS_S, VISIT_S = 300.0, 300.0, 120.0
_LOG_CHARACTERS = 300


@dataclass(frozen=True, kw_only=True)
class Installed:
    """A peer that is here.

    Attributes:
        name: of its file.
        python: the interpreter that has it.
        versions: of its packages.
        precisions: what it can make of a float model.
        unable: why not another one, by precision.
    """

    name: str
    python: str
    versions: Mapping[str, str]
    precisions: Sequence[str]
    unable: Mapping[str, str]


def peer_names() -> list[str]:
    """Every peer, by file name, sorted."""
    modules = pkgutil.iter_modules(edgepress.pipeline.peers.__path__)
    return sorted(m.name for m in modules if m.name != "base" and not m.name.startswith("_"))


def find_peer(name: str, python: str | None = None) -> Installed:
    """Find the interpreter that has a peer: this one, or else the one that is named.

    Raises:
        UsageError: neither has it; says what to install.
    """
    missing = ""
    candidates = [sys.executable, *([] if python is None else [python])]
    for candidate in candidates:
        try:
            found = _once([candidate, str(WORKER), "check", name], START_S)
        except CannotRun as error:
            raise UsageError(f"{candidate} cannot look for {name}: {error}.") from error
        if not found["missing"]:
            return Installed(
                name=name,
                python=candidate,
                versions=found["versions"],
                precisions=found["precisions"],
                unable=found["unable"],
            )
        missing = found["missing"]  # under the interpreter that was named, where one was
    raise UsageError(f"{missing}.")


def convert(peer: Installed, precision: str, task: Task, folder: Path, cache: Cache | None) -> None:
    """Fill a folder with what a peer makes of the model; converters' refusals are kept too.

    Raises:
        CannotRun: it cannot make anything of it.
    """
    key = content_key("peer", _code(peer.name), precision, dict(peer.versions), task.key)
    entry = None if cache is None else cache.get(key)
    if entry is None:
        refusal = _converted(peer, precision, task, folder)
        if refusal is not None:
            (folder / "refused.txt").write_text(refusal, "utf-8")
        if cache is not None:
            cache.put(key, lambda into: _copy(folder, into))
    else:
        _copy(entry, folder)
    if (folder / "refused.txt").exists():
        raise CannotRun((folder / "refused.txt").read_text("utf-8"))


def _code(name: str) -> str:
    """Hash the code that converts for a peer."""
    files = (WORKER.with_name(f"{name}.py"), WORKER.with_name("base.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _converted(peer: Installed, precision: str, task: Task, folder: Path) -> str | None:
    """Let a peer convert; return why it cannot, or None."""
    command = [peer.python, str(WORKER), "prepare", peer.name, str(task.job.folder), precision]
    try:
        _once([*command, str(folder)], CONVERSION_S + START_S)
    except CannotRun as error:
        return str(error)
    return None


def _copy(source: Path, into: Path) -> None:
    for file in source.iterdir():
        if file.is_file() and file.name != "entry.json":
            shutil.copyfile(file, into / file.name)


def _once(command: Sequence[str], limit_s: float) -> dict[str, Any]:
    """Start the worker for one answer. Raises CannotRun."""
    with tempfile.TemporaryDirectory(prefix="edgepress-") as temporary:
        process = _Process(command, Path(temporary) / "log")
        try:
            return process.answer(limit_s)
        finally:
            process.close()


class _Process:
    """A worker: requests go in as lines of JSON, answers come out."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._log = log
        with log.open("wb") as errors:
            try:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
                )
            except OSError as error:
                raise CannotRun(f"{command[0]} cannot be started: {error.strerror}") from error

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def ask(self, request: Mapping[str, Any], limit_s: float) -> dict[str, Any]:
        """Wake the process, send a request, wait for the answer, and stop the process again."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._ended() from error
        answer = self.answer(limit_s)
        self.stop()
        return answer

    def answer(self, limit_s: float) -> dict[str, Any]:
        """Read the next answer. Raises CannotRun where it is an error, or none comes in time."""
        assert self._process.stdout is not None
        late = threading.Event()

        def kill() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(limit_s, kill)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if late.is_set():
            raise CannotRun(f"no answer in {limit_s:g} s")
        if not line:
            raise self._ended()
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise CannotRun(message["error"])
        return message

    def stop(self) -> None:
        """Let it do nothing until it is asked; return when it does nothing."""
        self._signal(signal.SIGSTOP)
        # without taking the news from Popen, which wants to know of an exit itself
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    continue

    def _signal(self, number: int) -> None:
        if self._process.poll() is None:
            os.kill(self._process.pid, number)

    def _ended(self) -> CannotRun:
        code = self._process.wait()
        said = self._log.read_text("utf-8", "replace").strip().rpartition("\n")[2]
        return CannotRun(f"it ended with {code}: {said[:_LOG_CHARACTERS]}".rstrip(": "))


class Racer:
    """A peer with a model loaded, ready to be visited."""

    def __init__(self, peer: Installed, task: Task, model: Path, threads: int) -> None:
        """Load what `convert` made. Raises CannotRun."""
        self._folder = Path(tempfile.mkdtemp(prefix="edgepress-"))
        self._task = task
        self._cores: list[float] = []
        command = [peer.python, str(WORKER), "serve", peer.name]
        arguments = [str(task.job.folder), str(model), str(threads)]
        self._process = _Process([*command, *arguments], self._folder / "log")
        try:
            self._process.answer(START_S)
        except CannotRun:
            self.close()
            raise
        self._process.stop()

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def visit(self, seconds: float, runs: int) -> list[float]:
        """Return the times in ms of at least `runs` inferences and `seconds`. Raises CannotRun."""
        found = self._process.ask({"seconds": seconds, "runs": runs}, VISIT_S + seconds)
        self._cores.append(float(found["cores"]))
        samples: list[float] = found["samples_ms"]
        return samples

    @property
    def cores(self) -> float:
        """The cores that it kept busy: CPU time over time, the median over the visits."""
        return statistics.median(self._cores) if self._cores else 0.0

    def answers(self) -> dict[str, Array]:
        """Return the outputs of all tests, stacked, by name. Raises CannotRun."""
        path = self._folder / "answers.npz"
        self._process.ask({"answers": str(path)}, ANSWERS_S)
        with np.load(path) as data:
            return {name: data[name] for name in self._task.job.outputs}

    def close(self) -> None:
        """End the process."""
        self._process.close()
        shutil.rmtree(self._folder, ignore_errors=True)
