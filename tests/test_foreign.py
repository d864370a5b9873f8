"""Checkpoints of the TET authors: names, numbers against their forward pass written out here, refusals."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from command_helpers import printed, refused
from run_helpers import Bomb
from torch import Tensor

import tetdeploy
from tetdeploy.checkpoint import read_metadata
from tetdeploy.foreign import ARCHITECTURES, import_checkpoint, import_to_checkpoint, output_file, their_names

ENTRIES = {
    arch: json.loads((Path(__file__).parent / "fixtures" / "tet_reference_state_dict_keys.json").read_text())[key][
        "entries"
    ]
    for arch, key in (("resnet19", "resnet19"), ("vggsnn", "vggsnn"), ("vggsnn-strided", "vggsnnwoap"))
}
State = dict[str, Tensor]


def random_state(arch: str) -> State:
    """A state dict with the authors' keys and shapes whose neurons fire in every layer."""
    torch.manual_seed(0)
    state: State = {}
    for entry in ENTRIES[arch]:
        state[entry["key"]] = state[entry["alias_of"]] if "alias_of" in entry else random_tensor(entry)
    return state


def random_tensor(entry: Mapping[str, Any]) -> Tensor:
    key, shape = entry["key"], entry["shape"]
    if key.endswith("num_batches_tracked"):
        return torch.tensor(7)
    if key.endswith("running_var") or (key.endswith("weight") and len(shape) == 1):
        return torch.rand(shape) + 0.5
    if len(shape) > 1:
        fan_in = torch.Size(shape[1:]).numel()
        return torch.randn(shape) * (2 / fan_in) ** 0.5 * (4 if len(shape) == 2 else 1)
    return torch.randn(shape) * 0.3


