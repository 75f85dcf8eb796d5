"""Looks at this machine: what is there, what is missing, and what mends it."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from edgepress.pipeline.cache import cache_folder
from edgepress.targets.base import CompileFailed, Target, TargetError
from edgepress.targets.cuda.toolkit import INSTALL, NVCC_VARIABLE, cuda_compiler
from edgepress.targets.load import load_target, target_names

PINS = {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post1"}
LIBRARIES = ("cryptography", "numpy", "onnx", "onnx-ir", "onnxruntime")
EXTRAS = {"torch": ("passes that train", "train")}  # what for, and the extra that brings it
FREE_BYTES = 2 << 30


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: what was looked for.
        ok: whether it is as it should be.
        found: what was found, in words.
        fix: what to do where it is not ok.
        needed: whether nothing works without it; else only some targets want it.
    """

    what: str
    ok: bool
    found: str
    fix: str = ""
    needed: bool = True


def examine() -> list[Finding]:
    """Look at everything; the needed first."""
    programs = [*_programs(), *_cuda()]
    return [_python(), *_packages(), _tvm(), *programs, *_extras(), _ssh(), _cache(), _space()]


def _python() -> Finding:
    version = platform.python_version()
    fix = "install Python 3.11 or newer"
    return Finding(what="Python", ok=sys.version_info >= (3, 11), found=version, fix=fix)


def _packages() -> list[Finding]:
    findings = []
    for name in (*PINS, *LIBRARIES):
        version = _version(name)
        wanted = PINS.get(name, version)
        install = f"pip install {name}=={wanted}" if name in PINS else f"pip install {name}"
        ok = bool(version) and version == wanted
        findings.append(Finding(what=name, ok=ok, found=version or "not installed", fix=install))
    return findings


def _extras() -> list[Finding]:
    findings = []
    for name, (purpose, extra) in EXTRAS.items():
        version, fix = _version(name), f"pip install 'edgepress[{extra}]'"
        findings.append(
            Finding(
                what=f"{name} (for {purpose})",
                ok=bool(version),
                found=version or "not installed",
                fix=fix,
                needed=False,
            )
        )
    return findings


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _tvm() -> Finding:
    try:
        from tvm.target import codegen

        count = len(codegen.llvm_get_targets())
    except Exception as error:  # whatever a broken installation raises is what to tell
        fix = "pip install --force-reinstall apache-tvm==0.27.0.post1"
        return Finding(what="TVM with LLVM", ok=False, found=str(error), fix=fix)
    return Finding(what="TVM with LLVM", ok=count > 0, found=f"{count} architectures")


def _programs() -> list[Finding]:
    """Look for the compilers and emulators of every target, each once."""
    findings: dict[str, Finding] = {}
    for target in _targets():
        native = target.architecture == platform.machine()
        fix = f"apt-get install {target.compiler_package}" if target.compiler_package else ""
        for program, package, needed in (
            (target.compiler, fix, native),
            (target.emulator, "apt-get install qemu-user", False),
        ):
            if program and program not in findings:
                path = shutil.which(program)
                findings[program] = Finding(
                    what=f"{program} (for {target.name})",
                    ok=path is not None,
                    found=path or "not found",
                    fix=package or f"install {program}",
                    needed=needed,
                )
    return sorted(findings.values(), key=lambda finding: not finding.needed)


def _cuda() -> list[Finding]:
    """Look for what compiles kernels for GPUs."""
    targets = [target.name for target in _targets() if target.is_cuda]
    if not targets:
        return []
    fix = INSTALL
    try:
        compiler = cuda_compiler()
        ok, found = True, f"{compiler}, {compiler.path}"
    except CompileFailed:
        ok, found = False, "not found"
        if asked := os.environ.get(NVCC_VARIABLE):
            found, fix = f"{asked}: no nvcc that works", f"unset {NVCC_VARIABLE}, or name another"
    what = f"a CUDA compiler (for {', '.join(targets)})"
    return [Finding(what=what, ok=ok, found=found, fix=fix, needed=False)]


def _targets() -> list[Target]:
    targets = []
    for name in target_names():
        try:
            targets.append(load_target(name))
        except TargetError:  # a machine that fits no candidate of `native`
            continue
    return targets


def _ssh() -> Finding:
    """Look for the client that reaches boards."""
    path = shutil.which("ssh")
    return Finding(
        what="ssh (for boards)",
        ok=path is not None,
        found=path or "not found",
        fix="apt-get install openssh-client",
        needed=False,
    )


def _cache() -> Finding:
    folder = cache_folder()
    fix = "set EDGEPRESS_CACHE_DIR to a folder that you may write to, or use --no-cache"
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    ok = existing.is_dir() and os.access(existing, os.W_OK)
    found = f"{folder}, {_bytes_in(folder) / 1e6:.0f} MB"
    return Finding(what="cache", ok=ok, found=found, fix=fix, needed=False)


def _space() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    found = f"{free / 1e9:.1f} GB free here"
    fix = "free some space; a large model needs 2 GB while it is built"
    return Finding(what="disk", ok=free > FREE_BYTES, found=found, fix=fix, needed=False)


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
