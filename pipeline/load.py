"""An ONNX file becomes an `onnx_ir.Model` that later stages can rely on, or is refused.

What a loaded model promises: every tensor is in memory, complete and free of NaN; every node and
value has a unique name; model-local functions are inlined; nodes are in execution order; every
operator is known to the installed onnx and works on plain tensors.

Errors::

    ModelError             the file cannot be used: what, where, what to do next
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
import onnx_ir as ir
import onnxruntime
from onnx_ir.passes.common import CheckerPass, InlinePass, RemoveUnusedOpsetsPass

from edgepress.pipeline._model_checks import (
    bad_weights,
    one_line,
    onnxruntime_runs,
    unsupported_parts,
)

OLDEST_OPSET = 7
STANDARD_DOMAINS = ("", "ai.onnx")

# onnx_ir logs what it cannot resolve; the same faults are raised here, with their names.
logging.getLogger("onnx_ir.serde").addFilter(lambda record: record.levelno >= logging.ERROR)


class ModelError(Exception):
    """The file cannot be used: what, where, what to do next."""


def load_model(path: Path) -> ir.Model:
    """Read an ONNX file and everything it refers to into memory.

    External data is read from the model's own folder only. Raises ModelError where the file is no
    ONNX model, is incomplete, leaves its folder, holds NaN weights, or uses what edgepress cannot
    compile; one message lists every such node.
    """
    proto = _parse(path)
    try:
        model = _model(path, proto)
        parts, bad = unsupported_parts(model), bad_weights(model)
    except ModelError:
        raise
    except Exception as error:  # a damaged file can hold anything
        raise ModelError(
            f"{path}: this ONNX model is inconsistent: {one_line(error)}. Export it again."
        ) from error
    if parts:
        raise ModelError(
            f"{path} cannot be compiled, {len(parts)} parts of it are not supported: "
            f"{'; '.join(parts)}. Export the model without them, or cut them off."
        )
    if bad:
        raise ModelError(f"{path}: bad weights: {'; '.join(bad)}. Export the trained model again.")
    try:
        CheckerPass()(model)
    except Exception as error:
        raise ModelError(
            f"{path}: the ONNX checker refuses this model: {one_line(error)}. Export it again."
        ) from error
    return model


def _model(path: Path, proto: onnx.ModelProto) -> ir.Model:
    """Turn the protobuf into a complete model: data read, functions inlined, all named."""
    _check_opset(path, proto)
    _check_names(path, proto)
    _read_external_data(path, proto)
    model = ir.from_proto(proto)
    _normalise_domains(model)
    _name_everything(model)  # inlining builds names from those of the callers
    if model.functions:
        model = InlinePass()(model).model
        model.functions.clear()  # what is left is never called
        _name_everything(model)
    model = RemoveUnusedOpsetsPass()(model).model
    model.graph.sort()
    return model


def model_sha256(path: Path) -> str:
    """Hash a model file and its external data.

    Without external data this is the file's own sha256. With it, it is the sha256 of the model's
    digest and of one line `digest location` per data file, sorted. Raises ModelError.
    """
    digest = hashlib.sha256(_bytes(path)).hexdigest()
    locations = {_external(tensor)["location"] for tensor in _external_tensors(_parse(path))}
    if not locations:
        return digest
    lines = [digest]
    for location in sorted(locations):
        with _inside(path, location).open("rb") as data:
            lines.append(f"{hashlib.file_digest(data, 'sha256').hexdigest()} {location}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _bytes(path: Path) -> bytes:
    """Read the file. Raises ModelError."""
    if path.is_dir():
        raise ModelError(f"{path} is a folder; name the .onnx file in it.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not content:
        raise ModelError(f"{path} is empty; download or export it again.")
    return content


def _parse(path: Path) -> onnx.ModelProto:
    """Parse the protobuf and see that it holds a graph. Raises ModelError."""
    proto = onnx.ModelProto()
    content = _bytes(path)
    try:
        proto.ParseFromString(content)
    except Exception as error:  # protobuf's DecodeError, which ships no types
        raise ModelError(
            f"{path} is not an ONNX model, or it is truncated: its bytes are no complete protobuf "
            "message. Download or export it again."
        ) from error
    if not proto.HasField("graph") or not proto.ir_version:
        raise ModelError(f"{path} is not an ONNX model: it holds no graph.")
    if not proto.opset_import:
        raise ModelError(f"{path} is truncated or no ONNX model: it names no operator set.")
    if not proto.graph.output:
        raise ModelError(f"{path} is truncated or of no use: its graph has no outputs.")
    return proto


def _check_opset(path: Path, proto: onnx.ModelProto) -> None:
    """Refuse operator sets that are too old, or newer than onnx and onnxruntime here know."""
    versions = [o.version for o in proto.opset_import if o.domain in STANDARD_DOMAINS]
    newest = onnx.defs.onnx_opset_version()
    if not versions:
        domains = ", ".join(sorted(o.domain for o in proto.opset_import))
        raise ModelError(f"{path} uses only the operator domains {domains}, none is supported.")
    if max(versions) > newest:
        raise ModelError(
            f"{path} uses opset {max(versions)}; onnx {onnx.__version__} here knows up to "
            f"{newest}. Upgrade onnx, or export the model with an older opset."
        )
    if min(versions) < OLDEST_OPSET:
        raise ModelError(
            f"{path} uses opset {min(versions)}; {OLDEST_OPSET} is the oldest supported. Convert "
            "it with onnx.version_converter, or export it again."
        )
    if not onnxruntime_runs(max(versions), proto.ir_version):
        raise ModelError(
            f"{path} uses opset {max(versions)} and IR version {proto.ir_version}; onnxruntime "
            f"{onnxruntime.__version__} here, the reference, does not run such models. "
            "Upgrade onnxruntime, or export the model with an older opset."
        )


def _check_names(path: Path, proto: onnx.ModelProto) -> None:
    """Refuse inputs and outputs that make no sense, and values that are written twice or never."""
    graph = proto.graph
    inputs = [value.name for value in graph.input]
    written = [name for node in graph.node for name in node.output if name]
    tensors = [tensor.name for tensor in graph.initializer]
    if not set(inputs) - set(tensors):
        raise ModelError(f"{path}: the graph has no inputs, so there is nothing to run.")
    if again := _repeated([value.name for value in graph.output]):
        raise ModelError(
            f"{path}: outputs listed more than once: {_listed(again)}. Put an Identity between."
        )
    twice = _repeated(inputs + written) | _repeated(tensors + written)
    if twice:
        raise ModelError(f"{path}: written more than once: {_listed(twice)}. Export it again.")
    sparse = {tensor.values.name for tensor in graph.sparse_initializer}
    if sparse:
        raise ModelError(f"{path}: sparse weights are not supported: {_listed(sparse)}.")
    known = {*inputs, *written, *tensors}
    missing = {name for node in graph.node for name in node.input if name} - known
    missing |= {output.name for output in graph.output} - known
    if missing:
        raise ModelError(
            f"{path}: read, but nothing writes them: {_listed(missing)}. The file was cut badly or "
            "is damaged; export it again."
        )


def _tensors(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor, those in attributes and subgraphs included."""
    if isinstance(graph, onnx.GraphProto):
        yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for subgraph in (
                *([attribute.g] if attribute.HasField("g") else []),
                *attribute.graphs,
            ):
                yield from _tensors(subgraph)


