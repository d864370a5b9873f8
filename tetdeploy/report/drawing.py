"""Plots as inline SVG: one look for all, sharp at any size, the same bytes for the same numbers."""

from __future__ import annotations

import html
import io
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tetdeploy.report.document import Plot
from tetdeploy.storage.files import atomic_write
from tetdeploy.system.extras import import_extra

# Okabe and Ito's palette, which the colour-blind can tell apart; without its yellow, which is lost on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LINES = ("-", "--", "-.", (0, (1, 1.2)))
_LONGEST_NAME = 34
_LOG_FROM = 20.0  # where the dearest point costs so many times the cheapest, energy is drawn on a logarithmic axis

# A plot is drawn as wide as a phone is, so that its text can be read there; on a large screen two stand side by side.
WIDTH, HEIGHT = 4.8, 3.1  # inches

_RC = {
    "svg.fonttype": "none",  # text stays text: to be searched, copied, read out, and shown in any script
    "text.parse_math": False,  # a $ in a name is a $
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.axisbelow": True,
    "axes.edgecolor": "0.35",
    "lines.markersize": 5,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "legend.handlelength": 2.6,
}


@dataclass(frozen=True)
class Style:
    """Colour, marker and line of a series: any one of them tells it from the others."""

    colour: str
    marker: str
    line: Any

    @staticmethod
    def of(number: int) -> Style:
        colours = len(_COLOURS)
        marker = number + number // colours  # in plots without lines the eighth would be drawn as the first is
        return Style(_COLOURS[number % colours], _MARKERS[marker % len(_MARKERS)], _LINES[number % len(_LINES)])

    @property
    def options(self) -> dict[str, Any]:
        """For `Axes.plot`."""
        return {"color": self.colour, "marker": self.marker, "linestyle": self.line}


def draw(
    paint: Callable[[Any], None],
    *,
    description: str,
    caption: str,
    height: float = HEIGHT,
    legend: bool = True,
) -> Plot:
    """A plot of one pair of axes.

    Args:
        paint: draws on the axes; what has a label comes into the legend above them.
        description: what one sees, for screen readers.
        height: of the plot in inches, without the legend.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    matplotlib = import_extra("matplotlib", "report")
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_RC | {"svg.hashsalt": drawable(caption)}), any_letters():  # browsers have fonts for all
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        paint(axes)
        handles, labels = axes.get_legend_handles_labels()
        if legend and handles:
            columns = 1 if max(map(len, labels)) > 16 else min(2, len(labels))
            figure.set_figheight(height + 0.22 * -(-len(labels) // columns))
            figure.legend(handles, labels, loc="outside upper left", ncols=columns)
        if axes.texts:
            figure.draw_without_rendering()  # lays them out
        thin_out(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return Plot(_inline(file.getvalue(), description), description, caption)


def thin_out(axes: Any, *, inside: bool = False) -> None:
    """Remove each text, laid out, that would lie on one before it: of many those are left that can be read.

    Args:
        inside: remove also what the axes' frame cuts off.
    """
    boxes = list[Any]()
    for text in [*axes.texts]:
        box = (text.get_bbox_patch() or text).get_window_extent()
        cut_off = inside and not all(axes.bbox.contains(*corner) for corner in (box.min, box.max))
        if cut_off or any(map(box.overlaps, boxes)):
            text.remove()
        else:
            boxes.append(box)


@contextmanager
def any_letters() -> Iterator[None]:
    """Within it, letters that matplotlib's font lacks are boxes without a warning."""
    messages = "Glyph .* missing from font|Matplotlib currently does not support"  # the second before 3.11
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=messages)
        yield


