"""Key files: made once and never replaced, closed to others, and refused where they are wrong."""

import errno
import os
import stat
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa, x25519
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from edgepress.pipeline.output import OutputError
from edgepress.pipeline.signing_keys import (
    InvalidKey,
    fingerprint,
    new_key,
    read_private_key,
    read_public_key,
)
from tests.targets.tiny import need, run


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0, 0o022, 0o777])
def test_a_pair_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        public = new_key(tmp_path / "k.pem")
    finally:
        os.umask(before)
    assert public == tmp_path / "k.pem.pub"
    assert (mode(tmp_path / "k.pem"), mode(public)) == (0o600, 0o644)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k.pem", "k.pem.pub"]
    key = read_private_key(tmp_path / "k.pem")
    read_public_key(public).verify(key.sign(b"text"), b"text")
    assert fingerprint(key.public_key()) == fingerprint(read_public_key(public))
    assert (tmp_path / "k.pem").read_text().startswith("-----BEGIN PRIVATE KEY-----\n")
    assert public.read_text().startswith("-----BEGIN PUBLIC KEY-----\n")


def test_no_two_keys_are_the_same(tmp_path: Path) -> None:
    keys = [read_public_key(new_key(tmp_path / name)) for name in "abc"]
    assert len({fingerprint(key) for key in keys}) == 3


@pytest.mark.parametrize("taken", ["k.pem", "k.pem.pub"])
@pytest.mark.parametrize("what", ["file", "folder", "dangling link"])
def test_nothing_is_replaced(tmp_path: Path, taken: str, what: str) -> None:
    path = tmp_path / taken
    if what == "file":
        path.write_text("mine")
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to("absent")
    with pytest.raises(OutputError, match=rf"{taken} exists, and keys are never replaced"):
        new_key(tmp_path / "k.pem")
    assert [path.name for path in tmp_path.iterdir()] == [taken]
    assert not path.is_file() or path.read_text() == "mine"


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_a_folder_is_no_name_of_a_key(name: str) -> None:
    with pytest.raises(OutputError, match="never replaced"):
        new_key(Path(name))


def test_many_at_once_make_one_pair(tmp_path: Path) -> None:
    def attempt(_: int) -> bool:
        try:
            new_key(tmp_path / "k.pem")
        except OutputError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(40))) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k.pem", "k.pem.pub"]
    public = read_private_key(tmp_path / "k.pem").public_key()
    assert fingerprint(public) == fingerprint(read_public_key(tmp_path / "k.pem.pub"))


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"k\.pem: No space left on device; free some space"):
        new_key(tmp_path / "k.pem")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot write .*No such file or directory"):
        new_key(tmp_path / "absent" / "k.pem")


def test_a_passphrase(tmp_path: Path) -> None:
    path = tmp_path / "k.pem"
    new_key(path, "é \n'$()".encode())
    assert path.read_text().startswith("-----BEGIN ENCRYPTED PRIVATE KEY-----\n")
    key = read_private_key(path, "é \n'$()".encode)
    assert fingerprint(key.public_key()) == fingerprint(read_public_key(tmp_path / "k.pem.pub"))
    with pytest.raises(InvalidKey, match=r"k\.pem is encrypted; give its passphrase"):
        read_private_key(path)
    with pytest.raises(InvalidKey, match=r"k\.pem cannot be read: the passphrase is wrong"):
        read_private_key(path, lambda: b"wrong")
    with pytest.raises(InvalidKey, match="passphrase is wrong"):
        read_private_key(path, lambda: b"")


def test_a_passphrase_that_is_empty_makes_no_key(tmp_path: Path) -> None:
    with pytest.raises(InvalidKey, match="this passphrase cannot be used"):
        new_key(tmp_path / "k.pem", b"")
    assert list(tmp_path.iterdir()) == []


def test_no_passphrase_is_asked_for_where_none_is_needed(tmp_path: Path) -> None:
    def ask() -> NoReturn:
        raise AssertionError("asked")

    new_key(tmp_path / "k.pem")
    read_private_key(tmp_path / "k.pem", ask)


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o620, 0o602, 0o610, 0o777])
@pytest.mark.parametrize("passphrase", [None, b"secret"])
def test_a_private_key_that_others_may_read(
    tmp_path: Path, bits: int, passphrase: bytes | None
) -> None:
    path = tmp_path / "my key.pem"
    new_key(path, passphrase)
    path.chmod(bits)
    with pytest.raises(InvalidKey) as caught:
        read_private_key(path, lambda: b"secret")
    assert f"run `chmod 600 '{path}'`" in str(caught.value)
    path.chmod(0o400)
    read_private_key(path, lambda: b"secret")


def test_a_public_key_may_be_read_by_all(tmp_path: Path) -> None:
    public = new_key(tmp_path / "k.pem")
    public.chmod(0o666)
    read_public_key(public)
    with pytest.raises(InvalidKey, match="is a public key; give the private one"):
        read_private_key(public)


