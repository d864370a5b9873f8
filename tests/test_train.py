"""Training: configuration, schedule, augmentation, optimizer, and the loop with its files, interrupts and resumes."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Self
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from run_helpers import metrics, same_weights, toy_images
from safetensors.torch import load_file
from torch import Generator, Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import tetdeploy
from tetdeploy.checkpoint import load_weights, read_metadata
from tetdeploy.data import FrameSet, Framing, ImageSet, load_data, split_validation
from tetdeploy.networks import Classifier, NetworkConfig, build_network
from tetdeploy.neurons import LIF
from tetdeploy.storage.form import json_text
from tetdeploy.storage.run_folder import newest_run
from tetdeploy.storage.tensor_file import read_content
from tetdeploy.train import How, TrainConfig, TrainResult, evaluate, loop, train, train_seeds
from tetdeploy.train.augment import AUGMENTATIONS, cutout, random_crop, random_flip
from tetdeploy.train.device import pick_device
from tetdeploy.train.device_images import DeviceImages, Draws
from tetdeploy.train.optimizer import build_optimizer, load_optimizer_tensors, optimizer_tensors
from tetdeploy.train.progress import Progress
from tetdeploy.train.runs import mark_latest, new_run_folder, only_trainer
from tetdeploy.train.schedule import derive_seed, learning_rate
from tetdeploy.train.session import check_data, remarks
from tetdeploy.train.state import Best


class Toy(nn.Module):
    """Convolution, BN, dropout and a readout whose logits grow with the step: all that resuming can get wrong.

    `on_forward` is called with the number of forward passes so far.
    """

    def __init__(self, on_forward: Callable[[int], None] = lambda count: None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.2)
        self.readout = nn.Linear(4 * 16, 3)
        self.on_forward, self.count = on_forward, 0

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        self.count += 1
        self.on_forward(self.count)
        features = self.dropout(torch.relu(self.norm(self.conv(x)))).flatten(1)
        gain = torch.linspace(0.5, 1.5, T or 1).view(-1, 1, 1)
        return self.readout(features) * gain


def toy(on_forward: Callable[[int], None] = lambda count: None, *, seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    return wrap(Toy(on_forward))


def wrap(network: nn.Module, class_names: tuple[str, ...] = ("dark", "middle", "bright")) -> Classifier:
    config = NetworkConfig("tests:toy", len(class_names), 1, (4, 4))
    return Classifier(network, config=config, mean=(0.5,), std=(0.25,), class_names=class_names, data="toy")


TRAIN, VAL = toy_images(52, 1, (1, 4, 4)), toy_images(31, 2, (1, 4, 4))  # 6 steps of 8, 4 images left out
STEPS = 6


def otherwise(data: ImageSet) -> ImageSet:
    """The same with its classes in another order."""
    return ImageSet(**(vars(data) | {"class_names": data.class_names[::-1]}))


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(**({"T": 2, "epochs": 3, "batch_size": 8, "augment": "shift", "device": "cpu"} | changes))


def run(out: Path, classifier: Classifier | None = None, **options: Any) -> TrainResult:
    config = options.pop("config", settings())
    arguments = {"progress": False} | options
    return train(classifier or toy(), TRAIN, VAL, config, out, **arguments)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs; whoever changes it takes a copy."""
    out = tmp_path_factory.mktemp("finished")
    run(out)
    return out


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def interrupt_at(count: int) -> Callable[[int], None]:
    """Ctrl-C in the middle of the forward pass with this number (training and validation batches counted)."""
    return lambda current: signal.raise_signal(signal.SIGINT) if current == count else None


# --- configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"T": 0}, "T is 0; it must be at least 1"),
        ({"T": 1025}, "T is 1025; it must be at most 1024"),
        ({"tit": "1:1,1025:1"}, "T is 1025; it must be at most 1024"),
        ({"random_T": "1:1025"}, "T is 1025; it must be at most 1024"),
        ({"T": 2.5}, "T must be a whole number, got 2.5"),
        ({"epochs": True}, "epochs must be a whole number, got True"),
        ({"lr": 0.0}, r"lr is 0.0; it must be above 0.0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"lr": math.inf}, r"lr is inf; it must be above 0.0 and at most 1e\+18"),
        ({"lr": 1e39}, r"lr is 1e\+39; it must be above 0.0 and at most 1e\+18"),
        ({"distill_tau": 1e155}, r"distill_tau is 1e\+155; it must be above 0.0 and at most 1e\+18"),
        ({"lr": "fast"}, "lr must be a number, got 'fast'"),
        ({"lam": 1.5}, "lam is 1.5; it must be at least 0.0 and at most 1.0"),
        ({"phi": math.inf}, "phi is inf; it must be finite"),
        ({"clip": -1.0}, "clip is -1.0; it must be at least 0"),
        ({"seed": -1}, "seed is -1"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0; .* at most 0.9"),
        ({"warmup_epochs": 3, "epochs": 3}, "warmup_epochs is 3 of 3 epochs; .*, or --warmup-epochs 0"),
        ({"optimizer": "adam"}, "unknown optimizer 'adam'; choose one of adamw, sgd"),
        ({"loss": "ce"}, "unknown loss 'ce'; choose one of tet, sdt"),
        ({"augment": "cutout"}, "unknown augment 'cutout'; choose one of none, shift, crop, crop-flip"),
        ({"precision": "int8"}, "unknown precision 'int8'; choose one of auto, fp32, bf16, fp16"),
        ({"qat": "no"}, "qat must be True or False, got 'no'"),
        ({"device": "tpu"}, "unknown device 'tpu'; choose auto, cpu, cuda"),
        ({"device": None}, "unknown device None; choose auto, cpu, cuda"),
        ({"batch_size": 2**63}, "batch_size is 9223372036854775808; .* at most 9223372036854775807"),
    ],
)
def test_config_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


def test_config_takes_numpys_numbers() -> None:
    """As a loop over settings gives them; JSON, which a run writes its settings in, does not hold them."""
    config = TrainConfig(T=np.int64(2), lr=np.float32(0.5))
    assert (config.T, config.lr) == (2, 0.5) and json.dumps(asdict(config))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recompute": "no"}, "recompute must be True or False, got 'no'"),
        ({"cuda_graphs": 1}, "cuda_graphs must be True or False, got 1"),
        ({"shards_mb": "16"}, "shards_mb must be a number, got '16'"),
    ],
)
def test_how_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        How(**options)


def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"device cuda:99 is not there: PyTorch sees \d+ GPUs.*--device cpu or auto"):
        pick_device("cuda:99")


# --- schedule and seeds


def test_learning_rate_warms_up_linearly_then_follows_a_cosine() -> None:
    rates = [learning_rate(s, peak=0.4, total_steps=12, warmup_steps=4) for s in range(12)]
    assert rates[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])
    assert rates[8] == pytest.approx(0.2)  # half of the cosine
    assert rates[11] == pytest.approx(0.2 * (1 + math.cos(math.pi * 7 / 8)))
    assert learning_rate(0, peak=0.4, total_steps=1, warmup_steps=0) == 0.4


def test_derived_seeds_differ_by_seed_purpose_and_index() -> None:
    seeds = {derive_seed(s, p, i) for s in range(5) for p in ("order", "augment") for i in range(50)}
    assert len(seeds) == 500
    assert all(0 <= s < 2**64 for s in seeds)
    assert derive_seed(3, "order", 7) == 13010953834296498372  # on every machine


# --- augmentation


@given(N=st.integers(1, 6), C=st.integers(1, 3), H=st.integers(1, 7), W=st.integers(1, 7), padding=st.integers(0, 3))
def test_random_crop_shifts_each_image_and_fills_with_zeros(N: int, C: int, H: int, W: int, padding: int) -> None:
    images = torch.randint(1, 256, (N, C, H, W), dtype=torch.uint8, generator=Generator().manual_seed(N))
    cropped = random_crop(images, Generator().manual_seed(H), padding=padding)
    assert cropped.shape == images.shape and cropped.dtype == torch.uint8
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    spots = [(top, left) for top in range(2 * padding + 1) for left in range(2 * padding + 1)]
    for n in range(N):
        assert any(np.array_equal(cropped[n], padded[n, :, a : a + H, b : b + W]) for a, b in spots)


def test_random_crop_uses_every_shift_and_random_flip_half() -> None:
    images = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3).expand(900, 1, 3, 3)
    middles = random_crop(images, Generator().manual_seed(0), padding=1)[:, 0, 1, 1].bincount(minlength=10)[1:]
    assert middles.min() > 60 and middles.max() < 140  # 100 each, standard deviation 9.4
    flipped = random_flip(images, Generator().manual_seed(0))
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    assert 400 < mirrored.sum() < 500
    assert torch.equal(flipped[~mirrored], images[~mirrored])


