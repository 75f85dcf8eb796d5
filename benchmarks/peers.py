"""Race real models against onnxruntime, OpenVINO, ncnn and LiteRT, and print Markdown tables.

    python benchmarks/models.py all -o models
    python benchmarks/peers.py models -o results --peer-python peers/bin/python

Per model and number of threads one race: our float and int8 bundles, and what each peer makes of
the same float model in float and in int8, calibrated on the same samples. Everybody in a process of
its own, stopped while others run; A B C A B C. Bundles and conversions are kept in the output
folder, so that a second run only races; `--rebuild` makes our bundles anew.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from edgepress.pipeline.bundle import read_bundle
from edgepress.pipeline.cache import Cache
from edgepress.pipeline.oracle import sqnr_db
from edgepress.pipeline.peak import peak_gops
from edgepress.pipeline.peer_process import Installed, Racer, find_peer, peer_names
from edgepress.pipeline.peers.base import CannotRun
from edgepress.pipeline.progress import Progress
from edgepress.pipeline.race import disturbed, interleave, our_visit, peer_visit
from edgepress.pipeline.rivals import Field, prepared
from edgepress.pipeline.verify import bundle_target
from edgepress.targets.devices.local import connect

TOKENS = ("input_ids:1x64", "attention_mask:1x64", "token_type_ids:1x64")
OURS = {"float": "edgepress float", "int8": "edgepress int8"}
CACHE_BYTES = 20 << 30


@dataclass(frozen=True)
class Network:
    """A model: its title, the recipe of its int8 build, and what of onnxruntime it must beat."""

    name: str
    title: str
    recipe: str = "default"
    shapes: tuple[str, ...] = ()
    yardstick: str = "onnxruntime int8"

    @property
    def dynamic(self) -> bool:
        """Whether its activations are quantized while it runs."""
        return self.recipe == "transformer"


NETWORKS = (
    Network("resnet18", "ResNet-18 224"),
    Network("squeezenet", "SqueezeNet 1.1"),
    Network("mobilenetv2", "MobileNetV2"),
    Network("efficientnet-lite0", "EfficientNet-lite0"),
    Network("encoder", "encoder", "transformer", (), "onnxruntime int8 dynamic"),
    Network("minilm", "MiniLM 64", "transformer", TOKENS, "onnxruntime int8 dynamic"),
)


def build(network: Network, models: Path, out: Path, *, rebuild: bool) -> dict[str, Path]:
    """Make both bundles through the command line, where they are missing."""
    made = {kind: out / f"{network.name}-{kind}" for kind in OURS}
    for kind, folder in made.items():
        if folder.exists() and not rebuild:
            continue
        command = [str(Path(sys.executable).with_name("edgepress")), "run"]
        command += [str(models / f"{network.name}.onnx"), "-t", "native", "-o", str(folder)]
        command += [word for shape in network.shapes for word in ("--input-shape", shape)]
        command += ["-r", "none"] if kind == "float" else ["-r", network.recipe, "--calib"]
        command += [] if kind == "float" else [str(models / f"{network.name}_calib.npz")]
        done = subprocess.run([*command, "--overwrite"], stdout=subprocess.DEVNULL, check=False)
        if done.returncode not in (0, 6):
            raise click.ClickException(f"{' '.join(command)} ended with {done.returncode}")
    return made


def race(
    network: Network,
    models: Path,
    out: Path,
    peers: list[Installed],
    counts: tuple[int, ...],
    rounds: int,
    seconds: float,
    *,
    rebuild: bool,
) -> list[dict[str, Any]]:
    """Convert and race one model on each number of threads; without any, only convert."""
    progress, cache = Progress(), Cache(out / "cache", CACHE_BYTES)
    bundles = {
        kind: read_bundle(f) for kind, f in build(network, models, out, rebuild=rebuild).items()
    }
    device = connect(bundle_target(bundles["int8"]))
    results = []
    with tempfile.TemporaryDirectory(prefix="edgepress-") as temporary:
        paths = [models / f"{network.name}{end}" for end in (".onnx", "_calib.npz", "_eval.npz")]
        field = Field(bundles["int8"], paths[0], Path(temporary), paths[1], paths[2])
        ready: dict[str, tuple[Installed, Path]] = {}
        skipped: dict[str, str] = {
            f"{peer.name} {p}": why for peer in peers for p, why in peer.unable.items()
        }
        for name, (peer, source) in field.plans(peers).items():
            try:
                made = prepared(peer, source, field.task, field.folder / name, cache, progress)
                ready[name] = (peer, made)
            except CannotRun as error:
                skipped[name] = str(error)
        quality: dict[str, float] = {
            OURS[kind]: sqnr_db(field.task.wanted, device.infer(b.folder, field.task.feeds))
            for kind, b in bundles.items()
            if counts
        }
        for threads in counts:
            with contextlib.ExitStack() as stack:
                visits = {
                    OURS[kind]: our_visit(bundle, device, threads, seconds, {})
                    for kind, bundle in bundles.items()
                }
                racers: dict[str, Racer] = {}
                for name, (peer, made) in ready.items():
                    try:
                        racers[name] = racer = Racer(peer, field.task, made, threads)
                        stack.callback(racer.close)
                        if name not in quality:
                            quality[name] = field.task.sqnr_db(racer.answers())
                        visits[name] = peer_visit(racer, seconds)
                    except CannotRun as error:
                        skipped[name] = str(error)
                medians, dropped = interleave(visits, rounds, progress)
                cores = {name: racer.cores for name, racer in racers.items()}
            results.append(
                {
                    "model": network.name,
                    "threads": threads,
                    "macs": bundles["float"].manifest.source["macs"],
                    "medians_ms": medians,
                    "sqnr_db": {name: db for name, db in quality.items() if name in medians},
                    "cores": cores,
                    "skipped": skipped | dropped,
                }
            )
    return results


# Tables ---------------------------------------------------------------------------------------


def is_int8(name: str) -> bool:
    return "int8" in name


def ratios(result: dict[str, Any], theirs: str) -> list[float]:
    """Return our time over theirs, per round, of the same precision."""
    medians = result["medians_ms"]
    mine = medians[OURS["int8" if is_int8(theirs) else "float"]]
    return [a / b for a, b in zip(mine, medians[theirs], strict=True)]


def fastest(result: dict[str, Any], network: Network, *, int8: bool) -> str | None:
    """Return the fastest peer of a precision; of transformers, among those that are as exact."""
    medians, quality = result["medians_ms"], result["sqnr_db"]
    least = quality.get(network.yardstick) if network.dynamic and int8 else None
    names = [
        name
        for name in medians
        if name not in OURS.values()
        and is_int8(name) == int8
        and (least is None or quality.get(name, -1e9) >= least)
    ]
    return min(names, key=lambda name: statistics.median(medians[name]), default=None)


def _ratio(result: dict[str, Any], name: str | None) -> str:
    if name is None or name not in result["medians_ms"]:
        return "–"
    found = ratios(result, name)
    return f"{statistics.median(found):.2f} ({min(found):.2f}–{max(found):.2f})"


def model_table(result: dict[str, Any], network: Network, peak: dict[str, float]) -> str:
    """Return one race as Markdown: floats first, ours first of each precision."""
    lines = [
        f"**{network.title}, {result['threads']} thread(s)**",
        "",
        "| | median ms | ours / theirs (range) | % of peak | SQNR dB |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, times in sorted(result["medians_ms"].items(), key=lambda item: is_int8(item[0])):
        median = statistics.median(times)
        most = peak["int8" if is_int8(name) else "fp32"]
        share = 100 * 2e-6 * result["macs"] / median / most
        db = result["sqnr_db"].get(name)
        ratio = "" if name in OURS.values() else _ratio(result, name)
        quality = "–" if db is None else f"{db:.1f}"
        lines.append(f"| {name} | {median:.4g} | {ratio} | {share:.0f} | {quality} |")
    lines += ["", *(f"**{note}.**" for note in disturbed(result["threads"], result["cores"]))]
    if result["skipped"]:
        whys = "; ".join(f"{name}: {why}" for name, why in result["skipped"].items())
        lines += ["", f"Did not run: {whys}."]
    return "\n".join(lines) + "\n"


def summary_table(results: list[dict[str, Any]], threads: int) -> str:
    """Return what the goals are about, one line per model."""
    lines = [
        f"**Our time over theirs, {threads} thread(s)**",
        "",
        "| | float ms | / onnxruntime fp32 | / fastest float | int8 ms | / onnxruntime int8 "
        "| / fastest int8 |",
        "|---|---:|---:|---|---:|---:|---|",
    ]
    for result in (r for r in results if r["threads"] == threads):
        network = next(n for n in NETWORKS if n.name == result["model"])
        cells = [network.title]
        for kind, yardstick in (("float", "onnxruntime fp32"), ("int8", network.yardstick)):
            best = fastest(result, network, int8=kind == "int8")
            times = result["medians_ms"].get(OURS[kind])
            cells.append("–" if times is None else f"{statistics.median(times):.4g}")
            cells.append(_ratio(result, yardstick))
            cells.append(f"{_ratio(result, best)} {best or ''}".strip())
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def report(document: dict[str, Any]) -> str:
    """Return all tables."""
    results = document["results"]
    counts = list(dict.fromkeys(result["threads"] for result in results))
    parts = [summary_table(results, threads) for threads in counts]
    for threads in counts:
        peak = document["peak_gops"][str(threads)]
        gops = ", ".join(f"{name} {most:.0f}" for name, most in peak.items())
        parts.append(f"Peak of this machine, GOP/s, {threads} thread(s): {gops}.\n")
    for network in NETWORKS:
        for result in (r for r in results if r["model"] == network.name):
            peak = document["peak_gops"][str(result["threads"])]
            parts.append(model_table(result, network, peak))
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    parts.append(f"Versions: {versions}.\n")
    return "\n".join(parts)


@click.command(help=str(__doc__).partition("\n")[0])
@click.argument("models", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path))
@click.option("--only", multiple=True, help="Only these models.")
@click.option("--against", multiple=True, default=peer_names(), show_default=True)
@click.option(
    "--peer-python", envvar="EDGEPRESS_PEER_PYTHON", help="Where the peers are installed."
)
@click.option("--threads", "counts", multiple=True, type=int, default=(1, 2), show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=0.3, show_default=True, help="Length of a visit.")
@click.option("--convert", is_flag=True, help="Build and convert only; race later.")
@click.option("--rebuild", is_flag=True, help="Build our bundles anew.")
def main(
    models: Path,
    out: Path,
    only: tuple[str, ...],
    against: tuple[str, ...],
    peer_python: str | None,
    counts: tuple[int, ...],
    rounds: int,
    seconds: float,
    convert: bool,
    rebuild: bool,
) -> None:
    """Race every model; the raw results go to OUT/peers.json."""
    out.mkdir(parents=True, exist_ok=True)
    peers = [find_peer(name, peer_python) for name in against]
    document: dict[str, Any] = {
        "rounds": rounds,
        "seconds": seconds,
        "versions": {name: version for p in peers for name, version in p.versions.items()},
        "peak_gops": {},
        "results": [],
    }
    for network in (n for n in NETWORKS if not only or n.name in only):
        click.echo(f"{network.name} …", err=True)
        document["results"] += race(
            network, models, out, peers, () if convert else counts, rounds, seconds, rebuild=rebuild
        )
        if convert:
            continue
        target = bundle_target(read_bundle(out / f"{network.name}-float"))
        for threads in counts:  # a peak is the best of all
            peak = document["peak_gops"].setdefault(str(threads), {})
            cache = Cache(out / "cache", CACHE_BYTES)
            found = peak_gops(target, connect(target), threads=threads, cache=cache)
            peak |= {name: max(gops, peak.get(name, 0)) for name, gops in found.items()}
        (out / "peers.json").write_text(json.dumps(document, indent=1), "utf-8")
    if not convert:
        click.echo(report(document))


if __name__ == "__main__":
    main()
