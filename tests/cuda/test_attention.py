"""Attention on CUDA: one fused kernel, of any sizes and places, in every float format."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from edgepress.targets.cuda.attention import Arrangement, AttentionShape, arrange, attention
from edgepress.targets.cuda.places import CudaPlace, place
from edgepress.targets.float_format import FloatFormat
from edgepress.targets.load import load_target
from edgepress.targets.lowering.build import lower
from edgepress.targets.program import Array
from tests.cuda.emulation import emulate
from tests.cuda.test_rows import program_of
from tests.graphs import answers
from tests.targets.attention_forms import FORMS
from tests.targets.kernels import Case
from tests.targets.test_attention import inputs_for, shares

TARGET = load_target("cuda-sm90")
ERRORS: dict[FloatFormat, float] = {"float32": 3e-6, "tf32": 2e-3, "float16": 2e-3}
"""Of the largest result."""
Sizes = tuple[int, int, int, int, int, int]
ORDERS = {"q": (0, 2, 1, 3), "k": (0, 2, 1, 3), "v": (0, 2, 1, 3), "m": (0, 1, 2, 3)}


def place_of(array: Array, order: Sequence[int]) -> CudaPlace:
    """Where `[batch, heads, rows, columns]` lies in an array whose axes are permuted."""
    view = array.transpose(order)
    strides = [
        0 if n == 1 else s // array.itemsize for n, s in zip(view.shape, view.strides, strict=True)
    ]
    batch, head, row, column = strides
    sizes = view.shape
    return place(
        str(array.dtype),
        0,
        (batch, head, row, column or 1),
        (sizes[0], sizes[1], sizes[2], sizes[3]),
    )


def attention_case(
    sizes: Sizes,
    mask: tuple[int, int, int, int] | None = None,
    products: FloatFormat = "float32",
    *,
    turned_keys: bool = False,
    by_head: bool = False,
    scale: float = 0.0,
    zero_rows: bool = False,
    spread: float = 1.0,
    multiprocessors: int = 8,
    stored: Sequence[str] = (),
) -> Case:
    """Random operands of `(batch, heads, queries, keys, width, value width)`.

    The mask has the given shape, and hides many keys. `stored`: dtypes of the operands and y.
    """
    batch, heads, queries, keys, width, value_width = sizes
    random = np.random.default_rng([*sizes])
    default = "float16" if products == "float16" else "float32"
    *kinds, result = stored or [default] * 5
    q, k, v = (
        (random.standard_normal(shape) * spread).astype(kind)
        for kind, shape in zip(
            kinds,
            (
                (batch, queries, heads, width),
                (batch, keys, heads, width),
                (batch, keys, heads, value_width),
            ),
            strict=False,
        )
    )
    scale = float(np.float32(scale or width**-0.5))
    scores = np.einsum("bqhw,bkhw->bhqk", q.astype(np.float64), k.astype(np.float64)) * scale
    arguments, orders = [q, k, v], dict(ORDERS)
    if mask is not None:
        hidden = random.random(mask) < 0.4
        hidden[..., 0] = False
        hidden[..., -1, :] |= zero_rows
        added = np.where(hidden, -np.inf, random.standard_normal(mask)).astype(kinds[3])
        scores += added
        arguments.append(added)
    wanted = np.einsum("bhqk,bkhw->bhqw", shares(scores, zero_rows), v.astype(np.float64))
    if turned_keys:
        arguments[1] = np.ascontiguousarray(k.transpose(0, 2, 3, 1))
        orders["k"] = (0, 1, 3, 2)
    if not by_head:
        wanted = wanted.transpose(0, 2, 1, 3)
    wanted = np.ascontiguousarray(wanted.astype(result))
    places = {
        name: place_of(array, order)
        for (name, order), array in zip(orders.items(), arguments, strict=False)
    }
    shape = AttentionShape(
        *sizes,
        query=places["q"],
        key=places["k"],
        value=places["v"],
        mask=places.get("m"),
        output=place_of(wanted, (0, 1, 2, 3) if by_head else (0, 2, 1, 3)),
        scale=scale,
        zero_rows=zero_rows,
    )
    return Case(
        lambda name: attention(name, shape, products, multiprocessors),
        tuple(arguments),
        wanted,
        f"{sizes} {mask} {products} {multiprocessors}",
    )


def check(cases: Sequence[Case], error: float) -> None:
    """Emulate cases together and compare them with float64."""
    program, given = program_of(cases)
    results = emulate(program, given)
    for index, case in enumerate(cases):
        got, wanted = (a.astype(np.float64) for a in (results[f"k{index}_out"], case.wanted))
        assert np.isfinite(wanted).all(), case.what
        difference = np.abs(got - wanted).max()
        assert difference <= error * np.abs(wanted).max(), (case.what, difference)


def grid(products: FloatFormat) -> list[Case]:
    return [
        attention_case((1, 2, 17, 128, 32, 32), (1, 1, 17, 128), products),
        attention_case((2, 3, 5, 7, 3, 5), None, products, turned_keys=True, by_head=True),
        attention_case((2, 2, 3, 21, 17, 40), (2, 1, 1, 21), products, zero_rows=True),
        attention_case((1, 1, 1, 1, 1, 1), (1, 1, 1, 1), products),
        attention_case((1, 1, 70, 150, 24, 64), None, products, multiprocessors=1),
        attention_case((1, 2, 33, 40, 8, 8), (1, 2, 33, 40), products, multiprocessors=2),
    ]


@pytest.mark.parametrize("products", ERRORS)
def test_kernels(products: FloatFormat) -> None:
    check(grid(products), ERRORS[products])


def test_large_scores() -> None:
    cases = [
        attention_case((1, 2, 4, 300, 8, 8), spread=30.0),
        attention_case((1, 1, 7, 20, 6, 4), (1, 1, 7, 20), zero_rows=True, scale=-2.0),
    ]
    check(cases, 2e-5)  # of scores in the hundreds, a last bit counts


def test_wide_heads() -> None:
    cases = [
        attention_case((1, 1, 9, 40, 128, 128)),
        attention_case((1, 1, 3, 33, 160, 300)),  # values in slices
        attention_case((1, 1, 3, 300, 1300, 140), (1, 1, 3, 300), zero_rows=True),  # no tile fits
    ]
    check(cases, ERRORS["float32"])


def test_operands_of_both_float_types() -> None:
    stored = ("float32", "float16", "float16", "float32", "float32")
    check(
        [attention_case((1, 2, 20, 24, 16, 16), (1, 1, 1, 24), "float16", stored=stored)],
        ERRORS["float16"],
    )


def test_not_a_number_stays() -> None:
    case = attention_case((1, 1, 3, 5, 4, 4), (1, 1, 3, 5))
    q, _, _, mask = case.arguments
    q[0, 1] = np.nan
    mask[0, 0, 2] = -np.inf
    program, given = program_of([case])
    (got,) = emulate(program, given).values()
    np.testing.assert_array_equal(np.isnan(got[0, :, 0, 0]), [False, True, True])
    np.testing.assert_allclose(got[0, 0], case.wanted[0, 0], rtol=1e-5)


def shape_of_sizes(sizes: Sizes) -> AttentionShape:
    where = CudaPlace("float32", 0, (0, 0, 1, 1), 1)
    return AttentionShape(
        *sizes, query=where, key=where, value=where, mask=None, output=where, scale=1.0
    )


def test_few_rows_fill_a_large_gpu_and_many_share_keys() -> None:
    few, many = shape_of_sizes((1, 12, 128, 128, 32, 32)), shape_of_sizes((8, 16, 512, 512, 64, 64))
    assert arrange(few, 4, 132) == Arrangement(1, 4, 32)
    assert arrange(few, 4, 8) == Arrangement(4, 1, 64)
    assert arrange(many, 2, 132) == Arrangement(4, 1, 64)
    assert arrange(shape_of_sizes((1, 1, 4, 4, 5000, 4)), 4, 132) is None


@pytest.mark.parametrize(
    "name", ["one projection, split and sliced", "two masks", "channels first"]
)
def test_compiled_graphs(name: str) -> None:
    model = FORMS[name].model()
    given = inputs_for(model)
    (wanted,) = answers(model, given)
    got = emulate(lower(model, TARGET), given)["y"]
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-6)
