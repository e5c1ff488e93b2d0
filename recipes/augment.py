"""Random affine augmentation of a batch of images, every row its own."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["random_affine"]


def random_affine(
    images: Tensor, generator: torch.Generator, *, degrees: float, shift: float, stretch: float
) -> Tensor:
    """Rotate, shift, scale and shear each image by its own random amounts.

    torchvision's transforms draw one transformation for a whole batch; here every row needs its own.

    Parameters
    ----------
    images
        `[rows, channels, height, width]`.
    generator
        Source of the amounts, all uniform and symmetric about doing nothing.
    degrees
        Largest rotation either way.
    shift
        Largest shift either way, in pixels, fractions included.
    stretch
        Largest relative change of scale, and largest shear, either way.

    Returns
    -------
    Tensor
        Of the shape of `images`, borders repeated. No rows give no rows.

    """
    rows, _, height, width = images.shape
    if not rows:  # an empty Poisson batch; affine_grid takes none
        return images

    def uniform(limit: float) -> Tensor:
        return (2 * torch.rand(rows, generator=generator) - 1) * limit

    angle, scale, shear = uniform(math.radians(degrees)), 1 + uniform(stretch), uniform(stretch)
    across, down = uniform(2 * shift / width), uniform(2 * shift / height)
    matrices = torch.stack(
        [
            torch.stack([scale * angle.cos(), shear - scale * angle.sin(), across], dim=1),
            torch.stack([scale * angle.sin(), scale * angle.cos(), down], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(matrices.to(images.dtype), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False, padding_mode="border")
