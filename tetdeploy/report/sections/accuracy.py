"""Accuracy against time steps and against energy: the two panels of the paper's Figure 4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tetdeploy.picojoules import CONSTANTS
from tetdeploy.report.document import Note, Plot, Row, Section
from tetdeploy.report.drawing import (
    draw,
    energy_axis,
    energy_unit,
    error_bars,
    mark,
    percent_axis,
    whole_numbers,
)
from tetdeploy.report.numbers import energy, percent
from tetdeploy.report.results import Measurement, Results, means_caption

Twin = tuple[str, float, float]  # a trained ANN: name, energy in pJ an image, validation accuracy


def accuracy(results: Results) -> Section | None:
    """Both panels of Figure 4, and what the energies are."""
    plots = tuple(plot for plot in (_by_steps(results), _by_energy(results)) if plot is not None)
    return Section("Accuracy by time steps and energy", (Row(plots), Note(_bills(results)))) if plots else None


def _by_steps(results: Results) -> Plot | None:
    """Figure 4A."""
    measured = [m for m in results.series if m.points("T", "accuracy")]
    if not measured:
        return None

    def paint(axes: Any) -> None:
        for m in measured:
            style = results.style_of[m.name]
            points = m.points("T", "accuracy")
            axes.plot([T for T, *_ in points], [y for *_, y in points], label=results.label_of[m.name], **style.options)
            error_bars(axes, [(T, y) for T, _, y in points], m.deviations("T", "accuracy"), style.colour)
            for T, _, y in points:
                if m.trained_T == T:
                    axes.plot(T, y, "o", color=style.colour, markersize=12, fillstyle="none", zorder=3)
        axes.set_xlabel("time steps T")
        axes.set_ylabel("accuracy (%)")
        whole_numbers(axes.xaxis)
        percent_axis(axes.yaxis, results.fewest_images)

    ends = [f"{m.name} {_ends(m)}" for m in measured]
    return draw(paint, description=f"Accuracy against time steps: {'; '.join(ends)}", caption=_steps_caption(measured))


def _by_energy(results: Results) -> Plot | None:
    """Figure 4B, with the ANN twin."""
    measured = [m for m in results.series if m.points("energy_pj", "accuracy")]
    if not measured:
        return None
    twins: dict[float, list[str]] = {}  # by energy, of which models
    for m in measured:
        if m.ann_pj:
            twins.setdefault(m.ann_pj, []).append(m.name)
    trained_twins = _trained_twins(results)
    energies = [energy_pj for m in measured for _, energy_pj, _ in m.points("energy_pj", "accuracy")]
    energies += [*twins, *(energy_pj for _, energy_pj, _ in trained_twins)]
    unit, size = energy_unit(max(energies))

    def paint(axes: Any) -> None:
        for energy_pj in twins:
            _draw_twin(axes, energy_pj / size)
        for m in measured:
            _draw_model(axes, m, results, size)
        for name, energy_pj, validation in trained_twins:
            star = {"color": results.style_of[name].colour, "markersize": 11}
            axes.plot(energy_pj / size, validation, "*", label=f"{results.label_of[name]} (ANN, validation)", **star)
        energy_axis(axes, energies, unit)
        axes.set_ylabel("accuracy (%)")
        percent_axis(axes.yaxis, results.fewest_images)

    points = [
        f"{m.name} at T={m.T}: {percent(m.headline.get('accuracy'))} for {energy(m.headline.get('energy_pj'))}"
        for m in measured
    ]
    caption = _energy_caption(twins, has_trained_twin=bool(trained_twins)) + means_caption(measured)
    return draw(paint, description=f"Accuracy against energy per image: {'; '.join(points)}", caption=caption)


def _draw_twin(axes: Any, energy: float) -> None:
    axes.axvline(energy, color="0.35", linestyle=":", linewidth=1.4)
    upright = {"xycoords": ("data", "axes fraction"), "rotation": 90, "ha": "right"}
    axes.annotate("ANN twin", (energy, 0.02), color="0.35", fontsize=8, **upright)


def _draw_model(axes: Any, m: Measurement, results: Results, size: float) -> None:
    """A line with a point for each T; the first, the last and the trained one are named."""
    style = results.style_of[m.name]
    points = [(T, energy_pj / size, y) for T, energy_pj, y in m.points("energy_pj", "accuracy")]
    axes.plot([x for _, x, _ in points], [y for *_, y in points], label=results.label_of[m.name], **style.options)
    deviations = [(x / size, y) for x, y in m.deviations("energy_pj", "accuracy")]
    error_bars(axes, [(x, y) for _, x, y in points], deviations, style.colour)
    for T, x, y in points:
        if T in (m.T, points[0][0], points[-1][0]):
            mark(axes, f"T={T}", x, y)


def _trained_twins(results: Results) -> list[Twin]:
    """ANNs are not exported, so validation accuracy is all there is."""
    found = []
    for source in results.unmeasured:
        energy_pj = results.twin_energy(source.run) if source.run else None
        best = (source.run.best if source.run else None) or {}
        validation = source.summary.get("mean_val_accuracy")
        validation = best.get("val_accuracy") if validation is None else validation
        if energy_pj is not None and validation is not None:
            found.append((source.name, energy_pj, float(validation)))
    return found


def _ends(m: Measurement) -> str:
    points = m.points("T", "accuracy")
    (first, _, lowest), (last, _, highest) = points[0], points[-1]
    return f"from {percent(lowest)} at T={first} to {percent(highest)} at T={last}"


def _steps_caption(measured: Sequence[Measurement]) -> str:
    trained = {f"{m.name}: T={m.trained_T}": m.trained_T for m in measured if m.trained_T == m.T}
    same = len(set(trained.values())) == 1
    listed = f"T={next(iter(trained.values()))}" if same else ", ".join(trained)
    ring = f" A ring marks the T of the training ({listed})." if trained else ""
    return f"Accuracy after T time steps.{ring}{means_caption(measured)}"


def _energy_caption(twins: Mapping[float, Sequence[str]], *, has_trained_twin: bool) -> str:
    caption = "Accuracy against energy per image; each point is one T."
    if len(twins) == 1:
        caption += " The dotted line is the energy of the ANN twin: the same layers, dense, once."
    elif twins:
        listed = "; ".join(f"{energy(energy_pj)} of {', '.join(names)}" for energy_pj, names in sorted(twins.items()))
        caption += f" Dotted lines are the energies of ANN twins, the same layers, dense, once: {listed}."
    if has_trained_twin:
        caption += (
            " The star is a trained ANN: it is not exported, so its accuracy is that on the validation images of its "
            "training (of several seeds the mean), not on those of the others, and its energy is that of float32."
        )
    return caption


def _bills(results: Results) -> str:
    """What an energy is; models of another precision have other constants."""
    constants: dict[str, list[str]] = {}
    for m in results.series:
        constants.setdefault(_constants(m.content.get("constants") or {}), []).append(m.name)
    several = len(constants) > 1
    listed = "; ".join(f"{', '.join(n)}: {text}" if several else text for text, n in constants.items())
    return (
        f"Energy is estimated from counted operations, not measured. {listed}. As in the paper the first layer "
        "multiplies at every step and all others only add; memory traffic and the neurons' own arithmetic are not in "
        "it."
    )


def _constants(given: dict[str, Any]) -> str:
    if not given:
        return "No constants are given"
    costs = []
    for name, what, abbreviation in (("ac_pj", "an addition", "AC"), ("mac_pj", "a multiply-accumulate", "MAC")):
        float32 = f"; {getattr(CONSTANTS['fp32'], name):g} pJ in layers of float32"
        costs.append(f"{given[name]:g} pJ {what} ({abbreviation}{float32 if given.get('by_layer') == name else ''})")
    return f"{', '.join(costs)}: {given['source']}"
