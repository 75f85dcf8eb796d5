"""The C of targets/runtime by itself: warnings, sanitizers, and the same verdicts as the Python."""

import os
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest

from edgepress.targets.base import Target
from edgepress.targets.driver_source import Driver, driver_source, header_source
from edgepress.targets.export import copy_runtime
from edgepress.targets.memory import plan
from edgepress.targets.weights import WeightsError, read_weights
from tests.targets.test_weights import (
    BROKEN,
    BROKEN_CODED,
    W,
    coded_example,
    example,
    resealed,
    signed,
)
from tests.targets.tiny import ARMV7, HOST, PI4, need, run, tiny_program

WARNINGS = ["-std=c11", "-O2", "-pthread", "-Wall", "-Wextra", "-Werror", "-pedantic", "-Wshadow"]
WARNINGS += ["-Wstrict-prototypes", "-Wmissing-prototypes", "-Wvla"]
SANITIZERS = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def write_sources(folder: Path, target: Target) -> None:
    """Everything that export compiles, for the tiny program."""
    copy_runtime(folder)
    program = tiny_program()
    weights = [{"name": "w", "codec": "raw", "raw_bytes": 24}]
    driver = Driver(
        name="tiny", tolerances=(0, 0.5), weights=weights, weights_checksum=0, weight_bytes=24
    )
    api = (folder / "api.h").read_text()
    (folder / "model.h").write_text(header_source(program, "tiny", api))
    (folder / "driver.c").write_text(driver_source(program, plan(program), target, driver))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runtime")
    write_sources(folder, HOST)
    return folder


def build(sources: Path, name: str, main: str, *files: str, flags: list[str]) -> Path:
    (sources / f"{name}.c").write_text(main)
    run(["gcc", *WARNINGS, *flags, f"{name}.c", *files, "-o", name], sources)
    return sources / name


@pytest.mark.parametrize("target", [HOST, PI4, ARMV7], ids=lambda target: target.name)
def test_no_compiler_warns(tmp_path: Path, target: Target) -> None:
    need(target.compiler, target.compiler_package)
    write_sources(tmp_path, target)
    files = sorted(path.name for path in tmp_path.glob("*.c"))
    run([target.compiler, *WARNINGS, "-fPIC", "-c", *files], tmp_path)


def test_the_header_serves_c_plus_plus(sources: Path) -> None:
    need("g++", "g++")
    (sources / "user.cc").write_text('#include "model.h"\nint main() { return model_open(0); }\n')
    run(["g++", "-Wall", "-Wextra", "-Werror", "-pedantic", "-fsyntax-only", "user.cc"], sources)


def test_crc32_is_zlibs(sources: Path) -> None:
    main = """
#include <stdio.h>
#include "crc32.h"
int main(void)
{
    static uint8_t bytes[1 << 16];
    size_t count = fread(bytes, 1, sizeof bytes, stdin);
    for (size_t cut = 0; cut < 20; cut++)
        printf("%u\\n", crc32_update(crc32_update(0, bytes, cut), bytes + cut, count - cut));
    return 0;
}
"""
    program = build(sources, "crc", main, "crc32.c", flags=SANITIZERS)
    data = np.random.default_rng(0).bytes(5003)
    result = subprocess.run([program], input=data, capture_output=True, check=True)
    assert set(result.stdout.split()) == {str(zlib.crc32(data)).encode()}


WEIGHTS = ("weights.c", "weights_cache.c", "decode.c", "crc32.c", "error.c")

# Overlong, surrogates, beyond Unicode, cut short, a continuation alone, no such first byte.
NOT_UTF8 = ["c080", "c1bf", "e09fbf", "f08fbfbf", "eda080", "edbfbf", "f4908080", "f5808080"]
NOT_UTF8 += ["c3", "e282", "f09f98", "80", "bf41", "c341", "ff", "f880808080"]

OPEN_WEIGHTS = """
#include <stdio.h>
#include <string.h>
#include "error.h"
#include "weights.h"

int main(void)
{
    char path[512];
    while (fgets(path, sizeof path, stdin) != NULL) {
        path[strcspn(path, "\\n")] = '\\0';
        struct weights weights;
        if (weights_open(&weights, path) != 0) {
            puts(error_text());
            continue;
        }
        if (weights_decode(&weights, NULL) != 0) {
            puts(error_text());
            weights_close(&weights);
            continue;
        }
        unsigned sum = 0;
        for (unsigned i = 0; i < weights.count; i++)
            for (unsigned b = 0; b < weights.tensors[i].bytes; b++)
                sum += ((const unsigned char *)weights.tensors[i].data)[b];
        printf("%u tensors, sum %u\\n", weights.count, sum);
        weights_close(&weights);
    }
    return 0;
}
"""


