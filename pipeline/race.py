"""Times a bundle on this machine, alone or against other runtimes.

The race is interleaved, A B A B, so that a machine that slows down slows all alike. Every contender
runs in a process of its own, and none runs while it is not its turn: runtimes whose threads spin
ruin the timing of others. Ours is started for every visit; a peer loads its model once and is
stopped between its visits. Whoever comes warms up first.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from edgepress.pipeline.bundle import Bundle, read_bundle
from edgepress.pipeline.cache import Cache
from edgepress.pipeline.peer_process import Installed, Racer, find_peer
from edgepress.pipeline.peers.base import CannotRun
from edgepress.pipeline.progress import Progress
from edgepress.pipeline.rivals import OURS, Field, prepared, signal_to_noise
from edgepress.pipeline.verify import bundle_target
from edgepress.targets.base import DeviceFailed
from edgepress.targets.command_device import CommandDevice
from edgepress.targets.devices.base import find_device
from edgepress.targets.devices.local import connect

QUIET_CORES = 0.9
ROUNDS, VISIT_SECONDS, VISIT_RUNS, WARM_UP_SECONDS = 7, 0.5, 10, 0.15
Visit = Callable[[], Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class Race:
    """What every contender took.

    Attributes:
        threads: of every contender.
        medians_ms: contender to its median of every round.
        device: facts about this machine.
        sqnr_db: contender to the signal to noise ratio of its answers against the float model.
        cores: peer to the cores that it kept busy: CPU time over time, the median over the visits.
        skipped: contender to why it did not run.
        versions: of the peers' packages.
        notes: what to know of the samples.
    """

    threads: int
    medians_ms: Mapping[str, Sequence[float]]
    device: Mapping[str, Any]
    sqnr_db: Mapping[str, float] = field(default_factory=dict)
    cores: Mapping[str, float] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def median_ms(self, name: str) -> float:
        """Return the median over the rounds."""
        return statistics.median(self.medians_ms[name])

    def ratios(self, name: str, ours: str = OURS) -> list[float]:
        """Return our time as a share of this contender's, per round: below 1, we are faster."""
        pairs = zip(self.medians_ms[ours], self.medians_ms[name], strict=True)
        return [mine / theirs for mine, theirs in pairs]

    def to_json(self) -> dict[str, Any]:
        """Return plain data; a ratio has its median, least and largest over the rounds."""
        ratios = {
            name: {
                "median": statistics.median(self.ratios(name)),
                "min": min(self.ratios(name)),
                "max": max(self.ratios(name)),
            }
            for name in self.medians_ms
            if name != OURS
        }
        return {
            "threads": self.threads,
            "medians_ms": {name: list(times) for name, times in self.medians_ms.items()},
            "our_time_over_theirs": ratios,
            "sqnr_db": dict(self.sqnr_db),
            "cores": dict(self.cores),
            "skipped": dict(self.skipped),
            "versions": dict(self.versions),
            "notes": list(self.notes),
            "device": dict(self.device),
        }


