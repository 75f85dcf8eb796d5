"""Signatures of bundles: Ed25519 (RFC 8032) over the bytes of `manifest.json`.

The manifest has the hash of every other file, so that one signature stands for all of them; only
`evidence.json` is outside. `manifest.sig` holds the 64 bytes as they are: `openssl pkeyutl -verify
-rawin` checks it without edgepress. `docs/security.md` says what that protects from.

Errors::

    SignatureError      a bundle without a signature, or with one of no trusted key
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edgepress.pipeline.bundle import Bundle, write_signature
from edgepress.pipeline.signing_keys import read_public_key


class SignatureError(Exception):
    """A bundle that no trusted key signed: what, where, what to do."""


def sign(bundle: Bundle, key: Ed25519PrivateKey) -> Bundle:
    """Write `manifest.sig`, in the place of an older one, and return the signed bundle.

    Every byte of the bundle was checked when it was read. Raises OutputError.
    """
    return write_signature(bundle, key.sign(bundle.manifest_bytes))


def require_signature(bundle: Bundle, public_keys: Sequence[Path]) -> Path:
    """Return the first of the trusted keys that signed a bundle.

    What is verified is what `read_bundle` read: files that are used later must still have the
    hashes of `bundle.manifest`.

    Args:
        bundle: what must be signed.
        public_keys: files of the trusted keys, one at least; all of them must be readable.

    Raises:
        SignatureError: the bundle is not signed, or by none of these keys.
        InvalidKey: a file is no public key.
    """
    if not public_keys:
        raise ValueError("no trusted key, so no signature could be right")
    keys = {path: read_public_key(path) for path in public_keys}
    if bundle.signature is None:
        raise SignatureError(
            f"{bundle.folder} is not signed, and a signature is required; whoever built it signs "
            "it with `edgepress sign`."
        )
    for path, key in keys.items():
        try:
            key.verify(bundle.signature, bundle.manifest_bytes)
        except InvalidSignature:
            continue
        return path
    raise SignatureError(
        f"{bundle.folder / 'manifest.sig'} is not a signature of this manifest.json by "
        f"{' or '.join(map(str, keys))}: another key signed it, or one of both files was changed "
        "since. Do not use the bundle unless you know why; have it built and signed again."
    )
