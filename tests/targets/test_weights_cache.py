"""Coded weights of an exported model: in memory or in a cache file, and how much memory."""

import ctypes
import json
import resource
import shutil
import stat
import subprocess
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepress.targets.base import Target
from edgepress.targets.export import export
from edgepress.targets.program import Array, Call, Program, Tensor
from tests.targets.test_weights import ZEROS, coded_file
from tests.targets.tiny import ARMV7, HOST, PI4, compile_c, need, run

LAYERS = 8
OUTPUTS = 5
KERNEL = r"""
#include <stdint.h>
int32_t layer(const int32_t *x, const int8_t *w, const float *scale, int32_t *y)
{
    for (int i = 0; i < 5; i++) {
        y[i] = x[i] + (int32_t)scale[i];
        for (int k = i; k < COUNT; k += 5)
            y[i] += w[k];
    }
    return 0;
}
"""


def constants_of(seed: int, count: int) -> dict[str, Array]:
    """Weights with codes of about 7 bits, of which two are equal, and scales of few values."""
    random = np.random.default_rng(seed)
    weights = [np.rint(random.normal(0, 25, count)).clip(-128, 127) for _ in range(LAYERS)]
    constants = {f"w{k}": array.astype(np.int8) for k, array in enumerate(weights)}
    constants["w1"] = constants["w0"]
    scale = random.choice(np.array([1.5, -4.25, 3, 8], np.float32), 500)
    return {**constants, "scale": scale, "raw": np.arange(OUTPUTS, dtype=np.float32)}


def export_coded(target: Target, folder: Path, seed: int, count: int) -> dict[str, Array]:
    """Export a chain of layers with coded weights, and one golden sample; return the weights."""
    names = ["x", *(f"y{k}" for k in range(LAYERS))]
    constants = constants_of(seed, count)
    calls = []
    for k in range(LAYERS):
        scale = "raw" if k == 3 else "scale"
        arguments = (names[k], f"w{k}", scale, names[k + 1])
        calls.append(Call("layer", arguments, (names[k + 1],), names[k + 1]))
    program = Program(
        inputs=("x",),
        outputs=(names[-1],),
        tensors={name: Tensor(name, "int32", (OUTPUTS,)) for name in names},
        constants=constants,
        calls=calls,
        kernels={"layer": None},
    )
    code = compile_c(target, KERNEL, f"-DCOUNT={count}")
    export(program, code, target, folder, name="coded", tolerances=[0], coded=True)
    x: Array = np.arange(OUTPUTS, dtype=np.int32)
    (folder / "golden").mkdir()
    (folder / "golden/0.in").write_bytes(x.tobytes())
    for k in range(LAYERS):
        x = x + constants["raw" if k == 3 else "scale"][:OUTPUTS].astype(np.int32)
        sums = [constants[f"w{k}"][i::OUTPUTS].sum(dtype=np.int32) for i in range(OUTPUTS)]
        x = x + np.array(sums, np.int32)
    (folder / "golden/0.out").write_bytes(x.astype(np.int32).tobytes())
    return constants


