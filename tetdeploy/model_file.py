"""The file of an exported model: its bytes, and the metadata in it. Needs no more than numpy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tetdeploy.form import NUMBER, STEP, check_form

METADATA_KEY = "tetdeploy"
_TENSOR = {"input!": str, "output!": str, "shape!": [STEP]}
_METADATA = {
    "layout!": str,
    "encoding!": str,
    "T": STEP,
    "trained_T!": STEP,
    "input!": {"shape!": [STEP], "dtype!": str},
    "class_names!": [str],
    "neurons!": [{"name!": str, "shape!": [STEP]}],
    "states!": [_TENSOR],
    "encoded!": [_TENSOR],
    "layers!": [{"name!": str, "input_shape!": [STEP]}],
    "counting_overlay!": str,
    "source!": {},
}


def read_model(path: Path) -> bytes:
    """The bytes of an exported model.

    Raises:
        ValueError: it is a folder, or a TensorRT engine.
        OSError: it is not there or cannot be read.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not an .onnx file")
    if not path.exists():
        raise FileNotFoundError(f"no model at {path}; write one with: tetdeploy export")
    if path.suffix == ".engine":
        raise ValueError(f"{path} is a TensorRT engine; here the .onnx file it was built from is needed")
    return path.read_bytes()


def session_metadata(session: Any, path: Path) -> dict[str, str]:
    """All metadata of the model `path` in a session.

    Raises:
        ValueError: they are damaged.
    """
    try:
        texts: dict[str, str] = session.get_modelmeta().custom_metadata_map
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} has damaged metadata ({error}); export the model again") from error
    return texts


def parse_metadata(text: str | None, path: Path) -> dict[str, Any]:
    """The metadata of a model from their text in the file `path`.

    Raises:
        ValueError: there are none, they are damaged, or of a format that this version does not know.
    """
    if text is None:
        raise ValueError(f"{path} is an ONNX model, but not one that tetdeploy exported: its metadata are missing")
    try:
        value: dict[str, Any] = json.loads(text)
        check_form(value, {"format!": NUMBER})
        if value["format"] == 1:
            check_form(value, _METADATA)
    except ValueError as error:
        raise ValueError(f"{path} has damaged metadata ({error}); export the model again") from error
    if value["format"] != 1:
        raise ValueError(f"{path} has metadata of format {value['format']}; this tetdeploy reads format 1")
    return value


def state_outputs(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """What one call gives for the next: membranes, and the encoded currents of a step graph for images."""
    return tuple(state["output"] for state in (*metadata["states"], *metadata["encoded"]))
