"""A validation in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from tetdeploy.report.numbers import percent, ppm, rate, scientific, text
from tetdeploy.report.result_table import ResultTable
from tetdeploy.report.tables import COSTS, Columns, cells, images_of, rows_table, uncounted_note, with_values

_COSTS = ("accuracy", "firing_rate", "ac_ops", "mac_ops", "energy_pj", "latency_ms", "torch_latency_ms")
_AGREEMENT: Columns = {
    "engine_accuracy": ("accuracy", percent),
    "torch_accuracy": ("PyTorch's", percent),
    "top1_agreement": ("top-1\nagreement", percent),
    "spike_mismatch_rate": ("spike\nmismatch", ppm),
    "local_mismatch_rate": ("each layer\nby itself", ppm),
    "spike_count_error": ("spike count\nerror", ppm),
    "max_abs_logit_error": ("largest\nlogit error", scientific),
}
_MARGINS = {"differing": "margin where\nthey differ", "local": "by itself,\nat first", "every": "every-\nwhere"}


def shown(result: Mapping[str, Any], *, layers: bool) -> Iterator[str | Text | Table]:
    """What the terminal shows of a validation's JSON, from top to bottom.

    Args:
        layers: also a table of the layers of neurons.
    """
    rows, agreement, trained_T = result["rows"], result["agreement"], result["trained_T"]
    yield f"{result['model']}   {images_of(result['num_samples'], result['data'])}   {result['layout']}"
    yield rows_table(rows, {key: COSTS[key] for key in _COSTS}, trained_T)
    for note in uncounted_note(result["uncounted"], result["layout"]):
        yield Text(note, "dim")
    if rows[0]["accuracy"] is None:
        yield Text("images of the training: their accuracy says nothing; name a test set with --data", "dim")
    if agreement is not None:
        yield _heading(agreement)
        yield rows_table(rows, _AGREEMENT, trained_T)
        star = "* the T of the training; " if trained_T in [row["T"] for row in rows] else ""
        yield Text(f"{star}{_reading(agreement)}", "dim")
    if layers:
        yield f"layers of neurons, T={rows[-1]['T']}{_seen_by_both(result)}"
        yield _neurons_table(result["neurons"])


def _heading(agreement: Mapping[str, Any]) -> str:
    count = f"{agreement['num_images']:,} images"
    if agreement["with"] == "reference":
        return f"compared with what PyTorch made of the {count} of the reference, T up to {agreement['T']}"
    return f"beside PyTorch on {count}, checkpoint {agreement['checkpoint_sha256'][:12]}"


def _seen_by_both(result: Mapping[str, Any]) -> str:
    """On which images the layers stand beside PyTorch's, if they do."""
    if not any("engine_firing_rate" in layer for layer in result["neurons"]):
        return ""
    return f", on the {result['agreement']['num_images']:,} images that PyTorch saw too"


def _reading(agreement: Mapping[str, Any]) -> str:
    """How to read the table."""
    if agreement["with"] == "reference":
        return "spike count error: per layer and step, over all neuron-steps; at least as many spikes differ"
    by_itself = "by itself: each layer of PyTorch reads the engine's spikes"
    margin = agreement["margin"]["local"]
    if not margin["count"]:
        return by_itself
    return (
        f"{by_itself}; where it differs, |u - v_th| / v_th is {margin['median']:.1e} "
        f"(median of {margin['count']:,}; at most {margin['max']:.1e})"
    )


def _neurons_table(neurons: Sequence[Mapping[str, Any]]) -> Table:
    """Layers of neurons: firing rate at the largest T, of the images that PyTorch saw too if it ran beside, and how far
    they are from PyTorch's over all steps."""
    columns: Columns = {
        "torch_firing_rate": ("PyTorch's", rate),
        "spike_mismatch_rate": ("spike\nmismatch", ppm),
        "local_mismatch_rate": ("by\nitself", ppm),
        "spike_count_error": ("spike count\nerror", ppm),
    }
    columns = with_values(columns, neurons)
    margins = _MARGINS if any("margin" in layer for layer in neurons) else {}
    headers = (header for header, _ in columns.values())
    table = ResultTable("", numbers=("firing\nrate", *headers, *margins.values()))
    for layer in neurons:
        fired = layer.get("engine_firing_rate", layer["rows"][-1]["firing_rate"])
        medians = (text(layer["margin"][name]["median"], "{:.0e}".format) for name in margins)
        table.add_row(layer["name"], rate(fired), *cells(layer, columns), *medians)
    return table
