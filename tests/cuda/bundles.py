"""Bundles for a GPU, and the stand-in of a driver on which they run."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

QUICK = ("--seconds", "0", "--runs", "20", "--warmup", "0")
"""Options of a measurement whose times nobody looks at."""


class Bundle:
    """An exported bundle, and the environment in which it finds a driver."""

    def __init__(self, folder: Path, environment: Mapping[str, str], log: Path) -> None:
        self.folder = folder
        self.environment = dict(environment)
        self.log = log

    def start(
        self, arguments: Sequence[str], variables: Mapping[str, str], stdin: bytes = b""
    ) -> subprocess.CompletedProcess[bytes]:
        self.log.unlink(missing_ok=True)
        environment = {**os.environ, **self.environment, "CUDA_STUB_LOG": str(self.log)}
        return subprocess.run(
            [self.folder / "model", *arguments],
            input=stdin,
            capture_output=True,
            env={**environment, **variables},
            timeout=120,
            check=False,
        )

    def ask(self, *arguments: str, **variables: str) -> dict[str, Any]:
        """What a command prints that must succeed, say nothing, and give everything back."""
        result = self.start(arguments, variables)
        assert (result.returncode, result.stderr.decode()) == (0, "")
        assert self.left() == []
        document = json.loads(result.stdout)
        assert isinstance(document, dict)
        return document

    def fail(self, *arguments: str, **variables: str) -> tuple[int, str]:
        """Exit code and message of a command that must print nothing on stdout."""
        result = self.start(arguments, variables)
        assert result.stdout == b""
        return result.returncode, result.stderr.decode()

    def answer(self, samples: bytes) -> bytes:
        """What it answers to samples."""
        result = self.start(["--run", "-", "-"], {}, samples)
        assert (result.returncode, result.stderr) == (0, b"")
        return result.stdout

    def left(self) -> list[str]:
        """What the process did not give back to the driver."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in lines if line.startswith("left")]

    def called(self, function: str) -> int:
        return self.log.read_text().splitlines().count(function)
