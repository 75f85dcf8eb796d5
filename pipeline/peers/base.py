"""What a peer is: another runtime that converts, quantizes, loads and runs a model.

A peer is one file in this folder, named as users write it (`openvino`), that defines `PEER`. It
runs in a process of its own, under whichever Python has the runtime installed, and edgepress need
not be installed there. So the files in this folder import nothing but the standard library, NumPy,
this file, and, inside functions, their runtime.

Errors::

    CannotRun            the peer cannot convert or run this model, and why
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Feed = dict[str, Array]
CONVERSION_S = 1800.0  # the slowest converter, that of LiteRT, needs ten minutes for a ResNet-18
_SHOWN_CHARACTERS = 200


class CannotRun(Exception):
    """The peer cannot convert or run this model, and why."""


@dataclass(frozen=True)
class Job:
    """A model for all peers, in a folder.

    Attributes:
        folder: holds `model.onnx` (float, fixed shapes, opset 17 where it can be had),
            `calibration.npz` and `tests.npz` (one array per input, samples on a new first axis).
        inputs: input name to shape and dtype, in order.
        outputs: output name to shape, in order.
        attends: whether it multiplies two computed tensors, as attention does.
        convolves: whether it has a convolution.
    """

    folder: Path
    inputs: Mapping[str, tuple[tuple[int, ...], str]]
    outputs: Mapping[str, tuple[int, ...]]
    attends: bool
    convolves: bool

    @property
    def model(self) -> Path:
        """The float model."""
        return self.folder / "model.onnx"

    def samples(self, name: str) -> list[Feed]:
        """Read the feeds of `calibration` or `tests`."""
        with np.load(self.folder / f"{name}.npz") as data:
            arrays = {key: data[key] for key in self.inputs}
        count = len(next(iter(arrays.values())))
        return [{key: array[i] for key, array in arrays.items()} for i in range(count)]

    def write(self) -> None:
        """Write what `read_job` reads, beside the files."""
        facts = {
            "inputs": {name: [list(shape), dtype] for name, (shape, dtype) in self.inputs.items()},
            "outputs": {name: list(shape) for name, shape in self.outputs.items()},
            "attends": self.attends,
            "convolves": self.convolves,
        }
        (self.folder / "job.json").write_text(json.dumps(facts), "utf-8")


def read_job(folder: Path) -> Job:
    """Read a job's description."""
    facts = json.loads((folder / "job.json").read_text("utf-8"))
    return Job(
        folder=folder,
        inputs={name: (tuple(shape), dtype) for name, (shape, dtype) in facts["inputs"].items()},
        outputs={name: tuple(shape) for name, shape in facts["outputs"].items()},
        attends=facts["attends"],
        convolves=facts["convolves"],
    )


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to run.

    Attributes:
        convert: turns a feed into the form that the runtime likes best; its time does not count.
        call: runs that; returns the outputs in the order of `Job.outputs`.
    """

    convert: Callable[[Feed], Any]
    call: Callable[[Any], Sequence[Any]]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A runtime.

    Attributes:
        name: as users write it.
        extra: the extra of edgepress that installs it.
        packages: what pip calls its parts, by the Python module to look for.
        precisions: what it can make of a float model, such as "fp32" and "int8".
        unable: why a precision that others have is not among them, by precision.
        tools: programs that convert for it, by name: how to install them.
        prepare: `(job, precision, folder)`: write a converted, quantized model into a folder.
        start: `(job, folder, threads)`: load what `prepare` wrote.
    """

    name: str
    extra: str
    packages: Mapping[str, str]
    precisions: tuple[str, ...]
    unable: Mapping[str, str]
    tools: Mapping[str, str]
    prepare: Callable[[Job, str, Path], None]
    start: Callable[[Job, Path, int], Loaded]

    def available(self) -> str | None:
        """Say what is missing under this Python and how to install it; None where nothing is."""
        missing = [p for module, p in self.packages.items() if not importlib.util.find_spec(module)]
        if missing:
            return (
                f"{self.name} needs {', '.join(missing)}, not installed for {sys.executable}: "
                f"pip install 'edgepress[{self.extra}]', or name a Python that has it with "
                "--peer-python"
            )
        for tool, how in self.tools.items():
            if find_tool(tool) is None:
                return f"{self.name} needs the program {tool}: {how}"
        return None

    def versions(self) -> dict[str, str]:
        """Return the versions of its packages."""
        return {package: importlib.metadata.version(package) for package in self.packages.values()}


def part(module: str) -> Any:
    """Import a part of a runtime: type checkers take `import openvino` in `openvino.py` for itself.

    It is called where a part is needed, since not every Python has them all.
    """
    return importlib.import_module(module)


def find_tool(name: str) -> str | None:
    """Find a converter: `$EDGEPRESS_NAME`, a file beside this Python, or one on the PATH."""
    if named := os.environ.get(f"EDGEPRESS_{name.upper()}"):
        return named if os.access(named, os.X_OK) else None
    beside = Path(sys.executable).parent / name  # not resolved: that of a venv is a link
    return str(beside) if os.access(beside, os.X_OK) else shutil.which(name)


def run_tool(name: str, *arguments: str, folder: Path) -> None:
    """Run a converter in a folder. Raises CannotRun with the line that tells most."""
    command = find_tool(name)
    if command is None:
        raise CannotRun(f"the program {name} is missing")
    # its own helpers, such as onnxsim, lie beside it
    path = os.pathsep.join([str(Path(command).parent), os.environ.get("PATH", "")])
    try:
        done = subprocess.run(
            [command, *arguments],
            cwd=folder,
            env=os.environ | {"PATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=CONVERSION_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CannotRun(f"{name} does not finish in {CONVERSION_S / 60:g} minutes") from None
    if done.returncode:
        raise CannotRun(f"{name} fails: {_telling_line(done.stdout.decode('utf-8', 'replace'))}")


def _telling_line(log: str) -> str:
    """Return the last line of a log that speaks of an error, or the last one."""
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["it says nothing"]
    return ([line for line in lines if "rror" in line] or lines)[-1][:_SHOWN_CHARACTERS]