def bench(
    path: Path,
    *,
    model: Path | None = None,
    against: Sequence[str] = (),
    threads: int = 1,
    rounds: int = ROUNDS,
    calib: Path | None = None,
    evaluation: Path | None = None,
    peer_python: str | None = None,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> Race:
    """Time a bundle, or a model that is first compiled as it is for this machine.

    Args:
        path: a bundle or an ONNX model.
        model: the original of a compressed bundle: what peers convert and quantize themselves.
        against: names of peers; none to time alone.
        threads: for every contender.
        rounds: visits of each contender.
        calib: calibration samples for peers that quantize; None takes random ones.
        evaluation: samples to compare answers on; None takes the bundle's golden ones.
        peer_python: an interpreter that has peers which this one lacks.
        cache: keeps what peers made of the model, or None.
        progress: where to say how far it is.

    Raises:
        UsageError: a peer is not installed, or the original model is needed and not here.
        DeviceFailed: this machine cannot run the bundle, or nothing was left to race against.
    """
    progress = progress or Progress(shown=False)
    peers = [find_peer(name, peer_python) for name in dict.fromkeys(against)]
    with tempfile.TemporaryDirectory(prefix="edgepress-") as temporary:
        folder = Path(temporary)
        if path.is_dir():
            bundle = read_bundle(path)
        else:
            bundle, model = _compiled(path, folder / "bundle", progress), path
        device = connect(bundle_target(bundle), "", find_device("local"))
        if not peers:
            return _alone(bundle, device, threads, rounds, progress)
        field_ = Field(bundle, model, folder, calib, evaluation)
        return _against(field_, peers, device, threads, rounds, cache, progress)


def _compiled(path: Path, folder: Path, progress: Progress) -> Bundle:
    """Compile a model for this machine without compression."""
    from edgepress.pipeline.cache import Cache, cache_folder
    from edgepress.pipeline.recipe import load_recipe
    from edgepress.pipeline.run import Request, run
    from edgepress.targets.load import load_target

    request = Request(
        model=path,
        target=load_target("native"),
        recipe=load_recipe("none"),
        output=folder,
        check=False,
    )
    return run(request, cache=Cache(cache_folder()), progress=progress).bundle


def _alone(
    bundle: Bundle, device: CommandDevice, threads: int, rounds: int, progress: Progress
) -> Race:
    facts: dict[str, Any] = {}
    visits = {OURS: our_visit(bundle, device, threads, VISIT_SECONDS, facts)}
    medians, _ = interleave(visits, rounds, progress)
    return Race(threads=threads, medians_ms=medians, device=facts)


def _against(
    field_: Field,
    peers: Sequence[Installed],
    device: CommandDevice,
    threads: int,
    rounds: int,
    cache: Cache | None,
    progress: Progress,
) -> Race:
    plans, facts = field_.plans(peers), dict[str, Any]()
    skipped = {
        f"{peer.name} {precision}": why
        for peer in peers
        for precision, why in peer.unable.items()
        if not field_.floating
    }
    with contextlib.ExitStack() as stack:
        racers: dict[str, Racer] = {}
        for name, (peer, source) in plans.items():
            try:
                made = prepared(peer, source, field_.task, field_.folder / name, cache, progress)
                racers[name] = Racer(peer, field_.task, made, threads)
                stack.callback(racers[name].close)
            except CannotRun as error:
                skipped[name] = str(error)
        found: dict[str, float] = {}
        if field_.has_floats:
            found = signal_to_noise(field_.bundle, device, racers, field_.task, skipped, progress)
        visits = {OURS: our_visit(field_.bundle, device, threads, VISIT_SECONDS, facts)}
        visits |= {
            name: peer_visit(racer, VISIT_SECONDS)
            for name, racer in racers.items()
            if name not in skipped
        }
        medians, dropped = interleave(visits, rounds, progress)
        skipped |= dropped
        cores = {name: racers[name].cores for name in medians if name != OURS}
    if len(medians) == 1:
        reasons = "; ".join(f"{name}: {why}" for name, why in skipped.items())
        raise DeviceFailed(f"nothing is left to race against. {reasons}")
    return Race(
        threads=threads,
        medians_ms=medians,
        device=facts,
        sqnr_db={name: db for name, db in found.items() if name in medians},
        cores=cores,
        skipped=skipped,
        versions={name: v for peer in peers for name, v in peer.versions.items()},
        notes=[*field_.notes, *disturbed(threads, cores)],
    )


def disturbed(threads: int, cores: Mapping[str, float]) -> list[str]:
    """Say so where something else took the cores: a single thread that computes fills its own."""
    if threads > 1 or not cores or min(cores.values()) >= QUIET_CORES:
        return []
    return [
        f"the machine was not at rest: a contender got {min(cores.values()):.2f} of its core; stop "
        "what else runs, and race again"
    ]


def our_visit(
    bundle: Bundle, device: CommandDevice, threads: int, seconds: float, facts: dict[str, Any]
) -> Visit:
    """Return what times a bundle once; `facts` gets those of the device."""

    def visit() -> Sequence[float]:
        measured = device.bench(
            bundle.folder,
            threads=threads,
            seconds=seconds,
            runs=VISIT_RUNS,
            warm_up_seconds=WARM_UP_SECONDS,
        )
        facts.update(measured.device)
        return measured.samples_ms

    return visit


def peer_visit(racer: Racer, seconds: float) -> Visit:
    """Return what times a peer once."""
    return lambda: racer.visit(seconds, VISIT_RUNS)


def interleave(
    visits: Mapping[str, Visit], rounds: int, progress: Progress
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Visit all contenders in turn; return their medians per round, and why some dropped out."""
    medians: dict[str, list[float]] = {name: [] for name in visits}
    dropped: dict[str, str] = {}
    with progress.step(f"race, {rounds} rounds"):
        for done, (_, name) in enumerate(itertools.product(range(rounds), visits)):
            progress.update(f"race: {name}", done, rounds * len(visits))
            if name in dropped:
                continue
            try:
                medians[name].append(statistics.median(visits[name]()))
            except CannotRun as error:
                dropped[name] = str(error)
    return {name: times for name, times in medians.items() if name not in dropped}, dropped


def show_race(race: Race, screen: Console) -> None:
    """Print the table, then who did not run, and what to know."""
    screen.print(race_table(race))
    for name, why in race.skipped.items():
        screen.print(Text(f"{name} did not run: {why}"))
    for note in race.notes:
        screen.print(Text(note))


def race_table(race: Race) -> Table:
    """Show the medians and our time as a share of theirs, with its spread over the rounds."""
    table = Table(title=f"{race.threads} thread(s), median of {len(race.medians_ms[OURS])} rounds")
    for heading in ("", "median ms", "our time / theirs", "least", "most"):
        table.add_column(heading, justify="right" if heading else "left")
    if race.sqnr_db:
        table.add_column("SQNR dB", justify="right")
    for name in race.medians_ms:
        cells = [""] * 3
        if name != OURS:
            ratios = race.ratios(name)
            cells = [f"{v:.2f}" for v in (statistics.median(ratios), min(ratios), max(ratios))]
        if race.sqnr_db:
            cells.append(f"{race.sqnr_db[name]:.1f}" if name in race.sqnr_db else "")
        table.add_row(name, f"{race.median_ms(name):.4g}", *cells)
    return table
