"""Kernels of every kind compile for every GPU, in registers alone."""

from __future__ import annotations

import pytest

from edgepress.targets.cuda.compile import kernel_resources
from edgepress.targets.cuda.operators import CUDA_KERNELS
from edgepress.targets.load import load_target
from edgepress.targets.lowering.build import lowered_graph
from edgepress.targets.program import Program
from tests.cuda.catalogue import catalogue, models

TARGETS = ("cuda-sm80", "cuda-sm90", "jetson-orin-nano", "jetson-agx-orin")
MOST_REGISTERS = 255
REGISTERS_OF_A_BLOCK = 65536


@pytest.mark.parametrize("name", TARGETS)
def test_no_kernel_needs_memory_for_its_variables(name: str) -> None:
    target = load_target(name)
    listed = catalogue(target)
    kernels = {one.kernel.name: one.kernel for one in listed.values()}
    wrong = []
    for kernel, taken in kernel_resources(Program(kernels=kernels), target).items():
        x, y, z = kernels[kernel].block
        fits = taken.registers <= min(MOST_REGISTERS, REGISTERS_OF_A_BLOCK // (x * y * z))
        if taken.spill_store_bytes or taken.spill_load_bytes or taken.stack_bytes or not fits:
            wrong.append(f"{listed[kernel].graph}: {kernel}: {taken}")
    assert wrong == []


def test_every_operator_is_among_them() -> None:
    target = load_target(TARGETS[0])
    used = {
        node.op_type for model in models().values() for node in lowered_graph(model, target).graph
    }
    assert set(CUDA_KERNELS) - used == set()
