"""Compress the LeNets of "Deep Compression" and print what that paper has beside what we get.

    python benchmarks/deep_compression.py -o results
    python benchmarks/deep_compression.py -o results --only lenet-5 --seeds 1 --board native

Han, Mao and Dally, "Deep Compression", ICLR 2016, tables 1 to 3. Per network and seed: train the
dense network on MNIST's 60,000 images, compress it with the recipe in `deep_compression/` through
the command line, build the result for every board, and let the executable answer all 10,000 test
images; the Arm ones under qemu. The size is that of the file `weights.epw`. Settings were found
on held-back training images; a second recipe, tried after test errors were known, was dropped.
"""

from __future__ import annotations

import json
import os
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import onnx
import onnxruntime
from lenet import INPUT, Data, train
from real_models import edgepress
from samples import mnist_images, mnist_labels

RECIPES = Path(__file__).with_name("deep_compression")
BOARDS = ("native", "raspberry-pi-4", "armv7-neon")
FLOAT_BYTES = 4
STEP_FACTS = ("pass_name", "options", "stats", "seconds")


@dataclass(frozen=True)
class Network:
    """One network of the paper, with the figures of its tables 1 and 3.

    Attributes:
        recipe: file in `deep_compression/`.
        epochs: of the dense training.
        paper_kb: before and after; 1 KB is 1000 bytes there.
        paper_errors: per cent of the test images, before and after.
        least_ratio: what we want to reach.
        most_error: likewise, per cent.
    """

    recipe: str
    epochs: int
    paper_kb: tuple[float, float]
    paper_errors: tuple[float, float]
    least_ratio: float
    most_error: float


NETWORKS = {
    "lenet-300-100": Network("lenet_300_100.toml", 15, (1070, 27), (1.64, 1.58), 50, 1.58),
    "lenet-5": Network("lenet_5.toml", 8, (1720, 44), (0.80, 0.74), 100, 0.74),
}
# What --quick is content with: it shows that everything works, and the errors mean nothing.
QUICK_TRAINING, QUICK_TEST, QUICK_EPOCHS = 2048, 200, 1


@dataclass(frozen=True)
class Samples:
    """Where the images are.

    Attributes:
        training: what is trained on.
        training_file: the same, for the command line.
        test: what is asked in the end.
        test_file: the same, for the command line.
        quick: whether these are few and training is short.
    """

    training: Data
    training_file: Path
    test: Data
    test_file: Path
    quick: bool


def samples(out: Path, *, quick: bool) -> Samples:
    """Fetch MNIST and write it where the command line can read it."""
    training, test = (Data(mnist_images(part), mnist_labels(part)) for part in ("train", "t10k"))
    if quick:
        training, test = training.first(QUICK_TRAINING), test.first(QUICK_TEST)
    found = Samples(training, out / "training.npz", test, out / "test.npz", quick)
    training.save(found.training_file)
    test.save(found.test_file)
    return found


def measure(
    name: str, seed: int, data: Samples, boards: tuple[str, ...], out: Path
) -> dict[str, Any]:
    """Train, compress, build for every board, and ask the test images there.

    A dense network that lies in OUT already is not trained again, and finished passes are taken
    from OUT/cache.
    """
    network, stem = NETWORKS[name], f"{name}-seed{seed}" + "-quick" * data.quick
    dense, small = out / f"{stem}.onnx", out / f"{stem}-small.onnx"
    if not dense.exists():
        say(f"{stem}: train")
        epochs = QUICK_EPOCHS if data.quick else network.epochs
        onnx.save(train(name, data.training, epochs, seed), dense)
    say(f"{stem}: compress")
    compressed, compression_s, _ = edgepress(
        "compress", str(dense), "-r", str(recipe(network, seed, out, quick=data.quick)),
        "--train", str(data.training_file), "-o", str(small), "--overwrite", cache=out / "cache",
    )  # fmt: skip
    row: dict[str, Any] = {
        "network": name, "seed": seed,
        "compression_s": round(compression_s, 1),
        "steps": [{key: step[key] for key in STEP_FACTS} for step in compressed["steps"]],
        "dense_error": dense_error(dense, data.test),
    }  # fmt: skip
    row["boards"] = {board: ask(small, board, data, out) for board in boards}
    first = row["boards"][boards[0]]
    row["parameters"] = compressed["steps"][-1]["parameters"]
    row["fp32_bytes"] = FLOAT_BYTES * row["parameters"]
    row["ledger"] = first["ledger"]
    return row


