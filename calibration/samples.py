"""Reads samples: an `.npz` with one array per model input, or a folder of images."""

from __future__ import annotations

import difflib
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgepress.calibration.base import Array, CalibrationError, Samples

DType = np.dtype[Any]
IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How an image becomes a model input: `(pixel · scale - mean) / std`, channel by channel.

    Layout and size are those of the input: `[1, 3, 224, 224]` is NCHW, `[1, 224, 224, 3]` NHWC;
    one channel means grey.

    Attributes:
        resize: the short side in pixels after resizing, which keeps the aspect; None takes the
            least that covers the input.
        crop: cut the centre in the input's size; false stretches the whole image to that size.
        scale: factor on pixels of 0 to 255.
        mean: per channel in the order of `channels`, or one for all.
        std: as mean.
        channels: "rgb" or "bgr".
        interpolation: "nearest", "bilinear", "bicubic" or "lanczos".
    """

    resize: int | None = None
    crop: bool = True
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    channels: str = "rgb"
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if self.channels not in ("rgb", "bgr"):
            raise CalibrationError(
                f"preprocess: channels is {self.channels!r}; choose 'rgb' or 'bgr'."
            )
        if self.interpolation not in INTERPOLATIONS:
            raise CalibrationError(
                f"preprocess: interpolation is {self.interpolation!r}; "
                f"choose one of {', '.join(INTERPOLATIONS)}."
            )
        if self.resize is not None and self.resize < 1:
            raise CalibrationError(f"preprocess: resize is {self.resize}; it must be positive.")
        if self.resize is not None and not self.crop:
            raise CalibrationError(
                "preprocess: resize keeps the aspect, so it needs crop; remove resize to stretch."
            )
        if not all(self.std):
            raise CalibrationError("preprocess: std holds a 0; it divides.")


def load_samples(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, DType],
    preprocess: Preprocess | None = None,
    limit: int | None = None,
) -> Samples:
    """Read samples and check them against the model's inputs.

    Args:
        path: an `.npz` file, or a folder of images (which needs the `images` extra).
        shapes: the fixed shape of every model input, by name.
        dtypes: the dtype of every model input, by name.
        preprocess: for images; None takes the defaults.
        limit: use no more than this many samples, the first ones.

    Returns:
        Samples in the shapes that Samples documents, cast to the model's dtypes. An array may
        keep or leave out the batch axis of 1: for an input `[1, 1, 28, 28]` both `[n, 1, 28, 28]`
        and `[n, 1, 1, 28, 28]` are read. Casts never scale: uint8 pixels become 0.0 to 255.0.

    Raises:
        CalibrationError: there is no such file, it is damaged, names, shapes, dtypes or counts do
            not fit, there are no samples, or a value is NaN or infinite.
    """
    if limit is not None and limit < 1:
        raise CalibrationError(f"{path}: the limit of samples is {limit}; it must be at least 1.")
    if not path.exists():
        raise CalibrationError(f"{path}: there is no such file or folder.")
    if path.is_dir():
        return _from_images(path, shapes, dtypes, preprocess or Preprocess(), limit)
    if preprocess is not None:
        raise CalibrationError(
            f"{path}: preprocess is for folders of images, arrays are used as they are; remove it."
        )
    return _from_npz(path, shapes, dtypes, limit)


def _from_npz(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, DType],
    limit: int | None,
) -> Samples:
    """Read one array per input, and labels."""
    arrays = _read_npz(path)
    labels = arrays.pop("labels", None) if "labels" not in shapes else None
    _check_names(path, arrays, shapes)
    inputs = {name: _shaped(path, name, arrays[name], shapes[name])[:limit] for name in shapes}
    count = _count(path, {name: len(arrays[name]) for name in shapes})
    inputs = {name: _cast(path, name, array, dtypes[name]) for name, array in inputs.items()}
    if labels is not None:
        labels = _checked_labels(path, labels, count)[:limit]
    return Samples(inputs, labels, str(path))


def _read_npz(path: Path) -> dict[str, Array]:
    """Read every array of the file. Objects would run code, so they are refused."""
    try:
        # np.load leaves a file open that it opened itself and cannot read
        with path.open("rb") as stream:
            loaded = np.load(stream, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise CalibrationError(
                    f"{path}: it holds a single array without a name; write it with "
                    "np.savez(path, INPUT_NAME=array)."
                )
            with loaded:
                return {name: loaded[name] for name in loaded.files}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise CalibrationError(
            f"{path}: not a readable .npz of plain arrays ({error}); write it with np.savez."
        ) from error


def _check_names(
    path: Path, arrays: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse missing and unknown arrays, in one message."""
    missing = [name for name in shapes if name not in arrays]
    unknown = [name for name in arrays if name not in shapes]
    if not missing and not unknown:
        return
    faults = []
    if missing:
        faults.append(f"no array for the model's input {', '.join(map(repr, missing))}")
    for name in unknown:
        near = difflib.get_close_matches(name, missing, 1, 0.4)
        hint = f" (is it {near[0]!r}?)" if near else ""
        faults.append(f"the array {name!r} is no input of the model{hint}")
    raise CalibrationError(
        f"{path}: {'; '.join(faults)}. The model's inputs are {', '.join(shapes)}; "
        "name the arrays after them."
    )


def _shaped(path: Path, name: str, array: Array, shape: tuple[int, ...]) -> Array:
    """Return the array as `[n, *shape without its batch axis of 1]`."""
    sample = shape[1:] if shape[:1] == (1,) else shape
    if array.ndim and array.shape[1:] in (sample, shape):
        return array.reshape(array.shape[0], *sample)
    expected = str(["n", *sample]).replace("'", "")
    raise CalibrationError(
        f"{path}: array {name!r} has shape {list(array.shape)}, expected {expected}, "
        "n samples on a leading axis."
    )


