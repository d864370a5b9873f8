"""Networks, and how a configuration becomes one. Each family is a file of its own."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tetdeploy.arguments import check_count, check_flags, check_number, check_type
from tetdeploy.data import Encoding
from tetdeploy.networks.ann import has_neurons, is_ann_twin
from tetdeploy.networks.convsnn import ConvSNN
from tetdeploy.networks.resnet19 import ResNet19
from tetdeploy.networks.sew_resnet34 import SEWResNet34
from tetdeploy.networks.smooth_spike import steepness
from tetdeploy.networks.spiking_resnet34 import SpikingResNet34
from tetdeploy.networks.twins import ann_twin, smooth_twin
from tetdeploy.networks.vggsnn import VGGSNN

__all__ = [
    "NETWORKS",
    "VGGSNN",
    "Classifier",
    "ConvSNN",
    "NetworkConfig",
    "ResNet19",
    "SEWResNet34",
    "SpikingResNet34",
    "ann_twin",
    "build_network",
    "import_network",
    "run_network",
    "smooth_twin",
]

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "convsnn": ConvSNN,
    "resnet19": ResNet19,
    "vggsnn": VGGSNN,
    "vggsnn-strided": partial(VGGSNN, strided=True),
    "spiking-resnet34": SpikingResNet34,
    "sew-resnet34": SEWResNet34,
}


_MAX_WIDTH = 100  # far beyond any memory; numbers of channels beyond 64 bits end in PyTorch


@dataclass(frozen=True)
class NetworkConfig:
    """All that decides a network's parameters' shapes and its neurons.

    `model` is a name of `NETWORKS`, or `package.module:function` for a network of the user's own: the function is
    called with num_classes, in_channels and image_size, and makes its own choice of the rest.
    `ann` makes it the ANN twin: ReLU in place of the neurons, no time, the same parameters under the same names. It is
    a switch beside `model`, not a model of its own, so that the user's own networks have a twin as well.
    `smooth_spike` above 0 makes spikes smooth, Sigmoid(k x) with that k in place of the Heaviside function (Table 2).
    `tau` is always 1 for sew-resnet34, whose IF neurons do not leak.
    """

    model: str
    num_classes: int
    in_channels: int
    image_size: tuple[int, int]
    width: float = 1.0
    tau: float = 0.5
    v_th: float = 1.0
    gamma: float = 1.0
    ann: bool = False
    smooth_spike: float = 0.0

    def __post_init__(self) -> None:
        check_flags(self)
        if self.model not in NETWORKS and not re.fullmatch(r"\w+(\.\w+)*:\w+", self.model):
            raise ValueError(
                f"unknown model {self.model!r}; choose one of {', '.join(NETWORKS)}, "
                "or package.module:function for your own"
            )
        for name in ("num_classes", "in_channels"):
            object.__setattr__(self, name, check_count(name, getattr(self, name)))
        for name in ("width", "tau", "v_th", "gamma", "smooth_spike"):
            object.__setattr__(self, name, check_number(name, getattr(self, name)))
        for name in ("width", "v_th", "gamma"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        if self.width > _MAX_WIDTH:
            raise ValueError(f"width must be at most {_MAX_WIDTH}, got {self.width}; 1 is the network as published")
        if not 0.0 <= self.smooth_spike < float("inf"):
            raise ValueError(f"smooth_spike must be 0 (off) or a k above 0, got {self.smooth_spike}")
        if self.ann and self.smooth_spike:
            raise ValueError("ann and smooth_spike exclude each other: an ANN has no spikes to make smooth")
        if self.model == "sew-resnet34":
            object.__setattr__(self, "tau", 1.0)  # what is saved says what is computed
        object.__setattr__(self, "image_size", (int(self.image_size[0]), int(self.image_size[1])))

    @property
    def is_spiking(self) -> bool:
        """Whether neurons fire 0 or 1, as an export needs it: those of an ANN twin and smooth spikes do not."""
        return not (self.ann or self.smooth_spike)

    @property
    def is_own(self) -> bool:
        """Whether the network is the user's own code."""
        return self.model not in NETWORKS


def build_network(config: NetworkConfig) -> nn.Module:
    """A freshly initialised network.

    Raises:
        ValueError: the model is the user's own: that is imported only where the user says so, by `import_network`.
    """
    if config.is_own:
        raise ValueError(
            f"the network {config.model!r} is code of your own and is not imported because a file says so; "
            f"pass --model {config.model} (in Python: load(path, network=...))"
        )
    network = NETWORKS[config.model](
        num_classes=config.num_classes,
        in_channels=config.in_channels,
        image_size=config.image_size,
        width=config.width,
        tau=config.tau,
        v_th=config.v_th,
        gamma=config.gamma,
    )
    return _variant(network, config)


