"""What a model takes at each T: operations, energy, latency."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tetdeploy.report.document import Note, Plots, Section, Table
from tetdeploy.report.drawing import Style, draw, short, whole_numbers
from tetdeploy.report.numbers import joules, milliseconds, operations, percent, rate, times
from tetdeploy.report.results import Measurement, Results

_COLUMNS: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("accuracy", "accuracy", percent),
    ("firing rate", "firing_rate", rate),
    ("AC ops", "ac_ops", operations),
    ("MAC ops", "mac_ops", operations),
    ("energy", "energy_pj", joules),
    ("energy, exact", "energy_exact_pj", joules),
    ("energy, first layer once", "energy_once_pj", joules),
    ("ANN twin / energy", "ann_ratio", times),
    ("latency", "latency_ms", milliseconds),
)


def numbers_by_T(results: Results) -> Section | None:
    """A table for each model."""
    if not results.measurements:
        return None
    other = [_other_operations(m) for m in results.measurements]
    notes = [
        "Operations, energy and latency are per image; firing rate is spikes a neuron and step, over the whole "
        "network. Energy follows the paper: the first layer multiplies at every step, all others add. Exact: every "
        "layer whose input is not binary multiplies. First layer once: as the engine runs a still image, whose first "
        "layer is the same at every step.",
        *dict.fromkeys(note for note in other if note),
    ]
    return Section("Numbers by time steps", (*(_table(m) for m in results.measurements), *map(Note, notes)))


def latency_by_T(results: Results) -> Section | None:
    """Of one image on the machine that measured."""
    measured = [m for m in results.measurements if m.points("T", "latency_ms")]
    if not measured:
        return None

    def paint(axes: Any) -> None:
        for m in measured:
            points = m.points("T", "latency_ms")
            style = Style.of(results.style_of[m.name])
            axes.plot([T for T, *_ in points], [ms for *_, ms in points], label=short(m.name), **style.options)
        axes.set_xlabel("time steps T")
        axes.set_ylabel("latency (ms per image)")
        axes.set_ylim(bottom=0)
        whole_numbers(axes.xaxis)

    devices = ", ".join(dict.fromkeys(str(m.content.get("device", "cpu")) for m in measured))
    unrolled = [m.name for m in measured if m.content.get("layout") == "unrolled"]
    plot = draw(
        paint,
        description="Latency of one image against time steps. "
        + "; ".join(f"{m.name} at T={m.T}: {milliseconds(m.headline.get('latency_ms'))}" for m in measured),
        caption=f"Median time of one image at a time, on {devices}.",
    )
    always = "always runs all of its steps, at the same cost for every T"
    notes = [Note(f"An unrolled graph ({', '.join(unrolled)}) {always}.")] if unrolled else []
    return Section("Latency by time steps", (Plots((plot,)), *notes))


def _table(m: Measurement) -> Table:
    columns = [column for column in _COLUMNS if any(row.get(column[1]) is not None for row in m.rows)]
    rows = tuple(
        (f"{row['T']}{' *' if row['T'] == m.trained_T else ''}", *(form(row.get(key)) for _, key, form in columns))
        for row in m.rows
    )
    marked = frozenset(k for k, row in enumerate(m.rows) if row["T"] == m.trained_T)
    star = "; * is the T of the training" if marked else ""
    caption = f"{m.name}: {m.content['num_samples']:,} images of {m.content['data']}{star}."
    return Table(caption, ("T", *(header for header, *_ in columns)), rows, marked=marked)


def _other_operations(m: Measurement) -> str:
    """What the totals leave out."""
    found = m.content.get("other_ops") or {}
    listed = [f"{key.replace('_', ' ')} {operations(v)}" for key, v in found.items() if isinstance(v, int | float)]
    return f"Not in the totals, per image and step ({m.name}): {', '.join(listed)}." if listed else ""