def _count(path: Path, counts: Mapping[str, int]) -> int:
    """Return how many samples there are; refuse none, and arrays that disagree."""
    if len(set(counts.values())) > 1:
        each = ", ".join(f"{name!r} has {count}" for name, count in counts.items())
        raise CalibrationError(f"{path}: the arrays hold different numbers of samples: {each}.")
    count = next(iter(counts.values()), 0)
    if not count:
        raise CalibrationError(f"{path}: it holds no samples; at least one is needed.")
    return count


def _cast(path: Path, name: str, array: Array, dtype: DType) -> Array:
    """Cast without loss (float64 to float32 apart), and refuse NaN and infinity."""
    floats = array.dtype.kind == "f" and dtype.kind == "f"
    if not floats and not np.can_cast(array.dtype, dtype, "safe"):
        raise CalibrationError(
            f"{path}: array {name!r} has dtype {array.dtype}, the model's input is {dtype}; "
            f"convert it with .astype(np.{dtype})."
        )
    if array.dtype.kind != "f":
        return array.astype(dtype)
    with np.errstate(over="ignore"):  # what overflows is refused as infinite
        cast = array.astype(dtype)
    finite = np.isfinite(cast.reshape(len(cast), -1)).all(axis=1)
    if not finite.all():
        index = int(np.argmin(finite))
        what = "NaN" if np.isnan(cast[index]).any() else f"a value beyond {dtype}"
        raise CalibrationError(
            f"{path}: array {name!r} holds {what} in sample {index}; "
            "remove the sample or mend its preprocessing."
        )
    return cast


def _checked_labels(path: Path, labels: Array, count: int) -> Array:
    """Return labels as `[n]` int64."""
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise CalibrationError(
            f"{path}: labels have shape {list(labels.shape)} and dtype {labels.dtype}, "
            "expected [n] class numbers."
        )
    if len(labels) != count:
        raise CalibrationError(f"{path}: {len(labels)} labels for {count} samples.")
    return labels.astype(np.int64)


def _from_images(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, DType],
    preprocess: Preprocess,
    limit: int | None,
) -> Samples:
    """Read every image of a folder, in the order of their names."""
    if len(shapes) != 1:
        raise CalibrationError(
            f"{folder}: images can feed a single input, the model has {len(shapes)} "
            f"({', '.join(shapes)}); write an .npz."
        )
    ((name, shape),) = shapes.items()
    if len(shape) != 4 or shape[0] != 1 or (shape[1] not in (1, 3) and shape[3] not in (1, 3)):
        raise CalibrationError(
            f"{folder}: the input {name!r} of shape {list(shape)} is no image of 1 or 3 channels; "
            "write an .npz."
        )
    if dtypes[name] != np.float32:
        raise CalibrationError(
            f"{folder}: the input {name!r} is {dtypes[name]}, images become float32; write an .npz."
        )
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGES)
    if not files:
        raise CalibrationError(f"{folder}: no images in it; known are {', '.join(IMAGES)}.")
    images = [read_image(file, shape, preprocess) for file in files[:limit]]
    return Samples({name: np.stack(images)}, None, str(folder))


def read_image(file: Path, shape: tuple[int, ...], preprocess: Preprocess) -> Array:
    """Read one image for an input of this shape.

    Args:
        file: any format that Pillow knows.
        shape: `[1, C, H, W]` or `[1, H, W, C]`, C being 1 or 3.
        preprocess: how.

    Returns:
        float32 `[C, H, W]` or `[H, W, C]`.

    Raises:
        CalibrationError: Pillow is not installed, the file is no image, or it is too small.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise CalibrationError(
            f"{file}: reading images needs Pillow; install it with pip install 'edgepress[images]'."
        ) from error
    first = shape[1] in (1, 3)
    channels, height, width = shape[1:] if first else (shape[3], *shape[1:3])
    for what, values in (("mean", preprocess.mean), ("std", preprocess.std)):
        if len(values) not in (1, channels):
            raise CalibrationError(
                f"preprocess: {what} has {len(values)} entries, the input has {channels} channels."
            )
    method = Image.Resampling[preprocess.interpolation.upper()]
    try:
        with Image.open(file) as opened:
            image = opened.convert("L" if channels == 1 else "RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise CalibrationError(f"{file}: not a readable image ({error}); remove it.") from error
    if preprocess.crop:
        ratio = max(width / image.width, height / image.height)
        if preprocess.resize is not None:
            ratio = preprocess.resize / min(image.size)
        size = (round(image.width * ratio), round(image.height * ratio))
        if size[0] < width or size[1] < height:
            raise CalibrationError(
                f"{file}: resized to {size[0]}x{size[1]} pixels it does not cover the input of "
                f"{width}x{height}; raise preprocess.resize."
            )
        left, top = (size[0] - width) // 2, (size[1] - height) // 2
        image = image.resize(size, method).crop((left, top, left + width, top + height))
    else:
        image = image.resize((width, height), method)
    pixels = np.asarray(image, np.float32).reshape(height, width, channels)
    if preprocess.channels == "bgr":
        pixels = pixels[:, :, ::-1]
    mean, std = np.asarray(preprocess.mean, np.float32), np.asarray(preprocess.std, np.float32)
    pixels = (pixels * np.float32(preprocess.scale) - mean) / std
    return np.ascontiguousarray(pixels.transpose(2, 0, 1) if first else pixels, np.float32)
