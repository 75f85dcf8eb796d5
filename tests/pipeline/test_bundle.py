import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgepress.pipeline.bundle import BundleError, read_bundle, write_evidence, write_manifest
from edgepress.pipeline.output import OutputError
from tests.pipeline import bundles


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    written = bundles.write(tmp_path / "b")
    read = read_bundle(tmp_path / "b")
    assert read == written
    assert [file["path"] for file in read.manifest.files] == [
        "golden/0.in",
        "golden/0.out",
        "graph.onnx",
        "libmodel.so",
        "model",
        "model.h",
        "weights.epw",
    ]
    assert read.deployed_bytes == len("the bytes of model") + len("the bytes of weights.epw")
    assert read.evidence is None


@pytest.mark.parametrize(("key", "empty"), [("layers", []), ("ledger", {}), ("training", None)])
def test_an_older_bundle_lacks_what_came_later(tmp_path: Path, key: str, empty: object) -> None:
    bundles.write(tmp_path / "b")
    rewrite(tmp_path / "b", lambda data: data.pop(key))
    assert getattr(read_bundle(tmp_path / "b").manifest, key) == empty


def test_coded_weights_are_known_by_their_codec(tmp_path: Path) -> None:
    bundle = bundles.write(tmp_path / "b")
    assert not bundle.has_coded_weights
    rows = [{"name": "a", "codec": "raw"}]
    rewrite(tmp_path / "b", lambda data: data.update(weights=rows))
    assert not read_bundle(tmp_path / "b").has_coded_weights
    rows.append({"name": "b", "codec": "coded"})
    rewrite(tmp_path / "b", lambda data: data.update(weights=rows))
    assert read_bundle(tmp_path / "b").has_coded_weights


def test_two_builds_are_the_same_bytes(tmp_path: Path) -> None:
    bundles.write(tmp_path / "a")
    bundles.write(tmp_path / "b")
    a, b = ((tmp_path / name / "manifest.json").read_bytes() for name in "ab")
    assert a == b


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


