"""The report's tables: every number is that of its row, in the unit that is said."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from matplotlib.collections import LineCollection
from report_helpers import (
    COMPARED,
    EARLY_EXIT,
    MACHINE,
    blocks,
    epoch,
    items,
    reached,
    result,
    run_folder,
    seeds_folder,
    sweep,
    tables,
    without,
    without_rendering,
    write,
)

from tetdeploy.report import validation
from tetdeploy.report.document import Cards, Note, Plot, Table
from tetdeploy.report.drawing import energy_unit
from tetdeploy.report.means import mean_of
from tetdeploy.report.page import document_of
from tetdeploy.report.reading import Run
from tetdeploy.report.result_table import ResultTable
from tetdeploy.report.results import Results
from tetdeploy.report.sections.settings import _TRAINING
from tetdeploy.report.sections.training import _duration, _kept
from tetdeploy.report.sources import read_results
from tetdeploy.report.tables import layers_table
from tetdeploy.storage.files import sha256_of
from tetdeploy.train.config import TrainConfig

SETTINGS = "What was trained, on what and how"
CURVES = ("Accuracy by time steps and energy", "Pareto front", "Cost by time steps")


@pytest.fixture(autouse=True)
def painted(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    return without_rendering(monkeypatch)


def shown(folder: Path, **changes: Any) -> Results:
    """A validation named a."""
    return read_results([write(folder / "a.json", result(**changes))])


def said(results: Results, title: str) -> list[Any]:
    """Facts of cards, captions, headers and rows of tables, captions and descriptions of plots, notes."""
    found: list[Any] = []
    for item in items(results, title):
        if isinstance(item, Cards):
            found += [fact for card in item.cards for fact in card.facts]
        elif isinstance(item, Table):
            found += [item.caption, item.headers, *item.rows]
        else:
            found += [item.text] if isinstance(item, Note) else [item.caption, item.description]
    return found


OTHER_OPS = {"other_ops": {"neuron_ops": 4096}, "other_ops_pj": {"neuron_ops": 2e3}, "uncounted": ["odd"]}


@pytest.mark.parametrize(
    ("title", "changes", "wanted"),
    [
        (
            "Agreement with PyTorch",
            {"agreement": {"with": "checkpoint", "num_images": 50, "data": "part of digits"}},
            ["a: the exported model against PyTorch on 50 images of part of digits."],
        ),
        (
            "Cost by time steps",
            {"trained_T": 3, "device": "cuda", "layout": "step", **OTHER_OPS},
            [
                "Median time of one image at a time, on cuda.",
                "energy (µJ per image) against time steps. a at T=3: 4.08",
                "a: 200 images of digits; * is the T of the training.",
                "Not in the totals of a: neuron ops 4.1 k (2 nJ) per image and step; the layers odd.",
            ],
        ),
        ("Accuracy by class", {}, ["accuracy (%) by name, 2 of them. a: most in cat"]),
        (
            "Early exit",
            {"kind": "early-exit", "early_exit": EARLY_EXIT, "machine": MACHINE},
            [
                "Images by steps taken. a: 60.0% at T=1, 30.0% at T=2, 10.0% at T=3",
                "Accuracy against energy with early exit. a: 90.00% with 1.50 steps",
                ("", "T=3", "early exit", ""),
                ("accuracy", "92.00%", "90.00%", "2.00 ± 3.10 points lost"),
            ],
        ),
    ],
)
def test_a_section_says(title: str, changes: dict[str, Any], wanted: list[Any], tmp_path: Path) -> None:
    found = said(shown(tmp_path, **changes), title)
    assert [one for one in wanted if one not in found] == [], found


def test_large_numbers_are_no_powers_of_ten(tmp_path: Path) -> None:
    rows, layers = result()["rows"], result()["layers"]
    rows[1]["latency_ms"], layers[1]["fan_out"] = 1234.0, 18432.0
    for layer in layers:
        layer["rows"][1]["input_rate"] = 0.5
    latency = "latency (ms per image) against time steps. a at T=2: 1,234"
    assert latency in said(shown(tmp_path, rows=rows), "Cost by time steps")
    assert list(layers_table(result(layers=layers), 2).columns[3].cells) == ["288", "18,432", ""]


@pytest.mark.parametrize("trained_T", [None, 7])
def test_without_a_row_of_the_training_s_T_the_largest_leads_and_none_is_marked(
    trained_T: int | None, painted: dict[str, list[Any]], tmp_path: Path
) -> None:
    results = shown(tmp_path, trained_T=trained_T)
    assert said(results, "At a glance")[0] == ("accuracy at T=3", "93.00%")
    (costs,) = tables(results, "Cost by time steps")
    neurons, _ = tables(results, "Firing rate and energy by layer")
    assert not costs.marked and costs.rows[2][0] == "3" and neurons.headers[2:] == ("T=1", "T=2", "T=3")
    assert len(painted["sections.accuracy"][0].lines) == 1  # no ring
    assert "T of the training" not in repr(document_of(results))
    assert "Accuracy of each class at T=3." in said(results, "Accuracy by class")
    assert "Accuracy of each class at the T of the training (T=2)." in said(shown(tmp_path), "Accuracy by class")


def test_every_model_has_the_T_of_its_training_in_the_caption(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.json", result(trained_T=T)) for name, T in (("a", 2), ("b", 3))]
    caption, *_ = said(read_results(files), "Accuracy by time steps and energy")
    assert caption.endswith(" A ring marks the T of the training (a: T=2, b: T=3).")


@pytest.mark.parametrize(
    ("picojoules", "unit"),
    [(1e9, ("mJ", 1e9)), (2e8, ("µJ", 1e6)), (1e6, ("µJ", 1e6)), (1e3, ("nJ", 1e3)), (999.0, ("pJ", 1.0))],
)
def test_an_axis_has_the_largest_unit_that_its_values_reach(picojoules: float, unit: tuple[str, float]) -> None:
    assert energy_unit(picojoules) == unit


def test_the_front_is_priced_in_times_the_cheapest(tmp_path: Path) -> None:
    rows = result()["rows"]
    rows[2]["accuracy"] = 0.5
    (table,) = tables(shown(tmp_path, rows=rows), "Pareto front")
    assert table.rows == (("a", "1", "91.00%", "1.36 µJ", "1 ×"), ("a", "2", "92.00%", "2.72 µJ", "2 ×"))


def test_costs_stand_in_their_columns(tmp_path: Path) -> None:
    rows = result()["rows"]
    rows[1]["torch_latency_ms"] = 7.0
    (table,) = tables(shown(tmp_path, rows=rows), "Cost by time steps")
    energies = ("2.72 µJ", "2.8 µJ", "2 µJ", "2.5 ×")
    assert table.rows[1] == ("2 *", "92.00%", "0.100", "2 M", "200 k", *energies, "1 ms", "7 ms")


def test_layers_have_rates_shares_and_exact_energies_of_their_own(tmp_path: Path) -> None:
    content = result()
    del content["layers"][1]["binary"]  # as in files of earlier versions
    content["layers"][1]["rows"][1] |= {"energy_exact_pj": 5e6, "input_rate": 0.25}
    content["neurons"][0]["rows"][0]["firing_rate"] = 0.7
    neurons, layers = tables(shown(tmp_path, **content), "Firing rate and energy by layer")
    assert neurons.rows[0] == ("lif1", "2,048", "0.700", "0.100", "0.100")
    assert layers.rows[1] == ("conv2", "spikes", "1,152", "288", "25.0%", "1 M", "0", "1.92 µJ", "5 µJ", "70.6%")


def test_of_many_classes_the_worst_the_best_and_the_median_are_named(tmp_path: Path) -> None:
    classes = [{"name": f"c{k:03}", "num_samples": 10, "accuracy": [k / 100] * 3} for k in range(1, 101)]
    table, note = blocks(shown(tmp_path, by_class=classes), "Accuracy by class")
    assert isinstance(table, Table) and table.rows[0] == ("c001", "1.00%", "c100", "100.00%")
    assert "c050" not in repr(table)
    assert isinstance(note, Note) and note.text.startswith("a: classes by accuracy: 0-10 %: 9, 10-20 %: 10, ")
    assert note.text.endswith(", 90-100 %: 11. Median 50.50%.")


@pytest.mark.parametrize(("ann_pj", "said"), [(1.36e6, "2 times more energy"), (4.08e6, "1.5 times less energy")])
@pytest.mark.parametrize("ratio", [True, False], ids=["measured", "of_an_older_file"])
def test_more_energy_than_the_ann_is_said_as_more(tmp_path: Path, ratio: bool, ann_pj: float, said: str) -> None:
    rows = [row | {"ann_ratio": ann_pj / row["energy_pj"] if ratio else None} for row in result()["rows"]]
    cards, *_ = blocks(shown(tmp_path, rows=rows, ann={"energy_pj": ann_pj}), "At a glance")
    assert isinstance(cards, Cards) and said in dict(cards.cards[0].facts).values()


def test_differences_by_itself_and_margins_are_those_of_their_name(tmp_path: Path) -> None:
    content = result()
    content["rows"][1]["local_mismatch_rate"] = 1e-6
    margin = {"local": {"count": 1, "median": 3e-7, "max": 4e-7}, "every": {"count": 9, "median": 0.5, "max": 2.0}}
    content["neurons"][1] |= {"spike_mismatch_rate": 3e-6, "local_mismatch_rate": 1e-6, "margin": margin}
    steps, layers = tables(shown(tmp_path, **content), "Agreement with PyTorch")
    assert steps.rows[1] == ("2", "99.50%", "2 ppm", "1 ppm", "1.0e-05")
    assert layers.rows == (("lif2", "3 ppm", "1 ppm", "4.0e-07", "5.0e-01"),)


def test_each_number_of_a_validation_is_in_its_column_of_the_terminal() -> None:
    rates = {"top1_agreement": 0.99, "spike_mismatch_rate": 2e-6, "local_mismatch_rate": 3e-6}
    rates |= {"spike_count_error": 4e-6, "max_abs_logit_error": 5e-5}
    own = {"engine_accuracy": 0.91, "torch_accuracy": 0.92, "torch_latency_ms": 7.0}
    medians = {"differing": 1e-7, "local": 2e-7, "every": 0.3}
    margin = {name: {"count": 8, "median": median, "max": 4e-7} for name, median in medians.items()}
    content = result(agreement={"with": "checkpoint", "num_images": 50, "checkpoint_sha256": "cd" * 32}, uncounted=[])
    content["agreement"]["margin"] = margin
    content["rows"] = [row | rates | own for row in content["rows"]]
    fired = {"engine_firing_rate": 0.125, "torch_firing_rate": 0.25, "margin": margin}
    content["neurons"] = [layer | rates | fired for layer in content["neurons"]]
    _, costs, heading, compared, note, _, layers = validation.shown(content, layers=True)
    shown_tables = [table for table in (costs, compared, layers) if isinstance(table, ResultTable)]
    assert [[list(column.cells)[1] for column in table.columns] for table in shown_tables] == [
        ["2*", "92.00%", "0.100", "2 M", "200 k", "2.72 µJ", "1.00 ms", "7.00 ms"],
        ["2*", "91.00%", "92.00%", "99.00%", "2 ppm", "3 ppm", "4 ppm", "5.0e-05"],
        ["lif2", "0.125", "0.250", "2 ppm", "3 ppm", "4 ppm", "1e-07", "2e-07", "3e-01"],
    ]
    assert heading == "beside PyTorch on 50 images, checkpoint cdcdcdcdcdcd"
    assert str(note).endswith("|u - v_th| / v_th is 2.0e-07 (median of 8; at most 4.0e-07)")


def test_of_a_reference_it_is_said_how_many_images_and_steps_were_compared() -> None:
    compared = {"with": "reference", "num_images": 50, "T": 3}
    _, _, heading, _, note, layers, _ = validation.shown(result(agreement=compared, uncounted=[]), layers=True)
    assert heading == "compared with what PyTorch made of the 50 images of the reference, T up to 3"
    assert str(note).startswith("* the T of the training; spike count error: ")
    assert layers == "layers of neurons, T=3"  # on all images, of which PyTorch may have seen fewer


def test_the_epoch_that_was_kept_has_its_own_numbers_and_the_run_all_its_time() -> None:
    best = epoch(1, seconds=1800.0, train_accuracy=0.9, val_accuracy=0.95)
    metrics = (best, epoch(2, seconds=5400.0))
    run = Run(Path("a"), {}, {}, {"epochs": 2}, metrics, {"provenance": {"epoch": 1}})
    assert _kept("a", run) == ("a", "2 of 2", "1", "95.00%", "1.1", "90.00%", "2.0 h")


def test_times_have_the_unit_of_their_size() -> None:
    assert [*map(_duration, (89, 90, 5399, 5400))] == ["89.0 s", "1.5 min", "90.0 min", "1.5 h"]


def test_a_trained_ann_stands_beside_the_others_with_the_epoch_that_was_kept(
    painted: dict[str, list[Any]], tmp_path: Path
) -> None:
    snn = run_folder(tmp_path / "snn")
    for kind in ("validate", "sweep"):
        write(snn / f"m.{kind}.json", result(kind=kind, runtime="onnxruntime", images_sha256="ef" * 32))
    metrics = [epoch(1, val_accuracy=0.5), epoch(2, T=1, val_accuracy=0.97), epoch(3, val_accuracy=0.6)]
    ann = run_folder(tmp_path / "ann", ann=True, kept=2, metrics=metrics, seed=3, lr=0.00125, clip=1.0)
    results = read_results([snn, ann])
    cards, *_ = blocks(results, "At a glance")
    assert isinstance(cards, Cards) and cards.cards[1].facts == (
        ("validation accuracy at T=1", "97.00%"),
        ("energy per image", "6.8 µJ in float32"),
        ("measured on", "100 validation images"),
        ("kind", "ANN: no T, not exported"),
    )
    star = painted["sections.accuracy"][1].lines[-1]
    assert (*star.get_xdata(), *star.get_ydata()) == pytest.approx((6.8, 0.97))
    assert "The star is a trained ANN" in said(results, "Accuracy by time steps and energy")[2]
    (settings,) = tables(results, SETTINGS)
    wanted = {
        ("network", "convsnn", "convsnn, ANN twin"),
        ("channels × height × width", "1 × 8 × 8", "1 × 8 × 8"),
        ("classes", "2", "2"),
        ("training images", "900", "900"),
        ("validation images", "100", "100"),
        ("learning rate, peak", "0.002", "0.00125"),
        ("largest norm of the gradient", "–", "1"),
        ("seed", "0", "3"),
        ("device", "–", "GPU7"),
        ("precision", "–", "bf16"),
    }
    assert wanted <= {*settings.rows}
    before, after, measured = tables(results, "Versions and hashes")
    sha256 = sha256_of(ann / "checkpoint.safetensors")
    origin = (("checkpoint", "checkpoint.safetensors"), ("its SHA-256", sha256), ("written", "now"))
    assert (before.rows, after.rows) == ((("checkpoint", "not here"),), (*origin, ("versions", "torch 9")))
    assert measured.rows == (
        ("results", "m.validate.json, m.sweep.json"),
        ("model", "runs/a/model-T3.onnx"),
        ("its SHA-256", "ab" * 32),
        ("layout", "unrolled"),
        ("precision of its layers", "fp32"),
        ("data", "200 images of digits"),
        ("their SHA-256", "ef" * 32),
        ("device", "cpu"),
        ("runtime", "onnxruntime"),
        ("measured", "2026-01-02T03:04:05+00:00"),
        ("versions", "tetdeploy 0.1.0, onnxruntime 1.32.0"),
    )


def test_seeds_stand_in_their_order_and_one_that_finished_has_no_deviation(tmp_path: Path) -> None:
    for seed in (10, 2):
        run_folder(tmp_path / f"seed-{seed}", seed=seed, metrics=reached(0.8)[: 2 if seed == 2 else 1])
    results = read_results([tmp_path], ["a"])
    facts = said(results, "At a glance")
    assert facts[0] == ("validation accuracy, 1 of 2 seeds", "80.00%")
    assert ("kind", "trained, not exported or not measured") in facts
    assert [*results.sources[0].runs] == ["a seed-2", "a seed-10"]
    (table,) = tables(results, "Seeds")
    assert table.rows[0] == ("2", "2", "80.00%") and table.marked == {2}


def test_numbers_at_different_T_are_said_to_be(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{T}.sweep.json", result(kind="sweep") | {"trained_T": T}) for T in (2, 3)]
    note = Note("The numbers of each are at the T that stands beside its accuracy.")
    assert note in blocks(read_results(files), "At a glance")
    assert note not in blocks(read_results(files[:1]), "At a glance")


def test_seeds_are_compared_by_their_means(tmp_path: Path, painted: dict[str, list[Any]]) -> None:
    one = seeds_folder(tmp_path / "one", sweep(1.0), sweep(2.0), None)
    other = write(tmp_path / "other.sweep.json", result(kind="sweep"))
    results = read_results([one, other])
    assert results.notes == ("one: its means are of 2 of 3 seeds; seed-2 has no result (export, then sweep).",)
    cards, note = blocks(results, "At a glance")
    assert isinstance(cards, Cards) and isinstance(note, Note) and note.text in results.notes
    assert [card.title for card in cards.cards] == ["one", "other"]
    facts = dict(cards.cards[0].facts)
    assert facts["accuracy at T=2, as trained"] == "90.50% ± 0.71%" and facts["mean of"] == "2 of 3 seeds"
    assert facts["energy per image"] == "4.08 ± 1.92 µJ"
    assert facts["spikes per neuron and step"] == "0.100 ± 0.000"
    assert "mean of" not in dict(cards.cards[1].facts)

    steps, energy = painted["sections.accuracy"]
    assert list(steps.lines[0].get_xdata()) == [1, 2, 3]
    assert list(steps.lines[0].get_ydata()) == pytest.approx([0.895, 0.905, 0.915])
    bar = steps.collections[1].get_segments()[1]
    assert bar[:, 1] == pytest.approx([0.905 - 0.5**0.5 / 100, 0.905 + 0.5**0.5 / 100])
    assert [axes.get_legend_handles_labels()[1] for axes in (steps, energy)] == [["one", "other"]] * 2
    across, up = energy.collections[0].get_segments()[1], painted["sections.cost"][0].collections[1].get_segments()[1]
    microjoules = pytest.approx([4.08 - 2.72 * 0.5**0.5, 4.08 + 2.72 * 0.5**0.5])
    assert across[:, 0] == microjoules and up[:, 1] == microjoules

    captions = [item.caption for section in CURVES for item in items(results, section) if isinstance(item, Plot)]
    told = "Means over seeds (one: 2 of 3 seeds); bars are their standard deviation."
    assert len(captions) >= 4 and all(caption.endswith(told) for caption in captions)
    (front,) = tables(results, "Pareto front")
    assert [row[0] for row in front.rows] == ["other"] * 3  # as all are beaten by it
    means, *own, single = tables(results, "Cost by time steps")
    assert means.caption.startswith("one, mean of 2 of 3 seeds ± standard deviation (over n - 1): 200 images of digits")
    assert means.rows[1][:3] == ("2 *", "90.50% ± 0.71%", "0.100 ± 0.000")
    assert [table.caption.split(":")[0] for table in (*own, single)] == ["one seed-0", "one seed-1", "other"]
    assert single.rows[1][1] == "92.00%"
    (classes,) = tables(results, "Accuracy by class")
    assert classes.headers[-2:] == ("one, T=2", "other, T=2")
    assert classes.caption == "Accuracy of each class. Means over seeds (one: 2 of 3 seeds)."
    entries = ("Accuracy by class", "Firing rate and energy by layer")
    captions = [item.caption for section in entries for item in items(results, section) if isinstance(item, Plot)]
    assert len(captions) == 3 and all(c.endswith(" Means over seeds (one: 2 of 3 seeds).") for c in captions)


def test_a_point_of_the_front_has_its_deviations(tmp_path: Path, painted: dict[str, list[Any]]) -> None:
    (front,) = tables(read_results([seeds_folder(tmp_path / "a", sweep(1.0), sweep(2.0))]), "Pareto front")
    assert front.rows[1] == ("a", "2", "90.50% ± 0.71%", "4.08 ± 1.92 µJ", "2 ×")
    energies, accuracies = (bars.get_segments()[1] for bars in painted["sections.pareto"][0].collections)
    assert energies[:, 0] == pytest.approx([4.08 - 2.72 * 0.5**0.5, 4.08 + 2.72 * 0.5**0.5])
    assert accuracies[:, 1] == pytest.approx([0.905 - 0.5**0.5 / 100, 0.905 + 0.5**0.5 / 100])


@pytest.mark.parametrize(
    ("others", "unfinished", "notes"),
    [
        ((sweep(2.0),), (), ()),
        ((sweep(2.0),), (1,), ("a: its means are of 1 of 2 seeds; seed-1 is unfinished, as far as its files say.",)),
        (
            (sweep(2.0), None),
            (0, 1),
            (
                "a: the seeds stand each by itself, as none is finished; "
                "seed-0 is unfinished, as far as its files say; seed-1 is unfinished, as far as its files say; "
                "seed-2 has no result (export, then sweep).",
            ),
        ),
        (
            (without(["accuracy"]),),
            (),
            ("a: its means are of 1 of 2 seeds; seed-1 has no result (export, then sweep).",),
        ),
        (
            (sweep(2.0, constants={"ac_pj": 0.03, "mac_pj": 0.23, "source": "given"}),),
            (),
            ("a: the seeds stand each by itself, as their results differ in constants.",),
        ),
        (
            (sweep(2.0, rows=result()["rows"][:2], by_class=None),),
            (),
            ("a: its means are of the T at which each of the seeds was measured, 1, 2.",),
        ),
        (
            (sweep(2.0, rows=[row | {"T": 9} for row in result()["rows"][:1]], by_class=None),),
            (),
            ("a: the seeds stand each by itself, as their results differ in T.",),
        ),
    ],
    ids=["alike", "one unfinished", "all unfinished", "one unlabelled", "prices", "some T", "no T"],
)
def test_of_which_seeds_the_means_are_is_said(
    tmp_path: Path, others: tuple[dict[str, Any] | None, ...], unfinished: tuple[int, ...], notes: tuple[str, ...]
) -> None:
    results = read_results([seeds_folder(tmp_path / "a", sweep(1.0), *others, unfinished=unfinished)])
    assert results.notes == notes
    alone = any("by itself" in note for note in notes)
    assert [m.name for m in results.series] == (["a seed-0", "a seed-1"] if alone else ["a"])
    document_of(results)


def test_the_means_are_of_the_seeds_that_the_table_of_seeds_counts(tmp_path: Path) -> None:
    folder = seeds_folder(tmp_path / "a", sweep(1.0), sweep(2.0), unfinished=(1,))
    (folder / "seed-1" / "metrics.jsonl").unlink()  # summary.json is all that tells of it
    (source,) = read_results([folder]).sources
    assert source.finished_seeds == source.series[0].counted_seeds == "1 of 2 seeds"


def test_several_models_of_several_seeds_have_a_mean_each(tmp_path: Path) -> None:
    folder = seeds_folder(tmp_path / "a", sweep(1.0), sweep(2.0))
    write(folder / "seed-1" / "m-int8.sweep.json", sweep(1.0))
    results = read_results([folder])
    assert [(m.name, m.counted_seeds) for m in results.series] == [("a m", "2 seeds"), ("a m-int8", "1 of 2 seeds")]
    cards, _ = blocks(results, "At a glance")
    assert isinstance(cards, Cards) and cards.cards[1].facts[0][1] == "91.00%"  # one seed has no deviation


def test_of_a_single_seed_no_bars_are_spoken_of(tmp_path: Path, painted: dict[str, list[Any]]) -> None:
    results = read_results([seeds_folder(tmp_path / "a", sweep(1.0), None)])
    captions = [item.caption for section in CURVES for item in items(results, section) if isinstance(item, Plot)]
    assert captions and all(caption.endswith("Means over seeds (a: 1 of 2 seeds).") for caption in captions)
    assert "deviation" not in tables(results, "Cost by time steps")[0].caption
    assert not any(isinstance(drawn, LineCollection) for axes in painted["sections.cost"] for drawn in axes.collections)


def test_the_star_of_an_ann_of_several_seeds_is_their_mean(tmp_path: Path, painted: dict[str, list[Any]]) -> None:
    snn = run_folder(tmp_path / "snn")
    write(snn / "m.sweep.json", result(kind="sweep"))
    for seed in range(2):
        metrics = [epoch(1, val_accuracy=0.7 + seed / 10), epoch(2, val_accuracy=0.1)]
        run_folder(tmp_path / "ann" / f"seed-{seed}", ann=True, seed=seed, metrics=metrics)
    results = read_results([snn, tmp_path / "ann"])
    (seeds,) = tables(results, "Seeds")
    assert [*painted["sections.accuracy"][1].lines[-1].get_ydata()] == [0.75]
    assert seeds.rows == (
        ("0", "1", "70.00%"),
        ("1", "1", "80.00%"),
        ("mean ± standard deviation", "", "75.00% ± 7.07%"),
    )


def test_the_mean_of_results_is_that_of_each_number_that_all_have() -> None:
    one = {"a": 1, "b": True, "c": "x", "rows": [{"T": 1, "y": 1.0}, {"T": 2, "y": 5.0}], "only": 1, "same": [1, 2]}
    two = {"a": 2, "b": False, "c": "y", "rows": [{"T": 2, "y": 6.0}, {"T": 3, "y": 1.0}], "same": [1, 2]}
    wanted = {"a": 1.5, "b": None, "c": None, "rows": [{"T": 2, "y": 5.5}], "same": [1, 2]}
    assert mean_of([one, two]) == wanted and mean_of([1, 2, 6]) == 3
    assert [mean_of([None, other]) for other in (1.0, {"y": 1.0}, [1.0])] == [None] * 3


def test_a_stage_has_its_T_its_epochs_and_its_learning_rate(tmp_path: Path) -> None:
    (table,) = tables(read_results([run_folder(tmp_path / "a", tit="2:30,6:1:1e-4")]), SETTINGS)
    stages = "T=2 for 30 epochs, then T=6 for 1 epoch at learning rate 1e-4"
    assert ("time inheritance training", stages) in table.rows


def test_how_was_learned_from_another_network_is_said_where_one_was(tmp_path: Path) -> None:
    defaults = {"distill_alpha": 1.0, "distill_tau": 3.0}
    alone = run_folder(tmp_path / "alone", **defaults)
    taught = run_folder(tmp_path / "taught", distill="runs/ann", **defaults | {"distill_alpha": 0.5})
    assert not any("distillation" in label for label, _ in tables(read_results([alone]), SETTINGS)[0].rows)
    (table,) = tables(read_results([alone, taught]), SETTINGS)
    wanted = {("weight of the distillation", "–", "0.5"), ("temperature of the distillation", "–", "3")}
    assert wanted <= {*table.rows}


def test_every_setting_that_decides_the_weights_is_among_those_of_the_report() -> None:
    elsewhere = {"seed", "val_fraction", "device", "precision"}  # of each seed, in images, and as they came out
    assert {field.name for field in fields(TrainConfig)} == elsewhere | _TRAINING.keys()


def test_a_validation_comes_before_a_sweep(tmp_path: Path) -> None:
    run, sweep = run_folder(tmp_path / "a"), result(kind="sweep")
    sweep["rows"][1]["accuracy"] = 0.1
    write(run / "m.validate.json", result())
    write(run / "m.sweep.json", sweep)
    (measurement,) = read_results([run]).measurements
    assert measurement.rows[1]["accuracy"] == 0.92


def test_gates_of_all_files_are_kept(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "a")
    gate = {"key": "accuracy", "wanted": 0.95, "T": 2, "got": 0.92, "passed": False}
    kept = without(["accuracy"], data="reference images", gates=[gate | {"key": "agreement"}])
    write(run / "m.validate.json", kept)
    write(run / "m.sweep.json", without(COMPARED, kind="sweep", gates=[gate]))
    (measurement,) = read_results([run]).measurements
    assert [gate["key"] for gate in measurement.content["gates"]] == ["accuracy", "agreement"]


@pytest.mark.parametrize(
    "other",
    [{"image_size": [9, 9]}, {"model": "vggsnn"}, {"num_classes": 3}, {"in_channels": 2}, {"width": 2}, {"ann": False}],
    ids=str,
)
def test_only_an_ann_of_the_very_shape_is_a_twin(other: dict[str, Any], tmp_path: Path) -> None:
    snn = run_folder(tmp_path / "snn")
    write(snn / "m.sweep.json", result(kind="sweep"))
    results = read_results([snn, run_folder(tmp_path / "other", network={"ann": True} | other)])
    assert results.sources[1].run is not None and results.twin_energy(results.sources[1].run) is None
