"""What `tetdeploy build` wrote beside a TensorRT engine. Needs numpy only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tetdeploy.runtimes.nvidia import MODULES
from tetdeploy.storage.form import parse_json
from tetdeploy.storage.model_file import check_metadata

AGAIN = "build it again: tetdeploy build MODEL.onnx"
_NEEDED = {"package", "version", "gpu_architectures", "graph", "engine_sha256", "batch", "T", "metadata"}


def manifest_path(engine: Path) -> Path:
    """`MODEL.engine.json` for `MODEL.engine`."""
    return engine.with_name(f"{engine.name}.json")


def read_manifest(engine: Path) -> dict[str, Any]:
    """What `tetdeploy build` wrote beside an engine.

    Raises:
        FileNotFoundError: the engine or the manifest is not there.
        ValueError: the manifest is damaged; it or the metadata in it are of a format that this version does not know.
    """
    path = manifest_path(engine)
    for file in (engine, path):
        if not file.is_file():
            raise FileNotFoundError(f"there is no {file}; {AGAIN}")
    try:
        manifest: dict[str, Any] = parse_json(path.read_bytes())
        known = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged; {AGAIN}") from error
    if known != 1:
        raise ValueError(f"{path} is a manifest of format {known}; this tetdeploy reads format 1")
    batch = manifest.get("batch")
    is_range = isinstance(batch, list) and [type(value) for value in batch] == [int, int, int]
    if _NEEDED - manifest.keys() or str(manifest["package"]) not in MODULES or not is_range:
        raise ValueError(f"{path} is damaged; {AGAIN}")
    return manifest | {"metadata": check_metadata(manifest["metadata"], path)}
