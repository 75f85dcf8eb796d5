"""A device on which a command runs the executable: the commands of `model`, and what they print."""

from __future__ import annotations

import json
import math
import os
import platform
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgepress.targets import children
from edgepress.targets.base import DeviceFailed, Measurement
from edgepress.targets.program import Array

_START_S = 60
_SELFTEST_S = 1800
_SAMPLE_S = 60
# `model --bench` measures so often where it is disturbed; --mlperf 600 s and 64 inferences.
_ATTEMPTS = 3
_MLPERF_S = 600 + 64 * _SAMPLE_S
_CHUNK_BYTES = 64 * 2**20
# Whatever else runs on a machine, a longer warm-up does not make a profile's midmeans steadier.
_PROFILE = ("--profile", "--warmup", "0.5")


@dataclass(frozen=True)
class CommandDevice:
    """A device on which a command runs the executable.

    Attributes:
        name: name of the device.
        prefix: words of the command before the executable's path: none, or an emulator.
    """

    name: str
    prefix: tuple[str, ...] = ()

    @property
    def emulated(self) -> bool:
        """Whether a time on it means nothing: not on a real CPU."""
        return False

    @property
    def machine(self) -> str:
        """This machine: its name, and how many of its cores this process may use."""
        return f"{platform.node()}, {len(os.sched_getaffinity(0))} cores"

    def info(self, folder: Path) -> dict[str, Any]:
        """What `model --info` prints."""
        return self._json(folder, ["--info"], _START_S, ("inputs", "outputs"))

    def selftest(self, folder: Path) -> dict[str, Any]:
        """What `model --selftest` prints; `passed` is False where an output is off."""
        return self._json(folder, ["--selftest"], _SELFTEST_S, ("passed",), accept=(0, 1))

    def infer(self, folder: Path, feeds: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
        """Answer feeds, in processes that get some tens of megabytes each.

        Raises:
            ValueError: a feed lacks an input or has another one, or a dtype or shape is wrong.
        """
        info = self.info(folder)
        samples = [_sample_bytes(info["inputs"], feed, i) for i, feed in enumerate(feeds)]
        input_bytes = sum(int(tensor["bytes"]) for tensor in info["inputs"])
        chunk = max(1, _CHUNK_BYTES // max(1, input_bytes)) if input_bytes else 1
        answers: list[dict[str, Array]] = []
        for start in range(0, len(samples), chunk):
            part = samples[start : start + chunk]
            timeout_s = _START_S + _SAMPLE_S * len(part)
            data = self.run(folder, ["--run", "-", "-"], timeout_s, stdin=b"".join(part)).stdout
            answers += _split_answers(self.name, info["outputs"], data, len(part))
        return answers

    def bench(
        self,
        folder: Path,
        *,
        threads: int | None,
        seconds: float,
        runs: int,
        warm_up_seconds: float | None = None,
        cores: str | None = None,
        defended: bool = False,
        sustained_minutes: float | None = None,
        mlperf: bool = False,
    ) -> Measurement:
        """Measure single inferences with `model --bench`, raw samples included.

        Before that it warms up until times are steady, for `warm_up_seconds` at most. `cores`
        pins one thread to each of them: "big", "little", or a list such as "0,2-3". A `defended`
        measurement is made again where it was disturbed; the others are for comparisons, which
        have their own ways to see that.
        """
        keys = ("samples_ms", "threads", "device")
        command = ["--bench"] if defended else ["--bench", "--anyway"]
        if sustained_minutes is not None:
            command += ["--sustained", str(sustained_minutes)]
        if mlperf:
            command += ["--mlperf"]
        if warm_up_seconds is not None:
            command += ["--warmup", str(warm_up_seconds)]
        if cores is not None:
            command += ["--cores", cores]
        extra_s = 60 * (sustained_minutes or 0) + (_MLPERF_S if mlperf else 0)
        printed = self._measure(folder, command, threads, seconds, runs, keys, extra_s)
        intervals = printed.get("intervals_ms", {})
        return Measurement(
            samples_ms=tuple(float(ms) for ms in printed["samples_ms"]),
            threads=int(printed["threads"]),
            device={
                "name": self.name,
                "runs_per_sample": int(printed.get("runs_per_sample", 1)),
                "peak_memory_bytes": printed.get("peak_memory_bytes"),
                **({} if cores is None else {"cores": cores}),
                **printed["device"],
            },
            refused=tuple(printed.get("refused", ())),
            intervals_ms={name: pair and tuple(pair) for name, pair in intervals.items()},
            windows_ms=tuple(printed.get("windows_ms", ())),
            conditions=printed.get("conditions", {}),
            sustained=printed.get("sustained", []),
            mlperf=printed.get("mlperf"),
        )

    def profile(
        self, folder: Path, *, threads: int | None, seconds: float, runs: int
    ) -> list[float]:
        """Time in ms of every kernel call, with `model --profile`, in the order of the calls.

        A call's time is the mean of the middle half of its times in up to 1024 inferences after a
        warm-up: those that the system interrupted do not count.
        """
        printed = self._measure(folder, _PROFILE, threads, seconds, runs, ("calls", "runs"))
        return [float(call["midmean_ms"]) for call in printed["calls"]]

    def _measure(
        self,
        folder: Path,
        command: Sequence[str],
        threads: int | None,
        seconds: float,
        runs: int,
        keys: Sequence[str],
        extra_s: float = 0,
    ) -> dict[str, Any]:
        """Run a command that measures inferences, and parse what it prints.

        Args:
            folder: of the bundle.
            command: and its own options.
            threads: None leaves them to the executable.
            seconds: to measure at least.
            runs: inferences to measure at least.
            keys: of what it prints.
            extra_s: that it may take beyond `seconds` and `runs`.
        """
        arguments = [*command, "--seconds", str(seconds), "--runs", str(runs)]
        if threads is not None:
            arguments += ["--threads", str(threads)]
        timeout_s = _START_S + _ATTEMPTS * (seconds + runs * _SAMPLE_S) + extra_s
        return self._json(folder, arguments, timeout_s, keys)

    def run(
        self,
        folder: Path,
        arguments: Sequence[str],
        timeout_s: float,
        *,
        stdin: bytes = b"",
        accept: Sequence[int] = (0,),
    ) -> subprocess.CompletedProcess[bytes]:
        """Run the folder's executable; raise DeviceFailed unless it exits with a code of `accept`.

        Args:
            folder: holds `model`.
            arguments: of the executable.
            timeout_s: seconds after which it is ended.
            stdin: what it reads.
            accept: exit codes.
        """
        result = self.start(folder, arguments, timeout_s, stdin)
        what = f"model {' '.join(arguments)}"
        said = result.stderr.decode("utf-8", "replace").strip()[:2000]
        if result.returncode < 0:
            memory = ""
            if result.returncode == -signal.SIGKILL:
                memory = "That is how the system ends a program where memory runs out. "
            raise DeviceFailed(
                f"{self.name}: `{what}` was ended by {_signal_name(-result.returncode)}. "
                f"{memory}{said}".rstrip()
            )
        if result.returncode not in accept:
            raise DeviceFailed(f"{self.name}: `{what}` exited with {result.returncode}: {said}")
        return result

    def start(
        self, folder: Path, arguments: Sequence[str], timeout_s: float, stdin: bytes
    ) -> subprocess.CompletedProcess[bytes]:
        """Run the folder's executable, however it ends; raise DeviceFailed where it did not run."""
        command = [*self.prefix, str((folder / "model").resolve()), *arguments]
        try:
            return children.run(command, stdin, timeout_s)
        except subprocess.TimeoutExpired:
            what = f"model {' '.join(arguments)}"
            raise DeviceFailed(f"{self.name}: `{what}` did not end in {timeout_s:g} s.") from None
        except OSError as error:
            raise DeviceFailed(f"{self.name}: cannot start {command[0]}: {error}") from None

    def _json(
        self,
        folder: Path,
        arguments: Sequence[str],
        timeout_s: float,
        keys: Sequence[str],
        accept: Sequence[int] = (0,),
    ) -> dict[str, Any]:
        """Run the executable and parse what it prints: an object that has all `keys`."""
        result = self.run(folder, arguments, timeout_s, accept=accept)
        text = result.stdout.decode("utf-8", "replace")
        try:
            document = json.loads(text)
        except ValueError:
            document = None
        if not isinstance(document, dict) or not set(keys) <= set(document):
            lines = "\n".join(text.splitlines()[:5])[:500] or "nothing"
            said = result.stderr.decode("utf-8", "replace").strip()[:2000]
            raise DeviceFailed(
                f"{self.name}: `model {' '.join(arguments)}` should print a JSON object with "
                f"{', '.join(keys)}, but printed: {lines} {said}".rstrip()
            )
        return document


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _sample_bytes(inputs: Sequence[dict[str, Any]], feed: Mapping[str, Array], index: int) -> bytes:
    """Bytes of one sample, as `model --run` reads them."""
    names = [tensor["name"] for tensor in inputs]
    if set(names) != set(feed):
        raise ValueError(f"feed {index} has the inputs {sorted(feed)} instead of {sorted(names)}")
    parts = []
    for tensor in inputs:
        array = np.asarray(feed[tensor["name"]])
        dtype, shape = np.dtype(tensor["dtype"]), tuple(tensor["shape"])
        if array.dtype != dtype or array.shape != shape:
            raise ValueError(
                f"feed {index}: input {tensor['name']!r} is {array.dtype}{list(array.shape)} "
                f"instead of {dtype}{list(shape)}"
            )
        parts.append(array.astype(dtype.newbyteorder("<"), copy=False).tobytes())
    return b"".join(parts)


def _split_answers(
    device: str, outputs: Sequence[dict[str, Any]], data: bytes, count: int
) -> list[dict[str, Array]]:
    """Arrays of `count` samples from what `model --run` wrote."""
    wanted = count * sum(int(tensor["bytes"]) for tensor in outputs)
    if len(data) != wanted:
        raise DeviceFailed(f"{device}: `model --run` wrote {len(data)} bytes instead of {wanted}")
    answers = []
    at = 0
    for _ in range(count):
        answer: dict[str, Array] = {}
        for tensor in outputs:
            shape = tuple(tensor["shape"])
            dtype = np.dtype(tensor["dtype"])
            values = np.frombuffer(data, dtype.newbyteorder("<"), math.prod(shape), at)
            answer[tensor["name"]] = values.reshape(shape).astype(dtype)
            at += int(tensor["bytes"])
        answers.append(answer)
    return answers
