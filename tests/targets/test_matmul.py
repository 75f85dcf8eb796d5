"""Products of two tensors: which MatMuls get a node, and what its kernel answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgepress.targets.isa.base import Isa, load_isa
from edgepress.targets.lowering.floats import claim
from edgepress.targets.lowering.products import fuse_products
from edgepress.targets.program import Array
from edgepress.targets.schedules.matmul import MatMulShape, matmul
from edgepress.targets.schedules.panel import Place
from tests.graphs import answers, feeds, net, random
from tests.targets.interpret import run_program
from tests.targets.kernels import Case, compare, program_of, target_of
from tests.targets.qdq import merged_graphs, shaped
from tests.targets.test_attention import ERROR, ISAS
from tests.targets.test_bit_equality import EMULATED, emulate, need_board

GRAPHS = {
    "batches": ("float[2,3,5,7] a, float[2,3,7,9] b", "y = MatMul(a, b)"),
    "one matrix for all": ("float[2,3,5,7] a, float[7,9] b", "y = MatMul(a, b)"),
    "one batch for all": ("float[3,5,7] a, float[2,1,7,9] b", "y = MatMul(a, b)"),
    "the left one for all": ("float[5,7] a, float[4,7,9] b", "y = MatMul(a, b)"),
    "transposed": (
        "float[2,9,7,3] a, float[2,3,5,7] b",
        "t = Transpose <perm=[0,3,1,2]> (a) u = Transpose <perm=[0,1,3,2]> (b) y = MatMul(t, u)",
    ),
    "neither neighbours": (
        "float[3,5,7] a, float[7,9,3] b",
        "u = Transpose <perm=[2,0,1]> (b) y = MatMul(a, u)",
    ),
    "weights on the left": ("float[2,7,9] b", "y = MatMul(w, b)"),
    "weights for every head": ("float[1,3,5,7] a", "y = MatMul(a, heads)"),
}
WEIGHTS = {"w": random(5, 7), "heads": random(3, 7, 4)}


def operators(body: str, inputs: str, weights: dict[str, Array]) -> list[str]:
    model = shaped(net(f"({inputs}) => (float y)", body, weights))
    found = claim(fuse_products(model), {})
    return [f"{node.domain}{node.op_type}" for node in found.graph]


@pytest.mark.parametrize("name", GRAPHS)
def test_products_of_two_tensors_get_a_node(name: str) -> None:
    inputs, body = GRAPHS[name]
    weights = {key: array for key, array in WEIGHTS.items() if key in body}
    wanted = ["edgepressMatMul"]
    if name == "neither neighbours":
        wanted = ["Transpose", *wanted]
    assert operators(body, inputs, weights) == wanted


@pytest.mark.parametrize(
    ("inputs", "body", "weights"),
    [
        ("float[5,7] a", "y = MatMul(a, w)", {"w": random(7, 9)}),
        ("float[7] a, float[7,9] b", "y = MatMul(a, b)", {}),
        ("float[5,7] a, float[7] b", "y = MatMul(a, b)", {}),
        ("double[5,7] a, double[7,9] b", "c = MatMul(a, b) y = Cast <to=1> (c)", {}),
        ("float[2,1,3,5,7] a, float[1,4,1,7,9] b", "y = MatMul(a, b)", {}),
    ],
)
def test_other_products_stay(inputs: str, body: str, weights: dict[str, Array]) -> None:
    assert "MatMul" in operators(body, inputs, weights)


def test_compiled_graphs() -> None:
    models = []
    for inputs, body in GRAPHS.values():
        weights = {key: array for key, array in WEIGHTS.items() if key in body}
        models.append(shaped(net(f"({inputs}) => (float y)", body, weights)))
    given = [feeds(model) for model in models]
    program, joined = merged_graphs(models, target_of(ISAS[-1]), given)
    results = run_program(program, target_of(ISAS[-1]), joined)
    for index, (model, feed) in enumerate(zip(models, given, strict=True)):
        (wanted,) = answers(model, feed)
        np.testing.assert_allclose(results[f"g{index}_y"], wanted, rtol=1e-5, atol=1e-5)


def product_case(
    isa: Isa, sizes: tuple[int, int, int, int, int], *, turned: bool = False, shared: bool = False
) -> Case:
    """Random matrices of `(batch, heads, rows, depth, width)`.

    `turned`: each matrix lies transposed; `shared`: heads have the same right matrix.
    """
    batch, heads, rows, depth, width = sizes
    random = np.random.default_rng([*sizes])
    left = random.standard_normal((batch, heads, rows, depth)).astype(np.float32)
    right = random.standard_normal((batch, 1 if shared else heads, depth, width))
    right = right.astype(np.float32)
    wanted = (left.astype(np.float64) @ right.astype(np.float64)).astype(np.float32)
    arguments, places = [], []
    for matrix in (left, right):
        kept = np.ascontiguousarray(matrix.swapaxes(2, 3)) if turned else matrix
        view = kept.swapaxes(2, 3) if turned else kept
        by = [0 if n == 1 else s // 4 for n, s in zip(view.shape, view.strides, strict=True)]
        by = [*by[:2], by[2] or 1, by[3] or 1]
        arguments.append(kept)
        places.append(Place(kept.size, 0, *by))
    shape = MatMulShape(*sizes, *places)
    what = f"{isa.name} {sizes} {turned} {shared}"
    return Case(lambda name: matmul(name, shape, isa), tuple(arguments), wanted, what)


def grid(isa: Isa) -> list[Case]:
    return [
        product_case(isa, (2, 3, 17, 19, 37)),
        product_case(isa, (2, 2, 5, 35, 18), turned=True),
        product_case(isa, (1, 1, 1, 1, 1)),
        product_case(isa, (1, 2, 4, 3, 5), shared=True),
    ]


@pytest.mark.parametrize("isa", ISAS)
def test_kernels(isa: str) -> None:
    cases = [*grid(load_isa(isa)), product_case(load_isa(isa), (1, 2, 130, 64, 150))]
    program, given = program_of(cases)
    results = run_program(program, target_of(isa), given)
    for index, case in enumerate(cases):
        error = np.abs(results[f"k{index}_out"] - case.wanted).max()
        assert error <= ERROR * np.abs(case.wanted).max(), case.what


@pytest.mark.parametrize("isa", [isa for isa in EMULATED if isa in ("neon", "neon_armv7")])
def test_other_instruction_sets(isa: str, tmp_path: Path) -> None:
    need_board(isa)
    cases = grid(load_isa(isa))[:2]
    program, given = program_of(cases)
    compare(cases, emulate(program, isa, tmp_path, given))
