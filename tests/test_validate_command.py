"""`tetdeploy validate` as a user types it: what it writes, its exit codes, and one clear line for what is wrong."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import command_helpers
import numpy as np
import onnx
import pytest
import torch
from command_helpers import printed
from export_helpers import digits, frames

from tetdeploy.checkpoint import save_checkpoint
from tetdeploy.class_names import check_classes
from tetdeploy.cli.fail_under import Gate, check_gates, describe, parse_gate, place_gates
from tetdeploy.data.fingerprint import images_sha256
from tetdeploy.engine import Engine
from tetdeploy.networks import Classifier, NetworkConfig, build_network, import_network
from tetdeploy.resumable import Partial, Pass
from tetdeploy.storage.files import sha256_of, write_json
from tetdeploy.storage.model_file import METADATA_KEY

CONTRACT = {"T", "accuracy", "firing_rate", "ac_ops", "mac_ops", "energy_pj", "energy_exact_pj", "latency_ms"}
CONTRACT |= {"top1_agreement", "spike_mismatch_rate", "max_abs_logit_error"}
RUN, OTHER = "run", "other"
MODEL, DYNAMIC, FRAMES = "run/model-T3.onnx", "run/model-dynamic.onnx", "run/frames.onnx"


def write_run(folder: Path, seed: int, model: str = "convsnn") -> None:
    """A run folder with a small network whose BN have seen the digits."""
    data = digits()
    config = NetworkConfig(model, num_classes=10, in_channels=1, image_size=(8, 8), width=0.25)
    torch.manual_seed(seed)
    network = import_network(config) if config.is_own else build_network(config)
    statistics: dict[str, Any] = {"mean": data.mean, "std": data.std, "class_names": data.class_names}
    classifier = Classifier(network, config=config, data="digits", **statistics)
    classifier.train()
    with torch.no_grad():
        for start in range(0, 320, 64):
            classifier(torch.from_numpy(data.x[start : start + 64]), 3)
    save_checkpoint(folder / "checkpoint.safetensors", classifier.eval(), training={"T": 3}, provenance={})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run exported in two layouts and for frames, and another run."""
    folder = tmp_path_factory.mktemp("made")
    for name, seed in ((RUN, 0), (OTHER, 1)):
        write_run(folder / name, seed)
    np.savez(folder / "frames.npz", images=frames(40, 5), labels=np.arange(40) % 10)
    for options in (
        ["--check", "20"],
        ["--layout", "dynamic", "--check", "0"],
        ["--encoding", "frames", "--data", folder / "frames.npz", "--check", "0", "-o", folder / FRAMES],
    ):
        printed("export", folder / RUN, *options)
    return folder


