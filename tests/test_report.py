"""The report: what it shows of which results, that it is one safe page, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from command_helpers import printed, refused
from hypothesis import given
from hypothesis import strategies as st
from report_helpers import (
    COMPARED,
    EARLY_EXIT,
    Page,
    epoch,
    items,
    reached,
    result,
    run_folder,
    tables,
    without,
    without_rendering,
    write,
)

from tetdeploy import load
from tetdeploy.report.drawing import draw, energy_axis, mark
from tetdeploy.report.numbers import count, energy, milliseconds
from tetdeploy.report.page import document_of
from tetdeploy.report.reading import read_run
from tetdeploy.report.results import Results
from tetdeploy.report.sections.pareto import Point, pareto
from tetdeploy.report.sources import read_results
from tetdeploy.report.staleness import stale
from tetdeploy.report.writers import to_html, to_markdown
from tetdeploy.storage.files import sha256_of
from tetdeploy.train.state import Best


def page(*paths: Path, names: tuple[str, ...] = ()) -> Page:
    return Page(html(read_results(paths, names)))


def html(results: Results) -> str:
    return to_html(document_of(results))


def sections(results: Results) -> list[str]:
    return [section.title for section in document_of(results).sections]


ALL = [
    "At a glance",
    "Accuracy by time steps and energy",
    "Pareto front",
    "Cost by time steps",
    "Firing rate and energy by layer",
    "Agreement with PyTorch",
    "Accuracy by class",
    "Versions and hashes",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page with everything: two runs, one of them validated."""
    folder = tmp_path_factory.mktemp("whole")
    write(run_folder(folder / "a") / "m.validate.json", result())
    return html(read_results([folder / "a", run_folder(folder / "b", loss="sdt")]))


