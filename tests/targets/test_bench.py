"""`model --bench` as a whole: when it refuses figures, sustained and by MLPerf's rule."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgepress.targets import export as exporting
from edgepress.targets.base import Target
from edgepress.targets.devices.base import open_device
from edgepress.targets.export import copy_runtime, export
from tests.targets.test_runtime_c import SANITIZERS, WARNINGS
from tests.targets.tiny import (
    ARMV7,
    HOST,
    KERNELS,
    PI4,
    compile_c,
    export_tiny,
    need,
    run,
    tiny_program,
)

QUICK = ["--warmup", "0", "--seconds", "0", "--threads", "1"]
FIGURES = ("p50_ms", "p90_ms", "p99_ms")
PI = "devices/platform/soc/soc:firmware/get_throttled"


# What the first kernel does beside its work, if the environment says so.
MOODS = """
    const char *mood = getenv("MOOD");
    static double ns = 5e5;
    if (mood != NULL && *mood == 'c') /* counted */
        fputs("x", stderr);
    if (mood != NULL && *mood == 's') /* slower and slower */
        nanosleep(&(struct timespec){0, (long)(ns *= 1.02)}, NULL);
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in a hurry, which looks for /sys below where it runs."""
    folder = tmp_path_factory.mktemp("model")
    head = "#include <stdio.h>\n#include <stdlib.h>\n#include <time.h>\n"
    add_one = "int32_t add_one(const float *x, float *y)\n{"
    source = head + KERNELS.replace(add_one, add_one + MOODS)
    code = compile_c(HOST, source, "-D_POSIX_C_SOURCE=200809L")
    flags = (*exporting.COMPILE_FLAGS, "-DMLPERF_SECONDS=0", '-DSYS_FOLDER="sys"')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "COMPILE_FLAGS", flags)
        export(tiny_program(), code, HOST, folder, name="tiny", tolerances=(0, 0))
    return folder / "model"


def bench(*command: str | Path, where: Path | None = None) -> dict[str, Any]:
    return mood("", *command, where=where)[0]


def mood(mood: str, *command: str | Path, where: Path | None = None) -> tuple[dict[str, Any], int]:
    """Run a model in a mood; return what it prints, and how often its kernel was counted."""
    result = subprocess.run(
        [*map(str, command)], cwd=where, env={**os.environ, "MOOD": mood},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert set(result.stderr) <= {"x"}
    return json.loads(result.stdout), len(result.stderr)


def test_figures_are_given_or_refused(model: Path) -> None:
    said = bench(model, "--bench", *QUICK, "--runs", "400")
    assert len(said["samples_ms"]) >= 400
    assert said["min_ms"] == min(said["samples_ms"])
    assert len(said["windows_ms"]) == 10
    assert 1 <= said["attempts"] <= 3
    for name in FIGURES:
        assert (said[name] is None) == bool(said["refused"])
    assert (said["intervals_ms"]["p50"] is None) == bool(said["refused"])
    assert (said["sustained"], said["mlperf"]) == ([], None)


def test_few_runs(model: Path) -> None:
    said = bench(model, "--bench", "--anyway", *QUICK, "--runs", "5")
    assert said["attempts"] == 1
    assert len(said["samples_ms"]) == 5
    assert said["windows_ms"] == []
    assert said["intervals_ms"]["p50"] is None
    said = bench(model, "--bench", "--anyway", *QUICK, "--runs", "20")
    low, high = said["intervals_ms"]["p50"]
    assert said["min_ms"] <= low <= said["p50_ms"] <= high
    low, high = said["intervals_ms"]["p99"]
    assert (low <= said["p99_ms"], high) == (True, None)


def test_a_throttled_board(model: Path, tmp_path: Path) -> None:
    flags = tmp_path / "sys" / PI
    flags.parent.mkdir(parents=True)
    flags.write_text("50005\n")
    options = [*QUICK, "--runs", "100", "--mlperf"]
    said = bench(model, "--bench", *options, "--sustained", "0.01", where=tmp_path)
    sentence = "throttled: the firmware reported low voltage, throttling (0x5)"
    assert said["refused"][0] == sentence
    assert said["attempts"] == 1, "it would be throttled again"
    assert {said[name] for name in FIGURES} == {None}
    assert set(said["intervals_ms"].values()) == {None}
    assert said["min_ms"] > 0
    assert said["conditions"]["before"]["throttled"] == "0x50005"
    assert said["mlperf"]["refused"][0] == sentence
    assert said["mlperf"]["early_stopping_p90_ms"] is None
    assert all(window["throttled"] for window in said["sustained"])
    assert all(window["p50_ms"] > 0 for window in said["sustained"])

    said = bench(model, "--bench", "--anyway", *options, where=tmp_path)
    assert said["refused"][0] == sentence
    assert 0 < said["min_ms"] <= said["p50_ms"] <= said["p99_ms"]
    assert said["mlperf"]["early_stopping_p90_ms"] > 0

    flags.write_text("0\n")
    said = bench(model, "--bench", *options, where=tmp_path)
    assert sentence not in said["refused"]


def test_a_model_that_gets_slower(model: Path) -> None:
    said, _ = mood("slower", model, "--bench", *QUICK, "--runs", "40")
    assert said["attempts"] == 3
    assert said["p50_ms"] is None
    assert any(
        reason.startswith(("unstable: the medians", "drifting")) for reason in said["refused"]
    )
    assert said["windows_ms"][0] < said["windows_ms"][-1]


@pytest.fixture
def greedy() -> Iterator[int]:
    """A core that another program wants, too."""
    core = min(os.sched_getaffinity(0))
    code = f"import os\nos.sched_setaffinity(0, {{{core}}})\nprint(flush=True)\nwhile 1: pass"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.readline()
    yield core
    other.kill()
    other.wait()
    other.stdout.close()


def test_a_core_that_is_shared(model: Path, greedy: int) -> None:
    options = ["--warmup", "0", "--seconds", "0.3", "--runs", "1", "--cores", str(greedy)]
    said = bench(model, "--bench", *options)
    if said["conditions"]["waited_share"] is None:
        pytest.skip("this kernel does not say how long threads wait")
    assert said["conditions"]["ran_on"] == [greedy]
    assert said["conditions"]["waited_share"] > 0.25
    assert said["conditions"]["involuntary_switches"] > 0
    assert said["attempts"] == 3
    assert said["p50_ms"] is None
    assert any("a thread waited for a core" in reason for reason in said["refused"])


def test_looks_are_outside_of_what_is_timed(model: Path) -> None:
    """After a look, which may be long ago, an inference is not timed."""
    options = ["--warmup", "0", "--seconds", "0.8", "--threads", "1", "--anyway"]
    said, calls = mood("counted", model, "--bench", *options)
    looks = said["conditions"]["looks"]
    assert 1 <= looks <= said["conditions"]["seconds"] / 0.25
    first = 2  # for the memory, and after the first look
    assert calls == first + looks + len(said["samples_ms"])


def test_sustained(model: Path) -> None:
    said = bench(model, "--bench", *QUICK, "--runs", "20", "--sustained", "0.02")["sustained"]
    ends = [window["at_s"] for window in said]
    assert ends == sorted(ends)
    assert ends[-1] >= 1.2
    assert 1 <= len(said) <= 5, "a window of a quarter of a second, or longer"
    keys = {"at_s", "p50_ms", "p90_ms", "frequency_khz", "temperature_celsius", "throttled"}
    for window in said:
        assert set(window) == keys | {"waited_share"}
        assert 0 < window["p50_ms"] <= window["p90_ms"]


def test_single_stream(model: Path) -> None:
    """Without a minimum of ten minutes 64 queries are enough, of which none is discarded."""
    options = [*QUICK, "--runs", "1", "--anyway", "--mlperf"]
    everything, calls = mood("counted", model, "--bench", *options)
    least = 3 + 1 + 64  # the measurement before; one that is not timed; the queries
    assert least <= calls <= least + 10, "more only where a machine is so slow that it is looked at"
    said = everything["mlperf"]
    assert (said["queries"], said["discarded"]) == (64, 0)
    assert (said["scenario"], said["percentile"], said["confidence"]) == ("SingleStream", 0.9, 0.99)
    assert said["min_duration_s"] == 0
    assert 0 < said["p90_ms"] <= said["early_stopping_p90_ms"]
    assert said["p99_ms"] == said["early_stopping_p90_ms"], "the longest of 64"
    assert said["early_stopping_p99_ms"] is None
    assert said["mean_ms"] * 64 <= said["duration_s"] * 1e3 + 1


COUNTS = r"""
#include "mlperf.c"

