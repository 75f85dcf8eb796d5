from __future__ import annotations

import math

import numpy as np
import pytest

import tests.torch_needed as needed
from edgepress.passes._augmentation import distorted
from edgepress.passes.tune_codebooks import TuneCodebooks
from tests.graphs import Array, random

torch = needed.torch

COUNT, HEIGHT, WIDTH = 5, 6, 9


def drawn(seed: int, **options: float) -> tuple[Array, Array]:
    """Images before and after."""
    x = random(COUNT, 2, HEIGHT, WIDTH)
    chosen = TuneCodebooks(**options)  # type: ignore[arg-type]
    y = distorted(torch.tensor(x), chosen, torch.Generator().manual_seed(seed))
    return x, y.numpy()


def bilinear(image: Array, row: float, column: float) -> Array:
    """The value between pixels, or at the nearest place in the image: [channels]."""
    row, column = min(max(row, 0), HEIGHT - 1), min(max(column, 0), WIDTH - 1)
    top, left = math.floor(row), math.floor(column)
    bottom, right = min(top + 1, HEIGHT - 1), min(left + 1, WIDTH - 1)
    v, u = row - top, column - left
    upper = (1 - u) * image[:, top, left] + u * image[:, top, right]
    lower = (1 - u) * image[:, bottom, left] + u * image[:, bottom, right]
    return np.asarray((1 - v) * upper + v * lower)


@pytest.mark.parametrize(
    "options",
    [
        {"rotation_degrees": 40.0},
        {"scaling": 0.4},
        {"shear": 0.5},
        {"shift_pixels": 2.5},
        {"rotation_degrees": 20.0, "scaling": 0.2, "shear": 0.3, "shift_pixels": 1.5},
    ],
    ids=str,
)
def test_every_pixel_comes_from_where_the_map_says(options: dict[str, float]) -> None:
    x, y = drawn(3, **options)
    random_numbers = torch.Generator().manual_seed(3)
    amounts = ("rotation_degrees", "scaling", "shear", "shift_pixels", "shift_pixels")
    angle, scale, shear, right, down = (
        (2 * torch.rand(COUNT, generator=random_numbers).numpy() - 1) * options.get(name, 0)
        for name in amounts
    )
    want = np.empty_like(x)
    for i in range(COUNT):
        turn = math.radians(float(angle[i]))
        rotate = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        matrix = rotate @ np.array([[1, shear[i]], [0, 1]]) / (1 + scale[i])
        for row in range(HEIGHT):
            for column in range(WIDTH):
                middle = np.array([(WIDTH - 1) / 2, (HEIGHT - 1) / 2])
                place = matrix @ (np.array([column, row]) - middle) + middle
                source = bilinear(x[i], place[1] + down[i], place[0] + right[i])
                want[i, :, row, column] = source
    assert np.abs(y - x).max() > 0.1
    np.testing.assert_allclose(y, want, atol=2e-5)


def test_nothing_moves_by_default() -> None:
    x, y = drawn(0)
    np.testing.assert_allclose(y, x, atol=1e-5)


def test_every_image_moves_by_itself_and_every_time() -> None:
    image = torch.tensor(np.repeat(random(1, 1, HEIGHT, WIDTH), 4, axis=0))
    generator = torch.Generator().manual_seed(0)
    options = TuneCodebooks(shift_pixels=2.0)
    found = torch.cat([distorted(image, options, generator) for _ in range(2)]).numpy()
    assert len({array.tobytes() for array in found}) == 8


def test_a_constant_image_stays_constant() -> None:
    """What comes in from outside repeats the border."""
    options = TuneCodebooks(rotation_degrees=45.0, shift_pixels=5.0, scaling=0.5)
    flat = torch.full((3, 1, 4, 4), 7.0)
    found = distorted(flat, options, torch.Generator().manual_seed(1))
    np.testing.assert_allclose(found.numpy(), 7.0, rtol=1e-6)
