"""Ed25519 keys as PEM files: the private one in PKCS8, the public one in SubjectPublicKeyInfo.

openssl reads and writes the same. A private key file is readable by its owner alone, and another
is refused.

Errors::

    InvalidKey          a file that is no key, another kind of key, or one that others may read
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from edgepress.pipeline.output import OutputError, cannot_write

_PRIVATE, _ENCRYPTED, _PUBLIC = "PRIVATE KEY", "ENCRYPTED PRIVATE KEY", "PUBLIC KEY"
_LABEL = re.compile(r"-----BEGIN ([A-Z0-9 ]+)-----")
_LARGEST_BYTES = 64 << 10
_MAKE_ONE = "make an Ed25519 key with `edgepress keygen KEY.pem`"


class InvalidKey(Exception):
    """A key file that cannot be used: what, where, what to do."""


def new_key(path: Path, passphrase: bytes | None = None) -> Path:
    """Make a private key, and beside it `PATH.pub`, its public one, whose path is returned.

    Neither file replaces another, and neither is ever there half written.

    Args:
        path: of the private key; it gets the mode 0600.
        passphrase: encrypts the private key.

    Raises:
        OutputError: a file of these names exists, or cannot be written.
        InvalidKey: the passphrase is empty or too long.
    """
    key = Ed25519PrivateKey.generate()
    try:
        cipher = NoEncryption() if passphrase is None else BestAvailableEncryption(passphrase)
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, cipher)
    except ValueError as error:
        what = str(error).rstrip(".")
        raise InvalidKey(f"this passphrase cannot be used: {what}; choose another.") from None
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    public_path = path.parent / f"{path.name}.pub"
    _create(path, private, 0o600)
    try:
        _create(public_path, public, 0o644)
    except BaseException:
        path.unlink()
        raise
    return public_path


def read_private_key(
    path: Path, passphrase: Callable[[], bytes] | None = None
) -> Ed25519PrivateKey:
    """Read a private key. Raises InvalidKey.

    Args:
        path: of the key.
        passphrase: asked for it where the file is encrypted.
    """
    pem = _read(path, private=True)
    label = _label(path, pem)
    if label == _PUBLIC:
        raise InvalidKey(f"{path} is a public key; give the private one, which signs.")
    if label not in (_PRIVATE, _ENCRYPTED):
        _refuse_kind(path, label)
    secret = None
    if label == _ENCRYPTED:
        if passphrase is None:
            raise InvalidKey(f"{path} is encrypted; give its passphrase.")
        secret = passphrase()
    try:
        key = load_pem_private_key(pem, secret)
    except UnsupportedAlgorithm:
        _refuse_kind(path, label)
    except (TypeError, ValueError):
        wrong = "the passphrase is wrong, or the file is damaged"
        what = wrong if label == _ENCRYPTED else "the file is cut short or damaged"
        raise InvalidKey(f"{path} cannot be read: {what}.") from None
    if not isinstance(key, Ed25519PrivateKey):
        _refuse_kind(path, label)
    return key


def read_public_key(path: Path) -> Ed25519PublicKey:
    """Read a public key. Raises InvalidKey, also for a private key."""
    pem = _read(path)
    label = _label(path, pem)
    if _PRIVATE in label:
        raise InvalidKey(
            f"{path} is a private key, which belongs to the one who signs; give its public key, "
            f"such as {path}.pub."
        )
    if label != _PUBLIC:
        _refuse_kind(path, label)
    try:
        key = load_pem_public_key(pem)
    except UnsupportedAlgorithm:
        _refuse_kind(path, label)
    except ValueError:
        raise InvalidKey(
            f"{path} cannot be read: the file is cut short or damaged; copy it again."
        ) from None
    if not isinstance(key, Ed25519PublicKey):
        _refuse_kind(path, label)
    return key


def fingerprint(key: Ed25519PublicKey) -> str:
    """SHA-256 of the DER of SubjectPublicKeyInfo, by which people compare keys."""
    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def _create(path: Path, data: bytes, mode: int) -> None:
    """Write a file that is there as a whole or not at all, and never instead of another."""
    partial = None
    try:
        # opened with O_EXCL, and readable by its owner alone
        descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
        with os.fdopen(descriptor, "wb") as stream:
            os.fchmod(descriptor, mode)
            stream.write(data)
            stream.flush()
            os.fsync(descriptor)
        os.link(partial, path)  # a rename would replace what is there
    except FileExistsError:
        raise OutputError(
            f"{path} exists, and keys are never replaced; give another name, or move it away."
        ) from None
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        if partial is not None:
            with suppress(OSError):
                Path(partial).unlink()


def _read(path: Path, *, private: bool = False) -> bytes:
    """Read a key file; where a private key is wanted, one that nobody but its owner may read."""
    try:
        with path.open("rb") as stream:
            status = os.fstat(stream.fileno())
            pem = stream.read(_LARGEST_BYTES)
    except OSError as error:
        raise InvalidKey(f"cannot read the key {path}: {error.strerror or error}.") from None
    if private and _PRIVATE.encode() in pem and stat.S_IMODE(status.st_mode) & 0o077:
        raise InvalidKey(
            f"others than its owner may read or write the private key {path}; run `chmod 600 "
            f"{shlex.quote(str(path))}`, and make a new key if somebody may have read this one."
        )
    return pem


def _label(path: Path, pem: bytes) -> str:
    """What a PEM file says that it holds."""
    labels = _LABEL.findall(pem.decode("ascii", "replace"))
    if not labels:
        raise InvalidKey(f"{path} is no PEM file; {_MAKE_ONE}.")
    return ", ".join(labels)


def _refuse_kind(path: Path, label: str) -> NoReturn:
    raise InvalidKey(f"{path} holds another kind of key ({label}); {_MAKE_ONE}.")
