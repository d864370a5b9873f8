"""The threshold of early exit against every other one, what it keeps and saves, its commands and its section."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from command_helpers import invoke, printed, refused
from export_helpers import digits, engine, exported, frames
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from report_helpers import EARLY_EXIT, write
from report_helpers import result as sweep_result
from rich.text import Text

from tetdeploy.data import load_data, save_npz, split_validation
from tetdeploy.data.fingerprint import images_sha256
from tetdeploy.early_exit import CRITERIA, Exit, exit_path, load_rule
from tetdeploy.early_exit.savings import measure
from tetdeploy.early_exit.threshold import (
    Answers,
    Frontier,
    Paired,
    find_threshold,
    images_to_prove,
    provable_loss,
    run_answers,
    shows_less,
)
from tetdeploy.energy import Operations, layers_of
from tetdeploy.engine import Engine
from tetdeploy.report.early_exit import _frontier_table, by_steps, calibration_shown, compared, savings_shown
from tetdeploy.report.early_exit import rule as rule_shown
from tetdeploy.report.page import document_of
from tetdeploy.report.sources import read_results
from tetdeploy.storage.files import sha256_of
from tetdeploy.storage.tensor_file import write_tensors

Array = np.ndarray[Any, Any]
T = 6


def own_labels(start: int, count: int) -> tuple[Array, Array]:
    """Digits, each with the class that the untrained network gives it after T steps: early exit then loses where an
    earlier answer differs from the last."""
    x = digits().images[start : start + count]
    return x, engine("step").run(x, T).logits.argmax(-1)


# ---------------------------------------------------------------------------------------------------- the calibration


@st.composite
def answers(draw: st.DrawFn) -> Answers:
    shape = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    few = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])  # so that many are equal
    certainty = draw(hnp.arrays(float, shape, elements=few | st.floats(0, 1)))
    return Answers(draw(hnp.arrays(bool, shape)), dict.fromkeys(CRITERIA, certainty))


def outcome(some: Answers, exit: Exit) -> tuple[int, int, int]:
    """Steps of all images together, answers lost and gained, image by image."""
    steps = some.steps(exit)
    pairs = [(bool(right[-1]), bool(right[t - 1])) for right, t in zip(some.right, steps, strict=True)]
    return int(steps.sum()), pairs.count((True, False)), pairs.count((False, True))


@given(answers(), st.integers(1, 5), st.floats(0, 1))
def test_no_threshold_takes_fewer_steps_for_the_loss(some: Answers, min_T: int, loss: float) -> None:
    N, steps = some.right.shape
    min_T = min(min_T, steps)
    frontier = Frontier.of(some, "margin", min_T)
    for k, threshold in enumerate(frontier.threshold):
        claimed = int(frontier.steps[k]), int(frontier.lost[k]), int(frontier.gained[k])
        assert claimed == outcome(some, Exit(float(threshold), "margin", min_T))
    values = np.unique(np.append(some.certainty["margin"], [0.0, 1.0]))
    every = {outcome(some, Exit(float(v), "margin", min_T)) for v in [*values, *((values[1:] + values[:-1]) / 2)]}
    assert every == set(zip(frontier.steps.tolist(), frontier.lost.tolist(), frontier.gained.tolist(), strict=True))
    point = frontier.cheapest(loss, confident=False)
    assert point.paired.loss <= loss + 1e-9
    fitting = [taken for taken, lost, gained in every if lost - gained <= loss * N + 1e-9]
    assert point.mean_T * N == pytest.approx(min(fitting))
    assert point.accuracy == pytest.approx(some.right[:, -1].mean() - point.paired.loss)


def test_a_calibration_by_hand() -> None:
    """Three images, three steps. The first is right from the start, the second from its second step on, the third
    only at the first; the surer, the sooner a falling threshold stops them."""
    right = np.array([[True, True, True], [False, True, True], [True, False, False]])
    sure = np.array([[0.9, 0.8, 0.99], [0.6, 0.7, 0.99], [0.5, 0.4, 0.99]])
    some = Answers(right, {"confidence": sure, "margin": sure / 2})
    frontier = Frontier.of(some, "confidence")
    np.testing.assert_allclose(frontier.threshold, [1, 0.8, 0.65, 0.55, 0.25])
    assert frontier.steps.tolist() == [9, 7, 6, 5, 3]
    assert frontier.lost.tolist() == [0, 0, 0, 1, 1] and frontier.gained.tolist() == [0, 0, 0, 0, 1]
    assert frontier.cheapest(0.0, confident=False).mean_T == 1.0  # at last one answer turned wrong and another right
    found = find_threshold(some, loss=0.0, criteria=["margin"], confident=False)
    assert found.point.exit == Exit(0.125, "margin") and found.accuracy_by_T == [2 / 3, 2 / 3, 2 / 3]
    assert find_threshold(some, min_T=3).point.mean_T == 3
    earliest = find_threshold(some, loss=1.0, confident=False)
    assert earliest.to_dict(engine("step"), "")["num_images_by_steps"] == [3, 0, 0]
    for options, message in (
        ({"loss": -0.1}, "loss of accuracy must lie in 0..1, a fraction, got -0.1"),
        ({"loss": 1.5}, "loss of accuracy must lie in 0..1, a fraction, got 1.5"),
        ({"min_T": 4}, "min_T must lie within the T=3 steps, got 4"),
        ({"confident": "no"}, "confident must be True or False, got .no."),
    ):
        with pytest.raises(ValueError, match=message):
            find_threshold(some, **options)


def test_certainties_with_no_number_between_them_are_told_apart() -> None:
    low = np.nextafter(0.5, 1)
    high = np.nextafter(low, 1)
    assert (low + high) / 2 == high
    some = Answers(np.ones((2, 2), bool), dict.fromkeys(CRITERIA, np.array([[high, 1.0], [low, 1.0]])))
    frontier = Frontier.of(some, "margin")
    taken = [outcome(some, Exit(float(threshold), "margin"))[0] for threshold in frontier.threshold]
    assert taken == frontier.steps.tolist() == [4, 3, 2]


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.01, 0.05, 0.2]))
@settings(max_examples=25)
def test_a_confident_threshold_and_all_above_it_are_shown_to_lose_less(seed: int, loss: float) -> None:
    generator = np.random.default_rng(seed)
    certain = generator.random((300, 4))
    some = Answers(generator.random((300, 4)) < 0.6 + 0.4 * certain, {"confidence": certain, "margin": certain**2})
    frontier = Frontier.of(some, "margin")
    point = frontier.cheapest(loss)
    paired = [Paired(300, int(a), int(b)) for a, b in zip(frontier.lost, frontier.gained, strict=True)]
    above = [k for k in range(1, len(paired)) if frontier.threshold[k] >= point.exit.threshold]
    assert all(shows_less(300, paired[k].lost, paired[k].gained, loss) for k in above)
    if len(above) + 1 < len(paired):
        after = paired[len(above) + 1]
        assert not shows_less(300, after.lost, after.gained, loss)
    assert point.mean_T >= frontier.cheapest(loss, confident=False).mean_T


def test_a_confident_threshold_holds_on_other_images() -> None:
    """Of draws of 2,000 images one in forty may lose more elsewhere; the best on the draw does so in most cases."""
    generator = np.random.default_rng(0)

    def draw(count: int) -> Answers:
        sure = generator.random(count)
        right = generator.random(count) < 0.9
        early = np.where(generator.random(count) < 0.15 * (1 - sure), ~right, right)
        certain = np.stack([sure, np.ones(count)], axis=1)
        return Answers(np.stack([early & right, right], axis=1), {"confidence": certain, "margin": certain})

    truth = Frontier.of(draw(400_000), "margin")

    def true_loss(threshold: float) -> float:
        k = int(np.searchsorted(-truth.threshold, -threshold))
        return float(truth.lost[k] - truth.gained[k]) / truth.num_images

    exceeded = {True: 0, False: 0}
    for _ in range(60):
        frontier = Frontier.of(draw(2000), "margin")
        for confident in exceeded:
            exceeded[confident] += true_loss(frontier.cheapest(0.01, confident=confident).exit.threshold) > 0.01
    assert exceeded[True] <= 4 < 30 < exceeded[False]


def test_the_criterion_of_fewer_steps_is_taken() -> None:
    right = np.array([[True, True], [False, True]])
    tells, does_not = np.array([[0.9, 1.0], [0.3, 1.0]]), np.array([[0.3, 1.0], [0.9, 1.0]])
    for sure in ({"confidence": tells, "margin": does_not}, {"confidence": does_not, "margin": tells}):
        some = Answers(right, sure)
        best = find_threshold(some, loss=0.0, confident=False).point
        assert sure[best.exit.criterion] is tells and best.mean_T == 1.5 and best.paired == Paired(2, 0, 0)


def test_fewer_steps_come_first_and_then_the_smaller_loss() -> None:
    right = np.array([[True, True], [False, True]])
    both, wrong, correct = (np.array([[a, 1.0], [b, 1.0]]) for a, b in ((0.9, 0.8), (0.0, 0.9), (0.9, 0.0)))
    for confidence, mean_T, paired in ((both, 1.0, Paired(2, 1, 0)), (wrong, 1.5, Paired(2, 0, 0))):
        some = Answers(right, {"confidence": confidence, "margin": correct})
        point = find_threshold(some, loss=0.5, confident=False).point
        assert (point.mean_T, point.paired) == (mean_T, paired)


def test_a_loss_in_percent_may_be_met_to_the_image() -> None:
    """Though 0.7 / 100 is below 7 / 1000 in floating point."""
    right = np.ones((1000, 2), bool)
    right[:7, 0] = False
    frontier = Frontier.of(Answers(right, dict.fromkeys(CRITERIA, np.where(right, 0.0, 0.5))), "margin")
    assert frontier.cheapest(0.7 / 100, confident=False).paired == Paired(1000, 7, 0)


def test_paired_interval() -> None:
    """Bonett and Price: one is added to each kind of flip, two to the images."""
    paired = Paired(98, lost=7, gained=3)
    assert paired.loss == pytest.approx(0.04082, abs=1e-5)
    assert paired.loss_95 == pytest.approx(1.96 * np.sqrt((0.08 + 0.04 - 0.04**2) / 100))
    assert Paired(98, 0, 0).loss_95 == pytest.approx(1.96 * np.sqrt(0.02 / 100))  # no flips prove little


@pytest.mark.parametrize("loss", [0.05, 0.002, 1e-4])
def test_so_many_images_prove_a_loss_and_one_fewer_do_not(loss: float) -> None:
    count = images_to_prove(loss)
    assert provable_loss(count) < loss <= provable_loss(count - 1)
    assert shows_less(count, 0, 0, loss) and not shows_less(count - 1, 0, 0, loss)
    assert not shows_less(count, 1, 0, loss)


def test_that_no_answer_flips_is_no_proof_of_no_loss() -> None:
    assert not shows_less(1_000_000, 0, 0, 0.0)


def test_the_score_test_is_tangos() -> None:
    """By its definition: with exactly the allowed loss, the rate of gains is the likeliest one, and the difference lies
    more than 1.96 standard deviations below."""
    for N, lost, gained, loss in itertools.product((300, 5000), (0, 3, 20), (0, 2, 25), (0.002, 0.02, 0.1)):
        rates = np.linspace(1e-9, 0.499 - loss / 2, 400_001)
        both = 2 * rates + loss
        likelihood = lost * np.log(rates + loss) + gained * np.log(rates) + (N - lost - gained) * np.log1p(-both)
        rate = rates[np.argmax(likelihood)]
        score = (lost - gained - N * loss) / np.sqrt(N * (2 * rate + loss * (1 - loss)))
        if abs(score + 1.96) > 0.01:
            assert shows_less(N, lost, gained, loss) == (score < -1.96), (N, lost, gained, loss)


@pytest.mark.parametrize("gains", [0.0, 0.3, 2.0, 12.0, 40.0])
def test_what_loses_as_much_as_is_allowed_is_rarely_shown_to_lose_less(gains: float) -> None:
    """The level: by Poisson's law, at all numbers of images at which it could be worst."""

    def law(mean: float, count: int) -> Array:
        terms = np.cumsum(np.log(np.maximum(np.arange(count), 1)))
        return np.exp(np.arange(count) * np.log(max(mean, 1e-300)) - mean - terms)

    for expected in np.arange(3.5, 40, 0.5):
        loss = 0.001
        N, count = round(expected / loss), int(expected + gains + 9 * np.sqrt(expected + gains) + 10)
        lost, gained = np.arange(count)[:, None], np.arange(count)[None, :]
        shown = shows_less(N, lost, gained, loss)
        assert (law(expected + gains, count)[:, None] * law(gains, count))[shown].sum() < 0.0257


