"""A model frozen as bytes, together with the calibrated ranges that ONNX has no place for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import onnx
import onnx_ir as ir

from edgepress.calibration.base import Range


@dataclass(frozen=True)
class Snapshot:
    """What the next pass sees of a model.

    Attributes:
        model: the serialised ModelProto; the same bytes for the same model.
        ranges: JSON of `{value name: [low, high]}`.
    """

    model: bytes
    ranges: str = "{}"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of both."""
        digest = hashlib.sha256(self.model)
        digest.update(self.ranges.encode())
        return digest.hexdigest()

    def load(self) -> ir.Model:
        """Return a new model with its ranges in `value.meta["range"]`."""
        model = ir.serde.deserialize_model(onnx.ModelProto.FromString(self.model))
        ranges = json.loads(self.ranges)
        for value in values(model):
            if value.name in ranges:
                value.meta["range"] = Range(*ranges[value.name])
        return model

    def write(self, folder: Path) -> None:
        """Write `model.onnx` and `ranges.json`."""
        (folder / "model.onnx").write_bytes(self.model)
        (folder / "ranges.json").write_text(self.ranges, "utf-8")


def take(model: ir.Model) -> Snapshot:
    """Freeze a model."""
    data = ir.to_proto(model).SerializeToString(deterministic=True)
    ranges = {
        value.name: [float(found.low), float(found.high)]
        for value in values(model)
        if (found := value.meta.get("range")) is not None
    }
    return Snapshot(data, json.dumps(ranges, sort_keys=True))


def read(folder: Path) -> Snapshot:
    """Read what `Snapshot.write` wrote."""
    ranges = (folder / "ranges.json").read_text("utf-8")
    return Snapshot((folder / "model.onnx").read_bytes(), ranges)


def same_graph(one: Snapshot, other: Snapshot) -> bool:
    """Tell whether two models differ in their metadata at most."""
    protos = [onnx.ModelProto.FromString(each.model) for each in (one, other)]
    for proto in protos:
        del proto.metadata_props[:]
    return bool(protos[0] == protos[1])


def values(model: ir.Model) -> Iterator[ir.Value]:
    """Yield every value of the main graph: inputs, constants, node outputs."""
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in model.graph:
        yield from node.outputs
