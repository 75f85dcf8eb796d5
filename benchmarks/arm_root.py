"""Make small Arm systems in which other runtimes run under qemu: one folder per kind of core.

    python benchmarks/arm_root.py arm-root

Each holds Debian's Python 3.11, unpacked from .deb files, and wheels from PyPI: numpy, onnxruntime
and ncnn for aarch64; ncnn, with Debian's numpy, for 32-bit Arm, which has no onnxruntime. Nothing
is installed on this machine. Needs pip, dpkg, and apt-get with the archive of Debian 12.

onnxruntime reads /proc/cpuinfo and /sys to choose its kernels, and those of this machine would lead
it astray. So a root describes one core of the board itself; qemu answers from there.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import click

_DEBS = (
    "python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "libc6", "libgcc-s1",
    "libstdc++6", "zlib1g", "libexpat1", "libssl3", "libffi8", "libbz2-1.0", "liblzma5",
    "libuuid1", "libgomp1",
)  # fmt: skip
_ARM64 = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")


@dataclass(frozen=True)
class System:
    """One root.

    Attributes:
        name: its folder.
        debian: Debian's name of the architecture.
        debs: more packages.
        platforms: of wheels.
        wheels: what to fetch.
        part: of the core in /proc/cpuinfo.
        features: likewise.
        links: libraries that Debian's alternatives would link, inside the library folder.
    """

    name: str
    debian: str
    debs: tuple[str, ...]
    platforms: tuple[str, ...]
    wheels: tuple[str, ...]
    part: str
    features: str
    links: tuple[str, ...] = ()


SYSTEMS = (
    System(
        "cortex-a76", "arm64", (), _ARM64, ("numpy", "onnxruntime", "ncnn"), "0xd0b",
        "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc "
        "dcpop asimddp",
    ),
    System(
        "cortex-a72", "arm64", (), _ARM64, ("numpy", "onnxruntime", "ncnn"), "0xd08",
        "fp asimd evtstrm crc32 cpuid",
    ),
    System(
        "cortex-a7", "armhf", ("python3-numpy", "libblas3", "liblapack3", "libgfortran5"),
        ("manylinux_2_31_armv7l",), ("ncnn",), "0xc07",
        "half thumb fastmult vfp edsp neon vfpv3 tls vfpv4 idiva idivt vfpd32 lpae evtstrm",
        ("blas/libblas.so.3", "lapack/liblapack.so.3"),
    ),
)  # fmt: skip


def make(system: System, root: Path) -> None:
    """Fetch and unpack one root."""
    folder = root / system.name
    debs, wheels = root / f"{system.debian}-debs", root / f"{system.debian}-wheels"
    if not debs.is_dir():
        _download_debs(system, debs)
    for package in sorted(debs.glob("*.deb")):
        subprocess.run(["dpkg", "-x", str(package), str(folder)], check=True)
    for link in system.links:
        (library,) = (folder / "usr/lib").glob("*/" + link)
        target = library.parent.parent / library.name
        target.unlink(missing_ok=True)
        target.symlink_to(library.relative_to(target.parent))
    if not wheels.is_dir():
        platforms = [part for platform in system.platforms for part in ("--platform", platform)]
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(wheels),
             *platforms, "--only-binary=:all:", "--python-version", "311", *system.wheels],
            check=True,
        )  # fmt: skip
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / "site")
    _describe_core(system, folder)


def _download_debs(system: System, debs: Path) -> None:
    """Let apt fetch packages of another architecture without adding it to this machine."""
    state = debs / "apt"
    for part in ("lists/partial", "archives/partial"):
        (state / part).mkdir(parents=True)
    (state / "status").touch()
    settings = {
        "Dir::State": state, "Dir::State::lists": state / "lists",
        "Dir::State::status": state / "status", "Dir::Cache": state,
        "Dir::Cache::archives": state / "archives", "APT::Architecture": system.debian,
    }  # fmt: skip
    options = [part for key, value in settings.items() for part in ("-o", f"{key}={value}")]
    options += ["-o", f"APT::Architectures::={system.debian}"]
    update = subprocess.run(["apt-get", *options, "update"], capture_output=True, check=False)
    wanted = [f"{name}:{system.debian}" for name in (*_DEBS, *system.debs)]
    fetched = subprocess.run(["apt-get", *options, "download", *wanted], cwd=debs, check=False)
    shutil.rmtree(state)
    if fetched.returncode:
        said = update.stderr.decode("utf-8", "replace").strip()
        shutil.rmtree(debs)
        raise click.ClickException(f"apt-get could not fetch the packages. {said}")


def _describe_core(system: System, folder: Path) -> None:
    """Write what the kernel of the board would say about one core."""
    cpu = folder / "sys/devices/system/cpu"
    values = {"possible": "0", "present": "0", "online": "0", "kernel_max": "255"}
    for name in (
        "core_siblings_list",
        "cluster_cpus_list",
        "thread_siblings_list",
        "core_cpus_list",
    ):
        values[f"cpu0/topology/{name}"] = "0"
    for name in ("physical_package_id", "core_id", "cluster_id"):
        values[f"cpu0/topology/{name}"] = "0"
    values |= {
        "cpu0/cpufreq/cpuinfo_max_freq": "1800000",
        "cpu0/cpufreq/cpuinfo_min_freq": "600000",
    }
    caches = (("1", "Data", "64K"), ("1", "Instruction", "64K"), ("2", "Unified", "512K"))
    for index, (level, kind, size) in enumerate(caches):
        facts = {"level": level, "type": kind, "size": size, "coherency_line_size": "64",
                 "shared_cpu_list": "0", "shared_cpu_map": "1"}  # fmt: skip
        values |= {f"cpu0/cache/index{index}/{key}": value for key, value in facts.items()}
    for name, value in values.items():
        path = cpu / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value + "\n")
    proc = folder / "proc"
    proc.mkdir(exist_ok=True)
    (proc / "cpuinfo").write_text(
        f"processor\t: 0\nBogoMIPS\t: 108.00\nFeatures\t: {system.features}\n"
        "CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x0\n"
        f"CPU part\t: {system.part}\nCPU revision\t: 3\n\n"
    )


@click.command(help=__doc__.partition("\n")[0])
@click.argument("root", type=click.Path(file_okay=False, path_type=Path))
def main(root: Path) -> None:
    """Make every root that is not there."""
    root.mkdir(parents=True, exist_ok=True)
    for system in SYSTEMS:
        if not (root / system.name / "proc/cpuinfo").is_file():
            click.echo(f"{system.name} …", err=True)
            make(system, root.resolve())


if __name__ == "__main__":
    main()
