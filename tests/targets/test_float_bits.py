"""Quantize and Dequantize at powers of two, against the float formulas they stand for."""

import numpy as np
import pytest

from edgepress.targets.isa.base import Isa, load_isa
from edgepress.targets.program import Array
from edgepress.targets.schedules import float_bits
from edgepress.targets.schedules.epilogue import Requantise
from tests.targets.kernels import HIGHEST, LOWEST, WIDE, Case, check, native_isas

EPILOGUES = [
    WIDE,
    Requantise("int16", 0, 0, 4000),
    Requantise("int8", 0, -128, 127),
    Requantise("uint8", 128, 0, 255),
    Requantise("uint8", 0, 3, 200),
]


def hostile_floats(exponent: int, seed: int = 0) -> Array:
    """Any bits, ties and their neighbours at this scale, and the ends; an odd number of them."""
    random = np.random.default_rng(seed)
    bits = random.integers(0, 2**32, 1000, np.uint64).astype(np.uint32).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        ties = (np.arange(-300, 301) / 2 * 2.0**exponent).astype(np.float32)
        far = (random.uniform(-40_000, 40_000, 300) * 2.0**exponent).astype(np.float32)
        halves = ((random.integers(-33_000, 33_000, 200) + 0.5) * 2.0**exponent).astype(np.float32)
    around = [np.nextafter(ties, np.float32(side)) for side in (-np.inf, np.inf)]
    ends = [0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, np.inf, -np.inf]
    nans = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    return np.concatenate([bits, ties, *around, far, halves, np.array(ends, np.float32), nans])


def quantise_case(x: Array, isa: Isa, exponent: int, out: Requantise) -> Case:
    low, high = out.low - out.zero_point, out.high - out.zero_point
    # float64 divides by a power of two exactly, and rounds half to even
    with np.errstate(invalid="ignore"):
        steps = np.rint(np.clip(x.astype(np.float64) * 2.0**-exponent, low, high))
    steps[np.isnan(x)] = high
    return Case(
        lambda name: float_bits.quantise(name, x.size, isa, exponent, out),
        (x.view(np.int32),),
        (steps + out.zero_point).astype(out.dtype),
        f"quantise / 2**{exponent} to {out}",
    )


def dequantise_case(isa: Isa, exponent: int, dtype: str, zero_point: int) -> Case:
    x = np.arange(LOWEST[dtype], HIGHEST[dtype] + 1).astype(dtype)
    with np.errstate(over="ignore"):
        wanted = (x.astype(np.float32) - np.float32(zero_point)) * np.float32(2.0**exponent)
    return Case(
        lambda name: float_bits.dequantise(name, x.size, isa, exponent, dtype, zero_point),
        (x,),
        wanted.view(np.int32),
        f"dequantise {dtype} less {zero_point} * 2**{exponent}",
    )


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("isa_name", native_isas())
def test_quantise(isa_name: str) -> None:
    isa, cases = load_isa(isa_name), []
    for seed, exponent in enumerate((-100, -24, -15, -7, -1, 0, 1, 8, 100, 106, 107, 127)):
        x = hostile_floats(exponent, seed)
        cases.append(quantise_case(x, isa, exponent, EPILOGUES[seed % len(EPILOGUES)]))
        cases.append(quantise_case(x[seed:], isa, exponent, WIDE))
    check(cases, isa_name)


@pytest.mark.parametrize("isa_name", native_isas())
def test_dequantise(isa_name: str) -> None:
    isa, cases = load_isa(isa_name), []
    for exponent in (-100, -20, -1, 0, 7, 110, 111, 119, 127):
        cases.append(dequantise_case(isa, exponent, "int16", 0))
        cases.append(dequantise_case(isa, exponent, "uint8", 128 if exponent % 2 else 3))
        cases.append(dequantise_case(isa, exponent, "int8", 0))
    check(cases, isa_name)
