"""How much the model's outputs change when a weight does: the diagonal of the curvature.

Choi, El-Khamy and Lee, "Towards the Limit of Network Quantization", 2017, section 3, cluster
weights by the second derivatives of a loss. For squared errors of the outputs, these are by Gauss
and Newton `Σ (∂y/∂w)²` over outputs y, averaged over samples, and need no labels. A random
projection `v·y` with signs v has a squared slope of the same mean, so one gradient per sample sees
all outputs: Hutchinson, "A stochastic estimator of the trace", 1990.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgepress.calibration.base import Array
from edgepress.passes._constants import free_name
from edgepress.passes._gradient_tape import is_float
from edgepress.passes._gradients import open_gradients
from edgepress.passes._sample_order import in_canonical_order
from edgepress.passes._shapes import shape_of
from edgepress.passes._taps import input_shapes
from edgepress.passes.base import Context

_ADVICE = 'set weighting = "none"'
#: Projections that are averaged in all, where there are fewer samples.
PROJECTIONS = 64
#: The share of a tensor's mean curvature that is added to all of it: what the samples do not touch
#: is not free to become anything.
DAMPING = 0.01


@dataclass(frozen=True)
class Curvature:
    """What the samples say of weights.

    Attributes:
        diagonals: for every initializer the mean of `Σ (∂y/∂w)²` over samples, damped: float64 in
            its shape. A tensor that no output depends on has ones.
        energy: the mean of `Σ y²` over samples.
    """

    diagonals: dict[ir.Value, Array]
    energy: float


def output_curvature(
    pass_name: str, model: ir.Model, weights: Sequence[ir.Value], context: Context, seed: int
) -> Curvature:
    """Measure the curvature of initializers.

    Args:
        pass_name: for refusals.
        model: with fixed shapes; it is not changed.
        weights: initializers of floats.
        context: with samples.
        seed: of the projections.

    Raises:
        PassRefused: the samples cannot be run, or an operator has no gradient.
        CalibrationError: the samples do not fit.
    """
    assert context.samples is not None, "whoever measures has asked for samples"
    samples = in_canonical_order(context.samples)
    copy, sources = _with_sources(model, weights)
    outputs = list(dict.fromkeys(value for value in copy.graph.outputs if is_float(value)))
    gradients = open_gradients(pass_name, copy, [*sources, *outputs], _ADVICE)
    squares = [np.zeros(shape_of(source)) for source in sources]
    energy = 0.0
    times = math.ceil(PROJECTIONS / max(len(samples), 1))
    for number, feed in enumerate(samples.feeds(input_shapes(pass_name, copy))):
        rng = np.random.default_rng([seed, number])
        for projection in range(times):
            directions = {
                output.name or "": rng.choice([-1.0, 1.0], shape_of(output)) for output in outputs
            }
            found = gradients(feed, directions)
            for square, source in zip(squares, sources, strict=True):
                square += np.square(found[source.name or ""][1], dtype=np.float64)
            if projection == 0:
                energy += sum(_energy(found[output.name or ""][0]) for output in outputs)
        context.progress("measure curvature", number + 1, len(samples))
    return Curvature(
        diagonals={
            weight: _damped(square / (times * len(samples)))
            for weight, square in zip(weights, squares, strict=True)
        },
        energy=energy / len(samples),
    )


def _with_sources(model: ir.Model, weights: Sequence[ir.Value]) -> tuple[ir.Model, list[ir.Value]]:
    """Return a copy in which every weight is read through an Identity, and their outputs."""
    copy = model.clone()
    sources = []
    for weight in weights:
        value = copy.graph.initializers[weight.name or ""]
        name = free_name(copy.graph, f"{value.name}_read")
        source = ir.Value(name=name, shape=value.shape, type=value.type)
        value.replace_all_uses_with(source)
        copy.graph.insert_before(copy.graph[0], ir.node("Identity", [value], outputs=[source]))
        sources.append(source)
    return copy, sources


def _energy(output: Array) -> float:
    return float(np.square(output, dtype=np.float64).sum())


def _damped(diagonal: Array) -> Array:
    """Add a share of the mean."""
    mean = float(diagonal.mean())
    return diagonal + DAMPING * mean if mean > 0 else np.ones_like(diagonal)
