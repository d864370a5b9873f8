"""Going on elsewhere from weights alone: what is carried, where the run goes on, and what is refused."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from command_helpers import printed, refused
from run_helpers import metrics, same_weights, toy_images
from safetensors.torch import load_file
from torch import nn

import tetdeploy
from tetdeploy.checkpoint import read_metadata
from tetdeploy.cli.errors import INTERRUPTED
from tetdeploy.inspection import inspect
from tetdeploy.networks import Classifier, NetworkConfig, build_network
from tetdeploy.report.inspection import inspection_tables
from tetdeploy.storage.files import sha256_of
from tetdeploy.storage.metrics import read_metrics
from tetdeploy.storage.run_folder import newest_shards, weights_file
from tetdeploy.storage.shards import INDEX_NAME, read_shards, read_shards_content, write_shards
from tetdeploy.storage.tensor_file import read_content, write_tensors
from tetdeploy.train import How, TrainConfig, TrainResult, loop, train, training
from tetdeploy.train.restart import check_restart, find_restart, has_shards
from tetdeploy.train.runs import run_settings

STEPS = 5

TRAIN, VAL = toy_images(8 * STEPS + 2, 1, (1, 8, 8)), toy_images(24, 2, (1, 8, 8))


def classifier(seed: int = 0, **options: Any) -> Classifier:
    torch.manual_seed(seed)
    config = NetworkConfig("convsnn", 3, 1, (8, 8), width=0.125, **options)
    data: dict[str, Any] = {"mean": TRAIN.mean, "std": TRAIN.std, "class_names": TRAIN.class_names, "data": "toy"}
    return Classifier(build_network(config), config=config, **data)


def settings(**changes: Any) -> TrainConfig:
    plain = {"tit": "1:2,2:2", "batch_size": 8, "augment": "shift", "device": "cpu", "optimizer": "sgd", "lr": 0.05}
    return TrainConfig(**(plain | changes))


def run(out: Path, of: Classifier | None = None, **options: Any) -> TrainResult:
    given = {"config": settings(), "progress": False, "how": How(shards_mb=0.01)} | options
    return train(of or classifier(), TRAIN, VAL, given.pop("config"), out, **given)


def interrupted(out: Path, steps: int, **options: Any) -> None:
    """A run that a Ctrl-C ends after so many training steps."""
    trained, count = classifier(), iter(range(1, 1000))

    def stop(network: nn.Module, *_: Any) -> None:
        if network.training and next(count) == steps:
            signal.raise_signal(signal.SIGINT)

    trained.network.register_forward_hook(stop)
    assert run(out, trained, **options).interrupted


def carried(out: Path, to: Path) -> Path:
    """The shards alone, on another machine."""
    shutil.copytree(out / "shards", to)
    shutil.rmtree(out)
    return to


def forget_moments(out: Path) -> None:
    """Take the optimizer's moments out of a run's state."""
    state = out / "last.safetensors"
    kept = {name: value for name, value in load_file(state).items() if not name.startswith("optimizer.")}
    write_tensors(state, kept, read_content(state))


# --- what is written


def test_shards_hold_the_last_weights_and_no_moments(tmp_path: Path) -> None:
    trained = classifier()
    run(tmp_path / "r", trained, config=settings(ema=0.5))
    (folder,) = (tmp_path / "r" / "shards").iterdir()
    assert folder.name == "epoch-00004-step-000000"
    tensors = read_shards(folder)
    for name, value in trained.network.state_dict().items():
        assert torch.equal(tensors[f"network.{name}"], value)
    averaged = [name for name in tensors if name.startswith("average.")]
    assert len(averaged) == len([*trained.network.parameters()])
    assert not [name for name in tensors if name.startswith("optimizer.")]
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert all(file.stat().st_size <= 10_000 for file in folder.glob("model-*"))
    assert (folder / "metrics.jsonl").read_bytes() == (tmp_path / "r" / "metrics.jsonl").read_bytes()
    assert read_metadata(folder)["provenance"]["epoch"] == 4


def test_load_reads_shards(tmp_path: Path) -> None:
    trained = classifier()
    run(tmp_path / "r", trained)
    (folder,) = (tmp_path / "r" / "shards").iterdir()
    x = torch.from_numpy(VAL.x)
    torch.testing.assert_close(tetdeploy.load(folder)(x, 2), trained.eval()(x, 2), rtol=0, atol=0)


def test_of_several_shards_the_latest_are_read_but_a_checkpoint_comes_first(tmp_path: Path) -> None:
    trained = classifier()
    run(tmp_path / "r", trained)
    (folder,) = (tmp_path / "r" / "shards").iterdir()
    earlier = shutil.copytree(folder, folder.with_name("epoch-00001-step-000002"))
    for file in earlier.glob("model-*"):
        file.write_bytes(b"")
    shutil.copytree(tmp_path / "r" / "shards", tmp_path / "carried")
    assert newest_shards(tmp_path / "carried") == tmp_path / "carried" / folder.name
    assert same_weights(tetdeploy.load(tmp_path / "carried"), trained)
    shutil.copy(tmp_path / "r" / "checkpoint.safetensors", tmp_path / "carried")
    assert weights_file(tmp_path / "carried") == tmp_path / "carried" / "checkpoint.safetensors"
    assert weights_file(tmp_path / "r") == tmp_path / "r" / "checkpoint.safetensors"


def test_inspect_describes_shards_and_one_of_them(tmp_path: Path) -> None:
    run(tmp_path / "r", how=How(shards_mb=0.007))
    whole = inspect(tmp_path / "r")
    shutil.move(tmp_path / "r" / "shards", tmp_path / "carried")
    (folder,) = (tmp_path / "carried").iterdir()
    found = inspect(tmp_path / "carried")
    assert (found["kind"], found["path"]) == ("shards", str(folder))
    assert {name: found["restart"][name] for name in ("epoch", "step")} == {"epoch": 4, "step": 0}
    assert (found["parameters"], found["layers"]) == (whole["parameters"], whole["layers"])
    files = list(folder.glob("model-*-of-*"))
    assert found["size_bytes"] == sum(file.stat().st_size for file in files)
    each = [inspect(file) for file in files]
    assert sum(part["parameters"] for part in each) == whole["parameters"] and len(each) > 1
    for part in (found, *each):
        facts = next(inspection_tables(part))
        labels, values = ([*column.cells] for column in facts.columns)
        assert "4 epochs and 0 steps finished" in values and "–" not in values
        assert "kept" not in labels
    for refuse in (tetdeploy.load, find_restart):
        with pytest.raises(
            ValueError, match=rf"is one of several files with weights; name their folder, .*{folder.name}"
        ):
            refuse(files[0])
    whole_file = files[0].read_bytes()
    files[0].write_bytes(whole_file[:-1] + bytes([whole_file[-1] ^ 1]))
    with pytest.raises(ValueError, match=rf"{files[0].name} is not the file that {INDEX_NAME} was written for"):
        inspect(folder)
    files[0].unlink()
    with pytest.raises(ValueError, match=rf"lacks {files[0].name}, of {len(files)} shards; copy them all"):
        inspect(folder)


def test_inspect_says_whether_there_is_a_moving_average(tmp_path: Path) -> None:
    for ema in (0.0, 0.5):
        run(tmp_path / f"{ema}", config=settings(ema=ema))
        (found,) = (tmp_path / f"{ema}" / "shards").iterdir()
        facts = next(inspection_tables(inspect(found)))
        assert ("moving average" in facts.columns[0].cells) == inspect(found)["averaged"] == bool(ema)


def test_a_finished_run_writes_the_shards_that_a_full_disk_left_an_epoch_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(session: Any, state: Any, limit: int) -> None:
        if state.epoch == 4:
            raise OSError(28, "No space left on device")
        write(session, state, limit)

    write, trained = loop.write_restart, classifier()
    monkeypatch.setattr(loop, "write_restart", full)
    with pytest.raises(OSError, match="No space left on device"):
        run(tmp_path / "r", trained)
    monkeypatch.undo()
    assert newest_shards(tmp_path / "r" / "shards").name == "epoch-00003-step-000000"
    assert run(tmp_path / "r", classifier(5), resume=True).epochs == 4
    (folder,) = (tmp_path / "r" / "shards").iterdir()
    assert same_weights(tetdeploy.load(folder), trained)
    (folder / INDEX_NAME).write_text("{")
    run(tmp_path / "r", classifier(5), resume=True)
    assert same_weights(tetdeploy.load(folder), trained)
    next(folder.glob("model-00001*")).unlink()
    run(tmp_path / "r", classifier(5), resume=True, how=How())  # which writes none
    assert not list(folder.glob("model-00001*"))
    run(tmp_path / "r", classifier(5), resume=True)
    assert same_weights(tetdeploy.load(folder), trained)
    assert has_shards(tmp_path / "r", 4, 10_000) and not has_shards(tmp_path / "r", 4, 7_000)  # and the run is locked
    run(tmp_path / "r", classifier(5), resume=True, how=How(shards_mb=0.007))
    assert max(file.stat().st_size for file in folder.glob("model-*")) <= 7_000
    assert same_weights(tetdeploy.load(folder), trained)


def test_without_the_option_there_are_no_shards_and_with_it_the_run_is_the_same(tmp_path: Path) -> None:
    one, other = classifier(), classifier()
    run(tmp_path / "plain", one, how=How())
    run(tmp_path / "shards", other)
    assert not (tmp_path / "plain" / "shards").exists()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_state_saved_twice_leaves_its_shards_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between removing and writing them there would be none."""
    interrupted(tmp_path / "r", 3)
    (folder,) = (tmp_path / "r" / "shards").iterdir()
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_train_steps", lambda *_: False)  # a Ctrl-C at once
        assert run(tmp_path / "r", resume=True).interrupted
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    max(folder.glob("model-*")).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_train_steps", lambda *_: False)
        run(tmp_path / "r", resume=True)
    read_shards(folder)


