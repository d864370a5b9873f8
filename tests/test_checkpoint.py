"""Checkpoints: round trip, what is refused and how it is said, the newest run."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import Bomb, same_weights
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tetdeploy
from tetdeploy.checkpoint import load, load_weights, read_checkpoint, read_metadata, save_checkpoint
from tetdeploy.networks import Classifier, NetworkConfig, build_network
from tetdeploy.steps import trained_T
from tetdeploy.storage.files import atomic_folder, atomic_write, check_writable, write_json
from tetdeploy.storage.metrics import metrics_line, read_metrics, write_metrics
from tetdeploy.storage.provenance import own_fraction
from tetdeploy.storage.run_folder import (
    checkpoint_file,
    latest_run,
    newest_export,
    newest_run,
    other_checkpoint,
    weights_file,
    weights_sha256,
    without_latest,
)
from tetdeploy.storage.shards import read_shards, write_shards


class OwnNetwork(nn.Module):
    """A user's own network that follows the contract; its one linear layer is registered twice."""

    def __init__(self, features: int = 16, classes: int = 3) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(features)
        self.readout = nn.Linear(features, classes)
        self.again = self.readout

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        return self.again(self.norm(x.flatten(1))).expand(T, -1, -1)


def classifier_of(network: nn.Module, config: NetworkConfig) -> Classifier:
    names = tuple(f"class {k}" for k in range(config.num_classes))
    channels = config.in_channels
    mean, std = (0.4914, 0.4822, 0.4465)[:channels], (0.2023, 0.1994, 0.201)[:channels]
    return Classifier(network, config=config, mean=mean, std=std, class_names=names, data="digits")


def convsnn(num_classes: int = 3, **options: Any) -> Classifier:
    config = NetworkConfig("convsnn", num_classes, 1, (8, 8), **({"width": 0.125} | options))
    return classifier_of(build_network(config), config)


def own() -> Classifier:
    return classifier_of(OwnNetwork(), NetworkConfig("mine.nets:small", 3, 1, (4, 4)))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, convsnn(), training={"T": 4}, provenance={"epoch": 7})
    return path


def rewrite(path: Path, change: Any) -> None:
    """Apply `change` to the JSON in a checkpoint's metadata, leaving the tensors."""
    tensors, content = load_file(path), read_metadata(path)
    change(content)
    save_file(tensors, path, metadata={"tetdeploy": json.dumps(content)})


def test_round_trip_gives_the_same_logits_and_settings(tmp_path: Path) -> None:
    classifier = convsnn(tau=0.25, v_th=0.5, gamma=2.0)
    images = torch.randint(256, (5, 1, 8, 8), dtype=torch.uint8)
    classifier.train()(images, 3)  # BN statistics are part of what must come back
    path = tmp_path / "new" / "folder" / "c.safetensors"
    save_checkpoint(path, classifier, training={"T": 4}, provenance={"epoch": 7})
    loaded = tetdeploy.load(path)
    assert not loaded.training
    assert loaded.config == classifier.config
    assert (loaded.class_names, loaded.data) == (classifier.class_names, "digits")
    torch.testing.assert_close(loaded(images, 5), classifier.eval()(images, 5), rtol=0, atol=0)


def test_a_callers_defaults_and_random_numbers_play_no_part(saved: Path) -> None:
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            loaded = tetdeploy.load(saved)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    wanted = load(saved).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in loaded.state_dict().items())
    assert {(p.device.type, p.dtype) for p in loaded.parameters()} == {("cpu", torch.float32)}
    assert loaded.mean.device.type == "cpu"


def test_a_run_folder_stands_for_its_checkpoint(saved: Path) -> None:
    assert read_metadata(saved.parent) == read_metadata(saved)
    assert load(saved.parent).config == load(saved).config


def test_metadata_says_all_that_serving_needs(saved: Path) -> None:
    metadata = read_metadata(saved)
    assert metadata["format"] == 1
    assert metadata["network"]["image_size"] == [8, 8]
    assert metadata["data"] == {
        "name": "digits",
        "encoding": "direct",
        "mean": [0.4914],
        "std": [0.2023],
        "class_names": ["class 0", "class 1", "class 2"],
        "image_shape": [1, 8, 8],
    }
    assert (metadata["training"], metadata["provenance"]) == ({"T": 4}, {"epoch": 7})


