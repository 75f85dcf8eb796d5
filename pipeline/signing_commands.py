"""`edgepress keygen` and `edgepress sign`: call, print what was written."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from edgepress.pipeline.json_document import print_json

PASSPHRASE = "EDGEPRESS_KEY_PASSPHRASE"


def keygen(path: Path, *, passphrase: bool, as_json: bool) -> int:
    """Make a pair of keys; `edgepress keygen`. With `passphrase` the private one is encrypted."""
    from edgepress.pipeline.signing_keys import fingerprint, new_key, read_public_key

    public = new_key(path, _passphrase(path, new=True) if passphrase else None)
    digest = fingerprint(read_public_key(public))
    if as_json:
        facts = {"key": str(path), "public_key": str(public), "public_key_sha256": digest}
        print_json(facts)
    else:
        print(f"{path}: the private key, which signs; keep it to yourself")
        print(f"{public}: the public key, for `edgepress deploy --require-signature`")
        print(f"its SHA-256 is {digest}")
    return 0


def sign(folder: Path, *, key: Path, as_json: bool) -> int:
    """Sign a bundle; `edgepress sign`."""
    from edgepress.pipeline import signing
    from edgepress.pipeline.bundle import read_bundle
    from edgepress.pipeline.signing_keys import fingerprint, read_private_key

    bundle = read_bundle(folder)
    private = read_private_key(key, lambda: _passphrase(key))
    bundle = signing.sign(bundle, private)
    digest = fingerprint(private.public_key())
    signature = folder / "manifest.sig"
    if as_json:
        facts = {
            "bundle": str(folder),
            "signature": str(signature),
            "manifest_sha256": bundle.manifest_sha256,
            "public_key_sha256": digest,
        }
        print_json(facts)
    else:
        print(f"{signature}: by the key whose public one has the SHA-256 {digest}")
    return 0


def _passphrase(path: Path, *, new: bool = False) -> bytes:
    """Passphrase of a key file: from the environment, or else typed on the terminal."""
    import click

    from edgepress.pipeline.signing_keys import InvalidKey

    given = os.environ.get(PASSPHRASE)
    if not given and not sys.stdin.isatty():
        raise InvalidKey(
            f"{path} needs a passphrase; set {PASSPHRASE}, or run this on a terminal, which asks."
        )
    if not given:
        what = f"Passphrase of {path}"
        given = click.prompt(what, hide_input=True, confirmation_prompt=new, err=True)
    return os.fsencode(given)
