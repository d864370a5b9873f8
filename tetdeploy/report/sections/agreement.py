"""How far the exported model is from PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tetdeploy.report.document import Note, Section, Table
from tetdeploy.report.merging import AGREEMENT, agrees
from tetdeploy.report.numbers import energy, percent, ppm, scientific
from tetdeploy.report.results import Measurement, Results
from tetdeploy.report.tables import Columns, cells

_COLUMNS: Columns = {
    "top1_agreement": ("same class", percent),
    "torch_accuracy": ("PyTorch's accuracy", percent),
    "spike_mismatch_rate": ("spikes that differ", ppm),
    "local_mismatch_rate": ("by itself", ppm),
    "spike_count_error": ("spike counts differ", ppm),
    "max_abs_logit_error": ("logit error, largest", scientific),
}
_NOTE = (
    "Same class: images for which both give the same answer. Spikes that differ: of all neurons and steps, in parts "
    "per million; a membrane potential u that lies within rounding of the threshold v_th may fall on either side. By "
    "itself: where each layer of PyTorch reads the spikes that the engine's layer read, so that no earlier layer plays "
    "a part."
)
_NOTE_ON_COUNTS = " Spike counts: of each layer and step; at least as many spikes differ."


def agreement(results: Results) -> Section | None:
    """A table by T for each model, and one by layer where it is known which spikes differ."""
    compared = [m for m in results.measurements if agrees(m.content)]
    tables = [table for m in compared for table in (_by_steps(m), _by_layer(m)) if table is not None]
    counts = any(row.get("spike_count_error") is not None for m in compared for row in m.rows)
    note = Note(_NOTE + _NOTE_ON_COUNTS * counts)
    return Section("Agreement with PyTorch", (*tables, note)) if tables else None


def gates(results: Results) -> Section | None:
    """What was asked of a model, and whether it held (`validate --fail-under`)."""
    rows = tuple(_gate(m.name, gate) for m in results.measurements for gate in m.content.get("gates") or [])
    headers = ("model", "number", "T", "wanted", "got", "held")
    return Section("Gates", (Table("Bounds that were set for the models.", headers, rows, 2),)) if rows else None


def _gate(name: str, gate: Mapping[str, Any]) -> tuple[str, ...]:
    form = energy if gate.get("unit") == "pJ" else percent
    bound = "at most" if gate.get("at_most") else "at least"
    held = "yes" if gate["passed"] else "NO"
    return name, str(gate["key"]), str(gate["T"]), f"{bound} {form(gate['wanted'])}", form(gate.get("got")), held


def _images(m: Measurement) -> str:
    """What agreement was measured on."""
    compared = m.content.get("agreement") or {}
    number = compared.get("num_images", m.content["num_samples"])
    if compared.get("with") == "reference":
        return f"the {number:,} images that its export kept"
    return f"{number:,} images of {compared.get('data', m.content['data'])}"


def _by_steps(m: Measurement) -> Table:
    found = [row for row in m.rows if any(row.get(key) is not None for key in AGREEMENT)]
    rows = tuple((f"{row['T']}", *cells(row, _COLUMNS)) for row in found)
    caption = f"{m.name}: the exported model against PyTorch on {_images(m)}."
    return Table(caption, ("T", *(header for header, _ in _COLUMNS.values())), rows).without_empty_columns()


def _by_layer(m: Measurement) -> Table | None:
    """Of `validate --against`, over all steps."""
    layers = [entry for entry in m.content.get("neurons") or [] if entry.get("spike_mismatch_rate") is not None]
    if not layers:
        return None
    rows = tuple(
        (
            entry["name"],
            ppm(entry["spike_mismatch_rate"]),
            ppm(entry.get("local_mismatch_rate")),
            _margin(entry, "local", "max"),
            _margin(entry, "every", "median"),
        )
        for entry in layers
    )
    headers = ("layer", "spikes that differ", "by itself", "their largest margin", "median of all margins")
    caption = f"{m.name}: agreement by layer. Margin: |u - v_th| / v_th; that of spikes which differ by themselves."
    return Table(caption, headers, rows).without_empty_columns()


def _margin(entry: Mapping[str, Any], which: str, statistic: str) -> str:
    return scientific((entry.get("margin") or {}).get(which, {}).get(statistic))
