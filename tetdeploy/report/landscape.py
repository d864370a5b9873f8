"""A measured loss landscape as people read it: contours for a paper (Figure 2), a table for the terminal."""

from __future__ import annotations

import math
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text

from tetdeploy.report.drawing import any_letters, drawable, save_plot, thin_out
from tetdeploy.report.result_table import ResultTable
from tetdeploy.system.extras import import_extra

if TYPE_CHECKING:
    from tetdeploy.train.landscape import Landscape

LOSSES = {"sdt_loss": "L_SDT", "tet_loss": "L_TET"}
_COLOURS = "cividis"  # dark to bright in even steps, and made to look the same to the colour-blind


def summarise(landscape: Landscape, radius: float) -> list[dict[str, Any]]:
    """What a landscape comes to, a row a checkpoint, JSON-able.

    Returns:
        Of each checkpoint its name, accuracy, and of both losses the value at the centre and the mean and the largest
        increase over the grid points at most `radius` away: "sdt_loss", "sdt_mean_increase", "sdt_max_increase" and
        the same with "tet". A value that is not finite is None.

    Raises:
        ValueError: the radius is smaller than a step of the grid.
    """
    rows = []
    for k, name in enumerate(landscape.names):
        row: dict[str, Any] = {"name": name, "accuracy": float(landscape.centre("accuracy")[k])}
        for loss in LOSSES:
            around = landscape.increases(loss, radius)[k]
            short = loss.removesuffix("_loss")
            row[loss] = _finite(landscape.centre(loss)[k])
            row[f"{short}_mean_increase"] = _finite(around.mean())
            row[f"{short}_max_increase"] = _finite(around.max())
        rows.append(row)
    return rows


def landscape_table(landscape: Landscape, radius: float) -> Table:
    """`summarise` as a table."""
    rises = (f"mean rise\nr <= {radius:g}", "largest\nrise")
    table = ResultTable("checkpoint", numbers=("accuracy", "L_SDT", *rises, "L_TET", *rises))
    for row in summarise(landscape, radius):
        numbers = [
            "-" if (value := row[key]) is None else f"{value:.4f}"
            for short in ("sdt", "tet")
            for key in (f"{short}_loss", f"{short}_mean_increase", f"{short}_max_increase")
        ]
        table.add_row(Text(row["name"]), f"{row['accuracy']:.2%}", *numbers)
    return table


def plot_landscape(landscape: Landscape, path: Path | str, *, radius: float, title: str = "") -> None:
    """Contours of both losses, a row of panels a checkpoint, all with the same levels; the checkpoint is marked.

    Args:
        landscape: complete.
        path: PNG, or what the file's ending says.
        radius: drawn as a dashed circle, as a caption says.
        title: above all panels.

    Raises:
        ValueError: no loss is finite.
        MissingExtraError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    import_extra("matplotlib", "report")
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle

    runs = len(landscape.names)
    figure = Figure(figsize=(8.4, 1.1 + 3.15 * runs), layout="compressed")
    axes = figure.subplots(runs, len(LOSSES), sharex=True, sharey=True, squeeze=False)
    levels, norm = _levels(landscape)
    letters = (first + second for first in ("", *ascii_uppercase) for second in ascii_uppercase)
    for k, name in enumerate(landscape.names):
        for column, (loss, label) in enumerate(LOSSES.items()):
            panel = axes[k, column]
            shades = _panel(panel, landscape, getattr(landscape, loss)[k], levels, norm)
            circle = Circle((0, 0), radius, fill=False, linestyle="--", edgecolor="white", linewidth=0.8)
            panel.add_patch(circle)
            shown = name if len(name) <= 26 else f"…{name[-25:]}"  # what tells runs apart is at the end of their paths
            heading = f"{next(letters)}   {label}   {shown}"
            panel.set_title(drawable(heading), fontsize=10, loc="left", parse_math=False)
            if k == runs - 1:
                panel.set_xlabel("α, first direction")
            if column == 0:
                panel.set_ylabel("β, second direction")
    bar = figure.colorbar(shades, ax=axes, ticks=levels, format="%.3g", label="loss (the same colours in all panels)")
    bar.minorticks_off()
    figure.suptitle(drawable(title), fontsize=10, parse_math=False)
    caption = f"dashed circle: r = {radius:g}, inside which the mean and the largest rise of each loss are taken"
    figure.supxlabel(caption, fontsize=9)
    with any_letters():
        figure.draw_without_rendering()  # so that the labels have their places
    for panel in axes.flat:
        thin_out(panel, inside=True)  # some lines are named; the colour bar has all
    save_plot(figure, Path(path))


def _panel(panel: Any, landscape: Landscape, loss: NDArray[np.float64], levels: Any, norm: Any) -> Any:
    """One loss round one checkpoint; returns what a colour bar is made from."""
    from matplotlib.patheffects import withStroke

    values = np.ma.masked_invalid(loss.T)  # alpha to the right, beta up
    shades = panel.pcolormesh(landscape.alphas, landscape.betas, values, norm=norm, cmap=_COLOURS, shading="gouraud")
    crossed = [level for level in levels if values.min() < level < values.max()]
    if crossed:
        lines = panel.contour(landscape.alphas, landscape.betas, values, levels=crossed, colors="white", linewidths=0.8)
        lines.set_path_effects([withStroke(linewidth=1.6, foreground="0.25")])  # white alone is lost on bright colours
        labels = panel.clabel(lines, fmt="%.3g", fontsize=7, colors="black", inline=False)  # no gap where a label goes
        for text in labels:
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.8})
    panel.plot(0, 0, "+", color="white", markersize=9, markeredgewidth=1.6)
    panel.set_aspect("equal")
    panel.locator_params(nbins=5)
    return shades


def _levels(landscape: Landscape) -> tuple[list[float], Any]:
    """Levels and colours for all panels: 1, 2, 5, 10, ... where the loss spans decades, even steps where not."""
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import MaxNLocator

    values = np.concatenate([getattr(landscape, loss).ravel() for loss in LOSSES])
    values = values[np.isfinite(values)]
    if not values.size:
        raise ValueError("no loss is finite: there is nothing to plot; take a smaller --extent, or --precision fp32")
    low, high = float(values.min()), float(values.max())
    if low <= 0 or high < 10 * low:
        levels = [float(level) for level in MaxNLocator(10).tick_values(low, high)]
        return [level for level in levels if low <= level <= high], Normalize(low, high)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high > 100 * low else (1, 1.5, 2, 3, 4, 5, 7)
    levels = [step * 10.0**decade for decade in decades for step in steps]
    return [level for level in levels if low <= level <= high], LogNorm(low, high, clip=True)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
