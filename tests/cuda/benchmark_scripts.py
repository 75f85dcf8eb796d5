"""The scripts of benchmarks/cuda, and what they are given in tests."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(__file__).parent.parent.parent / "benchmarks/cuda"
MODULES = tuple(path.stem for path in FOLDER.glob("*.py"))
Load = Callable[[str], ModuleType]


@contextlib.contextmanager
def scripts() -> Iterator[Load]:
    """Yield what imports one: the benchmarks are no package, and their files import each other."""
    before = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(FOLDER))
        for name in MODULES:
            sys.modules.pop(name, None)
        sys.modules.update(before)


def fake_bundle(folder: Path, model: str, weights: bytes = b"weights") -> None:
    (folder / "golden").mkdir(parents=True)
    (folder / "model").write_text(model)
    (folder / "model").chmod(0o755)
    (folder / "weights.epw").write_bytes(weights)
    (folder / "graph.onnx").write_bytes(b"stays")
    for end in ("in", "out"):
        (folder / f"golden/0.{end}").write_bytes(end.encode())


def a_row(name: str, batch: int = 1, macs: int = 1000) -> dict[str, Any]:
    model, precision = name.split("-")
    inputs = [{"name": "x", "dtype": "float32", "shape": [batch, 2]}]
    facts = {"model": model, "precision": precision, "batch": batch, "macs": macs}
    return {"name": f"{name}-b{batch}", "inputs": inputs, **facts}
