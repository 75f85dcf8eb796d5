"""exp, log, tanh, erf and sigmoid as vector arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tvm import te, tirx

from edgepress.targets.compile import kernel_assembly
from edgepress.targets.load import load_target
from edgepress.targets.program import Array
from edgepress.targets.schedules.generic import schedule
from tests.targets.te_programs import answer, program_of

X86 = load_target("x86-64-v3")
SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e30, -1e30, 1e-42, 88.7, -103.0]


def inputs(low: float, high: float) -> Array:
    random = np.random.default_rng(0)
    small = np.exp(random.uniform(-60, 1, 4000)) * random.choice([-1, 1], 4000)
    values = np.concatenate([SPECIAL, random.uniform(low, high, 8000), small])
    return np.resize(values, 12288).astype(np.float32)


def apply(function: Callable[[Any], Any], x: Array) -> Array:
    source = te.placeholder(x.shape, name="x")
    result = te.compute(x.shape, lambda i: function(source[i]), "y")
    program = program_of(schedule(te.create_prim_func([source, result]), X86))
    text = kernel_assembly(program, X86)
    assert "ymm" in text
    assert "call" not in text.split("kernel:")[1].split(".cfi_endproc")[0]
    return answer(program, X86, {"x": x})


def exact(function: Callable[[float], float], x: Array) -> Array:
    return np.array([function(float(v)) for v in x])


def safe_exp(x: float) -> float:
    return np.inf if x > 709 else math.exp(x)


def any_log(x: float) -> float:
    if x > 0:
        return math.log(x)
    return -np.inf if x == 0 else np.nan


@pytest.mark.parametrize(
    ("function", "reference", "low", "high", "ulps"),
    [
        (tirx.exp, safe_exp, -105, 89, 2),
        (tirx.log, any_log, -1, 1e5, 2),
        (tirx.tanh, math.tanh, -10, 10, 2),
        (tirx.erf, math.erf, -5, 5, 2),
        (tirx.sigmoid, lambda x: 1 / (1 + safe_exp(-x)), -80, 30, 4),
    ],
)
def test_it_is_exact_to_a_few_units_in_the_last_place(
    function: Any, reference: Any, low: float, high: float, ulps: int
) -> None:
    x = inputs(low, high)
    got, wanted = apply(function, x), exact(reference, x)
    with np.errstate(over="ignore"):
        rounded = wanted.astype(np.float32)
    finite = np.isfinite(rounded)
    np.testing.assert_array_equal(got[~finite], rounded[~finite])
    unit = np.spacing(np.maximum(np.abs(rounded[finite]), np.float32(1e-45)))
    assert (np.abs(got[finite] - wanted[finite]) / unit).max() <= ulps
