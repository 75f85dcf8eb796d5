"""Fuzzes the readers of weights files for a while; `make fuzz` runs it.

    python -m tests.fuzz.run --seconds 600

`fuzz_decode` and `fuzz_weights` run under libFuzzer where there is clang (Debian: clang,
libclang-rt-dev), else as `standalone.c` under gcc; both with AddressSanitizer and UBSan.
`differential` gives broken files to Python, C and the reference in `reference.py`. Each gets the
seconds. What libFuzzer found worth keeping stays in FOLDER/corpus and is where the next run starts;
inputs that end a program are kept in FOLDER/findings: the program with such a file as its only
argument shows what happened.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np

from tests.fuzz import differential, programs, seeds

DIFFERENTIAL = "differential"
MAX_BYTES = 1 << 14
RUNS_AT_ONCE = 20_000  # of standalone.c
FILES_AT_ONCE = 1_000
STATISTICS = re.compile(r"stat::number_of_executed_units: +(\d+)")
COVERAGE = re.compile(r"cov: (\d+) ft: (\d+) corp: (\d+)")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = [*programs.TARGETS, DIFFERENTIAL]
    parser.add_argument("--seconds", type=int, default=600, help="for each of them")
    parser.add_argument("--only", choices=names, action="append", help="instead of all")
    parser.add_argument("--folder", type=Path, default=Path("build/fuzz"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found = 0
    for name in options.only or names:
        folder = options.folder.absolute()
        if name == DIFFERENTIAL:
            found += _compare(folder, options.seconds, options.seed)
        elif shutil.which("clang"):
            found += _libfuzzer(name, folder, options.seconds, options.seed)
        else:
            print("no clang: standalone.c with gcc, which does not learn from coverage")
            found += _standalone(name, folder, options.seconds, options.seed)
    return 1 if found else 0


def write_seeds(name: str, folder: Path) -> list[Path]:
    """Write the inputs that a target starts from."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    if name == "fuzz_weights":
        inputs = dict(seeds.corpus(random))
    else:
        payloads = [(key, *coded) for key, coded in seeds.payloads(random).items()]
        payloads += [(key, tensor.payload, tensor.raw_bytes) for key, tensor, _ in seeds.broken()]
        inputs = {
            key: (raw_bytes - 1).to_bytes(3, "little") + payload
            for key, payload, raw_bytes in payloads
        }
    for key, data in inputs.items():
        (folder / key).write_bytes(data)
    return sorted(folder / key for key in inputs)


def _libfuzzer(name: str, folder: Path, seconds: int, seed: int) -> int:
    """Run a target under libFuzzer; 1 where it found something."""
    program = programs.build(folder / "clang", "clang", programs.LIBFUZZER, f"{name}.c")
    write_seeds(name, folder / "seeds" / name)
    for place in ("corpus", "findings"):
        (folder / place / name).mkdir(parents=True, exist_ok=True)
    print(f"{name}: libFuzzer, {seconds} s", flush=True)
    command = [
        str(program), str(folder / "corpus" / name), str(folder / "seeds" / name),
        f"-max_total_time={seconds}", f"-max_len={MAX_BYTES}", f"-seed={seed + 1}", "-timeout=10",
        "-rss_limit_mb=2048", "-use_value_profile=1", "-print_final_stats=1", "-verbosity=1",
        f"-artifact_prefix={folder / 'findings' / name}/",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    log = folder / f"{name}.log"
    log.write_text(done.stderr)
    runs, coverage = STATISTICS.findall(done.stderr), COVERAGE.findall(done.stderr)
    if runs and coverage:
        edges, features, inputs = coverage[-1]
        print(f"  {runs[-1]} runs; {edges} edges, {features} features, {inputs} inputs kept")
    if done.returncode:
        print(f"  FOUND SOMETHING, see {log} and {folder / 'findings' / name}")
    return int(done.returncode != 0)


def _standalone(name: str, folder: Path, seconds: int, seed: int) -> int:
    """Run a target with changes of its seeds that know nothing of coverage; 1 where it failed."""
    sources = (f"{name}.c", "standalone.c")
    program = programs.build(folder / "gcc", "gcc", programs.SANITIZERS, *sources)
    inputs = write_seeds(name, folder / "seeds" / name)
    until = time.monotonic() + seconds
    runs = 0
    while time.monotonic() < until:
        command = [str(program), str(RUNS_AT_ONCE), str(seed), *map(str, inputs)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name}: FOUND SOMETHING\n{' '.join(command)}\n{done.stderr}")
            return 1
        runs += RUNS_AT_ONCE
        seed += 1
    print(f"{name}: {runs} runs", flush=True)
    return 0


def _compare(folder: Path, seconds: int, seed: int) -> int:
    """Compare the readers; 1 where they differ."""
    compiler = "clang" if shutil.which("clang") else "gcc"
    program = programs.build(folder / compiler, compiler, programs.SANITIZERS, "verdicts.c")
    files = folder / "findings" / DIFFERENTIAL
    files.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + seconds
    verdicts: Counter[str] = Counter()
    while time.monotonic() < until:
        try:
            random = np.random.default_rng(seed)
            cases = differential.write_cases(files, random, FILES_AT_ONCE)
            verdicts += differential.compare([str(program)], cases)
        except Exception:
            print(f"{DIFFERENTIAL}: FOUND SOMETHING, seed {seed}")
            traceback.print_exc()
            return 1
        seed += 1
    shutil.rmtree(files)
    said = ", ".join(f"{count} {name}" for name, count in verdicts.most_common())
    print(f"{DIFFERENTIAL}: {verdicts.total()} files: {said}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
