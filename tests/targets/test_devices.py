import dataclasses
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

import edgepress.targets.command_device as devices
from edgepress.targets import children
from edgepress.targets.base import DeviceFailed, Target
from edgepress.targets.devices import qemu
from edgepress.targets.devices.base import open_device
from edgepress.targets.export import export
from edgepress.targets.load import load_target
from edgepress.targets.named_devices import device_names
from edgepress.targets.program import Array
from tests.targets.tiny import (
    ARMV7,
    HOST,
    PI4,
    compile_c,
    export_tiny,
    need,
    tiny_answer,
    tiny_feed,
    tiny_program,
)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(HOST, tmp_path_factory.mktemp("host") / "bundle").folder


@pytest.fixture(scope="module")
def pi4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("qemu-aarch64", "qemu-user")
    return export_tiny(PI4, tmp_path_factory.mktemp("pi4") / "bundle").folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def check_answers(answers: list[dict[str, Array]], feeds: list[dict[str, Array]]) -> None:
    assert len(answers) == len(feeds)
    for answer, feed in zip(answers, feeds, strict=True):
        for name, wanted in tiny_answer(feed).items():
            assert (answer[name].dtype, answer[name].shape) == (wanted.dtype, wanted.shape)
            np.testing.assert_array_equal(answer[name], wanted)


def test_the_kinds_of_devices() -> None:
    assert {"local", "qemu"} <= set(device_names())
    assert "base" not in device_names()


def test_the_device_follows_from_the_target() -> None:
    assert open_device(None, HOST).name == "local"
    need("qemu-arm", "qemu-user")
    assert open_device(None, ARMV7).name == "qemu"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lokal", "no device is called 'lokal'. Did you mean local"),
        ("usb:1", "Known: .*local, qemu"),
        ("base", "no device is called 'base'"),
        ("local:1", "local takes no address"),
        ("qemu:1", "qemu takes no address"),
        ("qemu", "the target host has no emulator"),
    ],
)
def test_wrong_devices(spec: str, message: str) -> None:
    with pytest.raises(DeviceFailed, match=message):
        open_device(spec, HOST)


def test_local_refuses_another_architecture() -> None:
    with pytest.raises(DeviceFailed, match=r"but armv7 is armv7l\. Use the device qemu"):
        open_device("local", ARMV7)


def test_a_missing_emulator_is_named() -> None:
    with pytest.raises(DeviceFailed, match="apt-get install qemu-user"):
        open_device("qemu", dataclasses.replace(PI4, emulator="absent-qemu"))


def test_local(host: Path) -> None:
    device = open_device("local", HOST)
    assert device.info(host)["name"] == "tiny"
    assert device.selftest(host)["passed"] is True
    feeds = [tiny_feed(seed) for seed in range(7)]
    check_answers(device.infer(host, feeds), feeds)
    assert device.infer(host, []) == []
    made = device.bench(host, threads=1, seconds=0.001, runs=20)
    assert len(made.samples_ms) >= 20
    assert (made.threads, made.instructions, made.device["name"]) == (1, None, "local")
    first = str(min(os.sched_getaffinity(0)))
    pinned = device.bench(host, threads=None, seconds=0.001, runs=20, cores=first)
    assert (pinned.threads, pinned.device["cores"]) == (1, first)
    assert pinned.device["peak_memory_bytes"] > 100_000
    assert not device.emulated
    assert platform.node() in device.machine
    calls = device.profile(host, threads=1, seconds=0.001, runs=20)
    assert len(calls) == 3
    assert all(0 < ms < 1 for ms in calls)


def test_a_profile_is_asked_for_as_a_bench_is(tmp_path: Path) -> None:
    model = tmp_path / "model"
    said = (
        '{"runs": 9, "calls": [{"mean_ms": 9, "midmean_ms": 2}, {"mean_ms": 9, "midmean_ms": 3}]}'
    )
    model.write_text(f"#!/bin/sh\necho $* >{tmp_path}/arguments\necho '{said}'\n")
    model.chmod(0o755)
    device = open_device("local", HOST)
    assert device.profile(tmp_path, threads=None, seconds=0.5, runs=7) == [2.0, 3.0]
    asked = (tmp_path / "arguments").read_text().split()
    assert asked == ["--profile", "--warmup", "0.5", "--seconds", "0.5", "--runs", "7"]
    device.profile(tmp_path, threads=3, seconds=1, runs=1)
    assert (tmp_path / "arguments").read_text().split()[-2:] == ["--threads", "3"]