@pytest.mark.parametrize(("name", "pixels", "flips"), [("shift", 1, {1}), ("crop", 4, {1}), ("crop-flip", 4, {1, -1})])
def test_images_are_shifted_and_flipped_as_documented(name: str, pixels: int, flips: set[int]) -> None:
    H, W = 11, 11
    images = torch.arange(1, 1 + H * W, dtype=torch.uint8).view(1, 1, H, W).expand(200, 1, H, W)
    middle, right = AUGMENTATIONS[name](images, Generator().manual_seed(0))[:, 0, 5, 5:7].int().T
    assert set((right - middle).tolist()) == flips
    rows, columns = (middle - 1) // W - 5, (middle - 1) % W - 5
    assert set(rows.tolist()) == set(columns.tolist()) == set(range(-pixels, pixels + 1))


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_follows_from_the_generator(name: str) -> None:
    images = torch.randint(256, (16, 3, 8, 8), dtype=torch.uint8)
    first, again, other = (AUGMENTATIONS[name](images, Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (name == "none")


# --- optimizer


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_weight_decay_spares_bn_and_biases(name: str) -> None:
    network = Toy()
    optimizer = build_optimizer(network, settings(optimizer=name, weight_decay=0.3), scaled=False)
    assert type(optimizer) is {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[name]
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    found = {key: decay[id(p)] for key, p in network.named_parameters()}
    assert found == {key: 0.3 if key in ("conv.weight", "readout.weight") else 0.0 for key in found}
    wanted = {"nesterov": True, "momentum": 0.9} if name == "sgd" else {"betas": (0.9, 0.999), "eps": 1e-8}
    assert all(group.items() >= wanted.items() for group in optimizer.param_groups)


def test_every_kind_of_convolution_decays() -> None:
    network = nn.Sequential(nn.Conv1d(1, 1, 1), nn.ConvTranspose2d(1, 1, 1), nn.Conv3d(1, 1, 1))
    optimizer = build_optimizer(network, settings(weight_decay=0.3), scaled=False)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0.3 for p in group["params"]}
    assert decayed == {id(layer.weight) for layer in network}


def test_sgd_is_not_fused_where_steps_may_be_left_out() -> None:
    with FakeTensorMode():
        network = nn.ParameterList([torch.empty(3, device="cuda")])
        for name, scaled in product(("sgd", "adamw"), (False, True)):
            fused = build_optimizer(network, settings(optimizer=name), scaled=scaled).defaults["fused"]
            assert fused == (name == "adamw" or not scaled)


def test_loaded_moments_lie_in_memory_as_their_parameter() -> None:
    network = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(network, settings(), scaled=False)
    network(torch.randn(1, 2, 3, 3)).sum().backward()
    optimizer.step()
    tensors = {name: value.contiguous() for name, value in optimizer_tensors(optimizer, network).items()}
    load_optimizer_tensors(optimizer, network, tensors)
    moment = optimizer.state[network.weight]["exp_avg"]
    assert torch.equal(moment, tensors["weight.exp_avg"])
    assert moment.stride() == network.weight.stride() != tensors["weight.exp_avg"].stride()


def test_a_network_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="Identity has no parameter that can be trained"):
        build_optimizer(nn.Identity(), settings(), scaled=False)


# --- the loop


def test_a_run_leaves_its_four_files(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = run(out, config=settings(epochs=8, lr=0.02, augment="none"))
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoint.safetensors",
        "config.json",
        "last.safetensors",
        "metrics.jsonl",
    ]
    assert (result.epochs, result.interrupted, result.checkpoint) == (8, False, out / "checkpoint.safetensors")
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == list(range(1, 9))
    assert set(records[0]) == {
        *("epoch", "stage", "T", "loss", "lr", "train_loss", "train_accuracy", "images_per_s", "seconds"),
        *("val_loss", "val_sdt_loss", "val_tet_loss", "val_accuracy"),
    }
    assert records[-1]["train_loss"] < records[0]["train_loss"]
    assert records[-1]["val_accuracy"] > 0.8
    config = json.loads((out / "config.json").read_text())
    assert config["training"]["batch_size"] == 8 and config["network"]["model"] == "tests:toy"
    assert config["data"]["train_images"] == 52 and config["data"]["val_images"] == 31


def test_the_checkpoint_is_the_epoch_with_the_best_validation(tmp_path: Path) -> None:
    result = run(tmp_path, config=settings(epochs=10, lr=0.02))
    records = metrics(tmp_path)
    best = max(records, key=lambda record: (record["val_accuracy"], -record["val_loss"]))
    assert result.best is not None
    assert (result.best.epoch, result.best.val_accuracy) == (best["epoch"], best["val_accuracy"])
    assert best["epoch"] < 10  # or the test could not tell best from last
    provenance = read_metadata(tmp_path)["provenance"]
    assert (provenance["epoch"], provenance["val_accuracy"]) == (best["epoch"], best["val_accuracy"])
    loaded = tetdeploy.load(tmp_path, network=Toy())
    assert evaluate(loaded, torch.tensor(VAL.images), torch.tensor(VAL.labels), T=2) == pytest.approx(
        (best["val_loss"], best["val_accuracy"])
    )


def test_the_line_of_an_epoch_is_made_once_however_many_follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Mock(wraps=json_text)
    monkeypatch.setattr("tetdeploy.storage.metrics.json_text", made)
    run(tmp_path, config=settings(epochs=6))
    assert made.call_count == len(metrics(tmp_path)) == 6


def test_without_validation_the_last_epoch_is_kept(tmp_path: Path) -> None:
    classifier = toy()
    result = train(classifier, TRAIN, None, settings(), tmp_path, progress=False)
    assert result.best is not None and (result.best.epoch, result.best.val_accuracy) == (3, None)
    assert same_weights(tetdeploy.load(tmp_path, network=Toy()), classifier) and not classifier.training
    assert metrics(tmp_path)[-1]["val_loss"] is None


def test_the_seed_decides_everything_and_the_callers_random_state_is_left_alone(tmp_path: Path) -> None:
    classifiers = [toy(), toy(), toy()]
    for index, (classifier, seed) in enumerate(zip(classifiers, (0, 0, 1), strict=True)):
        torch.manual_seed(100 + index)
        expected = torch.get_rng_state()
        run(tmp_path / str(index), classifier, config=settings(seed=seed))
        assert torch.equal(torch.get_rng_state(), expected)
    assert same_weights(classifiers[0], classifiers[1])
    assert not same_weights(classifiers[0], classifiers[2])


CHANGES: list[dict[str, Any]] = [
    {},
    {"optimizer": "sgd", "clip": 0.5},
    {"precision": "fp16", "lam": 0.5, "phi": 1000.0},  # the scale of its gradients is lowered at first
]


@pytest.fixture(scope="module", params=CHANGES, ids=["adamw", "sgd", "fp16"])
def whole(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainConfig, Path, Classifier]:
    config, out, classifier = settings(**request.param), tmp_path_factory.mktemp("whole"), toy()
    run(out, classifier, config=config)
    return config, out, classifier


# Forward passes of an epoch: 6 training batches, 1 validation batch.
@pytest.mark.parametrize("at", [1, 3, STEPS, STEPS + 1, STEPS + 2, 2 * STEPS + 1, 3 * STEPS + 2])
def test_a_resumed_run_ends_with_the_same_bits(
    tmp_path: Path, at: int, whole: tuple[TrainConfig, Path, Classifier]
) -> None:
    config, out, classifier = whole
    result = run(tmp_path, toy(interrupt_at(at)), config=config)
    assert result.interrupted and result.epochs == (at - 1) // (STEPS + 1)
    assert read_content(tmp_path / "last.safetensors")["resume"]["seconds"] > 0
    resumed = toy(seed=5)
    assert not run(tmp_path, resumed, config=config, resume=True).interrupted

    assert same_weights(resumed, classifier)
    assert metrics(tmp_path) == metrics(out)
    for name in ("last.safetensors", "checkpoint.safetensors"):
        parts, wanted = load_file(tmp_path / name), load_file(out / name)
        assert parts.keys() == wanted.keys()
        assert all(torch.equal(parts[key], wanted[key]) for key in wanted)
    scaler, wanted_scaler = (
        read_content(folder / "last.safetensors")["resume"]["scaler"] for folder in (tmp_path, out)
    )
    assert scaler == wanted_scaler
    assert config.precision != "fp16" or scaler["scale"] < 2**16  # which it began with


def test_a_run_with_frozen_weights_resumes(tmp_path: Path) -> None:
    """Of which there is no average."""

    def frozen(*arguments: Any, **options: Any) -> Classifier:
        made = toy(*arguments, **options)
        made.network.conv.requires_grad_(False)
        return made

    whole, resumed, config = frozen(), frozen(seed=5), settings(epochs=2, ema=0.5)
    run(tmp_path / "whole", whole, config=config)
    run(tmp_path / "cut", frozen(interrupt_at(STEPS + 1)), config=config)
    run(tmp_path / "cut", resumed, config=config, resume=True)
    assert same_weights(resumed, whole)


def test_a_run_that_goes_on_in_another_precision_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`precision auto` chooses by the device: a card without bf16 scales gradients, of which the run has no state."""
    config = settings(precision="auto")
    run(tmp_path, toy(interrupt_at(STEPS + 3)), config=config)
    monkeypatch.setattr("tetdeploy.train.session.pick_precision", lambda name, device: "fp16")
    run(tmp_path, toy(), config=config, resume=True, progress=None)
    assert (
        "computed in fp32 until now, which `precision auto` does not choose on this device" in capsys.readouterr().out
    )
    state = read_content(tmp_path / "last.safetensors")["resume"]
    assert state["precision"] == "fp16" and state["scaler"]["scale"] > 0
    run(tmp_path, toy(), config=config, resume=True, progress=None)
    assert "until now" not in capsys.readouterr().out


def test_a_killed_run_repeats_its_epoch_without_double_lines(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    classifier = toy()
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "parts", toy(lambda count: _kill() if count == STEPS + 3 else None))
    # As if the kill had come after the second epoch's metrics and before its state.
    (tmp_path / "parts" / "metrics.jsonl").write_text((tmp_path / "whole" / "metrics.jsonl").read_text())
    run(tmp_path / "parts", classifier, resume=True)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


def test_a_kill_between_checkpoint_and_state_leaves_no_other_epoch_as_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the epoch that is run again ends worse, as rounding on a GPU may have it."""
    always = {"val_accuracy": 0.5, "val_sdt_loss": 1.0, "val_tet_loss": 1.0}
    losses = iter([2.0, 1.0, 3.0, 4.0])
    monkeypatch.setattr(loop, "_validate", lambda *arguments: always | {"val_loss": next(losses)})
    saved: list[int] = []

    def save(session: Any, state: Any) -> None:
        saved.append(state.epoch)
        if saved == [1, 2]:
            _kill()
        save_state(session, state)

    save_state = loop.save
    monkeypatch.setattr(loop, "save", save)
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path)
    assert read_metadata(tmp_path)["provenance"]["epoch"] == 2
    result = run(tmp_path, resume=True)
    assert result.best is not None and result.best.epoch == 2
    assert read_metadata(tmp_path)["provenance"]["epoch"] == 2


