"""A bundle: a folder whose every byte its manifest accounts for.

Reading fails closed: a file that is not listed, a missing one, a changed byte, a symbolic link, an
unknown key or a newer schema is refused. `docs/bundle.md` describes every field.

Errors::

    BundleError          what is wrong with which file
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgepress.pipeline.cache import file_sha256
from edgepress.pipeline.output import cannot_write

SCHEMA = 1
ROLES = {
    "model": "executable",
    "libmodel.so": "library",
    "model.h": "header",
    "weights.epw": "weights",
    "graph.onnx": "graph",
}
GOLDEN = re.compile(r"golden/(0|[1-9]\d*)\.(in|out)")
ARITHMETIC = ("float", "integer", "mixed")
OPTIONAL = ("layers", "ledger", "training")  # bundles of older versions have none
MAX_JSON_BYTES = 64 << 20


class BundleError(Exception):
    """A folder that is no bundle, or not the one that was written."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is known of a bundle when it is built. The same inputs give the same manifest.

    Attributes:
        schema: version of this format.
        name: the model's name.
        arithmetic: `integer` where the outputs are exact, `float`, or `mixed`.
        tool: `{"name", "version"}` of edgepress.
        toolchain: versions of what built the bundle.
        source: file, sha256, content_sha256, opset, parameters, macs, size_bytes of the model.
        recipe: `{"name", "text"}`, verbatim.
        steps: one record per pass.
        target: the fields of the target.
        inputs: name, dtype, shape, scale, zero_point of each, in order.
        outputs: likewise.
        calibration: `{"samples", "sha256"}`, or None.
        training: likewise of the training samples.
        memory: arena_bytes, workspace_bytes, weight_bytes.
        weights: per constant: name, dtype, shape, codec, raw_bytes, encoded_bytes, sha256.
        golden: `{"samples", "source", "reference", "tolerances"}`.
        files: path, role, size_bytes, sha256 of every other file.
        layers: per layer what `layer_facts` says; empty where the bundle is older than that.
        ledger: what `size_ledger` says of the weights; empty where the bundle is older than that.
    """

    schema: int = SCHEMA
    name: str
    arithmetic: str
    tool: dict[str, Any]
    toolchain: dict[str, Any]
    source: dict[str, Any]
    recipe: dict[str, Any]
    steps: list[dict[str, Any]]
    target: dict[str, Any]
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    calibration: dict[str, Any] | None
    memory: dict[str, Any]
    weights: list[dict[str, Any]]
    golden: dict[str, Any]
    files: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    ledger: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle whose every byte was checked.

    Attributes:
        folder: where it lies.
        manifest: what it was built from and of.
        manifest_sha256: hash of `manifest.json`.
        evidence: what was measured on a device, or None.
    """

    folder: Path
    manifest: Manifest
    manifest_sha256: str
    evidence: dict[str, Any] | None = None

    @property
    def deployed_bytes(self) -> int:
        """Bytes of the executable and the coded weights: what has to be on the board."""
        deployed = ("executable", "weights")
        return sum(f["size_bytes"] for f in self.manifest.files if f["role"] in deployed)

    @property
    def has_coded_weights(self) -> bool:
        """Whether the weights are decoded when the model is loaded."""
        return any(row["codec"] != "raw" for row in self.manifest.weights)


def write_manifest(folder: Path, manifest: Manifest) -> Bundle:
    """List every file of a folder in its manifest and write that. Raises BundleError."""
    files = []
    for path in _walk(folder):
        if path in ("manifest.json", "evidence.json"):
            continue
        role = _role(path)
        if role is None:
            raise BundleError(f"{folder / path} has no place in a bundle.")
        file = folder / path
        facts = {"size_bytes": file.stat().st_size, "sha256": file_sha256(file)}
        files.append({"path": path, "role": role, **facts})
    manifest = dataclasses.replace(manifest, files=files)
    text = json.dumps(dataclasses.asdict(manifest), indent=1, sort_keys=True, allow_nan=False)
    (folder / "manifest.json").write_text(text + "\n", "utf-8")
    return read_bundle(folder)


def write_evidence(bundle: Bundle, evidence: dict[str, Any]) -> Bundle:
    """Replace `evidence.json` in one step. Raises OutputError."""
    evidence = {"schema": SCHEMA, "manifest_sha256": bundle.manifest_sha256, **evidence}
    text = json.dumps(evidence, sort_keys=True, allow_nan=False)
    # beside the bundle, since a stray file inside would make it invalid
    folder = bundle.folder.absolute()
    temporary = folder.parent / f".{folder.name}.evidence-{os.getpid()}"
    try:
        temporary.write_text(text + "\n", "utf-8")
        temporary.replace(folder / "evidence.json")
    except OSError as error:
        raise cannot_write(bundle.folder / "evidence.json", error) from error
    finally:
        temporary.unlink(missing_ok=True)
    return dataclasses.replace(bundle, evidence=evidence)


