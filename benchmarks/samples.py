"""Images and texts out of packages, as the arrays that the models take."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from packages import FOOLBOX, MNIST, SKIMAGE, SKLEARN, VADER
from PIL import Image

Array = npt.NDArray[Any]
Pixels = Callable[[Image.Image], Array]

CALIBRATION_PHOTOS = (
    *(
        (SKIMAGE, f"skimage/data/{name}")
        for name in (
            "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png",
            "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png",
            "motorcycle_left.png", "retina.jpg", "rocket.jpg",
        )
    ),
    (SKLEARN, "sklearn/datasets/images/china.jpg"),
    (SKLEARN, "sklearn/datasets/images/flower.jpg"),
)  # fmt: skip


def mnist_images(part: str) -> Array:
    """Images of `train` or `t10k` as float32 `[n, 1, 28, 28]` in 0..1."""
    return (_idx(f"{part}-images-idx3-ubyte")[:, None] / 255).astype(np.float32)


def mnist_labels(part: str) -> Array:
    """Labels of `train` or `t10k`, int64 `[n]`."""
    return _idx(f"{part}-labels-idx1-ubyte").astype(np.int64)


def calibration_photos(pixels: Pixels) -> Array:
    """16 unlabelled photos as `[16, 3, h, w]`."""
    files = (package.read(member) for package, member in CALIBRATION_PHOTOS)
    return np.stack([pixels(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])


def labelled_photos(pixels: Pixels) -> tuple[Array, Array]:
    """20 ImageNet photos `[20, 3, h, w]` and their labels, which end the file names."""
    names = FOOLBOX.members("foolbox/data/imagenet_")
    photos = [pixels(Image.open(io.BytesIO(FOOLBOX.read(n))).convert("RGB")) for n in names]
    labels = [int(re.findall(r"_(\d+)\.jpg$", name)[0]) for name in names]
    return np.stack(photos), np.array(labels, np.int64)


def movie_snippets(count: int) -> list[str]:
    """The first sentences about films, in English."""
    return [text for _, text in scored_snippets()[:count]]


def scored_snippets() -> list[tuple[float, str]]:
    """All sentences about films with what people thought of their mood, from -4 to 4."""
    inner = VADER.read("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        (name,) = (
            n for n in archive.getnames() if n.endswith("/movieReviewSnippets_GroundTruth.txt")
        )
        file = archive.extractfile(name)
        lines = file.read().decode("latin-1").splitlines() if file else []
    rows = (line.split("\t") for line in lines if line.count("\t") >= 2)
    return [(float(row[1]), row[2]) for row in rows]


def squeezenet_pixels(photo: Image.Image) -> Array:
    """Centre square, 227 pixels, BGR minus the mean, `[3, 227, 227]`."""
    square = _centre(photo, min(photo.size)).resize((227, 227), Image.Resampling.BICUBIC)
    bgr = np.asarray(square, np.float32)[..., ::-1]
    mean = np.array([103.939, 116.779, 123.68], np.float32)
    return np.ascontiguousarray((bgr - mean).transpose(2, 0, 1))


def efficientnet_pixels(photo: Image.Image) -> Array:
    """Centre 7/8 of the short side, 224 pixels, about -1..1, `[3, 224, 224]`."""
    square = _centre(photo, int(224 / (224 + 32) * min(photo.size)))
    resized = np.asarray(square.resize((224, 224), Image.Resampling.BICUBIC), np.float32)
    return np.ascontiguousarray(((resized - 127) / 128).transpose(2, 0, 1))


def _centre(photo: Image.Image, side: int) -> Image.Image:
    left, top = (photo.width - side) // 2, (photo.height - side) // 2
    return photo.crop((left, top, left + side, top + side))


def _idx(name: str) -> Array:
    """Decode one MNIST file: big-endian shape, then bytes."""
    data = MNIST.read(f"package/data/{name}")
    rank = data[3]
    shape = np.frombuffer(data, ">i4", rank, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)
