from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepress.calibration.base import Array, CalibrationError, Samples
from edgepress.calibration.samples import Preprocess, load_samples

SHAPES: dict[str, tuple[int, ...]] = {"image": (1, 3, 4, 4), "ids": (1, 5)}
DTYPES: dict[str, np.dtype[Any]] = {"image": np.dtype(np.float32), "ids": np.dtype(np.int64)}


def arrays(n: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "image": rng.standard_normal((n, 3, 4, 4)).astype(np.float32),
        "ids": rng.integers(0, 9, (n, 5)),
    }


def written(folder: Path, **changes: np.ndarray | None) -> Path:
    content = {name: a for name, a in (arrays() | changes).items() if a is not None}
    path = folder / "d.npz"
    np.savez(path, allow_pickle=True, **content)
    return path


def read(path: Path, **options: Any) -> Samples:
    return load_samples(path, SHAPES, DTYPES, **options)


def test_arrays_and_labels_are_read(tmp_path: Path) -> None:
    samples = read(written(tmp_path, labels=np.array([2, 0, 1], np.uint8)))
    assert len(samples) == 3
    np.testing.assert_array_equal(samples.inputs["image"], arrays()["image"])
    assert samples.labels is not None
    assert samples.labels.tolist() == [2, 0, 1]
    assert samples.labels.dtype == np.int64
    feed = next(samples.feeds(SHAPES))
    assert feed["image"].shape == (1, 3, 4, 4)
    assert read(written(tmp_path)).labels is None


def test_the_batch_axis_may_be_kept(tmp_path: Path) -> None:
    kept = read(written(tmp_path, image=arrays()["image"][:, None], ids=arrays()["ids"][:, None]))
    assert kept.sha256() == read(written(tmp_path)).sha256()


def test_an_input_without_a_batch_axis_keeps_its_shape(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((7, 2, 5), np.float32), s=np.ones(7, np.float32))
    floats = np.dtype(np.float32)
    samples = load_samples(tmp_path / "d.npz", {"x": (2, 5), "s": ()}, {"x": floats, "s": floats})
    assert samples.inputs["x"].shape == (7, 2, 5)
    feed = next(samples.feeds({"x": (2, 5), "s": ()}))
    assert isinstance(feed["s"], np.ndarray)  # onnxruntime refuses NumPy's own scalars
    assert feed["s"].shape == ()


def test_the_limit_takes_the_first(tmp_path: Path) -> None:
    path = written(tmp_path, labels=np.array([5, 6, 7]))
    samples = read(path, limit=2)
    np.testing.assert_array_equal(samples.inputs["ids"], arrays()["ids"][:2])
    assert samples.labels is not None
    assert samples.labels.tolist() == [5, 6]
    assert len(read(path, limit=99)) == 3


@pytest.mark.parametrize("dtype", [np.uint8, np.float64, np.float16, np.int16])
def test_safe_casts_do_not_scale(tmp_path: Path, dtype: type) -> None:
    pixels: Array = np.arange(144).reshape(3, 3, 4, 4).astype(dtype)
    ids = arrays()["ids"].astype(np.int32)
    samples = read(written(tmp_path, image=pixels, ids=ids))
    assert samples.inputs["image"].dtype == np.float32
    assert samples.inputs["ids"].dtype == np.int64
    np.testing.assert_array_equal(samples.inputs["image"], pixels.astype(np.float32))


