"""What a report compares: sources, the models that were measured of each, and all of them together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import stdev
from typing import Any

from tetdeploy.picojoules import CONSTANTS
from tetdeploy.report.document import NONE
from tetdeploy.report.drawing import Style, told_apart
from tetdeploy.report.merging import has_accuracy
from tetdeploy.report.reading import Run
from tetdeploy.report.tables import images_of
from tetdeploy.wording import counted


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
        return of_seeds(len(self.seeds), self.begun) if self.seeds else NONE

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
        return of_seeds(self.summary["num_finished"], len(self.summary["runs"]))

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


def means_caption(measured: Sequence[Measurement], *, bars: bool = True) -> str:
    """What is shown of several seeds: means, and in a plot with `bars` those where there are two seeds or more."""
    means = [f"{m.name}: {m.counted_seeds}" for m in measured if m.seeds]
    deviation = "; bars are their standard deviation" if bars and any(len(m.seeds) > 1 for m in measured) else ""
    return f" Means over seeds ({', '.join(means)}){deviation}." if means else ""


def of_seeds(number: int, begun: int) -> str:
    """`3 seeds`, or `2 of 3 seeds`."""
    return counted(number, "seed") if number == begun else f"{number} of {begun} seeds"


def _shape(run: Run) -> dict[str, Any]:
    """What decides the shapes of a network's parameters."""
    names = ("model", "num_classes", "in_channels", "image_size", "width")
    return {name: run.network.get(name) for name in names}
