"""Random changes to images that leave their class as it is.

This module imports torch: import it inside functions only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from edgepress.passes._training import TrainingPass


def distorted(images: Tensor, options: TrainingPass, random: torch.Generator) -> Tensor:
    """Turn, scale, shear and move every image at random, by one affine map each.

    Values between pixels are interpolated linearly; what comes in from outside repeats the border.

    Args:
        images: `[n, channels, height, width]`.
        options: how far; every amount is uniform between ± the option.
        random: draws the amounts.
    """
    count, _, height, width = images.shape

    def uniform(most: float) -> Tensor:
        return (2 * torch.rand(count, generator=random) - 1) * most

    angle, scale = uniform(math.radians(options.rotation_degrees)), 1 + uniform(options.scaling)
    shear = uniform(options.shear)
    right, down = uniform(options.shift_pixels), uniform(options.shift_pixels)
    # From where in the old image each pixel comes, counted from the middle, in pixels. The shear
    # comes first. torch counts in half widths and half heights instead.
    cosine, sine = torch.cos(angle) / scale, torch.sin(angle) / scale
    aspect = height / width
    rows = (
        (cosine, (shear * cosine - sine) * aspect, 2 * right / width),
        (sine / aspect, shear * sine + cosine, 2 * down / height),
    )
    maps = torch.stack([torch.stack(row, 1) for row in rows], 1).to(images.dtype)
    grid = functional.affine_grid(maps, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
