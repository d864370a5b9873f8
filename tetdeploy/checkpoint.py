"""Weights, configuration and provenance of a trained network in one file.

A checkpoint is a safetensors file: the network's state dict as tensors, and in the metadata one key, "tetdeploy", with
JSON {"format", "network", "data", "training", "provenance"}, and "int8" if it was fine-tuned in 8 bits. Reading the
metadata needs neither torch nor safetensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tetdeploy.arguments import check_flag
from tetdeploy.names import section
from tetdeploy.storage.form import COUNT, NUMBER, STEP, as_json, check_form
from tetdeploy.storage.provenance import ORIGIN
from tetdeploy.storage.run_folder import CHECKPOINT_NAME, weights_file, weights_sha256
from tetdeploy.storage.shards import read_shards, read_shards_content
from tetdeploy.storage.tensor_file import FORMAT, read_content, read_tensors, write_tensors
from tetdeploy.system.extras import import_extra
from tetdeploy.wording import shorten

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tetdeploy.networks import Classifier

_SECTIONS = ("network", "data", "training", "provenance")
_DATA = ("name", "encoding", "mean", "std", "class_names", "image_shape")
_FORM = ORIGIN | {
    "network": ORIGIN["network"] | {"model!": str, "num_classes!": STEP, "in_channels!": STEP, "image_size!": [STEP]},
    "restart": {"epoch!": COUNT, "step!": COUNT, "seconds": NUMBER},
}
_KEYS_SHOWN = 20
_READS = 5  # at most, of what is replaced meanwhile


class MisfitError(ValueError):
    """Weights of other names or shapes than the network's."""


@dataclass(frozen=True)
class Checkpoint:
    """What a file held when it was read: a run that goes on puts others in its place.

    Attributes:
        path: as it was named: a checkpoint, a run folder, or a folder of shards.
        file: the checkpoint, or the folder of shards.
        metadata: see `read_metadata`.
        tensors: the network's, by name, on the CPU.
        sha256: see `run_folder.weights_sha256`.
    """

    path: Path
    file: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    sha256: str


def read_checkpoint(path: Path | str) -> Checkpoint:
    """Read weights, what they say of themselves, and their SHA-256 at once.

    Args:
        path: a checkpoint, a run folder that holds one, or a folder of shards.

    Raises:
        FileNotFoundError: see `read_metadata`.
        ValueError: see `read_metadata`; the tensors are damaged; others take their place as often as they are read.
    """
    for _ in range(_READS):
        file = weights_file(path)
        before = _identity(file)
        try:
            metadata = read_metadata(file)
            refuse_one_shard(file, metadata)
            tensors = section(read_shards(file), "network.") if file.is_dir() else read_tensors(file)
            sha256 = weights_sha256(file)
        except (OSError, ValueError, RuntimeError):  # the last one of a mapping that is longer than the file by then
            if before is not None and _identity(file) == before:
                raise
        else:
            if _identity(file) == before:
                return Checkpoint(Path(path), file, metadata, tensors, sha256)
    raise ValueError(f"{file} is being written: others took its place each time it was read; try again later")


def refuse_one_shard(file: Path, metadata: Mapping[str, Any]) -> None:
    """Refuse, with ValueError, one of several files of weights, which holds only some of them."""
    if metadata.get("restart") and not file.is_dir():
        raise ValueError(f"{file} is one of several files with weights; name their folder, {file.parent}")


def _identity(file: Path) -> tuple[int, ...] | None:
    """What tells a file, or a folder of shards, from another one that takes its place; None if it is gone."""
    try:
        stat = file.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def save_checkpoint(
    path: Path | str,
    classifier: Classifier,
    *,
    training: Mapping[str, Any],
    provenance: Mapping[str, Any],
    int8: Mapping[str, Any] | None = None,
    fingerprint: str | None = None,
) -> None:
    """Write the classifier as one safetensors file, atomically: an error leaves an earlier file as it was.

    Args:
        path: the file to write.
        classifier: network, its configuration and the input normalisation.
        training: how it was trained, JSON-able.
        provenance: versions, time, epoch, accuracy, seed; JSON-able. NaN and infinity become null.
        int8: the scales that the network was fine-tuned at, `int8.calibration.Calibration.to_dict()`, if it was.
        fingerprint: of the images that were held out, or without any of those trained on; see `LabelledSet`.

    Raises:
        ValueError: `training` or `provenance` say what reading would refuse, such as T=0.
        TypeError: JSON has no form for a value of theirs, such as a tensor.
        OSError: the file cannot be written.
    """
    content: dict[str, Any] = {
        "format": FORMAT,
        "network": asdict(classifier.config),
        "data": data_settings(classifier),
        "training": dict(training),
        "provenance": dict(provenance),
    }
    if fingerprint is not None:
        content["data"]["fingerprint"] = fingerprint
    if int8 is not None:
        content["int8"] = dict(int8)
    content = as_json(content)
    check_form(content, _FORM)
    write_tensors(path, classifier.network.state_dict(), content)


