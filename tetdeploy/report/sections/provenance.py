"""Where every number comes from: files, their hashes, versions, times."""

from __future__ import annotations

from typing import Any

from tetdeploy.report.document import Section, Table
from tetdeploy.report.reading import Run
from tetdeploy.report.results import Measurement, Results
from tetdeploy.report.tables import versions
from tetdeploy.storage.files import sha256_of
from tetdeploy.storage.run_folder import CHECKPOINT_NAME


def provenance(results: Results) -> Section:
    """A table for each run and each measurement."""
    runs = [_run_table(name, run) for source in results.sources for name, run in source.runs.items()]
    return Section("Versions and hashes", (*runs, *(_measurement_table(m) for m in results.measurements)))


def _run_table(name: str, run: Run) -> Table:
    origin: dict[str, Any] = run.checkpoint.get("provenance") or {}
    file = run.folder / CHECKPOINT_NAME
    facts = {
        "checkpoint": CHECKPOINT_NAME if file.is_file() else "not here" if run.metrics else "none yet",
        "its SHA-256": sha256_of(file) if file.is_file() else "",
        "written": origin.get("created"),
        "versions": versions(origin.get("versions")),
    }
    return _facts(f"{name}: the training.", facts)


def _measurement_table(m: Measurement) -> Table:
    content = m.content
    facts = {
        "results": ", ".join(file.name for file in m.files),
        "model": content["model"],
        "its SHA-256": content.get("model_sha256"),
        "layout": content.get("layout"),
        "precision of its layers": m.precision,
        "data": m.images,
        "their SHA-256": content.get("images_sha256"),
        "device": content.get("device"),
        "runtime": content.get("runtime"),
        "measured": content.get("created"),
        "versions": versions(content.get("versions")),
    }
    return _facts(f"{m.name}: the measurement.", facts)


def _facts(caption: str, facts: dict[str, Any]) -> Table:
    rows = tuple((label, str(value)) for label, value in facts.items() if value not in (None, ""))
    return Table(caption, ("", ""), rows, num_labels=2, wide=True)
