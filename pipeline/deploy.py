"""Install a bundle where its device runs it: sent, checked, tried, and only then switched to.

What goes there is what the board needs: the executable, the library with its header, the weights,
the golden files, the manifest and its signature. A version whose bytes differ or whose selftest
fails never replaces what was installed before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from edgepress.pipeline.bundle import Bundle
from edgepress.pipeline.output import OutputError
from edgepress.pipeline.progress import Progress
from edgepress.pipeline.signing import require_signature
from edgepress.pipeline.verify import bundle_target
from edgepress.targets.base import DeviceFailed, LinkBroken, OnDevice, Unreachable
from edgepress.targets.devices.base import (
    Device,
    find_device,
    open_device,
    open_shell,
    require_support,
)
from edgepress.targets.remote.board_store import NotOurs, Store

_STAYS_HERE = ("graph",)


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """What was installed.

    Attributes:
        folder: what programs open on the device.
        device: the device's name.
        size_bytes: bytes of all its files.
        sent_bytes: how many of them were sent; the others were there.
        golden_samples: how many golden samples it answered right there.
        version: its ID.
        previous: ID of the version before, which a rollback goes back to, or None.
    """

    folder: str
    device: str
    size_bytes: int
    sent_bytes: int
    golden_samples: int
    version: str
    previous: str | None


def deploy(
    bundle: Bundle,
    device: str | None,
    *,
    destination: str | Path | None = None,
    trusted_keys: Sequence[Path] = (),
    progress: Progress | None = None,
) -> Deployment:
    """Install a bundle on a device; the version that was there before is kept for a rollback.

    Args:
        bundle: what to install; it was checked when it was read.
        device: where; None chooses by target.
        destination: what programs open there, `NAME` in the device's folder for bundles unless
            given; that is `~/edgepress` unless `devices.toml` names another.
        trusted_keys: public keys, one of which must have signed the bundle; none: nobody must.
        progress: where to say how far it is.

    Raises:
        SignatureError: none of the keys signed it.
        DeviceFailed: the device was not reached or cannot run it, or its selftest fails there.
        OutputError: at the destination is something that is not to be replaced.
    """
    progress = progress or Progress(shown=False)
    if trusted_keys:
        require_signature(bundle, trusted_keys)
    opened = open_device(device, bundle_target(bundle))
    store, name = _place(opened, bundle, destination)
    with _refusals(), progress.step(f"look at {opened.name}"):
        store.look(name)
    with _refusals(), store.locked():
        store.require_links()
        with progress.step(f"send to {opened.name}"):
            version = store.stage(
                bundle.folder,
                files=_files(bundle),
                check=lambda there: require_support(opened, there),
                progress=progress.update,
            )
        with progress.step(f"selftest on {opened.name}"):
            try:
                tried = _selftest(opened, version, "so it was not installed")
            except (LinkBroken, Unreachable):  # nothing is known yet, and it need not be sent again
                raise
            except DeviceFailed:
                store.discard(version)
                raise
        with progress.step(f"switch on {opened.name}"):
            previous = store.switch(name, version)
    size_bytes = _size_bytes(bundle)
    return _deployment(opened, store, name, version, size_bytes, tried, previous, progress)


def rollback(
    bundle: Bundle,
    device: str | None,
    *,
    destination: str | Path | None = None,
    progress: Progress | None = None,
) -> Deployment:
    """Go back to the version before, once its selftest passed; again: forth.

    Args:
        bundle: names what to roll back, and for which target.
        device: where; None chooses by target.
        destination: what programs open there, as for `deploy`.
        progress: where to say how far it is.

    Raises:
        DeviceFailed: the device was not reached, there is no version before, or it is damaged, or
            its selftest fails.
        OutputError: at the destination is something else.
    """
    progress = progress or Progress(shown=False)
    opened = open_device(device, bundle_target(bundle))
    store, name = _place(opened, bundle, destination)
    tried: dict[str, Any] = {}

    def check(version: OnDevice) -> None:
        tried.update(_selftest(opened, version, "so nothing was changed"))

    with _refusals(), store.locked():
        with progress.step(f"roll back on {opened.name}"):
            version, left = store.rollback(name, check=check)
        size_bytes = store.size_bytes(version)
    return _deployment(opened, store, name, version, size_bytes, tried, left, progress)


def _deployment(
    opened: Device,
    store: Store,
    name: str,
    version: OnDevice,
    size_bytes: int,
    tried: dict[str, Any],
    previous: str | None,
    progress: Progress,
) -> Deployment:
    folder = str(version.parent.parent / name)
    if not store.atomic:
        progress.note(
            f"{opened.name}: `mv` there knows no -T, so that for a moment there was no {folder}."
        )
    return Deployment(
        folder=folder,
        device=opened.name,
        size_bytes=size_bytes,
        sent_bytes=store.sent_bytes,
        golden_samples=int(tried["samples"]),
        version=version.name,
        previous=previous,
    )


def _place(opened: Device, bundle: Bundle, destination: str | Path | None) -> tuple[Store, str]:
    """Return where a bundle goes: the folder for bundles on the device, and its name there."""
    shell = open_shell(opened.name)
    if destination is None:
        return Store(shell, find_device(opened.name).folder), bundle.manifest.name
    path = PurePosixPath(destination)
    return Store(shell, str(path.parent)), path.name


def _files(bundle: Bundle) -> dict[str, str]:
    """SHA-256 of every file that the board needs, as the manifest says, and its own."""
    files = {f["path"]: f["sha256"] for f in bundle.manifest.files if f["role"] not in _STAYS_HERE}
    files["manifest.json"] = bundle.manifest_sha256
    if bundle.signature is not None:
        files["manifest.sig"] = hashlib.sha256(bundle.signature).hexdigest()
    return files


def _size_bytes(bundle: Bundle) -> int:
    listed = [f["size_bytes"] for f in bundle.manifest.files if f["role"] not in _STAYS_HERE]
    return int(sum(listed)) + len(bundle.manifest_bytes) + len(bundle.signature or b"")


def _selftest(opened: Device, version: OnDevice, consequence: str) -> dict[str, Any]:
    tried = opened.selftest(version)
    if not tried["passed"]:
        raise DeviceFailed(
            f"{opened.name}: the selftest of {version.name} fails there, {consequence}; run "
            "`edgepress verify` to see by how much."
        )
    return tried


@contextmanager
def _refusals() -> Iterator[None]:
    """Say of a destination that is taken what is said of every other one."""
    try:
        yield
    except NotOurs as error:
        raise OutputError(str(error)) from None
