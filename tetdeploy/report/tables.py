"""Results as people read them in a terminal: tables, and numbers in engineering units."""

from __future__ import annotations

from rich import box
from rich.table import Table

from tetdeploy.validate import Sweep


def sweep_table(result: Sweep, trained_T: int | None = None) -> Table:
    """A sweep as a table; the T of the training is marked."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("T", "accuracy", "firing\nrate", "AC\nops", "MAC\nops", "energy", "exact\nenergy", "latency"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in result.rows:
        table.add_row(
            f"{row.T}{'*' if trained_T == row.T else ' '}",
            f"{row.accuracy:.2%}",
            f"{row.firing_rate:.3f}",
            count(row.ac_ops),
            count(row.mac_ops),
            energy(row.energy_pj),
            energy(row.energy_exact_pj),
            f"{row.latency_ms:.2f} ms",
        )
    return table


def count(number: float) -> str:
    """A number of operations in engineering units: `1.66 M`."""
    return _scaled(number, (("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0)))


def energy(picojoules: float) -> str:
    """An energy in engineering units: `1.92 µJ`."""
    return _scaled(picojoules, (("mJ", 1e9), ("µJ", 1e6), ("nJ", 1e3), ("pJ", 1.0)))


def _scaled(number: float, units: tuple[tuple[str, float], ...]) -> str:
    for unit, size in units:
        if number >= size:
            return f"{number / size:.3g} {unit}".rstrip()
    return f"{number:.3g} {units[-1][0]}".rstrip()