def load(path: Path | str | Checkpoint, *, network: nn.Module | None = None) -> Classifier:
    """The trained classifier of a checkpoint, on the CPU and in eval mode; torch's random numbers stay as they were.

    Args:
        path: a checkpoint, a run folder that holds one, or a folder of shards (`tetdeploy train --shards-mb`; the
            latest, if it holds several); or what `read_checkpoint` has read.
        network: an instance of the user's own network, needed if the checkpoint was trained with one
            (`package.module:function`): a file never decides what code is imported.

    Returns:
        A `Classifier`: `classifier(x, T=6)` gives logits [T, N, K] for images x [N, C, H, W], uint8 or normalised;
        for a network of frames, x is [T, N, C, H, W].

    Raises:
        FileNotFoundError: there is no such file, or the run has no checkpoint yet.
        ValueError: not a checkpoint of ours, truncated, or a pickle; the weights do not fit the network, or one is NaN;
            `network` is not an `nn.Module`.
    """
    torch = import_extra("torch", "train")
    from tetdeploy.networks import Classifier, build_network

    checkpoint = path if isinstance(path, Checkpoint) else read_checkpoint(path)
    config, arguments = _classifier_arguments(checkpoint.metadata, checkpoint.file)
    if network is None:
        # whatever torch's default device and dtype are; weights that are replaced draw nothing of the caller's
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            classifier = Classifier(build_network(config).float(), config=config, **arguments)
    else:
        classifier = Classifier(network, config=config, **arguments)
    load_weights(classifier, checkpoint)
    return classifier.eval()


def load_weights(classifier: Classifier, path: Path | str | Checkpoint, *, other_classes: bool = False) -> list[str]:
    """Copy a checkpoint's weights into the network of `classifier`, in place (`--init`).

    Args:
        classifier: keeps its own configuration and normalisation; only its network's state changes.
        path: a checkpoint, a run folder that holds one, or a folder of shards; or what `read_checkpoint` has read.
        other_classes: the checkpoint may have another number of classes. What differs only in that number, the readout,
            is not copied.

    Returns:
        The names of the weights that were not copied. A warning says if the user's own network has other code by now.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a checkpoint of ours; a weight is NaN, or an integer where the network has floats; a layer of
            the network has no size yet.
        MisfitError: keys are missing, unexpected or misshapen (up to 20 of each are named).
    """
    from tetdeploy.networks import warn_of_other_code, without_size

    check_flag("other_classes", other_classes)
    checkpoint = path if isinstance(path, Checkpoint) else read_checkpoint(path)
    file, tensors = checkpoint.file, dict(checkpoint.tensors)
    if checkpoint.metadata["network"]["model"] == classifier.config.model:
        before = checkpoint.metadata["provenance"].get("code_sha256")
        warn_of_other_code(classifier.config, before, checkpoint.path)
    own = classifier.network.state_dict()
    if lazy := without_size(classifier.network):
        raise ValueError(
            f"{lazy[0]!r} of the network gets its size from the first image; run the network once, on zeros of the "
            "image's size, before it takes the weights"
        )
    sizes = (checkpoint.metadata["network"].get("num_classes"), classifier.config.num_classes)
    kept = _resized(tensors, own, sizes) if other_classes and sizes[0] != sizes[1] else []
    tensors |= {name: own[name] for name in kept}
    check_keys(tensors, own, file)
    if cast := [name for name in own if own[name].is_floating_point() and not tensors[name].is_floating_point()]:
        raise ValueError(
            f"{file} holds {tensors[cast[0]].dtype} where the network has {own[cast[0]].dtype}, in "
            f"{shorten(cast, _KEYS_SHOWN)}: what scaled them is not there; take the file as it was written"
        )
    if broken := [name for name, tensor in tensors.items() if tensor.isnan().any()]:  # a mask may be infinite
        raise ValueError(
            f"{file} holds NaN in {shorten(broken, _KEYS_SHOWN)}: it is damaged, or its training diverged; "
            "copy or train it again"
        )
    classifier.network.load_state_dict(tensors)
    return kept


