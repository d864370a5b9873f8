"""What the files of a report must look like, as far as it reads them. Whatever else they hold is left alone.

A form is `str`, `bool`, `NUMBER`, `STEP`, a list with the form of every item, or a dict of forms by key, where `"*"` is
every key and a key with `!` must be there. What need not be there may be null.
"""

from __future__ import annotations

import math
from typing import Any

NUMBER, LOOSE_NUMBER, STEP = "a finite number", "a number", "a whole number of at least 1"

_ROW = {
    "T!": STEP,
    "accuracy": NUMBER,
    "firing_rate": NUMBER,
    "ac_ops": NUMBER,
    "mac_ops": NUMBER,
    "energy_pj": NUMBER,
    "energy_exact_pj": NUMBER,
    "energy_once_pj": NUMBER,
    "ann_ratio": NUMBER,
    "latency_ms": NUMBER,
    "torch_latency_ms": NUMBER,
    "torch_accuracy": NUMBER,
    "top1_agreement": NUMBER,
    "spike_mismatch_rate": NUMBER,
    "local_mismatch_rate": NUMBER,
    "spike_count_error": NUMBER,
    "max_abs_logit_error": NUMBER,
    "input_rate": NUMBER,
}
_COST = {"energy_pj!": NUMBER, "energy_exact_pj!": NUMBER, "energy_once_pj!": NUMBER}
_EARLY_EXIT = {
    "criterion!": str,
    "threshold!": NUMBER,
    "min_T!": STEP,
    "T!": STEP,
    "accuracy!": NUMBER,
    "fixed_accuracy!": NUMBER,
    "lost!": NUMBER,
    "gained!": NUMBER,
    "loss!": NUMBER,
    "loss_95!": NUMBER,
    "mean_T!": NUMBER,
    "by_steps!": [{"T!": STEP, "num_images!": NUMBER}],
    "cost!": _COST,
    "fixed_cost!": _COST,
    "seconds!": NUMBER,
    "fixed_seconds!": NUMBER,
    "speedup!": NUMBER,
}
RESULT = {
    "model!": str,
    "data!": str,
    "num_samples!": STEP,
    "rows!": [_ROW],
    "model_sha256": str,
    "trained_T": STEP,
    "layout": str,
    "device": str,
    "created": str,
    "versions": {"*": str},
    "layers": [{"name!": str, "rows!": [_ROW], "fan_out": NUMBER, "weights": NUMBER, "parameters": NUMBER}],
    "neurons": [
        {
            "name!": str,
            "rows!": [_ROW],
            "size": NUMBER,
            "spike_mismatch_rate": NUMBER,
            "local_mismatch_rate": NUMBER,
            "margin": {"*": {"median": NUMBER, "max": NUMBER}},
        }
    ],
    "uncounted": [str],
    "ann": {"energy_pj": NUMBER},
    "other_ops": {"*": NUMBER},
    "other_ops_pj": {"*": NUMBER},
    "constants": {"ac_pj": NUMBER, "mac_pj": NUMBER, "source": str},
    "by_class": [{"name!": str, "num_samples!": NUMBER, "accuracy!": [NUMBER]}],
    "early_exit": _EARLY_EXIT,
    "agreement": {"with": str, "num_images": NUMBER, "data": str},
    "gates": [{"key!": str, "T!": STEP, "wanted!": NUMBER, "got": NUMBER, "passed!": bool}],
}
RUN = {
    "network!": {"model": str, "ann": bool},
    "data!": {"name": str, "image_shape": [NUMBER], "train_images": NUMBER, "val_images": NUMBER},
    "training!": {"T": STEP, "tit": str, "loss": str},
}
EPOCH = {
    "epoch!": STEP,
    "loss": str,
    "lr": LOOSE_NUMBER,  # numbers of a training that went wrong may be NaN
    "seconds": LOOSE_NUMBER,
    "train_loss": LOOSE_NUMBER,
    "train_accuracy": LOOSE_NUMBER,
    "val_loss": LOOSE_NUMBER,
    "val_accuracy": LOOSE_NUMBER,
}
SUMMARY = {
    "mean_val_accuracy": NUMBER,
    "std_val_accuracy": NUMBER,
    "runs": [{"seed": NUMBER, "best_epoch": NUMBER, "val_accuracy": NUMBER}],
}


def check_form(value: Any, form: Any, where: str = "it") -> None:
    """Compare JSON with a form.

    Raises:
        ValueError: it does not fit; the message names the place, and what it must be.
    """
    if isinstance(form, dict):
        _check_object(value, form, where)
    elif isinstance(form, list):
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, got {_shown(value)}")
        for k, item in enumerate(value):
            check_form(item, form[0], f"{where}[{k}]")
    elif not _is(value, form):
        raise ValueError(f"{where} must be {form if isinstance(form, str) else form.__name__}, got {_shown(value)}")


def _check_object(value: Any, forms: dict[str, Any], where: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object, got {_shown(value)}")
    prefix = "" if where == "it" else f"{where}."
    for key, form in forms.items():
        name = key.removesuffix("!")
        if key.endswith("!") and value.get(name) is None:
            raise ValueError(f"{prefix}{name} is missing")
        for found in value if key == "*" else [name]:
            if value.get(found) is not None:
                check_form(value[found], form, f"{prefix}{found}")


def _is(value: Any, form: Any) -> bool:
    if form in (str, bool):
        return isinstance(value, form)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value is None and form != STEP
    if form == STEP:
        return isinstance(value, int) and value >= 1
    return form == LOOSE_NUMBER or math.isfinite(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