def test_metadata_are_read_without_torch_and_safetensors(saved: Path) -> None:
    code = (
        "import sys; from tetdeploy.checkpoint import read_metadata; print(read_metadata(sys.argv[1])['format']);"
        "assert not {'torch', 'safetensors'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr) == ("1\n", "")


def test_what_was_read_stays_where_another_file_takes_its_place(saved: Path) -> None:
    before, weights, sha256 = read_checkpoint(saved), load(saved), weights_sha256(saved)
    save_checkpoint(saved, convsnn(), training={"T": 5}, provenance={})
    assert (before.sha256, before.metadata["training"]["T"]) == (sha256, 4)
    other = convsnn()
    load_weights(other, before)
    assert same_weights(load(before), weights) and same_weights(other, weights)
    assert not same_weights(load(saved), weights)


def test_what_is_read_is_of_one_file_where_another_takes_its_place_meanwhile(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced = 0

    def replacing(file: Path) -> str:
        nonlocal replaced
        replaced += 1
        if replaced != 2:
            save_checkpoint(file, convsnn(), training={"T": replaced}, provenance={})
        return weights_sha256(file)

    monkeypatch.setattr("tetdeploy.checkpoint.weights_sha256", replacing)
    read = read_checkpoint(saved)
    assert (read.sha256, read.metadata["training"]["T"]) == (weights_sha256(saved), 1)
    assert all(torch.equal(tensor, read.tensors[name]) for name, tensor in load_file(saved).items())
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is being written: others took its place each time"):
        read_checkpoint(saved)
    assert replaced == 2 + 5


def test_shards_that_are_gone_while_they_are_read_give_way_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(epoch: int) -> Path:
        save_checkpoint(tmp_path / "c.safetensors", convsnn(), training={"T": epoch}, provenance={})
        content, network = read_metadata(tmp_path / "c.safetensors"), load_file(tmp_path / "c.safetensors")
        folder = tmp_path / f"epoch-{epoch}"
        write_shards(folder, {f"network.{name}": tensor for name, tensor in network.items()}, content, limit=10**6)
        return folder

    def removing(folder: Path) -> dict[str, Tensor]:
        if folder == first:
            write(2)
            shutil.rmtree(folder)
        return read_shards(folder)

    def found(path: Path) -> Path:
        file = weights_file(path)
        if file == second:
            write(3)
            shutil.rmtree(file)
        return file

    first, second = write(1), tmp_path / "epoch-2"
    monkeypatch.setattr("tetdeploy.checkpoint.read_shards", removing)
    read = read_checkpoint(tmp_path)
    assert (read.file, read.metadata["training"]["T"]) == (tmp_path / "epoch-2", 2)
    with pytest.raises(FileNotFoundError, match="epoch-1 does not exist"):
        read_checkpoint(first)
    monkeypatch.setattr("tetdeploy.checkpoint.weights_file", found)
    assert read_checkpoint(tmp_path).metadata["training"]["T"] == 3


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_weights_are_mapped_and_not_copied(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = read_checkpoint(saved).tensors
    assert tensors and str(saved) in Path("/proc/self/maps").read_text()
    del tensors
    monkeypatch.setattr(sys, "platform", "win32")  # where no other file could take the place of a mapped one
    tensors = read_checkpoint(saved).tensors
    assert tensors and str(saved) not in Path("/proc/self/maps").read_text()


def test_own_networks_are_never_imported_because_a_file_says_so(tmp_path: Path) -> None:
    path, classifier = tmp_path / "own.safetensors", own()
    save_checkpoint(path, classifier, training={}, provenance={})
    with pytest.raises(ValueError, match=r"not imported because a file says so; pass --model mine\.nets:small"):
        load(path)
    loaded = load(path, network=OwnNetwork())
    for other in ("mine.nets:small", OwnNetwork):
        with pytest.raises(
            ValueError, match=r"network must be an instance of torch\.nn\.Module, got .*(small|OwnNetwork)"
        ):
            load(path, network=other)
    with pytest.raises(ValueError, match=r"^'1\.weight' of the network gets its size from the first image; run"):
        load(path, network=nn.Sequential(nn.Flatten(), nn.LazyLinear(10)))
    images = torch.randint(256, (2, 1, 4, 4), dtype=torch.uint8)
    torch.testing.assert_close(loaded(images, 2), classifier.eval()(images, 2), rtol=0, atol=0)


def test_weights_start_another_run(saved: Path) -> None:
    other = convsnn(tau=0.9)
    load_weights(other, saved)
    assert other.config.tau == 0.9
    state, wanted = other.network.state_dict(), load(saved).network.state_dict()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


def test_weights_that_are_nan_are_named_and_change_nothing(tmp_path: Path) -> None:
    made, other = convsnn(), convsnn()
    names = [name for name in made.network.state_dict() if name.endswith(("readout.2.weight", "running_var"))]
    for name in names:
        made.network.state_dict()[name].view(-1)[0] = torch.nan
    save_checkpoint(tmp_path / "c.safetensors", made, training={}, provenance={})
    before = {name: value.clone() for name, value in other.network.state_dict().items()}
    with pytest.raises(ValueError, match=rf"c\.safetensors holds NaN in .*{names[-1]}.*: it is damaged"):
        load_weights(other, tmp_path / "c.safetensors")
    assert all(torch.equal(before[name], value) for name, value in other.network.state_dict().items())


def test_integers_in_place_of_weights_are_refused(saved: Path) -> None:
    content = json.dumps(read_metadata(saved))
    tensors = {name: tensor.half() for name, tensor in load_file(saved).items()}  # BN's counts as well
    save_file(tensors, saved, metadata={"tetdeploy": content})
    assert load(saved).network.state_dict()["readout.2.weight"].dtype == torch.float32
    tensors["readout.2.weight"] = (100 * tensors["readout.2.weight"]).to(torch.int8)
    save_file(tensors, saved, metadata={"tetdeploy": content})
    with pytest.raises(
        ValueError, match=r"torch\.int8 where the network has torch\.float32, in readout\.2\.weight: what"
    ):
        load(saved)


def test_weights_that_do_not_fit_are_listed_and_change_nothing(saved: Path) -> None:
    other = convsnn(num_classes=5)
    before = {name: value.clone() for name, value in other.network.state_dict().items()}
    with pytest.raises(ValueError, match=r"misshapen: readout.*weight \[3, 32\], wanted \[5, 32\]"):
        load_weights(other, saved)
    assert all(torch.equal(before[name], value) for name, value in other.network.state_dict().items())
    with pytest.raises(ValueError, match=r"missing: norm\.weight, .*again\.bias; unexpected: .*readout"):
        load(saved, network=OwnNetwork())


def test_for_other_classes_the_readout_stays_as_it_is(saved: Path) -> None:
    other, same, wider = convsnn(num_classes=5), convsnn(), convsnn(num_classes=5, width=0.5)
    before = {name: value.clone() for name, value in other.network.state_dict().items()}
    kept = load_weights(other, saved, other_classes=True)
    assert kept == ["readout.2.weight", "readout.2.bias"]
    wanted = load(saved).network.state_dict() | {name: before[name] for name in kept}
    assert all(torch.equal(wanted[name], value) for name, value in other.network.state_dict().items())
    assert load_weights(same, saved, other_classes=True) == []
    with pytest.raises(ValueError, match=r"misshapen: encode"):
        load_weights(wider, saved, other_classes=True)


def test_a_readout_of_other_inputs_does_not_stay_as_it_is(tmp_path: Path) -> None:
    def without_norm(features: int, classes: int) -> Classifier:
        network = OwnNetwork(features, classes)
        network.norm = nn.Identity()
        return classifier_of(network, NetworkConfig("mine.nets:small", classes, 1, (4, 4)))

    save_checkpoint(tmp_path / "own.safetensors", without_norm(16, 3), training={}, provenance={})
    with pytest.raises(ValueError, match=r"misshapen: readout\.weight \[3, 16\], wanted \[5, 8\]"):
        load_weights(without_norm(8, 5), tmp_path / "own.safetensors", other_classes=True)


@pytest.mark.parametrize("name", ["missing.safetensors", "no/such/run"])
def test_a_wrong_path_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist; give a checkpoint"):
        load(tmp_path / name)


def test_folders_without_checkpoint_say_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no checkpoint\.safetensors; it is not a run folder"):
        load(tmp_path)
    seed = tmp_path / "seed-1" / "config.json"
    seed.parent.mkdir()
    seed.touch()
    with pytest.raises(FileNotFoundError, match=r"it has a run's settings, and no weights: name another run$"):
        load(seed.parent)
    with pytest.raises(FileNotFoundError, match=r"the runs of several seeds: none has finished an epoch yet$"):
        load(tmp_path)
    (seed.parent / "checkpoint.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=f"the runs of several seeds: name one, such as {seed.parent}"):
        load(tmp_path)
    (tmp_path / "last.safetensors").touch()
    with pytest.raises(FileNotFoundError, match="first epoch is not finished: go on with --resume"):
        load(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 8, 100, -1])
def test_truncated_files_are_refused(saved: Path, kept: int) -> None:
    saved.write_bytes(saved.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is truncated: \d+ bytes.*; copy or train it again$"):
        load(saved)


def test_what_is_no_path_or_flag_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="path must be the path of a checkpoint or a run folder, got None"):
        load(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="other_classes must be True or False, got 'no'"):
        load_weights(load(saved), saved, other_classes="no")  # type: ignore[arg-type]


def test_pickles_and_torch_files_are_never_unpickled(tmp_path: Path) -> None:
    for protocol in range(2, 6):
        (tmp_path / "model.pt").write_bytes(pickle.dumps(Bomb(), protocol=protocol))
        with pytest.raises(ValueError, match=r"is a pickle, not a checkpoint.*unpickling can run code"):
            load(tmp_path / "model.pt")
    torch.save({"bomb": Bomb()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"is a zip archive, as torch\.save writes.*\.safetensors files"):
        read_metadata(tmp_path / "model.pt")


@pytest.mark.parametrize(
    "content",
    [
        b"hello, this is some text",
        struct.pack("<Q", 4) + b"nope",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 16) + b'{"a": {"b": 1}} ',
        struct.pack("<Q", 20) + b'{"__metadata__": 3}  ',
        struct.pack("<Q", 28) + b'{"a": {"data_offsets": [0]}}',
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        struct.pack("<Q", 37) + b'{"a": {"data_offsets": ["0", "12"]}} ' + bytes(12),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match="is not a checkpoint: not a safetensors file"):
        load(tmp_path / "x")


@pytest.mark.parametrize("name", ["model-T4.onnx", "model-T4.engine", "model.nir"])
def test_an_exported_model_is_no_checkpoint(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x08\n\x12\ttetdeploy")
    with pytest.raises(ValueError, match=f"{name} is an exported model, not a checkpoint; give the run folder"):
        load(tmp_path / name)


def test_a_pointer_of_git_lfs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(ValueError, match=r"x is a pointer of Git LFS in place of the weights; fetch .* git lfs pull$"):
        load(tmp_path / "x")


def test_foreign_safetensors_are_refused(tmp_path: Path) -> None:
    for metadata in (None, {"format": "pt"}):
        save_file({"weight": torch.zeros(3)}, tmp_path / "x.safetensors", metadata=metadata)
        with pytest.raises(ValueError, match="safetensors file but not a tetdeploy checkpoint"):
            load(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 22) + b'{"__metadata__": null}')
    with pytest.raises(ValueError, match="safetensors file but not a tetdeploy checkpoint"):
        load(tmp_path / "x.safetensors")


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x"
    header = json.dumps({"__metadata__": {"tetdeploy": json.dumps({"format": 1, "training": {}})}}).encode()
    path.write_bytes(struct.pack("<Q", 0x0280) + header.ljust(0x0280))  # a pickle of protocol 2 opens with 80 02
    with pytest.raises(ValueError, match="lacks network, data, provenance"):
        read_metadata(path)


def test_damaged_metadata_are_refused(saved: Path) -> None:
    rewrite(saved, lambda content: content["network"].update(model="resnet1"))
    with pytest.raises(ValueError, match=r"checkpoint.safetensors: unknown model 'resnet1'; choose one of convsnn"):
        load(saved)
    rewrite(saved, lambda content: content["network"].update(model="convsnn", depth=3))
    with pytest.raises(ValueError, match=r"do not describe a network this tetdeploy knows: .*'depth'"):
        load(saved)
    rewrite(saved, lambda content: content.pop("data"))
    with pytest.raises(ValueError, match="metadata lacks data"):
        load(saved)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model", -1, "must be str, got -1"),
        ("num_classes", None, "is missing"),
        ("in_channels", 0, "must be a whole number of at least 1, got 0"),
        ("image_size", [8, "8"], "must be a whole number of at least 1, got '8'"),
        *(
            (name, "1", "must be a finite number, got '1'")
            for name in ("width", "tau", "v_th", "gamma", "smooth_spike")
        ),
        ("ann", 1, "must be bool, got 1"),
    ],
)
def test_a_network_with_damaged_settings_is_refused(saved: Path, name: str, value: Any, message: str) -> None:
    rewrite(saved, lambda content: content["network"].update({name: value}))
    with pytest.raises(ValueError, match=rf"of its metadata, network\.{name}\S* {message}; the file was changed"):
        read_metadata(saved)


def test_names_of_classes_that_are_numbers_become_texts() -> None:
    net, statistics = convsnn(), {"mean": (0.5,), "std": (0.2,), "data": "x"}
    made = Classifier(net.network, config=net.config, class_names=range(3), **statistics)  # type: ignore[arg-type]
    assert made.class_names == ("0", "1", "2")


@pytest.mark.parametrize(
    ("part", "changes", "fault"),
    [
        ("data", {"class_names": {}}, r"data\.class_names must be a list, got {}"),
        ("training", {"T": [2]}, r"training\.T must be a whole number of at least 1, got \[2\]"),
        ("training", {"val_fraction": 7}, r"training\.val_fraction must be a number from 0 to 1, got 7"),
        ("provenance", {"val_accuracy": "high"}, r"provenance\.val_accuracy must be a finite number, got 'high'"),
    ],
)
def test_damaged_words_on_data_and_training_are_refused(
    saved: Path, part: str, changes: dict[str, Any], fault: str
) -> None:
    rewrite(saved, lambda content: content[part].update(changes))
    with pytest.raises(ValueError, match=rf"of its metadata, {fault}; the file was changed"):
        read_metadata(saved)


@pytest.mark.parametrize(
    ("training", "fault"),
    [
        ({"T": "4"}, r"training\.T must be a whole number of at least 1, got '4'"),
        ({"T": 0}, r"training\.T must be a whole number of at least 1, got 0"),
        ({"seed": 2**64}, "a whole number is beyond 64 bits: 18446744073709551616"),
        ({"val_fraction": 7}, r"training\.val_fraction must be a number from 0 to 1, got 7"),
    ],
)
def test_what_reading_would_refuse_is_not_written(saved: Path, training: dict[str, Any], fault: str) -> None:
    before = saved.read_bytes()
    with pytest.raises(ValueError, match=f"^{fault}$"):
        save_checkpoint(saved, convsnn(), training=training, provenance={})
    with pytest.raises(TypeError, match="Tensor is not JSON serializable"):
        save_checkpoint(saved, convsnn(), training={"lr": torch.ones(())}, provenance={})
    assert saved.read_bytes() == before


def test_numbers_that_json_has_not_are_null_which_says_nothing(saved: Path) -> None:
    training = {"T": None, "val_fraction": math.nan}
    save_checkpoint(saved, convsnn(), training=training, provenance={"loss": math.inf})
    found = read_metadata(saved)
    assert (found["training"], found["provenance"]) == ({"T": None, "val_fraction": None}, {"loss": None})
    assert (trained_T(found), own_fraction(found)) == (4, 0.0)
    assert own_fraction({"training": None}) == own_fraction({}) == 0.0


@pytest.mark.parametrize("name", ["encoding", "image_shape"])
def test_metadata_that_lack_a_setting_of_the_data_are_refused(saved: Path, name: str) -> None:
    rewrite(saved, lambda content: content["data"].pop(name))
    with pytest.raises(ValueError, match=rf"metadata lacks data\.{name}; the file was changed after it was written"):
        read_metadata(saved)


def test_damaged_words_on_what_a_run_began_with_are_refused(saved: Path) -> None:
    rewrite(saved, lambda content: content["provenance"].update(init={"path": "runs/a"}))
    with pytest.raises(ValueError, match=r"of its metadata, provenance\.init\.checkpoint_sha256 is missing; the file"):
        read_metadata(saved)


def test_newer_and_unreadable_formats_are_refused(saved: Path) -> None:
    rewrite(saved, lambda content: content.update(format=2))
    with pytest.raises(ValueError, match="has format 2, this tetdeploy reads format 1; update tetdeploy"):
        load(saved)
    for text in ("{", "{}", "[]"):
        save_file({"weight": torch.zeros(3)}, saved, metadata={"tetdeploy": text})
        with pytest.raises(ValueError, match="metadata cannot be read"):
            load(saved)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (SafetensorError("it is odd"), r"cannot write .*: it is odd; an earlier file there is as it was"),
        (SafetensorError("I/O error: No space left (os error 28)"), r"No space left on device: '.*checkpoint"),
        (SafetensorError("IoError(Os { code: 28, kind: StorageFull })"), r"No space left on device: '.*checkpoint"),
    ],
)
def test_a_failed_write_leaves_the_earlier_file(
    error: Exception, message: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise error

    before = saved.read_bytes()
    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match=message):
        save_checkpoint(saved, convsnn(), training={}, provenance={})
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_pipe_is_not_replaced_and_a_link_is_followed(tmp_path: Path) -> None:
    """As root even `--json /dev/null` would have taken the device's place."""
    pipe, link, target = tmp_path / "pipe", tmp_path / "link", tmp_path / "deeper" / "target"
    os.mkfifo(pipe)
    for attempt in (lambda: check_writable(pipe, remedy="choose another with --json"), lambda: write_json(pipe, {})):
        with pytest.raises(OSError, match=r"cannot write .*pipe: it is a device or a pipe; choose another"):
            attempt()
    assert pipe.is_fifo()
    link.symlink_to("deeper/target")
    for content in ({"a": 1}, {"a": 2}):
        write_json(link, content)
        assert link.is_symlink() and json.loads(target.read_text()) == content
    assert {path.name for path in tmp_path.rglob("*")} == {"pipe", "link", "deeper", "target"}


