"""What the exported executable answers, and how it refuses."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepress.targets.base import Artifact, Target
from edgepress.targets.export import export
from tests.targets.tiny import (
    ARMV7,
    HOST,
    KERNELS,
    PI4,
    compile_c,
    export_tiny,
    need,
    run,
    tiny_answer,
    tiny_feed,
    tiny_program,
)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export_tiny(HOST, tmp_path_factory.mktemp("host") / "bundle")


@pytest.fixture
def bundle(artifact: Artifact, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(artifact.folder, tmp_path / "bundle"))


def ask(folder: Path, *arguments: str) -> dict[str, Any]:
    document = json.loads(run([str(folder / "model"), *arguments]))
    assert isinstance(document, dict)
    return document


def fail(folder: Path, *arguments: str, stdin: bytes = b"") -> tuple[int, str]:
    """Exit code and message of a call that must print nothing on stdout."""
    result = subprocess.run(
        [folder / "model", *arguments], input=stdin, capture_output=True, check=False
    )
    assert result.stdout == b""
    return result.returncode, result.stderr.decode()


def test_info(artifact: Artifact) -> None:
    assert ask(artifact.folder, "--info") == {
        "name": "tiny",
        "target": "host",
        "inputs": [
            {"name": "x", "dtype": "float32", "shape": [2, 3], "bytes": 24},
            {"name": "offset", "dtype": "int8", "shape": [1], "bytes": 1},
        ],
        "outputs": [
            {"name": "scaled", "dtype": "float32", "shape": [2, 3], "bytes": 24, "tolerance": 0},
            {"name": "total", "dtype": "int32", "shape": [], "bytes": 4, "tolerance": 0},
        ],
        "threads": min(2, len(os.sched_getaffinity(0))),
        "calls": 3,
        "arena_bytes": 64,
        "workspace_bytes": 0,
        "weight_bytes": 24,
        "weights": {"coded_bytes": 0, "decoded_bytes": 0, "cache": None},
        "features": {HOST.cpu_flags[0]: True},
        "supported": True,
    }


def test_raw_weights_need_no_cache(artifact: Artifact, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert ask(artifact.folder, "--info", "--cache", str(cache))["weights"]["cache"] == "unused"
    assert ask(artifact.folder, "--selftest", "--cache", str(cache))["passed"]
    assert not cache.exists()


def test_selftest_and_its_tolerance(bundle: Path, tmp_path: Path) -> None:
    good = ask(bundle, "--selftest")
    assert (good["passed"], good["samples"]) == (True, 2)
    wanted = bundle / "golden/1.out"
    data = wanted.read_bytes()
    wanted.write_bytes(data[:-4] + np.int32(data[-4] + 3).tobytes())
    code, document = check(bundle)
    assert (code, document["passed"]) == (1, False)
    assert document["outputs"][0]["passed"]
    assert document["outputs"][1]["max_abs_error"] >= 3
    assert document["outputs"][1]["different_elements"] == 1

    nan = np.array([math.nan], np.float32).tobytes()
    wanted.write_bytes(nan + data[4:])
    assert check(bundle)[1]["outputs"][0]["max_abs_error"] is None

    loose = export_tiny(HOST, tmp_path / "loose", tolerances=(0.5, 0)).folder
    near = np.frombuffer(data, np.float32, 6) + np.float32(0.5)
    (loose / "golden/1.out").write_bytes(near.tobytes() + data[24:])
    assert check(loose)[0] == 0
    (loose / "golden/1.out").write_bytes((near + np.float32(0.5)).tobytes() + data[24:])
    assert check(loose)[0] == 1
    (loose / "golden/1.out").write_bytes(nan + data[4:])
    assert check(loose)[0] == 1


def check(folder: Path) -> tuple[int, dict[str, Any]]:
    result = subprocess.run([folder / "model", "--selftest"], capture_output=True, check=False)
    return result.returncode, json.loads(result.stdout)


def test_bench_and_profile(artifact: Artifact) -> None:
    short = ["--warmup", "0.01", "--seconds", "0.001", "--runs", "150", "--threads", "1"]
    bench = ask(artifact.folder, "--bench", "--anyway", *short)
    samples = np.array(bench["samples_ms"])
    assert len(samples) >= 150
    assert bench["min_ms"] == pytest.approx(samples.min(), abs=1e-6)
    for part in (50, 90, 99):
        assert bench[f"p{part}_ms"] == pytest.approx(np.percentile(samples, part), abs=2e-6)
    assert bench["threads"] == 1
    assert 100_000 < bench["peak_memory_bytes"] < 20_000_000
    assert bench["runs_per_sample"] > 1, "this model takes less than 10 µs"
    assert bench["runs_per_sample"] * bench["p50_ms"] > 0.002
    assert bench["device"]["kernel"] == os.uname().release

    profile = ask(artifact.folder, "--profile", *short)
    assert profile["runs"] >= 150
    assert [call["node"] for call in profile["calls"]] == ['first */ "node"', "zweitér", "third"]
    for call in profile["calls"]:
        assert call["mean_ms"] == pytest.approx(call["total_ms"] / profile["runs"], abs=1e-6)
        assert 0 < call["midmean_ms"] < 1


def test_a_midmean_leaves_out_the_fastest_and_the_slowest_quarter(tmp_path: Path) -> None:
    """One kernel sleeps for 40 ms once, for 1 ms else."""
    kernels = """
