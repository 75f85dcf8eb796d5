"""One TIR function as a Program, and what it answers."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgepress.targets.base import Target
from edgepress.targets.program import Array, Call, Program, Tensor
from tests.targets.interpret import run_program


def program_of(function: Any, name: str = "kernel") -> Program:
    """Wrap a function of buffers; the last one is its output."""
    tensors = [
        Tensor(p.name, str(p.ty.dtype), tuple(int(size) for size in p.ty.shape))
        for p in function.params
    ]
    names = tuple(tensor.name for tensor in tensors)
    return Program(
        inputs=names[:-1],
        outputs=names[-1:],
        tensors={tensor.name: tensor for tensor in tensors},
        calls=[Call(name, names, names[-1:])],
        kernels={name: function},
    )


def random_feeds(program: Program, seed: int = 0) -> dict[str, Array]:
    """Normal values for the inputs."""
    random = np.random.default_rng(seed)
    return {
        name: random.standard_normal(program.tensors[name].shape).astype(
            program.tensors[name].dtype
        )
        for name in program.inputs
    }


def answer(program: Program, target: Target, feeds: dict[str, Array]) -> Array:
    """Run a program of one output."""
    return run_program(program, target, feeds)[program.outputs[0]]
