import numpy as np
import onnx_ir as ir
import pytest

from edgepress.targets.lowering.dialect import Builder
from edgepress.targets.lowering.integer_elementwise import add_factors
from edgepress.targets.lowering.integer_pools import fixed_point_factors
from edgepress.targets.lowering.quantization import (
    Quantization,
    Quantized,
    are_powers_of_two,
    exponent,
    factor_attribute,
    multiplier,
    shifts,
)


def wide(scale: float) -> Quantization:
    return Quantization(np.float32(scale), 0, "int16")


def test_clamps_of_8_bits() -> None:
    q = Quantization(np.float32(0.5), 100, "uint8")
    assert q.clamp(0, np.inf) == (100, 255)
    assert q.clamp(-np.inf, np.inf) == (0, 255)
    assert q.clamp(0.75, 6) == (102, 112)
    assert q.clamp(-1e9, -1e9) == (0, 0)
    assert q.clamp(3, -3) == (94, 94)


def test_clamps_of_16_bits() -> None:
    q = wide(0.5)
    assert q.clamp(-np.inf, np.inf) == (-(2**15), 2**15 - 1)
    assert q.clamp(-1000, 1e9) == (-2000, 2**15 - 1)


def test_powers_of_two() -> None:
    assert [exponent(s) for s in (1, 0.5, 2.0**-100, 3, np.float32(0.1))] == [
        0,
        -1,
        -100,
        None,
        None,
    ]
    assert are_powers_of_two(np.float32(4), np.array([0.5, 2], np.float32))
    assert not are_powers_of_two(np.float32(4), np.array([0.5, 3], np.float32))


def test_shifts_stop_where_nothing_changes() -> None:
    ratios = np.array([2.0**-3, 1, 2, 2.0**17, 2.0**40, 2.0**-31, 2.0**-32, 2.0**-90])
    found = shifts(ratios)
    assert found.dtype == np.int32
    assert found.tolist() == [3, 0, -1, -17, -17, 31, 32, 32]


def test_a_shift_needs_powers_of_two_throughout() -> None:
    """Equal scales have the ratio 1; 8-bit nodes of such graphs keep their multiplier."""
    same = np.float32(0.3)
    assert factor_attribute(np.float64(1), same, same) == {"multiplier": 1.0}
    assert factor_attribute(np.float64(0.25), np.float32(0.5), np.float32(2)) == {"shift": 2}
    assert multiplier(np.float64(1e300)) == np.float32(2.0**96)


def test_factors_of_8_bit_sums_have_21_bits() -> None:
    a, b = (Quantization(np.float32(s), 3, "uint8") for s in (0.05, 0.1))
    assert add_factors(a, b)[:2] == (2**20, 2**21)
    assert add_factors(b, a)[:2] == (2**21, 2**20)


@pytest.mark.parametrize(
    "scales", [(1.0, 1.0), (0.1, 0.3), (1.0, 2.0**-15), (1e-6, 1.0), (0.7, 0.70001), (3e-4, 2e-3)]
)
def test_factors_of_16_bit_sums_fit_int32(scales: tuple[float, float]) -> None:
    for first, second in (scales, scales[::-1]):
        a, b, unit = add_factors(wide(first), wide(second))
        assert max(abs(a), abs(b)) <= 2**15
        assert 2**15 * (a + b) <= 2**31
        for factor, scale in ((a, first), (b, second)):
            error = abs(factor * unit - np.float64(np.float32(scale)))
            assert error * 2**15 <= 0.51 * np.float32(max(scales))


def test_factors_of_average_pools() -> None:
    for ratio in (1 / 9, 0.25, 1.0, 2.0**-60, 2.0**-90, 2.0**30, 0.999999999999):
        ratios = np.array([ratio, ratio / 2])
        factors, places = fixed_point_factors(ratios)
        assert factors.dtype == np.int32
        assert places <= 62
        if 2.0**-40 < ratio < 2.0**20:
            assert factors.max() >= 2**30
            np.testing.assert_allclose(factors / 2.0**places, ratios, rtol=2.0**-29)


def test_what_a_value_reaches() -> None:
    builder = Builder()
    x = ir.Value(name="x", shape=ir.Shape([1, 2]), type=ir.TensorType(ir.DataType.INT16))
    assert Quantized(x, wide(1)).reach == (-(2**15), 2**15 - 1)
    clamped = builder.node("Rescale", [x], {"low": 5, "high": 900}, "y", "int16", (1, 2))
    assert Quantized(clamped, wide(1)).reach == (0, 900)
    other = builder.node("QMul", [x, x], {"low": -70, "high": 9}, "z", "int16", (1, 2))
    joined = builder.node("Concat", [clamped, other], {}, "c", "int16", (1, 4), "")
    moved = builder.node("Reshape", [joined], {}, "m", "int16", (4,), "")
    assert Quantized(moved, wide(1)).reach == (-70, 900)
    unsigned = builder.node("Rescale", [x], {"low": 100, "high": 228}, "u", "uint8", (1, 2))
    assert Quantized(unsigned, Quantization(np.float32(1), 128, "uint8")).reach == (-28, 100)
    fill = builder.constant("fill", np.array(-300, np.int16))
    padded = builder.node("Pad", [clamped, None, fill], {}, "p", "int16", (1, 4), "")
    assert Quantized(padded, wide(1)).reach == (-300, 900)
    constant = builder.constant("k", np.array([-4, 7], np.int16))
    assert Quantized(constant, wide(1)).reach == (-4, 7)
