"""Products of two tensors on CUDA, of any sizes and places, in every float format."""

from __future__ import annotations

import numpy as np
import pytest

from edgepress.targets.cuda.matmul import MatMulShape, matmul
from edgepress.targets.cuda.places import CudaPlace, place
from edgepress.targets.float_format import FloatFormat
from edgepress.targets.load import load_target
from edgepress.targets.lowering.build import lower
from tests.cuda.emulation import emulate
from tests.cuda.test_attention import ERRORS, check
from tests.graphs import answers, feeds, net
from tests.targets.kernels import Case
from tests.targets.qdq import shaped
from tests.targets.test_matmul import GRAPHS, WEIGHTS

TARGET = load_target("cuda-sm90")


def product_case(
    sizes: tuple[int, int, int, int, int],
    products: FloatFormat = "float32",
    *,
    turned: bool = False,
    shared: bool = False,
    multiprocessors: int = 1,
    stored: tuple[str, str, str] | None = None,
) -> Case:
    """Random matrices of `(batch, heads, rows, depth, width)`.

    `turned`: each matrix lies transposed; `shared`: heads have the same right matrix; `stored`:
    dtypes of the operands and the product.
    """
    batch, heads, rows, depth, width = sizes
    random = np.random.default_rng([*sizes])
    kind = "float16" if products == "float16" else "float32"
    stored = stored or (kind, kind, kind)
    left = random.standard_normal((batch, heads, rows, depth)).astype(stored[0])
    right = random.standard_normal((batch, 1 if shared else heads, depth, width)).astype(stored[1])
    wanted = (left.astype(np.float64) @ right.astype(np.float64)).astype(stored[2])
    kept, places = [], list[CudaPlace]()
    for index, matrix in enumerate((left, right)):
        memory = np.ascontiguousarray(matrix.swapaxes(2, 3)) if turned else matrix
        view = memory.swapaxes(2, 3) if turned else memory
        by_batch, by_head, row, column = (
            0 if n == 1 else s // matrix.itemsize
            for n, s in zip(view.shape, view.strides, strict=True)
        )
        height, length = view.shape[2:]
        if turned and index:  # its columns are seen as rows
            row, column, height, length = column, row, length, height
        strides = (by_batch, by_head, row or 1, column or 1)
        places.append(place(stored[index], 0, strides, (batch, heads, height, length)))
        kept.append(memory)
    shape = MatMulShape(
        *sizes, left=places[0], right=places[1], upright=not turned, dtype=stored[2]
    )
    return Case(
        lambda name: matmul(name, shape, products, multiprocessors),
        tuple(kept),
        wanted,
        f"{sizes} {products} {turned} {shared} {multiprocessors}",
    )


@pytest.mark.parametrize("products", ERRORS)
def test_kernels(products: FloatFormat) -> None:
    cases = [
        product_case((2, 3, 17, 19, 37), products),
        product_case((2, 2, 5, 35, 18), products, turned=True),
        product_case((1, 1, 1, 1, 1), products),
        product_case((1, 2, 4, 3, 5), products, shared=True),
        product_case((1, 1, 70, 72, 136), products),
        product_case((1, 1, 70, 72, 136), products, turned=True, multiprocessors=100),
    ]
    check(cases, ERRORS[products])


def test_operands_of_both_float_types() -> None:
    stored = ("float32", "float16", "float32")
    check([product_case((1, 2, 20, 24, 16), "float16", stored=stored)], ERRORS["float16"])


@pytest.mark.parametrize("name", GRAPHS)
def test_compiled_graphs(name: str) -> None:
    inputs, body = GRAPHS[name]
    weights = {key: array for key, array in WEIGHTS.items() if key in body}
    model = shaped(net(f"({inputs}) => (float y)", body, weights))
    given = feeds(model)
    (wanted,) = answers(model, given)
    got = emulate(lower(model, TARGET), given)["y"]
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
