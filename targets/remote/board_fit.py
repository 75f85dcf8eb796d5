"""Whether a board runs the bundles of a target, and whether a measurement there would mean much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from edgepress.targets.base import Target
from edgepress.targets.glibc_needs import Version, parse_version, version_text
from edgepress.targets.remote.board_probe import BoardFacts
from edgepress.targets.remote.board_scripts import TOOLS

_LOADERS = {
    "aarch64-linux-gnu": "/lib/ld-linux-aarch64.so.1",
    "armv7l-linux-gnueabihf": "/lib/ld-linux-armhf.so.3",
    "armv7l-linux-gnueabi": "/lib/ld-linux.so.3",
    "x86_64-linux-gnu": "/lib64/ld-linux-x86-64.so.2",
}
_RUNS = {
    "x86_64": ("x86_64",),
    "aarch64": ("aarch64", "armv7l"),
    "armv8l": ("armv7l",),
    "armv7l": ("armv7l",),
}
"""Architectures of bundles, by that of the kernel."""

# A 64-bit kernel lists features of 64-bit programs; in 32 bits a CPU with `asimd` has these, too.
_IN_32_BITS = ("half", "thumb", "fastmult", "vfp", "edsp", "neon", "vfpv3", "tls", "vfpv4", "idiva",
               "idivt", "vfpd32")  # fmt: skip
_HOT_CELSIUS = 70
_BUSY = 0.5
_LEAST_FREE_BYTES = 2**20
_FEW_FREE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Finding:
    """Something about a board that its user should know.

    Attributes:
        kind: `stops`: no bundle runs, or none can be installed; `spoils`: a time that is measured
            there would not be that of the board; `note`: what else is unusual.
        text: a sentence or two: what, and what to do.
    """

    kind: Literal["stops", "spoils", "note"]
    text: str


def compare(
    facts: BoardFacts,
    target: Target | None,
    *,
    run_with: Sequence[str] = (),
    glibc: Version | None = None,
) -> list[Finding]:
    """Say what stops bundles of a target on a board, then what would spoil a measurement there.

    Args:
        facts: of the board.
        target: what bundles are built for; None looks at the board alone.
        run_with: words before the executable on the board; an emulator runs any architecture.
        glibc: the oldest that the bundles run with, or None where that is not known.
    """
    found = []
    emulator = PurePosixPath(run_with[0]).name if run_with else ""
    if run_with and not facts.program:
        found.append(Finding("stops", f"run_with names {run_with[0]}, which is not there."))
    if emulator.startswith("qemu-"):
        note = (
            f"bundles run under {emulator} there: the answers are right, but no time is measured."
        )
        return [*found, *_about_storage(facts), Finding("note", note)]
    if target is not None:
        found += [Finding("stops", text) for text in stopping(facts, target, glibc)]
    return [*found, *_about_storage(facts), *_about_measuring(facts, target)]


def stopping(facts: BoardFacts, target: Target, glibc: Version | None = None) -> list[str]:
    """Say why bundles of a target do not start on a board; see `compare`."""
    if wrong := wrong_architecture(facts.machine, target):
        return [wrong]
    found = (_loader(facts, target, glibc), _features(facts, target), _gpu(facts, target))
    return [text for text in found if text]


def wrong_architecture(machine: str, target: Target) -> str:
    """Say that a board whose kernel is for `machine` runs no bundles of a target; empty: it may."""
    if target.architecture in _RUNS.get(machine, (machine,)):
        return ""
    return (
        f"its system is {machine}, but {target.name} bundles are {target.architecture}. "
        "Install another system, or build for another target."
    )


def _features(facts: BoardFacts, target: Target) -> str:
    """Say which CPU features are missing, where the board tells those it has."""
    known = set(facts.features)
    if "asimd" in known and target.architecture == "armv7l":
        known.update(_IN_32_BITS)
    missing = [name for name in target.cpu_flags if name not in known]
    if not known or not missing:
        return ""
    return f"this board lacks {', '.join(missing)}, which {target.name} bundles need."


def _gpu(facts: BoardFacts, target: Target) -> str:
    """Say that a board has no GPU, where a target needs one."""
    if not target.is_cuda or facts.gpus:
        return ""
    return (
        f"{target.name} bundles run on an NVIDIA GPU, and there is none whose driver is loaded: "
        "neither /dev/nvidia0 nor, as on a Jetson, /dev/nvhost-gpu."
    )


def _loader(facts: BoardFacts, target: Target, glibc: Version | None) -> str:
    """Say what is wrong with the loader and its libc."""
    wanted = _LOADERS.get(target.triple)
    if wanted is None:
        return ""
    libc = facts.loaders.get(wanted)
    musl = [name for name in facts.loaders.values() if name.startswith("musl")]
    if musl and not libc:
        return (
            f"its libc is {musl[0]}, but bundles are built for glibc. Install a system with glibc, "
            "such as Debian."
        )
    if libc is None:
        others = ", ".join(path for path in _LOADERS.values() if path in facts.loaders) or "none"
        kernel = "its kernel is 64-bit, but its programs are 32-bit: "
        mixed = target.architecture == facts.machine == "aarch64" and others != "none"
        return (
            f"{kernel if mixed else ''}{wanted}, which starts {target.name} bundles, is not there; "
            f"of its kind there is {others}. Install another system, or build for another target."
        )
    has = parse_version(libc.removeprefix("glibc "))
    if has is not None and glibc is not None and has < glibc:
        return (
            f"its {libc} is too old: bundles that {target.compiler} builds here need "
            f"{version_text(glibc)}. Update the board's system, or build on one whose "
            "cross compiler has an older glibc."
        )
    return ""


def _about_storage(facts: BoardFacts) -> list[Finding]:
    """Say what is wrong with the place where bundles are installed."""
    found = []
    free = facts.disk_free_bytes
    if not facts.writable:
        found.append(Finding("stops", f"this user may not write to {facts.folder}."))
    if not facts.executable:
        text = f"{facts.folder} is mounted noexec, so no bundle starts there. Set another folder."
        found.append(Finding("stops", text))
    if free is not None and free < _LEAST_FREE_BYTES:
        found.append(Finding("stops", f"there is no space left for {facts.folder}."))
    elif free is not None and free < _FEW_FREE_BYTES:
        text = f"only {free / 1e6:.0f} MB are free for {facts.folder}."
        found.append(Finding("note", text))
    if lacking := [tool for tool in TOOLS.split() if tool not in facts.tools]:
        text = (
            f"it lacks {', '.join(lacking)}, which installing takes. Install busybox or coreutils."
        )
        found.append(Finding("stops", text))
    if "mv -T" not in facts.tools:
        text = "its mv has no -T, so for a moment there is no bundle while one is replaced."
        found.append(Finding("note", text))
    return found


def _about_measuring(facts: BoardFacts, target: Target | None) -> list[Finding]:
    """Say what would make a measured time another than the board's own."""
    texts = []
    governors = {core.governor for core in facts.cores if core.governor} - {"performance"}
    if governors:
        texts.append(
            f"its governor is {', '.join(sorted(governors))}, not performance, so frequencies "
            "change while it measures. As root there: echo performance | tee "
            "/sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
        )
    if flags := facts.throttle_flags:
        texts.append(f"{', '.join(flags)}. Mind its power supply and its cooling.")
    if (heat := facts.temperature_celsius) is not None and heat >= _HOT_CELSIUS:
        texts.append(f"its hottest sensor shows {heat:.0f} °C; boards that hot slow down. Cool it.")
    if facts.load is not None and facts.load > _BUSY:
        texts.append(f"its load is {facts.load:.2f}: other programs want its cores. End them.")
    if target is not None and 0 < len(facts.cores) < target.cores:
        texts.append(
            f"it has {len(facts.cores)} cores, but {target.name} bundles run on {target.cores}. "
            f"Measure with --threads {len(facts.cores)}."
        )
    return [Finding("spoils", text) for text in texts]
