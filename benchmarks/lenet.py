"""The two networks of "Deep Compression" and their training on MNIST, in torch.

LeNet-300-100 is LeCun et al., 1998, with ReLU; LeNet-5 is Caffe's variant, whose convolutions have
no activation but the pooling (`examples/mnist/lenet_train_test.prototxt`). Both have the shapes
that Han, Mao and Dally, 2016, table 1, and Han et al., 2015, count: 266,610 and 431,080 weights
and biases. torch is imported inside functions only.
"""

from __future__ import annotations

import io
import math
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

Array = npt.NDArray[Any]

INPUT, OUTPUT = "image", "logits"
BATCH_SIZE, LEARNING_RATE, AVERAGING = 128, 1e-3, 0.999
# Training images are changed by one random affine map each, of up to:
ROTATION_DEGREES, SCALING, SHEAR, SHIFT_PIXELS = 10.0, 0.1, 0.1, 1.5


@dataclass(frozen=True)
class Data:
    """Labelled images.

    Attributes:
        images: float32 `[n, 1, 28, 28]` in 0..1.
        labels: int64 `[n]`.
    """

    images: Array
    labels: Array

    def first(self, count: int) -> Data:
        """Return the first samples."""
        return Data(self.images[:count], self.labels[:count])

    def save(self, path: Any) -> None:
        """Write an npz file that the command line reads."""
        np.savez(path, **{INPUT: self.images, "labels": self.labels})


def lenet_300_100() -> Any:
    """784-300-100-10, ReLU."""
    from torch import nn

    layers = (
        ("flatten", nn.Flatten()),
        ("fc1", nn.Linear(784, 300)),
        ("relu1", nn.ReLU()),
        ("fc2", nn.Linear(300, 100)),
        ("relu2", nn.ReLU()),
        ("fc3", nn.Linear(100, 10)),
    )
    return nn.Sequential(OrderedDict(layers))


def lenet_5() -> Any:
    """Caffe's: 20 and 50 filters of 5×5 without padding, each pooled, then 500 and 10."""
    from torch import nn

    layers = (
        ("conv1", nn.Conv2d(1, 20, 5)),
        ("pool1", nn.MaxPool2d(2)),
        ("conv2", nn.Conv2d(20, 50, 5)),
        ("pool2", nn.MaxPool2d(2)),
        ("flatten", nn.Flatten()),
        ("fc1", nn.Linear(800, 500)),
        ("relu1", nn.ReLU()),
        ("fc2", nn.Linear(500, 10)),
    )
    return nn.Sequential(OrderedDict(layers))


NETWORKS = {"lenet-300-100": lenet_300_100, "lenet-5": lenet_5}


def train(name: str, data: Data, epochs: int, seed: int) -> onnx.ModelProto:
    """Train a network and export it, the batch dynamic.

    Adam, its learning rate following half a cosine to 0; cross-entropy; images distorted at random.
    The result has the moving average of the weights.
    """
    import torch
    from torch import nn

    torch.manual_seed(seed)
    network = NETWORKS[name]()
    for layer in network:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    average = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(AVERAGING)
    )
    images, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    optimizer = torch.optim.Adam(network.parameters())
    steps, step = epochs * math.ceil(len(labels) / BATCH_SIZE), 0
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels)).split(BATCH_SIZE):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * step / steps)) / 2
            loss = nn.functional.cross_entropy(network(distorted(images[chosen])), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update_parameters(network)
            step += 1
    return _exported(average.module.eval())


def distorted(images: Any) -> Any:
    """Turn, scale, shear and move every image of a torch tensor `[n, 1, h, w]` at random."""
    import torch

    def uniform(most: float) -> Any:
        return (2 * torch.rand(len(images)) - 1) * most

    angle, scale, shear = (
        uniform(math.radians(ROTATION_DEGREES)),
        1 + uniform(SCALING),
        uniform(SHEAR),
    )
    cosine, sine = torch.cos(angle) / scale, torch.sin(angle) / scale
    right, down = (uniform(2 * SHIFT_PIXELS / images.shape[-1]) for _ in range(2))
    maps = torch.stack([cosine, shear * cosine - sine, right, sine, shear * sine + cosine, down], 1)
    grid = torch.nn.functional.affine_grid(
        maps.view(-1, 2, 3), list(images.shape), align_corners=False
    )
    return torch.nn.functional.grid_sample(images, grid, align_corners=False)


def _exported(network: Any) -> onnx.ModelProto:
    """Export with torch's TorchScript exporter, which needs no package but onnx."""
    import torch

    buffer = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network, (torch.zeros(1, 1, 28, 28),), buffer, input_names=[INPUT],
            output_names=[OUTPUT], dynamic_axes={INPUT: {0: "N"}, OUTPUT: {0: "N"}},
            opset_version=17, dynamo=False,
        )  # fmt: skip
    return onnx.load_model_from_string(buffer.getvalue())
