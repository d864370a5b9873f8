"""Where the spikes and the energy are: firing rate by layer of neurons, energy by layer of weights."""

from __future__ import annotations

from collections.abc import Sequence

from tetdeploy.energy import input_kind
from tetdeploy.report.document import NONE, Plot, Row, Section, Table
from tetdeploy.report.drawing import energy_unit
from tetdeploy.report.entry_plot import plot_by_entry
from tetdeploy.report.numbers import count, energy, rate, text, three_digits
from tetdeploy.report.results import Measurement, Results


def layers(results: Results) -> Section | None:
    """At the headline's T as plots; firing rates at every T as a table."""
    firing = [m for m in results.series if m.by_entry("neurons", "firing_rate")]
    costing = [m for m in results.series if m.by_entry("layers", "energy_pj")]
    plots = [_firing_plot(results, firing)] if firing else []
    if costing:
        plots.append(_energy_plot(results, costing))
    tables = (*map(_neurons_table, firing), *map(_layers_table, costing))
    return Section("Firing rate and energy by layer", (Row(tuple(plots)), *tables)) if plots else None


def _firing_plot(results: Results, measured: Sequence[Measurement]) -> Plot:
    caption = "Firing rate of each layer of neurons, from the input (top) to the output,"
    label = "spikes per neuron and step"
    return plot_by_entry(results, measured, "neurons", "firing_rate", label=label, caption=caption)


def _energy_plot(results: Results, measured: Sequence[Measurement]) -> Plot:
    unit, size = energy_unit(max(e for m in measured for e in m.by_entry("layers", "energy_pj").values()))
    caption = "Energy of each convolution and linear layer, from the input (top) on,"
    label = f"energy ({unit} per image)"
    return plot_by_entry(results, measured, "layers", "energy_pj", label=label, size=size, caption=caption)


def _neurons_table(m: Measurement) -> Table:
    entries = m.content["neurons"]
    steps = list(dict.fromkeys(row["T"] for entry in entries for row in entry["rows"]))
    rows = []
    for entry in entries:
        rates = {row["T"]: row.get("firing_rate") for row in entry["rows"]}
        rows.append(
            (entry["name"], text(entry.get("size"), lambda v: f"{v:,.0f}"), *(rate(rates.get(T)) for T in steps))
        )
    headers = ("layer", "neurons", *(f"T={T}{' *' if m.trained_T == T else ''}" for T in steps))
    return Table(f"{m.heading}: firing rate of each layer by T.", headers, tuple(rows))


def _layers_table(m: Measurement) -> Table:
    total = sum(m.by_entry("layers", "energy_pj").values())
    found = [(layer, row) for layer in m.content["layers"] for row in layer["rows"] if row["T"] == m.T]
    headers = (
        "layer",
        "input",
        "weights",
        "fan-out",
        "nonzero inputs",
        "AC ops",
        "MAC ops",
        "energy",
        "exact",
        "share",
    )
    rows = tuple(
        (
            layer["name"],
            input_kind(layer),
            text(layer.get("weights"), lambda v: f"{v:,.0f}"),
            three_digits(layer.get("fan_out")),
            text(row.get("input_rate"), lambda v: f"{v:.1%}"),
            count(row.get("ac_ops")),
            count(row.get("mac_ops")),
            energy(row.get("energy_pj")),
            energy(row.get("energy_exact_pj")),
            text(row.get("energy_pj"), lambda v: f"{v / total:.1%}" if total else NONE),
        )
        for layer, row in found
    )
    caption = f"{m.heading} at T={m.T}, per image. Fan-out: outputs that an input value reaches, on average."
    return Table(caption, headers, rows).without_empty_columns()
