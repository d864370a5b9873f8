"""Checkpoints of the TET authors' code as networks and checkpoints of ours.

Their modules register the same layer several times, so that one tensor has up to four names in their state dict; such
names are merged after a check that they agree. What their networks compute is what ours compute: conv3x3-BN-LIF with
tau 0.5 and threshold 1, in ResNet-19 and in both VGGSNN. Only the names and the layout differ (theirs is batch-first).
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tetdeploy.arguments import check_choice, check_count
from tetdeploy.checkpoint import check_keys, save_checkpoint
from tetdeploy.data.cifar import CIFAR10, CIFAR100
from tetdeploy.networks import Classifier, NetworkConfig, build_network
from tetdeploy.storage.files import lfs_pointer, sha256_of
from tetdeploy.storage.provenance import written
from tetdeploy.storage.run_folder import CHECKPOINT_NAME
from tetdeploy.wording import shorten

_COUNT = "num_batches_tracked"
_BN = ("weight", "bias", "running_mean", "running_var", _COUNT)
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_WRAPPERS = ("state_dict", "net")
_PREFIXES = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class _Architecture:
    """The authors' network: what it was made for, and the name of its last layer's weight in our network."""

    in_channels: int
    image_size: tuple[int, int]
    last: str


ARCHITECTURES = {
    "resnet19": _Architecture(3, (32, 32), "fc2.0.weight"),
    "vggsnn": _Architecture(2, (48, 48), "readout.1.weight"),
    "vggsnn-strided": _Architecture(2, (48, 48), "readout.1.weight"),
}


@dataclass(frozen=True)
class _Data:
    """What the authors trained on: how large it is, and what a `Classifier` takes of it.

    Their DVS frames are only scaled, to [0, 1], and are none of ours: time surfaces or 0/1 presence, not counts of
    events. So no checkpoint says that it goes with the frames that we make of the same recordings.
    """

    image_size: tuple[int, int]
    settings: dict[str, Any]


_DATA = {
    c.name: _Data((32, 32), {"data": c.name, "mean": c.mean, "std": c.std, "class_names": c.class_names})
    for c in (CIFAR10, CIFAR100)
}
_DATA["dvs-cifar10"] = _Data(
    (48, 48), {"mean": (0.0, 0.0), "std": (1.0, 1.0), "class_names": CIFAR10.class_names, "encoding": "frames"}
)
_OTHER_DATA = "; for other data put what import_checkpoint gives into a Classifier, in Python, and save_checkpoint that"


@dataclass(frozen=True)
class Imported:
    """An imported network in eval mode, and how many of the file's keys were further names of the same tensor."""

    network: nn.Module
    config: NetworkConfig
    num_keys: int
    num_merged: int


@dataclass(frozen=True)
class ImportedCheckpoint:
    """What `import_to_checkpoint` wrote and where; `data` is what was chosen if it was left open.

    `names_data`: whether the checkpoint says so too, because ours are the images that the authors trained on.
    """

    path: Path
    data: str
    names_data: bool
    config: NetworkConfig
    num_parameters: int
    num_keys: int
    num_merged: int


