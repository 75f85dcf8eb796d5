"""A folder of bundles as one small file: equal files are stored once, all of them as .tar.xz.

    python3 pack.py unpack PACK.tar.xz FOLDER

What `--selftest`, `--bench` and `--profile` read travels, and nothing else of a bundle. Plain
Python, since the machine with the GPU has no edgepress.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import lzma
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

INDEX = "index.json"
OBJECTS = "objects"
CARRIED = ("model", "weights.epw", "golden/0.in", "golden/0.out")
# Equal bits of files that lie that far apart are still found, and unpacking needs that much memory.
WINDOW_BYTES = 64 << 20


def pack(bundles: Path, configurations: Sequence[dict[str, Any]], destination: Path) -> int:
    """Write the bundles BUNDLES/NAME of all configurations; return the size of the file.

    A configuration is a dict with its `name`; what else is in it ends up in the index.
    """
    objects: dict[str, Path] = {}
    entries = []
    for configuration in configurations:
        folder = bundles / configuration["name"]
        files = {name: _digest(folder / name) for name in CARRIED}
        objects |= {digest: folder / name for name, digest in files.items()}
        entries.append(configuration | {"files": files})
    # what resembles each other lies together: by kind, then by model as the configurations are
    order = sorted(objects, key=lambda digest: CARRIED.index(_kind(objects[digest])))
    index = json.dumps({"configurations": entries}, indent=1).encode()
    filters = [
        {
            "id": lzma.FILTER_LZMA2,
            "preset": 9,
            "dict_size": WINDOW_BYTES,
        }
    ]
    with (
        lzma.open(destination, "wb", filters=filters) as stream,
        tarfile.open(fileobj=stream, mode="w|") as archive,
    ):
        _add(archive, INDEX, index)
        for digest in order:
            _add(archive, f"{OBJECTS}/{digest}", objects[digest].read_bytes())
    return destination.stat().st_size


def unpack(source: Path, folder: Path) -> list[dict[str, Any]]:
    """Unpack to FOLDER/NAME, one folder a configuration; return the configurations."""
    folder.mkdir(parents=True, exist_ok=True)
    with lzma.open(source) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
        archive.extractall(folder, filter="data")
    configurations = read_index(folder)
    for configuration in configurations:
        for name, digest in configuration["files"].items():
            path = folder / configuration["name"] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            os.link(folder / OBJECTS / digest, path)
            if name == "model":
                path.chmod(0o755)
    return configurations


def read_index(folder: Path) -> list[dict[str, Any]]:
    """Return the configurations of an unpacked folder."""
    configurations: list[dict[str, Any]] = json.loads((folder / INDEX).read_text("utf-8"))[
        "configurations"
    ]
    return configurations


def _kind(path: Path) -> str:
    return next(name for name in CARRIED if path.as_posix().endswith(f"/{name}"))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def main() -> None:
    """Unpack."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("command", choices=["unpack"])
    parser.add_argument("pack", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    for configuration in unpack(arguments.pack, arguments.folder):
        print(configuration["name"])


if __name__ == "__main__":
    main()
