"""Ranges end where the functions behind them are flat."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from edgepress.calibration.base import Array, Range
from edgepress.passes import quantize_int8
from edgepress.passes._flat_ends import without_flat_ends
from edgepress.passes._int8_rules import plan
from edgepress.passes._scales import sources
from tests.graphs import random
from tests.passes.int8_nets import made, quantized, sqnr_db

NUMBERS = {"three": 3, "zero": 0, "six": 6, "root": 2**0.5, "one": 1, "half": 0.5}


def net_of(body: str, outputs: str = "float[1,4] y") -> ir.Model:
    weights: dict[str, Array] = {n: np.array(v, np.float32) for n, v in NUMBERS.items()}
    signature = f"(float[1,4] x) => ({outputs})"
    return made(signature, f"c = Gemm(x, w) {body}", opset=20, w=random(4, 4), **weights)


def narrowed(
    body: str, outputs: str = "float[1,4] y", kept: str = "", low: float = -20, high: float = 30
) -> Range:
    """What is left of the range of `c`; results span from -1 to 1 unless they say else."""
    model = net_of(body, outputs)
    planned = plan(model, {})
    roots = sources(planned)
    ranges = dict.fromkeys(roots.values(), Range(-1.0, 1.0))
    by_name = {value.name: value for value in roots}
    ranges[by_name["c"]] = Range(low, high)
    return without_flat_ends(ranges, roots, planned, 20, {by_name[kept]} if kept else ())[
        by_name["c"]
    ]


FLAT = {
    # from here to there nothing changes by more than a quarter of 2 / 255
    "y = HardSigmoid <alpha=0.16666667> (c)": (-3, 3),
    "s = HardSigmoid <alpha=0.16666667> (c) y = Mul(c, s)": (-3, 30),
    "a = Add(c, three) b = Clip(a, zero, six) d = Div(b, six) y = Mul(b, d)": (-2.89, 3),
    "y = Sigmoid(c)": (np.log(0.5 / 255), -np.log(0.5 / 255)),
    "y = Tanh(c)": (-np.arctanh(1 - 0.5 / 255), np.arctanh(1 - 0.5 / 255)),
    "y = Gelu(c)": (-3.24, 30),
    "y = LeakyRelu(c)": (-19.8, 30),
    # two readers, each flat somewhere else
    "p = HardSigmoid <alpha=0.16666667> (c) q = Neg(p) r = Max(c, three) y = Concat <axis=0> (q, r)"
    : (-3, 30),
}  # fmt: skip


@pytest.mark.parametrize("body", FLAT)
def test_ranges_end_where_functions_do(body: str) -> None:
    found = narrowed(body, "float[N,4] y" if "Concat" in body else "float[1,4] y")
    low, high = FLAT[body]
    assert found.low == pytest.approx(low, abs=0.06)
    assert found.high == pytest.approx(high, abs=0.06)


KEPT = [
    ("y = Add(c, x)", "float[1,4] y", ""),  # not a function of c alone
    ("y = HardSigmoid(c)", "float[1,4] y, float[1,4] c", ""),  # c is an output
    ("s = Sigmoid(c) y = Gemm(c, w)", "float[1,4] y, float[1,4] s", ""),  # a layer reads it too
    ("y = HardSigmoid(c)", "float[1,4] y", "c"),
    ("y = HardSigmoid(c)", "float[1,4] y", "y"),
    ("t = Transpose(c) y = Sigmoid(t)", "float[4,1] y", ""),  # a carrier reads it
]


@pytest.mark.parametrize(("body", "outputs", "kept"), KEPT)
def test_other_ranges_stay(body: str, outputs: str, kept: str) -> None:
    assert narrowed(body, outputs, kept) == Range(-20, 30)


def test_zero_stays_inside() -> None:
    below = narrowed("y = HardSigmoid(c)", low=-20, high=-10)
    assert below.low == pytest.approx(-2.5, abs=0.02)
    assert below.high == 0
    above = narrowed("y = HardSigmoid(c)", low=10, high=20)
    assert above.low == 0
    assert above.high == pytest.approx(2.5, abs=0.02)
    assert narrowed("y = Sigmoid(c)", low=0, high=0) == Range(0.0, 0.0)


@pytest.mark.filterwarnings("ignore:.*overflow.*")
def test_what_is_not_finite_changes_nothing() -> None:
    assert narrowed("e = Exp(c) y = Neg(e)", low=-200, high=200) == Range(-200, 200)


def test_the_best_method_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide sums before a hard-swish: most of their range is where it is 0."""
    body = ["c0 = Conv <pads=[1,1,1,1]> (x, w0) v0 = HardSwish(c0)"]
    for i in range(1, 4):
        body.append(f"c{i} = Conv <pads=[1,1,1,1]> (v{i - 1}, w{i}) v{i} = HardSwish(c{i})")
    weights = {f"w{i}": random(16, 16, 3, 3, seed=i) / 3 for i in range(4)}
    text = "(float[1,16,8,8] x) => (float[1,16,8,8] v3)"
    model = made(text, " ".join(body), opset=17, **weights)
    whole, without = model.clone(), model.clone()
    quantized(without, method="best")
    monkeypatch.setattr(quantize_int8, "without_flat_ends", lambda ranges, *_: ranges)
    quantized(whole, method="best")
    assert sqnr_db(model, without) > sqnr_db(model, whole) + 1
