"""What graph to write: its layout, precision and target, and which of them go together.

Every layout goes with every target; docs/precision.md has the precisions of each target as a table. A refusal is for
what would run, but with nothing gained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from numpy.typing import NDArray

from tetdeploy.arguments import check_choice, check_count, check_flags
from tetdeploy.data import ENCODINGS, Encoding
from tetdeploy.steps import MAX_T

Layout = Literal["unrolled", "dynamic", "step"]
Precision = Literal["fp32", "fp16", "int8"]
Target = Literal["cpu", "cuda", "tensorrt", "tensorrt-rtx", "openvino"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
TARGETS: tuple[Target, ...] = get_args(Target)
GPU_TARGETS: tuple[Target, ...] = ("cuda", "tensorrt", "tensorrt-rtx")
REFUSED: dict[tuple[Target, Precision], str] = {
    ("cpu", "fp16"): "ONNX Runtime computes float16 in float32 on x86",
    ("cuda", "int8"): "ONNX Runtime's CUDA provider has no 8-bit convolutions and computes them in float32",
    ("openvino", "fp16"): "the engine holds OpenVINO to float32, which keeps the spikes",
}


@dataclass(frozen=True)
class ExportConfig:
    """What graph to write.

    Attributes:
        layout: `unrolled` (T fixed), `dynamic` (any T in one call) or `step` (one step; membranes go in and out).
        T: steps of an unrolled graph; ignored by the other layouts.
        trained_T: the T of the training, for the default number of steps of the other layouts.
        with_state: an unrolled graph also takes and returns every membrane, for long streams in chunks of T.
        encoding: `direct` for images shown at every step, `frames` for an input that changes.
        normalize: input normalisation is part of the graph, which then takes uint8.
        fold_bn: fold BN (Eq. 6).
        precision: `int8` computes the convolutions of spikes and their sums in 8 bits, see
            `tetdeploy.int8.quantisation`; `fp16` the layers between neurons in float16, see `export.half`.
        target: where the graph is to run; says which precisions there are.

    Raises:
        ValueError: a name is unknown, T or trained_T is no whole number from 1 to 1024, a flag is none, or things do
            not go together: the target and the precision, a precision below float32 and BN that is not folded,
            with_state and another layout.
    """

    layout: Layout = "unrolled"
    T: int = 4
    trained_T: int = 4
    with_state: bool = False
    encoding: Encoding = "direct"
    normalize: bool = True
    fold_bn: bool = True
    precision: Precision = "fp32"
    target: Target = "cpu"

    def __post_init__(self) -> None:
        check_flags(self)
        _check_target(self.target, self.precision)
        if self.precision != "fp32" and not self.fold_bn:
            raise ValueError(
                f"precision {self.precision} needs BN folded into the convolutions: leave out --no-fold-bn"
            )
        check_choice("layout", self.layout, LAYOUTS)
        check_choice("encoding", self.encoding, ENCODINGS)
        for name in ("T", "trained_T"):
            object.__setattr__(self, name, check_count(name, getattr(self, name), MAX_T))
        if self.with_state and self.layout != "unrolled":
            raise ValueError(
                f"--with-state goes with --layout unrolled; a {self.layout} graph "
                + ("always has its state outside" if self.layout == "step" else "runs any T in one call")
            )

    @property
    def steps(self) -> int | None:
        """Steps of the trace: None where they are a dimension of the input."""
        return {"unrolled": self.T, "dynamic": None, "step": 1}[self.layout]

    def steps_on(self, x: NDArray[Any], *, beyond: int = 0) -> int:
        """How many steps to run `x`: as many as an unrolled graph has, or else `beyond` more than the training had; but
        no more than there are frames."""
        T = self.T if self.layout == "unrolled" else self.trained_T + beyond
        return min(T, x.shape[1]) if self.encoding == "frames" else T

    @property
    def has_state(self) -> bool:
        """Whether every membrane is an input and an output of the graph."""
        return self.with_state or self.layout == "step"

    @property
    def file_name(self) -> str:
        """`model-T6.onnx`, `model-T6-state.onnx`, `model-dynamic.onnx`, `model-T6-fp16-cuda.onnx`."""
        name = f"model-T{self.T}" if self.layout == "unrolled" else f"model-{self.layout}"
        precision = "" if self.precision == "fp32" else f"-{self.precision}"
        target = "" if self.target == "cpu" else f"-{self.target}"
        return f"{name}{'-state' if self.with_state else ''}{precision}{target}.onnx"


def _check_target(target: Target, precision: Precision) -> None:
    """Refuse what the table does not have: an unknown name, or a precision with nothing to gain on the target."""
    check_choice("target", target, TARGETS)
    check_choice("precision", precision, PRECISIONS)
    if reason := REFUSED.get((target, precision)):
        others = ", ".join(p for p in PRECISIONS if (target, p) not in REFUSED)
        where = ", ".join(t for t in TARGETS if (t, precision) not in REFUSED)
        raise ValueError(
            f"precision {precision} gains nothing on target {target}: {reason}; choose precision {others}, or for "
            f"{precision} target {where}"
        )
