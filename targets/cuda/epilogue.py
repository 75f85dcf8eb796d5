"""How accumulators become outputs, as CUDA C++: one struct per epilogue.

The struct is what templates take as `Finish`::

    struct NAME {
        typedef … Output, Residual;         // types in memory
        typedef … Factor;                   // float multipliers or int32_t shifts, per channel
        static const bool HAS_FACTOR, HAS_RESIDUAL;
        static Output of(accumulator, factor, residual);   // int32_t or float accumulator
    };

Where there is no factor or no residual, any value may be given for it.
"""

from __future__ import annotations

import math

from edgepress.targets.cuda.kernel import C_TYPES, float_literal
from edgepress.targets.schedules.activations import Activation
from edgepress.targets.schedules.epilogue import Added, Clip, Epilogue, Requantise, Shift

HEADERS = ("types.cuh", "activations.cuh", "epilogue.cuh")
"""What the text needs."""


def finish_source(name: str, epilogue: Epilogue, output: str, residual: str = "float32") -> str:
    """Write the struct of an epilogue.

    Args:
        name: of the struct.
        epilogue: what to do.
        output: dtype of the output in memory; `float16` where floats are stored so.
        residual: dtype of the residual in memory, where there is one.
    """
    first = epilogue.inner if isinstance(epilogue, Added) else epilogue
    integer = isinstance(first, Requantise)
    added = isinstance(epilogue, Added)
    factor = "int32_t" if isinstance(first, Shift) else "float"
    if isinstance(epilogue, Added):
        body = _added(epilogue, output)
    elif isinstance(epilogue, Requantise):
        body = [f"return ({C_TYPES[output]})({centred(epilogue)} + {epilogue.zero_point});"]
    else:
        body = [f"return from_float<{C_TYPES[output]}>({clipped('accumulator', epilogue)});"]
    lines = [
        f"struct {name} {{",
        f"    typedef {C_TYPES[output]} Output;",
        f"    typedef {C_TYPES[residual]} Residual;",
        f"    typedef {factor} Factor;",
        f"    static const bool HAS_FACTOR = {_bool(integer)};",
        f"    static const bool HAS_RESIDUAL = {_bool(added)};",
        "    static __device__ __forceinline__ Output "
        f"of({'int32_t' if integer else 'float'} accumulator, Factor factor, Residual residual)",
        "    {",
        "        (void)factor, (void)residual;",
        *(f"        {line}" for line in body),
        "    }",
        "};",
    ]
    return "\n".join(lines) + "\n"


def centred(epilogue: Requantise, accumulator: str = "accumulator", factor: str = "factor") -> str:
    """Return the expression of the output less its zero point, int32."""
    low, high = epilogue.low - epilogue.zero_point, epilogue.high - epilogue.zero_point
    if isinstance(epilogue, Shift):
        shift = "shifted" if epilogue.left or factor.lstrip("-").isdigit() else "shifted_right"
        return f"{shift}({accumulator}, {factor}, {low}, {high})"
    limits = f"{float_literal(low)}, {float_literal(high)}"
    return f"requantised({accumulator}, {factor}, {limits})"


def clipped(value: str, epilogue: Clip) -> str:
    """Return the expression of a float, clamped and activated."""
    if epilogue.low != -math.inf:
        value = f"fmaxf({value}, {float_literal(epilogue.low)})"
    if epilogue.high != math.inf:
        value = f"fminf({value}, {float_literal(epilogue.high)})"
    return value if epilogue.activation is None else activated(value, epilogue.activation)


def activated(value: str, activation: Activation) -> str:
    """Return the expression of an activation function of a float."""
    arguments = [value, *map(float_literal, activation.parameters)]
    function = {"sigmoid": "sigmoid", "tanh": "tanh_of"}.get(activation.name, activation.name)
    return f"{function}({', '.join(arguments)})"


def _added(epilogue: Added, output: str) -> list[str]:
    """Return the statements of an epilogue with a residual."""
    kind = C_TYPES[output]
    if not isinstance(epilogue.inner, Requantise):
        assert isinstance(epilogue.final, Clip)
        total = f"{clipped('accumulator', epilogue.inner)} + to_float(residual)"
        final = clipped("total", epilogue.final)
        return [f"float total = {total};", f"return from_float<{kind}>({final});"]
    assert isinstance(epilogue.final, Requantise)
    own, other = epilogue.factors
    places = int(epilogue.factor) if isinstance(epilogue.final, Shift) else None
    factor = str(places) if places is not None else float_literal(epilogue.factor)
    final = centred(epilogue.final, "total", factor)
    return [
        f"int32_t own = {centred(epilogue.inner)};",
        f"int32_t other = (int32_t)residual - {_parenthesised(epilogue.residual_zero_point)};",
        f"int32_t total = own * {_parenthesised(own)} + other * {_parenthesised(other)};",
        f"return ({kind})({final} + {_parenthesised(epilogue.final.zero_point)});",
    ]


def _parenthesised(value: int) -> str:
    return f"({value})" if value < 0 else str(value)


def _bool(value: bool) -> str:
    return "true" if value else "false"