def test_what_a_killed_write_left_is_swept(tmp_path: Path) -> None:
    interrupted(tmp_path / "r", 3)
    left = tmp_path / "r" / "shards" / ".epoch-00001-step-000000.abc.tmp"
    left.mkdir()
    (left / "model-00001-of-00002.safetensors").write_bytes(b"half")
    run(tmp_path / "r", resume=True)
    assert [folder.name for folder in (tmp_path / "r" / "shards").iterdir()] == ["epoch-00004-step-000000"]


def killed(out: Path, before: str, **options: Any) -> None:
    """A beginning that ends before this function that it calls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, before, Mock(side_effect=SystemExit))
        with pytest.raises(SystemExit):
            run(out, **options)


def test_shards_of_a_killed_beginning_are_not_those_of_the_next_run_there(tmp_path: Path) -> None:
    killed(tmp_path / "r", "write_run_config", config=settings(lr=0.01))
    assert find_restart(tmp_path / "r" / "shards").settings["training"]["lr"] == 0.01
    killed(tmp_path / "r", "run_epochs", config=settings(lr=0.02))
    assert find_restart(tmp_path / "r").settings["training"]["lr"] == 0.02


def test_metrics_of_a_killed_restart_are_not_those_of_the_next_one_there(tmp_path: Path) -> None:
    for name in ("a", "b"):
        interrupted(tmp_path / name, 2 * STEPS + 1)
    killed(tmp_path / "c", "save", restart_from=tmp_path / "a")
    assert [record["epoch"] for record in read_metrics(tmp_path / "c")] == [1, 2]
    shutil.copytree(tmp_path / "b" / "shards", tmp_path / "carried")
    for file in (tmp_path / "carried").rglob("metrics.jsonl"):
        file.unlink()
    run(tmp_path / "c", restart_from=tmp_path / "carried")
    assert [record["epoch"] for record in read_metrics(tmp_path / "c")] == [3, 4]


# --- where it goes on


# Of 4 epochs of 5 steps: in each stage, in the last epoch, and after the last step of one, before its validation.
@pytest.mark.parametrize("at", [3, STEPS, 2 * STEPS + 1, 4 * STEPS - 1])
@pytest.mark.parametrize("changes", [{}, {"ema": 0.5, "optimizer": "adamw", "lr": 2e-3}])
def test_it_is_the_resumed_run_with_fresh_moments(tmp_path: Path, at: int, changes: dict[str, Any]) -> None:
    config = settings(**changes)
    interrupted(tmp_path / "first", at, config=config)
    shutil.copytree(tmp_path / "first" / "shards", tmp_path / "carried")
    forget_moments(tmp_path / "first")
    resumed, restarted = classifier(seed=5), classifier(seed=6)
    run(tmp_path / "first", resumed, config=config, resume=True)
    result = run(tmp_path / "second", restarted, config=config, restart_from=tmp_path / "carried")
    assert (result.epochs, result.interrupted) == (4, False)
    assert same_weights(restarted, resumed)
    assert metrics(tmp_path / "second") == metrics(tmp_path / "first")
    origin = json.loads((tmp_path / "second" / "config.json").read_text())["restarted"]
    assert origin["epoch"] * STEPS + origin["step"] == at


def test_the_moments_are_missed(tmp_path: Path) -> None:
    """Or the test above could not tell a restart from a resume."""
    interrupted(tmp_path / "first", 3)
    shutil.copytree(tmp_path / "first" / "shards", tmp_path / "carried")
    resumed, restarted = classifier(), classifier()
    run(tmp_path / "first", resumed, resume=True)
    run(tmp_path / "second", restarted, restart_from=tmp_path / "carried")
    assert not same_weights(restarted, resumed)


def test_the_best_epoch_is_one_of_those_after_the_restart(tmp_path: Path) -> None:
    config = settings(tit="", epochs=4, lr=1e-6)  # nothing is learned: the first epoch stays the best
    interrupted(tmp_path / "first", 2 * STEPS + 1, config=config)
    result = run(tmp_path / "second", config=config, restart_from=carried(tmp_path / "first", tmp_path / "carried"))
    assert result.best is not None and result.best.epoch >= 3
    assert read_metadata(tmp_path / "second")["provenance"]["epoch"] == result.best.epoch


def test_a_restarted_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the time of all of an epoch's steps, wherever they were trained: here each takes a second."""
    step, now, lost = loop._train_step, [0.0], list[Path]()

    def timed(*arguments: Any) -> None:
        step(*arguments)
        now[0] += 1
        for path in lost:
            path.unlink(missing_ok=True)

    monkeypatch.setattr(loop, "_train_step", timed)
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    interrupted(tmp_path / "first", 3)
    shards = carried(tmp_path / "first", tmp_path / "carried")
    whole, resumed = classifier(), classifier()
    run(tmp_path / "whole", whole, restart_from=shards)
    interrupted(tmp_path / "second", 4, restart_from=shards)
    lost.append(tmp_path / "second" / "config.json")
    origin = json.loads(lost[0].read_text())["restarted"]
    run(tmp_path / "second", resumed, resume=True)
    assert same_weights(resumed, whole) and metrics(tmp_path / "second") == metrics(tmp_path / "whole")
    assert json.loads(lost[0].read_text())["restarted"] == origin  # written anew
    for out in (tmp_path / "second", tmp_path / "whole"):
        assert [(r["seconds"], r["images_per_s"]) for r in read_metrics(out)] == [(STEPS, 8)] * 4


