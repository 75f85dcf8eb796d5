"""Install a bundle where its device runs it: copied, checked, tried, and only then renamed in.

What goes there is what the board needs: the executable, the library with its header, the weights,
the golden files and the manifest. A copy whose bytes differ or whose selftest fails never replaces
what was installed before.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from edgepress.pipeline.bundle import Bundle, BundleError
from edgepress.pipeline.cache import file_sha256
from edgepress.pipeline.output import new_folder
from edgepress.pipeline.progress import Progress
from edgepress.pipeline.verify import bundle_target
from edgepress.targets.base import DeviceFailed
from edgepress.targets.devices.base import open_device

_STAYS_HERE = ("graph",)


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """What was installed.

    Attributes:
        folder: where it lies on the device.
        device: the device's name.
        size_bytes: bytes of all its files.
        golden_samples: how many golden samples it answered right there.
    """

    folder: Path
    device: str
    size_bytes: int
    golden_samples: int


def deploy(
    bundle: Bundle,
    device: str | None,
    *,
    destination: Path | None = None,
    progress: Progress | None = None,
) -> Deployment:
    """Install a bundle on a device, replacing an older one of the same place.

    Args:
        bundle: what to install; it was checked when it was read.
        device: `local` or `qemu`, which both run from this machine's disk; None chooses by target.
        destination: the folder there, `~/edgepress/NAME` unless given.
        progress: where to say how far it is.

    Raises:
        DeviceFailed: the device cannot run it, or its selftest fails there.
        OutputError: the destination cannot be written, or is no bundle.
        BundleError: a copied file differs from the manifest.
    """
    progress = progress or Progress(shown=False)
    opened = open_device(device, bundle_target(bundle))
    folder = destination or Path.home() / "edgepress" / bundle.manifest.name
    with new_folder(folder, overwrite=True) as partial:
        size_bytes = 0
        with progress.step(f"copy to {folder}"):
            for listed in bundle.manifest.files:
                if listed["role"] not in _STAYS_HERE:
                    _copy(bundle.folder, partial, listed["path"], listed["sha256"])
                    size_bytes += listed["size_bytes"]
            shutil.copy2(bundle.folder / "manifest.json", partial / "manifest.json")
        with progress.step(f"selftest on {opened.name}"):
            tried = opened.selftest(partial)
        if not tried.get("passed"):
            raise DeviceFailed(
                f"{opened.name}: the bundle's selftest fails there, so it was not installed; "
                "run `edgepress verify` to see by how much."
            )
    return Deployment(
        folder=folder,
        device=opened.name,
        size_bytes=size_bytes,
        golden_samples=len(list((folder / "golden").glob("*.in"))),
    )


def _copy(source: Path, target: Path, path: str, sha256: str) -> None:
    (target / path).parent.mkdir(exist_ok=True)
    shutil.copy2(source / path, target / path)
    if file_sha256(target / path) != sha256:
        raise BundleError(f"{path} was not copied faithfully to {target}; check the disk.")
