"""The generated `driver.c` of a model on a GPU: tables of what is launched, and on which memory."""

from __future__ import annotations

from collections.abc import Sequence

from edgepress.targets.base import Target
from edgepress.targets.cuda.kernel import CudaKernel
from edgepress.targets.driver_source import (
    Driver,
    OutputCopy,
    c_comment,
    c_string,
    description_lines,
    first_lines,
    output_copies,
)
from edgepress.targets.memory import Plan
from edgepress.targets.program import Call, Program

ALIGNMENT_BYTES = 256
"""Of every tensor in the GPU's memory."""

MOST_ARGUMENTS = 511
"""Pointers of a call; CUDA passes 512, and the counters' is one of them."""


def cuda_driver_source(program: Program, plan: Plan, target: Target, driver: Driver) -> str:
    """Generate `driver.c`: one launch per call, then the description of the model.

    Raises:
        ValueError: a call has more arguments than a kernel takes, or the arena is not aligned.
    """
    if wrong := [name for name, offset in plan.offsets.items() if offset % ALIGNMENT_BYTES]:
        raise ValueError(f"{', '.join(wrong)}: not aligned to {ALIGNMENT_BYTES} bytes")
    places = _places(program, plan, driver)
    arguments: list[str] = []
    launches: list[str] = []
    nodes: list[str] = []
    for call in program.calls:
        if len(call.arguments) > MOST_ARGUMENTS:
            raise ValueError(f"{call.node}: {len(call.arguments)} arguments, a kernel takes "
                             f"{MOST_ARGUMENTS}")  # fmt: skip
        launches.append(_launch(call, program.kernels[call.kernel], len(arguments)))
        arguments += [f"{places[name]}, /* {c_comment(name)} */" for name in call.arguments]
        nodes.append(call.node or call.kernel)
    for copy in output_copies(program):
        launches.append(_copy(copy, len(arguments)))
        source = "PLACE_INPUT" if copy.source_kind == "inputs" else "PLACE_OUTPUT"
        arguments += [f"{{PLACE_OUTPUT, {copy.output}}},", f"{{{source}, {copy.source}}},"]
        nodes.append(copy.node)
    lines = [
        *first_lines(driver, target),
        "#include <stddef.h>",
        "",
        '#include "description.h"',
        '#include "launches.h"',
        "",
        *_table("const struct place", "places", "{PLACE_ARENA, 0},", arguments),
        *_table("const struct launch", "launches", "{0},", launches),
        *description_lines(
            driver,
            target,
            nodes,
            arena_bytes=plan.arena_bytes,
            workspace_bytes=program.workspace_bytes,
            threads=1,
        ),
    ]
    return "\n".join(lines) + "\n"


def _places(program: Program, plan: Plan, driver: Driver) -> dict[str, str]:
    """Where every tensor and constant lies, as an initialiser of `struct place`."""
    places = {name: f"{{PLACE_ARENA, {offset}u}}" for name, offset in plan.offsets.items()}
    places |= {str(e["name"]): f"{{PLACE_WEIGHT, {i}}}" for i, e in enumerate(driver.weights)}
    outputs = reversed(list(enumerate(program.outputs)))
    places |= {name: f"{{PLACE_OUTPUT, {i}}}" for i, name in outputs}
    return places | {name: f"{{PLACE_INPUT, {i}}}" for i, name in enumerate(program.inputs)}


def _launch(call: Call, kernel: CudaKernel, first_place: int) -> str:
    return (
        f"{{.kernel = {c_string(kernel.name)}, .grid = {_extents(kernel.grid)}, "
        f".block = {_extents(kernel.block)}, .shared_bytes = {kernel.shared_bytes}, "
        f".counters = {kernel.counters}, .overlaps = {int(kernel.overlaps)}, "
        f".first_place = {first_place}, .place_count = {len(call.arguments)}}},"
    )


def _copy(copy: OutputCopy, first_place: int) -> str:
    return (
        f"{{.kernel = NULL, .first_place = {first_place}, .place_count = 2, "
        f".copied_bytes = {copy.size_bytes}u}},"
    )


def _extents(sizes: tuple[int, int, int]) -> str:
    return f"{{{', '.join(map(str, sizes))}}}"


def _table(kind: str, name: str, end: str, rows: Sequence[str]) -> list[str]:
    """Define an array; the last row keeps it from being empty."""
    return [f"{kind} {name}[] = {{", *(f"    {row}" for row in (*rows, end)), "};"]
