"""Results as people read them in a terminal: tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from tetdeploy.energy import OTHER_OPS
from tetdeploy.report.numbers import count, energy, three_digits
from tetdeploy.report.result_table import ResultTable
from tetdeploy.sweep import Sweep

BILLS = {"paper": "energy_pj", "exact": "energy_exact_pj", "once": "energy_once_pj"}
_HEADERS = {"paper": "energy", "exact": "exact\nenergy", "once": "once\nenergy"}


def sweep_table(
    result: Sweep, trained_T: int | None = None, *, conventions: Sequence[str] = ("paper", "exact")
) -> Table:
    """A sweep as a table; the T of the training is marked.

    Args:
        conventions: of `tetdeploy.energy.CONVENTIONS`, a column each; the ANN twin is compared with the first.
    """
    table = _table(
        "T", "accuracy", "firing\nrate", "AC\nops", "MAC\nops", *_headers(conventions), "ANN /\nSNN", "latency"
    )
    for row in result.rows:
        bills = [getattr(row, BILLS[name]) for name in conventions]
        table.add_row(
            f"{row.T}{'*' if trained_T == row.T else ' '}",
            f"{row.accuracy:.2%}",
            f"{row.firing_rate:.3f}",
            count(row.ac_ops),
            count(row.mac_ops),
            *map(energy, bills),
            three_digits(result.details["ann"]["energy_pj"] / bills[0]) if bills[0] else "-",
            f"{row.latency_ms:.2f} ms",
        )
    return table


def layers_table(details: Mapping[str, Any], T: int, *, conventions: Sequence[str] = ("paper", "exact")) -> Table:
    """Every layer's inputs, operations and energy per image after T steps, and their sum.

    Args:
        details: `Sweep.details`, or the JSON of a result, with T among its rows.
    """
    table = _table("layer", "input", "rate", "fan-out", "AC\nops", "MAC\nops", *_headers(conventions))
    table.columns[0].justify = table.columns[1].justify = "left"
    table.columns[0].no_wrap = False
    keys = ["ac_ops", "mac_ops", *(BILLS[name] for name in conventions)]
    total = dict.fromkeys(keys, 0.0)
    for layer in details["layers"]:
        row = next(row for row in layer["rows"] if row["T"] == T)
        total = {key: total[key] + row[key] for key in keys}
        kind = "image" if layer["from_input"] else "spikes" if layer["binary"] else "analogue"
        table.add_row(layer["name"], kind, f"{row['input_rate']:.3f}", f"{layer['fan_out']:.4g}", *_cells(row, keys))
    table.add_section()
    table.add_row("all layers", "", "", "", *_cells(total, keys))
    return table


def other_ops_table(details: Mapping[str, Any], T: int) -> Table:
    """What no energy above includes, per image in T steps."""
    table = _table("not in the energy", "ops", "energy", "what is counted")
    table.columns[0].justify = table.columns[3].justify = "left"
    table.columns[3].no_wrap = False
    for kind, ops in details["other_ops"].items():
        bill = details["other_ops_pj"][kind]
        table.add_row(kind.replace("_", " "), count(ops * T), energy(bill * T), OTHER_OPS[kind])
    return table


BENCH_COLUMNS = ("T", "threads", "batch", "median", "p95", "p99", "images/s", "calls")
NUM_BENCH_LABELS = 3


def bench_table(result: Mapping[str, Any]) -> Table:
    """Latency and throughput: the JSON of a bench."""
    table = _table(*BENCH_COLUMNS, num_labels=NUM_BENCH_LABELS)
    for row in result["rows"]:
        table.add_row(*bench_cells(row))
    return table


def bench_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of a bench under `BENCH_COLUMNS`."""
    times = (f"{three_digits(row[key])} ms" for key in ("median_ms", "p95_ms", "p99_ms"))
    settings = (str(row[key]) for key in ("T", "threads", "batch"))
    return (*settings, *times, three_digits(row["images_per_s"]), str(row["calls"]))


def hardware(machine: Mapping[str, Any]) -> str:
    """The processor and its cores, and the GPU if there is one."""
    gpu = machine["gpu"]
    return f"{machine['cpu']}, {machine['cores']} cores" + (f", {gpu}" if gpu else "")


def _table(*headers: str, num_labels: int = 1) -> Table:
    table = ResultTable(num_labels=num_labels)
    table.add_numbers(*headers)
    return table


def _headers(conventions: Sequence[str]) -> list[str]:
    return [_HEADERS[name] for name in conventions]


def _cells(row: Mapping[str, float], keys: Sequence[str]) -> list[str]:
    return [(count if key.endswith("ops") else energy)(row[key]) for key in keys]


def images_of(number: int, data: str) -> str:
    """`359 images of digits`; `256 reference images`."""
    return f"{number:,} {data}" if data.endswith("images") else f"{number:,} images of {data}"
