"""What the Dockerfile and its neighbours promise, read from their text; nothing is built."""

from __future__ import annotations

import fnmatch
import re
import tomllib
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from edgepress.pipeline.doctor import PINS
from edgepress.pipeline.image import EXAMPLE_TARGETS, stage_of
from edgepress.targets.load import load_target, target_names
from tests.test_packaging import PACKAGES

ROOT = Path(__file__).parent.parent
PACKAGE_OF_EMULATOR = {"qemu-aarch64": "qemu-user", "qemu-arm": "qemu-user"}


@dataclass
class Stage:
    """One `FROM … AS name` and what follows it, as `(instruction, words)`."""

    name: str
    parent: str
    instructions: list[tuple[str, str]] = field(default_factory=list)


def dockerfile() -> tuple[dict[str, str], dict[str, Stage]]:
    """Defaults of all arguments, and the stages by name."""
    text = (ROOT / "Dockerfile").read_text("utf-8")
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    arguments: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    stage: Stage | None = None
    for line in filter(str.strip, text.splitlines()):
        instruction, _, rest = line.strip().partition(" ")
        if instruction == "FROM":
            parent, _, name = rest.partition(" AS ")
            stage = stages[name] = Stage(name, parent)
        elif instruction == "ARG":
            name, _, default = rest.partition("=")
            arguments[name] = default
        elif stage is not None:
            stage.instructions.append((instruction, re.sub(r"\s+", " ", rest)))
    return arguments, stages


ARGUMENTS, STAGES = dockerfile()


def lineage(name: str) -> list[Stage]:
    """A stage and what it starts from, the eldest first."""
    stage = STAGES[name]
    return [*(lineage(stage.parent) if stage.parent in STAGES else []), stage]


def instructions(name: str, wanted: str) -> list[str]:
    return [rest for stage in lineage(name) for kind, rest in stage.instructions if kind == wanted]


def apt_packages(name: str) -> set[str]:
    found = re.findall(
        r"apt-get install -y --no-install-recommends ((?:[a-z0-9][a-z0-9.+-]* ?)+)",
        " ; ".join(instructions(name, "RUN")),
    )
    return {package for words in found for package in words.split()}


def test_every_stage_that_is_offered_is_there() -> None:
    assert set(EXAMPLE_TARGETS) <= set(STAGES)


@pytest.mark.parametrize("name", EXAMPLE_TARGETS)
def test_no_image_runs_as_root(name: str) -> None:
    own = STAGES[name].instructions
    assert own[-1] == ("USER", "1000")
    assert [rest for kind, rest in own if kind == "USER"] == ["1000"]
    assert any("useradd --create-home --uid 1000 " in run for run in instructions(name, "RUN"))


@pytest.mark.parametrize("name", EXAMPLE_TARGETS)
def test_an_image_is_the_command(name: str) -> None:
    assert instructions(name, "ENTRYPOINT") == ['["edgepress"]']
    assert instructions(name, "WORKDIR") == ["/work"]


@pytest.mark.parametrize("name", EXAMPLE_TARGETS)
def test_any_user_may_write_where_home_and_work_are(name: str) -> None:
    assert any(env.startswith("HOME=/home/edgepress ") for env in instructions(name, "ENV"))
    assert any("chmod 1777 /home/edgepress /work" in run for run in instructions(name, "RUN"))


@pytest.mark.parametrize("name", target_names())
def test_a_stage_has_the_compiler_and_the_emulator_of_its_targets(name: str) -> None:
    target = load_target(name)
    packages = set(target.compiler_package.split())
    if target.emulator:
        packages.add(PACKAGE_OF_EMULATOR[target.emulator])
        unpacked = " ".join(instructions(stage_of(name)[0], "RUN"))
        assert f"'path-include=/usr/bin/{target.emulator}'" in unpacked
    assert packages <= apt_packages(stage_of(name)[0])


@pytest.mark.parametrize("name", EXAMPLE_TARGETS)
def test_every_image_can_deploy_and_count_instructions(name: str) -> None:
    assert {"gcc", "libc6-dev", "openssh-client", "python3"} <= apt_packages(name)


