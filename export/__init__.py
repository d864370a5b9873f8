"""From a trained network to an ONNX file that carries all serving needs."""

from tetdeploy.agreement import reference_path

from .model import LAYOUTS, ExportConfig, Exported, export_model
from .parity import Parity, ParityError
from .sidebyside import SideBySide

__all__ = [
    "LAYOUTS",
    "ExportConfig",
    "Exported",
    "Parity",
    "ParityError",
    "SideBySide",
    "export_model",
    "reference_path",
]