def test_many_samples_go_in_parts(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    run = children.run

    def spy(
        command: Sequence[str], stdin: bytes, timeout_s: float
    ) -> subprocess.CompletedProcess[bytes]:
        calls.append(len(stdin))
        return run(command, stdin, timeout_s)

    monkeypatch.setattr(devices, "_CHUNK_BYTES", 60)
    monkeypatch.setattr(children, "run", spy)
    feeds = [tiny_feed(seed) for seed in range(5)]
    check_answers(open_device("local", HOST).infer(host, feeds), feeds)
    assert calls == [0, 50, 50, 25]  # --info, then two samples of 25 bytes at a time


def without(feed: dict[str, Array]) -> dict[str, Array]:
    return {"x": feed["x"]}


def renamed(feed: dict[str, Array]) -> dict[str, Array]:
    return {"y": feed["x"], "offset": feed["offset"]}


def other_dtype(feed: dict[str, Array]) -> dict[str, Array]:
    return feed | {"x": feed["x"].astype(np.float64)}


def other_shape(feed: dict[str, Array]) -> dict[str, Array]:
    return feed | {"x": feed["x"].reshape(3, 2)}


@pytest.mark.parametrize("change", [without, renamed, other_dtype, other_shape])
def test_wrong_feeds(host: Path, change: Callable[[dict[str, Array]], dict[str, Array]]) -> None:
    with pytest.raises(ValueError, match="feed 1"):
        open_device("local", HOST).infer(host, [tiny_feed(0), change(tiny_feed(1))])


def test_a_failed_selftest_is_an_answer(host: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(host, tmp_path / "bundle"))
    (broken / "golden/0.out").write_bytes(b"\xff" * 28)
    assert open_device("local", HOST).selftest(broken)["passed"] is False


INFO = '{"inputs": [], "outputs": [{"name": "y", "dtype": "int8", "shape": [2], "bytes": 2}]}'


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("kill -SEGV $$", "ended by SIGSEGV"),
        ("kill -ILL $$", "ended by SIGILL"),
        ("echo oh; echo no; exit 0", "should print a JSON object .*: oh\nno"),
        ("echo [1]", r"should print a JSON object .*: \[1\]"),
        ("echo '{}'", "should print a JSON object with inputs, outputs"),
        ("echo wrong >&2; exit 3", "exited with 3: wrong"),
        ("sleep 30", "did not end in 0.2 s"),
        (f"[ $1 = --info ] && echo '{INFO}' || echo -n abc", "wrote 3 bytes instead of 2"),
    ],
)
def test_programs_that_misbehave(
    tmp_path: Path, script: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script.startswith("sleep"):
        monkeypatch.setattr(devices, "_START_S", 0.2)
    model = tmp_path / "model"
    model.write_text(f"#!/bin/sh\n{script}\n")
    model.chmod(0o755)
    with pytest.raises(DeviceFailed, match=message):
        open_device("local", HOST).infer(tmp_path, [{}])


def test_no_program_at_all(tmp_path: Path) -> None:
    with pytest.raises(DeviceFailed, match=r"cannot start .*model"):
        open_device("local", HOST).info(tmp_path)


def test_qemu(pi4: Path) -> None:
    device = open_device("qemu", PI4)
    assert device.selftest(pi4)["passed"] is True
    feeds = [tiny_feed(seed) for seed in range(3)]
    check_answers(device.infer(pi4, feeds), feeds)


def test_qemu_counts_instructions_and_never_milliseconds(pi4: Path) -> None:
    made = [open_device("qemu", PI4).bench(pi4, threads=2, seconds=1, runs=100) for _ in range(2)]
    assert made[0].instructions == made[1].instructions
    assert made[0].instructions is not None
    assert 100 < made[0].instructions < 5000
    assert made[0].samples_ms == ()
    assert made[0].threads == 1
    assert "cortex-a72" in made[0].device["emulator"]


LOOP = r"""
#include <stdint.h>
#include <stddef.h>
static int32_t loop(int turns)
{
    for (volatile int i = 0; i < turns; i++) {}
    return 0;
}
int32_t add_one(const float *x, float *y) { (void)x, (void)y; return loop(100); }
int32_t scale(const float *x, const float *factor, float *y)
{
    (void)x, (void)factor, (void)y;
    return loop(1100);
}
int32_t sum(const float *x, const int8_t *offset, int32_t *total)
{
    (void)x, (void)offset, (void)total;
    return loop(3100);
}
"""


@pytest.mark.parametrize("target", [PI4, ARMV7], ids=lambda target: target.name)
def test_qemu_counts_the_instructions_of_every_call(tmp_path: Path, target: Target) -> None:
    need(target.emulator, "qemu-user")
    code = compile_c(target, LOOP)
    export(tiny_program(), code, target, tmp_path / "loops", name="loops", tolerances=(0, 0))
    device = open_device("qemu", target)
    assert device.emulated
    assert device.machine == ""
    counts = [device.profile(tmp_path / "loops", threads=4, seconds=1, runs=9) for _ in range(2)]
    assert counts[0] == counts[1]
    first, second, third = counts[0]
    turn = round((third - second) / 2000)
    assert 3 <= turn <= 12
    assert third - second == pytest.approx(2000 * turn, abs=20)
    assert 0 < second - 1100 * turn < 200, "calling, returning and looking at the clock"
    assert 0 < first - 100 * turn < 2000, "the first call begins an inference"
    whole = device.bench(tmp_path / "loops", threads=1, seconds=1, runs=1).instructions
    assert whole is not None
    assert whole == pytest.approx(sum(counts[0]), abs=2000)


def test_an_uncounted_profile_says_why(pi4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(version: int) -> Path:
        raise DeviceFailed(f"no version {version}")

    monkeypatch.setattr(qemu, "build_plugin", fail)
    with pytest.raises(DeviceFailed, match="instructions were not counted: no version 1"):
        open_device("qemu", PI4).profile(pi4, threads=1, seconds=1, runs=1)


@pytest.mark.parametrize("readings", [0, 9, 11])
def test_a_profile_that_looks_at_the_clock_otherwise_is_an_error(readings: int) -> None:
    lines = b"".join(b"edgepress-clock %d\n" % count for count in range(readings))
    with pytest.raises(DeviceFailed, match=f"looked at the clock {readings} times instead of 10"):
        qemu._per_call(lines, 1)


def test_counts_are_those_of_the_second_inference() -> None:
    # 3 readings before, the start, the end and the next start of either inference, 1 after
    at = [0, 1, 2, 10, 20, 21, 30, 47, 48, 50]
    assert qemu._per_call(b"".join(b"edgepress-clock %d\n" % count for count in at), 1) == [17.0]


def test_an_uncounted_bench_says_why(pi4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(version: int) -> Path:
        raise DeviceFailed(f"no version {version}")

    monkeypatch.setattr(qemu, "build_plugin", fail)
    made = open_device("qemu", PI4).bench(pi4, threads=1, seconds=1, runs=1)
    assert made.instructions is None
    assert made.device["note"] == "instructions were not counted: no version 1"


def test_a_plugin_that_does_not_load_is_tried_in_the_next_version(
    pi4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qemu, "_PLUGIN_VERSIONS", (99, 1, 2, 3, 4, 5))
    made = open_device("qemu", PI4).bench(pi4, threads=1, seconds=1, runs=1)
    assert made.instructions is not None


def test_the_wrong_board_is_refused_under_qemu(tmp_path: Path) -> None:
    need("qemu-aarch64", "qemu-user")
    target = dataclasses.replace(PI4, cpu_flags=("asimddp",))
    folder = export_tiny(target, tmp_path / "bundle").folder
    device = open_device("qemu", target)
    for attempt in (
        lambda: device.selftest(folder),
        lambda: device.infer(folder, [tiny_feed(0)]),
        lambda: device.bench(folder, threads=1, seconds=1, runs=1),
        lambda: device.profile(folder, threads=1, seconds=1, runs=1),
    ):
        with pytest.raises(DeviceFailed, match="exited with 3: model: this CPU lacks asimddp"):
            attempt()


def test_no_emulator_stands_for_a_gpu() -> None:
    with pytest.raises(DeviceFailed, match=r"has no emulator\. Use -d ssh:USER@HOST, the machine"):
        open_device("qemu", load_target("jetson-orin-nano"))
