"""Activation functions of float32 that kernels compute in registers, on vectors of any length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx

from edgepress.targets.schedules.elementary import gelu, gelu_tanh, once, sigmoid, silu, tanh
from edgepress.targets.schedules.emit import Expr, splat


@dataclass(frozen=True)
class Activation:
    """A function by its name in `FUNCTIONS`, and its parameters in their order there."""

    name: str
    parameters: tuple[float, ...] = ()


def activated(x: Expr, activation: Activation, lanes: int) -> Expr:
    """Apply a function to float32 lanes."""
    return once(FUNCTIONS[activation.name](x, lanes, *activation.parameters))


def _hard_sigmoid(x: Expr, lanes: int, alpha: float, beta: float) -> Expr:
    """Return `alpha * x + beta` between 0 and 1."""
    line = x * splat(alpha, "float32", lanes) + splat(beta, "float32", lanes)
    # both give their second operand where it is NaN
    return tirx.Max(splat(0.0, "float32", lanes), tirx.Min(splat(1.0, "float32", lanes), line))


def _leaky_relu(x: Expr, lanes: int, slope: float) -> Expr:
    zero = splat(0.0, "float32", lanes)
    return tirx.Max(zero, x) + splat(slope, "float32", lanes) * tirx.Min(zero, x)


FUNCTIONS: dict[str, Callable[..., Expr]] = {
    "gelu": lambda x, _: gelu(x),
    "gelu_tanh": lambda x, _: gelu_tanh(x),
    "hard_sigmoid": _hard_sigmoid,
    "hard_swish": lambda x, lanes: x * _hard_sigmoid(x, lanes, 1 / 6, 0.5),
    "leaky_relu": _leaky_relu,
    "sigmoid": lambda x, _: sigmoid(x),
    "silu": lambda x, _, slope: silu(x, slope),
    "tanh": lambda x, _: tanh(x),
}