def save_plot(figure: Any, path: Path) -> None:
    """Write a figure as PNG, or what the file's ending says, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    with atomic_write(path) as temporary, any_letters():
        figure.savefig(temporary, dpi=150, format=path.suffix.removeprefix(".") or "png")


def error_bars(
    axes: Any, places: Sequence[tuple[float, float]], deviations: Sequence[tuple[float, float]], colour: str
) -> None:
    """Of points (x, y) the standard deviations in both, where there are any."""
    if any(map(any, deviations)):
        x, y = zip(*places, strict=True)
        x_std, y_std = zip(*deviations, strict=True)
        axes.errorbar(x, y, y_std, x_std, fmt="none", ecolor=colour, elinewidth=1, capsize=2)


def percent_axis(axis: Any, num_images: int | None = None) -> None:
    """Fractions as per cent, where all is drawn; the unit stands in the label of the axis. Of accuracies `num_images`
    is on how many each was measured, see `wide_enough`."""
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    end_at(axis.axes, 1.0)
    if num_images is not None:
        wide_enough(axis.axes, num_images, 1.0)


def wide_enough(axes: Any, num_images: int, most: float) -> None:
    """The y axis, of accuracies up to `most`, spans at least ten images, or two points where that is less: one image
    more or less is no cliff."""
    low, high = axes.get_ylim()
    span = most * min(10 / num_images, 0.02)
    if high - low < span:
        low = min(max((low + high - span) / 2, 0), most - span)
        axes.set_ylim(low, min(low + span, most))


def end_at(axes: Any, most: float) -> None:
    """The y axis goes no further than to `most`, where all is drawn; points there are drawn whole."""
    axes.set_ylim(top=min(most, axes.get_ylim()[1]))
    for line in axes.lines:
        line.set_clip_on(False)


def whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def energy_axis(axes: Any, energies_pj: Sequence[float], unit: str) -> None:
    """The x axis from 0 on; logarithmic, with ticks as plain numbers, where the energies lie far apart."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xlabel(f"energy ({unit} per image)")
    if min(energies_pj) <= 0 or max(energies_pj) <= _LOG_FROM * min(energies_pj):
        axes.set_xlim(0, 1.1 * axes.dataLim.x1)
        return
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def mark(axes: Any, text: str, x: float, y: float) -> None:
    """A small text below and to the right of a point, with room for it at the edges of the plot."""
    axes.margins(0.1)
    axes.annotate(text, (x, y), (4, -11), textcoords="offset points", fontsize=8, color="0.25")


def short(name: str, longest: int = _LONGEST_NAME) -> str:
    """A name that fits a plot; what tells names apart is mostly at their ends."""
    name = drawable(name)
    return name if len(name) <= longest else f"{name[: longest // 3]}…{name[-(longest - longest // 3 - 1) :]}"


def told_apart(names: Sequence[str]) -> dict[str, str]:
    """Each name as `short` has it; of names that would look alike, how they begin and the words that differ."""
    labels = {name: short(name) for name in names}
    for label in [label for label, count in Counter(labels.values()).items() if count > 1]:
        alike = [name for name in labels if labels[name] == label]
        front = _shared_words(alike)
        back = _shared_words([name[front:][::-1] for name in alike])
        for name in alike:
            labels[name] = short(f"{name[: min(front, _LONGEST_NAME // 3)]}…{name[front : len(name) - back]}")
    return labels


def _shared_words(names: Sequence[str]) -> int:
    """How many characters all begin with, in whole words."""
    shared = os.path.commonprefix(names)  # noqa: RUF071  # not of paths
    return len(re.sub(r"[^-_ /]+$", "", shared))


def drawable(text: str) -> str:
    """Text that may name a file: what is no UTF-8 there, which matplotlib refuses, becomes `?`."""
    return text.encode("utf-8", "replace").decode("utf-8")


def energy_unit(largest_pj: float) -> tuple[str, float]:
    """The unit for an axis, and how many picojoules it has."""
    units = (("mJ", 1e9), ("µJ", 1e6), ("nJ", 1e3))
    return next(((unit, size) for unit, size in units if largest_pj >= size), ("pJ", 1.0))


def _inline(svg: str, description: str) -> str:
    """The `<svg>` element alone: as wide as its place, with a text for screen readers."""
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r"<!--.*?-->", "", element, flags=re.DOTALL)
    opening, rest = element.split(">", 1)
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)
    return f'{opening} role="img" aria-label="{html.escape(description)}">{rest.strip()}'