@pytest.fixture(autouse=True)
def _workplace(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy to do harm to; it is the working folder."""
    shutil.copytree(made, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")


run = partial(printed, "validate")
refused = partial(command_helpers.refused, "validate")


def written(path: str = "run/model-T3.validate.json") -> dict[str, Any]:
    value: dict[str, Any] = json.loads(Path(path).read_text(), parse_constant=lambda name: pytest.fail(name))
    return value


class TestReference:
    def test_it_alone_tells_agreement_and_no_accuracy(self) -> None:
        output = run(MODEL, "--layers")
        value = written()
        assert value["kind"] == "validate"
        assert value["data"] == "reference images"
        assert value["num_samples"] == 256
        assert "   256 reference images   " in output
        assert [row["T"] for row in value["rows"]] == [1, 2, 3]
        for row in value["rows"]:
            assert set(row) >= CONTRACT
            assert row["top1_agreement"] == 1.0
            assert row["max_abs_logit_error"] < 1e-4
            assert row["spike_count_error"] < 100e-6
            assert row["spike_mismatch_rate"] is None
            assert row["accuracy"] is None
            assert row["energy_pj"] > 0
        assert value["agreement"] == {"with": "reference", "num_images": 256, "T": 3}
        with np.load("run/model-T3.reference.npz") as kept:
            assert value["images_sha256"] == images_sha256(kept["x"], kept["labels"])
        assert value["checkpoint_sha256"] == sha256_of(Path("run/checkpoint.safetensors"))
        assert value["gates"] == []
        assert "spike_count_error" in value["neurons"][0]
        assert "their accuracy says nothing" in output
        assert "lif1" in output
        assert output.splitlines()[-1] == "next: tetdeploy report run/model-T3.validate.json"

    def test_no_torch_is_needed(self) -> None:
        script = """
import sys
heavy = ("torch", "onnx", "onnxscript", "safetensors", "sklearn")
sys.modules.update(dict.fromkeys(heavy))
from tetdeploy.cli import main
main(["validate", "run/model-T3.onnx", "--data", "mine.npz", "--fail-under", "agreement=0.9"])
"""
        data = digits()
        np.savez("mine.npz", images=data.x[:50], labels=data.labels[:50])
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert written()["rows"][2]["top1_agreement"] == 1.0
        assert 0 < written()["rows"][2]["accuracy"] < 1

    def test_fewer_steps_give_the_same_numbers(self) -> None:
        assert "* the T of the training" in run(MODEL, "--json", "all.json")
        assert "the T of the training" not in run(MODEL, "--T", "2", "--json", "two.json")
        (two,) = written("two.json")["rows"]
        other = written("all.json")["rows"][1]
        for key in ("top1_agreement", "spike_count_error", "energy_pj", "firing_rate"):
            assert two[key] == other[key]

    def test_the_reference_may_hold_fewer_steps_than_asked_for(self) -> None:
        said = "holds T=3 steps, too few for T=5; "
        assert f"{said}name data with --data, or choose a smaller --T" in refused(DYNAMIC, "--T", "1:5")
        assert f"{said}choose a smaller --T" in refused(MODEL, "--T", "1:5")  # no data would do
        run(DYNAMIC, "--T", "2,5", "--data", "digits", "--json", "v.json")
        two, five = written("v.json")["rows"]
        assert two["top1_agreement"] == 1.0
        assert five["top1_agreement"] is None
        assert five["accuracy"] is not None

    def test_another_answer_is_seen(self) -> None:
        path = Path("run/model-T3.reference.npz")
        with np.load(path) as file:
            arrays = dict(file)
        arrays["per_step"][:64] *= -1
        np.savez(path, **arrays)
        output = run(MODEL, "--fail-under", "agreement=0.999", code=3)
        assert written()["rows"][2]["top1_agreement"] <= 0.75
        assert "failed: agreement at T=3: 0.75, wanted at least 0.999" in output

    def test_steps_that_the_reference_lacks_are_not_said_to_be_compared(self) -> None:
        output = run(DYNAMIC, "--data", "digits", "--limit", "9", "--T", "8,9")
        assert "model-dynamic.reference.npz holds T=3, no T=8, so nothing is compared with PyTorch" in output
        assert "compared with what PyTorch made" not in output and "spike count error" not in output
        assert written("run/model-dynamic.validate.json")["agreement"] is None

    def test_no_reference(self) -> None:
        Path("run/model-T3.reference.npz").unlink()
        assert "no reference images at run/model-T3.reference.npz" in refused(MODEL)
        assert "nothing is compared with PyTorch" in run(MODEL, "--data", "digits")
        value = written()
        assert value["agreement"] is None
        assert value["rows"][0]["top1_agreement"] is None
        assert "no reference images" in refused(MODEL, "--data", "digits", "--fail-under", "agreement=0.9")


class TestData:
    def test_accuracy_is_that_of_a_sweep(self) -> None:
        run(MODEL, "--data", "digits")
        printed("sweep", MODEL, "--json", "s.json")
        sweep, value = written("s.json"), written()
        for ours, theirs in zip(value["rows"], sweep["rows"], strict=True):
            for key in CONTRACT & set(theirs) - {"latency_ms"}:
                assert ours[key] == theirs[key], key
        assert value["num_samples"] == 359
        assert value["by_class"] == sweep["by_class"]
        assert value["layers"] == sweep["layers"]
        assert value["model_sha256"] == sweep["model_sha256"]

    def test_fewer_images_than_a_batch(self) -> None:
        data = digits()
        np.savez("few.npz", images=data.x[:3], labels=data.labels[:3])
        run(MODEL, "--data", "few.npz", "--batch-size", "64")
        assert written()["num_samples"] == 3
        run(MODEL, "--data", "few.npz", "--against", RUN, "--num-torch", "2000")
        assert written()["agreement"]["num_images"] == 3

    def test_frames(self) -> None:
        run(FRAMES, "--data", "frames.npz", "--against", RUN, "--T", "1:3", "--json", "f.json")
        assert written("f.json")["rows"][2]["top1_agreement"] == 1.0
        assert "T=6 steps need as many frames" in refused(FRAMES, "--data", "frames.npz", "--T", "6")


class TestAgainst:
    def test_each_T_has_the_latency_of_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        latency = "tetdeploy.export.sidebyside.torch_latency"
        monkeypatch.setattr(latency, lambda classifier, x, steps: {T: 10.0 * T for T in steps})
        run(MODEL, "--against", RUN, "--T", "1:3", "--num-torch", "20", "--limit", "20")
        assert [row["torch_latency_ms"] for row in written()["rows"]] == [10, 20, 30]

    def test_spike_by_spike(self) -> None:
        output = run(MODEL, "--against", RUN, "--T", "1:3", "--num-torch", "100", "--limit", "150")
        value, shown = written(), re.sub(" +", "  ", output)
        assert "layers of neurons, T=3, on the 100 images that PyTorch saw too\n" in output
        assert value["data"] == "digits"
        assert value["num_samples"] == 150
        assert value["agreement"]["with"] == "checkpoint"
        assert value["agreement"]["num_images"] == 100
        assert len(value["agreement"]["checkpoint_sha256"]) == 64
        for row in value["rows"]:
            assert set(row) >= CONTRACT
            assert row["top1_agreement"] == 1.0
            assert row["spike_mismatch_rate"] < 100e-6
            assert row["local_mismatch_rate"] < 100e-6
            assert row["torch_latency_ms"] > 0
        for layer in value["neurons"]:
            assert layer["torch_firing_rate"] == pytest.approx(layer["engine_firing_rate"], rel=1e-3)
            assert f"{layer['name']}  {layer['engine_firing_rate']:.3f}  {layer['torch_firing_rate']:.3f}" in shown
            assert set(layer["margin"]) == {"differing", "local", "every"}
            assert layer["margin"]["every"]["median"] > 0
        assert "PyTorch's" in output
        assert "every-" in output

    def test_pytorch_sees_2000_images_or_all(self) -> None:
        run(MODEL, "--against", f"{RUN}/checkpoint.safetensors", "--num-torch", "0")
        assert written()["agreement"]["num_images"] == written()["num_samples"] == 359

    def test_how_many_images_pytorch_sees_and_with_how_many_threads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        run_both, set_threads = Mock(side_effect=ValueError("enough")), Mock()
        monkeypatch.setattr(sys.modules["tetdeploy.cli.validate"]._Job, "side_by_side", run_both)
        monkeypatch.setattr("torch.set_num_threads", set_threads)
        for given in ((), ("--num-torch", "0"), ("--num-torch", "9")):
            refused(MODEL, "--against", f"{RUN}/checkpoint.safetensors", "--threads", "1", *given)
        assert [call.args[-2] for call in run_both.call_args_list] == [2000, 0, 9]
        set_threads.assert_called_with(1)

    def test_a_checkpoint_of_another_model(self) -> None:
        message = refused(MODEL, "--against", OTHER)
        assert "model-T3.onnx was not exported from other/checkpoint.safetensors" in message
        assert "tetdeploy export other" in message
        for name in (RUN, OTHER):
            digest = hashlib.sha256(Path(name, "checkpoint.safetensors").read_bytes()).hexdigest()
            assert digest[:12] in message

    def test_the_command_that_exports_it_is_quoted_for_a_shell(self) -> None:
        shutil.copytree(OTHER, "an other")
        assert refused(MODEL, "--against", "an other").rstrip().endswith(": tetdeploy export 'an other'")

    def test_the_same_run_trained_on(self) -> None:
        write_run(Path(RUN), 5)
        assert "was not exported from run/checkpoint.safetensors" in refused(MODEL, "--against", RUN)

    def test_own_networks_only_when_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        shutil.copy(Path(__file__).parent.parent / "examples" / "own_network.py", "own_network.py")
        monkeypatch.syspath_prepend(str(Path.cwd()))
        own = ("--model", "own_network:my_network")
        write_run(Path("own"), 0, own[1])
        printed("export", "own", *own, "--check", "0")
        assert "is not imported because a file says so" in refused("own/model-T3.onnx", "--against", "own")
        run("own/model-T3.onnx", "--against", "own", *own, "--limit", "20")
        assert written("own/model-T3.validate.json")["rows"][2]["top1_agreement"] == 1.0

    def test_wrong_paths(self) -> None:
        assert "nowhere" in refused(MODEL, "--against", "nowhere")
        assert "holds no checkpoint.safetensors" in refused(MODEL, "--against", ".")
        assert f"{MODEL} is an exported model, not a checkpoint" in refused(MODEL, "--against", MODEL)

    def test_options_that_go_with_it(self) -> None:
        assert "go with --against" in refused(MODEL, "--num-torch", "5", code=2)
        assert "go with --against" in refused(MODEL, "--model", "a:b", code=2)
        for option in (("--limit", "3"), ("--data-dir", "."), ("--restart",)):
            assert "go with --data or --against" in refused(MODEL, *option, code=2)

    def test_without_torch(self) -> None:
        script = "import sys; sys.modules['torch'] = None\nfrom tetdeploy.cli import main\nmain()"
        command = [sys.executable, "-c", script, "validate", MODEL, "--against", RUN]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "pip install 'tetdeploy[train]'" in done.stderr


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ("--layout step --precision int8 --calibrate 64 --out 'a run/a model.onnx'", "a model.onnx"),
        ("--T 3 --with-state --no-normalize --no-fold-bn --target cuda", "model-T3-state-cuda.onnx"),
    ],
)
def test_a_model_of_an_earlier_checkpoint_is_told_and_how_to_export_it_anew(options: str, name: str) -> None:
    def told() -> str:
        return " ".join(run(f"a run/{name}", "--T", "1").split())

    def export(words: str) -> dict[str, Any]:
        output = printed("export", *shlex.split(words), "--check", "0")
        assert f"next: tetdeploy sweep 'a run/{name}'" in output
        metadata = Engine(f"a run/{name}").metadata
        keys = ("layout", "T", "precision", "target", "states", "input", "fold_bn")
        return {key: metadata[key] for key in keys}

    shutil.copytree(RUN, "a run")
    before = export(f"'a run' {options}")
    assert "another checkpoint" not in told()
    shutil.copy(f"{OTHER}/checkpoint.safetensors", "a run/checkpoint.safetensors")
    said = rf"{name} was exported from another checkpoint than a run has now; for that one run tetdeploy export"
    found = re.search(rf"{said} (.* --out '.*\.onnx')", told())
    assert found is not None
    message = refused(f"a run/{name}", "--against", "a run").rstrip()
    assert message.endswith(f"or export this one again: tetdeploy export {found[1]}")
    assert export(found[1]) == before
    assert "another checkpoint" not in told()


class TestGoingOn:
    OPTIONS = (MODEL, "--against", RUN, "--num-torch", "64", "--batch-size", "16", "--limit", "100")
    PARTIAL = Path("run/model-T3.validate.partial.npz")

    def interrupt(self, monkeypatch: pytest.MonkeyPatch, batch: int) -> str:
        """Ctrl-C during a batch."""
        advance = Pass.advance
        calls: list[int] = []

        def advance_or_stop(self: Pass) -> int:
            calls.append(self.done)
            if len(calls) == batch:
                raise KeyboardInterrupt
            return advance(self)

        with monkeypatch.context() as patch:
            patch.setattr(Pass, "advance", advance_or_stop)
            return " ".join(run(*self.OPTIONS, code=130).split())

    def test_ctrl_c_keeps_what_is_done(self, monkeypatch: pytest.MonkeyPatch) -> None:
        run(*self.OPTIONS, "--json", "whole.json")
        message = self.interrupt(monkeypatch, 4)
        assert f"what is done lies in {self.PARTIAL} and the same command goes on" in message
        assert self.PARTIAL.exists()
        assert not Path("run/model-T3.validate.json").exists()
        assert "going on after 48 of 100 images" in run(*self.OPTIONS)
        assert not self.PARTIAL.exists()
        mine, whole = written(), written("whole.json")
        timed = {"latency_ms", "torch_latency_ms"}
        for ours, theirs in zip(mine["rows"], whole["rows"], strict=True):
            assert {k: v for k, v in ours.items() if k not in timed} == {
                k: v for k, v in theirs.items() if k not in timed
            }
        assert mine["neurons"] == whole["neurons"]
        assert mine["agreement"] == whole["agreement"]

    def test_other_settings_or_another_start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.interrupt(monkeypatch, 2)
        assert "T: 3 -> 2" in refused(*self.OPTIONS, "--T", "2")
        assert "torch images" in refused(*self.OPTIONS[:3], "--num-torch", "32", "--limit", "100")
        run(MODEL)  # the reference alone leaves it be
        refused(*self.OPTIONS, "--restart", "--T", "9")
        assert self.PARTIAL.exists()
        assert "going on" not in run(*self.OPTIONS, "--restart")
        assert not self.PARTIAL.exists()

    def test_the_file_of_another_process_stays(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def beside(path: Path, result: Any) -> None:
            Partial(self.PARTIAL, {"T": 9}).save({})
            write_json(path, result)

        monkeypatch.setattr(import_module("tetdeploy.cli.validate"), "write_json", beside)
        run(*self.OPTIONS)
        assert self.PARTIAL.exists()
        assert "if another process is at it, give this one its own --json" in refused(*self.OPTIONS)

    def test_changed_images(self, monkeypatch: pytest.MonkeyPatch) -> None:
        images, labels = digits().images[:64].copy(), digits().labels[:64]
        np.savez("own.npz", images=images, labels=labels)
        monkeypatch.setattr(self, "OPTIONS", (MODEL, "--data", "own.npz", "--batch-size", "16"), raising=False)
        self.interrupt(monkeypatch, 3)
        images[7] = 255 - images[7]  # neither the first nor the last
        np.savez("own.npz", images=images, labels=labels)
        assert "images_sha256: " in refused(*self.OPTIONS)

    def test_before_anything_was_done(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            "tetdeploy.agreement.compare_reference", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        assert run(MODEL, code=130) == "interrupted\n"


class TestGates:
    def test_all_pass(self) -> None:
        bounds = ("accuracy=0.01", "agreement=0.999@2", "energy=1e9")
        output = run(MODEL, "--data", "digits", *(word for bound in bounds for word in ("--fail-under", bound)))
        assert "passed: agreement at T=2: 1, wanted at least 0.999\n" in output
        assert output.count("passed: ") == 3 and "failed: " not in output
        assert [(g["key"], g["T"], g["passed"]) for g in written()["gates"]] == [
            ("accuracy", 3, True),
            ("agreement", 2, True),
            ("energy", 3, True),
        ]

    def test_each_failure_is_a_line_and_the_result_is_written(self) -> None:
        bounds = ("accuracy=1", "energy=5@1", "agreement=0.5")
        output = run(MODEL, "--data", "digits", *(word for bound in bounds for word in ("--fail-under", bound)), code=3)
        value = written()
        assert f"failed: accuracy at T=3: {value['rows'][2]['accuracy']:.10g}, wanted at least 1\n" in output
        assert f"failed: energy at T=1: {value['rows'][0]['energy_pj']:.10g} pJ, wanted at most 5 pJ\n" in output
        assert "passed: agreement at T=3: 1, wanted at least 0.5\n" in output

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("speed=3", "KEY one of accuracy, agreement, energy"),
            ("accuracy", "write KEY=VALUE"),
            ("accuracy=high", "with numbers"),
            ("accuracy=0.9@x", "with numbers"),
            ("accuracy=0.9@0", "T at least 1"),
            ("accuracy=nan", "0 or more"),
            ("energy=-1", "0 or more"),
            ("accuracy=94", "a fraction, 0 to 1 (94 % is 0.94)"),
        ],
    )
    def test_bounds_that_do_not_parse(self, text: str, message: str) -> None:
        assert message in refused(MODEL, "--fail-under", text, code=2)

    def test_bounds_that_cannot_be_had(self) -> None:
        assert "needs a test set: name one with --data" in refused(MODEL, "--fail-under", "accuracy=0.9")
        assert "T=9 is not measured (1, 2, 3)" in refused(MODEL, "--fail-under", "energy=1@9")
        message = refused(DYNAMIC, "--data", "digits", "--fail-under", "agreement=0.9@8")
        assert "the reference holds no T=8" in message

    def test_an_energy_that_leaves_layers_out_is_no_gate(self) -> None:
        model = onnx.load(MODEL)
        (metadata,) = (entry for entry in model.metadata_props if entry.key == METADATA_KEY)
        known = json.loads(metadata.value)
        for name in ("up.0", "later (residual_adds)"):  # a layer, and what is in no energy anyhow
            metadata.value = json.dumps(known | {"uncounted": [name]})
            onnx.save(model, f"{name}.onnx")
        of_digits = ("--data", "digits", "--limit", "20", "--fail-under", "energy=1e9")
        told = "operations not counted, and in no energy: later (residual_adds); export --layout step may count them "
        told += "(why: docs/energy.md)"
        assert told in " ".join(run("later (residual_adds).onnx", *of_digits).split())
        message = refused("up.0.onnx", *of_digits)
        assert f"--fail-under energy cannot be judged: {told.replace('later (residual_adds)', 'up.0')}" in message
        assert not Path("up.0.validate.json").exists()
        run("up.0.onnx", "--data", "digits", "--limit", "20", "--fail-under", "accuracy=0")

    def test_the_default_T_is_the_training_s(self) -> None:
        gate = parse_gate("accuracy=0.5")
        assert gate == Gate("accuracy", 0.5)
        assert place_gates([gate], (1, 4, 6), 4)[0].T == 4
        assert place_gates([gate], (1, 6, 2), 4)[0].T == 6
        assert place_gates([parse_gate("energy=2e6@1")], (1, 6), 4) == [Gate("energy", 2e6, 1)]

    @pytest.mark.parametrize(
        ("text", "got", "passed"),
        [
            ("accuracy=0.5", 0.5, True),
            ("accuracy=0.5", 0.4999, False),
            ("energy=5", 5.0, True),
            ("energy=5", 5.1, False),
        ],
    )
    def test_bounds_themselves_pass(self, text: str, got: float, passed: bool) -> None:
        gates = place_gates([parse_gate(text)], (1,), 1)
        (found,) = check_gates(gates, [{"T": 1, "accuracy": got, "energy_pj": got}])
        assert found["passed"] is passed
        assert f"{got:g}" in describe(found)

    def test_what_was_not_measured_fails_and_says_so(self) -> None:
        (found,) = check_gates([Gate("energy", 5.0, 1)], [{"T": 1, "energy_pj": None}])
        assert (found["at_most"], found["unit"], found["passed"]) == (True, "pJ", False)
        assert describe(found) == "energy at T=1: not measured, wanted at most 5 pJ"


class TestBadInput:
    def test_labels_that_do_not_match(self) -> None:
        np.savez("classes.npz", images=np.zeros((2, 1, 8, 8), np.uint8), labels=np.array([0, 11]))
        assert "has 10 classes; is this the data it was trained on?" in refused(MODEL, "--data", "classes.npz")

    def test_classes_of_other_names(self) -> None:
        from PIL import Image

        for split in ("train", "test"):
            for name in ("cat", "dog"):
                folder = Path("pets", split, name)
                folder.mkdir(parents=True)
                Image.fromarray(np.full((8, 8), split == "test", np.uint8)).save(folder / "a.png")
        message = refused(MODEL, "--data", "folder:pets")
        assert "the labels of folder:pets do not match the model's: it has 2 classes (cat, dog)" in message
        assert "knows 10 classes (0, 1, 2, ...)" in message

    @pytest.mark.parametrize(
        ("model", "images"),
        [(MODEL, np.zeros((2, 1, 8, 8), np.uint8)), (FRAMES, frames(2, 5))],
        ids=["images", "frames"],
    )
    def test_a_file_that_names_other_classes(self, model: str, images: Any) -> None:
        def save(*names: str) -> None:
            np.savez("named.npz", images=images, labels=np.array([0, 1]), class_names=np.array(names))

        save(*"9876543210")
        message = refused(model, "--data", "named.npz")
        assert "the labels of named.npz do not match the model's: it has 10 classes (9, 8, 7, ...)" in message
        for known in ("01", "0123456789", ("cat", "dog")):  # a model whose classes are numbers may have had no names
            save(*known)
            run(model, "--data", "named.npz", "--T", "1")

    def test_numbers_are_no_folders_named_by_numbers(self) -> None:
        folders = tuple(sorted(map(str, range(11))))  # 0, 1, 10, 2, ...
        check_classes("the model", folders, "x.npz", ("0", "1"))
        with pytest.raises(ValueError, match="label 2 means 2 to it, and 10 to the model"):
            check_classes("the model", folders, "x.npz", tuple(map(str, range(11))))

    @pytest.mark.parametrize("T", ["0", "4:1", "1-4", "x", "1:99999", "1,", ""])
    def test_steps_that_do_not_parse(self, T: str) -> None:
        assert "T must" in refused(MODEL, "--T", T, code=2)

    def test_more_steps_than_the_graph(self) -> None:
        assert "cannot run T=5" in refused(MODEL, "--T", "1:5", "--data", "digits")

    def test_images_of_another_size(self) -> None:
        np.savez("size.npz", images=np.zeros((2, 1, 9, 9), np.uint8), labels=np.zeros(2, np.int64))
        assert "[N, 1, 8, 8]" in refused(MODEL, "--data", "size.npz")

    def test_what_cannot_be_written(self) -> None:
        Path("file").write_text("in the way")
        assert "file/v.json" in refused(MODEL, "--json", "file/v.json")
        assert "'run' is a directory" in refused(MODEL, "--json", "run", code=2)
