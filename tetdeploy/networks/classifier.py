"""A network with what its data need."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tetdeploy.arguments import check_choice, check_type
from tetdeploy.data import ENCODINGS, Encoding, Framing
from tetdeploy.networks.ann import has_neurons, is_ann_twin
from tetdeploy.networks.smooth_spike import steepness

if TYPE_CHECKING:
    from tetdeploy.networks import NetworkConfig


def check_classifier(classifier: Any) -> None:
    """Refuse what is no `Classifier`, with ValueError."""
    if not isinstance(classifier, Classifier):
        raise ValueError(
            f"classifier must be a Classifier, got {type(classifier).__name__}; a network becomes one by "
            "Classifier(network, config=..., mean=..., std=..., class_names=...)"
        )


def _check_kind(network: nn.Module, config: NetworkConfig) -> None:
    """Refuse, with ValueError, a network that is another twin, or none, than the configuration says: by that it is made
    anew from a checkpoint."""
    if config.ann and has_neurons(network):
        raise ValueError("the configuration says ann, but the network has neurons; pass ann_twin(network)")
    if not config.ann and is_ann_twin(network) and not has_neurons(network):
        raise ValueError("the network is an ANN twin, but the configuration does not say ann; set ann=True")
    kinds = steepness(network)  # several are of the user's own making, and will be made so again
    if len(kinds) == 1 and kinds != {config.smooth_spike}:
        (k,) = kinds
        has = f"smooth spikes of k={k:g}" if k else "spikes of 0 and 1"
        raise ValueError(
            f"the configuration says smooth_spike={config.smooth_spike:g}, but the network's neurons have {has}; "
            "set smooth_spike, or pass smooth_twin(network, k=...)"
        )


class Classifier(nn.Module):
    """A network together with what its data need: input normalisation, class names, image shape.

    `classifier(x, T)` normalises uint8 images, (x / 255 - mean) / std per channel; floating-point input is taken as
    normalised already. Everything else is the network's: `[N, C, H, W]` with T or `[T, N, C, H, W]` in, `[T, N, K]`
    out. `encoding` says which of the two the data are: "direct" or "frames".

    Args:
        config: what the network is; a checkpoint keeps it.
        mean, std: of the pixels over 255, a value a channel.
        class_names: one a class.
        data: the name of the data set; empty if there is none to name.
        framing: of recordings, how they become frames; None where that is not known.

    Raises:
        ValueError: `network` is no module, or another twin, or none, than `config` says; mean, std or class_names are
            not as many as the channels or classes; std is not above 0, or one of them not finite; the encoding is
            unknown. When called: x is none of the two, or not of the image's shape.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        config: NetworkConfig,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        class_names: tuple[str, ...],
        data: str = "",
        encoding: Encoding = "direct",
        framing: Framing | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise ValueError(f"network must be an instance of torch.nn.Module, got {network!r}")
        if not len(mean) == len(std) == config.in_channels:
            raise ValueError(f"mean and std must have {config.in_channels} values each, got {len(mean)} and {len(std)}")
        if not all(value > 0 for value in std):
            raise ValueError(f"std must be above 0 in every channel, got {std}")
        if not all(map(math.isfinite, (*mean, *std))):  # of NaN no neuron fires, and logits look like others
            raise ValueError(f"mean and std must be finite, got {mean} and {std}")
        if len(class_names) != config.num_classes:
            raise ValueError(f"{config.num_classes} classes need as many names, got {len(class_names)}")
        check_choice("encoding", encoding, ENCODINGS)
        _check_kind(network, config)
        self.network = network
        self.config = config
        self.class_names = tuple(map(str, class_names))
        self.data = data
        self.encoding: Encoding = encoding
        self.framing = framing
        shape = (config.in_channels, 1, 1)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(shape), persistent=False)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return (self.config.in_channels, *self.config.image_size)

    def normalize(self, x: Tensor) -> Tensor:
        return (x.to(self.mean.dtype) / 255.0 - self.mean) / self.std

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        check_type("images", x, Tensor, "pass torch.from_numpy(images)")
        self._check_images(x)
        x = self.normalize(x) if x.dtype == torch.uint8 else x
        logits = self._run(x, T)
        if not torch.compiler.is_compiling():  # a trace may leave T and the batch open
            self._check_logits(logits, (len(x), x.shape[1]) if x.dim() == 5 else (1 if T is None else T, len(x)))
        return logits

    def _run(self, x: Tensor, T: int | None) -> Tensor:
        arguments, own = (x,) if T is None else (x, T), self.config.image_size
        if torch.compiler.is_compiling() or tuple(x.shape[-2:]) == own:
            logits: Tensor = self.network(*arguments)
            return logits
        try:  # layers alone know whether they take images of another size
            logits = self.network(*arguments)
        except RuntimeError as error:
            made, got = ("x".join(map(str, size)) for size in (own, x.shape[-2:]))
            error.add_note(f"the network was made for images of {made}, and these are of {got}")
            raise
        return logits

    def _check_images(self, x: Tensor) -> None:
        """Their size is the network's to judge: one that pools over the whole image takes any."""
        if x.dtype != torch.uint8 and not x.is_floating_point():
            raise ValueError(f"images must be uint8, or floating point that is normalised already, got {x.dtype}")
        if x.dim() in (4, 5) and x.shape[-3] != self.config.in_channels:
            raise ValueError(
                f"images must be [N, C, H, W] or frames [T, N, C, H, W] with C={self.config.in_channels}, "
                f"got {list(x.shape)}"
            )

    def _check_logits(self, logits: Any, steps_and_batch: tuple[int, int]) -> None:
        """Other numbers of classes would train, and name classes that there are not."""
        wanted = [*steps_and_batch, len(self.class_names)]
        if isinstance(logits, Tensor) and list(logits.shape) == wanted:
            return
        got = list(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ValueError(
            f"{self.config.model} must give logits [T, N, K], here {wanted}, got {got}; time comes first, "
            f"K is num_classes, and only one head can be trained and exported"
        )
