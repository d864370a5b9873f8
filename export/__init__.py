"""From a trained network to an ONNX file that carries all serving needs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import LAYOUTS, ExportConfig
    from .model import Exported, export_model
    from .parity import Parity, ParityError
    from .sidebyside import SideBySide

__all__ = ["LAYOUTS", "ExportConfig", "Exported", "Parity", "ParityError", "SideBySide", "export_model"]


def __getattr__(name: str) -> Any:
    # Lazy: TensorRT engines are built from a graph on hosts that have no torch.
    if name not in __all__:
        raise AttributeError(f"module 'tetdeploy.export' has no attribute {name!r}")
    homes = {"SideBySide": "tetdeploy.export.sidebyside"}
    homes |= dict.fromkeys(("LAYOUTS", "ExportConfig"), "tetdeploy.export.config")
    homes |= dict.fromkeys(("Parity", "ParityError"), "tetdeploy.export.parity")
    return getattr(import_module(homes.get(name, "tetdeploy.export.model")), name)