COUNT = 1_500_000
DECODED_BYTES = (LAYERS - 1) * COUNT + 500 * 4  # equal weights are stored once


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coded") / "bundle"
    export_coded(HOST, folder, 0, COUNT)
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the same sizes with other weights."""
    folder = tmp_path_factory.mktemp("other") / "bundle"
    export_coded(HOST, folder, 1, COUNT)
    return folder


def ask(folder: Path, *arguments: str) -> dict[str, Any]:
    document = json.loads(run([str(folder / "model"), *arguments]))
    assert isinstance(document, dict)
    return document


def state(folder: Path, cache: Path) -> str:
    """What a start does with a cache; the answers must be right with it."""
    found = ask(folder, "--info", "--cache", str(cache))["weights"]["cache"]
    assert ask(folder, "--selftest", "--cache", str(cache))["passed"]
    return str(found)


def complaint(folder: Path, cache: Path, **options: Any) -> str:
    """What a start says on stderr of a cache that it cannot use; the answers must be right."""
    command = [str(folder / "model"), "--selftest", "--cache", str(cache)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["passed"]
    assert result.stderr.endswith(". The weights are decoded to memory instead.\n")
    start = f"model: the cache {cache}: "
    assert result.stderr.startswith(start)
    return str(result.stderr.removeprefix(start).partition(".")[0])


def test_decoded_to_memory(bundle: Path) -> None:
    assert ask(bundle, "--selftest")["passed"]
    weights = ask(bundle, "--info")["weights"]
    assert weights.pop("coded_bytes") < 0.95 * DECODED_BYTES
    assert weights == {"decoded_bytes": DECODED_BYTES, "cache": None}


@pytest.mark.parametrize("target", [PI4, ARMV7], ids=lambda target: target.name)
def test_other_architectures(tmp_path: Path, target: Target) -> None:
    need(target.emulator, "qemu-user")
    folder = tmp_path / "bundle"
    export_coded(target, folder, 0, 20_000)
    command = [target.emulator, "-L", target.sysroot, str(folder / "model")]
    assert json.loads(run([*command, "--selftest"]))["passed"]
    for wanted in ("written", "read"):
        with_cache = ["--cache", str(tmp_path / "cache")]
        info = json.loads(run([*command, "--info", *with_cache]))
        assert info["weights"]["cache"] == wanted
        assert json.loads(run([*command, "--selftest", *with_cache]))["passed"]


def test_peak_memory_is_the_decoded_weights_and_one_layer(bundle: Path, tmp_path: Path) -> None:
    """If all of the file stayed in memory, it would be 9 MB more."""
    limit = DECODED_BYTES + COUNT + (4 << 20)
    once = ["--bench", "--runs", "1", "--seconds", "0", "--warmup", "0"]
    with_cache = [*once, "--cache", str(tmp_path / "cache")]
    for arguments in (once, with_cache, with_cache):
        assert DECODED_BYTES < ask(bundle, *arguments)["peak_memory_bytes"] < limit


def test_the_first_start_writes_and_the_next_ones_read(bundle: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (bundle / "weights.epw").chmod(0o640)
    assert ask(bundle, "--info", "--cache", str(cache))["weights"]["cache"] == "written"
    assert state(bundle, cache) == "read"
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert stat.S_IMODE(cache.stat().st_mode) == 0o640
    data = cache.read_bytes()
    assert data[:8] == b"\x89EPC\r\n\x1a\n"
    scale, weight = constants_of(0, COUNT)["scale"], constants_of(0, COUNT)["w7"]
    assert data[64:].startswith(scale.tobytes())
    assert data.rstrip(b"\0").endswith(weight.tobytes().rstrip(b"\0"))


def test_what_is_cached_is_what_is_used(bundle: Path, tmp_path: Path) -> None:
    """A cache with another byte and the right checksum gives another answer."""
    cache = tmp_path / "cache"
    state(bundle, cache)
    data = bytearray(cache.read_bytes())
    data[100_000] ^= 1
    data[8:12] = zlib.crc32(data[64:]).to_bytes(4, "little")
    cache.write_bytes(data)
    command = [str(bundle / "model"), "--selftest", "--cache", str(cache)]
    result = subprocess.run(command, capture_output=True, check=False)
    assert result.returncode == 1


def test_a_stale_cache_is_written_again(bundle: Path, other: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for folder in (bundle, other, bundle):
        assert ask(folder, "--info", "--cache", str(cache))["weights"]["cache"] == "written"
        assert state(folder, cache) == "read"


def test_a_damaged_cache_is_written_again(bundle: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    state(bundle, cache)
    good = cache.read_bytes()
    flips = [8, 12, 16, 24, 40, 64, len(good) // 2, len(good) - 1]
    damaged = [good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :] for at in flips]
    damaged += [b"", good[:5], good[:64], good[:-1], good + b"\0"]
    for data in damaged:
        cache.write_bytes(data)
        assert ask(bundle, "--info", "--cache", str(cache))["weights"]["cache"] == "written"
        assert cache.read_bytes() == good
    assert state(bundle, cache) == "read"


@pytest.mark.parametrize("content", [b"precious", b"\x89PNG\r\n\x1a\n", bytes(100)])
def test_something_else_than_a_cache_is_left_alone(
    bundle: Path, tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    why = complaint(bundle, file)
    assert why == "it is something else than a cache, or cannot be read"
    assert file.read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/absent/folder/cache", "No such file or directory"),
        ("/sys/cache", "Permission denied"),
        ("/dev/full", "it is something else than a cache, or cannot be read"),
        ("/tmp", "it is something else than a cache, or cannot be read"),
        ("", "No such file or directory"),
    ],
)
def test_where_no_cache_can_be_written(bundle: Path, tmp_path: Path, path: str, why: str) -> None:
    command = [str(bundle / "model"), "--info", "--cache", path]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert json.loads(result.stdout)["weights"]["cache"] == "unused"
    assert complaint(bundle, Path(path), cwd=tmp_path) == why if path else True
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(bundle: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    # Python ignores SIGXFSZ; so does the program then, and gets an error as on a full disk.
    options = {"preexec_fn": limit, "restore_signals": False}
    assert complaint(bundle, tmp_path / "cache", **options) == "File too large"
    assert list(tmp_path.iterdir()) == []


def test_many_starts_at_once(bundle: Path, other: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    def start(folder: Path) -> subprocess.Popen[bytes]:
        command = [str(folder / "model"), "--selftest", "--cache", str(cache)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    for folders in ([bundle] * 8, [bundle, other] * 4):
        for process in [start(folder) for folder in folders]:
            out, err = process.communicate()
            assert (process.returncode, err) == (0, b"")
            assert json.loads(out)["passed"]
        assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_the_c_api(bundle: Path, tmp_path: Path) -> None:
    library = ctypes.CDLL(str(bundle / "libmodel.so"))
    library.model_last_error.restype = ctypes.c_char_p
    weights = str(bundle / "weights.epw").encode()
    caches: Sequence[tuple[bytes | None, str]] = [
        (b"/absent/cache", "the cache /absent/cache: No such file or directory. The weights are "
         "decoded to memory instead."),
        (None, ""),
        (str(tmp_path / "cache").encode(), ""),
    ]  # fmt: skip
    for cache, complaint_text in caches:
        assert library.model_set_cache(cache) == 0
        assert library.model_open(weights) == 0
        assert library.model_last_error().decode() == complaint_text
        library.model_close()
    assert (tmp_path / "cache").exists()


def test_broken_and_foreign_weights_are_refused(bundle: Path, other: Path, tmp_path: Path) -> None:
    """A file that states sizes beyond all memory is refused before anything is allocated."""
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    weights = copy / "weights.epw"
    good = weights.read_bytes()
    flipped = good[:-1000] + bytes([good[-1000] ^ 1]) + good[-999:]
    bad = [
        (flipped, "a payload's checksum is wrong"),
        ((other / "weights.epw").read_bytes(), "holds the weights of another model than coded"),
        (coded_file(ZEROS, 1 << 60), "holds the weights of another model than coded"),
    ]
    for data, why in bad:
        weights.write_bytes(data)
        for extra in ([], ["--cache", str(tmp_path / "cache")]):
            command = [str(copy / "model"), "--selftest", *extra]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            assert result.returncode == 2
            assert why in result.stderr
            assert not list(tmp_path.glob("cache*"))
