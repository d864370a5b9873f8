"""One safetensors file: named tensors, and JSON content under one key of its metadata.

Reading the content needs neither torch nor safetensors.
Pickles, and so torch's own files, are recognised by their first bytes and never unpickled: a pickle runs code.
"""

from __future__ import annotations

import json
import os
import re
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tetdeploy.storage.files import MODELS, atomic_write, is_utf8, lfs_pointer
from tetdeploy.storage.form import parse_json
from tetdeploy.storage.model_file import METADATA_KEY
from tetdeploy.system.extras import import_extra

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1  # of the content

_HEADER_LIMIT = 100_000_000  # bytes, the limit of the safetensors format
# How safetensors, whose errors are its own, tells one of the system; the second form is that of versions before 0.5.
_OS_ERROR = re.compile(r"(?:os error |Os \{ code: )(\d+)")
_AGAIN = "copy or train it again"


def write_tensors(path: Path | str, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
    """Write named tensors and JSON content as one safetensors file, atomically.

    Raises:
        OSError: the file cannot be written; an earlier one is as it was. Its number is the system's, of a full disk for
            instance.
    """
    safetensors = import_extra("safetensors.torch", "train")
    from safetensors import SafetensorError

    # Each tensor its own copy: safetensors refuses tensors that share memory, as those of a module used twice do.
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomic_write(path) as temporary:
        mode = temporary.stat().st_mode
        try:
            safetensors.save_file(copies, temporary, metadata={METADATA_KEY: json.dumps(content)})
        except SafetensorError as error:
            number = _OS_ERROR.search(str(error))
            if number is None:
                raise OSError(f"cannot write {path}: {error}; an earlier file there is as it was") from error
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        if temporary.stat().st_mode != mode:  # it puts a private file in the place of the one that was there
            temporary.chmod(mode)


def read_tensors(path: Path | str) -> dict[str, Tensor]:
    """All tensors of a safetensors file whose header `read_content` accepts, on the CPU."""
    read_content(path)
    safetensors = import_extra("safetensors.torch", "train")
    from safetensors import SafetensorError

    try:
        # Windows puts no file in the place of one that is mapped; the names of others safetensors itself cannot open
        if sys.platform == "win32" or not is_utf8(path):
            return dict(safetensors.load(Path(path).read_bytes()))
        return dict(safetensors.load_file(path))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


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
        content: dict[str, Any] = parse_json(text)
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
        ValueError: a pickle, a pointer of Git LFS, an exported model, truncated, or not safetensors.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            _refuse_others(path, file.peek(64))
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            raw = file.read(length) if 0 < length <= min(size - 8, _HEADER_LIMIT) else b""
    except IsADirectoryError as error:
        raise ValueError(f"{path} is a folder; a checkpoint is a .safetensors file") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist") from error
    if 8 + length > size and length <= _HEADER_LIMIT:
        raise ValueError(f"{path} is truncated: {size} bytes, its header alone has {8 + length}; {_AGAIN}")
    try:
        header: dict[str, Any] = parse_json(raw)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        whole = 8 + length + max(ends, default=0)
        metadata = header.get("__metadata__") or {}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise ValueError(f"{path} is not a checkpoint: not a safetensors file") from None
    if not isinstance(metadata, dict):
        raise ValueError(f"{path} is not a checkpoint: not a safetensors file")
    if size < whole:
        raise ValueError(f"{path} is truncated: {size} bytes of {whole}; {_AGAIN}")
    return header


def _refuse_others(path: Path, start: bytes) -> None:
    if pointer := lfs_pointer(start, "weights"):
        raise ValueError(f"{path} is {pointer}")
    if path.suffix in MODELS - {".safetensors"}:
        measured = "" if path.suffix == ".nir" else ". What the model itself does is measured by tetdeploy validate"
        raise ValueError(
            f"{path} is an exported model, not a checkpoint; give the run folder or the checkpoint that it was exported"
            f" from{measured}"
        )
    is_zip = start.startswith(b"PK\x03\x04")
    # Protocol 2 and later open with this byte and their number. No safetensors header is that short.
    is_pickle = len(start) >= 2 and start[0] == 0x80 and start[1] in range(2, 6) and start[2:8] != bytes(6)
    if is_zip or is_pickle:
        kind = "a zip archive, as torch.save writes" if is_zip else "a pickle"
        raise ValueError(
            f"{path} is {kind}, not a checkpoint of tetdeploy; it is not opened, because unpickling can run code. "
            "Checkpoints are .safetensors files"
        )
