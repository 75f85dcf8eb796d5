"""exp, log, tanh, erf, sigmoid, GELU and SiLU of float32 as vector arithmetic.

LLVM calls libm once per lane for these. Here each is a polynomial over whole vectors, within 2 ulp
of the exact value, right for infinities, NaN and denormal results, and needs no instruction that
32-bit Neon lacks (so no rounding instruction).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx

Expr = Any

LOG2_E = 1.44269504088896341
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4  # the high part has 9 bits: n * high is exact
_ROUND = 12582912.0  # 1.5 * 2**23: adding it rounds to an integer, held in the low bits
_ROUND_BITS = 0x4B400000

_SMALLEST_NORMAL, _LARGEST = 2.0**-126, 3.4028234663852886e38

# Cephes expf, logf and tanhf; erff is Norbert Juffa's.
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
_EXP2 = (  # fitted to 2**r - 1 over r, |r| <= 1/2: relative error 2e-9 before rounding
    1.5353362e-4,
    1.3398875e-3,
    9.6184369e-3,
    5.5503324e-2,
    2.4022648e-1,
    6.9314718e-1,
)
_LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
_TANH = (
    -5.70498872745e-3,
    2.06390887954e-2,
    -5.37397155531e-2,
    1.33314422036e-1,
    -3.33332819422e-1,
)
_ERF_SMALL = (
    -5.96761703e-4,
    4.99119423e-3,
    -2.67681349e-2,
    1.12819925e-1,
    -3.76125336e-1,
    1.28379166e-1,
)
# The eighth roots of `_less_tail`, up to 6 and 5.5: least squares, weighted for the error of the
# whole function and anew for its largest errors (Lawson's algorithm).
_GELU = (
    -2.93026744e-7,
    7.43553164e-6,
    -5.99806008e-5,
    3.33740063e-5,
    1.50611089e-3,
    -6.73866423e-4,
    -3.19269300e-2,
    -9.14577544e-2,
    9.17004049e-1,
)
_GELU_TANH = (
    -6.04375217e-8,
    1.41746864e-6,
    -1.35135415e-5,
    6.53452735e-5,
    -1.59859279e-4,
    1.66025347e-4,
    -2.07316334e-4,
    1.69523049e-3,
    -6.47826178e-4,
    -3.19172591e-2,
    -9.14585143e-2,
    9.17004049e-1,
)
_ERF_LARGE = (
    -1.72853470e-5,
    3.83197126e-4,
    -3.88396438e-3,
    2.42546219e-2,
    -1.06777877e-1,
    -6.34846687e-1,
    -1.28717512e-1,
)


def exp(x: Expr) -> Expr:
    """Return e to the x: 2**n times a polynomial of the remainder, |remainder| <= ln(2) / 2."""

    def of(x: Expr) -> Expr:
        shifted = fence(x * _like(x, LOG2_E) + _like(x, _ROUND))
        return _let("shifted", shifted, lambda shifted: _exp_from_rounded(x, shifted))

    # Beyond these the result is 0 or infinity anyway. Max and Min return their second operand
    # where x is NaN.
    clamped = tirx.Min(_like(x, 89.0), tirx.Max(_like(x, -104.0), x))
    return _let("x", clamped, of)


def _exp_from_rounded(x: Expr, shifted: Expr) -> Expr:
    n = fence(shifted) - _like(x, _ROUND)
    remainder = _let("n", n, lambda n: x - n * _like(x, _LN2_HIGH) - n * _like(x, _LN2_LOW))
    power = _as_int(shifted) - _like_int(x, _ROUND_BITS)

    def polynomial(r: Expr) -> Expr:
        return _horner(_EXP, r) * r * r + r + _like(x, 1.0)

    def scaled(value: Expr, power: Expr) -> Expr:
        half = tirx.shift_right(power, _like_int(x, 1))
        return value * _two_to(half) * _two_to(power - half)

    value = _let("r", remainder, polynomial)
    return _let("power", power, lambda power: scaled(value, power))


def exp2_below_zero(x: Expr, bind: Callable[[str, Expr], Expr]) -> Expr:
    """Return 2 to the x for x <= 0, or a little above, and 0 below -127: what softmax needs.

    The polynomial of the remainder, |remainder| <= 1/2, is 1 at 0: the smallest power leaves no
    bit of it, and no comparison is needed. NaN stays NaN.

    Args:
        x: float32.
        bind: gives a value a name, as `Kernel.let` does.
    """
    bounded = bind("bounded", tirx.Max(_like(x, -127.0), x))  # its second operand where x is NaN
    shifted = bind("shifted", fence(bounded + _like(x, _ROUND)))
    r = bind("r", bounded - (fence(shifted) - _like(x, _ROUND)))
    value = bind("value", _horner((*_EXP2, 1.0), r))
    # the upper bits of `shifted` leave the register: n is left, where exponents are
    power = tirx.shift_left(_as_int(shifted), _like_int(x, 23))
    return _as_float(_as_int(value) + power)


def log(x: Expr) -> Expr:
    """Return the natural logarithm: of the exponent, plus a polynomial of the mantissa."""

    def of(x: Expr) -> Expr:
        tiny = x < _like(x, _SMALLEST_NORMAL)
        normal = tirx.Select(tiny, x * _like(x, 2.0**23), x)
        shift = tirx.Select(tiny, _like(x, 127.0 + 23.0), _like(x, 127.0))
        finite = _let("bits", _as_int(normal), lambda bits: _log_of_bits(bits, shift))
        positive = tirx.Select(x > _like(x, _LARGEST), x, finite)
        other = tirx.Select(x.equal(_like(x, 0.0)), _like(x, -math.inf), _like(x, math.nan))
        return tirx.Select(x > _like(x, 0.0), positive, other)

    return _let("x", x, of)


def _log_of_bits(bits: Expr, shift: Expr) -> Expr:
    """Logarithm of a normal number, given its bits and the bias of its exponent."""
    exponent = tirx.Cast(_with_lanes("float32", bits), tirx.shift_right(bits, _like_int(bits, 23)))
    fraction = tirx.bitwise_and(bits, _like_int(bits, 0x7FFFFF))
    mantissa = _as_float(tirx.bitwise_or(fraction, _like_int(bits, 0x3F800000)))

    def of(mantissa: Expr, exponent: Expr) -> Expr:
        upper = mantissa > _like(mantissa, math.sqrt(2.0))
        rest = tirx.Select(upper, mantissa * _like(mantissa, 0.5), mantissa)
        more = tirx.Select(upper, _like(mantissa, 1.0), _like(mantissa, 0.0))
        power = exponent - shift + more
        return _let(
            "r",
            rest - _like(rest, 1.0),
            lambda r: _let("power", power, lambda power: polynomial(r, power)),
        )

    def polynomial(r: Expr, power: Expr) -> Expr:
        cubic = _horner(_LOG, r) * r * r * r
        low = cubic + power * _like(r, _LN2_LOW) - _like(r, 0.5) * r * r
        return r + low + power * _like(r, _LN2_HIGH)

    return _let("mantissa", mantissa, lambda m: _let("exponent", exponent, lambda e: of(m, e)))


def sigmoid(x: Expr) -> Expr:
    """Return 1 / (1 + exp(-x))."""
    one = _like(x, 1.0)
    return one / (one + exp(_like(x, 0.0) - x))


def tanh(x: Expr) -> Expr:
    """Return the hyperbolic tangent: a polynomial to 0.625, above it 1 - 2 / (exp(2 |x|) + 1)."""

    def of(x: Expr) -> Expr:
        one = _like(x, 1.0)
        small = _let("z", x * x, lambda z: _horner(_TANH, z) * z * x + x)
        large = one - _like(x, 2.0) / (exp(_like(x, 2.0) * _absolute(x)) + one)
        return tirx.Select(_absolute(x) < _like(x, 0.625), small, _with_sign(large, x))

    return _let("x", x, of)


def erf(x: Expr) -> Expr:
    """Return the error function: a polynomial up to 0.93, above it 1 - exp of a polynomial.

    The exp is left as a call, for `expand_elementary`.
    """

    def of(x: Expr) -> Expr:
        small = _let("z", x * x, lambda z: _horner(_ERF_SMALL, z) * x + x)
        large = _let("t", _absolute(x), _erf_of_large)
        return tirx.Select(_absolute(x) < _like(x, 0.927734375), small, _with_sign(large, x))

    return _let("x", x, of)


def _erf_of_large(t: Expr) -> Expr:
    # At 10 erf is 1 to the last bit; beyond it the polynomial would leave its range.
    bounded = tirx.Min(_like(t, 10.0), t)
    return _like(t, 1.0) - _let("b", bounded, lambda b: tirx.exp(_horner(_ERF_LARGE, b) * b - b))


def gelu(x: Expr) -> Expr:
    """Return x * Phi(x), with the normal distribution's Phi; within 1.3e-7 of max(1, |x|)."""
    return _less_tail(x, _GELU, 6.0)