def test_a_folder_that_is_removed_midway_is_a_run_again(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    run(tmp_path / "run", toy(lambda count: shutil.rmtree(tmp_path / "run") if count == STEPS + 2 else None))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert (tmp_path / "run" / "config.json").read_bytes() == (tmp_path / "whole" / "config.json").read_bytes()
    run(tmp_path / "run", resume=True)


def test_a_checkpoint_that_is_gone_leaves_no_best_epoch_without_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    always = {"val_accuracy": 0.5, "val_sdt_loss": 1.0, "val_tet_loss": 1.0}
    losses = iter([1.0, 3.0, 2.0])  # the first is the best
    monkeypatch.setattr(loop, "_validate", lambda *arguments: always | {"val_loss": next(losses)})
    run(tmp_path, toy(interrupt_at(STEPS + 2)))
    (tmp_path / "checkpoint.safetensors").unlink()
    gone = r"checkpoint\.safetensors is gone, and so is epoch 1, the best: the best of those that follow is kept"
    with pytest.warns(RuntimeWarning, match=gone):
        result = run(tmp_path, resume=True)
    assert result.best is not None and result.best.epoch == 3
    assert read_metadata(tmp_path)["provenance"]["epoch"] == 3


def _kill() -> None:
    raise RuntimeError("killed")


def test_a_second_ctrl_c_ends_at_once_and_handlers_are_put_back(tmp_path: Path) -> None:
    def twice(count: int) -> None:
        if count == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, toy(twice))
    assert signal.getsignal(signal.SIGINT) is before
    assert not run(tmp_path, toy(), resume=True).interrupted


def test_training_runs_in_a_thread_too(tmp_path: Path) -> None:
    results: list[TrainResult] = []
    thread = threading.Thread(target=lambda: results.append(run(tmp_path)))
    thread.start()
    thread.join()
    assert results[0].epochs == 3


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    classifier, again = toy(), toy(seed=5)
    run(tmp_path, classifier)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / ".lock").mkdir()  # and it writes nothing, as on a disk that is mounted to be read only
    result = run(tmp_path, again, resume=True, runs=tmp_path / "config.json")
    assert (result.epochs, result.interrupted) == (3, False)
    assert same_weights(again, classifier)
    (tmp_path / ".lock").rmdir()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_resuming_a_finished_run_says_what_is_wrong_with_its_checkpoint(copied: Path) -> None:
    file = copied / "checkpoint.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=r"checkpoint\.safetensors is truncated: .* bytes of .*; copy or train it again"
    ):
        run(copied, resume=True)
    file.unlink()  # as of seeds that lost
    with pytest.warns(RuntimeWarning, match=r"checkpoint\.safetensors is gone: .* must be trained anew"):
        assert run(copied, resume=True).best is not None
    with pytest.raises(FileNotFoundError, match=r"checkpoint\.safetensors; it is gone: put it back, go on .*, or name"):
        tetdeploy.load(copied, network=Toy())


def test_init_starts_a_new_run_from_given_weights(tmp_path: Path) -> None:
    run(tmp_path / "old")
    classifier = toy(seed=5)
    load_weights(classifier, tmp_path / "old")
    assert same_weights(classifier, tetdeploy.load(tmp_path / "old", network=Toy()))
    assert run(tmp_path / "new", classifier).epochs == 3


@pytest.mark.parametrize("precision", ["fp32", "fp16"])  # the latter with scaled gradients
def test_clipping_bounds_the_step(tmp_path: Path, precision: str) -> None:
    """Plain SGD at lr 1 without decay moves the weights by the clipped gradient and its Nesterov momentum."""
    start, classifier = toy(), toy()
    config = settings(
        **{"epochs": 1, "batch_size": 52, "precision": precision, "clip": 1e-3},
        **{"optimizer": "sgd", "lr": 1.0, "weight_decay": 0.0, "warmup_epochs": 0},
    )
    run(tmp_path, classifier, config=config)
    moved = [a.detach() - b.detach() for a, b in zip(start.parameters(), classifier.parameters(), strict=True)]
    norm = torch.cat([value.flatten() for value in moved]).norm().item()
    assert norm == pytest.approx(1.9e-3, rel=1e-3)


