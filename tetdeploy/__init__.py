"""Spiking neural networks from Temporal Efficient Training to a served engine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tetdeploy.checkpoint import load
    from tetdeploy.engine import Engine

__version__ = "0.1.0"
__all__ = ["Engine", "__version__", "load"]

# ONNX Runtime would send usage data to Microsoft, and keep an identifier in the home folder. It looks once, when it is
# imported. Whoever wants that sets it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    # Lazy: a serving host imports the engine without torch, a training host needs no onnxruntime.
    if name == "load":
        from tetdeploy.checkpoint import load

        return load
    if name == "Engine":
        from tetdeploy.engine import Engine

        return Engine
    raise AttributeError(f"module 'tetdeploy' has no attribute {name!r}")
