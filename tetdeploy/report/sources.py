"""Makes a source of each path that a report was given, with a name, its runs and what was measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain, combinations
from pathlib import Path
from typing import Any

from tetdeploy.report.comparing import cautions, check_comparable, data_name, measured_on
from tetdeploy.report.means import mean_of
from tetdeploy.report.merging import apart, has_accuracy, merged
from tetdeploy.report.reading import Run, model_stem, read_result, read_run, readable, result_files
from tetdeploy.report.results import Measurement, Results, Source, of_seeds
from tetdeploy.report.seeds import finished_seeds, summary_of
from tetdeploy.report.staleness import stale
from tetdeploy.report.timings import is_bench, read_benches
from tetdeploy.storage.run_folder import CHECKPOINT_NAME, METRICS_NAME, seed_runs
from tetdeploy.wording import quoted


def read_results(paths: Sequence[Path], names: Sequence[str] = ()) -> Results:
    """Read run folders and result files.

    Args:
        paths: run folders, folders of several seeds, or JSON files of sweep, validate, early-exit and bench.
        names: for the sources in the order of the paths; the others are called by their folder or file. The results
            of one model beside each other are one source.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: no path, or one twice; a path is no result, or damaged; a run folder's config.json, metrics.jsonl or
            checkpoint is (of a result in it a note says so, and it is left out); names that do not fit; the results are
            of different data and cannot be compared.
    """
    timings = [path for path in paths if is_bench(path)]
    if timings and len(timings) == len(paths):
        raise ValueError(
            f"{', '.join(map(str, timings))}: timings alone make no report; name the run folder, or a sweep, as well"
        )
    groups = _grouped([path for path in paths if path not in timings])
    notes: list[str] = []
    sources = tuple(_source(name, g, notes) for name, g in zip(_labels(groups, names), groups, strict=True))
    empty = [group[0] for group, source in zip(groups, sources, strict=True) if not _holds_anything(source)]
    if empty:
        raise ValueError(
            f"nothing to report on in {', '.join(f'{path}: {_why_empty(path)}' for path in empty)} and nothing was "
            f"measured; train further (--resume), or export and run tetdeploy sweep{''.join(f'. {n}' for n in notes)}"
        )
    check_comparable(sources)
    folders = {label: run.folder for source in sources for label, run in source.runs.items()}
    benches = read_benches(folders, timings, notes)
    return Results(sources, tuple(notes + list(cautions(sources))), benches)


def _source(name: str, paths: tuple[Path, ...], notes: list[str]) -> Source:
    """A run, several seeds, or the result files of one model."""
    if not paths[0].is_dir():
        alone = (_measurement(name, {path: read_result(path) for path in paths}, None, notes),)
        return Source(name, {}, alone, alone, {})
    folder = paths[0]
    seeds = seed_runs(folder)
    runs = {f"{name} {seed.name}": read_run(seed) for seed in seeds} or {name: read_run(folder)}
    found = [
        (label, run, stem, contents)
        for label, run in runs.items()
        for stem, files in result_files(run.folder).items()
        if (contents := {file: content for file in files if (content := readable(read_result, file, notes))})
    ]
    single = Counter(label for label, *_ in found)
    measured = [
        (stem, _measurement(label if single[label] == 1 else f"{label} {stem}", contents, run, notes))
        for label, run, stem, contents in found
    ]
    measured = _on_one_data_set(measured, notes)
    measurements = tuple(m for _, m in measured)
    if not seeds:
        return Source(name, runs, measurements, measurements, {})
    by_stem: dict[str, list[Measurement]] = {}
    for stem, m in measured:
        by_stem.setdefault(stem, []).append(m)
    summary = summary_of(folder, [*runs.values()])
    finished, begun = finished_seeds(summary), [seed.name for seed in seeds]
    series = [
        _over_seeds(f"{name} {stem}" if len(by_stem) > 1 else name, group, finished, begun, notes)
        for stem, group in by_stem.items()
    ]
    return Source(name, runs, measurements, tuple(chain.from_iterable(series)), summary)


def _on_one_data_set(measured: list[tuple[str, Measurement]], notes: list[str]) -> list[tuple[str, Measurement]]:
    """The results in a folder whose accuracies are on the data of the training, or else on those of the first one: what
    is on other data does not compare, as where a network is tried on images of another kind, too. Those on the very
    images that were trained on come last."""
    data = measured_on(m for _, m in measured if has_accuracy(m.content))
    if len(set(data.values())) < 2:
        return measured
    own = {data[m.name] for _, m in measured if m.name in data and m.content.get("trained_on")}
    names = [name for name in data.values() if name not in own] or [*data.values()]
    trained_on = {data_name(m.run.data.get("name", "")) for _, m in measured if m.run}
    kept = next((name for name in names if name in trained_on), names[0])
    comparable = []
    for stem, m in measured:
        if (on := data.get(m.name, kept)) == kept:
            comparable.append((stem, m))
        else:
            again = quoted("tetdeploy", "report", *m.files)
            notes.append(f"{m.name} is left out: it is on {on}, not {kept}; by itself: {again}")
    return comparable


def _over_seeds(
    name: str, measured: Sequence[Measurement], finished: Sequence[str], begun: Sequence[str], notes: list[str]
) -> Sequence[Measurement]:
    """The mean of what was measured of one model of several seeds, of those that are finished; each by itself where the
    results do not compare."""
    labelled = [m for m in measured if has_accuracy(m.content)] or measured  # agreement alone has no part in a mean
    seeds = {m.run.folder.name: m for m in labelled if m.run is not None and m.run.folder.name in finished}
    why = {True: "has no result (export, then sweep)", False: "is unfinished, as far as its files say"}
    left_out = "".join(f"; {seed} {why[seed in finished]}" for seed in begun if seed not in seeds)
    contents = [m.content for m in seeds.values()]
    differing = {key for one, other in combinations(contents, 2) for key in _differing(one, other)}
    steps = [{row["T"] for row in content["rows"]} for content in contents]
    common = set[int]().union(*steps).intersection(*steps)
    if differing or not common:
        reason = f"their results differ in {', '.join(sorted(differing or {'T'}))}" if seeds else "none is finished"
        notes.append(f"{name}: the seeds stand each by itself, as {reason}{left_out}.")
        return measured
    if left_out:
        notes.append(f"{name}: its means are of {of_seeds(len(seeds), len(begun))}{left_out}.")
    if common != set.union(*steps):
        listed = ", ".join(map(str, sorted(common)))
        notes.append(f"{name}: its means are of the T at which each of the seeds was measured, {listed}.")
    return [Measurement(name, mean_of(contents), (), measured[0].run, tuple(seeds.values()), len(begun))]


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What keeps the results of two seeds out of one mean; what only one of them says is no difference."""
    own = [key for key in ("trained_T", "layout") if one.get(key) and other.get(key) and one[key] != other[key]]
    return [key for key in apart(one, other) if key != "model_sha256"] + own