def test_each_step_has_the_loss_and_the_rate_that_are_logged(tmp_path: Path) -> None:
    """Eqs. 7 and 13 with smoothed labels in numpy, from the logits of the very batches; the optimizer's own rates."""
    classifier, batches, rates = toy().eval(), [], []  # as a loaded one is

    def seen(module: nn.Module, arguments: tuple[Tensor, int], logits: Tensor) -> None:
        if module.training:
            batches.append((arguments[0].numpy(), logits.detach().double().numpy()))

    turned = torch.tensor([3.0, -0.5])[:, None, None]  # of two steps the last alone has other classes than the mean
    classifier.network.register_forward_hook(lambda module, arguments, logits: logits * turned)
    classifier.register_forward_hook(seen)
    config = settings(
        **{"epochs": 2, "augment": "none", "loss": "sdt", "switch_to_tet": 1},
        **{"label_smoothing": 0.2, "lam": 0.3, "phi": 0.7, "lr": 0.01, "warmup_epochs": 0.49},
    )
    with register_optimizer_step_pre_hook(lambda of, *_: rates.append([group["lr"] for group in of.param_groups])):
        run(tmp_path, classifier, config=config)

    label_of = {image.tobytes(): label for image, label in zip(TRAIN.images, TRAIN.labels, strict=True)}
    targets = [np.eye(3)[[label_of[image.tobytes()] for image in x]] for x, _ in batches]

    def cross_entropy(logits: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> float:
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return float(-((0.8 * y + 0.2 / 3) * log_p).sum(-1).mean())

    of_epochs = [
        [cross_entropy(logits.mean(0), y) for (_, logits), y in zip(batches[:STEPS], targets, strict=False)],
        [
            0.7 * cross_entropy(logits, y) + 0.3 * float(((logits - 0.7) ** 2).mean())
            for (_, logits), y in zip(batches[STEPS:], targets[STEPS:], strict=True)
        ],
    ]
    assert [r["train_loss"] for r in metrics(tmp_path)] == pytest.approx([np.mean(of) for of in of_epochs], rel=1e-6)
    right = [(o.mean(0).argmax(-1) == y.argmax(-1)).mean() for (_, o), y in zip(batches, targets, strict=True)]
    accuracy = [np.mean(right[:STEPS]), np.mean(right[STEPS:])]
    assert [r["train_accuracy"] for r in metrics(tmp_path)] == pytest.approx(accuracy)
    cosine = [0.005 * (1 + math.cos(math.pi * s / 9)) for s in range(9)]  # after 3 of 12 steps, 2.94 rounded
    of_weights, of_others = zip(*rates, strict=True)
    assert of_weights == of_others == pytest.approx([0.01 / 3, 0.02 / 3, 0.01, *cosine])


def test_a_batch_is_no_larger_than_the_set(tmp_path: Path) -> None:
    classifier, few = toy(), TRAIN.select(slice(24))
    classifier.register_forward_hook(lambda module, arguments, logits: logits * 0 + torch.eye(3)[0])  # always the first
    train(classifier, few, None, settings(batch_size=64), tmp_path, progress=False)
    assert metrics(tmp_path)[0]["train_accuracy"] == (few.labels == 0).mean()


def test_every_batch_is_chosen_and_augmented_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of training, and those that BN is estimated on; under each seed others."""
    drawn, seen = DeviceImages.drawn, []

    def recorded(self: DeviceImages, draws: Draws) -> Any:
        seen.append(draws)
        for chosen, seed, (x, labels) in zip(draws.chosen, draws.seeds, drawn(self, draws), strict=True):
            images = torch.tensor(TRAIN.images)[chosen]
            assert torch.equal(x, AUGMENTATIONS["shift"](images, Generator().manual_seed(seed)))
            assert not torch.equal(x, images)
            yield x, labels

    monkeypatch.setattr(DeviceImages, "drawn", recorded)
    for seed in (0, 1):
        run(tmp_path / str(seed), config=settings(ema=0.5, seed=seed))
    seeds = [seed for draws in seen for seed in draws.seeds]
    assert len(set(seeds)) == len(seeds) == 12 * STEPS
    orders = [tuple(draws.chosen.flatten().tolist()) for draws in seen]
    assert len(set(orders)) == len(orders) and all(len(set(order)) == 8 * STEPS for order in orders)


@pytest.mark.parametrize("augment", ["none", "shift"])
def test_cutout_comes_after_the_augmentation_and_blanks_to_the_mean(augment: str) -> None:
    images, draws = DeviceImages(TRAIN, toy(), settings(augment=augment, cutout=3)), torch.arange(8)[None]
    ((x, labels),) = images.drawn(Draws(draws, (7,), slice(2, 6)))
    grey = torch.tensor([128], dtype=torch.uint8)  # 127.5, rounded
    generator = Generator().manual_seed(7)
    augmented = AUGMENTATIONS[augment](torch.tensor(TRAIN.images[:8]), generator)
    wanted = cutout(augmented, generator, size=3, fill=grey)
    assert torch.equal(x, wanted[2:6]) and labels.tolist() == TRAIN.labels[2:6].tolist()


def test_every_step_draws_anew_for_dropout(tmp_path: Path) -> None:
    seeds: list[int] = []
    train(toy(lambda count: seeds.append(torch.initial_seed())), TRAIN, None, settings(), tmp_path, progress=False)
    assert len(set(seeds)) == len(seeds) == 3 * STEPS


def test_the_average_goes_over_all_steps_of_a_run(tmp_path: Path) -> None:
    """w_avg <- d w_avg + (1 - d) w with d = (1 + s) / (10 + s), which 0.99 never bounds here."""
    classifier, plain = toy(), toy()
    average, weights = classifier.network.readout.weight.detach().double(), []
    with register_optimizer_step_post_hook(
        lambda *_: weights.append(classifier.network.readout.weight.detach().double())
    ):
        run(tmp_path, classifier, config=settings(ema=0.99))
    for s, weight in enumerate(weights):
        d = (1 + s) / (10 + s)
        average = d * average + (1 - d) * weight
    assert len(weights) == 3 * STEPS
    kept = load_file(tmp_path / "last.safetensors")["average.readout.weight"]
    torch.testing.assert_close(kept.double(), average, rtol=1e-5, atol=1e-7)
    run(tmp_path / "plain", plain)
    assert same_weights(classifier, plain)  # it takes no part in training


def test_a_run_too_short_for_the_statistics_of_bn_is_told_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """15 steps leave 0.9^15 of what they start with, 21 %; 16 steps 19 %."""

    def built_in() -> Classifier:
        classifier = toy()
        classifier.config = replace(classifier.config, model="convsnn")
        return classifier

    def said(name: str, classifier: Classifier | None = None, **changes: Any) -> str:
        init = changes.pop("init", None)
        run(tmp_path / name, classifier or built_in(), config=settings(**changes), progress=None, init=init)
        return " ".join(capsys.readouterr().out.split())

    single = {"batch_size": 52}  # one step an epoch
    short = said("short", epochs=15, **single)
    assert "after the 15 steps of this run, 21% of BN's running statistics are still what they start with" in short
    assert "take a smaller --batch-size or more --epochs" in short
    slow, none = built_in(), built_in()
    slow.network.norm.momentum, none.network.norm = 0.01, nn.Identity()
    assert "after the 18 steps of this run, 83% of BN's" in said("slow", slow)
    parent = {"path": "runs/parent", "checkpoint_sha256": "0"}
    for name, classifier, changes in (
        ("longer", None, {"epochs": 16} | single),
        ("without", none, single),
        ("averaged", None, {"ema": 0.9} | single),
        ("trained", None, {"init": parent} | single),
        ("own", toy(), single),  # BN may run at each time step there
    ):
        assert "running statistics" not in said(name, classifier, **changes), name


def test_layers_that_never_fire_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Deaf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.lif, self.readout = nn.Linear(16, 8), LIF(v_th=100.0), nn.Linear(8, 3)

        def forward(self, x: Tensor, T: int) -> Tensor:
            logits: Tensor = self.readout(self.lif(self.hidden(x.flatten(1)).expand(T, -1, -1)))
            return logits

    run(tmp_path / "deaf", wrap(Deaf()), config=settings(epochs=20), progress=None)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("no neuron of lif fired on 31 ")]
    assert ["after epoch 2;" in said[0], "after epoch 20;" in said[1]] == [True, True]
    run(tmp_path / "toy", progress=None)
    assert "no neuron" not in capsys.readouterr().out


def test_frames_that_are_not_read_and_classes_without_an_image_are_said() -> None:
    frames, names = np.ones((3, 5, 1, 4, 4), np.uint8), ("0", "1", "2")
    data = FrameSet("own.npz", "train", frames, np.array([1, 2, 1]), names, (0.0,), (1.0,))
    unread, missing = remarks(data, settings(T=2))
    assert unread == "own.npz has 5 frames a recording, of which T=2 reads the first 2; --T 5 reads all"
    assert remarks(data, settings(T=1), ann=True)[0].endswith("reads the first 1; an ANN has no time to read others")
    assert missing == "own.npz has no training image of 1 of 3 classes: 0; labels are counted from 0"
    assert remarks(data.select([0]), settings(T=5))[0].endswith("of 2 of 3 classes: 0, 2; labels are counted from 0")
    assert remarks(TRAIN, settings()) == []
    black = replace(TRAIN, images=TRAIN.images // 255)
    assert remarks(black, settings()) == [
        f"no pixel of {TRAIN.name} is above 1, of 255: were they from 0 to 1? give (255 * x).round()"
    ]


def test_channels_that_may_be_steps_are_said() -> None:
    images = np.full((3, 5, 4, 6), 9, np.uint8)
    data = ImageSet("own.npz", "train", images, np.array([0, 1, 1]), ("0", "1"), (0.0,) * 5, (1.0,) * 5)
    said = "images of own.npz have 5 channels and are shown whole at each step: are these frames? give [N, 5, 1, 4, 6]"
    assert remarks(data, settings()) == [said]
    assert remarks(replace(data, name="made"), settings()) == []
    assert remarks(replace(data, images=images[:, :4], mean=(0.0,) * 4, std=(1.0,) * 4), settings()) == []


def test_counts_that_end_at_255_and_recordings_in_one_frame_are_said() -> None:
    frames = np.zeros((4, 3, 2, 4, 4), np.uint8)
    frames[..., 0, :] = 9
    data = FrameSet("by-time:events:own", "train", frames, np.array([0, 1, 0, 1]), ("0", "1"), (0.0,) * 2, (1.0,) * 2)
    assert remarks(data, settings(T=3)) == []
    data = replace(data, framing=Framing("time", (4, 4)))
    assert remarks(data, settings(T=3)) == []
    frames[:, :, :, 0, 0] = 255
    frames[3, 1:] = 0
    full, crowded = remarks(data, settings(T=3))
    assert full.startswith("25% of the counts above 0 in by-time:events:own end at 255, the most that a frame counts")
    assert crowded.startswith("1 of 4 recordings of by-time:events:own have over 99% of their events in one frame: is")
    assert remarks(replace(data, framing=Framing("count", (4, 4))), settings(T=3)) == [full]
    frames[:, :, 1] = 0
    assert "4 recordings of by-time:events:own have no ON event: were polarities lost?" in remarks(data, settings(T=3))


def test_which_of_two_epochs_is_better() -> None:
    first = Best(1, 0.5, 1.0)
    assert not first.is_beaten_by(Best(2, 0.5, 1.0))  # the earlier of equals
    assert first.is_beaten_by(Best(2, 0.5, 0.9)) and not first.is_beaten_by(Best(2, 0.5, 1.1))
    assert first.is_beaten_by(Best(2, 0.6, 9.0)) and not first.is_beaten_by(Best(2, 0.4, 0.1))
    assert first.is_beaten_by(Best(2, 0.1, 9.0, stage=2)) and not Best(2, 0.1, 9.0, stage=2).is_beaten_by(first)
    assert Best(1, None, None).is_beaten_by(Best(2, None, None))


def test_bf16_autocast_keeps_weights_and_losses_in_float32(tmp_path: Path) -> None:
    seen: list[torch.dtype] = []
    classifier = toy()
    classifier.network.readout.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    run(tmp_path, classifier, config=settings(precision="bf16", ema=0.9))
    assert seen == [torch.bfloat16] * 3 * (STEPS + STEPS + 1)  # to train, to estimate BN, to validate
    assert {p.dtype for p in classifier.parameters()} == {torch.float32}
    assert read_metadata(tmp_path)["provenance"]["precision"] == "bf16"


def test_a_callers_autocast_does_not_hold_weights_back(tmp_path: Path) -> None:
    """It keeps what it cast until it ends: every step would compute with the first one's weights."""
    bf16 = settings(precision="bf16")
    run(tmp_path / "alone", config=bf16)
    with torch.autocast("cpu", enabled=False):
        run(tmp_path / "within", config=bf16)
    assert metrics(tmp_path / "within") == metrics(tmp_path / "alone")


@pytest.mark.parametrize("mode", [partial(torch.autocast, "cpu", torch.bfloat16), torch.no_grad, torch.inference_mode])
def test_a_callers_modes_change_nothing(mode: Callable[[], AbstractContextManager[Any]], tmp_path: Path) -> None:
    """Linear layers run backward in half precision under autocast, whatever forward ran in."""
    classifier = toy()
    run(tmp_path / "alone")
    with mode():
        run(tmp_path / "within", classifier)
    assert metrics(tmp_path / "within") == metrics(tmp_path / "alone")


class Merging(nn.Module):
    """Merges weights for inference as it is told to, as layers do that learn a difference to frozen weights."""

    merged = False

    def train(self, mode: bool = True) -> Self:
        self.merged = not mode
        return super().train(mode)


def test_evaluation_leaves_each_module_in_its_mode() -> None:
    classifier = toy()
    classifier.network.merging = Merging()
    classifier.train()
    frozen = next(module for module in classifier.modules() if isinstance(module, nn.BatchNorm2d))
    frozen.eval()
    before = [module.training for module in classifier.modules()]
    evaluate(classifier, torch.tensor(VAL.images), torch.tensor(VAL.labels), T=2)
    assert [module.training for module in classifier.modules()] == before
    assert not classifier.network.merging.merged


def test_evaluation_does_not_depend_on_the_batches_and_keeps_the_mode() -> None:
    classifier = toy().train()
    images, labels = torch.tensor(VAL.images), torch.tensor(VAL.labels)
    whole = evaluate(classifier, images, labels, T=2)
    assert whole == pytest.approx(evaluate(classifier, images, labels, T=2, batch_size=7))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        evaluate(classifier, images, labels, T=2, batch_size=0)
    with pytest.raises(ValueError, match=r"labels must be of type Tensor, got ndarray; pass torch\.from_numpy"):
        evaluate(classifier, images, labels.numpy(), T=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="every image needs a label: 5 images, 1 labels"):
        evaluate(classifier, images[:5], labels[:1], T=2)
    assert classifier.training
    logits = classifier.eval()(images, 2).mean(0)
    assert whole is not None and whole[1] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())