def read_metadata(path: Path | str) -> dict[str, Any]:
    """What a checkpoint says about itself, without torch: {"format", "network", "data", "training", "provenance"}.

    Fine-tuned in 8 bits, it has "int8" as well, the scales; shards have "how" the run ran, and "restart", where it
    stood.

    Args:
        path: a checkpoint, a run folder that holds one, or a folder of shards.

    Raises:
        FileNotFoundError: there is no such file, or the run has no checkpoint yet.
        ValueError: not a checkpoint of ours, truncated, or a pickle.
    """
    file = weights_file(path)
    content = read_shards_content(file) if file.is_dir() else read_content(file)
    if "resume" in content:
        raise ValueError(
            f"{file} holds the state of a training run (for --resume), not a checkpoint; "
            f"use {file.with_name(CHECKPOINT_NAME)}"
        )
    missing = [name for name in _SECTIONS if not isinstance(content.get(name), dict)]
    missing = missing or [f"data.{name}" for name in _DATA if name not in content["data"]]
    missing = missing or ["network.model"] * ("model" not in content["network"])
    if missing:
        raise ValueError(f"{file}: its metadata lacks {', '.join(missing)}; the file was changed after it was written")
    try:
        check_form(content, _FORM)
    except ValueError as error:
        raise ValueError(f"{file}: of its metadata, {error}; the file was changed after it was written") from error
    return content


def trained_on(metadata: Mapping[str, Any], path: Path | str) -> str:
    """The name of the data that a checkpoint was trained on.

    Raises:
        ValueError: it does not say, as one imported from elsewhere.
        FileNotFoundError: they are not where they were.
    """
    from tetdeploy.data import check_recorded

    name = str(metadata["data"]["name"])
    if not name:
        raise ValueError(f"{path} does not say what data it was trained on; name some with --data")
    check_recorded(name, path)
    return name


def data_settings(classifier: Classifier) -> dict[str, Any]:
    """What a classifier knows of its data, JSON-able: name, encoding, mean, std, class names and image shape; of
    recordings the framing."""
    settings: dict[str, Any] = {
        "name": classifier.data,
        "encoding": classifier.encoding,
        "mean": _short_floats(classifier.mean),
        "std": _short_floats(classifier.std),
        "class_names": list(classifier.class_names),
        "image_shape": list(classifier.image_shape),
    }
    return settings if classifier.framing is None else settings | {"framing": classifier.framing.to_dict()}


def check_keys(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path | str) -> None:
    """Compare names and shapes of a file's tensors with those a network wants.

    Raises:
        MisfitError: they differ; missing, unexpected and misshapen names are listed.
    """
    problems = {
        "missing": [name for name in wanted if name not in tensors],
        "unexpected": [name for name in tensors if name not in wanted],
        "misshapen": [
            f"{name} {list(tensors[name].shape)}, wanted {list(wanted[name].shape)}"
            for name in wanted
            if name in tensors and tensors[name].shape != wanted[name].shape
        ],
    }
    listed = [f"{kind}: {shorten(names, _KEYS_SHOWN)}" for kind, names in problems.items() if names]
    if listed:
        raise MisfitError(f"the weights of {path} do not fit the network; " + "; ".join(listed))


def _resized(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], sizes: tuple[Any, int]) -> list[str]:
    """The names of tensors whose first axis has `sizes[0]` values in a file where `sizes[1]` others are wanted."""
    return [
        name
        for name in wanted
        if name in tensors
        and (*tensors[name].shape[:1], *wanted[name].shape[:1]) == sizes
        and tensors[name].shape[1:] == wanted[name].shape[1:]
    ]


def _classifier_arguments(metadata: Mapping[str, Any], file: Path) -> tuple[Any, dict[str, Any]]:
    """The `NetworkConfig` and the other arguments of the `Classifier` that metadata describe."""
    from tetdeploy.data import Framing
    from tetdeploy.networks import NetworkConfig

    data = metadata["data"]
    try:
        config = NetworkConfig(**metadata["network"])
        arguments = {
            "mean": tuple(float(value) for value in data["mean"]),
            "std": tuple(float(value) for value in data["std"]),
            "class_names": tuple(str(name) for name in data["class_names"]),
            "data": str(data["name"]),
            "encoding": str(data["encoding"]),
            "framing": Framing.of(data),
        }
    except (TypeError, KeyError, IndexError) as error:
        raise ValueError(f"{file}: its metadata do not describe a network this tetdeploy knows: {error}") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return config, arguments


def _short_floats(values: Tensor) -> list[float]:
    # By way of str: the shortest decimals that give the same float32 again, 0.4914 and not 0.49140000343322754.
    return [float(str(value)) for value in values.detach().flatten().cpu().numpy()]
