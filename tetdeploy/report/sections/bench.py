"""Latency and throughput, as `tetdeploy bench` timed them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tetdeploy.report.document import Note, Section, Table
from tetdeploy.report.results import Results
from tetdeploy.report.tables import BENCH_COLUMNS, NUM_BENCH_LABELS, bench_cells, hardware

_NOTE = (
    "Times of one call, in which a batch of images runs all T steps: the median, and what 95 and 99 of 100 calls stay "
    "under. Images per second: of all calls together. The settings of a table took turns."
)


def bench(results: Results) -> Section | None:
    """A table for each model that was timed."""
    if not results.benches:
        return None
    tables = tuple(_table(name, content) for name, content in results.benches.items())
    return Section("Latency and throughput", (*tables, Note(_NOTE)))


def _table(name: str, content: Mapping[str, Any]) -> Table:
    machine = content["machine"]
    where = f"{hardware(machine)}, {machine['provider']}{', interrupted' if content.get('interrupted') else ''}"
    rows = tuple(bench_cells(row) for row in content["rows"])
    return Table(f"{name}: {content['model']} on {where}.", BENCH_COLUMNS, rows, num_labels=NUM_BENCH_LABELS)
