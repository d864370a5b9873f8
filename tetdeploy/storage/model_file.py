"""The file of an exported model: its bytes, and the metadata in it. Needs no more than numpy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tetdeploy.energy import layers_of
from tetdeploy.storage.files import lfs_pointer
from tetdeploy.storage.form import COUNT, NUMBER, STEP, check_form, parse_json
from tetdeploy.storage.provenance import ORIGIN
from tetdeploy.wording import first_line, quoted

METADATA_KEY = "tetdeploy"  # of a checkpoint as well
FORMAT = 2  # of the metadata; 1 was written before the first release
# The key of a tensor's external data, as protocol buffers may write it: its number and length may be longer, too.
_EXTERNAL = re.compile(rb"(?:\n|\x8a\x80*\x00)(?:\x08|\x88\x80*\x00)location")
_TENSOR = {"input!": str, "output!": str, "shape!": [STEP]}
_METADATA = {
    "layout!": str,
    "encoding!": str,
    "T": STEP,
    "trained_T!": STEP,
    "input!": {"shape!": [STEP], "dtype!": ("uint8", "float32")},
    "class_names!": [str],
    "precision!": str,
    "target!": str,
    "fires!": str,
    "reset!": str,
    "neurons!": [{"name!": str, "tau!": NUMBER, "v_th!": NUMBER, "shape!": [STEP]}],
    "states!": [_TENSOR],
    "encoded!": [_TENSOR],
    "layers!": [
        {
            "name!": str,
            "input_shape!": [STEP],
            "outputs!": STEP,
            "pads!": [[COUNT]],
            **{axes: [STEP] for axes in ("kernel", "strides", "dilations")},
            **dict.fromkeys(("from_input", "binary", "product"), bool),
            "positions": STEP,
            "once!": bool,
            "precision!": str,
        }
    ],
    "uncounted!": [str],
    "other_ops!": {"*": {"*": COUNT}},
    "counting_overlay!": str,
    "created!": str,
    "source!": ORIGIN,
}


def read_model(path: Path) -> bytes:
    """The bytes of an exported model.

    Raises:
        ValueError: it is a folder, a TensorRT engine, a NIR graph, a checkpoint, or keeps weights in another file.
        OSError: it is not there or cannot be read.
    """
    refuse_folder(path)
    if not path.exists():
        raise FileNotFoundError(f"no model at {path}; write one with: tetdeploy export")
    if path.suffix == ".engine":
        raise ValueError(f"{path} is a TensorRT engine; here the .onnx file it was built from is needed")
    if path.suffix == ".nir":
        raise ValueError(f"{path} is a NIR graph, not an .onnx file; write one with: tetdeploy export")
    if path.suffix == ".safetensors":
        raise ValueError(f"{path} is a checkpoint, not an .onnx file; write one with: tetdeploy export {quoted(path)}")
    model = path.read_bytes()
    refuse_external(model, path)
    return model


def refuse_external(model: bytes, path: Path) -> None:
    """Refuse, with ValueError, a model that keeps weights in another file; it or its overlay was in the file `path`."""
    # They would be sought in the working directory, and no SHA-256 of ours covers them. The word alone is found faster.
    if b"location" in model and _EXTERNAL.search(model):
        raise ValueError(
            f"{path} keeps weights in another file (external data), as no export of tetdeploy does: take the exported "
            f"file, or make one of both with onnx.save(onnx.load({str(path)!r}), 'joined.onnx')"
        )


def models_in(run: Path) -> list[Path]:
    """The exported models in a run's folder and beside its shards, then those of the runs of several seeds in it."""
    folders = ("", "shards/", "seed-*/", "seed-*/shards/")
    return [model for folder in folders for model in sorted(run.glob(f"{folder}[!.]*.onnx"))]  # `._*` is macOS's


def refuse_folder(path: Path) -> None:
    """Refuse a folder where a model is needed, as of a run, and name a model in it.

    Raises:
        ValueError: `path` is a folder.
    """
    if path.is_dir():
        models = models_in(path)
        remedy = f"name a model in it, such as {models[0]}" if models else "write a model with: tetdeploy export"
        raise ValueError(f"{path} is a folder, not an .onnx file; {remedy}")


