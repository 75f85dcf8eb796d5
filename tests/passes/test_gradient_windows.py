from __future__ import annotations

import pytest

from edgepress.passes import _gradient_windows
from edgepress.passes._gradient_rules import GRADIENTS
from edgepress.passes._gradients import open_gradients
from edgepress.passes.base import PassRefused
from tests.passes.finite_differences import Case, case, check, spaced

SAME = ("SAME_UPPER", "SAME_LOWER", "VALID")


def conv(attributes: str, x: tuple[int, ...], w: tuple[int, ...]) -> Case:
    body = f"y = Conv <{attributes}> (x, w, b)"
    return case(body, x=spaced(*x, seed=1), w=spaced(*w), b=spaced(w[0]))


def conv_transpose(attributes: str, x: tuple[int, ...], w: tuple[int, ...]) -> Case:
    body = f"y = ConvTranspose <{attributes}> (x, w)"
    return case(body, x=spaced(*x, seed=1), w=spaced(*w))


def pool(operator: str, attributes: str, *x: int, opset: int = 18) -> Case:
    return case(f"y = {operator} <{attributes}> (x)", opset=opset, x=spaced(*x))


CONVS = [
    conv("pads=[1,1,1,1]", (1, 3, 4, 4), (2, 3, 3, 3)),
    conv("strides=[2,3]", (2, 2, 6, 7), (3, 2, 3, 2)),
    # a row and a column that no window reaches
    conv("strides=[2,2], pads=[0,1,0,0]", (1, 2, 6, 6), (2, 2, 3, 2)),
    conv("pads=[2,0,1,3]", (1, 2, 4, 5), (2, 2, 3, 4)),
    conv("dilations=[2,1], strides=[1,2], pads=[1,1,1,1]", (1, 2, 6, 5), (2, 2, 3, 2)),
    conv("group=2, pads=[1,1,1,1]", (1, 4, 4, 4), (6, 2, 3, 3)),
    conv("group=3, strides=[2,2], pads=[1,1,1,1]", (1, 3, 5, 5), (6, 1, 3, 3)),
    conv("strides=[3]", (2, 2, 11), (3, 2, 2)),
    conv("group=2, strides=[2,2]", (3, 4, 4, 5), (4, 2, 2, 3)),
    case("y = Conv (x, w)", x=spaced(1, 2, 3, 3), w=spaced(2, 2, 3, 3, seed=1)),
    conv("pads=[1,0,1,0,1,1], strides=[1,2,1]", (1, 2, 3, 4, 3), (2, 2, 2, 2, 2)),
    *(conv(f'auto_pad="{p}", strides=[2,2]', (1, 2, 5, 6), (2, 2, 3, 3)) for p in SAME),
    *(conv(f'auto_pad="{p}", strides=[3,3]', (1, 2, 7, 8), (2, 2, 2, 2)) for p in SAME),
    conv('auto_pad="VALID", dilations=[2,1]', (1, 2, 6, 5), (2, 2, 3, 4)),
]
TRANSPOSED = [
    conv_transpose("pads=[0,0,0,0]", (1, 2, 3, 3), (2, 3, 3, 3)),
    conv_transpose("strides=[2,2], pads=[1,1,1,1]", (1, 2, 4, 4), (2, 3, 4, 4)),
    conv_transpose("strides=[2,3], output_padding=[1,2]", (1, 2, 3, 3), (2, 2, 3, 2)),
    conv_transpose(
        "strides=[3,2], pads=[0,1,2,1], output_padding=[2,1]", (2, 2, 3, 3), (2, 2, 3, 3)
    ),
    conv_transpose("dilations=[2,1], strides=[2,1], pads=[1,0,0,1]", (1, 2, 3, 4), (2, 2, 2, 3)),
    conv_transpose("group=2, strides=[2,2]", (1, 4, 3, 3), (4, 3, 2, 2)),
    conv_transpose("group=3", (1, 3, 3, 3), (3, 1, 3, 3)),
    conv_transpose("group=2", (3, 4, 3, 3), (4, 3, 2, 2)),
    case(
        "y = ConvTranspose <group=2> (x, w, b)",
        x=spaced(2, 2, 3, 3),
        w=spaced(2, 3, 2, 2, seed=1),
        b=spaced(6),
    ),
    conv_transpose("strides=[2], pads=[1,0], output_padding=[1]", (1, 2, 5), (2, 3, 3)),
    conv_transpose("strides=[2,1,1]", (1, 2, 2, 3, 2), (2, 2, 2, 2, 2)),
    conv_transpose('auto_pad="VALID", strides=[2,2]', (1, 2, 3, 3), (2, 2, 3, 3)),
]
POOL_GEOMETRIES = [
    "kernel_shape=[2,2], strides=[2,2]",
    "kernel_shape=[3,2], strides=[2,1], pads=[1,0,0,1]",
    "kernel_shape=[3,3], pads=[1,1,1,1]",
    "kernel_shape=[3,3], strides=[2,2], ceil_mode=1",
    "kernel_shape=[2,3], strides=[3,2], pads=[1,1,1,1], ceil_mode=1",
    *(f'kernel_shape=[3,2], strides=[2,2], auto_pad="{p}"' for p in SAME),
]
POOLS = [
    *(pool("MaxPool", geometry, 1, 2, 6, 6) for geometry in POOL_GEOMETRIES),
    pool("MaxPool", "kernel_shape=[2,2], dilations=[2,3], pads=[1,1,1,1]", 1, 2, 6, 6),
    pool("MaxPool", "kernel_shape=[3], strides=[2], pads=[1,1]", 2, 3, 7),
    pool("MaxPool", "kernel_shape=[2,2,2]", 2, 2, 3, 3, 3),
    *(
        pool("AveragePool", f"{geometry}, count_include_pad={include}", 1, 2, 6, 6)
        for geometry in POOL_GEOMETRIES
        for include in (0, 1)
    ),
    *(
        pool(
            "AveragePool",
            f"kernel_shape=[2,3], dilations=[3,2], pads=[1,1,1,1], count_include_pad={include}",
            *(1, 2, 6, 6),
            opset=19,
        )
        for include in (0, 1)
    ),
    pool("AveragePool", "kernel_shape=[3], strides=[2], pads=[1,0]", 2, 3, 7),
    pool("AveragePool", "kernel_shape=[2,2,2], pads=[0,1,0,1,0,0]", 2, 2, 3, 3, 3),
]
CASES = [*CONVS, *TRANSPOSED, *POOLS]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_gradient_is_the_limit_of_differences(case: Case) -> None:
    check(case)


def test_every_rule_of_this_file_has_a_case() -> None:
    rules = {op for op, r in GRADIENTS.items() if r.__module__ == _gradient_windows.__name__}
    assert {case.operator for case in CASES} == rules


def refusal(made: Case) -> str:
    model = made.model()
    with pytest.raises(PassRefused) as refused:
        open_gradients("test", model, list(model.graph.inputs))
    return str(refused.value)


@pytest.mark.parametrize("attributes", ['auto_pad="SAME_UPPER"', "output_shape=[5,5]"])
def test_a_transposed_convolution_that_chooses_its_padding_is_refused(attributes: str) -> None:
    text = refusal(conv_transpose(f"{attributes}, strides=[2,2]", (1, 2, 3, 3), (2, 2, 3, 3)))
    assert "node 'ConvTranspose_0'" in text
    assert "it chooses its own padding" in text


def test_column_major_indices_are_refused() -> None:
    text = refusal(pool("MaxPool", "kernel_shape=[2,2], storage_order=1", 1, 2, 4, 4))
    assert "it answers indices in column-major order" in text