def recipe(network: Network, seed: int, out: Path, *, quick: bool) -> Path:
    """Write the network's recipe with another seed, and with few epochs where that is wanted."""
    text = (RECIPES / network.recipe).read_text("utf-8")
    text = re.sub(r"^seed = .*$", f"seed = {seed}", text, flags=re.MULTILINE)
    if quick:
        text = re.sub(r"^epochs = .*$", f"epochs = {QUICK_EPOCHS}", text, flags=re.MULTILINE)
    path = out / f"{Path(network.recipe).stem}-seed{seed}.toml"
    path.write_text(text, "utf-8")
    return path


def dense_error(model: Path, test: Data) -> float:
    """Let onnxruntime answer the test images; return its error in per cent."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (answers,) = session.run(None, {INPUT: test.images})
    return round(100 * float((answers.argmax(1) != test.labels).mean()), 4)


def ask(model: Path, board: str, data: Samples, out: Path) -> dict[str, Any]:
    """Build a bundle and let the board answer the test images.

    The error is in per cent. `outputs` says how far the answers are from those of onnxruntime.
    """
    bundle = out / f"{model.stem}-{board}"
    say(f"{model.stem}: {board}")
    done, _, _ = edgepress(
        "run", str(model), "-t", board, "-r", "none", "--eval", str(data.test_file),
        "-o", str(bundle), "--overwrite", cache=out / "cache",
    )  # fmt: skip
    if not done["evidence"]:
        raise click.ClickException(f"{bundle} was not run: {done['unverified']}")
    manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
    answered = done["evidence"]["accuracy"]
    return {
        "error": round(100 - answered["top1"], 4),
        "samples": answered["samples"],
        "weights_bytes": (bundle / "weights.epw").stat().st_size,
        "deployed_bytes": done["deployed_bytes"],
        "outputs": done["evidence"]["outputs"],
        "passed": done["passed"],
        "ledger": manifest["ledger"],
    }


def say(what: str) -> None:
    """Tell what happens now."""
    click.echo(f"{what} …", err=True)


def tables(rows: list[dict[str, Any]]) -> str:
    """Return Markdown: the paper's rows beside ours, then the size ledger of every network."""
    boards = list(rows[0]["boards"])
    lines = [
        "fp32 and `weights.epw` in bytes (paper: KB); the ratio is that of the largest file; "
        f"errors in % of {_samples(rows):,} test images.",
        "",
        "| network | by | fp32 | " + " | ".join(f"`weights.epw` {board}" for board in boards)
        + " | ratio | fp32 error | " + " | ".join(f"error {board}" for board in boards) + " |",
        "|---|---|" + "---:|" * (3 + 2 * len(boards)),
    ]  # fmt: skip
    for name in dict.fromkeys(row["network"] for row in rows):
        ours = [row for row in rows if row["network"] == name]
        lines.append(_paper_row(name, len(boards)))
        lines += [_our_row(row) for row in ours]
        lines.append(_verdict(name, ours, len(boards)))
    for row in rows:
        if row["seed"] == rows[0]["seed"]:
            lines += ["", *_ledger(row)]
    return "\n".join(lines) + "\n"


def ratio(row: dict[str, Any]) -> float:
    """Return how many times smaller the largest weights file is than all weights in fp32."""
    largest = max(board["weights_bytes"] for board in row["boards"].values())
    return float(row["fp32_bytes"] / largest)