def import_network(config: NetworkConfig) -> nn.Module:
    """Import and call the user's own `package.module:function`; modules in the current folder are found too.

    Raises:
        ValueError: the module or the function is not there, does not take num_classes, in_channels and image_size, or
            what it returns is not an `nn.Module`, or has lazy layers that saw no image yet or weights that it computed.
    """
    module_name, _, function_name = config.model.partition(":")
    if (here := str(Path.cwd())) not in sys.path:  # as `python -m` does; a console script has its own folder instead
        sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"cannot import {function_name!r} from {module_name!r}: {error}; the module must be importable from here "
            "(set PYTHONPATH, or run where it lies)"
        ) from error
    options = {"num_classes": config.num_classes, "in_channels": config.in_channels, "image_size": config.image_size}
    try:
        inspect.signature(function).bind(**options)
    except TypeError as error:
        raise ValueError(f"{config.model} must be a function of {', '.join(options)}: {error}") from error
    network = function(**options)
    if not isinstance(network, nn.Module):
        raise ValueError(f"{config.model} must return a torch.nn.Module, got {type(network).__name__}")
    if fixed := [path for path, module in network.named_modules() if _keeps_computed(module)]:
        raise ValueError(
            f"{config.model} returns a network whose {fixed[0] or 'module'!r} keeps a weight that it computes of "
            "others, as torch.nn.utils.weight_norm and prune do, which cannot be copied or exported; use "
            "torch.nn.utils.parametrizations.weight_norm, or prune.remove"
        )
    if lazy := [name for name, parameter in network.named_parameters() if is_lazy(parameter)]:
        raise ValueError(
            f"{config.model} returns a network whose {lazy[0]!r} gets its size from the first image; let the function "
            "run the network once, on zeros of the image's size, before it returns it"
        )
    return _variant(network, config)


def _keeps_computed(module: nn.Module) -> bool:
    return any(isinstance(value, Tensor) and value.grad_fn is not None for value in vars(module).values())


def run_network(network: Callable[..., Tensor], x: Tensor, T: int) -> Tensor:
    """Per-step logits `[T, N, K]` of a batch as it is kept, batch first.

    Args:
        network: called like a `Classifier`, which it is, or something in its place.
        x: images `[N, C, H, W]`, each shown at T steps; or frames `[N, T', C, H, W]`, of which the first T are.

    Raises:
        ValueError: there are fewer frames than T, or of frames T is below 1.
    """
    if x.dim() == 5 and not 1 <= T <= x.shape[1]:
        raise ValueError(f"T={T} steps need as many frames, from 1 to the {x.shape[1]} that there are")
    return network(x[:, :T].transpose(0, 1)) if x.dim() == 5 else network(x, T)


def check_classifier(classifier: Any) -> None:
    """Refuse what is no `Classifier`.

    Raises:
        ValueError: it is so.
    """
    if not isinstance(classifier, Classifier):
        raise ValueError(
            f"classifier must be a Classifier, got {type(classifier).__name__}; a network becomes one by "
            "Classifier(network, config=..., mean=..., std=..., class_names=...)"
        )


def _variant(network: nn.Module, config: NetworkConfig) -> nn.Module:
    """The network itself, its ANN twin, or its twin with smooth spikes."""
    if config.ann:
        return ann_twin(network)
    return smooth_twin(network, k=config.smooth_spike) if config.smooth_spike else network


def _check_kind(network: nn.Module, config: NetworkConfig) -> None:
    """Refuse a network that is another twin, or none, than the configuration says: by that it is made anew from a
    checkpoint.

    Raises:
        ValueError: it is so.
    """
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
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise ValueError(f"network must be an instance of torch.nn.Module, got {network!r}")
        if not len(mean) == len(std) == config.in_channels:
            raise ValueError(f"mean and std must have {config.in_channels} values each, got {len(mean)} and {len(std)}")
        if min(std) <= 0:
            raise ValueError(f"std must be above 0 in every channel, got {std}")
        if len(class_names) != config.num_classes:
            raise ValueError(f"{config.num_classes} classes need as many names, got {len(class_names)}")
        if encoding not in ("direct", "frames"):
            raise ValueError(f"unknown encoding {encoding!r}; choose direct or frames")
        _check_kind(network, config)
        self.network = network
        self.config = config
        self.class_names = tuple(class_names)
        self.data = data
        self.encoding: Encoding = encoding
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
        arguments = (x,) if T is None else (x, T)
        if torch.compiler.is_compiling() or tuple(x.shape[-2:]) == self.config.image_size:
            logits: Tensor = self.network(*arguments)
            return logits
        try:  # layers alone know whether they take images of another size
            logits = self.network(*arguments)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            got, own = ("x".join(map(str, size)) for size in (x.shape[-2:], self.config.image_size))
            raise ValueError(f"the network was made for images of {own} and fails on some of {got}: {error}") from error
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
