"""A kernel that does nothing but multiply and add: what a CPU can do at most.

It is the innermost loop of a convolution without its memory: rows of inputs, by columns of weights
that stay in registers, and one accumulator for each pair. Chains that shared both would be one for
the compiler, and inputs in registers would be products that it computes once; so the inputs are
read anew, from a few KB, as convolutions read them. There are enough chains to hide an
instruction's latency.

The pieces divide evenly among any small number of threads.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgepress.targets.isa.base import Isa
from edgepress.targets.schedules.emit import Kernel, lanes_of, load, repeat, splat

PIECES, STEPS = 240, 2048
MOST_CHAINS = 12


def chains(isa: Isa, quantized: bool) -> tuple[int, int]:
    """Return rows of inputs and columns of weights: the least loads that the registers allow.

    With few registers, floats take two rows, since a product waits for the sum before it; the sums
    of integer products wait less.
    """
    few = isa.vector_registers == 16 and not isa.temporaries
    if few and not quantized:
        return 2, 4
    free = isa.vector_registers - 2 - isa.temporaries  # one for inputs, one for a product
    if quantized and isa.by_pairs:  # LLVM keeps both halves of such weights
        return 1, min(MOST_CHAINS // 2, free // 3)
    return 1, min(MOST_CHAINS, free // 2)


def parts(isa: Isa, quantized: bool) -> int:
    """Return how many steps are written out, of which each takes the weights of the next column.

    They share a load of inputs where instructions multiply by an element of a register. Where
    products are plain multiplications, LLVM would add the inputs of two steps and multiply once,
    were the weights the same.
    """
    group, size = isa.group if quantized else 1, np.dtype(isa.staged).itemsize if quantized else 4
    if quantized and isa.matrix is not None:
        return 1
    if isa.by_element:
        return isa.vector_bytes // (size * group)
    return 4 if quantized and group == 1 else 1


@dataclass(frozen=True)
class Product:
    """What one instruction, or the few that make a dot product, multiplies.

    Attributes:
        inputs: elements of x, for every lane the same or a matrix.
        weights: elements.
        macs: multiply-accumulates.
    """

    inputs: int
    weights: int
    macs: int


def product(isa: Isa, quantized: bool) -> Product:
    """Return the widest product of a set: of matrices where it has them."""
    if quantized and isa.matrix is not None:
        return Product(inputs=16, weights=16, macs=32)  # [2, 8] by [8, 2]
    group = isa.group if quantized else 1
    return Product(inputs=group, weights=isa.lanes * group, macs=isa.lanes * group)


def peak_macs(isa: Isa, quantized: bool) -> int:
    """Return the multiply-accumulates of one call of the kernel."""
    rows, columns = chains(isa, quantized)
    return PIECES * STEPS * rows * columns * product(isa, quantized).macs


def peak_sizes(isa: Isa, quantized: bool) -> tuple[int, int, int]:
    """Return the elements of the kernel's arguments x, weights and y."""
    rows, columns = chains(isa, quantized)
    one = product(isa, quantized)
    return (
        STEPS * rows * one.inputs,
        columns * one.weights,
        PIECES * rows * columns * isa.lanes,
    )


def peak(name: str, isa: Isa, weights_dtype: str) -> Any:
    """Generate the kernel: `y[piece, row, column]` is the sum of `x[step, row] · w[column + part]`.

    Arguments of the kernel: x `[steps / parts, rows, parts, inputs]` (float32, or staged), weights
    `[columns, weights]` (float32; int8 or int16, in the order that the set's product takes them), y
    `[pieces, rows, columns, lanes]` (float32 or int32).
    """
    quantized = weights_dtype != "float32"
    rows, columns = chains(isa, quantized)
    one, lanes = product(isa, quantized), isa.lanes
    together = parts(isa, quantized)
    sizes, dtype = peak_sizes(isa, quantized), "int32" if quantized else "float32"
    kernel = Kernel(name)
    x = kernel.argument("x", isa.staged if quantized else "float32", sizes[0])
    weights = kernel.argument("weights", weights_dtype, sizes[1])
    y = kernel.argument("y", dtype, sizes[2])
    with kernel.loop("piece", PIECES, parallel=True) as piece:
        width = one.weights
        vectors = [kernel.let("w", load(weights, i * width, width)) for i in range(columns)]
        held = [
            [kernel.registers("held", dtype, lanes) for _ in range(columns)] for _ in range(rows)
        ]
        for accumulator in (a for accumulators in held for a in accumulators):
            kernel.store(accumulator, 0, splat(0, dtype, lanes), lanes)
        with kernel.loop("step", STEPS // together) as step:
            size = together * one.inputs
            loaded = [
                kernel.let("x", load(x, (step * rows + row) * size, size)) for row in range(rows)
            ]
            for part, row in itertools.product(range(together), range(rows)):
                inputs = lanes_of(loaded[row], part * one.inputs, one.inputs, size)
                for column, accumulator in enumerate(held[row]):
                    vector, total = vectors[(column + part) % columns], load(accumulator, 0, lanes)
                    if quantized and isa.matrix is not None:
                        total = isa.matrix(total, inputs, vector)
                    elif quantized:
                        total = isa.dot(total, inputs, vector)
                    else:
                        total = total + repeat(inputs, lanes) * vector
                    kernel.store(accumulator, 0, total, lanes)
        for row, accumulators in enumerate(held):
            for column, accumulator in enumerate(accumulators):
                at = ((piece * rows + row) * columns + column) * lanes
                kernel.store(y, at, load(accumulator, 0, lanes), lanes)
    return kernel.finish()
