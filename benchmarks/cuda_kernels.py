"""What the kernels for GPUs take of a multiprocessor: Markdown, a table per architecture."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

import click

from edgepress.targets.base import Target
from edgepress.targets.cuda.compile import kernel_resources
from edgepress.targets.cuda.kernel import CudaKernel
from edgepress.targets.cuda.resources import Resources
from edgepress.targets.cuda.toolkit import cuda_compiler_version
from edgepress.targets.load import load_target
from edgepress.targets.program import Program
from tests.cuda.catalogue import catalogue

TARGETS = ("cuda-sm80", "jetson-orin-nano", "jetson-agx-orin", "cuda-sm90")
REGISTERS = 65536
WARP = 32


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a multiprocessor holds at once, as the CUDA C++ Programming Guide lists it.

    Attributes:
        warps: of 32 threads.
        blocks: of threads.
        shared_bytes: for all blocks; each takes 1 KiB more than it asks for.
    """

    warps: int
    blocks: int
    shared_bytes: int


LIMITS = {
    "sm_80": Limits(64, 32, 164 << 10),
    "sm_87": Limits(48, 16, 164 << 10),
    "sm_90": Limits(64, 32, 228 << 10),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A kernel and what it takes."""

    kernel: CudaKernel
    graph: str
    taken: Resources
    limits: Limits

    @property
    def kind(self) -> str:
        """Name without its number; kernels that TVM schedules are one kind."""
        name = re.sub(r"_\d+$", "", self.kernel.name)
        return "region" if name.startswith("region") else name

    @property
    def shared_bytes(self) -> int:
        """Per block, static and dynamic."""
        return self.taken.shared_bytes + self.kernel.shared_bytes

    @property
    def resident_warps(self) -> int:
        """Return how many warps a multiprocessor holds, were there blocks enough."""
        warps = math.ceil(math.prod(self.kernel.block) / WARP)
        of_warp = math.ceil(self.taken.registers * WARP / 256) * 256
        by_registers = REGISTERS // of_warp // 4 * 4 // warps
        by_shared = self.limits.shared_bytes // (math.ceil(self.shared_bytes / 128) * 128 + 1024)
        blocks = min(self.limits.blocks, self.limits.warps // warps, by_registers, by_shared)
        return blocks * warps


def measured(target: Target) -> list[Row]:
    """Compile every kernel of the catalogue."""
    listed = catalogue(target)
    program = Program(kernels={name: one.kernel for name, one in listed.items()})
    limits = LIMITS[target.gpu_arch]
    return [
        Row(listed[name].kernel, listed[name].graph, taken, limits)
        for name, taken in kernel_resources(program, target).items()
    ]


def by_kind(rows: Iterable[Row]) -> list[list[object]]:
    """One line per kind of kernel."""
    kinds = defaultdict(list)
    for row in rows:
        kinds[row.kind].append(row)
    return [
        [
            f"`{kind}`",
            len(of_kind),
            _range([row.taken.registers for row in of_kind]),
            _range([row.shared_bytes / 1024 for row in of_kind]),
            _range([row.resident_warps for row in of_kind]),
            sum(_spills(row) > 0 for row in of_kind) or "",
        ]
        for kind, of_kind in sorted(kinds.items())
    ]


def one_by_one(rows: Iterable[Row]) -> list[list[object]]:
    """One line per kernel."""
    return [
        [
            f"`{row.kernel.name}` of {row.graph}",
            math.prod(row.kernel.block),
            row.taken.registers,
            f"{row.shared_bytes / 1024:.3g}",
            row.resident_warps,
            _spills(row) or "",
        ]
        for row in rows
    ]


def _spills(row: Row) -> int:
    return row.taken.spill_store_bytes + row.taken.spill_load_bytes


def _range(numbers: Sequence[float]) -> str:
    low, high = (f"{number:.3g}" for number in (min(numbers), max(numbers)))
    return low if low == high else f"{low}–{high}"


@click.command()
@click.option("-t", "--target", "targets", multiple=True, type=click.Choice(TARGETS))
@click.option("--each", is_flag=True, help="A line per kernel, not per kind.")
def main(targets: tuple[str, ...], each: bool) -> None:
    """Compile every kernel that the zoo needs, in each number format, and print what it takes."""
    heads = ["kernel", "threads"] if each else ["kernels", "how many"]
    heads += ["registers", "shared memory, KiB", "warps on a multiprocessor"]
    heads.append("spilled bytes" if each else "of them spill")
    for name in targets or TARGETS:
        target = load_target(name)
        rows = measured(target)
        most = LIMITS[target.gpu_arch].warps
        click.echo(f"\n{name}: {target.gpu_arch}, {cuda_compiler_version()}, {len(rows)} kernels; "
                   f"at most {most} warps on a multiprocessor.\n")  # fmt: skip
        lines = (one_by_one if each else by_kind)(rows)
        table: list[list[object]] = [[*heads], ["---", *["---:"] * (len(heads) - 1)], *lines]
        for line in table:
            click.echo(f"| {' | '.join(map(str, line))} |")


if __name__ == "__main__":
    main()