def test_a_run_names_the_weights_that_it_began_with_also_when_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run(Path("old"))
    Path("latest").symlink_to("old")
    interrupted(Path("first"), STEPS + 2, init="latest")
    shards = shutil.copytree("first/shards", "carried")
    wanted = {"path": "old", "checkpoint_sha256": sha256_of(Path("old/checkpoint.safetensors"))}
    shutil.rmtree("old")
    run(Path("first"), resume=True, progress=None)
    run(Path("second"), restart_from=shards, progress=None)
    assert capsys.readouterr().out.count("parameters, from old ") == 2
    for out in ("first", "second"):
        assert json.loads(Path(out, "config.json").read_text())["init"] == wanted
        assert read_metadata(out)["provenance"]["init"] == wanted
    for other in ({"resume": True}, {"restart_from": shards}):
        with pytest.raises(ValueError, match="init names what a new run begins with; leave it out"):
            run(Path("first"), init="first", **other)


def test_a_checkpoint_goes_on_after_its_epoch(tmp_path: Path) -> None:
    config = settings(ema=0.5, lr=1e-6)  # nothing is learned: the first epoch stays the best
    interrupted(tmp_path / "first", 2 * STEPS + 1, config=config, how=How())
    epoch = read_metadata(tmp_path / "first")["provenance"]["epoch"]
    assert (epoch, len(metrics(tmp_path / "first"))) == (1, 2)
    earlier = metrics(tmp_path / "first")[:epoch]
    for number, path in enumerate((tmp_path / "first", tmp_path / "first" / "checkpoint.safetensors")):
        out = tmp_path / f"second-{number}"
        run(out, config=config, restart_from=path)
        assert [record["epoch"] for record in metrics(out)] == [1, 2, 3, 4]
        assert metrics(out)[:epoch] == earlier
        assert any(name.startswith("average.") for name in load_file(out / "last.safetensors"))
    interrupted(tmp_path / "third", 1, config=config, restart_from=tmp_path / "first")
    assert metrics(tmp_path / "third") == earlier