def import_checkpoint(
    path: Path | str, arch: str, *, in_channels: int | None = None, image_size: tuple[int, int] | None = None
) -> Imported:
    """Read a state dict of the TET authors into our network of the same architecture.

    The number of classes is read from the last layer. A `module.` (DataParallel) or `_orig_mod.` (torch.compile) before
    every key is dropped, and a state dict that lies under "state_dict" or "net" is taken out.

    Args:
        path: what `torch.save(model.state_dict(), path)` wrote. It is read with `weights_only=True`: no code runs.
        arch: "resnet19", "vggsnn" or "vggsnn-strided".
        in_channels: of the images; None takes the authors' (3 for resnet19, 2 polarities for vggsnn).
        image_size: (H, W); None takes the authors' (32x32 for resnet19, 48x48 for vggsnn).

    Raises:
        OSError: the file cannot be read.
        ValueError: unknown `arch`; not a file of torch.save, or one that holds code; keys are missing, unexpected or
            misshapen; weights are not floating or not stored as plain tensors; names of one tensor disagree; a weight
            is not finite in float32, a variance negative. All of a kind are listed.
    """
    check_choice("architecture", arch, ARCHITECTURES)
    tensors = _without_prefix(_state_dict(_read(Path(path)), path))
    config = _config(tensors, arch, in_channels, image_size)
    with torch.device("meta"):
        wanted = build_network(config).state_dict()
    names = their_names(arch)
    _check_architecture(tensors, arch, path)
    check_keys(tensors, {theirs: wanted[ours] for ours, all_ in names.items() for theirs in all_}, path)
    tensors = _as_float32(tensors, path)
    _check_values(tensors, names, path)
    network = build_network(config).eval()
    network.load_state_dict({ours: tensors[theirs[0]] for ours, theirs in names.items()})
    return Imported(network, config, len(tensors), len(tensors) - len(names))


def import_to_checkpoint(
    file: Path | str, arch: str, output: Path | str, *, data: str | None = None, T: int | None = None
) -> ImportedCheckpoint:
    """Import a checkpoint of the TET authors and write it as one of ours.

    Args:
        file, arch: see `import_checkpoint`.
        output: a `.safetensors` file, or a run folder, which must not hold a checkpoint yet.
        data: what it was trained on, which brings normalisation, class names and image size: "cifar10", "cifar100" or
            "dvs-cifar10". None takes what the authors trained on: for resnet19 CIFAR-10 or CIFAR-100 by the number of
            classes, for vggsnn DVS-CIFAR10. For "dvs-cifar10" the checkpoint names no data: see `_Data`.
        T: steps it was trained with, which become the default of an export, if known.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: as `import_checkpoint`; other data; the file is for another number of classes, of channels or (a
            VGGSNN) of pixels than the data have; the run folder already holds a checkpoint.
    """
    path = output_file(Path(output))
    if T is not None:
        check_count("T", T)
    if data is not None and data not in _DATA:
        raise ValueError(f"the normalisation of {data!r} is not known; choose one of {', '.join(_DATA)}{_OTHER_DATA}")
    chosen = _DATA[data] if data else None
    imported = import_checkpoint(
        file,
        arch,
        in_channels=len(chosen.settings["mean"]) if chosen else None,
        image_size=chosen.image_size if chosen else None,
    )
    config = imported.config
    data = data or _trained_on(arch, config.num_classes)
    settings = _DATA[data].settings
    if len(settings["class_names"]) != config.num_classes:
        raise ValueError(
            f"{file} tells {config.num_classes} classes apart, but {data} has {len(settings['class_names'])}; "
            "choose the data it was trained on"
        )
    classifier = Classifier(imported.network, config=config, **settings)
    save_checkpoint(path, classifier, training={} if T is None else {"T": T}, provenance=_provenance(Path(file), arch))
    num_parameters = sum(p.numel() for p in imported.network.parameters())
    keys = (imported.num_keys, imported.num_merged)
    return ImportedCheckpoint(path, data, bool(classifier.data), config, num_parameters, *keys)


def their_names(arch: str) -> dict[str, tuple[str, ...]]:
    """For every key of our network's state dict all the names that the tensor has in the authors' state dict."""
    return _resnet19_names() if arch == "resnet19" else _vggsnn_names(strided=arch == "vggsnn-strided")


