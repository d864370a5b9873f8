"""Stages, the switch of the loss, EMA, random T, distillation, augmentation, seeds: each on real digits."""

from __future__ import annotations

import json
import math
import shutil
import signal
import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import metrics
from safetensors.torch import load_file
from torch import Generator, Tensor, nn

import tetdeploy
from tetdeploy.checkpoint import read_metadata
from tetdeploy.data import Framing, ImageSet, load_data, split_validation
from tetdeploy.names import section
from tetdeploy.networks import Classifier, NetworkConfig, build_network
from tetdeploy.steps import MAX_T
from tetdeploy.storage.files import sha256_of, write_json
from tetdeploy.storage.tensor_file import read_content, write_tensors
from tetdeploy.system.extras import MissingExtraError
from tetdeploy.train import (
    How,
    TrainConfig,
    TrainResult,
    distillation_loss,
    evaluate,
    sdt_loss,
    tet_loss,
    total_loss,
    train,
    train_seeds,
)
from tetdeploy.train.augment import cutout
from tetdeploy.train.averaging import estimating_bn, update_average
from tetdeploy.train.objective import Teacher, draw_lengths, load_teacher, prefix_mean
from tetdeploy.train.runs import read_run_config
from tetdeploy.train.session import BN_BATCHES
from tetdeploy.train.stages import Stage, TimeRange, parse_random_T, parse_tit
from tetdeploy.train.state import Best

DIGITS = load_data("digits", "train", data_dir=Path())
assert isinstance(DIGITS, ImageSet)
TRAIN, VAL = split_validation(DIGITS.select(slice(500)), fraction=0.2)  # 400 and 100 or so
STEPS = len(TRAIN) // 64


def classifier_of(*, seed: int = 0, **network: Any) -> Classifier:
    config = NetworkConfig("convsnn", 10, 1, (8, 8), **({"width": 0.25} | network))
    torch.manual_seed(seed)
    return Classifier(
        build_network(config),
        config=config,
        mean=DIGITS.mean,
        std=DIGITS.std,
        class_names=DIGITS.class_names,
        data="digits",
    )


def settings(**changes: Any) -> TrainConfig:
    defaults = {"T": 2, "epochs": 2, "batch_size": 64, "lr": 0.01, "warmup_epochs": 0.5, "device": "cpu"}
    return TrainConfig(**(defaults | changes))


def run(out: Path, classifier: Classifier | None = None, *, resume: bool = False, **changes: Any) -> TrainResult:
    classifier = classifier or classifier_of()
    return train(classifier, TRAIN, VAL, settings(**changes), out, resume=resume, progress=False)


def interrupted_at(count: int, classifier: Classifier) -> Classifier:
    """Ctrl-C in the middle of the training pass with this number."""
    passes = iter(range(1, 1000))

    def before(module: nn.Module, args: Any) -> None:
        if module.training and next(passes) == count:
            signal.raise_signal(signal.SIGINT)

    classifier.register_forward_pre_hook(before)
    return classifier


def same_files(one: Path, other: Path) -> bool:
    """The same tensors in the state and in the checkpoint, and the same metrics."""
    for name in ("last.safetensors", "checkpoint.safetensors"):
        a, b = load_file(one / name), load_file(other / name)
        if a.keys() != b.keys() or not all(torch.equal(a[key], b[key]) for key in a):
            return False
    return metrics(one) == metrics(other)


# --- notation


def test_tit_notation() -> None:
    assert parse_tit("2:300,6:50:1e-4", lr=0.1) == (Stage(1, 2, 300, 0.1, 0), Stage(2, 6, 50, 1e-4, 300))
    assert [stage.first_epoch for stage in parse_tit("1:5,2:1,4:2", lr=0.1)] == [0, 5, 6]
    config = TrainConfig(tit="2:300,6:50:1e-4", lr=0.1)
    assert (config.T, config.epochs, config.longest_T) == (6, 350, 6)
    assert [config.stage(epoch).T for epoch in (0, 299, 300, 349)] == [2, 2, 6, 6]
    assert TrainConfig(T=3, epochs=7, lr=0.5).stages == (Stage(1, 3, 7, 0.5, 0),)


@pytest.mark.parametrize(
    "text",
    ["2", "2:300,", "2:300,6", "2:x", "0:5", "2:0", "2:5:0", "2:5:nan", "2:5:inf", "2:5:1e39", "2:5:1:1", "2.5:3"],
)
def test_tit_that_does_not_parse(text: str) -> None:
    with pytest.raises(ValueError, match=r"tit is '.*'.*must be T:epochs or T:epochs:lr .* such as 2:300,6:50"):
        TrainConfig(tit=text)


def test_of_several_stages_the_one_that_does_not_parse_is_named() -> None:
    with pytest.raises(ValueError, match=r"tit is '2:300,6:x' \('6:x' in it does not parse\); it must"):
        parse_tit("2:300,6:x", lr=0.1)
    with pytest.raises(ValueError, match=r"tit is '6:x'; it must"):
        parse_tit("6:x", lr=0.1)


