"""Which model, at which T, is the most accurate for its energy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tetdeploy.report.document import NONE, Row, Section, Table
from tetdeploy.report.drawing import draw, energy_axis, energy_unit, error_bars, mark, percent_axis
from tetdeploy.report.numbers import energy, percent, times
from tetdeploy.report.results import Results, means_caption

_ROUNDING = 1e-9  # of a mean over seeds; one image of a test set is more


@dataclass(frozen=True)
class Point:
    """A model at one T; energy per image. Of a mean over seeds with the standard deviation of both."""

    name: str
    T: int
    energy_pj: float
    accuracy: float
    deviation: tuple[float, float] | None = None


def pareto_front(results: Results) -> Section | None:
    """The points of all models that no other point beats in both energy and accuracy."""
    points = _points(results)
    if len(points) < 2:
        return None
    front = pareto(points)
    unit, size = energy_unit(max(point.energy_pj for point in points))

    def paint(axes: Any) -> None:
        line = {"where": "post", "color": "0.6", "linewidth": 1.2, "label": "Pareto front"}
        axes.step([p.energy_pj / size for p in front], [p.accuracy for p in front], **line)
        for name in dict.fromkeys(point.name for point in points):
            _draw_points(axes, [p for p in points if p.name == name], front, results, size)
        energy_axis(axes, [p.energy_pj for p in points], unit)
        axes.set_ylabel("accuracy (%)")
        percent_axis(axes.yaxis, results.fewest_images)

    plot = draw(
        paint,
        description="Pareto front of accuracy and energy: " + "; ".join(f"{p.name} at T={p.T}" for p in front),
        caption="The Pareto front: no other model or T is as accurate for less energy. Points behind it are pale."
        + means_caption(results.series),
    )
    return Section("Pareto front", (Row((plot, _table(front))),))


def pareto(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats: as accurate or more for as much energy or less, and better in one of them.

    Returns:
        By energy, and so by accuracy. Of equal points the first is kept.
    """
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.energy_pj, -p.accuracy)):
        if not front or point.accuracy > front[-1].accuracy + _ROUNDING:
            front.append(point)
    return front


def _points(results: Results) -> list[Point]:
    """Every model at every T where accuracy and energy are known."""
    return [
        Point(m.name, T, energy_pj, accuracy, deviation if len(m.seeds) > 1 else None)
        for m in results.series
        for (T, energy_pj, accuracy), deviation in zip(
            m.points("energy_pj", "accuracy"), m.deviations("energy_pj", "accuracy"), strict=True
        )
    ]


def _draw_points(axes: Any, own: Sequence[Point], front: Sequence[Point], results: Results, size: float) -> None:
    """One model's points, pale, and those on the front in full and with their T."""
    style, label = results.style_of[own[0].name], results.label_of[own[0].name]
    pale = {"color": style.colour, "alpha": 0.35, "markeredgewidth": 0}
    axes.plot([p.energy_pj / size for p in own], [p.accuracy for p in own], style.marker, **pale)
    best = [p for p in own if p in front]
    x, y = [p.energy_pj / size for p in best], [p.accuracy for p in best]
    axes.plot(x, y, style.marker, color=style.colour, markersize=7, zorder=3, label=label)
    deviations = [p.deviation or (0.0, 0.0) for p in best]
    error_bars(axes, list(zip(x, y, strict=True)), [(x_std / size, y_std) for x_std, y_std in deviations], style.colour)
    for point in best:
        mark(axes, f"T={point.T}", point.energy_pj / size, point.accuracy)


def _table(front: Sequence[Point]) -> Table:
    cheapest = front[0].energy_pj
    rows = tuple(
        (
            p.name,
            str(p.T),
            percent(p.accuracy, p.deviation and p.deviation[1]),
            energy(p.energy_pj, p.deviation and p.deviation[0]),
            times(p.energy_pj / cheapest) if cheapest else NONE,
        )
        for p in front
    )
    headers = ("model", "T", "accuracy", "energy", "/ cheapest")
    return Table("The points of the front; energy per image.", headers, rows)
