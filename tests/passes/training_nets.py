"""Small classifiers with labelled samples, and a NumPy trainer of the linear one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

import tests.torch_needed as needed
from edgepress.calibration.base import Samples
from edgepress.passes._shapes import refresh_shapes
from edgepress.passes._training import TrainingPass
from edgepress.passes.base import Context
from tests.graphs import Array, answers, net, random

torch = needed.torch

CLASSES = 3


def made(signature: str, body: str, weights: dict[str, Array]) -> ir.Model:
    model = net(signature, body, weights)
    refresh_shapes(model)
    return model


def linear(w: Array | None = None, b: Array | None = None, features: int = 6) -> ir.Model:
    """`y = x w + b`."""
    w = random(features, CLASSES) if w is None else w
    b = random(CLASSES, seed=1) if b is None else b
    signature = f"(float[1,{w.shape[0]}] x) => (float[1,{CLASSES}] y)"
    return made(signature, "y = Gemm(x, w, b)", {"w": w, "b": b})


def convolutional(seed: int = 0) -> ir.Model:
    """A LeNet with channels for a few hundred weights."""
    return made(
        "(float[1,1,8,8] x) => (float[1,3] y)",
        "c = Conv(x, w1, b1) r = Relu(c) p = MaxPool <kernel_shape=[2,2], strides=[2,2]> (r) "
        "f = Flatten(p) g = Gemm <transB=1> (f, w2, b2) h = Relu(g) y = MatMul(h, w3)",
        {
            "w1": random(4, 1, 3, 3, seed=seed) / 3,
            "b1": random(4, seed=seed) / 10,
            "w2": random(10, 36, seed=seed) / 6,
            "b2": random(10, seed=seed) / 10,
            "w3": random(10, CLASSES, seed=seed) / 3,
        },
    )


def blobs(count: int = 60, *shape: int, seed: int = 0) -> Samples:
    """Samples of classes that differ by their mean: features or images, `[6]` by default."""
    shape = shape or (6,)
    rng = np.random.default_rng([seed, *shape])
    means = np.random.default_rng(len(shape)).standard_normal((CLASSES, *shape))
    labels = rng.integers(0, CLASSES, count)
    x = means[labels] + rng.standard_normal((count, *shape))
    return Samples({"x": x.astype(np.float32)}, labels.astype(np.int64))


def images(count: int = 60, seed: int = 0) -> Samples:
    return blobs(count, 1, 8, 8, seed=seed)


def accuracy(model: ir.Model, samples: Samples) -> float:
    """By onnxruntime, sample by sample."""
    assert samples.labels is not None
    feeds = ({"x": x[None]} for x in samples.inputs["x"])
    found = [int(answers(model, feed)[0].argmax()) for feed in feeds]
    return float(np.mean(np.equal(found, samples.labels)))


def trained(step: TrainingPass, model: ir.Model, samples: Samples, **more: ir.Model) -> ir.Model:
    """Train a clone and return it."""
    context = Context(training=samples, **more)  # type: ignore[arg-type]
    clone = model.clone()
    step.requires(clone, context)
    return step.call(clone, context).model


def softmax(z: Array) -> Array:
    powers = np.exp(z - z.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def train_linear(
    options: TrainingPass,
    samples: Samples,
    variables: Sequence[Array],
    weights: Callable[[Sequence[Array]], tuple[Array, Array]],
    gradients: Callable[[Array, Array], Sequence[Array]],
    teacher: tuple[Array, Array] | None = None,
) -> Sequence[Array]:
    """Train `y = x w + b` in NumPy and float64.

    Args:
        options: as for the pass.
        samples: of `x`.
        variables: what Adam changes.
        weights: gives w and b of them.
        gradients: gives those of the variables from those of w and b.
        teacher: its w and b.

    Returns:
        The variables, or their moving average, in the end.
    """
    x, labels = samples.inputs["x"].astype(np.float64), samples.labels
    assert labels is not None
    steps = options.epochs * math.ceil(len(x) / options.batch_size)
    variables = [v.astype(np.float64) for v in variables]
    sizes = [max(math.sqrt(np.mean(v[v != 0] ** 2)) if v.any() else 0, 1e-3) for v in variables]
    first, second = ([np.zeros_like(v) for v in variables] for _ in range(2))
    means = [v.copy() for v in variables]
    order = torch.Generator().manual_seed(options.seed)
    done = 0
    for _ in range(options.epochs):
        shuffled = torch.randperm(len(x), generator=order).numpy()
        for start in range(0, len(x), options.batch_size):
            chosen = shuffled[start : start + options.batch_size]
            w, b = weights(variables)
            z, a, t = x[chosen] @ w + b, options.distillation, options.temperature
            dz = softmax(z) - np.eye(CLASSES)[labels[chosen]]
            if teacher is not None:
                soft = softmax(z / t) - softmax((x[chosen] @ teacher[0] + teacher[1]) / t)
                dz = (1 - a) * dz + a * t * soft
            dz /= len(chosen)
            rate = options.learning_rate * (1 + math.cos(math.pi * done / steps)) / 2
            done += 1
            found = gradients(x[chosen].T @ dz, dz.sum(axis=0))
            for i, gradient in enumerate(found):
                first[i] = 0.9 * first[i] + 0.1 * gradient
                second[i] = 0.999 * second[i] + 0.001 * gradient**2
                moved = first[i] / (1 - 0.9**done)
                scale = np.sqrt(second[i] / (1 - 0.999**done)) + 1e-8
                variables[i] = variables[i] - rate * sizes[i] * moved / scale
                decay = min(options.averaging, done / (done + 10))
                means[i] = decay * means[i] + (1 - decay) * variables[i]
    return means if options.averaging else variables