# --- refusals


def test_a_new_run_never_overwrites_one(copied: Path) -> None:
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    with pytest.raises(ValueError, match=r"already holds a run \(config.json, .*choose another --out, or --resume"):
        run(copied)
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before


def test_resume_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing to resume in .*no config.json and last.safetensors"):
        run(tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()


def test_resume_without_the_state_names_what_weights_can_do(copied: Path) -> None:
    (copied / "last.safetensors").unlink()
    remedy = f"it has no last.safetensors; continue with --restart-from {copied} in another --out"
    with pytest.raises(ValueError, match=f"nothing to resume in .*: {re.escape(remedy)}$"):
        run(copied, resume=True)


def test_resume_with_other_settings_shows_the_difference(copied: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"training\.epochs: 3 -> 4; training\.lr: 0\.002 -> 0\.1; resume with the old ones, or start a new run "
        rf"in another --out, from these weights with --init {re.escape(str(copied))} and its other options$",
    ):
        run(copied, config=settings(epochs=4, lr=0.1), resume=True)
    (copied / "checkpoint.safetensors").unlink()  # as before the first epoch's end, and in a folder of seeds
    with pytest.raises(ValueError, match=r"lr: 0\.002 -> 0\.1; resume .* in another --out$"):
        run(copied, config=settings(lr=0.1), resume=True)
    with pytest.raises(ValueError, match=r"data\.val_images: 31 -> 0"):
        train(toy(), TRAIN, None, settings(), copied, resume=True, progress=False)


def test_resume_with_the_images_in_another_order_is_refused(copied: Path) -> None:
    config = copied / "config.json"
    assert read_metadata(copied)["data"]["fingerprint"] == json.loads(config.read_text())["data"]["fingerprint"]
    others = toy_images(31, 3, (1, 4, 4))
    reason = (
        r"other settings: the images are others or in another order, .*: name the folder it was trained .*--data-dir"
    )
    with pytest.raises(ValueError, match=reason):
        train(toy(), TRAIN, others, settings(), copied, resume=True, progress=False)
    written = json.loads(config.read_text())
    del written["data"]["fingerprint"]  # as of a run of before
    config.write_text(json.dumps(written))
    train(toy(), TRAIN, others, settings(), copied, resume=True, progress=False)


def test_resume_from_a_damaged_state_is_refused(copied: Path) -> None:
    state = copied / "last.safetensors"
    state.write_bytes(state.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"last\.safetensors is truncated"):
        run(copied, resume=True)
    state.write_bytes((copied / "checkpoint.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"last\.safetensors is a checkpoint, not the state of a run"):
        run(copied, resume=True)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("epoch.correct", "epoch.corrupt", "is damaged: it lacks 'epoch.correct'"),
        ("average.norm.weight", "average.norm-weight", r"do not fit the network; missing: norm\.weight; unexpected"),
        ("optimizer.norm.bias", "optimizer.norm-bias", "is damaged: the optimizer state norm-bias.* belongs to no"),
        ("norm.bias.step", "norm.bias.stap", r"is damaged: the optimizer state norm\.bias\.stap has the shape \[\]"),
        ("norm.bias.exp_avg_", "norm.bias.exp_avg-", "is damaged: .* has exp_avg, exp_avg-sq, step, wanted exp_avg, "),
        (r"\"step\": ", r"\"stap\": ", "is damaged: step is missing"),
        (r"\"epoch\": 3", r"\"epoch\":-3", "is damaged: epoch must be a whole number of at least 0, got -3"),
        (r"\"val_loss\": ", r"\"val_lots\": ", "is damaged: .*unexpected keyword argument 'val_lots'"),
        (r"\"precision\": ", r"\"pretision\": ", "is damaged: precision is missing"),
    ],
)
def test_a_state_with_another_name_in_it_is_damaged(tmp_path: Path, old: str, new: str, reason: str) -> None:
    """As a bit that fell over on a disk leaves it: the file reads, and no longer says all that is asked of it."""
    config = settings(ema=0.5)
    run(tmp_path, config=config)
    state = tmp_path / "last.safetensors"
    whole = state.read_bytes()
    assert old.encode() in whole
    state.write_bytes(whole.replace(old.encode(), new.encode()))
    with pytest.raises(ValueError, match=reason):
        run(tmp_path, config=config, resume=True)


def test_a_training_state_is_no_checkpoint(finished: Path) -> None:
    with pytest.raises(ValueError, match=r"holds the state of a training run.*; use .*checkpoint\.safetensors"):
        tetdeploy.load(finished / "last.safetensors")


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("{", "is not JSON: .*; mend it by hand"),
        ("[]", r"is damaged: it must be an object, got \[\]; mend it by hand"),
        ("{}", "is damaged: network is missing; mend it by hand"),
        ('{"network": {}, "data": {}, "training": null}', "is damaged: training is missing"),
        ('{"network": {}, "data": {}, "training": []}', r"is damaged: training must be an object, got \[\]"),
        ('{"network": {"width": "x"}}', "is damaged: network.width must be a finite number, got 'x'"),
        ('{"network": {}, "data": {}, "training": {}, "seeds": 7}', "is damaged: seeds must be a list, got 7"),
        (
            '{"network": {}, "data": {}, "training": {}, "seeds": [-1]}',
            r"is damaged: seeds\[0\] must be a whole number of at least 0, got -1; mend it by hand",
        ),
    ],
)
def test_a_broken_config_file_is_named(copied: Path, broken: str, reason: str) -> None:
    (copied / "config.json").write_text(broken)
    with pytest.raises(ValueError, match=rf"config\.json {reason}"):
        run(copied, resume=True)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"epoch": 2, "T', r"Unterminated string starting at \(column 14\)"),
        (b"\0\0\0\0", ".*"),  # what a power cut can leave
        (b"3", "it must be an object, got 3"),
        (b'{"epoch": true}', "epoch must be a whole number of at least 1, got True"),
        (b'{"epoch": -3}', "epoch must be a whole number of at least 1, got -3"),
        (b"{}", "epoch is missing"),
        (b'{"epoch": 2, "lr": "high"}', "lr must be a number, got 'high'"),
        (b'{"epoch": 2, "lr": 1' + b"0" * 400 + b"}", "a whole number is beyond 64 bits: 10{39}…"),
        (b'{"epoch": 2, "val_accuracy": Infinity}', "val_accuracy must be a number from 0 to 1, got inf"),
    ],
)
def test_a_damaged_line_of_the_metrics_is_named(copied: Path, line: bytes, reason: str) -> None:
    file = copied / "metrics.jsonl"
    first, _, third = file.read_bytes().splitlines()
    file.write_bytes(b"\n".join([first, line, third]))
    with pytest.raises(ValueError, match=rf"metrics\.jsonl is damaged in line 2: {reason}; remove that line"):
        run(copied, resume=True)
    file.write_bytes(b"\n".join([first, third]))
    assert run(copied, resume=True).epochs == 3


