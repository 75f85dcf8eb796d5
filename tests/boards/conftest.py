"""Small real bundles, and the command line that brings them to boards on loopback.

Every scenario of this folder ends in the bundle that was wanted or in the one that was there
before, which `installed` checks byte by byte.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgepress.pipeline.cache import Cache
from edgepress.pipeline.cli import main
from edgepress.pipeline.recipe import load_recipe
from edgepress.pipeline.run import Request, run
from edgepress.targets.load import load_target
from edgepress.targets.remote import board_store
from tests.graphs import net, random
from tests.loopback import QEMU_AARCH64, Board, Lab
from tests.targets.tiny import need

STAYS_HERE = ("graph.onnx", "evidence.json")
WIDTH = 1024  # of the hidden layer: the weights are most of the bytes
PATIENCE_S = 120
SSH_OVERHEAD_BYTES = 64 * 1024  # of a command line: logins, scripts, packets around data


@dataclass(frozen=True)
class Bundles:
    """Bundles of one small float model, each built when it is first asked for.

    Attributes:
        folder: where they lie, with `samples.npz`.
    """

    folder: Path

    @functools.cached_property
    def first(self) -> Path:
        """For raspberry-pi-4."""
        return self._build("first", "raspberry-pi-4")

    @functools.cached_property
    def second(self) -> Path:
        """The same with other weights."""
        return self._build("second", "raspberry-pi-4", seed=1)

    @functools.cached_property
    def dotprod(self) -> Path:
        """For raspberry-pi-5, whose bundles need asimddp."""
        return self._build("dotprod", "raspberry-pi-5")

    @functools.cached_property
    def armv7(self) -> Path:
        """For 32-bit Arm."""
        return self._build("armv7", "armv7-neon")

    @property
    def samples(self) -> Path:
        """Eight samples for the model."""
        return self.folder / "samples.npz"

    def model(self, bundle: Path) -> Path:
        """Return the model that a bundle was built from."""
        return self.folder / f"{bundle.name}.onnx"

    def _build(self, name: str, target: str, seed: int = 0) -> Path:
        board = load_target(target)
        need(board.compiler, board.compiler_package)
        need(board.emulator, "qemu-user")
        model = net(
            "(float[N,64] x) => (float[N,10] y)",
            "h = Gemm<transB=1>(x, w1, b) r = Relu(h) k = MatMul(r, w2) y = MatMul(k, w3)",
            {
                "w1": random(WIDTH, 64, seed=seed),
                "b": random(WIDTH, seed=seed),
                "w2": random(WIDTH, WIDTH, seed=seed),
                "w3": random(WIDTH, 10, seed=seed),
            },
        )
        ir.save(model, self.folder / f"{name}.onnx")
        request = Request(
            model=self.folder / f"{name}.onnx",
            target=board,
            recipe=load_recipe("none"),
            output=self.folder / name,
            check=False,
        )
        run(request, cache=Cache(self.folder / "cache"))
        return self.folder / name


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """Bundles of which no test changes a byte."""
    folder = tmp_path_factory.mktemp("bundles")
    np.savez(folder / "samples.npz", x=random(8, 64))
    return Bundles(folder)


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    """Copy a bundle, so that evidence or damage goes to the copy alone."""

    def make(bundle: Path) -> Path:
        return shutil.copytree(bundle, tmp_path / bundle.name)

    return make


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """What `--json` printed."""
        parsed = json.loads(self.out)
        assert isinstance(parsed, dict)
        return parsed


Edgepress = Callable[..., Ended]


@pytest.fixture
def edgepress(capsys: pytest.CaptureFixture[str]) -> Edgepress:
    """Run the command line in this process."""

    def call(*arguments: object) -> Ended:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return Ended(int(caught.value.code or 0), printed.out, printed.err)

    return call


@dataclass
class Running:
    """A command line in a process and a process group of its own.

    Attributes:
        process: of Python.
    """

    process: subprocess.Popen[str]

    def wait(self) -> Ended:
        """Wait until it has ended."""
        out, err = self.process.communicate(timeout=PATIENCE_S)
        return Ended(self.process.returncode, out, err)


@dataclass
class Processes:
    """Starts command lines as processes."""

    lab: Lab
    started: list[Running] = field(default_factory=list)

    def start(self, *arguments: object) -> Running:
        command = [sys.executable, "-m", "edgepress.pipeline.cli", *map(str, arguments)]
        process = subprocess.Popen(
            command,
            env={**os.environ, **self.lab.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(Running(process))
        return self.started[-1]


@pytest.fixture
def processes(lab: Lab) -> Iterator[Processes]:
    """Command lines on the lab's board, ended where a test left them running."""
    made = Processes(lab)
    yield made
    for running in made.started:
        running.process.kill()
        running.process.communicate()