def test_of_a_run_the_later_of_shards_and_checkpoint_goes_on(tmp_path: Path) -> None:
    interrupted(tmp_path / "r", STEPS + 2)
    assert (find_restart(tmp_path / "r").epoch, find_restart(tmp_path / "r").step) == (1, 2)
    file = tmp_path / "r" / "checkpoint.safetensors"
    content = read_content(file)
    content["provenance"]["epoch"] = 3  # as if the run had gone on without shards
    write_tensors(file, load_file(file), content)
    assert (find_restart(tmp_path / "r").path, find_restart(tmp_path / "r").epoch) == (file, 3)
    assert find_restart(tmp_path / "r" / "shards").epoch == 1


def test_weights_that_are_replaced_after_their_settings_were_read(tmp_path: Path) -> None:
    interrupted(tmp_path / "r", STEPS + 2, how=How())
    found, file = find_restart(tmp_path / "r"), tmp_path / "r" / "checkpoint.safetensors"
    found.tensors()
    content = read_content(file)
    content["provenance"]["epoch"] = 2
    write_tensors(file, load_file(file), content)
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors was replaced while it was read .*: start again"):
        found.tensors()
    interrupted(tmp_path / "s", STEPS + 2)
    found = find_restart(tmp_path / "s")
    shutil.rmtree(found.path)
    with pytest.raises(ValueError, match="was replaced while it was read"):
        found.tensors()