def load_fault(path: Path, error: Exception, hint: str = "") -> ValueError | MemoryError:
    """What to raise where the file of a model cannot be loaded: a MemoryError where `error` says that memory does not
    suffice, else a ValueError, which ends in `hint` and the first line of `error`, or says that Git LFS has it."""
    if "std::bad_alloc" in str(error):
        return MemoryError(f"{path} cannot be loaded: {first_line(error)}")
    with suppress(OSError), path.open("rb") as file:
        if pointer := lfs_pointer(file.read(64), "model"):
            return ValueError(f"{path} is {pointer}")
    fault = "not an ONNX model, or a damaged one; export or copy it again"
    return ValueError(f"{path} cannot be loaded: {fault}{hint} ({first_line(error)})")


def session_metadata(session: Any, path: Path) -> dict[str, str]:
    """All metadata of the model `path` in a session.

    Raises:
        ValueError: they are damaged.
    """
    try:
        texts: dict[str, str] = session.get_modelmeta().custom_metadata_map
    except UnicodeDecodeError as error:
        raise _damaged(path, error) from error
    return texts


def parse_metadata(text: str | None, path: Path) -> dict[str, Any]:
    """The metadata of a model from their text in the file `path`.

    Raises:
        ValueError: there are none; see also `check_metadata`.
    """
    if text is None:
        raise ValueError(f"{path} is an ONNX model, but not one that tetdeploy exported: its metadata are missing")
    try:
        value = parse_json(text)
    except ValueError as error:
        raise _damaged(path, error) from error
    return check_metadata(value, path)


def check_metadata(value: Any, path: Path) -> dict[str, Any]:
    """The metadata of a model, `value`, if they are such; the file `path` has them.

    Raises:
        ValueError: they are damaged, or of a format that this version does not know.
    """
    try:
        check_form(value, {"format!": NUMBER})
        if value["format"] == FORMAT:
            check_form(value, _METADATA)
            layers_of(value)
    except (ValueError, TypeError) as error:  # the latter of a layer's key that is not known
        raise _damaged(path, error) from error
    if value["format"] != FORMAT:
        remedy = "export the model again" if value["format"] < FORMAT else "update tetdeploy"
        raise ValueError(f"{path} has metadata of format {value['format']}; this tetdeploy reads {FORMAT}: {remedy}")
    known: dict[str, Any] = {"T": None, "normalization": None} | value
    return known


def check_outputs(outputs: Iterable[Any], metadata: Mapping[str, Any], path: Path) -> None:
    """Refuse, with ValueError, a graph whose outputs are not those that its metadata say.

    Args:
        outputs: of its session, each with `name` and `shape`, in which a free axis is no number.
    """
    classes = len(metadata["class_names"])
    wanted = {"logits": [classes], "per_step": [metadata["T"], classes]}
    wanted |= {state["output"]: state["shape"] for state in (*metadata["states"], *metadata["encoded"])}
    shapes = {output.name: list(output.shape[1:]) for output in outputs}
    for name, sizes in wanted.items():
        found = shapes.get(name, [])
        if len(found) != len(sizes) or any(isinstance(f, int) and f != s for f, s in zip(found, sizes, strict=True)):
            given = _shape(found) if name in shapes else "none"
            raise ValueError(
                f"{path} is not what its metadata say: {name} should be {_shape(sizes)}, the graph gives {given}; "
                "the file was changed, export the model again"
            )


def _shape(sizes: Sequence[Any]) -> str:
    return f"[{', '.join(map(str, ('N', *('T' if size is None else size for size in sizes))))}]"


def state_outputs(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """What one call gives for the next: membranes, and the encoded currents of a step graph for images."""
    return tuple(state["output"] for state in (*metadata["states"], *metadata["encoded"]))


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} has damaged metadata ({error}); export the model again")
