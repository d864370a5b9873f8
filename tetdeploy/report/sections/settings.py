"""What was trained, on what and how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tetdeploy.names import has_regulariser, is_own_model
from tetdeploy.report.document import NONE, Section, Table
from tetdeploy.report.reading import Run
from tetdeploy.report.results import Results, Source

_BUILT_IN = {  # what a network of the user's own decides for itself
    "width": "width, factor on channels",
    "tau": "τ, leak factor a step (Eq. 1)",
    "v_th": "threshold v_th (Eq. 2)",
    "gamma": "γ, half-width of the surrogate (Eq. 5)",
}
_NETWORK = _BUILT_IN | {"smooth_spike": "smooth spikes, Sigmoid(k x) with k"}
_TRAINING = {
    "T": "time steps T",
    "tit": "time inheritance training",
    "random_T": "T drawn anew at each step",
    "epochs": "epochs",
    "loss": "loss",
    "switch_to_tet": "epochs of SDT before TET",
    "lam": "λ, weight of the MSE term (Eq. 13)",
    "phi": "φ, target of the MSE term (Eq. 12)",
    "distill": "learned from",
    "distill_alpha": "weight of the distillation",
    "distill_tau": "temperature of the distillation",
    "optimizer": "optimizer",
    "lr": "learning rate, peak",
    "batch_size": "batch size",
    "weight_decay": "weight decay",
    "warmup_epochs": "epochs of warm-up",
    "label_smoothing": "label smoothing",
    "clip": "largest norm of the gradient",
    "ema": "moving average of the weights, decay",
    "augment": "augmentation",
    "cutout": "cutout, pixels",
    "qat": "fine-tuned in 8 bits (--qat)",
}
_OFF: tuple[Any, ...] = (None, "", 0, "none")  # not shown where no run uses them


def settings(results: Results) -> Section | None:
    """A column for each training; rows in which they differ are marked."""
    trained = results.trained
    if not trained:
        return None
    runs = [run for source in trained if (run := source.run) is not None]
    facts = _data_facts(runs) | _config_facts(runs) | _origin_facts(trained, runs)
    rows = tuple((label, *values) for label, values in facts.items() if any(v not in ("", NONE) for v in values))
    differing = frozenset(k for k, (_, *values) in enumerate(rows) if len(set(values)) > 1)
    marks = " Rows in which they differ are marked." if differing else ""
    caption = f"The settings of each training; what none of them uses is left out.{marks}"
    table = Table(caption, ("", *(source.name for source in trained)), rows, marked=differing)
    return Section("What was trained, on what and how", (table,))


def _data_facts(runs: Sequence[Run]) -> dict[str, list[str]]:
    return {
        "network": [_network(run) for run in runs],
        "parameters": [_count(run.parameters) for run in runs],
        "data": [str(run.data.get("name", NONE)) for run in runs],
        "channels × height × width": [" × ".join(map(str, run.data.get("image_shape") or ())) for run in runs],
        "classes": [str(run.network.get("num_classes", NONE)) for run in runs],
        "training images": [_count(run.data.get("train_images")) for run in runs],
        "validation images": [_count(run.data.get("val_images")) for run in runs],
    }


def _config_facts(runs: Sequence[Run]) -> dict[str, list[str]]:
    found = {}
    for part, labels in (("network", _NETWORK), ("training", _TRAINING)):
        for name, label in labels.items():
            values = [None if _plays_no_part(name, run) else getattr(run, part).get(name) for run in runs]
            if not all(value in _OFF for value in values):
                found[label] = [_value(name, value) for value in values]
    return found


def _origin_facts(sources: Sequence[Source], runs: Sequence[Run]) -> dict[str, list[str]]:
    origins = [run.checkpoint.get("provenance", {}) for run in runs]
    parents = [origin.get("init") or {} for origin in origins]
    return {
        "began with": [f"{p['path']}, checkpoint {p['checkpoint_sha256'][:12]}" if p else NONE for p in parents],
        "restarted, by --restart-from, after epoch": [NONE if (n := run.restarted) is None else str(n) for run in runs],
        "seed": [", ".join(str(run.training.get("seed", NONE)) for run in source.runs.values()) for source in sources],
        "device": [str(origin.get("device", NONE)) for origin in origins],
        "precision": [str(origin.get("precision", NONE)) for origin in origins],
    }


def _plays_no_part(name: str, run: Run) -> bool:
    """What a network of the user's own decides for itself, the MSE term of a training by Eq. 7 alone, and how to learn
    from a network where there is none to learn from."""
    if name in ("distill_alpha", "distill_tau"):
        return not run.training.get("distill")
    if name in ("lam", "phi"):
        return not (has_regulariser(run.training.get("loss", "")) or run.training.get("switch_to_tet"))
    return name in _BUILT_IN and is_own_model(str(run.network.get("model", "")))


def _network(run: Run) -> str:
    return f"{run.network.get('model', NONE)}{', ANN twin' if run.network.get('ann') else ''}"


def _value(name: str, value: Any) -> str:
    if value in (None, ""):
        return NONE
    if name == "loss":
        return str(value).upper()
    if name == "tit":
        return ", then ".join(_stage(*stage.split(":")[:3]) for stage in str(value).split(",") if ":" in stage)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _stage(T: str, epochs: str, lr: str = "") -> str:
    """Of time inheritance training; its own learning rate, if it has one."""
    return f"T={T} for {epochs} epoch{'s' * (epochs != '1')}" + (f" at learning rate {lr}" if lr else "")


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else NONE