@pytest.fixture
def board(lab: Lab) -> Board:
    """The board of the lab."""
    return lab.boards[0]


def wait_for(event: Callable[[], object], what: str) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + PATIENCE_S
    while not event():
        assert time.monotonic() < deadline, f"in vain: {what}"
        time.sleep(0.01)


def arrived_bytes(board: Board) -> int:
    """Bytes of the largest file that is under way on a board."""
    sizes = [0]
    for part in (board.home / "edgepress/.edgepress/incoming").glob("*.part"):
        with contextlib.suppress(FileNotFoundError):
            sizes.append(part.stat().st_size)
    return max(sizes)


def in_background(work: Callable[[], None]) -> threading.Thread:
    """Start a thread."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def when(event: Callable[[], object], what: str, act: Callable[[], None]) -> threading.Thread:
    """Start a thread that waits until something is so, and then does something."""

    def work() -> None:
        wait_for(event, what)
        act()

    return in_background(work)


def change_store(patch: pytest.MonkeyPatch, **defaults: float) -> None:
    """Give stores other defaults."""
    init = board_store.Store.__init__
    patch.setattr(init, "__kwdefaults__", {**(init.__kwdefaults__ or {}), **defaults})


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder that belongs on a board."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.relative_to(folder).as_posix() not in STAYS_HERE
    }


def sent_size(bundle: Path) -> int:
    """Bytes of the files of a bundle that belong on a board."""
    return sum((bundle / path).stat().st_size for path in digests(bundle))


def installed(place: Path) -> dict[str, str]:
    """SHA-256 of every file that a name on a board points to; it is one complete version.

    Checks SHA256SUMS, and that the name is a link to a version that is named after it.
    """
    sums = (place / "SHA256SUMS").read_bytes()
    lines = [line.split("  ", 1) for line in sums.decode().splitlines()]
    listed = {path: sha256 for sha256, path in lines}
    found = digests(place)
    assert found.pop("SHA256SUMS") == hashlib.sha256(sums).hexdigest()
    assert found == listed
    assert os.readlink(place) == f".edgepress/{hashlib.sha256(sums).hexdigest()[:16]}"  # noqa: PTH115
    assert os.access(place / "model", os.X_OK)
    return found


def remains(store: Path) -> list[str]:
    """What is left of a deployment that is over, in the folder `.edgepress` of a board."""
    names = ("incoming", "lock", "link.new", "previous.new", "aside")
    return [
        path.name
        for path in store.iterdir()
        if path.name in names or path.suffix == ".partial" or path.name.startswith("lock.")
    ]


@contextlib.contextmanager
def gate(board: Board, lab: Lab, at: str) -> Iterator[Path]:
    """Hold every model on a board that has an argument, until the block ends or frees it.

    Args:
        board: where.
        lab: of the board.
        at: the argument, such as `--selftest`.

    Yields:
        A file that appears where a model is held, with its process id; removing it frees it.
    """
    held, program = board.home / "held", board.home / "qemu-gate"
    program.write_text(
        "#!/bin/sh\n"
        f'case " $* " in *" {at} "*)\n'
        f'    echo $$ >"{held}.new"; mv "{held}.new" "{held}"\n'
        f'    while [ -e "{held}" ]; do sleep 0.05; done ;;\n'
        "esac\n"
        f'exec {" ".join(QEMU_AARCH64)} "$@"\n'
    )
    program.chmod(0o755)
    lab.write_devices(target="raspberry-pi-4", run_with=(str(program),))
    try:
        yield held
    finally:
        held.unlink(missing_ok=True)
        lab.write_devices(target="raspberry-pi-4", run_with=QEMU_AARCH64)


def lying_emulator(board: Board) -> Path:
    """Put a program on a board that runs models, but says that their selftests fail."""
    program = board.home / "qemu-liar"
    program.write_text(
        "#!/bin/sh\n"
        """case "$*" in *--selftest) echo '{"passed": false, "samples": 3}'; exit 1 ;; esac\n"""
        f'exec {" ".join(QEMU_AARCH64)} "$@"\n'
    )
    program.chmod(0o755)
    return program
