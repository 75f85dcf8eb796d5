"""From a compressed graph to the files of a bundle: lower, compile, export, golden, manifest."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir

from edgepress.calibration.base import Samples
from edgepress.passes.encode_huffman import is_coded
from edgepress.pipeline.bundle import Bundle, Manifest, write_manifest
from edgepress.pipeline.cache import Cache, code_version, content_key
from edgepress.pipeline.feeds import input_shapes, random_samples
from edgepress.pipeline.golden import COUNT, Golden, make_golden
from edgepress.pipeline.layer_facts import facts_version, layer_facts
from edgepress.pipeline.prepare import Prepared
from edgepress.pipeline.progress import Progress
from edgepress.pipeline.recipe import Recipe
from edgepress.pipeline.size_ledger import ledger_version, size_ledger
from edgepress.targets.base import Artifact, Target
from edgepress.targets.cuda.toolkit import cuda_compiler_version
from edgepress.targets.tile_files import TileSizes

ARTIFACT_FILES = ("model", "libmodel.so", "model.h", "weights.epw")


@dataclass(frozen=True, kw_only=True)
class Built:
    """A folder that is a whole bundle.

    Attributes:
        bundle: as read back.
        seconds: of each stage.
        cached: whether the compiled files came from the cache.
    """

    bundle: Bundle
    seconds: Mapping[str, float]
    cached: bool


def build(
    prepared: Prepared,
    recipe: Recipe,
    target: Target,
    folder: Path,
    *,
    tiles: Mapping[str, TileSizes] = MappingProxyType({}),
    cache: Cache | None = None,
    progress: Progress,
) -> Built:
    """Write a bundle into an empty folder. Raises TargetError.

    `tiles` are those that were found on the device; the manifest lists the ones that layers got.
    """
    model = prepared.compressed.load()
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", Path(prepared.source["file"]).stem) or "model"
    samples = prepared.evaluation or prepared.calibration or random_samples(model, COUNT)
    shapes = input_shapes(model) or {}
    feeds = [feed for feed, _ in zip(samples.feeds(shapes), range(COUNT), strict=False)]
    with progress.step("golden") as golden_clock:
        original = prepared.original if prepared.lossless else None
        golden = make_golden(prepared.compressed, original, feeds)
    with progress.step("compile") as compile_clock:
        compiled, cached = _compiled(
            model, prepared, target, folder, name, golden, tiles, cache, progress
        )
    artifact = compiled.artifact
    (folder / "graph.onnx").write_bytes(prepared.compressed.model)
    golden.write(folder)
    manifest = Manifest(
        name=name,
        arithmetic=golden.arithmetic,
        tool={"name": "edgepress", "version": importlib.metadata.version("edgepress")},
        toolchain=toolchain(target) | ({"tiles": compiled.tiles} if compiled.tiles else {}),
        source=prepared.source,
        recipe={"name": recipe.name, "text": recipe.text},
        steps=[record.facts() for record in prepared.steps],
        target=dataclasses.asdict(target),
        inputs=[describe(value) for value in model.graph.inputs],
        outputs=[describe(value) for value in model.graph.outputs],
        calibration=_samples_facts(prepared.calibration),
        training=_samples_facts(prepared.training),
        memory={
            "arena_bytes": artifact.arena_bytes,
            "workspace_bytes": artifact.workspace_bytes,
            "weight_bytes": artifact.weight_bytes,
        },
        weights=artifact.weights,
        golden={
            "samples": len(golden.feeds),
            "reference": golden.reference,
            "tolerances": list(golden.tolerances),
        },
        layers=compiled.layers,
        ledger=compiled.ledger,
    )
    bundle = write_manifest(folder, manifest)
    seconds = {"golden": golden_clock.seconds, "compile": compile_clock.seconds}
    return Built(bundle=bundle, seconds=seconds, cached=cached)


@dataclass(frozen=True, kw_only=True)
class _Compiled:
    """What the compiler made of a program, and what is known of that.

    Attributes:
        artifact: the files.
        tiles: the tuned tiles that layers got.
        layers: what `layer_facts` says.
        ledger: what `size_ledger` says.
    """

    artifact: Artifact
    tiles: dict[str, TileSizes]
    layers: list[dict[str, Any]]
    ledger: dict[str, Any]


def _compiled(
    model: ir.Model,
    prepared: Prepared,
    target: Target,
    folder: Path,
    name: str,
    golden: Golden,
    tiles: Mapping[str, TileSizes],
    cache: Cache | None,
    progress: Progress,
) -> tuple[_Compiled, bool]:
    """Compile into the folder, or take the files from the cache; the second tells which."""
    key = content_key(
        "artifact",
        code_version("edgepress.targets"),
        prepared.compressed.digest,
        dataclasses.asdict(target),
        toolchain(target),
        name,
        list(golden.tolerances),
        dict(tiles),
        facts_version(),
        ledger_version(),
    )
    entry = cache.get(key) if cache else None
    if entry is not None:
        for file in ARTIFACT_FILES:
            shutil.copy2(entry / file, folder / file)
        facts = json.loads((entry / "artifact.json").read_text("utf-8"))
        artifact = Artifact(folder=folder, **facts.pop("artifact"))
        return _Compiled(artifact=artifact, **facts), True
    from edgepress.targets.compile import compile_kernels
    from edgepress.targets.export import export
    from edgepress.targets.lowering.build import lower
    from edgepress.targets.tiling import Tiles

    asked = Tiles(tiles)
    program = lower(model, target, progress.update, asked)
    code = compile_kernels(program, target)
    artifact = export(
        program,
        code,
        target,
        folder,
        name=name,
        tolerances=golden.tolerances,
        coded=is_coded(model),
    )
    compiled = _Compiled(
        artifact=artifact,
        tiles=asked.used(),
        layers=layer_facts(program, model),
        ledger=size_ledger(program, model, artifact.weights),
    )
    facts = dataclasses.asdict(compiled)
    del facts["artifact"]["folder"]

    def fill(into: Path) -> None:
        for file in ARTIFACT_FILES:
            shutil.copy2(folder / file, into / file)
        (into / "artifact.json").write_text(json.dumps(facts), "utf-8")

    if cache:
        cache.put(key, fill)
    return compiled, False


def toolchain(target: Target) -> dict[str, str]:
    """Return the versions of everything that has a hand in the bytes of a bundle."""
    names = ("apache-tvm", "apache-tvm-ffi", "numpy", "onnx", "onnx-ir", "onnxruntime")
    versions = {name: importlib.metadata.version(name) for name in names}
    if target.is_cuda:
        versions["cuda"] = cuda_compiler_version()
    return {"python": platform.python_version(), "compiler": _compiler(target)} | versions


def _compiler(target: Target) -> str:
    try:
        done = subprocess.run(
            [target.compiler, "--version"], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return f"{target.compiler} (not found)"
    return done.stdout.partition("\n")[0]


def describe(value: ir.Value) -> dict[str, Any]:
    """Describe an input or output: how the C API passes it, and how the graph quantizes it."""
    scale = zero_point = None
    nodes = [use.node for use in value.uses() if use.node.op_type == "QuantizeLinear"]
    producer = value.producer()
    if producer is not None and producer.op_type == "DequantizeLinear":
        nodes = [producer]
    if len(nodes) == 1:
        scale, zero_point = (_scalar(given) for given in [*nodes[0].inputs, None][1:3])
    return {
        "name": value.name,
        "dtype": "float32" if value.dtype is None else value.dtype.numpy().name,
        "shape": [] if value.shape is None else [int(str(dim)) for dim in value.shape],
        "scale": scale,
        "zero_point": zero_point,
    }


def _scalar(value: ir.Value | None) -> float | int | None:
    tensor = None if value is None else value.const_value
    if tensor is None or tensor.size != 1:
        return None
    number: float | int = np.asarray(tensor.numpy()).item()
    return number


def _samples_facts(samples: Samples | None) -> dict[str, Any] | None:
    if samples is None:
        return None
    return {"samples": len(samples), "sha256": samples.sha256()}