@pytest.fixture
def _unrendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what stands beside plots, which are painted still: to render those of a page takes half a second."""
    without_rendering(monkeypatch)


@pytest.mark.parametrize(
    ("energies", "scale"),
    [((1.0, 10.0, 20.0), "linear"), ((0.0, 10.0, 20.0), "linear"), ((1.0, 40.0, 400.0), "log")],
)
def test_a_points_text_lies_within_the_axes(energies: tuple[float, ...], scale: str) -> None:
    outside = []

    def paint(axes: Any) -> None:
        accuracies = (0.9, 0.95, 0.9)  # the lowest points, of which one is the rightmost
        axes.plot(energies, accuracies)
        for T, point in enumerate(zip(energies, accuracies, strict=True), start=1):
            mark(axes, f"T={T}", *point)
        energy_axis(axes, energies, "µJ")
        assert axes.get_xscale() == scale
        assert scale == "log" or axes.get_xlim() == (0, pytest.approx(22))
        axes.figure.draw_without_rendering()
        boxes = [text.get_window_extent() for text in axes.texts]
        outside.extend(box for box in boxes if not (axes.bbox.x1 >= box.x1 and axes.bbox.y0 <= box.y0))

    draw(paint, description="", caption="")
    assert not outside


class TestPage:
    def test_numbers_with_units_stand_in_the_page(self, whole: str) -> None:
        found = Page(whole).texts
        for text in ("92.00%", "200 images of digits", "2.72 µJ", "2.5 times less energy", "1 ms", "99.50%"):
            assert text in found, text
        assert "ab" * 32 in found
        assert "2026-01-02T03:04:05+00:00" in found

    def test_is_one_file_that_loads_nothing(self, whole: str) -> None:
        found = Page(whole)
        tags = {tag for tag, _ in found.tags}
        assert tags.isdisjoint({"script", "link", "img", "iframe", "object"})
        assert all(value.startswith("#") for name in ("href", "src", "xlink:href") for value in found.attributes(name))
        assert all(url.startswith("#") for url in re.findall(r"url\(([^)]*)\)", whole))
        assert "@import" not in whole

    def test_ids_are_unique_and_every_reference_has_one(self, whole: str) -> None:
        ids = Page(whole).attributes("id")
        assert len(ids) == len(set(ids))
        references = set(re.findall(r'(?:href="|url\()#([^")]*)', whole))
        assert references
        assert references <= set(ids)

    def test_plots_have_a_text_for_those_who_do_not_see_them(self, whole: str) -> None:
        found = Page(whole)
        plots = [attributes for tag, attributes in found.tags if tag == "svg"]
        assert len(plots) == 11
        assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in plots)
        assert all("width" not in attributes and attributes["viewbox"] for attributes in plots)
        assert sum(tag == "figcaption" for tag, _ in found.tags) >= len(plots)

    def test_names_in_the_contents_are_those_of_the_sections(self, whole: str) -> None:
        found = Page(whole)
        assert [f"#{section['id']}" for tag, section in found.tags if tag == "section"] == [
            link["href"] for tag, link in found.tags if tag == "a"
        ]

    def test_same_input_same_bytes(self, tmp_path: Path) -> None:
        file = write(tmp_path / "a.validate.json", result(layers=None, by_class=None))
        assert html(read_results([file])) == html(read_results([file]))

    def test_names_are_text_and_never_markup(self, tmp_path: Path) -> None:
        evil = "<script>alert(1)</script>"
        content = result(
            model=evil, device=evil, versions={evil: evil}, constants={"ac_pj": 1, "mac_pj": 2, "source": evil}
        )
        content["by_class"][0]["name"] = content["layers"][0]["name"] = content["neurons"][0]["name"] = evil
        content["layout"] = '"><img src=x onerror=alert(1)>'
        text = html(read_results([write(tmp_path / "a.validate.json", content)], [f'{evil} " $x$ & 火']))
        tags = {tag for tag, _ in Page(text).tags}
        assert tags.isdisjoint({"script", "img"})
        assert "&lt;script&gt;" in text
        assert "$x$ &amp; 火" in text  # no formula, and any script

    def test_markdown_has_the_tables_and_shows_names_as_they_are(self, tmp_path: Path) -> None:
        file = write(tmp_path / "a.validate.json", result())
        text = to_markdown(document_of(read_results([file], ["a|b <i> *c* [d](#e) $x^2$ ~"])))
        assert "| a\\|b \\<i\\> \\*c\\* \\[d\\](\\#e) \\$x\\^2\\$ \\~ |" in text
        assert "| **2 \\*** | **92.00%** |" in text
        lines = [line for line in text.splitlines() if line.startswith("|")]
        rules = [(before, after) for before, after in pairwise(lines) if "--" in after and set(after) <= set("|:- ")]
        assert len(rules) > 5
        for before, after in rules:
            assert len(re.findall(r"(?<!\\)\|", before)) == len(re.findall(r"\|", after))


@pytest.mark.usefixtures("_unrendered")
class TestSections:
    def test_all_of_a_validation(self, tmp_path: Path) -> None:
        assert sections(read_results([write(tmp_path / "a.json", result())])) == ALL

    @pytest.mark.parametrize(
        ("key", "section"),
        [("by_class", "Accuracy by class"), ("layers", None), ("neurons", None), ("ann", None), ("constants", None)],
    )
    def test_a_section_needs_its_numbers(self, tmp_path: Path, key: str, section: str | None) -> None:
        found = sections(read_results([write(tmp_path / "a.json", result(**{key: None}))]))
        assert found == [title for title in ALL if title != section]

    def test_neither_layers_nor_neurons(self, tmp_path: Path) -> None:
        found = sections(read_results([write(tmp_path / "a.json", result(layers=None, neurons=None))]))
        assert "Firing rate and energy by layer" not in found

    def test_an_old_sweep_shows_what_it_has(self, tmp_path: Path) -> None:
        keys = ("T", "accuracy", "firing_rate", "ac_ops", "mac_ops", "energy_pj", "energy_exact_pj", "latency_ms")
        rows = [{key: row[key] for key in keys} for row in result()["rows"]]
        old = {"model": "m.onnx", "data": "digits", "num_samples": 10, "rows": rows}
        results = read_results([write(tmp_path / "old.json", old)])
        assert results.measurements[0].T == 3  # the T of the training is not known
        assert sections(results) == [t for t in ALL if not t.startswith(("Firing", "Agreement", "Accuracy by class"))]

    def test_numbers_that_were_not_measured(self, tmp_path: Path) -> None:
        content = result(by_class=None)
        for row in content["rows"]:
            row |= {"accuracy": None, "energy_pj": None, "latency_ms": None}
        found = sections(read_results([write(tmp_path / "a.json", content)]))
        assert "Pareto front" not in found
        assert "Accuracy by time steps and energy" not in found
        assert "Agreement with PyTorch" in found
        assert "Pareto front" not in sections(read_results([write(tmp_path / "b.json", without(["energy_pj"]))]))

    def test_constants_of_each_precision_are_named(self, tmp_path: Path) -> None:
        def note_of(files: list[Path]) -> str:
            return document_of(read_results(files)).sections[1].blocks[-1].text  # type: ignore[union-attr]

        int8 = {"ac_pj": 0.03, "mac_pj": 0.23, "source": "8-bit integers"}
        files = [write(tmp_path / "a.json", result()), write(tmp_path / "b.json", result(constants=int8))]
        note = note_of(files)
        assert (
            "a: 0.9 pJ an addition (AC), 4.6 pJ a multiply-accumulate (MAC): Horowitz, ISSCC 2014; b: 0.03 pJ" in note
        )
        assert "estimated from counted operations, not measured" in note
        int8 |= {"source": "given: ac_pj 0.03", "by_layer": "mac_pj"}
        files = [files[0], write(tmp_path / "b.json", result(constants=int8))]
        assert "0.03 pJ an addition (AC), 0.23 pJ a multiply-accumulate (MAC; 4.6 pJ in layers of" in note_of(files)
        files = [files[1], write(tmp_path / "c.json", result(constants=None))]
        assert "; c: No constants are given. As in" in note_of(files)

    def test_the_precision_of_a_model_is_told(self, tmp_path: Path) -> None:
        """Its training has another one."""
        content = result()
        content["layers"][1]["precision"] = "int8"
        for name, whole, precision in (("a", content, "int8, fp32"), ("b", result(), "fp32")):
            results = read_results([write(tmp_path / f"{name}.json", whole)])
            assert ("precision of its layers", precision) in tables(results, "Versions and hashes")[-1].rows
            (card,) = items(results, "At a glance")[0].cards  # type: ignore[union-attr]
            assert dict(card.facts).get("precision of its layers") == (precision if name == "a" else None)

    def test_many_parts_per_million_are_written_out_as_in_the_terminal(self, tmp_path: Path) -> None:
        content = result()
        content["neurons"][1]["spike_mismatch_rate"] = 0.0123
        assert "12,300 ppm" in page(write(tmp_path / "a.json", content)).texts

    def test_gates(self, tmp_path: Path) -> None:
        gates = [
            {"key": "accuracy", "wanted": 0.95, "T": 2, "got": 0.92, "passed": False},
            {"key": "energy", "at_most": True, "unit": "pJ", "wanted": 3e6, "T": 2, "got": 2.72e6, "passed": True},
            {"key": "rest", "at_most": True, "unit": "pJ", "wanted": 5.0, "T": 2, "got": None, "passed": False},
            {"key": "flips", "at_most": True, "unit": "fraction", "wanted": 0.1, "T": 2, "got": 0.05, "passed": True},
        ]
        results = read_results([write(tmp_path / "a.json", result(gates=gates))])
        assert tables(results, "Gates")[0].rows == (
            ("a", "accuracy", "2", "at least 95.00%", "92.00%", "NO"),
            ("a", "energy", "2", "at most 3 µJ", "2.72 µJ", "yes"),
            ("a", "rest", "2", "at most 5 pJ", "–", "NO"),
            ("a", "flips", "2", "at most 10.00%", "5.00%", "yes"),
        )


@pytest.mark.usefixtures("_unrendered")
class TestTraining:
    def test_what_a_network_of_ones_own_decides_is_not_told(self, tmp_path: Path) -> None:
        neurons = {"tau": 0.5, "v_th": 1.0, "gamma": 1.0}
        models = {"own": "nets:mine", "built-in": "convsnn"}
        folders = [run_folder(tmp_path / name, network=neurons | {"model": models[name]}) for name in models]
        both, own = (to_markdown(document_of(read_results(given))) for given in (folders, folders[:1]))
        untold = {"τ, leak": "0.5", "threshold v": "1", "γ, half": "1", "width, factor": "1"}
        for label, value in untold.items():
            assert [f"| **–** | **{value}** |" in line for line in both.splitlines() if label in line] == [True]
        assert "nets:mine" in own and not any(label in own for label in untold)

    def test_settings_and_curves(self, tmp_path: Path) -> None:
        results = read_results([run_folder(tmp_path / "a", loss="sdt"), run_folder(tmp_path / "b", T=6)])
        document = document_of(results)
        assert [s.title for s in document.sections][:3] == [
            "At a glance",
            "What was trained, on what and how",
            "Training",
        ]
        (table,) = tables(results, "What was trained, on what and how")
        marked = {table.rows[k] for k in table.marked}
        assert marked == {("time steps T", "2", "6"), ("loss", "SDT", "TET")}

    def test_a_training_by_equation_7_alone_has_no_mse_term(self, tmp_path: Path) -> None:
        losses: dict[str, dict[str, Any]] = {
            "sdt": {"loss": "sdt"},
            "tet": {"loss": "tet"},
            "both": {"loss": "sdt", "switch_to_tet": 1},
        }
        folders = [run_folder(tmp_path / name, lam=0.05, phi=1.0, **loss) for name, loss in losses.items()]
        (table,) = tables(read_results(folders), "What was trained, on what and how")
        terms = ("λ, weight of the MSE term (Eq. 13)", "φ, target of the MSE term (Eq. 12)")
        assert [row for row in table.rows if "MSE" in row[0]] == [
            (terms[0], "–", "0.05", "0.05"),
            (terms[1], "–", "1", "1"),
        ]
        assert "MSE" not in page(folders[0]).text

    def test_the_weights_that_a_run_began_with_are_named(self, tmp_path: Path) -> None:
        parent = {"path": "runs/old", "checkpoint_sha256": "ab" * 32}
        folders = [run_folder(tmp_path / "a", kept=1), run_folder(tmp_path / "b", kept=1, init=parent)]
        both, first = (to_markdown(document_of(read_results(given))) for given in (folders, folders[:1]))
        assert "| **began with** | **–** | **runs/old, checkpoint abababababab** |" in both
        assert "began with" not in first

    def test_fine_tuning_in_8_bits_is_told(self, tmp_path: Path) -> None:
        folders = [run_folder(tmp_path / "a", kept=1), run_folder(tmp_path / "b", kept=1, qat=True)]
        both, first = (to_markdown(document_of(read_results(given))) for given in (folders, folders[:1]))
        assert "| **fine-tuned in 8 bits (--qat)** | **–** | **yes** |" in both
        assert "8 bits" not in first

    def test_changes_of_T_and_of_the_loss_are_marked(self, tmp_path: Path) -> None:
        metrics = [epoch(1, loss="sdt"), epoch(2), epoch(3, T=6, stage=2), epoch(4, T=6, stage=3)]
        text = page(run_folder(tmp_path / "a", metrics=metrics)).text
        assert "a goes on with TET after epoch 1; a goes on with T=6 after epoch 2; a goes on with stage 3" in text

    def test_a_run_without_its_checkpoint_has_the_epoch_that_training_keeps(self, tmp_path: Path) -> None:
        run = run_folder(tmp_path / "a", metrics=[epoch(1, val_accuracy=0.9), epoch(2)])
        text = to_markdown(document_of(read_results([run])))
        assert "| validation accuracy at T=2 | 90.00% |" in text
        assert "| a | 2 of 2 | 1 | 90.00% |" in text
        assert "Of a, whose checkpoint is not here, it is the one that training keeps by these numbers." in text
        assert "| checkpoint | not here |" in text
        kept = to_markdown(document_of(read_results([run_folder(tmp_path / "b", kept=2)])))
        assert "not here" not in kept and "| b | 2 of 2 | 2 |" in kept

    @pytest.mark.parametrize(
        ("changes", "training", "kept"),
        [
            ([(0.7, 1.0, 2.0, 1), (0.8, 1.0, 2.0, 1), (0.75, 0.5, 0.5, 1)], {}, 2),
            (
                [(0.8, 1.0, 2.0, 1), (0.8, 0.9, 3.0, 1), (0.8, 0.9, 1.0, 1)],
                {},
                2,
            ),  # the lower loss, then the first
            ([(0.8, 1.0, 2.0, 1), (0.8, 0.9, 3.0, 1)], {"loss": "sdt", "switch_to_tet": 1}, 1),  # by L_TET
            ([(0.9, 1.0, 2.0, 1), (0.8, 1.0, 2.0, 2), (0.7, 1.0, 2.0, 2)], {}, 2),  # the last stage
            ([(None, None, None, 1), (None, None, None, 1)], {}, 2),  # without validation images
        ],
    )
    def test_the_epoch_that_training_keeps(
        self, tmp_path: Path, changes: list[tuple[Any, ...]], training: dict[str, Any], kept: int
    ) -> None:
        keys = ("val_accuracy", "val_loss", "val_tet_loss", "stage")
        metrics = [epoch(k, **dict(zip(keys, values, strict=True))) for k, values in enumerate(changes, start=1)]
        best = read_run(run_folder(tmp_path / "a", metrics=metrics, **training)).best
        assert best is not None and best["epoch"] == kept
        chosen: Best | None = None  # as the training itself goes about it
        for record in metrics:
            loss = record["val_tet_loss" if training else "val_loss"]
            this = Best(record["epoch"], record["val_accuracy"], loss, record["stage"])
            chosen = this if chosen is None or chosen.is_beaten_by(this) else chosen
        assert chosen is not None and chosen.epoch == kept

    def test_a_restarted_run_keeps_one_of_its_own_epochs(self, tmp_path: Path) -> None:
        run = run_folder(tmp_path / "a", metrics=[epoch(1, val_accuracy=0.9), epoch(2, val_accuracy=0.8)])
        config = json.loads((run / "config.json").read_text())
        for number, kept in ((0, 1), (1, 2), (2, None)):
            write(run / "config.json", config | {"restarted": {"epoch": number, "step": 3, "provenance": {}}})
            best = read_run(run).best
            assert (best and best["epoch"]) == kept
            told = to_markdown(document_of(read_results([run])))
            assert f"| restarted, by --restart-from, after epoch | {number} |" in told
        write(run / "config.json", config | {"restarted": {"epoch": "one"}})
        with pytest.raises(ValueError, match=r"config.json is damaged: restarted.epoch must be a"):
            read_run(run)

    def test_several_seeds(self, tmp_path: Path) -> None:
        for seed in (0, 1):
            run_folder(tmp_path / "a" / f"seed-{seed}", seed=seed, metrics=reached(0.8 + seed / 10))
        write(tmp_path / "a" / "config.json", {"seeds": [0, 1]})
        text = page(tmp_path / "a").text
        assert "85.00% ± 7.07%" in text
        assert "the band goes from the lowest to the highest" in text
        assert "0, 1" in text.splitlines()  # the seeds

    def test_of_several_seeds_those_not_begun_are_told_and_what_their_metrics_lack(self, tmp_path: Path) -> None:
        run_folder(tmp_path / "a" / "seed-0", seed=0, metrics=reached(0.8))
        for seed in (1, 2):  # the line of the epoch that was kept is missing
            run_folder(tmp_path / "a" / f"seed-{seed}", seed=seed, kept=1, metrics=[epoch(2, val_accuracy=0.5)])
        write(tmp_path / "a" / "config.json", {"seeds": [0, 1, 2, 3]})
        told = {"seed": 1, "interrupted": False, "best_epoch": 1, "val_accuracy": 0.6}
        write(tmp_path / "a" / "summary.json", {"runs": [told]})
        (table,) = tables(read_results([tmp_path / "a"]), "Seeds")
        wanted = [("0", "2", "80.00%"), ("1", "1", "60.00%"), ("2", "–", "–")]
        wanted += [("3, not begun, not in the mean", "–", "–")]
        assert [*table.rows] == [*wanted, ("mean ± standard deviation", "", "70.00% ± 14.14%")]
        assert "of 2 of 4 seeds" in table.caption

    def test_of_several_seeds_an_interrupted_one_is_not_in_the_mean(self, tmp_path: Path) -> None:
        for seed in (0, 1, 2):
            metrics = reached(0.8 + seed / 10)[: 1 if seed == 2 else None]
            run_folder(tmp_path / "a" / f"seed-{seed}", seed=seed, metrics=metrics)
        results = read_results([tmp_path / "a"])
        document = document_of(results)
        assert "validation accuracy, 2 of 3 seeds" in Page(to_html(document)).texts
        (table,) = tables(results, "Seeds")
        assert [row[0] for row in table.rows[:3]] == ["0", "1", "2, unfinished, not in the mean"]
        assert "Mean and deviation are of 2 of 3 seeds" in table.caption
        assert "| **mean ± standard deviation** |  | **85.00% ± 7.07%** |" in to_markdown(document)
        for seed in (0, 1):
            (tmp_path / "a" / f"seed-{seed}" / "config.json").unlink()
        (table,) = tables(read_results([tmp_path / "a"]), "Seeds")
        assert len(table.rows) == 1 and "Mean" not in table.caption

    def test_of_a_seed_that_was_resumed_by_itself_its_own_numbers_count(self, tmp_path: Path) -> None:
        """summary.json has what it had reached before, and nothing of one that was killed."""
        for seed in range(3):
            run_folder(tmp_path / "a" / f"seed-{seed}", seed=seed, metrics=reached(0.7 + seed / 10))
        told = [{"seed": seed, "interrupted": seed == 1, "best_epoch": 1, "val_accuracy": 0.6} for seed in (0, 1)]
        write(tmp_path / "a" / "summary.json", {"runs": told, "mean_val_accuracy": 0.7, "num_finished": 1})
        (table,) = tables(read_results([tmp_path / "a"]), "Seeds")
        wanted = [(str(seed), "2", f"{70 + 10 * seed}.00%") for seed in range(3)]
        assert [*table.rows] == [*wanted, ("mean ± standard deviation", "", "80.00% ± 10.00%")]
        (tmp_path / "a" / "seed-0" / "metrics.jsonl").unlink()  # then summary.json is all that tells of it
        results = read_results([tmp_path / "a"])
        assert results.sources[0].summary["runs"][0] == told[0] | {"run": "seed-0"}
        assert results.sources[0].finished_seeds == "3 seeds"

    def test_no_validation_images(self, tmp_path: Path) -> None:
        nothing = {"val_loss": None, "val_accuracy": None}
        run = run_folder(tmp_path / "a", metrics=[epoch(1, **nothing), epoch(2, train_loss=float("nan"), **nothing)])
        assert "Training" in sections(read_results([run]))

    def test_energy_of_a_trained_ann_is_its_twins(self, tmp_path: Path) -> None:
        snn, ann = run_folder(tmp_path / "snn"), run_folder(tmp_path / "ann", ann=True)
        write(snn / "m.sweep.json", result(kind="sweep"))
        results = read_results([snn, ann])
        assert results.twin_energy(results.sources[1].run) == 6.8e6  # type: ignore[arg-type]
        assert "6.8 µJ in float32" in Page(html(results)).texts
        int8 = result(kind="sweep", ann={"mac_ops": 1e6, "energy_pj": 3e5})
        int8["layers"][1]["precision"] = "int8"
        for content in (int8, int8 | {"layers": []}):  # and of a precision that is not known
            write(snn / "m.sweep.json", content)
            results = read_results([snn, ann])
            assert results.twin_energy(results.sources[1].run) == 4.6e6  # type: ignore[arg-type]
        write(snn / "m.sweep.json", int8 | {"ann": None})
        assert read_results([snn, ann]).twin_energy(read_run(ann)) is None
        write(snn / "n.sweep.json", result(kind="sweep"))
        assert read_results([snn, ann]).twin_energy(read_run(ann)) == 6.8e6


@pytest.mark.usefixtures("_unrendered")
class TestReading:
    def test_sweep_fills_in_what_a_validation_lacks(self, tmp_path: Path) -> None:
        run = run_folder(tmp_path / "a")
        write(run / "m.validate.json", without(["latency_ms"]))
        write(run / "m.sweep.json", result(kind="sweep", extra="kept"))
        (measurement,) = read_results([run]).measurements
        assert [row["latency_ms"] for row in measurement.rows] == [0.5, 1.0, 1.5]
        assert measurement.content["kind"] == "validate"
        assert measurement.content["extra"] == "kept"
        assert measurement.name == "a"

    def test_steps_that_a_validation_did_not_measure_are_the_sweeps(self, tmp_path: Path) -> None:
        run, validation = run_folder(tmp_path / "a"), result(by_class=None)
        validation["rows"] = [row | {"accuracy": 0.5} for row in validation["rows"] if row["T"] == 2]
        for key in ("layers", "neurons"):
            for entry in validation[key]:
                entry["rows"] = [row | {"firing_rate": 0.5} for row in entry["rows"] if row["T"] == 2]
        write(run / "m.validate.json", validation)
        write(run / "m.sweep.json", result(kind="sweep"))
        (m,) = read_results([run]).measurements
        whole = result()
        assert [row["accuracy"] for row in m.rows] == [whole["rows"][0]["accuracy"], 0.5, whole["rows"][2]["accuracy"]]
        for key in ("layers", "neurons", "by_class"):
            assert [entry["name"] for entry in m.content[key]] == [entry["name"] for entry in whole[key]]
            assert all([row["T"] for row in entry["rows"]] == [1, 2, 3] for entry in m.content[key])
            assert all(entry["rows"][1]["firing_rate"] == 0.5 for entry in m.content[key] if key != "by_class")

    def test_steps_of_two_results_stand_in_their_order(self, tmp_path: Path) -> None:
        run, rows = run_folder(tmp_path / "a"), result()["rows"]
        write(run / "m.validate.json", result(rows=rows[:1], by_class=None))
        write(run / "m.sweep.json", result(kind="sweep", rows=rows[1:], by_class=None))
        assert [row["T"] for row in read_results([run]).measurements[0].rows] == [1, 2, 3]

    def test_the_T_of_the_training_is_the_results_before_the_runs(self, tmp_path: Path) -> None:
        run = run_folder(tmp_path / "a", T=1)  # trained anew since
        for trained_T, T in ((2, 2), (None, 1)):
            write(run / "m.sweep.json", result(kind="sweep", trained_T=trained_T))
            assert read_results([run]).measurements[0].T == T

    def test_numbers_just_below_a_unit(self) -> None:
        assert [count(n) for n in (0, 0.5, 999.4, 999.7, 12_345, 999_400, 999_700, 1.234e12)] == [
            *("0", "0.5", "999", "1 k", "12.3 k", "999 k", "1 M", "1,234 G"),
        ]
        assert [energy(e) for e in (999.6, 999.6e9)] == ["1 nJ", "1,000 mJ"]
        deviations = {(1.2, 0.0567): "1.20 ± 0.06", (0.01234, 0.01): "0.0123 ± 0.0100", (98.98, 0.426): "99.0 ± 0.4"}
        deviations |= {
            (99.94, 1.26): "99.9 ± 1.3",
            (99.96, 0.426): "100.0 ± 0.4",
            (336.0, 0.0): "336 ± 0",
            (1234.0, 1100.4): "1,234 ± 1,100",
            (0.0, 0.0): "0.00 ± 0.00",
            (1.23e-5, 0.5): "0.000 ± 0.500",
            (1.2, 1100.4): "1 ± 1,100",
        }
        for (mean, std), wanted in deviations.items():
            assert milliseconds(mean, std) == f"{wanted} ms"
        assert energy(1.2e6, 56_700.0) == "1.20 ± 0.06 µJ" and count(12.3, 0.426) == "12.3 ± 0.4"
        times = {0.1234: "0.123 ms", 99.94: "99.9 ms", 99.96: "100 ms", 1234.0: "1,234 ms", None: "–"}
        assert {t: milliseconds(t) for t in times} == times

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("model_sha256", "cd"),
            ("num_samples", 3),
            ("data", "other"),
            ("images_sha256", "cd"),
            ("constants", {"ac_pj": 0.03, "mac_pj": 0.23, "source": "given"}),
            ("device", "cuda"),
            ("runtime", "openvino"),
        ],
    )
    def test_of_another_model_or_data_it_is_left_out_and_said(self, tmp_path: Path, key: str, value: Any) -> None:
        run = run_folder(tmp_path / "a")
        own: dict[str, Any] = {"images_sha256": None if key == "data" else "ab", "runtime": "onnxruntime"}
        write(run / "m.validate.json", without(COMPARED, **own))
        write(run / "m.sweep.json", without(COMPARED, kind="sweep", **own | {key: value}))
        results = read_results([run])
        assert results.measurements[0].content[key] == result(**own)[key]
        assert f"m.sweep.json is left out: it and m.validate.json differ in {key}." in results.notes[0]
        assert results.notes[0] in Page(html(results)).text

    def test_more_images_lead_and_take_the_agreement_of_fewer(self, tmp_path: Path) -> None:
        run = run_folder(tmp_path / "a")
        few = result(images_sha256="ab", num_samples=64)
        for row in few["rows"]:
            row["accuracy"] = 0.5
        write(run / "m.validate.json", few)
        write(run / "m.early-exit.json", result(kind="early-exit", images_sha256="cd", num_samples=20_000))
        sweep = without(COMPARED, kind="sweep", images_sha256="cd", num_samples=10_000)
        write(run / "m.sweep.json", sweep)
        results = read_results([run])
        (m,) = results.measurements
        assert [note for note in results.notes if "early-exit.json" not in note] == []
        assert (m.content["num_samples"], m.content["agreement"]["num_images"]) == (10_000, 64)
        assert [row["accuracy"] for row in m.rows] == [row["accuracy"] for row in sweep["rows"]]
        assert m.headline["top1_agreement"] == few["rows"][m.T - 1]["top1_agreement"]

    @pytest.mark.parametrize("other", [{"model_sha256": "cd"}, {"data": "other"}], ids=str)
    def test_more_images_of_another_model_or_data_do_not_lead(self, tmp_path: Path, other: dict[str, str]) -> None:
        run = run_folder(tmp_path / "a")
        write(run / "m.validate.json", result(num_samples=64))
        write(run / "m.sweep.json", result(kind="sweep", num_samples=10_000, **other))
        (m,) = read_results([run]).measurements
        assert (m.content["kind"], m.content["num_samples"]) == ("validate", 64)

    def test_what_an_older_file_does_not_say_is_no_difference(self, tmp_path: Path) -> None:
        run = run_folder(tmp_path / "a")
        write(run / "m.validate.json", result(images_sha256="ab", runtime="openvino", device="cuda", model_sha256=None))
        write(run / "m.sweep.json", result(kind="sweep", device=None, constants=None))
        assert read_results([run]).notes == ()

    def test_a_result_without_latencies_may_be_of_another_device(self, tmp_path: Path) -> None:
        on = {"cpu": "c", "cores": 2, "gpu": "H100", "provider": "CUDA"}
        untimed = without(
            ["latency_ms", *COMPARED], kind="early-exit", device="cuda", early_exit=EARLY_EXIT, machine=on
        )
        run = run_folder(tmp_path / "a")
        write(run / "m.early-exit.json", untimed)
        write(run / "m.sweep.json", result(kind="sweep"))
        results = read_results([run])
        assert results.notes == () and results.measurements[0].content["device"] == "cpu"
        assert any("Timed on c, 2 cores, H100, CUDA." in table.caption for table in tables(results, "Early exit"))

    @pytest.mark.parametrize("other", [{"device": "cuda"}, {"model_sha256": "cd" * 32}], ids=str)
    def test_agreement_of_another_device_or_model_is_left_out(self, tmp_path: Path, other: dict[str, str]) -> None:
        run = run_folder(tmp_path / "a")
        write(run / "m.validate.json", without(["accuracy"], data="reference images", **other))
        for kind, lacking in (("early-exit", ["latency_ms", *COMPARED]), ("sweep", COMPARED)):
            write(run / f"m.{kind}.json", without(lacking, kind=kind))
            told = f"m.validate.json is left out: it and m.{kind}.json differ in data, {next(iter(other))}."
            assert [told in note for note in read_results([run]).notes] == [True]

    def test_a_result_of_another_model_than_lies_beside_it_is_told(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = run_folder(tmp_path / "a")
        model = run / "model-T3.onnx"
        model.write_bytes(b"a new export")
        file = run / "model-T3.sweep.json"
        for path, measured in ((run, "runs/a/model-T3.onnx"), (file, r"D:\runs\model-T3.onnx")):
            write(file, result(kind="sweep", model=measured))
            (note,) = read_results([path]).notes
            assert f"{file} is of another model (abababababab) than {model} is now" in note
            assert note.endswith(f"measure again: tetdeploy sweep {shlex.quote(str(model))} --data digits")
        write(file, result(kind="sweep", model_sha256=sha256_of(model)))
        monkeypatch.setattr("tetdeploy.report.staleness.json_object", None)  # for the note alone
        assert read_results([run]).notes == ()

    def test_results_of_the_model_that_is_there_come_before_those_of_another(self, tmp_path: Path) -> None:
        run = run_folder(tmp_path / "a")
        model = run / "model-T3.onnx"
        model.write_bytes(b"a new export")
        kept = without(["accuracy"], data="reference images", model=str(model), model_sha256=sha256_of(model))
        write(run / "model-T3.validate.json", kept)
        old = write(run / "model-T3.sweep.json", result(kind="sweep", model=str(model)))
        results = read_results([run])
        assert [m.files for m in results.measurements] == [(run / "model-T3.validate.json",)]
        (note,) = results.notes
        assert note.startswith(f"Left out: {old} is of another model") and "measure again: tetdeploy sweep " in note

    def test_a_result_of_another_checkpoint_than_the_runs_is_told(self, tmp_path: Path) -> None:
        run = run_folder(tmp_path / "a")
        checkpoint = run / "checkpoint.safetensors"
        checkpoint.write_bytes(b"of a later epoch")
        kept = without(["accuracy"], data="reference images", checkpoint_sha256="cd" * 32)
        file = write(run / "model-T3.validate.json", kept)
        (note,) = read_results([file]).notes
        assert f"{file} is of another checkpoint (cdcdcdcdcdcd) than that of {run}" in note
        model = run / "model-T3.onnx"
        how = f"export {model} once more, with the options that it had"
        assert note.endswith(f"; {how}, then measure again: tetdeploy validate {shlex.quote(str(model))}")
        assert note in page(file).text
        for same in (sha256_of(checkpoint), None):
            write(file, kept | {"checkpoint_sha256": same})
            assert read_results([file]).notes == ()

    def test_what_was_validated_beside_pytorch_is_so_again(self, tmp_path: Path) -> None:
        run = run_folder(tmp_path / "a", kept=1)
        (run / "model-T3.onnx").write_bytes(b"a new export")
        file = write(run / "model-T3.validate.json", result(agreement={"with": "checkpoint", "num_images": 200}))
        (note,) = read_results([run]).notes
        assert note.endswith(f": tetdeploy validate {run / 'model-T3.onnx'} --data digits --against {run}")
        (run / "checkpoint.safetensors").unlink()
        (note,) = read_results([file]).notes
        assert note.endswith("--data digits")

    def test_each_of_several_results_of_another_checkpoint_is_measured_anew(self, tmp_path: Path) -> None:
        run = tmp_path / "a run"
        write(run / "checkpoint.safetensors", "of a later epoch")
        other = {"checkpoint_sha256": "cd" * 32, "model": "m.onnx"}
        swept = write(run / "m.sweep.json", result(kind="sweep", device=None, runtime="openvino", **other))
        exited = write(run / "m.early-exit.json", result(kind="early-exit", device="tensorrt", **other))
        note = stale(result(**other), [exited, swept])
        assert note is not None and note.startswith(f"{exited} and {swept} are of another checkpoint")
        model = f"'{run}/m.onnx'"
        assert note.endswith(
            f"then measure again: tetdeploy calibrate {model} --device tensorrt, "
            f"then tetdeploy early-exit {model} --data digits --device tensorrt, "
            f"then tetdeploy sweep {model} --data digits --runtime openvino"
        )

    def test_several_models_of_a_run_have_names_of_their_own(self, tmp_path: Path) -> None:
        run = run_folder(tmp_path / "a")
        write(run / "m-T6-int8.sweep.json", result())
        write(run / "m-T6.sweep.json", result())
        assert [m.name for m in read_results([run]).measurements] == ["a m-T6", "a m-T6-int8"]

    def test_classes_follow_their_rows_whatever_the_order(self, tmp_path: Path) -> None:
        content = result()
        content["rows"].reverse()
        (m,) = read_results([write(tmp_path / "a.json", content)]).measurements
        assert [row["T"] for row in m.rows] == [1, 2, 3]
        rows = m.content["by_class"][0]["rows"]
        assert {row["T"]: row["accuracy"] for row in rows} == {3: 0.91, 2: 0.92, 1: 0.93}

    def test_names(self, tmp_path: Path) -> None:
        files = [write(tmp_path / folder / "m.sweep.json", result()) for folder in ("a", "b")]
        assert [s.name for s in read_results(files).sources] == ["a/m", "b/m"]
        assert [s.name for s in read_results(files, ["SDT"]).sources] == ["SDT", "b/m"]
        files = [write(tmp_path / folder / "a" / "m.sweep.json", result()) for folder in ("x", "y")]
        assert [s.name for s in read_results(files).sources] == [*map(str, files)]

    def test_agreement_on_reference_images_joins_the_accuracy_of_a_sweep(self, tmp_path: Path) -> None:
        run = run_folder(tmp_path / "a")
        kept = result(data="reference images", num_samples=64, by_class=None, agreement={"with": "reference"})
        for row in kept["rows"]:
            row |= {"accuracy": None, "energy_pj": 1.0, "top1_agreement": 0.75, "spike_count_error": 8e-6}
            row["local_mismatch_rate"] = 7e-6
        kept["neurons"][0] |= {"spike_mismatch_rate": 5e-6, "margin": {"local": {"max": 0.25}}}
        write(run / "m.validate.json", kept)
        write(run / "m.sweep.json", without(COMPARED, kind="sweep"))
        results = read_results([run])
        (m,) = results.measurements
        assert results.notes == ()
        assert [row["accuracy"] for row in m.rows] == [0.91, 0.92, 0.93]
        assert (m.headline["energy_pj"], m.headline["top1_agreement"]) == (2.72e6, 0.75)
        assert m.content["agreement"] == {"with": "reference", "num_images": 64, "data": "reference images"}
        found = Page(html(results)).texts
        assert {"75.00%", "8 ppm", "5 ppm", "7 ppm", "2.5e-01"} <= set(found)
        assert "a: the exported model against PyTorch on the 64 images that its export kept." in found
        assert any(
            text.endswith("Spike counts: of each layer and step; at least as many spikes differ.") for text in found
        )

    def test_agreement_alone_is_compared_with_any_data(self, tmp_path: Path) -> None:
        files = [
            write(tmp_path / "a.json", without(["accuracy"], data="reference images")),
            write(tmp_path / "b.json", result()),
        ]
        results = read_results(files)
        assert "different images (a: 200 reference images, b: 200 images of digits)" in results.notes[0]

    def test_different_numbers_of_images_are_said(self, tmp_path: Path) -> None:
        files = [write(tmp_path / f"{n}.json", result(num_samples=n)) for n in (100, 200)]
        assert "different images (100: 100 images of digits, 200: 200 images of digits)" in read_results(files).notes[0]

    @pytest.mark.parametrize(
        ("other", "on"), [({"device": "cuda"}, "cuda"), ({"runtime": "openvino"}, "cpu with openvino")], ids=str
    )
    def test_different_devices_and_runtimes_are_said(self, tmp_path: Path, other: dict[str, str], on: str) -> None:
        files = [write(tmp_path / "a.json", result(device=None)), write(tmp_path / "b.json", result(**other))]
        results = read_results(files)
        assert results.notes == (
            f"The models did not all run on the same device and runtime (cpu, {on}): latencies do not compare.",
        )
        assert f"Median time of one image at a time, on cpu, {on}." in repr(document_of(results))
        always = "An unrolled graph always runs all of its steps, so that its latency is the same for every T (a, b)."
        assert always in " ".join(Page(html(results)).texts)

    def test_a_data_file_counts_by_its_name(self, tmp_path: Path) -> None:
        files = [write(tmp_path / f"{n}.json", result(data=f"{n}/test.npz")) for n in ("x", "y")]
        assert len(read_results(files).measurements) == 2

    @pytest.mark.parametrize(
        ("changes", "same"),
        [
            ({}, False),
            ({"trained_T": 4}, False),
            ({"encoding": "frames"}, True),  # a hash says nothing of images in another form
            ({"input_dtype": "float32"}, True),
            ({"images_sha256": "ab" * 32}, True),
            ({"images_sha256": None}, True),
            ({"rows": [{"T": 2, "accuracy": None}], "by_class": None}, True),  # nor without the labels
            ({"images_sha256": "ab" * 32, "data": "other/digits.npz"}, True),
        ],
    )
    def test_images_are_the_same_by_their_hash(self, tmp_path: Path, changes: dict[str, Any], same: bool) -> None:
        own = {"data": "x/digits.npz"} if "data" in changes else {}
        own |= {"images_sha256": "ab" * 32, "encoding": "direct", "input_dtype": "uint8"}
        others = own | {"images_sha256": "cd" * 32} | changes
        files = [write(tmp_path / "a.json", result(**own)), write(tmp_path / "b.json", result(**others))]
        notes = read_results(files).notes
        assert (notes == ()) is same
        if not same:
            assert "a: 200 images of digits with the SHA-256 abababababab, b: 200 images of digits with" in notes[0]
            assert {"ab" * 32, "cd" * 32} <= set(page(*files).texts)

    def test_frames_of_another_T_are_not_told_apart_by_their_hash(self, tmp_path: Path) -> None:
        own = {"images_sha256": "ab" * 32, "encoding": "frames", "input_dtype": "uint8"}
        others = own | {"images_sha256": "cd" * 32}
        files = [write(tmp_path / "a.json", result(**own)), write(tmp_path / "b.json", result(**others, trained_T=4))]
        assert read_results(files).notes == ()
        write(files[1], result(**others))
        assert "different images" in read_results(files).notes[0]

    def test_data_that_are_called_images(self, tmp_path: Path) -> None:
        (m,) = read_results([write(tmp_path / "a.json", result(data="folder:images"))]).measurements
        assert m.images == "200 images of folder:images"

    def test_classes_have_the_images_of_each_model(self, tmp_path: Path) -> None:
        files = [write(tmp_path / f"{name}.json", result()) for name in "ab"]
        assert self.classes(files) == [("class", "images", "a, T=2", "b, T=2"), ("cat", "120", "92.00%", "92.00%")]
        by_class = result()["by_class"]
        by_class[0]["num_samples"] = 12
        write(files[1], result(by_class=by_class[:1]))
        header, cat, dog = self.classes(files, 3)
        assert header == ("class", "images, a", "images, b", "a, T=2", "b, T=2")
        assert cat == ("cat", "120", "12", "92.00%", "92.00%")
        assert dog == ("dog", "80", "–", "72.00%", "–")

    def classes(self, files: list[Path], number: int = 2) -> list[tuple[str, ...]]:
        (table,) = tables(read_results(files), "Accuracy by class")
        return [table.headers, *table.rows][:number]


points = st.lists(
    st.builds(
        Point, st.just("m"), st.integers(1, 9), st.sampled_from([1.0, 2.0, 3.0, 5.0]), st.sampled_from([0.1, 0.5, 0.9])
    ),
    max_size=12,
)


@given(points)
def test_the_front_is_what_no_point_beats(given_points: list[Point]) -> None:
    def beats(p: Point, q: Point) -> bool:
        better = p.energy_pj < q.energy_pj or p.accuracy > q.accuracy
        return p.energy_pj <= q.energy_pj and p.accuracy >= q.accuracy and better

    unbeaten = {(q.energy_pj, q.accuracy) for q in given_points if not any(beats(p, q) for p in given_points)}
    front = pareto(given_points)
    assert [(p.energy_pj, p.accuracy) for p in front] == sorted(unbeaten)


def test_as_accurate_is_no_better_where_one_of_both_is_a_mean() -> None:
    mean = statistics.fmean([340 / 359, 343 / 359, 343 / 359])
    assert mean < 342 / 359  # by rounding
    seeds, single = Point("seeds", 2, 1.0, mean), Point("single", 8, 2.0, 342 / 359)
    assert pareto([seeds, single]) == [seeds]


class TestRefusals:
    def refused(self, *paths: Path, match: str, names: tuple[str, ...] = ()) -> None:
        with pytest.raises((ValueError, FileNotFoundError), match=match):
            read_results(paths, names)

    def test_a_model(self, tmp_path: Path) -> None:
        for name in ("m.onnx", "checkpoint.safetensors"):
            (tmp_path / name).write_bytes(b"\x08\x0a\xff")
            self.refused(tmp_path / name, match="is a model, not a result; give its run folder, or the JSON of")

    def test_nothing(self) -> None:
        self.refused(match="nothing to report on: give run folders")

    def test_no_such_path(self, tmp_path: Path) -> None:
        self.refused(tmp_path / "no", match="no does not exist; give a run folder or the JSON file")

    def test_twice(self, tmp_path: Path) -> None:
        run = run_folder(tmp_path / "a")
        self.refused(run, tmp_path / "a" / ".." / "a", match="named twice")

    def test_no_run_folder(self, tmp_path: Path) -> None:
        self.refused(tmp_path, match="is not a run folder: it has no config.json")

    def test_a_run_without_anything(self, tmp_path: Path) -> None:
        self.refused(run_folder(tmp_path / "a", metrics=[]), match="nothing to report on in .*a: no epoch is finished")

    def test_a_checkpoint_without_metrics(self, tmp_path: Path) -> None:
        run = run_folder(tmp_path / "a", kept=2)
        (run / "metrics.jsonl").unlink()
        self.refused(
            run, match=r"nothing to report on in .*a: the epochs' figures \(metrics.jsonl\) are gone and nothing"
        )
        unfinished = run_folder(tmp_path / "b", metrics=[])
        self.refused(run, unfinished, match="metrics.jsonl. are gone, .*b: no epoch is finished and nothing was")

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ("{", "is not JSON: .*; give JSON of"),
            ("[" * 100_000, "is not JSON"),
            ("\xff\xfe", "is not a result|is not JSON"),
            ("[1]", "holds a list, not an object; give JSON of"),
            ("null", "holds null, not an object; give JSON of"),
            ("7", "holds an integer, not an object; give JSON of"),
            ("{}", 'it has no "kind"'),
            ('{"kind": "poem"}', "its kind is 'poem'; give JSON of early-exit, sweep, validate or bench"),
            ('{"kind": "sweep"}', "does not have the form of a sweep: model is missing"),
            ('{"kind": "early-exit"}', "does not have the form of an early-exit: model is missing"),
            ('{"kind": "sweep", "model": "m", "data": "d", "num_samples": 1, "rows": []}', "it needs rows"),
            (
                '{"kind": "sweep", "model": "m", "data": "d", "num_samples": 1, "rows": [1]}',
                r"form of a sweep: rows\[0\] must be an object, got 1",
            ),
        ],
    )
    def test_a_file_that_is_no_result(self, tmp_path: Path, text: str, match: str) -> None:
        file = tmp_path / "x.json"
        file.write_text(text, encoding="latin-1")
        self.refused(file, match=match)

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"layers": [1]}, r"layers\[0\] must be an object, got 1"),
            ({"layers": [{"name": "a"}]}, r"layers\[0\].rows is missing"),
            ({"neurons": {"a": 1}}, "neurons must be a list"),
            (
                {"neurons": [{"name": "a", "rows": [{"T": 1, "firing_rate": "high"}]}]},
                r"rows\[0\].firing_rate must be a",
            ),
            ({"by_class": [{"name": "a", "num_samples": 1, "accuracy": [0.5]}]}, "an accuracy for each row"),
            ({"num_samples": "many"}, "num_samples must be a whole number of at least 1, got 'many'"),
            ({"num_samples": True}, "num_samples must be a whole number of at least 1, got True"),
            ({"ann": {"energy_pj": float("inf")}}, "ann.energy_pj must be a finite number of at least 0, got inf"),
            ({"ann": {"energy_pj": -3}}, "ann.energy_pj must be a finite number of at least 0, got -3"),
            ({"rows": [{"T": 1, "accuracy": 1.7}]}, r"rows\[0\].accuracy must be a number from 0 to 1, got 1.7"),
            ({"rows": [{"T": 1, "top1_agreement": -0.1}]}, "top1_agreement must be a number from 0 to 1, got -0.1"),
            ({"rows": [{"T": 1, "firing_rate": float("nan")}]}, "firing_rate must be a number from 0 to 1, got nan"),
            (
                {"rows": [{"T": 1, "energy_pj": -3}]},
                r"rows\[0\].energy_pj must be a finite number of at least 0, got -3",
            ),
            ({"versions": {"a": 1}}, "versions.a must be str, got 1"),
            ({"early_exit": EARLY_EXIT | {"by_steps": [{"T": 1, "num_images": 0}]}}, "by_steps needs images"),
            ({"gates": [{"key": "energy", "T": 1, "wanted": 1, "passed": "yes"}]}, r"passed must be bool"),
        ],
    )
    def test_a_damaged_part(self, tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
        file = write(tmp_path / "x.json", result(**changes))
        self.refused(file, match=f"x.json does not have the form of a validate: .*{reason}")

    def test_a_T_twice_and_a_number_that_is_none(self, tmp_path: Path) -> None:
        content = result()
        content["rows"][1]["T"] = 1
        self.refused(write(tmp_path / "x.json", content), match="rows, each with a T of its own")
        content = result()
        content["rows"][1]["accuracy"] = "good"
        self.refused(write(tmp_path / "y.json", content), match="form of a validate")

    def test_damaged_run_folders(self, tmp_path: Path) -> None:
        run = run_folder(tmp_path / "a")
        (run / "metrics.jsonl").write_text('{"epoch": 1}\n{"epo')
        self.refused(
            run, match=r"metrics.jsonl is damaged in line 2: Unterminated string .*\(column 2\); remove that line"
        )
        (run / "metrics.jsonl").write_text("3\n")
        self.refused(run, match="metrics.jsonl is damaged in line 1: it must be an object, got 3")
        write(run / "config.json", {"network": 1})
        self.refused(run, match="config.json is damaged: network must be an object, got 1")

    def test_a_damaged_result_in_a_run_folder_is_left_out_with_a_note(self, tmp_path: Path) -> None:
        """By its folder; named by itself it is refused."""
        one, two = run_folder(tmp_path / "one"), run_folder(tmp_path / "two")
        write(two / "m.sweep.json", result(kind="sweep"))
        write(one / "m.validate.json", result())
        for kind in ("sweep", "bench"):  # macOS's, of which nobody need know
            (one / f"._m.{kind}.json").write_bytes(b"\x00\x05\x16\x07")
        cut, bench = one / "m.sweep.json", one / "m.bench.json"
        cut.write_text('{"kind": "swe')
        write(bench, {"kind": "bench"})
        results = read_results([one, two])
        assert [m.files for m in results.measurements] == [(one / "m.validate.json",), (two / "m.sweep.json",)]
        assert not results.benches
        notes = [note for note in results.notes if note.startswith("Left out until it is measured again: ")]
        assert [str(file) in note for file, note in zip((cut, bench), notes, strict=True)] == [True, True]
        assert "is not JSON" in notes[0] and "form of a bench" in notes[1] and cut.name in page(one, two).text
        (one / "m.validate.json").unlink()
        assert [source.name for source in read_results([one, two]).unmeasured] == ["one"]
        (one / "metrics.jsonl").write_text("")
        self.refused(one, match=rf"nothing to report on in {one}: .*run tetdeploy sweep\. Left out until .*{cut}")
        self.refused(cut, match="m.sweep.json is not JSON")

    def test_results_of_different_data(self, tmp_path: Path) -> None:
        files = [write(tmp_path / f"{name}.json", result(data=f"folder:{name}/test")) for name in "ab"]
        different = "they were measured on different data: a on folder:a/test, b on folder:b/test;"
        self.refused(*files, match=f"cannot be compared, {different}")

    def test_the_same_images_by_another_path_are_no_different_data(self, tmp_path: Path) -> None:
        images = {"images_sha256": "ab" * 32}
        files = [write(tmp_path / f"{name}.json", result(data=f"folder:{name}/set", **images)) for name in "ab"]
        assert [m.name for m in read_results(files).measurements] == ["a", "b"]
        run = run_folder(tmp_path / "run")
        for kind in ("sweep", "validate"):
            write(run / f"m.{kind}.json", result(kind=kind, data=f"folder:{kind}/set", **images))
        assert len(read_results([run]).measurements[0].files) == 2
        trained = [run_folder(tmp_path / name, data=f"folder:{name}/set") for name in ("one", "two")]
        for config in (folder / "config.json" for folder in trained):
            config.write_text(config.read_text().replace('"val_images"', '"fingerprint": "cd", "val_images"'))
        assert len(read_results(trained).sources) == 2

    def test_of_a_run_the_results_on_its_own_data(self, tmp_path: Path) -> None:
        """A network may be tried on images of another kind, too, by another of its models."""
        run = run_folder(tmp_path / "a")
        own, other = (
            write(run / f"{m}.sweep.json", result(kind="sweep", data=d)) for m, d in (("m", "digits"), ("b", "b.npz"))
        )
        results = read_results([run])
        assert [m.files for m in results.measurements] == [(own,)]
        assert f"a b is left out: it is on b.npz, not digits; by itself: tetdeploy report {other}" in results.notes
        write(own, result(kind="sweep", data="c.npz"))  # none is on the data of the training
        assert [m.files for m in read_results([run]).measurements] == [(other,)]

    def test_of_a_run_the_results_on_what_it_was_trained_on_come_last_and_are_told(self, tmp_path: Path) -> None:
        """A .npz has no test part, so that by default a sweep measures on it."""
        run = run_folder(tmp_path / "a", data="own.npz")
        own = write(run / "a.sweep.json", result(kind="sweep", data="own.npz", trained_on=True))
        told = "trained on, which has no test part (a: 200 images of own.npz): accuracy on new images may be lower"
        assert any(told in note for note in read_results([run]).notes)
        test = write(run / "b.sweep.json", result(kind="sweep", data="test.npz"))
        results = read_results([run])
        assert [m.files for m in results.measurements] == [(test,)]
        left_out = f"a a is left out: it is on own.npz, not test.npz; by itself: tetdeploy report {own}"
        assert results.notes == (left_out,)
        own.unlink()
        write(run / "b.validate.json", result(data="own.npz", trained_on=True))  # of the same model
        assert [m.files for m in read_results([run]).measurements] == [(test,)]

    @pytest.mark.parametrize("measured", [False, True])
    def test_trainings_on_different_data_with_one_of_them_not_measured(self, tmp_path: Path, measured: bool) -> None:
        one, two = run_folder(tmp_path / "one"), run_folder(tmp_path / "two", data="cifar10")
        if measured:
            write(one / "m.sweep.json", result())
        self.refused(one, two, match="trained on different data: one on digits, two on cifar10")

    def test_names_that_do_not_fit(self, tmp_path: Path) -> None:
        files = [write(tmp_path / f"{name}.json", result()) for name in "ab"]
        self.refused(*files, names=("x", "y", "z"), match="3 names for 2 results")
        self.refused(*files, names=("b",), match="needs a name of its own")
        self.refused(*files, names=(" ",), match="needs a name of its own")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run with an export and its sweep."""
    folder = tmp_path_factory.mktemp("report")
    runs = ["--runs", str(folder)]
    for command in (
        ["train", "--epochs", "2", "--width", "0.25", "--T", "2", "--out", str(folder / "tet"), *runs],
        ["export", "--T", "3", "--check", "0", *runs],
        ["sweep", *runs],
    ):
        printed(*command)
    return folder


