"""The sweep against counts made by hand, and how numbers of steps are typed."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import onnxruntime
import pytest
import torch
from export_helpers import digits, exported
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.table import Table

from tetdeploy import sweep as sweeping
from tetdeploy.cli.inputs import load_inputs
from tetdeploy.cli.sweep import _prices, print_sweep
from tetdeploy.cli.sweep import sweep as sweep_command
from tetdeploy.data import save_npz
from tetdeploy.data.fingerprint import images_sha256
from tetdeploy.early_exit.threshold import run_answers
from tetdeploy.energy import CONVENTIONS, layers_of, other_ops_pj
from tetdeploy.engine import Engine
from tetdeploy.picojoules import CONSTANTS, EnergyConstants, energy_constants
from tetdeploy.report.numbers import count, energy
from tetdeploy.report.sweep_plot import plot_sweep
from tetdeploy.report.tables import BILLS, layers_table, other_ops_table, sweep_table
from tetdeploy.steps import parse_steps
from tetdeploy.sweep import Row, Sweep, Tally, check_images, check_logits, sweep


@pytest.mark.parametrize(
    ("text", "steps"), [("6", (6,)), ("1:4", (1, 2, 3, 4)), ("4,1,2", (1, 2, 4)), ("1:3,2:5", (1, 2, 3, 4, 5))]
)
def test_steps_as_typed(text: str, steps: tuple[int, ...]) -> None:
    assert parse_steps(text) == steps


@pytest.mark.parametrize("text", ["", "x", "1:", ":3", "1-4", "0", "0:3", "4:1", "-1", "1:300000000", "2.5"])
def test_steps_that_do_not_parse(text: str) -> None:
    with pytest.raises(ValueError, match="T must"):
        parse_steps(text)


def test_images_are_known_by_pixels_and_labels() -> None:
    x, labels = digits().images[:40], digits().labels[:40]
    known = images_sha256(x, labels)
    assert known == images_sha256(np.asfortranarray(x), labels.astype(np.int32))
    other = x.copy()
    other[17, 0, 3, 3] ^= 1
    others = ((other, labels), (x, labels[::-1]), (x[:39], labels[:39]), (x.reshape(40, 64), labels), (x, None))
    assert len({known, images_sha256(x.view(np.int8), labels), *(images_sha256(*pair) for pair in others)}) == 7
    many = np.zeros((2, 1025, 1), np.uint8)  # of which 1,024 are read at a time
    many[1, -1] = 1
    assert images_sha256(many[0], None) != images_sha256(many[1], None)
    engine = Engine(exported("dynamic"), threads=1)
    written = sweep(engine, x, labels, (1,), num_timed=1).to_dict()
    assert (written["images_sha256"], written["checkpoint_sha256"]) == (known, None)


def test_a_result_says_that_its_images_were_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    engine = Engine(exported("dynamic"), threads=1)
    engine.metadata["source"]["data"] = {"name": "own.npz"}
    for name in ("own.npz", "other.npz"):
        save_npz(digits().select(slice(4)), name)
    for data, expected in {"./own.npz": True, "other.npz": None}.items():
        name, x, labels = load_inputs(engine, data, Path(), None)
        assert ("own.npz is one set with no test part: these" in capsys.readouterr().out) is bool(expected)
        written = sweep(engine, x, labels, (1,), data=name, num_timed=1).to_dict()
        assert written.get("trained_on") is expected
    x, labels = digits().images[:4], digits().labels[:4]
    engine.metadata["source"]["data"] = {"name": "digits"}
    assert "trained_on" not in sweep(engine, x, labels, (1,), data="digits", num_timed=1).to_dict()


@pytest.mark.parametrize("layout", ["unrolled", "dynamic", "step"])
def test_a_sweep_is_what_single_runs_give(layout: str) -> None:
    engine = Engine(exported(layout))
    x = digits().images[:70]
    labels = engine.run(x, 3).logits.argmax(-1)  # so that accuracy depends on T, and is 1 at last
    seen, rounds = list[int](), list[int]()
    result = sweep(
        engine, x, labels, (1, 3), data="digits", batch_size=32, num_timed=1, tick=seen.append, timing=rounds.append
    )
    assert sum(seen) == result.num_samples == 70
    assert rounds == [0, 1, 1, 1]  # two to warm up
    for k, row in enumerate(result.rows):
        run, counts = engine.count(x, row.T)
        assert row.accuracy == np.mean(run.logits.argmax(-1) == labels)
        right = sum(of["num_samples"] * (of["accuracy"][k] or 0) for of in result.details["by_class"])
        assert row.accuracy == pytest.approx(right / 70)
        fired = sum(counts[f"fired.{n['name']}"].sum() for n in engine.metadata["neurons"])
        neurons = sum(np.prod(n["shape"]) for n in engine.metadata["neurons"])
        assert row.firing_rate == pytest.approx(fired / (neurons * row.T * 70))
        assert row.latency_ms > 0
    assert result.rows[0].accuracy < result.rows[1].accuracy == 1
    assert result.rows[0].ac_ops < result.rows[1].ac_ops
    assert result.rows[1].mac_ops == pytest.approx(3 * result.rows[0].mac_ops)


def test_what_lies_behind_the_rows() -> None:
    engine = Engine(exported("step"))
    x, labels = digits().images[:70], digits().labels[:70].copy()
    labels[labels == 3] = 4  # a class without images
    result = sweep(engine, x, labels, (2, 3), data="digits", batch_size=32, num_timed=1)
    written = json.loads(json.dumps(result.to_dict()))
    assert (written["kind"], written["num_samples"], written["layout"], written["device"]) == (
        "sweep",
        70,
        "step",
        "cpu",
    )
    assert written["model_sha256"] == hashlib.sha256(engine.path.read_bytes()).hexdigest()
    assert (written["trained_T"], written["num_classes"]) == (engine.metadata["trained_T"], 10)
    assert set(written["versions"]) == {"tetdeploy", "python", "numpy", "onnxruntime"}
    assert written["versions"]["onnxruntime"] == onnxruntime.__version__
    assert (written["encoding"], written["input_dtype"]) == ("direct", "uint8")
    created = datetime.fromisoformat(written["created"])
    assert (created.utcoffset(), created.microsecond) == (timedelta(0), 0)

    run, counts = engine.count(x, 3)
    for neurons in written["neurons"]:
        fired = counts[f"fired.{neurons['name']}"]  # [T, N]
        rates = [fired[:T].sum() / (70 * T * neurons["size"]) for T in (2, 3)]
        assert [row["firing_rate"] for row in neurons["rows"]] == pytest.approx(rates)
    for layer in written["layers"][1:]:
        of = next(entry for entry in layers_of(engine.metadata) if entry.name == layer["name"])
        active = counts[of.counter]
        assert layer["rows"][1]["ac_ops"] == pytest.approx((active * of.fan_out()).sum() / 70)
        assert layer["rows"][1]["input_rate"] == pytest.approx(active.sum() / (70 * 3 * of.num_inputs))
    for k, row in enumerate(written["rows"]):
        for bill in ("ac_ops", "mac_ops", "energy_pj", "energy_exact_pj", "energy_once_pj"):
            assert row[bill] == pytest.approx(sum(layer["rows"][k][bill] for layer in written["layers"]))
        assert row["ann_ratio"] == pytest.approx(written["ann"]["energy_pj"] / row["energy_pj"])
    dense = sum(layer["dense_ops"] for layer in written["layers"])
    assert written["ann"] == {"mac_ops": dense, "energy_pj": pytest.approx(dense * 4.6)}
    assert written["constants"] == CONSTANTS["fp32"].to_dict()

    right = np.cumsum(run.per_step, axis=1).argmax(-1)[:, 1:] == labels[:, None]
    for k, entry in enumerate(written["by_class"]):
        assert (entry["name"], entry["num_samples"]) == (engine.class_names[k], (labels == k).sum())
        expected = right[labels == k].mean(0).tolist() if k != 3 else [None, None]
        assert entry["accuracy"] == (pytest.approx(expected) if k != 3 else expected)


@pytest.mark.parametrize(("layout", "with_state"), [("step", True), ("unrolled", True), ("unrolled", False)])
def test_latency_is_the_median_after_a_warm_up_in_milliseconds(
    layout: str, with_state: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that takes 10 ms a step by a clock of ours, and ten times as long in two first rounds and two last."""
    clock, calls = [0.0], []

    class Slow:
        is_fixed = Engine.is_fixed

        def __init__(self) -> None:
            self.layout, self.with_state = layout, with_state

        def run(self, image: np.ndarray[Any, Any], T: int) -> None:
            assert image.shape == (1, 2)
            calls.append((T, image[0, 0]))
            rounds = [t for t, _ in calls].count(T)
            clock[0] += T * (0.1 if rounds in (1, 2, 6, 7) else 0.01)

    monkeypatch.setattr(sweeping, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    latency = sweeping.measure_latency(Slow(), np.array([[0.0, 0], [1, 0], [2, 0]]), (1, 4), 5)  # type: ignore[arg-type]
    if layout == "unrolled" and not with_state:  # all steps are run whatever T is
        assert latency == {1: pytest.approx(40.0), 4: pytest.approx(40.0)}
        assert calls == [(4, k) for k in (1, 2, 0, 1, 2, 0, 1)]
    else:
        assert latency == {1: pytest.approx(10.0), 4: pytest.approx(40.0)}
        assert calls == [(T, k) for k in (1, 2, 0, 1, 2, 0, 1) for T in (1, 4)]


@pytest.mark.parametrize(("a_call", "rounds"), [(30.0, 5), (15.0, 5), (5.0, 13), (1.0, 32)])
def test_timing_ends_after_a_minute_and_three_rounds(
    a_call: float, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of T = 1 to 64 a round alone may take that long."""
    clock, calls = [0.0], []

    def run(image: np.ndarray[Any, Any], T: int) -> None:
        calls.append(T)
        clock[0] += a_call

    monkeypatch.setattr(sweeping, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    assert sweeping.median_ms(run, np.zeros((2, 2)), (4,), repeats=30, warm_up=2) == {4: 1e3 * a_call}
    assert len(calls) == rounds


def test_a_tally_goes_on_where_it_was_kept() -> None:
    engine = Engine(exported("unrolled"))
    x, labels = digits().images[:40], digits().labels[:40]
    whole, first = Tally(engine, 3), Tally(engine, 3)
    for tally, parts in ((whole, (slice(0, 40),)), (first, (slice(0, 24),))):
        for part in parts:
            result, counts = engine.count(x[part], 3)
            tally.add(result.per_step, counts, labels[part])
    later, kept = Tally(engine, 3), first.row(3, 1.0)
    later.restore(first.arrays())
    result, counts = engine.count(x[24:], 3)
    later.add(result.per_step, counts, labels[24:])
    assert later.row(3, 1.0) == whole.row(3, 1.0)
    assert later.details((1, 3)) == whole.details((1, 3))
    assert first.row(3, 1.0) == kept  # its sums are not those that go on


@pytest.mark.parametrize(
    ("options", "calls"), [({"layout": "step"}, 1), ({"layout": "unrolled", "T": 3, "with_state": True}, 2)]
)
def test_chunks_with_state_compute_the_first_layer_again(options: dict[str, Any], calls: int) -> None:
    engine = Engine(exported(**options))
    (row,) = sweep(engine, digits().images[:8], digits().labels[:8], (5,), num_timed=1).rows
    assert row.energy_pj == pytest.approx(0.9 * row.ac_ops + 4.6 * row.mac_ops)
    assert row.energy_once_pj == pytest.approx(0.9 * row.ac_ops + 4.6 * row.mac_ops * calls / 5)


def test_the_anns_energy_is_compared_by_the_convention_of_the_paper() -> None:
    engine = Engine(exported("unrolled"))
    engine.metadata["layers"][1]["binary"] = False  # then the exact energy is another
    result = sweep(engine, digits().images[:8], digits().labels[:8], (2,), num_timed=1)
    (row,) = result.rows
    assert row.energy_exact_pj > row.energy_pj
    assert row.ann_ratio == pytest.approx(result.details["ann"]["energy_pj"] / row.energy_pj)


def test_layers_of_another_precision_than_the_model_have_their_own_price() -> None:
    engine = Engine(exported("unrolled"))
    engine.precision = "int8"
    for layer in engine.metadata["layers"][1:]:
        layer["precision"] = "int8"
    result = sweep(engine, digits().images[:8], digits().labels[:8], (2,), num_timed=1)
    assert result.rows[0].energy_pj == pytest.approx(0.1 * result.rows[0].ac_ops + 4.6 * result.rows[0].mac_ops)
    assert result.details["constants"] == CONSTANTS["int8"].to_dict()
    adds = result.details["other_ops"]["bias_adds"]
    assert result.details["other_ops_pj"]["bias_adds"] == pytest.approx(0.9 * adds) and adds > 0
    own = energy_constants("int8", ac_pj=0.2)
    of_one = sweep(engine, digits().images[:8], digits().labels[:8], (2,), num_timed=1, constants=own)
    in_float32 = other_ops_pj(engine.metadata, EnergyConstants(0.2, 4.6, "ours"))
    assert of_one.details["other_ops_pj"] == pytest.approx(in_float32)
    engine.metadata["layers"] = []
    assert sweep(engine, digits().images[:8], digits().labels[:8], (2,), num_timed=1).rows[0].ann_ratio is None


def test_prices_are_those_of_each_precision_unless_given() -> None:
    layers = [{"precision": "fp32"}, {"precision": "fp16"}, {"precision": "int8"}]
    shown = {
        "Horowitz": "1.5 pJ a multiply-accumulate and 0.4 pJ an addition in fp16, "
        "4.6 pJ a multiply-accumulate and 0.9 pJ an addition in fp32, "
        "0.3 pJ a multiply-accumulate and 0.1 pJ an addition in int8",
        "given: ac_pj 0.5, mac_pj 2": "2 pJ a multiply-accumulate and 0.5 pJ an addition",
    }
    for source, prices in shown.items():
        details = {"constants": {"ac_pj": 0.5, "mac_pj": 2.0, "source": source}, "layers": layers}
        assert _prices(SimpleNamespace(details=details)) == prices  # type: ignore[arg-type]
    details = {"constants": energy_constants("int8", ac_pj=0.2).to_dict(), "layers": layers}
    assert _prices(SimpleNamespace(details=details)) == (  # type: ignore[arg-type]
        "1.5 pJ a multiply-accumulate and 0.2 pJ an addition in fp16, "
        "4.6 pJ a multiply-accumulate and 0.2 pJ an addition in fp32, "
        "0.3 pJ a multiply-accumulate and 0.2 pJ an addition in int8"
    )


def test_a_precision_without_cited_energies_needs_ones_own() -> None:
    engine = Engine(exported("unrolled"))
    engine.precision = "fp4"
    x, labels = digits().images[:4], digits().labels[:4]
    with pytest.raises(ValueError, match="no cited energies for precision 'fp4'"):
        sweep(engine, x, labels, (1,), num_timed=1)
    result = sweep(engine, x, labels, (1,), num_timed=1, constants=EnergyConstants(1.0, 2.0, "ours"))
    assert result.rows[0].energy_pj == result.rows[0].ac_ops + 2 * result.rows[0].mac_ops


def test_labels_that_do_not_fit() -> None:
    engine = Engine(exported("unrolled"))
    x = digits().images[:4]
    with pytest.raises(ValueError, match="every image needs a label: 4 images, 3 labels"):
        sweep(engine, x, np.zeros(3, np.int64), (1,))
    with pytest.raises(ValueError, match="every image needs a label: 0 images, 0 labels"):
        sweep(engine, x[:0], np.zeros(0, np.int64), (1,))
    for low, high in ((0, 10), (-1, 2)):
        with pytest.raises(ValueError, match=rf"labels run from {low} to {high}, but .* has 10 classes"):
            sweep(engine, x, np.array([low, 1, 2, high]), (1,))
    labels = np.zeros(4, np.int64)
    others = (labels.tolist(), torch.tensor(labels), labels.astype(float), labels > 0, labels[:, None])
    for other, got in zip(others, ("list", "Tensor", r"float64 \[4\]", r"bool \[4\]", r"int64 \[4, 1\]"), strict=True):
        with pytest.raises(ValueError, match=rf"labels must be a NumPy array of whole numbers \[N\].*, got {got}$"):
            sweep(engine, x, other, (1,))
    with pytest.raises(ValueError, match="num_timed must be at least 1, got 0"):
        sweep(engine, x, labels, (1,), num_timed=0)


def test_more_steps_than_the_graph_has_are_refused_before_the_run() -> None:
    engine, x, labels = Engine(exported("unrolled")), digits().images[:4], digits().labels[:4]
    with pytest.raises(ValueError, match="is unrolled to T=4 and cannot run T=5"):
        check_images(engine, x, labels, 5)


def test_steps_may_come_one_by_one_but_must_be_some(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, x, labels = Engine(exported("unrolled")), digits().images[:4], digits().labels[:4]
    run, timed = engine.run, list[int]()
    monkeypatch.setattr(engine, "run", lambda image, T: (timed.append(T), run(image, T)))
    assert [row.T for row in sweep(engine, x, labels, iter((np.int64(2), 1)), num_timed=1).rows] == [2, 1]
    assert timed == [2, 2, 2]  # two rounds to warm up, and the one that was asked for
    for steps, message in ([[], "steps holds no T"], [(1, 2.0), "T must be a whole number, got 2.0"]):
        with pytest.raises(ValueError, match=message):
            sweep(engine, x, labels, steps)


def test_images_without_an_answer_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tetdeploy.engine.LARGEST", 3.1e38)  # one that a network of great weights cannot take
    engine = Engine(exported("unrolled", T=4, normalize=False), threads=1)
    x, labels = np.zeros((6, 1, 8, 8), np.float32), np.zeros(6, np.int64)
    x[[1, 3]] = 3e38
    said = "2 of 6 images run together have NaN or infinite logits, the first at step 2: no answer"
    with pytest.raises(ValueError, match=said):
        sweep(engine, x, labels, (1, 2), num_timed=1)
    with pytest.raises(ValueError, match=said):
        run_answers(engine, x, labels, 2)
    per_step = np.zeros((5, 3, 10))
    per_step[4, 1, 7], per_step[2, 2, 0] = np.inf, np.nan
    with pytest.raises(ValueError, match=r"2 of 5 images .* the first at step 2"):
        check_logits(per_step)


def test_engineering_units() -> None:
    assert [count(n) for n in (0, 12, 1_234, 5_678_000, 2.2e9)] == ["0", "12", "1.23 k", "5.68 M", "2.2 G"]
    assert [energy(pj) for pj in (0.5, 900, 1.92e6, 3e9)] == ["0.5 pJ", "900 pJ", "1.92 µJ", "3 mJ"]


def test_the_table_marks_the_trained_T_and_the_plot_is_a_picture(tmp_path: Path) -> None:
    engine = Engine(exported("unrolled"))
    data = digits()
    result = sweep(engine, data.images[:20], data.labels[:20], (1, 2, 3), num_timed=1)
    console = Console(width=80, file=io.StringIO())
    console.print(sweep_table(result, 2))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "2*" in text
    assert "…" not in text  # nothing is cut at 80 columns
    picture = tmp_path / "plot.png"
    for model in (result.model, r"$\frac$.onnx", os.fsdecode(b"m\xff.onnx"), "数字-שלום.onnx"):  # any name, no formula
        plot_sweep(dataclasses.replace(result, model=model), picture, 2)
        with Image.open(picture) as image:
            assert min(image.size) > 400


@pytest.mark.parametrize("steps", [(1, 2), (3, 4)])
def test_the_star_of_the_trained_T_is_told_where_a_row_has_it(
    steps: tuple[int, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    engine, data = Engine(exported("unrolled")), digits()
    print_sweep(sweep(engine, data.images[:4], data.labels[:4], steps, num_timed=1), engine, ["paper"])
    said = capsys.readouterr().out
    assert ("4*" in said) == ("* the T of the training" in said) == (engine.trained_T in steps)
    assert "energy per image: the first layer multiplies" in said


def test_tables_of_layers_and_of_other_operations() -> None:
    engine = Engine(exported("unrolled"))
    result = sweep(engine, digits().images[:20], digits().labels[:20], (1, 2), num_timed=1)
    row = result.rows[1]
    layers = printed(layers_table(result.details, 2))
    assert [line.split()[0] for line in layers if line.strip()][-5:-1] == [
        "encode.0",
        "layer2.0",
        "layer3.1",
        "readout.2",
    ]
    assert layers[-2].split("  ")[-1].strip() == energy(row.energy_exact_pj)
    once = printed(layers_table(result.details, 2, conventions=("once",)))
    assert once[-2].split("  ")[-1].strip() == energy(row.energy_once_pj)
    assert row.energy_once_pj < row.energy_pj
    others = "\n".join(printed(other_ops_table(result.details, 2)))
    assert f"{count(2 * result.details['other_ops']['bias_adds'])}" in others
    assert f"{energy(2 * result.details['other_ops_pj']['neuron_ops'])}" in others
    assert "once" in printed(sweep_table(result, conventions=("once",)))[1]


def two_steps() -> Sweep:
    rows = [Row(T, 0.9 + T / 100, 0.1, 2e6 * T, 3e5 * T, 4e6 * T, 5e6 * T, 0.5 * T, 1e6, 2.0 / T) for T in (1, 2)]
    return Sweep("m.onnx", "digits", 9, tuple(rows), {}, {"ann": {"energy_pj": 8e6}})


def cells(table: Table) -> list[tuple[Any, ...]]:
    return list(zip(*(column.cells for column in table.columns), strict=True))


def test_each_number_of_a_sweep_is_in_its_column() -> None:
    assert cells(sweep_table(two_steps(), 2)) == [
        ("1 ", "91.00%", "0.100", "2 M", "300 k", "4 µJ", "5 µJ", "2", "0.50 ms"),
        ("2*", "92.00%", "0.100", "4 M", "600 k", "8 µJ", "10 µJ", "1", "1.00 ms"),
    ]
    once = cells(sweep_table(two_steps(), 2, conventions=("once", "paper")))  # with which the ANN is compared
    assert [row[5:8] for row in once] == [("1 µJ", "4 µJ", "8"), ("1 µJ", "8 µJ", "8")]


def test_each_number_of_a_layer_is_in_its_column() -> None:
    row = {"T": 1, "ac_ops": 2e6, "mac_ops": 0.0, "energy_pj": 1e6, "energy_exact_pj": 3e6, "input_rate": 0.25}
    layer = {"name": "conv", "from_input": False, "binary": True, "fan_out": 9.0, "rows": [row]}
    first, *_ = cells(layers_table({"layers": [layer]}, 1))
    assert first == ("conv", "spikes", "0.250", "9", "2 M", "0", "1 µJ", "3 µJ")


def test_a_plot_is_of_per_cent_and_microjoules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda axes, x, y, *args, **options: drawn.append((x, y)))
    plot_sweep(two_steps(), tmp_path / "plot.png", 2)
    assert drawn == [([1, 2], pytest.approx([91, 92])), ([1, 2], pytest.approx([4, 8]))]


def test_one_image_fills_no_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = list[Figure]()
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure))
    rows = tuple(dataclasses.replace(row, accuracy=0.9 + row.T / 359) for row in two_steps().rows)
    plot_sweep(dataclasses.replace(two_steps(), rows=rows, num_samples=359), tmp_path / "plot.png", 2)
    low, high = figures[0].axes[0].get_ylim()
    assert high - low == pytest.approx(2)


def test_a_plot_has_the_format_of_its_ending(tmp_path: Path) -> None:
    plot_sweep(two_steps(), tmp_path / "plot.pdf", 2)
    assert (tmp_path / "plot.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("trained_T", [1, 2, 3])
def test_all_of_a_plot_lies_within_its_axes(trained_T: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = list[Figure]()
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure))
    rows = tuple(dataclasses.replace(two_steps().rows[0], T=T, accuracy=1.01 - 0.01 * T) for T in (1, 2, 3))
    plot_sweep(dataclasses.replace(two_steps(), rows=rows), tmp_path / "plot.png", trained_T)
    figures[0].draw_without_rendering()
    left, right = figures[0].axes
    (text,) = left.texts
    box = text.get_window_extent()
    assert list(left.lines[-1].get_xdata()) == [trained_T] * 2
    assert left.bbox.x0 <= box.x0 and box.x1 <= left.bbox.x1
    assert box.y1 < left.transData.transform((1, 98))[1]
    assert left.get_ylim()[1] == 100 and right.get_ylim()[0] == 0
    assert all(tick == round(tick) for tick in left.get_xticks())


def printed(table: Table) -> list[str]:
    """The lines of a table in a terminal of 100 columns; none is cut."""
    console = Console(width=100, file=io.StringIO())
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "…" not in text
    return [line.rstrip() for line in text.splitlines()]


def test_every_convention_can_be_asked_for() -> None:
    (option,) = (option for option in sweep_command.params if option.name == "conventions")
    assert isinstance(option.type, click.Choice)
    assert list(option.type.choices) == list(BILLS) == list(CONVENTIONS)
