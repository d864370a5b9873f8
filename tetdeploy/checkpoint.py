"""Weights, configuration and provenance in one safetensors file; runs and how to find the newest.

A checkpoint is a safetensors file: the network's state dict as tensors, and in the metadata one key, "tetdeploy", with
JSON {"format", "network", "data", "training", "provenance"}, and "int8" if it was fine-tuned in 8 bits. Reading the
metadata needs neither torch nor safetensors.
Pickles, and so torch's own files, are recognised by their first bytes and never unpickled: a pickle runs code.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tetdeploy.extras import import_extra
from tetdeploy.files import atomic_write, sha256_of
from tetdeploy.names import section, shorten

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tetdeploy.networks import Classifier

FORMAT = 1
METADATA_KEY = "tetdeploy"
CHECKPOINT_NAME = "checkpoint.safetensors"
STATE_NAME = "last.safetensors"
CONFIG_NAME = "config.json"
METRICS_NAME = "metrics.jsonl"
SUMMARY_NAME = "summary.json"  # of several seeds
LATEST_NAME = "latest"

_SECTIONS = ("network", "data", "training", "provenance")
_HEADER_LIMIT = 100_000_000  # bytes, the limit of the safetensors format
_KEYS_SHOWN = 20


def save_checkpoint(
    path: Path | str,
    classifier: Classifier,
    *,
    training: Mapping[str, Any],
    provenance: Mapping[str, Any],
    int8: Mapping[str, Any] | None = None,
) -> None:
    """Write the classifier as one safetensors file, atomically: an error leaves an earlier file as it was.

    Args:
        path: the file to write.
        classifier: network, its configuration and the input normalisation.
        training: how it was trained, JSON-able.
        provenance: versions, time, epoch, accuracy, seed; JSON-able.
        int8: the scales that the network was fine-tuned at, `int8.calibration.Calibration.to_dict()`, if it was.

    Raises:
        OSError: the file cannot be written.
    """
    content = {
        "format": FORMAT,
        "network": asdict(classifier.config),
        "data": data_settings(classifier),
        "training": dict(training),
        "provenance": dict(provenance),
    }
    if int8 is not None:
        content["int8"] = dict(int8)
    write_tensors(path, classifier.network.state_dict(), content)


def load(path: Path | str, *, network: nn.Module | None = None) -> Classifier:
    """The trained classifier of a checkpoint, on the CPU and in eval mode.

    Args:
        path: a checkpoint, a run folder that holds one, or a folder of shards (`tetdeploy train --shards-mb`), of more
            in it the latest.
        network: an instance of the user's own network, needed if the checkpoint was trained with one
            (`package.module:function`): a file never decides what code is imported.

    Returns:
        A `Classifier`: `classifier(x, T=6)` gives logits [T, N, K] for images x [N, C, H, W], uint8 or normalised.

    Raises:
        FileNotFoundError: there is no such file, or the run has no checkpoint yet.
        ValueError: not a checkpoint of ours, truncated, a pickle; the weights do not fit the network, or one is NaN.
    """
    import_extra("torch", "train")
    from tetdeploy.networks import Classifier, build_network

    file = weights_file(path)
    config, arguments = _classifier_arguments(read_metadata(file), file)
    classifier = Classifier(build_network(config) if network is None else network, config=config, **arguments)
    load_weights(classifier, file)
    return classifier.eval()


def load_weights(classifier: Classifier, path: Path | str, *, other_classes: bool = False) -> list[str]:
    """Copy a checkpoint's weights into the network of `classifier`, in place (`--init`).

    Args:
        classifier: keeps its own configuration and normalisation; only its network's state changes.
        path: a checkpoint, a run folder that holds one, or a folder of shards.
        other_classes: the checkpoint may be of another number of classes. What differs in it alone, the readout, is
            not copied.

    Returns:
        The names of the weights that were not copied.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a checkpoint of ours; keys are missing, unexpected or misshapen (all are named); a weight is
            NaN.
    """
    from tetdeploy.shards import is_sharded, read_shards

    file = weights_file(path)
    num_classes = read_metadata(file)["network"].get("num_classes")
    tensors = section(read_shards(file), "network.") if is_sharded(file) else read_tensors(file)
    own = classifier.network.state_dict()
    sizes = (num_classes, classifier.config.num_classes)
    kept = _resized(tensors, own, sizes) if other_classes and sizes[0] != sizes[1] else []
    tensors |= {name: own[name] for name in kept}
    check_keys(tensors, own, file)
    if broken := [name for name, tensor in tensors.items() if tensor.isnan().any()]:  # a mask may be infinite
        raise ValueError(
            f"{file} holds NaN in {shorten(broken, _KEYS_SHOWN)}: it is damaged, or its training diverged; "
            "copy or train it again"
        )
    classifier.network.load_state_dict(tensors)
    return kept


def read_metadata(path: Path | str) -> dict[str, Any]:
    """What a checkpoint says about itself, without torch: {"format", "network", "data", "training", "provenance"}.

    Args:
        path: a checkpoint, a run folder that holds one, or a folder of shards.

    Raises:
        FileNotFoundError: there is no such file, or the run has no checkpoint yet.
        ValueError: not a checkpoint of ours, truncated, or a pickle.
    """
    from tetdeploy.shards import is_sharded, read_shards_content

    file = weights_file(path)
    content = read_shards_content(file) if is_sharded(file) else read_content(file)
    if "resume" in content:
        raise ValueError(
            f"{file} holds the state of a training run (for --resume), not a checkpoint; "
            f"use {file.with_name(CHECKPOINT_NAME)}"
        )
    missing = [name for name in _SECTIONS if not isinstance(content.get(name), dict)]
    if missing:
        raise ValueError(f"{file}: its metadata lacks {', '.join(missing)}; the file was changed after it was written")
    return content


def weights_file(path: Path | str) -> Path:
    """A folder of shards, `path` itself or the latest in it (RUN/shards), or the `checkpoint_file` that `path` names.

    Raises:
        FileNotFoundError: see `checkpoint_file`.
    """
    from tetdeploy.shards import newest_shards

    held = (Path(path) / CHECKPOINT_NAME).exists()  # shards beside a checkpoint would be a choice
    return (None if held else newest_shards(path)) or checkpoint_file(path)


def weights_sha256(file: Path) -> str:
    """Of a checkpoint, or of the index of a folder of shards, which has the checksum of each."""
    from tetdeploy.shards import INDEX_NAME

    return sha256_of(file / INDEX_NAME if file.is_dir() else file)


def checkpoint_file(path: Path | str) -> Path:
    """The checkpoint that `path` names: a file itself, or the best weights of a run folder.

    Raises:
        FileNotFoundError: there is no such path, or the folder has no checkpoint.
    """
    from tetdeploy.shards import newest_shards

    path = Path(path)
    if path.is_dir():
        file = path / CHECKPOINT_NAME
        if not file.exists():
            remedy = "it is not a run folder"
            if (path / STATE_NAME).exists():
                remedy = "its first epoch is not finished: go on with --resume"
            elif (shards := newest_shards(path)) is not None:
                remedy = (
                    f"it holds shards: name one of their files, such as {min(shards.glob('model-*'), default=shards)}"
                )
            raise FileNotFoundError(f"{path} holds no {CHECKPOINT_NAME}; {remedy}")
        return file
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a checkpoint (.safetensors) or a run folder")
    return path


def newest_run(runs: Path) -> Path:
    """The run folder that `runs/latest` points at: a symlink, or a text file where symlinks are not to be had.

    Raises:
        FileNotFoundError: nothing was trained there, or the newest run is gone.
    """
    latest = runs / LATEST_NAME
    if latest.is_symlink():
        target = latest.readlink()
    elif latest.is_file():
        target = Path(os.fsdecode(latest.read_bytes().strip()))
    else:
        if run := next(runs.glob(f"*/{CONFIG_NAME}"), None):
            raise FileNotFoundError(f"{latest} is missing; name a run folder, such as {run.parent}")
        raise FileNotFoundError(f"no run in {runs}: train one first (tetdeploy train), or name a run folder")
    run = Path(os.path.normpath(runs / target))
    if not target.name or not run.is_dir():
        fault = f"points at {run}, which is gone" if target.name else "is empty"
        raise FileNotFoundError(f"{latest} {fault}; name another run folder")
    return run


def data_settings(classifier: Classifier) -> dict[str, Any]:
    """What a classifier knows of its data, JSON-able: name, encoding, mean, std, class names and image shape."""
    return {
        "name": classifier.data,
        "encoding": classifier.encoding,
        "mean": _short_floats(classifier.mean),
        "std": _short_floats(classifier.std),
        "class_names": list(classifier.class_names),
        "image_shape": list(classifier.image_shape),
    }


def write_tensors(path: Path | str, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
    """Write named tensors and JSON content as one safetensors file, atomically.

    Raises:
        OSError: the file cannot be written; an earlier one is as it was.
    """
    safetensors = import_extra("safetensors.torch", "train")
    # Each tensor its own copy: safetensors refuses tensors that share memory, as those of a module used twice do.
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomic_write(path) as temporary, _naming(path):
        safetensors.save_file(copies, temporary, metadata={METADATA_KEY: json.dumps(content)})


def read_tensors(path: Path | str) -> dict[str, Tensor]:
    """All tensors of a safetensors file whose header `read_content` accepts, on the CPU."""
    read_content(path)
    safetensors = import_extra("safetensors.torch", "train")
    from safetensors import SafetensorError

    try:
        tensors: dict[str, Tensor] = safetensors.load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return tensors


def read_content(path: Path | str) -> dict[str, Any]:
    """The JSON that `write_tensors` put into a file's metadata, of a checkpoint or of a training state.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a pickle, truncated, not safetensors, not ours, or of a newer format.
    """
    path = Path(path)
    header = read_header(path)
    text = (header.get("__metadata__") or {}).get(METADATA_KEY)
    if text is None:
        raise ValueError(f"{path} is a safetensors file but not a tetdeploy checkpoint: no {METADATA_KEY!r} metadata")
    try:
        content: dict[str, Any] = json.loads(text)
        version = content["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: its {METADATA_KEY!r} metadata cannot be read; the file was changed") from error
    if version != FORMAT:
        raise ValueError(f"{path} has format {version}, this tetdeploy reads format {FORMAT}; update tetdeploy")
    return content


def read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file, ours or not: shape, dtype and place of every tensor by name, and metadata.

    It is 8 bytes of its length, then JSON; checked against the file's size.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a pickle, truncated, or not safetensors.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            _refuse_pickle(path, start)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            raw = file.read(length) if 0 < length <= min(size - 8, _HEADER_LIMIT) else b""
    except IsADirectoryError as error:
        raise ValueError(f"{path} is a folder; a checkpoint is a .safetensors file") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist") from error
    if 8 + length > size and length <= _HEADER_LIMIT:
        raise ValueError(f"{path} is truncated: {size} bytes, its header alone has {8 + length}")
    try:
        header: dict[str, Any] = json.loads(raw)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        whole = 8 + length + max(ends, default=0)
        metadata = header.get("__metadata__") or {}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise ValueError(f"{path} is not a checkpoint: not a safetensors file") from None
    if not isinstance(metadata, dict):
        raise ValueError(f"{path} is not a checkpoint: not a safetensors file")
    if size < whole:
        raise ValueError(f"{path} is truncated: {size} bytes of {whole}; copy or train it again")
    return header


def check_keys(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path | str) -> None:
    """Compare names and shapes of a file's tensors with those a network wants.

    Raises:
        ValueError: they differ; missing, unexpected and misshapen names are listed.
    """
    shared = [name for name in wanted if name in tensors]
    problems = {
        "missing": [name for name in wanted if name not in tensors],
        "unexpected": [name for name in tensors if name not in wanted],
        "misshapen": [
            f"{name} {list(tensors[name].shape)}, wanted {list(wanted[name].shape)}"
            for name in shared
            if tensors[name].shape != wanted[name].shape
        ],
    }
    listed = [f"{kind}: {shorten(names, _KEYS_SHOWN)}" for kind, names in problems.items() if names]
    if listed:
        raise ValueError(f"the weights of {path} do not fit the network; " + "; ".join(listed))


def _resized(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], sizes: tuple[Any, int]) -> list[str]:
    """The names of tensors whose first axis has `sizes[0]` values in a file where `sizes[1]` others are wanted."""
    return [
        name
        for name in wanted
        if name in tensors
        and (*tensors[name].shape[:1], *wanted[name].shape[:1]) == sizes
        and tensors[name].shape[1:] == wanted[name].shape[1:]
    ]


def _refuse_pickle(path: Path, start: bytes) -> None:
    is_zip = start.startswith(b"PK\x03\x04")
    # Protocol 2 and later open with this byte and their number. No safetensors header is that short.
    is_pickle = len(start) >= 2 and start[0] == 0x80 and start[1] in range(2, 6) and start[2:] != bytes(6)
    if is_zip or is_pickle:
        kind = "a zip archive, as torch.save writes" if is_zip else "a pickle"
        raise ValueError(
            f"{path} is {kind}, not a checkpoint of tetdeploy; it is not opened, because unpickling can run code. "
            "Checkpoints are .safetensors files"
        )


def _classifier_arguments(metadata: Mapping[str, Any], file: Path) -> tuple[Any, dict[str, Any]]:
    """The `NetworkConfig` and the other arguments of the `Classifier` that metadata describe."""
    from tetdeploy.networks import NetworkConfig

    data = metadata["data"]
    try:
        config = NetworkConfig(**metadata["network"])
        arguments = {
            "mean": tuple(float(value) for value in data["mean"]),
            "std": tuple(float(value) for value in data["std"]),
            "class_names": tuple(str(name) for name in data["class_names"]),
            "data": str(data["name"]),
            "encoding": str(data.get("encoding", "direct")),
        }
    except (TypeError, KeyError, IndexError) as error:
        raise ValueError(f"{file}: its metadata do not describe a network this tetdeploy knows: {error}") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return config, arguments


@contextmanager
def _naming(path: Path | str) -> Iterator[None]:
    """Turn what safetensors raises on a failed write into an OSError that names the file."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write {path}: {error}; an earlier file there is as it was") from error


def _short_floats(values: Tensor) -> list[float]:
    # By way of str: the shortest decimals that give the same float32 again, 0.4914 and not 0.49140000343322754.
    return [float(str(value)) for value in values.detach().flatten().cpu().numpy()]