def gelu_tanh(x: Expr) -> Expr:
    """Return x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x**3))) / 2 as exactly as `gelu`."""
    return _less_tail(x, _GELU_TANH, 5.5)


def _less_tail(x: Expr, coefficients: Sequence[float], end: float) -> Expr:
    """Return max(x, 0) - t * tail(t), where t = |x| and tail falls smoothly from 1/2 to 0.

    The eighth root of the tail is close to a polynomial, so no exponential is needed and no case is
    distinguished; beyond `end` the product is below 1e-8, and stays what it is there.
    """

    def of(x: Expr) -> Expr:
        return _let("t", tirx.Min(_like(x, end), _absolute(x)), lambda t: positive(x) - product(t))

    def positive(x: Expr) -> Expr:
        return tirx.Max(_like(x, 0.0), x)  # NaN stays NaN

    def product(t: Expr) -> Expr:
        return _squared(_squared(_squared(_horner(coefficients, t)))) * t

    return _let("x", x, of)


def _squared(x: Expr) -> Expr:
    return _let("root", x, lambda root: root * root)


def silu(x: Expr, slope: float = 1.0) -> Expr:
    """Return x / (1 + exp(-slope * x))."""

    def of(x: Expr) -> Expr:
        return x / (_like(x, 1.0) + exp(_like(x, -slope) * x))

    return _let("x", x, of)


