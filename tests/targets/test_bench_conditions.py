"""What `model --bench` sees of a board, and which sentences follow, on boards made of files."""

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from edgepress.targets.base import Target
from tests.targets.test_runtime_c import SANITIZERS, WARNINGS, write_sources
from tests.targets.tiny import ARMV7, HOST, need, run

FILES = ["board_state", "conditions", "cores", "error", "json", "judgement", "load", "statistics"]
FILES += ["sysfs", "tasks", "threads"]

MAIN = r"""
#include <stdio.h>
#include <string.h>
#include <time.h>
#include "judgement.h"
#include "threads.h"

static struct conditions conditions;

/* Use the CPU for 200 ms. */
static void work(void)
{
    for (clock_t end = clock() + CLOCKS_PER_SEC / 5; clock() < end;)
        ;
}

/* begin, look, work, crowd; end prints the conditions, whether it was throttled, and the
 * judgement; windows and ten numbers print the judgement on them. */
int main(void)
{
    char line[512];
    while (fgets(line, sizeof line, stdin) != NULL) {
        struct judgement judgement = {0};
        double ms[WINDOWS];
        if (strncmp(line, "begin", 5) == 0)
            conditions_begin(&conditions);
        else if (strncmp(line, "look", 4) == 0)
            conditions_look(&conditions);
        else if (strncmp(line, "crowd", 5) == 0)
            threads_set(MODEL_MAX_THREADS);
        else if (strncmp(line, "work", 4) == 0)
            work();
        else if (strncmp(line, "end", 3) == 0) {
            conditions_end(&conditions);
            judge_conditions(&judgement, &conditions);
            printf("{\"conditions\": ");
            conditions_print(&conditions);
            printf(", \"throttled\": %d, \"reasons\": ", conditions_throttled(&conditions));
            judgement_print(&judgement);
            printf(", \"lasting\": %s}", judgement.lasting ? "true" : "false");
        } else if (sscanf(line, "windows %lf %lf %lf %lf %lf %lf %lf %lf %lf %lf", &ms[0], &ms[1],
                          &ms[2], &ms[3], &ms[4], &ms[5], &ms[6], &ms[7], &ms[8], &ms[9]) == 10) {
            judge_windows(&judgement, ms);
            judgement_print(&judgement);
        }
        puts("");
        fflush(stdout);
    }
    return 0;
}
"""


