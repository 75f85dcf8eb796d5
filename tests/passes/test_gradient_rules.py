from __future__ import annotations

import itertools

import numpy as np
import pytest

from edgepress.passes._gradient_rules import GRADIENTS
from edgepress.passes._gradients import open_gradients
from edgepress.passes.base import PassRefused
from tests.graphs import Array
from tests.passes.finite_differences import Case, case, check, ints, positive, spaced

#: Some are near 0, others far from it.
X, FAR = spaced(6, 8), spaced(4, 6, scale=2)
#: Two operands that are both repeated: to `[2, 3, 4]`.
A, B = spaced(2, 1, 4), spaced(3, 1, seed=3)
SCALE, SHIFT = positive(3), spaced(3, seed=1)


def pointwise(operator: str, attributes: str = "", x: Array = X, opset: int = 18) -> Case:
    return case(f"y = {operator} {attributes} (x)", opset=opset, x=x)


def numbers(**numbers: float) -> dict[str, Array]:
    return {name: np.array(number, np.float64) for name, number in numbers.items()}


POINTWISE = [
    pointwise("Abs"),
    pointwise("Elu"),
    pointwise("Elu", "<alpha=0.3>"),
    pointwise("Erf", x=spaced(4, 6)),
    pointwise("Exp"),
    pointwise("Gelu", opset=20),
    pointwise("Gelu", '<approximate="none">', opset=20),
    pointwise("Gelu", '<approximate="tanh">', opset=20),
    pointwise("HardSigmoid", x=FAR),
    pointwise("HardSigmoid", "<alpha=0.4, beta=0.3>", x=FAR),
    pointwise("HardSwish", x=FAR),
    pointwise("Identity"),
    pointwise("LeakyRelu"),
    pointwise("LeakyRelu", "<alpha=0.3>"),
    pointwise("Log", x=positive(4, 3)),
    pointwise("Mish"),
    pointwise("Neg"),
    pointwise("Reciprocal", x=positive(4, 3)),
    pointwise("Relu"),
    pointwise("Selu"),
    pointwise("Selu", "<alpha=0.7, gamma=2.0>"),
    pointwise("Sigmoid"),
    pointwise("Softplus"),
    pointwise("Sqrt", x=positive(4, 3)),
    pointwise("Swish", opset=24),
    pointwise("Swish", "<alpha=1.7>", opset=24),
    pointwise("Tanh"),
    case("h = Cast <to=11> (x) y = Cast <to=1> (h)", x=X),
    case("y = Dropout(x)", x=X),
    case("y, mask = Dropout(x, ratio)", numbers(ratio=0.7), x=X),
    case("y = Dropout(x, ratio, no)", numbers(ratio=0.7) | {"no": np.array(False)}, x=X),
    case("y = Clip(x, low, high)", numbers(low=-1.1, high=2.3), x=FAR),
    case("y = Clip(x, low)", numbers(low=-1.1), x=FAR),
    case("y = Clip(x, , high)", numbers(high=2.3), x=FAR),
    case("y = Clip(x)", x=FAR),
    case("y = PRelu(x, slope)", {"slope": spaced(8)}, x=X),
    case("y = PRelu(x, slope)", {"slope": spaced(3, 1, 1)}, x=spaced(2, 3, 2, 2)),
    case("y = Pow(x, p)", {"p": np.array([0.0, 1, 2, -1.5, 0.5, 3])}, x=positive(4, 6)),
    case("y = Pow(x, p)", {"p": ints(2, 0, 3, 1, 4, 5, 1, 2)}, x=X),
    case("y = Pow(x, p)", {"p": np.array([[2.0], [3.0]])}, x=spaced(3, 1, 2)),
    # the slope of x⁰ is 0 at 0, too
    case("y = Pow(x, p)", {"p": np.array([0.0, 2.0])}, x=np.zeros((3, 2))),
]
BROADCAST = [
    *(case(f"y = {op}(a, b)", a=A, b=B) for op in ("Add", "Sub", "Mul", "Max", "Min")),
    case("y = Div(a, b)", a=A, b=positive(3, 1)),
    *(case(f"y = {op}(x, x)", x=X) for op in ("Add", "Sub", "Mul")),
    case("y = Div(x, x)", x=positive(2, 3)),
    *(case(f"y = {op}(a)", a=A) for op in ("Sum", "Mean", "Max", "Min")),
    *(
        case(f"y = {op}(a, b, c, b)", a=A, b=B, c=spaced(4, seed=5))
        for op in ("Sum", "Mean")
    ),
    *(case(f"y = {op}(a, b, c)", a=A, b=B, c=spaced(4, seed=5)) for op in ("Max", "Min")),
    # equal operands share the gradient, so that it is that of x
    *(case(f"y = {op}(x, x, x)", x=X) for op in ("Max", "Min")),
    case("y = Where(here, a, b)", {"here": np.array([[1], [0], [1]], np.bool_)}, a=A, b=B),
    case("y = Where(here, a, b)", {"here": np.array([1, 0, 0, 1], np.bool_)}, a=B, b=A),
]  # fmt: skip
PRODUCTS = [
    *(
        case("y = MatMul(a, b)", a=spaced(*a), b=spaced(*b, seed=1))
        for a, b in (
            ((3, 4), (4, 2)),
            ((4,), (4, 2)),
            ((3, 4), (4,)),
            ((4,), (4,)),
            ((2, 3, 4), (4, 2)),
            ((3, 4), (2, 4, 2)),
            ((2, 1, 3, 2), (3, 2, 2)),
            ((1, 3, 2), (2, 2, 2)),
            ((4,), (2, 4, 3)),
            ((2, 3, 4), (4,)),
        )
    ),
    case("y = MatMul(x, x)", x=spaced(3, 3)),
    *(
        case(
            f"y = Gemm <transA={flip_a}, transB={flip_b}, alpha=0.5, beta=-2.0> (a, b, c)",
            a=spaced(*(4, 3)[:: -1 if not flip_a else 1]),
            b=spaced(*(4, 2)[:: -1 if flip_b else 1], seed=1),
            c=spaced(*c, seed=2),
        )
        for (flip_a, flip_b), c in zip(
            itertools.product((0, 1), (0, 1)), ((2,), (3, 1), (1, 2), (3, 2)), strict=True
        )
    ),
    case("y = Gemm(a, b, c)", a=spaced(3, 4), b=spaced(4, 2), c=np.array(0.5)),
    case("y = Gemm(a, b)", a=spaced(3, 4), b=spaced(4, 2)),
    case("y = Gemm <transB=1> (x, x)", x=spaced(3, 4)),
]
NORMALIZED = [
    *(
        case(f"y = {operator} {axis} (x)", x=spaced(2, 3, 4))
        for operator in ("Softmax", "LogSoftmax")
        for axis in ("", "<axis=1>", "<axis=-3>")
    ),
    case("y = LayerNormalization(x, s)", {"s": positive(4)}, x=spaced(2, 3, 4)),
    *(
        case(
            f"y = LayerNormalization <axis={axis}, epsilon=0.3> (x, s, b)",
            {"s": positive(3, 4), "b": spaced(3, 4)},
            x=spaced(2, 3, 4),
        )
        for axis in (1, -2)
    ),
    case("y = RMSNormalization(x, s)", {"s": positive(4)}, opset=23, x=spaced(2, 3, 4)),
    case(
        "y = RMSNormalization <axis=1, epsilon=0.3> (x, s)",
        {"s": positive(3, 4)},
        opset=23,
        x=spaced(2, 3, 4),
    ),
    *(
        case(
            f"y = InstanceNormalization {epsilon} (x, s, b)",
            {"s": SCALE, "b": SHIFT},
            x=spaced(2, 3, *extents),
        )
        for epsilon in ("", "<epsilon=0.3>")
        for extents in ((4,), (3, 2))
    ),
    *(
        case(
            f"y = BatchNormalization {epsilon} (x, s, b, m, v)",
            {"s": SCALE, "b": SHIFT, "m": SHIFT, "v": positive(3, seed=2)},
            x=spaced(2, 3, *extents),
        )
        for epsilon in ("", "<epsilon=0.3>")
        for extents in ((), (2, 3))
    ),
]
CASES = [*POINTWISE, *BROADCAST, *PRODUCTS, *NORMALIZED]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_gradient_is_the_limit_of_differences(case: Case) -> None:
    check(case)


