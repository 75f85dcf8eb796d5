"""Container images: the stage of the Dockerfile that a target needs, and the engine that builds it.

Errors::

    ImageError       nothing to build from, or a stage that is not there
     └─ ImageFailed  no engine works here, or the build failed
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import edgepress.pipeline
from edgepress.targets.base import UnknownTarget
from edgepress.targets.load import load_target, target_names

ENGINES = ("docker", "podman", "buildah")
"""In the order in which they are tried."""

STAGE_OF_ARCHITECTURE = {"x86_64": "x86", "aarch64": "cross-aarch64", "armv7l": "cross-armv7"}
EXAMPLE_TARGETS = {
    "x86": "x86-64-v3",
    "cross-aarch64": "raspberry-pi-4",
    "cross-armv7": "armv7-neon",
    "cuda": "cuda-sm80",
}
"""Every stage that becomes an image, with a target that it can build for."""

_STAGE = re.compile(r"^FROM\s+\S+\s+AS\s+(\S+)\s*$", re.IGNORECASE | re.MULTILINE)
_HUMAN_SIZE = re.compile(r"([\d.]+) ?([kKMGT]?)B")
_ENGINE_S = 30
_STDERR = 2


class ImageError(Exception):
    """There is nothing to build an image from: what, where, what to do."""


class ImageFailed(ImageError):
    """No engine works here, or the one that was asked failed."""


@dataclass(frozen=True, kw_only=True)
class PassedOver:
    """An engine that was not taken, and why: what it said, or that it is not installed."""

    engine: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Image:
    """An image that can be built.

    Attributes:
        engine: `docker`, `podman` or `buildah`.
        stage: of the Dockerfile.
        target: a target to build for in it.
        tag: its name.
        base: image that it starts from; empty: what the Dockerfile names.
        context: the checkout, as an absolute path.
    """

    engine: str
    stage: str
    target: str
    tag: str
    base: str = ""
    context: Path

    @property
    def command(self) -> list[str]:
        """Words of the command that builds it."""
        base = [f"--build-arg=BASE_IMAGE={self.base}"] if self.base else []
        options = [f"--target={self.stage}", *base, f"--tag={self.tag}"]
        return [self.engine, "build", *options, str(self.context)]

    @property
    def use(self) -> str:
        """A shell line that runs it on the working folder as whoever types it."""
        tag = shlex.quote(self.tag)
        user, mount = '--user "$(id -u):$(id -g)"', '-v "$PWD:/work"'
        work = f"run model.onnx -t {self.target} -o bundle"
        if self.engine == "buildah":
            return (
                f'c=$(buildah from {tag}) && buildah run {user} {mount} "$c" -- edgepress {work}; '
                'buildah rm "$c"'
            )
        keep = " --userns=keep-id" if self.engine == "podman" else ""
        return f"{self.engine} run --rm{keep} {user} {mount} {tag} {work}"


def stage_of(name: str) -> tuple[str, str]:
    """Return the stage for a target or a stage's name, and a target to build for in it.

    Raises:
        UnknownTarget: neither a target nor a stage has this name.
        ImageError: no stage builds for the target's architecture.

    >>> stage_of("raspberry-pi-4")
    ('cross-aarch64', 'raspberry-pi-4')
    >>> stage_of("cuda")
    ('cuda', 'cuda-sm80')
    """
    if name in EXAMPLE_TARGETS:
        return name, EXAMPLE_TARGETS[name]
    if name == "native":  # whatever the host is: the images have their own compiler for it
        return "x86", name
    if name not in target_names():
        raise UnknownTarget(name, [*EXAMPLE_TARGETS, *target_names()])
    target = load_target(name)
    if target.is_cuda:
        return "cuda", name
    architecture = target.architecture
    if architecture not in STAGE_OF_ARCHITECTURE:
        raise ImageError(
            f"{name} is {architecture}, for which the Dockerfile has no stage. Add one, and its "
            "name to pipeline/image.py."
        )
    return STAGE_OF_ARCHITECTURE[architecture], name


def find_context(given: Path | None, stage: str) -> Path:
    """Return the checkout to build from, as an absolute path.

    It is what was given; else where edgepress was installed from, where that is a checkout; else
    the working folder.

    Raises:
        ImageError: it is no checkout, or its Dockerfile has no such stage.
    """
    installed = Path(edgepress.pipeline.__path__[0]).parent
    candidates = [installed, Path.cwd()] if given is None else [given]
    context = next((folder for folder in candidates if _is_checkout(folder)), None)
    if context is None:
        where = "here" if given is None else f"in {given}"
        raise ImageError(
            f"no checkout of edgepress {where}: images are built from its Dockerfile and sources, "
            "which an installed edgepress lacks. Run this in a checkout, or name it with --context."
        )
    stages = _STAGE.findall((context / "Dockerfile").read_text("utf-8"))
    if stage not in stages:
        raise ImageError(
            f"{context / 'Dockerfile'} has no stage {stage}; it has {', '.join(stages) or 'none'}. "
            "Use a checkout of this version of edgepress."
        )
    return context.resolve()


def find_engine() -> tuple[str, list[PassedOver]]:
    """Return the first engine that works, and those before it that do not.

    A program that is there without what it needs, such as `docker` without its daemon, is passed
    over.

    Raises:
        ImageFailed: none works; the message has what each of them said.
    """
    passed_over: list[PassedOver] = []
    for engine in ENGINES:
        why = broken(engine)
        if not why:
            return engine, passed_over
        passed_over.append(PassedOver(engine=engine, why=why))
    said = " ".join(f"{other.engine}: {_sentence(other.why)}" for other in passed_over)
    raise ImageFailed(
        f"nothing here can build an image. {said} Start the Docker daemon, or on Debian and "
        "Ubuntu: apt-get install buildah. To see the command for another machine, add "
        "`--engine docker --print`."
    )


def broken(engine: str) -> str:
    """Say why an engine cannot be used here; empty where it can."""
    if shutil.which(engine) is None:
        return "not installed"
    try:
        done = subprocess.run(
            [engine, "info"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_ENGINE_S,
            check=False,
        )
    except OSError as error:
        return f"cannot be started: {error.strerror or error}"
    except subprocess.TimeoutExpired:
        return f"no answer within {_ENGINE_S} s"
    if done.returncode == 0:
        return ""
    said = (done.stderr.strip() or done.stdout.strip()).decode("utf-8", "replace")
    return (
        said.splitlines()[-1].strip() if said else f"`{engine} info` ended with {done.returncode}"
    )


def build(image: Image) -> None:
    """Build an image; everything that the engine prints goes to stderr.

    Raises:
        ImageFailed: the engine cannot be started, or failed.
    """
    try:
        done = subprocess.run(image.command, stdin=subprocess.DEVNULL, stdout=_STDERR, check=False)
    except OSError as error:
        raise ImageFailed(
            f"{image.engine} cannot be started: {error.strerror or error}. Install it, or name "
            "another with --engine."
        ) from None
    if done.returncode:
        raise ImageFailed(
            f"{image.engine} failed with exit code {done.returncode} while it built the stage "
            f"{image.stage}; its own last lines, above, say why. The command was: "
            f"{shlex.join(image.command)}"
        )


def size_bytes(image: Image) -> int | None:
    """Ask the engine for the size of an image, or None; buildah rounds to three digits."""
    if image.engine == "buildah":
        command = ["buildah", "images", "--format={{.Size}}", image.tag]
    else:
        command = [image.engine, "image", "inspect", "--format={{.Size}}", image.tag]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_ENGINE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    said = done.stdout.strip().partition("\n")[0] if done.returncode == 0 else ""
    if said.isdecimal():
        return int(said)
    human = _HUMAN_SIZE.fullmatch(said)
    if human is None:
        return None
    return round(float(human[1]) * 1000.0 ** " KMGT".index(human[2].upper() or " "))


def _is_checkout(folder: Path) -> bool:
    """Whether edgepress can be installed from a folder."""
    try:
        project = (folder / "pyproject.toml").read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return 'name = "edgepress"' in project.splitlines() and (folder / "Dockerfile").is_file()


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?", "!")) else f"{text}."
