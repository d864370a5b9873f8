"""Results as people read them: tables for the terminal, plots for a paper, a report for the browser.

A report goes from files to `Results` (reading.py, results.py), to a `Document` (page.py, sections/), to HTML or
Markdown (writers.py).
"""

from tetdeploy.report.numbers import count, energy
from tetdeploy.report.sweep_plot import plot_sweep
from tetdeploy.report.tables import layers_table, other_ops_table, sweep_table

__all__ = ["count", "energy", "layers_table", "other_ops_table", "plot_sweep", "sweep_table"]
