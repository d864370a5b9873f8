"""Networks, and how a configuration becomes one. Each family is a file of its own."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy

from tetdeploy.arguments import check_count, check_flags, check_number
from tetdeploy.networks.classifier import Classifier, check_classifier
from tetdeploy.networks.convsnn import ConvSNN
from tetdeploy.networks.resnet19 import ResNet19
from tetdeploy.networks.sew_resnet34 import SEWResNet34
from tetdeploy.networks.spiking_resnet34 import SpikingResNet34
from tetdeploy.networks.twins import ann_twin, smooth_twin
from tetdeploy.networks.vggsnn import VGGSNN
from tetdeploy.neurons import LIF
from tetdeploy.storage.files import sha256_of
from tetdeploy.wording import shorten

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
    "check_classifier",
    "code_sha256",
    "drawn_as_trained",
    "import_network",
    "run_network",
    "smooth_twin",
    "warn_of_other_code",
]

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "convsnn": ConvSNN,
    "resnet19": ResNet19,
    "vggsnn": VGGSNN,
    "vggsnn-strided": partial(VGGSNN, strided=True),
    "spiking-resnet34": SpikingResNet34,
    "sew-resnet34": SEWResNet34,
}


_MAX_V_TH = 1e18  # float32 holds no square of a much larger one
_MAX_WIDTH = 100  # far beyond any memory; numbers of channels beyond 64 bits end in PyTorch
_OWN_MODEL = r"\w+(\.\w+)*:\w+"


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
        if self.model not in NETWORKS and not re.fullmatch(_OWN_MODEL, self.model):
            raise ValueError(
                f"unknown model {self.model!r}; choose one of {', '.join(NETWORKS)}, "
                f"or package.module:function for your own{_as_module(self.model)}"
            )
        for name in ("num_classes", "in_channels"):
            object.__setattr__(self, name, check_count(name, getattr(self, name)))
        for name in ("width", "tau", "v_th", "gamma", "smooth_spike"):
            object.__setattr__(self, name, check_number(name, getattr(self, name)))
        for name in ("width", "v_th", "gamma"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        if self.v_th > _MAX_V_TH:
            raise ValueError(f"v_th must be at most {_MAX_V_TH:g}, got {self.v_th}")
        if self.width > _MAX_WIDTH:
            raise ValueError(f"width must be at most {_MAX_WIDTH}, got {self.width}; 1 is the network as published")
        if not 0.0 <= self.smooth_spike < float("inf"):
            raise ValueError(f"smooth_spike must be 0 (off) or a k above 0, got {self.smooth_spike}")
        if self.ann and self.smooth_spike:
            raise ValueError("ann and smooth_spike exclude each other: an ANN has no spikes to make smooth")
        if self.model == "sew-resnet34":
            object.__setattr__(self, "tau", 1.0)  # what is saved says what is computed
        object.__setattr__(self, "image_size", _height_and_width(self.image_size))

    @property
    def is_spiking(self) -> bool:
        """Whether neurons fire 0 or 1, as an export needs it: those of an ANN twin and smooth spikes do not."""
        return not (self.ann or self.smooth_spike)

    @property
    def is_own(self) -> bool:
        """Whether the network is the user's own code."""
        return self.model not in NETWORKS


def _as_module(model: str) -> str:
    """What to write in place of a file's path, where that can be told."""
    file, _, function = model.rpartition(":")
    own = f"{file.removeprefix('./').removesuffix('.py').replace('/', '.')}:{function}"
    return f": here {own}" if file.endswith(".py") and re.fullmatch(_OWN_MODEL, own) else ""


