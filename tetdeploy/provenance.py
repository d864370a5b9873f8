"""What a file says of where it comes from: versions, time, and the model that was measured. Needs no torch."""

from __future__ import annotations

import importlib
import platform
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from tetdeploy import __version__

if TYPE_CHECKING:
    from tetdeploy.engine import Engine


def written(**packages: str) -> dict[str, Any]:
    """Who writes a file, and when, as JSON: `versions` of tetdeploy, Python and `packages`, and `created`, in UTC."""
    return {
        "versions": {"tetdeploy": __version__, "python": platform.python_version(), **packages},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def engine_provenance(engine: Engine) -> dict[str, Any]:
    """What a result must say of the model and of the measurement besides its numbers, as JSON."""
    runtime = importlib.import_module(engine.runtime)
    return {
        "model_sha256": engine.sha256,
        "trained_T": engine.trained_T,
        "layout": engine.layout,
        "num_classes": len(engine.class_names),
        "device": engine.device,
        "runtime": engine.runtime,
    } | written(**{"numpy": np.__version__, engine.runtime: str(runtime.__version__)})
