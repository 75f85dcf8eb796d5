"""Measure what coding the weights of int8 models saves and costs, beside zstd and xz.

    python benchmarks/models.py all -o models
    python benchmarks/weight_coding.py models -o results              # builds; sizes; then times
    python benchmarks/weight_coding.py models -o results --times      # only the times again

Per model two bundles are built through the command line, with the pass `encode-huffman` and
without. Sizes are those of the int8 tensors in `weights.epw`, against the zero-order entropy of
their bytes, `zstd -19` and `xz -9e` of the same tensors. Times are of one thread: decoding in a
race with libzstd (decode_race.c), opening the model in fresh processes, by turns (open_time.c),
and encoding in Python.
"""

from __future__ import annotations

import json
import lzma
import statistics
import struct
import subprocess
import time
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from real_models import JOBS, Job, edgepress

from edgepress.targets.export import COMPILE_FLAGS, copy_runtime
from edgepress.targets.program import Array
from edgepress.targets.weight_coding import encode
from edgepress.targets.weights import read_weights

HERE = Path(__file__).parent
NAMES = ("efficientnet-lite0", "squeezenet", "minilm")
ZSTD_LEVELS = (3, 19)
CODINGS = ("ours", *(f"zstd -{level}" for level in ZSTD_LEVELS))
XZ_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
LEAST_RACE_BYTES = 1 << 14  # smaller tensors are raced, but not named as the slowest


class Weight(NamedTuple):
    """An int8 tensor of a bundle, and its payload in the coded one."""

    name: str
    array: Array
    payload: bytes
    coding: str
    is_coded: bool

    @property
    def raw(self) -> bytes:
        return self.array.tobytes()


def build(job: Job, models: Path, out: Path, *, rebuild: bool) -> tuple[Path, Path]:
    """Make the raw and the coded int8 bundle of a model, where they are missing."""
    shipped = resources.files("edgepress.pipeline") / "recipes" / f"{job.recipe}.toml"
    recipe = out / f"{job.recipe}-coded.toml"
    recipe.write_text(shipped.read_text("utf-8") + '\n[[pass]]\nname = "encode-huffman"\n', "utf-8")
    bundles = out / f"{job.name}-raw", out / f"{job.name}-coded"
    for bundle, of in zip(bundles, (job.recipe, str(recipe)), strict=True):
        if bundle.exists() and not rebuild:
            continue
        click.echo(f"{bundle} …", err=True)
        shapes = [part for shape in job.shapes for part in ("--input-shape", shape)]
        edgepress(
            "run", str(models / f"{job.name}.onnx"), "-t", "native", "-r", of, *shapes,
            "--calib", str(models / f"{job.name}_calib.npz"), "-o", str(bundle), "--overwrite",
            cache=out / "cache",
        )  # fmt: skip
    return bundles


def int8_weights(bundle: Path) -> list[Weight]:
    """The distinct int8 tensors of a coded bundle, with their payloads as they are in the file."""
    manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
    arrays = read_weights(bundle / "weights.epw")
    data = (bundle / "weights.epw").read_bytes()
    found: dict[int, Weight] = {}
    for row in manifest["weights"]:
        if row["dtype"] == "int8":
            payload = data[row["offset"] : row["offset"] + row["encoded_bytes"]]
            found[row["offset"]] = Weight(
                row["name"], arrays[row["name"]], payload, row["coding"], row["codec"] == "coded"
            )
    return list(found.values())


def entropy_bytes(raw: bytes) -> float:
    """Zero-order entropy of bytes: what no code for single bytes can go below."""
    counts = np.bincount(np.frombuffer(raw, np.uint8), minlength=256)
    share = counts[counts > 0] / max(1, len(raw))
    return float(-(share * np.log2(share)).sum() * len(raw) / 8)


def sizes(weights: list[Weight], frames: list[tuple[bytes, ...]]) -> dict[str, Any]:
    """Bytes of the int8 tensors in every form; rivals get each tensor by itself, and all as one."""
    together = b"".join(weight.raw for weight in weights)
    return {
        "tensors": len(weights),
        "int8_bytes": len(together),
        "entropy_bytes": sum(entropy_bytes(weight.raw) for weight in weights),
        "coded_bytes": sum(len(weight.payload) for weight in weights),
        "codings": {
            coding: sum(weight.coding == coding for weight in weights)
            for coding in sorted({weight.coding for weight in weights})
        },
        "zstd_each_bytes": sum(len(of_tensor[-1]) for of_tensor in frames),
        "zstd_together_bytes": len(zstd(together, ZSTD_LEVELS[-1])),
        "xz_each_bytes": sum(len(xz(weight.raw)) for weight in weights),
        "xz_together_bytes": len(xz(together)),
    }


def zstd(data: bytes, level: int) -> bytes:
    """A frame of the command line tool, without a checksum."""
    command = ["zstd", f"-{level}", "--no-check", "-q", "-c", f"--stream-size={len(data)}"]
    return subprocess.run(command, input=data, capture_output=True, check=True).stdout


def xz(data: bytes) -> bytes:
    return lzma.compress(data, lzma.FORMAT_XZ, lzma.CHECK_NONE, filters=XZ_FILTERS)


