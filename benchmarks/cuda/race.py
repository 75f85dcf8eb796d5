"""Race bundles against PyTorch on this machine's GPU: A B A B, as many as time allows.

    python3 benchmarks/cuda/race.py BUNDLES -o OUT --budget-s 400

Rows are raced in waves: the PyTorch processes of a wave compile beside each other, then everybody
stops and waits for their turn. A wave that compiles for too long goes on with cheaper modes. Every
finished row is a line of OUT/race.jsonl at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import machine
from contenders import OURS, ContenderFailed, Visit, Worker, torch_worker, visit_bundle
from pack import read_index

# PyTorch has no int8 convolutions on CUDA: int8 meets the fastest floats.
PEER_PRECISION = {"int8": "float16"}
# What follows a mode that takes too long to compile, each with so many seconds.
FALLBACKS = {"max-autotune": "reduce-overhead", "reduce-overhead": "none"}
FALLBACK_S = 60.0
LEAST_WAVE_S = 30.0
SAME_MACS = 0.05
Row = dict[str, Any]
Key = tuple[str, str, int]


@dataclass(frozen=True)
class Options:
    """How to race.

    Attributes:
        deadline: time of `time.monotonic` at which all is over.
        autotune_s: how long a wave may compile before it goes on with cheaper modes.
        parallel: PyTorch processes of a wave.
    """

    deadline: float
    rounds: int = 3
    seconds: float = 0.2
    runs: int = 100
    warm_up_seconds: float = 0.5
    compile_mode: str = "max-autotune"
    autotune_s: float = 150.0
    parallel: int = 8
    device: str = "cuda"
    threads: int = 8
    modes: tuple[str, ...] = ("eager", "graph", "compiled")

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()


def peer_key(row: Row) -> Key:
    """Return model, precision and batch of the PyTorch process that a row needs."""
    return row["model"], PEER_PRECISION.get(row["precision"], row["precision"]), row["batch"]


def waves(rows: Sequence[Row], parallel: int) -> Iterator[list[Row]]:
    """Cut the rows, in their order, where they would need more PyTorch processes than that."""
    wave: list[Row] = []
    for row in rows:
        if len({peer_key(r) for r in [*wave, row]}) > parallel:
            yield wave
            wave = []
        wave.append(row)
    if wave:
        yield wave


def interleave(
    visits: dict[str, Callable[[], Visit]], rounds: int
) -> tuple[dict[str, list[Visit]], dict[str, str]]:
    """Let everybody visit in turn, round after round; who fails once is out, with the reason."""
    done: dict[str, list[Visit]] = {name: [] for name in visits}
    failed: dict[str, str] = {}
    for _ in range(rounds):
        for name, visit in visits.items():
            if name in failed:
                continue
            try:
                done[name].append(visit())
            except ContenderFailed as error:
                failed[name] = str(error)
    return {name: found for name, found in done.items() if name not in failed}, failed


def summary(rounds: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Return the medians of the rounds, and median and quartiles of all times together."""
    times = sorted(time for found in rounds for time in found)
    q1, p50, q3 = statistics.quantiles(times, n=4, method="inclusive") if times[1:] else times * 3
    medians = [statistics.median(found) for found in rounds]
    return {"rounds": medians, "q1": q1, "p50": p50, "q3": q3, "count": len(times)}


def summarised(visits: Sequence[Visit]) -> dict[str, Any]:
    """Summarise the visits of one contender."""
    keys = [key for key in ("events_ms", "wall_ms") if key in visits[0]]
    found: dict[str, Any] = {key: summary([visit[key] for visit in visits]) for key in keys}
    if "queued_ms" in visits[0]:
        found["queued_ms"] = statistics.median(visit["queued_ms"] for visit in visits)
    return found


def race_row(row: Row, worker: Worker | None, why: str, folder: Path, options: Options) -> Row:
    """Race one row; `why` there is no worker, or why it has other modes than it was asked for."""
    how = (options.seconds, options.runs, options.warm_up_seconds)
    visits: dict[str, Callable[[], Visit]] = {OURS: lambda: visit_bundle(folder, *how)}
    result = {key: row[key] for key in ("name", "model", "precision", "batch", "macs")}
    skipped: dict[str, str] = {}
    ready = worker.ready if worker else None
    if worker is None or ready is None:
        skipped = dict.fromkeys(options.modes, why)
    else:
        skipped = dict(ready["skipped"])
        for mode in options.modes:
            if mode not in ready["modes"]:
                skipped.setdefault(mode, why or "was not prepared")
        if abs(ready["macs"] / row["macs"] - 1) > SAME_MACS:
            other = f"does other work: {ready['macs']} multiply-accumulates"
            skipped |= dict.fromkeys(ready["modes"], other)
        for mode in ready["modes"]:
            if mode not in skipped:
                visits[mode] = lambda mode=mode: worker.visit(mode, *how)
    before = machine.momentary()
    found, failed = interleave(visits, options.rounds)
    return {
        "kind": "row",
        **result,
        "peer_precision": peer_key(row)[1],
        "contenders": {name: summarised(done) for name, done in found.items()},
        "prepared": ready["modes"] if ready else {},
        "skipped": skipped | failed,
        "note": why,
        "state": {"before": before, "after": machine.momentary()},
    }