def test_a_loss_that_is_not_finite_names_step_rate_and_remedy(tmp_path: Path) -> None:
    def poison(count: int) -> None:
        if count == STEPS + 4:  # the third training batch of the second epoch
            nn.init.constant_(classifier.network.conv.bias, math.nan)

    classifier = toy(poison)
    message = r"loss is nan at step 8 \(epoch 2, lr 0\.0015\); lower --lr or switch on --clip 1, in a new run, as"
    with pytest.raises(ValueError, match=message):
        run(tmp_path, classifier)
    assert len(metrics(tmp_path)) == 1
    assert all(value.isfinite().all() for value in load_file(tmp_path / "last.safetensors").values())


def test_a_validation_loss_that_is_not_finite_is_named(tmp_path: Path) -> None:
    def poison(count: int) -> None:
        if count == STEPS + 1:  # the first epoch's validation
            nn.init.constant_(classifier.network.conv.bias, math.nan)

    classifier = toy(poison)
    with pytest.raises(ValueError, match=r"the validation loss after the epoch is nan at step 5 \(epoch 1, "):
        run(tmp_path, classifier)
    assert not (tmp_path / "checkpoint.safetensors").exists() and not (tmp_path / "metrics.jsonl").exists()


def test_what_memory_or_bn_lacks_is_said_with_what_the_run_may_still_change(tmp_path: Path) -> None:
    def full(count: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def lonely(count: int) -> None:
        nn.functional.batch_norm(torch.zeros(1, 3, 1, 1), None, None, training=True)

    bf16 = settings(precision="bf16")
    broken = toy(lambda count: nn.init.constant_(broken.network.conv.bias, math.nan if count > 1 else 0))
    with pytest.raises(
        ValueError, match=r"at batch_size 8, T=2, precision bf16; go on with --recompute, or train anew"
    ):
        run(tmp_path / "a", toy(full), config=bf16)
    with pytest.raises(ValueError, match=r"no statistics for BN: Expected more than 1 value .*; raise --batch-size"):
        run(tmp_path / "b", toy(lonely))
    with pytest.raises(ValueError, match=r"lower --lr, use --precision fp32 or switch on"):
        run(tmp_path / "c", broken, config=bf16)


@pytest.mark.parametrize(("precision", "remedy"), [("fp32", "look for"), ("bf16", "use --precision fp32, or look for")])
def test_a_first_loss_that_is_not_finite_is_not_laid_to_the_rate(tmp_path: Path, precision: str, remedy: str) -> None:
    broken = toy(lambda count: nn.init.constant_(broken.network.conv.bias, math.nan))
    with pytest.raises(ValueError, match=rf"nan at step 0 \(.*\), before any weight was changed: {remedy} what is not"):
        run(tmp_path, broken, config=settings(precision=precision))


def test_a_state_that_outlives_its_batch_is_named(tmp_path: Path) -> None:
    class Stateful(Toy):
        u: Tensor | float = 0.0

        def forward(self, x: Tensor, T: int | None = None) -> Tensor:
            self.u = self.u + super().forward(x, T)
            return self.u

    with pytest.raises(ValueError, match=r"tests:toy goes on with what it computed of the batch before, .*: reset"):
        run(tmp_path, wrap(Stateful()))


def test_a_state_that_a_checkpoint_would_hold_in_the_batch_s_shape_is_refused(tmp_path: Path) -> None:
    class Stateful(Toy):
        def __init__(self, *, persistent: bool) -> None:
            super().__init__()
            self.register_buffer("v_mem", torch.zeros(0), persistent=persistent)

        def forward(self, x: Tensor, T: int | None = None) -> Tensor:
            self.v_mem = x.detach()
            return super().forward(x, T)

    with pytest.raises(ValueError, match=r"not fit a new network: v_mem \[8, 1, 4, 4\], not \[0\] as before; take"):
        run(tmp_path / "kept", wrap(Stateful(persistent=True)))
    assert not (tmp_path / "kept" / "checkpoint.safetensors").exists()
    assert run(tmp_path / "other", wrap(Stateful(persistent=False))).checkpoint.is_file()


def test_recomputing_reaches_the_network(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Toy has nothing to recompute"):
        run(tmp_path, how=How(recompute=True))


def test_data_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    wide = ImageSet(**(vars(TRAIN) | {"images": np.zeros((52, 1, 4, 5), np.uint8)}))
    with pytest.raises(ValueError, match=r"toy has images of shape \(1, 4, 5\); the network wants \(1, 4, 4\)"):
        train(toy(), wide, VAL, settings(), tmp_path)
    more = ImageSet(**(vars(TRAIN) | {"labels": TRAIN.labels + 1, "class_names": ("a", "b", "c", "d")}))
    with pytest.raises(ValueError, match="toy has labels from 1 to 3; the network has 3 classes"):
        train(toy(), more, VAL, settings(), tmp_path)
    alone = ImageSet(**(vars(TRAIN) | {"labels": np.zeros_like(TRAIN.labels), "class_names": ("dark",)}))
    with pytest.raises(ValueError, match=r"toy has one class, dark, and nothing to tell it from \(folder:PATH takes"):
        train(wrap(Toy(), ("dark",)), alone, None, settings(), tmp_path)
    for sets, message in (
        ((TRAIN.images, VAL), "train_set .*, got ndarray; load_data"),
        ((TRAIN, [1]), "val_set .* list"),
    ):
        with pytest.raises(ValueError, match=message):
            train(toy(), *sets, settings(), tmp_path)
        with pytest.raises(ValueError, match=message):
            train_seeds(lambda seed: toy(), *sets, settings(), (0,), tmp_path / "seeds")
    with pytest.raises(ValueError, match=r"classifier must be a Classifier, got Toy; a network becomes one"):
        train(Toy(), TRAIN, VAL, settings(), tmp_path)
    with pytest.raises(ValueError, match="classifier must be a Classifier, got Toy"):
        train_seeds(lambda seed: Toy(), TRAIN, VAL, settings(), (0,), tmp_path / "seeds")
    with pytest.raises(ValueError, match="config must be of type TrainConfig, got dict"):
        train(toy(), TRAIN, VAL, {}, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="config must be of type TrainConfig, got dict"):
        train_seeds(lambda seed: toy(), TRAIN, VAL, {}, (0,), tmp_path / "seeds")  # type: ignore[arg-type]
    for flag in ("resume", "board", "progress"):
        no: dict[str, Any] = {flag: "no"}
        with pytest.raises(ValueError, match=f"{flag} must be True or False(, or None)?, got 'no'"):
            train(toy(), TRAIN, VAL, settings(), tmp_path, **no)
        with pytest.raises(ValueError, match=f"{flag} must be True or False(, or None)?, got 'no'"):
            train_seeds(lambda seed: toy(), TRAIN, VAL, settings(), (0,), tmp_path / "seeds", **no)
    with pytest.raises(ValueError, match="how must be of type How, got dict"):
        train(toy(), TRAIN, VAL, settings(), tmp_path, how={"recompute": True})  # type: ignore[arg-type]
    for sets in ({"train_set": TRAIN, "val_set": otherwise(VAL)}, {"train_set": otherwise(TRAIN), "val_set": None}):
        with pytest.raises(
            ValueError,
            match=r"labels of toy do not match .* \(bright, middle, dark\), .*; label 0 means bright to it, ",
        ):
            train(toy(), config=settings(), out=tmp_path, **sets)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("own", "names"),
    [
        (("dark", "middle", "bright"), ["dark", "middle", "bright"]),
        (("dark", "middle", "bright"), ("0", "1", "2")),
        (("0", "1", "2"), ("dark", "middle", "bright")),
        (("dark", "middle", "bright", "white"), ("dark", "middle", "bright")),
    ],
)
def test_data_made_in_python_need_not_name_their_classes(own: tuple[str, ...], names: Any) -> None:
    check_data(ImageSet(**(vars(TRAIN) | {"class_names": names})), wrap(Toy(), own), 2)


@pytest.mark.parametrize("name", ["folder:a", "digits", "imagenet@64"])
def test_data_that_have_names_for_their_classes_are_known_by_them(name: str) -> None:
    numbered = ImageSet(**(vars(TRAIN) | {"name": name, "class_names": ("0", "1", "2")}))
    with pytest.raises(ValueError, match=rf"labels of {name} do not match"):
        check_data(numbered, toy(), 2)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write .*file/run: Not a directory"):
        run(tmp_path / "file" / "run")


def test_a_path_need_not_be_utf8(tmp_path: Path, finished: Path) -> None:
    out = tmp_path / os.fsdecode(b"run\xff")
    run(out, toy(interrupt_at(9)))
    assert run(out, resume=True).epochs == 3
    assert same_weights(*(tetdeploy.load(folder, network=Toy()) for folder in (out, finished)))
    with pytest.raises(OSError, match=r"TensorBoard takes no path that is not UTF-8; choose another --out"):
        run(tmp_path / os.fsdecode(b"board\xff"), board=True)
    assert [*tmp_path.iterdir()] == [out]


def test_a_full_disk_leaves_the_finished_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Any, target: Any) -> None:
        if Path(target).name == "metrics.jsonl" and Path(target).exists():
            raise OSError(28, "No space left on device")
        replace(source, target)

    replace = os.replace
    monkeypatch.setattr("tetdeploy.storage.files.os.replace", full)
    with pytest.raises(
        OSError, match=r"No space left on device; what .* as it was: go on with --resume --model tests:toy"
    ):
        run(tmp_path)
    monkeypatch.undo()
    assert len(metrics(tmp_path)) == 1
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []
    whole, resumed = toy(), toy()
    run(tmp_path / "whole", whole)
    run(tmp_path, resumed, resume=True)
    assert same_weights(resumed, whole)


