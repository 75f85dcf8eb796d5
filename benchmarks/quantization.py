"""What int8 costs in answers, by method: SQNR, agreement and top-1 of quantized graphs.

    python benchmarks/models.py mnist squeezenet efficientnet-lite0 -o models
    python benchmarks/quantization.py models

Every graph is calibrated on NAME_calib.npz and judged on NAME_eval.npz, in onnxruntime with its
optimisations off, against the float model. `onnxruntime static` is `quantize_static` with uint8
activations and int8 weights. Fashion-MNIST comes from `examples/`.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import onnx_ir as ir
from onnxruntime import quantization

from edgepress.calibration.base import Samples
from edgepress.passes.base import Context, Pass
from edgepress.passes.calibrate import Calibrate
from edgepress.passes.equalize_layers import EqualizeLayers
from edgepress.passes.quantize_int8 import QuantizeInt8
from edgepress.pipeline.accuracy import accuracy
from edgepress.pipeline.driver import Driver, canonical_passes
from edgepress.pipeline.feeds import input_shapes, user_samples
from edgepress.pipeline.load import load_model
from edgepress.pipeline.oracle import Oracle, Outputs

EXAMPLE = Path(__file__).parent.parent / "examples/fashion_mnist"
NAMES = ("mnist", "fashion-mnist", "squeezenet", "efficientnet-lite0")


@dataclass(frozen=True)
class Task:
    """A canonical float model, and what it is calibrated and judged on."""

    name: str
    model: ir.Model
    calibration: Samples
    evaluation: Samples


#: Makes a quantized model out of a task.
Method = Callable[[Task], ir.Model]


def ours(*passes: Pass) -> Method:
    """Return a method that runs passes of this project."""

    def run(task: Task) -> ir.Model:
        model, context = task.model.clone(), Context(samples=task.calibration)
        for step in passes:
            step.requires(model, context)
            model = step.call(model, context).model
        return model

    return run


def onnxruntimes(*, per_channel: bool) -> Method:
    """Return onnxruntime's own static quantization."""

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        """Hands out the calibration samples once."""

        def __init__(self, task: Task) -> None:
            self.feeds = task.calibration.feeds(shapes_of(task.model))

        def get_next(self) -> Any:
            """Return the next sample, or None."""
            return next(self.feeds, None)

    def run(task: Task) -> ir.Model:
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
            ir.save(task.model, source)
            quantization.quantize_static(
                source,
                target,
                Reader(task),
                per_channel=per_channel,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
            )
            model = ir.load(target)
            ir.external_data.load_to_model(model)
        return model

    return run


METHODS: dict[str, Method] = {
    "onnxruntime static, per tensor": onnxruntimes(per_channel=False),
    "onnxruntime static, per channel": onnxruntimes(per_channel=True),
    "per tensor": ours(Calibrate(), QuantizeInt8(per_channel=False)),
    "per tensor, equalize-layers": ours(
        EqualizeLayers(), Calibrate(), QuantizeInt8(per_channel=False)
    ),
    "no bias correction": ours(Calibrate(), QuantizeInt8(bias_correction=False)),
    "min_max": ours(Calibrate(), QuantizeInt8()),
    "symmetric": ours(Calibrate(), QuantizeInt8(symmetric=True)),
    "percentile": ours(Calibrate(method="percentile"), QuantizeInt8()),
    "entropy": ours(Calibrate(method="entropy"), QuantizeInt8()),
    "mse": ours(Calibrate(method="mse"), QuantizeInt8()),
    "best": ours(QuantizeInt8(method="best")),
    "equalize-layers, best": ours(EqualizeLayers(), QuantizeInt8(method="best")),
    "adaptive rounding": ours(Calibrate(), QuantizeInt8(rounding="adaptive")),
    "best, adaptive rounding": ours(QuantizeInt8(method="best", rounding="adaptive")),
    "best, adaptive rounding, int16 outputs": ours(
        QuantizeInt8(method="best", rounding="adaptive", int16_outputs=True)
    ),
}


def load(name: str, models: Path) -> Task:
    """Load a model and make it canonical."""
    if name == "fashion-mnist":
        files = [
            EXAMPLE / file for file in ("fashion_mnist.onnx", "calib_256.npz", "test_2000.npz")
        ]
    else:
        files = [models / f"{name}{end}" for end in (".onnx", "_calib.npz", "_eval.npz")]
    driver = Driver(load_model(files[0]))
    driver.run(canonical_passes(), Context())
    calibration, evaluation = (user_samples(driver.model, file, None) for file in files[1:])
    return Task(name, driver.model, calibration, evaluation)


def shapes_of(model: ir.Model) -> dict[str, tuple[int, ...]]:
    """Return the fixed shapes of a canonical model's inputs."""
    shapes = input_shapes(model)
    assert shapes is not None, "the model is canonical"
    return shapes


def answers(task: Task, model: ir.Model) -> Outputs:
    """Run a model on all evaluation samples."""
    oracle = Oracle(model)
    return [oracle.run(feed) for feed in task.evaluation.feeds(shapes_of(task.model))]


def measure(task: Task, methods: Sequence[str]) -> list[dict[str, Any]]:
    """Quantize with every method and judge the answers."""
    expected = answers(task, task.model)
    rows = []
    for method in methods:
        started = time.perf_counter()
        model = METHODS[method](task)
        seconds = time.perf_counter() - started
        found = accuracy(task.evaluation, answers(task, model), expected)
        row = {"model": task.name, "method": method, "seconds": round(seconds, 1), **found}
        rows.append(row)
        click.echo(line(row), err=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    agree = f"{round(row['agreement'] * row['samples'] / 100)}/{row['samples']}"
    top1 = "–" if row["top1"] is None else f"{row['top1']:.2f} ({row['reference_top1']:.2f})"
    return (
        f"| {row['model']} | {row['method']} | {row['sqnr_db']:.1f} | {agree} | {top1} "
        f"| {row['seconds']} |"
    )


@click.command(help=str(__doc__).partition("\n")[0])
@click.argument("models", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--only", multiple=True, type=click.Choice(NAMES), help="Only these models.")
@click.option("--method", multiple=True, type=click.Choice(list(METHODS)), help="Only these.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(models: Path, only: tuple[str, ...], method: tuple[str, ...], as_json: bool) -> None:
    """Print a table of models and methods."""
    rows = []
    for name in only or NAMES:
        rows += measure(load(name, models), method or list(METHODS))
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    click.echo("| model | method | SQNR dB | same class | top-1 (fp32) % | s |")
    click.echo("|---|---|---:|---:|---:|---:|")
    click.echo("\n".join(map(line, rows)))


if __name__ == "__main__":
    main()
