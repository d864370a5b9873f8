"""Augmentation of whole batches of uint8 images, on the device they live on.

Every function takes the generator it draws from: the same generator state gives the same images.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Generator, Tensor
from torch.nn import functional


def random_crop(images: Tensor, generator: Generator, *, padding: int) -> Tensor:
    """Shift each image on its own by up to `padding` pixels up, down, left and right; what comes in is 0 (black).

    The same as padding by `padding` on every side and cutting out a window of the old size at random.

    Args:
        images: [N, C, H, W], any dtype.
        generator: on the device of `images`.
        padding: pixels, at least 0.

    Returns:
        New images, [N, C, H, W].
    """
    N, _, H, W = images.shape
    padded = functional.pad(images, (padding,) * 4)
    # Views of every possible window, [N, C, 2 padding + 1, 2 padding + 1, H, W]: choosing copies only whole rows.
    windows = padded.unfold(2, H, 1).unfold(3, W, 1)
    top, left = torch.randint(2 * padding + 1, (2, N), generator=generator, device=images.device)
    return windows[torch.arange(N, device=images.device), :, top, left]


def random_flip(images: Tensor, generator: Generator) -> Tensor:
    """Mirror each image left to right with probability 1/2.

    Args:
        images: [N, C, H, W], any dtype.
        generator: on the device of `images`.

    Returns:
        New images, [N, C, H, W].
    """
    flip = torch.rand(len(images), generator=generator, device=images.device) < 0.5
    return torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)


def _crop_and_flip(images: Tensor, generator: Generator) -> Tensor:
    return random_flip(random_crop(images, generator, padding=4), generator)


AUGMENTATIONS: dict[str, Callable[[Tensor, Generator], Tensor]] = {
    "none": lambda images, generator: images,
    "shift": partial(random_crop, padding=1),  # digits: 8 x 8 pixels leave room for one
    "crop": partial(random_crop, padding=4),
    "crop-flip": _crop_and_flip,  # CIFAR
}