# --- progress


def test_progress_is_one_line_an_epoch_off_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, progress=None)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("toy  52 train  31 validation   tests:toy 0.000243 M parameters   fp32")
    assert lines[1] == "TET lambda 0.05   T=2   3 epochs   batch size 8   adamw lr 0.002"
    run(tmp_path / "cut", progress=None, config=settings(batch_size=60))
    assert "   batch size 52 (all there are, of 60)   " in capsys.readouterr().out
    assert len(lines) == 5
    assert lines[4].startswith("epoch 3/3  T=2  loss ") and lines[4].endswith("img/s  eta 00:00")


def test_progress_bar_and_silence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "bar", progress=True)
    shown = capsys.readouterr().out
    assert "━" in shown and "epoch 3/3" in shown and "eta 00:00" in shown
    run(tmp_path / "silent", progress=False)
    assert capsys.readouterr().out == ""


def test_the_remaining_time_goes_by_the_recent_epochs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("tetdeploy.train.progress.time.perf_counter", lambda: now)
    with Progress(settings(T=2, epochs=20), steps_per_epoch=10, steps_done=0, show=None) as bar:
        for epoch in range(1, 11):
            now += 100 if epoch == 1 else 1  # the first also compiles
            bar.epoch({"epoch": epoch, "train_loss": 1, "train_accuracy": 1, "images_per_s": 1, "val_accuracy": None})
    ends = [line[-5:] for line in capsys.readouterr().out.splitlines()]
    assert ends[0] == "31:40"  # 19 epochs of 100 s
    assert ends[1:] == [f"00:{left:02d}" for left in range(18, 9, -1)]


# --- run folders