def error(row: dict[str, Any]) -> float:
    """Return the worst error of the boards, in per cent."""
    return float(max(board["error"] for board in row["boards"].values()))


def reached(name: str, rows: list[dict[str, Any]]) -> bool:
    """Tell whether every seed is as small and as good as it must be."""
    network = NETWORKS[name]
    return all(
        ratio(row) >= network.least_ratio and error(row) <= network.most_error for row in rows
    )


def _samples(rows: list[dict[str, Any]]) -> int:
    return int(next(iter(rows[0]["boards"].values()))["samples"])


def _paper_row(name: str, boards: int) -> str:
    network = NETWORKS[name]
    (fp32, coded), (before, after) = network.paper_kb, network.paper_errors
    sizes = " | ".join([f"{coded:g} KB"] * boards)
    errors = " | ".join([f"{after:.2f}"] * boards)
    return (
        f"| {name} | Han et al. 2016 | {fp32:g} KB | {sizes} | {fp32 / coded:.0f}× "
        f"| {before:.2f} | {errors} |"
    )


def _our_row(row: dict[str, Any]) -> str:
    found = row["boards"].values()
    sizes = " | ".join(f"{board['weights_bytes']:,}" for board in found)
    errors = " | ".join(f"{board['error']:.2f}" for board in found)
    return (
        f"| | seed {row['seed']} | {row['fp32_bytes']:,} | {sizes} | {ratio(row):.0f}× "
        f"| {row['dense_error']:.2f} | {errors} |"
    )


def _verdict(name: str, rows: list[dict[str, Any]], boards: int) -> str:
    network = NETWORKS[name]
    mean = statistics.fmean(map(ratio, rows))
    wanted = f"wanted: ≥ {network.least_ratio:g}×, ≤ {network.most_error:.2f} %"
    return (
        f"| | {wanted}: {'reached' if reached(name, rows) else '**missed**'} | "
        + "| " * boards + f"| mean {mean:.0f}× | " + "| " * boards + "|"
    )  # fmt: skip


def _ledger(row: dict[str, Any]) -> list[str]:
    """Say what the weights of every layer take, stage by stage, on the first board."""
    ledger = row["ledger"]
    lines = [
        f"{row['network']}, seed {row['seed']}, {next(iter(row['boards']))}, bytes:",
        "",
        "| layer | weights | kept | fp32 | pruned | shared | payload | container | Shannon bound |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for entry in [*ledger["layers"], {"name": "all", **ledger["total"]}]:
        kept = entry["weights"] - entry["zeros"]
        stages = ("fp32", "pruned", "shared", "coded", "container", "entropy")
        sizes = " | ".join(f"{entry[f'{stage}_bytes']:,.0f}" for stage in stages)
        lines.append(f"| `{entry['name']}` | {entry['weights']:,} | {kept:,} | {sizes} |")
    return lines


@click.command(help=__doc__.partition("\n")[0])
@click.option("-o", "--out", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--only", multiple=True, type=click.Choice(list(NETWORKS)), help="Only these.")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(min=1))
@click.option("--board", "boards", multiple=True, default=BOARDS, show_default=True)
@click.option("--quick", is_flag=True, help="Few images, one epoch: whether it works at all.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(
    out: Path, only: tuple[str, ...], seeds: int, boards: tuple[str, ...], quick: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Measure every network and seed; what is done so far lies in OUT/deep_compression.json."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums of several threads have another rounding
    out.mkdir(parents=True, exist_ok=True)
    data = samples(out, quick=quick)
    rows = []
    for name in only or NETWORKS:
        for seed in range(seeds):
            rows.append(measure(name, seed, data, boards, out))
            (out / "deep_compression.json").write_text(json.dumps(rows, indent=1), "utf-8")
    click.echo(json.dumps(rows, indent=1) if as_json else tables(rows))


if __name__ == "__main__":
    main()