def replace_by_link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "changed byte": (lambda b: flip(b / "model"), "model has other bytes"),
    "longer": (lambda b: (b / "model.h").write_text("x"), "model.h has another size"),
    "missing": (lambda b: (b / "weights.epw").unlink(), "weights.epw is missing"),
    "golden missing": (lambda b: (b / "golden/0.out").unlink(), "0.out is missing"),
    "unknown file": (lambda b: (b / "notes.txt").write_text(""), "notes.txt is not listed"),
    "unknown golden": (lambda b: (b / "golden/1.in").write_text(""), "1.in is not listed"),
    "hidden file": (lambda b: (b / ".x").write_text(""), ".x is not listed"),
    "folder": (lambda b: (b / "more").mkdir(), "more has no place"),
    "link": (lambda b: replace_by_link(b / "model"), "not a plain file"),
    "linked folder": (lambda b: replace_by_link(b / "golden"), "not a plain file"),
    "no manifest": (lambda b: (b / "manifest.json").unlink(), "no manifest.json"),
    "not json": (lambda b: (b / "manifest.json").write_text("{"), "not valid JSON"),
    "not an object": (lambda b: (b / "manifest.json").write_text("[]"), "not a JSON object"),
    "a key twice": (
        lambda b: (b / "manifest.json").write_text('{"schema": 1, "schema": 1}'),
        "occurs twice",
    ),
    "nan": (lambda b: (b / "manifest.json").write_text('{"schema": NaN}'), "NaN"),
    "newer": (lambda b: rewrite(b, lambda d: d.update(schema=2)), "update edgepress"),
    "no schema": (lambda b: rewrite(b, lambda d: d.pop("schema")), "schema None"),
    "unknown key": (lambda b: rewrite(b, lambda d: d.update(more=1)), "unknown key 'more'"),
    "missing key": (lambda b: rewrite(b, lambda d: d.pop("target")), "'target' is missing"),
    "wrong type": (lambda b: rewrite(b, lambda d: d.update(steps={})), "'steps' is not"),
    "arithmetic": (lambda b: rewrite(b, lambda d: d.update(arithmetic="x")), "arithmetic 'x'"),
    "listed twice": (
        lambda b: rewrite(b, lambda d: d["files"].append(d["files"][0])),
        "lists a file twice",
    ),
    "wrong role": (
        lambda b: rewrite(b, lambda d: d["files"][0].update(role="weights")),
        "role",
    ),
    "outside": (
        lambda b: rewrite(b, lambda d: d["files"][0].update(path="../manifest.json")),
        "no such file or role",
    ),
    "malformed entry": (
        lambda b: rewrite(b, lambda d: d["files"][0].pop("sha256")),
        "malformed",
    ),
    "golden count": (
        lambda b: rewrite(b, lambda d: d["golden"].update(samples=2)),
        "not those of the manifest",
    ),
    "evidence": (lambda b: (b / "evidence.json").write_text("{}"), "schema None"),
    "short signature": (
        lambda b: (b / "manifest.sig").write_bytes(bytes(63)),
        "manifest.sig is no signature of 64 bytes",
    ),
    "long signature": (
        lambda b: (b / "manifest.sig").write_bytes(bytes(65)),
        "manifest.sig is no signature of 64 bytes",
    ),
    "linked signature": (lambda b: (b / "manifest.sig").symlink_to("model"), "not a plain file"),
    "signature folder": (lambda b: (b / "manifest.sig").mkdir(), "manifest.sig has no place"),
    "signature elsewhere": (
        lambda b: (b / "golden/manifest.sig").write_bytes(bytes(64)),
        "golden/manifest.sig is not listed",
    ),
    "listed signature": (
        lambda b: rewrite(b, lambda d: d["files"][0].update(path="manifest.sig")),
        "no such file or role",
    ),
    "foreign evidence": (
        lambda b: (b / "evidence.json").write_text('{"schema": 1, "manifest_sha256": "0"}'),
        "another build",
    ),
    "malformed evidence": (
        lambda b: write_evidence(read_bundle(b), bundles.evidence(passed=False)),
        "'passed' is not what 'verdicts' say; remove it",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_bundle_that_is_not_whole_is_refused(tmp_path: Path, damage: str) -> None:
    bundles.write(tmp_path / "b")
    apply, words = DAMAGE[damage]
    apply(tmp_path / "b")
    with pytest.raises(BundleError) as caught:
        read_bundle(tmp_path / "b")
    assert words in str(caught.value)


def test_a_signature_lies_beside_the_manifest(tmp_path: Path) -> None:
    """Whose it is, only `require_signature` asks."""
    before = bundles.write(tmp_path / "b")
    assert before.signature is None
    (tmp_path / "b/manifest.sig").write_bytes(bytes(range(64)))
    after = read_bundle(tmp_path / "b")
    assert after.signature == bytes(range(64))
    assert after.manifest == before.manifest


def test_the_manifest_is_known_by_its_bytes(tmp_path: Path) -> None:
    bundle = bundles.write(tmp_path / "b")
    data = (tmp_path / "b/manifest.json").read_bytes()
    assert bundle.manifest_bytes == data
    assert bundle.manifest_sha256 == hashlib.sha256(data).hexdigest()


def test_a_file_that_has_no_place_is_not_bundled(tmp_path: Path) -> None:
    bundles.write(tmp_path / "b")
    (tmp_path / "b/ranges.json").write_text("")
    with pytest.raises(BundleError, match=r"ranges\.json"):
        write_manifest(tmp_path / "b", bundles.manifest())


@pytest.mark.parametrize("name", ["model", "graph.onnx", "golden/0.in"])
def test_every_file_is_needed(tmp_path: Path, name: str) -> None:
    bundles.write(tmp_path / "b")
    (tmp_path / "b" / name).unlink()
    with pytest.raises(BundleError):
        write_manifest(tmp_path / "b", bundles.manifest())


def test_evidence_is_kept_and_replaced(tmp_path: Path) -> None:
    bundle = bundles.write(tmp_path / "b")
    before = (tmp_path / "b/manifest.json").read_bytes()
    write_evidence(bundle, bundles.evidence())
    write_evidence(bundle, bundles.evidence(instructions=7))
    read = read_bundle(tmp_path / "b")
    assert read.evidence is not None
    assert read.evidence["instructions"] == 7
    assert (tmp_path / "b/manifest.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_evidence_that_could_not_be_read_back_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = write_evidence(bundles.write(tmp_path / "b"), bundles.evidence())
    monkeypatch.setattr("edgepress.pipeline.bundle.MAX_JSON_BYTES", 10_000)
    with pytest.raises(OutputError, match="verify fewer boards at once"):
        write_evidence(bundle, bundles.evidence(outputs={"name": "x" * 10_000}))
    read = read_bundle(tmp_path / "b").evidence
    assert read is not None
    assert read["outputs"] == {"samples": 1}


def test_a_copied_bundle_is_the_same(tmp_path: Path) -> None:
    bundle = bundles.write(tmp_path / "b")
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    assert read_bundle(tmp_path / "c").manifest_sha256 == bundle.manifest_sha256


def test_what_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not a folder"):
        read_bundle(tmp_path / "missing")
