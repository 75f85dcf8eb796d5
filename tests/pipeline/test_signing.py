"""A signed bundle: no byte of it changes unnoticed, and openssl alone can tell."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.pipeline.bundle import (
    Bundle,
    BundleError,
    read_bundle,
    write_evidence,
    write_manifest,
)
from edgepress.pipeline.cli import exit_code
from edgepress.pipeline.output import OutputError
from edgepress.pipeline.signing import SignatureError, require_signature, sign
from edgepress.pipeline.signing_keys import InvalidKey, new_key, read_private_key
from tests.pipeline import bundles
from tests.targets.tiny import need, run


@dataclass(frozen=True)
class Signed:
    """A signed bundle, the key that signed it, and one that did not."""

    folder: Path
    key: Path
    public: Path
    foreign: Path
    bundle: Bundle


def make(folder: Path) -> Signed:
    key = folder / "k.pem"
    public, foreign = new_key(key), new_key(folder / "foreign.pem")
    bundle = sign(bundles.write(folder / "b"), read_private_key(key))
    return Signed(folder / "b", key, public, foreign, bundle)


@pytest.fixture
def signed(tmp_path: Path) -> Signed:
    return make(tmp_path)


def test_a_signature_is_64_bytes_that_stay_with_the_bundle(signed: Signed, tmp_path: Path) -> None:
    assert len((signed.folder / "manifest.sig").read_bytes()) == 64
    read = read_bundle(signed.folder)
    assert read == signed.bundle
    assert require_signature(read, [signed.public]) == signed.public
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"b", "k.pem", "k.pem.pub", "foreign.pem", "foreign.pem.pub"}


def test_one_of_the_trusted_keys_is_enough(signed: Signed) -> None:
    assert require_signature(signed.bundle, [signed.foreign, signed.public]) == signed.public


def test_evidence_may_come_after_the_signature(signed: Signed) -> None:
    write_evidence(signed.bundle, bundles.evidence())
    require_signature(read_bundle(signed.folder), [signed.public])


def test_a_bundle_without_a_signature(tmp_path: Path) -> None:
    public = new_key(tmp_path / "k.pem")
    bundle = bundles.write(tmp_path / "b")
    with pytest.raises(SignatureError, match="b is not signed, and a signature is required") as no:
        require_signature(bundle, [public])
    assert exit_code(no.value) == 6


def test_a_signature_of_another_key(signed: Signed) -> None:
    with pytest.raises(SignatureError, match="another key signed it, or one of both") as wrong:
        require_signature(signed.bundle, [signed.foreign])
    assert str(signed.foreign) in str(wrong.value)
    assert exit_code(wrong.value) == 6


def test_a_signature_of_another_manifest(signed: Signed, tmp_path: Path) -> None:
    other = bundles.write(tmp_path / "other")
    text = other.manifest_bytes.replace(b'"native"', b'"pi"')
    (tmp_path / "other/manifest.json").write_bytes(text)
    (tmp_path / "other/manifest.sig").write_bytes((signed.folder / "manifest.sig").read_bytes())
    with pytest.raises(SignatureError, match="changed"):
        require_signature(read_bundle(tmp_path / "other"), [signed.public])


def test_a_newer_signature_replaces_the_older(signed: Signed, tmp_path: Path) -> None:
    sign(signed.bundle, read_private_key(tmp_path / "foreign.pem"))
    read = read_bundle(signed.folder)
    assert require_signature(read, [signed.foreign])
    with pytest.raises(SignatureError):
        require_signature(read, [signed.public])


def test_a_new_build_drops_the_signature(signed: Signed) -> None:
    (signed.folder / "golden/0.in").write_bytes(bytes(16))
    assert write_manifest(signed.folder, bundles.manifest()).signature is None
    assert not (signed.folder / "manifest.sig").exists()


def test_no_trusted_key_is_no_way_around(signed: Signed) -> None:
    with pytest.raises(ValueError, match="no trusted key"):
        require_signature(signed.bundle, [])


def test_every_trusted_key_must_be_one(signed: Signed) -> None:
    with pytest.raises(InvalidKey, match="is a private key"):
        require_signature(signed.bundle, [signed.public, signed.key])


def test_what_was_read_is_what_is_verified(signed: Signed) -> None:
    """Whoever exchanges the files after they were read changes nothing of what is known of them."""
    (signed.folder / "manifest.json").write_text("{}")
    (signed.folder / "manifest.sig").unlink()
    require_signature(signed.bundle, [signed.public])
    with pytest.raises(BundleError):
        read_bundle(signed.folder)


def test_a_bundle_that_cannot_be_written(signed: Signed, tmp_path: Path) -> None:
    (tmp_path / "b").rename(tmp_path / "moved")
    with pytest.raises(OutputError, match=r"cannot write .*manifest\.sig"):
        sign(signed.bundle, read_private_key(signed.key))
    assert not list(tmp_path.glob(".b*"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Signed:
    return make(tmp_path_factory.mktemp("signed"))


FILES = ("manifest.json", "manifest.sig", "model", "libmodel.so", "model.h", "weights.epw",
         "graph.onnx", "golden/0.in", "golden/0.out")  # fmt: skip


@settings(deadline=None, max_examples=400)
@given(data=st.data())
def test_no_changed_byte_is_let_through(shared: Signed, data: st.DataObject) -> None:
    path = shared.folder / data.draw(st.sampled_from((*FILES, "manifest.json")))
    before = path.read_bytes()
    at, by = data.draw(st.integers(0, len(before) - 1)), data.draw(st.integers(1, 255))
    changed = bytearray(before)
    changed[at] ^= by
    try:
        path.write_bytes(changed)
        with pytest.raises((BundleError, SignatureError)):
            require_signature(read_bundle(shared.folder), [shared.public])
    finally:
        path.write_bytes(before)
    require_signature(read_bundle(shared.folder), [shared.public])


def test_the_property_above_covers_every_file(shared: Signed) -> None:
    found = [p.relative_to(shared.folder) for p in shared.folder.rglob("*") if p.is_file()]
    assert sorted(path.as_posix() for path in found) == sorted(FILES)


VERIFY = "pkeyutl -verify -pubin -inkey ../k.pem.pub -rawin -in manifest.json -sigfile manifest.sig"


def test_openssl_alone_verifies(signed: Signed) -> None:
    need("openssl", "openssl")
    assert "Verified Successfully" in run(["openssl", *VERIFY.split()], signed.folder)
    with (signed.folder / "manifest.json").open("ab") as stream:
        stream.write(b" ")
    command = ["openssl", *VERIFY.split()]
    result = subprocess.run(command, cwd=signed.folder, capture_output=True, check=False)
    assert result.returncode != 0


def test_a_signature_of_openssl_is_right(tmp_path: Path) -> None:
    need("openssl", "openssl")
    bundles.write(tmp_path / "b")
    for command in (
        "genpkey -algorithm ed25519 -out k.pem",
        "pkey -in k.pem -pubout -out k.pub",
        "pkeyutl -sign -inkey k.pem -rawin -in b/manifest.json -out b/manifest.sig",
    ):
        run(["openssl", *command.split()], tmp_path)
    assert require_signature(read_bundle(tmp_path / "b"), [tmp_path / "k.pub"])


def test_the_page_on_security_says_how(signed: Signed) -> None:
    need("openssl", "openssl")
    page = (Path(__file__).parents[2] / "docs/security.md").read_text("utf-8")
    script = page.partition("```sh\n")[2].partition("```")[0]
    signed.public.rename(signed.folder.parent / "KEY.pem.pub")
    shell = ["sh", "-ec", script]
    said = run(shell, signed.folder)
    assert "Verified Successfully" in said
    assert all(f"{name}: OK" in said for name in FILES if not name.startswith("manifest"))
    (signed.folder / "golden/0.in").write_bytes(bytes(16))
    damaged = subprocess.run(shell, cwd=signed.folder, capture_output=True, check=False)
    assert (damaged.returncode, b"golden/0.in: FAILED" in damaged.stdout) == (1, True)
    (signed.folder / "manifest.sig").write_bytes(bytes(64))
    unsigned = subprocess.run(shell, cwd=signed.folder, capture_output=True, check=False)
    assert (unsigned.returncode != 0, b"FAILED" in unsigned.stdout) == (True, False)
