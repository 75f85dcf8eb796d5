"""Count instructions per inference on emulated Arm boards, ours against onnxruntime and ncnn.

    python benchmarks/models.py all -o models
    python benchmarks/arm_root.py arm-root
    python benchmarks/arm_instructions.py models --root arm-root -o results

Per model, precision and board: what one inference executes under qemu, on one thread; how much of
that are the instructions that multiply (sdot, smmla, smlal or fmla); how many vectors innermost
loops with such instructions spill; and the ratio to other runtimes under the same emulator, from
the same float model or, in int8, from the very graph of our bundle (transformers: from what
onnxruntime's own quantize_dynamic makes). ncnn has no int8 here, and 32-bit Arm has no onnxruntime:
where int8 has no rival, ncnn's floats stand in. Instructions are no time.

ncnn's models come from pnnx, which must be on PATH or be given with --pnnx.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

HERE = Path(__file__).parent
KINDS = ("all", "sdot", "smmla", "smlal", "fmla")
#: Our board, the core it stands for, the emulator's options, and the disassembler.
BOARDS = {
    "raspberry-pi-5": ("cortex-a76", "qemu-aarch64", "aarch64-linux-gnu"),
    "raspberry-pi-4": ("cortex-a72", "qemu-aarch64", "aarch64-linux-gnu"),
    "armv8-i8mm": ("max", "qemu-aarch64", "aarch64-linux-gnu"),
    "armv7-neon": ("cortex-a7", "qemu-arm", "arm-linux-gnueabihf"),
}
_COUNTS = re.compile(r"edgepress-mix ([\d ]+)\n(.*)")
_TIMEOUT_S = 3600
_MULTIPLY = re.compile(r"[su]dot|[su]mmla|[su]ml[as]l2?|[su]mull2?|fmla")
_STACK_STORE = re.compile(r"st[pr]\s+q.*\[(?:sp|x29)")
_INSTRUCTION = re.compile(r"\s*([0-9a-f]+):\t(?:[0-9a-f]{4,8} ?)+\s*\t(\S+)(?:\s+(.*))?")


@dataclass(frozen=True)
class Job:
    """One model: input shapes to fix, and whether int8 quantizes while the model runs."""

    name: str
    shapes: tuple[tuple[str, str], ...] = ()
    dynamic: bool = False


_TOKENS = tuple((name, "1x64") for name in ("input_ids", "attention_mask", "token_type_ids"))
JOBS = (
    Job("resnet18"),
    Job("squeezenet"),
    Job("mobilenetv2"),
    Job("efficientnet-lite0"),
    Job("encoder", dynamic=True),
    Job("minilm", _TOKENS, dynamic=True),
)
Counts = dict[str, int]


class Skip(Exception):
    """What is missing, in words."""


def build_plugin(folder: Path) -> Path:
    """Compile the counting plugin."""
    plugin = folder / "instruction_mix.so"
    command = ["gcc", "-std=c11", "-O2", "-fPIC", "-shared"]
    subprocess.run([*command, str(HERE / "instruction_mix.c"), "-o", str(plugin)], check=True)
    return plugin


def counted(text: str) -> list[tuple[Counts, str]]:
    """Find the plugin's counts in what a run said, each with the line that followed it."""
    return [
        (dict(zip(KINDS, map(int, numbers.split()), strict=True)), after)
        for numbers, after in _COUNTS.findall(text)
    ]


def difference(later: Counts, earlier: Counts) -> Counts:
    """Subtract counts."""
    return {kind: later[kind] - earlier[kind] for kind in KINDS}


def our_counts(bundle: Path, board: str, plugin: Path) -> Counts:
    """Count two inferences of a bundle, and take away one."""
    core, emulator, system = BOARDS[board]
    sample = (bundle / "golden/0.in").read_bytes()
    totals = []
    with tempfile.TemporaryDirectory() as temporary:
        for count in (1, 2):
            (Path(temporary) / "in").write_bytes(sample * count)
            done = subprocess.run(
                [emulator, "-cpu", core, "-L", f"/usr/{system}", "-plugin", str(plugin),
                 "./model", "--run", f"{temporary}/in", f"{temporary}/out", "--threads", "1"],
                cwd=bundle, capture_output=True, text=True, check=True, timeout=_TIMEOUT_S,
            )  # fmt: skip
            totals.append(counted(done.stderr)[-1][0])
    return difference(totals[1], totals[0])


