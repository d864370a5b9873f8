"""Commands as a user types them: what they write, what they say, and one clear line for everything done wrong."""

from __future__ import annotations

import codecs
import errno
import importlib
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest.mock import ANY, Mock

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from command_helpers import invoke, printed, refused
from image_helpers import write_deep_png
from PIL import Image
from rich.progress import ProgressColumn
from run_helpers import metrics, small_files
from safetensors.torch import load_file, save_file

from tetdeploy import checkpoint, data
from tetdeploy.checkpoint import Checkpoint, read_checkpoint, read_metadata, save_checkpoint
from tetdeploy.cli import main
from tetdeploy.cli.characters import _like
from tetdeploy.cli.errors import CleanErrors, CleanGroup
from tetdeploy.cli.export import _next as after_export
from tetdeploy.cli.inputs import load_classifier
from tetdeploy.cli.predict import _print, _read_image
from tetdeploy.cli.terminal import console, print_notes, progress_bar, say_next
from tetdeploy.data import load_data, save_npz
from tetdeploy.engine import Engine
from tetdeploy.export import preflight
from tetdeploy.networks import NETWORKS, Classifier, NetworkConfig, build_network
from tetdeploy.storage.files import sha256_of
from tetdeploy.storage.run_folder import newest_export
from tetdeploy.storage.tensor_file import read_content, write_tensors
from tetdeploy.train import TrainResult, loop
from tetdeploy.train.config import CHOICES
from tetdeploy.train.progress import Progress
from tetdeploy.train.state import Best


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def _not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a network of one's own can be exported is not asked, which takes a process, before it is trained."""
    monkeypatch.setattr("tetdeploy.export.preflight.why_not", lambda *_: None)


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """Some of the digits, which are read without scikit-learn."""
    save_npz(load_data("digits", "train", data_dir=tmp_path).select(slice(200)), tmp_path / "few.npz")
    return Path("few.npz")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `train` and `export` ran on the digits: runs/digits-convsnn with an unrolled T=3 model."""
    folder = tmp_path_factory.mktemp("trained")
    for arguments in (["train", "--epochs", "4", "--width", "0.5"], ["export", "--T", "3", "--check", "64"]):
        printed(*arguments, "--runs", folder / "runs")
    return folder


@pytest.fixture
def workplace(trained: Path, tmp_path: Path) -> Path:
    """A copy of `trained` to do harm to; it is the working folder."""
    shutil.copytree(trained / "runs", tmp_path / "runs", symlinks=True)
    return tmp_path


def needs(package: str) -> pytest.MarkDecorator:
    """Of a test that needs more than what the README installs for the tests."""
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


RUN = "runs/digits-convsnn"
MODEL = f"{RUN}/model-T3.onnx"
TRAIN_FEW = ("train", "--data", "few.npz", "--epochs", "1", "--width", "0.25", "--out", "new")
NOT_EXPORTED = "this network cannot be exported:"
FRAMES_NET = """
from torch import nn
from tetdeploy.neurons import LIF
class Net(nn.Sequential):
    def forward(self, frames):
        return super().forward(frames.flatten(2))
def net(num_classes, in_channels, image_size):
    return Net(nn.Linear(64, 8), LIF(), nn.Linear(8, num_classes))
"""
# A network without neurons.
LINEAR_NET = """
from torch import nn
class Net(nn.Linear):
    def forward(self, x, T):
        return super().forward(x.flatten(1)).expand(T, -1, -1)
def net(num_classes, in_channels, image_size):
    return Net(64, num_classes)
"""
DRAWN_NET = """
import torch
from torch import nn
class Net(nn.Linear):
    def forward(self, x, T):
        return super().forward(x.flatten(1) * self.mask).expand(T, -1, -1)
def net(num_classes, in_channels, image_size):
    made = Net(64, num_classes)
    made.mask = torch.rand(64) > 0.5
    return made
"""
RANDOM_NET = """
import functools
import os
import sys
import torch
from torch import nn
from tetdeploy.layers import OverTime
from tetdeploy.neurons import LIF
os.write(1, b"\\xff printed at import")
assert not sys.argv[-1].endswith("answer.json")  # a module may read the words of its command
@functools.lru_cache  # which a check in the same process would fill with float64
def window(size):
    return torch.linspace(0.5, 1, size)
class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.layer, self.lif = OverTime(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.2)), LIF()
        self.readout = nn.Linear(4, num_classes)
    def forward(self, x, T):
        x = (x * window(x.shape[-1])).expand(T, *x.shape)
        return self.readout(self.lif(self.layer((torch.rand_like(x) < x).to(x.dtype))).mean((-2, -1)))
def net(num_classes, in_channels, image_size):
    return Net(num_classes)