def read_bundle(folder: Path) -> Bundle:
    """Read a bundle and check every byte of it. Raises BundleError."""
    if not folder.is_dir():
        raise BundleError(f"{folder} is not a folder; give a bundle that `edgepress run` wrote.")
    if not (folder / "manifest.json").is_file():
        raise BundleError(
            f"{folder} has no manifest.json; give a bundle that `edgepress run` wrote."
        )
    found = _walk(folder)
    manifest = _read_manifest(folder / "manifest.json")
    listed = {file["path"]: file for file in manifest.files}
    if len(listed) != len(manifest.files):
        raise BundleError(f"{folder / 'manifest.json'} lists a file twice; build the bundle again.")
    for path, file in listed.items():
        if _role(path) != file["role"]:
            raise BundleError(f"{folder / path}: no such file or role belongs in a bundle.")
        if path not in found:
            raise _changed(folder / path, "is missing")
        if (folder / path).stat().st_size != file["size_bytes"]:
            raise _changed(folder / path, "has another size than the manifest says")
        if file_sha256(folder / path) != file["sha256"]:
            raise _changed(folder / path, "has other bytes than the manifest says")
    for path in found:
        if path not in listed and path not in ("manifest.json", "evidence.json"):
            raise BundleError(
                f"{folder / path} is not listed in the manifest; remove it if you put it there."
            )
    for path, role in ROLES.items():
        if path not in listed:
            raise BundleError(f"{folder} has no {role} ({path}); build the bundle again.")
    _check_golden(folder, manifest, listed)
    digest = file_sha256(folder / "manifest.json")
    evidence = None
    if "evidence.json" in found:
        evidence = _read_evidence(folder / "evidence.json", digest)
    return Bundle(folder=folder, manifest=manifest, manifest_sha256=digest, evidence=evidence)


def _read_manifest(path: Path) -> Manifest:
    data = _read_json(path)
    _check_schema(path, data)
    hints = {item.name: str(item.type).partition("[")[0] for item in dataclasses.fields(Manifest)}
    kinds: dict[str, Any] = {"int": int, "str": str, "dict": dict, "list": list}
    for key in data:
        if key not in hints:
            raise BundleError(f"{path}: unknown key {key!r}; update edgepress.")
    for key, kind in hints.items():
        if key not in data and key in OPTIONAL:
            continue
        if key not in data:
            raise BundleError(f"{path}: {key!r} is missing; build the bundle again.")
        optional = key in ("calibration", "training") and data[key] is None
        if not optional and type(data[key]) is not kinds[kind]:
            raise BundleError(f"{path}: {key!r} is not of type {kind}; build the bundle again.")
    manifest = Manifest(**data)
    if manifest.arithmetic not in ARITHMETIC:
        raise BundleError(f"{path}: unknown arithmetic {manifest.arithmetic!r}; update edgepress.")
    wanted = {"path": str, "role": str, "size_bytes": int, "sha256": str}
    for file in manifest.files:
        if not isinstance(file, dict) or {k: type(v) for k, v in file.items()} != wanted:
            raise BundleError(f"{path}: an entry of 'files' is malformed; build the bundle again.")
    for tensor in (*manifest.inputs, *manifest.outputs):
        if not isinstance(tensor, dict) or not {"name", "dtype", "shape"} <= tensor.keys():
            raise BundleError(f"{path}: an input or output is malformed; build the bundle again.")
    return manifest


def _read_evidence(path: Path, manifest_sha256: str) -> dict[str, Any]:
    data = _read_json(path)
    _check_schema(path, data)
    if data.get("manifest_sha256") != manifest_sha256:
        raise BundleError(f"{path} belongs to another build; remove it and run `edgepress verify`.")
    return data


def _check_golden(folder: Path, manifest: Manifest, listed: dict[str, Any]) -> None:
    count = manifest.golden.get("samples")
    if type(count) is not int or count < 1:
        raise BundleError(f"{folder} has no golden samples; build the bundle again.")
    wanted = {f"golden/{i}.{kind}" for i in range(count) for kind in ("in", "out")}
    if wanted != {path for path in listed if path.startswith("golden/")}:
        raise BundleError(f"{folder}: the golden files are not those of the manifest.")


def _check_schema(path: Path, data: dict[str, Any]) -> None:
    schema = data.get("schema")
    if type(schema) is not int or schema != SCHEMA:
        newer = isinstance(schema, int) and schema > SCHEMA
        todo = "update edgepress" if newer else "build the bundle again"
        raise BundleError(f"{path}: schema {schema!r} is not {SCHEMA}; {todo}.")


def _read_json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise BundleError(f"{path} is too large for a {path.name}.")
    try:
        data = json.loads(
            path.read_text("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(data, dict):
        raise BundleError(f"{path} is not a JSON object.")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _walk(folder: Path) -> list[str]:
    """List every file by its path in the folder. Refuses links, devices and stray folders."""
    paths = []
    for root, folders, names in os.walk(folder):
        for name in (*folders, *names):
            file = Path(root) / name
            path = file.relative_to(folder).as_posix()
            mode = file.lstat().st_mode
            if stat.S_ISDIR(mode):
                if path != "golden":
                    raise BundleError(f"{file} has no place in a bundle; remove it.")
            elif not stat.S_ISREG(mode):
                raise BundleError(f"{file} is not a plain file; build the bundle again.")
            else:
                paths.append(path)
    return sorted(paths)


def _role(path: str) -> str | None:
    if found := GOLDEN.fullmatch(path):
        return "golden-input" if found[2] == "in" else "golden-output"
    return ROLES.get(path)


def _changed(path: Path, what: str) -> BundleError:
    return BundleError(f"{path} {what}; copy the bundle again, or build it again.")