def test_random_T_notation() -> None:
    assert parse_random_T("1:6") == TimeRange(1, 6, 3)
    assert parse_random_T("2:4:1") == TimeRange(2, 4, 1)
    assert parse_random_T(f"2:4:{MAX_T}").draws == MAX_T
    for text in ("6", "3:3", "6:1", "0:3", "1:6:0", "1:6:2:2", "1:6:1000000000", "a:b"):
        with pytest.raises(ValueError, match=r"random_T is '.*'; it must be LOW:HIGH .* such as 1:6"):
            TrainConfig(random_T=text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tit": "2:3,4:1", "warmup_epochs": 1.0}, "warmup_epochs is 1.0 of 1 epoch;"),
        ({"tit": 2}, "tit is 2; it must be a text in quotes"),
        ({"switch_to_tet": 3}, "switch_to_tet goes with loss sdt, got loss tet"),
        ({"switch_to_tet": 30, "loss": "sdt"}, "switch_to_tet is 30 of 30 epochs"),
        ({"tit": "2:3,4:3", "random_T": "1:4"}, "random_T and tit both decide the time steps"),
        ({"ema": 1.0}, "ema is 1.0; it must be at least 0.0 and at most 0.9999999"),
        ({"cutout": -1}, "cutout is -1; it must be at least 0"),
        ({"distill_tau": 0.0}, "distill_tau is 0.0; it must be above 0.0"),
    ],
)
def test_config_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


# --- time inheritance training


TIT = {"tit": "1:2,3:2:0.004"}


def test_each_stage_has_its_T_its_schedule_and_fresh_moments(whole_tit: Path) -> None:
    records = metrics(whole_tit)
    assert [(r["epoch"], r["stage"], r["T"]) for r in records] == [(1, 1, 1), (2, 1, 1), (3, 2, 3), (4, 2, 3)]
    total, warmup = 2 * STEPS, round(0.5 * STEPS)
    last = [0.5 * (1 + math.cos(math.pi * (s - warmup) / (total - warmup))) for s in (STEPS - 1, total - 1)]
    assert [r["lr"] for r in records] == pytest.approx(
        [0.01 * last[0], 0.01 * last[1], 0.004 * last[0], 0.004 * last[1]]
    )
    steps = load_file(whole_tit / "last.safetensors")["optimizer.layer2.0.weight.step"]
    assert steps.item() == 2 * STEPS  # of the second stage alone
    provenance = read_metadata(whole_tit)["provenance"]
    assert provenance["T"] == read_metadata(whole_tit)["training"]["T"] == 3
    validated = records[provenance["epoch"] - 1]
    found = evaluate(tetdeploy.load(whole_tit), torch.tensor(VAL.x), torch.tensor(VAL.labels), T=3)
    assert found == pytest.approx((validated["val_loss"], validated["val_accuracy"]))


def test_the_checkpoint_is_the_best_of_the_last_stage_alone(tmp_path: Path) -> None:
    """A second stage that destroys what was learned is kept all the same: its T is the one asked for."""
    run(tmp_path, tit="2:2,3:2:10.0")
    records = metrics(tmp_path)
    assert max(r["val_accuracy"] for r in records[2:]) < records[1]["val_accuracy"]  # or nothing is tested
    best = max(records[2:], key=lambda r: (r["val_accuracy"], -r["val_loss"]))
    provenance = read_metadata(tmp_path)["provenance"]
    assert (provenance["epoch"], provenance["val_accuracy"]) == (best["epoch"], best["val_accuracy"])


def test_inheriting_beats_starting_anew(tmp_path: Path) -> None:
    """On real digits: two epochs at T=3 after four at T=1 against the same two from scratch."""
    inherited = run(tmp_path / "tit", tit="1:4,3:2")
    anew = run(tmp_path / "anew", T=3, epochs=2)
    assert inherited.best is not None and anew.best is not None
    assert inherited.best.val_accuracy > anew.best.val_accuracy  # type: ignore[operator]


# The first stage, its last step, the first step of the second stage, and within it.
@pytest.mark.parametrize("at", [2, 2 * STEPS, 2 * STEPS + 1, 3 * STEPS + 2])
def test_a_run_resumes_bit_for_bit_in_any_stage(tmp_path: Path, at: int, whole_tit: Path) -> None:
    assert run(tmp_path, interrupted_at(at, classifier_of()), **TIT).interrupted
    assert not run(tmp_path, classifier_of(seed=5), resume=True, **TIT).interrupted
    assert same_files(tmp_path, whole_tit)


@pytest.fixture(scope="module")
def whole_tit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    run(out, **TIT)
    return out


def test_a_checkpoint_at_the_end_of_a_stage_says_the_T_of_that_stage(tmp_path: Path) -> None:
    """And was validated at it."""
    classifier, passes = interrupted_at(STEPS + 1, classifier_of()), []
    classifier.register_forward_hook(lambda module, given, _: passes.append((module.training, given[1])))
    assert run(tmp_path, classifier, tit="2:1,3:1").interrupted
    assert read_metadata(tmp_path)["provenance"]["T"] == 2
    assert set(passes) == {(True, 2), (False, 2), (True, 3)}