class FakeBoard:
    """A program that takes the files of a folder for those of its board."""

    def __init__(self, folder: Path, command: list[str]) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.task = f"proc/self/task/{self.process.pid}"

    def put(self, files: Mapping[str, object]) -> None:
        for name, content in files.items():
            path = self.folder / name.format(task=self.task)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n")

    def say(self, command: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def measure(self, *stages: Mapping[str, object]) -> dict[str, Any]:
        """Begin with the first stage's files there, look at the others, end with the last."""
        self.put(stages[0])
        self.say("begin")
        for stage in stages[1:-1]:
            self.put(stage)
            self.say("look")
        self.put(stages[-1])
        said: dict[str, Any] = json.loads(self.say("end"))
        return said

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        assert self.process.wait(60) == 0
        self.process.stdout.close()


def compiled(target: Target, folder: Path) -> list[str]:
    """Return the command of the program above, which looks for files below where it runs."""
    need(target.compiler, target.compiler_package)
    write_sources(folder, target)
    (folder / "main.c").write_text(MAIN)
    flags = SANITIZERS if target is HOST else []
    flags = [*flags, '-DSYS_FOLDER="sys"', '-DPROC_FOLDER="proc"']
    files = ["main.c", *(f"{name}.c" for name in FILES), "-lm", "-o", "program"]
    run([target.compiler, *WARNINGS, *flags, *files], folder)
    if target is HOST:
        return [str(folder / "program")]
    need(target.emulator, "qemu-user")
    emulator = [target.emulator, "-cpu", target.emulator_cpu, "-L", target.sysroot]
    return [*emulator, str(folder / "program")]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return compiled(HOST, tmp_path_factory.mktemp("host"))


@pytest.fixture
def board(command: list[str], tmp_path: Path) -> Iterator[FakeBoard]:
    made = FakeBoard(tmp_path, command)
    yield made
    made.close()


@pytest.fixture
def board_32_bits(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeBoard]:
    made = FakeBoard(tmp_path, compiled(ARMV7, tmp_path_factory.mktemp("armv7")))
    yield made
    made.close()


CPU = "sys/devices/system/cpu/cpu7/"
PI = "sys/devices/platform/soc/soc:firmware/get_throttled"
ZONE = "sys/class/thermal/thermal_zone{}/temp"
COOLING = "sys/class/thermal/cooling_device{}/"


def task(core: int, waited_ns: int = 0) -> dict[str, object]:
    """The program's only thread, last on this core; its name has brackets and spaces."""
    fields = ["R", *map(str, range(4, 39)), str(core), "0"]
    return {
        "{task}/stat": f"1 (a) b (c) {' '.join(fields)}",
        "{task}/schedstat": f"123456789 {waited_ns} 5",
    }


def cpus(user: int, steal: int, idle: int = 0, cores: int = 8) -> dict[str, object]:
    """Ticks of every core. Idle ones, those that wait for a disk, and those of guests, which are
    part of the user's, do not count."""
    line = f"{user} 0 0 {idle} {idle} 0 0 {steal} {idle} {idle}"
    lines = [f"cpu  {line}", *(f"cpu{core} {line}" for core in range(cores)), "intr 1 2"]
    return {"proc/stat": "\n".join(lines)}


def test_a_board_that_says_nothing(board: FakeBoard) -> None:
    said = board.measure({}, {}, {})
    state = dict.fromkeys(("governor", "frequency_khz", "temperature_celsius", "throttled",
                           "throttle_count", "cooling_level"))  # fmt: skip
    conditions = said["conditions"]
    assert conditions.pop("before") == conditions.pop("after") == state
    assert (conditions.pop("looks"), conditions.pop("ran_on"), conditions.pop("cores")) == (
        1,
        [],
        0,
    )
    assert conditions.pop("seconds") > 0
    assert conditions.pop("involuntary_switches") >= 0
    assert set(conditions.values()) == {None}
    assert (said["throttled"], said["reasons"], said["lasting"]) == (-1, [], False)


def quiet_pi() -> dict[str, object]:
    return {
        **task(7),
        **cpus(0, 0),
        CPU + "cpufreq/scaling_governor": "ondemand",
        CPU + "cpufreq/scaling_cur_freq": 1500000,
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": 600000,
        ZONE.format(0): 51234,
        ZONE.format(1): 48000,
        ZONE.format(2): -274000,
        ZONE.format(3): 255000,
        COOLING.format(0) + "type": "thermal-cpufreq-0",
        COOLING.format(0) + "cur_state": 0,
        COOLING.format(1) + "type": "pwm-fan",
        COOLING.format(1) + "cur_state": 3,
        PI: "50000",
    }


def test_a_quiet_board_is_described(board: FakeBoard) -> None:
    hotter = {ZONE.format(1): 62000, CPU + "cpufreq/scaling_cur_freq": 1400000, PI: "50000"}
    cooler = {
        **cpus(0, 0, idle=10**7),
        ZONE.format(1): 40000,
        CPU + "cpufreq/scaling_cur_freq": 1500000,
    }
    said = board.measure(quiet_pi(), hotter, cooler)
    assert said["reasons"] == []
    assert said["throttled"] == 0
    conditions = said["conditions"]
    assert conditions["before"] == {
        "governor": "ondemand",
        "frequency_khz": 1500000,
        "temperature_celsius": 51.234,
        "throttled": "0x50000",
        "throttle_count": None,
        "cooling_level": 0,
    }
    assert conditions["after"] == conditions["before"]
    assert conditions["hottest_celsius"] == 62
    assert conditions["lowest_frequency_khz"] == 1400000
    assert conditions["highest_frequency_khz"] == 1500000
    assert (conditions["ran_on"], conditions["cores"]) == ([7], 8)
    assert conditions["throttled"] == "0x0", "what was before is over"
    assert conditions["other_load_cores"] == 0
    assert conditions["waited_share"] == conditions["stolen_share"] == 0


def test_flags_that_are_up_in_between(board: FakeBoard) -> None:
    said = board.measure(quiet_pi(), {PI: "50005"}, {PI: "50000"})
    sentence = "throttled: the firmware reported low voltage, throttling (0x5)"
    assert (said["reasons"], said["throttled"], said["lasting"]) == ([sentence], 1, True)


def test_flags_that_only_the_firmware_saw(board_32_bits: FakeBoard) -> None:
    said = board_32_bits.measure(quiet_pi(), {}, {PI: "d0000"})
    sentence = "throttled: the firmware reported the soft temperature limit (0x8)"
    assert (said["reasons"], said["conditions"]["throttled"]) == ([sentence], "0x8")


def test_a_board_that_was_throttled_all_the_time(board: FakeBoard) -> None:
    slow = {**quiet_pi(), COOLING.format(0) + "cur_state": 2, ZONE.format(0): 84600, PI: "f000f"}
    said = board.measure(slow, {})
    assert said["reasons"] == [
        "throttled: the firmware reported low voltage, capped frequency, throttling, the soft "
        "temperature limit (0xf)",
        "throttled: the system slowed the CPU down to cool it (level 2, 85 °C)",
    ]
    assert said["lasting"]


def test_a_raspberry_pi_with_an_alarm_only(board: FakeBoard) -> None:
    other = {"sys/class/hwmon/hwmon0/name": "nvme", "sys/class/hwmon/hwmon0/in0_lcrit_alarm": 1}
    alarm = "sys/class/hwmon/hwmon1/in0_lcrit_alarm"
    volts = {**other, "sys/class/hwmon/hwmon1/name": "rpi_volt", alarm: 0}
    said = board.measure(volts, {alarm: 1}, {alarm: 0})
    assert said["reasons"] == ["throttled: the firmware reported low voltage (0x1)"]
    assert said["conditions"]["before"]["throttled"] == "0x0"


def test_throttle_events_of_an_x86_cpu(board: FakeBoard) -> None:
    first = min(os.sched_getaffinity(0))
    folder = f"sys/devices/system/cpu/cpu{first}/thermal_throttle/"
    counts: dict[str, object] = {
        folder + "core_throttle_count": 40,
        folder + "package_throttle_count": 50,
    }
    assert board.measure(counts, {})["throttled"] == 0
    said = board.measure(counts, {folder + "package_throttle_count": 57})
    assert said["conditions"]["before"]["throttle_count"] == 90
    assert said["reasons"] == ["throttled: the CPU counted 7 thermal throttle events"]


def test_cooling_without_a_thermometer(board: FakeBoard) -> None:
    acpi = {COOLING.format(4) + "type": "Processor", COOLING.format(4) + "cur_state": 10}
    said = board.measure(acpi, {})
    assert said["reasons"] == ["throttled: the system slowed the CPU down to cool it (level 10)"]
    assert (said["throttled"], said["lasting"]) == (1, True)


def test_a_frequency_that_falls_and_one_that_rises(board: FakeBoard) -> None:
    low, high = ({CPU + "cpufreq/scaling_cur_freq": khz} for khz in (600000, 1800000))
    said = board.measure({**quiet_pi(), **high}, low, high)
    assert said["reasons"] == ["unstable: the frequency fell from 1800 to 600 MHz"]
    assert not said["lasting"]
    said = board.measure({**quiet_pi(), **low}, high, high)
    assert said["reasons"] == [], "a governor woke up: the windows tell whether that matters"
    most = {CPU + "cpufreq/scaling_cur_freq": 1360000}
    assert board.measure({**quiet_pi(), **high}, most)["reasons"] == []


def test_threads_on_clusters_of_two_kinds(board: FakeBoard) -> None:
    cluster = "sys/devices/system/cpu/cpu3/cpufreq/"
    other = {
        **{f"proc/self/task/{10**8 + i}/stat": task(3)["{task}/stat"] for i in range(8)},
        cluster + "scaling_governor": "powersave",
        cluster + "scaling_cur_freq": 100,
    }
    said = board.measure({**quiet_pi(), **other}, {})
    assert set(said["conditions"]["before"]["governor"].split(", ")) == {"ondemand", "powersave"}
    assert said["conditions"]["ran_on"] == [3, 7]
    assert said["conditions"]["lowest_frequency_khz"] == 1500000, "of the first thread's core"


HOUR_NS = 3600 * 10**9


def test_a_thread_that_waits(board: FakeBoard) -> None:
    said = board.measure({**quiet_pi(), **task(7, 5)}, task(7, 5 + HOUR_NS))
    assert said["reasons"] == [
        "other load: a thread waited for a core 100 % of the time; other programs used 0.0 of 8 "
        "cores"
    ]
    said = board.measure(task(7, 5), {**task(7, 5 + HOUR_NS), "proc/stat": ""})
    assert said["reasons"] == ["other load: a thread waited for a core 100 % of the time"]


def test_a_thread_that_came_later_is_not_judged(board: FakeBoard) -> None:
    later = {"proc/self/task/99999999/schedstat": f"1 {HOUR_NS} 1"}
    assert board.measure(quiet_pi(), later)["reasons"] == []


def test_other_programs(board: FakeBoard) -> None:
    said = board.measure({**quiet_pi(), **cpus(0, 0)}, cpus(10**7, 0))
    assert said["reasons"] == [
        "other load: other programs used 8.0 of 8 cores, and memory and caches with them"
    ]
    assert said["conditions"]["other_load_cores"] == 8


def test_the_programs_own_load_is_not_that_of_others(board: FakeBoard) -> None:
    board.put({**quiet_pi(), **cpus(0, 0)})
    board.say("begin")
    board.say("work")
    busy_s = 0.24
    ticks = round(busy_s * os.sysconf("SC_CLK_TCK"))
    board.put({"proc/stat": f"cpu0 {ticks} 0 0 0 0 0 0 0 0 0\ncpu1 0 0 0 0 0 0 0 0 0 0"})
    conditions = json.loads(board.say("end"))["conditions"]
    assert conditions["cores"] == 2
    assert conditions["other_load_cores"] * conditions["seconds"] <= busy_s - 0.2 + 0.01


def test_threads_that_wait_for_each_other(board: FakeBoard) -> None:
    """Nobody else did it. But then they share their cores with others all the more."""
    own = len(os.sched_getaffinity(0))
    board.say("crowd")
    assert board.measure({**quiet_pi(), **task(7, 5)}, task(7, 5 + HOUR_NS))["reasons"] == []
    assert board.measure(cpus(0, 0), cpus(10**7, 0))["reasons"] == [
        f"other load: other programs used 8.0 of 8 cores, and 256 threads share {own}"
    ]


def test_a_greedy_hypervisor(board: FakeBoard) -> None:
    said = board.measure({**quiet_pi(), **cpus(0, 0)}, cpus(0, 10**7))
    assert said["reasons"] == ["other load: the hypervisor took 100 % of the time of its cores"]
    assert said["conditions"]["stolen_share"] == 1


def windows(board: FakeBoard, *ms: float) -> list[str]:
    said: list[str] = json.loads(board.say(f"windows {' '.join(map(str, ms))}"))
    return said


def test_windows_that_agree(board: FakeBoard) -> None:
    assert windows(board, *[2.0] * 10) == []
    assert windows(board, 2, 2.4, 2, 2.2, 2.1, 2, 2.5, 2, 2.3, 2) == []
    assert windows(board, *(2 + 0.02 * i for i in range(10))) == [], "a drift of 9 %"


def test_windows_that_do_not(board: FakeBoard) -> None:
    assert windows(board, 2, 2, 2, 3, 2, 2, 2, 2, 2, 2) == [
        "unstable: the medians of its ten windows go from 2 to 3 ms, 50 % apart"
    ]


@pytest.mark.parametrize("rising", [True, False])
def test_windows_that_drift(board: FakeBoard, rising: bool) -> None:
    ms = sorted((2 + 0.03 * i for i in range(10)), reverse=not rising)
    (said,) = windows(board, *ms)
    way = "rose" if rising else "fell"
    assert said.startswith(f"drifting: its windows' medians {way} by 13 % from the first to the ")
    assert said.endswith("which happens by chance with a probability of 5.5e-07")


def test_a_step_is_no_drift(board: FakeBoard) -> None:
    assert windows(board, 2, 2.3, 2, 2.3, 2, 2.3, 2.1, 2.3, 2.2, 2.3) == []