def test_shards_of_an_earlier_version_and_without_metrics_go_on(tmp_path: Path) -> None:
    """They do not say how long the epoch took so far; metrics that did not come along are left out."""
    interrupted(tmp_path / "first", 2 * STEPS + 1)
    shards = carried(tmp_path / "first", tmp_path / "carried")
    (folder,) = shards.iterdir()
    tensors, content = read_shards(folder), read_shards_content(folder)
    del content["restart"]["seconds"]  # as of an earlier version
    shutil.rmtree(folder)
    write_shards(folder, tensors, content, limit=10_000)
    run(tmp_path / "second", restart_from=shards)
    assert [record["epoch"] for record in metrics(tmp_path / "second")] == [3, 4]


# --- what is refused


def test_other_settings_are_named_but_the_machine_may_be_another(tmp_path: Path) -> None:
    interrupted(tmp_path / "first", 3)
    shards = carried(tmp_path / "first", tmp_path / "carried")
    changed = r"of a run with other settings: training\.lr: 0\.05 -> 0\.1; training\.seed: 0 -> 1; go on with the old"
    with pytest.raises(ValueError, match=changed):
        run(tmp_path / "second", config=settings(lr=0.1, seed=1), restart_from=shards)
    with pytest.raises(ValueError, match=r"network\.tau: 0\.5 -> 0\.25"):
        run(tmp_path / "second", classifier(tau=0.25), restart_from=shards)
    found = find_restart(shards)
    lacking = {name: value for name, value in found.settings["training"].items() if name != "ema"}
    with pytest.raises(ValueError, match=r"training\.ema: \(none\) -> 0\.0; go on with the old"):
        check_restart(replace(found, settings=found.settings | {"training": lacking}), found.settings)
    with pytest.raises(ValueError, match=r"data\.val_images: 24 -> 0"):
        train(classifier(), TRAIN, None, settings(), tmp_path / "second", restart_from=shards, progress=False)
    assert not (tmp_path / "second").exists()
    run(tmp_path / "second", config=settings(precision="bf16", device="auto"), restart_from=shards)


@pytest.mark.parametrize("how", [How(), How(shards_mb=0.01)])
def test_images_in_another_order_are_refused(tmp_path: Path, how: How) -> None:
    interrupted(tmp_path / "first", STEPS + 2, how=how)
    found = find_restart(tmp_path / "first")
    others = run_settings(classifier(), TRAIN, toy_images(24, 3, (1, 8, 8)), settings())
    with pytest.raises(ValueError, match=r"the images are others or in another order, .* --data-dir; go on with the"):
        check_restart(found, others)
    shorter = run_settings(classifier(), TRAIN, toy_images(20, 3, (1, 8, 8)), settings(val_fraction=0.2))
    with pytest.raises(ValueError, match=r"val_fraction: 0.1 -> 0.2; go on with the"):  # which explains the rest
        check_restart(found, shorter)
    same = run_settings(classifier(), TRAIN, VAL, settings())
    check_restart(found, same | {"data": same["data"] | {"name": "folder:elsewhere"}})
    found.settings["data"].pop("fingerprint")  # as of a run of before
    check_restart(found, others)
    with pytest.raises(ValueError, match=r"data\.name: toy -> folder:elsewhere"):
        check_restart(found, same | {"data": same["data"] | {"name": "folder:elsewhere"}})