def test_resuming_with_another_tit_shows_both(whole_tit: Path) -> None:
    with pytest.raises(ValueError, match=r"training\.tit: 1:2,3:2:0\.004 -> 1:2,3:2;"):
        run(whole_tit, resume=True, tit="1:2,3:2")


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [("data", "encoding", "direct"), ("network", "smooth_spike", "0.0"), ("training", "ema", "0.0")],
)
def test_a_config_that_lacks_a_setting_is_refused(
    section: str, name: str, value: str, whole_tit: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole_tit, tmp_path / "r")
    config = json.loads((whole_tit / "config.json").read_text())
    del config[section][name]
    (tmp_path / "r" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=rf"r was started with other settings: {section}\.{name}: \(none\) -> {value};"
    ):
        run(tmp_path / "r", resume=True, **TIT)


# --- from SDT to TET


def test_the_switch_changes_the_loss_and_both_are_logged_throughout(tmp_path: Path) -> None:
    switched, sdt = tmp_path / "switched", tmp_path / "sdt"
    result = run(switched, loss="sdt", switch_to_tet=2, epochs=4, T=3, lam=0.3)
    run(sdt, loss="sdt", epochs=4, T=3, lam=0.3)
    with_switch, without = metrics(switched), metrics(sdt)
    assert with_switch[:2] == without[:2]
    assert [r["loss"] for r in with_switch] == ["sdt", "sdt", "tet", "tet"]
    assert all(a["train_loss"] != b["train_loss"] for a, b in zip(with_switch[2:], without[2:], strict=True))
    assert all(r["val_sdt_loss"] <= r["val_tet_loss"] for r in with_switch)  # Lemma 4.1
    assert [r["val_loss"] for r in without] == [r["val_sdt_loss"] for r in without]
    assert result.best is not None and result.best.epoch == 4
    assert result.best.val_loss == with_switch[3]["val_tet_loss"]  # which every epoch has
    found = evaluate(tetdeploy.load(switched), torch.tensor(VAL.x), torch.tensor(VAL.labels), T=3, loss=_eq_13)
    assert found == pytest.approx((with_switch[3]["val_loss"], with_switch[3]["val_accuracy"]))


def _eq_13(logits: Tensor, labels: Tensor) -> Tensor:
    return total_loss(logits, labels, lam=0.3)


def test_the_logged_losses_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    run(tmp_path, epochs=1, lam=0.3, label_smoothing=0.2)
    record, classifier = metrics(tmp_path)[0], tetdeploy.load(tmp_path)
    with torch.no_grad():
        logits = classifier(torch.tensor(VAL.x), 2)
    labels = torch.tensor(VAL.labels)
    assert record["val_sdt_loss"] == pytest.approx(sdt_loss(logits, labels).item())
    assert record["val_tet_loss"] == pytest.approx(tet_loss(logits, labels).item())
    assert record["val_loss"] == pytest.approx(total_loss(logits, labels, lam=0.3, label_smoothing=0.2).item())


# --- smooth spikes and ANN


@pytest.mark.parametrize("network", [{"smooth_spike": 1.0}, {"smooth_spike": 20.0}, {"ann": True}])
def test_smooth_networks_and_twins_learn_and_load(tmp_path: Path, network: dict[str, Any]) -> None:
    T = 1 if "ann" in network else 2
    result = run(tmp_path, classifier_of(**network), T=T, epochs=6)
    assert result.best is not None and result.best.val_accuracy is not None and result.best.val_accuracy > 0.7
    loaded = tetdeploy.load(tmp_path)
    assert loaded.config == classifier_of(**network).config
    found = evaluate(loaded, torch.tensor(VAL.x), torch.tensor(VAL.labels), T=T)
    assert found == pytest.approx((result.best.val_loss, result.best.val_accuracy))


def test_an_ann_has_no_time(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"an ANN has no time: train it with T=1 \(--ann --T 1\), got T=2"):
        run(tmp_path / "ann", classifier_of(ann=True))
    assert not (tmp_path / "ann").exists()


# --- moving average


def test_the_average_by_hand() -> None:
    network = nn.Linear(1, 1, bias=False)
    average = {"weight": torch.tensor([[4.0]])}
    nn.init.constant_(network.weight, 8.0)
    update_average(average, network, decay=0.5, step=0)  # d = 1/10
    assert average["weight"].item() == pytest.approx(0.1 * 4 + 0.9 * 8)
    update_average(average, network, decay=0.5, step=99)  # d = 0.5 < 100/109
    assert average["weight"].item() == pytest.approx(0.5 * 7.6 + 0.5 * 8)


def test_bn_is_estimated_as_the_mean_over_the_passes() -> None:
    network = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5)).train()
    first, second = torch.randn(50, 2), 3 + torch.randn(50, 2)
    network(10 + first)  # which no longer counts
    with estimating_bn(network):
        network(first), network(second)
    norm = network[0]
    assert torch.allclose(norm.running_mean, (first.mean(0) + second.mean(0)) / 2, atol=1e-6)
    assert torch.allclose(norm.running_var, (first.var(0) + second.var(0)) / 2, atol=1e-5)
    assert norm.momentum == 0.1 and not any(module.training for module in network.modules())