def spilled_vectors(bundle: Path, board: str) -> int | None:
    """Count stores of vectors to the stack in innermost loops that multiply vectors.

    A loop is what lies between an instruction and a later jump back to it. None where there is no
    disassembler, or it cannot tell A32 from T32: a stripped library does not say.
    """
    objdump = f"{BOARDS[board][2]}-objdump"
    if board == "armv7-neon" or shutil.which(objdump) is None:
        return None
    library = bundle / "libmodel.so"
    text = subprocess.run(
        [objdump, "-d", str(library)], capture_output=True, text=True, check=True
    ).stdout
    code = [
        found.groups(default="") for found in map(_INSTRUCTION.match, text.splitlines()) if found
    ]
    places = {address: index for index, (address, _, _) in enumerate(code)}
    loops: dict[int, int] = {}
    for index, (_, mnemonic, operands) in enumerate(code):
        if not mnemonic.startswith(("b", "cb", "tb")):
            continue
        target = re.search(r"\b([0-9a-f]+) <", operands)
        start = places.get(target[1]) if target else None
        if start is not None and start <= index:
            loops[start] = max(index, loops.get(start, 0))
    spilled = 0
    starts = sorted(loops)
    for position, start in enumerate(starts):
        end = loops[start]
        if any(loops[other] <= end for other in starts[position + 1 :] if other <= end):
            continue
        body = code[start : end + 1]
        if any(_MULTIPLY.match(mnemonic) for _, mnemonic, _ in body):
            spilled += sum(
                _STACK_STORE.match(f"{mnemonic} {operands}") is not None
                for _, mnemonic, operands in body
            )
    return spilled


