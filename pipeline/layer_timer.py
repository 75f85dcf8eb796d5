"""Measures layers on the target's device: what passes mean by the cost of a layer.

On a real CPU the unit is ms. Layers are compiled side by side, up to 64 into one executable, and
`model --profile` times every kernel call. It takes as many threads as the bundle will, and as the
gate of the latency does: those of the target's cores that are there. One inference visits all
layers in turn, several processes do so one after the other, and the median over the processes
counts, so a disturbance hits all layers alike. Under an emulator the unit is instructions, on one
thread; they are the same every time, so one process counts them.

The cost of a call that does nothing, some 30 ns, is subtracted from every call. Kernels that take
less than 100 ns are therefore not told apart. From one sweep to the next, figures differ by some
2 % on a machine that is at rest; where other programs take its cores, those of kernels that take
longer than 1 ms, which is as long as the system lets a thread run, may double.

The figures of one call are kept together. The same layers in any order are not measured again, but
one layer more has all of them measured anew: figures taken at different times do not compare.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgepress.calibration.base import CalibrationError
from edgepress.passes.base import Context, PassRefused, refresh_shapes
from edgepress.passes.calibrate import Calibrate
from edgepress.passes.quantize_int8 import QuantizeInt8
from edgepress.pipeline._layer_programs import Joined, layer_program, side_by_side
from edgepress.pipeline.build import toolchain
from edgepress.pipeline.cache import Cache, code_version, content_key
from edgepress.pipeline.feeds import random_samples
from edgepress.pipeline.progress import Progress
from edgepress.targets.base import CompileFailed, DeviceFailed, Target, UnsupportedModel
from edgepress.targets.devices.base import Device
from edgepress.targets.program import Program

NAME = "layer-timer"
CHUNK_LAYERS, CHUNK_BYTES = 64, 128 << 20
PROCESSES, SECONDS, RUNS = 7, 0.2, 10
FEW_NUMBERS = 8  # as many as the scales of a Resize, which decide what is computed


@dataclass(frozen=True)
class DeviceTimer:
    """Measures layers on a device; the contract is `passes.base.LayerTimer`.

    Attributes:
        target: what to compile for.
        device: where to measure.
        quantized: whether the layers will run on 8-bit integers, as `quantize-int8` makes them
            where none of its options says otherwise.
        cache: keeps figures, or None.
        progress: called as `progress(what, done, total)`; whoever asks for figures need not say how
            far they are.
    """

    target: Target
    device: Device
    quantized: bool = False
    cache: Cache | None = None
    progress: Callable[[str, int, int], None] = Progress(shown=False).update

    @property
    def unit(self) -> str:
        """What is measured: "ms", or "instructions" under an emulator."""
        return "instructions" if self.device.emulated else "ms"

    @property
    def key(self) -> str:
        """What a figure depends on beside the layer: code, target, device, precision."""
        return self._key

    @cached_property
    def _key(self) -> str:
        packages = ("calibration", "passes", "pipeline", "targets")
        return content_key(
            NAME,
            code_version(*(f"edgepress.{package}" for package in packages)),
            dataclasses.asdict(self.target),
            toolchain(self.target),
            self.device.name,
            self.device.machine,
            self.quantized,
        )

    def __call__(self, layers: Sequence[ir.Model]) -> list[float]:
        """Return the cost of one inference of every layer, in `unit`, in order.

        Layers are canonical models of fixed shapes. Two that differ only in names and weights are
        measured once. Conversions of layout and number format at a layer's ends do not count:
        inside a network the layers before and after spare them.

        Raises:
            PassRefused: a layer cannot be quantized or compiled; names it.
            CompileFailed: the C compiler is missing or failed.
            DeviceFailed: the device is unreachable, or the program failed there.
        """
        if not layers:
            return []
        keys = [layer_key(layer) for layer in layers]
        distinct: dict[str, ir.Model] = {}
        for key, layer in zip(keys, layers, strict=True):
            distinct.setdefault(key, layer)
        entry = content_key("layers", self.key, sorted(distinct))
        figures = self._recall(entry)
        if figures is None:
            figures = dict(zip(distinct, self._measure(list(distinct.values())), strict=True))
            self._keep(entry, figures)
        return [figures[key] for key in keys]

    def _recall(self, entry: str) -> dict[str, float] | None:
        folder = self.cache.get(entry) if self.cache else None
        if folder is None:
            return None
        figures: dict[str, float] = json.loads((folder / "figures.json").read_text("utf-8"))
        return figures

    def _keep(self, entry: str, figures: dict[str, float]) -> None:
        def fill(folder: Path) -> None:
            (folder / "figures.json").write_text(json.dumps(figures), "utf-8")

        if self.cache:
            self.cache.put(entry, fill)

    # Measuring ----------------------------------------------------------------------------------

    def _measure(self, layers: list[ir.Model]) -> list[float]:
        """Measure distinct layers: per call the median over processes, per layer their sum."""
        processes = 1 if self.device.emulated else PROCESSES
        costs = [0.0] * len(layers)  # a layer without calls, such as a Reshape, costs nothing
        with tempfile.TemporaryDirectory(prefix="edgepress-") as temporary:
            programs = list(self._compiled(layers, Path(temporary)))
            visits: list[list[list[float]]] = [[] for _ in programs]
            for done in range(processes):
                self.progress(f"measure {len(layers)} layers", done, processes)
                for (folder, joined), visited in zip(programs, visits, strict=True):
                    visited.append(self._profile(folder, len(joined.owners)))
        for (_, joined), visited in zip(programs, visits, strict=True):
            calls = np.median(visited, axis=0)
            for owner, cost in zip(joined.owners, calls - calls[joined.idle], strict=True):
                if owner is not None:
                    costs[owner] += max(float(cost), 0.0)
        return costs

    def _profile(self, folder: Path, count: int) -> list[float]:
        """Run one process; return what every call costs."""
        calls = self.device.profile(folder, threads=None, seconds=SECONDS, runs=RUNS)
        if len(calls) != count:
            raise DeviceFailed(
                f"{self.device.name}: `model --profile` should report {count} calls, "
                f"but reported {len(calls)}."
            )
        return calls

    # Compiling ----------------------------------------------------------------------------------

    def _compiled(self, layers: list[ir.Model], folder: Path) -> Iterator[tuple[Path, Joined]]:
        """Compile all layers, as many into one executable as shall be in it."""
        for number, members in enumerate(_chunks(layers)):
            programs: dict[int, Program] = {}
            for member in members:
                self.progress(f"compile {len(layers)} layers", member, len(layers))
                programs[member] = self._lower(layers[member])
            joined = side_by_side(programs, self.target)
            self._compile(joined.program, folder / str(number), programs, layers)
            yield folder / str(number), joined

    def _lower(self, layer: ir.Model) -> Program:
        try:
            return layer_program(_quantized(layer) if self.quantized else layer, self.target)
        except (CalibrationError, PassRefused, UnsupportedModel) as error:
            raise _refusal(layer, error) from error

    def _compile(
        self,
        program: Program,
        folder: Path,
        parts: dict[int, Program],
        layers: list[ir.Model],
    ) -> None:
        """Fill a folder; where the kernels do not compile, name the part that does not."""
        from edgepress.targets.compile import compile_kernels
        from edgepress.targets.export import export

        try:
            code = compile_kernels(program, self.target)
        except CompileFailed:
            for number, part in parts.items():
                try:
                    compile_kernels(part, self.target)
                except CompileFailed as error:
                    raise _refusal(layers[number], error) from error
            raise
        export(program, code, self.target, folder, name=NAME, tolerances=(0.0,))


def layer_key(layer: ir.Model) -> str:
    """Hash what decides the cost of a layer: operators, shapes and dtypes, but not its weights.

    Names do not matter. Integers, and the numbers of small constants, say what is computed (axes,
    sizes, bounds), so they are in the key; float constants of more than 8 numbers are not.
    """
    numbers: dict[ir.Value | None, int] = {None: 0}
    facts: list[Any] = [sorted(layer.graph.opset_imports.items())]

    def number(value: ir.Value | None) -> int:
        if value not in numbers:
            assert value is not None
            numbers[value] = len(numbers)
            facts.append([str(value.dtype), str(value.shape), _decisive(value.const_value)])
        return numbers[value]

    facts.append([number(value) for value in layer.graph.inputs])
    for node in layer.graph:
        attributes = {
            name: ir.to_proto(attribute).SerializeToString(deterministic=True).hex()
            for name, attribute in sorted(node.attributes.items())
        }
        ends = [[number(value) for value in values] for values in (node.inputs, node.outputs)]
        facts.append([node.domain, node.op_type, attributes, *ends])
    facts.append([number(value) for value in layer.graph.outputs])
    return content_key(*facts)


def _decisive(tensor: ir.TensorProtocol | None) -> str | None:
    """Hash the numbers of a constant that decide what is computed; None for weights."""
    if tensor is None or (tensor.dtype.is_floating_point() and tensor.size > FEW_NUMBERS):
        return None
    return hashlib.sha256(np.asarray(tensor.numpy()).tobytes()).hexdigest()


def _chunks(layers: Sequence[ir.Model]) -> Iterator[list[int]]:
    """Yield the numbers of neighbours that share an executable.

    Executables are equally full, so that weights are about as cold in each: those of the only layer
    in a program would be warm.
    """
    shares = np.array([max(1 / CHUNK_LAYERS, _weight_bytes(m) / CHUNK_BYTES) for m in layers])
    middles = (np.cumsum(shares) - shares / 2) / shares.sum()
    chunk_of = np.floor(middles * math.ceil(shares.sum())).tolist()
    for _, members in itertools.groupby(range(len(layers)), key=chunk_of.__getitem__):
        yield list(members)


def _weight_bytes(layer: ir.Model) -> int:
    constants = (value.const_value for value in layer.graph.initializers.values())
    return sum(tensor.nbytes for tensor in constants if tensor is not None)


def _quantized(layer: ir.Model) -> ir.Model:
    """Quantize a layer on one random sample: ranges are wrong, kernels are right."""
    model = layer.clone()
    context = Context(samples=random_samples(model, 1))
    for step in (Calibrate(), QuantizeInt8(bias_correction=False)):
        step.requires(model, context)
        outcome = step.call(model, context)
        model = outcome.model
        if outcome.modified:
            refresh_shapes(model, step.name)
    return model


def _refusal(layer: ir.Model, error: Exception) -> PassRefused:
    """Name the layer by its nodes and their shapes, since nodes may have names of no meaning."""
    nodes = (
        f"{node.name}: {node.op_type}({', '.join(str(v.shape) for v in node.inputs if v)})"
        for node in layer.graph
    )
    why = f"it cannot be measured: {str(error).rstrip('.')}. Leave it out of what the pass changes."
    return PassRefused(NAME, f"layer {' + '.join(nodes)}", why)
