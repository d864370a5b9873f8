"""The plot of one number by layer, neuron layer or class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tetdeploy.report.document import Plot
from tetdeploy.report.drawing import draw, short
from tetdeploy.report.results import Measurement, Results, means_caption

_SMALLEST, _ROW, _DOT = 1.6, 0.2, 0.1  # inches: the plot, an entry of one model, and of each of several


def plot_by_entry(
    results: Results,
    measured: Sequence[Measurement],
    part: str,
    key: str,
    *,
    label: str,
    size: float = 1.0,
    caption: str,
) -> Plot:
    """One number of each entry: bars of one model, a dot for each of several.

    Args:
        part, key: of the measurements' JSON: the list of entries, and the number in the row of each.
        label: of the axis.
        size: of its unit.
        caption: to which "at T=2." is added, and of seeds that it is their means.
    """
    values = {m.name: m.by_entry(part, key) for m in measured}
    names = list(dict.fromkeys(name for found in values.values() for name in found))
    places = {name: k for k, name in enumerate(names)}

    def paint(axes: Any) -> None:
        for k, (series, found) in enumerate(values.items()):
            style, name = results.style_of[series], results.label_of[series]
            at, shown = [places[name] for name in found], [value / size for value in found.values()]
            if len(values) == 1:
                axes.barh(at, shown, color=style.colour, height=0.7)
            else:
                beside = (k - (len(values) - 1) / 2) * 0.6 / len(values)
                axes.plot(shown, [y + beside for y in at], style.marker, color=style.colour, label=name)
        axes.set_yticks(range(len(names)), [short(name, 24) for name in names], fontsize=8)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(visible=len(values) > 1, axis="y")
        axes.set_xlim(0, 1.05 * max(v for found in values.values() for v in found.values()) / size or 1.0)
        axes.locator_params(axis="x", nbins=6)
        axes.set_xlabel(label)

    at = ", ".join(dict.fromkeys(f"T={m.T}" for m in measured))
    if all(m.trained_T == m.T for m in measured):
        at = f"the T of the training ({at})"
    highest = [f"{m.name}: most in {max(v, key=lambda n: v[n])}" for m in measured if (v := values[m.name])]
    return draw(
        paint,
        description=f"{label} by name, {len(names)} of them. {'; '.join(highest)}",
        caption=f"{caption} at {at}.{means_caption(measured, bars=False)}",
        height=max(_SMALLEST, 0.7 + max(_ROW, _DOT * len(measured)) * len(names)),
    )
