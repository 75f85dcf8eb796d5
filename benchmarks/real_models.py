"""Run the whole pipeline on real models and print what the README and docs/performance.md quote.

    python benchmarks/models.py all -o models
    python benchmarks/real_models.py models -o results

Per model: `run` for this machine with an empty cache and again with a warm one (seconds, peak
memory), the float build's largest error, the int8 build's bits, accuracy and SQNR, a race against
onnxruntime (interleaved, separate processes), and the same bundle for Arm boards under qemu.
Everything is done through the command line, as a user would.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

BOARDS = ("raspberry-pi-4", "raspberry-pi-5", "armv7-neon")
BOARD_SAMPLES = 4


@dataclass(frozen=True)
class Job:
    """One model: input shapes to fix, and the recipe of its int8 build."""

    name: str
    shapes: tuple[str, ...] = ()
    recipe: str = "default"


JOBS = (
    Job("mnist"),
    Job("squeezenet"),
    Job("efficientnet-lite0"),
    Job(
        "minilm",
        ("input_ids:1x64", "attention_mask:1x64", "token_type_ids:1x64"),
        recipe="transformer",
    ),
    Job("encoder", recipe="transformer"),
)


def edgepress(*arguments: str, cache: Path) -> tuple[dict[str, Any], float, int]:
    """Return a command's JSON document, its seconds and its peak memory in MB."""
    command = [str(Path(sys.executable).with_name("edgepress")), *arguments, "--json"]
    environment = os.environ | {"EDGEPRESS_CACHE_DIR": str(cache)}
    start = time.monotonic()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(command, stdout=out, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - start
        out.seek(0)
        text = out.read()
    if process.returncode not in (0, 6):
        raise click.ClickException(f"{' '.join(command)} ended with {process.returncode}")
    return json.loads(text), seconds, usage.ru_maxrss // 1024


def few_samples(path: Path, folder: Path) -> Path:
    """Write the first samples of a data file to a file of their own."""
    with np.load(path) as data:
        np.savez(folder / "few.npz", **{name: data[name][:BOARD_SAMPLES] for name in data})
    return folder / "few.npz"


def measure(job: Job, models: Path, out: Path, threads: int) -> dict[str, Any]:
    """Run everything for one model."""
    model, calib, evaluation = (
        str(models / f"{job.name}{suffix}") for suffix in (".onnx", "_calib.npz", "_eval.npz")
    )
    shapes = [part for shape in job.shapes for part in ("--input-shape", shape)]
    cache, result = out / "cache", dict[str, Any](model=job.name)
    shutil.rmtree(cache, ignore_errors=True)
    quantized = ["-r", job.recipe, "--calib", calib]
    for kind, options in (("float", ["-r", "none"]), ("int8", quantized)):
        bundle = str(out / f"{job.name}-{kind}")
        arguments = ["run", model, "-t", "native", *options, *shapes, "--eval", evaluation]
        arguments += ["-o", bundle, "--overwrite"]
        cold, cold_s, cold_mb = edgepress(*arguments, cache=cache)
        _, warm_s, _ = edgepress(*arguments, cache=cache)
        race, _, _ = edgepress(
            "bench", bundle, "--against", "onnxruntime", "--model", model,
            "--threads", str(threads), cache=cache,
        )  # fmt: skip
        result[kind] = {
            "cold_s": round(cold_s, 1), "warm_s": round(warm_s, 1), "peak_mb": cold_mb,
            "deployed_bytes": cold["deployed_bytes"], "outputs": cold["evidence"]["outputs"],
            "accuracy": cold["evidence"]["accuracy"], "race": race,
        }  # fmt: skip
    few = few_samples(Path(evaluation), out)
    for board in BOARDS:
        bundle = str(out / f"{job.name}-{board}")
        arguments = ["run", model, "-t", board, *quantized, *shapes, "--eval", str(few)]
        found, _, _ = edgepress(*arguments, "-o", bundle, "--overwrite", cache=cache)
        result[board] = {
            "outputs": found["evidence"]["outputs"],
            "instructions": found["evidence"]["instructions"],
            "deployed_bytes": found["deployed_bytes"],
        }
    return result


def table(results: list[dict[str, Any]], threads: int) -> str:
    """Return the results as Markdown."""
    lines = [
        f"{threads} thread(s); ratio = our median time over theirs, median over rounds (range).",
        "",
        "| model | build | outputs | SQNR dB | top-1 (fp32) | on the board KB "
        "| ours ms | / onnxruntime, same precision | cold s | warm s | peak MB |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for result in results:
        for kind in ("float", "int8"):
            if kind not in result:
                continue
            row = result[kind]
            rival = "onnxruntime int8" if kind == "int8" else "onnxruntime fp32"
            ratio = row["race"]["our_time_over_theirs"][rival]
            accuracy = row["accuracy"] or {}
            top1 = "–"
            if accuracy.get("top1") is not None:
                top1 = f"{accuracy['top1']:.2f} ({accuracy['reference_top1']:.2f})"
            lines.append(
                f"| {result['model']} | {kind} | {_outputs(row['outputs'])} "
                f"| {_number(accuracy.get('sqnr_db'))} "
                f"| {top1} "
                f"| {row['deployed_bytes'] / 1e3:.0f} "
                f"| {np.median(row['race']['medians_ms']['edgepress']):.3g} "
                f"| {ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f}) "
                f"| {row['cold_s']} | {row['warm_s']} | {row['peak_mb']} |"
            )
    lines += ["", "| model | board (qemu) | outputs | instructions per inference | KB |"]
    lines += ["|---|---|---|---:|---:|"]
    for result in results:
        for board in BOARDS:
            if board in result:
                row = result[board]
                count = row["instructions"]
                lines.append(
                    f"| {result['model']} | {board} | {_outputs(row['outputs'])} "
                    f"| {'–' if count is None else f'{count / 1e6:.2f} M'} "
                    f"| {row['deployed_bytes'] / 1e3:.0f} |"
                )
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _outputs(outputs: dict[str, Any]) -> str:
    if outputs.get("bit_equal"):
        return f"bit-equal ({outputs['samples']} samples)"
    return f"max error {outputs['max_error']:.1e}"


@click.command(help=__doc__.partition("\n")[0])
@click.argument("models", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path))
@click.option("--only", multiple=True, help="Only these models.")
@click.option("--threads", default=1, show_default=True)
def main(models: Path, out: Path, only: tuple[str, ...], threads: int) -> None:
    """Measure every model and print two tables; the raw results go to OUT/results.json."""
    out.mkdir(parents=True, exist_ok=True)
    results = []
    for job in JOBS:
        if not only or job.name in only:
            click.echo(f"{job.name} …", err=True)
            results.append(measure(job, models, out, threads))
            (out / "results.json").write_text(json.dumps(results, indent=1))
    click.echo(table(results, threads))


if __name__ == "__main__":
    main()
