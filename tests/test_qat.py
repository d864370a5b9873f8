"""Fine-tuning in 8 bits: gradients, what is trained is what the export computes, runs and resumes, refusals."""

from __future__ import annotations

import copy
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_helpers import printed, refused
from export_helpers import LinearTokens, classifier, convsnn, digits, frames
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from tetdeploy import Engine
from tetdeploy.checkpoint import load, read_metadata
from tetdeploy.data import load_data, split_validation
from tetdeploy.export.trained import Trained
from tetdeploy.int8.calibration import Calibration
from tetdeploy.int8.network import Int8Network
from tetdeploy.int8.quantisation import CurrentScale, fake_quantised_conv
from tetdeploy.names import section
from tetdeploy.traced_network import TracedNetwork
from tetdeploy.tracing import Tracer
from tetdeploy.train import TrainConfig, TrainResult, qat, session, train

TRAIN, VAL = split_validation(load_data("digits", "train", data_dir=Path()).select(slice(400)), fraction=0.2)
SCALES = {"layer2.0": CurrentScale.covering(-3, 3), "layer3.1": CurrentScale.covering(-3, 3)}


def tuned(out: Path, init: Path, *, classifier: Any = None, **changes: Any) -> TrainResult:
    settings = {"T": 2, "epochs": 2, "lr": 1e-3, "batch_size": 64, "qat": True, "device": "cpu"} | changes
    start = classifier or load(init)
    return train(start, TRAIN, VAL, TrainConfig(**settings), out, resume=(out / "config.json").exists(), progress=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network, trained in float32 by the command."""
    folder = tmp_path_factory.mktemp("qat") / "plain"
    kept = "--T 2 --batch-size 32 --label-smoothing 0.1 --clip 1 --lam 0.1 --phi 0.9 --val-fraction 0.2 --cutout 1"
    options = f"{kept} --augment shift --loss sdt --switch-to-tet 2".split()
    printed("train", "--width", "0.25", "--epochs", "3", *options, "--out", folder, "--runs", folder.parent)
    return folder


# --- gradients


@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_are_those_without_rounding_and_none_where_clipped(groups: int) -> None:
    torch.manual_seed(0)
    spikes = (torch.rand(3, 4, 6, 6) < 0.4).float().requires_grad_()
    weight = torch.randn(6, 4 // groups, 3, 3, requires_grad=True)
    bias = torch.randn(6, requires_grad=True)
    place = ([2, 2], [1, 1], [1, 1], groups)
    scale = CurrentScale.covering(-2.0, 2.0)
    current = fake_quantised_conv(spikes, weight, bias, scale.scale, scale.zero, *place)
    exact = functional.conv2d(spikes, weight, bias, *place)
    inside = (exact > -1.9) & (exact < 1.9)
    clipped = (exact < -2.1) | (exact > 2.1)
    assert 0.1 < float(clipped.float().mean()) < 0.9
    torch.testing.assert_close(current[inside], exact[inside], rtol=0.0, atol=0.1)
    assert float(current.detach().abs().max()) <= 2.01
    parameters = (spikes, weight, bias)
    assert not any(grad.any() for grad in torch.autograd.grad(current[clipped].sum(), parameters, retain_graph=True))
    ours = torch.autograd.grad(current[inside].sum(), parameters)
    expected = torch.autograd.grad(exact[inside].sum(), parameters)
    for got, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0.0, atol=0.02 * float(wanted.abs().max()))


@pytest.mark.parametrize("encoding", ["direct", "frames"])
def test_gradients_reach_every_parameter_and_bn_keeps_its_statistics(encoding: Any) -> None:
    network = Int8Network(Tracer(convsnn(), encoding=encoding, uint8=True), SCALES)
    before = {name: value.clone() for name, value in network.named_buffers()}
    network.train()
    x = torch.from_numpy(digits().images[:8] if encoding == "direct" else frames(8, 3))
    with torch.inference_mode():  # the first trace, that of a validation
        network(x if encoding == "direct" else x.transpose(0, 1), 3)
    network(x if encoding == "direct" else x.transpose(0, 1), 3).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        parameter.grad = None
    assert all(torch.equal(value, before[name]) for name, value in network.named_buffers())


@torch.no_grad()
def test_a_frozen_network_computes_the_same_bits_and_a_copy_of_it_the_weights_it_has_when_called() -> None:
    tracer = Tracer(copy.deepcopy(convsnn()), encoding="direct", uint8=True)
    x, frozen = torch.from_numpy(digits().images[:30]), Int8Network(tracer, SCALES, frozen=True)
    expected = Int8Network(tracer, SCALES)(x, 3)
    assert torch.equal(frozen(x, 3), expected) and not any(p.requires_grad for p in frozen.trace(3).parameters())
    copied = copy.deepcopy(frozen)
    for parameter in copied.parameters():
        parameter.mul_(0.5)
    assert not torch.equal(copied(x, 3), expected) and torch.equal(frozen(x, 3), expected)
    assert torch.equal(copied(x, 3), Int8Network(copied.tracer, SCALES)(x, 3))
    for parameter in frozen.parameters():
        parameter.mul_(0.5)  # too late
    assert torch.equal(frozen(x, 3), expected) and not torch.equal(Int8Network(tracer, SCALES)(x, 3), expected)


@pytest.mark.parametrize("shape", [(7, 8, 5), (7, 8, 5, 5), (7, 8, 3, 3, 3), (0, 8, 5, 5)])
def test_currents_round_alike_in_parts(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    dims, generator = len(shape) - 2, torch.Generator().manual_seed(0)
    spikes = (torch.rand(shape, generator=generator) < 0.3).float()
    weight = torch.randint(-127, 128, (4, 8, *[3] * dims), generator=generator, dtype=torch.int8)
    bias = torch.randint(-(2**29), 2**29, (4,), generator=generator, dtype=torch.int32) // 2 ** torch.arange(0, 28, 7)
    scale = 0.001 + torch.rand(4, generator=generator) / 100
    given = (spikes, weight, scale, bias.int(), 0.02, 90, [1] * dims, [1] * dims, [1] * dims, 1)
    found = []
    for in_cache in (1, 3 * shape[1] * 5**dims, 2**18):
        monkeypatch.setattr("tetdeploy.int8.quantisation._IN_CACHE", in_cache)
        found.append(torch.ops.tetdeploy.int8_conv(*given))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert shape[0] == 0 or len(found[0].unique()) > 20


def test_bn_of_tokens_trains_with_the_linear_layer_before_it() -> None:
    tokens = classifier(LinearTokens())
    scales = qat.find_scales(tokens, TRAIN, 2).scales
    assert list(scales) == ["conv.0"]
    network = qat.int8_network(tokens, scales).train()
    network(torch.from_numpy(digits().images[:8]), 2).square().sum().backward()
    for parameter in (tokens.network.linear.weight, tokens.network.bn.weight, tokens.network.bn.bias):
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0


def test_a_copy_has_weights_of_its_own() -> None:
    network = TracedNetwork(Tracer(copy.deepcopy(convsnn()), encoding="direct", uint8=True))
    x = torch.from_numpy(digits().images[:3])
    for T, message in ((0, "T must be at least 1, got 0"), (None, "T must be a whole number, got None")):
        with pytest.raises(ValueError, match=message):
            network(x, T)
    with torch.no_grad():
        before = network(x, 2)
        copied = copy.deepcopy(network)
        for parameter in copied.parameters():
            parameter.mul_(0.5)
        assert not torch.equal(copied(x, 2), before)
        network._by_T.clear()
        assert torch.equal(network(x, 2), before)


# --- runs


def test_the_export_computes_what_was_trained(trained: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "tuned", "--runs", tmp_path)
    said = " ".join(printed("train", "--qat", "--init", trained, "--epochs", "1", *out).split())
    assert "2 convolutions in int8" in said and "--precision int8" in said
    assert f"parameters, from {trained} " in said
    metadata, before = read_metadata(tmp_path / "tuned"), read_metadata(trained)
    training, kept = metadata["training"], ("T", "batch_size", "label_smoothing", "clip", "lam", "phi", "val_fraction")
    assert metadata["network"] == before["network"]
    assert all(training[name] == before["training"][name] for name in (*kept, "augment", "cutout"))
    assert (training["lr"], training["loss"]) == (1e-4, "tet")
    int8 = ("export", tmp_path / "tuned", "--precision", "int8")
    said = " ".join(printed(*int8, "--check", "100", "-o", tmp_path / "int8.onnx").split())
    assert "2 convolutions, at the scales that the run was fine-tuned at (--qat)" in said
    assert "spike mismatch 0.00 ppm" in said
    printed("export", tmp_path / "tuned", "--check", "100", "-o", tmp_path / "fp32.onnx")
    assert "leave out --calibrate" in refused(*int8, "--calibrate", "64", code=2)

    engine = Engine(tmp_path / "int8.onnx", threads=1)
    data, val = split_validation(load_data("digits", "train", data_dir=Path()), fraction=0.2)
    answers = engine.run(val.x, 2).logits.argmax(1)
    assert float((answers == val.labels).mean()) == pytest.approx(metadata["provenance"]["val_accuracy"], abs=1e-6)
    scales = Calibration.from_dict(metadata["int8"])
    assert scales.fine_tuned and list(scales.scales) == ["layer2.0", "layer3.1"]
    network = Int8Network(Tracer(load(tmp_path / "tuned"), encoding="direct", uint8=True), scales.scales)
    with torch.no_grad():
        logits = network(torch.from_numpy(data.x[:64]), 2).transpose(0, 1).numpy()
    np.testing.assert_allclose(engine.run(data.x[:64], 2).per_step, logits, rtol=0.0, atol=1e-4)


def test_weights_train_and_statistics_stay(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "pick_precision", lambda *_: "bf16")  # as on a GPU
    result = tuned(tmp_path / "run", trained, epochs=1, ema=0.5, random_T="1:3", loss="sdt", tit="")
    before, after = (load_file(folder / "checkpoint.safetensors") for folder in (trained, result.out))
    assert before.keys() == after.keys()
    for name in before:
        fixed = name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        assert torch.equal(before[name], after[name]) == fixed, name
    assert read_metadata(result.out)["provenance"]["precision"] == "fp32"
    averages = section(load_file(result.out / "last.safetensors"), "average.")
    assert averages and all(torch.equal(after[name], average) for name, average in averages.items())


def test_an_interrupted_run_goes_on_with_the_same_scales_and_weights(trained: Path, tmp_path: Path) -> None:
    changes = {"tit": "2:1,3:1"}
    whole = tuned(tmp_path / "whole", trained, **changes)
    of_last_stage = qat.find_scales(load(trained), TRAIN, 3).scales
    assert Calibration.from_dict(read_metadata(whole.out)["int8"]).scales == of_last_stage
    classifier, passes = load(trained), iter(range(1000))

    def interrupt(module: nn.Module, given: Any, output: Any) -> None:
        if torch.is_grad_enabled() and next(passes) == 2:
            signal.raise_signal(signal.SIGINT)

    hook = nn.modules.module.register_module_forward_hook(
        lambda module, given, output: interrupt(module, given, output) if isinstance(module, Int8Network) else None
    )
    with hook:
        assert tuned(tmp_path / "cut", trained, classifier=classifier, **changes).interrupted
    untrained = load(trained)
    nn.init.zeros_(untrained.network.layer2[0].weight)  # --resume overwrites it, and calibrates nothing anew
    assert not tuned(tmp_path / "cut", trained, classifier=untrained, **changes).interrupted
    for name in ("checkpoint.safetensors", "last.safetensors"):
        a, b = load_file(whole.out / name), load_file(tmp_path / "cut" / name)
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert read_metadata(whole.out)["int8"] == read_metadata(tmp_path / "cut")["int8"]


# --- refusals


def test_what_cannot_be_fine_tuned(trained: Path, tmp_path: Path) -> None:
    tune = ("train", "--qat", "--out", tmp_path / "none", "--runs", tmp_path)
    assert "name its run or checkpoint with --init" in refused(*tune, code=2)
    assert "has width 0.25, not 0.5: leave it out" in refused(*tune, "--init", trained, "--width", "0.5")
    said = refused(*tune, "--init", trained, "--data", "saccades:digits")
    assert "takes direct input [1, 8, 8] of 10 classes" in said
    assert "--recompute does not go with --qat" in refused(*tune, "--init", trained, "--recompute")
    for precision in ("bf16", "fp16"):
        with pytest.raises(ValueError, match=f"whole numbers in float32; use precision fp32, got {precision}"):
            TrainConfig(qat=True, precision=precision)
    few = TrainConfig(T=2, epochs=1, qat=True, device="cpu", batch_size=20)
    with pytest.raises(ValueError, match=r"at least 32 images .*, got 20 \(another --data .*; leave out --qat$"):
        train(load(trained), TRAIN.select(slice(20)), VAL, few, tmp_path / "few", progress=False)
    assert not (tmp_path / "none").exists() and not (tmp_path / "few").exists()


@pytest.mark.parametrize(("option", "kind"), [(("--ann",), "an ANN twin"), (("--smooth-spike", "10"), "smooth spikes")])
def test_networks_without_spikes_are_refused(option: tuple[str, ...], kind: str, tmp_path: Path) -> None:
    short = ("--width", "0.1", "--T", "1", "--epochs", "1", "--warmup-epochs", "0", "--runs", tmp_path)
    printed("train", *option, *short, "--out", tmp_path / "a")
    said = refused("train", "--qat", "--init", tmp_path / "a", "--out", tmp_path / "b", "--runs", tmp_path)
    assert kind in said and "leave out --qat" in said


def test_scales_that_cannot_be_read(trained: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json lacks the scales of --qat; start the run again with --init"):
        qat.read_scales(trained)
    with pytest.raises(ValueError, match="its int8 metadata cannot be read"):
        _ = Trained(trained, {"int8": {"scales": []}}, "").scales


def test_scales_are_found_on_the_last_training_images(monkeypatch: pytest.MonkeyPatch) -> None:
    data, seen, network = load_data("digits", "train", data_dir=Path("data")), [], copy.deepcopy(convsnn()).train()
    monkeypatch.setattr(qat, "calibrate", lambda tracer, x, labels, T, answers: seen.append((x, labels, T)))
    qat.find_scales(network, data, 3)
    ((x, labels, T),) = seen
    assert np.array_equal(x, data.x[-512:]) and np.array_equal(labels, data.labels[-512:])
    assert T == 3 and not network.training
