"""Side by side against plain loops over single spikes, margins against numpy's, and runs that are taken up again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_helpers import convsnn, digits, engine, exported, frames
from torch import nn

from tetdeploy.engine import Engine
from tetdeploy.export.counters import spikes_overlay
from tetdeploy.export.margins import Margins, margins
from tetdeploy.export.recorder import run_torch
from tetdeploy.export.sidebyside import SideBySide, torch_latency
from tetdeploy.networks import Classifier
from tetdeploy.neurons import lif
from tetdeploy.resumable import Partial, Pass, finish
from tetdeploy.sweep import summarise, sweep

T = 4


def moved(scale: float, *, channel: bool = False) -> Classifier:
    """The exported network with every weight, or one channel of the second convolution, `scale` times as large."""
    classifier = copy.deepcopy(convsnn())
    convolutions = [m for m in classifier.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        for convolution in convolutions[1:2] if channel else convolutions:
            weight = convolution.weight[:1] if channel else convolution.weight
            weight.mul_(scale)
    return classifier


def compared(classifier: Classifier, model: Engine, count: int = 40, steps: int = T) -> SideBySide:
    data = digits()
    beside = SideBySide(classifier, model, steps)
    for start in range(0, count, 15):
        part = slice(start, min(start + 15, count))
        beside.add(data.x[part], data.labels[part])
    return beside


@pytest.mark.parametrize("layout", ["unrolled", "dynamic", "step"])
def test_rates_are_those_of_a_plain_loop(layout: str) -> None:
    model, classifier = engine(layout), moved(1.3, channel=True)
    beside = compared(classifier, model)
    x, labels = digits().x[:40], digits().labels[:40]
    logits, expected = run_torch(classifier, x, T)
    result, outputs = model.run_with(spikes_overlay(beside.names), x, T)
    spikes = [outputs[f"spikes.{name}"] for name in beside.names]
    for t in range(1, T + 1):
        row = beside.row(t)
        different = sum(int((a[:t] != b[:t]).sum()) for a, b in zip(spikes, expected, strict=True))
        assert different > 0
        assert row["spike_mismatch_rate"] == different / sum(a[:t].size for a in expected)
        classes = [side[:, :t].mean(1).argmax(-1) for side in (logits, result.per_step)]
        assert row["torch_accuracy"] == np.mean(classes[0] == labels)
        assert row["engine_accuracy"] == np.mean(classes[1] == labels)
        assert row["top1_agreement"] == np.mean(classes[0] == classes[1])
        assert row["max_abs_logit_error"] == pytest.approx(np.abs(logits - result.per_step)[:, :t].max(), rel=1e-4)
    for k, (a, b) in enumerate(zip(spikes, expected, strict=True)):
        layer = beside.neuron(k)
        assert layer["spike_mismatch_rate"] == np.mean(a != b)
        assert layer["torch_firing_rate"] == pytest.approx(b.mean())
        assert layer["engine_firing_rate"] == pytest.approx(a.mean())
        assert layer["margin"]["differing"]["count"] == (a != b).sum()
        assert layer["margin"]["every"]["count"] >= 30 * b[:, 0].size


def test_a_wrong_layer_is_found_where_each_reads_the_engine_s_spikes() -> None:
    beside = compared(moved(1.3, channel=True), engine("unrolled"))
    rates = [beside.neuron(k)["local_mismatch_rate"] for k in range(3)]
    assert rates[1] > 100e-6
    assert rates[0] == rates[2] == 0
    assert beside.neuron(2)["spike_mismatch_rate"] > 100e-6  # it follows
    assert beside.neuron(2)["margin"]["local"] == {"count": 0, "median": None, "max": None}
    assert beside.sums.local.num_images == 40
    assert 0 < beside.row(T)["local_mismatch_rate"] < beside.row(T)["spike_mismatch_rate"]


def test_a_single_spike_that_differs_is_found_there_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = engine("unrolled")
    beside, run = SideBySide(convsnn(), model, T), model.run_with

    def flipped(*args: Any) -> Any:
        result, outputs = run(*args)
        spikes = outputs[f"spikes.{beside.names[-1]}"]
        spikes[-1, 0].flat[0] = 1 - spikes[-1, 0].flat[0]
        return result, outputs

    monkeypatch.setattr(model, "run_with", flipped)
    beside.add(digits().x[:1], digits().labels[:1])
    assert beside.sums.whole.differing.sum() == beside.sums.local.differing.sum() == 1


def test_a_wrong_readout_is_found_where_no_spike_differs() -> None:
    wrong, model, x = copy.deepcopy(convsnn()), engine("unrolled"), digits().x[:20]
    with torch.no_grad():
        wrong.network.get_parameter("readout.2.weight").mul_(1.5)
    beside = compared(wrong, model, count=20)
    logits, got = run_torch(wrong, x, T)[0], model.run(x, T).per_step
    error = max(np.abs(got - logits)[part].max() / np.abs(logits[part]).max() for part in (slice(15), slice(15, 20)))
    assert beside.to_dict()["local_logit_error"] == pytest.approx(error, rel=1e-4)
    assert beside.row(T)["spike_mismatch_rate"] == 0
    assert beside.sums.local.num_images == 20


def test_rounding_flips_only_membranes_at_the_threshold_and_what_follows_lies_anywhere() -> None:
    beside = compared(moved(1 + 1e-4), engine("unrolled"), count=200)
    margin = beside.to_dict()["margin"]
    assert margin["local"]["count"] > 5
    assert margin["local"]["max"] < 5e-3
    assert margin["differing"]["max"] > 10 * margin["local"]["max"]
    assert margin["every"]["median"] > 0.1
    assert sum(margin["differing"]["octaves"]) == margin["differing"]["count"]
    assert beside.to_dict()["num_images"] == 200


def test_the_export_itself_agrees() -> None:
    beside = compared(copy.deepcopy(convsnn()).train(), engine("unrolled"))  # it goes to inference
    assert beside.row(T)["spike_mismatch_rate"] < 100e-6
    assert beside.row(T)["top1_agreement"] == 1.0
    assert beside.to_dict()["local_logit_error"] < 1e-4  # 0 on some machines


def test_fewer_steps_are_a_prefix_of_more() -> None:
    classifier, model = moved(1.3, channel=True), engine("dynamic")
    long, short = compared(classifier, model, steps=5), compared(classifier, model, steps=2)
    keys = ("top1_agreement", "spike_mismatch_rate", "local_mismatch_rate", "torch_accuracy")
    assert [long.row(2)[key] for key in keys] == [short.row(2)[key] for key in keys]


def test_frames() -> None:
    model = engine("unrolled", encoding="frames")
    beside = SideBySide(convsnn(), model, T)
    x = frames(20, 9)
    result, counts = beside.add(x, np.zeros(20, np.int64))
    assert np.array_equal(result.per_step, model.run(x, T).per_step)
    assert not any(name.startswith("spikes.") for name in counts)
    assert beside.row(T)["spike_mismatch_rate"] < 100e-6
    assert set(torch_latency(convsnn(), x, (1, 4))) == {1, 4}


@pytest.mark.parametrize(("tau", "v_th"), [(0.5, 1.0), (1.0, 0.7), (0.0, 2.0)])
def test_margins_are_the_distance_of_eq_1_from_the_threshold(tau: float, v_th: float) -> None:
    generator = torch.Generator().manual_seed(0)
    current = torch.randn(5, 3, 7, generator=generator) + 0.5
    spikes, _ = lif(current, tau=tau, v_th=v_th)
    got = margins(current, spikes, tau, v_th).numpy()
    u = np.zeros((3, 7), np.float32)
    for t in range(5):
        h = tau * u + current[t].numpy()
        np.testing.assert_allclose(got[t], np.abs(h - v_th) / v_th, rtol=1e-5, atol=1e-6)
        u = h * (h <= v_th)


def test_the_histogram_s_median_and_maximum() -> None:
    values = [np.exp(np.random.default_rng(k).normal(-3, 4, 999)).astype(np.float32) for k in range(2)]
    found = Margins(3)
    for k, layer in enumerate(values):
        for part in np.array_split(layer, 4):
            found.add(k, torch.from_numpy(part))
        assert found.of(k)["median"] == pytest.approx(np.median(layer), rel=0.03)
        assert found.of(k)["max"] == layer.max()
        assert found.of(k)["count"] == 999
    assert found.of()["max"] == max(layer.max() for layer in values)
    assert found.of()["median"] == pytest.approx(np.median(np.concatenate(values)), rel=0.03)
    assert found.of(2) == {"count": 0, "median": None, "max": None}
    octaves = found.histogram()
    below_one = sum(octaves[:30])
    assert below_one == sum(int((layer < 1).sum()) for layer in values)
    found.add(2, torch.zeros(3))
    assert found.of(2) == {"count": 3, "median": 0.0, "max": 0.0}


def test_the_median_of_one_margin_and_of_most_at_the_threshold() -> None:
    found = Margins(1)
    found.add(0, torch.tensor([0.25]))
    assert found.of(0)["median"] == 0.25  # no more than the largest
    found.add(0, torch.zeros(2))
    found.add(0, torch.zeros(0))
    assert found.of(0) == {"count": 3, "median": 0.0, "max": 0.25}
    found.add(0, torch.tensor([100.0, 200.0, 300.0, 400.0, 500.0, 600.0, 700.0]))  # as of large currents
    assert found.of(0)["median"] == pytest.approx(200, rel=0.03)


def test_a_pass_beside_pytorch_counts_what_a_sweep_does() -> None:
    model, data = engine("unrolled"), digits()
    x, labels = data.x[:70], data.labels[:70]
    beside = SideBySide(moved(1.3, channel=True), model, T)
    run = Pass(model, x, labels, T, batch_size=32, beside=beside, num_beside=45)
    sizes = []
    while run.done < 70:
        sizes.append(run.advance())
    assert sizes == [32, 13, 25]
    assert beside.num_images == 45
    here = summarise(model, run.tally, x, None, (1, T), num_timed=1)
    there = sweep(model, x, labels, (1, T), num_timed=1)
    assert here.details == there.details
    assert [(r.accuracy, r.energy_pj) for r in here.rows] == [(r.accuracy, r.energy_pj) for r in there.rows]


class TestGoingOn:
    def make(self, *, num_beside: int = 40) -> Pass:
        data, model = digits(), engine("unrolled")
        beside = SideBySide(moved(1.3, channel=True), model, T)
        return Pass(model, data.x[:60], data.labels[:60], T, batch_size=8, beside=beside, num_beside=num_beside)

    def test_no_more_images_than_there_are_run_beside(self) -> None:
        assert self.make(num_beside=100).num_beside == 60  # what the bars show, and a later run is compared with

    @pytest.mark.parametrize("at", [8, 24, 48])
    def test_an_interrupted_run_ends_as_one_that_was_not(self, at: int, tmp_path: Path) -> None:
        whole, cut = self.make(), self.make()
        partial = Partial(tmp_path / "p.npz", {"T": T})
        finish(whole, Partial(tmp_path / "whole.npz", {}), lambda done: None)

        def interrupt(done: int) -> None:
            if cut.done > at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            finish(cut, partial, interrupt)
        rest = self.make()
        kept = partial.load()
        assert kept is not None
        rest.restore(kept)
        assert rest.done == at  # the batch that was interrupted is run again
        finish(rest, partial, lambda done: None)
        assert rest.done == 60
        mine, other = rest.arrays(), whole.arrays()
        assert mine.keys() == other.keys()
        for name, value in mine.items():
            np.testing.assert_array_equal(value, other[name], err_msg=name)
        ended = Partial(tmp_path / "whole.npz", {}).load()
        assert ended is not None and ended["done"] == 60  # for whoever interrupts what comes after the images

    def test_nothing_done_leaves_no_file(self, tmp_path: Path) -> None:
        def interrupt(done: int) -> None:
            raise KeyboardInterrupt

        partial = Partial(tmp_path / "p.npz", {})
        with pytest.raises(KeyboardInterrupt):
            finish(self.make(), partial, interrupt)
        assert partial.load() is None

    def test_it_is_written_down_on_the_way(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tetdeploy.resumable._SAVE_EVERY", 0.0)
        partial = Partial(tmp_path / "p.npz", {"T": T})
        finish(self.make(num_beside=8), partial, lambda done: None)
        kept = partial.load()
        assert kept is not None
        assert kept["done"] == 60

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04 nothing"])
    def test_a_damaged_file(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "p.npz"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="pass --restart to begin anew"):
            Partial(path, {}).load()
        np.savez(path, done=np.array(3))
        with pytest.raises(ValueError, match="pass --restart to begin anew"):
            Partial(path, {}).load()

    @pytest.mark.parametrize("lost", ["done", "tally/seen", "beside/correct"])
    def test_a_file_that_lacks_sums(self, lost: str) -> None:
        arrays = self.make(num_beside=8).arrays()
        del arrays[lost]
        with pytest.raises(ValueError, match=r"the unfinished run lacks .*; pass --restart to begin anew"):
            self.make(num_beside=8).restore(arrays)


def test_a_batch_is_as_large_as_its_spikes_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    model = engine("unrolled")
    size = sum(int(np.prod(n["shape"])) for n in model.metadata["neurons"])
    monkeypatch.setattr("tetdeploy.batches._SPIKE_BYTES", 5.5 * 4 * T * size)
    assert SideBySide(convsnn(), model, T).batch_size == 5
    monkeypatch.setattr("tetdeploy.batches._SPIKE_BYTES", 1)
    assert SideBySide(convsnn(), Engine(exported("unrolled")), T).batch_size == 1
