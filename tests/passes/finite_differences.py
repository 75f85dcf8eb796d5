"""Gradients of one operator at a time against finite differences of what onnxruntime answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir
import onnxruntime

from edgepress.passes._gradients import open_gradients
from edgepress.passes._shapes import refresh_shapes, shape_of
from tests.graphs import Array, net

#: Operators that onnxruntime does not compute in float64.
SINGLE = {
    "AveragePool", "Cast", "Conv", "ConvTranspose", "Elu", "Erf", "Gelu", "GlobalAveragePool",
    "GlobalMaxPool", "HardSigmoid", "HardSwish", "InstanceNormalization", "LeakyRelu", "Mish",
    "Mean", "PRelu", "Resize", "Selu", "Softplus",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Nodes that compute y, and what they read.

    Attributes:
        body: ends with the node whose operator is tested.
        sources: floating inputs; the gradients are taken with respect to them.
        constants: initializers.
        opset: of the model.
    """

    body: str
    sources: Mapping[str, Array]
    constants: Mapping[str, Array]
    opset: int

    @property
    def operator(self) -> str:
        operators: list[str] = re.findall(r"= (\w+)", self.body)
        return operators[-1]

    @property
    def dtype(self) -> type[np.floating]:
        return np.float32 if self.operator in SINGLE else np.float64

    def model(self) -> ir.Model:
        """Build it; float64 arrays take the dtype in which the operator is computed."""
        kind = "float" if self.dtype is np.float32 else "double"
        inputs = ", ".join(
            f"{kind}{list(array.shape) or ''} {name}" for name, array in self.sources.items()
        )
        weights = {
            name: array.astype(self.dtype) if array.dtype == np.float64 else array
            for name, array in self.constants.items()
        }
        version = 8 if self.opset < 20 else 10
        model = net(
            f"({inputs}) => ({kind}[N] y)", self.body, weights, opset=self.opset, ir_version=version
        )
        refresh_shapes(model)
        return model

    def __str__(self) -> str:
        shapes = "".join(f" {list(array.shape)}" for array in self.sources.values())
        return f"{self.body}{shapes} opset {self.opset}"


def case(
    body: str, constants: Mapping[str, Array] | None = None, *, opset: int = 18, **sources: Array
) -> Case:
    return Case(body, sources, constants or {}, opset)


def spaced(*shape: int, scale: float = 1.0, seed: int = 0) -> Array:
    """Shuffled numbers between ±2·scale, with gaps, so that a step crosses no kink and no tie."""
    count = int(np.prod(shape))
    numbers = (np.arange(count) * 2 + 1 - count) * 2 / max(count - 1, 1) + 0.01 * seed
    rng = np.random.default_rng([seed, *shape])
    return np.asarray(rng.permutation(numbers).reshape(shape) * scale)


def positive(*shape: int, seed: int = 0) -> Array:
    """Numbers between 0.5 and 2.5."""
    return np.abs(spaced(*shape, seed=seed)) + 0.5


def ints(*numbers: int) -> Array:
    return np.array(numbers, np.int64)


def check(case: Case) -> None:
    """Compare every gradient of `Σ v·y` with its differences."""
    model = case.model()
    feed = {name: array.astype(case.dtype) for name, array in case.sources.items()}
    direction = np.random.default_rng(0).standard_normal(shape_of(model.graph.outputs[0]))
    projected = projection(model, direction)
    found = open_gradients("test", model, list(model.graph.inputs))(feed, {"y": direction})
    assert list(found) == list(feed)
    tolerance = 1e-4 if case.dtype is np.float32 else 1e-6
    for name, array in feed.items():
        value, gradient = found[name]
        np.testing.assert_array_equal(value, array.astype(np.float32))
        assert gradient.dtype == np.float32
        assert gradient.shape == array.shape
        expected = differences(projected, feed, name)
        limit = tolerance * max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(gradient, expected, rtol=tolerance, atol=limit, err_msg=name)


def projection(model: ir.Model, direction: Array) -> Callable[[Mapping[str, Array]], float]:
    """Return `feed ↦ Σ v·y` for a direction v and the first output y, summed in float64."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
    output = session.get_outputs()[0].name

    def projected(feed: Mapping[str, Array]) -> float:
        return float(
            (direction * np.asarray(session.run([output], dict(feed))[0], np.float64)).sum()
        )

    return projected


def differences(
    function: Callable[[Mapping[str, Array]], float], feed: Mapping[str, Array], name: str
) -> Array:
    """Differentiate by every element of one input."""
    array = feed[name]
    step = 2.0**-6 if array.dtype == np.float32 else 2.0**-10
    result = np.zeros(array.shape)

    def moved(index: tuple[int, ...], distance: float) -> float:
        elements = array.copy()
        elements[index] += distance
        return function({**feed, name: elements})

    for index in np.ndindex(array.shape):
        result[index] = slope(partial(moved, index), step)
    return result


def slope(function: Callable[[float], float], step: float) -> float:
    """Differentiate at 0 with the five-point stencil, whose error is of fourth order."""
    far = function(-2 * step) - function(2 * step)
    near = function(step) - function(-step)
    return (far + 8 * near) / (12 * step)