def test_latest_points_at_the_newest_run(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    run(runs / "one", runs=runs)
    assert newest_run(runs) == runs / "one"
    run(tmp_path / "elsewhere" / "two", runs=runs)
    assert newest_run(runs) == tmp_path / "elsewhere" / "two"
    assert (runs / "latest" / "checkpoint.safetensors").is_file()


def test_latest_points_at_the_newest_run_where_runs_is_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scratch/me/runs").mkdir(parents=True)
    runs = Path("runs")
    runs.symlink_to("scratch/me/runs")
    for name in ("runs/one", "two"):
        Path(name).mkdir()
        mark_latest(Path(name), runs)
        assert (runs / "latest").samefile(name) and newest_run(runs).samefile(name)
    mark_latest(Path("runs/one"), runs)
    assert newest_run(runs) == Path("runs/one")
    mark_latest(Path("two"), Path("others"))
    assert newest_run(Path("others")) == Path("two")


def test_latest_is_the_whole_path_of_a_run_on_another_drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.setattr(os.path, "relpath", Mock(side_effect=ValueError("path is on mount 'D:', start on mount 'C:'")))
    mark_latest(run, tmp_path / "runs")
    assert (tmp_path / "runs" / "latest").readlink() == run == newest_run(tmp_path / "runs")


@pytest.mark.parametrize("system", ["FAT", "Windows"])
def test_latest_is_a_text_file_where_there_are_no_symlinks(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise OSError("Operation not permitted")

    if system == "Windows":  # which makes a link, for some, and puts none in its place
        monkeypatch.setattr(sys, "platform", "win32")
    else:
        monkeypatch.setattr(Path, "symlink_to", refuse)
    for name in (b"one", b"two\xff"):
        folder = tmp_path / "runs" / os.fsdecode(name)
        folder.mkdir(parents=True)
        mark_latest(folder, tmp_path / "runs")
        assert (tmp_path / "runs" / "latest").read_bytes() == name + b"\n"
        assert newest_run(tmp_path / "runs") == folder


def test_a_latest_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    warned = r"runs/latest cannot be written \(.+\): name the run in later commands, or train with another --runs"
    with pytest.warns(RuntimeWarning, match=warned):
        assert run(tmp_path / "elsewhere", runs=tmp_path / "runs").epochs == 3


def test_a_folder_in_the_place_of_latest_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    (runs / "latest").mkdir(parents=True)
    refused = r"latest is a folder, where a link .* is to be: rename or remove it, or train with another --runs"
    with pytest.raises(OSError, match=refused):
        run(runs / "new", runs=runs)
    with pytest.raises(OSError, match=refused):
        train_seeds(
            lambda seed: toy(seed=seed), TRAIN, VAL, settings(), (0, 1), runs / "new", runs=runs, progress=False
        )
    assert [path.name for path in tmp_path.rglob("*")] == ["runs", "latest"]
    with pytest.warns(RuntimeWarning, match=r"latest cannot be written"):
        assert run(tmp_path / "elsewhere", runs=runs).checkpoint.exists()


def test_a_run_in_latest_itself_goes_on(tmp_path: Path) -> None:
    latest = tmp_path / "latest"
    run(latest, toy(interrupt_at(9)))
    assert not run(latest, resume=True, runs=tmp_path).interrupted
    assert not latest.is_symlink() and newest_run(tmp_path) == latest


def test_a_run_goes_on_by_the_link_latest(tmp_path: Path) -> None:
    run(tmp_path / "one", toy(interrupt_at(9)), runs=tmp_path)
    result = run(tmp_path / "latest", resume=True, runs=tmp_path)
    assert not result.interrupted and result.out == tmp_path / "one"
    assert (tmp_path / "latest").readlink() == Path("one")


def test_seeds_of_numpy_and_folders_named_by_text(tmp_path: Path) -> None:
    out = str(tmp_path / "several")
    seeds: Any = np.arange(2)
    result = train_seeds(
        lambda seed: toy(seed=seed), TRAIN, VAL, settings(), seeds, out, runs=str(tmp_path), progress=False
    )
    assert [run.out.name for run in result.runs] == ["seed-0", "seed-1"]
    assert json.loads((tmp_path / "several" / "config.json").read_text())["seeds"] == [0, 1]


def test_weights_made_in_inference_mode_are_refused(tmp_path: Path) -> None:
    with torch.inference_mode():
        classifier = toy()
    with pytest.raises(ValueError, match=r"made within torch\.inference_mode\(\) cannot be trained"):
        run(tmp_path / "run", classifier)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kept", ["a link", "a folder"])
def test_seeds_go_on_by_latest(kept: str, tmp_path: Path) -> None:
    def seeds(out: Path, *seeds: int, **options: Any) -> Any:
        return train_seeds(
            lambda seed: toy(seed=seed), TRAIN, VAL, settings(), seeds, out, runs=tmp_path, progress=False, **options
        )

    several, latest = tmp_path / "several", tmp_path / "latest"
    seeds(several, 0)
    latest.unlink()
    if kept == "a link":
        latest.symlink_to("several")
    else:
        several.rename(latest)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = seeds(latest, 0, 1, resume=True)
    assert len(result.runs) == 2 and newest_run(tmp_path).name in ("latest", "seed-0", "seed-1")
    assert latest.is_symlink() == (kept == "a link")


def test_latest_is_never_written_through_a_symlink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, full = tmp_path / "runs", OSError(28, "No space left on device")
    runs.mkdir()
    (runs / "latest").symlink_to("../other")
    monkeypatch.setattr(Path, "symlink_to", Mock(side_effect=full))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", Mock(side_effect=full))
        with pytest.raises(OSError, match=r"latest cannot be written \(No space left.*remove it, or .*--runs"):
            mark_latest(runs / "new", runs)
    assert (runs / "latest").readlink() == Path("../other")
    mark_latest(runs / "new", runs)
    assert (runs / "latest").read_text() == "new\n"
    assert [path.name for path in tmp_path.rglob("*")] == ["runs", "latest"]


def test_new_run_folders_count_up_and_go_again_where_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "runs" / "digits-convsnn").mkdir(parents=True)
    with (
        new_run_folder(tmp_path / "runs", "digits-convsnn") as two,
        new_run_folder(two.parent, "digits-convsnn") as three,
    ):
        assert [two.name, three.name] == ["digits-convsnn-2", "digits-convsnn-3"]
        (three / "file").touch()
    assert sorted(path.name for path in two.parent.iterdir()) == ["digits-convsnn", "digits-convsnn-3"]
    with new_run_folder(tmp_path / "elsewhere" / "runs", "digits-convsnn") as folder:
        assert folder.is_dir()
    assert not (tmp_path / "elsewhere").exists()
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write .*file/digits: Not a directory; choose another output folder"):
        new_run_folder(tmp_path / "file", "digits").__enter__()


# --- one trainer in a folder


def test_a_folder_in_training_takes_no_second_trainer(tmp_path: Path) -> None:
    whole, held, other = tmp_path / "whole", tmp_path / "held", toy()
    refusal = rf"{held} is being trained by process {os.getpid()} on \S+; wait until .* choose another --out"

    def refused(count: int) -> None:
        if count in (1, STEPS + 3):  # before there is an epoch to resume, and after
            for resume in (False, True):
                with pytest.raises(ValueError, match=refusal):
                    run(held, other, resume=resume)

    run(whole)
    run(held, toy(refused))
    assert metrics(held) == metrics(whole)
    assert {path.name for path in held.iterdir()} == {path.name for path in whole.iterdir()}


def test_a_trainer_that_is_killed_holds_its_folder_no_longer(tmp_path: Path) -> None:
    script = """
import os
import sys
from pathlib import Path
from filelock import FileLock
with FileLock(sys.argv[1]):
    Path(sys.argv[1]).write_text(f"process {os.getpid()} on this machine")
    print("holds", flush=True)
    sys.stdin.read()
"""  # as `only_trainer`, whose import takes seconds
    command = [sys.executable, "-c", script, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "holds\n"
        with pytest.raises(ValueError, match=f"is being trained by process {other.pid} on"):
            run(tmp_path)
        other.kill()
    assert (tmp_path / ".lock").exists()
    names = ("checkpoint.safetensors", "last.safetensors", "config.json", "metrics.jsonl", "summary.json")
    for name in (*names, "model.onnx"):  # the last of another command, which may be at work
        (tmp_path / f".{name}.k1ll3d.tmp").touch()
    (tmp_path / ".tmpvi9B1S").touch()  # safetensors'
    run(tmp_path)
    assert [path.name for path in tmp_path.glob(".*")] == [".model.onnx.k1ll3d.tmp"]


def test_what_was_left_half_done_goes_where_the_lock_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / ".last.safetensors.k1ll3d.tmp"
    left.touch()
    monkeypatch.setattr(Path, "write_text", Mock(side_effect=PermissionError))  # as on Windows
    with only_trainer(tmp_path, resume=False):
        assert not left.exists()


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOLCK])
def test_without_locks_a_run_goes_on_and_says_so(tmp_path: Path, error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.warns(
        RuntimeWarning, match=rf"\.lock cannot be locked \({os.strerror(error)}\): see to it that no other"
    ):
        assert run(tmp_path).epochs == 3


def test_a_lock_that_cannot_be_opened_may_be_held(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()  # as a file of another user, it cannot be opened to write
    reason = rf"cannot lock {re.escape(str(tmp_path))}/\.lock: Is a directory; make its folder writable, or train anew"
    with pytest.raises(OSError, match=reason):
        run(tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_several_seeds_hold_the_folder_of_all(tmp_path: Path) -> None:
    run(tmp_path / "seed-0", config=settings(seed=0))
    with (
        only_trainer(tmp_path, resume=False),
        pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))} is being trained by process"),
    ):
        train_seeds(lambda seed: toy(), TRAIN, VAL, settings(), (0, 1), tmp_path, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seed-0"]


def test_the_seed_decides_the_initial_weights_and_no_seed_goes_on_with_anothers(tmp_path: Path) -> None:
    def drawn(seed: int) -> Classifier:
        assert torch.initial_seed() == seed
        return wrap(Toy())

    before = torch.get_rng_state()
    train_seeds(drawn, TRAIN, None, settings(epochs=1), (0, 1), tmp_path / "seeds", progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    train_seeds(drawn, TRAIN, None, settings(epochs=1), (1,), tmp_path / "again", progress=False)
    zero, one, other = (
        tetdeploy.load(tmp_path / f, network=Toy()) for f in ("seeds/seed-0", "seeds/seed-1", "again/seed-1")
    )
    assert same_weights(one, other) and not same_weights(one, zero)

    kept = wrap(Toy())
    factories = {"one object": lambda seed: kept, "one network": lambda seed: wrap(kept.network)}
    with pytest.raises(ValueError, match="seed is 100000000000000000000; it must be at least 0 and at most"):
        train_seeds(drawn, TRAIN, VAL, settings(), (0, 10**20), tmp_path / "huge", progress=False)
    for name, factory in factories.items():
        with pytest.raises(ValueError, match=r"for seed 1 weights that it had returned before; let it build a new"):
            train_seeds(factory, TRAIN, VAL, settings(), (0, 1), tmp_path / name, progress=False)
        assert not (tmp_path / name).exists()
    one = factories["one object"]
    assert len(train_seeds(one, TRAIN, None, settings(epochs=1), (0,), tmp_path / "one", progress=False).runs) == 1
    made = {0: wrap(Toy()), 1: wrap(Toy())}
    result = train_seeds(made.__getitem__, TRAIN, None, settings(epochs=1), (0, 1), tmp_path / "made", progress=False)
    assert len(result.runs) == 2


# --- real data, real network


def test_the_small_network_learns_real_digits(tmp_path: Path) -> None:
    digits = load_data("digits", "train", data_dir=tmp_path)
    train_set, val_set = split_validation(digits.select(slice(600)), fraction=0.2)
    config = NetworkConfig("convsnn", 10, 1, (8, 8), width=0.5)
    torch.manual_seed(0)
    classifier = Classifier(
        build_network(config), config=config, mean=digits.mean, std=digits.std, class_names=digits.class_names
    )
    result = train(classifier, train_set, val_set, settings(T=2, epochs=5, batch_size=32, lr=0.01), tmp_path / "run")
    assert result.best is not None and result.best.val_accuracy is not None
    assert result.best.val_accuracy > 0.8  # 0.98 here; 0.91 with another seed