@pytest.mark.parametrize("name", [name for name in STAGES if name not in ("builder", "nvrtc")])
def test_package_lists_do_not_stay(name: str) -> None:
    for run in (rest for kind, rest in STAGES[name].instructions if kind == "RUN"):
        if "apt-get install" in run:
            assert run.endswith("&& apt-get clean && rm -rf /var/lib/apt/lists/* /var/log/*")


def test_what_comes_from_outside_is_pinned_by_an_argument() -> None:
    outside = {stage.parent for stage in STAGES.values()} - set(STAGES)
    assert outside == {"${BASE_IMAGE}"}
    assert ARGUMENTS["BASE_IMAGE"] == "debian:bookworm-slim"
    nvrtc = " ".join(rest for _, rest in STAGES["nvrtc"].instructions)
    assert '"nvidia-cuda-nvrtc-cu12==${CUDA_NVRTC}"' in nvrtc
    pip = [rest for rest in instructions("builder", "RUN") if "pip --python" in rest]
    assert all("install --no-deps" in rest for rest in pip)


def test_the_compiler_for_gpus_is_that_of_the_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (extra,) = map(Requirement, project["optional-dependencies"]["cuda"])
    assert str(extra.specifier) == f"=={ARGUMENTS['CUDA_NVRTC']}"
    assert ("COPY", "--from=nvrtc /opt/nvrtc /opt/nvrtc") in STAGES["cuda"].instructions
    assert "PYTHONPATH=/opt/nvrtc" in instructions("cuda", "ENV")


def copied() -> set[str]:
    """What the Dockerfile takes from the context."""
    words = [
        rest.split()[:-1]
        for stage in STAGES.values()
        for kind, rest in stage.instructions
        if kind == "COPY" and not rest.startswith("--from")
    ]
    return {word for part in words for word in part}


def test_the_context_is_what_is_copied() -> None:
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied()
    assert rules[-1] == "**/__pycache__"
    assert all((ROOT / name).exists() for name in copied())


def test_the_packages_of_the_wheel_are_copied() -> None:
    assert set(PACKAGES) <= copied()


# ---- requirements.txt


def pinned() -> dict[str, str]:
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    pairs = (line.partition("==") for line in lines if not line.startswith("#"))
    return {name: version for name, _, version in pairs}


def project_requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    texts = [*project["dependencies"], *project["optional-dependencies"]["images"]]
    return [Requirement(text) for text in texts]


def test_everything_that_edgepress_needs_is_pinned_and_fits() -> None:
    for requirement in project_requirements():
        version = pinned()[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement


def test_what_those_need_is_pinned_too() -> None:
    """Against what is installed here, whose own requirements are at hand."""
    missing = set()
    for name in pinned():
        try:
            needs = metadata.distribution(name).requires or []
        except metadata.PackageNotFoundError:
            continue
        for need in map(Requirement, needs):
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                missing |= {canonicalize_name(need.name)} - set(pinned())
    assert missing == set()


def test_the_pins_of_tvm_agree() -> None:
    assert {name: pinned()[name] for name in PINS} == PINS


def test_names_are_sorted_and_canonical() -> None:
    names = list(pinned())
    assert names == sorted(names)
    assert names == [canonicalize_name(name) for name in names]


def test_dpkg_leaves_out_nothing_that_is_needed() -> None:
    rules = re.findall(r"'path-(exclude|include)=([^']+)'", " ".join(instructions("base", "RUN")))
    assert len(rules) >= 8

    def unpacked(path: str) -> bool:
        last = [kind for kind, pattern in rules if fnmatch.fnmatch(path, pattern)]
        return not last or last[-1] == "include"

    assert unpacked("/usr/bin/qemu-aarch64")
    assert unpacked("/usr/bin/qemu-arm")
    assert not unpacked("/usr/bin/qemu-x86_64")
    assert unpacked("/usr/bin/aarch64-linux-gnu-gcc-12")
    assert unpacked("/usr/share/doc/gcc/copyright")
    assert not unpacked("/usr/share/man/man1/gcc.1.gz")
    assert not unpacked("/usr/bin/aarch64-linux-gnu-lto-dump-12")
