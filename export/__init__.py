"""From a trained network to an ONNX file that carries all serving needs. The parts, in the order of an export:

- `model`: `export_model`, from start to end. It takes what `trained` finds, as `config` says, tells `progress`, and
  writes the graph and its `reference`.
- `preflight`, `causality`: what is refused, before a training and before a trace.
- `onnx_tracer`: from PyTorch to ONNX, each layer of neurons one node; `program`: what torch.onnx translates of a folded
  network; `pooling`, `half`, `int8`: operators that are written otherwise.
- `lowering`, `neuron_steps`: those nodes become steps of neurons, in each layout; `encoder`: what a step graph computes
  once for an image; `openvino`: a runtime's own form.
- `operations`: what is counted, for which `binary_values` and `step_order` look at the values (`values`: their makers
  and constants); `counters`: outputs that count.
- `description`: what a graph says of itself; `reading`: an exported graph, read back.
- `gate`: what an export is compared on before it is kept; `parity`: how, and its limits; `sidebyside`: the same on a
  test set, for `tetdeploy validate --against`; `comparison`: the sums of both; `recorder`, `margins`: spikes and
  membranes for them; `audit`: operation counts; `kept_answers`: what lower precision keeps.
- Other forms: `nir_format`; `tensorrt`, `tensorrt_graph`; `repository`, `sequence_graph` for Triton; `kserve`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import LAYOUTS, ExportConfig
    from .model import Exported, export_model
    from .parity import Parity, ParityError
    from .sidebyside import SideBySide

__all__ = ["LAYOUTS", "ExportConfig", "Exported", "Parity", "ParityError", "SideBySide", "export_model"]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    # Lazy: TensorRT engines are built from a graph on hosts that have no torch.
    if name not in __all__:
        raise AttributeError(f"module 'tetdeploy.export' has no attribute {name!r}")
    homes = {"SideBySide": "tetdeploy.export.sidebyside"}
    homes |= dict.fromkeys(("LAYOUTS", "ExportConfig"), "tetdeploy.export.config")
    homes |= dict.fromkeys(("Parity", "ParityError"), "tetdeploy.export.parity")
    return getattr(import_module(homes.get(name, "tetdeploy.export.model")), name)
