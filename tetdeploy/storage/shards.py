"""Tensors in several safetensors files of limited size, for where large files cannot go.

Hugging Face's convention: `model-00001-of-00004.safetensors` and so on, and `model.safetensors.index.json`, which says
in which file each tensor lies (`weight_map`); here its `metadata` also hold each file's SHA-256, as a copy may be
damaged. Every file carries the whole JSON content that a single one would.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tetdeploy.storage.files import atomic_folder, sha256_of, write_json
from tetdeploy.storage.form import parse_json
from tetdeploy.storage.model_file import METADATA_KEY
from tetdeploy.storage.tensor_file import read_content, read_tensors, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

INDEX_NAME = "model.safetensors.index.json"

_ENTRY = 120  # bytes of the header for one tensor, beside its name


def holds_shards(folder: Path) -> bool:
    """Whether a folder holds shards, be they only some of their files: reading them then says which are missing."""
    return (folder / INDEX_NAME).is_file() or any(folder.glob("model-*-of-*.safetensors"))


def is_complete(folder: Path, limit: int) -> bool:
    """Whether a folder holds shards, all that its index names, none larger than `limit` bytes."""
    try:
        return all(file.stat().st_size <= limit for file in _files(folder, _read_index(folder)))
    except (FileNotFoundError, ValueError):
        return False


def check_limit(tensors: Mapping[str, Tensor], content: Mapping[str, Any], *, limit: int) -> None:
    """What `write_shards` would say to these, before anything is written.

    Raises:
        ValueError: a tensor is larger than `limit`.
    """
    _split(tensors, limit, _header(content))


def write_shards(
    folder: Path, tensors: Mapping[str, Tensor], content: Mapping[str, Any], *, limit: int, beside: Sequence[Path] = ()
) -> None:
    """Write named tensors and JSON content into a new folder, all of it or nothing.

    Args:
        folder: must not be there.
        limit: of a file's size, in bytes.
        beside: files that are copied into the folder as well.

    Raises:
        ValueError: a tensor is larger than `limit`.
        OSError: the folder cannot be written.
    """
    parts = _split(tensors, limit, _header(content))
    names = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    with atomic_folder(folder) as temporary:
        for name, part in zip(names, parts, strict=True):
            write_tensors(temporary / name, {key: tensors[key] for key in part}, content)
        metadata = {
            "total_size": sum(_size(tensor) for tensor in tensors.values()),
            "sha256": {name: sha256_of(temporary / name) for name in names},
        }
        weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        write_json(temporary / INDEX_NAME, {"metadata": metadata, "weight_map": weight_map})
        for file in beside:
            (temporary / file.name).write_bytes(file.read_bytes())


def read_shards(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's shards, on the CPU, in the order they were written in.

    Raises:
        FileNotFoundError: no index.
        ValueError: a damaged one, or files that are missing, damaged or not those the index was written for.
    """
    index = _read_index(folder)
    tensors: dict[str, Tensor] = {}
    for file in shard_files(folder, index):
        tensors |= read_tensors(file)
    if tensors.keys() != index["weight_map"].keys():
        raise ValueError(f"{folder / INDEX_NAME} does not list the tensors of its shards; copy it again")
    return {name: tensors[name] for name in index["weight_map"]}


def read_shards_content(folder: Path) -> dict[str, Any]:
    """The JSON content, as `write_shards` was given it, without torch.

    Raises:
        FileNotFoundError: no index.
        ValueError: a damaged one, files are missing, or the first is damaged or not the one the index was written for.
    """
    return read_content(next(shard_files(folder)))


def shard_files(folder: Path, index: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """The files that the index of a folder names, each of which is the one that it was written for.

    Raises:
        FileNotFoundError, ValueError: see `read_shards`.
    """
    index = index or _read_index(folder)
    for file in _files(folder, index):
        if sha256_of(file) != index["metadata"]["sha256"][file.name]:
            raise ValueError(f"{file} is not the file that {INDEX_NAME} was written for; copy it again")
        yield file


def _files(folder: Path, index: Mapping[str, Any]) -> list[Path]:
    """The files that the index names; each is there."""
    files = [folder / name for name in index["metadata"]["sha256"]]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{folder} lacks {', '.join(missing)}, of {len(files)} shards; copy them all")
    return files


def _header(content: Mapping[str, Any]) -> int:
    """Bytes of the JSON content in a file's header."""
    return len(json.dumps({METADATA_KEY: json.dumps(content)}))


def _split(tensors: Mapping[str, Tensor], limit: int, header: int) -> list[list[str]]:
    """The names of each file's tensors, in their order; a file is begun when the next tensor does not fit."""
    parts: list[list[str]] = [[]]
    header += 64  # length, alignment, brackets
    filled = header
    sizes = {name: _size(tensor) + len(name) + _ENTRY for name, tensor in tensors.items()}
    largest = max(sizes, key=sizes.__getitem__)
    if (least := header + sizes[largest]) > limit:
        raise ValueError(
            f"{largest} alone takes {least / 1e6:.3g} MB; shards of at most {limit / 1e6:g} MB are too small: "
            f"allow {math.ceil(least / 1e4) / 100:g} MB or more"
        )
    for name, size in sizes.items():
        if filled + size > limit:
            parts.append([])
            filled = header
        parts[-1].append(name)
        filled += size
    return parts


def _read_index(folder: Path) -> dict[str, Any]:
    """The index, checked: some files, by plain names."""
    file = folder / INDEX_NAME
    if not file.is_file():
        held = "has shards, but not their" if holds_shards(folder) else "holds no shards: it has no"
        raise FileNotFoundError(f"{folder} {held} {INDEX_NAME}; copy all of its files, or name a checkpoint")
    try:
        index: dict[str, Any] = parse_json(file.read_text(encoding="utf-8"))
        sums, weight_map = index["metadata"]["sha256"], index["weight_map"]
        usable = len(sums) > 0 and all(Path(name).name == name for name in sums) and isinstance(weight_map, dict)
        usable = usable and all(isinstance(value, str) for value in sums.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        usable = False
    if not usable:
        raise ValueError(
            f"{file} is damaged, or was not written by tetdeploy: it must hold metadata.sha256, weight_map; "
            "one file of the folder can be inspected by itself"
        )
    return index


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
