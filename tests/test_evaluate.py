"""`tetdeploy evaluate`: accuracy at every T from one pass, of networks with and without an export."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from command_helpers import invoke, printed, refused
from export_helpers import convsnn, digits, engine
from report_helpers import epoch, reached, run_folder
from torch import Tensor, nn

import tetdeploy
from tetdeploy.checkpoint import read_checkpoint, save_checkpoint
from tetdeploy.cli.beginnings import note_trained_on
from tetdeploy.cli.inputs import load_part
from tetdeploy.cli.terminal import command_line
from tetdeploy.data import FrameSet, load_data, save_npz, split_validation
from tetdeploy.data.fingerprint import images_sha256
from tetdeploy.export.trained import Trained
from tetdeploy.networks import Classifier, ConvSNN, NetworkConfig, build_network, run_network
from tetdeploy.storage.arrays import read_npz
from tetdeploy.storage.files import sha256_of
from tetdeploy.train import evaluate
from tetdeploy.train.validation import classes_by_step, count_correct

TRAINING = {"T": 4, "val_fraction": 0.1, "seed": 3}


def ann(seed: int = 0, **options: Any) -> Classifier:
    torch.manual_seed(seed)
    data = digits()
    config = NetworkConfig("convsnn", 10, 1, (8, 8), width=0.125, **options)
    names = data.class_names
    return Classifier(
        build_network(config), config=config, mean=data.mean, std=data.std, class_names=names, data="digits"
    )


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """runs/snn, runs/ann and runs/smooth, in the working folder."""
    monkeypatch.chdir(tmp_path)
    snn = convsnn()
    config = NetworkConfig("convsnn", 10, 1, (8, 8), width=0.25)
    snn = Classifier(snn.network, config=config, mean=snn.mean.flatten().tolist(), std=snn.std.flatten().tolist(),
                     class_names=snn.class_names, data="digits")  # fmt: skip
    made = {"snn": (snn, TRAINING), "ann": (ann(ann=True), {"T": 1}), "smooth": (ann(smooth_spike=10.0), {"T": 2})}
    for name, (classifier, training) in made.items():
        save_checkpoint(Path("runs") / name / "checkpoint.safetensors", classifier, training=training, provenance={})
    return tmp_path / "runs"


run = partial(printed, "evaluate")


def test_every_T_is_a_run_of_that_T() -> None:
    x, y = torch.tensor(digits().images[:90]), torch.tensor(digits().labels[:90])
    classifier = convsnn()
    classifier.train()
    found = (classes_by_step(classifier, x.split(40), T=5) == y).double().mean(1).tolist()
    assert classifier.training
    classifier.eval()
    assert found == pytest.approx([evaluate(classifier, x, y, T=T)[1] for T in range(1, 6)], abs=1e-7)
    assert len(set(found)) > 1


class Close(nn.Module):
    """Logits [2, 1, 2] in bfloat16, whose mean in bfloat16 is a tie."""

    mean = torch.zeros(1)

    def forward(self, x: Tensor, T: int) -> Tensor:
        return torch.tensor([[[1, 1]], [[1, 1.0078125]]], dtype=torch.bfloat16)


def test_logits_in_half_precision_are_averaged_in_float32() -> None:
    x, y = torch.zeros(1, 1, 2, 2), torch.tensor([1])
    assert count_correct(Close()(x, 2), y) == 1
    assert classes_by_step(Close(), [x], T=2).tolist() == [[0], [1]]  # type: ignore[arg-type]


def test_no_other_number_of_frames_is_taken_for_T() -> None:
    x, y = torch.tensor(digits().images[:2, None]).expand(-1, 3, -1, -1, -1), torch.tensor(digits().labels[:2])
    wanted = {4: "T=4 steps need as many frames, from 1 to the 3", 0: "T must be at least 1, got 0"}
    for T, message in wanted.items():
        with pytest.raises(ValueError, match=message):
            evaluate(convsnn(), x, y, T=T)
        with pytest.raises(ValueError, match=message):
            classes_by_step(convsnn(), [x], T=T)
    with pytest.raises(ValueError, match="T=-1 steps need as many frames, from 1 to the 3"):
        run_network(convsnn(), x, -1)


def test_a_run_and_what_has_no_export(runs: Path) -> None:
    output = run("runs/snn", "runs/ann", "runs/smooth", "--json", "e.json", "--T", "1:3,6")
    assert "359 images of digits, test   fp32 on cpu" in output
    content = json.loads(Path("e.json").read_text())
    snn, twin, smooth = content["runs"]
    assert (snn["trained_T"], snn["num_images"], snn["ann"], twin["ann"]) == (4, 359, False, True)
    assert snn["checkpoint_sha256"] == sha256_of(runs / "snn" / "checkpoint.safetensors")
    assert {row["images_sha256"] for row in content["runs"]} == {images_sha256(digits().images, digits().labels)}
    assert (snn["seed"], twin["seed"]) == (3, None)
    exported = engine("dynamic").run(digits().images, 6).per_step
    wanted = [float((exported[:, :T].mean(1).argmax(-1) == digits().labels).mean()) for T in (1, 2, 3, 6)]
    assert [entry["accuracy"] for entry in snn["accuracy"]] == pytest.approx(wanted, abs=1.5 / 359)
    assert [entry["T"] for entry in snn["accuracy"]] == [1, 2, 3, 6]
    assert [entry["T"] for entry in twin["accuracy"]] == [1]
    network, x = tetdeploy.load("runs/ann"), torch.tensor(digits().images)
    with torch.no_grad():
        right = (network(x, 1).mean(0).argmax(-1).numpy() == digits().labels).mean()
    assert twin["accuracy"][0]["accuracy"] == pytest.approx(right)
    assert len(smooth["accuracy"]) == 4
    assert "runs/ann (ANN)" in output and "an ANN has no time" in output
    assert content["versions"]["torch"] == torch.__version__
    assert output.endswith("next: tetdeploy export runs/snn\n")
    assert "next" not in run("runs/ann", "runs/smooth", "--T", "1", "--limit", "9")


def test_of_a_network_fine_tuned_in_8_bits_it_is_said_that_others_are_measured(runs: Path) -> None:
    assert "not int8" not in run("runs/snn", "--T", "1", "--limit", "9", "--json", "e.json")
    assert json.loads(Path("e.json").read_text())["runs"][0]["qat"] is False
    save_checkpoint(runs / "tuned" / "checkpoint.safetensors", ann(), training=TRAINING | {"qat": True}, provenance={})
    output = run("runs/tuned", "runs/snn", "--T", "1", "--limit", "9", "--precision", "bf16", "--json", "e.json")
    shown = output.splitlines()
    first, second, *_ = (line.split()[:-1] for line in shown if "runs/" in line)
    assert (first, second) == (["runs/tuned", "(not", "int8)"], ["runs/snn"])
    said = " ".join(output.split())
    assert "not int8: fine-tuned in 8 bits (--qat), but measured in bf16; tetdeploy export --precision int8 and" in said
    assert "then tetdeploy sweep measure it in 8 bits" in said
    assert [row["qat"] for row in json.loads(Path("e.json").read_text())["runs"]] == [True, False]

    seed = run_folder(runs / "seeds" / "seed-0")
    save_checkpoint(seed / "checkpoint.safetensors", ann(), training=TRAINING | {"qat": True}, provenance={})
    said = " ".join(run("runs/seeds", "--T", "1", "--limit", "9", "--json", "e.json").split())
    assert "mean (n=1) (not int8)" in said
    assert json.loads(Path("e.json").read_text())["seeds"][0]["qat"] is True
    assert shown[-1] == "next: tetdeploy export runs/tuned --precision int8"


def test_the_class_of_each_image_is_kept(runs: Path) -> None:
    output = run("runs/snn", "runs/ann", "--T", "2,4", "--limit", "50", "--json", "e.json", "--predictions", "p.npz")
    assert "e.json   p.npz\n" in output
    kept, rows = read_npz("p.npz"), json.loads(Path("e.json").read_text())["runs"]
    assert kept["runs"].tolist() == ["runs/snn", "runs/ann"] and kept["T"].tolist() == [1, 2, 4]
    np.testing.assert_array_equal(kept["labels"], digits().labels[:50])
    assert kept["images_sha256"].tolist() == [row["images_sha256"] for row in rows]
    for row, predicted in zip(rows, kept["predicted"], strict=True):
        measured = {entry["T"]: entry["accuracy"] for entry in row["accuracy"]}
        for T, classes in zip(kept["T"], predicted, strict=True):
            assert (classes == kept["labels"]).mean() == measured[T] if T in measured else (classes == -1).all()
    same = digits()
    others = {
        "turned": same.select(slice(None, None, -1)),
        "darker": replace(same, images=same.images // 2),
        "same": same,
    }
    for name, images in others.items():
        save_npz(images, f"{name}.npz")
        classifier = ann()
        classifier.data = f"{name}.npz"
        save_checkpoint(runs / name / "checkpoint.safetensors", classifier, training=TRAINING, provenance={})
    for name in ("turned", "darker"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys.modules["tetdeploy.cli.evaluate"], "_measure", None)  # it is refused before
            asked = ("evaluate", "runs/snn", f"runs/{name}", "--T", "1", "--limit", "9", "--predictions", "q.npz")
            said = refused(*asked)
        assert f"Error: --predictions: runs/{name} is measured on other images than runs/snn; choose --data" in said
        assert not Path("q.npz").exists()
    run("runs/snn", "runs/same", "--T", "1", "--limit", "9", "--predictions", "q.npz")
    run("runs/snn", "runs/turned", "--T", "1", "--limit", "9")
    run("runs/turned", "--T", "1", "--limit", "9", "--predictions", "p.npz")  # in their place


@pytest.mark.parametrize("folder", ["r/[tet]", "r/[/tet]", "r/:bug:"])
def test_the_name_of_a_folder_is_text(runs: Path, folder: str) -> None:
    shutil.copytree(runs / "snn", folder)
    output = run(folder, "--T", "1", "--limit", "9")
    *_, row, _, following = (line.rstrip() for line in output.splitlines() if line.strip())
    assert row.split()[0] == folder and following == f"next: {command_line('export', Path(folder))}"


def test_a_network_of_a_fixed_T_says_at_which_T_it_fails(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = ConvSNN.forward

    def attended(self: ConvSNN, x: Tensor, T: int) -> Tensor:
        weights = nn.Linear(4, 1)(torch.ones(T))
        return forward(self, x, T) * weights

    monkeypatch.setattr(ConvSNN, "forward", attended)
    beyond = "Error: the network of runs/snn fails at T=8, beyond the T=4 of its training"
    output = refused("evaluate", "runs/snn", "--limit", "9")
    assert beyond in output and output.endswith("; choose --T 1:4\n")
    run("runs/snn", "--limit", "9", "--T", "1:4")
    monkeypatch.setattr(ConvSNN, "forward", Mock(side_effect=RuntimeError("at any T")))
    for steps in ("1:4", "1:8"):
        assert str(invoke("evaluate", "runs/snn", "--limit", "9", "--T", steps).exception) == "at any T"

    def indexed(self: ConvSNN, x: Tensor, T: int) -> Tensor:
        return forward(self, x, [None, 1, 2, 3, 4][T])

    monkeypatch.setattr(ConvSNN, "forward", indexed)
    assert f"{beyond} (list index" in refused("evaluate", "runs/snn", "--limit", "9")
    monkeypatch.setattr(ConvSNN, "forward", Mock(side_effect=RuntimeError("CUDA out of memory")))
    assert "choose --T" not in refused("evaluate", "runs/snn", "--limit", "9")


def test_recordings_are_measured_at_each_T_of_the_training(runs: Path) -> None:
    frames, labels = np.zeros((20, 3, 1, 8, 8), np.uint8), np.arange(20) % 10
    save_npz(FrameSet("own.npz", "train", frames, labels, digits().class_names, (0.0,), (1.0,)), "own.npz")
    classifier = ann()
    classifier.data, classifier.encoding = "own.npz", "frames"
    save_checkpoint(runs / "own" / "checkpoint.safetensors", classifier, training=TRAINING | {"T": 3}, provenance={})
    run("runs/own", "--json", "e.json")
    (only,) = json.loads(Path("e.json").read_text())["runs"]
    assert [entry["T"] for entry in only["accuracy"]] == [1, 2, 3]


def test_the_batches_and_the_precision_are_those_asked_for(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[Any]()

    def measured(classifier: Classifier, batches: Any, **options: Any) -> Tensor:
        seen.append(([len(x) for x in batches], options))
        return torch.zeros(1, 9, dtype=torch.int64)

    monkeypatch.setattr("tetdeploy.train.validation.classes_by_step", measured)
    asked = ("--T", "1", "--limit", "9", "--batch-size", "7", "--precision", "bf16")
    run("runs/snn", *asked)
    assert seen == [([7, 2], {"T": 1, "precision": "bf16"})]


def test_mean_and_deviation_over_seeds(runs: Path) -> None:
    for name, count in (("tet", 3), ("twins", 1)):
        for seed in range(count):
            run_of = run_folder(runs / name / f"seed-{seed}", seed=seed, metrics=[epoch(1), epoch(2)][: 3 - seed])
            classifier = ann(seed, ann=name == "twins")
            save_checkpoint(run_of / "checkpoint.safetensors", classifier, training=TRAINING, provenance={})
    told = [{"seed": seed, "interrupted": seed == 1} for seed in (0, 1)]  # 1 was resumed by itself, 2 was killed
    (runs / "tet" / "summary.json").write_text(json.dumps({"runs": told}))
    with pytest.MonkeyPatch.context() as patch:
        load = Mock(side_effect=load_part)
        patch.setattr(sys.modules["tetdeploy.cli.evaluate"], "load_part", load)
        output = run("runs/tet", "runs/snn", "runs/twins", "--T", "1,2", "--json", "e.json")
    load.assert_called_once()  # all were trained on the same data
    content = json.loads(Path("e.json").read_text())
    names = ["tet/seed-0", "tet/seed-1", "tet/seed-2", "snn", "twins/seed-0"]
    assert [row["run"] for row in content["runs"]] == [f"runs/{name}" for name in names]
    tet, twins = content["seeds"]
    assert (tet["run"], tet["num_finished"], twins["num_finished"]) == ("runs/tet", 2, 1)
    assert (tet["ann"], twins["ann"], tet["qat"]) == (False, True, False)
    first, second = ([entry["accuracy"] for entry in row["accuracy"]] for row in content["runs"][:2])
    assert first != second
    for entry, a, b in zip(tet["accuracy"], first, second, strict=True):
        assert (entry["mean"], entry["std"]) == pytest.approx(((a + b) / 2, abs(a - b) / 2**0.5))
    assert [(entry["T"], entry["std"]) for entry in twins["accuracy"]] == [(1, None)]
    shown = [line.split() for line in output.splitlines()]
    for key, label in (("mean", "mean (n=2)"), ("std", "± standard deviation")):
        assert ["runs/tet", *label.split(), *(f"{entry[key]:.2%}" for entry in tet["accuracy"])] in shown
    assert output.endswith("next: tetdeploy export runs/tet/seed-0\n")


def test_of_several_seeds_the_best_goes_on(runs: Path) -> None:
    """By the accuracy on images held out, as `train` says; a checkpoint is to be had of it."""
    for seed, accuracy in enumerate((0.4, 0.6, 0.5, 0.9)):
        run_of = run_folder(runs / "tet" / f"seed-{seed}", seed=seed, metrics=reached(accuracy))
        if seed < 3:
            save_checkpoint(run_of / "checkpoint.safetensors", ann(seed), training=TRAINING, provenance={"epoch": 2})
    output = run("runs/ann", "runs/tet", "--T", "1", "--limit", "9")
    assert output.endswith("next: tetdeploy export runs/tet/seed-1\n")


def begun_seeds(folder: Path, num_finished: int) -> None:
    """A folder of three seeds, whose training was cut in the first epoch of the one behind those that are finished."""
    for seed in range(num_finished + 1):
        run_of = run_folder(folder / f"seed-{seed}", seed=seed, metrics=None if seed < num_finished else [])
        if seed < num_finished:
            save_checkpoint(run_of / "checkpoint.safetensors", ann(seed), training=TRAINING, provenance={})


def test_a_seed_without_an_epoch_is_left_out(runs: Path) -> None:
    begun_seeds(runs / "cut", 2)
    run("runs/cut", "--T", "1", "--limit", "9", "--json", "e.json")
    content = json.loads(Path("e.json").read_text())
    assert [row["run"] for row in content["runs"]] == ["runs/cut/seed-0", "runs/cut/seed-1"]
    assert content["seeds"][0]["num_finished"] == 2


def test_seeds_of_which_none_is_known_to_be_finished_have_no_mean(runs: Path) -> None:
    begun_seeds(runs / "first", 1)
    (runs / "first" / "seed-0" / "metrics.jsonl").unlink()
    output = run("runs/first", "--T", "1", "--limit", "9")
    assert "seed-0" in output
    said = " ".join(output.split())
    assert (
        "mean (n" not in said
        and "runs/first has no mean: none of its seeds is finished, as far as their files say" in said
    )


def test_a_folder_of_seeds_that_has_nothing_to_measure_is_refused_at_once(runs: Path) -> None:
    begun_seeds(runs / "none", 0)
    output = refused("evaluate", "runs/snn", "runs/none", "--T", "1", "--limit", "9")
    assert "Error: runs/none holds no checkpoint.safetensors" in output
    begun_seeds(runs / "damaged", 1)
    for text in ("[", "[1]"):
        (runs / "damaged" / "summary.json").write_text(text)
        output = refused("evaluate", "runs/damaged", "--T", "1", "--limit", "9")
        assert "Error: runs/damaged/summary.json" in output and "give JSON of" not in output


def test_parts_limits_and_the_default(runs: Path) -> None:
    (runs / "latest").symlink_to("snn")
    output = run("--split", "validation", "--limit", "20", "--json", "e.json")
    assert "20 images of digits, validation" in output and "an ANN" not in output
    (only,) = json.loads(Path("e.json").read_text())["runs"]
    assert [entry["T"] for entry in only["accuracy"]] == list(range(1, 9))


def test_the_file_that_was_trained_on_is_named(runs: Path) -> None:
    save_npz(digits(), "own.npz")
    output = run("runs/snn", "--data", "own.npz", "--T", "1", "--json", "e.json")
    assert "own.npz is one set with no test part" not in output
    assert "trained_on" not in json.loads(Path("e.json").read_text())["runs"][0]
    classifier = ann()
    classifier.data = "own.npz"
    save_checkpoint(runs / "own" / "checkpoint.safetensors", classifier, training=TRAINING, provenance={})
    output = run("runs/own", "runs/own/checkpoint.safetensors", "--T", "1", "--json", "e.json")
    assert output.count("own.npz is one set with no test part") == 1
    assert [row["trained_on"] for row in json.loads(Path("e.json").read_text())["runs"]] == [True, True]
    assert "with no test part" not in run("runs/own", "--T", "1", "--split", "validation", "--json", "e.json")
    assert "trained_on" not in json.loads(Path("e.json").read_text())["runs"][0]


@pytest.mark.parametrize("command", ["evaluate", "landscape", "export", "train --init", "train --resume"])
def test_where_data_should_be_that_are_not_there_is_said(command: str, runs: Path) -> None:
    folder, classifier = runs / "gone", ann()
    classifier.data = "folder:gone"
    save_checkpoint(folder / "checkpoint.safetensors", classifier, training=TRAINING, provenance={})
    (folder / "config.json").write_text(json.dumps({"network": {}, "data": {"name": "folder:gone"}, "training": {}}))
    output = refused(*command.split(), "runs/gone")
    assert "Error: runs/gone" in output
    said = "was trained on folder:gone, a path relative to where the training was started, and it is not here; run this"
    assert f"{said} there" in output and ("other data with --data" in output) == ("resume" not in command)


@pytest.fixture
def reordered(runs: Path) -> Path:
    """A run on own.npz, whose images are in another order now."""
    data, classifier = digits(), ann()
    classifier.data = "own.npz"
    print_of = split_validation(data, fraction=0.1)[1].fingerprint
    folder = runs / "own"
    save_checkpoint(
        folder / "checkpoint.safetensors", classifier, training=TRAINING, provenance={}, fingerprint=print_of
    )
    save_npz(data, "own.npz")
    run("runs/own", "--T", "1", "--split", "validation")
    save_npz(data.select(slice(None, None, -1)), "own.npz")
    return folder


def test_images_that_were_trained_on_are_not_taken_for_those_held_out(reordered: Path) -> None:
    for command in ("evaluate", "landscape"):
        output = refused(command, "runs/own", "--T", "1", "--split", "validation")
        assert "Error: own.npz: the training held out other images, and was trained on some of these" in output
    run("runs/own", "--T", "1", "--split", "train")


def test_an_export_and_a_new_run_say_that_they_check_on_what_was_trained_on(
    reordered: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = Trained.of(read_checkpoint(reordered))
    with pytest.warns(RuntimeWarning, match="own.npz: the training held out other images than are found here"):
        (x, _), _ = trained.images(None, Path("nowhere"), "direct", num_check=9, num_calibration=0)
    assert len(x) == 9
    val_set = split_validation(load_data("own.npz", "train", data_dir=Path("nowhere")), fraction=0.1)[1]
    note_trained_on(reordered, trained.metadata, val_set, 0.1)
    assert "own held out other images and was trained on some of these" in capsys.readouterr().out
    note_trained_on(reordered, trained.metadata, val_set, 0.05)
    assert capsys.readouterr().out == ""
    note_trained_on(reordered, trained.metadata, val_set, 0.2)
    said = " ".join(capsys.readouterr().out.split())
    assert "own held out only 0.1 of its images and was trained on some of these" in said and "fraction 0.1" in said
    all_of_it = {**trained.metadata, "training": {"T": 4, "val_fraction": 0.0}}
    note_trained_on(reordered, all_of_it, val_set, 0.1)
    assert "own held out none of its images and was trained on some of these" in capsys.readouterr().out
    note_trained_on(reordered, {**trained.metadata, "training": {"T": 4}}, val_set, 0.1)  # as own loops write
    assert "own does not say what it held out, and may have been" in " ".join(capsys.readouterr().out.split())
    note_trained_on(reordered, all_of_it, replace(val_set, name="other.npz"), 0.1)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["runs/none"], 1, "Error: runs/none does not exist"),
        (["runs/snn", "--data", "fashion-mnist", "--data-dir", "nowhere"], 1, "Error: "),
        (["runs/snn", "--device", "tpu"], 1, "Error: unknown device 'tpu'; choose auto, cpu, cuda"),
        (["runs/snn", "--device", "cuda:x"], 1, "Error: unknown device 'cuda:x'; choose auto"),
        (["runs/snn", "--precision", "int8"], 2, "Invalid value for '--precision'"),
        (["runs/snn", "--T", "0"], 2, "T must lie in 1..1024"),
        (["runs/ann", "--split", "val"], 1, "Error: --split validation: a run held out no images"),
        (["runs/snn", "--data", ""], 1, "Error: unknown data set ''; choose"),
        (["runs/snn", "--data", "other.npz"], 1, "Error: other.npz has images of shape (1, 6, 6); the network wants"),
    ],
)
def test_refusals(runs: Path, arguments: list[str], code: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez("other.npz", images=np.zeros((3, 6, 6), np.uint8), labels=np.array([0, 1, 2]))
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    assert message in refused("evaluate", *arguments, "--json", "e.json", code=code)
    assert not Path("e.json").exists()


def test_images_that_vary_far_less_than_those_of_the_training_are_told(runs: Path) -> None:
    data = digits()
    np.savez("raw.npz", images=data.images // 16, labels=data.labels)  # as scikit-learn has them: 0..15
    said = "pixels of raw.npz go up to 15 and vary 17 times less than those of the training"
    assert said in run("runs/snn", "--T", 1, "--data", "raw.npz").replace("\n", " ")
    assert "vary" not in run("runs/snn", "--T", 1, "--limit", 20)
