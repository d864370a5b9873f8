"""Results as people read them in a terminal: tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table

from tetdeploy.energy import OTHER_OPS, input_kind
from tetdeploy.report.numbers import count, energy, latency, milliseconds, percent, rate, three_digits
from tetdeploy.report.result_table import ResultTable

if TYPE_CHECKING:
    from tetdeploy.sweep import Sweep

Columns = Mapping[str, tuple[str, Callable[[float | None], str]]]  # by key of a row: the header, how it is written

BILLS = {"paper": "energy_pj", "exact": "energy_exact_pj", "once": "energy_once_pj"}
COSTS: Columns = {
    "accuracy": ("accuracy", percent),
    "firing_rate": ("firing\nrate", rate),
    "ac_ops": ("AC\nops", count),
    "mac_ops": ("MAC\nops", count),
    "energy_pj": ("energy", energy),
    "energy_exact_pj": ("exact\nenergy", energy),
    "energy_once_pj": ("once\nenergy", energy),
    "ann_ratio": ("ANN /\nSNN", three_digits),
    "latency_ms": ("latency", latency),
    "torch_latency_ms": ("PyTorch's\nlatency", latency),
}


def sweep_table(
    result: Sweep, trained_T: int | None = None, *, conventions: Sequence[str] = ("paper", "exact")
) -> Table:
    """A sweep as a table; the T of the training is marked.

    Args:
        conventions: of `tetdeploy.energy.CONVENTIONS`, a column each; the ANN twin is compared with the first.
    """
    ann, bills = result.details["ann"]["energy_pj"], [BILLS[name] for name in conventions]
    rows = [asdict(row) for row in result.rows]
    for row in rows:
        row["ann_ratio"] = ann / row[bills[0]] if row[bills[0]] else None
    keys = ("accuracy", "firing_rate", "ac_ops", "mac_ops", *bills, "ann_ratio", "latency_ms")
    return rows_table(rows, {key: COSTS[key] for key in keys}, trained_T)


def rows_table(rows: Sequence[Mapping[str, Any]], columns: Columns, trained_T: int | None) -> Table:
    """What was measured of some columns at each T; the T of the training is marked."""
    columns = with_values(columns, rows)
    table = ResultTable(numbers=("T", *(header for header, _ in columns.values())))
    for row in rows:
        table.add_row(f"{row['T']}{'*' if row['T'] == trained_T else ' '}", *cells(row, columns))
    return table


def with_values(columns: Columns, rows: Sequence[Mapping[str, Any]]) -> Columns:
    """The columns of which some row has a value."""
    return {key: column for key, column in columns.items() if any(row.get(key) is not None for row in rows)}


def cells(row: Mapping[str, Any], columns: Columns) -> list[str]:
    """The cells of a row."""
    return [form(row.get(key)) for key, (_, form) in columns.items()]


def layers_table(details: Mapping[str, Any], T: int, *, conventions: Sequence[str] = ("paper", "exact")) -> Table:
    """Every layer's inputs, operations and energy per image after T steps, and their sum.

    Args:
        details: `Sweep.details`, or the JSON of a result, with T among its rows.
    """
    columns = {key: COSTS[key] for key in ("ac_ops", "mac_ops", *(BILLS[name] for name in conventions))}
    table = ResultTable("layer", numbers=("input", "rate", "fan-out", *(header for header, _ in columns.values())))
    table.columns[1].justify = "left"
    total = dict.fromkeys(columns, 0.0)
    for layer in details["layers"]:
        row = next(row for row in layer["rows"] if row["T"] == T)
        total = {key: total[key] + row[key] for key in columns}
        table.add_row(
            layer["name"],
            input_kind(layer),
            rate(row["input_rate"]),
            three_digits(layer["fan_out"]),
            *cells(row, columns),
        )
    table.add_section()
    table.add_row("all layers", "", "", "", *cells(total, columns))
    return table


def other_ops_table(details: Mapping[str, Any], T: int) -> Table:
    """What no energy above includes, per image in T steps."""
    table = ResultTable("not in the energy", numbers=("ops", "energy"))
    table.add_column("what is counted")
    for kind, ops in details["other_ops"].items():
        bill = details["other_ops_pj"][kind]
        table.add_row(kind.replace("_", " "), count(ops * T), energy(bill * T), OTHER_OPS[kind])
    return table


BENCH_COLUMNS = ("T", "threads", "batch", "median", "p95", "p99", "images/s", "calls")
NUM_BENCH_LABELS = 3


def bench_table(result: Mapping[str, Any]) -> Table:
    """Latency and throughput: the JSON of a bench."""
    table = ResultTable(numbers=BENCH_COLUMNS, num_labels=NUM_BENCH_LABELS)
    for row in result["rows"]:
        table.add_row(*bench_cells(row))
    return table


def bench_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of a bench under `BENCH_COLUMNS`."""
    times = (milliseconds(row[key]) for key in ("median_ms", "p95_ms", "p99_ms"))
    settings = (str(row[key]) for key in ("T", "threads", "batch"))
    return (*settings, *times, three_digits(row["images_per_s"]), str(row["calls"]))


def hardware(machine: Mapping[str, Any]) -> str:
    """The processor and its cores, and the GPU if there is one."""
    gpu = machine.get("gpu")
    return f"{machine['cpu']}, {machine['cores']} cores" + (f", {gpu}" if gpu else "")


def versions(of: Any) -> str:
    """What something was made with; nothing where that is not said."""
    return ", ".join(f"{name} {version}" for name, version in of.items()) if isinstance(of, dict) else ""


def uncounted_note(names: Sequence[str], layout: str) -> list[str]:
    """What no energy includes for want of a way to count it: a line, if anything."""
    if not names:
        return []
    way_out = "" if layout == "step" else "; export --layout step may count them"
    return [f"operations not counted, and in no energy: {', '.join(names)}{way_out} (why: docs/energy.md)"]


def images_of(number: int, data: str) -> str:
    """`359 images of digits`; `256 reference images`."""
    return f"{number:,} {data}" if data == "reference images" else f"{number:,} images of {data}"
