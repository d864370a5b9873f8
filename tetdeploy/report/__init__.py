"""Results as people read them: tables for the terminal, plots for a paper, a report for the browser.

A report goes from files (reading.py) to sources, if they compare (sources.py, comparing.py), which are its `Results`
(results.py), to a `Document` (page.py, sections/), to HTML or Markdown (writers.py).
"""
