"""An exported graph, read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from tetdeploy.storage.model_file import METADATA_KEY, load_fault, parse_metadata


def parse_graph(data: bytes, path: Path) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """An exported graph and its metadata from the bytes of the file `path`.

    Raises:
        ValueError: it is no ONNX model, or none of ours.
    """
    try:
        graph = onnx.load_from_string(data)
        if not graph.HasField("graph"):  # an empty file is a message without fields
            raise DecodeError("it has no graph")
    except DecodeError as error:
        raise load_fault(path, error) from error
    texts = {entry.key: entry.value for entry in graph.metadata_props}
    return graph, parse_metadata(texts.get(METADATA_KEY), path)
