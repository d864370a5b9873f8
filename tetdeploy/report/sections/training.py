"""What was trained on what, how, and how it went."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from tetdeploy.report.document import Note, Plots, Section, Table
from tetdeploy.report.drawing import Style, draw, percent_axis, short, whole_numbers
from tetdeploy.report.numbers import NONE, percent, short_float
from tetdeploy.report.reading import Run
from tetdeploy.report.results import Results, Source

# Settings that are off by default: shown where any of the runs uses them.
_OFF = {"label_smoothing", "clip", "cutout", "ema", "random_T", "distill", "smooth_spike", "switch_to_tet"}
_LABELS = {
    "lr": "learning rate, peak",
    "lam": "λ, weight of the MSE term (Eq. 13)",
    "phi": "φ, target of the MSE term (Eq. 12)",
    "tau": "τ, leak factor a step (Eq. 1)",
    "v_th": "threshold v_th (Eq. 2)",
    "gamma": "γ, half-width of the surrogate (Eq. 5)",
    "random_T": "T drawn anew at each step",
    "ema": "moving average of the weights, decay",
    "width": "width, factor on channels",
    "switch_to_tet": "epochs of SDT before TET",
}
_NETWORK = ("width", "tau", "v_th", "gamma", "smooth_spike")
_TRAINING = (
    "T", "tit", "epochs", "loss", "lam", "phi", "switch_to_tet", "random_T", "distill", "optimizer", "lr",
    "batch_size", "weight_decay", "warmup_epochs", "label_smoothing", "clip", "ema", "augment", "cutout", "seed",
)  # fmt: skip


def settings(results: Results) -> Section | None:
    """A column for each training."""
    trained = results.trained
    if not trained:
        return None
    runs = [source.run for source in trained if source.run is not None]
    facts: dict[str, list[str]] = {
        "network": [_network(run) for run in runs],
        "data": [str(run.data.get("name", NONE)) for run in runs],
        "image (channels, height, width)": [" × ".join(map(str, run.data.get("image_shape", ()))) for run in runs],
        "classes": [str(run.network.get("num_classes", NONE)) for run in runs],
        "images trained on": [_count(run.data.get("train_images")) for run in runs],
        "images held out for validation": [_count(run.data.get("val_images")) for run in runs],
    }
    for part, names in (("network", _NETWORK), ("training", _TRAINING)):
        for name in names:
            values = [getattr(run, part).get(name) for run in runs]
            if any(values) or (name not in _OFF and name != "tit" and any(value is not None for value in values)):
                facts[_LABELS.get(name, name.replace("_", " "))] = [_value(name, value) for value in values]
    facts["seed"] = [_seeds(source) for source in trained]
    facts["trained on"] = [str(_origin(run).get("device", NONE)) for run in runs]
    facts["precision"] = [str(_origin(run).get("precision", NONE)) for run in runs]
    rows = tuple((label, *values) for label, values in facts.items() if any(v not in ("", NONE) for v in values))
    table = Table("The settings of each training.", ("", *(source.name for source in trained)), rows)
    return Section("What was trained, on what and how", (table,))


def training_curves(results: Results) -> Section | None:
    """Loss, accuracy and learning rate by epoch, stages marked."""
    shown = [source for source in results.trained if any(run.metrics for run in source.runs.values())]
    if not shown:
        return None
    plots = [
        _curves(results, shown, ("train_loss", "val_loss"), "loss", _loss_caption(shown)),
        _curves(results, shown, ("train_accuracy", "val_accuracy"), "accuracy (%)", "Accuracy by epoch."),
        _curves(results, shown, ("lr",), "learning rate", "Learning rate at the end of each epoch."),
    ]
    marks = _marks_note(shown)
    rows = tuple(_progress(name, run) for source in shown for name, run in source.runs.items() if run.metrics)
    headers = ("run", "epochs", "kept epoch", "validation accuracy", "validation loss", "training accuracy", "time")
    table = Table("The epoch whose weights were kept, and the time of all epochs.", headers, rows)
    found = tuple(plot for plot in plots if plot is not None)
    return Section("Training", (Plots(found), *([Note(marks)] if marks else []), table))


def seeds(results: Results) -> Section | None:
    """Several seeds of one training: each, and the mean."""
    tables = []
    for source in results.sources:
        if source.summary:
            runs = source.summary.get("runs") or []
            rows = [
                (str(r.get("seed")), str(r.get("best_epoch") or NONE), percent(r.get("val_accuracy"))) for r in runs
            ]
            mean, std = source.summary.get("mean_val_accuracy"), source.summary.get("std_val_accuracy")
            rows.append(("mean ± standard deviation", "", f"{percent(mean)} ± {percent(std)}"))
            caption = f"{source.name}: best validation accuracy of each seed; the deviation is over n - 1."
            table = Table(
                caption, ("seed", "kept epoch", "validation accuracy"), tuple(rows), 1, frozenset({len(runs)})
            )
            tables.append(table)
    return Section("Seeds", tuple(tables)) if tables else None


def _curves(results: Results, sources: Sequence[Source], keys: tuple[str, ...], label: str, caption: str) -> Any:
    """Each key by epoch: the last of them in full, one before it dashed and pale. None if no run has any."""
    if not any(record.get(keys[-1]) is not None for s in sources for run in s.runs.values() for record in run.metrics):
        keys = keys[:1]

    def paint(axes: Any) -> None:
        for source in sources:
            style = Style.of(results.style_of[source.name])
            _mark_stages(axes, source, style)
            for key in keys:
                epochs, low, mean, high = _over_seeds(source, key)
                if not epochs:
                    continue
                whole = key == keys[-1]
                name = short(source.name) + (_part(key) if len(keys) > 1 else "")
                axes.plot(
                    epochs,
                    mean,
                    color=style.colour,
                    label=name,
                    alpha=1.0 if whole else 0.65,
                    linestyle="-" if whole else "--",
                    marker=style.marker if whole else None,
                    markevery=max(1, len(epochs) // 8),
                )
                if len(source.runs) > 1 and whole:
                    axes.fill_between(epochs, low, high, color=style.colour, alpha=0.15, linewidth=0)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        whole_numbers(axes.xaxis)
        if "%" in label:
            percent_axis(axes.yaxis)
        elif label == "learning rate":
            axes.set_ylim(bottom=0)

    names = ", ".join(source.name for source in sources)
    several = any(len(source.runs) > 1 for source in sources)
    band = " The line is the mean over the seeds, the band goes from the lowest to the highest." if several else ""
    return draw(paint, description=f"{label} by epoch of {names}", caption=caption + band)


def _over_seeds(source: Source, key: str) -> tuple[list[int], list[float], list[float], list[float]]:
    """Epochs, and the lowest, mean and highest value of the runs at each."""
    values: dict[int, list[float]] = {}
    for run in source.runs.values():
        for record in run.metrics:
            if record.get(key) is not None:
                values.setdefault(int(record["epoch"]), []).append(float(record[key]))
    epochs = sorted(values)
    of: Callable[[Callable[[list[float]], Any]], list[float]] = lambda f: [float(f(values[e])) for e in epochs]  # noqa: E731
    return epochs, of(min), of(np.mean), of(max)


def _mark_stages(axes: Any, source: Source, style: Style) -> None:
    for epoch, what in _marks(source):
        axes.axvline(epoch + 0.5, color=style.colour, linestyle=":", linewidth=1.2)
        axes.annotate(
            what,
            (epoch + 0.5, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(2, -8),
            textcoords="offset points",
            fontsize=7.5,
            color=style.colour,
        )


def _marks(source: Source) -> list[tuple[int, str]]:
    """The last epoch before each change of T or of the loss, and what comes."""
    metrics = source.run.metrics if source.run else ()
    marks = []
    for before, after in pairwise(metrics):
        changes = [f"T={after['T']}"] if before.get("T") != after.get("T") and "T" in after else []
        if before.get("loss") != after.get("loss") and after.get("loss"):
            changes.append(str(after["loss"]).upper())
        if not changes and before.get("stage") != after.get("stage"):
            changes.append(f"stage {after.get('stage')}")
        if changes:
            marks.append((int(before["epoch"]), " ".join(changes)))
    return marks


def _marks_note(sources: Sequence[Source]) -> str:
    listed = [f"{s.name} goes on with {what} after epoch {epoch}" for s in sources for epoch, what in _marks(s)]
    return f"Dotted lines: {'; '.join(listed)}." if listed else ""


def _loss_caption(sources: Sequence[Source]) -> str:
    losses = {f"{s.name}: {_loss_name(s.run)}" for s in sources if s.run}
    return f"Loss by epoch, each run's own ({', '.join(sorted(losses))})."


def _loss_name(run: Run) -> str:
    names = dict.fromkeys(str(r.get("loss", "")).upper() for r in run.metrics)
    return " then ".join(names) or NONE


def _part(key: str) -> str:
    return ", validation" if key.startswith("val_") else ", training"


def _progress(name: str, run: Run) -> tuple[str, ...]:
    best = run.best or {}
    seconds = sum(float(record.get("seconds") or 0.0) for record in run.metrics)
    return (
        name,
        f"{len(run.metrics)} of {run.training.get('epochs', '?')}",
        str(best.get("epoch", NONE)),
        percent(best.get("val_accuracy")),
        short_float(best.get("val_loss")),
        percent(best.get("train_accuracy")),
        _duration(seconds) if seconds else NONE,
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _network(run: Run) -> str:
    kind = " (ANN twin: ReLU, no time)" if run.network.get("ann") else ""
    return f"{run.network.get('model', NONE)}{kind}"


def _value(name: str, value: Any) -> str:
    if value is None or value == "":
        return NONE
    if name == "loss":
        return str(value).upper()
    if name == "tit":
        return (
            " then ".join(f"T={part.split(':')[0]} for {part.split(':')[1]}" for part in value.split(",")) + " epochs"
        )
    return f"{value:g}" if isinstance(value, float) else str(value)


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else NONE


def _seeds(source: Source) -> str:
    return ", ".join(str(run.training.get("seed", NONE)) for run in source.runs.values())


def _origin(run: Run) -> dict[str, Any]:
    return dict(run.checkpoint.get("provenance") or {})
