"""How training went: curves by epoch, the epoch that was kept, several seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from tetdeploy.report.document import NONE, Note, Plot, Row, Section, Table
from tetdeploy.report.drawing import Style, draw, percent_axis, whole_numbers
from tetdeploy.report.numbers import percent, three_digits
from tetdeploy.report.reading import Run
from tetdeploy.report.results import Results, Source


def training(results: Results) -> Section | None:
    """Loss, accuracy and learning rate by epoch, stages marked."""
    sources = [source for source in results.trained if any(run.metrics for run in source.runs.values())]
    if not sources:
        return None
    own = {s.name: _losses(s.run) for s in sources if s.run}
    alike = len(set(own.values())) == 1
    losses = ", ".join({*own.values()} if alike else (f"{name}: {loss}" for name, loss in own.items()))
    plots = (
        _curves(results, sources, "loss", "loss", f"Loss by epoch; each run's own ({losses})."),
        _curves(results, sources, "accuracy", "accuracy (%)", "Accuracy by epoch."),
        _rates(results, sources),
    )
    marks = [f"{s.name} goes on with {what} after epoch {epoch}" for s in sources for epoch, what in _changes(s)]
    notes = [Note(f"Dotted vertical lines: {'; '.join(marks)}.")] if marks else []
    return Section("Training", (Row(plots), *notes, _kept_epochs(sources)))


def seeds(results: Results) -> Section | None:
    """Several seeds of one training: each, and the mean."""
    tables = tuple(_seeds_table(source) for source in results.sources if source.summary)
    return Section("Seeds", tables) if tables else None


def _curves(results: Results, sources: Sequence[Source], key: str, label: str, caption: str) -> Plot:
    """Of the validation images in full, of the training images dashed and pale."""

    def paint(axes: Any) -> None:
        for source in sources:
            style = results.style_of[source.name]
            _draw_changes(axes, source, style)
            training, validation = (_Course(source, f"{part}_{key}") for part in ("train", "val"))
            alone = len(sources) == 1
            axes.plot(*training.mean, "--", color=style.colour, alpha=0.6, label="training" if alone else None)
            line = {"color": style.colour, "marker": style.marker, "markevery": training.every}
            axes.plot(*validation.mean, "-", **line, label="validation" if alone else results.label_of[source.name])
            if len(source.runs) > 1:
                axes.fill_between(*validation.band, color=style.colour, alpha=0.15, linewidth=0)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        whole_numbers(axes.xaxis)
        if "%" in label:
            percent_axis(axes.yaxis)

    lines = " Solid: validation images; dashed: training images."
    several = any(len(source.runs) > 1 for source in sources)
    band = " The line is the mean over the seeds that came so far, the band goes from the lowest to the highest."
    names = ", ".join(source.name for source in sources)
    return draw(paint, description=f"{label} by epoch of {names}", caption=caption + lines + band * several)


def _rates(results: Results, sources: Sequence[Source]) -> Plot:
    """Runs with one schedule lie on each other: their lines are broken differently."""

    def paint(axes: Any) -> None:
        for source in sources:
            style = results.style_of[source.name]
            rates = _Course(source, "lr")
            axes.plot(*rates.mean, label=results.label_of[source.name], markevery=rates.every, **style.options)
        axes.set_xlabel("epoch")
        axes.set_ylabel("learning rate")
        axes.set_ylim(bottom=0)
        whole_numbers(axes.xaxis)

    names = ", ".join(source.name for source in sources)
    description = f"learning rate by epoch of {names}"
    return draw(
        paint, description=description, caption="Learning rate at the end of each epoch.", legend=len(sources) > 1
    )


class _Course:
    """A number by epoch: `mean` (epochs, values) and `band` (epochs, lowest, highest) over the runs of a source."""

    def __init__(self, source: Source, key: str) -> None:
        values: dict[int, list[float]] = {}
        for run in source.runs.values():
            for record in run.metrics:
                if record.get(key) is not None:
                    values.setdefault(int(record["epoch"]), []).append(float(record[key]))
        epochs = sorted(values)
        self.every = max(1, len(epochs) // 8)
        self.mean = epochs, [statistics.fmean(values[epoch]) for epoch in epochs]
        self.band = epochs, [min(values[epoch]) for epoch in epochs], [max(values[epoch]) for epoch in epochs]


def _draw_changes(axes: Any, source: Source, style: Style) -> None:
    for epoch, what in _changes(source):
        axes.axvline(epoch + 0.5, color=style.colour, linestyle=":", linewidth=1.2)
        place = {"xycoords": ("data", "axes fraction"), "xytext": (2, -9), "textcoords": "offset points"}
        axes.annotate(what, (epoch + 0.5, 1.0), fontsize=8, color=style.colour, **place)


def _changes(source: Source) -> list[tuple[int, str]]:
    """The last epoch before each change of T or of the loss, and what comes then."""
    found = []
    for before, after in pairwise(source.run.metrics if source.run else ()):
        changes = [f"T={after['T']}"] if before.get("T") != after.get("T") and "T" in after else []
        if before.get("loss") != after.get("loss") and after.get("loss"):
            changes.append(str(after["loss"]).upper())
        if not changes and before.get("stage") != after.get("stage"):
            changes.append(f"stage {after.get('stage')}")
        if changes:
            found.append((int(before["epoch"]), " ".join(changes)))
    return found


def _losses(run: Run) -> str:
    return " then ".join(dict.fromkeys(str(r.get("loss", "")).upper() for r in run.metrics)) or NONE


def _kept_epochs(sources: Sequence[Source]) -> Table:
    runs = {name: run for source in sources for name, run in source.runs.items() if run.metrics}
    caption = (
        "The epoch whose weights were kept, which is the one with the highest validation accuracy (of the last stage; "
        "the last epoch where there are no validation images), and the time of all epochs."
    )
    if gone := [name for name, run in runs.items() if not run.checkpoint]:
        caption += (
            f" Of {', '.join(gone)}, whose checkpoint is not here, it is the one that training keeps by these numbers."
        )
    headers = ("run", "epochs", "kept epoch", "validation accuracy", "validation loss", "training accuracy", "time")
    return Table(caption, headers, tuple(_kept(name, run) for name, run in runs.items()))


def _kept(name: str, run: Run) -> tuple[str, ...]:
    best = run.best or {}
    seconds = sum(float(record.get("seconds") or 0.0) for record in run.metrics)
    return (
        name,
        f"{len(run.metrics)} of {run.training.get('epochs', '?')}",
        str(best.get("epoch", NONE)),
        percent(best.get("val_accuracy")),
        three_digits(best.get("val_loss")),
        percent(best.get("train_accuracy")),
        _duration(seconds) if seconds else NONE,
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _lacks(entry: Mapping[str, Any]) -> str:
    if not entry.get("interrupted"):
        return ""
    return f", {'unfinished' if entry.get('begun', True) else 'not begun'}, not in the mean"


def _seeds_table(source: Source) -> Table:
    runs = source.summary.get("runs") or []
    rows = [
        (
            f"{r.get('seed')}{_lacks(r)}",
            str(r.get("best_epoch") or NONE),
            percent(r.get("val_accuracy")),
        )
        for r in runs
    ]
    mean, std = source.summary.get("mean_val_accuracy"), source.summary.get("std_val_accuracy")
    caption = f"{source.name}: best validation accuracy of each seed."
    if mean is not None:
        rows.append(("mean ± standard deviation", "", percent(mean, std)))
        caption += f" Mean and deviation are of {source.finished_seeds}, the deviation over n - 1."
    return Table(caption, ("seed", "kept epoch", "validation accuracy"), tuple(rows), marked=frozenset({len(runs)}))
