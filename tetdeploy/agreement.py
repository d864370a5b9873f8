"""Whether this machine computes what PyTorch computed: the images an export keeps beside the model. Needs no torch.

PyTorch's logits and spike counts of up to 256 images lie in `MODEL.reference.npz`. Running them again tells, without
PyTorch and without the data set, whether another runtime, processor or precision gives the same answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tetdeploy.batches import parts
from tetdeploy.engine import Engine
from tetdeploy.storage.arrays import read_npz
from tetdeploy.sweep import Sweep, Tally, running_sum

_NEEDED = ("x", "per_step", "spike_counts", "neurons")
_TIE = 1e-6  # of the largest logit: classes nearer than that are tied, and the last bit of a sum decides between them


class LogitAgreement:
    """Per-step logits of the same images from two sides, summed up by step; `arrays` and `restore` as in `Tally`.

    Attributes:
        same: images whose predicted class is the same after each number of steps, or tied, `[T]`.
        largest: the largest difference of a logit at each step, `[T]`.
    """

    def __init__(self, T: int) -> None:
        self.num_images = 0
        self.same = np.zeros(T, np.int64)
        self.largest = np.zeros(T)

    def add(self, per_step: NDArray[Any], expected: NDArray[Any]) -> None:
        """Add a batch, both `[N, T, K]`.

        Raises:
            ValueError: a logit is NaN or infinite.
        """
        for side, logits in (("the engine", per_step), ("PyTorch", expected)):
            if not np.isfinite(logits).all():
                raise ValueError(f"{side} gives NaN or infinite logits; there is nothing to compare")
        self.num_images += len(per_step)
        self.same += _same_class(per_step, expected).sum(0)
        self.largest = np.maximum(self.largest, np.abs(per_step - expected).max((0, 2)))

    def top1_agreement(self, t: int) -> float:
        """The fraction of images with the same class after `t` steps, or one that is tied with it: see `_TIE`."""
        return float(self.same[t - 1] / self.num_images)

    def max_abs_logit_error(self, t: int) -> float:
        """The largest difference of a logit within the first `t` steps."""
        return float(self.largest[:t].max())

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {"num_images": np.array(self.num_images), "same": self.same, "largest": self.largest}

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.num_images = int(arrays["num_images"])
        self.same, self.largest = arrays["same"].copy(), arrays["largest"].copy()


def _same_class(per_step: NDArray[Any], expected: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether both sides, `[N, T, K]`, predict the same class after each number of steps, `[N, T]`, or classes that are
    tied on both."""
    sides = [running_sum(logits) for logits in (per_step, expected)]
    classes = [running.argmax(-1)[..., None] for running in sides]
    tied = []
    for running in sides:
        one, other = (np.take_along_axis(running, chosen, -1)[..., 0] for chosen in classes)
        tied.append(np.abs(one - other) <= _TIE * np.abs(running).max(-1))
    same: NDArray[np.bool_] = tied[0] & tied[1]
    return same


@dataclass(frozen=True)
class Reference:
    """The images that an export kept, and what PyTorch made of them.

    Attributes:
        x: `[N, C, H, W]`, or frames `[N, T, C, H, W]`, as the graph takes them.
        per_step, spike_counts: `[N, T, K]`; `[N, T, layers]`.
        labels: `[N]`, or None.
    """

    x: NDArray[Any]
    per_step: NDArray[Any]
    spike_counts: NDArray[np.int64]
    labels: NDArray[np.int64] | None

    @property
    def T(self) -> int:
        return int(self.per_step.shape[1])


def reference_path(model: Path) -> Path:
    """Where the reference images of an exported model lie."""
    return model.with_suffix(".reference.npz")


def load_reference(engine: Engine) -> Reference:
    """The reference beside a model.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or that of another model.
    """
    path = reference_path(engine.path)
    if not path.exists():
        raise FileNotFoundError(
            f"no reference images at {path}; `tetdeploy export` writes them beside the model: copy them along"
        )
    try:
        arrays = read_npz(path)
    except ValueError as error:
        raise ValueError(f"{error}; export the model again") from error
    if missing := [name for name in _NEEDED if name not in arrays]:
        raise ValueError(f"{path} lacks {', '.join(missing)}; export the model again")
    if not _belongs(engine, arrays):
        raise ValueError(f"{path} is not the reference of {engine.path.name}: it was written with another model")
    if not _is_whole(arrays, len(engine.class_names)):
        raise ValueError(f"{path} is damaged: its arrays do not fit each other; export the model again")
    return Reference(arrays["x"], arrays["per_step"], arrays["spike_counts"], arrays.get("labels"))