def write_race(path: Path, weights: list[Weight], frames: list[tuple[bytes, ...]]) -> None:
    """Write what decode_race.c reads: the tensors that are coded, and zstd's frames of them."""
    coded = [pair for pair in zip(weights, frames, strict=True) if pair[0].is_coded]
    with path.open("wb") as file:
        file.write(struct.pack("<II", len(coded), len(CODINGS)))
        for weight, of_tensor in coded:
            for data in (weight.raw, weight.payload, *of_tensor):
                file.write(struct.pack("<Q", len(data)) + data)


def compile_c(out: Path, name: str, *libraries: str) -> Path:
    """Compile a program of this folder with the runtime, as a bundle's runtime is compiled."""
    runtime = out / "runtime"
    runtime.mkdir(exist_ok=True)
    copy_runtime(runtime)
    command = ["gcc", *COMPILE_FLAGS, f"-I{runtime}", str(HERE / f"{name}.c")]
    command += [str(runtime / "decode.c"), "-o", str(out / name), *libraries]
    subprocess.run(command, check=True)
    return out / name


def race(program: Path, file: Path, names: list[str], rounds: int) -> dict[str, Any]:
    """Race on a model's tensors; the ratios are of whole rounds, theirs in time over ours."""
    command = [str(program), str(file), str(rounds)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    times = np.array([line.split() for line in printed.splitlines()], float)
    times = times.reshape(rounds, -1, len(CODINGS))  # ns, [round, tensor, coding]
    tensor_bytes = read_race_sizes(file)
    totals = times.sum(1)
    per_tensor = np.median(times, 0)
    slowest = {}
    for coding in range(1, len(CODINGS)):
        gains = {
            name: float(ns[coding] / ns[0])
            for name, size, ns in zip(names, tensor_bytes, per_tensor, strict=True)
            if size >= LEAST_RACE_BYTES
        }
        worst = min(gains, key=lambda name: gains[name])
        slowest[CODINGS[coding]] = {"tensor": worst, "ratio": gains[worst]}
    ratios = totals[:, 1:] / totals[:, :1]
    return {
        "bytes": sum(tensor_bytes),
        "mb_per_s": dict(zip(CODINGS, 1e3 * sum(tensor_bytes) / np.median(totals, 0), strict=True)),
        "our_speed_over_theirs": {
            coding: {"median": float(np.median(r)), "min": float(r.min()), "max": float(r.max())}
            for coding, r in zip(CODINGS[1:], ratios.T, strict=True)
        },
        "slowest": slowest,
    }


def read_race_sizes(file: Path) -> list[int]:
    """The tensors' bytes in a file of write_race."""
    found = []
    with file.open("rb") as data:
        tensors, codings = struct.unpack("<II", data.read(8))
        for _ in range(tensors):
            for part in range(codings + 1):
                (size,) = struct.unpack("<Q", data.read(8))
                data.seek(size, 1)
                found += [size] if part == 0 else []
    return found


def measure_sizes(job: Job, models: Path, out: Path, row: dict[str, Any], *, rebuild: bool) -> None:
    """Build a model's bundles, and add to its row what the int8 tensors weigh."""
    bundle = build(job, models, out, rebuild=rebuild)[1]
    weights = int8_weights(bundle)
    click.echo(f"{job.name}: zstd and xz …", err=True)
    frames = [tuple(zstd(weight.raw, level) for level in ZSTD_LEVELS) for weight in weights]
    write_race(out / f"{job.name}.race", weights, frames)
    row["sizes"] = sizes(weights, frames)


def measure_times(
    job: Job, out: Path, row: dict[str, Any], programs: tuple[Path, Path], rounds: int
) -> None:
    """Add a model's times to its row."""
    race_program, open_program = programs
    raw, coded = (out / f"{job.name}-{kind}" for kind in ("raw", "coded"))
    weights = int8_weights(coded)
    names = [weight.name for weight in weights if weight.is_coded]
    row["race"] = race(race_program, out / f"{job.name}.race", names, rounds)
    row["opening"] = opening(open_program, ways(raw, coded, out), rounds)
    row["encoding"] = encoding(weights, min(rounds, 3))


def ways(raw: Path, coded: Path, out: Path) -> dict[str, list[str]]:
    """What open_time.c is asked to open: the cached way finds its cache there."""
    cache = out / "decoded.cache"
    cache.unlink(missing_ok=True)
    found = {
        way: [str(bundle / "libmodel.so"), str(bundle / "weights.epw")]
        for way, bundle in (("raw", raw), ("coded", coded), ("cached", coded))
    }
    found["cached"].append(str(cache))
    return found


def opening(program: Path, ways: dict[str, list[str]], rounds: int) -> dict[str, Any]:
    """Open models in processes of their own, by turns: ms of model_open, peak memory in KB."""
    visits: dict[str, list[list[float]]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        for way, arguments in ways.items():
            command = [str(program), *arguments]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            if turn > 0:  # the first one reads the files, and writes the cache
                visits[way].append([float(word) for word in printed.split()])
    return {
        way: {
            "ms": statistics.median(ms for ms, _ in found),
            "ms_min": min(ms for ms, _ in found),
            "ms_max": max(ms for ms, _ in found),
            "peak_kb": statistics.median(kb for _, kb in found),
        }
        for way, found in visits.items()
    }


def encoding(weights: list[Weight], rounds: int) -> dict[str, float]:
    """MB/s of encoding int8 tensors in Python."""
    total = sum(weight.array.nbytes for weight in weights)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        for weight in weights:
            encode(weight.raw, weight.array.itemsize)
        seconds.append(time.perf_counter() - start)
    return {"bytes": total, "mb_per_s": total / 1e6 / statistics.median(seconds)}


def report(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown tables."""
    lines = [
        "int8 tensors in `weights.epw`, KB; bound: zero-order entropy of each tensor's bytes; the "
        "others: all tensors as one file (each by itself).",
        "",
        "| model | tensors | int8 | bound | coded | coded / bound | zstd -19 | xz -9e |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if "sizes" not in row:
            continue
        size = row["sizes"]
        zstd_, xz_ = (
            f"{size[f'{tool}_together_bytes'] / 1e3:.1f} ({size[f'{tool}_each_bytes'] / 1e3:.1f})"
            for tool in ("zstd", "xz")
        )
        lines.append(
            f"| {row['model']} | {size['tensors']} | {size['int8_bytes'] / 1e3:.1f} "
            f"| {size['entropy_bytes'] / 1e3:.1f} | {size['coded_bytes'] / 1e3:.1f} "
            f"| {size['coded_bytes'] / size['entropy_bytes']:.4f} | {zstd_} | {xz_} |"
        )
    lines += [
        "",
        "Decoding the coded ones, one thread, MB/s of int8: medians over the rounds; our speed "
        "over theirs: median (range over the rounds), and on the tensor where it is least.",
        "",
        f"| model | {' | '.join(CODINGS)} | over zstd -3 | over zstd -19 | least |",
        f"|---|{'---:|' * (len(CODINGS) + 2)}---|",
    ]
    for row in rows:
        if "race" not in row:
            continue
        found = row["race"]
        speeds = " | ".join(f"{found['mb_per_s'][coding]:.0f}" for coding in CODINGS)
        ratios = " | ".join(
            f"{r['median']:.2f} ({r['min']:.2f}–{r['max']:.2f})"
            for r in found["our_speed_over_theirs"].values()
        )
        least = ", ".join(f"{slow['ratio']:.2f}" for slow in found["slowest"].values())
        lines.append(f"| {row['model']} | {speeds} | {ratios} | {least} |")
    lines += [
        "",
        "Opening the model in a fresh process, the file in the page cache: ms (range), and the "
        "peak memory, pages of the file included.",
        "",
        "| model | raw | coded | coded − raw ms | cached | encoding in Python MB/s |",
        "|---|---|---|---:|---|---:|",
    ]
    for row in rows:
        if "opening" not in row:
            continue
        found = row["opening"]
        raw, coded, cached = (
            f"{way['ms']:.2f} ({way['ms_min']:.2f}–{way['ms_max']:.2f}), "
            f"{way['peak_kb'] / 1e3:.1f} MB"
            for way in (found[name] for name in ("raw", "coded", "cached"))
        )
        slower = found["coded"]["ms"] - found["raw"]["ms"]
        lines.append(
            f"| {row['model']} | {raw} | {coded} | {slower:.2f} | {cached} "
            f"| {row['encoding']['mb_per_s']:.0f} |"
        )
    return "\n".join(lines) + "\n"


@click.command(help=__doc__.partition("\n")[0])
@click.argument("models", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path))
@click.option("--only", multiple=True, help="Only these models.")
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(min=1))
@click.option("--times", is_flag=True, help="Only the times: build nothing, compress nothing.")
@click.option("--no-times", is_flag=True, help="Only the sizes.")
@click.option("--rebuild", is_flag=True, help="Build the bundles anew.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(
    models: Path, out: Path, only: tuple[str, ...], rounds: int, times: bool, no_times: bool,
    rebuild: bool, as_json: bool,
) -> None:  # fmt: skip
    """Measure, and print tables; all figures go to OUT/weight_coding.json."""
    out.mkdir(parents=True, exist_ok=True)
    document = out / "weight_coding.json"
    rows = json.loads(document.read_text("utf-8")) if document.exists() else {}
    jobs = [job for job in JOBS if job.name in (only or NAMES)]
    if not times:
        for job in jobs:
            measure_sizes(job, models, out, rows.setdefault(job.name, {}), rebuild=rebuild)
    if not no_times:
        programs = compile_c(out, "decode_race", "-lzstd"), compile_c(out, "open_time", "-ldl")
        for job in jobs:
            measure_times(job, out, rows.setdefault(job.name, {}), programs, rounds)
    document.write_text(json.dumps(rows, indent=1), "utf-8")
    found = [{"model": job.name, **rows[job.name]} for job in jobs]
    click.echo(json.dumps(found, indent=1) if as_json else report(found))


if __name__ == "__main__":
    main()