def test_the_checkpoint_has_the_averaged_weights_and_their_bn(tmp_path: Path) -> None:
    classifier = classifier_of()
    result = run(tmp_path, classifier, ema=0.9, epochs=4)
    state, kept = load_file(tmp_path / "last.safetensors"), load_file(tmp_path / "checkpoint.safetensors")
    assert result.best is not None and result.best.epoch == 4  # else the state is of another epoch
    for name, value in kept.items():
        if f"average.{name}" in state:
            assert torch.equal(value, state[f"average.{name}"])
            assert not torch.equal(value, state[f"network.{name}"])
    assert not torch.equal(kept["layer2.1.running_mean"], state["network.layer2.1.running_mean"])
    assert torch.equal(classifier.network.state_dict()["layer2.0.weight"], state["network.layer2.0.weight"])
    found = evaluate(tetdeploy.load(tmp_path), torch.tensor(VAL.x), torch.tensor(VAL.labels), T=2)
    assert found == pytest.approx((result.best.val_loss, result.best.val_accuracy))


def test_averaging_helps_a_noisy_run(tmp_path: Path) -> None:
    """At a constant high rate the weights jump about; their average is better, on real digits."""
    noisy = {"tit": "2:1000:0.05", "ema": 0.98}  # the cosine of 1,000 epochs is flat in its first six
    assert run(tmp_path, interrupted_at(6 * STEPS, classifier_of()), **noisy).interrupted
    state = load_file(tmp_path / "last.safetensors")
    plain, averaged = classifier_of(), classifier_of()
    plain.network.load_state_dict(section(state, "network."))
    averaged.network.load_state_dict(section(state, "network.") | section(state, "average."))
    with estimating_bn(averaged):
        averaged(torch.tensor(TRAIN.x), 2)
    x, labels = torch.tensor(VAL.x), torch.tensor(VAL.labels)
    losses = [evaluate(each, x, labels, T=2, loss=tet_loss)[0] for each in (averaged, plain)]
    assert losses[0] < losses[1]


# --- random T


def test_the_first_steps_of_a_long_run_are_a_short_run() -> None:
    """Causality, which `prefix_mean` relies on."""
    classifier = classifier_of().eval()
    x = torch.tensor(VAL.x[:20])
    with torch.no_grad():
        assert torch.equal(classifier(x, 6)[:2], classifier(x, 2))


def test_prefix_mean_is_the_mean_of_the_runs() -> None:
    logits, labels = torch.randn(5, 7, 10, dtype=torch.float64), torch.randint(10, (7,))
    expected = (tet_loss(logits[:1], labels) + 2 * tet_loss(logits[:4], labels)) / 3
    assert torch.allclose(prefix_mean(tet_loss, logits, labels, (4, 1, 4)), expected)


def test_lengths_follow_from_the_step_and_cover_the_range() -> None:
    config = settings(random_T="2:5:3")
    before = torch.get_rng_state()
    drawn = [draw_lengths(config, 0, step) for step in range(100)]
    assert torch.equal(torch.get_rng_state(), before)  # of which dropout draws
    assert drawn == [draw_lengths(config, 0, step) for step in range(100)]
    assert drawn != [draw_lengths(settings(random_T="2:5:3", seed=1), 0, step) for step in range(100)]
    assert {T for lengths in drawn for T in lengths} == {2, 3, 4, 5}
    assert {len(lengths) for lengths in drawn} == {3}
    assert draw_lengths(settings(tit="1:2,3:2"), 2, 0) == (3,)


def test_bn_is_estimated_on_runs_of_the_longest_length_drawn(tmp_path: Path) -> None:
    classifier, lengths = classifier_of(), []
    classifier.register_forward_hook(lambda module, arguments, _: lengths.append((module.training, arguments[1])))
    run(tmp_path, classifier, random_T="1:3:20", T=2, epochs=1)  # of 20 draws one is 3
    passes = min(BN_BATCHES, STEPS)
    assert lengths[:STEPS] == [(True, 3)] * STEPS
    assert lengths[STEPS : STEPS + passes] == [(False, 3)] * passes and set(lengths[STEPS + passes :]) == {(False, 2)}
    lengths.clear()
    run(tmp_path / "stages", classifier, tit="1:1,3:1", ema=0.9)
    half = len(lengths) // 2
    assert {T for _, T in lengths[:half]} == {1} and {T for _, T in lengths[half:]} == {3}


def test_each_epoch_draws_images_and_lengths_of_its_own_for_steps_and_for_bn(tmp_path: Path) -> None:
    classifier, passes = classifier_of(), []
    classifier.register_forward_hook(lambda module, given, _: passes.append((int(given[0].sum()), given[1])))
    run(tmp_path, classifier, random_T="1:6", epochs=2)
    count, half = min(BN_BATCHES, STEPS), len(passes) // 2
    for images_or_lengths in zip(*passes, strict=True):
        drawn = {images_or_lengths[first : first + count] for first in (0, STEPS, half, half + STEPS)}
        assert len(drawn) == 4


