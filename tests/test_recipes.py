"""Recipes: every file in examples/recipes says something that trains, and what is wrong with one is named."""

from __future__ import annotations

import json
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import click
import command_helpers
import pytest

from tetdeploy.cli.recipe import read_recipe
from tetdeploy.cli.train import default_by_network, train, train_config
from tetdeploy.data import DATA_NAMES
from tetdeploy.export import preflight
from tetdeploy.networks import NETWORKS, NetworkConfig
from tetdeploy.storage.run_folder import latest_run
from tetdeploy.train import TrainConfig

RECIPES = sorted((Path(__file__).parents[1] / "examples" / "recipes").glob("*.toml"))
QUICK = ("--epochs", "2", "--width", "0.25", "--T", "2", "--batch-size", "256")


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


run = partial(command_helpers.printed, "train")
refused = partial(command_helpers.refused, "train")


def configurations(*arguments: str) -> tuple[TrainConfig, dict[str, Any]]:
    """What `tetdeploy train` makes of these arguments, without training."""
    with train.make_context("train", list(arguments)) as ctx:
        names = {field.name for field in fields(TrainConfig)}
        default_by_network(ctx, ctx.params)
        config = train_config(
            ctx, {name: value for name, value in ctx.params.items() if name in names}, v_th=ctx.params["v_th"]
        )
        return config, ctx.params


def settings(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(folder, "config.json").read_text())
    return found


