"""Builds the C programs of fuzzing out of `targets/runtime`."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from edgepress.targets.export import copy_runtime

HERE = Path(__file__).parent
FLAGS = ("-std=c11", "-g", "-O1", "-pthread", "-Wall", "-Wextra", "-Werror", "-pedantic")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
LIBFUZZER = ("-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all")
RUNTIME = ("weights.c", "weights_cache.c", "decode.c", "crc32.c", "error.c")
TARGETS = ("fuzz_decode", "fuzz_weights")


def build(folder: Path, compiler: str, flags: Sequence[str], *sources: str) -> Path:
    """Compile files of this folder with those that read weights; returns the program."""
    runtime = folder / "runtime"
    runtime.mkdir(parents=True, exist_ok=True)
    copy_runtime(runtime)
    program = folder / sources[0].removesuffix(".c")
    files = [HERE / name for name in sources] + [runtime / name for name in RUNTIME]
    subprocess.run(
        [compiler, *FLAGS, *flags, f"-I{runtime}", *map(str, files), "-o", str(program)],
        check=True,
    )
    return program
