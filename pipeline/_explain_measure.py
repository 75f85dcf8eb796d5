"""Figures of the rows of a bundle: code of their kernels, cost on the device, error they add."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgepress.calibration.base import Array, Samples
from edgepress.passes.analysis import QuantizedLayer, quantization_switches
from edgepress.pipeline import feeds
from edgepress.pipeline._explain_rows import Row
from edgepress.pipeline.bundle import Bundle
from edgepress.pipeline.oracle import Outputs, sqnr_db
from edgepress.pipeline.progress import Progress
from edgepress.targets.base import Target
from edgepress.targets.devices.base import Device
from edgepress.targets.kernel_code import KernelCode, kernel_codes
from edgepress.targets.program import Program

PROCESSES, SECONDS, RUNS = 5, 0.2, 10
MOST_SAMPLES = 8  # every layer needs an inference of each, in onnxruntime without optimisations


@dataclass(frozen=True, kw_only=True)
class Code:
    """The kernels of a bundle, compiled again from its graph.

    Attributes:
        program: what was compiled.
        kernels: the code of each kernel, by name.
        in_bundle: whether the bundle's executable holds exactly this code.
    """

    program: Program
    kernels: Mapping[str, KernelCode]
    in_bundle: bool


def compile_again(bundle: Bundle, model: ir.Model, target: Target, progress: Progress) -> Code:
    """Lower and compile the graph of a bundle, and look for the result in its executable.

    Raises:
        UnsupportedModel, CompileFailed: by this version of edgepress.
    """
    from edgepress.targets.compile import compile_with_assembly  # imports TVM
    from edgepress.targets.lowering.build import lower
    from edgepress.targets.object_code import holds
    from edgepress.targets.tiling import Tiles

    with progress.step("compile its kernels again"):
        tiles = Tiles(bundle.manifest.toolchain.get("tiles", {}))
        program = lower(model, target, progress.update, tiles)
        code, assembly = compile_with_assembly(program, target)
        executable = (bundle.folder / "model").read_bytes()
        return Code(
            program=program,
            kernels=kernel_codes(assembly, program.kernels),
            in_bundle=holds(executable, code),
        )


def profile(bundle: Bundle, device: Device, program: Program, progress: Progress) -> Array | None:
    """Measure every call: in ms, or in instructions under an emulator.

    Of several processes the median counts. What is behind the program's calls copies outputs.

    Returns:
        float64 `[calls]`; None where the executable makes fewer calls than the program.

    Raises:
        DeviceFailed: the device failed.
    """
    if int(device.info(bundle.folder).get("calls", 0)) < len(program.calls):
        return None
    processes = 1 if device.emulated else PROCESSES
    visits: list[list[float]] = []
    what = f"profile on {device.name}"
    with progress.step(what):
        for done in range(processes):
            progress.update(what, done, processes)
            visits.append(device.profile(bundle.folder, threads=None, seconds=SECONDS, runs=RUNS))
    if len({len(visit) for visit in visits}) > 1 or len(visits[0]) < len(program.calls):
        return None
    return np.asarray(np.median(np.asarray(visits, np.float64), axis=0))


def main_kernel(row: Row, code: Code, costs: Array | None) -> str:
    """Return the kernel that tells most of a row: the costliest that multiplies, or of all."""
    calls = code.program.calls
    products = [i for i in row.calls if code.kernels[calls[i].kernel].multiply]
    among = products or row.calls
    best = among[-1] if costs is None else max(among, key=lambda index: float(costs[index]))
    return calls[best].kernel


@dataclass(frozen=True, kw_only=True)
class Errors:
    """What the layers of a quantized model add to the error of its outputs.

    Attributes:
        total_db: signal to noise ratio of the outputs with all layers quantized.
        alone_db: the same with one layer quantized and all others in float, by layer.
        layers: the layers, in graph order.
        samples: how many were asked.
        with_constants: whether constants were switched to float too; without the original model
            only activations can be.
    """

    total_db: float
    alone_db: Mapping[str, float]
    layers: Sequence[QuantizedLayer]
    samples: int
    with_constants: bool

    def shares(self) -> dict[str, float]:
        """Return the share of each layer in the noise of all layers, each alone; they sum to 1."""
        noise = {name: 10 ** (-db / 10) for name, db in self.alone_db.items()}
        total = sum(noise.values())
        return {name: power / total for name, power in noise.items()} if total else {}

    def of_rows(self, rows: Sequence[Row]) -> dict[int, list[str]]:
        """Return the layers of each row, by its index: a row may compute several, or none."""
        owners = {name: i for i, row in enumerate(rows) for name in row.nodes}
        quantizing = {
            name: i
            for i, row in enumerate(rows)
            if row.operator in ("Quantize", "Input")
            for name in row.reads
        }
        found: dict[int, list[str]] = {}
        for layer in self.layers:
            names = (layer.name, *layer.nodes)
            index = next((owners[name] for name in names if name in owners), None)
            if index is None and not layer.nodes:  # of a model input
                values = (*layer.writes, layer.name.removeprefix(f"{layer.op_type} "))
                index = next((quantizing[name] for name in values if name in quantizing), None)
            if index is not None:
                found.setdefault(index, []).append(layer.name)
        return found


def measure_errors(
    model: ir.Model, floats: ir.Model | None, samples: Samples, progress: Progress
) -> Errors:
    """Quantize one layer at a time and compare the outputs to those in float.

    Args:
        model: a quantized model.
        floats: the model right before it was quantized, or None.
        samples: all of them are used.
        progress: shows how far the work is.
    """
    shapes = feeds.input_shapes(model) or {}
    with progress.step("error of every layer"):
        switches = quantization_switches(model, floats)
        asked = list(samples.feeds(shapes))

        def answers(on: set[str] | None) -> Outputs:
            return [switches.run(feed, on) for feed in asked]

        expected = answers(set())
        alone: dict[str, float] = {}
        for done, layer in enumerate(switches.layers):
            progress.update("error of every layer", done, len(switches.layers))
            alone[layer.name] = sqnr_db(expected, answers({layer.name}))
        return Errors(
            total_db=sqnr_db(expected, answers(None)),
            alone_db=alone,
            layers=switches.layers,
            samples=len(samples),
            with_constants=floats is not None,
        )