def peer_counts(
    runtime: str, core: str, model: Path, sample: Path, root: Path, plugin: Path
) -> Counts:
    """Count the second inference of another runtime inside a root.

    Raises:
        Skip: the root is missing, or the runtime failed there.
    """
    system = (root / core).resolve()
    if not system.is_dir():
        raise Skip(f"{root / core} is missing: python benchmarks/arm_root.py {root}")
    emulator = "qemu-arm" if core == "cortex-a7" else "qemu-aarch64"
    paths = [str(system / "site"), str(system / "usr/lib/python3/dist-packages")]
    environment = os.environ | {
        "PYTHONHOME": str(system / "usr"), "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [emulator, "-cpu", core, "-L", str(system), "-plugin", str(plugin)]
    command += [str(system / "usr/bin/python3.11"), "-S", str(HERE / "arm_peer.py")]
    done = subprocess.run(
        [*command, runtime, str(model), str(sample)],
        env=environment, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S,
    )  # fmt: skip
    at = {after: counts for counts, after in counted(done.stderr)}
    if done.returncode or not {"edgepress-start", "edgepress-end"} <= set(at):
        last = done.stderr.strip().rpartition("\n")[2]
        raise Skip(f"{runtime} failed on {model.name}: {last}")
    return difference(at["edgepress-end"], at["edgepress-start"])


def build(job: Job, precision: str, board: str, models: Path, out: Path) -> Path:
    """Compile a model for a board as a user would; nothing is verified."""
    bundle = out / f"{job.name}-{precision}-{board}"
    recipe = "none" if precision == "float" else "transformer" if job.dynamic else "default"
    command = [
        str(Path(sys.executable).with_name("edgepress")),
        "run",
        str(models / f"{job.name}.onnx"),
    ]
    command += ["-t", board, "-r", recipe, "-o", str(bundle), "--overwrite", "--json"]
    if precision == "int8":
        command += ["--calib", str(models / f"{job.name}_calib.npz")]
    for name, shape in job.shapes:
        command += ["--input-shape", f"{name}:{shape}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 6):  # 6: a gate failed; the bundle is kept
        raise click.ClickException(f"{' '.join(command)}: {done.stderr[-500:]}")
    return bundle


def sample_of(job: Job, models: Path, out: Path) -> Path:
    """Write the first evaluation sample to a file of its own."""
    with np.load(models / f"{job.name}_eval.npz") as data:
        feeds: dict[str, Any] = {n: data[n][:1] for n in data.files if n != "labels"}
    path = out / f"{job.name}-sample.npz"
    np.savez(path, **feeds)
    return path


def ncnn_model(job: Job, models: Path, sample: Path, out: Path, pnnx: str) -> Path:
    """Convert a model with pnnx, once; return its path without suffix.

    Raises:
        Skip: pnnx is missing or cannot convert the model.
    """
    folder = out / f"{job.name}-ncnn"
    converted = folder / "m.ncnn"
    if converted.with_suffix(".ncnn.param").is_file():
        return converted
    if shutil.which(pnnx) is None:
        raise Skip("pnnx is missing: pip install pnnx, in an environment of its own")
    folder.mkdir(exist_ok=True)
    shutil.copy(models / f"{job.name}.onnx", folder / "m.onnx")
    short = {"float32": "f32", "int64": "i64", "int32": "i32"}
    with np.load(sample) as feeds:
        shapes = ",".join(
            f"[{','.join(map(str, feeds[n].shape))}]{short[str(feeds[n].dtype)]}"
            for n in feeds.files
        )
    subprocess.run(
        [pnnx, "m.onnx", f"inputshape={shapes}", "fp16=0"],
        cwd=folder, capture_output=True, check=False,
    )  # fmt: skip
    if not converted.with_suffix(".ncnn.param").is_file():
        raise Skip(f"pnnx cannot convert {job.name}")
    return converted


def rivals(
    job: Job, precision: str, board: str, models: Path, out: Path, pnnx: str
) -> dict[str, tuple[str, Path]]:
    """Return what to run against a bundle: `{name: (runtime, model)}`.

    Raises:
        Skip: ncnn's model cannot be made.
    """
    found: dict[str, tuple[str, Path]] = {}
    if board != "armv7-neon":
        graph = models / f"{job.name}.onnx"
        if precision == "int8":
            graph = out / f"{job.name}-int8-{board}" / "graph.onnx"
        if precision == "int8" and job.dynamic:
            graph = out / f"{job.name}-dynamic.onnx"
            if not graph.is_file():
                from onnxruntime.quantization import quantize_dynamic

                quantize_dynamic(models / f"{job.name}.onnx", graph)
        found[f"onnxruntime {precision}"] = ("onnxruntime", graph)
    if precision == "float" or board == "armv7-neon":
        sample = out / f"{job.name}-sample.npz"
        found["ncnn float"] = ("ncnn", ncnn_model(job, models, sample, out, pnnx))
    return found


def measure(
    job: Job,
    precision: str,
    board: str,
    models: Path,
    out: Path,
    root: Path,
    pnnx: str,
    plugin: Path,
) -> dict[str, Any]:
    """Count one bundle and its rivals; what is missing is said and left out."""
    sample = sample_of(job, models, out)
    bundle = build(job, precision, board, models, out)
    row: dict[str, Any] = {"model": job.name, "precision": precision, "board": board}
    row |= {"ours": our_counts(bundle, board, plugin), "spilled": spilled_vectors(bundle, board)}
    row["rivals"] = {}
    core = BOARDS[board][0].replace("max", "cortex-a76")  # no root has a newer core
    try:
        for name, (runtime, model) in rivals(job, precision, board, models, out, pnnx).items():
            kept = out / f"{job.name}-{runtime}-{model.stem}-{core}.json"
            if not kept.is_file():
                counts = peer_counts(runtime, core, model, sample, root, plugin)
                kept.write_text(json.dumps(counts))
            row["rivals"][name] = json.loads(kept.read_text())
    except Skip as reason:
        click.echo(f"{job.name} {precision} {board}: {reason}", err=True)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| model | | board (qemu) | M instructions | multiply | spilled | rival | M instructions "
        "| multiply | ratio |",
        "|---|---|---|---:|---:|---:|---|---:|---:|---:|",
    ]
    for row in rows:
        ours = row["ours"]
        spilled = "–" if row["spilled"] is None else row["spilled"]
        left = (
            f"| {row['model']} | {row['precision']} | {row['board']} | {ours['all'] / 1e6:.1f} "
            f"| {share(ours)} | {spilled} "
        )
        for name, counts in row["rivals"].items() or [("–", None)]:
            if counts is None:
                lines.append(f"{left}| – | – | – | – |")
                continue
            lines.append(
                f"{left}| {name} | {counts['all'] / 1e6:.1f} | {share(counts)} "
                f"| {ours['all'] / counts['all']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def share(counts: Counts) -> str:
    """Say which part of all instructions multiplies vectors."""
    return f"{100 * sum(counts[kind] for kind in KINDS[1:]) / counts['all']:.0f} %"


@click.command(help=__doc__.partition("\n")[0])
@click.argument("models", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path))
@click.option("--root", default="arm-root", type=click.Path(path_type=Path), help="Of arm_root.py.")
@click.option("--pnnx", default="pnnx", help="Converts models for ncnn.")
@click.option("--only", multiple=True, help="Only these models.")
@click.option("--board", "boards", multiple=True, type=click.Choice(list(BOARDS)))
@click.option("--precision", "precisions", multiple=True, type=click.Choice(["float", "int8"]))
def main(
    models: Path,
    out: Path,
    root: Path,
    pnnx: str,
    only: tuple[str, ...],
    boards: tuple[str, ...],
    precisions: tuple[str, ...],
) -> None:
    """Print the table; the raw counts go to OUT/arm_instructions.json."""
    out.mkdir(parents=True, exist_ok=True)
    out = out.resolve()
    plugin = build_plugin(out)
    rows = []
    for job in JOBS:
        if only and job.name not in only:
            continue
        if not (models / f"{job.name}.onnx").is_file():
            click.echo(f"{job.name}: not in {models}", err=True)
            continue
        for precision in precisions or ("float", "int8"):
            for board in boards or BOARDS:
                click.echo(f"{job.name} {precision} {board} …", err=True)
                rows.append(measure(job, precision, board, models, out, root, pnnx, plugin))
                (out / "arm_instructions.json").write_text(json.dumps(rows, indent=1))
    click.echo(table(rows))


if __name__ == "__main__":
    main()
