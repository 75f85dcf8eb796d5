"""What measuring sees of a Jetson's GPU, on boards made of files, and which sentences follow."""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.cuda.test_driver_source import write_cuda_sources
from tests.targets.test_bench_conditions import FILES
from tests.targets.test_runtime_c import SANITIZERS, WARNINGS
from tests.targets.tiny import run

MAIN = r"""
#include <stdio.h>
#include "gpu_watch.h"
#include "judgement.h"

/* Two looks; a line on stdin is waited for in between. */
int main(void)
{
    static struct conditions conditions;
    struct judgement judgement = {0};
    gpu_watch_open("0000:00:00.0");
    conditions_read_gpu = gpu_watch_read;
    conditions_begin(&conditions);
    printf("{\"driver\": \"%s\"}\n", gpu_watch_driver());
    fflush(stdout);
    (void)getchar();
    conditions_end(&conditions);
    judge_conditions(&judgement, &conditions);
    printf("{\"conditions\": ");
    conditions_print(&conditions);
    printf(", \"throttled\": %d, \"reasons\": ", conditions_throttled(&conditions));
    judgement_print(&judgement);
    puts("}");
    return 0;
}
"""

ORIN = {
    "sys/module/nvidia/version": "540.4.0",
    "sys/class/devfreq/13e00000.host1x/cur_freq": 1,
    "sys/class/devfreq/17000000.gpu/cur_freq": 612000000,
    "sys/class/devfreq/17000000.gpu/max_freq": 1020000000,
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
    "sys/class/thermal/thermal_zone0/temp": 51000,
    "sys/class/thermal/thermal_zone1/type": "gpu-thermal",
    "sys/class/thermal/thermal_zone1/temp": 47500,
    "sys/class/thermal/cooling_device0/type": "pwm-fan",
    "sys/class/thermal/cooling_device0/cur_state": 3,
    "sys/class/thermal/cooling_device1/type": "17000000.gpu",
    "sys/class/thermal/cooling_device1/cur_state": 0,
}
FASTEST = {"sys/class/devfreq/17000000.gpu/cur_freq": 1020000000}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watch")
    write_cuda_sources(folder)
    (folder / "main.c").write_text(MAIN)
    flags = [*SANITIZERS, '-DSYS_FOLDER="sys"', '-DPROC_FOLDER="proc"']
    files = ["main.c", "gpu_watch.c", *(f"{name}.c" for name in FILES), "-lm", "-ldl"]
    run(["gcc", *WARNINGS, *flags, *files, "-o", "program"], folder)
    return folder / "program"


def put(folder: Path, files: Mapping[str, object]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")


def watch(
    program: Path, folder: Path, before: Mapping[str, object], after: Mapping[str, object]
) -> dict[str, Any]:
    """Look at the files of before, then at those of after."""
    put(folder, before)
    with subprocess.Popen(
        [program], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        put(folder, after)
        text, _ = process.communicate("\n", timeout=60)
    assert process.returncode == 0
    return {**first, **json.loads(text)}


def test_an_orin_that_is_cool(program: Path, tmp_path: Path) -> None:
    said = watch(program, tmp_path, ORIN, FASTEST)
    assert said["driver"] == "540.4.0"
    assert said["conditions"]["gpu"]["before"] == {
        "frequency_khz": 612000,
        "highest_khz": 1020000,
        "memory_khz": None,
        "temperature_celsius": 47.5,
        "power_watts": None,
        "performance_state": None,
        "throttle_reasons": None,
        "cooling_level": 0,
    }
    assert said["conditions"]["gpu"]["highest_frequency_khz"] == 1020000
    assert said["reasons"] == [], "a rising clock wakes up"
    assert said["throttled"] == 0


def test_an_orin_that_is_slowed_down(program: Path, tmp_path: Path) -> None:
    after = {
        "sys/class/devfreq/17000000.gpu/cur_freq": 306000000,
        "sys/class/thermal/cooling_device1/cur_state": 2,
    }
    said = watch(program, tmp_path, ORIN | FASTEST, after)
    assert said["reasons"] == [
        "throttled: the system slowed the GPU down to cool it (level 2)",
        "unstable: the GPU's frequency fell from 1020 to 306 MHz",
    ]
    assert said["throttled"] == 1


def test_the_names_of_jetpack_5(program: Path, tmp_path: Path) -> None:
    files = {
        "sys/class/devfreq/17000000.ga10b/cur_freq": 510000000,
        "sys/class/thermal/thermal_zone3/type": "GPU-therm",
        "sys/class/thermal/thermal_zone3/temp": 39000,
    }
    said = watch(program, tmp_path, files, {})
    before = said["conditions"]["gpu"]["before"]
    assert (before["frequency_khz"], before["temperature_celsius"]) == (510000, 39)
    assert said["throttled"] == -1, "no source is known"


def test_a_board_that_says_nothing(program: Path, tmp_path: Path) -> None:
    said = watch(program, tmp_path, {}, {})
    assert said["driver"] == ""
    assert set(said["conditions"]["gpu"]["after"].values()) == {None}
    assert said["reasons"] == []
    assert said["throttled"] == -1
