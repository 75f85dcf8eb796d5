"""What `edgepress keygen` and `edgepress sign` print, and where they get a passphrase."""

import io
import json
import stat
from pathlib import Path

import click
import pytest

from edgepress.pipeline.bundle import BundleError, read_bundle
from edgepress.pipeline.cli import exit_code
from edgepress.pipeline.signing import require_signature
from edgepress.pipeline.signing_commands import PASSPHRASE, keygen, sign
from edgepress.pipeline.signing_keys import InvalidKey, read_private_key
from tests.pipeline import bundles


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PASSPHRASE, raising=False)
    monkeypatch.setattr("sys.stdin", io.StringIO())


def test_a_key_and_a_signature(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundles.write(tmp_path / "b")
    key, public = tmp_path / "k.pem", tmp_path / "k.pem.pub"
    assert keygen(key, passphrase=False, as_json=False) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{key}: the private key")
    assert said[1].startswith(f"{public}: the public key")
    digest = said[2].removeprefix("its SHA-256 is ")
    assert sign(tmp_path / "b", key=key, as_json=False) == 0
    assert capsys.readouterr().out == (
        f"{tmp_path}/b/manifest.sig: by the key whose public one has the SHA-256 {digest}\n"
    )
    require_signature(read_bundle(tmp_path / "b"), [public])


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = bundles.write(tmp_path / "b")
    assert keygen(tmp_path / "k.pem", passphrase=False, as_json=True) == 0
    made = json.loads(capsys.readouterr().out)
    digest = made.pop("public_key_sha256")
    assert made == {"key": f"{tmp_path}/k.pem", "public_key": f"{tmp_path}/k.pem.pub"}
    assert sign(tmp_path / "b", key=tmp_path / "k.pem", as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == {
        "bundle": f"{tmp_path}/b",
        "signature": f"{tmp_path}/b/manifest.sig",
        "manifest_sha256": bundle.manifest_sha256,
        "public_key_sha256": digest,
    }


def test_a_passphrase_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundles.write(tmp_path / "b")
    key = tmp_path / "k.pem"
    monkeypatch.setenv(PASSPHRASE, "secret")
    keygen(key, passphrase=True, as_json=False)
    read_private_key(key, lambda: b"secret")
    sign(tmp_path / "b", key=key, as_json=False)
    require_signature(read_bundle(tmp_path / "b"), [tmp_path / "k.pem.pub"])
    monkeypatch.setenv(PASSPHRASE, "wrong")
    with pytest.raises(InvalidKey, match="passphrase is wrong") as caught:
        sign(tmp_path / "b", key=key, as_json=False)
    assert exit_code(caught.value) == 2


def test_a_passphrase_from_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def prompt(text: str, **options: bool) -> str:
        asked.append((text, options))
        return "typed"

    monkeypatch.setattr(click, "prompt", prompt)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    bundles.write(tmp_path / "b")
    key = tmp_path / "k.pem"
    keygen(key, passphrase=True, as_json=True)
    sign(tmp_path / "b", key=key, as_json=True)
    read_private_key(key, lambda: b"typed")
    shown = {"hide_input": True, "err": True}
    assert asked == [
        (f"Passphrase of {key}", {**shown, "confirmation_prompt": True}),
        (f"Passphrase of {key}", {**shown, "confirmation_prompt": False}),
    ]


def test_no_passphrase_without_a_terminal(tmp_path: Path) -> None:
    with pytest.raises(InvalidKey, match="set EDGEPRESS_KEY_PASSPHRASE, or run this on a terminal"):
        keygen(tmp_path / "k.pem", passphrase=True, as_json=False)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_bundle_is_not_signed(tmp_path: Path) -> None:
    bundles.write(tmp_path / "b")
    keygen(tmp_path / "k.pem", passphrase=False, as_json=False)
    (tmp_path / "b/model").write_text("another")
    with pytest.raises(BundleError):
        sign(tmp_path / "b", key=tmp_path / "k.pem", as_json=False)
    assert not (tmp_path / "b/manifest.sig").exists()


def test_a_key_that_others_may_read_signs_nothing(tmp_path: Path) -> None:
    bundles.write(tmp_path / "b")
    keygen(tmp_path / "k.pem", passphrase=False, as_json=False)
    (tmp_path / "k.pem").chmod(stat.S_IRUSR | stat.S_IRGRP)
    with pytest.raises(InvalidKey, match="chmod 600"):
        sign(tmp_path / "b", key=tmp_path / "k.pem", as_json=False)
    assert not (tmp_path / "b/manifest.sig").exists()
