"""A folder of peers like the real one, with `fake` in it, which needs nothing but NumPy.

Its model is one MatMul: `fp32` computes it, `int8` rounds its inputs. Other precisions and the
environment variables `FAKE_…` make it go wrong.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgepress.calibration.base import Samples
from edgepress.pipeline import peer_process, snapshot
from edgepress.pipeline.peer_job import Task, make_task
from tests.graphs import net, random

FAKE = '''"""Multiplies by what it finds in the calibration samples' place."""
from __future__ import annotations
import importlib.util
import os
import time
from pathlib import Path
import numpy as np
from edgepress.pipeline.peers.base import CannotRun, Job, Loaded, Peer, run_tool

def prepare(job, precision, folder):
    with Path(os.environ["FAKE_LOG"]).open("a") as log:
        log.write(precision + "\\n")
    if precision == "int4":
        raise CannotRun("no four bits today")
    if precision == "int2":
        raise RuntimeError("two lines\\nof which one is enough")
    if precision == "tool":
        run_tool("faketool", folder=folder)
    (folder / "precision").write_text(precision)
    (folder / "samples").write_text(str(len(job.samples("calibration"))))

def start(job, folder, threads):
    if os.environ.get("FAKE_START") == "fails":
        raise CannotRun("it does not load")
    weights = np.load(os.environ["FAKE_WEIGHTS"])
    step = 0.05 if (folder / "precision").read_text() == "int8" else 0
    def call(x):
        if os.environ.get("FAKE_CALL") == "dies" and not hasattr(call, "first"):
            call.first = True
        elif os.environ.get("FAKE_CALL") == "dies":
            os.write(2, b"these are my last words\\n")
            os._exit(7)
        elif os.environ.get("FAKE_CALL") == "hangs":
            time.sleep(60)
        x = x.reshape(1, -1)
        return [(np.round(x / step) * step if step else x) @ weights]
    return Loaded(convert=lambda feed: feed["x"], call=call)

def seen():
    """Which parts of edgepress can be imported here."""
    names = ("edgepress.pipeline.peers.base", "edgepress.targets")
    found = []
    for name in names:
        try:
            found += [name] if importlib.util.find_spec(name) else []
        except ModuleNotFoundError:
            pass
    return found

class Fake(Peer):
    def versions(self):
        return {"fake": "1.2", "sees": ",".join(seen())}

PEER = Fake(
    name="fake",
    extra="fake",
    packages={m: "pip-" + m for m in os.environ.get("FAKE_PACKAGES", "").split()},
    precisions=tuple(os.environ.get("FAKE_PRECISIONS", "fp32 int8").split()),
    unable={"int1": "one bit is not enough"},
    tools={m: "get it somewhere" for m in os.environ.get("FAKE_TOOLS", "").split()},
    prepare=prepare,
    start=start,
)
'''
WEIGHTS = random(4, 3)


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str = "fake") -> Path:
    """Put the fake among the real peers; return the file that lists what it prepared."""
    peers = folder / "peers"
    peers.mkdir()
    for file in peer_process.WORKER.parent.glob("*.py"):
        shutil.copyfile(file, peers / file.name)
    (peers / f"{name}.py").write_text(FAKE.replace('"fake"', f'"{name}"'))
    log = folder / "prepared.txt"
    np.save(folder / "weights.npy", WEIGHTS)
    monkeypatch.setattr(peer_process, "WORKER", peers / "_worker.py")
    monkeypatch.setenv("FAKE_LOG", str(log))
    monkeypatch.setenv("FAKE_WEIGHTS", str(folder / "weights.npy"))
    return log


def model() -> ir.Model:
    """What the fake computes, with a batch that is not fixed."""
    return net("(float[N,4] x) => (float[N,3] y)", "y = MatMul(x, w)", {"w": WEIGHTS})


def fixed() -> snapshot.Snapshot:
    graph = net("(float[1,4] x) => (float[1,3] y)", "y = MatMul(x, w)", {"w": WEIGHTS})
    return snapshot.take(graph)


def task(folder: Path, calibration: Samples | None = None) -> Task:
    """A job for the fake, with five tests."""
    folder.mkdir(parents=True)
    tests = Samples(inputs={"x": random(5, 4)})
    return make_task(fixed(), folder, calibration=calibration, tests=tests)


def samples(seed: int = 3) -> Samples:
    rng = np.random.default_rng(seed)
    return Samples(inputs={"x": rng.standard_normal((7, 4)).astype(np.float32)})


def prepared(log: Path) -> Mapping[str, int]:
    """How often the fake was asked to prepare each precision."""
    words = log.read_text().split() if log.exists() else []
    return {word: words.count(word) for word in words}