def test_json_has_null_for_what_it_has_no_number_for(tmp_path: Path) -> None:
    nan, infinity = float("nan"), float("inf")
    write_json(tmp_path / "a.json", {"a": nan, "b": [1.5, -infinity, ("c", nan)], "d": {"e": infinity, "f": True}})
    expected = {"a": None, "b": [1.5, None, ["c", None]], "d": {"e": None, "f": True}}
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail) == expected
    records = [{"epoch": 1, "val_loss": 0.5, "val_tet_loss": infinity}, {"epoch": 2, "val_loss": nan}]
    write_metrics(tmp_path, map(metrics_line, records))
    assert [(r["val_loss"], r.get("val_tet_loss")) for r in read_metrics(tmp_path)] == [(0.5, None), (None, None)]


@pytest.mark.parametrize("write", [atomic_write, atomic_folder])
def test_folders_that_were_made_go_again_where_nothing_is_written(write: Any, tmp_path: Path) -> None:
    def fails() -> None:
        raise ValueError("it is damaged")

    before = os.umask(0o022)
    for path in (tmp_path / "a" / "b" / "c", tmp_path / "c"):
        with pytest.raises(ValueError, match="it is damaged"), write(path):
            fails()
    assert list(tmp_path.iterdir()) == []
    with write(tmp_path / "a" / "b" / "c"), pytest.raises(ValueError, match="it"), write(tmp_path / "a" / "d" / "e"):
        fails()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["a", "a/b", "a/b/c"]
    plain = tmp_path / "plain"
    plain.touch() if write is atomic_write else plain.mkdir()
    assert (tmp_path / "a" / "b" / "c").stat().st_mode == plain.stat().st_mode  # whoever may read that may read this
    assert os.umask(before) == 0o022


