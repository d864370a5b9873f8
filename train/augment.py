"""Augmentation of whole batches of uint8 images, on the device they live on.

Every function takes images [N, C, H, W], of any dtype, and the generator that it draws from, on their device, and gives
new images of that shape: the same generator state gives the same ones. Frames are augmented by `same_at_every_step`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Generator, Tensor
from torch.nn import functional

from .autoaugment import autoaugment


def random_crop(images: Tensor, generator: Generator, *, padding: int) -> Tensor:
    """Shift each image on its own by up to `padding` pixels up, down, left and right; what comes in is 0 (black).

    The same as padding by `padding` on every side and cutting out a window of the old size at random.
    """
    N, _, H, W = images.shape
    padded = functional.pad(images, (padding,) * 4)
    # Views of every possible window, [N, C, 2 padding + 1, 2 padding + 1, H, W]: choosing copies only whole rows.
    windows = padded.unfold(2, H, 1).unfold(3, W, 1)
    top, left = torch.randint(2 * padding + 1, (2, N), generator=generator, device=images.device)
    return windows[torch.arange(N, device=images.device), :, top, left]


def random_flip(images: Tensor, generator: Generator) -> Tensor:
    """Mirror each image left to right with probability 1/2."""
    flip = torch.rand(len(images), generator=generator, device=images.device) < 0.5
    return torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)


def random_roll(images: Tensor, generator: Generator, *, pixels: int) -> Tensor:
    """Roll each image on its own by up to `pixels` up, down, left and right; what leaves comes in on the other side."""
    N, _, H, W = images.shape
    device = images.device
    down, right = torch.randint(-pixels, pixels + 1, (2, N, 1), generator=generator, device=device)
    rows = (torch.arange(H, device=device) - down) % H
    columns = (torch.arange(W, device=device) - right) % W
    chosen = images[torch.arange(N, device=device)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return chosen.movedim(-1, 1).contiguous()  # indices apart from each other put [N, H, W] first


def cutout(images: Tensor, generator: Generator, *, size: int, fill: Tensor) -> Tensor:
    """Blank a square of `size` pixels of each image, centred on any pixel and so partly outside near a border.

    (DeVries and Taylor, Improved Regularization of Convolutional Neural Networks with Cutout, 2017.)

    Args:
        size: side of the square, at least 0.
        fill: values of a blank pixel, [C] in the dtype of `images`; fewer are repeated over the channels.
    """
    N, C, H, W = images.shape
    device = images.device
    top, left = (torch.randint(side, (N, 1), generator=generator, device=device) - size // 2 for side in (H, W))
    rows, columns = torch.arange(H, device=device), torch.arange(W, device=device)
    in_rows, in_columns = (rows >= top) & (rows < top + size), (columns >= left) & (columns < left + size)
    square = in_rows[:, None, :, None] & in_columns[:, None, None, :]
    return torch.where(square, fill.repeat(C // len(fill)).view(-1, 1, 1), images)


def same_at_every_step(augment: Callable[[Tensor, Generator], Tensor], images: Tensor, generator: Generator) -> Tensor:
    """Apply `augment` to images [N, C, H, W], or to frames [N, T, C, H, W] as to images of T x C channels.

    All steps of a sequence are flipped, cut out and rolled alike, as one moving picture.
    """
    if images.dim() == 4:
        return augment(images, generator)
    augmented: Tensor = augment(images.flatten(1, 2), generator).unflatten(1, images.shape[1:3])
    return augmented


def _flip_and_roll(images: Tensor, generator: Generator) -> Tensor:
    return random_roll(random_flip(images, generator), generator, pixels=5)


def _crop_and_flip(images: Tensor, generator: Generator) -> Tensor:
    return random_flip(random_crop(images, generator, padding=4), generator)


def _crop_flip_autoaugment(images: Tensor, generator: Generator) -> Tensor:
    return autoaugment(_crop_and_flip(images, generator), _on_the_host(generator))


def _on_the_host(generator: Generator) -> Generator:
    """A generator on the CPU with the seed of one on a GPU, whose numbers would have to be waited for."""
    return generator if generator.device.type == "cpu" else Generator().manual_seed(generator.initial_seed())


# Of image files, as they are decoded: see `disk_images`.
RESIZED_CROP = "resized-crop"

AUGMENTATIONS: dict[str, Callable[[Tensor, Generator], Tensor]] = {
    "none": lambda images, generator: images,
    "shift": partial(random_crop, padding=1),  # digits: 8 x 8 pixels leave room for one
    "crop": partial(random_crop, padding=4),
    "crop-flip": _crop_and_flip,  # CIFAR
    "autoaugment": _crop_flip_autoaugment,
    "flip-roll": _flip_and_roll,  # DVS-CIFAR10
}
