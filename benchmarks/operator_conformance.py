"""Runs the onnx package's node tests through edgepress and writes docs/operators.md.

    python -m benchmarks.operator_conformance [--variant NAME] [--only TEXT] [--write]

Each case is lowered, compiled and run on this machine in a worker process, so that a crash of TVM
costs one case. Exit code 1 where a case is wrong or crashed or fewer than 84 % are right.
"""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

RIGHT_AT_LEAST = 0.84
CASE_TIMEOUT_S = 120
START_TIMEOUT_S = 180
COMMAND = [sys.executable, "-m", "benchmarks.operator_conformance"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="x86-64-v3")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--json", type=Path, help="write every result here")
    parser.add_argument("--write", action="store_true", help="write docs/operators.md")
    parser.add_argument("--variant", choices=("baked", "live", "inside"), default="baked")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options.target, options.variant)
    from tests.targets.conformance import node_tests

    tests = node_tests(options.variant)
    cases = {name: case for name, case in tests.items() if options.only in name}
    results = run_all(list(cases), options.target, options.variant)
    count = Counter(status for status, _ in results.values())
    for name, (status, why) in results.items():
        if status in ("wrong", "crashed"):
            print(f"{status:8} {name}: {why}")
    print(f"{len(cases)} cases: " + ", ".join(f"{n} {status}" for status, n in count.items()))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    if options.write:
        from benchmarks.operator_table import table

        Path("docs/operators.md").write_text(table(cases, results, options.target))
    good = count["right"] >= RIGHT_AT_LEAST * len(cases)
    return 0 if good and not count["wrong"] + count["crashed"] else 1


def run_all(names: list[str], target: str, variant: str) -> dict[str, tuple[str, str]]:
    """Run cases in worker processes; a case whose worker dies or hangs has crashed."""
    results: dict[str, tuple[str, str]] = {}
    pending = list(names)
    while pending:
        process = subprocess.Popen(
            [*COMMAND, "--worker", "--target", target, "--variant", variant],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        lines = _lines_of(process)
        while pending:
            name = pending.pop(0)
            line = _ask(process, lines, name, CASE_TIMEOUT_S + START_TIMEOUT_S)
            if line is None:
                results[name] = ("crashed", f"exit code {process.poll()}")
                break
            results[name] = tuple(json.loads(line))
            print(f"\r{len(results)}/{len(names)} {name:60.60}", end="", file=sys.stderr)
        process.kill()
        process.wait()
    print(file=sys.stderr)
    return results


def _lines_of(process: subprocess.Popen[str]) -> queue.Queue[str | None]:
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def _ask(
    process: subprocess.Popen[str], lines: queue.Queue[str | None], name: str, timeout_s: float
) -> str | None:
    assert process.stdin is not None
    try:
        process.stdin.write(name + "\n")
        process.stdin.flush()
        return lines.get(timeout=timeout_s)
    except (BrokenPipeError, queue.Empty):
        return None


def worker(target_name: str, variant: str) -> int:
    """Read case names from stdin; answer each with one JSON line."""
    from edgepress.targets.load import load_target
    from tests.targets.conformance import check, node_tests

    answers = sys.stdout
    sys.stdout = sys.stderr  # TVM prints
    target, cases = load_target(target_name), node_tests(variant)
    for line in sys.stdin:
        result = check(cases[line.strip()], target)
        print(json.dumps([result.status, result.why]), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