def test_a_checkpoint_is_no_more_private_than_other_files(tmp_path: Path) -> None:
    for umask in (0o022, 0o077):
        before = os.umask(umask)
        save_checkpoint(tmp_path / f"{umask}.safetensors", convsnn(), training={}, provenance={})
        (tmp_path / f"{umask}.plain").touch()
        os.umask(before)
        modes = [(tmp_path / f"{umask}{suffix}").stat().st_mode for suffix in (".safetensors", ".plain")]
        assert modes[0] == modes[1]


def test_another_file_that_is_missing_meanwhile_has_its_own_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, atomic_write(tmp_path / "written"):
        (tmp_path / "read").read_bytes()
    assert caught.value.filename == str(tmp_path / "read")


@pytest.mark.parametrize("write", [atomic_write, atomic_folder])
def test_content_is_on_the_disk_before_it_has_its_name(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And lies on the same file system: a rename crosses none."""

    def fill(path: Path) -> None:
        with write(path) as temporary:
            assert temporary.parent == tmp_path
            file = temporary if write is atomic_write else temporary / "1" / "file"
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(b"content")

    def sync(number: int) -> None:
        sizes.append(0 if path.exists() else os.fstat(number).st_size)
        if code:
            raise OSError(code, os.strerror(code))

    sizes: list[int] = []
    monkeypatch.setattr("tetdeploy.storage.files.os.fsync", sync)
    for code in (0, errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EIO):  # four of which do no harm
        path = tmp_path / f"written-{code}"
        with pytest.raises(OSError, match=re.escape(str(path))) if code == errno.EIO else nullcontext():
            fill(path)
        assert path.exists() == (code != errno.EIO)
    assert sizes == [len(b"content")] * 5 and len([*tmp_path.iterdir()]) == 4


def test_a_folder_that_cannot_be_made_is_named(saved: Path) -> None:
    with pytest.raises(OSError, match=r"cannot write .*c\.safetensors: .*choose another output folder"):
        save_checkpoint(saved / "c.safetensors", convsnn(), training={}, provenance={})
    with pytest.raises(OSError, match=r"cannot write .*: Is a directory; choose another name"):
        write_json(saved.parent, {})


def test_an_empty_file_may_be_written_over(tmp_path: Path) -> None:
    """As a shell's redirection leaves one."""
    path = tmp_path / "result.json"
    path.touch()
    check_writable(path, begins=b"{", remedy="choose another with --json")
    path.write_text("x")
    with pytest.raises(OSError, match="it is there, and something else; choose another with --json, or remove it"):
        check_writable(path, begins=b"{", remedy="choose another with --json")


@pytest.mark.skipif(not hasattr(os, "pathconf"), reason="does not say how long a name may be")
def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    longest = os.pathconf(tmp_path, "PC_NAME_MAX")
    path = tmp_path / ("a" * longest)
    check_writable(path, remedy="choose another with --json")
    write_json(path, {})
    write_json(tmp_path / os.fsdecode("\u56fe".encode() * (longest // 3)), {})  # three bytes each
    with atomic_folder(tmp_path / ("b" * longest)):
        pass
    assert len([*tmp_path.iterdir()]) == 3
    too_long = tmp_path / ("a" * (longest + 1))
    for attempt in (lambda: check_writable(too_long, remedy="choose another folder"), lambda: write_json(too_long, {})):
        with pytest.raises(OSError, match=r"^cannot write .*: File name too long; choose a shorter name$"):
            attempt()


def test_a_run_without_weights_has_no_other_weights(saved: Path) -> None:
    of_these = weights_sha256(saved)
    assert other_checkpoint(saved.parent, of_these) is other_checkpoint(saved.parent, None) is None
    assert other_checkpoint(saved.parent, "ab") == of_these
    saved.unlink()
    assert other_checkpoint(saved.parent, "ab") is None


def test_newest_run_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no run in .*: train one first \(tetdeploy train\)"):
        newest_run(tmp_path / "runs")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"latest is missing; name a run folder, such as .*one$"):
        newest_run(tmp_path)
    for text, fault in (
        (b"gone\n", "points at .*gone, which is gone"),
        (b"one/config.json\n", "points at .*config.json, which is gone"),
        (b"\xff\x00", "points at .*which is gone"),
        (b"\n", "is empty"),
    ):
        (tmp_path / "latest").write_bytes(text)
        with pytest.raises(FileNotFoundError, match=f"latest {fault}; name another run folder$"):
            newest_run(tmp_path)
    (tmp_path / "one" / "checkpoint.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=r"is empty; name another run folder, such as .*one$"):
        newest_run(tmp_path)


@pytest.mark.parametrize("kept", ["config.json", "checkpoint.safetensors", "seed-1/checkpoint.safetensors"])
def test_a_copy_that_followed_the_link_has_the_newest_run_in_latest_itself(kept: str, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "config.json").touch()
    (tmp_path / "latest").mkdir()
    with pytest.raises(FileNotFoundError, match=r"latest is a folder without a run; name a run folder, such as .*one$"):
        newest_run(tmp_path)
    file = tmp_path / "latest" / kept
    file.parent.mkdir(exist_ok=True)
    file.touch()
    if file.parent.name == "seed-1":
        file.with_name("config.json").touch()
    assert latest_run(tmp_path) == newest_run(tmp_path) == tmp_path / "latest"


def test_a_path_through_the_link_latest_is_one_of_the_run_itself(tmp_path: Path) -> None:
    (tmp_path / "one" / "seed-1").mkdir(parents=True)
    (tmp_path / "latest").symlink_to("one")
    assert without_latest(tmp_path / "latest") == tmp_path / "one"
    assert without_latest(tmp_path / "latest" / "seed-1") == tmp_path / "one" / "seed-1"
    assert without_latest(tmp_path / "one") == tmp_path / "one"
    weights = tmp_path / "one" / "checkpoint.safetensors"
    weights.touch()
    assert weights_file(tmp_path / "latest") == weights_file(tmp_path / "latest" / weights.name) == weights
    (tmp_path / "runs").symlink_to(tmp_path)  # no other link is followed
    assert without_latest(tmp_path / "runs" / "one") == tmp_path / "runs" / "one"
    (tmp_path / "copy" / "latest").mkdir(parents=True)
    assert without_latest(tmp_path / "copy" / "latest") == tmp_path / "copy" / "latest"
    shutil.rmtree(tmp_path / "one")
    with pytest.raises(FileNotFoundError, match=r"latest points at .*one, which is gone"):
        without_latest(tmp_path / "latest")


def test_what_is_there_for_a_moment_is_no_run(tmp_path: Path) -> None:
    for name in (".one", ".latest.abcd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.onnx").touch()
    os.utime(tmp_path / ".one" / "model.onnx", (0, 0))
    assert newest_export(tmp_path) == tmp_path / ".one" / "model.onnx"


def test_a_newest_run_without_a_checkpoint_gives_way_to_the_newest_that_has_one(tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to("failed")
    for name in ("failed", "seeds/seed-1"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").touch()
    (tmp_path / "failed" / "last.safetensors").touch()
    assert newest_run(tmp_path) == tmp_path / "failed"  # nothing else is there
    for name, age in (("old", 50), ("seeds/seed-1", 10)):
        file = tmp_path / name / "checkpoint.safetensors"
        file.parent.mkdir(exist_ok=True)
        file.touch()
        os.utime(file, (time.time() - age, time.time() - age))
    seed = tmp_path / "seeds" / "seed-1"
    with pytest.warns(RuntimeWarning, match=f"failed, the newest run, has no checkpoint.safetensors; taking {seed}, "):
        assert newest_run(tmp_path) == seed
    assert latest_run(tmp_path) == tmp_path / "failed"
    with pytest.raises(FileNotFoundError, match=f"--resume, or name another run, such as {seed}$"):
        checkpoint_file(tmp_path / "latest")
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("seeds")  # of which one has a checkpoint
    assert newest_run(tmp_path) == tmp_path / "seeds"


def test_the_normalisation_comes_back_to_the_bit(tmp_path: Path) -> None:
    config = NetworkConfig("convsnn", 2, 1, (8, 8), width=0.1)
    own = Classifier(build_network(config), config=config, mean=(1 / 3,), std=(1 / 255,), class_names=("a", "b"))
    save_checkpoint(tmp_path / "c.safetensors", own, training={}, provenance={})
    again = load(tmp_path / "c.safetensors")
    assert torch.equal(again.mean, own.mean) and torch.equal(again.std, own.std)
