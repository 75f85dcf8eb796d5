"""Build the container images without an engine or a registry, and compare a bundle made inside.

    python benchmarks/image.py image-work             # --stage NAME for some stages only

Makes a Debian 12 base with debootstrap and builds the stages with buildah, by `edgepress image`. In
each stage the example is compiled and run for the stage's targets as a user whom the image does not
know. In cross-aarch64 it is also run for a Raspberry Pi 4 as uid 1000, and outside by Debian's own
Python with the same packages: every file of the two bundles but evidence.json must be the same.

Where packages come from is this machine's business and must not stay in an image. EDGEPRESS_MIRROR
is debootstrap's mirror. EDGEPRESS_BUILD_MOUNTS lists files and folders of this machine, separated
by colons, that builds see read-only under the same names: apt's sources, pip's settings.

Needs root, debootstrap, buildah, python3-venv, qemu-user, the Arm cross compiler, and 10 GB.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click

from edgepress.pipeline.image import EXAMPLE_TARGETS, stage_of
from edgepress.targets.load import target_names

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "fashion_mnist"
BASE = "localhost/edgepress-base"
STRANGER = "4321:4321"
COMPILE = """
import sys
from edgepress.targets.compile import compile_kernels
from edgepress.targets.cuda.kernel import CudaKernel
from edgepress.targets.load import load_target
from edgepress.targets.program import Program
source = 'extern "C" __global__ void scale(float *x) { x[threadIdx.x] *= 2; }'
kernel = CudaKernel("scale", source, (), (1, 1, 1), (128, 1, 1))
for name in sys.argv[1:]:
    compile_kernels(Program(kernels={"scale": kernel}), load_target(name))
    print(name)
"""
PACKAGES = "opt/edgepress/lib/python3*/site-packages"
PARTS = {
    "TVM, LLVM inside": [f"{PACKAGES}/tvm", f"{PACKAGES}/tvm_ffi"],
    "onnxruntime": [f"{PACKAGES}/onnxruntime"],
    "SymPy, mpmath": [f"{PACKAGES}/sympy", f"{PACKAGES}/mpmath"],
    "NumPy": [f"{PACKAGES}/numpy", f"{PACKAGES}/numpy.libs"],
    "onnx": [f"{PACKAGES}/onnx"],
    "edgepress": [f"{PACKAGES}/edgepress"],
    "other Python packages": [PACKAGES],
    "Python": ["usr/lib/python3*", "usr/bin/python3*"],
    "gcc for this machine": ["usr/lib/gcc", "usr/bin/x86_64-linux-gnu-*", "usr/include"],
    "cross gcc": ["usr/lib/gcc-cross", "usr/a*-linux-gnu*", "usr/bin/a*-linux-gnu*"],
    "qemu": ["usr/bin/qemu-*"],
    "NVRTC": ["opt/nvrtc"],
    "the rest of Debian": ["."],
}
"""A file counts for the first part that matches."""


class Work:
    """The folder in which everything happens."""

    def __init__(self, folder: Path, mirror: str, mounts: list[str]) -> None:
        self.folder, self.mirror, self.mounts = folder, mirror, mounts
        volumes = [f"{mount}:{mount}:ro" for mount in mounts]
        self.write(
            "containers.conf", f'[containers]\nnetns = "host"\nvolumes = {json.dumps(volumes)}\n'
        )
        store = folder / "store"
        self.write(
            "storage.conf",
            '[storage]\ndriver = "overlay"\n'
            f"graphroot = {json.dumps(f'{store}/root')}\nrunroot = {json.dumps(f'{store}/run')}\n",
        )
        self.environment = os.environ | {
            "BUILDAH_ISOLATION": "chroot",
            "BUILDAH_LAYERS": "true",
            "CONTAINERS_CONF": str(folder / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
        }

    def write(self, name: str, text: str) -> None:
        """Write a file of settings."""
        (self.folder / name).write_text(text, "utf-8")

    def run(self, *command: str | Path, cwd: Path | None = None) -> str:
        """Run a command, let it talk on stderr, and return what it prints."""
        words = [str(word) for word in command]
        done = subprocess.run(
            words, cwd=cwd, env=self.environment, stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            said = done.stdout[-2000:]
            raise click.ClickException(f"{' '.join(words)}: exit code {done.returncode}\n{said}")
        return done.stdout.strip()

    @contextmanager
    def container(self, image: str) -> Iterator[str]:
        """Yield a container of an image, and remove it after the block."""
        name = self.run("buildah", "from", image)
        try:
            yield name
        finally:
            self.run("buildah", "rm", name)

    def remove_store(self) -> None:
        """Remove every container and image, and the base."""
        self.run("buildah", "rm", "--all")
        self.run("buildah", "rmi", "--all", "--force")
        shutil.rmtree(self.folder / "store")
        shutil.rmtree(self.folder / "base", ignore_errors=True)


def make_base(work: Work) -> None:
    """Make a Debian 12 base image that knows nothing of this machine."""
    base = work.folder / "base"
    if not (base / "etc/debian_version").is_file():
        shutil.rmtree(base, ignore_errors=True)
        # With its certificates set up here, a build may have this machine's mounted over them.
        options = ("--variant=minbase", "--include=ca-certificates")
        work.run("debootstrap", *options, "bookworm", base, work.mirror)
        for left in ("etc/apt/sources.list", "var/log/bootstrap.log", "etc/hostname",
                     "etc/resolv.conf"):  # fmt: skip
            (base / left).unlink(missing_ok=True)
        documents = [f"usr/share/{name}" for name in ("doc", "info", "locale", "man")]
        for folder in ("var/cache/apt", "var/lib/apt/lists", *documents):  # like bookworm-slim
            shutil.rmtree(base / folder)
            (base / folder).mkdir()
    with work.container("scratch") as name:
        work.run("buildah", "add", "--quiet", name, base, "/")
        work.run("buildah", "commit", "--quiet", name, BASE)


def build_stage(work: Work, stage: str) -> dict[str, Any]:
    """Build a stage as a user would, and look at what is in it."""
    built = json.loads(
        work.run(
            sys.executable, "-m", "edgepress.pipeline.cli", "image", stage, "--json",
            "--engine", "buildah", "--base", BASE, "--context", ROOT,
        )
    )  # fmt: skip
    facts = {"size_bytes": built["size_bytes"]}
    with work.container(built["tag"]) as name:
        root = Path(work.run("buildah", "mount", name))
        facts |= {"parts": sizes(root), "traces": traces(work, root)}
    return facts


def sizes(root: Path) -> dict[str, int]:
    """Bytes of each part of an image's tree."""
    found, seen = {}, set()
    for part, patterns in PARTS.items():
        total = 0
        for pattern in patterns:
            for top in root.glob(pattern) if pattern != "." else [root]:
                for path in [top, *(top.rglob("*") if top.is_dir() else ())]:
                    status = path.lstat()
                    if path.is_file() and status.st_ino not in seen:
                        seen.add(status.st_ino)
                        total += status.st_size
        if total:
            found[part] = total
    return found