def test_every_rule_of_this_file_has_a_case() -> None:
    elsewhere = ("_gradient_axes", "_gradient_windows")
    rules = {op for op, rule in GRADIENTS.items() if not rule.__module__.endswith(elsewhere)}
    assert {case.operator for case in CASES} == rules


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (
            case(
                "y, m2, v2 = BatchNormalization <training_mode=1> (x, s, b, m, v)",
                dict.fromkeys("sbmv", SCALE),
                x=spaced(2, 3),
            ),
            "it trains",
        ),
        (case("y = Dropout(x, , yes)", {"yes": np.array(True)}, x=X), "it trains"),
        (
            case("yes = Less(x, x) no = ReduceMin <keepdims=0> (yes) y = Dropout(x, , no)",
                 opset=20, x=X),
            "its input 'no' is not constant",
        ),
        (
            case("y = BatchNormalization(x, s, b, m, v)", dict.fromkeys("bmv", SCALE),
                 x=spaced(2, 3), s=SCALE),
            "that of its input 's'",
        ),
        (case("y = PRelu(x, s)", x=X, s=spaced(8)), "that of its input 's'"),
        (case("y = Clip(x, s)", x=X, s=np.array(0.5)), "that of its input 's'"),
        (case("y = Pow(x, p)", x=X, p=positive(8)), "its input 'p' is not constant"),
        (
            case("z, m = LayerNormalization(x, s) n = Cast <to=11> (m) y = Add(z, n)",
                 {"s": SCALE}, x=spaced(2, 3)),
            "its output 'm' is read, too",
        ),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused(made: Case, why: str) -> None:
    model = made.model()
    with pytest.raises(PassRefused, match=why) as refused:
        open_gradients("test", model, list(model.graph.inputs))
    assert "choose an importance without gradients, such as l1" in str(refused.value)