@pytest.mark.parametrize(
    ("num_images", "loss", "gains", "most"),
    [(20, 0.3, 0.2987, 0.032), (23, 0.01, 0.18, 0.031), (301, 0.001, 0.0146, 0.029), (24, 0.3, 0.34999, 0.043)],
)
def test_few_images_nearly_keep_the_level(num_images: int, loss: float, gains: float, most: float) -> None:
    """By the trinomial law, where a search found it worst."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, num_images + 1)))])  # of factorials
    lost, gained = np.mgrid[: num_images + 1, : num_images + 1].reshape(2, -1)
    lost, gained = (count[lost + gained <= num_images] for count in (lost, gained))
    same = num_images - lost - gained
    chance = logs[num_images] - logs[lost] - logs[gained] - logs[same]
    chance += lost * np.log(gains + loss) + gained * np.log(gains) + same * np.log1p(-2 * gains - loss)
    shown = shows_less(num_images, lost, gained, loss)
    assert most - 0.001 < np.exp(chance[shown]).sum() < most


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_engine_does_what_the_calibration_says(criterion: Any) -> None:
    x, labels = own_labels(0, 90)
    ticks: list[int] = []
    some = run_answers(engine("step"), x, labels, T, batch_size=40, tick=ticks.append)
    assert ticks == [40, 40, 10] and some.right.shape == (90, T) and some.right[:, -1].all()
    found = find_threshold(some, loss=0.1, criteria=[criterion]).point
    assert 1 < found.mean_T < T and found.paired.gained == 0 and 0 < found.paired.lost <= 4
    result = engine("step").run(x, T, exit=found.exit)
    np.testing.assert_array_equal(result.steps, some.steps(found.exit))
    assert result.steps.mean() == pytest.approx(found.mean_T)
    assert (result.logits.argmax(-1) == labels).mean() == pytest.approx(found.accuracy)


# -------------------------------------------------------------------------------------------------------- the savings


def test_savings_are_those_of_the_steps_that_each_image_took() -> None:
    runner, (x, labels) = engine("step"), own_labels(100, 50)
    exit = find_threshold(run_answers(runner, x, labels, T), loss=0.2).point.exit
    alone = runner.run(x, T, exit=exit)
    other = np.flatnonzero(alone.logits.argmax(-1) != labels)
    labels[other[0]] = alone.logits[other[0]].argmax()  # this one is right by early exit alone
    result = measure(runner, x, labels, exit, T, data="some digits", batch_size=32)
    early = result["early_exit"]
    assert (result["data"], result["num_samples"], early["batch_size"]) == ("some digits", 50, 32)
    assert early["mean_T"] == pytest.approx(alone.steps.mean())
    assert [entry["num_images"] for entry in early["by_steps"]] == np.bincount(alone.steps, minlength=T + 1)[
        1:
    ].tolist()
    right = alone.logits.argmax(-1) == labels
    assert early["accuracy"] == pytest.approx(right.mean())
    for entry in early["by_steps"]:
        those = right[alone.steps == entry["T"]]
        assert entry["accuracy"] == (pytest.approx(those.mean()) if len(those) else None)
    assert early["fixed_accuracy"] == 0.98 == result["rows"][-1]["accuracy"]
    assert (early["lost"], early["gained"]) == (len(other) - 1, 1) and early["lost"] > 1
    assert [(row["T"], row["accuracy"]) for row in result["rows"]] == [
        (t, pytest.approx((runner.run(x, t).logits.argmax(-1) == labels).mean())) for t in range(1, T + 1)
    ]
    each = []
    for image, steps in zip(x, alone.steps, strict=True):
        operations = Operations(layers_of(runner.metadata))
        operations.add(runner.count(image[None], int(steps))[1], 1, int(steps))
        each.append(operations.at(int(steps)))
    for key in ("ac_ops", "mac_ops", "energy_pj", "energy_exact_pj", "energy_once_pj"):
        assert early["cost"][key] == pytest.approx(np.mean([getattr(count, key) for count in each]))
        assert early["fixed_cost"][key] == pytest.approx(result["rows"][-1][key])
        assert early["cost"][key] < early["fixed_cost"][key]
    assert early["speedup"] == pytest.approx(early["fixed_seconds"] / early["seconds"])


def test_results_for_numbers_of_numpy_are_json() -> None:
    runner, (x, labels) = engine("step"), own_labels(0, 4)
    found = find_threshold(run_answers(runner, x, labels, np.int64(2)), loss=np.float32(0.5), min_T=np.int64(1))  # type: ignore[arg-type]
    assert json.loads(json.dumps(found.to_dict(runner, "digits")))["allowed_loss"] == 0.5
    exit = Exit(np.float32(0.5), min_T=np.int64(2))  # type: ignore[arg-type]
    result = measure(runner, x, labels, exit, np.int64(3), batch_size=np.int64(2))  # type: ignore[arg-type]
    early = json.loads(json.dumps(result))["early_exit"]
    assert [early[key] for key in ("threshold", "min_T", "T", "batch_size")] == [0.5, 2, 3, 2]


def test_labels_that_do_not_fit_are_refused() -> None:
    x, labels = own_labels(0, 4)
    for wrong, message in (
        (labels[:3], "every image needs a label: 4 images, 3 labels"),
        (labels + 10, r"labels run from \d+ to \d+, but step\.onnx has 10 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            run_answers(engine("step"), x, wrong, 2)
        with pytest.raises(ValueError, match=message):
            measure(engine("step"), x, wrong, Exit(0.5), 2)


def test_both_ways_take_turns_after_a_round_to_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[bool, int]] = []
    run = Engine.run

    def recorded(self: Engine, x: Array, T: int | None = None, *, exit: Exit | None = None) -> Any:
        calls.append((exit is not None, len(x)))
        return run(self, x, T, exit=exit)

    monkeypatch.setattr(Engine, "run", recorded)
    monkeypatch.setattr(
        "tetdeploy.early_exit.savings.time.perf_counter", lambda: sum(1 if early else 3 for early, _ in calls)
    )
    x, labels = digits().images[:10], digits().labels[:10]
    early = measure(engine("step"), x, labels, Exit(0.5), 2, batch_size=4)["early_exit"]
    assert (early["fixed_seconds"], early["seconds"], early["speedup"]) == (9, 3, 3)  # of three batches
    assert [early for early, _ in calls] == [True, False, True, False, False, True, True, False]
    assert [size for _, size in calls] == [4, 4, 4, 4, 4, 4, 2, 2]


# ------------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copy(exported("step"), tmp_path / "m.onnx"))


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    x, labels = own_labels(0, 120)
    np.savez(tmp_path / "held-out.npz", images=x, labels=labels)
    return tmp_path / "held-out.npz"


def describe(model: Path, **changes: Any) -> None:
    """Change the metadata in a model file."""
    proto = onnx.load(model)
    (entry,) = [prop for prop in proto.metadata_props if prop.key == "tetdeploy"]
    entry.value = json.dumps(json.loads(entry.value) | changes)
    onnx.save(proto, model)


def test_a_rule_of_an_earlier_version_is_no_point_estimate(tmp_path: Path) -> None:
    model = tmp_path / "m.onnx"
    model.write_bytes(b"model")
    content = {"threshold": 0.5, "criterion": "margin", "min_T": 1, "T": 4, "model_sha256": sha256_of(model)}
    for confident, written in ((True, content), (False, content | {"confident": False})):
        exit_path(model).write_text(json.dumps(written))
        assert load_rule(model) == (Exit(0.5, "margin"), 4, confident, None)


def test_calibrate_then_measure_then_report(model: Path, held_out: Path, tmp_path: Path) -> None:
    output = printed("calibrate", model, "--data", held_out, "--T", T, "--loss", 5, "--json", tmp_path / "copy.json")
    content = json.loads(exit_path(model).read_text())
    assert content == json.loads((tmp_path / "copy.json").read_text())
    exit, calibrated_T, _, images_sha256 = load_rule(model)
    assert (exit.threshold, exit.criterion, calibrated_T) == (content["threshold"], content["criterion"], T)
    assert images_sha256 == content["images_sha256"]
    assert content["fixed_accuracy"] == 1.0 and 0.95 <= content["accuracy"] < 1 and content["mean_T"] < T
    assert sum(content["num_images_by_steps"]) == content["num_samples"] == 120
    steps = sum(t * count for t, count in enumerate(content["num_images_by_steps"], start=1))
    assert steps / 120 == pytest.approx(content["mean_T"])
    assert [entry["allowed_loss"] for entry in content["frontier"]] == [0, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05]
    assert "5*" in output and f"{content['threshold']:.4f}" in output
    assert "one image is" not in output  # 5 % of 120 images are 6
    assert f"next: tetdeploy early-exit {shlex.quote(str(model))}" in output

    output = printed("early-exit", model, "--data", held_out, "--threads", 1)
    result = json.loads((tmp_path / "m.early-exit.json").read_text())
    assert result["early_exit"]["mean_T"] == pytest.approx(content["mean_T"])
    assert result["early_exit"]["accuracy"] == pytest.approx(content["accuracy"])
    assert f"{content['mean_T']:.2f}" in output and "time of the run" in output
    assert "promises nothing" not in output
    same = "the threshold was found on these very images"
    assert same in output and result["early_exit"]["calibrated_on"]
    options = "--limit", 50, "--batch-size", 16, "--json", tmp_path / "longer.json"
    said = " ".join(printed("early-exit", model, "--data", held_out, "--T", T + 1, *options).split())
    assert f"was found for T={T} and promises nothing against T={T + 1}; for that run" in said
    longer = json.loads((tmp_path / "longer.json").read_text())
    assert same not in said and "calibrated_on" not in longer["early_exit"]  # but on more of them
    assert (longer["data"], longer["num_samples"]) == (str(held_out), 50)
    assert [longer["early_exit"][key] for key in ("T", "batch_size")] == [T + 1, 16]

    options = "-o", tmp_path / "r.html", "--markdown", tmp_path / "r.md"
    assert "Early exit" in printed("report", tmp_path / "m.early-exit.json", *options)
    text = (tmp_path / "r.md").read_text()
    assert f"{exit.criterion} \\> {exit.threshold:.4f}" in text and f"{content['mean_T']:.2f}" in text
    assert "was found on these very images: on others it may lose more" in text


def test_what_calibrate_and_early_exit_print() -> None:
    assert by_steps([120, 60, 20]) == "1: 60.0%   2: 30.0%   3: 10.0%"
    rule = {"allowed_loss": 0.001, "criterion": "margin", "threshold": 0.99997, "accuracy": 0.9, "mean_T": 1.5}
    paired = {"loss": 0.02, "loss_95": 0.031, "lost": 7, "gained": 3}
    table = _frontier_table({"frontier": [rule | paired], "allowed_loss": 0.001, "T": 3})
    (cells,) = zip(*(column.cells for column in table.columns), strict=True)
    assert cells == ("0.1*", "margin", "0.99997", "90.00%", "2.00 ± 3.10", "7 / 3", "1.50", "50%")


@pytest.mark.parametrize(
    ("num_images", "turned", "options", "said"),
    [
        (3700, "right", {}, None),  # too few to show 0.1 points if no answer changed; here the first to stop gains
        (
            3700,
            "same",
            {},
            "3,700 images show no loss below 0.1 points with 95 % confidence; calibrate on 3,838 or more",
        ),
        (3700, "same", {"loss": 0.0}, "3,700 images show no loss below 0.1 points with 95 % confidence; allow more"),
        (5000, "same", {}, None),
        (
            5000,
            "wrong",
            {},
            "too many of the surest answers before T=2 are right only at T=2; calibrate on more images",
        ),
        (5000, "wrong", {"min_T": 2}, "2 steps are the fewest, and the most"),
        (
            500,
            "wrong",
            {"confident": False},
            "at every other threshold more is lost on these images than may be; allow",
        ),
        (500, "same", {"confident": False}, None),
        (500, "same", {}, "500 images show no loss below 0.76 points"),
        (1000, "same", {"confident": False}, None),
    ],
)
def test_calibrate_says_why_no_image_stops_early(
    num_images: int, turned: str, options: dict[str, Any], said: str | None
) -> None:
    sure = np.linspace(0.99, 0.1, num_images)[:, None].repeat(2, axis=1)
    right = np.ones((num_images, 2), bool)
    right[0] = turned != "wrong", turned != "right"
    if not options.get("confident", True) and turned == "wrong":
        sure[:] = 0.5  # so that all stop at once or none
    found = find_threshold(Answers(right, dict.fromkeys(CRITERIA, sure)), **options)
    lines = strings(calibration_shown(found.to_dict(engine("step"), "digits")))
    assert lines[0].endswith(f"step.onnx   {num_images:,} images of digits   T=2")
    assert lines[1].startswith("every image the same T, 1 to 2: ") and lines[-1].startswith("steps  ")
    assert (lines[-1] == "steps  2: 100.0%") == (found.point.mean_T == 2)  # none at 1 that no image took
    promise = "a test shows that less is lost than may be" if found.confident else "it is within what may be lost"
    assert lines[2].endswith(promise)
    few = [line for line in lines if line.startswith("one image is ")]
    assert len(few) == (num_images == 500 and not found.confident)
    assert all(line.startswith("one image is 0.2 points here, more than may be lost") for line in few)
    told = [line for line in lines if line.startswith("no image stops early: ")]
    assert len(told) == (said is not None) == (found.point.mean_T == 2)
    assert not told or told[0].startswith(f"no image stops early: {said}")


def strings(parts: Iterable[Any]) -> list[str]:
    return [str(part) for part in parts if isinstance(part, str | Text)]


@pytest.mark.parametrize(("load", "busy"), [(None, False), (0.9, False), (1.0, True)])
def test_savings_are_shown_with_their_rule_and_what_they_were_measured_on(load: float | None, busy: bool) -> None:
    machine = {"cpu": "a CPU", "cores": 2, "gpu": None, "provider": "CPUExecutionProvider"}
    result = {"model": "[b]/m.onnx", "data": "digits", "num_samples": 1200, "machine": machine}
    assert strings(savings_shown(result | {"early_exit": EARLY_EXIT | {"min_T": 2, "load": load}})) == [
        "[b]/m.onnx   1,200 images of digits   confidence > 0.9300, from T=2",
        "steps  1: 60.0%   2: 30.0%   3: 10.0%",
        "a CPU, 2 cores, CPUExecutionProvider, batches of 64",
        "Against T=3 for every image, answers turned wrong: 7, right: 3.",
        *["1.0 processes were running when this began: an idle machine is faster"] * busy,
    ]
    for threshold in ("0.9300", "0.99997", "0.999996", "0.9999999999999999", "1.0000"):
        assert rule_shown(EARLY_EXIT | {"threshold": float(threshold)}) == f"confidence > {threshold}"


def test_what_is_saved_is_told_as_all_steps_over_those_taken() -> None:
    assert list(compared(EARLY_EXIT)) == [
        ("accuracy", "92.00%", "90.00%", "2.00 ± 3.10 points lost"),
        ("mean T", "3.00", "1.50", "2.00 × less"),
        ("energy", "4 µJ", "2 µJ", "2.00 × less"),
        ("energy, exact", "6.6 µJ", "2.2 µJ", "3.00 × less"),
        ("energy, first layer once", "4 µJ", "1 µJ", "4.00 × less"),
        ("time of the run", "5 s", "2 s", "2.50 × faster"),
    ]
    *_, time = compared(EARLY_EXIT | {"fixed_seconds": 2.0, "seconds": 5.0, "speedup": 0.4})
    assert time == ("time of the run", "2 s", "5 s", "2.50 × slower")


def test_images_that_the_run_of_init_was_trained_on_are_told(model: Path, tmp_path: Path) -> None:
    first = tmp_path / "checkpoint.safetensors"
    parent = {"path": str(tmp_path), "checkpoint_sha256": ""}
    source = {"data": {"name": "digits"}, "training": {"val_fraction": 0.1}, "provenance": {"init": parent}}
    for share, told in ((0.0, "held out none of its images"), (0.05, "held out only 0.05"), (0.1, None)):
        write_tensors(first, {}, {"format": 1, "data": {"name": "digits"}, "training": {"val_fraction": share}})
        parent["checkpoint_sha256"] = sha256_of(first)
        describe(model, source=source)
        said = " ".join(printed("calibrate", model, "--T", 2).split())
        assert told in said if told else "began with" not in said
    first.write_bytes(b"another")
    assert "began with" not in printed("calibrate", model, "--T", 2)


def test_the_images_held_out_from_the_training_by_default(model: Path) -> None:
    describe(model, source={"data": {"name": "digits"}, "training": {"val_fraction": 0.1}})
    output = printed("calibrate", model, "--T", 3)
    content = json.loads(exit_path(model).read_text())
    assert (content["data"], content["num_samples"], content["T"]) == ("digits (held out)", 143, 3)
    assert content["confident"] and (content["threshold"], content["mean_T"]) == (1, 3)
    assert "143 images show no loss below 2.6 points with 95 % confidence" in output
    assert "calibrate on 3,838 or more" in output
    assert "calibrate on" not in printed("calibrate", model, "--T", 3, "--loss", 0)  # no number would do
    output = printed("calibrate", model, "--T", 3, "--point-estimate")
    assert not json.loads(exit_path(model).read_text())["confident"]
    assert "one image is 0.699 points here" in output
    output = printed("calibrate", model, "--T", 3, "--point-estimate", "--limit", 1)
    assert "one image is 100 points here" in output
    output = printed("early-exit", model, "--data", "digits", "--limit", 20)
    assert "The threshold is a point estimate" in " ".join(output.split())
    document = document_of(read_results([model.with_suffix(".early-exit.json")]))
    assert "The threshold is a point estimate" in str(document)
    assert "calibrate on" not in printed("calibrate", model, "--T", 3, "--loss", 0, "--point-estimate")
    output = printed("calibrate", model, "--T", 3, "--split", "val")  # another word for validation
    assert json.loads(exit_path(model).read_text())["data"] == "digits (held out)"
    assert "trained on these" not in output
    output = printed("calibrate", model, "--split", "train", "--limit", 30, "--criterion", "margin", "--min-T", 2)
    assert "was trained on these images" in " ".join(output.split())
    content = json.loads(exit_path(model).read_text())
    assert (content["data"], content["num_samples"], content["T"]) == ("digits (trained on)", 30, 8)
    assert content["num_images_by_steps"][0] == 0 and {e["criterion"] for e in content["frontier"]} == {"margin"}


def no_work(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("it ran the model")


@pytest.mark.parametrize(("arguments", "changes", "code", "message"), [
    ([], {}, 2, "does not say what data it was trained on; name some with --data"),
    ([], {"source": {"data": {"name": "digits"}}}, 1, "held out no images as .* those it was trained on with --split"),
    (["--data", "poems"], {"source": {"training": {"val_fraction": 0.1}}}, 1, "unknown data set 'poems'"),
    (["--data", ""], {"source": {"data": {"name": "digits"}}}, 1, "unknown data set ''; choose"),
    (["--data", "digits", "--split", "train"], {"class_names": list("abcdefghij")}, 1, "do not match the model's"),
    (["--data", "digits", "--split", "train", "--min-T", "9"], {}, 1, "min_T must lie within the T=8 steps, got 9"),
    (["--data", "digits", "--loss", "-1"], {}, 2, "-1.0 is not in the range"),
    (["--data", "digits", "--split", "val"], {}, 2, "digits is not what was trained on, so nothing is held out"),
    (["--data", "own.npz", "--split", "train"], {}, 2, "own.npz is one set, of which all images are used: leave out"),
    (["--split", "test"], {"source": {"data": {"name": "digits"}}}, 2, "the test set of digits is for tetdeploy early"),
])  # fmt: skip
def test_what_calibrate_refuses_before_any_work(
    model: Path, arguments: list[str], changes: dict[str, Any], code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "run", no_work)
    describe(model, **changes)
    assert re.search(message, refused("calibrate", model, "--limit", 20, *arguments, code=code))
    assert not exit_path(model).exists()


@pytest.mark.parametrize("command", ["calibrate", "early-exit"])
def test_other_layouts_are_refused_before_any_work(command: str) -> None:
    assert "export with --layout step" in refused(command, exported("dynamic"), "--data", "digits")


def test_what_early_exit_refuses(model: Path, held_out: Path) -> None:
    output = refused("early-exit", model, "--data", held_out)
    assert "no early-exit threshold at" in output and "tetdeploy calibrate" in output
    printed("calibrate", model, "--data", held_out, "--T", T)
    assert f"was found for T={T} and says nothing of T=4" in refused("early-exit", model, "--data", held_out, "--T", 4)
    describe(model, trained_T=5)
    assert "holds the threshold of another model" in refused("early-exit", model, "--data", held_out)


def test_frames_are_calibrated_for_the_steps_of_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = tmp_path / "m.onnx", tmp_path / "frames.npz"
    shutil.copy(exported("step", encoding="frames"), model)
    np.savez(data, images=frames(12, 5), labels=np.arange(12) % 10)
    printed("calibrate", model, "--data", data)
    assert load_rule(model)[1] == 4
    monkeypatch.setattr(Engine, "run", no_work)
    for command in ("calibrate", "early-exit"):
        assert "T=6 steps need as many frames, got 5" in refused(command, model, "--data", data, "--T", 6)


@pytest.mark.parametrize("command", ["calibrate", "early-exit", "bench"])
def test_a_model_of_an_earlier_checkpoint_is_told(command: str, model: Path) -> None:
    describe(model, source={"checkpoint_sha256": "00"})
    (model.parent / "checkpoint.safetensors").touch()
    said = " ".join(invoke(command, model, *(["--repeats", 1] if command == "bench" else [])).output.split())
    assert "m.onnx was exported from another checkpoint than" in said


def test_data_are_looked_for_where_data_dir_says(model: Path, held_out: Path, tmp_path: Path) -> None:
    printed("calibrate", model, "--data", held_out, "--T", 1)
    for command in ("calibrate", "early-exit"):
        output = refused(command, model, "--data", "cifar10", "--data-dir", tmp_path / "nowhere")
        assert str(tmp_path / "nowhere") in output


def test_a_path_with_brackets_is_no_markup(tmp_path: Path, held_out: Path) -> None:
    (tmp_path / "[red]").mkdir()
    model = Path(shutil.copy(exported("step"), tmp_path / "[red]" / "m.onnx"))
    commands = ["calibrate", model, "--T", 2], ["early-exit", model], ["sweep", model, "--T", 1], ["validate", model]
    for arguments in commands:
        output = printed(*arguments, "--data", held_out)
        said, folder = "".join(output.split()), "".join(str(model.parent).split())  # tables are folded
        assert "[red]/m.onnx120imagesof" in said
        if arguments[0] == "calibrate":
            assert said.endswith(f"{folder}/m.exit.jsonnext:tetdeployearly-exit'{folder}/m.onnx'")
        if arguments[0] == "early-exit":
            assert said.endswith(f"{folder}/m.early-exit.jsonnext:tetdeployreport'{folder}/m.early-exit.json'")


def test_a_threshold_that_cannot_be_written_is_named(model: Path, held_out: Path) -> None:
    exit_path(model).mkdir()
    said = r"cannot write .*/m\.exit\.json: Is a directory; copy the model to another folder"
    assert re.search(said, refused("calibrate", model, "--data", held_out, "--T", 2))
    assert not list(model.parent.glob(".*.tmp"))


def test_a_result_that_stays_is_not_said_to_be_replaced(model: Path, held_out: Path, tmp_path: Path) -> None:
    printed("calibrate", model, "--data", held_out, "--T", T)
    printed("early-exit", model, "--data", held_out)
    np.savez(tmp_path / "others.npz", images=digits().images[:5], labels=np.full(5, 10))
    assert "will be replaced" not in refused("early-exit", model, "--data", tmp_path / "others.npz")


@pytest.mark.parametrize("command", ["calibrate", "early-exit", "sweep"])
def test_an_output_that_cannot_be_written_is_named_before_any_work(
    model: Path, held_out: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    if command == "early-exit":
        printed("calibrate", model, "--data", held_out, "--T", T)
    (model.parent / "file").touch()

    monkeypatch.setattr(Engine, "run", no_work)
    monkeypatch.setattr(Engine, "run_with", no_work)
    before = sorted(path.name for path in model.parent.iterdir())
    for target, reason in (
        (model.parent / "file" / "a.json", "Not a directory"),
        ("/proc/none/a.json", "No such file"),
    ):
        output = refused(command, model, "--data", held_out, "--json", target)
        assert re.search(f"cannot write {target}: {reason}", output)
    if command == "sweep":
        output = refused(command, model, "--data", held_out, "--plot", model.parent / "file" / "a.png")
        assert "a.png: Not a directory" in output
    assert sorted(path.name for path in model.parent.iterdir()) == before


@pytest.mark.parametrize("training", [{}, {"val_fraction": 0.1}])
@pytest.mark.parametrize(("split", "count"), [(None, 1438), ("train", 1438), ("test", 359)])
def test_a_set_that_was_not_trained_on_is_taken_whole(
    model: Path, training: dict[str, float], split: str | None, count: int
) -> None:
    describe(model, source={"data": {"name": "another"}, "training": training})
    printed("calibrate", model, "--data", "digits", "--T", 1, *(("--split", split) if split else ()))
    content = json.loads(exit_path(model).read_text())
    assert (content["data"], content["num_samples"]) == (f"digits ({split or 'train'} split, of other data)", count)


def test_the_same_set_by_another_name_is_known(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = digits()
    save_npz(images, tmp_path / "d.npz")
    describe(model, source={"data": {"name": str(tmp_path / "d.npz")}, "training": {"val_fraction": 0.1}})
    monkeypatch.chdir(tmp_path)
    printed("calibrate", model, "--data", "d.npz", "--T", 1)
    content = json.loads(exit_path(model).read_text())
    held_out = split_validation(images, fraction=0.1)[1]
    assert (content["data"], content["num_samples"]) == ("d.npz (held out)", len(held_out))
    exit_path(model).unlink()
    (tmp_path / "d.npz").unlink()
    gone = f"{tmp_path / 'd.npz'}, which is not there; put it there again, or name other data"
    assert gone in refused("calibrate", model, "--T", 1)
    source = {"data": {"name": "d.npz", "fingerprint": held_out.fingerprint}, "training": {"val_fraction": 0.1}}
    describe(model, source=source)
    save_npz(images, tmp_path / "copy.npz")  # as one that lies elsewhere on a serving host
    printed("calibrate", model, "--data", "copy.npz", "--T", 1)
    content = json.loads(exit_path(model).read_text())
    assert (content["data"], content["num_samples"]) == ("copy.npz (held out)", len(held_out))
    exit_path(model).unlink()
    save_npz(images.select(slice(None, None, -1)), tmp_path / "d.npz")
    assert "d.npz: the training held out other images" in refused("calibrate", model, "--T", 1)
    assert not exit_path(model).exists()


def test_a_copy_of_the_folder_that_was_trained_on_is_known(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images = digits()
    for i, (image, label) in enumerate(zip(images.images, images.labels, strict=True)):
        for part in ("train", "test")[: 2 if i < 100 else 1]:
            folder = tmp_path / "copy" / part / images.class_names[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0] ^ np.uint8(part == "test")).save(folder / f"{i}.png")
    copy = f"folder:{tmp_path / 'copy'}"
    held_out = split_validation(load_data(copy, "train", data_dir=tmp_path), fraction=0.1)[1]
    source = {"data": {"name": "folder:gone", "fingerprint": held_out.fingerprint}, "training": {"val_fraction": 0.1}}
    describe(model, source=source)
    printed("calibrate", model, "--data", copy, "--T", 1)
    content = json.loads(exit_path(model).read_text())
    assert (content["data"], content["num_samples"]) == (f"{copy} (held out)", len(held_out))
    monkeypatch.setattr("tetdeploy.data.is_copy", lambda *_, **__: pytest.fail("asked for images of the training"))
    printed("calibrate", model, "--data", copy, "--split", "test", "--T", 1)


@pytest.mark.parametrize("command", ["calibrate", "early-exit"])
def test_ctrl_c_leaves_nothing_behind(
    model: Path, held_out: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    if command == "early-exit":
        printed("calibrate", model, "--data", held_out, "--T", T)
    before = sorted(path.name for path in model.parent.iterdir())
    calls: list[int] = []
    engine_run = Engine.run

    def interrupted(self: Engine, x: Array, *arguments: Any, **options: Any) -> Any:
        calls.append(len(x))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return engine_run(self, x, *arguments, **options)

    monkeypatch.setattr(Engine, "run", interrupted)
    output = printed(command, model, "--data", held_out, "--batch-size", 30, code=130)
    assert "interrupted; no file is left half written" in output
    assert calls == [30, 30]
    assert sorted(path.name for path in model.parent.iterdir()) == before


# ------------------------------------------------------------------------------------------------------------- report


def test_a_sweep_of_the_same_images_is_joined(tmp_path: Path) -> None:
    x, labels = own_labels(0, 40)
    measured = measure(engine("step"), x, labels, Exit(0.3), 3, data="digits")
    of = {key: measured[key] for key in ("data", "num_samples", "model_sha256", "constants")}
    assert measured["images_sha256"] == images_sha256(x, labels)
    files = [
        write(tmp_path / "m.early-exit.json", measured),
        write(tmp_path / "m.sweep.json", sweep_result(kind="sweep", **of)),
    ]
    results = read_results(files)
    (found,) = results.measurements
    assert found.rows[0]["latency_ms"] == 0.5 and found.content["early_exit"]["T"] == 3 and not results.notes
    titles = [section.title for section in document_of(results).sections]
    assert titles.index("Early exit") == titles.index("Cost by time steps") + 1
    del measured["early_exit"]["mean_T"]
    write(files[0], measured)
    with pytest.raises(ValueError, match=r"early_exit.mean_T is missing; run tetdeploy early-exit again"):
        read_results(files)
    measured["early_exit"] |= {"mean_T": 1.0, "by_steps": [{"T": 1, "num_images": 0}]}
    write(files[0], measured)
    with pytest.raises(ValueError, match=r"by_steps needs images; run tetdeploy early-exit again"):
        read_results(files)
