"""Train the example's CNN on Fashion-MNIST and write the model and the data files.

    apt-get install dataset-fashion-mnist
    pip install -e .[train]
    python examples/fashion_mnist/train.py
    python examples/fashion_mnist/train.py --training-data train.npz    # only this file

Needs about six minutes on one core. The seed is fixed; another version of torch may still give
weights that differ a little.
"""

from __future__ import annotations

import argparse
import gzip
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

EPOCHS = 6
BATCH = 128
PEAK_LEARNING_RATE = 0.15


def conv_norm(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Module:
    """Convolution without bias, then BatchNorm."""
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class InvertedResidual(nn.Module):
    """Expand, depthwise 3×3, project, add the input. `[n, c, h, w]` to the same shape."""

    def __init__(self, channels: int, expanded: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            conv_norm(channels, expanded, 1),
            nn.ReLU(),
            conv_norm(expanded, expanded, 3, groups=expanded),
            nn.ReLU(),
            conv_norm(expanded, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def network() -> nn.Module:
    """Pixels 0..255 `[n, 1, 28, 28]` to logits `[n, 10]`; the first BatchNorm sets the scale."""
    return nn.Sequential(
        conv_norm(1, 16, 5, stride=2),
        nn.ReLU(),
        conv_norm(16, 32, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        conv_norm(32, 32, 3, groups=32),
        nn.ReLU(),
        conv_norm(32, 96, 1),
        InvertedResidual(96, 192),
        InvertedResidual(96, 192),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(96, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """Decode one file of the data set: big-endian shape, then bytes."""
    data = gzip.decompress(path.read_bytes())
    rank = data[3]
    shape = np.frombuffer(data, ">i4", rank, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def read_part(folder: Path, part: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Images `[n, 1, 28, 28]` and labels `[n]` of `train` or `t10k`."""
    images = read_idx(folder / f"{part}-images-idx3-ubyte.gz")[:, None]
    return images, read_idx(folder / f"{part}-labels-idx1-ubyte.gz").astype(np.int64)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is at the label."""
    model.eval()
    with torch.no_grad():
        answers = torch.cat([model(batch.float()).argmax(1) for batch in images.split(500)])
    return float((answers == labels).float().mean())


def train(model: nn.Module, images: Tensor, labels: Tensor, test: tuple[Tensor, Tensor]) -> None:
    """One-cycle SGD with horizontal flips; prints a line per epoch."""
    steps = len(images) // BATCH
    optimizer = torch.optim.SGD(
        model.parameters(), PEAK_LEARNING_RATE, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, steps * EPOCHS)
    start = time.perf_counter()
    for epoch in range(EPOCHS):
        model.train()
        for indices in torch.randperm(len(images))[: steps * BATCH].split(BATCH):
            batch = images[indices].float().contiguous(memory_format=torch.channels_last)
            flipped = torch.rand(len(batch)) < 0.5
            batch[flipped] = batch[flipped].flip(3)
            optimizer.zero_grad()
            functional.cross_entropy(model(batch), labels[indices]).backward()
            optimizer.step()
            schedule.step()
        seconds = time.perf_counter() - start
        print(f"epoch {epoch + 1}: test {accuracy(model, *test):.2%}, {seconds:.0f} s", flush=True)


def export(model: nn.Module, path: Path) -> None:
    """Write ONNX with a dynamic batch, BatchNorm left in place."""
    options: dict[str, Any] = {
        "input_names": ["image"],
        "output_names": ["logits"],
        "dynamic_axes": {"image": {0: "N"}, "logits": {0: "N"}},
        "opset_version": 17,
        "training": torch.onnx.TrainingMode.PRESERVE,
        "dynamo": False,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model.eval(), (torch.zeros(1, 1, 28, 28),), str(path), **options)


def main() -> None:
    """Train, export, and write 2,000 test and 256 training images."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--training-data", type=Path, help="write the 60,000 images, do no more")
    arguments = parser.parse_args()
    if not arguments.data.is_dir():
        parser.error(f"{arguments.data} is missing: apt-get install dataset-fashion-mnist")
    images, labels = read_part(arguments.data, "train")
    if arguments.training_data is not None:
        np.savez_compressed(arguments.training_data, image=images, labels=labels)
        return
    torch.manual_seed(0)
    torch.set_num_threads(1)
    test_images, test_labels = read_part(arguments.data, "t10k")
    model = network().to(memory_format=torch.channels_last)
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    test = torch.from_numpy(test_images.copy()), torch.from_numpy(test_labels)
    train(model, torch.from_numpy(images.copy()), torch.from_numpy(labels), test)
    export(model, arguments.output / "fashion_mnist.onnx")
    np.savez_compressed(
        arguments.output / "test_2000.npz", image=test_images[:2000], labels=test_labels[:2000]
    )
    np.savez_compressed(arguments.output / "calib_256.npz", image=images[:256])


if __name__ == "__main__":
    main()
