"""Race models with 30 % of their channels cut against the same models uncut, on this machine.

    python benchmarks/models.py all -o models
    python benchmarks/pruning.py models -o results
    python benchmarks/pruning.py --fashion-mnist -o results

Per model and precision, both bundles are made and verified through the command line, as a user
would, then timed by turns, A B A B, every visit a process of its own on one thread. A CNN that
stays above the limit gets its layers that did not get faster named. `--fashion-mnist` asks instead
what half of the multiply-accumulates cost a trained model in accuracy, with recovery and without.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import real_models
from models import count_correct
from real_models import Job, edgepress

from edgepress.pipeline.report import quantity

NAMES = ("efficientnet-lite0", "squeezenet", "minilm", "resnet18", "mobilenetv2")
NO_CNN = ("minilm",)
LIMIT = 0.80  # of the uncut CNN's time
VISIT = ("--threads", "1", "--seconds", "0.5", "--runs", "10")
PROFILE_VISITS = 3
NOT_FASTER, LEAST_SHARE = 0.97, 0.01  # of the layer's time before; of the whole time after

PRUNE = '[[pass]]\nname = "prune-channels"\namount = 0.3\nranking = "global"\n'
INT8 = '[[pass]]\nname = "calibrate"\n[[pass]]\nname = "quantize-int8"\n'
HALVE = '[[pass]]\nname = "prune-channels"\namount = 0.5\nof = "macs"\n'
FASHION_MNIST = Path(__file__).parent.parent / "examples/fashion_mnist"


def measure(job: Job, precision: str, models: Path, out: Path, rounds: int) -> dict[str, Any]:
    """Make both bundles of a model and race them."""
    quantize = INT8 if precision == "int8" else ""
    name = f"{job.name}-{precision}"
    before = build(job, f"{name}-before", quantize, models, out)
    after = build(job, f"{name}-after", PRUNE + quantize, models, out)
    row: dict[str, Any] = {"model": job.name, "precision": precision}
    row |= {"before": before, "after": after, "limit": None if job.name in NO_CNN else LIMIT}
    bundles = Path(before["bundle"]), Path(after["bundle"])
    row |= race(*bundles, rounds)
    if row["limit"] is not None and row["ratio"] > row["limit"]:
        row["not_faster"] = not_faster(*bundles)
    return row


def build(job: Job, name: str, passes: str, models: Path, out: Path) -> dict[str, Any]:
    """Make and verify the bundle OUT/NAME; return its static figures and its SQNR."""
    calib, evaluation = (str(models / f"{job.name}_{part}.npz") for part in ("calib", "eval"))
    shapes = [part for shape in job.shapes for part in ("--input-shape", shape)]
    document, _, _ = edgepress(
        "run", str(models / f"{job.name}.onnx"), "-t", "native", "-r", recipe(out, name, passes),
        *shapes, "--calib", calib, "--eval", evaluation, "-o", str(out / name), "--overwrite",
        cache=out / "cache",
    )  # fmt: skip
    if not document["passed"]:
        raise click.ClickException(f"{out / name}: a gate failed, see its evidence.json")
    cuts = [step for step in document["steps"] if step["pass_name"] == "prune-channels"]
    return {
        "bundle": document["bundle"],
        "parameters": document["steps"][-1]["parameters"],
        "macs": document["steps"][-1]["macs"],
        "deployed_bytes": document["deployed_bytes"],
        "sqnr_db": (document["evidence"]["accuracy"] or {}).get("sqnr_db"),
        "cuts": [{key: cut[key] for key in ("stats", "skipped", "equivalence")} for cut in cuts],
    }


def recipe(out: Path, name: str, passes: str) -> str:
    """Write the recipe OUT/NAME.toml."""
    path = out / f"{name}.toml"
    path.write_text(f"schema = 1\n{passes}", "utf-8")
    return str(path)


def race(before: Path, after: Path, rounds: int) -> dict[str, Any]:
    """Time two bundles by turns: a median per visit, their ratio and its range over the rounds."""
    visits = [
        [visit(bundle, "--bench")["p50_ms"] for bundle in (before, after)] for _ in range(rounds)
    ]
    old, new = (list(times) for times in zip(*visits, strict=True))
    ratios = [ours / theirs for theirs, ours in visits]
    return {
        "before_ms": old,
        "after_ms": new,
        "ratio": statistics.median(new) / statistics.median(old),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def not_faster(before: Path, after: Path) -> list[dict[str, Any]]:
    """Profile two bundles by turns and list the layers that kept their time, largest first.

    A layer without a namesake in the first bundle has 0 ms there.
    """
    visits = [[layer_times(bundle) for bundle in (before, after)] for _ in range(PROFILE_VISITS)]
    old, new = (
        {name: statistics.median(times[name] for times in profiles) for name in profiles[0]}
        for profiles in zip(*visits, strict=True)
    )
    least = LEAST_SHARE * sum(new.values())
    return [
        {"layer": name, "before_ms": old.get(name, 0.0), "after_ms": new[name]}
        for name in sorted(new, key=lambda name: -new[name])
        if new[name] >= max(least, NOT_FASTER * old.get(name, 0.0))
    ]


def layer_times(bundle: Path) -> Counter[str]:
    """Return the ms of every layer, that of preparing its input (`NAME (padding)`) included."""
    times: Counter[str] = Counter()
    for call in visit(bundle, "--profile")["calls"]:
        times[call["node"].partition(" (")[0]] += call["midmean_ms"]
    return times


def visit(bundle: Path, command: str) -> dict[str, Any]:
    """Run a bundle's own measuring command in a process of its own."""
    arguments = [str(bundle / "model"), command, *VISIT]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{' '.join(arguments)}: {done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def race_table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown, and below them what kept its time in those above the limit."""
    lines = [
        "Before → after; ms: median over the rounds; ratio: of these medians (range over rounds); "
        "SQNR: of the outputs, to the original fp32 model.",
        "",
        "| model | precision | parameters | MACs | ms | ratio | limit | SQNR dB | deployed KB |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        medians = (statistics.median(row[key]) for key in ("before_ms", "after_ms"))
        limit = "–" if row["limit"] is None else f"{row['limit']:.2f}"
        lines.append(
            f"| {row['model']} | {row['precision']} "
            f"| {_both(row, 'parameters', quantity)} | {_both(row, 'macs', quantity)} "
            f"| {' → '.join(f'{ms:.3g}' for ms in medians)} "
            f"| {row['ratio']:.2f} ({row['ratio_min']:.2f}–{row['ratio_max']:.2f}) | {limit} "
            f"| {_both(row, 'sqnr_db', lambda value: f'{value:.1f}')} "
            f"| {_both(row, 'deployed_bytes', lambda value: f'{value / 1e3:.0f}')} |"
        )
    for row in rows:
        if "not_faster" in row:
            layers = ", ".join(
                f"`{layer['layer']}` {layer['before_ms']:.3g} → {layer['after_ms']:.3g} ms"
                for layer in row["not_faster"]
            )
            about = f"{row['model']} {row['precision']}: {row['ratio']:.2f} is above the limit"
            lines += ["", f"{about}; no faster: {layers or 'no layer alone'}."]
    return "\n".join(lines) + "\n"


def _both(row: dict[str, Any], key: str, write: Callable[[float], str]) -> str:
    values = (row[kind][key] for kind in ("before", "after"))
    return " → ".join("–" if value is None else write(value) for value in values)


def fashion_mnist(out: Path) -> list[dict[str, Any]]:
    """Count what the example gets right, uncut and with half of its multiply-accumulates."""
    with np.load(FASHION_MNIST / "test_2000.npz") as data:
        test = {"image": data["image"].astype(np.float32), "labels": data["labels"]}
    cuts = {
        "original": "",
        "cut-without-recovery": HALVE + 'recover = "none"\n',
        "cut-with-recovery": HALVE,
    }
    rows = []
    for name, passes in cuts.items():
        path = out / f"{name}.onnx"
        document, _, _ = edgepress(
            "compress", str(FASHION_MNIST / "fashion_mnist.onnx"), "-r", recipe(out, name, passes),
            "--calib", str(FASHION_MNIST / "calib_256.npz"), "-o", str(path), "--overwrite",
            cache=out / "cache",
        )  # fmt: skip
        last = document["steps"][-1]
        rows.append({
            "name": name, "parameters": last["parameters"], "macs": last["macs"],
            "correct": count_correct(onnx.load(path), test), "samples": len(test["labels"]),
        })  # fmt: skip
    return rows


def accuracy_table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lines = [
        f"Fashion-MNIST, {rows[0]['samples']} test images, onnxruntime fp32.",
        "",
        "| model | parameters | MACs | top-1 % |",
        "|---|---:|---:|---:|",
    ]
    lines += [
        f"| {row['name'].replace('-', ' ')} | {quantity(row['parameters'])} "
        f"| {quantity(row['macs'])} | {100 * row['correct'] / row['samples']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def race_all(names: tuple[str, ...], models: Path, out: Path, rounds: int) -> list[dict[str, Any]]:
    """Measure every model in both precisions; what is done so far lies in OUT/pruning.json."""
    known = {job.name: job for job in real_models.JOBS}
    rows = []
    for name in names:
        job = known.get(name, Job(name))
        for precision in ("float", "int8") if job.quantized else ("float",):
            click.echo(f"{name} {precision} …", err=True)
            rows.append(measure(job, precision, models, out, rounds))
            (out / "pruning.json").write_text(json.dumps(rows, indent=1), "utf-8")
    return rows


@click.command(help=__doc__.partition("\n")[0])
@click.argument(
    "models", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path)
)
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path))
@click.option("--only", multiple=True, help="Only these models, of those in the folder MODELS.")
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(min=1))
@click.option("--fashion-mnist", "accuracy", is_flag=True, help="Accuracy of the example instead.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(
    models: Path | None, out: Path, only: tuple[str, ...], rounds: int, accuracy: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Measure, and print a table."""
    out.mkdir(parents=True, exist_ok=True)
    if accuracy:
        rows, table = fashion_mnist(out), accuracy_table
    elif models is None:
        raise click.UsageError("give the folder MODELS that benchmarks/models.py wrote")
    else:
        rows, table = race_all(only or NAMES, models, out, rounds), race_table
    click.echo(json.dumps(rows, indent=1) if as_json else table(rows))


if __name__ == "__main__":
    main()
