"""What a model takes at each T: operations, energy, latency."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tetdeploy.report.document import Note, Plot, Row, Section, Table
from tetdeploy.report.drawing import draw, energy_unit, error_bars, whole_numbers
from tetdeploy.report.numbers import count, energy, milliseconds, percent, rate, three_digits, times
from tetdeploy.report.results import Measurement, Results, means_caption

# by key of a row: the header, how the number and its standard deviation are written
_COLUMNS: Mapping[str, tuple[str, Callable[[float | None, float | None], str]]] = {
    "accuracy": ("accuracy", percent),
    "firing_rate": ("firing rate", rate),
    "ac_ops": ("AC ops", count),
    "mac_ops": ("MAC ops", count),
    "energy_pj": ("energy", energy),
    "energy_exact_pj": ("energy, exact", energy),
    "energy_once_pj": ("energy, first layer once", energy),
    "ann_ratio": ("ANN twin / energy", times),
    "latency_ms": ("latency", milliseconds),
    "torch_latency_ms": ("PyTorch's", milliseconds),
}


def cost(results: Results) -> Section | None:
    """Energy and latency as plots, all numbers in a table for each model, those of seeds after their means."""
    measured = results.series
    if not measured:
        return None
    plots = (
        _plot(results, "energy_pj", "Energy per image, as the paper counts it.", *_energy_axis(measured)),
        _plot(results, "latency_ms", _latency_caption(measured), "latency (ms per image)", 1.0),
    )
    row = Row(tuple(plot for plot in plots if plot is not None))
    tables = [_table(one) for m in measured for one in (m, *m.seeds)]
    return Section("Cost by time steps", (*([row] if row.items else []), *tables, *_notes(measured)))


def _plot(results: Results, key: str, caption: str, label: str, size: float) -> Plot | None:
    """A number by T, from 0 on."""
    measured = [m for m in results.series if m.points("T", key)]
    if not measured:
        return None

    def paint(axes: Any) -> None:
        highest = 0.0
        for m in measured:
            values = [value / size for *_, value in m.points("T", key)]
            style = results.style_of[m.name]
            steps = [T for T, *_ in m.points("T", key)]
            axes.plot(steps, values, label=results.label_of[m.name], **style.options)
            deviations = [(0.0, std / size) for _, std in m.deviations("T", key)]
            error_bars(axes, list(zip(steps, values, strict=True)), deviations, style.colour)
            highest = max(highest, *(value + std for value, (_, std) in zip(values, deviations, strict=True)))
        axes.set_xlabel("time steps T")
        axes.set_ylabel(label)
        axes.set_ylim(0, 1.08 * highest or 1.0)
        whole_numbers(axes.xaxis)

    numbers = "; ".join(
        f"{m.name} at T={m.T}: {three_digits(float(m.headline[key]) / size)}" for m in measured if m.headline.get(key)
    )
    return draw(
        paint,
        description=f"{label} against time steps. {numbers}",
        caption=caption + means_caption(measured),
        legend=len(measured) > 1,
    )


def _energy_axis(measured: Sequence[Measurement]) -> tuple[str, float]:
    unit, size = energy_unit(max((row.get("energy_pj") or 0.0 for m in measured for row in m.rows), default=0.0))
    return f"energy ({unit} per image)", size


def _latency_caption(measured: Sequence[Measurement]) -> str:
    ran_on = ", ".join(dict.fromkeys(one.ran_on for m in measured for one in m.seeds or (m,)))
    return f"Median time of one image at a time, on {ran_on}."


def _notes(measured: Sequence[Measurement]) -> list[Note]:
    text = (
        "Operations, energy and latency are per image; firing rate is spikes per neuron and step, over the whole "
        "network. Energy follows the paper: the first layer multiplies at every step, all others add. Exact: every "
        "layer whose input is not binary multiplies. First layer once: as the engine runs a still image, whose first "
        "layer is the same at every step. ANN twin / energy: how many times less than the same layers, dense, once."
    )
    left_out: dict[str, list[str]] = {}
    for m in measured:
        left_out.setdefault(_left_out(m), []).append(m.name)
    unrolled = [m.name for m in measured if m.content.get("layout") == "unrolled" and m.points("T", "latency_ms")]
    if unrolled:
        always = "An unrolled graph always runs all of its steps, so that its latency is the same for every T"
        text += f" {always} ({', '.join(unrolled)})."
    return [
        Note(text),
        *(Note(f"Not in the totals of {', '.join(n)}: {what}.") for what, n in left_out.items() if what),
    ]


def _table(m: Measurement) -> Table:
    rows = tuple(
        (
            f"{row['T']}{' *' if row['T'] == m.trained_T else ''}",
            *(form(row.get(key), m.std(row["T"], key)) for key, (_, form) in _COLUMNS.items()),
        )
        for row in m.rows
    )
    marked = frozenset(k for k, row in enumerate(m.rows) if row["T"] == m.trained_T)
    star = "; * is the T of the training" if marked else ""
    std = " ± standard deviation (over n - 1)" if len(m.seeds) > 1 else ""
    caption = f"{m.heading}{std}: {m.images}{star}."
    headers = ("T", *(header for header, _ in _COLUMNS.values()))
    return Table(caption, headers, rows, marked=marked).without_empty_columns()


def _left_out(m: Measurement) -> str:
    """What the totals do not hold."""
    counts, energies = (m.content.get(key) or {} for key in ("other_ops", "other_ops_pj"))
    listed = [
        f"{name.replace('_', ' ')} {count(number)}" + (f" ({energy(energies[name])})" if name in energies else "")
        for name, number in counts.items()
        if number
    ]
    uncounted = [f"the layers {', '.join(map(str, names))}"] if (names := m.content.get("uncounted")) else []
    parts = ([f"{', '.join(listed)} per image and step"] if listed else []) + uncounted
    return "; ".join(parts)