def verdict(path: Path) -> str:
    """What Python thinks of a weights file, in the words of the C program above."""
    try:
        weights = read_weights(path)
    except WeightsError as error:
        return f"{path}: {error.rule.value}. Copy the bundle again as a whole."
    total = sum(sum(array.tobytes()) for array in weights.values())
    return f"{len(weights)} tensors, sum {total}"


def corpus(folder: Path) -> list[Path]:
    """Good, broken, cut, flipped, and randomly changed files with a right header checksum."""
    good = example(folder / "good.epw")
    random = np.random.default_rng(0)
    files = [good, *(corrupt(good) for _, _, corrupt in BROKEN)]
    files += [good[:at] for at in range(1, len(good), 3)]
    files += [good[:at] + bytes([good[at] ^ 64]) + good[at + 1 :] for at in range(0, len(good), 3)]
    for _ in range(600):
        changed = bytearray(good)
        for at in random.integers(40, 216, random.integers(1, 4)):
            changed[at] = random.choice([0, 1, 2, 3, 7, 8, 64, 128, 255])
        files.append(signed(bytes(changed)))
    texts = ["é", "€", "😀", "\U0010ffff", "\ud7ff", "\ue000"]
    names = [text.encode() for text in texts] + [bytes.fromhex(text) for text in NOT_UTF8]
    for name in names:
        entry = good[W : W + 56] + name + bytes(8 - len(name))
        entry = struct.pack("<H", len(name)) + entry[2:]
        files.append(signed(good[:W] + entry + good[W + 64 :]))
    for header_bytes in (0, 31, 40, 41, 96, 215, 217, len(good), len(good) + 1, 1 << 40):
        files.append(good[:16] + struct.pack("<Q", header_bytes) + good[24:])
    paths = []
    for index, data in enumerate(files):
        if data:  # the C cannot map an empty file; test_what_is_no_file covers it
            paths.append(folder / f"{index}.epw")
            paths[-1].write_bytes(data)
    return paths


