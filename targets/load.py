"""Boards as data: read a TOML file, check it strictly, and check it against LLVM.

A board is one file in `targets/boards/`. Its keys are the fields of
`edgepress.targets.base.Target`; the file's stem is the target's name. A file with `[[candidate]]`
tables describes the machine it is read on: the first candidate whose `cpu_flags` are all in
`/proc/cpuinfo` is the target. TVM is imported only where LLVM is asked.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import tomllib
import typing
from collections.abc import Collection, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from edgepress.targets.base import Target, TargetError, UnknownTarget

LLVM_NAMES = {"armv7l": "arm"}
"""Triples whose first part LLVM's list of architectures spells differently."""
GPU_HOSTS = ("x86_64", "aarch64")

_GPU_ARCHITECTURE = re.compile(r"sm_(?:[89]\d|1\d\d)[af]?")  # kernels need those of Ampere


class InvalidBoard(TargetError):
    """A board file breaks a rule, or names what LLVM does not know."""


def target_names() -> list[str]:
    """Every target, by file name, sorted.

    >>> "raspberry-pi-4" in target_names()
    True
    """
    files = (entry.name for entry in resources.files("edgepress.targets.boards").iterdir())
    return sorted(name.removesuffix(".toml") for name in files if name.endswith(".toml"))


def load_target(name: str) -> Target:
    """Read the board file of this name.

    Raises:
        UnknownTarget: no such file; the message has the near names.
        InvalidBoard: the file breaks a rule, or this machine fits none of its candidates.

    >>> load_target("raspberry-pi-5").isa
    'neon_dotprod'
    """
    if name not in target_names():
        raise UnknownTarget(name, target_names())
    file = resources.files("edgepress.targets.boards") / f"{name}.toml"
    return parse_target(name, file.read_text(encoding="utf-8"))


def parse_target(name: str, text: str, cpuinfo: str | None = None) -> Target:
    """Build the target `name` from the text of a board file.

    Args:
        name: the target's name; messages call the file by it.
        text: TOML.
        cpuinfo: text of `/proc/cpuinfo` to choose a candidate by; None asks this machine, and
            counts the cores that this process may use.

    Raises:
        InvalidBoard: the file breaks a rule, or the machine fits none of its candidates.
    """
    try:
        board = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidBoard(f"{name}.toml is not TOML: {error}. Mend the file.") from error
    candidates = board.pop("candidate", None)
    if candidates is None:
        return _target(name, board)
    if cpuinfo is None:
        path = Path("/proc/cpuinfo")
        host = path.read_text(encoding="utf-8") if path.exists() else ""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    else:
        host = cpuinfo
        cores = max(1, len(_cpuinfo_lines(host, "processor")))
    flags = host_flags(host)
    targets = [_target(name, {"cores": cores} | board | candidate) for candidate in candidates]
    for target in targets:
        if flags.issuperset(target.cpu_flags):
            return target
    wanted = ", or ".join(" ".join(target.cpu_flags) for target in targets)
    raise InvalidBoard(
        f"{name}: this machine fits no candidate of {name}.toml: /proc/cpuinfo must list {wanted}. "
        "Name a board instead; `edgepress targets` lists them all."
    )


def host_flags(cpuinfo: str) -> frozenset[str]:
    """Flags that every processor of a `/proc/cpuinfo` text has (`flags` on x86, `Features` on Arm).

    >>> sorted(host_flags("flags : fma avx2"))
    ['avx2', 'fma']
    """
    lines = _cpuinfo_lines(cpuinfo, "flags") or _cpuinfo_lines(cpuinfo, "Features")
    return frozenset.intersection(*(frozenset(line.split()) for line in lines or [""]))


def validate(target: Target) -> None:
    """Check the architecture, cpu and features against LLVM's own lists.

    TVM itself only prints a line on stderr and compiles for something else.

    Raises:
        InvalidBoard: LLVM does not know one of them; the message has the near names.
    """
    from tvm.target import codegen

    architecture = LLVM_NAMES.get(target.architecture, target.architecture)
    architectures = {str(name) for name in codegen.llvm_get_targets()}
    if architecture not in architectures:
        _refuse(target, "architecture", architecture, architectures)
    cpus, features = _llvm_names(target.triple)
    if target.cpu not in cpus:
        _refuse(target, "cpu", target.cpu, cpus)
    for feature in target.features:
        if feature[1:] not in features:
            _refuse(target, "feature", feature[1:], features)


