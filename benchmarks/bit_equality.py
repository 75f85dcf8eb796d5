"""Compare the outputs of integer bundles, bit for bit, on every instruction set and in NumPy.

    python benchmarks/models.py all -o models
    python benchmarks/bit_equality.py models -o results

Real models go through the command line, once per board, from the same recipe; whole answers are
compared with those of the NumPy reference on the graph in the bundle. Then random graphs with
hostile ranges (saturating, tiny, huge, zero only, a single value) are built into one program per
board. x86 boards run on this machine, which needs AVX-512 VNNI for both; Arm boards run under qemu.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import onnx_ir as ir

ROOT = Path(__file__).resolve().parents[1]
BOARDS = ("x86-64-v3", "x86-64-v4", "raspberry-pi-4", "raspberry-pi-5", "armv7-neon")
SAMPLES = 4
AT_ONCE = 25  # graphs in one program
CALIBRATED = 'schema = 1\n\n[[pass]]\nname = "calibrate"\n\n[[pass]]\n'
RECIPES = {
    "int8": "",  # the built-in default
    "fixed point, 16 bits": f'{CALIBRATED}name = "quantize-fixed-point"\nbits = 16\n',
    "fixed point, 8 bits": f'{CALIBRATED}name = "quantize-fixed-point"\nbits = 8\n',
}


def edgepress(*arguments: str) -> None:
    """Run a command; a gate that failed (6) is no failure here."""
    command = [str(Path(sys.executable).with_name("edgepress")), *arguments]
    code = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
    if code not in (0, 6):
        raise click.ClickException(f"{' '.join(command)} ended with {code}")


def device_of(board: str) -> str:
    """Name the device that runs a board's bundles here."""
    return "local" if board.startswith("x86") else "qemu"


def digest(answers: dict[str, np.ndarray]) -> str:
    """Hash names, shapes and bytes, in order of the names."""
    whole = hashlib.sha256()
    for name in sorted(answers):
        array = np.ascontiguousarray(answers[name])
        whole.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return whole.hexdigest()[:12]


def few_samples(path: Path, folder: Path) -> Path:
    """Write the first samples of a data file to a file of their own."""
    with np.load(path) as data:
        few = {name: data[name][:SAMPLES] for name in data if name != "labels"}
    np.savez(folder / "few.npz", **few)
    return folder / "few.npz"


def reference_answers(graph: Path, data: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return the NumPy reference's answers to all samples, stacked, and its float islands."""
    from edgepress.pipeline.accuracy import stack
    from edgepress.pipeline.feeds import input_shapes, user_samples
    from edgepress.targets.reference import Reference

    model = ir.load(graph)
    reference = Reference(model)
    feeds = user_samples(model, data).feeds(input_shapes(model) or {})
    return dict(stack([reference.run(feed) for feed in feeds])), reference.islands


def models(folder: Path) -> Iterator[tuple[str, Path, Path, Path]]:
    """Yield name, model, calibration and evaluation samples."""
    fashion = ROOT / "examples" / "fashion_mnist"
    yield (
        "fashion-mnist",
        fashion / "fashion_mnist.onnx",
        fashion / "calib_256.npz",
        fashion / "test_2000.npz",
    )
    for name in ("squeezenet", "efficientnet-lite0"):
        files = (folder / f"{name}{end}" for end in (".onnx", "_calib.npz", "_eval.npz"))
        yield (name, *files)  # type: ignore[misc]


def compare_model(
    name: str, recipe: str, paths: tuple[Path, Path, Path], boards: tuple[str, ...], folder: Path
) -> bool:
    """Build and run one model on every board; print a line for each and whether all agree."""
    model, calib, evaluation = paths
    given = "default"
    if RECIPES[recipe]:
        given = str(folder / "recipe.toml")
        Path(given).write_text(RECIPES[recipe], "utf-8")
    data, wanted, equal = few_samples(evaluation, folder), None, True
    for board in boards:
        bundle, answers = folder / f"{name}_{board}", folder / "answers.npz"
        edgepress("run", str(model), "-t", board, "-r", given, "--calib", str(calib),
                  "-o", str(bundle), "--overwrite")  # fmt: skip
        edgepress("infer", str(bundle), "--data", str(data), "-d", device_of(board),
                  "-o", str(answers), "--overwrite")  # fmt: skip
        if wanted is None:
            found, islands = reference_answers(bundle / "graph.onnx", data)
            wanted = digest(found)
            note = f"{len(islands)} float islands" if islands else "integers throughout"
            print(f"| {name} | {recipe} | NumPy reference, {note} | {wanted} | |", flush=True)
        with np.load(answers) as got:
            same = digest(dict(got)) == wanted
            print(f"| {name} | {recipe} | {board} | {digest(dict(got))} | {same} |", flush=True)
        equal &= same
    return equal


def compare_graphs(count: int, boards: tuple[str, ...], folder: Path) -> bool:
    """Run random graphs on every board; print a line per board and whether all agree."""
    from edgepress.targets.compile import compile_kernels
    from edgepress.targets.devices.base import open_device
    from edgepress.targets.export import export
    from edgepress.targets.load import load_target
    from tests.targets.qdq import (
        FIXED_POINT,
        WIDE,
        check_graphs,
        drawn,
        inputs_of,
        merged_graphs,
        qdq_nets,
    )

    share = count // 4
    graphs = drawn(qdq_nets(4), share) + drawn(qdq_nets(2, moves=True), share)
    graphs += drawn(qdq_nets(4, styles=WIDE), share) + drawn(qdq_nets(4, styles=FIXED_POINT), share)
    inputs, equal = inputs_of(graphs), True
    for board in boards:
        target, exact, wrong = load_target(board), 0, ""
        for first in range(0, len(graphs), AT_ONCE):
            part, feeds = graphs[first : first + AT_ONCE], inputs[first : first + AT_ONCE]
            program, joined = merged_graphs(part, target, feeds)
            code = compile_kernels(program, target)
            tolerances = [0.0] * len(program.outputs)
            with tempfile.TemporaryDirectory(dir=folder) as bundle:
                export(program, code, target, Path(bundle), name="graphs", tolerances=tolerances)
                (answers,) = open_device(device_of(board), target).infer(Path(bundle), [joined])
            try:
                exact += check_graphs(part, feeds, answers)
            except AssertionError as error:
                wrong = str(error).strip().splitlines()[-1]
                equal = False
        result = wrong or f"{exact} integer graphs bit-equal"
        print(f"| {len(graphs)} random graphs | – | {board} | {result} | {not wrong} |", flush=True)
    return equal


@click.command()
@click.argument("folder", metavar="MODELS", type=click.Path(path_type=Path, exists=True))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--graphs", default=400, show_default=True, help="How many random graphs.")
@click.option("--only", help="One model, or `graphs`.")
@click.option("--board", "boards", multiple=True, help="One board; default: all.")
def main(
    folder: Path, output: Path, graphs: int, only: str | None, boards: tuple[str, ...]
) -> None:
    """Compare every model in every recipe, and random graphs, on every board."""
    output.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("EDGEPRESS_CACHE_DIR", str(output / "cache"))
    sys.path.insert(0, str(ROOT))
    boards = boards or BOARDS
    print("| model | recipe | on | answers | equal |\n|---|---|---|---|---|", flush=True)
    equal = True
    for name, *paths in models(folder):
        if only in (None, name):
            for recipe in RECIPES:
                equal &= compare_model(name, recipe, (*paths,), boards, output)  # type: ignore[arg-type]
    if only in (None, "graphs"):
        equal &= compare_graphs(graphs, boards, output)
    if not equal:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