#define _POSIX_C_SOURCE 200809L
#include <stdint.h>
#include <stddef.h>
#include <time.h>
static int runs;
int32_t add_one(const float *x, float *y)
{
    struct timespec time = {0, runs++ == 2 ? 40000000 : 1000000};
    (void)x, (void)y;
    return nanosleep(&time, NULL);
}
int32_t scale(const float *x, const float *factor, float *y)
{
    return (void)x, (void)factor, (void)y, 0;
}
int32_t sum(const float *x, const int8_t *offset, int32_t *total)
{
    return (void)x, (void)offset, (void)total, 0;
}
"""
    code, folder = compile_c(HOST, kernels), tmp_path / "slow"
    export(tiny_program(), code, HOST, folder, name="slow", tolerances=(0, 0))
    often = ["--warmup", "0", "--seconds", "0", "--runs", "8", "--threads", "1"]
    profile = ask(folder, "--profile", *often)
    assert profile["runs"] == 8
    first = profile["calls"][0]
    assert first["mean_ms"] >= (40 + 7) / 8
    assert 1 <= first["midmean_ms"] < first["mean_ms"] - 3
    assert profile["calls"][1]["midmean_ms"] < 0.5


def test_run(artifact: Artifact, tmp_path: Path) -> None:
    feeds = [tiny_feed(seed) for seed in range(5)]
    data = b"".join(a.tobytes() for feed in feeds for a in feed.values())
    wanted = b"".join(a.tobytes() for feed in feeds for a in tiny_answer(feed).values())
    (tmp_path / "in").write_bytes(data)
    model = artifact.folder / "model"
    assert run([str(model), "--run", str(tmp_path / "in"), str(tmp_path / "out")]) == ""
    assert (tmp_path / "out").read_bytes() == wanted
    piped = subprocess.run([model, "--run", "-", "-"], input=data, capture_output=True, check=True)
    assert piped.stdout == wanted
    assert run([str(model), "--run", "/dev/null", "-"]) == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a command"),
        (["--info", "--help"], "one command"),
        (["--info", "x"], "files are for --run"),
        (["--run", "x"], "IN OUT"),
        (["--nonsense"], "--nonsense"),
        (["--bench", "--runs", "0"], "--runs must be a whole number from 1"),
        (["--bench", "--seconds", "nan"], "--seconds must be a number from 0"),
        (["--bench", "--threads", "257"], "--threads must be a whole number from 1 to 256"),
        (["--bench", "--threads", "2x"], "--threads must be"),
        (["--selftest", "--weights", "/dev/null"], "not a weights file"),
        (["--selftest", "--weights", "/absent"], "/absent: No such file"),
        (["--run", "/absent", "-"], "/absent: No such file"),
        (["--run", "-", "/absent/out"], "/absent/out: No such file"),
        (["--run", "-", "-"], "the last sample has 3 bytes instead of 25"),
    ],
)
def test_wrong_use(artifact: Artifact, arguments: list[str], message: str) -> None:
    code, said = fail(artifact.folder, *arguments, stdin=b"abc")
    assert code == 2
    assert message in said


def test_files_of_a_wrong_size(bundle: Path) -> None:
    golden = bundle / "golden/0.in"
    data = golden.read_bytes()
    golden.write_bytes(data[:-1])
    code, said = fail(bundle, "--run", str(golden), "-")
    assert (code, "24 bytes are not a whole number of samples of 25 bytes" in said) == (2, True)
    assert fail(bundle, "--selftest")[0] == 2
    golden.write_bytes(data * 2)
    assert fail(bundle, "--selftest")[0] == 2
    golden.write_bytes(data)
    wanted = bundle / "golden/0.out"
    wanted.write_bytes(wanted.read_bytes() + b"\0")
    assert fail(bundle, "--selftest")[0] == 2
    wanted.unlink()
    assert "0.out: No such file" in fail(bundle, "--selftest")[1]
    golden.unlink()
    assert "no golden/0.in" in fail(bundle, "--selftest")[1]


def test_a_full_disk(artifact: Artifact) -> None:
    golden = str(artifact.folder / "golden/0.in")
    assert fail(artifact.folder, "--run", golden, "/dev/full") == (
        2,
        "model: /dev/full: No space left on device\n",
    )


def test_a_failing_kernel_says_why(artifact: Artifact) -> None:
    sample = np.full(6, 1e6, np.float32).tobytes() + b"\0"
    assert fail(artifact.folder, "--run", "-", "-", stdin=sample) == (
        1,
        "model: third failed with code -7: ValueError: too large\n",
    )


def test_damaged_and_foreign_weights(bundle: Path, tmp_path: Path) -> None:
    weights = bundle / "weights.epw"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + b"\x7f")
    code, said = fail(bundle, "--selftest")
    assert (code, "a payload's checksum is wrong" in said) == (2, True)
    program = tiny_program()
    program.constants["w"] += np.float32(1)
    other = tmp_path / "other"
    export(program, compile_c(HOST, KERNELS), HOST, other, name="tiny", tolerances=(0, 0))
    code, said = fail(bundle, "--selftest", "--weights", str(other / "weights.epw"))
    assert (code, "holds the weights of another model than tiny" in said) == (2, True)


def test_a_wrong_cpu_is_refused_with_a_message(tmp_path: Path) -> None:
    need("qemu-aarch64", "qemu-user")
    target = dataclasses.replace(PI4, cpu_flags=("asimd", "asimddp", "i8mm"))
    folder = export_tiny(target, tmp_path / "bundle").folder
    command = ["qemu-aarch64", "-cpu", "cortex-a72", "-L", PI4.sysroot, str(folder / "model")]
    result = subprocess.run([*command, "--selftest"], capture_output=True, text=True, check=False)
    assert result.returncode == 3
    assert result.stderr == "model: this CPU lacks asimddp i8mm. Compile the model for this CPU.\n"
    info = json.loads(run([*command, "--info"]))
    assert info["features"] == {"asimd": True, "asimddp": False, "i8mm": False}
    assert info["supported"] is False


@pytest.mark.parametrize("target", [PI4, ARMV7], ids=lambda target: target.name)
def test_other_architectures(tmp_path: Path, target: Target) -> None:
    need(target.emulator, "qemu-user")
    folder = export_tiny(target, tmp_path / "bundle").folder
    command = [target.emulator, "-cpu", target.emulator_cpu, "-L", target.sysroot]
    said = json.loads(run([*command, str(folder / "model"), "--selftest", "--threads", "3"]))
    assert said["passed"]


def test_valgrind_finds_nothing(artifact: Artifact) -> None:
    if shutil.which("valgrind") is None:
        pytest.skip("valgrind is missing: apt-get install valgrind")
    command = ["valgrind", "--quiet", "--error-exitcode=9", "--leak-check=full"]
    model = str(artifact.folder / "model")
    run([*command, model, "--selftest", "--threads", "1"])
    run([*command, model, "--profile", "--runs", "1100", "--seconds", "0", "--warmup", "0"])