def pem(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | x25519.X25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_pem(key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


RSA = rsa.generate_private_key(65537, 2048)
EC = ec.generate_private_key(ec.SECP256R1())
ED = Ed25519PrivateKey.generate()
ED_PRIVATE = ED.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
ED_PUBLIC = ED.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
CERTIFICATE = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"

NO_PRIVATE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is no PEM file"),
    "binary": (bytes(range(256)), "is no PEM file"),
    "raw key": (b"k" * 32, "is no PEM file"),
    "rsa": (pem(RSA), "another kind of key"),
    "ec": (pem(EC), "another kind of key"),
    "x25519": (pem(x25519.X25519PrivateKey.generate()), "another kind of key"),
    "traditional ec": (
        EC.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()),
        "another kind of key (EC PRIVATE KEY)",
    ),
    "openssh": (
        ED.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()),
        "another kind of key (OPENSSH PRIVATE KEY)",
    ),
    "certificate": (CERTIFICATE, "another kind of key (CERTIFICATE)"),
    "public": (ED_PUBLIC, "is a public key; give the private one"),
    "public of another kind": (public_pem(RSA.public_key()), "is a public key; give the private"),
    "both": (ED_PRIVATE + ED_PUBLIC, "another kind of key (PRIVATE KEY, PUBLIC KEY)"),
    "cut after the first line": (ED_PRIVATE[:40], "cut short or damaged"),
    "cut in the middle": (ED_PRIVATE[:70], "cut short or damaged"),
    "cut at the end": (ED_PRIVATE[:-5], "cut short or damaged"),
    "no base64": (ED_PRIVATE.replace(b"MC4C", b"M@4C"), "cut short or damaged"),
    "no DER": (ED_PRIVATE.replace(b"MC4C", b"AC4C"), "cut short or damaged"),
    "labelled as encrypted": (
        ED_PRIVATE.replace(b"PRIVATE", b"ENCRYPTED PRIVATE"),
        "the passphrase is wrong, or the file is damaged",
    ),
}
NO_PUBLIC: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is no PEM file"),
    "rsa": (public_pem(RSA.public_key()), "another kind of key (PUBLIC KEY)"),
    "ec": (public_pem(EC.public_key()), "another kind of key (PUBLIC KEY)"),
    "certificate": (CERTIFICATE, "another kind of key (CERTIFICATE)"),
    "private": (ED_PRIVATE, "is a private key, which belongs to the one who signs"),
    "private of another kind": (pem(EC), "is a private key"),
    "both": (ED_PUBLIC + ED_PRIVATE, "is a private key"),
    "two": (ED_PUBLIC * 2, "another kind of key (PUBLIC KEY, PUBLIC KEY)"),
    "cut": (ED_PUBLIC[:50], "cut short or damaged"),
    "no DER": (ED_PUBLIC.replace(b"MCow", b"MDow"), "cut short or damaged"),
}


def said(read: Callable[[Path], object], path: Path, data: bytes) -> str:
    path.write_bytes(data)
    path.chmod(0o600)
    with pytest.raises(InvalidKey) as caught:
        read(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", NO_PRIVATE)
def test_what_is_no_private_key(tmp_path: Path, kind: str) -> None:
    data, words = NO_PRIVATE[kind]
    assert words in said(lambda path: read_private_key(path, lambda: b"x"), tmp_path / "k", data)


@pytest.mark.parametrize("kind", NO_PUBLIC)
def test_what_is_no_public_key(tmp_path: Path, kind: str) -> None:
    data, words = NO_PUBLIC[kind]
    assert words in said(read_public_key, tmp_path / "k", data)


@pytest.mark.parametrize("read", [read_private_key, read_public_key])
def test_what_is_no_file(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(InvalidKey, match=r"cannot read the key .*: No such file or directory"):
        read(tmp_path / "absent")
    with pytest.raises(InvalidKey, match=r"cannot read the key .*: Is a directory"):
        read(tmp_path)


def openssl(folder: Path, *arguments: str) -> str:
    need("openssl", "openssl")
    return run(["openssl", *arguments], folder)


def test_openssl_reads_these_keys(tmp_path: Path) -> None:
    new_key(tmp_path / "k.pem")
    new_key(tmp_path / "e.pem", b"secret")
    public = (tmp_path / "k.pem.pub").read_text()
    assert openssl(tmp_path, "pkey", "-in", "k.pem", "-pubout") == public
    encrypted = openssl(tmp_path, "pkey", "-in", "e.pem", "-passin", "pass:secret", "-pubout")
    assert encrypted == (tmp_path / "e.pem.pub").read_text()
    openssl(tmp_path, "pkey", "-pubin", "-in", "k.pem.pub", "-outform", "DER", "-out", "k.der")
    digest = subprocess.run(["sha256sum", tmp_path / "k.der"], capture_output=True, check=True)
    key = read_public_key(tmp_path / "k.pem.pub")
    assert digest.stdout.decode().split()[0] == fingerprint(key)


def test_keys_of_openssl_are_read(tmp_path: Path) -> None:
    openssl(tmp_path, "genpkey", "-algorithm", "ed25519", "-out", "k.pem")
    openssl(tmp_path, "pkey", "-in", "k.pem", "-pubout", "-out", "k.pub")
    cipher = ("-aes256", "-passout", "pass:secret")
    openssl(tmp_path, "pkey", "-in", "k.pem", *cipher, "-out", "e.pem")
    (tmp_path / "k.pem").chmod(0o600)
    (tmp_path / "e.pem").chmod(0o600)
    wanted = fingerprint(read_public_key(tmp_path / "k.pub"))
    assert fingerprint(read_private_key(tmp_path / "k.pem").public_key()) == wanted
    encrypted = read_private_key(tmp_path / "e.pem", lambda: b"secret")
    assert fingerprint(encrypted.public_key()) == wanted