@pytest.mark.parametrize("changes", [{"ema": 0.9, "random_T": "1:3"}, {"augment": "autoaugment", "cutout": 3}])
def test_options_resume_bit_for_bit(tmp_path: Path, changes: dict[str, Any]) -> None:
    run(tmp_path / "whole", **changes)
    assert run(tmp_path / "parts", interrupted_at(STEPS + 2, classifier_of()), **changes).interrupted
    run(tmp_path / "parts", classifier_of(seed=5), resume=True, **changes)
    assert same_files(tmp_path / "parts", tmp_path / "whole")


# --- distillation


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teacher")
    run(out, classifier_of(ann=True, width=0.5), T=1, epochs=5, lam=0.0)
    return out


def test_the_weight_and_the_temperature_of_distillation_are_those_given() -> None:
    """Of images, and of recordings all of whose events the teacher sees in one frame."""
    answers, logits, seen = torch.randn(1, 4, 5), torch.randn(3, 4, 5), []

    class Answers(nn.Module):
        def forward(self, x: Tensor, T: int | None = None) -> Tensor:
            seen.append((x, T))
            return answers

    teacher = Teacher(Answers(), 0.25, 2.0)  # type: ignore[arg-type]
    p, log_q = (answers[0].double() / 2).softmax(-1), (logits.double() / 2).log_softmax(-1)
    wanted = 0.25 * 2.0**2 * (p * (p.log() - log_q)).sum(-1).mean()
    images = torch.randint(0, 256, (4, 3, 2, 2), dtype=torch.uint8)
    frames = torch.tensor([100, 0, 200], dtype=torch.uint8).view(1, 3, 1, 1, 1).expand(4, 3, 1, 2, 2).clone()
    frames[0, 2] = 7
    for x in (images, frames):
        assert teacher.loss(logits, x).item() == pytest.approx(wanted.item(), rel=1e-5)
    assert torch.equal(seen[0][0], images) and seen[0][1] == 1
    sums = torch.tensor([107, 255, 255, 255], dtype=torch.uint8).view(1, 4, 1, 1, 1).expand(1, 4, 1, 2, 2)
    assert torch.equal(seen[1][0], sums) and seen[1][0].dtype == torch.uint8


