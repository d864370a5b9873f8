"""How far the exported model is from PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tetdeploy.report.document import NONE, Note, Row, Section, Table
from tetdeploy.report.numbers import parts_per_million, percent, text
from tetdeploy.report.results import Measurement, Results

_KEYS = ("top1_agreement", "spike_mismatch_rate", "max_abs_logit_error")
_NOTE = (
    "Same class: images for which both give the same answer. Spikes that differ: of all neurons and steps, in parts "
    "per million; a membrane potential u that lies within rounding of the threshold v_th may fall on either side. By "
    "itself: where each layer of PyTorch reads the spikes that the engine's layer read, so that no earlier layer plays "
    "a part."
)


def agreement(results: Results) -> Section | None:
    """A row for each model and T, and the layers where spikes differ."""
    found = [(m, row) for m in results.measurements for row in m.rows if any(row.get(k) is not None for k in _KEYS)]
    if not found:
        return None
    headers = (
        "model",
        "T",
        "same class",
        "PyTorch's accuracy",
        "spikes that differ",
        "by itself",
        "logit error, largest",
    )
    rows = tuple(_row(m, row) for m, row in found)
    whole = Table("The exported model against PyTorch.", headers, rows).without_empty_columns()
    by_layer = tuple(table for m in results.measurements if (table := _by_layer(m)) is not None)
    return Section("Agreement with PyTorch", (whole, Note(_NOTE), *([Row(by_layer)] if by_layer else [])))


def _row(m: Measurement, row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        m.name,
        str(row["T"]),
        percent(row.get("top1_agreement")),
        percent(row.get("torch_accuracy")),
        parts_per_million(row.get("spike_mismatch_rate")),
        parts_per_million(row.get("local_mismatch_rate")),
        _small(row.get("max_abs_logit_error")),
    )


def _by_layer(m: Measurement) -> Table | None:
    """Of `validate --against`, over all steps."""
    layers = [entry for entry in m.content.get("neurons") or [] if entry.get("spike_mismatch_rate") is not None]
    if not layers:
        return None
    rows = tuple(
        (
            entry["name"],
            parts_per_million(entry["spike_mismatch_rate"]),
            parts_per_million(entry.get("local_mismatch_rate")),
            _margin(entry, "local", "max"),
            _margin(entry, "every", "median"),
        )
        for entry in layers
    )
    headers = ("layer", "spikes that differ", "by itself", "their largest margin", "median of all margins")
    caption = f"{m.name}: agreement by layer. Margin: |u - v_th| / v_th; that of spikes which differ by themselves."
    return Table(caption, headers, rows).without_empty_columns()


def _margin(entry: Mapping[str, Any], which: str, statistic: str) -> str:
    margin = entry.get("margin")
    found = margin.get(which) if isinstance(margin, dict) else None
    return _small(found.get(statistic)) if isinstance(found, dict) else NONE


def _small(value: float | None) -> str:
    return text(value, lambda v: f"{v:.1e}")
