"""How far the exported model is from PyTorch."""

from __future__ import annotations

from tetdeploy.report.document import Note, Row, Section, Table
from tetdeploy.report.numbers import parts_per_million, percent, short_float, text
from tetdeploy.report.results import Measurement, Results

_KEYS = ("top1_agreement", "spike_mismatch_rate", "max_abs_logit_error")


def agreement(results: Results) -> Section | None:
    """A row for each model and T, and the layers where spikes differ."""
    rows = [
        (m.name, str(row["T"]), percent(row.get(_KEYS[0])), parts_per_million(row.get(_KEYS[1])),
         text(row.get(_KEYS[2]), lambda v: f"{v:.1e}"))
        for m in results.measurements
        for row in m.rows
        if any(row.get(key) is not None for key in _KEYS)
    ]  # fmt: skip
    if not rows:
        return None
    headers = ("model", "T", "same class", "spikes that differ", "largest logit error")
    whole = Table("The exported model against PyTorch.", headers, tuple(rows))
    by_layer = tuple(table for m in results.measurements if (table := _by_layer(m)) is not None)
    note = (
        "Same class: images for which both give the same answer. Spikes that differ: of all neurons and steps, in "
        "parts per million; a membrane potential that lies within rounding of the threshold may fall on either side."
    )
    return Section("Agreement with PyTorch", (whole, Note(note), *([Row(by_layer)] if by_layer else [])))


def _by_layer(m: Measurement) -> Table | None:
    """Of `validate --against`; numbers by layer, or by layer and T."""
    entries = m.content.get("neurons") or []
    rows = []
    for entry in entries:
        at = next((row for row in entry["rows"] if row["T"] == m.T), {})
        differ, margin = (at.get(key, entry.get(key)) for key in ("spike_mismatch_rate", "margin"))
        if isinstance(differ, int | float):
            shown = short_float(margin) if isinstance(margin, int | float) else "–"
            rows.append((entry["name"], parts_per_million(differ), shown))
    headers = ("layer", "spikes that differ", "margin |u - v_th| there")
    return Table(f"{m.name}: agreement by layer.", headers, tuple(rows)) if rows else None