def _external_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield the tensors whose bytes lie in other files."""
    for graph in (proto.graph, *proto.functions):
        for tensor in _tensors(graph):
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                yield tensor


def _external(tensor: onnx.TensorProto) -> dict[str, str]:
    """Return `location` and, where given, `offset` and `length`."""
    return {"location": ""} | {entry.key: entry.value for entry in tensor.external_data}


def _inside(path: Path, location: str) -> Path:
    """Return the data file at this location in the model's folder. Raises ModelError."""
    folder = path.parent
    posix, windows = PurePosixPath(location), PureWindowsPath(location)
    leaves = posix.is_absolute() or windows.drive or windows.root or ".." in windows.parts
    if not leaves and "\0" not in location:
        # A link may point elsewhere in the folder, not out of it.
        leaves = not (folder / location).resolve().is_relative_to(folder.resolve())
    if leaves or not location or "\0" in location:
        raise ModelError(
            f"{path}: its external data {location!r} lies outside the model's own folder, which is "
            "refused. Put the data beside the model and save it with a plain file name."
        )
    if not (folder / location).is_file():
        raise ModelError(
            f"{path}: its external data file {location!r} is missing. Copy it into {folder}."
        )
    return folder / location


def _read_external_data(path: Path, proto: onnx.ModelProto) -> None:
    """Replace references to files by the bytes. Raises ModelError."""
    for tensor in _external_tensors(proto):
        entry = _external(tensor)
        data = _inside(path, entry["location"])
        size = data.stat().st_size
        try:
            offset = int(entry.get("offset") or 0)
            length = int(entry.get("length") or max(size - offset, 0))
        except ValueError as error:
            raise ModelError(
                f"{path}: tensor {tensor.name!r} has a bad offset or length: {entry}."
            ) from error
        if offset < 0 or length < 0 or offset + length > size:
            raise ModelError(
                f"{path}: tensor {tensor.name!r} needs bytes {offset} to {offset + length} of "
                f"{entry['location']!r}, which has {size}. The data file is truncated or belongs "
                "to another model; copy it again."
            )
        with data.open("rb") as file:
            file.seek(offset)
            tensor.raw_data = file.read(length)
        tensor.ClearField("external_data")
        tensor.data_location = onnx.TensorProto.DEFAULT


