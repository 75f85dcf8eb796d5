"""Times a bundle on this machine, alone or against onnxruntime.

The race is interleaved, A B A B, so that a machine that slows down slows all alike. Every visit is
a process of its own that ends before the next begins: runtimes whose threads spin ruin the timing
of others.
"""

from __future__ import annotations

import itertools
import json
import logging
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from rich.table import Table

from edgepress.calibration.base import Array
from edgepress.pipeline.bundle import Bundle, read_bundle
from edgepress.pipeline.progress import Progress
from edgepress.pipeline.verify import bundle_target
from edgepress.targets.base import DeviceFailed
from edgepress.targets.devices.base import open_device

OURS = "edgepress"
VISIT_SECONDS, VISIT_RUNS, TIMEOUT_SECONDS = 0.5, 10, 600


@dataclass(frozen=True, kw_only=True)
class Race:
    """What every contender took.

    Attributes:
        threads: of every contender.
        medians_ms: contender to its median of every round.
        device: facts about this machine.
    """

    threads: int
    medians_ms: Mapping[str, Sequence[float]]
    device: Mapping[str, Any]

    def median_ms(self, name: str) -> float:
        """Return the median over the rounds."""
        return statistics.median(self.medians_ms[name])

    def ratios(self, name: str) -> list[float]:
        """Return our time as a share of this contender's, per round: below 1, we are faster."""
        pairs = zip(self.medians_ms[OURS], self.medians_ms[name], strict=True)
        return [ours / theirs for ours, theirs in pairs]

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
        medians = {name: list(times) for name, times in self.medians_ms.items()}
        return {
            "threads": self.threads,
            "medians_ms": medians,
            "our_time_over_theirs": ratios,
            "device": dict(self.device),
        }


def bench(
    path: Path,
    *,
    model: Path | None = None,
    against: str | None = None,
    threads: int = 1,
    rounds: int = 7,
    progress: Progress | None = None,
) -> Race:
    """Time a bundle, or a model that is first compiled as it is for this machine.

    Args:
        path: a bundle or an ONNX model.
        model: the original of a compressed bundle, to race its fp32 as well.
        against: `onnxruntime`, or None to time alone.
        threads: for every contender.
        rounds: visits of each contender.
        progress: where to say how far it is.

    Raises:
        DeviceFailed: this machine cannot run the bundle, or a contender failed.
    """
    progress = progress or Progress(shown=False)
    with tempfile.TemporaryDirectory(prefix="edgepress-") as temporary:
        if path.is_dir():
            bundle = read_bundle(path)
        else:
            bundle, model = _compiled(path, Path(temporary) / "bundle", progress), path
        sample = Path(temporary) / "sample.npz"
        arrays: dict[str, Any] = dict(golden_sample(bundle, 0))
        np.savez(sample, **arrays)
        rivals = {} if against is None else onnxruntime_rivals(bundle, model, Path(temporary))
        return _race(bundle, rivals, sample, threads, rounds, progress)


def onnxruntime_rivals(bundle: Bundle, model: Path | None, folder: Path) -> dict[str, Path]:
    """Return what onnxruntime shall run against a bundle, by name; files are written to `folder`.

    Args:
        bundle: decides the precision.
        model: the model that it was made from, or None.
        folder: for a model that onnxruntime quantizes itself: where activations are quantized while
            the model runs, it has faster operators for that than the bundle's own graph.
    """
    graph = bundle.folder / "graph.onnx"
    if bundle.manifest.arithmetic == "float":
        return {"onnxruntime fp32": model or graph}
    if not any(node.op_type == "MatMulInteger" for node in ir.load(graph).graph):
        return {"onnxruntime int8": graph} | ({} if model is None else {"onnxruntime fp32": model})
    if model is None:
        return {"onnxruntime, the same graph": graph}
    from onnxruntime.quantization import quantize_dynamic  # takes long to import

    logging.getLogger().addFilter(_no_advice)
    try:
        quantize_dynamic(model, folder / "dynamic.onnx")
    finally:
        logging.getLogger().removeFilter(_no_advice)
    return {"onnxruntime int8": folder / "dynamic.onnx", "onnxruntime fp32": model}


def _no_advice(record: logging.LogRecord) -> bool:
    """Drop onnxruntime's advice to preprocess models, which changes nothing here."""
    return "pre-processing" not in record.getMessage()


def golden_sample(bundle: Bundle, index: int) -> dict[str, Array]:
    """Read a golden input back as arrays by name."""
    data = (bundle.folder / "golden" / f"{index}.in").read_bytes()
    arrays: dict[str, Array] = {}
    at = 0
    for tensor in bundle.manifest.inputs:
        dtype = np.dtype(tensor["dtype"]).newbyteorder("<")
        count = int(np.prod(tensor["shape"], dtype=np.int64))
        array = np.frombuffer(data, dtype, count, at).reshape(tensor["shape"])
        arrays[tensor["name"]] = array.astype(tensor["dtype"])
        at += count * dtype.itemsize
    return arrays


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


def _race(
    bundle: Bundle,
    rivals: Mapping[str, Path],
    sample: Path,
    threads: int,
    rounds: int,
    progress: Progress,
) -> Race:
    device = open_device("local", bundle_target(bundle))
    facts: dict[str, Any] = {}

    def ours() -> Sequence[float]:
        measured = device.bench(
            bundle.folder, threads=threads, seconds=VISIT_SECONDS, runs=VISIT_RUNS
        )
        facts.update(measured.device)
        return measured.samples_ms

    def visit(model: Path) -> Callable[[], Sequence[float]]:
        return lambda: _onnxruntime(model, sample, threads)

    contenders = {OURS: ours} | {name: visit(model) for name, model in rivals.items()}
    medians: dict[str, list[float]] = {name: [] for name in contenders}
    with progress.step(f"race, {rounds} rounds"):
        for done, (_, name) in enumerate(itertools.product(range(rounds), contenders)):
            progress.update(f"race: {name}", done, rounds * len(contenders))
            medians[name].append(statistics.median(contenders[name]()))
    return Race(threads=threads, medians_ms=medians, device=facts)


def _onnxruntime(model: Path, sample: Path, threads: int) -> list[float]:
    numbers = map(str, (threads, VISIT_SECONDS, VISIT_RUNS))
    command = [sys.executable, "-m", "edgepress.pipeline.bench_worker", str(model), str(sample)]
    try:
        done = subprocess.run(
            [*command, *numbers], capture_output=True, timeout=TIMEOUT_SECONDS, check=True
        )
    except subprocess.TimeoutExpired as error:
        raise DeviceFailed(f"onnxruntime did not end in {TIMEOUT_SECONDS} s on {model}.") from error
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise DeviceFailed(f"onnxruntime failed on {model}: {said}") from error
    samples: list[float] = json.loads(done.stdout)["samples_ms"]
    return samples


def race_table(race: Race) -> Table:
    """Show the medians and our time as a share of theirs, with its spread over the rounds."""
    table = Table(title=f"{race.threads} thread(s), median of {len(race.medians_ms[OURS])} rounds")
    for heading in ("", "median ms", "our time / theirs", "least", "most"):
        table.add_column(heading, justify="right" if heading else "left")
    for name in race.medians_ms:
        cells = [""] * 3
        if name != OURS:
            ratios = race.ratios(name)
            cells = [f"{v:.2f}" for v in (statistics.median(ratios), min(ratios), max(ratios))]
        table.add_row(name, f"{race.median_ms(name):.4g}", *cells)
    return table