def _height_and_width(size: Any) -> tuple[int, int]:
    try:
        height, width = size
    except (TypeError, ValueError):
        raise ValueError(f"image_size must be height and width, got {size!r}") from None
    return check_count("image_size", height), check_count("image_size", width)


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
            what it returns is not an `nn.Module`, or has lazy layers that saw no image yet, weights that it computed,
            or weights to train, neurons or dropout where PyTorch does not see them.
    """
    module_name, _, function_name = config.model.partition(":")
    if (here := str(Path.cwd())) not in sys.path:  # as `python -m` does; a console script has its own folder instead
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"cannot import {function_name!r} from {module_name!r}: {error}; the module must be importable from here "
            "(set PYTHONPATH, or run where it lies)"
        ) from error
    if not hasattr(module, function_name):
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module_name]
        there = f"it has {shorten(own)}" if own else "it has nothing of its own"
        raise ValueError(f"{module_name!r} has no {function_name!r} ({getattr(module, '__file__', None)}); {there}")
    function = getattr(module, function_name)
    options = {"num_classes": config.num_classes, "in_channels": config.in_channels, "image_size": config.image_size}
    try:
        inspect.signature(function).bind(**options)
    except TypeError as error:
        raise ValueError(f"{config.model} must be a function of {', '.join(options)}: {error}") from error
    network = function(**options)
    if not isinstance(network, nn.Module):
        raise ValueError(f"{config.model} must return a torch.nn.Module, got {type(network).__name__}")
    known = {id(part) for part in (*network.parameters(), *network.modules())}
    for is_wrong, complaint in (
        (
            _keeps_computed,
            "keeps a weight that it computes of others, as torch.nn.utils.weight_norm and prune do, which cannot be "
            "copied or exported; use torch.nn.utils.parametrizations.weight_norm, or prune.remove",
        ),
        (
            partial(_hides_weights, known=known),
            "keeps weights to train out of its state dict, as a list of Python does: no optimiser and no checkpoint "
            "would see them; use nn.ModuleList, nn.ModuleDict or nn.ParameterList, or .requires_grad_(False) for those "
            "that are not to train",
        ),
        (
            partial(_hides_layers, known=known),
            "keeps neurons or dropout where PyTorch does not see them, as in a list of Python: firing rates and twins "
            "would lack these neurons, and dropout would never end; use nn.ModuleList or nn.ModuleDict",
        ),
    ):
        if wrong := [path for path, module in network.named_modules() if is_wrong(module)]:
            raise ValueError(f"{config.model} returns a network whose {wrong[0] or 'module'!r} {complaint}")
    if lazy := without_size(network):
        raise ValueError(
            f"{config.model} returns a network whose {lazy[0]!r} gets its size from the first image; let the function "
            "run the network once, on zeros of the image's size, before it returns it"
        )
    return _variant(network, config)


@contextmanager
def drawn_as_trained(training: Mapping[str, Any]) -> Iterator[None]:
    """Within it a network of the user's own draws what it drew for a training, by whose seed it began: a mask for
    instance, which no state dict holds. What is drawn after it stays as it was.

    Args:
        training: of a checkpoint's metadata.
    """
    seed = training.get("seed")  # one of another tool may name none
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed if isinstance(seed, int) else 0)
        yield


def code_sha256(config: NetworkConfig) -> str | None:
    """The SHA-256 of the source file of the user's own module, of that file alone; None of a built-in network, of a
    module that was not imported or has no such file, and of a program itself."""
    name = config.model.partition(":")[0]
    module = sys.modules.get(name) if config.is_own and name != "__main__" else None
    return None if module is None else _source_sha256(module)


@cache  # of what was imported: the file may be edited while a run goes on
def _source_sha256(module: ModuleType) -> str | None:
    file = Path(getattr(module, "__file__", None) or "")
    return sha256_of(file) if file.suffix == ".py" and file.is_file() else None


def warn_of_other_code(config: NetworkConfig, before: str | None, trained: Path) -> None:
    """Warn if the `code_sha256` of the user's own network is not what it was `before`, when `trained` was trained.
    None is no difference."""
    now = code_sha256(config)
    if None not in (before, now) and now != before:
        file = sys.modules[config.model.partition(":")[0]].__file__
        text = f"{file} has changed since the training of {trained}: its results may be of another network"
        warnings.warn(text, RuntimeWarning, stacklevel=3)


def without_size(network: nn.Module) -> list[str]:
    """What of a network's state gets its size from the first image, as in `nn.LazyConv2d`."""
    return [name for name, tensor in network.state_dict().items() if is_lazy(tensor)]


def _keeps_computed(module: nn.Module) -> bool:
    return any(isinstance(value, Tensor) and value.grad_fn is not None for value in vars(module).values())


def _hides_weights(module: nn.Module, known: Container[int]) -> bool:
    """Whether a module keeps parameters to train, or layers with such, whose `id` is not among the known."""
    for value in _kept_aside(module):
        parameters = value.parameters() if isinstance(value, nn.Module) else [value]
        if any(isinstance(p, nn.Parameter) and p.requires_grad and id(p) not in known for p in parameters):
            return True
    return False


def _hides_layers(module: nn.Module, known: Container[int]) -> bool:
    """Whether a module keeps neurons or dropout whose `id` is not among the known. Those within a network that has
    weights, a teacher for instance, are its own."""
    return any(
        isinstance(layer, LIF | _DropoutNd) and id(layer) not in known
        for value in _kept_aside(module)
        if isinstance(value, nn.Module) and not value.state_dict()
        for layer in value.modules()
    )


def _kept_aside(module: nn.Module) -> Iterator[Any]:
    """What a module keeps as attributes, lists and dicts of Python, where PyTorch does not look for layers."""
    left = [value for name, value in vars(module).items() if name not in ("_parameters", "_modules")]
    seen = set[int]()
    while left:
        value = left.pop()
        if isinstance(value, list | tuple | dict) and id(value) not in seen:
            seen.add(id(value))  # it may contain itself
            left += value.values() if isinstance(value, dict) else value
        yield value


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


def _variant(network: nn.Module, config: NetworkConfig) -> nn.Module:
    """The network itself, its ANN twin, or its twin with smooth spikes."""
    if config.ann:
        return ann_twin(network)
    return smooth_twin(network, k=config.smooth_spike) if config.smooth_spike else network