def expand_erf(function: Any) -> Any:
    """Replace the calls of erf in a TIR function by arithmetic and exp."""
    return _replaced(function, {"tirx.erf": erf})


def expand_elementary(function: Any) -> Any:
    """Replace the calls of the others in a TIR function by arithmetic."""
    expansions = {"tirx.exp": exp, "tirx.log": log, "tirx.sigmoid": sigmoid, "tirx.tanh": tanh}
    return _replaced(function, expansions)


def _replaced(function: Any, expansions: Mapping[str, Callable[[Expr], Expr]]) -> Any:
    def replace(call: Any) -> Any:
        expansion = expansions.get(getattr(call.op, "name", ""))
        if expansion is None or not str(call.ty.dtype).startswith("float32"):
            return call
        return expansion(call.args[0])

    return function.with_body(tvm_ffi.structural_map(function.body, (tvm.ir.Call, replace)))


def _horner(coefficients: Sequence[float], x: Expr) -> Expr:
    total = _like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * x + _like(x, coefficient)
    return total


def _let(name: str, value: Expr, body: Callable[[Expr], Expr]) -> Expr:
    variable = tirx.Var(name, value.ty)
    return tirx.Let(variable, value, body(variable))


def _like(x: Expr, value: float) -> Expr:
    """A float32 constant with as many lanes as x."""
    return _constant(value, "float32", x)


def _like_int(x: Expr, value: int) -> Expr:
    return _constant(value, "int32", x)


def _constant(value: float, dtype: str, x: Expr) -> Expr:
    scalar = tirx.const(value, dtype)
    lanes = _lanes(x)
    return scalar if lanes == 1 else tirx.Broadcast(scalar, lanes)


def _lanes(x: Expr) -> int:
    return int(x.ty.dtype.lanes)


def _with_lanes(dtype: str, x: Expr) -> str:
    lanes = _lanes(x)
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def _as_int(x: Expr) -> Expr:
    return tirx.reinterpret(_with_lanes("int32", x), x)


def _as_float(bits: Expr) -> Expr:
    return tirx.reinterpret(_with_lanes("float32", bits), bits)


def _two_to(power: Expr) -> Expr:
    """2.0 to an integer in -126 … 127."""
    return _as_float(tirx.shift_left(power + _like_int(power, 127), _like_int(power, 23)))


def _absolute(x: Expr) -> Expr:
    return _as_float(tirx.bitwise_and(_as_int(x), _like_int(x, 0x7FFFFFFF)))


def _with_sign(magnitude: Expr, x: Expr) -> Expr:
    sign = tirx.bitwise_and(_as_int(x), _like_int(x, -(1 << 31)))
    return _as_float(tirx.bitwise_or(_as_int(magnitude), sign))


def fence(x: Expr) -> Expr:
    """Keep TVM and LLVM from simplifying across this sum, as (x + c) - c to x."""
    return tirx.call_llvm_pure_intrin(*_fence(x))


def once(x: Expr) -> Expr:
    """Keep TVM from computing a value again where it is used: it must not repeat a Let inside."""
    return tirx.call_llvm_intrin(*_fence(x))


def _fence(x: Expr) -> tuple[str, str, Expr]:
    suffix = "f32" if _lanes(x) == 1 else f"v{_lanes(x)}f32"
    return _with_lanes("float32", x), f"llvm.arithmetic.fence.{suffix}", x
