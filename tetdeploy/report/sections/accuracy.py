"""Accuracy against time steps and against energy: the two panels of the paper's Figure 4, and the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tetdeploy.report.document import Note, Plot, Row, Section, Table
from tetdeploy.report.drawing import Style, draw, energy_unit, log_axis, percent_axis, short, whole_numbers
from tetdeploy.report.numbers import joules, percent, times
from tetdeploy.report.results import Results

_LOG_FROM = 20.0  # where the dearest point costs so many times the cheapest, energy is drawn on a logarithmic axis


@dataclass(frozen=True)
class Point:
    """A model at one T; energy per image."""

    name: str
    T: int
    energy_pj: float
    accuracy: float
    latency_ms: float | None = None


def accuracy(results: Results) -> Section | None:
    """Both panels of Figure 4, and what the energies are."""
    plots = [plot for plot in (accuracy_by_T(results), accuracy_by_energy(results)) if plot is not None]
    return (
        Section("Accuracy by time steps and energy", (Row(tuple(plots)), Note(bills_note(results)))) if plots else None
    )


def accuracy_by_T(results: Results) -> Plot | None:
    """Figure 4A."""
    measured = [m for m in results.measurements if m.points("T", "accuracy")]
    if not measured:
        return None

    def paint(axes: Any) -> None:
        for m in measured:
            style = Style.of(results.style_of[m.name])
            points = m.points("T", "accuracy")
            axes.plot([T for T, *_ in points], [a for *_, a in points], label=short(m.name), **style.options)
            for T, _, accuracy in points:
                if m.trained_T == T:
                    axes.plot(T, accuracy, "o", color=style.colour, markersize=12, fillstyle="none", zorder=3)
        axes.set_xlabel("time steps T")
        axes.set_ylabel("accuracy (%)")
        whole_numbers(axes.xaxis)
        percent_axis(axes.yaxis)

    trained = {f"{m.name}: T={m.trained_T}": m.trained_T for m in measured if m.trained_T}
    listed = f"T={next(iter(trained.values()))}" if len(set(trained.values())) == 1 else ", ".join(trained)
    rings = f" A ring marks the T of the training ({listed})." if trained else ""
    ends = [
        f"{m.name} goes from {percent(m.rows[0].get('accuracy'))} at T={m.rows[0]['T']} to "
        f"{percent(m.rows[-1].get('accuracy'))} at T={m.rows[-1]['T']}"
        for m in measured
    ]
    return draw(
        paint,
        description=f"Accuracy against time steps. {'; '.join(ends)}.",
        caption=f"Accuracy after T time steps.{rings}",
    )


def accuracy_by_energy(results: Results) -> Plot | None:
    """Figure 4B, with the ANN twin."""
    measured = [m for m in results.measurements if m.points("energy_pj", "accuracy")]
    if not measured:
        return None
    twins = sorted({m.ann_pj for m in measured if m.ann_pj})
    trained_twins = ann_runs(results)
    energies = [point.energy_pj for point in points_of(results)] + twins
    unit, size = energy_unit(max(energies))

    def paint(axes: Any) -> None:
        for energy_pj in twins:
            axes.axvline(energy_pj / size, color="0.35", linestyle=":", linewidth=1.4)
            axes.annotate(
                "ANN twin ",
                (energy_pj / size, 0.02),
                xycoords=("data", "axes fraction"),
                rotation=90,
                ha="right",
                color="0.35",
                fontsize=8,
            )
        for m in measured:
            style = Style.of(results.style_of[m.name])
            points = m.points("energy_pj", "accuracy")
            energy, accuracy = [e / size for _, e, _ in points], [a for *_, a in points]
            axes.plot(energy, accuracy, label=short(m.name), **style.options)
            for T, x, y in zip((T for T, *_ in points), energy, accuracy, strict=True):
                if T == m.T or T in (points[0][0], points[-1][0]):
                    axes.annotate(f"T={T}", (x, y), (3, -10), textcoords="offset points", fontsize=7.5, color="0.25")
        for name, energy_pj, validation in trained_twins:
            style = Style.of(results.style_of[name])
            label = f"{short(name)} (ANN, validation)"
            axes.plot(energy_pj / size, validation, "*", color=style.colour, markersize=11, label=label)
        if min(energies) > 0 and max(energies) > _LOG_FROM * min(energies):
            log_axis(axes)
        else:
            axes.set_xlim(left=0)
        axes.set_xlabel(f"energy ({unit} per image)")
        axes.set_ylabel("accuracy (%)")
        percent_axis(axes.yaxis)

    return draw(
        paint,
        description="Accuracy against energy per image, a line for each model and a point for each T. "
        + "; ".join(
            f"{m.name} at T={m.T}: {percent(m.headline.get('accuracy'))} for {joules(m.headline.get('energy_pj'))}"
            for m in measured
        ),
        caption=_energy_caption(bool(twins), bool(trained_twins)),
    )


def pareto_front(results: Results) -> Section | None:
    """The points of all models that no other point beats in both energy and accuracy."""
    points = points_of(results)
    if len(points) < 2:
        return None
    front = pareto(points)
    unit, size = energy_unit(max(point.energy_pj for point in points))

    def paint(axes: Any) -> None:
        energy, accuracy = [p.energy_pj / size for p in front], [p.accuracy for p in front]
        axes.step(energy, accuracy, where="post", color="0.6", linewidth=1.2, label="Pareto front")
        for m in results.measurements:
            style = Style.of(results.style_of[m.name])
            own = [p for p in points if p.name == m.name]
            if not own:
                continue
            x, y = [p.energy_pj / size for p in own], [p.accuracy for p in own]
            axes.plot(x, y, style.marker, color=style.colour, alpha=0.35, markeredgewidth=0)
            best = [p for p in own if p in front]
            x, y = [p.energy_pj / size for p in best], [p.accuracy for p in best]
            axes.plot(x, y, style.marker, color=style.colour, markersize=7, label=short(m.name))
            for p in best:
                place = (p.energy_pj / size, p.accuracy)
                axes.annotate(f"T={p.T}", place, (4, -11), textcoords="offset points", fontsize=8, color="0.25")
        if min(p.energy_pj for p in points) > 0 and max(p.energy_pj for p in points) > _LOG_FROM * points[0].energy_pj:
            log_axis(axes)
        axes.set_xlabel(f"energy ({unit} per image)")
        axes.set_ylabel("accuracy (%)")
        percent_axis(axes.yaxis)

    plot = draw(
        paint,
        description="Pareto front of accuracy and energy: " + "; ".join(f"{p.name} at T={p.T}" for p in front),
        caption="The Pareto front: no other model or T is as accurate for less energy. Points behind it are pale.",
    )
    rows = [(p.name, str(p.T), percent(p.accuracy), joules(p.energy_pj), _dearer(p, front)) for p in front]
    headers = ("model", "T", "accuracy", "energy", "/ cheapest")
    table = Table("The points of the front; energy per image.", headers, tuple(rows))
    return Section("Pareto front", (Row((plot, table)),))


def points_of(results: Results) -> list[Point]:
    """Every model at every T where accuracy and energy are known."""
    return [
        Point(m.name, T, energy_pj, accuracy)
        for m in results.measurements
        for T, energy_pj, accuracy in m.points("energy_pj", "accuracy")
    ]


def pareto(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats: as accurate or more for as much energy or less, and better in one of them.

    Returns:
        By energy, and so by accuracy. Of equal points the first is kept.
    """
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.energy_pj, -p.accuracy)):
        if not front or point.accuracy > front[-1].accuracy:
            front.append(point)
    return front


