"""The program of the paper's tables and figures: its recipes are there, and its smoke options are options."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

from tetdeploy.cli.train import default_by_network, train, train_config
from tetdeploy.train import TrainConfig

FILE = Path(__file__).parent.parent / "examples" / "paper.py"


@pytest.fixture(scope="module")
def paper() -> ModuleType:
    import sys

    specification = importlib.util.spec_from_file_location("paper", FILE)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["paper"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


def test_every_entry_has_its_recipe_and_a_name_of_its_own(paper: ModuleType) -> None:
    for entries in paper.TABLES.values():
        assert len({entry.name for entry in entries}) == len(entries) > 1
        for entry in entries:
            assert (paper.RECIPES / f"{entry.recipe}.toml").is_file(), entry.recipe


@pytest.mark.parametrize("scale", ["full", "small", "smoke"])
def test_every_option_of_a_scale_is_one_of_train(paper: ModuleType, scale: str) -> None:
    known = {name for parameter in train.params for name in parameter.opts}
    for entries in paper.TABLES.values():
        for entry in entries:
            options = entry.chosen(scale)
            assert {option for option in options if option.startswith("--")} <= known


@pytest.mark.parametrize("scale", ["full", "small", "smoke"])
def test_every_entry_makes_a_configuration(paper: ModuleType, scale: str) -> None:
    names = {field.name for field in fields(TrainConfig)}
    for entries in paper.TABLES.values():
        for entry in (entry for entry in entries if scale in entry.scales):
            arguments = [
                "--config",
                str(paper.RECIPES / f"{entry.recipe}.toml"),
                *entry.chosen(scale),
            ]
            with train.make_context("train", arguments) as ctx:
                default_by_network(ctx, ctx.params)
                config = train_config(
                    ctx, {name: value for name, value in ctx.params.items() if name in names}, v_th=ctx.params["v_th"]
                )
            assert scale == "full" or config.epochs <= 12


def test_what_is_left_out_says_why(paper: ModuleType, tmp_path: Path) -> None:
    by_name = {entry.name: entry for entry in paper.TABLES["comparison"]}
    imagenet, events = by_name["ImageNet SEW-ResNet-34 T=4"], by_name["DVS-CIFAR10 TET T=10"]
    assert imagenet.left_out("full", tmp_path) == f"it needs {tmp_path / 'imagenet'}"
    (tmp_path / "imagenet").mkdir()
    assert imagenet.left_out("full", tmp_path) == ""
    assert imagenet.left_out("smoke", tmp_path) == "only full runs have it"
    assert events.left_out("smoke", tmp_path) == "" and events.left_out("small", tmp_path) != ""


@pytest.mark.parametrize(("network", "exported"), [({"ann": True}, False), ({"smooth_spike": 10.0}, False), ({}, True)])
def test_what_has_no_export_is_measured_in_pytorch(
    paper: ModuleType, network: dict[str, Any], exported: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {"network": {"ann": False, "smooth_spike": 0.0} | network, "training": {"T": 2}}
    (tmp_path / "config.json").write_text(json.dumps(made))
    commands = []

    def tetdeploy(*arguments: Any) -> None:
        commands.append(arguments[0])
        rows = [{"T": T, "accuracy": T / 4} for T in ((1, 2, 3) if arguments[0] == "sweep" else (2,))]
        if "--json" in arguments:
            found = {"sweep": {"rows": rows}, "evaluate": {"runs": [{"accuracy": rows}]}}[arguments[0]]
            arguments[-1].write_text(json.dumps(found))

    monkeypatch.setattr(paper, "tetdeploy", tetdeploy)
    for _ in range(2):  # the second time there is nothing to do
        assert paper.final_accuracy(tmp_path, Path("data"), "1:3") == 0.5
    assert commands == (["export", "sweep"] if exported else ["evaluate"])


def test_a_scale_that_no_entry_has_is_refused_before_any_training(paper: ModuleType, tmp_path: Path) -> None:
    result = CliRunner().invoke(paper.main, ["modern", "--small", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and "modern has no --small run; choose full or smoke" in result.output
    assert not (tmp_path / "out").exists()


def test_mean_and_standard_deviation(paper: ModuleType) -> None:
    assert paper.mean_std([0.5]) == "50.00"
    assert paper.mean_std([0.9, 0.92]) == "91.00 ± 1.41"


def test_an_unknown_table_is_refused(paper: ModuleType) -> None:
    result = CliRunner().invoke(paper.main, ["table9"])
    assert result.exit_code == 2
    assert "'comparison'" in result.output