def test_a_step_adds_the_loss_of_a_resting_teacher_to_the_mean_over_lengths(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teachers: list[Teacher] = []
    modes: list[bool] = []
    batches: list[tuple[Tensor, Tensor]] = []

    def watched(config: TrainConfig, student: Classifier, *, sha256: str) -> Teacher:
        made = load_teacher(config, student, sha256=sha256)
        assert made is not None
        made.classifier.register_forward_hook(lambda of, *_: modes.extend(module.training for module in of.modules()))
        teachers.append(made)
        return made

    monkeypatch.setattr("tetdeploy.train.session.load_teacher", watched)
    config = settings(epochs=1, random_T="1:3", distill=str(teacher), distill_alpha=0.25, distill_tau=2.0)
    student, images = classifier_of(), TRAIN.select(slice(64))
    student.register_forward_hook(lambda module, seen, logits: batches.append((seen[0], logits.detach())))
    train(student, images, None, config, tmp_path, progress=False)

    x, logits = batches[0]
    label_of = {image.tobytes(): label for image, label in zip(images.x, images.labels, strict=True)}
    labels = torch.tensor([label_of[image.numpy().tobytes()] for image in x])
    loaded, lengths = tetdeploy.load(teacher), draw_lengths(config, 0, 0)
    with torch.no_grad():
        taught = 0.25 * distillation_loss(logits, loaded(x, 1)[0], tau_kd=2.0)
    wanted = prefix_mean(total_loss, logits, labels, lengths) + taught
    assert metrics(tmp_path)[0]["train_loss"] == pytest.approx(wanted.item(), rel=1e-5) and len(lengths) > 1
    (used,) = teachers
    assert (used.alpha, used.tau_kd) == (0.25, 2.0) and modes and not any(modes)
    after = used.classifier.state_dict()
    assert all(torch.equal(after[name], value) for name, value in loaded.state_dict().items())


def test_the_student_comes_closer_to_its_teacher(tmp_path: Path, teacher: Path) -> None:
    with torch.no_grad():
        targets = tetdeploy.load(teacher)(torch.tensor(VAL.x), 1)[0]
    distances = []
    for name, distill in (("alone", ""), ("taught", str(teacher))):
        run(tmp_path / name, epochs=4, distill=distill, distill_alpha=4.0)
        with torch.no_grad():
            logits = tetdeploy.load(tmp_path / name)(torch.tensor(VAL.x), 2)
        distances.append(tetdeploy.train.distillation_loss(logits, targets).item())
    assert distances[1] < 0.95 * distances[0]  # 0.89 to 0.90 for seeds 0 to 2; untaught 1


def test_teachers_that_do_not_fit(tmp_path: Path, teacher: Path) -> None:
    run(tmp_path / "snn", epochs=1)
    with pytest.raises(ValueError, match=r"the teacher .*snn is no ANN: train one with --ann"):
        run(tmp_path / "student", distill=str(tmp_path / "snn"))
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        run(tmp_path / "student", distill="nothing")
    other = replace(TRAIN, class_names=tuple("abcdefghij"))
    student = classifier_of()
    student.class_names = other.class_names
    with pytest.raises(ValueError, match=r"was trained on other data: its class_names is \('0', .*not \('a'"):
        train(student, other, None, settings(distill=str(teacher)), tmp_path / "student")
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize("unknown", ["teacher", "student"])
def test_where_one_sensor_is_not_known_nothing_is_said_of_the_other(
    teacher: Path, unknown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the frames of a `.npz`, or of a checkpoint of before."""
    student, loaded = classifier_of(), tetdeploy.load(teacher)
    (student if unknown == "teacher" else loaded).framing = Framing("count", (8, 8))
    monkeypatch.setattr("tetdeploy.train.objective.load", lambda *_, **__: loaded)
    found = load_teacher(  # a warning would be an error
        settings(distill=str(teacher)), student, sha256=sha256_of(teacher / "checkpoint.safetensors")
    )
    assert found is not None and found.classifier is loaded


def test_a_teacher_that_is_replaced_while_it_is_read(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann = shutil.copytree(teacher, tmp_path / "ann")
    file = ann / "checkpoint.safetensors"

    def replaced(device: str) -> torch.device:
        write_tensors(file, {name: value + 1 for name, value in load_file(file).items()}, read_content(file))
        return torch.device(device)

    monkeypatch.setattr("tetdeploy.train.session.pick_device", replaced)
    with pytest.raises(ValueError, match=r"the teacher .*ann was replaced while it was read .*: start again"):
        run(tmp_path / "student", distill=str(ann))
    assert not (tmp_path / "student").exists()


def test_a_teacher_may_move_but_must_be_the_same(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(tmp_path / "whole", distill=str(teacher))
    ann, moved, other = (shutil.copytree(teacher, tmp_path / name) for name in ("ann", "moved", "other"))
    file = other / "checkpoint.safetensors"
    write_tensors(file, {name: value + 1 for name, value in load_file(file).items()}, read_content(file))
    latest, cut = tmp_path / "latest", tmp_path / "cut"
    latest.symlink_to(ann)
    assert run(cut, interrupted_at(STEPS + 2, classifier_of()), distill=str(latest)).interrupted
    written = read_run_config(cut)["training"]
    assert written["distill"] == "ann"
    assert read_metadata(cut)["training"] == written and written["distill_sha256"] == sha256_of(moved / file.name)

    shutil.rmtree(ann)
    with pytest.raises(FileNotFoundError, match=r"--distill: .*ann does not exist; give a checkpoint"):
        run(cut, resume=True, distill=str(ann))
    with pytest.raises(ValueError, match=r"the teacher has other .*: name that one with --distill; resume with"):
        run(cut, resume=True, distill=str(other))
    with pytest.raises(ValueError, match=r"training\.distill: .*ann -> ; "):
        run(cut, resume=True)
    before = shutil.copytree(cut, tmp_path / "before")
    del written["distill_sha256"]  # as of a run of before
    write_json(before / "config.json", read_run_config(before) | {"training": written})
    assert not run(before, resume=True, distill=str(other)).interrupted
    assert not run(cut, resume=True, distill=str(moved)).interrupted
    assert same_files(cut, tmp_path / "whole") and read_run_config(cut)["training"]["distill"] == "moved"


# --- augmentation


def test_cutout_blanks_one_square_of_each_image() -> None:
    images = torch.full((400, 3, 9, 7), 9, dtype=torch.uint8)
    fill = torch.tensor([1, 2, 3], dtype=torch.uint8)
    cut = cutout(images, Generator().manual_seed(0), size=3, fill=fill)
    blank = cut[:, 0] == 1
    assert torch.equal(cut == fill.view(3, 1, 1), blank[:, None].expand_as(cut))
    areas = blank.flatten(1).sum(1)
    assert areas.max() == 9 and areas.min() == 4  # a corner leaves 2 x 2
    assert blank.any(0).all()
    rows, columns = blank.any(2).sum(1), blank.any(1).sum(1)
    assert torch.equal(rows * columns, areas)
    frames = cutout(images.repeat(1, 2, 1, 1), Generator().manual_seed(0), size=3, fill=fill)
    assert torch.equal(frames, cut.repeat(1, 2, 1, 1))


def test_a_cutout_that_could_leave_nothing_is_refused(tmp_path: Path) -> None:
    def whole(size: int) -> int:
        """How many of 2,000 images of 5x8 pixels are all blank."""
        cut = cutout(torch.ones(2000, 1, 5, 8), Generator().manual_seed(0), size=size, fill=torch.zeros(1))
        return int((cut.sum((1, 2, 3)) == 0).sum())

    assert whole(7) == 0 < whole(8)
    said = r"cutout 8 would blank whole images of digits, of 8x8 pixels; choose at most 7, or 0 for none"
    with pytest.raises(ValueError, match=said):
        run(tmp_path / "run", cutout=8)
    assert not (tmp_path / "run").exists()


def test_autoaugment_of_event_frames_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    config = NetworkConfig("convsnn", 10, 2, (8, 8), width=0.25)
    options: dict[str, Any] = {"mean": (0.0, 0.0), "std": (1.0, 1.0), "class_names": DIGITS.class_names}
    two = Classifier(build_network(config), config=config, **options)
    images = replace(TRAIN, images=TRAIN.x.repeat(2, axis=1), mean=(0.0, 0.0), std=(1.0, 1.0))
    with pytest.raises(ValueError, match="autoaugment wants images of 1 or 3 channels, got direct input of 2"):
        train(two, images, None, settings(augment="autoaugment"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- several seeds


def seeds(out: Path, make: Callable[[int], Classifier], **options: Any) -> Any:
    arguments = {"recipe": "my.toml", "progress": False} | options
    return train_seeds(make, TRAIN, VAL, settings(epochs=3), arguments.pop("seeds", (0, 3)), out, **arguments)


def of_seed(seed: int) -> Classifier:
    return classifier_of(seed=seed)


@pytest.fixture(scope="module")
def whole_seeds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder of runs, where `many` is the one of two seeds; and its result."""
    runs = tmp_path_factory.mktemp("runs")
    return runs, seeds(runs / "many", of_seed, runs=runs)


def test_seeds_make_a_run_each_and_a_summary(tmp_path: Path, whole_seeds: tuple[Path, Any]) -> None:
    runs, result = whole_seeds
    run(tmp_path, classifier_of(seed=3), epochs=3, seed=3)
    assert same_files(runs / "many" / "seed-3", tmp_path)
    summary = json.loads((runs / "many" / "summary.json").read_text())
    accuracies = [r["val_accuracy"] for r in summary["runs"]]
    assert [(r["seed"], r["run"]) for r in summary["runs"]] == [(0, "seed-0"), (3, "seed-3")]
    a, b = accuracies
    assert summary["mean_val_accuracy"] == result.mean == pytest.approx((a + b) / 2)
    assert summary["std_val_accuracy"] == result.std == pytest.approx(abs(a - b) / math.sqrt(2))
    assert (summary["recipe"], summary["num_finished"]) == ("my.toml", 2)
    assert summary["settings"]["training"]["epochs"] == 3 and "seed" not in summary["settings"]["training"]
    best = runs / "many" / ("seed-0" if a >= b else "seed-3")
    assert (runs / "latest").resolve() == best.resolve() == result.best.out.resolve()


def test_seeds_warn_once_of_a_latest_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")  # Python's default forgets what it has shown where a library adds a filter
        assert seeds(tmp_path / "many", of_seed, runs=tmp_path / "runs").best is not None
    assert len([w for w in warned if "runs/latest cannot be written" in str(w.message)]) == 1


def test_a_warning_of_each_seed_is_given_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def warns(classifier: Classifier, train_set: Any, val_set: Any, config: TrainConfig, out: Path, **_: Any) -> Any:
        warnings.warn("of all", RuntimeWarning, stacklevel=1)
        warnings.warn(f"of seed {config.seed}", RuntimeWarning, stacklevel=1)
        return TrainResult(out, 3, None, interrupted=False, seconds=1.0)

    monkeypatch.setattr("tetdeploy.train.seeds.train", warns)
    for folder in ("first", "again"):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            seeds(tmp_path / folder, of_seed)
        assert [str(warning.message) for warning in warned] == ["of all", "of seed 0", "of seed 3"]


def test_interrupted_seeds_go_on(tmp_path: Path, whole_seeds: tuple[Path, Any]) -> None:
    """The first in the midst of its run with the second not begun, then the second with the first finished."""

    def interrupted_in(interrupted: int) -> Callable[[int], Classifier]:
        return lambda seed: interrupted_at(STEPS + 1, of_seed(seed)) if seed == interrupted else of_seed(seed)

    first = seeds(tmp_path, interrupted_in(0))
    assert first.interrupted and len(first.runs) == 1
    second = seeds(tmp_path, interrupted_in(3), resume=True, recipe=None)
    assert second.interrupted and len(second.runs) == 2 and second.std is None
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert ([run["interrupted"] for run in summary["runs"]], summary["num_finished"]) == ([False, True], 1)
    finished = (tmp_path / "seed-0" / "last.safetensors").stat().st_mtime_ns
    assert not seeds(tmp_path, of_seed, resume=True, recipe=None).interrupted
    assert (tmp_path / "seed-0" / "last.safetensors").stat().st_mtime_ns == finished
    read = [json.loads((folder / "summary.json").read_text()) for folder in (tmp_path, whole_seeds[0] / "many")]
    assert read[0] == read[1]


def test_a_summary_names_the_best_epoch_of_each_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = TrainResult(tmp_path / "seed-0", 3, Best(2, 0.5, 1.25), interrupted=False, seconds=1.0)
    monkeypatch.setattr("tetdeploy.train.seeds.train", lambda *args, **options: ended)
    (found,) = json.loads(seeds(tmp_path, of_seed, seeds=(0,)).summary.read_text())["runs"]
    assert [found[key] for key in ("epochs", "best_epoch", "val_accuracy", "val_loss")] == [3, 2, 0.5, 1.25]


def test_seeds_refuse(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"seeds are \[1, 1\]; give at least one, and none twice"):
        seeds(tmp_path / "a", of_seed, seeds=(1, 1))
    seeds(tmp_path / "a", of_seed, seeds=(0,))
    with pytest.raises(ValueError, match=r"already holds a run \(config.json\)"):
        seeds(tmp_path / "a", of_seed, seeds=(0,))
    lacking = r"a has the seeds \[0\], of which \[1, 2\] lacks \[0\]: seeds may be added, none left out; .*delete the"
    with pytest.raises(ValueError, match=lacking):
        seeds(tmp_path / "a", of_seed, seeds=(1, 2), resume=True)
    (tmp_path / "a" / "seed-1").mkdir()
    (tmp_path / "a" / "seed-1" / "checkpoint.safetensors").touch()
    with pytest.raises(ValueError, match=r"seed-1 already holds a run"):
        seeds(tmp_path / "a", of_seed, seeds=(0, 1), resume=True)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["seeds"] == [0]
    shutil.copytree(tmp_path / "a" / "seed-0", tmp_path / "b" / "seed-0")
    with pytest.raises(ValueError, match=r"seed-0 already holds a run"):
        seeds(tmp_path / "b", of_seed, seeds=(1, 0))
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["seed-0"]  # nor is the first seed trained in vain


@pytest.mark.parametrize("order", [(0, 3, 5), (5, 3, 0)])
def test_seeds_are_added(tmp_path: Path, whole_seeds: tuple[Path, Any], order: tuple[int, ...]) -> None:
    """The new one alone is trained, behind those before; record and summary are as if all had been there at first."""
    out, kept = tmp_path / "many", [0, 3, 5]
    shutil.copytree(whole_seeds[0] / "many", out)
    before = {file: file.stat().st_mtime_ns for file in out.glob("seed-*/*")}
    result = seeds(out, of_seed, seeds=order, resume=True, recipe=None)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    run(tmp_path / "five", classifier_of(seed=5), epochs=3, seed=5)
    assert same_files(out / "seed-5", tmp_path / "five")
    settings = json.loads((out / "config.json").read_text())
    assert (settings["seeds"], settings["training"]["seed"], settings["recipe"]) == (kept, 0, "my.toml")
    summary = json.loads((out / "summary.json").read_text())
    accuracies = [run["val_accuracy"] for run in summary["runs"]]
    assert [run["seed"] for run in summary["runs"]] == kept and summary["num_finished"] == 3
    assert summary["mean_val_accuracy"] == result.mean == pytest.approx(statistics.mean(accuracies))
    assert summary["std_val_accuracy"] == pytest.approx(statistics.stdev(accuracies))
    assert not seeds(out, of_seed, seeds=order, resume=True, recipe=None).interrupted


def test_a_seed_that_has_not_begun_may_be_left_out_again(tmp_path: Path, whole_seeds: tuple[Path, Any]) -> None:
    out = tmp_path / "many"
    shutil.copytree(whole_seeds[0] / "many", out)
    config = json.loads((out / "config.json").read_text())
    config |= {"seeds": [44, 0, 3], "training": config["training"] | {"seed": 44}}  # whose folder was deleted
    (out / "config.json").write_text(json.dumps(config))
    seeds(out, of_seed, seeds=(0, 3), resume=True, recipe=None)
    assert json.loads((out / "config.json").read_text())["seeds"] == [0, 3]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"how": How(shards_mb=0.003)}, "shards of at most 0.003 MB are too small"),
        ({"how": How(cuda_graphs=True)}, "no CUDA graph of this training step"),
    ],
)
def test_what_the_first_seed_refuses_leaves_nothing_behind(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    """Or the same command without its mistake would find a run in the way."""
    with pytest.raises(ValueError, match=match):
        seeds(tmp_path / "a", of_seed, runs=tmp_path, **options)
    assert not [*tmp_path.iterdir()]


# --- TensorBoard


def test_tensorboard_gets_every_number_of_every_epoch(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(classifier_of(), TRAIN, VAL, settings(), tmp_path, progress=False, board=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    records = metrics(tmp_path)
    assert {"val_accuracy", "val_sdt_loss", "val_tet_loss", "lr", "T"} <= set(events.Tags()["scalars"])
    curve = [(event.step, event.value) for event in events.Scalars("val_tet_loss")]
    assert curve == [(r["epoch"], pytest.approx(r["val_tet_loss"])) for r in records]


def test_a_resumed_run_goes_on_with_its_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cut = interrupted_at(STEPS + 2, classifier_of())
    assert train(cut, TRAIN, VAL, settings(), tmp_path, progress=False, board=True).interrupted
    shutil.copytree(tmp_path, copy := tmp_path.with_name("without"))
    train(classifier_of(), TRAIN, VAL, settings(), tmp_path, progress=False, resume=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("lr")] == [record["epoch"] for record in metrics(tmp_path)]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.warns(RuntimeWarning, match="tensorboard: the curves end here, as the package tensorboard is not inst"):
        train(classifier_of(), TRAIN, VAL, settings(), copy, progress=False, resume=True)


def test_a_missing_tensorboard_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tetdeploy\[tensorboard\]'"):
        train(classifier_of(), TRAIN, VAL, settings(), tmp_path / "run", progress=False, board=True)
    assert not (tmp_path / "run").exists()