def traces(work: Work, root: Path) -> list[str]:
    """Files of an image that tell of this machine; there must be none.

    Where something was mounted only an empty file or folder may remain, or what the base has there.
    """
    host = (urlsplit(work.mirror).hostname or "").encode()
    mounted = [root / mount.lstrip("/") for mount in work.mounts]
    found = []
    for folder in ("etc", "home", "opt", "root", "src", "usr/local", "var", "work"):
        for path in (root / folder).rglob("*"):
            if path.is_symlink() or not path.is_file() or not path.stat().st_size:
                continue
            content, name = path.read_bytes(), path.relative_to(root)
            of_base = work.folder / "base" / name
            is_new = not of_base.is_file() or of_base.read_bytes() != content
            if host in content or (is_new and any(path.is_relative_to(m) for m in mounted)):
                found.append(str(name))
    return found


def run_inside(work: Work, stage: str, target: str, user: str, *options: str) -> Path:
    """Run the example in a container and return the bundle."""
    folder = work.folder / f"{stage}-{target}-{user.partition(':')[0]}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(EXAMPLE, folder)
    uid, _, gid = user.partition(":")
    for path in [folder, *folder.iterdir()]:
        os.chown(path, int(uid), int(gid))
    with work.container(f"localhost/edgepress:{stage}") as name:
        work.run(
            "buildah", "run", "--user", user, "-v", f"{folder}:/work", name, "--", "edgepress",
            *arguments(target, *options),
        )  # fmt: skip
    return folder / "bundle"


def compile_kernel(work: Work, targets: list[str]) -> list[str]:
    """Compile a kernel in the stage cuda, and return for which targets that worked."""
    with work.container("localhost/edgepress:cuda") as name:
        said = work.run(
            "buildah", "run", "--user", STRANGER, name, "--",
            "/opt/edgepress/bin/python", "-c", COMPILE, *targets,
        )  # fmt: skip
    return said.split()


