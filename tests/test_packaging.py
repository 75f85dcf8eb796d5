"""The wheel holds the tree: under an editable install a forgotten folder would go unnoticed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("calibration", "passes", "pipeline", "targets")
SHIPPED = {".py", ".cuh", ".toml", ".c", ".h", ".json", ".typed", ".html"}


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Build from a copy, so that a stale `build/` or egg-info cannot hide a gap."""
    copy, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, copy / package, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, str(output)],
        cwd=copy,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = output.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def tree_files() -> set[str]:
    paths = (path for package in PACKAGES for path in (ROOT / package).rglob("*"))
    return {
        f"edgepress/{path.relative_to(ROOT).as_posix()}"
        for path in paths
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_is_the_tree(wheel_files: set[str]) -> None:
    assert wheel_files == tree_files()


def test_the_tree_holds_only_what_is_meant_to_ship() -> None:
    assert {name for name in tree_files() if Path(name).suffix not in SHIPPED} == set()


@pytest.mark.parametrize(
    "name",
    [
        "edgepress/targets/boards/raspberry-pi-4.toml",
        "edgepress/targets/runtime/cpu.c",
        "edgepress/targets/runtime/cpu.h",
        "edgepress/targets/tiles/avx2.json",
        "edgepress/pipeline/recipes/default.toml",
        "edgepress/passes/py.typed",
    ],
)
def test_data_files_are_in_the_wheel(wheel_files: set[str], name: str) -> None:
    assert name in wheel_files


def test_every_folder_is_a_package_with_a_docstring_file() -> None:
    with_code = {path.parent for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert {str(folder) for folder in with_code if not (folder / "__init__.py").is_file()} == set()
