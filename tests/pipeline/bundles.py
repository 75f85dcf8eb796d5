"""A bundle for tests that need its form and not its code."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgepress.pipeline import snapshot
from edgepress.pipeline.bundle import Bundle, Manifest, write_manifest
from tests.graphs import net, random


def graph() -> ir.Model:
    return net("(float[1,4] x) => (float[1,3] y)", "y = MatMul(x, w)", {"w": random(4, 3)})


def manifest() -> Manifest:
    tensor = {"dtype": "float32", "scale": None, "zero_point": None}
    return Manifest(
        name="net",
        arithmetic="float",
        tool={"name": "edgepress", "version": "0"},
        toolchain={},
        source={"file": "net.onnx", "sha256": "0", "size_bytes": 100},
        recipe={"name": "none", "text": "schema = 1\n"},
        steps=[],
        target={"name": "native"},
        inputs=[tensor | {"name": "x", "shape": [1, 4]}],
        outputs=[tensor | {"name": "y", "shape": [1, 3]}],
        calibration=None,
        memory={"arena_bytes": 28, "workspace_bytes": 0, "weight_bytes": 48},
        weights=[],
        golden={"samples": 1, "reference": "onnxruntime", "tolerances": [1e-4]},
    )


def write(folder: Path) -> Bundle:
    folder.mkdir()
    (folder / "golden").mkdir()
    for name in ("model", "libmodel.so", "model.h", "weights.epw"):
        (folder / name).write_text(f"the bytes of {name}")
    (folder / "graph.onnx").write_bytes(snapshot.take(graph()).model)
    x = random(1, 4)
    (folder / "golden/0.in").write_bytes(x.tobytes())
    (folder / "golden/0.out").write_bytes(np.matmul(x, random(4, 3)).tobytes())
    return write_manifest(folder, manifest())


def evidence(**changes: Any) -> dict[str, Any]:
    """What a device said that passed, as `evidence.json` has it."""
    verdict = {"gate": "golden", "verdict": "pass", "value": 0.0, "limit": 0.0, "detail": "d"}
    return {
        "device": {"spec": "local"},
        "verdicts": [verdict],
        "outputs": {"samples": 1},
        "accuracy": None,
        "latency": None,
        "instructions": None,
        "trials": None,
        "passed": True,
        **changes,
    }