/* Latencies in ns, one per line; prints what is kept of each, then what so many are at or above. */
int main(void)
{
    static uint32_t buckets[BUCKETS];
    unsigned long long ns;
    long count = 0;
    while (scanf("%llu", &ns) == 1) {
        buckets[bucket_of(ns)]++;
        count++;
        printf("%.17g\n", most_ms(bucket_of(ns)) * 1e6);
    }
    for (long rank = 1; rank <= count; rank++)
        printf("%.17g\n", from_the_top(buckets, rank) * 1e6);
    return 0;
}
"""


def test_latencies_are_counted_to_a_thousandth(tmp_path: Path) -> None:
    copy_runtime(tmp_path)
    (tmp_path / "model.h").write_bytes((tmp_path / "api.h").read_bytes())
    (tmp_path / "main.c").write_text(COUNTS)
    unused = ["-ffunction-sections", "-Wl,--gc-sections,--unresolved-symbols=ignore-all"]
    flags = [*WARNINGS, "-Wno-unused-function", *SANITIZERS, *unused]
    files = ["main.c", "statistics.c", "json.c", "judgement.c", "-lm", "-o", "program"]
    run(["gcc", *flags, *files], tmp_path)
    values = [0, 1, 2047, 2048, 2049, 4095, 4096, 10**6 + 1, 10**9, 3600 * 10**9, 2**62]
    values += [2**power - 1 for power in range(12, 40)]
    text = "\n".join(map(str, values))
    result = subprocess.run(
        [tmp_path / "program"], input=text, capture_output=True, text=True, check=True
    )
    assert result.stderr == ""
    kept = [round(float(line)) for line in result.stdout.split()]
    each, ranked = kept[: len(values)], kept[len(values) :]
    for value, most in zip(values, each, strict=True):
        assert value <= most + 1e-9 * value
        assert most <= value * (1 + 1 / 1024) + 0.5
    assert ranked == sorted(each, reverse=True)


@pytest.mark.parametrize("target", [PI4, ARMV7], ids=lambda target: target.name)
def test_other_architectures(tmp_path: Path, target: Target) -> None:
    need(target.emulator, "qemu-user")
    model = export_tiny(target, tmp_path / "bundle").folder / "model"
    command = [target.emulator, "-cpu", target.emulator_cpu, "-L", target.sysroot, str(model)]
    options = ["--warmup", "0", "--seconds", "0.3", "--threads", "2", "--sustained", "0.01"]
    said = bench(*command, "--bench", "--anyway", *options)
    assert len(said["samples_ms"]) >= 100
    low, high = said["intervals_ms"]["p50"]
    assert low <= said["p50_ms"] <= high
    assert said["conditions"]["seconds"] >= 0.3
    assert said["sustained"]


def test_valgrind_finds_nothing(model: Path) -> None:
    need("valgrind", "valgrind")
    command = ["valgrind", "--quiet", "--error-exitcode=9", "--leak-check=full"]
    options = [*QUICK, "--runs", "300", "--mlperf", "--sustained", "0.01"]
    said = bench(*command, model, "--bench", *options)
    assert said["mlperf"]["queries"] == 64
    assert said["sustained"]


def test_what_a_device_asks_for_and_takes(tmp_path: Path) -> None:
    said = {
        "samples_ms": [2, 1],
        "threads": 3,
        "device": {"kernel": "k"},
        "refused": ["throttled"],
        "intervals_ms": {"p50": [1, 2], "p90": [1, None], "p99": None},
        "windows_ms": [1, 2],
        "conditions": {"looks": 3},
        "sustained": [{"at_s": 5}],
        "mlperf": {"queries": 64},
    }
    script = f"#!/bin/sh\necho $* >{tmp_path}/arguments\necho '{json.dumps(said)}'\n"
    (tmp_path / "model").write_text(script)
    (tmp_path / "model").chmod(0o755)
    device = open_device("local", HOST)
    made = device.bench(tmp_path, threads=None, seconds=1, runs=9)
    asked = (tmp_path / "arguments").read_text().split()
    assert asked == ["--bench", "--anyway", "--seconds", "1", "--runs", "9"]
    assert made.refused == ("throttled",)
    assert made.intervals_ms == {"p50": (1, 2), "p90": (1, None), "p99": None}
    assert made.windows_ms == (1, 2)
    assert (made.conditions, made.sustained, made.mlperf) == (
        {"looks": 3}, [{"at_s": 5}], {"queries": 64},
    )  # fmt: skip
    device.bench(
        tmp_path, threads=None, seconds=1, runs=9, defended=True, sustained_minutes=0.5, mlperf=True
    )
    asked = (tmp_path / "arguments").read_text().split()
    assert asked[:4] == ["--bench", "--sustained", "0.5", "--mlperf"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sustained", "0"], "--sustained must be a number from 0.01"),
        (["--sustained", "a day"], "--sustained must be a number"),
    ],
)
def test_wrong_use(model: Path, options: list[str], message: str) -> None:
    command = [str(model), "--bench", *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert message in result.stderr
