"""Where a graph is to run, and which precisions make sense there; docs/precision.md has the same as a table.

Every layout goes with every target. A refusal is for what would run, but with nothing gained.
"""

from __future__ import annotations

from typing import Literal

Target = Literal["cpu", "cuda", "tensorrt", "tensorrt-rtx", "openvino"]
Precision = Literal["fp32", "fp16", "int8"]
TARGETS: tuple[Target, ...] = ("cpu", "cuda", "tensorrt", "tensorrt-rtx", "openvino")
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
REFUSED: dict[tuple[Target, Precision], str] = {
    ("cpu", "fp16"): "ONNX Runtime computes float16 in float32 on x86",
    ("cuda", "int8"): "ONNX Runtime's CUDA provider has no 8-bit convolutions and computes them in float32",
    ("openvino", "fp16"): "the engine holds OpenVINO to float32, which keeps the spikes",
}


def check_target(target: Target, precision: Precision) -> None:
    """Refuse what the table does not have.

    Raises:
        ValueError: an unknown name, or a precision with nothing to gain on the target.
    """
    for what, name, known in (("target", target, TARGETS), ("precision", precision, PRECISIONS)):
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}; choose one of {', '.join(known)}")
    if reason := REFUSED.get((target, precision)):
        others = ", ".join(p for p in PRECISIONS if (target, p) not in REFUSED)
        where = ", ".join(t for t in TARGETS if (t, precision) not in REFUSED)
        raise ValueError(
            f"precision {precision} gains nothing on target {target}: {reason}; choose precision {others}, or for "
            f"{precision} target {where}"
        )
