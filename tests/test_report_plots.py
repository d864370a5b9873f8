"""The report's plots: what is drawn are the numbers of the results, in the unit of the axis."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from report_helpers import EARLY_EXIT, MACHINE, epoch, result, run_folder, without_rendering, write

from tetdeploy.report.drawing import Style, draw, end_at, mark, short, whole_numbers, wide_enough
from tetdeploy.report.page import document_of
from tetdeploy.report.sources import read_results
from tetdeploy.report.writers import to_html

ENERGIES = [1.36, 2.72, 4.08]  # µJ at T = 1, 2, 3
ACCURACIES = [0.91, 0.92, 0.93]


@pytest.fixture
def painted(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    return without_rendering(monkeypatch)


def report(path: Path, **changes: Any) -> None:
    document_of(read_results([write(path / "a.json", result(**changes))]))


def lines(axes: Any) -> list[tuple[Any, Any]]:
    """x and y of every line, to be compared with approx."""
    return [(pytest.approx(list(line.get_xdata())), pytest.approx(list(line.get_ydata()))) for line in axes.lines]


def test_an_axis_ends_where_the_points_do() -> None:
    axes = Figure().add_subplot()
    axes.plot([1, 2], [0.2, 0.4])
    end_at(axes, 1.0)
    assert 0.4 < axes.get_ylim()[1] < 0.5


@pytest.mark.parametrize(
    ("accuracies", "num_images", "limits"),
    [
        ([94.9, 95.1], 359, (94, 96)),  # one image is 0.28 points
        ([94.999, 95.001], 50_000, (94.99, 95.01)),
        ([99.9, 100], 359, (98, 100)),
        ([0, 0.1], 359, (0, 2)),
        ([90, 95], 359, (90, 95)),
    ],
)
def test_an_axis_of_accuracies_spans_some_images(
    accuracies: list[float], num_images: int, limits: tuple[float, float]
) -> None:
    axes = Figure().add_subplot()
    axes.set_ylim(*accuracies)
    wide_enough(axes, num_images, 100)
    assert axes.get_ylim() == pytest.approx(limits)


def test_one_image_fills_no_axis_of_accuracies(tmp_path: Path, painted: dict[str, list[Any]]) -> None:
    rows = [row | {"accuracy": 0.9 + row["T"] / 359} for row in result()["rows"]]
    report(tmp_path, rows=rows, num_samples=359, early_exit=EARLY_EXIT)
    axes = [*painted["sections.accuracy"], *painted["sections.pareto"], painted["sections.early_exit"][1]]
    assert [one.get_ylim()[1] - one.get_ylim()[0] for one in axes] == pytest.approx([0.02] * 4)


@pytest.mark.parametrize(
    ("name", "shown"), [("x" * 24, "x" * 24), ("a" * 20 + "b" * 20, "aaaaaaaa…bbbbbbbbbbbbbbb"), ("m\udcff", "m?")]
)
def test_a_name_is_cut_in_its_middle(name: str, shown: str) -> None:
    assert short(name, 24) == shown


@pytest.mark.parametrize(
    ("differ", "shown"),
    [
        (("tet-T4", "sdt-T4"), ["cifar10-wid…tet", "cifar10-wid…sdt"]),
        (("seed-1", "seed-10"), ["cifar10-wid…1", "cifar10-wid…10"]),
        (("half-half", "half"), ["cifar10-wid…half-with", "cifar10-wid…with"]),
    ],
)
def test_a_legend_tells_long_names_apart(
    differ: tuple[str, str], shown: list[str], tmp_path: Path, painted: dict[str, list[Any]]
) -> None:
    names = tuple(f"cifar10-width-64-{part}-with-autoaugment-and-cutout" for part in differ)
    document_of(read_results([run_folder(tmp_path / name) for name in names]))
    plots = ["sections.accuracy", "sections.pareto", "sections.cost", "entry_plot", "sections.training"]
    for axes in (axes for plot in plots for axes in painted[plot]):
        assert [name for name in axes.get_legend_handles_labels()[1] if "cifar10" in name] == shown


def test_a_loss_that_all_runs_have_is_named_once(tmp_path: Path, painted: dict[str, list[Any]]) -> None:
    runs = [run_folder(tmp_path / name) for name in ("a", "b")]
    assert "each run&#39;s own (TET)." in to_html(document_of(read_results(runs)))
    (runs[1] / "metrics.jsonl").write_text(json.dumps(epoch(1, loss="sdt")))
    assert "each run&#39;s own (a: TET, b: SDT)." in to_html(document_of(read_results(runs)))


def test_28_models_look_different_without_lines_too_and_neighbours_in_all() -> None:
    styles = [Style.of(number) for number in range(28)]
    assert len({(style.colour, style.marker) for style in styles}) == 28
    for one, other in pairwise(styles):
        assert one.colour != other.colour and one.marker != other.marker and one.line != other.line


@pytest.mark.parametrize(("legend", "height"), [(True, 3.66), (False, 3.0)])
def test_a_legend_has_room_above_the_plot_or_is_left_out(
    legend: bool, height: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures, savefig = list[Figure](), Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k)))

    def paint(axes: Any) -> None:
        for number in range(3):
            axes.plot([1], [1], label=f"a model of a long name {number}")

    draw(paint, description="", caption="", height=3.0, legend=legend)
    assert (len(figures[0].legends), figures[0].get_figheight()) == (legend, pytest.approx(height))


def test_of_many_points_those_are_marked_whose_text_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    figures, savefig = list[Figure](), Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k)))

    def paint(axes: Any) -> None:
        for T in range(1, 65):
            axes.plot([T], [0.9], "o")
            mark(axes, f"T={T}", T, 0.9)

    shown = re.findall("T=[0-9]+", draw(paint, description="", caption="").svg)
    assert shown[0] == "T=1" and 5 < len(shown) < 20
    boxes = [text.get_window_extent() for text in figures[0].axes[0].texts]
    assert len(boxes) == len(shown) and not any(a.overlaps(b) for a, b in pairwise(boxes))


def test_a_single_T_has_no_ticks_between_whole_numbers() -> None:
    axes = Figure().add_subplot()
    axes.plot([4], [0.9])
    whole_numbers(axes.xaxis)
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [4]


def test_every_axis_says_what_it_is_and_in_which_unit(tmp_path: Path, painted: dict[str, list[Any]]) -> None:
    run = run_folder(tmp_path / "a")
    write(run / "m.early-exit.json", result(kind="early-exit", early_exit=EARLY_EXIT))
    document_of(read_results([run]))
    T, accuracy, energy = "time steps T", "accuracy (%)", "energy (µJ per image)"
    assert {name: [(one.get_xlabel(), one.get_ylabel()) for one in axes] for name, axes in painted.items()} == {
        "sections.accuracy": [(T, accuracy), (energy, accuracy)],
        "sections.pareto": [(energy, accuracy)],
        "sections.cost": [(T, energy), (T, "latency (ms per image)")],
        "sections.early_exit": [("time steps taken", "images (%)"), (energy, accuracy)],
        "entry_plot": [("spikes per neuron and step", ""), (energy, ""), (accuracy, "")],
        "sections.training": [("epoch", "loss"), ("epoch", accuracy), ("epoch", "learning rate")],
    }


def test_accuracy_by_steps_and_by_energy(tmp_path: Path, painted: dict[str, list[Any]]) -> None:
    report(tmp_path)
    steps, energy = painted["sections.accuracy"]
    assert lines(steps) == [([1, 2, 3], ACCURACIES), ([2], [0.92])]  # a ring round the T of the training
    twin, own = lines(energy)
    assert twin[0] == [6.8, 6.8]
    assert own == (ENERGIES, ACCURACIES)
    assert {text.get_text() for text in energy.texts} == {"ANN twin", "T=1", "T=2", "T=3"}


def test_energies_of_several_ann_twins_are_told_below_the_plot(tmp_path: Path, painted: dict[str, list[Any]]) -> None:
    ann = result()["ann"]
    of_precision = (("fp32", 6.8e6), ("int8", 0.5e6), ("step", 6.8e6))
    files = [
        write(tmp_path / f"{name}.json", result(model=f"runs/a/{name}.onnx", ann=ann | {"energy_pj": energy_pj}))
        for name, energy_pj in of_precision
    ]
    document = document_of(read_results(files, ("float", "bytes", "a very long name of a network in single steps")))
    axes = painted["sections.accuracy"][1]
    assert [text.get_text() for text in axes.texts].count("ANN twin") == 2
    told = "500 nJ of bytes; 6.8 µJ of float, a very long name of a network in single steps."
    assert f"Dotted lines are the energies of ANN twins, the same layers, dense, once: {told}" in to_html(document)


def test_no_accuracy_axis_goes_beyond_100_per_cent(tmp_path: Path, painted: dict[str, list[Any]]) -> None:
    rows = [row | {"accuracy": 0.985} for row in result()["rows"]]
    report(tmp_path, rows=rows)
    axes = [*painted["sections.accuracy"], *painted["sections.pareto"]]
    assert [one.get_ylim()[1] for one in axes] == [1.0] * 3
    assert not any(line.get_clip_on() for one in axes for line in one.lines)  # points at 100 % are drawn whole


def test_the_front_is_drawn_over_all_points(tmp_path: Path, painted: dict[str, list[Any]]) -> None:
    rows = result()["rows"]
    rows[2]["accuracy"] = 0.5
    report(tmp_path, rows=rows)
    (axes,) = painted["sections.pareto"]
    front, own, best = lines(axes)
    assert own == (ENERGIES, [0.91, 0.92, 0.5])
    for line in (front, best):
        assert line == (ENERGIES[:2], ACCURACIES[:2])
    assert [text.get_text() for text in axes.texts] == ["T=1", "T=2"]


def test_costs_by_steps(tmp_path: Path, painted: dict[str, list[Any]]) -> None:
    report(tmp_path)
    energy, latency = painted["sections.cost"]
    assert lines(energy) == [([1, 2, 3], ENERGIES)]
    assert lines(latency) == [([1, 2, 3], [0.5, 1.0, 1.5])]


def test_bars_of_layers_are_microjoules_and_those_of_classes_per_cent(
    tmp_path: Path, painted: dict[str, list[Any]]
) -> None:
    layers = result()["layers"]
    layers[0]["rows"][1]["energy_pj"] = 2e3
    report(tmp_path, layers=layers)
    _, energy, classes = ([bar.get_width() for bar in axes.patches] for axes in painted["entry_plot"])
    assert energy == pytest.approx([0.002, 1.92])
    assert classes == pytest.approx([92, 72])
    assert all(bottom > top for bottom, top in (axes.get_ylim() for axes in painted["entry_plot"]))  # the first on top


def test_several_models_stand_beside_each_other(tmp_path: Path, painted: dict[str, list[Any]]) -> None:
    early = {"kind": "early-exit", "early_exit": EARLY_EXIT, "machine": MACHINE}
    rows = [row | {"energy_pj": row["energy_pj"] / 4} for row in result()["rows"]]
    files = [
        write(tmp_path / "a.json", result(**early)),
        write(tmp_path / "b.json", result(**early, rows=rows, by_class=result()["by_class"][1:])),
    ]
    document_of(read_results(files))
    assert painted["sections.cost"][0].get_ylim() == (0, pytest.approx(1.08 * ENERGIES[-1]))
    quarter = [energy / 4 for energy in ENERGIES]
    points = [(ENERGIES, ACCURACIES), ([], []), (quarter, ACCURACIES), (quarter, ACCURACIES)]  # b beats a
    assert lines(painted["sections.pareto"][0])[1:] == points
    names = [axes.get_legend_handles_labels()[1] for plots in painted.values() for axes in plots]
    assert len(names) == 10 and all(name in (["a", "b"], ["Pareto front", "a", "b"]) for name in names)
    bars = painted["sections.early_exit"][0].patches
    assert [bar.get_x() + bar.get_width() / 2 for bar in bars[::3]] == pytest.approx([0.8, 1.2])
    assert lines(painted["entry_plot"][-1]) == [([92, 72], [-0.15, 0.85]), ([72], [1.15])]


def test_curves_are_those_of_their_key_and_change_between_epochs(tmp_path: Path, painted: dict[str, list[Any]]) -> None:
    metrics = [epoch(1, loss="sdt"), epoch(2, T=6, val_accuracy=0.9)]
    runs = [run_folder(tmp_path / "a", metrics=metrics), run_folder(tmp_path / "b")]
    document_of(read_results(runs[:1]))
    document_of(read_results(runs))
    names = [axes.get_legend_handles_labels()[1] for axes in painted["sections.training"]]
    assert names == [["training", "validation"]] * 2 + [["a"]] + [["a", "b"]] * 3
    loss, accuracy, rates, *_ = painted["sections.training"]
    assert lines(loss) == [([1.5, 1.5], [0, 1]), ([1, 2], [1.0, 0.5]), ([1, 2], [1.1, 0.55])]
    assert lines(accuracy)[1:] == [([1, 2], [0.8, 0.8]), ([1, 2], [0.85, 0.9])]
    assert lines(rates) == [([1, 2], [0.002, 0.001])]
    assert [text.get_text() for text in loss.texts] == ["T=6 TET"]


def test_curves_are_the_mean_of_the_seeds_and_the_band_their_range(
    tmp_path: Path, painted: dict[str, list[Any]]
) -> None:
    for seed, loss in ((0, 1.0), (1, 3.0)):
        run_folder(tmp_path / f"seed-{seed}", seed=seed, metrics=[epoch(1, val_loss=loss, train_loss=loss / 2)])
    write(tmp_path / "config.json", {"seeds": [0, 1]})
    document_of(read_results([tmp_path]))
    loss_axes, *_ = painted["sections.training"]
    assert [(line.get_linestyle(), line.get_ydata()[0]) for line in loss_axes.lines] == [("--", 1.0), ("-", 2.0)]
    (band,) = loss_axes.collections[0].get_paths()
    assert (band.get_extents().ymin, band.get_extents().ymax) == (1.0, 3.0)


def test_early_exit_by_steps_and_by_energy(tmp_path: Path, painted: dict[str, list[Any]]) -> None:
    report(tmp_path, kind="early-exit", early_exit=EARLY_EXIT, machine=MACHINE)
    steps, accuracy = painted["sections.early_exit"]
    assert [bar.get_height() for bar in steps.patches] == pytest.approx([0.6, 0.3, 0.1])
    assert lines(accuracy)[-1] == ([2.0], [0.9])  # the star, in µJ
    assert [text.get_text() for text in accuracy.texts] == ["T=1", "T=2", "T=3"]