NAN = arrays()["image"].copy()
NAN[1, 2, 3, 3] = np.nan


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": None}, "no array for the model's input 'image'"),
        ({"image": None, "imgae": np.zeros(1)}, r"'imgae' is no input of the .* \(is it 'image'\?"),
        ({"other": np.zeros(1)}, "'other' is no input of the model. The model's inputs are image"),
        ({"image": np.zeros((3, 4, 4, 3), "f")}, r"shape \[3, 4, 4, 3\], expected \[n, 3, 4, 4\]"),
        ({"image": np.zeros((3, 3, 4), "f")}, r"shape \[3, 3, 4\], expected \[n, 3, 4, 4\]"),
        ({"image": np.float32(1)}, r"shape \[\], expected"),
        ({"ids": np.zeros((3, 5), np.float32)}, r"dtype float32, the model's input is int64"),
        ({"image": np.zeros((3, 3, 4, 4), "c8")}, "dtype complex64"),
        ({"image": np.full((3, 3, 4, 4), "a")}, "the model's input is float32"),
        ({"image": np.zeros((3, 3, 4, 4), object)}, r"not a readable .npz of plain arrays"),
        ({"image": NAN}, "'image' holds NaN in sample 1"),
        ({"image": np.full((3, 3, 4, 4), 1e300)}, "a value beyond float32 in sample 0"),
        ({"image": np.full((3, 3, 4, 4), -np.inf, "f")}, "a value beyond float32 in sample 0"),
        ({"ids": np.zeros((2, 5), int)}, "'image' has 3, 'ids' has 2"),
        ({n: a[:0] for n, a in arrays().items()}, "holds no samples"),
        ({"labels": np.arange(2)}, "2 labels for 3 samples"),
        ({"labels": np.zeros(3)}, "labels have shape .* dtype float64"),
        ({"labels": np.zeros((3, 1), int)}, r"labels have shape \[3, 1\]"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit_are_refused(
    tmp_path: Path, changes: dict[str, np.ndarray | None], message: str
) -> None:
    with pytest.raises(CalibrationError, match=message) as caught:
        read(written(tmp_path, **changes))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_npz_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no such file"):
        read(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(CalibrationError, match=r"not a readable \.npz"):
        read(tmp_path / "text.npz")
    (tmp_path / "empty.npz").touch()
    with pytest.raises(CalibrationError, match=r"not a readable \.npz"):
        read(tmp_path / "empty.npz")
    np.save(tmp_path / "one.npy", arrays()["image"])
    with pytest.raises(CalibrationError, match="single array without a name"):
        read(tmp_path / "one.npy")
    whole = written(tmp_path).read_bytes()
    for name, content in {
        "cut.npz": whole[: len(whole) // 2],
        "flipped.npz": whole[:300] + bytes([whole[300] ^ 1]) + whole[301:],
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CalibrationError, match=r"not a readable \.npz"):
            read(tmp_path / name)
    with pytest.raises(CalibrationError, match="limit of samples is 0"):
        read(tmp_path / "d.npz", limit=0)
    with pytest.raises(CalibrationError, match="preprocess is for folders"):
        read(tmp_path / "d.npz", preprocess=Preprocess())


def pictures(folder: Path, size: tuple[int, int] = (8, 6)) -> Path:
    """Two pictures, stored without loss; the red channel counts columns, the green one rows."""
    image = pytest.importorskip("PIL.Image")
    columns, rows = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    for name, blue in (("b.png", 200), ("a.bmp", 100)):
        pixels = np.stack([columns, rows, np.full_like(rows, blue)], axis=2).astype(np.uint8)
        image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("not a picture")
    return folder


def load_pictures(
    folder: Path, shape: tuple[int, ...] = (1, 3, 6, 8), **options: Any
) -> np.ndarray:
    options.setdefault("scale", 1.0)
    preprocess = Preprocess(**options)
    return load_samples(folder, {"x": shape}, {"x": DTYPES["image"]}, preprocess).inputs["x"]


def test_pictures_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    found = load_pictures(pictures(tmp_path))
    assert found.shape == (2, 3, 6, 8)
    assert found.dtype == np.float32
    assert found[:, 2, 0, 0].tolist() == [100, 200]
    assert found[0, 0, 0].tolist() == list(range(8))
    assert found[0, 1, :, 0].tolist() == list(range(6))
    one = load_samples(
        tmp_path, {"x": (1, 3, 6, 8)}, {"x": DTYPES["image"]}, Preprocess(scale=1.0), limit=1
    )
    np.testing.assert_array_equal(one.inputs["x"], found[:1])


def test_pictures_are_scaled_shifted_and_reordered(tmp_path: Path) -> None:
    plain = load_pictures(pictures(tmp_path))
    options: dict[str, Any] = {
        "scale": 0.5,
        "mean": (1.0, 2.0, 3.0),
        "std": (1.0, 2.0, 4.0),
        "channels": "bgr",
    }
    found = load_pictures(tmp_path, **options)
    columns = plain[:, ::-1] * 0.5 - np.array([1, 2, 3], "f")[:, None, None]
    np.testing.assert_array_equal(found, columns / np.array([1, 2, 4], "f")[:, None, None])
    last = load_pictures(tmp_path, (1, 6, 8, 3))
    np.testing.assert_array_equal(last, plain.transpose(0, 2, 3, 1))
    grey = load_pictures(tmp_path, (1, 1, 6, 8), mean=(5.0,))
    assert grey.shape == (2, 1, 6, 8)


def test_pictures_are_cropped_from_the_centre(tmp_path: Path) -> None:
    pictures(tmp_path)
    found = load_pictures(tmp_path, (1, 3, 4, 4), resize=6)
    assert found[0, 0, 0].tolist() == [2, 3, 4, 5]
    assert found[0, 1, :, 0].tolist() == [1, 2, 3, 4]
    covered = load_pictures(tmp_path, (1, 3, 6, 6))
    assert covered[0, 0, 0].tolist() == [1, 2, 3, 4, 5, 6]
    stretched = load_pictures(tmp_path, (1, 3, 3, 4), crop=False, interpolation="nearest")
    assert stretched[0, 0, 0].tolist() == [1, 3, 5, 7]
    with pytest.raises(CalibrationError, match="does not cover the input of 8x8"):
        load_pictures(tmp_path, (1, 3, 8, 8), resize=6)


def test_folders_and_inputs_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no images in it"):
        load_pictures(tmp_path)
    pictures(tmp_path)
    with pytest.raises(CalibrationError, match="a single input, the model has 2"):
        read(tmp_path)
    with pytest.raises(CalibrationError, match="is no image of 1 or 3 channels"):
        load_pictures(tmp_path, (1, 7, 8, 8))
    with pytest.raises(CalibrationError, match="is uint8, images become float32"):
        load_samples(tmp_path, {"x": (1, 3, 6, 8)}, {"x": np.dtype(np.uint8)})
    with pytest.raises(CalibrationError, match="mean has 2 entries"):
        load_pictures(tmp_path, mean=(1.0, 2.0))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(CalibrationError, match=r"a\.png: not a readable image"):
        load_pictures(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": "gbr"}, "choose 'rgb' or 'bgr'"),
        ({"interpolation": "linear"}, "choose one of nearest, bilinear"),
        ({"resize": 0}, "must be positive"),
        ({"resize": 9, "crop": False}, "needs crop"),
        ({"std": (1.0, 0.0, 1.0)}, "std holds a 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        Preprocess(**options)


def test_without_pillow_the_message_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").touch()
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(CalibrationError, match=r"pip install 'edgepress\[images\]'"):
        load_pictures(tmp_path)


def test_feeds_are_checked_against_the_inputs() -> None:
    whole = Samples(arrays(), source="mine")
    assert len(list(whole.feeds(SHAPES))) == 3
    whole.demand(SHAPES, DTYPES)
    kept = Samples({name: array[:, None] for name, array in arrays().items()})
    assert next(kept.feeds(SHAPES))["ids"].shape == (1, 5)
    for changes, message in (
        ({"ids": arrays()["ids"][:, :4]}, r"mine: 'ids' has shape \[3, 4\], expected \[n, 5\]"),
        ({"ids": np.array(3)}, r"'ids' has shape \[\]"),
        ({"ids": arrays()["ids"][:2]}, "2 samples of 'ids', but 3 of 'image'"),
        ({"image": arrays()["image"].reshape(3, -1)}, r"\[3, 48\], expected \[n, 3, 4, 4\]"),
    ):
        with pytest.raises(CalibrationError, match=message):
            next(Samples(arrays() | changes, source="mine").feeds(SHAPES))
    with pytest.raises(CalibrationError, match="no samples of the model's input 'image', only of"):
        next(Samples({"ids": arrays()["ids"]}).feeds(SHAPES))
    with pytest.raises(CalibrationError, match="'ids' has dtype int32, the model's input is int64"):
        Samples(arrays() | {"ids": arrays()["ids"].astype(np.int32)}).demand(SHAPES, DTYPES)
    with pytest.raises(CalibrationError, match="'image' is NaN in sample 1"):
        Samples(arrays() | {"image": NAN}).demand(SHAPES, DTYPES)