# --- the files of examples/recipes


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid(path: Path) -> None:
    config, params = configurations("--config", str(path))
    assert params["data"] in DATA_NAMES and params["model"] in NETWORKS
    options = {name: params[name] for name in ("width", "tau", "v_th", "gamma", "ann", "smooth_spike")}
    network = NetworkConfig(params["model"], 10, 3, (32, 32), **options)
    assert not network.ann or config.longest_T == 1
    for name, value in read_recipe(path, train).items():  # nothing in the file is lost on the way
        assert params[name] == value
    text = path.read_text(encoding="utf-8")
    assert text.startswith(("# Table", "# Figure", "# Comparison", "# Beside the paper"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_can_be_tried_briefly(path: Path) -> None:
    """As docs/training.md says."""
    given = read_recipe(path, train)
    short = ("--tit", "2:1,4:1") if "tit" in given else ("--epochs", "2")
    switch = ("--switch-to-tet", "1") if "switch_to_tet" in given else ()
    config, _ = configurations("--config", str(path), *short, "--warmup-epochs", "0", *switch)
    assert config.epochs == 2


def test_there_is_a_recipe_for_each_table_and_figure() -> None:
    names = {path.stem for path in RECIPES}
    assert {f"table1-{loss}-T{T}" for loss in ("sdt", "tet") for T in (4, 6)} <= names
    assert {"table2-sdt", "table2-tet", "figure3", "figure4a-T2", "figure4a-T3", "figure4a-T4", "figure4a-tit"} <= names
    assert {f"comparison-cifar{c}-T{T}" for c in (10, 100) for T in (2, 4, 6)} <= names
    assert {"modern-cifar10", "modern-cifar10-teacher", "comparison-dvs-cifar10-tet"} <= names
    assert {"imagenet-spiking-resnet34", "imagenet-sew-resnet34"} <= names
    assert {f"headline-cifar10{what}" for what in ("", "-ann", "-distilled")} <= names
    assert {"headline-cifar100", "headline-cifar100-sdt"} <= names


def test_the_headlines_twins_differ_from_it_in_nothing_else() -> None:
    def recipe(name: str) -> dict[str, Any]:
        return read_recipe(RECIPES[0].with_name(f"headline-{name}.toml"), train)

    def different(one: str, other: str) -> set[str]:
        first, second = recipe(one), recipe(other)
        return {key for key in first | second if first.get(key) != second.get(key)}

    assert different("cifar10", "cifar100") == {"data"}
    assert different("cifar100", "cifar100-sdt") == {"loss", "lam"}  # lam plays no part in SDT
    assert different("cifar10", "cifar10-distilled") == {"distill"}
    assert different("cifar10", "cifar10-ann") == {"ann", "T", "tit", "epochs", "lam"}
    stages = configurations("--config", str(RECIPES[0].with_name("headline-cifar10.toml")))[0].stages
    assert [(stage.T, stage.epochs) for stage in stages] == [(2, 80), (4, 40)]


def test_the_commands_defaults_are_those_of_the_configuration() -> None:
    config, _ = configurations()
    assert config == TrainConfig()


# --- a recipe in use


def test_a_recipe_trains_and_what_is_typed_overrides_it(tmp_path: Path) -> None:
    Path("small.toml").write_text('width = 0.25\nT = 2\nepochs = 9\nlr = 5e-3\nrandom-T = "1:2"\nbatch-size = 256\n')
    run("--config", "small.toml", "--epochs", "2")
    written = settings("runs/small")
    assert written["network"]["width"] == 0.25
    expected = {"T": 2, "epochs": 2, "lr": 5e-3, "random_T": "1:2", "batch_size": 256}
    assert expected.items() <= written["training"].items()


def test_resume_with_another_recipe_shows_the_difference(tmp_path: Path) -> None:
    run(*QUICK, "--out", "r")
    Path("other.toml").write_text("ema = 0.9\n")
    assert "training.ema: 0.0 -> 0.9" in refused("--resume", "r", "--config", "other.toml")
    run("--resume", "r")


def test_tit_from_the_command_line(tmp_path: Path) -> None:
    output = run("--tit", "1:2:0.01,2:2", "--width", "0.25", "--batch-size", "256", "--out", "r")
    assert "\nTET lambda 0.05   TIT 1:2:0.01,2:2   batch size 256   adamw lr 0.01, 0.002\n" in output
    records = [json.loads(line) for line in Path("r/metrics.jsonl").read_text().splitlines()]
    assert [record["T"] for record in records] == [1, 1, 2, 2]
    assert settings("r")["training"]["T"] == 2
    run("--resume", "r")


def test_seeds_from_a_recipe_end_in_a_summary_that_names_it(tmp_path: Path) -> None:
    Path("three.toml").write_text('seeds = "0,1,2"\nT = 1\n')
    output = run("--config", "three.toml", *QUICK[:4], *QUICK[6:], "--json", "out.json")
    summary = json.loads(Path("runs/three/summary.json").read_text())
    assert summary == json.loads(Path("out.json").read_text())
    assert summary["recipe"] == "three.toml" and summary["num_finished"] == 3
    spread = f"{summary['mean_val_accuracy']:.2%} +- {summary['std_val_accuracy']:.2%}"
    assert f"best val {spread} over 3 seeds" in output and " %" not in output
    before = Path("runs/three/summary.json").read_text()
    run("--resume", "runs/three")
    assert Path("runs/three/summary.json").read_text() == before
    assert "training.lr: 0.002 -> 0.1" in refused("--resume", "runs/three", "--lr", "0.1")
    alone = refused("--resume", "runs/three/seed-1", "--seeds", "0,1,2,3")
    assert "seeds: (none) -> [0, 1, 2, 3]" in alone and "--init" not in alone
    both = refused("--resume", "runs/three", "--seed", "1", code=2)
    assert "choose one of them (runs/three has the seeds 0, 1, 2)" in both
    both = refused("--resume", "runs/three", "--seed", "1", "--seeds", "0,1,2,3", code=2)
    assert "random numbers: choose one of them\n" in both


def test_seeds_are_added_to_those_of_which_latest_is_the_best(tmp_path: Path) -> None:
    run(*QUICK, "--seeds", "0", "--out", "runs/s")
    assert latest_run(Path("runs")) == Path("runs/s/seed-0")
    said = refused("--resume", "--out", "runs/s/seed-0", "--seeds", "0,1")
    assert "runs/s/seed-0 was started with other settings: seeds: (none) -> [0, 1]" in said
    run("--resume", "--seeds", "0,1")
    assert [one["seed"] for one in json.loads(Path("runs/s/summary.json").read_text())["runs"]] == [0, 1]


def test_a_run_that_is_called_like_one_of_several_seeds_is_one_by_itself(tmp_path: Path) -> None:
    run(*QUICK, "--out", "runs/seed-0")
    said = refused("--resume", "--seeds", "0,1")
    assert "runs/seed-0 was started with other settings: seeds: (none) -> [0, 1]" in said


def test_seeds_without_validation_say_where_their_summary_is() -> None:
    output = run(*QUICK, "--seeds", "0,1", "--val-fraction", "0", "--out", "r")
    assert "\n2 seeds  ->  r/summary.json\n" in output


def test_what_is_trained_is_said_before_and_after_it() -> None:
    output = run("--smooth-spike", "10", "--loss", "sdt", "--switch-to-tet", "1", "--seeds", "0", *QUICK)
    assert "M parameters, smooth spikes k=10   fp32" in output
    assert "\nSDT, after 1 epoch TET lambda 0.05   T=2   2 epochs   batch size 256   adamw lr 0.002\n" in output
    assert "% over 1 seed  ->" in output


def test_the_network_decides_the_defaults_of_its_loss() -> None:
    """phi is v_th (Eq. 12), and an ANN has no membranes to hold at it."""
    assert configurations("--v-th", "0.5")[0].phi == 0.5
    assert configurations("--v-th", "0.5", "--phi", "2")[0].phi == 2.0
    assert configurations("--ann")[0].lam == 0.0
    assert configurations("--ann", "--lam", "0.1")[0].lam == 0.1


def test_ann_then_distillation(tmp_path: Path) -> None:
    small = ("--width", "0.25", "--epochs", "2", "--batch-size", "256")
    output = run("--ann", *small, "--out", "ann")
    assert settings("ann")["training"]["T"] == 1 and settings("ann")["training"]["lam"] == 0
    assert "next: tetdeploy train --distill ann" in output
    assert "ANN twin of convsnn" in output and "\ncross-entropy   T=1   2 epochs   batch size 256 " in output
    output = run("--distill", "runs/latest", "--T", "2", *small, "--out", "taught")
    assert "distilled from runs/latest" in output
    run("--resume", "taught")  # which is the latest now
    assert "an ANN has no time" in refused("--ann", "--T", "2")


OWN = """
from torch import nn
from tetdeploy.layers import DirectEncoding, OverTime
from tetdeploy.neurons import LIF

class Net(nn.Module):
    def __init__(self, inputs, classes):
        super().__init__()
        self.encode, self.lif = DirectEncoding(nn.Flatten(), nn.Linear(inputs, 32)), LIF(tau=0.25)
        self.readout = OverTime(nn.Linear(32, classes))

    def forward(self, x, T=None):
        current = (1 - self.lif.tau) * self.encode(x, T)
        return self.readout(self.lif.with_state(current)[0])

def net(num_classes, in_channels, image_size):
    return Net(in_channels * image_size[0] * image_size[1], num_classes)

other = net
"""


def test_a_network_of_ones_own_learns_from_its_twin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose code may ask its neurons for their settings and their membranes."""
    monkeypatch.setattr(preflight, "why_not", preflight._answer)  # in this process
    Path("taught_net.py").write_text(OWN)
    small = ("--epochs", "1", "--batch-size", "256")
    output = run("--ann", *small, "--model", "taught_net:net", "--out", "ann")
    assert output.endswith("next: tetdeploy train --distill ann --model taught_net:net\n")
    distilled = run("--distill", "ann", "--model", "taught_net:net", "--T", "2", *small, "--out", "taught")
    assert "distilled from ann" in distilled
    inspected = command_helpers.printed("inspect", "taught")
    assert "taught_net:net" in inspected and "tau 0.5" not in inspected
    said = refused("--distill", "ann", "--model", "taught_net:other", *small)
    assert "the teacher ann is a network of your own, taught_net:net, and the student is taught_net:other" in said


def test_recompute_trains_the_same_and_is_no_setting_of_the_run(tmp_path: Path) -> None:
    run(*QUICK, "--out", "plain")
    run(*QUICK, "--out", "again", "--recompute")
    lines = [Path(folder, "metrics.jsonl").read_text().splitlines() for folder in ("plain", "again")]
    losses = [[json.loads(line)["train_loss"] for line in part] for part in lines]
    assert losses[0] == losses[1]
    plain, again = settings("plain"), settings("again")
    assert (plain.pop("how")["recompute"], again.pop("how")["recompute"]) == (False, True)
    assert plain == again


def test_a_smooth_network_trains_and_does_not_export(tmp_path: Path) -> None:
    assert "next: tetdeploy export" not in run("--smooth-spike", "10", *QUICK, "--out", "smooth")
    assert "Error: the network was trained with smooth spikes" in command_helpers.refused("export", "smooth")


# --- what can be wrong with one


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3", "r.toml: unknown key 'epoch' (did you mean epochs?); allowed are data, model, width, tau"),
        ('out = "x"', "r.toml: out belongs to one machine or one call, not to a recipe: type it as an option"),
        ('data-dir = "x"', "r.toml: data-dir belongs to one machine or one call"),
        ('json = "x"', "r.toml: json belongs to one machine or one call"),
        ("[train]\nT = 3", "r.toml: unknown key 'train'"),
        ('T = "4"', "r.toml: T is '4'; it must be a whole number (Time steps"),
        (f'T = "{"4" * 5000}"', f"r.toml: T is '{'4' * 12}...{'4' * 13}'; it must be a whole number"),
        ("T = 4.0", "r.toml: T is 4.0; it must be a whole number"),
        ("T = true", "r.toml: T is True; it must be a whole number"),
        ('lr = "fast"', "r.toml: lr is 'fast'; it must be a number"),
        ("ann = 1", "r.toml: ann is 1; it must be true or false"),
        ("tit = 3", "r.toml: tit is 3; it must be a text in quotes"),
        ('seeds = [0, "a"]', "r.toml: seeds is [0, 'a']; it must be a text in quotes ("),
        ("seeds = [0, 1]", 'r.toml: seeds is [0, 1]; it must be a text in quotes, such as "0,1"'),
        ('random-T = "1:2"\nrandom_T = "1:3"', "r.toml: random_T is there twice"),
        ("T = ", "r.toml is not TOML: "),
        (f"T = {'[' * 5000}", "r.toml is not TOML: "),
        ('loss = "ce"', "r.toml, with what was typed: unknown loss 'ce'; choose one of tet, sdt"),
        ('tit = "2:3,x"', "r.toml, with what was typed: tit is '2:3,x' ('x' in it does not parse)"),
        ('data = "mnist"', "r.toml, with what was typed: unknown data set 'mnist'"),
        ('T = 3\ntit = "1:2,2:2"', "tit '1:2,2:2' ends at T=2, but T is 3; leave out one of the two"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    Path("r.toml").write_text(text)
    assert message in refused("--config", "r.toml")
    assert not Path("runs").exists()


def test_missing_files_and_options_that_exclude_each_other() -> None:
    assert "nothing.toml" in refused("--config", "nothing.toml")
    Path("binary.toml").write_bytes(b"\xff\xfe")
    assert "binary.toml is not TOML: not text in UTF-8" in refused("--config", "binary.toml")
    assert ".: Is a directory; name a file" in refused("--config", ".")
    assert "seeds is '0,x'; it must be whole numbers from 0" in refused("--seeds", "0,x")
    assert "choose one of them" in refused("--seeds", "0,1", "--seed", "2", code=2)
    assert "choose --init or --seeds" in refused("--seeds", "0,1", "--init", "r", code=2)
    assert "but epochs is 7" in refused("--tit", "1:2,2:2", "--epochs", "7")


def test_a_typed_tit_replaces_the_recipes_T() -> None:
    Path("r.toml").write_text("T = 4\nepochs = 300\n")
    config, _ = configurations("--config", "r.toml", "--tit", "1:2,2:2")
    assert (config.T, config.epochs) == (2, 4)
    with pytest.raises(ValueError, match="ends at T=2, but T is 3"):
        configurations("--config", "r.toml", "--tit", "1:2,2:2", "--T", "3")


def test_only_options_are_keys(tmp_path: Path) -> None:
    Path("r.toml").write_text("T = 4\n")
    assert read_recipe(Path("r.toml"), click.Command("c", params=[click.Option(["--T", "T"], type=int)])) == {"T": 4}