def run_outside(work: Work, python: Path, target: str, *options: str) -> Path:
    """Run the example outside, with the packages of the images, and return the bundle."""
    environment, folder = work.folder / "outside-venv", work.folder / "outside"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(environment, ignore_errors=True)
    shutil.copytree(EXAMPLE, folder)
    work.run(python, "-m", "venv", environment)
    pip = environment / "bin" / "pip"
    work.run(pip, "install", "--quiet", "--no-deps", "-r", ROOT / "requirements.txt")
    work.run(pip, "install", "--quiet", "--no-deps", ROOT)
    work.run(environment / "bin" / "edgepress", *arguments(target, *options), cwd=folder)
    return folder / "bundle"


def arguments(target: str, *options: str) -> list[str]:
    """Words after `edgepress`."""
    calib = ["--calib", "calib_256.npz"]
    return ["run", "fashion_mnist.onnx", "-t", target, *calib, *options, "--no-cache",
            "-o", "bundle"]  # fmt: skip


def differences(one: Path, other: Path) -> list[str]:
    """Files of two bundles that differ; of manifests, the keys."""
    names = {str(p.relative_to(f)) for f in (one, other) for p in f.rglob("*") if p.is_file()}
    found = []
    for name in sorted(names - {"evidence.json"}):
        contents = [(f / name).read_bytes() if (f / name).is_file() else b"" for f in (one, other)]
        if contents[0] == contents[1]:
            continue
        found.append(name)
        if name == "manifest.json" and all(contents):
            ours, theirs = (flat(json.loads(content)) for content in contents)
            found += [
                f"manifest.json {key}: {ours.get(key)} inside, {theirs.get(key)} outside"
                for key in sorted(ours.keys() | theirs.keys())
                if ours.get(key) != theirs.get(key)
            ]
    return found


def flat(value: object, path: str = "") -> dict[str, object]:
    """Every leaf of a JSON document by its path."""
    if isinstance(value, dict):
        pairs = [(f"{path}.{key}" if path else key, inner) for key, inner in value.items()]
    elif isinstance(value, list):
        pairs = [(f"{path}[{index}]", inner) for index, inner in enumerate(value)]
    else:
        return {path: value}
    return {key: leaf for name, inner in pairs for key, leaf in flat(inner, name).items()}


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--stage", "stages", multiple=True, type=click.Choice(list(EXAMPLE_TARGETS)))
@click.option("--python", type=click.Path(path_type=Path), default="/usr/bin/python3",
              help="What runs edgepress outside.")  # fmt: skip
@click.option("--keep", is_flag=True, help="Leave the images and the base in FOLDER.")
@click.option("--mirror", envvar="EDGEPRESS_MIRROR", default="http://deb.debian.org/debian")
@click.option("--mounts", envvar="EDGEPRESS_BUILD_MOUNTS", default="")
def main(
    folder: Path, stages: tuple[str, ...], python: Path, keep: bool, mirror: str, mounts: str
) -> None:
    """Build the images, run the example in them, and compare its bundle with one made outside."""
    folder.mkdir(parents=True, exist_ok=True)
    work = Work(folder.resolve(), mirror, [mount for mount in mounts.split(":") if mount])
    make_base(work)
    report: dict[str, Any] = {"stages": {}}
    for stage in stages or EXAMPLE_TARGETS:
        facts = report["stages"][stage] = build_stage(work, stage)
        names = {EXAMPLE_TARGETS[stage], *(n for n in target_names() if stage_of(n)[0] == stage)}
        if stage == "cuda":  # nothing that it makes runs here
            facts["compiled"] = compile_kernel(work, sorted(names))
            names = set()
        for target in sorted(names - {"native"}):
            bundle = run_inside(work, stage, target, STRANGER)
            evidence = json.loads((bundle / "evidence.json").read_text("utf-8"))
            verdicts = {row["gate"]: row["verdict"] for row in evidence["verdicts"]}
            facts.setdefault("verdicts", {})[target] = verdicts
        click.echo(json.dumps({stage: facts}, indent=1))
    if "cross-aarch64" in report["stages"]:
        options = ("--eval", "test_2000.npz")
        inside = run_inside(work, "cross-aarch64", "raspberry-pi-4", "1000:1000", *options)
        outside = run_outside(work, python, "raspberry-pi-4", *options)
        report["differences"] = differences(inside, outside)
        click.echo(json.dumps(report["differences"], indent=1))
    (work.folder / "image.json").write_text(json.dumps(report, indent=1), "utf-8")
    if not keep:
        work.remove_store()
    left = [t for facts in report["stages"].values() for t in facts["traces"]]
    sys.exit(bool(left or report.get("differences")))


if __name__ == "__main__":
    main()
