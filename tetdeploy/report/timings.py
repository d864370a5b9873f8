"""The timings of `tetdeploy bench` among the files of a report: tables of their own, not rows by T as other results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tetdeploy.report.forms import BENCH
from tetdeploy.report.reading import WANTED, json_object, readable
from tetdeploy.report.staleness import stale
from tetdeploy.storage.form import check_form

_SUFFIX = ".bench.json"


def is_bench(path: Path) -> bool:
    """Whether a file is the result of a bench, by its name or else its content."""
    if not path.is_file():
        return False
    return path.name.endswith(_SUFFIX) or json_object(path, remedy=WANTED).get("kind") == "bench"


def read_benches(folders: Mapping[str, Path], files: Sequence[Path], notes: list[str]) -> dict[str, dict[str, Any]]:
    """The benches in run folders, of which a note names those left out as they are damaged, and in files of their own,
    by a name for each. Notes name those of another model than lies beside them, too.

    Args:
        folders: by what the report calls the run.

    Raises:
        ValueError: one of the files is no bench, or damaged.
    """
    given, benches = {file.resolve() for file in files}, {}
    for name, file in _named(folders, files):
        content = _read(file) if file.resolve() in given else readable(_read, file, notes)
        if content is not None:
            benches[name] = content
            if note := stale(content, [file]):
                notes.append(note)
    return benches


def _named(folders: Mapping[str, Path], files: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    seen = set()
    for run, folder in folders.items():
        for file in sorted(folder.glob(f"[!.]*{_SUFFIX}")):
            seen.add(file.resolve())
            yield f"{run} {file.name.removesuffix(_SUFFIX)}", file
    for file in files:
        if file.resolve() not in seen:
            yield str(file), file


def _read(file: Path) -> dict[str, Any]:
    content = json_object(file, remedy=WANTED)
    try:
        if content.get("kind") != "bench" or not content.get("rows"):
            raise ValueError("its kind is not bench, or it has no rows")
        check_form(content, BENCH)
    except ValueError as error:
        raise ValueError(f"{file} does not have the form of a bench: {error}; run tetdeploy bench again") from error
    return content