def _measurement(name: str, contents: Mapping[Path, dict[str, Any]], run: Run | None, notes: list[str]) -> Measurement:
    outdated = {file: note for file, content in contents.items() if (note := stale(content, [file]))}
    current = {file: content for file, content in contents.items() if file not in outdated}
    content, used, left_out = merged(current or contents)  # what is of the model that is there now counts
    if current:
        notes += [f"Left out: {note}" for note in outdated.values()]
    notes += left_out
    if not current and (note := stale(content, used)):
        notes.append(note)
    return Measurement(name, content, tuple(used), run)


def _holds_anything(source: Source) -> bool:
    return bool(source.measurements) or any(run.metrics for run in source.runs.values())


def _why_empty(path: Path) -> str:
    lost = (path / CHECKPOINT_NAME).exists() and not (path / METRICS_NAME).exists()
    return f"the epochs' figures ({METRICS_NAME}) are gone" if lost else "no epoch is finished"


def _grouped(paths: Sequence[Path]) -> list[tuple[Path, ...]]:
    """Each run folder by itself, the result files of one model together."""
    if not paths:
        raise ValueError("nothing to report on: give run folders, or JSON files of tetdeploy sweep")
    groups: dict[tuple[Path, str], list[Path]] = {}
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; give a run folder or the JSON file of a sweep")
        whole = path.resolve()
        group = groups.setdefault((whole, "") if path.is_dir() else (whole.parent, model_stem(path)), [])
        if whole in [known.resolve() for known in group]:
            raise ValueError(f"{path} is named twice")
        group.append(path)
    return [tuple(group) for group in groups.values()]


def _labels(groups: Sequence[tuple[Path, ...]], names: Sequence[str]) -> list[str]:
    if len(names) > len(groups):
        raise ValueError(f"{len(names)} names for {len(groups)} results: {', '.join(names)}; give one --name for each")
    own = [group[0].resolve().name if group[0].is_dir() else model_stem(group[0]) for group in groups]
    twice = {name for name, count in Counter(own).items() if count > 1}
    unique = [
        f"{group[0].resolve().parent.name}/{name}" if name in twice else name
        for name, group in zip(own, groups, strict=True)
    ]
    if len(set(unique)) < len(unique):
        unique = [str(group[0]) for group in groups]
    labels = [*names, *unique[len(names) :]]
    if len(set(labels)) < len(labels) or not all(label.strip() for label in labels):
        raise ValueError(f"every result needs a name of its own, got {', '.join(map(repr, labels))}; see --name")
    return labels
