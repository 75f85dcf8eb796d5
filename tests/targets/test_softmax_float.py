"""Softmax of floats, and the power of two that it is made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgepress.targets.isa.base import Isa, load_isa
from edgepress.targets.lowering.floats import claim_float_operators
from edgepress.targets.program import Array
from edgepress.targets.schedules.elementary import exp2_below_zero
from edgepress.targets.schedules.emit import Kernel, load
from edgepress.targets.schedules.softmax import SoftmaxShape
from edgepress.targets.schedules.softmax_float import softmax_float
from tests.graphs import answers, feeds, net
from tests.targets.interpret import run_program
from tests.targets.kernels import Case, compare, program_of, target_of
from tests.targets.qdq import merged_graphs, shaped
from tests.targets.test_attention import ERROR, ISAS
from tests.targets.test_bit_equality import EMULATED, emulate, need_board

SHAPES = [(4, 16, 1), (7, 37, 1), (3, 1, 1), (1, 1000, 1), (2, 5, 35), (1, 3, 1), (9, 70, 2)]


def softmax_case(isa: Isa, sizes: tuple[int, int, int]) -> Case:
    """Rows of which some hold infinities, and one NaN."""
    x = np.random.default_rng([*sizes]).standard_normal(sizes).astype(np.float32) * 20
    if sizes[1] > 2:
        x[:, 1] = -np.inf
        x[0, 2, 0] = 3e38
    with np.errstate(over="ignore"):
        powers = np.exp(x.astype(np.float64) - x.max(1, keepdims=True))
    wanted = (powers / powers.sum(1, keepdims=True)).astype(np.float32)
    shape = SoftmaxShape(*sizes)
    return Case(lambda name: softmax_float(name, shape, isa), (x,), wanted, f"{isa.name} {sizes}")


def errors(cases: list[Case], results: dict[str, Array]) -> list[float]:
    return [
        float(np.abs(results[f"k{index}_out"] - case.wanted).max() / np.abs(case.wanted).max())
        for index, case in enumerate(cases)
    ]


@pytest.mark.parametrize("isa", ISAS)
def test_kernels(isa: str) -> None:
    cases = [softmax_case(load_isa(isa), sizes) for sizes in SHAPES]
    program, given = program_of(cases)
    assert max(errors(cases, run_program(program, target_of(isa), given))) < ERROR


@pytest.mark.parametrize("isa", [isa for isa in EMULATED if isa in ("neon", "neon_armv7")])
def test_other_instruction_sets(isa: str, tmp_path: Path) -> None:
    need_board(isa)
    cases = [softmax_case(load_isa(isa), sizes) for sizes in SHAPES[1:5]]
    program, given = program_of(cases)
    compare(cases, emulate(program, isa, tmp_path, given))


def test_rows_without_a_finite_value_are_not_numbers() -> None:
    x = np.array([[-np.inf] * 5, [0, np.nan, 0, 0, 0], [np.inf, 0, 0, 0, 0], [1] * 5], np.float32)
    isa = load_isa(ISAS[-1])
    case = Case(lambda name: softmax_float(name, SoftmaxShape(4, 5), isa), (x,), x, "not finite")
    program, given = program_of([case])
    (got,) = run_program(program, target_of(ISAS[-1]), given).values()
    np.testing.assert_array_equal(np.isnan(got[:, 0]), [True, True, True, False])
    np.testing.assert_allclose(got[3], np.full(5, 0.2), rtol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
def test_powers_of_two(isa: str) -> None:
    lanes = load_isa(isa).lanes
    x = np.concatenate([np.linspace(-126, 0, 40_000), [-126.5, -127, -128, -1e30, -np.inf, np.nan]])
    x = np.resize(x, -(-x.size // lanes) * lanes).astype(np.float32)

    def powers(name: str) -> object:
        kernel = Kernel(name)
        source, target = (kernel.argument(which, "float32", x.size) for which in "xy")
        with kernel.loop("i", x.size // lanes) as i:
            value = exp2_below_zero(load(source, i * lanes, lanes), kernel.let)
            kernel.store(target, i * lanes, value, lanes)
        return kernel.finish()

    program, given = program_of([Case(powers, (x,), x, "powers of two")])
    (got,) = run_program(program, target_of(isa), given).values()
    exact = np.exp2(x[:40_000].astype(np.float64))
    assert np.abs((got[:40_000] - exact) / exact).max() < 1.2e-7
    assert got[40_000] < 2.0**-126
    np.testing.assert_array_equal(got[40_001:40_005], 0)
    assert np.isnan(got[40_005])
    assert got[39_999] == 1


@pytest.mark.parametrize(
    ("shape", "attribute", "opset"),
    [
        ((2, 3, 4), "", 17),
        ((2, 3, 4), "<axis=1>", 17),
        ((2, 3, 4), "<axis=-3>", 17),
        ((2, 3, 4), "", 11),
        ((2, 3, 4), "<axis=2>", 11),
        ((6,), "", 13),
    ],
)
def test_axes(shape: tuple[int, ...], attribute: str, opset: int) -> None:
    dims = ",".join(map(str, shape))
    text = f"(float[{dims}] x) => (float[{dims}] y)"
    model = shaped(net(text, f"y = Softmax {attribute} (x)", opset=opset))
    assert [node.domain for node in claim_float_operators(model).graph] == ["edgepress"]
    given = feeds(model)
    program, joined = merged_graphs([model], target_of(ISAS[-1]), [given])
    (got,) = run_program(program, target_of(ISAS[-1]), joined).values()
    np.testing.assert_allclose(got, answers(model, given)[0], rtol=1e-6)