def prepared(
    wave: Sequence[Row], start: Callable[[Row, str], Worker], options: Options
) -> tuple[dict[Key, Worker], dict[Key, str], dict[Key, str]]:
    """Start the workers of a wave and wait; restart with a cheaper mode what takes too long.

    Returns the workers that are ready, the mode of torch.compile of each, and what went wrong.
    """
    rows = {peer_key(row): row for row in wave}
    mode, limit_s = options.compile_mode, options.autotune_s
    ready: dict[Key, Worker] = {}
    modes: dict[Key, str] = {}
    why: dict[Key, str] = {}
    waiting = list(rows)
    while waiting and options.left_s > 0:
        workers = {key: start(rows[key], mode) for key in waiting}
        # the other half is for racing
        until = time.monotonic() + min(limit_s, options.left_s / 2)
        late = []
        for key, worker in workers.items():
            try:
                if worker.wait_ready(until):
                    ready[key], modes[key] = worker, mode
                    continue
                why[key] = f"PyTorch ({mode}) was not ready in time"
            except ContenderFailed as error:
                why[key] = str(error)
            late.append(key)
        for key in late:
            workers[key].close()
        if mode not in FALLBACKS:
            break
        mode, limit_s, waiting = FALLBACKS[mode], FALLBACK_S, late
    return ready, modes, why


def race(
    rows: Sequence[Row],
    bundles: Path,
    work: Path,
    options: Options,
    report: Callable[[Row], None],
    say: Callable[[str], None] = print,
) -> None:
    """Race all rows that time allows, and report each one, those that were not reached included."""
    work.mkdir(parents=True, exist_ok=True)

    def start(row: Row, mode: str) -> Worker:
        modes = tuple(m for m in options.modes if m != "compiled" or mode != "none")
        return torch_worker(
            row, peer_key(row)[1], mode, bundles, work, options.device, options.threads, modes
        )

    longest = 0.0
    for wave in waves(rows, options.parallel):
        if options.left_s < LEAST_WAVE_S:
            for row in wave:
                report(left_out(row))
            continue
        with contextlib.ExitStack() as stack:
            began = time.monotonic()
            workers, modes, why = prepared(wave, start, options)
            for worker in workers.values():
                stack.callback(worker.close)
            compiled = ", ".join(f"{'-'.join(map(str, key))} {mode}" for key, mode in modes.items())
            say(f"prepared in {time.monotonic() - began:.0f} s: {compiled or 'nothing'}")
            for key, reason in why.items():
                say(f"  {key}: {reason}")
            for row in wave:
                began, key = time.monotonic(), peer_key(row)
                if options.left_s < longest:
                    report(left_out(row))
                    continue
                result = race_row(
                    row, workers.get(key), why.get(key, ""), bundles / row["name"], options
                )
                result["torch_mode"] = modes.get(key, "none")
                report(result)
                longest = max(longest, time.monotonic() - began)


def left_out(row: Row) -> Row:
    return {"kind": "left out", "name": row["name"], "why": "the time was over"}


def chosen(rows: Sequence[Row], only: Sequence[str]) -> list[Row]:
    """Return the rows whose names match one of the patterns, in their order; all without any."""
    return [row for row in rows if not only or any(fnmatch(row["name"], p) for p in only)]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what `options` reads."""
    parser.add_argument("--budget-s", type=float, default=400, help="seconds for the whole race")
    parser.add_argument("--only", action="append", default=[], help="rows like 'resnet18-*-b1'")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.2, help="length of a visit")
    parser.add_argument("--runs", type=int, default=100, help="least inferences of a visit")
    parser.add_argument("--warm-up-s", type=float, default=0.5, help="before each visit, at most")
    parser.add_argument(
        "--torch-mode", default="max-autotune", choices=[*FALLBACKS, "none"],
        help="of torch.compile; a cheaper one takes over where it takes too long",
    )  # fmt: skip
    parser.add_argument("--autotune-s", type=float, default=150, help="most that a wave compiles")
    parser.add_argument("--parallel", type=int, default=8, help="PyTorch processes of a wave")
    parser.add_argument("--threads", type=int, default=8, help="compilers of each of them")
    parser.add_argument("--device", default="cuda", help="of PyTorch")
    parser.add_argument("--modes", default="eager,graph,compiled")


def options(arguments: argparse.Namespace) -> Options:
    """Read the options; the budget begins now."""
    return Options(
        deadline=time.monotonic() + arguments.budget_s,
        rounds=arguments.rounds,
        seconds=arguments.seconds,
        runs=arguments.runs,
        warm_up_seconds=arguments.warm_up_s,
        compile_mode=arguments.torch_mode,
        autotune_s=arguments.autotune_s,
        parallel=arguments.parallel,
        device=arguments.device,
        threads=arguments.threads,
        modes=tuple(arguments.modes.split(",")),
    )


def main() -> None:
    """Race an unpacked folder of bundles."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("bundles", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    add_options(parser)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "race.jsonl").open("a") as file:

        def report(row: Row) -> None:
            print(json.dumps(row), file=file, flush=True)
            print(row["name"], row.get("why", "raced"), flush=True)

        rows = chosen(read_index(arguments.bundles), arguments.only)
        race(rows, arguments.bundles, arguments.out / "work", options(arguments), report)


if __name__ == "__main__":
    main()