def _resnet19_names() -> dict[str, tuple[str, ...]]:
    names = _layer_names("encode", "", 1)
    blocks = [f"layer{stage}.{k}" for stage, count in ((1, 3), (2, 3), (3, 2)) for k in range(count)]
    for k, theirs in enumerate(blocks):
        for n in (1, 2):
            names |= _layer_names(f"blocks.{k}.layer{n}", f"{theirs}.", n)
        if theirs.endswith(".0"):  # the first block of a stage changes the shape
            names[f"blocks.{k}.shortcut.0.weight"] = (f"{theirs}.downsample.layer.module.weight",)
            norms = (f"{theirs}.downsample.bn.bn", f"{theirs}.downsample.bn.seqbn.module")
            names |= {f"blocks.{k}.shortcut.1.{x}": tuple(f"{norm}.{x}" for norm in norms) for x in _BN}
    for ours, theirs in (("fc1.2", "fc1"), ("fc2.0", "fc2")):
        names |= {f"{ours}.{x}": (f"{theirs}.{x}", f"{theirs}_s.layer.module.{x}") for x in ("weight", "bias")}
    return names


def _layer_names(ours: str, theirs: str, n: int) -> dict[str, tuple[str, ...]]:
    """A convolution and its BN: their `convN`, `bnN` and the pair of both, `convN_s`."""
    norms = (f"bn{n}.bn", f"bn{n}.seqbn.module", f"conv{n}_s.bn.bn", f"conv{n}_s.bn.seqbn.module")
    convolution = (f"{theirs}conv{n}.weight", f"{theirs}conv{n}_s.layer.module.weight")
    return {f"{ours}.0.weight": convolution} | {
        f"{ours}.1.{x}": tuple(f"{theirs}{norm}.{x}" for norm in norms) for x in _BN
    }


def _vggsnn_names(*, strided: bool) -> dict[str, tuple[str, ...]]:
    # Their pooling is a feature of its own, behind every second layer; in ours neurons are modules of their own too.
    theirs = range(8) if strided else (0, 1, 3, 4, 6, 7, 9, 10)
    ours = (0, 2, 4, 6, 8, 10, 12) if strided else (0, 3, 5, 8, 10, 13, 15)
    names: dict[str, tuple[str, ...]] = {}
    for layer, k in zip(("encode", *(f"layers.{k}" for k in ours)), theirs, strict=True):
        for part, parameters in (("0", ("weight", "bias")), ("1", _BN)):
            names |= {f"{layer}.{part}.{x}": (f"features.{k}.fwd.module.{part}.{x}",) for x in parameters}
    return names | {f"readout.1.{x}": (f"classifier.module.{x}",) for x in ("weight", "bias")}


def _read(path: Path) -> Any:
    """The content of a file of torch.save, if that is tensors and plain values."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise type(error)(f"cannot read {path}: {error.strerror}; give the file that torch.save wrote") from error
    if pointer := lfs_pointer(content, "weights"):
        raise ValueError(f"{path} is {pointer}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual pickles, which end in the errors below
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for what a file may hold
        name = re.search(r"GLOBAL (\S+)", str(error))
        if name:
            raise ValueError(
                f"{path} holds more than tensors ({name[1]}) and is not opened, because unpickling that can run code; "
                "where the file is to be trusted, save the weights alone: torch.save(model.state_dict(), file)"
            ) from error
        raise ValueError(f"{path} is damaged, or not a file of tensors that torch.save wrote") from error


def _state_dict(content: Any, path: Path | str) -> dict[str, Tensor]:
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path} holds {type(content).__name__}, not a state dict; save model.state_dict()")
    if nameless := [key for key in content if not isinstance(key, str)]:
        raise ValueError(f"{path} is not a state dict: its key {nameless[0]!r} is no name")
    others = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(
            f"{path} is not a state dict: {shorten(others, 10)} {'is' if len(others) == 1 else 'are'} no tensor; "
            f"a state dict may lie at the top of the file or under {' or '.join(map(repr, _WRAPPERS))}"
        )
    return dict(content)


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop what DataParallel and torch.compile put before every key, in either order."""
    while prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in tensors)), ""):
        tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return tensors


def _config(
    tensors: Mapping[str, Tensor], arch: str, in_channels: int | None, image_size: tuple[int, int] | None
) -> NetworkConfig:
    made_for = ARCHITECTURES[arch]
    last = next((tensors[name] for name in their_names(arch)[made_for.last] if name in tensors), None)
    num_classes = 10 if last is None or last.dim() != 2 else len(last)  # a last layer that is not one is listed later
    return NetworkConfig(arch, num_classes, in_channels or made_for.in_channels, image_size or made_for.image_size)


