"""Functions of one 8-bit value as tables of 256 entries.

The entries are computed once, in float64, so that a sigmoid or a hard-swish costs the board one
load and gives the same bits everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepress.targets.lowering.quantization import Quantization

Array = npt.NDArray[Any]
_erf = np.vectorize(math.erf, otypes=[np.float64])


def _attribute(node: ir.Node, name: str, default: float) -> float:
    return float(node.attributes.get_float(name, default))


def _sigmoid(x: Array) -> Array:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(x, -700, 700))))


def _elu(x: Array, node: ir.Node) -> Array:
    alpha = _attribute(node, "alpha", 1.0)
    return np.where(x < 0, alpha * np.expm1(np.minimum(x, 0)), x)


def _selu(x: Array, node: ir.Node) -> Array:
    alpha = _attribute(node, "alpha", 1.67326319217681884765625)
    gamma = _attribute(node, "gamma", 1.05070102214813232421875)
    return np.asarray(gamma * np.where(x < 0, alpha * np.expm1(np.minimum(x, 0)), x))


def _hard_sigmoid(x: Array, node: ir.Node) -> Array:
    return np.asarray(
        np.clip(_attribute(node, "alpha", 0.2) * x + _attribute(node, "beta", 0.5), 0, 1)
    )


def _gelu(x: Array, node: ir.Node) -> Array:
    if node.attributes.get_string("approximate", "none") == "tanh":
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        return np.asarray(0.5 * x * (1 + np.tanh(inner)))
    return np.asarray(0.5 * x * (1 + _erf(x / math.sqrt(2))))


FUNCTIONS: dict[str, Callable[[Array, ir.Node], Array]] = {
    "Abs": lambda x, _: np.abs(x),
    "Elu": _elu,
    "Erf": lambda x, _: _erf(x),
    "Exp": lambda x, _: np.exp(np.minimum(x, 700)),
    "Gelu": _gelu,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": lambda x, _: x * np.clip(x / 6 + 0.5, 0, 1),
    "LeakyRelu": lambda x, node: np.where(x < 0, _attribute(node, "alpha", 0.01) * x, x),
    "Mish": lambda x, _: x * np.tanh(np.logaddexp(0, x)),
    "Neg": lambda x, _: -x,
    "Selu": _selu,
    "Sigmoid": lambda x, _: _sigmoid(x),
    "Softplus": lambda x, _: np.logaddexp(0, x),
    "Softsign": lambda x, _: x / (1 + np.abs(x)),
    "Tanh": lambda x, _: np.tanh(x),
}


def table(
    real: Array, scale: float, zero_point: int, low: int, high: int, dtype: str
) -> npt.NDArray[Any]:
    """Quantize function values: rounded half to even, clamped to `[low, high]`; NaN is `high`."""
    scaled = np.clip(np.rint(np.where(np.isnan(real), np.inf, real) / scale), -1e6, 1e6)
    return np.asarray(np.clip(scaled + zero_point, low, high).astype(dtype))


def entries_of(
    function: Callable[[Array], Array],
    source: Quantization,
    target: Quantization,
    bounds: tuple[float, float],
) -> npt.NDArray[Any]:
    """Evaluate a function of an 8-bit value for all 256 of them, in ascending order.

    Args:
        function: of float64 values.
        source: what the 8-bit value stands for.
        target: of the entries.
        bounds: what a ReLU or Clip behind the function leaves of its values.
    """
    steps = np.arange(source.lowest, source.highest + 1, dtype=np.float64) - source.zero_point
    real = function(steps * np.float64(source.scale))
    low, high = target.clamp(*bounds)
    return table(real, float(target.scale), target.zero_point, low, high, target.dtype)
