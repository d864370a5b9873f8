"""The program of the paper's tables and figures: its recipes are there, and its smoke options are options."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest
from command_helpers import printed, refused

from tetdeploy.cli.train import default_by_network, train, train_config
from tetdeploy.report.reading import result_files
from tetdeploy.storage.files import sha256_of
from tetdeploy.storage.provenance import version
from tetdeploy.system.signals import handled
from tetdeploy.train import TrainConfig

FILE = Path(__file__).parent.parent / "examples" / "paper.py"


@pytest.fixture(scope="module")
def paper() -> ModuleType:
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


def test_folders_have_names_that_shells_take_as_they_are(paper: ModuleType, tmp_path: Path) -> None:
    at = paper.Place(tmp_path, Path("data"), "modern", "smoke")
    for entries in paper.TABLES.values():
        folders = {str(paper.folder_of(entry, at)) for entry in entries}
        assert len(folders) == len(entries) and all(shlex.quote(folder) == folder for folder in folders)


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


def written(words: Sequence[Any]) -> Path:
    """Where sweep or evaluate writes its numbers."""
    options = dict(itertools.pairwise(words))
    return Path(options["--json"]) if "--json" in options else Path(words[1]).with_suffix(".sweep.json")


@pytest.mark.parametrize(("network", "exported"), [({"ann": True}, False), ({"smooth_spike": 10.0}, False), ({}, True)])
def test_what_has_no_export_is_measured_in_pytorch(
    paper: ModuleType, network: dict[str, Any], exported: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {"network": {"ann": False, "smooth_spike": 0.0} | network, "training": {"T": 2}}
    (tmp_path / "config.json").write_text(json.dumps(made))
    weights = tmp_path / "checkpoint.safetensors"
    weights.write_text("")
    commands = []

    def tetdeploy(*arguments: Any) -> None:
        commands.append(arguments[0])
        rows = [{"T": T, "accuracy": T / 4} for T in ((1, 2, 3) if arguments[0] == "sweep" else (2,))]
        of = {"checkpoint_sha256": sha256_of(weights)}
        if arguments[0] == "sweep":
            written(arguments).write_text(json.dumps({"rows": rows} | of))
        elif arguments[0] == "evaluate":
            written(arguments).write_text(json.dumps({"runs": [{"accuracy": rows} | of]}))

    hashed = Mock(side_effect=sha256_of)
    monkeypatch.setattr(paper, "sha256_of", hashed)
    monkeypatch.setattr(paper, "tetdeploy", tetdeploy)
    wanted = ["export", "sweep"] if exported else ["evaluate"]
    place = paper.Place(tmp_path, Path("data"), "table1", "smoke")
    for _ in range(2):  # the second time there is nothing to do
        assert paper.final_accuracy(tmp_path, place, "1:3") == 0.5
    assert commands == wanted and hashed.call_count == 2
    assert len(result_files(tmp_path)) == exported  # which the report of the run shows
    weights.write_text("trained anew")
    assert paper.final_accuracy(tmp_path, place, "1:3") == 0.5
    assert commands == 2 * wanted


class Stub:
    """`tetdeploy` without its work: every number says of which training, seed and T it is."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.runs: dict[Path, tuple[int, int]] = {}  # its training, in their order, and its seed
        self.interrupted = False

    def __call__(self, *arguments: Any) -> None:
        words = [str(word) for word in arguments]
        self.commands.append(words)
        options = dict(itertools.pairwise(words))
        if words[0] == "train":
            self.train(words, options)
        elif words[0] in ("sweep", "evaluate"):
            run = Path(words[1]) if words[0] == "evaluate" else Path(words[1]).parent
            training, seed = self.runs[run]
            steps = range(1, 9) if words[0] == "sweep" else [int(options["--T"])]
            rows = [
                {
                    "T": T,
                    "accuracy": self.accuracy(training, seed, T),
                    "energy_pj": 1e6 * (10 * training + T + seed / 2),
                }
                for T in steps
            ]
            of = {"checkpoint_sha256": sha256_of(run / "checkpoint.safetensors")}
            found = {"rows": rows} | of if words[0] == "sweep" else {"runs": [{"accuracy": rows} | of]}
            written(words).write_text(json.dumps(found))

    @staticmethod
    def accuracy(training: int, seed: int, T: int) -> float:
        return training / 50 + seed / 100 + T / 1000

    def train(self, words: list[str], options: dict[str, str]) -> None:
        resumed = "--resume" in options
        folder = Path(options["--resume" if resumed else "--out"])
        context = train.make_context("train", words[1:])
        seeds = [int(seed) for seed in (context.params["seeds"] or "0").split(",")]
        default_by_network(context, context.params)
        T = int((context.params["tit"] or f"{context.params['T']}:1").split(",")[-1].split(":")[0])
        training = len(self.runs) and 1 + max(training for training, _ in self.runs.values())
        folders = [folder / f"seed-{seed}" for seed in seeds] if context.params["seeds"] else [folder]
        network = {"ann": context.params["ann"], "smooth_spike": context.params["smooth_spike"] or 0.0}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text("{}")
        if self.interrupted:
            raise SystemExit(130)
        for run, seed in zip(folders, seeds, strict=True):
            if run in self.runs:  # finished
                continue
            run.mkdir(exist_ok=True)
            (run / "checkpoint.safetensors").write_text(f"{training} {seed}")
            settings = {"network": network, "training": {"T": T}, "data": {"name": context.params["data"]}}
            (run / "config.json").write_text(json.dumps(settings))
            losses = {"val_sdt_loss": 1.0, "val_tet_loss": 2.0}
            switches = context.params["switch_to_tet"]
            rows = [{"epoch": k, "val_accuracy": 0.9 - k / 10} | losses for k in (1, 2)]
            rows = [row | {"loss": "tet" if switches and row["epoch"] > 1 else "sdt"} for row in rows]
            (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            self.runs[run] = training, seed

    def read_metadata(self, checkpoint: Path) -> dict[str, Any]:
        training, seed = self.runs[checkpoint.parent]
        versions = {"torch": "9"}
        return {"provenance": {"val_accuracy": training / 25 + seed / 200, "seed": seed, "versions": versions}}

    def options_of(self, folder: str) -> list[str]:
        """With which the run in it was trained."""
        return next(words for words in self.commands if words[0] == "train" and words[-1].endswith(f"/{folder}"))


@pytest.fixture
def stub(paper: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Stub:
    made = Stub()
    monkeypatch.setattr(paper, "tetdeploy", made)
    monkeypatch.setattr(paper, "read_metadata", made.read_metadata)
    return made


def run(paper: ModuleType, *words: str) -> None:
    printed(*words, "--data-dir", "data", command=paper.main)


def test_a_table_has_the_kept_weights_accuracies_at_the_T_of_each_training(
    paper: ModuleType, stub: Stub, tmp_path: Path
) -> None:
    run(paper, "table1", "--smoke", "--out", str(tmp_path))
    content = json.loads((tmp_path / "table1.json").read_text())
    rows = content["rows"]
    assert [(row["name"], row["recipe"]) for row in rows] == [
        (f"{loss.upper()} T={T}", f"table1-{loss}-T{T}") for T in (4, 6) for loss in ("sdt", "tet")
    ]
    for training, (row, T) in enumerate(zip(rows, (4, 4, 6, 6), strict=True)):
        assert row["held_out"] == [training / 25 + seed / 200 for seed in (0, 1)]
        assert row["test"] == [Stub.accuracy(training, seed, T) for seed in (0, 1)]
        for seed, of in enumerate(row["runs"]):
            assert (of["seed"], of["T"], of["versions"]) == (seed, T, {"torch": "9"})
            assert stub.runs[tmp_path / of["run"]] == (training, seed)
            assert of["checkpoint_sha256"] == sha256_of(tmp_path / of["run"] / "checkpoint.safetensors")
    assert content["versions"]["tetdeploy"] == version()
    held_out, test = (paper.mean_std(rows[1][part]) for part in ("held_out", "test"))
    assert f"| TET T=4 | {held_out} | {test} | 2 |" in (tmp_path / "table1.md").read_text()


def test_rows_of_a_short_comparison_name_what_was_run(paper: ModuleType, stub: Stub, tmp_path: Path) -> None:
    run(paper, "comparison", "--smoke", "--out", str(tmp_path))
    rows = json.loads((tmp_path / "comparison.json").read_text())["rows"]
    expected = {f"comparison-cifar10-T{T}": f"digits T={T}" for T in (2, 4, 6)} | {
        "comparison-cifar10-ann": "digits ANN"
    }
    for loss in ("sdt", "tet"):
        expected[f"comparison-dvs-cifar10-{loss}"] = f"saccades:digits {loss.upper()} T=4"
    assert {row["recipe"]: row["name"] for row in rows} == expected
    assert "| saccades:digits TET T=4 | " in (tmp_path / "comparison.md").read_text()


def test_smooth_spikes_have_the_slope_of_their_row(paper: ModuleType, stub: Stub, tmp_path: Path) -> None:
    run(paper, "table2", "--smoke", "--out", str(tmp_path))
    for loss, k in itertools.product(("SDT", "TET"), (1, 10, 20)):
        options = stub.options_of(f"{loss}-k{k}")
        assert options[options.index("--smooth-spike") + 1] == str(k)
        assert f"table2-{loss.lower()}.toml" in " ".join(options)
    assert not any(words[0] == "export" for words in stub.commands)


def test_the_modern_recipe_is_compared_on_one_set_and_as_many_seeds(
    paper: ModuleType, stub: Stub, tmp_path: Path
) -> None:
    def chosen(entry: Any, scale: str, *names: str) -> tuple[Any, ...]:
        options = ["--config", str(paper.RECIPES / f"{entry.recipe}.toml"), *entry.chosen(scale)]
        with train.make_context("train", options) as ctx:
            return tuple(ctx.params[name] for name in names)

    for scale in ("full", "smoke"):
        names = ("data", "seeds", "T", "model", "width")
        assert len({chosen(entry, scale, *names) for entry in paper.TABLES["modern"]}) == 1
    _, *modern = paper.TABLES["modern"]
    names = ("cutout", "ema", "random_T", "distill", "augment")
    assert {entry.name: chosen(entry, "full", *names) for entry in modern} == {
        "SGD": (0, 0.0, "", "", "crop-flip"),
        "SGD, cutout": (16, 0.0, "", "", "crop-flip"),
        "SGD, EMA": (0, 0.999, "", "", "crop-flip"),
        "SGD, random T": (0, 0.0, "1:6", "", "crop-flip"),
        "SGD, distilled": (0, 0.0, "", "{runs}/ANN-twin", "crop-flip"),
    }
    run(paper, "modern", "--smoke", "--out", str(tmp_path))
    rows = json.loads((tmp_path / "modern.json").read_text())["rows"]
    assert [row["name"] for row in rows] == [entry.name for entry in paper.TABLES["modern"]]
    for training, row in enumerate(rows, 1):  # behind the teacher
        assert row["recipe"] and [stub.runs[tmp_path / of["run"]] for of in row["runs"]] == [
            (training, seed) for seed in (0, 1, 2)
        ]
        assert row["test"] == {str(T): [Stub.accuracy(training, seed, T) for seed in (0, 1, 2)] for T in (1, 2, 4, 6)}
    assert (tmp_path / "modern.md").read_text().count(" | 3 |\n") == len(rows)
    options = stub.options_of("SGD-distilled")
    assert Path(options[options.index("--distill", options.index("--distill") + 1) + 1]) in stub.runs


def test_figure_4_is_of_both_losses_with_energy_in_microjoules(
    paper: ModuleType, stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(paper, "save", lambda figure, at: figures.append(figure))
    run(paper, "figure4", "--small", "--out", str(tmp_path))
    curves = json.loads((tmp_path / "figure4.json").read_text())["curves"]
    assert {name: curve["trained_T"] for name, curve in curves.items()} == {
        **{f"{loss} T={T}": T for loss in ("TET", "SDT") for T in (2, 3, 4)},
        "TET T=6": 6,
        "TIT T=2 to 6": 6,
    }
    for training, curve in enumerate(curves.values()):
        assert curve["accuracy_percent"] == pytest.approx([100 * Stub.accuracy(training, 0, T) for T in range(1, 9)])
        assert curve["energy_uj"] == pytest.approx([10 * training + T for T in range(1, 9)])
    for name in curves:
        assert ("sdt" in stub.options_of(name.replace(" ", "-").replace("=", ""))) == name.startswith("SDT")
    drawn, *_, large = figures[0].axes[0].get_lines()
    assert drawn.get_label() == "TET T=2" and large.get_label() == "large: T of the training"
    hollow = {line.get_label() for line in figures[0].axes[1].get_lines() if line.get_markerfacecolor() == "white"}
    assert hollow >= {f"SDT T={T}" for T in (2, 3, 4)} and not any("T" in name[:1] for name in hollow)


def test_figure_4_is_of_mean_and_deviation_over_seeds(
    paper: ModuleType, stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(paper, "save", lambda figure, at: figures.append(figure))
    monkeypatch.setitem(paper.TABLES, "figure4", (paper.Entry("TET T=4", "figure4a-T4", smoke=("--seeds", "0,1,2")),))
    run(paper, "figure4", "--smoke", "--out", str(tmp_path))
    (curve,) = json.loads((tmp_path / "figure4.json").read_text())["curves"].values()
    assert curve["accuracy_std"] == pytest.approx([1.0] * 8)  # of 0, 1 and 2 points more
    assert [of["run"] for of in curve["runs"]] == [f"runs/figure4-smoke/TET-T4/seed-{seed}" for seed in (0, 1, 2)]
    *_, row = (tmp_path / "figure4.md").read_text().splitlines()
    assert row.startswith("| TET T=4 | 1.10 ± 1.00 | 1.20 ± 1.00 |") and row.endswith(" 1.80 ± 1.00 | 3 |")
    assert "bars: standard deviation" in [text.get_text() for text in figures[0].legends[0].get_texts()]
    for axis in figures[0].axes:
        (bars,) = (bars.lines[2][0].get_segments() for bars in axis.containers)
        assert [high - low for (_, low), (_, high) in bars] == pytest.approx([2.0] * 8)


def test_figure_3_switches_after_two_thirds_as_the_full_run_does(paper: ModuleType) -> None:
    assert paper.switched(12) == ("--epochs", "12", "--switch-to-tet", "8", "--T", "4")


def test_figure_3_has_each_loss_on_its_own_axes(
    paper: ModuleType, stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure, axes = Mock(), [Mock() for _ in range(3)]
    monkeypatch.setattr(paper, "subplots", lambda count: (figure, axes[:count]))
    run(paper, "figure3", "--smoke", "--out", str(tmp_path))
    shown = {axis.set.call_args.kwargs["ylabel"]: axis.plot.call_args.args for axis in axes}
    runs = json.loads((tmp_path / "figure3.json").read_text())["runs"]
    assert {name: of[0]["run"] for name, of in runs.items()} == {
        "SDT, then TET": "runs/figure3-smoke/SDT-then-TET",
        "SDT": "runs/figure3-smoke/SDT",
    }
    assert shown == {
        "L_SDT, held out": ([1, 2], [1.0, 1.0], "--"),
        "L_TET, held out": ([1, 2], [2.0, 2.0], "--"),
        "accuracy (%), held out": ([1, 2], pytest.approx([80, 70]), "--"),
    }
    for axis in axes:
        assert axis.plot.call_args_list[0].args[2] == "-"
        assert [call.args for call in axis.axvline.call_args_list] == [(1.5,)]  # of the run that switches alone


def test_what_is_done_is_not_trained_again_and_what_was_interrupted_goes_on(
    paper: ModuleType, stub: Stub, tmp_path: Path
) -> None:
    stub.interrupted = True
    command = ["figure2", "--smoke", "--out", str(tmp_path), "--data-dir", "data"]
    printed(*command, code=130, command=paper.main)
    stub.interrupted = False
    run(paper, *command[:-2])
    folder = str(tmp_path / "runs" / "figure2-smoke" / "SDT")
    for words, where in zip(stub.commands, ("--out", "--resume"), strict=False):
        assert words[:3] == ["train", "--config", str(paper.RECIPES / "table1-sdt-T4.toml")]
        assert words[-2:] == [where, folder]
    seeds = [str(Path(at, "seed-0")) for at in (folder, folder.replace("SDT", "TET"))]
    assert stub.commands[-1][:3] == ["landscape", *seeds]
    before = len(stub.commands)
    run(paper, *command[:-2])
    assert [words[0] for words in stub.commands[before:]] == ["train", "train", "landscape"]
    assert all("--resume" in words for words in stub.commands[before:-1])  # which leaves alone what is finished


@pytest.mark.parametrize("interrupted", [True, False])
def test_runs_of_another_recipe_are_refused(
    paper: ModuleType, stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    recipes = shutil.copytree(paper.RECIPES, tmp_path / "recipes", copy_function=shutil.copyfile)  # may be read-only
    monkeypatch.setattr(paper, "RECIPES", recipes)
    recipe = tmp_path / "recipes" / "table1-sdt-T4.toml"
    command = ["figure2", "--smoke", "--out", str(tmp_path), "--data-dir", "data"]
    stub.interrupted = interrupted
    printed(*command, code=130 if interrupted else 0, command=paper.main)
    stub.interrupted = False
    text = recipe.read_text()
    recipe.write_text(text.replace("lr = 1e-3", "lr = 2e-3").replace("weight-decay = 0.0\n", "") + "clip = 1\n")
    before = len(stub.commands)
    output = refused(*command, command=paper.main)
    folder = tmp_path / "runs" / "figure2-smoke" / "SDT"
    changes = "lr: 0.001 -> 0.002; weight-decay: 0.0 -> (none); clip: (none) -> 1"
    assert len(stub.commands) == before
    assert f"{folder} was trained by another recipe: {changes}; remove it to train anew" in output
    recipe.write_text(text.replace("# Table 1", "# Table one").replace('"0,1,2"', '"0,1,2,3"'))
    run(paper, *command[:-2])  # a comment, and seeds, of which there may be more


def test_runs_of_other_tables_and_scales_are_not_taken_for_its_own(
    paper: ModuleType, stub: Stub, tmp_path: Path
) -> None:
    for what in (["figure3", "--smoke"], ["figure2", "--smoke"], ["figure3", "--small"]):
        before = sum(words[0] == "train" for words in stub.commands)
        run(paper, *what, "--out", str(tmp_path))
        assert sum(words[0] == "train" for words in stub.commands) - before == 2


# Says that it runs, saves for longer than Python lets a child of subprocess.run after Ctrl-C, and ends as train does.
CHILD = """
import os, pathlib, signal, sys, time
def stop(number, frame):
    time.sleep(0.6)
    pathlib.Path("saved").write_text(str(number))
    sys.exit(130)
signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
pathlib.Path("pid").write_text(str(os.getpid()) + " ")
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_training_save(
    paper: ModuleType, number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def send() -> None:
        end = time.monotonic() + 60
        while not (tmp_path / "pid").is_file() or not (pid := (tmp_path / "pid").read_text()).endswith(" "):
            if time.monotonic() > end:
                return
            time.sleep(0.02)
        if number == signal.SIGINT:  # which a terminal sends to both
            os.kill(int(pid), number)
        os.kill(os.getpid(), number)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paper, "COMMAND", (sys.executable, "-c", CHILD))
    sender = threading.Thread(target=send)
    sender.start()
    with pytest.raises(SystemExit) as ended:
        paper.tetdeploy("train")
    sender.join()
    assert ended.value.code == 130 and (tmp_path / "saved").read_text() == str(int(number))


def test_a_command_is_printed_as_a_shell_takes_it(
    paper: ModuleType, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paper, "COMMAND", (sys.executable, "-c", ""))
    words = ["train", "--random-T", "", "--out", "my runs/a"]
    paper.tetdeploy(*words)
    assert shlex.split(capfd.readouterr().out) == ["$", "tetdeploy", *words]


@pytest.mark.parametrize("started", [False, True], ids=["before", "after"])
def test_a_signal_as_the_training_is_started_ends_both(
    paper: ModuleType, started: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    children: list[subprocess.Popen[bytes]] = []

    def start(command: list[str]) -> subprocess.Popen[bytes]:
        if not started:
            os.kill(os.getpid(), signal.SIGTERM)
        children.append(subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"]))
        if started:
            os.kill(os.getpid(), signal.SIGTERM)
        return children[0]

    monkeypatch.setattr(paper, "subprocess", Mock(Popen=start))
    try:
        with handled(lambda *_: pytest.fail("not handled"), signal.SIGTERM), pytest.raises(SystemExit):
            paper.tetdeploy("train")
        assert children[0].returncode == -signal.SIGTERM
    finally:
        for child in children:
            child.kill()
            child.wait()


def test_a_scale_that_no_entry_has_is_refused_before_any_training(paper: ModuleType, tmp_path: Path) -> None:
    output = refused("modern", "--small", "--out", tmp_path / "out", code=2, command=paper.main)
    assert "modern has no --small run; choose --smoke, or neither for the full size" in output
    output = refused("table1", "--smoke", "--small", "--out", tmp_path / "out", code=2, command=paper.main)
    assert "--smoke and --small are two sizes; choose one" in output
    assert not (tmp_path / "out").exists()


def test_mean_and_standard_deviation(paper: ModuleType) -> None:
    assert paper.mean_std([0.5]) == "50.00"
    assert paper.mean_std([0.9, 0.92]) == "91.00 ± 1.41"


def test_an_unknown_table_is_refused(paper: ModuleType) -> None:
    assert "'comparison'" in refused("table9", code=2, command=paper.main)