def flat_state(arch: str) -> State:
    """The same keys and shapes with one number in each tensor, so that its file is small."""
    return {
        entry["key"]: torch.tensor(7)
        if entry["key"].endswith("num_batches_tracked")
        else torch.full((1,), 0.5).expand(entry["shape"])
        for entry in ENTRIES[arch]
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "theirs.pth"


# --- the authors' forward pass, batch first ---------------------------------------------------------------------------


def their_lif(x: Tensor) -> Tensor:
    mem: Tensor | float = 0.0
    spikes = []
    for t in range(x.shape[1]):
        mem = mem * 0.5 + x[:, t]
        spike = (mem - 1 > 0).to(x.dtype)
        mem = (1 - spike) * mem
        spikes.append(spike)
    return torch.stack(spikes, 1)


def over_steps(function: Any, x: Tensor) -> Tensor:
    y = function(x.flatten(0, 1))
    return y.view(*x.shape[:2], *y.shape[1:])


def their_conv_bn(state: State, x: Tensor, conv: str, bn: str, stride: int = 1) -> Tensor:
    weight, bias = state[f"{conv}.weight"], state.get(f"{conv}.bias")
    y = over_steps(lambda z: F.conv2d(z, weight, bias, stride=stride, padding=weight.shape[-1] // 2), x)
    norm = [state[f"{bn}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
    return over_steps(lambda z: F.batch_norm(z, *norm), y)


def their_resnet19(state: State, x: Tensor) -> Tensor:
    def layer(path: str, x: Tensor, stride: int = 1) -> Tensor:
        return their_conv_bn(state, x, f"{path}.layer.module", f"{path}.bn.seqbn.module", stride)

    x = their_lif(layer("conv1_s", x))
    for stage, count in ((1, 3), (2, 3), (3, 2)):
        for k in range(count):
            path, stride = f"layer{stage}.{k}", 2 if stage > 1 and k == 0 else 1
            out = layer(f"{path}.conv2_s", their_lif(layer(f"{path}.conv1_s", x, stride)))
            x = their_lif(out + (layer(f"{path}.downsample", x, stride) if k == 0 else x))
    x = x.mean((-2, -1))
    x = their_lif(F.linear(x, state["fc1_s.layer.module.weight"], state["fc1_s.layer.module.bias"]))
    return F.linear(x, state["fc2_s.layer.module.weight"], state["fc2_s.layer.module.bias"])


def their_vggsnn(state: State, x: Tensor, *, strided: bool) -> Tensor:
    feature = 0
    for k in range(8):
        path = f"features.{feature}.fwd.module"
        x = their_lif(their_conv_bn(state, x, f"{path}.0", f"{path}.1", 2 if strided and k % 2 else 1))
        feature += 1
        if k % 2 and not strided:
            x = over_steps(lambda z: F.avg_pool2d(z, 2), x)
            feature += 1
    return F.linear(x.flatten(2), state["classifier.module.weight"], state["classifier.module.bias"])


# --- what is imported -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_names_are_those_of_the_fixture(arch: str) -> None:
    groups: dict[str, set[str]] = {}
    for entry in ENTRIES[arch]:
        if not entry["key"].endswith("num_batches_tracked"):  # the fixture does not say what is the same count
            groups.setdefault(entry.get("alias_of", entry["key"]), set()).add(entry["key"])
    names = their_names(arch)
    weights = [set(theirs) for ours, theirs in names.items() if not ours.endswith("num_batches_tracked")]
    assert sorted(map(sorted, weights)) == sorted(map(sorted, groups.values()))
    every = [name for theirs in names.values() for name in theirs]
    assert sorted(every) == sorted(entry["key"] for entry in ENTRIES[arch])


@pytest.mark.parametrize("arch", ARCHITECTURES)
@torch.no_grad()
def test_the_imported_network_computes_what_theirs_computes(arch: str, file: Path) -> None:
    state = random_state(arch)
    torch.save(state, file)
    size = (16, 24) if arch == "resnet19" else (48, 48)
    imported = import_checkpoint(file, arch, image_size=size)
    assert imported.config.image_size == size
    double = {key: value.double() for key, value in state.items()}
    frames = torch.randn(2, 3, imported.config.in_channels, *size, dtype=torch.float64)
    if arch == "resnet19":
        expected = their_resnet19(double, frames)
    else:
        expected = their_vggsnn(double, frames, strided=arch == "vggsnn-strided")
    logits = imported.network.double()(frames.transpose(0, 1)).transpose(0, 1)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    # The comparison means something: the answers depend on the image and on the step.
    assert (expected[0] - expected[1]).abs().max() > 0.1
    assert (expected[:, 0] - expected[:, 2]).abs().max() > 0.1


def test_keys_are_counted_and_aliases_merged(file: Path) -> None:
    torch.save(flat_state("resnet19"), file)
    imported = import_checkpoint(file, "resnet19")
    assert (imported.num_keys, imported.num_merged) == (415, 415 - len(imported.network.state_dict()))
    assert not imported.network.training


@pytest.mark.parametrize("wrap", [None, "state_dict", "net"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_and_wrappers_are_dropped(wrap: str | None, prefix: str, file: Path) -> None:
    state = {prefix + key: value for key, value in flat_state("vggsnn").items()}
    torch.save(state if wrap is None else {"epoch": 3, "best_acc": 83.2, wrap: state}, file)
    weights = import_checkpoint(file, "vggsnn").network.state_dict()
    assert weights["layers.0.1.num_batches_tracked"] == 7
    assert all((value == 0.5).all() for key, value in weights.items() if "tracked" not in key)


def test_classes_are_read_from_the_last_layer(file: Path) -> None:
    state = flat_state("resnet19")
    for key in ("fc2.weight", "fc2_s.layer.module.weight", "fc2.bias", "fc2_s.layer.module.bias"):
        state[key] = state[key][:1].expand(100, *state[key].shape[1:])
    torch.save(state, file)
    assert import_checkpoint(file, "resnet19").config.num_classes == 100
    report = import_to_checkpoint(file, "resnet19", file.with_suffix(".safetensors"))
    written = read_metadata(report.path)["data"]
    assert (report.data, written["name"], written["class_names"][0]) == ("cifar100", "cifar100", "apple")
    assert written["mean"] == [0.5071, 0.4867, 0.4408] and written["std"] == [0.2675, 0.2565, 0.2761]


# --- as a checkpoint of ours ------------------------------------------------------------------------------------------


def test_a_checkpoint_of_ours_is_written(file: Path, tmp_path: Path) -> None:
    torch.save(flat_state("vggsnn"), file)
    report = import_to_checkpoint(file, "vggsnn", tmp_path / "runs" / "vgg", T=10)
    assert report.path == tmp_path / "runs" / "vgg" / "checkpoint.safetensors"
    assert (report.data, report.config.image_size, report.num_parameters) == ("dvs-cifar10", (48, 48), 9_271_498)
    classifier = tetdeploy.load(tmp_path / "runs" / "vgg")
    assert (classifier.image_shape, classifier.class_names[3]) == ((2, 48, 48), "cat")
    frames = torch.randint(256, (2, 1, 2, 48, 48), dtype=torch.uint8)
    with torch.no_grad():
        expected = import_checkpoint(file, "vggsnn").network(frames / 255)
        torch.testing.assert_close(classifier(frames), expected)
    metadata = read_metadata(report.path)
    assert (metadata["training"], metadata["data"]["encoding"]) == ({"T": 10}, "frames")
    assert (metadata["data"]["mean"], metadata["data"]["std"]) == ([0.0, 0.0], [1.0, 1.0])
    assert (metadata["data"]["name"], report.names_data) == ("", False)  # ours are frames of another kind
    assert metadata["provenance"]["imported"].keys() == {"file", "arch", "sha256"}
    assert str(tmp_path) not in json.dumps(metadata)


@pytest.mark.parametrize("data", [None, "cifar10"])
def test_cifar_brings_the_authors_normalisation(data: str | None, file: Path, tmp_path: Path) -> None:
    torch.save(flat_state("resnet19"), file)
    assert import_to_checkpoint(file, "resnet19", tmp_path / "c.safetensors", data=data).names_data
    written = read_metadata(tmp_path / "c.safetensors")["data"]
    assert written["mean"] == [0.4914, 0.4822, 0.4465] and written["std"] == [0.2023, 0.1994, 0.201]
    assert (written["name"], written["class_names"][0], written["encoding"]) == ("cifar10", "airplane", "direct")


@pytest.mark.parametrize(
    ("arch", "first", "data", "shape"),
    [
        ("resnet19", ("conv1.weight", "conv1_s.layer.module.weight"), "dvs-cifar10", (2, 48, 48)),
        ("vggsnn", ("features.0.fwd.module.0.weight",), "cifar10", (3, 32, 32)),
    ],
)
def test_a_checkpoint_has_the_size_of_its_data(
    arch: str, first: tuple[str, ...], data: str, shape: tuple[int, int, int], file: Path
) -> None:
    state = flat_state(arch)
    state |= {key: state[key][:, :1].expand(64, shape[0], 3, 3) for key in first}
    if arch == "vggsnn":
        torch.save(state, file)  # still with the readout of 48x48
        with pytest.raises(ValueError, match=r"misshapen: classifier\.module\.weight .*, wanted \[10, 2048\]"):
            import_to_checkpoint(file, arch, file.with_suffix(".safetensors"), data=data)
        state["classifier.module.weight"] = state["classifier.module.weight"][:, :2048]
    torch.save(state, file)
    report = import_to_checkpoint(file, arch, file.with_suffix(".safetensors"), data=data)
    assert tetdeploy.load(report.path).image_shape == shape


def test_later_commands_ask_for_frames_as_the_authors_made_them(file: Path, tmp_path: Path) -> None:
    torch.save(flat_state("vggsnn-strided"), file)
    out = str(tmp_path / "vgg.safetensors")
    said = " ".join(printed("import", file, "--arch", "vggsnn-strided", "-o", out).split())
    assert "so the checkpoint names no data" in said and "--T 6 --fold-bn --data FRAMES.npz" in said
    for command in (["export", out], ["evaluate", out], ["landscape", out], ["train", "--qat", "--init", out]):
        assert "does not say what data it was trained on; name some with --data" in refused(*command)
    np.savez(frames := tmp_path / "f.npz", images=np.ones((1, 2, 2, 48, 48), np.uint8), labels=[9])
    said = " ".join(printed("evaluate", out, "--data", frames, "--T", "2").split())
    assert said.endswith(f"next: tetdeploy export {out} --data {frames}")


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_weights_of_which_no_name_is_known_are_no_checkpoint_of_the_authors(file: Path) -> None:
    torch.save({"0.weight": torch.zeros(8, 3, 3, 3), "layer1.conv.weight": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match=r"no checkpoint of the TET authors' code: .*, Porting a network,"):
        import_checkpoint(file, "resnet19")


def test_missing_unexpected_and_misshapen_keys_are_listed_at_once(file: Path) -> None:
    state = flat_state("resnet19")
    del state["layer2.0.bn1.seqbn.module.bias"]
    state["layer4.0.conv1.weight"] = torch.zeros(2)
    state["layer1.0.conv1.weight"] = torch.zeros(128, 64, 5, 5)
    state["fc2.weight"] = torch.zeros(10)
    state["module.fc1.bias"] = state.pop("fc1.bias")
    torch.save(state, file)
    with pytest.raises(ValueError, match=r"missing: .*layer2\.0\.bn1\.seqbn\.module\.bias.*; ") as caught:
        import_checkpoint(file, "resnet19")
    assert "unexpected: layer4.0.conv1.weight, module.fc1.bias; " in str(caught.value)  # not all begin with it
    assert "layer1.0.conv1.weight [128, 64, 5, 5], wanted [128, 64, 3, 3]" in str(caught.value)
    assert "fc2.weight [10], wanted [10, 256]" in str(caught.value)


def test_names_of_one_tensor_must_agree(file: Path) -> None:
    state = flat_state("resnet19")
    state["conv1_s.layer.module.weight"] = torch.ones(64, 3, 3, 3)
    state["conv1_s.bn.bn.num_batches_tracked"] = torch.tensor(99)  # a count may differ
    state["layer3.1.bn2.seqbn.module.running_var"] = torch.ones(512)
    torch.save(state, file)
    message = (
        r"different values under names of one tensor: conv1_s\.layer\.module\.weight and conv1\.weight, "
        r"layer3\.1\.bn2\.seqbn\.module\.running_var and layer3\.1\.bn2\.bn\.running_var$"
    )
    with pytest.raises(ValueError, match=message):
        import_checkpoint(file, "resnet19")


def test_values_that_are_not_finite_are_refused(file: Path) -> None:
    state = flat_state("vggsnn")
    state["features.3.fwd.module.0.bias"] = torch.full((256,), torch.inf)
    torch.save(state, file)
    with pytest.raises(ValueError, match=r"not finite in float32 in features\.3\.fwd\.module\.0\.bias$"):
        import_checkpoint(file, "vggsnn")


def test_nan_is_no_difference_between_names_of_one_tensor(file: Path) -> None:
    state = flat_state("resnet19")
    state["conv1.weight"] = state["conv1_s.layer.module.weight"] = torch.full((64, 3, 3, 3), torch.nan)
    torch.save(state, file)
    with pytest.raises(ValueError, match=r"not finite in float32 in conv1\.weight$"):
        import_checkpoint(file, "resnet19")


def test_half_and_double_become_float32(file: Path) -> None:
    kinds = (torch.float16, torch.bfloat16, torch.float64)
    state = {
        key: value if key.endswith("tracked") else value.to(kinds[k % 3])  # names of one tensor have several kinds
        for k, (key, value) in enumerate(flat_state("resnet19").items())
    }
    torch.save(state, file)
    weights = import_checkpoint(file, "resnet19").network.state_dict()
    assert all(value.dtype == torch.float32 for key, value in weights.items() if "tracked" not in key)


WEIGHT, VARIANCE = "features.0.fwd.module.0.weight", "features.0.fwd.module.1.running_var"
COUNT = "features.0.fwd.module.1.num_batches_tracked"


def test_counts_of_32_bits_and_variances_of_0_are_taken(file: Path) -> None:
    state = flat_state("vggsnn")
    state[COUNT], state[VARIANCE] = state[COUNT].int(), torch.zeros_like(state[VARIANCE])  # of channels never read
    torch.save(state, file)
    assert not import_checkpoint(file, "vggsnn").network.state_dict()["encode.1.running_var"].any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # quantised tensors are deprecated
@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        (WEIGHT, lambda w: w.to(torch.int8), r"16, 32 or 64 bits: features\.0\.fwd\.module\.0\.weight \(int8\); save"),
        (WEIGHT, lambda w: w > 0, r"\(bool\)"),
        (WEIGHT, lambda w: w + 1j, r"\(complex64\)"),
        (WEIGHT, lambda w: w.to(torch.float8_e4m3fn), r"\(float8_e4m3fn\)"),
        (WEIGHT, lambda w: torch.quantize_per_tensor(w.clone(), 0.1, 0, torch.qint8), r"\(qint8, no plain tensor\)"),
        (WEIGHT, lambda w: w.clone().to_sparse(), r"\(float32, no plain tensor\)"),
        (WEIGHT, lambda w: w.to("meta"), r"\(float32, no plain tensor\)"),
        (COUNT, lambda n: n.to("meta"), r"num_batches_tracked \(int64, no plain tensor\)"),
        (COUNT, lambda n: n + 1j, r"num_batches_tracked \(complex64\)"),
        (WEIGHT, lambda w: w.double() * 1e300, r"not finite in float32 in features\.0\.fwd\.module\.0\.weight$"),
        (VARIANCE, lambda v: v - 1, r"variances below 0 in features\.0\.fwd\.module\.1\.running_var; BN divides"),
    ],
)
def test_weights_that_are_no_plain_floats_are_refused(key: str, change: Any, message: str, file: Path) -> None:
    state = flat_state("vggsnn")
    state[key] = change(state[key])
    torch.save(state, file)
    with pytest.raises(ValueError, match=message):
        import_checkpoint(file, "vggsnn")


def test_another_architecture_is_recognised(file: Path) -> None:
    torch.save(flat_state("vggsnn-strided"), file)
    with pytest.raises(ValueError, match=r"holds a vggsnn-strided, not a vggsnn; import it with --arch vggsnn-strided"):
        import_checkpoint(file, "vggsnn")


def test_an_unknown_architecture_is_refused(file: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown architecture 'resnet18'; choose one of resnet19, vggsnn, vggsnn-s"):
        import_checkpoint(file, "resnet18")


def test_code_is_never_run(file: Path) -> None:
    torch.save({"net": Bomb()}, file)
    with pytest.raises(ValueError, match=r"holds more than tensors \(_pytest\S*\) and is not opened, .*can run code"):
        import_checkpoint(file, "vggsnn")
    file.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"theirs\.pth is damaged, or not a file of tensors"):
        import_checkpoint(file, "vggsnn")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04" + bytes(100)])
def test_other_files_are_refused(content: bytes, file: Path) -> None:
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"theirs\.pth is damaged, or not a file of tensors that torch\.save wrote"):
        import_checkpoint(file, "vggsnn")


def test_a_pointer_of_git_lfs_is_refused(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(ValueError, match=r"theirs\.pth is a pointer of Git LFS in place of the weights; fetch"):
        import_checkpoint(file, "vggsnn")


def test_a_truncated_file_is_refused(file: Path) -> None:
    torch.save(flat_state("vggsnn"), file)
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ValueError, match="is damaged, or not a file"):
        import_checkpoint(file, "vggsnn")


def test_missing_files_and_folders_are_named(file: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cannot read .*theirs\.pth: No such file"):
        import_checkpoint(file, "vggsnn")
    with pytest.raises(
        IsADirectoryError, match=r"cannot read .*: Is a directory; give the file that torch\.save wrote"
    ):
        import_checkpoint(tmp_path, "vggsnn")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(3), "holds Tensor, not a state dict"),
        ({}, "holds dict, not a state dict"),
        ({"epoch": 3, "conv1.weight": torch.zeros(3)}, "not a state dict: epoch is no tensor"),
        ({0: torch.zeros(3)}, "not a state dict: its key 0 is no name"),
        ({"weights": {}, "epoch": 3}, "weights, epoch are no tensor; .* under 'state_dict' or 'net'"),
    ],
)
def test_what_is_no_state_dict_is_refused(content: Any, message: str, file: Path) -> None:
    torch.save(content, file)
    with pytest.raises(ValueError, match=message):
        import_checkpoint(file, "vggsnn")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "cifar100"}, r"theirs\.pth tells 10 classes apart, but cifar100 has 100; choose"),
        ({"data": "mine"}, "normalisation of 'mine' is not known; choose one of cifar10, cifar100, dvs-cifar10; for"),
        ({"data": "dvs-cifar10"}, r"misshapen: conv1\.weight \[64, 3, 3, 3\], wanted \[64, 2, 3, 3\]"),
        ({"T": 0}, "T must be at least 1, got 0"),
    ],
)
def test_data_that_do_not_fit_are_refused_and_nothing_is_written(
    options: dict[str, Any], message: str, file: Path, tmp_path: Path
) -> None:
    torch.save(flat_state("resnet19"), file)
    with pytest.raises(ValueError, match=message):
        import_to_checkpoint(file, "resnet19", tmp_path / "out" / "c.safetensors", **options)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_data_must_be_named_for_other_numbers_of_classes(file: Path, tmp_path: Path) -> None:
    state = flat_state("resnet19")
    for key in ("fc2.weight", "fc2_s.layer.module.weight", "fc2.bias", "fc2_s.layer.module.bias"):
        state[key] = state[key][:7]
    torch.save(state, file)
    with pytest.raises(ValueError, match="a resnet19 of 7 classes was trained neither on cifar10 nor on cifar100"):
        import_to_checkpoint(file, "resnet19", tmp_path / "c.safetensors")


def test_a_run_is_not_written_over(file: Path, tmp_path: Path) -> None:
    torch.save(flat_state("vggsnn"), file)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.safetensors").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"run already holds a run \(checkpoint\.safetensors\); choose another --out"):
        import_to_checkpoint(file, "vggsnn", tmp_path / "run")
    with pytest.raises(ValueError, match="already holds a run"):
        import_to_checkpoint(file, "vggsnn", tmp_path / "run" / "checkpoint.safetensors")
    assert (tmp_path / "run" / "checkpoint.safetensors").read_bytes() == b"mine"
    (tmp_path / "vgg.safetensors").write_bytes(b"an earlier import")
    assert output_file(tmp_path / "vgg.safetensors") == tmp_path / "vgg.safetensors"  # no run: written over