def _check_architecture(tensors: Mapping[str, Tensor], arch: str, path: Path | str) -> None:
    for other in ARCHITECTURES:
        if other != arch and set(tensors) == {name for names in their_names(other).values() for name in names}:
            raise ValueError(f"{path} holds a {other}, not a {arch}; import it with --arch {other}")
    if not set(tensors) & {name for of in ARCHITECTURES for names in their_names(of).values() for name in names}:
        raise ValueError(
            f"{path} is no checkpoint of the TET authors' code: not one of its tensors has a name of theirs; "
            "docs/training.md, Porting a network, says how weights of other frameworks are taken over"
        )


def _as_float32(tensors: Mapping[str, Tensor], path: Path | str) -> dict[str, Tensor]:
    """The weights in the network's own precision; BN's counts of batches stay as they are.

    Integers and floats of 8 bits are refused, because what they are scaled by is not in a state dict.
    """
    others = [
        f"{key} ({str(tensor.dtype).removeprefix('torch.')}{'' if _is_plain(tensor) else ', no plain tensor'})"
        for key, tensor in tensors.items()
        if not _is_plain(tensor) or (tensor.dtype not in _FLOATS and not _is_count(key, tensor))
    ]
    if others:
        raise ValueError(
            f"{path} has weights that are not dense floating-point tensors of 16, 32 or 64 bits: "
            f"{shorten(others, 10)}; save them as model.float().state_dict()"
        )
    return {key: tensor if key.endswith(_COUNT) else tensor.float() for key, tensor in tensors.items()}


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized


def _is_count(key: str, tensor: Tensor) -> bool:
    return key.endswith(_COUNT) and tensor.dtype in (torch.int64, torch.int32)


def _check_values(tensors: Mapping[str, Tensor], names: Mapping[str, tuple[str, ...]], path: Path | str) -> None:
    """Weights must be finite, names of one tensor agree, but for BN's count of batches, and variances be 0 or more."""
    broken = [first for first, *_ in names.values() if not tensors[first].isfinite().all()]
    if broken:  # which are different from themselves, too
        raise ValueError(f"{path} has values that are not finite in float32 in {', '.join(broken)}")
    differing = [
        f"{other} and {first}"
        for ours, (first, *others) in names.items()
        for other in others
        if not ours.endswith(_COUNT) and not torch.equal(tensors[first], tensors[other])
    ]
    if differing:
        raise ValueError(f"{path} has different values under names of one tensor: {', '.join(differing)}")
    negative = [first for first, *_ in names.values() if first.endswith("running_var") and (tensors[first] < 0).any()]
    if negative:
        raise ValueError(f"{path} has variances below 0 in {', '.join(negative)}; BN divides by their root")


def output_file(output: Path) -> Path:
    """Where `import_to_checkpoint` writes.

    Raises:
        ValueError: the run folder already holds a checkpoint.
    """
    file = output if output.suffix == ".safetensors" else output / CHECKPOINT_NAME
    if file.name == CHECKPOINT_NAME and file.exists():
        raise ValueError(f"{file.parent} already holds a run ({CHECKPOINT_NAME}); choose another --out")
    return file


def _trained_on(arch: str, num_classes: int) -> str:
    """The data that the authors trained an architecture on."""
    if arch != "resnet19":
        return "dvs-cifar10"
    names = [name for name in ("cifar10", "cifar100") if len(_DATA[name].settings["class_names"]) == num_classes]
    if not names:
        raise ValueError(
            f"a resnet19 of {num_classes} classes was trained neither on cifar10 nor on cifar100{_OTHER_DATA}"
        )
    return names[0]


def _provenance(file: Path, arch: str) -> dict[str, Any]:
    imported = {"file": file.name, "arch": arch, "sha256": sha256_of(file)}
    return written(torch=torch.__version__) | {"imported": imported}
