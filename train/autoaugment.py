"""AutoAugment's policy for CIFAR-10 over whole batches, on the device that the images lie on.

(Cubuk et al., AutoAugment: Learning Augmentation Policies from Data, CVPR 2019.) Each image draws one of 25 policies,
two operations in a row, each with a probability; where an operation has a magnitude with a sign, that is drawn as well.
Policies, magnitudes and operations are torchvision's, which takes one image at a time. Here the draws are made on the
host, where no number has to be waited for, and each operation is applied to all images at once that drew it.

Of torchvision's operations those that copy numbers to the device, and so would wait for the steps before, are done
otherwise, with the same pixels: a shift, shear or rotation looks up where each pixel comes from, which torchvision is
asked once for each size of images; and sharpness makes its own kernel.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional

from tetdeploy.system.extras import import_extra

from .device import without_waiting

_LEVELS = 10  # of a magnitude: 0 to 9
_LARGEST = {  # magnitude, at the highest level
    **{"Rotate": 30.0, "ShearY": 0.3, "TranslateX": 150 / 331, "TranslateY": 150 / 331, "Solarize": 255.0},
    **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), 0.9),
}
_SIGNED = _LARGEST.keys() - {"Solarize"}


class Operation(NamedTuple):
    """An operation of the policies, with the sign that was drawn.

    Attributes:
        name: torchvision's.
        level: of its magnitude, -9 to 9; 0 of those that have none.
    """

    name: str
    level: int = 0


class Policies(NamedTuple):
    """The 25 policies of two operations each.

    Attributes:
        operations: all that occur, each once.
        probability: of each policy's operations, [25, 2].
        chosen: which of `operations` they are, [25, 2, 2], the last axis by the sign that was drawn: -, +.
    """

    operations: tuple[Operation, ...]
    probability: Tensor
    chosen: Tensor


@cache
def policies() -> Policies:
    """torchvision's.

    Raises:
        MissingExtraError: torchvision is not installed.
    """
    transforms = import_extra("torchvision.transforms", "train")
    found = transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10).policies
    signed = [
        [
            [Operation(name, (sign if name in _SIGNED else 1) * (level or 0)) for sign in (-1, 1)]
            for name, _, level in pair
        ]
        for pair in found
    ]
    operations = tuple(sorted({operation for pair in signed for both in pair for operation in both}))
    return Policies(
        operations,
        torch.tensor([[probability for _, probability, _ in pair] for pair in found]),
        torch.tensor([[[operations.index(operation) for operation in both] for both in pair] for pair in signed]),
    )


def draw_operations(count: int, generator: Generator) -> Tensor:
    """What each of `count` images undergoes: two indices of `policies().operations`, or their number for nothing.

    Args:
        generator: on the CPU.

    Returns:
        int64 [2, count].
    """
    operations, probability, chosen = policies()
    policy = torch.randint(len(chosen), (count,), generator=generator)
    chance = torch.rand((2, count), generator=generator)
    sign = torch.randint(2, (2, count), generator=generator)
    first_and_second = torch.arange(2)[:, None]
    return torch.where(chance <= probability[policy].T, chosen[policy, first_and_second, sign], len(operations))


def autoaugment(images: Tensor, generator: Generator) -> Tensor:
    """Give each image one of the 25 policies that were found for CIFAR-10, at its own draw.

    Args:
        images: uint8 [N, C, H, W] with C = 1 or 3.
        generator: on the CPU, whatever device the images lie on.

    Returns:
        New images, uint8 [N, C, H, W].

    Raises:
        ValueError: another number of channels, or other than uint8.
        MissingExtraError: torchvision is not installed.
    """
    if images.shape[1] not in (1, 3):
        raise ValueError(f"autoaugment wants images of 1 or 3 channels, got {images.shape[1]}; choose another augment")
    if images.dtype != torch.uint8:
        raise ValueError(f"autoaugment wants uint8 images from 0 to 255, got {images.dtype}")
    operations = policies().operations
    drawn = draw_operations(len(images), generator)
    rows = drawn.argsort(dim=1, stable=True)  # of the images, those with the same operation side by side
    images = images.clone()
    for order, one in zip(without_waiting(rows, images.device), drawn, strict=True):
        counts = one.bincount(minlength=len(operations) + 1).tolist()
        for operation, which in zip(operations, order.split(counts), strict=False):  # the last did not draw any
            if len(which):
                images.index_copy_(0, which, apply(operation, images.index_select(0, which)))
    return images


def apply(operation: Operation, images: Tensor) -> Tensor:
    """One operation on all images, uint8 [N, C, H, W]."""
    ops = import_extra("torchvision.transforms.v2.functional", "train")
    result: Tensor
    match operation.name:
        case "Brightness":
            result = ops.adjust_brightness(images, 1.0 + magnitude(operation))
        case "Color":
            result = ops.adjust_saturation(images, 1.0 + magnitude(operation))
        case "Contrast":
            result = ops.adjust_contrast(images, 1.0 + magnitude(operation))
        case "Sharpness":
            result = _sharpened(images, 1.0 + magnitude(operation))
        case "Posterize":
            result = ops.posterize(images, 8 - round(4 * operation.level / (_LEVELS - 1)))
        case "Solarize":
            result = ops.solarize(images, 255.0 - magnitude(operation))
        case "AutoContrast":
            result = ops.autocontrast(images)
        case "Equalize":
            result = ops.equalize(images)
        case "Invert":
            result = ops.invert(images)
        case _:
            H, W = images.shape[2:]
            padded = functional.pad(images.flatten(2), (1, 0))  # what comes in from outside is 0 (black)
            result = padded.index_select(2, _sources(H, W, images.device)[operation]).unflatten(2, (H, W))
    return result


def magnitude(operation: Operation, side: int = 1) -> float:
    """Degrees of a rotation, tangent of a shear, pixels of a translation by a share of `side`, or what is added to a
    factor of 1."""
    levels = torch.linspace(0.0, _LARGEST[operation.name] * side, _LEVELS)  # in float32, as torchvision has it
    return math.copysign(levels[abs(operation.level)].item(), operation.level)


def _sharpened(images: Tensor, factor: float) -> Tensor:
    """torchvision's `adjust_sharpness`, whose kernel is a list of numbers that goes to the device."""
    C, H, W = images.shape[1:]
    if H <= 2 or W <= 2:
        return images
    kernel = torch.full((C, 1, 3, 3), 1 / 13, device=images.device)
    kernel[:, :, 1, 1] = 5 / 13
    sharpened = images.float()
    inner = sharpened[..., 1:-1, 1:-1]
    blurred = functional.conv2d(sharpened, kernel, groups=C).round_()
    inner.add_(blurred.sub_(inner), alpha=1.0 - factor)
    return sharpened.clamp_(0, 255).to(images.dtype)


@cache
def _sources(H: int, W: int, device: torch.device) -> dict[Operation, Tensor]:
    """Where each pixel comes from in what moves pixels: 0 is outside, the others are counted from 1. int64 [H W]."""
    ops = import_extra("torchvision.transforms.v2.functional", "train")
    pixels = torch.arange(1.0, H * W + 1).view(1, H, W)  # exact in float32 up to 2^24 of them
    sources: dict[Operation, Tensor] = {}
    for operation in policies().operations:
        match operation.name:
            case "Rotate":
                moved = ops.rotate(pixels, magnitude(operation))
            case "ShearY":
                angle = math.degrees(math.atan(magnitude(operation)))
                moved = ops.affine(pixels, 0.0, [0, 0], 1.0, [0.0, angle], center=[0, 0])
            case "TranslateX":
                moved = ops.affine(pixels, 0.0, [int(magnitude(operation, W)), 0], 1.0, [0.0, 0.0])
            case "TranslateY":
                moved = ops.affine(pixels, 0.0, [0, int(magnitude(operation, H))], 1.0, [0.0, 0.0])
            case _:
                continue
        sources[operation] = moved.flatten().long().to(device)
    return sources
