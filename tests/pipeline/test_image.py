"""Images: which stage for which target, which engine, from where, and in which words."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.pipeline import image as images
from edgepress.pipeline.cli import exit_code
from edgepress.pipeline.image import (
    ENGINES,
    EXAMPLE_TARGETS,
    Image,
    ImageError,
    ImageFailed,
    PassedOver,
    broken,
    build,
    find_context,
    find_engine,
    size_bytes,
    stage_of,
)
from edgepress.pipeline.image_commands import image as image_command
from edgepress.targets.base import UnknownTarget
from edgepress.targets.load import target_names

ROOT = Path(__file__).parent.parent.parent
STAGES = {
    "armv7-neon": "cross-armv7",
    "armv7-soft-float": "cross-armv7",
    "armv8-i8mm": "cross-aarch64",
    "cortex-a55": "cross-aarch64",
    "cuda-sm80": "cuda",
    "cuda-sm90": "cuda",
    "jetson-agx-orin": "cuda",
    "jetson-orin-nano": "cuda",
    "native": "x86",
    "raspberry-pi-4": "cross-aarch64",
    "raspberry-pi-5": "cross-aarch64",
    "x86-64-v3": "x86",
    "x86-64-v4": "x86",
}
WORKING = '#!/bin/sh\nprintf "%s\\n" "$0" "$@" >> "$LOG"\n'
BROKEN = '#!/bin/sh\necho "looking for it" >&2; echo "Cannot connect to the daemon." >&2; exit 1\n'


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole PATH; what runs there may note its words in `$LOG`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    return folder


def program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(text, "utf-8")
    path.chmod(0o755)


def command(name: str, **options: Any) -> int:
    defaults: dict[str, Any] = dict.fromkeys(("engine", "base", "tag", "context"))
    defaults |= {"print_only": False, "as_json": False}
    return image_command(name, **(defaults | options))


def logged(programs: Path) -> list[str]:
    return (programs.parent / "log").read_text("utf-8").splitlines()


# ---- stages


def test_every_target_has_its_stage() -> None:
    assert {name: stage_of(name)[0] for name in target_names()} == STAGES


@pytest.mark.parametrize("stage", EXAMPLE_TARGETS)
def test_a_stage_has_its_own_name_and_a_target_that_it_builds(stage: str) -> None:
    found, target = stage_of(stage)
    assert found == stage
    assert stage_of(target)[0] == stage


def test_a_target_is_built_for_itself() -> None:
    assert stage_of("raspberry-pi-5") == ("cross-aarch64", "raspberry-pi-5")


def test_native_needs_no_machine_that_fits_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "load_target", None)
    assert stage_of("native") == ("x86", "native")


def test_an_unknown_name_is_refused_with_the_near_ones() -> None:
    with pytest.raises(UnknownTarget, match="cross-aarch64"):
        stage_of("cross-arch64")


def test_a_target_of_another_architecture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(images.STAGE_OF_ARCHITECTURE, "aarch64")
    with pytest.raises(ImageError, match=r"raspberry-pi-4 is aarch64.*no stage"):
        stage_of("raspberry-pi-4")


# ---- the checkout


def test_the_checkout_that_edgepress_was_installed_from_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_context(None, "x86") == ROOT


def test_an_installed_edgepress_takes_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgepress.pipeline.__path__", [str(tmp_path / "site/pipeline")])
    monkeypatch.chdir(ROOT)
    assert find_context(None, "x86") == ROOT
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImageError, match=r"no checkout of edgepress here.*--context"):
        find_context(None, "x86")


@pytest.mark.parametrize("missing", ["Dockerfile", "pyproject.toml", "name"])
def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path, missing: str) -> None:
    files = {"Dockerfile": "FROM x AS x86\n", "pyproject.toml": '[project]\nname = "edgepress"\n'}
    if missing == "name":
        files["pyproject.toml"] = '[project]\nname = "other"\n'
    for name, text in files.items():
        if name != missing:
            (tmp_path / name).write_text(text, "utf-8")
    with pytest.raises(ImageError, match=re.escape(str(tmp_path))):
        find_context(tmp_path, "x86")


def test_a_checkout_without_the_stage_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "edgepress"\n', "utf-8")
    (tmp_path / "Dockerfile").write_text("FROM a AS base\nfrom base as x86\n", "utf-8")
    assert find_context(tmp_path, "x86") == tmp_path.resolve()
    with pytest.raises(ImageError, match="has no stage cuda; it has base, x86"):
        find_context(tmp_path, "cuda")


# ---- engines


@pytest.mark.parametrize("engine", ENGINES)
def test_the_engine_that_is_there_is_taken(programs: Path, engine: str) -> None:
    program(programs, engine, WORKING)
    found, passed_over = find_engine()
    assert found == engine
    assert {other.why for other in passed_over} <= {"not installed"}
    assert logged(programs) == [str(programs / engine), "info"]


def test_a_docker_without_its_daemon_is_passed_over(programs: Path) -> None:
    program(programs, "docker", BROKEN)
    program(programs, "buildah", WORKING)
    assert find_engine() == (
        "buildah",
        [
            PassedOver(engine="docker", why="Cannot connect to the daemon."),
            PassedOver(engine="podman", why="not installed"),
        ],
    )


def test_where_nothing_works_everybody_has_a_say(programs: Path) -> None:
    program(programs, "docker", BROKEN)
    program(programs, "podman", "#!/no/such/interpreter\n")
    with pytest.raises(ImageFailed) as caught:
        find_engine()
    said = str(caught.value)
    assert "docker: Cannot connect to the daemon. podman: cannot be started: " in said
    assert "buildah: not installed." in said
    assert "--engine docker --print" in said


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("#!/bin/sh\nexit 3\n", "`docker info` ended with 3"),
        ("#!/bin/sh\necho no luck; exit 1\n", "no luck"),
        ("#!/bin/sh\nexit 0\n", ""),
    ],
)
def test_what_a_broken_engine_says_is_told(programs: Path, text: str, why: str) -> None:
    program(programs, "docker", text)
    assert broken("docker") == why


def test_an_engine_that_does_not_answer_is_broken(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(programs, "docker", "#!/bin/sh\nread forever < /dev/zero\nwhile :; do :; done\n")
    monkeypatch.setattr(images, "_ENGINE_S", 0.2)
    assert broken("docker") == "no answer within 0.2 s"


# ---- the command


@settings(deadline=None, max_examples=60)
@given(
    base=st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1),
    tag=st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1),
    folder=st.text(st.characters(exclude_characters="\0", codec="utf-8")),
)
def test_every_name_is_one_word(base: str, tag: str, folder: str) -> None:
    image = Image(
        engine="podman",
        stage="x86",
        target="native",
        tag=tag,
        base=base,
        context=Path("/" + folder),
    )
    words = image.command
    assert words == [
        "podman",
        "build",
        "--target=x86",
        f"--build-arg=BASE_IMAGE={base}",
        f"--tag={tag}",
        str(Path("/" + folder)),
    ]
    assert shlex.split(shlex.join(words)) == words
    assert shlex.split(image.use).count(tag) >= 1


def test_print_shows_one_line_and_builds_nothing(
    programs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program(programs, "docker", BROKEN)
    program(programs, "podman", WORKING)
    assert command("armv7-neon", base="my base;$(x)'", print_only=True) == 0
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1
    assert shlex.split(printed.out) == [
        "podman",
        "build",
        "--target=cross-armv7",
        "--build-arg=BASE_IMAGE=my base;$(x)'",
        "--tag=edgepress:cross-armv7",
        str(ROOT),
    ]
    assert printed.err == "docker is passed over: Cannot connect to the daemon.\n"
    assert logged(programs) == [str(programs / "podman"), "info"]


def test_a_named_engine_need_not_be_here_to_print_its_command(
    programs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not list(programs.iterdir())
    assert command("cuda", engine="docker", print_only=True) == 0
    wanted = ["docker", "build", "--target=cuda", "--tag=edgepress:cuda", str(ROOT)]
    assert shlex.split(capsys.readouterr().out) == wanted


def test_a_named_engine_that_does_not_work_is_refused(programs: Path) -> None:
    program(programs, "docker", BROKEN)
    with pytest.raises(ImageFailed, match="docker cannot be used here: Cannot connect to the"):
        command("x86", engine="docker")


SIZES = {
    "docker": ("1105432100", 1105432100),
    "podman": ("1105432100", 1105432100),
    "buildah": ("1.105 GB", 1105000000),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_build_runs_the_words_and_says_size_and_use(
    programs: Path, capfd: pytest.CaptureFixture[str], engine: str
) -> None:
    said, size = SIZES[engine]
    program(
        programs,
        engine,
        WORKING + f'case "$1" in build) echo "STEP 1";; image*) echo "{said}";; esac\n',
    )
    assert command("raspberry-pi-4", tag="a b", base="x:y", as_json=True) == 0
    printed = capfd.readouterr()
    assert printed.err == "STEP 1\n"  # one document on stdout, and nothing else
    document = json.loads(printed.out)
    words = [
        engine,
        "build",
        "--target=cross-aarch64",
        "--build-arg=BASE_IMAGE=x:y",
        "--tag=a b",
        str(ROOT),
    ]
    assert document.pop("passed_over") == [
        {"engine": other, "why": "not installed"} for other in ENGINES[: ENGINES.index(engine)]
    ]
    use = document.pop("use")
    assert document == {
        "engine": engine,
        "stage": "cross-aarch64",
        "tag": "a b",
        "base": "x:y",
        "context": str(ROOT),
        "command": words,
        "built": True,
        "size_bytes": size,
    }
    assert use.startswith(f"{engine} run " if engine != "buildah" else "c=$(buildah from 'a b')")
    assert "run model.onnx -t raspberry-pi-4 -o bundle" in use
    assert "\n".join(words[1:]) in "\n".join(logged(programs))


def test_a_build_ends_with_the_command_that_uses_it(
    programs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program(programs, "docker", WORKING + '[ "$1" != image ] || echo 512000000\n')
    assert command("x86") == 0
    assert capfd.readouterr().out == (
        "edgepress:x86, 512 MB. To use it:\n\n"
        '  docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" edgepress:x86 '
        "run model.onnx -t x86-64-v3 -o bundle\n"
    )


def test_a_failed_build_says_what_failed(programs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program(programs, "docker", '#!/bin/sh\n[ "$1" = info ] || { echo "no space"; exit 17; }\n')
    with pytest.raises(ImageFailed) as caught:
        command("x86", tag="a b")
    assert "docker failed with exit code 17 while it built the stage x86" in str(caught.value)
    assert "docker build --target=x86 '--tag=a b'" in str(caught.value)
    assert capfd.readouterr().err == "no space\n"


def test_an_engine_that_cannot_be_started_is_a_failure(programs: Path) -> None:
    image = Image(engine="docker", stage="x86", target="native", tag="t", context=programs)
    with pytest.raises(ImageFailed, match="docker cannot be started"):
        build(image)
    assert size_bytes(image) is None


@pytest.mark.parametrize(
    ("said", "size"),
    [
        ("2.85 KB", 2850),
        ("131 MB", 131_000_000),
        ("1.21 GB", 1_210_000_000),
        ("12 B", 12),
        ("", None),
        ("lots", None),
    ],
)
def test_sizes_as_buildah_writes_them(programs: Path, said: str, size: int | None) -> None:
    program(programs, "buildah", f"#!/bin/sh\necho '{said}'\n")
    image = Image(engine="buildah", stage="x86", target="native", tag="t", context=programs)
    assert size_bytes(image) == size


def test_nothing_to_build_from_is_usage_and_a_failed_build_is_a_failed_compilation() -> None:
    assert exit_code(ImageError("")) == 2
    assert exit_code(ImageFailed("")) == 4