def test_weights_get_the_same_verdict_as_from_python(sources: Path, tmp_path: Path) -> None:
    program = build(sources, "open", OPEN_WEIGHTS, *WEIGHTS, flags=SANITIZERS)
    paths = corpus(tmp_path)
    result = subprocess.run(
        [program], input="\n".join(map(str, paths)), capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    said = result.stdout.splitlines()
    wanted = [verdict(path) for path in paths]
    assert said == wanted
    assert {line for line in said if line.startswith("3 tensors")} == {said[0]}
    assert said[0] == "3 tensors, sum 451"


def test_coded_weights_get_the_same_verdict_as_from_python(sources: Path, tmp_path: Path) -> None:
    program = build(sources, "open_coded", OPEN_WEIGHTS, *WEIGHTS, flags=SANITIZERS)
    good = coded_example(tmp_path / "good.epw")
    random = np.random.default_rng(0)
    files = [good, *(corrupt(good) for _, _, corrupt in BROKEN_CODED)]
    files += [good[:at] for at in range(1, len(good), 50)]
    files += [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in range(0, len(good), 20)]
    (header_bytes,) = struct.unpack_from("<Q", good, 16)
    for _ in range(300):
        changed = bytearray(good)
        changed[random.integers(header_bytes, len(good))] ^= 1 << int(random.integers(8))
        files.append(resealed(bytes(changed)))
    paths = []
    for index, data in enumerate(files):
        paths.append(tmp_path / f"{index}.epw")
        paths[-1].write_bytes(data)
    result = subprocess.run(
        [program], input="\n".join(map(str, paths)), capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    said = result.stdout.splitlines()
    assert said == [verdict(path) for path in paths]
    assert said[0].startswith("6 tensors")


def test_what_is_no_file(sources: Path, tmp_path: Path) -> None:
    program = build(sources, "no_file", OPEN_WEIGHTS, *WEIGHTS, flags=SANITIZERS)
    (tmp_path / "empty").write_bytes(b"")
    paths = [tmp_path, tmp_path / "absent", tmp_path / "empty"]
    said = subprocess.run(
        [program], input="\n".join(map(str, paths)), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert said == [
        f"{tmp_path}: not a weights file",
        f"{tmp_path}/absent: No such file or directory",
        f"{tmp_path}/empty: not a weights file",
    ]


THREADS = """
#define _DEFAULT_SOURCE
#include <assert.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
#include "error.h"
#include "threads.h"
#include "workspace.h"

struct group { void *sync_handle; int32_t num_task; };
typedef int (*lambda)(int, struct group *, void *);
extern int (*__TVMBackendParallelLaunch)(lambda, void *, int);
extern void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int);
extern int (*__TVMBackendFreeWorkspace)(int, int, void *);

enum { COUNT = 1000 };
static int cells[COUNT];
static int parts_seen;

static int add(int task, struct group *group, void *data)
{
    if (task == 0)
        parts_seen = group->num_task;
    int step = (COUNT + group->num_task - 1) / group->num_task;
    for (int i = task * step; i < (task + 1) * step && i < COUNT; i++)
        cells[i] += *(int *)data;
    return 0;
}

static int nested(int task, struct group *group, void *data)
{
    int parts = group->num_task;
    int code = 0;
    if (task == parts - 1)
        code = __TVMBackendParallelLaunch(add, data, 0);
    return code;
}

static int fails(int task, struct group *group, void *data)
{
    (void)data;
    if (task != group->num_task - 1)
        return 0;
    error_set("part %d is ill", task);
    return -5;
}

/* Every thread gets its own scratch, which holds what it wrote. */
static int scratch(int task, struct group *group, void *data)
{
    (void)group, (void)data;
    unsigned char *a = __TVMBackendAllocWorkspace(1, 0, 100, 2, 32);
    unsigned char *b = __TVMBackendAllocWorkspace(1, 0, 64, 2, 32);
    if (a == NULL || b == NULL || (uintptr_t)a % 64 != 0 || (uintptr_t)b % 64 != 0)
        return -1;
    if (__TVMBackendAllocWorkspace(1, 0, 1, 2, 32) != NULL)
        return -2;
    memset(a, task + 1, 100);
    memset(b, task + 101, 64);
    for (int i = 0; i < 100; i++)
        if (a[i] != task + 1)
            return -3;
    __TVMBackendFreeWorkspace(1, 0, a); /* the wrong order is right too */
    __TVMBackendFreeWorkspace(1, 0, b);
    a = __TVMBackendAllocWorkspace(1, 0, 192, 2, 32);
    return a == NULL ? -4 : __TVMBackendFreeWorkspace(1, 0, a);
}

static int leaks(int task, struct group *group, void *data)
{
    (void)task, (void)group, (void)data;
    return __TVMBackendAllocWorkspace(1, 0, 192, 2, 32) == NULL ? -1 : 0;
}

int main(void)
{
    const int counts[] = {1, 2, 3, 8, 4, 1, 2};
    int one = 1;
    int sum = 0;
    assert(threads_available() >= 1);
    for (size_t k = 0; k < sizeof counts / sizeof *counts; k++) {
        threads_set(counts[k]);
        assert(threads_count() == counts[k]);
        for (int round = 0; round < 300; round++)
            for (int parts = 0; parts < 4; parts++) {
                assert(__TVMBackendParallelLaunch(add, &one, parts) == 0);
                assert(parts_seen == (counts[k] == 1 ? 1 : parts == 0 ? 4 * counts[k] : parts));
                sum++;
            }
        assert(__TVMBackendParallelLaunch(nested, &one, 0) == 0);
        assert(parts_seen == 1);
        sum++;
        assert(__TVMBackendParallelLaunch(fails, NULL, 0) == -5);
        assert(strstr(error_text(), "is ill") != NULL);

        assert(workspace_open(192, counts[k]) == 0);
        for (int round = 0; round < 50; round++)
            assert(__TVMBackendParallelLaunch(scratch, NULL, 0) == 0);
        assert(__TVMBackendParallelLaunch(leaks, NULL, 1) == 0);
        assert(__TVMBackendParallelLaunch(leaks, NULL, 1) == -1);
        assert(strstr(error_text(), "192 bytes of workspace, but 0 of 192 are left") != NULL);
        workspace_begin_run();
        assert(__TVMBackendParallelLaunch(scratch, NULL, 0) == 0);
        workspace_close();
        assert(__TVMBackendAllocWorkspace(1, 0, 1, 2, 32) == NULL);
    }
    for (int i = 0; i < COUNT; i++)
        assert(cells[i] == sum);
    threads_set(3);
    for (int run = 0; run < 200; run++) { /* some of them while the others sleep already */
        threads_begin_run();
        for (int round = 0; round < run % 4; round++, sum++)
            assert(__TVMBackendParallelLaunch(add, &one, 0) == 0);
        if (run % 50 == 0)
            usleep(20000);
        assert(__TVMBackendParallelLaunch(add, &one, 0) == 0);
        sum++;
        threads_end_run();
        if (run % 50 == 1)
            usleep(2000);
    }
    for (int i = 0; i < COUNT; i++)
        assert(cells[i] == sum);
    threads_stop();
    threads_stop();
    puts("right");
    return 0;
}
"""


def test_threads_and_workspace(sources: Path) -> None:
    files = ("threads.c", "cores.c", "workspace.c", "error.c")
    program = build(sources, "pool", THREADS, *files, flags=SANITIZERS)
    assert run([str(program)]) == "right\n"


def test_threads_do_not_race(sources: Path) -> None:
    files = ("threads.c", "cores.c", "workspace.c", "error.c")
    flags = ["-g", "-fsanitize=thread"]
    program = build(sources, "races", THREADS, *files, flags=flags)
    # The sanitizer cannot place its shadow memory under some kernels' address randomisation.
    assert run(["setarch", "-R", str(program)]) == "right\n"


CORES = """
#include <stdio.h>
#include <stdlib.h>
#include "cores.h"
#include "error.h"
#include "threads.h"

int main(int count, char **arguments)
{
    int cores[4];
    for (int i = 1; i < count; i++) {
        int found = cores_choose(arguments[i], cores, 4);
        if (found < 0)
            printf("%s", error_text());
        for (int k = 0; k < found; k++)
            printf("%s%d", k > 0 ? " " : "", cores[k]);
        printf("\\n");
        if (found > 0 && (threads_pin(cores, found) != 0 || threads_available() != 1))
            return 1;
        if (found > 0)
            return 0;
    }
    return 0;
}
"""


def _cores(sources: Path, folder: Path, *choices: str) -> list[str]:
    flags = [f'-DCORES_FOLDER="{folder}"', *SANITIZERS]
    program = build(sources, "cores_test", CORES, "cores.c", "threads.c", "error.c", flags=flags)
    return run([str(program), *choices]).splitlines()


@pytest.mark.parametrize(("fast", "slow"), [(1024, 400), (2, 1)])
@pytest.mark.parametrize("file", ["cpu_capacity", "cpufreq/cpuinfo_max_freq"])
def test_big_and_little_cores(
    sources: Path, tmp_path: Path, file: str, fast: int, slow: int
) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        pytest.skip("needs two cores")
    for core in allowed:
        speed = tmp_path / f"cpu{core}" / file
        speed.parent.mkdir(parents=True)
        speed.write_text(f"{fast if core == allowed[1] else slow}\n")
    little = [core for core in allowed if core != allowed[1]][:4]
    assert _cores(sources, tmp_path, "big") == [str(allowed[1])]
    assert _cores(sources, tmp_path, "little") == [" ".join(map(str, little))]


def test_cores_of_one_kind_and_lists(sources: Path, tmp_path: Path) -> None:
    first, *rest = sorted(os.sched_getaffinity(0))
    wrong = ["big", "", "1-", "2-1", "x", f"{first},", "99999", "0,0,0,0,0", "-1"]
    said = _cores(sources, tmp_path, *wrong, f"{first}")
    assert said[0] == "this system tells no big cores from little ones. Name cores by number."
    assert said[1] == "cores must be big, little, or numbers such as 0,2-3, not ''"
    assert all(line.startswith("cores must be") for line in said[2:6])
    assert said[6].startswith("this process may not run on core 99999.")
    assert said[7:] == ["more than 4 cores", "cores must be big, little, or numbers such as "
                        "0,2-3, not '-1'", str(first)]  # fmt: skip
    if rest == [first + 1]:
        assert _cores(sources, tmp_path, f"{first}-{first + 1}") == [f"{first} {first + 1}"]
        assert _cores(sources, tmp_path, f"{first + 1},{first}") == [f"{first + 1} {first}"]


def test_json_and_errors(sources: Path) -> None:
    main = """
#include <math.h>
#include <stdio.h>
#include <string.h>
#include "error.h"
#include "json.h"
extern void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *message);
extern void TVMFFIErrorSetRaisedFromCStrParts(const char *, const char **, int);
int main(void)
{
    static char text[2000];
    const char *parts[] = {"a", text, "b"};
    json_string("a\\"\\\\\\n\\x01é"), puts("");
    json_string(NULL), puts("");
    json_number(0.5), puts(""), json_number(NAN), puts(""), json_number(-INFINITY), puts("");
    memset(text, 'x', sizeof text - 1);
    error_set("%s", text);
    printf("%zu\\n", strlen(error_text()));
    TVMFFIErrorSetRaisedFromCStrParts("ValueError", parts, 3);
    printf("%zu\\n", strlen(error_text()));
    TVMFFIErrorSetRaisedFromCStr("ValueError", "no");
    puts(error_text());
    return 0;
}
"""
    program = build(sources, "texts", main, "json.c", "error.c", flags=[*SANITIZERS, "-lm"])
    assert run([str(program)]).splitlines() == [
        '"a\\"\\\\\\u000a\\u0001é"',
        "null",
        "0.5",
        "null",
        "null",
        "511",
        "511",
        "ValueError: no",
    ]
