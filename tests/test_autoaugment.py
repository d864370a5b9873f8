"""AutoAugment over a batch: torchvision's pixels, its distribution, and nothing that waits for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, Tensor
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, InterpolationMode, v2

from tetdeploy.train.augment import AUGMENTATIONS
from tetdeploy.train.autoaugment import Operation, apply, autoaugment, draw_operations, policies

SIZES = [(3, 32, 32), (1, 28, 28), (3, 8, 11)]


def images_of(count: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Noise about a gradient, so that neither contrast nor histograms are those of noise; the first image is blank."""
    generator = Generator().manual_seed(seed)
    ramp = torch.linspace(40, 200, shape[-1]) * torch.rand(count, 1, 1, 1, generator=generator)
    noisy = ramp + 25 * torch.randn(count, *shape, generator=generator)
    noisy[0] = 100
    return noisy.clamp(0, 255).to(torch.uint8)


def torchvisions(operation: Operation, image: Tensor) -> Tensor:
    """One image by the very operation that torchvision's transform would apply."""
    transform: Any = v2.AutoAugment(AutoAugmentPolicy.CIFAR10)
    magnitudes, signed = transform._AUGMENTATION_SPACE[operation.name]
    of_level = magnitudes(10, *image.shape[1:])
    by = 0.0 if of_level is None else float(of_level[abs(operation.level)])
    by *= -1 if signed and operation.level < 0 else 1
    applied: Tensor = transform._apply_image_or_video_transform(
        image, operation.name, by, InterpolationMode.NEAREST, {Tensor: None}
    )
    return applied


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("operation", policies().operations, ids=lambda operation: f"{operation.name}{operation.level}")
def test_each_operation_is_torchvisions(operation: Operation, shape: tuple[int, ...]) -> None:
    images = images_of(6, shape)
    wanted = torch.stack([torchvisions(operation, image) for image in images])
    assert torch.equal(apply(operation, images), wanted)


@pytest.mark.parametrize("shape", SIZES)
def test_a_batch_is_what_torchvision_makes_of_each_image_at_the_same_draws(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    """By its first transform, whose draws can be given, with the operations of its second, which round otherwise."""
    N, generator = 400, Generator().manual_seed(3)
    policy = torch.randint(25, (N,), generator=generator).tolist()
    chance = torch.rand((2, N), generator=generator)
    sign = torch.randint(2, (2, N), generator=generator)
    draws = iter((policy[n], chance[:, n], sign[:, n]) for n in range(N))

    class Given(AutoAugment):
        @staticmethod
        def get_params(transform_num: int) -> tuple[int, Tensor, Tensor]:
            return next(draws)

    monkeypatch.setattr("torchvision.transforms.autoaugment.F", v2.functional)
    images = images_of(N, shape)
    wanted = torch.stack([*map(Given(AutoAugmentPolicy.CIFAR10), images)])
    assert torch.equal(autoaugment(images, Generator().manual_seed(3)), wanted)


def test_draws_are_distributed_as_the_policy_says() -> None:
    N = 200_000
    drawn = draw_operations(N, Generator().manual_seed(0))
    operations = policies().operations
    found = AutoAugment(AutoAugmentPolicy.CIFAR10).policies
    for number in range(2):
        for name in {pair[number][0] for pair in found}:
            of_name = torch.tensor([k for k, operation in enumerate(operations) if operation.name == name])
            share = torch.isin(drawn[number], of_name).double().mean().item()
            wanted = sum(pair[number][1] for pair in found if pair[number][0] == name) / 25
            assert share == pytest.approx(wanted, abs=4 * (0.25 / N) ** 0.5)
    signs = torch.tensor([operation.level for operation in operations] + [0])[drawn[0]]
    names = [k for k, operation in enumerate(operations) if operation.name in ("ShearY", "Contrast")]
    signs = signs[torch.isin(drawn[0], torch.tensor(names))]
    assert (signs > 0).double().mean().item() == pytest.approx(0.5, abs=4 * (0.25 / len(signs)) ** 0.5)
    # A policy's two operations go together: 24 of the pairs whose first is a rotation have a translation or nothing.
    rotated = torch.tensor(
        [operations[k].name == "Rotate" if k < len(operations) else False for k in drawn[0].tolist()]
    )
    assert {operations[k].name for k in drawn[1][rotated].tolist() if k < len(operations)} == {"TranslateX"}


def test_it_follows_from_the_generator_alone() -> None:
    images = images_of(64, (3, 16, 16))
    torch.manual_seed(7)
    state, before = torch.get_rng_state(), images.clone()
    generator = Generator().manual_seed(0)
    once, again = autoaugment(images, generator), autoaugment(images, generator)
    assert torch.equal(once, autoaugment(images, Generator().manual_seed(0))) and not torch.equal(once, again)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(images, before)
    assert once.dtype == torch.uint8 and once.is_contiguous()


def test_no_number_comes_back_from_the_device() -> None:
    """A meta tensor has a shape and no numbers: whatever reads one, or depends on one, is an error."""
    images = torch.empty(256, 3, 32, 32, dtype=torch.uint8, device="meta")
    autoaugment(images, Generator().manual_seed(0))  # where pixels come from is copied to the device once
    assert autoaugment(images, Generator().manual_seed(1)).device.type == "meta"
    for operation in policies().operations:
        assert apply(operation, images).shape == images.shape
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        (images > 100).nonzero()


def test_other_images_are_refused() -> None:
    with pytest.raises(ValueError, match="autoaugment wants images of 1 or 3 channels, got 2; choose another"):
        autoaugment(images_of(2, (2, 8, 8)), Generator())
    with pytest.raises(ValueError, match=r"autoaugment wants uint8 images from 0 to 255, got torch\.float32"):
        autoaugment(images_of(2, (3, 8, 8)).float(), Generator())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU")
def test_a_gpu_makes_the_same_of_the_same_draws() -> None:
    images = images_of(256, (3, 32, 32))
    wanted = autoaugment(images, Generator().manual_seed(0)).int()
    found = autoaugment(images.cuda(), Generator().manual_seed(0)).cpu().int()
    assert ((found - wanted).abs() <= 1).float().mean() > 0.999  # blends round otherwise
    generator = Generator("cuda").manual_seed(5)
    first = AUGMENTATIONS["autoaugment"](images.cuda(), generator)
    assert torch.equal(first, AUGMENTATIONS["autoaugment"](images.cuda(), generator.manual_seed(5)))


def test_it_comes_behind_crop_and_flip() -> None:
    images = torch.randint(256, (64, 3, 8, 8), dtype=torch.uint8)
    one, other = Generator().manual_seed(1), Generator().manual_seed(1)
    wanted = autoaugment(AUGMENTATIONS["crop-flip"](images, one), one)
    assert torch.equal(AUGMENTATIONS["autoaugment"](images, other), wanted)