def tvm_target(target: Target) -> Any:
    """Return the validated `tvm.target.Target`. Raises InvalidBoard as `validate` does."""
    from tvm.target import Target as TvmTarget

    validate(target)
    options: dict[str, Any] = {
        "kind": "llvm",
        "mtriple": target.triple,
        "mcpu": target.cpu,
        "num-cores": target.cores,
    }
    if target.features:
        options["mattr"] = list(target.features)
    if target.float_abi:
        options["mfloat-abi"] = target.float_abi
    if target.triple.startswith("arm"):
        # LLVM's pass that merges stores may add to a base register that later stores still use:
        # wrong results, and writes beyond the tensor.
        options["cl-opt"] = ["-arm-load-store-opt:bool=0"]
    return TvmTarget(options)


def _target(name: str, board: Mapping[str, Any]) -> Target:
    """Check every key and type of one board table and build the target."""
    kinds = {key: kind for key, kind in typing.get_type_hints(Target).items() if key != "name"}
    for key, value in board.items():
        if key not in kinds:
            raise InvalidBoard(f"{name}.toml: unknown key {key!r}.{near_names(key, kinds)}")
        if kinds[key] == tuple[str, ...]:
            fits = isinstance(value, list) and all(isinstance(item, str) for item in value)
        else:
            fits = type(value) is kinds[key]
        if not fits:
            wanted = "a list of strings" if kinds[key] == tuple[str, ...] else kinds[key].__name__
            raise InvalidBoard(f"{name}.toml: {key} must be {wanted}, it is {value!r}.")
    required = {f.name for f in dataclasses.fields(Target) if f.default is dataclasses.MISSING}
    if missing := sorted(required - {"name"} - board.keys()):
        raise InvalidBoard(f"{name}.toml: missing {', '.join(missing)}. Add what is missing.")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in board.items()}
    target = Target(name=name, **values)
    if target.cores < 1 or target.memory_bytes < 0:
        raise InvalidBoard(f"{name}.toml: cores must be 1 or more and memory_bytes 0 or more.")
    if unsigned := [feature for feature in target.features if feature[:1] not in ("+", "-")]:
        raise InvalidBoard(f"{name}.toml: features start with + or -, {unsigned[0]!r} does not.")
    _check_gpu(target)
    return target


def _check_gpu(target: Target) -> None:
    """Check what a board file says about the GPU, or that it says nothing."""
    wanted = ""
    if target.is_cuda and not _GPU_ARCHITECTURE.fullmatch(target.gpu_arch):
        wanted = f"gpu_arch must be sm_80 or later, it is {target.gpu_arch!r}."
    elif target.is_cuda and target.architecture not in GPU_HOSTS:
        wanted = f"the host of a GPU is {' or '.join(GPU_HOSTS)}, not {target.architecture}."
    elif target.is_cuda != (target.isa == "cuda"):
        wanted = 'gpu_arch and isa = "cuda" go together.'
    elif target.is_cuda != (target.gpu_multiprocessors > 0):
        wanted = "gpu_multiprocessors must be 1 or more where there is a gpu_arch, else 0."
    if wanted:
        raise InvalidBoard(f"{target.name}.toml: {wanted}")


def _cpuinfo_lines(cpuinfo: str, key: str) -> list[str]:
    """Right-hand sides of every line of this key, one per processor."""
    pairs = (line.partition(":") for line in cpuinfo.splitlines())
    return [value.strip() for left, _, value in pairs if left.strip() == key]


@cache
def _llvm_names(triple: str) -> tuple[frozenset[str], frozenset[str]]:
    """Every cpu that LLVM knows for this triple, and every feature that one of them has."""
    from tvm.target import Target as TvmTarget
    from tvm.target import codegen

    base = {"kind": "llvm", "mtriple": triple}
    cpus = frozenset(str(cpu) for cpu in codegen.llvm_get_cpu_archlist(TvmTarget(base)))
    of_cpu = (codegen.llvm_get_cpu_features(TvmTarget(base | {"mcpu": cpu})) for cpu in cpus)
    return cpus, frozenset(str(feature) for features in of_cpu for feature in features)


def _refuse(target: Target, what: str, name: str, known: Collection[str]) -> typing.NoReturn:
    """Raise for a name that LLVM does not know."""
    raise InvalidBoard(
        f"{target.name}.toml: LLVM knows no {what} {name!r} for {target.triple}."
        f"{near_names(name, known)}"
    )


def near_names(name: str, known: Collection[str]) -> str:
    """Say which known names are near."""
    near = difflib.get_close_matches(name, known, 3, 0.5)
    return f" Did you mean {' or '.join(near)}?" if near else f" Known: {', '.join(sorted(known))}."
