"""When an image's answer is certain enough to stop, and the threshold found for a model. Needs numpy only.

A network trained with TET answers at every step, and most images need few. Let p be the softmax of the mean logits of
the steps so far, p1 and p2 its largest entries. An image stops after the first step t >= min_T at which

    p1 > threshold           (criterion "confidence")
    p1 - p2 > threshold      (criterion "margin")

and after T steps in any case. A threshold of 1 stops no image early.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from tetdeploy.arguments import check_count, check_number, check_path
from tetdeploy.runtimes.manifest import read_manifest
from tetdeploy.storage.files import sha256_of
from tetdeploy.storage.form import FRACTION, STEP, check_form, parse_json
from tetdeploy.storage.model_file import refuse_folder
from tetdeploy.wording import quoted

Criterion = Literal["confidence", "margin"]
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
_FORM = {
    "threshold!": FRACTION,
    "criterion!": str,
    "min_T!": STEP,
    "T!": STEP,
    "confident": bool,
    "model_sha256!": str,
    "images_sha256": str,
}


@dataclass(frozen=True)
class Exit:
    """When an image's answer is certain enough to stop. Its numbers may come from NumPy; they are kept as Python's.

    Attributes:
        threshold: 0..1.
        criterion: what must exceed it, `confidence` or `margin`.
        min_T: the fewest steps that an image takes.

    Raises:
        ValueError: the criterion is unknown, the threshold no number, a number out of range, or min_T not whole.
    """

    threshold: float
    criterion: Criterion = "confidence"
    min_T: int = 1

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA:
            raise ValueError(f"unknown criterion {self.criterion!r}; choose {' or '.join(CRITERIA)}")
        threshold = check_number("threshold", self.threshold)
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must lie in 0..1, got {threshold}; 1 stops no image early")
        object.__setattr__(self, "threshold", float(threshold))
        object.__setattr__(self, "min_T", check_count("min_T", self.min_T))

    def certain(self, mean_logits: NDArray[Any]) -> NDArray[np.bool_]:
        """Which images may stop, `[N]`, by the mean logits of their steps so far, `[N, K]`."""
        return certainty(mean_logits, self.criterion) > self.threshold


def certainty(mean_logits: NDArray[Any], criterion: Criterion) -> NDArray[np.float64]:
    """The confidence p1 or the margin p1 - p2 of the softmax of `mean_logits [..., K]`: `[...]`, in 0..1."""
    p = softmax(mean_logits)
    found: NDArray[np.float64] = p.max(-1)
    if criterion == "margin" and p.shape[-1] > 1:
        found = found - np.partition(p, -2)[..., -2]
    return found


def softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Of `[..., K]`, in float64; of infinite logits NaN."""
    with np.errstate(invalid="ignore"):
        p: NDArray[np.float64] = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return p


def exit_path(model: Path | str) -> Path:
    """Where the threshold of an exported model lies: `MODEL.exit.json` beside `MODEL.onnx`."""
    return Path(model).with_suffix(".exit.json")


def load_exit(model: Path | str, T: int | None = None) -> Exit:
    """The rule that `tetdeploy calibrate` found for a model.

    Args:
        model: path of the `.onnx` file, which must be the very one; or of an `.engine` that `tetdeploy build` made of
            it, beside which its rule lies.
        T: the most steps that are to be run, if known. Compared with more steps than it was found for, the rule may
            lose more accuracy than it was allowed.

    Raises:
        FileNotFoundError: the model is not there, or there is no rule beside it.
        ValueError: `model` is no path, or a folder; the rule's file is damaged, is that of another model, or was found
            for more steps than T.
    """
    rule = load_rule(model)
    if T is not None:
        check_calibrated(model, rule.T, T)
    return rule.exit


def why_unfit(model: Path) -> str | None:
    """Why the rule that lies beside a model is not its own: that of an earlier model of this name is not deleted. None
    if it is, or if none lies there."""
    if not exit_path(model).exists():
        return None
    try:
        load_exit(model)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def check_calibrated(model: Path | str, calibrated_T: int, T: int) -> None:
    """Refuse, with ValueError, to run fewer steps than the rule of a model was found for."""
    if calibrated_T > T:
        raise ValueError(
            f"the threshold of {model} was found for T={calibrated_T} and says nothing of T={T}; "
            f"run: tetdeploy calibrate {quoted(_graph(Path(model))[0])} --T {T}"
        )


class Rule(NamedTuple):
    """A rule, the T and the images (`images_sha256`; an earlier version did not say) that it was found for, and whether
    it is confident, no point estimate."""

    exit: Exit
    T: int
    confident: bool
    images_sha256: str | None


def load_rule(model: Path | str, *, sha256: str | None = None) -> Rule:
    """The rule of a model. Raises: as `load_exit` without T.

    Args:
        sha256: of the `.onnx` file as it was loaded; None reads it.
    """
    check_path("model", model, "an .onnx file")
    graph, said = _graph(Path(model))
    refuse_folder(graph)
    sha256 = sha256 or (sha256_of(graph) if said is None else said)
    path, again = exit_path(graph), f"run: tetdeploy calibrate {quoted(graph)}"
    if not path.is_file():
        raise FileNotFoundError(f"no early-exit threshold at {path}; {again}")
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        check_form(content, _FORM)
        found = Exit(content["threshold"], content["criterion"], content["min_T"])
    except ValueError as error:
        raise ValueError(f"{path} is damaged; {again}") from error
    if content["model_sha256"] != sha256:
        raise ValueError(f"{path} holds the threshold of another model than {model}; {again}")
    return Rule(found, content["T"], content.get("confident", True), content.get("images_sha256"))


def _graph(model: Path) -> tuple[Path, str | None]:
    """The graph that a model is or was built from, and the SHA-256 of the latter."""
    if model.suffix != ".engine":
        return model, None
    manifest = read_manifest(model)
    return model.with_name(manifest["graph"]), str(manifest.get("graph_sha256", ""))
