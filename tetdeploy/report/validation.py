"""Tables of a validation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from tetdeploy.report.tables import energy

Show = Callable[[Any], str]
_COLUMNS: dict[str, tuple[str, Show]] = {
    "accuracy": ("accuracy", "{:.2%}".format),
    "engine_accuracy": ("engine", "{:.2%}".format),
    "torch_accuracy": ("PyTorch", "{:.2%}".format),
    "top1_agreement": ("top-1\nagreement", "{:.2%}".format),
    "spike_mismatch_rate": ("spike\nmismatch", lambda rate: ppm(rate)),
    "local_mismatch_rate": ("layer by\nlayer", lambda rate: ppm(rate)),
    "spike_count_error": ("spike count\nerror", lambda rate: ppm(rate)),
    "max_abs_logit_error": ("logit\nerror", "{:.1e}".format),
    "firing_rate": ("firing\nrate", "{:.3f}".format),
    "energy_pj": ("energy", energy),
    "latency_ms": ("latency", "{:.2f} ms".format),
    "torch_latency_ms": ("PyTorch's\nlatency", "{:.2f} ms".format),
}


def validation_table(rows: Sequence[Mapping[str, Any]], trained_T: int) -> Table:
    """The rows of a validation; the T of the training is marked. Columns without any value are left out."""
    shown = [key for key in _COLUMNS if any(row.get(key) is not None for row in rows)]
    table = _table("T", *(_COLUMNS[key][0] for key in shown))
    for row in rows:
        cells = ("–" if row.get(key) is None else _COLUMNS[key][1](row[key]) for key in shown)
        table.add_row(f"{row['T']}{'*' if row['T'] == trained_T else ' '}", *cells)
    return table


def neurons_table(neurons: Sequence[Mapping[str, Any]]) -> Table:
    """Layers of neurons: firing rate at the largest T, and how far they are from PyTorch's."""
    if not any("margin" in layer for layer in neurons):
        table = _table(
            "", "neurons", "firing\nrate", *(["spike count\nerror"] if "spike_count_error" in neurons[0] else [])
        )
        for layer in neurons:
            errors = [ppm(layer["spike_count_error"])] if "spike_count_error" in layer else []
            table.add_row(layer["name"], f"{layer['size']:,}", _rate(layer), *errors)
        return table
    headers = (
        "firing\nrate",
        "PyTorch's",
        "spike\nmismatch",
        "by\nitself",
        "margin where\nthey differ",
        "at first,\nby itself",
        "everywhere",
    )
    table = _table("", "neurons", *headers)
    for layer in neurons:
        margins = (_margin(layer["margin"][name]["median"]) for name in ("differing", "local", "every"))
        rates = (ppm(layer[key]) for key in ("spike_mismatch_rate", "local_mismatch_rate"))
        table.add_row(
            layer["name"], f"{layer['size']:,}", _rate(layer), f"{layer['torch_firing_rate']:.3f}", *rates, *margins
        )
    return table


def ppm(rate: float) -> str:
    """A rate in parts per million: `0.15 ppm`."""
    return f"{rate * 1e6:,.0f} ppm" if rate >= 99.5e-6 else f"{rate * 1e6:.3g} ppm"


def _rate(layer: Mapping[str, Any]) -> str:
    return f"{layer['rows'][-1]['firing_rate']:.3f}"


def _margin(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def _table(first: str, *headers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, justify="left" if not first else "right", no_wrap=True)
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    return table