class TestCommand:
    def test_of_a_real_run(self, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        shutil.copytree(trained, tmp_path / "runs", symlinks=True)
        assert "runs/tet/report.html" in printed("report", "--markdown", "r.md", "--title", "Two epochs")
        assert "r.png has no name of one; choose another with --out, in .html" in refused("report", "--out", "r.png")
        assert not Path("r.png").exists()
        found = Page((tmp_path / "runs/tet/report.html").read_text(encoding="utf-8"))
        (sweep,) = (json.loads(file.read_text()) for file in (tmp_path / "runs/tet").glob("*.sweep.json"))
        at_trained = next(row for row in sweep["rows"] if row["T"] == 2)
        assert f"{at_trained['accuracy']:.2%}" in found.texts
        assert sweep["model_sha256"] in found.texts
        parameters = sum(p.numel() for p in load("runs/tet").parameters())
        assert found.texts[found.texts.index("parameters") + 1] == f"{parameters:,}"
        assert sweep["checkpoint_sha256"] == sha256_of(tmp_path / "runs/tet/checkpoint.safetensors")
        assert "is of another" not in found.text
        titles = [s.split(",")[0] for s in ("What was trained, on what and how", "Training", *ALL[:5], *ALL[6:])]
        assert all(any(text.startswith(title) for text in found.texts) for title in titles)
        assert (tmp_path / "r.md").read_text(encoding="utf-8").startswith("# Two epochs\n")

    def test_without_a_home_to_write_to(self, tmp_path: Path) -> None:
        """In which Matplotlib keeps its fonts: it warned of that in two lines."""
        file = write(tmp_path / "a.sweep.json", result(kind="sweep"))
        command = [sys.executable, "-m", "tetdeploy", "report", file, "-o", tmp_path / "a.html"]
        environment = {k: v for k, v in os.environ.items() if k not in ("MPLCONFIGDIR", "XDG_CACHE_HOME")}
        environment |= {"HOME": str(tmp_path / "a.sweep.json" / "no"), "XDG_CONFIG_HOME": ""}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        assert (tmp_path / "a.html").exists()

    def test_several_go_beside_each_other_in_the_working_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        for name in "ab":
            write(tmp_path / f"{name}.sweep.json", result(kind="sweep"))
        printed("report", "a.sweep.json", "b.sweep.json", "--name", "[red]x[/y]")
        assert "[red]x[/y]" in Page((tmp_path / "report.html").read_text(encoding="utf-8")).texts

    def test_names_of_any_bytes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        name = os.fsdecode(b"a\xff")
        for folder in (name, "b"):
            write(run_folder(tmp_path / folder) / f"{name}.sweep.json", result(model=name, data=name))
        printed("report", name, "b", "--markdown", "r.md")
        assert "a?" in Page(Path("report.html").read_text(encoding="utf-8")).texts
        assert "| a? |" in Path("r.md").read_text(encoding="utf-8")

    @pytest.mark.parametrize("arguments", [[], ["nothing"], ["."], ["note.txt"]])
    def test_refusals_are_one_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
        monkeypatch.chdir(tmp_path)
        Path("note.txt").write_text("hello")
        refused("report", *arguments)
        assert not Path("report.html").exists()
