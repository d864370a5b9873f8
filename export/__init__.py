"""From a trained network to an ONNX file that carries all serving needs."""

from .model import LAYOUTS, ExportConfig, Exported, export_model, reference_path
from .parity import Parity, ParityError

__all__ = ["LAYOUTS", "ExportConfig", "Exported", "Parity", "ParityError", "export_model", "reference_path"]
