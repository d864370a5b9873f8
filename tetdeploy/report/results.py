"""What a report compares: each path it was given becomes a source, with a name, its runs and what was measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, combinations
from pathlib import Path
from statistics import stdev
from typing import Any

from tetdeploy.names import is_npz
from tetdeploy.picojoules import CONSTANTS
from tetdeploy.report.document import NONE
from tetdeploy.report.drawing import Style, told_apart
from tetdeploy.report.means import mean_of
from tetdeploy.report.merging import apart, has_accuracy, merged
from tetdeploy.report.reading import Run, model_stem, read_result, read_run, readable, result_files
from tetdeploy.report.seeds import finished_seeds, summary_of
from tetdeploy.report.staleness import stale
from tetdeploy.report.tables import images_of
from tetdeploy.report.timings import is_bench, read_benches
from tetdeploy.storage.run_folder import CHECKPOINT_NAME, METRICS_NAME, seed_runs
from tetdeploy.wording import counted, quoted


@dataclass(frozen=True)
class Measurement:
    """What was measured of one exported model.

    Attributes:
        name: of its series in plots and tables.
        content: as in the JSON.
        files: where that comes from.
        run: what it was trained in, if the report was given the run folder.
        seeds: what it is the mean of, if it is one; of it no files are known.
        begun: how many seeds there are.
    """

    name: str
    content: dict[str, Any]
    files: tuple[Path, ...]
    run: Run | None
    seeds: tuple[Measurement, ...] = ()
    begun: int = 0

    @property
    def counted_seeds(self) -> str:
        """Of how many seeds it is the mean: `2 of 3 seeds`."""
        return _of_seeds(len(self.seeds), self.begun) if self.seeds else NONE

    @property
    def heading(self) -> str:
        """The name; of a mean with the number of seeds."""
        return f"{self.name}, mean of {self.counted_seeds}" if self.seeds else self.name

    @property
    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.content["rows"]
        return rows

    @property
    def images(self) -> str:
        """`359 images of digits`."""
        return images_of(self.content["num_samples"], self.content["data"])

    @property
    def precision(self) -> str:
        """Of the model's layers: `fp32`, or `int8, fp32` of one with both; "" where that is not told."""
        found = {layer.get("precision") for layer in self.content.get("layers") or []}
        return ", ".join(sorted((precision for precision in found if precision), reverse=True))

    @property
    def ran_on(self) -> str:
        """What its latencies belong to: `cpu`, `cpu with openvino`."""
        device, runtime = self.content.get("device") or "cpu", self.content.get("runtime") or "onnxruntime"
        return str(device) if runtime == "onnxruntime" else f"{device} with {runtime}"

    @property
    def trained_T(self) -> int | None:
        known = self.content.get("trained_T") or (self.run.training.get("T") if self.run else None)
        return None if known is None else int(known)

    @cached_property
    def headline(self) -> dict[str, Any]:
        """The row at the T of the training, or else the one at the largest T."""
        return next((row for row in self.rows if row["T"] == self.trained_T), self.rows[-1])

    @property
    def T(self) -> int:
        """Of the headline."""
        return int(self.headline["T"])

    @property
    def ann_pj(self) -> float | None:
        """Energy of the ANN twin, in pJ an image."""
        found = (self.content.get("ann") or {}).get("energy_pj")
        return None if found is None else float(found)

    @property
    def float32_ann_pj(self) -> float | None:
        """As `ann_pj`, of the twin in float32, as which an ANN is trained: at this result's prices if its layers are
        in float32 as well, or else at the usual ones."""
        if self.precision == "fp32":
            return self.ann_pj
        mac_ops = (self.content.get("ann") or {}).get("mac_ops")
        return None if mac_ops is None else float(mac_ops) * CONSTANTS["fp32"].mac_pj

    def same_images(self, other: Measurement) -> bool:
        """Whether both were measured on the same images, by their hashes, if both have accuracies and had the images
        in one form, or else by number and name."""
        own, others = self.content, other.content
        alike = ["encoding", "input_dtype"]
        alike += [] if own.get("encoding") == "direct" else ["trained_T"]  # by which recordings are cut into frames
        hashes = [c.get("images_sha256") for c in (own, others) if has_accuracy(c)]
        if len(hashes) == 2 and all(hashes) and all(own.get(key) == others.get(key) for key in alike):
            return hashes[0] == hashes[1]
        return self.images == other.images

    def points(self, x: str, y: str) -> list[tuple[int, float, float]]:
        """T and two numbers of each row where both were measured."""
        pairs = [(row["T"], row.get(x), row.get(y)) for row in self.rows]
        return [(T, float(a), float(b)) for T, a, b in pairs if a is not None and b is not None]

    def std(self, T: int, key: str) -> float | None:
        """The standard deviation of a number over the seeds (over n - 1); None of fewer than two."""
        values = [row.get(key) for seed in self.seeds for row in seed.rows if row["T"] == T]
        known = [float(value) for value in values if value is not None]
        return stdev(known) if 1 < len(known) == len(self.seeds) else None

    def deviations(self, x: str, y: str) -> list[tuple[float, float]]:
        """The standard deviations of `points`, 0 where there are none."""
        return [(self.std(T, x) or 0.0, self.std(T, y) or 0.0) for T, *_ in self.points(x, y)]

    def by_entry(self, part: str, key: str) -> dict[str, float]:
        """A number of every entry of `layers`, `neurons` or `by_class` at the headline's T, by the entry's name."""
        entries = self.content.get(part) or []
        found = {entry["name"]: row.get(key) for entry in entries for row in entry["rows"] if row["T"] == self.T}
        return {name: float(value) for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Source:
    """One thing that a report was asked for.

    Attributes:
        runs: its trainings by name; several where it holds several seeds.
        measurements: of each model by itself.
        series: what plots and tables compare: the measurements, of several seeds their means.
        summary: of several seeds, see `summary_of`, else {}.
    """

    name: str
    runs: dict[str, Run]
    measurements: tuple[Measurement, ...]
    series: tuple[Measurement, ...]
    summary: dict[str, Any]

    @property
    def finished_seeds(self) -> str:
        """Over how many the summary's mean is: `3 seeds`, or `2 of 3 seeds` where one was interrupted."""
        return _of_seeds(self.summary["num_finished"], len(self.summary["runs"]))

    @property
    def run(self) -> Run | None:
        """The first of its runs."""
        return next(iter(self.runs.values()), None)


@dataclass(frozen=True)
class Results:
    """All of a report; `notes` say what a reader must know before comparing, `benches` are timings by name."""

    sources: tuple[Source, ...]
    notes: tuple[str, ...]
    benches: Mapping[str, dict[str, Any]]

    @property
    def measurements(self) -> list[Measurement]:
        return [m for source in self.sources for m in source.measurements]

    @property
    def series(self) -> list[Measurement]:
        return [m for source in self.sources for m in source.series]

    @property
    def fewest_images(self) -> int:
        """That any of the measurements is on."""
        return min(int(m.content["num_samples"]) for m in self.measurements)

    @property
    def trained(self) -> list[Source]:
        """The sources whose training is known."""
        return [source for source in self.sources if source.runs]

    @property
    def unmeasured(self) -> list[Source]:
        return [source for source in self.sources if not source.measurements]

    @cached_property
    def style_of(self) -> dict[str, Style]:
        """How every series is drawn, and every seed where it stands alone; a source as its first series."""
        series = {source.name: [m.name for m in source.series] or [source.name] for source in self.sources}
        names = [*(name for own in series.values() for name in own), *(m.name for m in self.measurements)]
        styles = {name: Style.of(k) for k, name in enumerate(dict.fromkeys(names))}
        return {source: styles[own[0]] for source, own in series.items()} | styles

    @cached_property
    def label_of(self) -> dict[str, str]:
        """What every series, seed and source is called in a legend."""
        return told_apart([*self.style_of])

    def twin_energy(self, run: Run) -> float | None:
        """The energy of an ANN run, in pJ an image in float32, if a spiking network of its very shape was measured."""
        found = (m.float32_ann_pj for m in self.measurements if m.run is not None and _shape(m.run) == _shape(run))
        return next((energy for energy in found if energy is not None), None) if run.network.get("ann") else None


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
        lost = all((path / CHECKPOINT_NAME).exists() and not (path / METRICS_NAME).exists() for path in empty)
        why = f"the epochs' figures ({METRICS_NAME}) are gone" if lost else "no epoch is finished"
        raise ValueError(
            f"nothing to report on in {', '.join(map(str, empty))}: {why} and nothing was measured; "
            f"train further (--resume), or export and run tetdeploy sweep{''.join(f'. {note}' for note in notes)}"
        )
    check_comparable(sources)
    folders = {label: run.folder for source in sources for label, run in source.runs.items()}
    benches = read_benches(folders, timings, notes)
    return Results(sources, tuple(notes + list(_cautions(sources))), benches)


def check_comparable(sources: Sequence[Source]) -> None:
    """Refuse to show results of different data side by side.

    Raises:
        ValueError: they are.
    """
    labelled = [m for source in sources for m in source.measurements if has_accuracy(m.content)]
    _refuse_different("measured on", _measured_on(labelled))
    if any(not source.measurements for source in sources):  # its validation images are all there is to compare by
        runs = {source.name: source.run.data for source in sources if source.run}
        trained = ((name, data.get("name", ""), data.get("fingerprint")) for name, data in runs.items())
        _refuse_different("trained on", _data_names(trained))


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
    data = _measured_on(m for _, m in measured if has_accuracy(m.content))
    if len(set(data.values())) < 2:
        return measured
    own = {data[m.name] for _, m in measured if m.name in data and m.content.get("trained_on")}
    names = [name for name in data.values() if name not in own] or [*data.values()]
    trained_on = {_data_name(m.run.data.get("name", "")) for _, m in measured if m.run}
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
        notes.append(f"{name}: its means are of {_of_seeds(len(seeds), len(begun))}{left_out}.")
    if common != set.union(*steps):
        listed = ", ".join(map(str, sorted(common)))
        notes.append(f"{name}: its means are of the T at which each of the seeds was measured, {listed}.")
    return [Measurement(name, mean_of(contents), (), measured[0].run, tuple(seeds.values()), len(begun))]


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What keeps the results of two seeds out of one mean; what only one of them says is no difference."""
    own = [key for key in ("trained_T", "layout") if one.get(key) and other.get(key) and one[key] != other[key]]
    return [key for key in apart(one, other) if key != "model_sha256"] + own


def means_caption(measured: Sequence[Measurement], *, bars: bool = True) -> str:
    """What is shown of several seeds: means, and in a plot with `bars` those where there are two seeds or more."""
    means = [f"{m.name}: {m.counted_seeds}" for m in measured if m.seeds]
    deviation = "; bars are their standard deviation" if bars and any(len(m.seeds) > 1 for m in measured) else ""
    return f" Means over seeds ({', '.join(means)}){deviation}." if means else ""


def _of_seeds(number: int, begun: int) -> str:
    """`3 seeds`, or `2 of 3 seeds`."""
    return counted(number, "seed") if number == begun else f"{number} of {begun} seeds"


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


def _cautions(sources: Sequence[Source]) -> Iterator[str]:
    """What sets results apart without making them incomparable."""
    measured = [m for source in sources for m in source.measurements]
    apart = [(a, b) for a, b in combinations(measured, 2) if not a.same_images(b)]
    if apart:
        hashes = [m.content.get("images_sha256") for m in measured]
        alike = any(a.images == b.images for a, b in apart)  # in number and name, so that only hashes tell them apart
        listed = ", ".join(
            f"{m.name}: {m.images}" + (f" with the SHA-256 {sha256[:12]}" if alike and sha256 else "")
            for m, sha256 in zip(measured, hashes, strict=True)
        )
        yield f"The models were measured on different images ({listed}): compare them with care."
    own = [m for m in measured if m.content.get("trained_on") and has_accuracy(m.content)]
    if own:
        listed = ", ".join(f"{m.name}: {m.images}" for m in own)
        yield (
            f"Measured on the file that was trained on, which has no test part ({listed}): accuracy on new images may "
            "be lower; tetdeploy sweep takes others with --data TEST.npz."
        )
    ran_on = {m.ran_on for m in measured}
    if len(ran_on) > 1:
        listed = ", ".join(sorted(ran_on))
        yield f"The models did not all run on the same device and runtime ({listed}): latencies do not compare."


def _refuse_different(what: str, data: Mapping[str, str]) -> None:
    if len(set(data.values())) > 1:
        listed = ", ".join(f"{name} on {where or 'unknown data'}" for name, where in data.items())
        raise ValueError(
            f"these results cannot be compared, they were {what} different data: {listed}; make a report for each"
        )


def _measured_on(measurements: Iterable[Measurement]) -> dict[str, str]:
    return _data_names((m.name, m.content["data"], m.content.get("images_sha256")) for m in measurements)


def _data_names(named: Iterable[tuple[str, str, str | None]]) -> dict[str, str]:
    """The data of each, by names, data and hashes; of the same images by another path, as hashes tell, the first's."""
    first: dict[str, str] = {}
    return {name: first.setdefault(sha256 or _data_name(data), _data_name(data)) for name, data, sha256 in named}


def _data_name(data: str) -> str:
    """Files of data may lie elsewhere on another machine: only their own name counts."""
    return Path(data).name if is_npz(data) else data


def _shape(run: Run) -> dict[str, Any]:
    """What decides the shapes of a network's parameters."""
    names = ("model", "num_classes", "in_channels", "image_size", "width")
    return {name: run.network.get(name) for name in names}


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
