"""Everything that is measured on the machine with the GPU, in one command.

    python3 benchmarks/cuda/on_device.py PACK.tar.xz -o OUT --budget-s 500

unpacks, checks every bundle, times every kernel, measures the peaks, and races against PyTorch as
far as the time allows. OUT gets `race.jsonl`, `selftest.json`, `profile.json`, `table.md`,
`artifacts.tar.xz` (what PyTorch compiled: give it to `--artifacts` next time) and `torch.log`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import lzma
import platform
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import machine
import race
import table
from contenders import ContenderFailed, run_bundle
from pack import read_index, unpack

PHASES = ("selftest", "profile", "peak", "race")
SELFTESTS_AT_ONCE = 4
PEAK_LIMIT_S = 60.0
PROFILE = ("--profile", "--seconds", "0.2", "--runs", "20", "--warmup", "0.3")
MOST_ARTIFACT_BYTES = 15 << 20
LOG_BYTES = 8 << 20
Say = Callable[[str], None]


def selftest(rows: Sequence[race.Row], bundles: Path, say: Say) -> dict[str, Any]:
    """Let every bundle answer its golden sample; return what it said, or why it could not."""
    found: dict[str, Any] = {}
    with ThreadPoolExecutor(SELFTESTS_AT_ONCE) as threads:
        answers = threads.map(lambda row: _selftest(bundles / row["name"]), rows)
        for row, answer in zip(rows, answers, strict=True):
            found[row["name"]] = answer
            say(f"selftest {row['name']}: {'passed' if answer['passed'] else 'FAILED'}")
            if not answer["passed"]:
                say(f"  {json.dumps(answer)[:400]}")
    return found


def _selftest(folder: Path) -> dict[str, Any]:
    try:
        return run_bundle(folder, "--selftest")
    except ContenderFailed as error:
        return {"passed": False, "error": str(error)}


def profile(rows: Sequence[race.Row], bundles: Path, say: Say) -> dict[str, Any]:
    """Time every kernel of every bundle, and name the slowest."""
    found: dict[str, Any] = {}
    for row in rows:
        try:
            found[row["name"]] = run_bundle(bundles / row["name"], *PROFILE)
        except ContenderFailed as error:
            say(f"profile {row['name']}: {error}")
            continue
        calls = found[row["name"]]["calls"]
        total = sum(call["midmean_ms"] for call in calls)
        slowest = sorted(calls, key=lambda call: -call["midmean_ms"])[:3]
        names = ", ".join(f"{call['node']} {call['midmean_ms']:.4f}" for call in slowest)
        say(f"profile {row['name']}: {total:.3f} ms in {len(calls)} calls; {names}")
    return found


def peak(say: Say) -> race.Row:
    """Measure the peaks in a process of its own, which gives the memory back."""
    script = Path(__file__).with_name("peak.py")
    try:
        done = subprocess.run(
            [sys.executable, str(script)], capture_output=True, text=True, check=True,
            timeout=PEAK_LIMIT_S,
        )  # fmt: skip
        found: race.Row = {"kind": "peak", **json.loads(done.stdout)}
    except (subprocess.SubprocessError, ValueError) as error:
        say(f"peak: {str(getattr(error, 'stderr', '') or error)[-300:]}")
        return {"kind": "peak"}
    say(f"peak: {json.dumps(found)}")
    return found


def about_machine() -> race.Row:
    """Return the GPU and the versions of what races."""
    versions = {}
    for name in ("torch", "triton", "transformers", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "–"
    return {
        "kind": "machine",
        "gpu": machine.constant(),
        "state": machine.momentary(),
        "cpu": platform.processor() or platform.machine(),
        **versions,
    }


def keep_artifacts(folder: Path, destination: Path, say: Say) -> None:
    """Pack what PyTorch compiled, the smallest first, as far as it fits."""
    kept = sorted(folder.glob("*"), key=lambda path: path.stat().st_size)
    packed = b""
    while kept:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as archive:
            for path in kept:
                archive.add(path, path.name)
        packed = lzma.compress(stream.getvalue(), preset=3)
        if len(packed) <= MOST_ARTIFACT_BYTES:
            break
        kept = kept[: len(kept) * 3 // 4]
    if kept:
        destination.write_bytes(packed)
        say(f"artifacts: {len(kept)} files, {len(packed) >> 10} KiB")


def load_artifacts(source: Path, folder: Path) -> None:
    """Unpack what `keep_artifacts` packed."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")


def gather_logs(work: Path, destination: Path) -> None:
    """Write the ends of all logs of PyTorch's processes to one file."""
    logs = sorted(work.glob("*.log"))
    most = LOG_BYTES // max(len(logs), 1)
    texts = (f"== {path.name}\n{path.read_text(errors='replace')[-most:]}\n" for path in logs)
    destination.write_text("".join(texts), "utf-8")


def main() -> int:
    """Run the phases; 1 where a bundle failed its selftest."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("pack", type=Path, help="the file, or a folder that it was unpacked to")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/edgepress-race"))
    parser.add_argument("--phases", default=",".join(PHASES), help="separated by commas")
    parser.add_argument("--artifacts", type=Path, help="artifacts.tar.xz of an earlier run")
    race.add_options(parser)
    arguments = parser.parse_args()
    options = race.options(arguments)
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {text}", flush=True)

    phases = arguments.phases.split(",")
    if unknown := set(phases) - set(PHASES):
        parser.error(f"no phase is called {', '.join(sorted(unknown))}; there are {PHASES}")
    out, work, bundles = arguments.out, arguments.work, arguments.pack
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    if bundles.is_file():
        bundles = work / "bundles"
        unpack(arguments.pack, bundles)
        say("unpacked")
    if arguments.artifacts:
        load_artifacts(arguments.artifacts, work / "artifacts")
    rows = race.chosen(read_index(bundles), arguments.only)
    results, peaks = out / "race.jsonl", dict[str, Any]()

    def report(row: race.Row) -> None:
        with results.open("a", encoding="utf-8") as file:
            print(json.dumps(row), file=file)
        if row["kind"] == "row":
            say(table.line(row, peaks))
        elif row["kind"] == "left out":
            say(f"{row['name']}: left out, {row['why']}")

    report(about_machine())
    passed = True
    if "selftest" in phases:
        found = selftest(rows, bundles, say)
        (out / "selftest.json").write_text(json.dumps(found, indent=1), "utf-8")
        right = {name for name, answer in found.items() if answer["passed"]}
        passed, rows = len(right) == len(rows), [row for row in rows if row["name"] in right]
        say(f"selftest: {len(right)} of {len(found)} passed")
    if "profile" in phases:
        found = profile(rows, bundles, say)
        (out / "profile.json").write_text(json.dumps(found), "utf-8")
    if "peak" in phases:
        peaks |= peak(say)
        report(peaks)
    if "race" in phases:
        race.race(rows, bundles, work, options, report, say)
        gather_logs(work, out / "torch.log")
        keep_artifacts(work / "artifacts", out / "artifacts.tar.xz", say)
    text = table.report(table.read(results))
    (out / "table.md").write_text(text, "utf-8")
    print(text)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
