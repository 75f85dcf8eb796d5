"""The layers that `edgepress explain` speaks of: rows of the program with all their figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgepress.calibration.base import Array
from edgepress.pipeline._explain_islands import Island
from edgepress.pipeline._explain_measure import Code, Errors, main_kernel
from edgepress.pipeline._explain_rows import Row
from edgepress.pipeline.oracle import MAX_SQNR_DB


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer of a bundle: a node, a run of nodes that are computed together, or a conversion.

    Attributes:
        name: of the node in the ONNX graph; of the value where it is a conversion.
        operator: as in the graph, such as "Conv"; several joined by "+"; or what is converted.
        nodes: names of all nodes that are computed here.
        fused: what is computed beside the operator, such as "Relu", "padding".
        conversion: whether it only changes number format or layout.
        precision: "float32", "int8", "int16 × int8", "Q3.4", "dynamic int8", ….
        float_island: whether it runs in float in a quantized model.
        why_float: why it does, or None.
        kernels: names of the kernels it calls, in order.
        main_kernel: the one that the next three are about: the costliest that multiplies.
        multiply: the mnemonic that does most multiplications in the innermost loops of its main
            kernel; None where nothing is multiplied there.
        multiply_count: how often it stands there.
        float_instructions: in the code of its kernels, as often as they stand there; an operator in
            integers has some where it multiplies by a float to leave its accumulators.
        vector: whether that is a vector instruction; without one, whether its loops use vectors.
        macs: multiply-accumulates of one inference.
        bytes_moved: of all tensors and weights that its calls read and write.
        working_set_bytes: the most that one of its calls touches.
        time_ms: of one inference; None under an emulator or without a device.
        executed_instructions: of one inference, under an emulator; else None.
        cost_share: of all layers' time or executed instructions, from 0 to 1.
        gops: achieved operations per second, 2 per multiply-accumulate, in 1e9.
        sqnr_alone_db: of the model's outputs with this layer alone quantized.
        error_share: of the noise that all layers add, each alone, from 0 to 1.
    """

    name: str
    operator: str
    nodes: list[str]
    fused: list[str]
    conversion: bool
    precision: str
    float_island: bool
    why_float: str | None
    kernels: list[str]
    main_kernel: str
    multiply: str | None
    multiply_count: int
    vector: bool
    float_instructions: int
    macs: int
    bytes_moved: int
    working_set_bytes: int
    time_ms: float | None
    executed_instructions: int | None
    cost_share: float | None
    gops: float | None
    sqnr_alone_db: float | None
    error_share: float | None

    @property
    def title(self) -> str:
        """Operator and what is fused into it."""
        return " + ".join([self.operator, *self.fused])


def make_layers(
    rows: Sequence[Row],
    islands: Sequence[Island],
    code: Code,
    costs: Array | None,
    emulated: bool,
    errors: Errors | None,
) -> list[Layer]:
    """Give every row its figures.

    Args:
        rows: in order of execution.
        islands: say which rows are float, and why.
        code: the kernels.
        costs: of every call, in ms or executed instructions; None where nothing was measured.
        emulated: whether they are instructions.
        errors: of the quantized layers, or None.
    """
    spent = [None if costs is None else float(costs[row.calls].sum()) for row in rows]
    total = sum(cost for cost in spent if cost is not None)
    why = {index: island.why for island in islands for index in island.rows}
    shares, owned = ({}, {}) if errors is None else (errors.shares(), errors.of_rows(rows))
    layers = []
    for index, (row, cost) in enumerate(zip(rows, spent, strict=True)):
        name = main_kernel(row, code, costs)
        kernel = code.kernels[name]
        milliseconds = None if emulated else cost
        names = owned.get(index, [])
        layers.append(
            Layer(
                name=row.name,
                operator=row.operator,
                nodes=row.nodes,
                fused=row.fused,
                conversion=row.conversion,
                precision=row.precision,
                float_island=index in why,
                why_float=why.get(index),
                kernels=[code.program.calls[number].kernel for number in row.calls],
                main_kernel=name,
                multiply=kernel.multiply or None,
                multiply_count=kernel.loop_multiplies.get(kernel.multiply, 0),
                vector=kernel.vector,
                float_instructions=_float_instructions(row, code),
                macs=row.macs,
                bytes_moved=row.bytes_moved,
                working_set_bytes=row.working_set_bytes,
                time_ms=milliseconds,
                executed_instructions=round(cost) if emulated and cost is not None else None,
                cost_share=None if cost is None else cost / total if total else 0.0,
                gops=2 * row.macs / milliseconds / 1e6 if row.macs and milliseconds else None,
                sqnr_alone_db=_together(errors, names) if errors is not None and names else None,
                error_share=sum(shares.get(name, 0.0) for name in names) if names else None,
            )
        )
    return layers


def _float_instructions(row: Row, code: Code) -> int:
    kernels = dict.fromkeys(code.program.calls[number].kernel for number in row.calls)
    return sum(code.kernels[name].float_instructions for name in kernels)


def _together(errors: Errors, names: Sequence[str]) -> float:
    """Return the ratio of signal to the summed noise of some layers."""
    noise = sum(10 ** (-errors.alone_db[name] / 10) for name in names)
    return min(MAX_SQNR_DB, -10 * math.log10(noise)) if noise else MAX_SQNR_DB