def computed_by(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Whose answers the reference of a model holds: the weights, how their layers compute, and in 8 bits at which
    scales. (That BN is folded, layout and T change none.) What the metadata of an earlier export lack is left out."""
    found = {key: metadata.get(key) for key in ("precision", "scales_sha256")}
    found["checkpoint_sha256"] = metadata["source"].get("checkpoint_sha256") or ""
    return {key: value for key, value in found.items() if value is not None}


def _belongs(engine: Engine, arrays: Mapping[str, NDArray[Any]]) -> bool:
    names = [n["name"] for n in engine.metadata["neurons"]]
    return (
        arrays["neurons"].tolist() == names
        and arrays["per_step"].shape[2:] == (len(engine.class_names),)
        and all(str(arrays.get(key, value)) == value for key, value in computed_by(engine.metadata).items())
    )


def _is_whole(arrays: Mapping[str, NDArray[Any]], num_classes: int) -> bool:
    """Whether the arrays are of the types that an export writes, fit each other, and hold an image and a step."""
    per_step, counts = arrays["per_step"], arrays["spike_counts"]
    labels = arrays.get("labels", np.zeros(len(per_step), np.int64))
    return (
        per_step.size > 0
        and counts.shape == (*per_step.shape[:2], arrays["neurons"].size)
        and arrays["x"].shape[:1] == labels.shape == per_step.shape[:1]
        and (per_step.dtype.kind, counts.dtype.kind) == ("f", "i")
        and labels.dtype.kind in "iu"
        and 0 <= labels.min() <= labels.max() < num_classes
    )


class ReferenceComparison:
    """What came of running a reference again.

    Attributes:
        T: the steps compared.
        logits: classes and logits.
        count_error: differences of the spike counts without their signs, over images, by layer and step,
            `[layers, T]`.
        tally: firing rate and operations on these images.
    """

    def __init__(self, engine: Engine, T: int) -> None:
        self.T = T
        self.logits = LogitAgreement(T)
        self.tally = Tally(engine, T)
        self.sizes = np.array(list(self.tally.neurons.values()), np.int64)
        self.count_error = np.zeros((len(self.sizes), T), np.int64)

    def row(self, t: int) -> dict[str, Any]:
        """What a row of the result says."""
        neuron_steps = self.sizes.sum() * t * self.logits.num_images
        return {
            "top1_agreement": self.logits.top1_agreement(t),
            "spike_mismatch_rate": None,  # counts cannot tell: two spikes may trade places
            "max_abs_logit_error": self.logits.max_abs_logit_error(t),
            "spike_count_error": float(self.count_error[:, :t].sum() / neuron_steps),
        }

    def neuron(self, layer: int) -> dict[str, Any]:
        """What a layer of neurons says, over all steps."""
        neuron_steps = self.sizes[layer] * self.T * self.logits.num_images
        return {"spike_count_error": float(self.count_error[layer].sum() / neuron_steps)}

    def to_dict(self) -> dict[str, Any]:
        return {"with": "reference", "num_images": self.logits.num_images, "T": self.T}


def compare_reference(
    engine: Engine,
    reference: Reference,
    T: int,
    *,
    batch_size: int = 32,
    tick: Callable[[int], None] | None = None,
) -> ReferenceComparison:
    """Run the reference images on this machine and compare.

    The spike count of a layer in one step of one image differs by at most the number of its neurons that differ:
    `spike_count_error`, the differences over all neuron-steps, is a lower bound of the spike mismatch rate.

    Args:
        T: steps to compare; of more than the reference holds, those that it holds.
        tick: called with the number of images done.

    Raises:
        ValueError: see `Engine.run`; or a logit is NaN.
    """
    T = min(T, reference.T)
    result = ReferenceComparison(engine, T)
    labels = np.zeros(len(reference.x), np.int64) if reference.labels is None else reference.labels
    for part in parts(len(reference.x), batch_size, tick):
        run, counts = engine.count(reference.x[part], T)
        if engine.native:  # whose operators are joined otherwise where they count
            run = engine.run(reference.x[part], T)
        result.logits.add(run.per_step, reference.per_step[part, :T])
        fired = np.stack([counts[f"fired.{name}"] for name in result.tally.neurons], axis=-1)  # [T, N, layers]
        wrong = np.abs(np.rint(fired).astype(np.int64).swapaxes(0, 1) - reference.spike_counts[part, :T])
        result.count_error += wrong.sum(0).T
        result.tally.add(run.per_step, counts, labels[part])
    return result


class Compared(Protocol):
    """A comparison with PyTorch, of the reference or of a whole test set."""

    T: int

    def row(self, t: int) -> dict[str, Any]: ...

    def neuron(self, layer: int) -> dict[str, Any]: ...

    def to_dict(self) -> dict[str, Any]: ...


_NOTHING = dict.fromkeys(("top1_agreement", "spike_mismatch_rate", "max_abs_logit_error"))


def validation(measured: Sweep, compared: Compared | None, *, labelled: bool) -> dict[str, Any]:
    """The JSON of `tetdeploy validate`: that of a sweep and, in rows, neurons and `agreement`, what was compared.

    Args:
        compared: None where there was nothing to compare with; its fields are null then, as in rows beyond its T.
        labelled: the images have labels that say something of the model; otherwise accuracies are null.
    """
    value = measured.to_dict() | {"kind": "validate", "agreement": compared and compared.to_dict()}
    value["rows"] = [
        row | (compared.row(row["T"]) if compared is not None and row["T"] <= compared.T else _NOTHING)
        for row in value["rows"]
    ]
    if not labelled:
        value["rows"] = [row | {"accuracy": None} for row in value["rows"]]
        value["by_class"] = []
    if compared is not None:
        value["neurons"] = [neuron | compared.neuron(k) for k, neuron in enumerate(value["neurons"])]
    return value