def test_a_teacher_may_lie_elsewhere_but_must_be_the_same(tmp_path: Path) -> None:
    interrupted(tmp_path / "first", 3)
    found = find_restart(tmp_path / "first")
    here, there = (
        found.settings | {"training": found.settings["training"] | {"distill": path}} for path in ("here/ann", "ann")
    )
    check_restart(replace(found, settings=here), there)
    here["training"]["distill_sha256"], there["training"]["distill_sha256"] = "ab", "cd"
    with pytest.raises(ValueError, match=r"the teacher has other .*: name that one with --distill; go on with"):
        check_restart(replace(found, settings=here), there)
    with pytest.raises(ValueError, match=r"training\.distill: here/ann -> ;"):
        check_restart(replace(found, settings=here), found.settings)
    there["training"]["distill_tau"] = 5.0
    with pytest.raises(ValueError, match=r"other settings: training\.distill_tau: 3\.0 -> 5\.0; go on with the old"):
        check_restart(replace(found, settings=here), there)


IN_8_BITS = r"was fine-tuned in 8 bits \(--qat\); start that again with --init"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"int8": {}}, IN_8_BITS),
        ({"training": {"qat": True}}, IN_8_BITS),
        ({"provenance": {}}, "does not say which epoch it is of; use it with --init"),
        ({"restart": {"epoch": 1}}, r"restart\.step is missing"),
    ],
)
def test_weights_in_8_bits_or_of_no_epoch_are_refused(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    interrupted(tmp_path / "r", STEPS + 2, how=How())
    file = tmp_path / "r" / "checkpoint.safetensors"
    content = read_content(file)
    training = content["training"] | changes.get("training", {})
    write_tensors(file, load_file(file), content | changes | {"training": training})
    with pytest.raises(ValueError, match=match):
        find_restart(tmp_path / "r")


def test_weights_of_another_network_are_listed(tmp_path: Path) -> None:
    interrupted(tmp_path / "first", 3)
    shards = carried(tmp_path / "first", tmp_path / "carried")
    other = classifier()
    other.network.extra = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"do not fit the network; missing: extra\.weight, extra\.bias"):
        run(tmp_path / "second", other, restart_from=shards)


def test_a_damaged_or_missing_shard_is_named(tmp_path: Path) -> None:
    interrupted(tmp_path / "first", 3)
    (folder,) = carried(tmp_path / "first", tmp_path / "carried").iterdir()
    last = max(folder.glob("model-*.safetensors"))
    whole = last.read_bytes()
    for place in (-1, 9):  # in a weight, and in the header, which is read before them
        last.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place:][1:])
        with pytest.raises(ValueError, match=rf"{last.name} is not the file that {INDEX_NAME} was written for"):
            run(tmp_path / "second", restart_from=folder)
    last.unlink()
    with pytest.raises(ValueError, match=rf"lacks {last.name}"):
        run(tmp_path / "third", restart_from=folder)


def test_shards_that_came_without_their_index_are_named(tmp_path: Path) -> None:
    """As the last file of an archive that was cut."""
    interrupted(tmp_path / "first", 3)
    shards = carried(tmp_path / "first", tmp_path / "carried" / "shards")
    (folder,) = shards.iterdir()
    (folder / INDEX_NAME).unlink()
    for named in (folder, shards, shards.parent):
        with pytest.raises(FileNotFoundError, match=rf"{folder.name} has shards, but not their {INDEX_NAME}; copy all"):
            run(tmp_path / "second", restart_from=named)
    for named in (folder, shards):
        with pytest.raises(FileNotFoundError, match="but not their"):
            tetdeploy.load(named)


@pytest.mark.parametrize("lost", [INDEX_NAME, "model-00001-of-*"])
def test_no_earlier_weights_are_taken_where_the_newest_shards_lack_a_file(tmp_path: Path, lost: str) -> None:
    interrupted(tmp_path / "first", STEPS + 2)
    (newest,) = (tmp_path / "first" / "shards").iterdir()
    shutil.copytree(newest, newest.with_name("epoch-00001-step-000000"))
    (file,) = newest.glob(lost)
    file.unlink()
    for named in (tmp_path / "first", newest.parent):
        with pytest.raises((FileNotFoundError, ValueError), match=rf"{newest.name} (has shards, but not|lacks model)"):
            find_restart(named)


