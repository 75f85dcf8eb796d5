"""Which compiler of CUDA C++ is used, and what is said where there is none."""

from __future__ import annotations

import shutil
from importlib import metadata
from pathlib import Path

import pytest

from edgepress.pipeline.doctor import examine
from edgepress.targets.base import CompileFailed
from edgepress.targets.cuda import toolkit
from edgepress.targets.cuda.toolkit import CudaCompiler, cuda_compiler, cuda_compiler_version

PINNED = "nvidia-cuda-nvrtc-cu12"


@pytest.fixture(autouse=True)
def nothing_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EDGEPRESS_NVCC", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without Python packages of NVIDIA's and without a toolkit."""
    monkeypatch.setattr(toolkit, "NVRTC_PACKAGES", ("no-such-package",))
    monkeypatch.setattr(toolkit, "NVCC_PACKAGES", ("no-such-package",))
    monkeypatch.setattr(toolkit, "_USUAL_FOLDER", tmp_path / "nothing")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


def nvcc(folder: Path, version: str = "12.3.107", status: int = 0) -> Path:
    """An nvcc that can only say its version."""
    program = folder / "bin" / "nvcc"
    program.parent.mkdir(parents=True)
    said = f"Cuda compilation tools, release {version[:4]}, V{version}"
    program.write_text(f"#!/bin/sh\necho '{said}'\nexit {status}\n", "utf-8")
    program.chmod(0o755)
    return program


def test_the_pinned_package_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = nvcc(tmp_path)
    monkeypatch.setenv("PATH", str(other.parent), prepend=":")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    found = cuda_compiler()
    assert found.kind == "nvrtc"
    assert found.path.name == "libnvrtc.so.12"
    assert found.path.is_file()
    assert found.version == metadata.version(PINNED)
    assert cuda_compiler_version() == f"nvrtc {metadata.version(PINNED)}"


def test_what_the_user_names_comes_before_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = nvcc(tmp_path)
    monkeypatch.setenv("EDGEPRESS_NVCC", str(program))
    assert cuda_compiler() == CudaCompiler("nvcc", program, "12.3.107")
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.setenv("EDGEPRESS_NVCC", "nvcc")
    assert cuda_compiler() == CudaCompiler("nvcc", program, "12.3.107")
    assert cuda_compiler_version() == "nvcc 12.3.107"


@pytest.mark.parametrize("status", [None, 1])
def test_a_name_of_no_compiler_is_refused_though_there_is_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int | None
) -> None:
    program = tmp_path / "bin" / "nvcc" if status is None else nvcc(tmp_path, status=status)
    monkeypatch.setenv("EDGEPRESS_NVCC", str(program))
    with pytest.raises(CompileFailed, match=r"EDGEPRESS_NVCC is '.*nvcc'.*pip install"):
        cuda_compiler()
    assert cuda_compiler_version() == "not found"


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_a_toolkit_that_the_environment_names_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    program = nvcc(tmp_path / "toolkit")
    monkeypatch.setenv(variable, str(tmp_path / "toolkit"))
    assert cuda_compiler().path == program


@pytest.mark.usefixtures("nothing_installed")
def test_one_that_does_not_work_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(nvcc(tmp_path / "broken", status=1).parent))
    monkeypatch.setattr(toolkit, "_USUAL_FOLDER", tmp_path / "usual")
    program = nvcc(tmp_path / "usual")
    assert cuda_compiler().path == program


@pytest.mark.usefixtures("nothing_installed")
def test_without_any_it_says_what_to_install() -> None:
    assert shutil.which("nvcc") is None
    with pytest.raises(CompileFailed, match=r"pip install 'edgepress\[cuda\]' brings one"):
        cuda_compiler()
    assert cuda_compiler_version() == "not found"


def test_the_advice_is_an_extra_that_brings_the_first_choice() -> None:
    extra = toolkit.INSTALL.partition("[")[2].partition("]")[0]
    brought = [need for need in metadata.requires("edgepress") or [] if f"extra == '{extra}'" in
               need.replace('"', "'")]  # fmt: skip
    assert [need.partition("=")[0] for need in brought] == [toolkit.NVRTC_PACKAGES[0]]


def test_the_doctor_tells_which_one_is_used() -> None:
    (finding,) = (one for one in examine() if one.what.startswith("a CUDA compiler (for cuda-"))
    assert finding.ok
    assert finding.found.startswith(f"nvrtc {metadata.version(PINNED)}, /")
    assert not finding.needed


@pytest.mark.usefixtures("nothing_installed")
def test_the_doctor_tells_what_to_install() -> None:
    (finding,) = (one for one in examine() if one.what.startswith("a CUDA compiler"))
    assert (finding.ok, finding.found, finding.fix) == (False, "not found", toolkit.INSTALL)


def test_the_doctor_tells_that_what_was_asked_for_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPRESS_NVCC", "/no/nvcc")
    (finding,) = (one for one in examine() if one.what.startswith("a CUDA compiler"))
    assert (finding.ok, finding.found) == (False, "/no/nvcc: no nvcc that works")
    assert "EDGEPRESS_NVCC" in finding.fix
