"""What a result says of what was measured: the model, and the images. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tetdeploy.storage.provenance import written

if TYPE_CHECKING:
    from tetdeploy.engine import Engine


def engine_provenance(engine: Engine) -> dict[str, Any]:
    """What a result must say of the model and of the measurement besides its numbers, as JSON."""
    return {
        "model_sha256": engine.sha256,
        "checkpoint_sha256": engine.metadata["source"].get("checkpoint_sha256"),
        "trained_T": engine.trained_T,
        "layout": engine.layout,
        "encoding": engine.encoding,
        "input_dtype": str(engine.input_dtype),
        "num_classes": len(engine.class_names),
        "device": engine.device,
        "runtime": engine.runtime,
    } | written(numpy=np.__version__, **engine.runtime_version)


def own_data(engine: Engine) -> str:
    """What the model was trained on; empty where it does not say."""
    return str(said_of_data(engine).get("name") or "")


def said_of_data(engine: Engine) -> Mapping[str, Any]:
    """The settings of its training's data that the model has in its metadata."""
    data: Mapping[str, Any] | None = engine.metadata["source"].get("data")
    return data or {}


def images_provenance(engine: Engine, name: str, x: NDArray[Any], labels: NDArray[np.int64] | None) -> dict[str, Any]:
    """What a result must say of the data set `name` besides its numbers, as JSON: `images_sha256`, and `trained_on` if
    that is the file that the model was trained on."""
    from tetdeploy.data import is_own_file
    from tetdeploy.data.fingerprint import images_sha256

    found: dict[str, Any] = {"images_sha256": images_sha256(x, labels)}
    return found | {"trained_on": True} if is_own_file(name, own_data(engine)) else found