def test_a_run_in_its_first_epoch_has_no_weights_though_it_has_shards(tmp_path: Path) -> None:
    interrupted(tmp_path / "first", 3)
    with pytest.raises(FileNotFoundError, match="its first epoch is not finished"):
        tetdeploy.load(tmp_path / "first")
    (tmp_path / "first" / "last.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"its last weights are in shards: name .*first.shards"):
        tetdeploy.load(tmp_path / "first")
    assert tetdeploy.load(tmp_path / "first" / "shards")


def test_nothing_is_left_to_train(tmp_path: Path) -> None:
    run(tmp_path / "first")
    with pytest.raises(ValueError, match=r"is of the last of 4 epochs: nothing is left to train; .*--init"):
        run(tmp_path / "second", restart_from=tmp_path / "first")


def test_what_is_no_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing does not exist; give a checkpoint"):
        run(tmp_path / "r", restart_from=tmp_path / "nothing")
    interrupted(tmp_path / "first", 3)
    with pytest.raises(ValueError, match=r"already holds a run"):
        run(tmp_path / "first", restart_from=tmp_path / "first")
    with pytest.raises(ValueError, match=r"resume goes on .* choose one of them"):
        run(tmp_path / "first", restart_from=tmp_path / "first", resume=True)
    with pytest.raises(ValueError, match=r"holds the state of a training run"):
        run(tmp_path / "r", restart_from=tmp_path / "first" / "last.safetensors")
    with pytest.raises(ValueError, match=r"shards_mb is 0\.0; .* must be above 0"):
        How(shards_mb=0.0)
    with pytest.raises(ValueError, match=r"shards_mb is 1e\+308; it is the size of a file in MB"):
        How(shards_mb=1e308)
    with pytest.raises(ValueError, match=r"0\.003 MB are too small: allow \S+ MB or more") as refused:
        run(tmp_path / "r", how=How(shards_mb=0.003))
    assert not list((tmp_path / "r").glob("*"))
    enough = float(str(refused.value).split()[-4])
    run(tmp_path / "r", how=How(shards_mb=enough))
    with pytest.raises(ValueError, match="are too small"):
        run(tmp_path / "second", restart_from=tmp_path / "first", how=How(shards_mb=0.003))
    assert not list((tmp_path / "second").glob("*"))


# --- the command


command = partial(printed, "train")


@pytest.fixture
def half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Shards of a command's run that a Ctrl-C ended in its second of three epochs."""
    monkeypatch.chdir(tmp_path)
    step, count = loop._train_step, iter(range(1, 1000))

    def stopped(*arguments: Any) -> None:
        step(*arguments)
        if next(count) == 8:  # of 5 an epoch
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_train_step", stopped)
        options = ("--epochs", 3, "--width", 0.25, "--T", 1, "--lr", 3e-3, "--batch-size", 256)
        command(*options, "--out", "r", "--shards-mb", 1, code=INTERRUPTED)
    return carried(Path("r"), Path("carried"))


def test_the_command_takes_the_settings_of_the_weights(half: Path) -> None:
    command("--restart-from", half, "--out", "second")
    written = json.loads(Path("second/config.json").read_text())
    assert written["training"]["lr"] == 3e-3 and written["network"]["width"] == 0.25
    assert [record["epoch"] for record in metrics(Path("second"))] == [1, 2, 3]
    assert written["restarted"]["epoch"] == 1 and written["restarted"]["step"] == 3
    command("--resume", "second")


def test_the_command_refuses_what_does_not_go_together(half: Path) -> None:
    for options in (["--init", "x"], ["--resume"], ["--seeds", "0,1"], ["--qat"]):
        said = refused("train", "--restart-from", half, *options, code=2)
        assert "not together with --resume, --init, --seeds or --qat" in said
    assert "training.lr: 0.003 -> 0.1" in refused("train", "--restart-from", half, "--lr", 0.1)
    assert "nowhere does not exist" in refused("train", "--restart-from", "nowhere")
    assert "--shards-mb" in refused("train", "--shards-mb", -1, code=2)


def test_export_takes_shards(half: Path) -> None:
    output = printed("export", half, "--check", "20")
    assert "epoch-00001-step-000003: the weights after 1 epochs and 3 steps, not the best epoch's" in output
    (model,) = Path().glob("carried/*.onnx")
    printed("validate", model, "--against", half, "--limit", "20")
    other = shutil.copytree(half / "epoch-00001-step-000003", Path("other"))
    index = json.loads((other / INDEX_NAME).read_text())
    (other / INDEX_NAME).write_text(json.dumps(index | {"changed": True}))
    assert "was not exported from other" in refused("validate", model, "--against", other, "--limit", "20")


def test_a_network_of_ones_own_is_not_imported_because_a_file_says_so(half: Path) -> None:
    folder = max(half.iterdir())
    tensors, content = read_shards(folder), read_shards_content(folder)
    content["network"]["model"] = "somebody:network"
    shutil.rmtree(folder)
    write_shards(folder, tensors, content, limit=10**6)
    assert "holds a network of your own: pass --model somebody:network" in refused("train", "--restart-from", half)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[How]:
    """How each run of the test is computed; graphs are allowed on a CPU."""
    given: list[How] = []
    whole = training.train

    def watched(*arguments: Any, how: How, **options: Any) -> TrainResult:
        given.append(how)
        return whole(*arguments, how=how, **options)

    monkeypatch.setattr("tetdeploy.train.train", watched)
    monkeypatch.setattr("tetdeploy.train.seeds.train", watched)
    monkeypatch.setattr("tetdeploy.train.session.check_graphs", lambda *_: None)
    monkeypatch.setattr("tetdeploy.train.session.StepGraphs", lambda _: None)
    return given


SMALL = ("--width", 0.25, "--T", 1, "--batch-size", 512, "--epochs", 2)


def test_a_resumed_run_goes_on_with_its_shards_and_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[How]
) -> None:
    """What is typed comes first, and is remembered; neither is a setting that must be the same."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "run_epochs", lambda *_: True)  # never finished: of a run that is, nothing is written
    command(*SMALL, "--out", "r", "--shards-mb", 1, "--cuda-graphs")
    for options in (
        *((), ("--shards-mb", 2, "--no-cuda-graphs"), (), ("--shards-mb", 0), ()),
        *(("--shards-mb", 4, "--recompute"), (), ("--no-recompute",)),
    ):
        command("--resume", "r", *options)
    assert given == [
        *(How(cuda_graphs=True, shards_mb=1.0), How(cuda_graphs=True, shards_mb=1.0), How(shards_mb=2.0)),
        *(How(shards_mb=2.0), How(), How()),
        *(How(shards_mb=4.0, recompute=True), How(shards_mb=4.0, recompute=True), How(shards_mb=4.0)),
    ]
    assert json.loads(Path("r/config.json").read_text())["how"] == asdict(How(shards_mb=4.0))
    said = refused("train", *SMALL, "--out", "q", "--recompute", "--cuda-graphs")
    assert "pass --no-recompute or --no-cuda-graphs" in said
    given.clear()
    command(*SMALL, "--out", "s", "--seeds", "0,1", "--shards-mb", 3)
    command("--resume", "s")
    assert given == [How(shards_mb=3.0)] * 4


def test_shards_that_are_switched_off_are_written_no_more(half: Path) -> None:
    command("--restart-from", half, "--out", "with")
    command("--restart-from", half, "--out", "without", "--shards-mb", 0)
    assert Path("with/shards").exists() and not Path("without/shards").exists()


def test_a_restarted_run_goes_on_with_the_shards_and_graphs_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[How]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "check_restart", lambda *_: None)  # of a finished run nothing is left to train
    command(*SMALL, "--out", "r", "--shards-mb", 1, "--cuda-graphs")
    command("--restart-from", "r/shards", "--out", "of-shards")
    command("--restart-from", "r/checkpoint.safetensors", "--out", "of-checkpoint")
    command("--restart-from", "r/shards", "--out", "typed", "--shards-mb", 2, "--no-cuda-graphs")
    shutil.copy("r/checkpoint.safetensors", "alone.safetensors")
    command("--restart-from", "alone.safetensors", "--out", "alone")
    assert given == [*[How(cuda_graphs=True, shards_mb=1.0)] * 3, How(shards_mb=2.0), How()]


def test_a_command_that_torchrun_starts_again_begins_no_second_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert "go on with --resume" in refused("train", "--epochs", "1", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
