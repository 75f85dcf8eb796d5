"""A bundle: a folder whose every byte its manifest accounts for.

Reading fails closed: a file that is not listed, a missing one, a changed byte, a symbolic link, an
unknown key or a newer schema is refused. `docs/bundle.md` describes every field.

Errors::

    BundleError          what is wrong with which file
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgepress.pipeline.cache import file_sha256
from edgepress.pipeline.evidence import checked_evidence
from edgepress.pipeline.output import OutputError, cannot_write

SCHEMA = 1
ROLES = {
    "model": "executable",
    "libmodel.so": "library",
    "model.h": "header",
    "weights.epw": "weights",
    "graph.onnx": "graph",
}
UNLISTED = ("manifest.json", "manifest.sig", "evidence.json")
GOLDEN = re.compile(r"golden/(0|[1-9]\d*)\.(in|out)")
ARITHMETIC = ("float", "integer", "mixed")
OPTIONAL = ("layers", "ledger", "training")  # bundles of older versions have none
MAX_JSON_BYTES = 64 << 20
SIGNATURE_BYTES = 64  # of Ed25519


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
        manifest_bytes: the bytes of `manifest.json` that `manifest` was read from.
        evidence: what was measured on a device, or None.
        signature: the bytes of `manifest.sig`, or None; `signing` says whose it is.
    """

    folder: Path
    manifest: Manifest
    manifest_bytes: bytes = field(repr=False)
    evidence: dict[str, Any] | None = None
    signature: bytes | None = None

    @property
    def manifest_sha256(self) -> str:
        """Hash of `manifest.json`."""
        return hashlib.sha256(self.manifest_bytes).hexdigest()

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
    """List every file of a folder in its manifest and write that. Raises BundleError.

    A signature of an older manifest is removed.
    """
    files = []
    for path in _walk(folder):
        if path in UNLISTED:
            continue
        role = _role(path)
        if role is None:
            raise BundleError(f"{folder / path} has no place in a bundle.")
        file = folder / path
        facts = {"size_bytes": file.stat().st_size, "sha256": file_sha256(file)}
        files.append({"path": path, "role": role, **facts})
    manifest = dataclasses.replace(manifest, files=files)
    text = json.dumps(dataclasses.asdict(manifest), indent=1, sort_keys=True, allow_nan=False)
    (folder / "manifest.sig").unlink(missing_ok=True)
    (folder / "manifest.json").write_text(text + "\n", "utf-8")
    return read_bundle(folder)


def write_evidence(bundle: Bundle, evidence: dict[str, Any]) -> Bundle:
    """Replace `evidence.json` in one step. Raises OutputError."""
    evidence = {"schema": SCHEMA, "manifest_sha256": bundle.manifest_sha256, **evidence}
    data = (json.dumps(evidence, sort_keys=True, allow_nan=False) + "\n").encode()
    if len(data) > MAX_JSON_BYTES:  # it could not be read back
        raise OutputError(
            f"the evidence of {bundle.folder} would take {len(data) >> 20} MiB; verify fewer "
            "boards at once."
        )
    _replace(bundle.folder, "evidence.json", data)
    return dataclasses.replace(bundle, evidence=evidence)


def write_signature(bundle: Bundle, signature: bytes) -> Bundle:
    """Replace `manifest.sig` in one step. Raises OutputError."""
    _replace(bundle.folder, "manifest.sig", signature)
    return dataclasses.replace(bundle, signature=signature)


def _replace(folder: Path, name: str, data: bytes) -> None:
    """Replace a file of a bundle that its manifest does not list."""
    # beside the bundle, since a stray file inside would make it invalid
    whole = folder.absolute()
    temporary = whole.parent / f".{whole.name}.{name}-{os.getpid()}"
    try:
        temporary.write_bytes(data)
        temporary.replace(whole / name)
    except OSError as error:
        raise cannot_write(folder / name, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_bundle(folder: Path) -> Bundle:
    """Read a bundle and check every byte of it. Raises BundleError."""
    if not folder.is_dir():
        raise BundleError(f"{folder} is not a folder; give a bundle that `edgepress run` wrote.")
    if not (folder / "manifest.json").is_file():
        raise BundleError(
            f"{folder} has no manifest.json; give a bundle that `edgepress run` wrote."
        )
    found = _walk(folder)
    manifest_bytes, data = _read_json(folder / "manifest.json")
    manifest = _parse_manifest(folder / "manifest.json", data)
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
        if path not in listed and path not in UNLISTED:
            raise BundleError(
                f"{folder / path} is not listed in the manifest; remove it if you put it there."
            )
    for path, role in ROLES.items():
        if path not in listed:
            raise BundleError(f"{folder} has no {role} ({path}); build the bundle again.")
    _check_golden(folder, manifest, listed)
    bundle = Bundle(folder=folder, manifest=manifest, manifest_bytes=manifest_bytes)
    signed = "manifest.sig" in found
    measured = "evidence.json" in found
    return dataclasses.replace(
        bundle,
        signature=_read_signature(folder / "manifest.sig") if signed else None,
        evidence=_read_evidence(bundle) if measured else None,
    )


def _parse_manifest(path: Path, data: dict[str, Any]) -> Manifest:
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


def _read_evidence(bundle: Bundle) -> dict[str, Any]:
    path = bundle.folder / "evidence.json"
    _, data = _read_json(path)
    _check_schema(path, data)
    if data.get("manifest_sha256") != bundle.manifest_sha256:
        raise BundleError(f"{path} belongs to another build; remove it and run `edgepress verify`.")
    try:
        return checked_evidence(data)
    except ValueError as error:
        raise BundleError(f"{path}: {error}; remove it and run `edgepress verify`.") from None


def _read_signature(path: Path) -> bytes:
    with path.open("rb") as stream:
        signature = stream.read(SIGNATURE_BYTES + 1)
    if len(signature) != SIGNATURE_BYTES:
        raise BundleError(
            f"{path} is no signature of {SIGNATURE_BYTES} bytes; remove it and sign the bundle "
            "again with `edgepress sign`."
        )
    return signature


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


def _read_json(path: Path) -> tuple[bytes, dict[str, Any]]:
    """Read a file once. Returns its bytes and the object that they are."""
    with path.open("rb") as stream:
        text = stream.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES:
        raise BundleError(f"{path} is too large for a {path.name}.")
    try:
        data = json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(data, dict):
        raise BundleError(f"{path} is not a JSON object.")
    return text, data


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