def ann_runs(results: Results) -> list[tuple[str, float, float]]:
    """Trained ANN twins: name, energy in pJ an image and validation accuracy. They are not exported, so that is all."""
    found = []
    for source in results.unmeasured:
        energy = results.twin_energy(source.run) if source.run else None
        best = source.run.best if source.run else None
        if energy is not None and best is not None and best.get("val_accuracy") is not None:
            found.append((source.name, energy, float(best["val_accuracy"])))
    return found


def bills_note(results: Results) -> str:
    """What an energy is."""
    constants: dict[str, Any] = next((c for m in results.measurements if (c := m.content.get("constants"))), {})
    add, multiply = constants.get("ac_pj", 0.9), constants.get("mac_pj", 4.6)
    source = constants.get("source", "32-bit float operations in 45 nm CMOS (Horowitz, ISSCC 2014)")
    return (
        f"Energy is estimated from counted operations, not measured: {add} pJ an addition (AC), {multiply} pJ a "
        f"multiply-accumulate (MAC); {source}. As in the paper the first layer multiplies at every step and all others "
        "only add; memory traffic and the neurons' own arithmetic are not in it."
    )


def _energy_caption(has_twin: bool, has_trained_twin: bool) -> str:
    caption = "Accuracy against energy per image; each point is one T."
    if has_twin:
        caption += " The dotted line is the energy of the ANN twin: the same layers, dense, once."
    if has_trained_twin:
        caption += (
            " The star is a trained ANN: it is not exported, so its accuracy is that on the validation images of its "
            "training, not on those of the others."
        )
    return caption


def _dearer(point: Point, front: Sequence[Point]) -> str:
    return times(point.energy_pj / front[0].energy_pj if front[0].energy_pj else None)