def _graphs(model: ir.Model) -> list[ir.Graph]:
    """Return the main graph and the bodies of functions."""
    return [model.graph, *(function.graph for function in model.functions.values())]


def _normalise_domains(model: ir.Model) -> None:
    """Spell the standard domain "" everywhere, as most exporters do."""
    for graph in _graphs(model):
        if "ai.onnx" in graph.opset_imports:
            version = graph.opset_imports.pop("ai.onnx")
            graph.opset_imports.setdefault("", version)


def _name_everything(model: ir.Model) -> None:
    """Give every node and value a unique name; names that are unique already stay."""
    graphs = _graphs(model)
    given = {node.name for graph in graphs for node in graph if node.name}
    taken: set[str] = set()
    for graph in graphs:
        for index, node in enumerate(graph):
            if node.name and node.name not in taken:
                taken.add(node.name)
                continue
            name = stem = node.name or f"{node.op_type}_{index}"
            suffix = 0
            while name in taken | given:
                suffix += 1
                name = f"{stem}_{suffix}"
            taken.add(name)
            node.name = name
    for graph in graphs:
        values = {v.name for node in graph for v in node.outputs} | {v.name for v in graph.inputs}
        values |= set(graph.initializers)
        for node in graph:
            used = [i for i, value in enumerate(node.outputs) if value.name]
            node.resize_outputs(max(used, default=0) + 1)
            for index, value in enumerate(node.outputs):
                if not value.name:
                    name = f"{node.name}_output_{index}"
                    while name in values:
                        name += "_"
                    values.add(name)
                    value.name = name


def _repeated(names: list[str]) -> set[str]:
    """Return the names that occur twice."""
    seen: set[str] = set()
    return {name for name in names if name in seen or seen.add(name)}  # type: ignore[func-returns-value]


def _listed(names: set[str]) -> str:
    """Quote names for a message."""
    return ", ".join(repr(name) for name in sorted(names))