"""


class TestCommands:
    def test_every_command_has_help_with_examples(self) -> None:
        listed = re.findall(r"^  tetdeploy (\S+)", printed("--help"), re.MULTILINE)
        assert listed == list(main.commands)
        for name in main.commands:
            output = printed(name, "--help")
            assert "Examples:" in output, name
            assert f"tetdeploy {name}" in output, name
            assert "None" not in output, name

    def test_training_names_the_networks_and_the_data_sets_of_its_own(self) -> None:
        said = {option.name: str(getattr(option, "help", "")) for option in main.commands["train"].params}
        assert said["model"].startswith(f"{', '.join(NETWORKS)}, or ")
        assert set(data.DATA_NAMES) <= set(re.findall(r"[\w-]+", said["data"]))

    @pytest.mark.parametrize("option", CHOICES)
    def test_the_help_of_training_names_all_choices(self, option: str) -> None:
        (said,) = (str(getattr(param, "help", "")) for param in main.commands["train"].params if param.name == option)
        assert set(CHOICES[option]) <= set(re.findall(r"[\w-]+", said))

    @pytest.mark.parametrize(
        "command",
        [
            *(("sweep", MODEL, "--limit", "4"), ("inspect", MODEL), ("predict", MODEL, "a.png"), ("validate", MODEL)),
            ("landscape", RUN, "--points", "3", "--limit", "4"),
            pytest.param(("build", MODEL, "--gpu-arch", "8.9"), marks=needs("tensorrt_rtx")),
            pytest.param(("export", MODEL, "--format", "kserve", "--storage-uri", "s3://models"), marks=needs("yaml")),
        ],
    )
    def test_a_reader_that_leaves_takes_no_result_along(
        self, command: tuple[str, ...], workplace: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Image.fromarray(np.zeros((8, 8), np.uint8)).save("a.png")

        def left(*_: Any, **__: Any) -> None:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        monkeypatch.setattr(console, "print", left)
        refused(*command, "--json", "found.json")
        assert json.loads(Path("found.json").read_text())

    def test_train_leaves_a_run(self, workplace: Path) -> None:
        folder = workplace / "runs" / "digits-convsnn"
        names = {path.name for path in folder.iterdir()}
        assert {"checkpoint.safetensors", "last.safetensors", "metrics.jsonl", "config.json"} <= names
        assert (workplace / "runs" / "latest").resolve() == folder.resolve()
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4

    def test_the_json_of_a_training_is_of_its_best_epoch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ended = TrainResult(Path("run"), 3, Best(2, 0.5, 1.25), interrupted=False, seconds=1.0)
        monkeypatch.setattr("tetdeploy.train.train", lambda *args, **options: ended)
        printed("train", "--out", "run", "--json", "t.json")
        said = {"run": "run", "epochs": 3, "seconds": 1.0, "best_epoch": 2, "val_accuracy": 0.5, "val_loss": 1.25}
        assert json.loads(Path("t.json").read_text()) == said

    def test_one_seed_and_several_are_refused(self) -> None:
        said = refused("train", "--seed", "1", "--seeds", "0,1", code=2)
        assert "--seed and --seeds both decide the random numbers: choose one of them" in said
        Path("three.toml").write_text('seeds = "0,1,2"')
        said = refused("train", "--config", "three.toml", "--seed", "1", code=2)
        assert "choose one of them (three.toml has the seeds 0, 1, 2)" in said

    @pytest.mark.parametrize("options", [("--out", "runs/"), ("--runs", "a/../mine", "--out", "mine")])
    def test_a_run_does_not_lie_where_all_runs_do(self, options: tuple[str, ...]) -> None:
        """The link to the newest run, in it, would lead to itself."""
        assert "is the folder of all runs: name one in it, such as" in refused("train", *options, code=2)

    @pytest.mark.parametrize(
        ("target", "command"),
        [
            ("cpu", "sweep {}"),
            ("cuda", "sweep {} --device cuda"),
            ("openvino", "sweep {} --runtime openvino"),
            ("tensorrt", "build {} --package tensorrt"),
            ("tensorrt-rtx", "build {} --package tensorrt-rtx"),
        ],
    )
    def test_an_export_goes_on_with_what_runs_its_target(self, target: str, command: str, workplace: Path) -> None:
        assert " ".join(map(str, after_export(Path("m.onnx"), target))) == command.format("m.onnx")
        if target == "tensorrt-rtx":
            output = printed("export", "--target", target, "--check", "0", "--out", "m.onnx")
            assert output.endswith(f"next: tetdeploy {command.format('m.onnx')}\n")
        name, *arguments = command.format("m.onnx").split()
        main.commands[name].make_context(name, arguments).close()  # it parses

    def test_an_export_says_when_a_calibration_does_not_fit_it(self, workplace: Path) -> None:
        model, export = f"{RUN}/model-step.onnx", ("export", "--layout", "step", "--check", "20")
        for command in (export, ("calibrate", model, "--T", "2"), export, ("export", *export[1:], "--no-fold-bn")):
            output = printed(*command)
            again = f"{RUN}/model-step.exit.json holds the threshold of another model than {model}; run: "
            assert (again in output) == ("--no-fold-bn" in command)
        assert Path(RUN, "model-step.exit.json").exists()

    def test_sweep_writes_the_contracts_json_and_a_plot(self, workplace: Path) -> None:
        output = printed("sweep", "--json", "out.json", "--plot", "out.png")
        written = json.loads(Path("out.json").read_text())
        assert set(written) >= {"model", "data", "num_samples", "rows"}
        assert [row["T"] for row in written["rows"]] == [1, 2, 3]
        assert written["num_samples"] == 359
        for row in written["rows"]:
            assert set(row) >= {
                "T",
                "accuracy",
                "firing_rate",
                "ac_ops",
                "mac_ops",
                "energy_pj",
                "energy_exact_pj",
                "latency_ms",
            }
            assert 0.8 < row["accuracy"] <= 1
            assert 0 < row["firing_rate"] < 1
            assert row["energy_pj"] == pytest.approx(0.9 * row["ac_ops"] + 4.6 * row["mac_ops"])
            assert row["latency_ms"] > 0
        ops = [row["ac_ops"] for row in written["rows"]]
        assert ops[0] < ops[1] < ops[2]
        with Image.open("out.png") as picture:
            assert picture.size[0] > 500
        assert "the latency is the same at every T" in output

    def test_the_plot_of_a_sweep_lies_beside_its_numbers(self, workplace: Path) -> None:
        output = printed("sweep", "--T", "1", "--limit", "4", "--json", "elsewhere/one.json")
        assert Path("elsewhere/one.png").exists() and not list(Path(RUN).glob("*.sweep.*"))
        assert output.endswith("next: tetdeploy report elsewhere/one.json\n")
        assert printed("sweep", "--T", "1", "--limit", "4").endswith(f"next: tetdeploy report {RUN}\n")

    def test_sweep_shows_where_the_energy_goes(self, workplace: Path) -> None:
        output = printed("sweep", "--T", "2:3", "--layers", "--other-ops", "--energy", "once", "--json", "out.json")
        for line in (
            "layers, per image at T=3",
            "encode.0",
            "layer2.0",
            "all layers",
            "bias adds",
            "neuron ops",
            "ANN",
        ):
            assert line in output
        written = json.loads(Path("out.json").read_text())
        assert written["kind"] == "sweep" and written["trained_T"] == 4
        total = sum(layer["rows"][1]["energy_pj"] for layer in written["layers"])
        assert total == pytest.approx(written["rows"][1]["energy_pj"])

    def test_sweep_takes_other_picojoules(self, workplace: Path) -> None:
        output = printed("sweep", "--T", "3", "--limit", "50", "--ac-pj", "0.5", "--mac-pj", "2", "--json", "out.json")
        assert "; 2 pJ a multiply-accumulate and 0.5 pJ an addition" in output
        written = json.loads(Path("out.json").read_text())
        (row,) = written["rows"]
        assert row["energy_pj"] == pytest.approx(0.5 * row["ac_ops"] + 2 * row["mac_ops"])
        assert written["constants"] == {"ac_pj": 0.5, "mac_pj": 2.0, "source": "given: ac_pj 0.5, mac_pj 2"}

    def test_sweep_runs_as_many_images_together_as_said(self, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        measured = Mock(side_effect=ValueError("enough"))
        monkeypatch.setattr("tetdeploy.sweep.sweep", measured)
        refused("sweep", MODEL, "--batch-size", "7")
        assert measured.call_args.kwargs["batch_size"] == 7

    def test_sweep_takes_npz_data(self, workplace: Path) -> None:
        generator = np.random.default_rng(0)
        images = generator.integers(0, 256, (20, 1, 8, 8), dtype=np.uint8)
        np.savez("mine.npz", images=images, labels=np.arange(20) % 10)
        printed("sweep", "--data", "mine.npz", "--json", "out.json")
        assert json.loads(Path("out.json").read_text())["num_samples"] == 20

    def test_a_result_of_other_images_is_told_before_it_is_replaced(self, workplace: Path) -> None:
        said = "out.json, the result of 20 images of digits, will be replaced; another --json keeps both"
        for limit, told in (("20", False), ("20", False), ("10", True)):
            assert (said in printed("sweep", "--T", "1", "--limit", limit, "--json", "out.json")) is told
        for junk in ("{}", '{"data": "digits", "num_samples": "many"}'):
            Path("out.json").write_text(junk)
            assert "will be replaced" not in printed("sweep", "--T", "1", "--limit", "10", "--json", "out.json")
        for junk in ("not json", "[]"):
            Path("out.json").write_text(junk)
            assert "out.json: it is there, and something else" in refused("sweep", "--T", "1", "--json", "out.json")
        Path("out.json").write_text("{}")
        printed("sweep", "--T", "1", "--limit", "20", "--json", "out.json")
        np.savez("others.npz", images=np.zeros((5, 1, 8, 8), np.uint8), labels=np.full(5, 10))
        assert "will be replaced" not in refused("sweep", "--data", "others.npz", "--json", "out.json")

    @pytest.mark.parametrize(("columns", "width"), [("60", 60), ("100", 100), ("0", 120), ("", 120)])
    def test_piped_tables_are_as_wide_as_COLUMNS(self, columns: str, width: int, workplace: Path) -> None:
        environment = os.environ | {"COLUMNS": columns, "PYTHONIOENCODING": "utf-8"}  # in ASCII λ has six letters
        command = [sys.executable, "-m", "tetdeploy", "inspect", MODEL]
        output = subprocess.run(command, env=environment, capture_output=True, check=True).stdout.decode()
        longest = max(map(len, output.splitlines()))
        assert longest == width  # the file's SHA-256 and versions are folded
        assert "…" not in output and "kernel" in output and "dense ops" in output

    @pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
    def test_any_encoding_of_stdout_will_do(self, encoding: str, workplace: Path) -> None:
        name = os.fsdecode(b"d\xe9\xff \xce\xbb.png")  # no UTF-8 on Linux
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(Path(name))
        printed = []
        for arguments in (
            ["sweep", "--limit", "9"],
            ["inspect", MODEL],
            ["predict", MODEL, name],
            ["validate", "--help"],
        ):
            result = CliRunner(charset=encoding).invoke(main, arguments)
            assert result.exit_code == 0, result.output
            printed.append(result.stdout_bytes)
        assert ("µJ" if encoding != "ascii" else "uJ").encode(encoding) in printed[0]
        assert ("λ=" if encoding == "utf-8" else "lambda=").encode(encoding) in printed[1]
        assert b"d\xe9\xff" in printed[2]

    def test_so_will_that_of_a_pipe(self, workplace: Path) -> None:
        command = [sys.executable, "-m", "tetdeploy", "inspect", MODEL]
        done = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, check=True)
        assert b"lambda=" in done.stdout

    def test_predict_names_classes_and_certainty_at_each_step(self, workplace: Path) -> None:
        Image.fromarray(np.zeros((8, 8), np.uint8)).save("a.png")
        Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save("b.png")
        assert "T=3" in printed("predict", MODEL, "a.png", "b.png", "--resize", "--top", "2", "--json", "p.json")
        certainty = np.array(json.loads(Path("p.json").read_text())["images"][0]["certainty"])
        assert certainty.shape == (3, 10)
        np.testing.assert_allclose(certainty.sum(-1), 1, rtol=1e-5)

    @pytest.mark.parametrize("said", [None, {"name": "imagenet"}])
    def test_predict_takes_models_whose_source_says_little(self, said: Any, workplace: Path) -> None:
        engine = Mock(metadata={"source": {"data": said}}, input_shape=(1, 8, 8), input_dtype=np.uint8)
        Image.fromarray(np.full((8, 8), 7, np.uint8)).save("a.png")
        assert (_read_image(Path("a.png"), engine, False) == 7).all()

    def test_predict_shows_the_classes_most_certain_at_last_by_the_mean_logits(self, workplace: Path) -> None:
        x, names = load_data("digits", "test", data_dir=Path()).x[:16], [f"{k}.png" for k in range(16)]
        for image, name in zip(x, names, strict=True):
            Image.fromarray(image[0]).save(name)
        output = printed("predict", MODEL, *names, "--top", "2", "--json", "p.json")
        engine = Engine(MODEL)
        mean = np.cumsum(engine.run(x).per_step.astype(np.float64), axis=1) / np.arange(1, 4)[:, None]
        expected = np.exp(mean) / np.exp(mean).sum(-1, keepdims=True)
        written = [image["certainty"] for image in json.loads(Path("p.json").read_text())["images"]]
        np.testing.assert_allclose(written, expected, atol=1e-5)
        shown = [line.split()[0] for line in output.splitlines() if re.match(r" +\d+ +\d", line)]
        first, last = (np.argsort(-expected[:, t], axis=-1)[:, :2] for t in (0, -1))
        assert shown == [engine.class_names[k] for k in last.ravel()]
        assert (first != last).any()

    def test_predict_shows_the_first_of_equal_classes_first(self, capsys: pytest.CaptureFixture[str]) -> None:
        """As the class that counts is the first of them."""
        _print(Path("a.png"), np.full((1, 4), 0.25), ("one", "two", "three", "four"), 2)
        assert re.findall("one|two|three|four", capsys.readouterr().out) == ["one", "two"]

    def test_predict_cuts_what_is_too_wide_and_squeezes_nothing(self, workplace: Path) -> None:
        wide = np.full((8, 24), 200, np.uint8)
        wide[:, 8:16] = load_data("digits", "test", data_dir=Path()).x[0, 0]
        Image.fromarray(wide).save("wide.png")
        Image.fromarray(wide[:, 8:16]).save("middle.png")
        printed("predict", MODEL, "wide.png", "middle.png", "--resize", "--json", "p.json")
        one, other = (image["certainty"] for image in json.loads(Path("p.json").read_text())["images"])
        np.testing.assert_allclose(one, other, atol=1e-6)

    def test_own_networks_are_imported_only_when_named(self) -> None:
        config = NetworkConfig("own:net", num_classes=3, in_channels=1, image_size=(8, 8))
        own = Classifier(torch.nn.Flatten(), config=config, mean=(0.0,), std=(1.0,), class_names=("a", "b", "c"))
        Path("runs/own").mkdir(parents=True)
        save_checkpoint("runs/own/checkpoint.safetensors", own, training={}, provenance={})
        assert "is not imported because a file says so" in refused("export", "runs/own", "--check", "20")
        assert "is not what this checkpoint was trained with" in refused("export", "runs/own", "--model", "other:net")
        assert "holds a network of your own: pass --model own:net" in refused("train", "--init", "runs/own")

    def test_init_takes_the_model_and_its_width_but_no_width_for_another(self) -> None:
        config = NetworkConfig("resnet19", num_classes=10, in_channels=1, image_size=(8, 8), width=0.0625)
        small = Classifier(
            build_network(config), config=config, mean=(0.0,), std=(1.0,), class_names=tuple("0123456789")
        )
        save_checkpoint("small.safetensors", small, training={}, provenance={})
        begun = ("train", "--init", "small.safetensors", "--device", "cuda:99")
        said = refused(*begun)
        assert "model resnet19, as in small.safetensors\nwidth 0.0625, as in small.safetensors\n" in said
        assert "cuda:99 is not there" in said
        said = refused(*begun, "--model", "convsnn")
        assert "small.safetensors has model resnet19, not convsnn, which its weights do not fit" in said
        assert said.endswith("leave out --model\n") and "width" not in said

    def test_options_that_a_network_is_not_told_of_are_refused(self) -> None:
        message = "is for the built-in networks; mine:net is code of your own and is not told of it"
        for option in ("--width", "--tau", "--v-th", "--gamma"):
            assert f"{option} {message}" in refused("train", "--model", "mine:net", option, "0.5", code=2)
        assert "--tau is 1 for sew-resnet34" in refused("train", "--model", "sew-resnet34", "--tau", "0.5", code=2)
        Path("recipe.toml").write_text("tau = 0.75\n")
        assert f"--tau {message}" in refused("train", "--config", "recipe.toml", "--model", "mine:net", code=2)

    def test_training_says_when_nothing_of_an_own_network_can_be_exported(
        self, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "silent_net.py").write_text(LINEAR_NET)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr(preflight, "why_not", preflight._answer)  # in this process
        with pytest.warns(RuntimeWarning, match=f"silent_net:net: {NOT_EXPORTED} the network has no LIF or IF of tet"):
            output = printed("train", "--model", "silent_net:net", "--epochs", "1", "--T", "2", "--data", few)
        again = output.rpartition("next: tetdeploy ")[2].split()
        assert again[0] == "evaluate"
        printed(*again, "--data", few)

    def test_training_is_warned_of_what_export_will_refuse_and_not_changed(
        self, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "random_net.py").write_text(RANDOM_NET)
        Path("queue.py").write_text("raise SystemExit('a file in the folder that is called as one of Python is')")
        monkeypatch.syspath_prepend(str(tmp_path))
        options = ("train", "--data", str(few), "--model", "random_net:net", "--epochs", "2", "--T", "2")
        with monkeypatch.context() as patch:
            patch.setattr("tetdeploy.export.preflight.why_not", lambda *_: None)
            printed(*options, "--out", "unchecked")
        with pytest.warns(RuntimeWarning, match=f"{NOT_EXPORTED} the network draws random numbers in in") as warned:
            printed(*options, "--out", "checked", "--seeds", "0,1")
        assert len(warned) == 1
        assert capfd.readouterr().out.count("printed at import") == 1  # by the training, which is this process
        kept = [load_file(f"{name}/checkpoint.safetensors") for name in ("unchecked", "checked/seed-0")]
        assert kept[0].keys() == kept[1].keys()
        assert all(torch.equal(value, kept[1][name]) for name, value in kept[0].items())
        assert metrics(Path("unchecked")) == metrics(Path("checked/seed-0"))
        printed("train", "--resume", "unchecked", "--model", "random_net:net")  # nor is this warned
        printed(*options, "--ann", "--T", "1", "--out", "ann")  # and is not warned

    def test_a_check_that_ends_without_an_answer_says_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def run_other(command: list[str], **options: Any) -> Any:
            return run_process([sys.executable, "-c", "raise SystemExit(3)"], **options)

        run_process = subprocess.run
        monkeypatch.setattr(subprocess, "run", run_other)
        assert preflight.why_not(NetworkConfig("mine:net", 10, 1, (8, 8)), "direct", 4) is None

    def test_neurons_that_are_called_as_functions_are_seen(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "function_net.py").write_text(
            "from torch import nn\n"
            "from tetdeploy.neurons import lif\n"
            "class Net(nn.Linear):\n"
            "    def forward(self, x, T):\n"
            "        spikes = lif(x.flatten(1).expand(T, -1, -1))[0]\n"
            "        return super().forward(nn.functional.dropout(spikes, training=self.training))\n"
            "def net(num_classes, in_channels, image_size):\n"
            "    return Net(64, num_classes)\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        assert preflight._answer(NetworkConfig("function_net:net", 10, 1, (8, 8)), "direct", 4) is None

    @pytest.mark.parametrize(
        ("layer", "said"), [("t", "the network fails at T=6 on"), ("min(t, 3)", "mixes time outside its neurons")]
    )
    def test_a_bn_for_each_step_is_seen(
        self, layer: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        name = f"bn_net_{len(layer)}"
        (tmp_path / f"{name}.py").write_text(
            "import torch\n"
            "from torch import nn\n"
            "from tetdeploy.neurons import LIF\n"
            "class Net(nn.Module):\n"
            "    def __init__(self, num_classes):\n"
            "        super().__init__()\n"
            "        self.bns = nn.ModuleList(nn.BatchNorm1d(64) for _ in range(4))\n"
            "        self.lif, self.readout = LIF(), nn.Linear(64, num_classes)\n"
            "    def forward(self, x, T):\n"
            f"        current = [self.bns[{layer}](x.flatten(1)) for t in range(T)]\n"
            "        return self.readout(self.lif(torch.stack(current)))\n"
            "def net(num_classes, in_channels, image_size):\n"
            "    return Net(num_classes)\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        answer = preflight._answer(NetworkConfig(f"{name}:net", 10, 1, (8, 8)), "direct", 4)
        assert answer is not None and said in answer.reason and not answer.of_folding

    def test_a_network_that_cannot_be_traced_is_seen(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        branching = "frames.flatten(2) * (2 if frames.mean() > -1e9 else 1)"  # as it is for all noise
        (tmp_path / "branch_net.py").write_text(FRAMES_NET.replace("frames.flatten(2)", branching))
        monkeypatch.syspath_prepend(str(tmp_path))
        said = preflight._answer(NetworkConfig("branch_net:net", 10, 1, (8, 8)), "frames", 4)
        assert said is not None and "cannot trace the network: its forward makes a Python number of" in said.reason

    def test_a_bn_that_cannot_be_folded_is_told_and_the_next_step_goes_without(
        self, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "behind_net.py").write_text(
            "from torch import nn\n"
            "from tetdeploy.layers import OverTime\n"
            "from tetdeploy.neurons import LIF\n"
            "class Net(nn.Module):\n"
            "    def __init__(self, num_classes):\n"
            "        super().__init__()\n"
            "        self.first, self.lif = nn.Linear(64, 32), LIF()\n"
            "        self.bn, self.readout = OverTime(nn.BatchNorm1d(32)), nn.Linear(32, num_classes)\n"
            "    def forward(self, x, T):\n"
            "        return self.readout(self.bn(self.lif(self.first(x.flatten(1)).expand(T, -1, -1))))\n"
            "def net(num_classes, in_channels, image_size):\n"
            "    return Net(num_classes)\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        words = ("train", "--model", "behind_net:net", "--epochs", "1", "--T", "2", "--data", few)
        match = r": this network cannot be exported, except with --no-fold-bn, in float32: cannot fold BN 'bn\.0': what"
        with pytest.warns(RuntimeWarning, match=match):
            output = printed(*words)
        again = output.rpartition("next: tetdeploy ")[2].split()
        assert again == ["export", ANY, "--T", "6", "--no-fold-bn", "--model", "behind_net:net"]
        printed(*again, "--check", "9")

    def test_weights_of_half_precision_are_not_trained(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "half_net.py").write_text(
            "from torch import nn\n"
            "def net(num_classes, in_channels, image_size):\n"
            "    return nn.Linear(8, num_classes).bfloat16()\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr("tetdeploy.export.preflight.why_not", lambda *_: None)
        said = refused("train", "--model", "half_net:net")
        assert "half_net:net returns a network whose 'weight' is torch.bfloat16; weights that are trained must" in said

    def test_a_network_for_frames_is_checked_on_frames(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "frames_net.py").write_text(FRAMES_NET)
        monkeypatch.syspath_prepend(str(tmp_path))
        lacking = "the network fails at T=4: DefaultCPUAllocator: can't allocate memory"
        checked = Mock(return_value=preflight.Obstacle(lacking))
        monkeypatch.setattr("tetdeploy.export.preflight.why_not", checked)
        np.savez("frames.npz", images=np.zeros((20, 2, 1, 8, 8), np.uint8), labels=np.arange(20) % 2)
        options = ("train", "--data", "frames.npz", "--model", "frames_net:net", "--epochs", "1", "--T", "2")
        assert "cuda:99" in refused(*options, "--device", "cuda:99") and not checked.called
        printed(*options)  # without a warning: nothing was found out
        assert [call.args[1] for call in checked.call_args_list] == ["frames"]

    @pytest.mark.usefixtures("_not_asked")
    def test_an_own_network_is_resumed_only_when_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "cut_net.py").write_text(
            "import signal\n"
            "from torch import nn\n"
            "times = 1\n"
            "class Net(nn.Linear):\n"
            "    def forward(self, x, T):\n"
            "        for _ in range(times):\n"
            "            signal.raise_signal(signal.SIGINT)\n"
            "        return super().forward(x.flatten(1)).expand(T, -1, -1)\n"
            "def net(num_classes, in_channels, image_size):\n"
            "    return Net(64, num_classes)\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        own = ("--model", "cut_net:net")
        for options in ((), ("--seeds", "0,1")):
            again = f"train --resume runs/own{len(options)}"
            output = printed("train", *own, "--epochs", "2", *options, "--out", again.split()[-1], code=130)
            assert output.endswith(f"go on with: tetdeploy {again} --model cut_net:net\n")
            del sys.modules["cut_net"]
            assert "holds a network of your own: pass --model cut_net:net" in refused(*again.split())
            assert "cut_net" not in sys.modules
            if options:
                assert "--seed and --seeds both decide" in refused(*again.split(), *own, "--seed", "1", code=2)
            printed(*again.split(), *own, code=130)
        sys.modules["cut_net"].times = 2
        output = printed(*again.split(), *own, code=130)
        assert f"go on from what was saved last with: tetdeploy {again} --model cut_net:net\n" in output

    @pytest.mark.usefixtures("_not_asked")
    def test_an_own_network_whose_code_has_changed_is_told(
        self, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        code = Path("tau_net.py")
        code.write_text(LINEAR_NET)
        monkeypatch.syspath_prepend(str(tmp_path))
        own, short = ("--model", "tau_net:net"), ("--data", str(few), "--epochs", "1", "--T", "1")
        printed("train", *own, *short, "--seeds", "0", "--out", "own")
        begun, before = "own/seed-0", sha256_of(code)
        assert json.loads(Path(begun, "config.json").read_text())["code_sha256"] == before
        assert read_metadata(begun)["provenance"]["code_sha256"] == before
        commands = [
            ("evaluate", begun, "--data", str(few), "--limit", "9", "--T", "1"),
            ("train", "--resume", "own"),
            ("train", "--init", begun, *short, "--out", "second"),
        ]
        printed(*commands[0], *own)  # without a warning
        code.write_text(code.read_text() + "# another tau\n")
        printed(*commands[0], *own)  # this process has the earlier code
        for command in commands:
            sys.modules.pop("tau_net")
            said = f"tau_net.py has changed since the training of {begun}: its results may be of another network"
            with pytest.warns(RuntimeWarning, match=said) as told:
                printed(*command, *own)
            assert sum("has changed" in str(warning.message) for warning in told) == 1
        assert read_metadata("second")["provenance"]["code_sha256"] == sha256_of(code) != before
        sys.modules.pop("tau_net")

    @pytest.mark.usefixtures("_not_asked")
    def test_what_an_own_network_draws_and_no_state_dict_holds_is_drawn_as_for_the_training(
        self, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Path("drawn_net.py").write_text(DRAWN_NET)
        monkeypatch.syspath_prepend(str(tmp_path))
        own, options = ("--model", "drawn_net:net"), ("--data", str(few), "--epochs", "1", "--T", "1", "--seed", "5")
        printed("train", *own, *options, "--out", "own")
        with torch.random.fork_rng():
            torch.manual_seed(5)
            mask = sys.modules["drawn_net"].net(10, 1, (8, 8)).mask
        before = torch.get_rng_state()
        assert torch.equal(load_classifier(read_checkpoint("own"), own[1]).network.mask, mask)
        assert torch.equal(torch.get_rng_state(), before)
        printed("evaluate", "own", *own, "--split", "validation", "--T", "1", "--json", "e.json")
        [measured] = json.loads(Path("e.json").read_text())["runs"]
        assert measured["accuracy"][0]["accuracy"] == pytest.approx(metrics(Path("own"))[0]["val_accuracy"])
        sys.modules.pop("drawn_net")

    def test_resume_goes_on_to_the_weights_of_an_uninterrupted_run(
        self, few: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        options = ["--data", str(few), "--epochs", "3", "--width", "0.25", "--T", "2"]
        printed("train", *options, "--out", "whole")
        shown = Progress.epoch

        def cut_after_the_first(self: Progress, record: dict[str, Any]) -> None:
            shown(self, record)
            if record["epoch"] == 1:
                signal.raise_signal(signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(Progress, "epoch", cut_after_the_first)
            rest = printed("train", *options, "--out", "cut", code=130)
        assert "Traceback" not in rest and "epoch 2/" not in rest
        assert "tetdeploy train --resume cut" in rest
        printed("train", "--resume", "cut")
        assert (
            Path("cut/checkpoint.safetensors").read_bytes()[-10_000:]
            == Path("whole/checkpoint.safetensors").read_bytes()[-10_000:]
        )
        metrics = [
            [json.loads(line) for line in Path(f, "metrics.jsonl").read_text().splitlines()] for f in ("cut", "whole")
        ]
        assert [row["train_loss"] for row in metrics[0]] == [row["train_loss"] for row in metrics[1]]

    def test_a_finished_run_whose_weights_are_gone_names_no_next_step(self, workplace: Path) -> None:
        Path(RUN, "checkpoint.safetensors").unlink()
        with pytest.warns(RuntimeWarning, match="is gone"):
            said = printed("train", "--resume", RUN)
        assert re.search(r"best val .* at epoch \d: gone", said) and "->" not in said and "next:" not in said

    def test_resume_refuses_a_config_that_lacks_a_setting(self, workplace: Path) -> None:
        settings = json.loads(Path(RUN, "config.json").read_text())
        del settings["network"]["tau"], settings["training"]["clip"]
        Path(RUN, "config.json").write_text(json.dumps(settings))
        message = "was started with other settings: network.tau: (none) -> 0.5; training.clip: (none) -> 0.0; resume"
        assert message in " ".join(refused("train", "--resume", RUN).split())

    @pytest.mark.parametrize("seeds", [(), ("--seeds", "0,1")], ids=["one", "seeds"])
    def test_a_folder_with_brackets_is_no_markup(self, seeds: tuple[str, ...], tmp_path: Path) -> None:
        output = printed("train", "--epochs", "1", "--width", "0.25", *seeds, "--out", "runs/[red]a[/x]")
        assert output.count("[red]a[/x]") == (4 if seeds else 2)  # where it lies, and what comes next

    def test_init_starts_from_given_weights(self, workplace: Path) -> None:
        printed(
            "train",
            "--init",
            "runs/digits-convsnn",
            "--width",
            "0.5",
            "--epochs",
            "1",
            "--warmup-epochs",
            "0",
            "--lr",
            "1e-9",
            "--json",
            "t.json",
        )
        assert json.loads(Path("t.json").read_text())["val_accuracy"] > 0.8
        message = refused("train", "--init", RUN, "--width", "1", "--epochs", "1")
        assert message == f"Error: {RUN} has width 0.5, not 1.0, which its weights do not fit: leave out --width\n"
        message = refused("train", "--init", RUN, "--width", "1", "--model", "resnet19", "--epochs", "1")
        assert "has model convsnn, not resnet19, and width 0.5, not 1.0, which" in message
        assert message.endswith("leave out --model and --width\n")
        np.savez("large.npz", images=np.zeros((4, 16, 16), np.uint8), labels=np.array([0, 0, 1, 1]))
        message = refused("train", "--init", RUN, "--data", "large.npz", "--epochs", "1")
        assert f"{RUN} takes images [1, 8, 8] and large.npz has [1, 16, 16], which its weights do not fit; " in message
        Path("recipe.toml").write_text('model = "resnet19"\nepochs = 1\n')
        message = refused("train", "--config", "recipe.toml", "--init", RUN, "--width", "1")
        assert message.endswith("leave out model in the recipe and --width\n")

    def test_a_checkpoint_that_is_replaced_while_it_is_used(
        self, workplace: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As a run that still trains does where an epoch is better."""
        file, load_parts = Path(RUN, "checkpoint.safetensors"), data.load_parts

        def replaced(*arguments: Any, **options: Any) -> Any:
            write_tensors(file, {name: value * 2 for name, value in load_file(file).items()}, read_content(file))
            return load_parts(*arguments, **options)

        for module in ("tetdeploy.data", "tetdeploy.export.trained"):
            monkeypatch.setattr(f"{module}.load_parts", replaced)
        read = Mock(wraps=checkpoint.read_checkpoint)  # once, or the weights may be others than the SHA-256 says
        monkeypatch.setattr(checkpoint, "read_checkpoint", read)
        before = sha256_of(file)
        printed("export", RUN, "--T", "2", "--check", "9", "-o", "a.onnx")
        assert read.call_count == 1
        assert Engine("a.onnx").metadata["source"]["checkpoint_sha256"] == before != sha256_of(file)

        before = sha256_of(file)
        printed("train", "--init", RUN, "--epochs", "1", "--out", "runs/second")
        init = json.loads(Path("runs/second/config.json").read_text())["init"]
        assert init == {"path": RUN, "checkpoint_sha256": before} and before != sha256_of(file)
        assert read.call_count == 2

    @pytest.mark.parametrize(
        ("command", "work"),
        [
            ("train --epochs 1 --out runs/second --init", "tetdeploy.train.training.prepare"),
            ("export", "tetdeploy.export.export_model"),
            pytest.param("export --format nir", "tetdeploy.export.nir_format.export_nir", marks=needs("nir")),
            ("evaluate", "tetdeploy.train.validation.classes_by_step"),
            ("landscape", "tetdeploy.train.landscape.measure_landscape"),
        ],
    )
    def test_the_tensors_of_a_checkpoint_are_not_kept_after_the_network_has_them(
        self, workplace: Path, command: str, work: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """They are a copy, and mapped, which on Windows keeps a training from putting others in their place."""
        tensors, read = list[weakref.ref[torch.Tensor]](), checkpoint.read_checkpoint

        def watched(path: Path | str) -> Checkpoint:
            found = read(path)
            tensors.extend(map(weakref.ref, found.tensors.values()))
            return found

        def at_work(*_: Any, **__: Any) -> None:
            kept = sum(tensor() is not None for tensor in tensors)
            raise ValueError(f"{kept} of {len(tensors)} tensors")

        monkeypatch.setattr(checkpoint, "read_checkpoint", watched)
        monkeypatch.setattr(work, at_work)
        assert re.fullmatch(r"Error: 0 of [1-9]\d* tensors\n", refused(*command.split(), RUN).splitlines(True)[-1])

    def test_init_keeps_the_network_that_the_weights_are_of(self, workplace: Path) -> None:
        short = ("--width", "0.25", "--epochs", "1", "--warmup-epochs", "0")
        printed("train", *short, "--v-th", "0.5", "--tau", "0.75", "--out", "runs/first")
        output = printed("train", *short[2:], "--init", "runs/first", "--tau", "0.25", "--out", "runs/second")
        assert "width 0.25, as in runs/first" in output and "parameters, from runs/first " in output
        settings = json.loads(Path("runs/second/config.json").read_text())
        network, phi = settings["network"], settings["training"]["phi"]
        assert (network["width"], network["tau"], network["v_th"], phi) == (0.25, 0.25, 0.5, 0.5)

    def test_init_for_other_classes_starts_with_a_new_readout(self, workplace: Path) -> None:
        images = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
        np.savez("three.npz", images=images, labels=np.arange(60) % 3)
        options = ("--init", RUN, "--data", "three.npz", "--epochs", "1")
        said = " ".join(printed("train", *options).split())
        assert f"{RUN} knows 10 classes, three.npz has 3: readout.2.weight, readout.2.bias start anew" in said
        assert "of 10 classes; three.npz has" in refused("train", "--qat", *options)

    def test_classes_in_another_order_are_told_and_refused_for_fine_tuning(self, workplace: Path) -> None:
        images = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
        np.savez("turned.npz", images=images, labels=np.arange(60) % 10, class_names=[str(9 - k) for k in range(10)])
        options = ("--init", RUN, "--data", "turned.npz", "--epochs", "1", "--warmup-epochs", "0")
        means = f"label 0 means 9 to it, and 0 to {RUN}"
        said = " ".join(printed("train", *options).split())
        assert (
            f"{means}; is this the data it was trained on? If not, the readout begins with the weights of other" in said
        )
        assert means in refused("train", "--qat", *options)

    def test_where_no_data_are_named_they_are_those_of_the_weights_or_of_the_teacher(self, workplace: Path) -> None:
        images = np.random.default_rng(0).integers(0, 256, (60, 3, 16, 16), dtype=np.uint8)
        np.savez("colour.npz", images=images, labels=np.arange(60) % 3)
        short = ("--epochs", "1", "--width", "0.25")
        printed("train", *short, "--data", "colour.npz", "--ann", "--out", "runs/ann")
        output = printed("train", *short, "--distill", "runs/ann", "--out", "runs/taught")
        assert "data colour.npz, as in runs/ann" in " ".join(output.split())
        output = printed("train", *short[:2], "--init", "runs/taught", "--out", "runs/further")
        assert "data colour.npz, as in runs/taught" in " ".join(output.split())
        assert "image_shape" in refused("train", *short, "--data", "digits", "--distill", "runs/ann")


class TestBadInput:
    @pytest.mark.parametrize(
        "command",
        [
            ("export", "nothing"),
            ("sweep", "nothing.onnx"),
            ("predict", "nothing.onnx", "a.png"),
            ("train", "--resume", "nothing"),
            ("train", "--init", "nothing"),
            ("train", "--data", "folder:nothing"),
            ("train", "--data", "nothing.npz"),
        ],
    )
    def test_wrong_path(self, command: tuple[str, ...]) -> None:
        assert "nothing" in refused(*command)

    @pytest.mark.parametrize("seeds", [(), ("--seeds", "0,1")], ids=["one", "seeds"])
    def test_a_run_that_does_not_exist_is_not_resumed(self, seeds: tuple[str, ...]) -> None:
        message = "Error: nothing does not exist; name a run folder, or train without --resume\n"
        assert refused("train", "--resume", "nothing", *seeds) == message

    def test_a_run_is_resumed_in_its_own_folder(self) -> None:
        said = refused("train", "--resume", "r/a", "--out", "r/b", code=2)
        assert "--resume goes on in the run's own folder, r/a, and --out names r/b: leave it out" in said
        assert "r/a does not exist" in refused("train", "--resume", "r/a", "--out", "./r/a")  # the same one

    def test_an_empty_run_is_not_the_newest(self, workplace: Path) -> None:
        said = refused("train", "--resume", "", code=2)
        assert said.endswith("it is empty; name a run, or give --resume alone to go on with the newest\n")

    @pytest.mark.parametrize("command", [("export",), ("sweep",), ("train", "--resume")])
    def test_nothing_there_yet(self, command: tuple[str, ...]) -> None:
        assert "tetdeploy " in refused(*command)

    def test_a_bare_resume_takes_the_newest_run_whether_it_has_a_checkpoint_or_not(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("runs/cut").mkdir(parents=True)
        Path("runs/latest").symlink_to("cut")
        Path("runs/done").mkdir()
        Path("runs/done/checkpoint.safetensors").touch()
        assert "runs/cut" in refused("train", "--resume")
        with pytest.warns(RuntimeWarning, match="taking runs/done"):
            assert "runs/done" in refused("export")

    def test_unknown_names_list_the_choices(self, workplace: Path) -> None:
        assert "convsnn, resnet19" in refused("train", "--model", "resnet1999")
        assert "digits, fashion-mnist, cifar10, cifar100" in refused("train", "--data", "mnist")
        assert "unrolled, dynamic, step" in refused("export", "--layout", "rolled")
        assert "cpu, cuda, tensorrt" in refused("sweep", "--device", "tpu")
        assert "adamw, sgd" in refused("train", "--optimizer", "adam")

    @pytest.mark.parametrize("T", ["0", "-1", "1025", "two"])
    def test_bad_T(self, T: str, workplace: Path) -> None:
        before = snapshot(workplace)
        refused("export", "--T", T, code=2)
        refused("predict", MODEL, "a.png", "--T", T, code=2)
        refused("sweep", "--T", T, code=2)
        refused("train", "--T", T, code=2)
        assert snapshot(workplace) == before

    def test_quickstart_goes_the_whole_path(self, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Beside another run and its model, begun later, which none of its steps may take for its own."""
        smaller = {"epochs": 2, "width": 0.5}
        for parameter in main.commands["train"].params:
            if parameter.name in smaller:
                monkeypatch.setattr(parameter, "default", smaller[parameter.name])
        folder, shown, begun = Path(f"{RUN}-2"), console.print, list[str]()

        def tell(text: Any = "", **options: Any) -> None:
            if "tetdeploy export --T 8" in str(text):
                begun.append("export")
                Path("runs/latest").unlink()
                Path("runs/latest").symlink_to(Path(RUN).name)
            if "tetdeploy sweep --T" in str(text):
                begun.append("sweep")
                later = time.time() + 60
                os.utime(MODEL, (later, later))
            shown(text, **options)

        monkeypatch.setattr(console, "print", tell)
        output = printed("quickstart", "--seed", "7", "--json", "result.json")
        assert begun == ["export", "sweep"]
        assert output.splitlines()[-1] == f"the model: {folder}/model-T8.onnx"
        assert Path(folder, "model-T8.onnx").exists()
        training = json.loads(Path(folder, "config.json").read_text())["training"]
        assert (training["seed"], training["epochs"]) == (7, 2)
        assert not Path(folder, "model-T8.sweep.json").exists()
        rows = json.loads(Path("result.json").read_text())["rows"]
        assert [row["T"] for row in rows] == [*range(1, 9)]
        assert rows[3]["accuracy"] > 0.7

    def test_quickstart_refuses_a_bad_switch_before_it_trains(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TETDEPLOY_NATIVE", "yes")
        assert refused("quickstart").startswith("Error: TETDEPLOY_NATIVE is 'yes'; it must be 0,")
        monkeypatch.delenv("TETDEPLOY_NATIVE")
        Path("text").touch()
        assert "choose another with --json" in refused("quickstart", "--json", "text/q.json")
        assert not Path("runs").exists()

    def test_picojoules_that_cannot_be(self, workplace: Path) -> None:
        assert "ac_pj must be a positive number of picojoules, at most a joule, got 0" in refused(
            "sweep", "--ac-pj", "0"
        )
        assert "mac_pj must be at least ac_pj=0.9; got 0.5" in refused("sweep", "--mac-pj", "0.5")
        assert "'paper', 'exact', 'once'" in refused("sweep", "--energy", "total", code=2)

    def test_T_beyond_an_unrolled_graph_says_how_to_export_again(self, workplace: Path) -> None:
        message = refused("sweep", "--T", "1:8")
        assert "cannot run T=8" in message
        assert "--T 8" in message
        assert "--layout dynamic" in message

    def test_wrong_image_size_and_kind(self, workplace: Path) -> None:
        Image.fromarray(np.zeros((9, 8), np.uint8)).save("a.png")
        assert "--resize" in refused("predict", MODEL, "a.png")
        Path("b.png").write_text("no image")
        assert "cannot be read as an image" in refused("predict", MODEL, "b.png")
        assert "cannot be read as an image: Is a directory; give a png" in refused("predict", MODEL, ".")
        refused("predict", MODEL, "a.png", "--T", "1000000000", code=2)
        assert "no image at c.png" in refused("predict", MODEL, "c.png")

    def test_16_bits_a_channel(self, workplace: Path) -> None:
        for kind, pixels in (("grey", "I;16"), ("RGB", "RGB;16"), ("RGBA", "RGBA;16")):
            write_deep_png(Path("deep.png"), kind, width=8, height=8)
            assert f"pixel format {pixels} is not 8 bits a channel" in refused("predict", MODEL, "deep.png")

    def test_an_image_too_large_for_pillow(self, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        Image.fromarray(np.zeros((8, 8), np.uint8)).save("bomb.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8)
        assert "bomb.png cannot be read as an image: Image size (64 pixels)" in refused("predict", MODEL, "bomb.png")

    def test_data_that_do_not_fit_the_model(self, workplace: Path) -> None:
        np.savez("size.npz", images=np.zeros((2, 1, 9, 9), np.uint8), labels=np.zeros(2, np.int64))
        assert "[N, 1, 8, 8]" in refused("sweep", "--data", "size.npz")
        np.savez("classes.npz", images=np.zeros((2, 1, 8, 8), np.uint8), labels=np.array([0, 11]))
        assert "10 classes" in refused("sweep", "--data", "classes.npz")
        np.savez("floats.npz", images=np.full((2, 1, 8, 8), np.nan), labels=np.zeros(2, np.int64))
        assert "uint8" in refused("sweep", "--data", "floats.npz")

    def test_nan_in_frames(self, workplace: Path) -> None:
        np.savez("frames.npz", images=np.zeros((30, 4, 1, 8, 8), np.float32), labels=np.zeros(30, np.int64))
        arguments = (
            "export",
            "--encoding",
            "frames",
            "--no-normalize",
            "--data",
            "frames.npz",
            "--check",
            "10",
            "-o",
            "f.onnx",
        )
        printed(*arguments)
        np.savez("nan.npz", images=np.full((2, 4, 1, 8, 8), np.nan, np.float32), labels=np.zeros(2, np.int64))
        assert "NaN" in refused("sweep", "f.onnx", "--data", "nan.npz")

    def test_frames_from_images_and_the_other_way_round(self, workplace: Path) -> None:
        np.savez("frames.npz", images=np.zeros((30, 4, 1, 8, 8), np.uint8), labels=np.zeros(30, np.int64))
        needs = "--encoding frames needs recordings (an event set, or a .npz of frames), and digits has images: "
        said = " ".join(refused("export", "--encoding", "frames").split())
        assert f"{needs}name others with --data, or leave out --encoding" in said
        said = " ".join(refused("export", "--data", "frames.npz").split())
        assert "--encoding direct needs images, and frames.npz has recordings: name others with --data, or" in said
        assert said.endswith("take --encoding frames")

    def test_checkpoints_that_are_none(self, workplace: Path) -> None:
        file = Path("runs/digits-convsnn/checkpoint.safetensors")
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        assert "truncated" in refused("export")
        file.write_bytes(b"\x80\x04\x95\x10\x00\x00\x00pickle of somebody")
        assert "unpickling can run code" in refused("export")
        file.write_bytes(b"PK\x03\x04torch.save")
        assert "not opened" in refused("export")
        import torch
        from safetensors.torch import save_file

        save_file({"weight": torch.zeros(3)}, file)
        assert "not" in refused("export")

    def test_onnx_files_that_are_not_ours(self, workplace: Path) -> None:
        import onnx
        from onnx import TensorProto, helper

        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
        graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
        onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), "foreign.onnx")
        assert "not one that tetdeploy exported" in refused("sweep", "foreign.onnx")
        Path("text.onnx").write_text("not onnx at all")
        assert "cannot be loaded" in refused("predict", "text.onnx", "a.png")
        whole = Path(MODEL).read_bytes()
        Path("half.onnx").write_bytes(whole[: len(whole) // 2])
        assert "half.onnx" in refused("sweep", "half.onnx")
        assert "folder" in refused("sweep", "runs")

    @pytest.mark.parametrize(
        ("missing", "command", "extra"),
        [
            ("torch", ("export",), "train"),
            ("onnxruntime", ("sweep",), "cpu"),
            ("sklearn", ("train",), "digits"),
            ("sklearn", ("sweep",), "digits"),
            ("matplotlib", ("sweep", "--plot", "p.png"), "report"),
            ("matplotlib", ("report",), "report"),
            ("PIL", ("predict", MODEL, "a.png"), "cpu"),
            ("safetensors", ("train",), "train"),
            ("filelock", ("train",), "train"),
            *((package, ("serve", MODEL), "serve") for package in ("pydantic", "tritonclient", "uvicorn", "grpc")),
            ("yaml", ("export", "--format", "kserve", "--storage-uri", "s3://m"), "cluster"),
            *(
                (package, ("export", "--format", "triton-repository"), "cluster")
                for package in ("tritonclient", "grpc")
            ),
            ("tensorrt_rtx", ("build", MODEL, "--package", "tensorrt-rtx"), "rtx"),
        ],
    )
    def test_a_missing_extra_names_the_line_that_installs_it(
        self, missing: str, command: tuple[str, ...], extra: str, workplace: Path
    ) -> None:
        script = f"import sys; sys.modules[{missing!r}] = None\nfrom tetdeploy.cli import main\nmain()"
        done = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 1, done.stderr
        assert f"pip install 'tetdeploy[{extra}]'" in done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout == ""  # before any work

    def test_a_sweep_goes_without_its_plot(self, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        output = printed("sweep", MODEL, "--limit", "20")
        assert "no plot: " in output and "pip install 'tetdeploy[report]'" in output

    def test_a_sweep_whose_plot_cannot_be_written_says_that_the_result_is(
        self, workplace: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        full = OSError(errno.ENOSPC, "No space left on device", "s.png")
        monkeypatch.setattr("tetdeploy.report.sweep_plot.plot_sweep", Mock(side_effect=full))
        said = "Error: s.json is written, but not s.png: No space left on device\n"
        assert refused("sweep", MODEL, "--limit", "20", "--json", "s.json") == said
        assert json.loads(Path("s.json").read_text())["num_samples"] == 20

    def test_both_onnxruntimes(self, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(metadata, "version", lambda name: "1.0")
        assert "pip uninstall -y onnxruntime onnxruntime-gpu" in refused("sweep")

    def test_output_that_cannot_be_written_leaves_all_as_it_was(self, workplace: Path) -> None:
        Path("file").write_text("in the way")
        before = snapshot(workplace)
        assert "file/m.onnx" in refused("export", "--check", "0", "-o", "file/m.onnx")
        assert "file/s.json" in refused("sweep", "--json", "file/s.json", "--plot", "file/s.png")
        assert "file/run" in refused("train", "--out", "file/run", "--epochs", "1")
        assert snapshot(workplace) == before

    def test_a_run_that_does_not_begin_leaves_no_folder(self, workplace: Path) -> None:
        before = sorted(workplace.rglob("*"))
        for where in ((), ("--runs", "new/runs"), ("--out", "new/run")):
            assert "cuda:99 is not there" in refused("train", "--device", "cuda:99", *where)
        assert "do not fit" in refused("train", "--init", RUN, "--width", "0.25")
        assert sorted(workplace.rglob("*")) == before

    @pytest.mark.parametrize(
        "command",
        [
            *((name, MODEL, "--json") for name in ("sweep", "bench", "validate", "inspect", "build")),
            *(("sweep", MODEL, "--plot"), ("predict", MODEL, "a.png", "--json")),
            *((name, "--json") for name in ("train", "export", "landscape")),
            ("evaluate", "--predictions"),
            *(("report", RUN, "-o"), ("report", RUN, "--markdown"), ("landscape", RUN, "-o"), ("landscape", "--plot")),
            ("export", "-o"),
            pytest.param(("export", "--format", "triton-repository", "-o"), marks=needs("tritonclient")),
            ("import", "theirs.pth", "--arch", "resnet19", "-o"),
        ],
    )
    def test_an_output_that_cannot_be_written_is_all_that_is_said(
        self, command: tuple[str, ...], workplace: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And before any work: nothing is run or trained, and no other file is written."""
        Path("file").touch()
        before = snapshot(workplace)
        for name in ("export.export_model", "train.train", "engine.Engine.run", "foreign.import_to_checkpoint"):
            monkeypatch.setattr(f"tetdeploy.{name}", self.works)
        file = "file/a.npz" if command[0] == "landscape" else "file/a.onnx"
        message = refused(*command, file).splitlines()[-1]
        option = "--out" if command[-1] == "-o" else command[-1]
        said = rf"Error: cannot write {file}\S*: Not a directory; choose another with {option}"
        assert re.fullmatch(said, message), message
        assert snapshot(workplace) == before

    @pytest.mark.parametrize(
        "command",
        [
            *(
                ("export", "-o", f"{RUN}/{name}")
                for name in ("checkpoint.safetensors", "last.safetensors", "config.json")
            ),
            pytest.param(("export", "--format", "nir", "-o", f"{RUN}/checkpoint.safetensors"), marks=needs("nir")),
            ("export", "-o", "link.onnx"),
            ("bench", MODEL, "--json", f"{RUN}/checkpoint.safetensors"),
            ("sweep", MODEL, "--plot", MODEL),
            ("report", RUN, "-o", MODEL),
            ("report", RUN, "-o", f"{RUN}/config.json"),
            *((command, MODEL, "--json", f"{RUN}/model-T3.reference.npz") for command in ("validate", "inspect")),
            ("report", RUN, "--markdown", f"{RUN}/last.safetensors"),
            ("report", RUN, "--markdown", f"{RUN}/config.json"),
            ("evaluate", RUN, "--predictions", f"{RUN}/config.json"),
            ("evaluate", RUN, "--predictions", f"{RUN}/model-T3.reference.npz"),
            *((command, MODEL, "--json", f"{RUN}/config.json") for command in ("sweep", "inspect", "bench")),
            ("export", RUN, "-o", "new.onnx", "--json", f"{RUN}/metrics.jsonl"),
            ("evaluate", RUN, "--json", "link.json"),
            ("train", "--resume", RUN, "--json", f"{RUN}/config.json"),
            *(("inspect", MODEL, "--json", f"{name}.json") for name in ("m.exit", "m.engine", "index", "summary")),
        ],
    )
    def test_an_output_does_not_take_the_place_of_something_else(
        self, command: tuple[str, ...], workplace: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Path(f"{RUN}/last.safetensors").touch()
        for name in ("link.onnx", "link.json"):
            Path(name).symlink_to(f"{RUN}/config.json")
        Path("m.exit.json").write_text('{"kind": "exit"}')
        Path("m.engine.json").write_text('{"graph_sha256": "", "metadata": {}}')
        Path("index.json").write_text('{"metadata": {}, "weight_map": {}}')
        Path("summary.json").write_text('{"recipe": null, "mean_val_accuracy": 0.5}')
        before = snapshot(workplace)
        for name in ("export.export_model", "engine.Engine.run"):
            monkeypatch.setattr(f"tetdeploy.{name}", self.works)
        message = refused(*command).replace("\n", " ")
        assert re.search("(it is there, and something else|its name must end in .*); choose another with --", message)
        assert snapshot(workplace) == before

    @pytest.mark.parametrize(
        ("command", "message"),
        [
            *(
                (command, "cannot write loop.onnx: it is a link that leads to itself; choose another with --")
                for command in (("export", "-o", "loop.onnx"), ("bench", MODEL, "--json", "loop.onnx"))
            ),
            (("sweep", MODEL, "--data", "loop.npz"), "no file loop.npz; give the path of a .npz"),
            (
                ("sweep", MODEL, "--data", "~no-such-user/x.npz"),
                "Could not determine home directory; give another path",
            ),
        ],
    )
    def test_a_link_that_leads_to_itself_or_a_home_that_is_not_there_is_refused(
        self, command: tuple[str, ...], message: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("loop.onnx", "loop.npz"):
            Path(name).symlink_to(name)
        for name in ("export.export_model", "engine.Engine.run"):
            monkeypatch.setattr(f"tetdeploy.{name}", self.works)
        assert message in refused(*command).replace("\n", " ")

    @pytest.mark.parametrize("name", ["nodir/", "model.json"])
    @pytest.mark.parametrize("file_format", ["onnx", pytest.param("nir", marks=needs("nir"))])
    def test_an_export_is_called_as_what_it_is(
        self, file_format: str, name: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("tetdeploy.export.export_model", self.works)
        message = refused("export", "--format", file_format, "-o", name)
        assert f"{name.rstrip('/')}: its name must end in .{file_format}; choose another with --out" in message

    @pytest.mark.parametrize(
        ("command", "result", "begins"),
        [(("sweep", MODEL, "--json"), "photo.json", "{"), (("landscape", RUN, "-o"), "photo.npz", "PK")],
    )
    def test_a_picture_without_the_result_is_no_plot_of_it(
        self, command: tuple[str, ...], result: str, begins: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("engine.Engine.run_with", "train.landscape.measure_landscape"):
            monkeypatch.setattr(f"tetdeploy.{name}", self.works)
        Path("photo.png").write_bytes(b"a cat")
        said = f"photo.png: it is there without {result}, and so something else; choose another with --plot"
        assert said in refused(*command, result).replace("\n", " ")
        Path(result).write_text(begins)
        assert isinstance(invoke(*command, result).exception, AssertionError)  # it began to work
        Path(f"{RUN}/model-T3.sweep.json").unlink(missing_ok=True)
        Path(f"{RUN}/model-T3.sweep.png").touch()  # a name that nobody chose
        assert isinstance(invoke("sweep", MODEL).exception, AssertionError)

    @pytest.mark.parametrize("command", [("sweep", MODEL, "--plot", "s.x"), ("landscape", RUN, "--plot", "l")])
    def test_a_plot_without_a_format_is_refused_before_the_work(
        self, command: tuple[str, ...], workplace: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("engine.Engine.run_with", "train.landscape.measure_landscape"):
            monkeypatch.setattr(f"tetdeploy.{name}", self.works)
        assert "is no plot's name: it must end in one of" in refused(*command).replace("\n", " ")

    @pytest.mark.parametrize(
        ("command", "first", "second"),
        [
            (("report", RUN), "--out", "--markdown"),
            (("sweep", MODEL), "--json", "--plot"),
            (("evaluate", RUN), "--json", "--predictions"),
        ],
    )
    def test_two_outputs_are_two_files(
        self, command: tuple[str, ...], first: str, second: str, workplace: Path
    ) -> None:
        said = refused(*command, first, "r.svg", second, f"{workplace}/r.svg", code=2).replace("\n", "")
        assert f"{first} and {second} would be one file" in said
        assert f"choose another with {first} or {second}" in said
        assert not Path("r.svg").exists()

    @pytest.mark.parametrize(
        ("command", "file"),
        [
            (("export", RUN, "-o", "x.onnx"), "x.onnx"),
            (("export", RUN, "-o", "x.onnx"), "x.reference.npz"),
            (("export", RUN, "-o", "y.onnx"), "link.json"),
            (("export", RUN, "--format", "nir"), f"{RUN}/model.nir"),
            (("train", "--out", "new"), "new/checkpoint.safetensors"),
            (("import", "x.pth", "--arch", "resnet19", "-o", "new"), "new/checkpoint.safetensors"),
            (("build", MODEL, "-o", "b.engine"), "b.engine"),
        ],
    )
    def test_a_result_has_no_name_of_what_the_command_writes(
        self, command: tuple[str, ...], file: str, workplace: Path
    ) -> None:
        Path("link.json").symlink_to("y.onnx")
        before = snapshot(workplace)
        said = f"cannot write {file}: JSON has no name in {Path(os.path.realpath(file)).suffix}; choose"
        assert said in refused(*command, "--json", file).replace("\n", " ")
        assert snapshot(workplace) == before

    @pytest.mark.parametrize(
        ("command", "file", "other"),
        [
            (("train", "--out", "new"), "new/config.json", "config.json of new"),
            (("train", "--out", "new"), "new/metrics.jsonl", "metrics.jsonl of new"),
            (("train", "--out", "new", "--seeds", "0,1"), "new/summary.json", "summary.json of new"),
            (("train", "--out", "new", "--seeds", "0,1"), "new/seed-1/config.json", "config.json of new/seed-1"),
            (("train",), f"{RUN}-2/config.json", f"config.json of {RUN}-2"),
            (("train", "--out", "new", "--runs", "others"), "others/latest", "the link to the newest run"),
            *(
                pytest.param(command, file, other, marks=needs("onnx"))
                for command, file, other in (
                    (("build", MODEL), f"{RUN}/model-T3.engine.json", "the manifest"),
                    (("build", MODEL, "--timing-cache", "t.json"), "t.json", "--timing-cache"),
                )
            ),
            pytest.param(
                ("export", RUN, "--format", "kserve", "--storage-uri", "s3://m"),
                f"{RUN}/kserve.yaml",
                "--out",
                marks=[needs("onnx"), needs("yaml")],
            ),
            pytest.param(
                ("export", RUN, "--format", "triton-repository", "-o", "models", "--name", "a"),
                "models/a-stream/labels.txt",
                "a-stream/labels.txt",
                marks=[needs("onnx"), needs("tritonclient")],
            ),
        ],
    )
    def test_a_result_does_not_take_the_place_of_another(
        self,
        command: tuple[str, ...],
        file: str,
        other: str,
        workplace: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        for name in ("export.export_model", "train.train", "train.train_seeds"):
            monkeypatch.setattr(f"tetdeploy.{name}", self.works)
        before = snapshot(workplace)
        said = " ".join(refused(*command, "--json", file, code=2).split())
        assert f"{other} and --json would be one file, {file}; choose another with" in said
        assert said.endswith("--json")
        assert snapshot(workplace) == before

    def test_a_result_may_lie_in_the_run(self, workplace: Path) -> None:
        printed("export", RUN, "--check", "0", "--json", f"{RUN}/any.json")
        assert json.loads(Path(f"{RUN}/any.json").read_text())["path"].startswith(RUN)

    @pytest.mark.parametrize(
        "command", [("sweep", MODEL), ("validate", MODEL), ("evaluate", RUN), ("inspect", MODEL), ("train",)]
    )
    def test_a_result_does_not_go_to_the_terminal(self, command: tuple[str, ...], workplace: Path) -> None:
        for terminal in ("-", "/dev/stdout", "/dev/fd/2"):
            said = refused(*command, "--json", terminal).replace("\n", " ")
            why = "a result goes to a file, not to the terminal; choose another with --json"
            assert f"cannot write {terminal}: {why}" in said
        assert not Path("-").exists()

    @pytest.mark.parametrize(
        ("command", "option"),
        [
            (("train",), "--out"),
            (("train",), "--runs"),
            (("export", "--format", "triton-repository"), "--out"),
        ],
    )
    def test_an_empty_output_is_not_the_current_folder(self, command: tuple[str, ...], option: str) -> None:
        assert "it is empty; name a place, or leave the option out" in refused(*command, option, "", code=2)

    def test_an_empty_output_that_must_be_given_is_to_be_named(self) -> None:
        said = refused("import", "a.pth", "--arch", "resnet19", "--out", "", code=2)
        assert said.endswith("it is empty; name a place\n")

    def test_an_output_beside_the_model_names_the_option_for_another(self, workplace: Path) -> None:
        for command, ending, option in (
            ("sweep", "sweep.png", "--plot"),
            ("bench", "bench.json", "--json"),
            ("validate", "validate.json", "--json"),
        ):
            Path(MODEL).with_suffix(f".{ending}").mkdir()
            assert f"{ending}: Is a directory; choose another with {option}\n" in refused(command, MODEL)

    @staticmethod
    def works(*arguments: object, **options: object) -> None:
        raise AssertionError("it began to work")

    @pytest.mark.parametrize("command", ["bench", "validate"])
    def test_so_is_the_usual_place(self, command: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tetdeploy.engine.Engine.run", self.works)
        monkeypatch.setattr("tetdeploy.engine.Engine.run_with", self.works)
        Path(MODEL).with_suffix(f".{command}.json").mkdir()
        assert f"model-T3.{command}.json: Is a directory" in refused(command)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root writes into read-only folders")
    def test_read_only_folder(self, workplace: Path) -> None:
        folder = workplace / "locked"
        folder.mkdir(mode=0o500)
        assert "locked" in refused("export", "--check", "0", "-o", "locked/m.onnx")

    def test_an_export_is_not_checked_on_other_classes(self, workplace: Path) -> None:
        names = np.array(list("9876543210"))
        np.savez("named.npz", images=np.zeros((40, 1, 8, 8), np.uint8), labels=np.arange(40) % 10, class_names=names)
        said = refused("export", RUN, "--data", "named.npz", "-o", "m.onnx").replace("\n", " ")
        assert "the labels of named.npz do not match the model's: it has 10 classes (9, 8, 7, ...)" in said
        assert not Path("m.onnx").exists()

    def test_a_run_is_not_overwritten(self, workplace: Path) -> None:
        before = snapshot(workplace)
        assert "choose another --out" in refused("train", "--out", "runs/digits-convsnn")
        assert "training.lr: 0.002 -> 0.1" in refused("train", "--resume", "runs/digits-convsnn", "--lr", "0.1")
        assert snapshot(workplace) == before
        refused("train", "--resume", "runs/digits-convsnn", "--init", "runs/digits-convsnn", code=2)


@pytest.mark.parametrize(
    ("command", "work"),
    [
        (("sweep",), "engine.Engine.run_with"),
        (("predict", MODEL, "a.png"), "engine.Engine.run"),
        (("inspect", RUN, "--json", "new"), "storage.files.json_text"),
        (("export", "--layout", "step"), "export.model.check_steps"),
        (("export", "--layout", "step"), "export.model.write_reference"),
        (("report",), "report.writers.to_html"),
        (("landscape",), "train.landscape.measure_landscape"),
        (("train", "--out", "new"), "data.load_data"),
        (("build", MODEL), "export.tensorrt.build_engine"),
    ],
)
def test_ctrl_c_is_one_line_and_leaves_nothing_behind(
    command: tuple[str, ...], work: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    Image.new("L", (8, 8)).save("a.png")
    before = snapshot(workplace)
    importlib.import_module(f"tetdeploy.{work}".rpartition(".")[0].removesuffix(".Engine"))
    monkeypatch.setattr(f"tetdeploy.{work}", interrupted)
    output = printed(*command, code=130)
    assert output.splitlines()[-1] == "interrupted; no file is left half written"
    assert "Error" not in output and snapshot(workplace) == before


ELSEWHERE = "; make room, or write elsewhere"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no device that is always full")
@pytest.mark.parametrize(
    ("command", "rest", "unbuffered"),
    [
        (TRAIN_FEW, "; what was written before is as it was: go on with --resume", ""),
        ((*TRAIN_FEW, "--seeds", "0,1"), ELSEWHERE, ""),
        (("inspect", MODEL), ELSEWHERE, ""),
        (("inspect", MODEL), ELSEWHERE, "1"),
        (("--help",), ELSEWHERE, ""),
        (("--help",), ELSEWHERE, "1"),
    ],
)
def test_standard_output_that_is_full_is_named(
    command: tuple[str, ...], rest: str, unbuffered: str, workplace: Path, few: Path
) -> None:
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("w") as full:
        command = (sys.executable, "-m", "tetdeploy", *command)
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, f"Error: standard output: No space left on device{rest}\n")


def test_a_run_that_a_full_disk_does_not_let_begin_is_not_one_to_go_on_with(workplace: Path, few: Path) -> None:
    with small_files(4096):
        said = refused(*TRAIN_FEW)
    assert said.endswith("Error: new/last.safetensors: File too large\n")
    assert not Path("new").exists()


def test_a_disk_that_is_full_when_another_seed_begins_leaves_a_run_to_go_on_with(
    workplace: Path, few: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = loop.save_state

    def save_the_first(path: Path, *rest: Any) -> None:
        if path.parent.name == "seed-1":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_state", save_the_first)
        said = refused(*TRAIN_FEW, "--seeds", "0,1")
    assert "new/seed-1/last.safetensors: No space left on device; what was written before is as it was: go on" in said
    printed("train", "--resume", "new")


def test_what_foreign_files_say_does_not_steer_the_terminal(workplace: Path) -> None:
    """To hide a line, say, or to turn the letters of a name around."""
    hostile = {"a\x1b[8mb\u202ec.weight": torch.ones(2, 3)}
    save_file(hostile, "foreign.safetensors", metadata={"made": "x\x1b]0;title\x07y\x9b2J"})
    said = printed("inspect", "foreign.safetensors")
    assert "a[8mbc " in said and "made=x]0;titley2J\n" in said.replace(" ", "")

    @click.command(cls=CleanErrors)
    def fail() -> None:
        raise ValueError("no layer a\x1b[8mb")

    assert refused(command=fail) == "Error: no layer a[8mb\n"
    assert "argument (model.onnx)" in refused("inspect", RUN, "model\u202e.onnx", code=2)
    bar = progress_bar()
    bar.console.file = io.StringIO()
    bar.console.print("model\u202e.onnx")
    assert bar.console.file.getvalue() == "model.onnx\n"


@pytest.mark.parametrize(
    ("command", "work"),
    [
        (("train", "--epochs", "1", "--out", "new"), "train.training.prepare"),
        (("export", RUN, "-o", "m.onnx"), "export.causality.run_network"),
    ],
)
def test_a_machine_without_a_temporary_folder_is_told_what_to_do(
    command: tuple[str, ...], work: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = "No usable temporary directory found in ['/tmp', '/x']"  # Python's, as PyTorch imports what it needs
    monkeypatch.setattr(f"tetdeploy.{work}", Mock(side_effect=FileNotFoundError(2, lacking)))
    message = f"Error: cannot write a temporary file: {lacking}; set TMPDIR to a folder with room\n"
    assert refused(*command) == message


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 40 GiB for an array"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("Storage size calculation overflowed with sizes=[10, 4000000000000000000]"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_memory_that_does_not_suffice_is_one_line(
    error: Exception, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tetdeploy.engine.Engine.run_with", Mock(side_effect=error))
    message = refused("sweep")
    assert "the memory does not suffice (" in message and "smaller T" in message
    assert (str(error) or "out of memory") in message


def test_a_gpu_that_pytorch_was_not_built_for_is_one_line(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device\nSearch for")
    monkeypatch.setattr("tetdeploy.engine.Engine.run_with", Mock(side_effect=error))
    message = refused("sweep")
    assert "not built for this GPU (CUDA error: no kernel image is available for execution on the device): " in message
    assert "install a PyTorch that was" in message and "Search" not in message


def test_stderr_that_is_closed_shows_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with progress_bar() as bar:
        assert bar.disable


def test_each_of_several_lacking_characters_has_one_like_it() -> None:
    codecs.register_error("tetdeploy.like", _like)
    assert "2±µλ漢 ×".encode("ascii", "tetdeploy.like") == b"2+-ulambda? x"


def test_a_path_in_ascii_keeps_its_bytes(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "m.safetensors")
    name = "é.json".encode()
    command = [sys.executable, "-m", "tetdeploy", "inspect", "m.safetensors", "--json", os.fsdecode(name)]
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, check=True)
    assert done.stdout.splitlines()[-1] == name


def test_the_next_command_looks_for_data_where_this_one_did(capsys: pytest.CaptureFixture[str]) -> None:
    command = click.Command("train", params=[click.Option(["--data-dir"], type=Path, default=Path("data"))])
    for typed in ([], ["--data-dir", "my data"]):
        with command.make_context("train", typed):
            say_next("export", Path("runs/a"), "--fold-bn")
            say_next("report", Path("runs/a"))
    next_ones = [
        "export runs/a --fold-bn",
        "report runs/a",
        "export runs/a --fold-bn --data-dir 'my data'",
        "report runs/a",
    ]
    assert capsys.readouterr().out == "".join(f"next: tetdeploy {words}\n" for words in next_ones)


def test_names_in_brackets_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    say_next("report", "a b/[x].onnx")
    print_notes(["of [x].onnx"])
    assert capsys.readouterr().out == "next: tetdeploy report 'a b/[x].onnx'\nof [x].onnx\n"


@pytest.mark.parametrize(("system", "shown"), [("linux", r"'runs\a' 'b c'"), ("win32", r'runs\a "b c"')])
def test_the_next_command_is_quoted_for_the_shell_of_the_system(
    system: str, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    say_next("report", r"runs\a", "b c")
    assert capsys.readouterr().out == f"next: tetdeploy report {shown}\n"


def test_paths_that_begin_with_a_dash_are_no_options(capsys: pytest.CaptureFixture[str]) -> None:
    say_next("export", Path("-dash"), "--T", 6, "--distill", Path("a-dash"))
    say_next(*after_export(Path("-dash/m.onnx"), "cpu"))
    said = "next: tetdeploy export ./-dash --T 6 --distill a-dash\nnext: tetdeploy sweep ./-dash/m.onnx\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize(
    ("typed", "got"),
    [
        ("--out=~/runs/x", "/home/me/runs/x"),
        ("-o~/x", "/home/me/x"),
        ("name=~/m.onnx", "name=/home/me/m.onnx"),
        ("--out=~", "/home/me"),
        ("--out=a~/x", "a~/x"),
        ("--out=./~/x", "./~/x"),
        ("--out=s3://models?of=~/x", "s3://models?of=~/x"),
        ("~/x", "~/x"),  # quoted, as shells expand it here
    ],
)
def test_a_home_that_the_shell_leaves_is_found(typed: str, got: str, monkeypatch: pytest.MonkeyPatch) -> None:
    @click.group(cls=CleanGroup)
    def group() -> None: ...

    @group.command(cls=CleanErrors)
    @click.option("--out", "-o", default="")
    @click.argument("rest", nargs=-1)
    def command(out: str, rest: tuple[str, ...]) -> None:
        click.echo(" ".join([out, *rest]).strip())

    monkeypatch.setenv("HOME", "/home/me")
    assert printed("command", typed, command=group) == f"{got}\n"


@pytest.mark.skipif(sys.platform == "win32", reason="which keeps a folder that is somebody's current one")
def test_a_current_folder_that_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert refused("sweep", str(tmp_path / "m.onnx")) == "Error: the current folder is gone; go to another one (cd)\n"


def test_a_bar_says_how_many_are_done_in_a_second() -> None:
    column = progress_bar("images").columns[-1]
    assert isinstance(column, ProgressColumn)
    assert [str(column.render(Mock(speed=speed))) for speed in (9.3, 1797.0, None)] == [
        "9.3 images/s",
        "1,797 images/s",
        "",
    ]


@pytest.mark.parametrize("module", ["tetdeploy.system.machine", "rich.console"])
def test_ctrl_c_during_the_imports_is_one_line(module: str) -> None:
    code = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell takes from what runs in its background
class Interrupted:
    def find_spec(self, name, *rest):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupted())
from tetdeploy.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code, module], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_ctrl_c_as_an_interrupted_command_ends_shows_no_traceback() -> None:
    """Two of them, of which a command answers the first."""
    code = """
import os, signal, click
import tetdeploy.cli
from tetdeploy.__main__ import main
from tetdeploy.cli import errors
signal.signal(signal.SIGINT, signal.default_int_handler)
@click.command(cls=errors.CleanErrors)
def command():
    os.kill(os.getpid(), signal.SIGINT)
    click.pause()
class Again:
    def __enter__(self): pass
    def __exit__(self, *error): os.kill(os.getpid(), signal.SIGINT)
errors._terminations_like_ctrl_c = Again
tetdeploy.cli.main = lambda **options: command([])
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    lines = ["interrupted; no file is left half written", "interrupted"]
    assert (done.returncode, done.stdout, done.stderr.splitlines()) == (130, "", lines)


@pytest.mark.skipif(sys.platform == "win32", reason="which tells no process of the signal that ended it")
@pytest.mark.parametrize(("handler", "code"), [("default_int_handler", -signal.SIGINT), ("SIG_IGN", 0)])
def test_ctrl_c_as_python_exits_shows_no_traceback(handler: str, code: int) -> None:
    program = """
import atexit, os, signal, sys
signal.signal(signal.SIGINT, getattr(signal, sys.argv.pop(1)))
atexit.register(os.kill, os.getpid(), signal.SIGINT)
from tetdeploy.__main__ import main
main()
"""
    command = [sys.executable, "-c", program, handler, "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, "")


@pytest.mark.parametrize(("first", "second"), [("SIGTERM", "SIGHUP"), ("SIGHUP", "SIGTERM"), ("SIGHUP", "SIGHUP")])
def test_a_termination_leaves_nothing_half_written(first: str, second: str, tmp_path: Path) -> None:
    code = """
import os, signal, sys, click
from tetdeploy.cli.errors import CleanErrors
from tetdeploy.storage.files import atomic_write
@click.command(cls=CleanErrors)
def command():
    try:
        with atomic_write(sys.argv[1]):
            os.kill(os.getpid(), first)
            click.pause()
    finally:
        os.kill(os.getpid(), second)  # a shell that a terminal leaves sends SIGHUP, and so does the system
first, second = (getattr(signal, name) for name in sys.argv[2:])
for number in (first, second):
    signal.signal(number, signal.SIG_DFL)
command([])
"""
    command = [sys.executable, "-c", code, str(tmp_path / "new" / "file"), first, second]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "interrupted; no file is left half written\n")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupt_in_the_callback_of_a_weak_reference_ends_the_command(name: str) -> None:
    """Python lets no exception out of it: the command would go on, and end with 0."""
    code = """
import os, signal, sys, time, weakref, click
from tetdeploy.cli.errors import CleanErrors
@click.command(cls=CleanErrors)
def command():
    freed = {1}
    reference = weakref.ref(freed, lambda _: os.kill(os.getpid(), number))
    del freed
    time.sleep(30)
number = getattr(signal, sys.argv[1])
signal.signal(signal.SIGTERM, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler if number == signal.SIGINT else signal.SIG_IGN)
command([])
"""
    done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "interrupted; no file is left half written\n")


def test_newest_export_is_the_last_written(tmp_path: Path) -> None:
    """The times are set: two files that are written within one tick of the kernel's clock have the same."""

    def write_model(folder: str, age: float) -> Path:
        model = runs / folder / "model-T4.onnx"
        model.parent.mkdir(parents=True)
        model.write_bytes(b"")
        os.utime(model, (time.time() - age, time.time() - age))
        return model

    runs = tmp_path / "runs"
    _, newest, _ = write_model("a", 300), write_model("b", 200), write_model("c", 250)
    assert newest_export(runs) == newest
    seeded = write_model("s/seed-0", 100)
    (runs / "latest").symlink_to("s")
    assert newest_export(runs) == seeded
    for folder, age in (("c/shards", 50), ("s/seed-0/shards", 20)):
        of_shards = write_model(folder, age)
        of_shards.with_name(f"._{of_shards.name}").write_bytes(b"")  # as macOS does
        assert newest_export(runs) == of_shards
    (runs / "latest").unlink()
    (runs / "latest").symlink_to("../elsewhere")
    assert newest_export(runs) == of_shards  # the run is gone, or not there yet
    write_model("../elsewhere", 0)
    assert newest_export(runs) == tmp_path / "elsewhere" / "model-T4.onnx"


def test_a_warning_is_one_line() -> None:
    code = """
import warnings, click
from tetdeploy.cli.errors import CleanErrors
@click.command(cls=CleanErrors)
def command():
    warnings.warn("slower than it could be", RuntimeWarning)
command()
"""
    for options, rc, begins in (((), 0, "Warning"), (("-W", "error::RuntimeWarning"), 1, "Error")):
        done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, check=False)
        assert (done.stderr, done.returncode) == (f"{begins}: slower than it could be\n", rc)
