"""Image sets: what is read is what was written, and every way to get it wrong says so."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import io
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
import urllib.error
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from image_helpers import DEEP, write_deep_png
from numpy.typing import NDArray
from PIL import Image

from tetdeploy.class_names import check_classes
from tetdeploy.cli import main
from tetdeploy.data import (
    DATA_NAMES,
    ImageSet,
    cifar,
    decoding,
    digits,
    fashion_mnist,
    holds_out_others,
    imagenet,
    load_data,
    load_parts,
    remedy_of_others,
    same_data,
    save_npz,
    split_validation,
)
from tetdeploy.data.cache import Cache
from tetdeploy.data.cifar import CIFAR10, CIFAR100
from tetdeploy.data.download import download
from tetdeploy.data.fingerprint import images_sha256
from tetdeploy.data.folder import class_files
from tetdeploy.data.frames import count_statistics
from tetdeploy.data.images import channel_statistics, mixed_order, stratified
from tetdeploy.storage import files
from tetdeploy.storage.arrays import read_npz
from tetdeploy.system.signals import handled

NO_DATA = Path("nowhere")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tetdeploy"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise urllib.error.URLError("no network in this test")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder and the local address it is served at."""
    folder = tmp_path / "server"
    folder.mkdir()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.HTTPServer(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder))) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield folder, f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()
        thread.join()


def noise(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def image_set(**changes: Any) -> ImageSet:
    parts: dict[str, Any] = {
        "name": "made",
        "split": "train",
        "images": noise(6, 1, 4, 4),
        "labels": np.array([0, 0, 0, 1, 1, 2]),
        "class_names": ("a", "b", "c"),
        "mean": (0.5,),
        "std": (0.2,),
    }
    return ImageSet(**(parts | changes))


def test_every_data_set_is_named_where_one_chooses() -> None:
    names = {*DATA_NAMES, "folder", "events", "saccades", "by-time"}
    options = {
        option.name: option.help or "" for option in main.commands["train"].params if isinstance(option, click.Option)
    }
    assert set(re.findall(r"[a-z][a-z-]*\d*", options["data"])) >= names
    described = (load_data.__doc__ or "").partition("split:")[0]
    assert set(re.findall(r'"([a-z\d-]+):?[A-Z]*"', described)) == names


# ---------------------------------------------------------------- ImageSet


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "val"}, "split is 'val'; choose 'train' or 'test'"),
        ({"images": noise(6, 4, 4)}, r"images are uint8 \[6, 4, 4\]; wanted uint8 \[N, C, H, W\]"),
        ({"images": np.zeros((6, 1, 4, 4))}, r"images are float64 \[6, 1, 4, 4\]; wanted uint8"),
        ({"images": [1, 2]}, "images are list; wanted uint8"),
        ({"images": noise(0, 1, 4, 4)}, r"shape \[0, 1, 4, 4\], which holds no pixel"),
        ({"labels": np.zeros(6, np.int32)}, r"labels are int32 \[6\]; wanted int64"),
        ({"labels": np.zeros(5, np.int64)}, "6 images but 5 labels"),
        ({"labels": np.array([0, 0, 0, 1, 1, 3])}, r"labels run from 0 to 3, outside 0..2 for 3 classes"),
        ({"labels": np.array([-1, 0, 0, 1, 1, 2])}, "labels run from -1 to 2"),
        ({"class_names": ("a", "b", "a")}, "class_names has a more than once"),
        ({"mean": (0.5, 0.5)}, "2 means and 1 stds for 1 channels"),
        ({"std": (0.0,)}, "std greater than 0"),
        ({"mean": (float("nan"),)}, "must be finite"),
    ],
)
def test_image_set_refuses_parts_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_set(**changes)


def test_flipped_images_are_laid_out_anew_for_pytorch() -> None:
    images, labels = noise(6, 1, 4, 4), np.array([0, 0, 0, 1, 1, 2])
    flipped = image_set(images=images[..., ::-1], labels=labels[::-1])
    np.testing.assert_array_equal(torch.from_numpy(flipped.images), images[..., ::-1])
    np.testing.assert_array_equal(torch.from_numpy(flipped.labels), labels[::-1])
    assert image_set(images=images).images is images


@pytest.mark.parametrize("indices", [[4, 0], np.array([4, 0]), slice(1, 3), np.array([1, 0, 0, 0, 1, 0], bool)])
def test_select_keeps_images_and_labels_together(indices: Any) -> None:
    data = image_set()
    chosen = data.select(indices)
    positions = np.arange(6)[indices]
    assert len(chosen) == 2
    np.testing.assert_array_equal(chosen.images, data.images[positions])
    np.testing.assert_array_equal(chosen.labels, data.labels[positions])
    assert (chosen.class_names, chosen.mean, chosen.std) == (data.class_names, data.mean, data.std)


@pytest.mark.parametrize(
    ("indices", "message"), [([6], "cannot select from 6 images"), ([], "holds no pixel"), ([0.5], "cannot select")]
)
def test_select_refuses(indices: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_set().select(indices)


def test_channel_statistics_are_those_of_the_scaled_images() -> None:
    images = noise(3000, 3, 5, 4)
    images[:, 2] = 7
    mean, std = channel_statistics(images)
    np.testing.assert_allclose(mean, (images / 255).mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std[:2], (images / 255).std((0, 2, 3))[:2], rtol=1e-12)
    assert std[2] == 1 / 255  # a constant channel does not divide by zero


# ---------------------------------------------------------------- validation split


@pytest.mark.parametrize(
    "measure",
    [channel_statistics, lambda images: count_statistics(images[None]), lambda images: images_sha256(images, None)],
    ids=["images", "frames", "fingerprint"],
)
def test_large_images_are_measured_with_little_memory(measure: Callable[[NDArray[np.uint8]], Any]) -> None:
    images = noise(32, 1, 512, 512)
    tracemalloc.start()
    measure(images)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < images.nbytes / 2  # 8 bytes a pixel of one image, not of all, and no copy


def test_split_validation_is_stratified_complete_and_repeatable() -> None:
    labels = np.repeat([0, 1, 2], [100, 40, 10])[np.random.default_rng(1).permutation(150)]
    data = image_set(images=np.arange(150, dtype=np.uint8).reshape(150, 1, 1, 1), labels=labels)
    train, validation = split_validation(data, fraction=0.1)
    assert np.bincount(validation.labels).tolist() == [10, 4, 1]
    assert sorted([*train.images.ravel(), *validation.images.ravel()]) == list(range(150))
    again = split_validation(data, fraction=0.1)[1]
    np.testing.assert_array_equal(validation.images, again.images)
    for part in (train, validation):
        np.testing.assert_array_equal(part.labels, labels[part.images.ravel()])


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_split_validation_leaves_every_class_on_both_sides(fraction: float) -> None:
    train, validation = split_validation(image_set(), fraction=fraction)
    assert set(train.labels) == {0, 1, 2}  # class 2 has one image, which stays in training
    assert set(validation.labels) == {0, 1}


@pytest.mark.parametrize("fraction", [0, 1, -0.5, float("nan")])
def test_split_validation_refuses_a_fraction_outside_0_and_1(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"validation fraction is .*; wanted a number between 0 and 1"):
        split_validation(image_set(), fraction=fraction)


def test_split_validation_refuses_what_it_cannot_split() -> None:
    single = image_set().select([0, 3, 5])
    with pytest.raises(ValueError, match=r"no class has two images.*without validation \(--val-fraction 0\)"):
        split_validation(single, fraction=0.5)


@pytest.mark.parametrize(
    "labels",
    [
        np.zeros(0, np.int64),
        np.array([7]),
        np.full(9, 3),
        np.repeat([5, 0, 2], [1, 90, 9]),  # 1, 3 and 4 are empty
        np.random.default_rng(0).integers(0, 1000, 3000),
        np.random.default_rng(1).geometric(0.3, 500) - 1,
        np.random.default_rng(2).integers(-2, 3, 200),
    ],
)
@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 0.999])
def test_the_split_is_the_same_for_ever(labels: NDArray[np.int64], fraction: float) -> None:
    """Or a run of before would have trained on what a later version holds out."""
    rng = np.random.RandomState(0)
    held_out: list[int] = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        held_out += members[: min(max(round(fraction * len(members)), 1), len(members) - 1)].tolist()
    first, second = stratified(labels, fraction=fraction)
    assert second.tolist() == sorted(held_out)
    assert first.tolist() == sorted(set(range(len(labels))) - set(held_out))


def test_the_mixed_order_is_the_same_for_ever() -> None:
    """Or a run of before would have trained on what a later version holds out."""
    assert mixed_order(8).tolist() == [6, 2, 1, 7, 3, 0, 5, 4]


def test_a_smaller_share_is_held_out_of_a_larger_one() -> None:
    data = image_set(images=np.arange(150, dtype=np.uint8).reshape(150, 1, 1, 1), labels=np.repeat([0, 1, 2], 50))
    small, large = (set(split_validation(data, fraction=share)[1].images.ravel()) for share in (0.1, 0.3))
    assert small < large  # landscape takes images that several runs held out


def test_a_fingerprint_tells_order_labels_and_pixels() -> None:
    data = image_set()
    brighter, renamed = data.images.copy(), data.labels.copy()
    brighter[5, 0, 3, 3] ^= 1
    renamed[5] = 1
    sets = (
        data,
        data.select(slice(5)),
        data.select([1, 0, 2, 3, 4, 5]),
        image_set(images=brighter),
        image_set(labels=renamed),
        image_set(images=data.images.reshape(6, 1, 2, 8)),
    )
    assert len({one.fingerprint for one in sets}) == len(sets)
    assert data.select(slice(6)).fingerprint == data.fingerprint
    counted = image_set(images=np.arange(96, dtype=np.uint8).reshape(6, 1, 4, 4))
    assert counted.fingerprint == "e29c7e8730413c4f8e2c681538f6978914d01739c3ebf9ca4078637420b91008"  # on every machine


@pytest.mark.parametrize(
    ("name", "known", "others"),
    [
        ("d.npz", {"name": "d.npz", "fingerprint": "0"}, True),
        ("d.npz", {"name": "d.npz", "fingerprint": image_set().fingerprint}, False),
        ("a/../d.npz", {"name": "d.npz", "fingerprint": "0"}, True),
        ("d.npz", {"name": "e.npz", "fingerprint": "0"}, False),
        ("d.npz", {"name": "d.npz"}, False),  # of before
        ("d.npz", {}, False),
        ("by-time:n-mnist", {"name": "n-mnist", "fingerprint": "0"}, False),  # the same recordings, perhaps
    ],
)
def test_other_images_than_those_held_out_are_known(name: str, known: dict[str, str], others: bool) -> None:
    assert holds_out_others(name, image_set(), known) == others


@pytest.mark.parametrize(
    ("name", "of_its_own"),
    [
        *((name, False) for name in ("cifar10", "imagenet@64", "saccades:cifar10")),
        *((name, True) for name in ("a/set.npz", "folder:a", "imagenet:a@64", "by-time:events:a")),
    ],
)
def test_only_data_that_are_looked_for_have_another_folder(name: str, of_its_own: bool) -> None:
    assert ("--data-dir" in remedy_of_others(name)) != of_its_own
    assert ("the file or folder as it was then" in remedy_of_others(name)) == of_its_own


def test_the_parts_of_a_run_are_its_split_or_all(tmp_path: Path) -> None:
    save_npz(image_set(), tmp_path / "d.npz")
    data = load_data(str(tmp_path / "d.npz"), "train", data_dir=tmp_path)
    parts = load_parts(data.name, data_dir=tmp_path, fraction=0.5)
    for part, wanted in zip(parts, split_validation(data, fraction=0.5), strict=True):
        assert part is not None
        np.testing.assert_array_equal(part.x, wanted.x)
    train, nothing = load_parts(data.name, data_dir=tmp_path, fraction=0)
    assert nothing is None
    np.testing.assert_array_equal(train.x, data.x)


# ---------------------------------------------------------------- names, imports


@pytest.mark.parametrize(("named", "folder"), [("elsewhere", "elsewhere"), ("", "data"), (None, "data")])
def test_data_are_looked_for_where_the_environment_says(
    named: str | None, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TETDEPLOY_DATA", raising=False)
    if named is not None:
        monkeypatch.setenv("TETDEPLOY_DATA", named)
    with pytest.raises(OSError, match=rf"no folder {folder}.imagenet: "):
        load_data("imagenet", "train")


def test_arguments_that_are_none_are_named(tmp_path: Path) -> None:
    name: Any
    for name in (None, 5):
        with pytest.raises(ValueError, match=r"name must be of type str, got \w+; choose digits, .* a path ending in"):
            load_data(name, "test", data_dir=tmp_path)
    with pytest.raises(ValueError, match="data_dir must be the path of a folder, got 5"):
        load_data("digits", "test", data_dir=5)  # type: ignore[arg-type]
    path: Any = tmp_path / "x.npz"
    with pytest.raises(ValueError, match=r"data must be of type LabelledSet, got \w+; pass save_npz\(data, path\)"):
        save_npz(path, image_set())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"path must be the path of a \.npz file, got None"):
        save_npz(image_set(), None)  # type: ignore[arg-type]


def test_unknown_names_list_the_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match="unknown data set 'mnist'; choose digits, fashion-mnist, cifar10, cifar100, imagenet, "
    ):
        load_data("mnist", "train", data_dir=NO_DATA)
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    with pytest.raises(ValueError, match=r"for the folder of that name: folder:photos"):
        load_data("photos", "train", data_dir=NO_DATA)
    with pytest.raises(ValueError, match="unknown split 'val'; choose 'train' or 'test'"):
        load_data("digits", "val", data_dir=NO_DATA)  # type: ignore[arg-type]


def test_import_and_npz_need_numpy_only(tmp_path: Path) -> None:
    save_npz(image_set(), tmp_path / "x.npz")
    program = (
        "import sys, tetdeploy.data as d; from pathlib import Path;"
        "n = len(d.load_data(sys.argv[1], 'test', data_dir=Path('.')));"
        "print(n, [m for m in ('torch', 'torchvision', 'sklearn', 'PIL') if m in sys.modules])"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "x.npz")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "6 []"


# ---------------------------------------------------------------- digits


def test_digits_are_lossless_and_split_in_two() -> None:
    from sklearn.datasets import load_digits

    train, test = (load_data("digits", split, data_dir=NO_DATA) for split in ("train", "test"))
    assert train.images.shape == (1438, 1, 8, 8) and test.images.shape == (359, 1, 8, 8)
    assert train.images.max() == 255 and train.class_names == tuple("0123456789")
    source = load_digits()
    wanted = sorted((tuple(x.ravel()), int(y)) for x, y in zip(source.images, source.target, strict=True))
    got = [
        (tuple(np.rint(x.ravel() * (16 / 255))), int(y))
        for part in (train, test)
        for x, y in zip(part.images, part.labels, strict=True)
    ]
    assert sorted(got) == wanted
    shares = np.bincount(test.labels) / np.bincount(source.target)
    assert abs(shares - 0.2).max() < 0.005


def test_digits_are_the_same_where_their_file_lies_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    found = load_data("digits", "test", data_dir=NO_DATA)
    monkeypatch.setattr(digits, "find_spec", lambda name: None)
    other = load_data("digits", "test", data_dir=NO_DATA)
    assert found.images.tobytes() == other.images.tobytes() and found.labels.tobytes() == other.labels.tobytes()


def test_digits_do_not_wait_for_scikit_learn() -> None:
    code = "import sys; from tetdeploy.data import load_data; load_data('digits', 'test', data_dir='.')"
    done = subprocess.run([sys.executable, "-c", f"{code}; print('sklearn' in sys.modules)"], capture_output=True)
    assert done.stdout.decode().strip() == "False", done.stderr.decode()


def test_digits_split_is_the_same_for_ever() -> None:
    test = load_data("digits", "test", data_dir=NO_DATA)
    assert hashlib.sha256(test.images.tobytes()).hexdigest()[:16] == "2f5eb12f1dfec8a2"


def test_digits_constants_are_those_of_the_training_images() -> None:
    mean, std = channel_statistics(load_data("digits", "train", data_dir=NO_DATA).images)
    np.testing.assert_allclose((digits.MEAN, digits.STD), (mean, std), atol=5e-5)


# ---------------------------------------------------------------- npz


def test_npz_returns_what_was_saved(tmp_path: Path) -> None:
    data = image_set(images=noise(6, 2, 4, 4), mean=(0.5, 0.5), std=(0.2, 0.2))
    save_npz(data, tmp_path / "new" / "x.npz")
    back = load_data(str(tmp_path / "new" / "x.npz"), "test", data_dir=NO_DATA)
    np.testing.assert_array_equal(back.images, data.images)
    np.testing.assert_array_equal(back.labels, data.labels)
    assert back.class_names == data.class_names and back.split == "test"
    assert (back.mean, back.std) == channel_statistics(data.images)


def test_npz_gives_grey_images_a_channel_and_classes_numbers(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=noise(3, 4, 5), labels=np.array([0, 2, 1], np.uint8))
    data = load_data(str(tmp_path / "x.npz"), "train", data_dir=NO_DATA)
    assert data.images.shape == (3, 1, 4, 5) and data.class_names == ("0", "1", "2")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": noise(2, 1, 4, 4)}, "holds images but not labels"),
        ({"x": noise(2)}, "holds x but not images and labels"),
        ({"images": np.zeros((2, 1, 4, 4), np.float32)}, r"images are float32 .* multiply by 255 and cast to uint8"),
        ({"images": np.zeros((2, 1, 4, 4), np.int64)}, r"images are int64 .* cast to uint8"),
        ({"images": noise(2, 4)}, r"images are uint8 \[2, 4\]; wanted uint8 \[N, C, H, W\] \(or \[N, H, W\]"),
        *(
            ({"images": noise(2, 8, 8, c)}, r"with the channels last; .* images.transpose\(0, 3, 1, 2\)")
            for c in range(1, 5)
        ),
        (
            {"images": noise(2, 3, 8, 9, 2)},
            r"with the channels last; wanted frames.* images.transpose\(0, 1, 4, 2, 3\)",
        ),
        ({"images": noise(0, 1, 4, 4), "labels": np.zeros(0, int)}, "holds no pixel"),
        ({"images": noise(0, 3, 2, 4, 4), "labels": np.zeros(0, int)}, "holds no pixel; .* with one sequence or more"),
        ({"labels": np.zeros(2)}, r"labels are float64 \[2\]; wanted integers \[N\]"),
        ({"labels": np.zeros((2, 1), int)}, r"labels are int64 \[2, 1\]; wanted integers.*give labels.ravel\(\)"),
        ({"labels": np.eye(2)}, r"labels are float64 \[2, 2\]; wanted integers.*give labels.argmax\(1\)"),
        (
            {"labels": np.ones((2, 2), int)},
            r"labels are int64 \[2, 2\]; wanted integers.*some rows have none or several",
        ),
        ({"labels": np.array([0.5, 1])}, r"labels are float64 \[2\]; wanted integers.*there is no regression"),
        ({"labels": np.array(["b", "a"])}, r"labels are <U1 \[2\]; wanted integers.*np.unique"),
        ({"labels": np.array([0, 2**64 - 1], np.uint64)}, "the highest label is 18446744073709551615"),
        ({"labels": np.zeros(3, int)}, "2 images but 3 labels"),
        ({"labels": np.array([-1, 0])}, "labels run from -1 to 0"),
        ({"labels": np.array([0, 2]), "class_names": np.array(["a", "b"])}, "labels run from 0 to 2, outside 0..1"),
        ({"labels": np.array([0, 10**9])}, "the highest label is 1000000000, which would make as many classes"),
        ({"class_names": np.array([1, 2])}, r"class_names are int64 \[2\]; wanted strings"),
        ({"class_names": np.array(["a", {}], object)}, r"class_names holds Python objects, .*astype\('U'\)"),
        ({"images": np.array([None, {}], object)}, "images holds Python objects"),
    ],
)
def test_npz_refuses_wrong_arrays(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    default = {} if len(arrays) == 1 and not {"labels", "class_names"} & set(arrays) and "holds" in message else None
    good = {"images": noise(2, 1, 4, 4), "labels": np.array([0, 1])}
    np.savez(tmp_path / "x.npz", **((good if default is None else {}) | arrays))
    with pytest.raises(ValueError, match=message):
        load_data(str(tmp_path / "x.npz"), "train", data_dir=NO_DATA)


@pytest.mark.parametrize("shape", [(2, 34, 34), (2, 4, 4), (1, 3, 3), (4, 8, 8), (3, 9, 2), (16, 4, 4), (64, 1, 1)])
def test_npz_takes_channels_first_whatever_their_number(tmp_path: Path, shape: tuple[int, ...]) -> None:
    for steps in ((), (3,)):
        np.savez(tmp_path / "x.npz", images=noise(2, *steps, *shape), labels=[0, 1])
        assert load_data(str(tmp_path / "x.npz"), "train", data_dir=NO_DATA).x.shape == (2, *steps, *shape)


def test_npz_refuses_files_that_are_not_one(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with pytest.raises(FileNotFoundError, match=r"no file .*x\.npz; give the path"):
        load_data(str(path), "train", data_dir=NO_DATA)
    save_npz(image_set(), path)
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[whole.index(image_set().images.tobytes()) + 3] ^= 1  # the zip's checksum notices one flipped bit
    single = io.BytesIO()
    np.save(single, noise(3))
    header = io.BytesIO()  # with no end to its shape
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(header, "w") as written:
        for name in archive.namelist():
            written.writestr(name, archive.read(name).replace(b"), }", b",   "))
    deflated = io.BytesIO()
    np.savez_compressed(deflated, images=image_set().images)
    stream = bytearray(deflated.getvalue())
    stream[30 + sum(struct.unpack_from("<2H", stream, 26))] |= 0b110  # the third kind of block, which there is not
    bytes_alone = io.BytesIO()
    with zipfile.ZipFile(bytes_alone, "w") as written:
        written.writestr("images.npy", b"no array")
    huge = io.BytesIO()  # by its header 96 TB
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(huge, "w") as written:
        for name in archive.namelist():
            claimed = f"({6 * 10**12}, 1, 4, 4), }}".encode()
            written.writestr(name, archive.read(name).replace(b"(6, 1, 4, 4), }" + b" " * 12, claimed))
    contents = (whole[: len(whole) // 2], whole[:-30], b"", b"hello", bytes(damaged), bytes(stream), single.getvalue())
    for content in (*contents, header.getvalue(), huge.getvalue(), bytes_alone.getvalue()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.npz is damaged: .*; write it with numpy.savez"):
            load_data(str(path), "train", data_dir=NO_DATA)


def test_npz_refuses_a_pointer_of_git_lfs(tmp_path: Path) -> None:
    (path := tmp_path / "x.npz").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(OSError, match=r"x\.npz is a pointer of Git LFS in place of the arrays; fetch .* git lfs pull$"):
        load_data(str(path), "train", data_dir=NO_DATA)


def test_an_npz_with_one_damaged_byte_is_read_or_said_to_be_damaged(tmp_path: Path) -> None:
    path, array, whole = tmp_path / "x.npz", io.BytesIO(), io.BytesIO()
    np.save(array, np.arange(6.0).reshape(2, 3))
    np.savez_compressed(whole, x=np.arange(6.0))

    def read(content: bytes) -> str:
        path.write_bytes(content)
        try:
            read_npz(path)
        except ValueError as error:
            return str(error)
        return ""

    def archived(array: bytes) -> bytes:  # NumPy parses the header of an array before the archive's checksum is known
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as written:
            written.writestr("x.npy", array)
        return archive.getvalue()

    said = {
        read(form(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]))
        for form, content in ((archived, array.getvalue()), (bytes, whole.getvalue()))
        for place in range(len(content))
        for bit in (1, 16, 128)
    }
    assert len(said) > 20 and all(re.match(rf"{re.escape(str(path))} is damaged: .", text) for text in said - {""})


def test_an_npz_may_hold_other_files_beside_the_arrays(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    save_npz(image_set(), path)
    with zipfile.ZipFile(path, "a") as archive:
        for name in ("README.txt", "__MACOSX/", "__MACOSX/._images.npy"):
            archive.writestr(name, b"" if name.endswith("/") else b"text")
    np.testing.assert_array_equal(load_data(str(path), "train", data_dir=NO_DATA).images, image_set().images)


def test_save_npz_refuses_other_suffixes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the name must end in \.npz"):
        save_npz(image_set(), tmp_path / "x.zip")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- folder:PATH


def write_image(path: Path, pixels: NDArray[Any], mode: str | None = None) -> NDArray[Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    image = image.convert(mode) if mode else image
    image.save(path, **({"lossless": True} if path.suffix == ".webp" else {}))
    return pixels


def make_tree(root: Path, classes: tuple[str, ...] = ("cat", "ant"), per_class: int = 3, grey: bool = False) -> Path:
    """Class folders of lossless 6x4 images; the first pixel says which class and which number it is, the last one of
    which split."""
    for split in ("train", "test"):
        for k, name in enumerate(sorted(classes)):
            for i in range(per_class):
                pixels = noise(4, 6, seed=100 * k + i) if grey else noise(4, 6, 3, seed=100 * k + i)
                pixels[0, 0], pixels[-1, -1] = 10 * k + i, 255 * (split == "test")
                write_image(root / split / name / f"{i}{('.png', '.webp', '.bmp')[i % 3]}", pixels)
    return root


def test_folder_reads_every_image_with_its_class(tmp_path: Path) -> None:
    make_tree(tmp_path)
    for hidden in (".DS_Store", "Thumbs.db"):
        (tmp_path / "train" / "cat" / hidden).write_bytes(b"ignored")
    data = load_data(f"folder:{tmp_path}", "train", data_dir=NO_DATA)
    assert data.images.shape == (6, 3, 4, 6) and data.class_names == ("ant", "cat")
    assert sorted(data.images[:, 0, 0, 0]) == [0, 1, 2, 10, 11, 12]
    np.testing.assert_array_equal(data.labels, data.images[:, 0, 0, 0] // 10)
    for image in data.images:
        first = int(image[0, 0, 0])
        wanted = noise(4, 6, 3, seed=100 * (first // 10) + first % 10).transpose(2, 0, 1)
        wanted[:, -1, -1] = 0
        np.testing.assert_array_equal(image[:, 1:], wanted[:, 1:])


def test_test_images_that_are_training_images_are_named(tmp_path: Path) -> None:
    root = make_tree(tmp_path)
    (root / "test/cat/copy.png").write_bytes((root / "train/ant/0.png").read_bytes())
    for _ in range(2):  # decoded, then from the cache
        with pytest.warns(
            RuntimeWarning, match=r"^1 of the 7 test images of .* too, pixel for pixel: .*test/cat/copy\.png;"
        ):
            load_data(f"folder:{root}", "test", data_dir=NO_DATA)


def test_folder_order_is_mixed_and_repeatable(tmp_path: Path) -> None:
    root = make_tree(tmp_path, per_class=10)
    first, second = (load_data(f"folder:{root}", "test", data_dir=NO_DATA) for _ in range(2))
    np.testing.assert_array_equal(first.images, second.images)
    assert set(first.labels[:10]) == {0, 1}


def test_the_test_images_of_a_folder_hold_no_others_in_memory(tmp_path: Path) -> None:
    images = load_data(f"folder:{make_tree(tmp_path)}", "test", data_dir=NO_DATA).images
    assert images.base is None or images.base.nbytes == images.nbytes


def test_folder_statistics_are_of_the_training_images_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_tree(tmp_path)
    for path in (root / "test").rglob("*.*"):
        write_image(path, np.zeros((4, 6, 3), np.uint8))
    train = load_data(f"folder:{root}", "train", data_dir=NO_DATA)
    monkeypatch.setattr("tetdeploy.data.folder.channel_statistics", lambda images: pytest.fail("computed again"))
    test = load_data(f"folder:{root}", "test", data_dir=NO_DATA)
    assert not test.images.any()
    assert (test.mean, test.std) == (train.mean, train.std) == channel_statistics(train.images)


def test_folder_is_grey_only_if_all_images_are(tmp_path: Path) -> None:
    root = make_tree(tmp_path, grey=True)
    for path in root.rglob("*.webp"):  # webp has no grey mode
        Image.open(path).convert("L").save(path.with_suffix(".png"))
        path.unlink()
    assert load_data(f"folder:{root}", "train", data_dir=NO_DATA).images.shape == (6, 1, 4, 6)
    write_image(root / "test" / "cat" / "colour.png", noise(4, 6, 3))
    data = load_data(f"folder:{root}", "train", data_dir=NO_DATA)
    assert data.images.shape == (6, 3, 4, 6)  # both splits decide, so that they fit one network
    assert (data.images == data.images[:, :1]).all()


@pytest.mark.parametrize(
    ("mode", "channels"), [("1", 1), ("L", 1), ("LA", 1), ("P", 3), ("RGB", 3), ("RGBA", 3), ("CMYK", 3)]
)
def test_folder_converts_pixel_formats(tmp_path: Path, mode: str, channels: int) -> None:
    black_and_white = np.repeat(np.where(noise(4, 6, 1) > 127, 255, 0).astype(np.uint8), 3, axis=2)
    for split in ("train", "test"):
        suffix = ".jpg" if mode == "CMYK" else ".png"
        write_image(tmp_path / split / "a" / f"x{suffix}", black_and_white, mode)
    data = load_data(f"folder:{tmp_path}", "train", data_dir=NO_DATA)
    wanted = black_and_white.transpose(2, 0, 1)[:channels]
    if mode != "CMYK":  # jpeg is lossy
        np.testing.assert_array_equal(data.images[0], wanted)
    assert data.images.shape == (1, channels, 4, 6)


def add_file(name: str, content: bytes) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)

    return change


def add_image(name: str, *shape: int) -> Callable[[Path], Any]:
    return lambda root: write_image(root / name, noise(*shape))


def add_deep_image(name: str, kind: str) -> Callable[[Path], Any]:
    return lambda root: write_deep_png(root / name, kind)


def cut(name: str) -> Callable[[Path], Any]:
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:60])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_file("train/cat/x.png", b"hello"), r"1 of 13 images cannot be read: .*x.png \(5 bytes that are no png"),
        (add_file("test/cat/x.png", b""), r"1 of 13 images cannot be read: .*x.png \(0 bytes"),
        (cut("test/ant/0.png"), r"1 of 12 images cannot be read: .*ant/0.png"),
        (lambda root: (root / "train/cat/l.png").symlink_to("gone.png"), r"1 of 13 images cannot be read: .*l.png"),
        *((add_deep_image("train/cat/x.png", kind), r"x.png \(pixel format .*;16 is not 8 bits") for kind in DEEP),
        (add_file("train/cat/x.png", b"version https://git-lfs.github.com/spec/v1"), r"x.png \(a pointer of Git LFS"),
        (
            add_image("test/cat/x.png", 5, 8, 3),
            r"2 sizes \(width x height\): 12 of 6x4, 1 of 8x5; .* 1: .*test/cat/x.png",
        ),
        (lambda root: (root / "train/dog").mkdir(), "1 class folders in .*train are empty: dog"),
        (add_image("train/dog/x.png", 4, 6, 3), r"train and .*test differ \(1 only in train: dog\)"),
        (add_image("test/dog/x.png", 4, 6, 3), r"\(1 only in test: dog\)"),
        (lambda root: (root / "train/dog").symlink_to("gone"), "1 links in .*train lead to nothing: .*dog; put"),
        (add_image("train/x.png", 4, 6, 3), "1 images in .*train lie outside a class folder: .*x.png"),
        (add_file("train/cat/x.tiff", b"?"), "1 entries of the class folders .* are no .*x.tiff"),
        (lambda root: (root / "train/cat/sub").mkdir(), "1 entries of the class folders .*sub"),
        (lambda root: (root / "test").rename(root / "val"), "no folder .*test; wanted .*test/<class>/"),
        (lambda root: (root / "train").rename(root / "training"), "no folder .*train; wanted .*train/<class>/"),
    ],
)
def test_folder_names_and_counts_what_is_wrong(tmp_path: Path, change: Callable[[Path], Any], message: str) -> None:
    root = make_tree(tmp_path / "set")
    load_data(f"folder:{root}", "train", data_dir=NO_DATA)  # fills the cache, which must not hide the change
    change(root)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_data(f"folder:{root}", "train", data_dir=NO_DATA)


def test_class_names_that_look_alike_are_said_to_differ_in_their_form(tmp_path: Path) -> None:
    root = make_tree(tmp_path, classes=("ant", "caf\u00e9"))
    (root / "test" / "caf\u00e9").rename(root / "test" / "cafe\u0301")
    with pytest.raises(ValueError, match=r"only in test: caf.*\), some in their Unicode form alone, NFC or NFD;"):
        load_data(f"folder:{root}", "train", data_dir=NO_DATA)
    with pytest.raises(ValueError, match=r"label 1 means .*, some in their Unicode form alone, NFC or NFD; is this"):
        check_classes("model", ("ant", "caf\u00e9"), "folder:x", ("ant", "cafe\u0301"))


def test_folder_counts_all_and_names_five(tmp_path: Path) -> None:
    root = make_tree(tmp_path)
    for i in range(8):
        (root / "train" / "cat" / f"bad{i}.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"8 of 20 images cannot be read: .* and 3 more; repair or remove them"):
        load_data(f"folder:{root}", "train", data_dir=NO_DATA)


def test_one_large_image_among_small_ones_is_named_whatever_memory_there_is() -> None:
    def named(name: str, side: int) -> decoding.ImageFile:
        encoded = io.BytesIO()
        Image.new("1", (side, side)).save(encoded, "png")
        return decoding.ImageFile(name, encoded.getvalue)

    images = [named("large", 9000), *[named("small", 2)] * 4000]  # 972 GB, were all as large
    with pytest.raises(ValueError, match=r"4000 of 2x2, 1 of 9000x9000; .* remove these 1: large$"):
        decoding.decode_images(images, text="")


def test_images_that_are_all_cut_short_are_refused() -> None:
    encoded = io.BytesIO()
    Image.fromarray(noise(64, 64, 3)).save(encoded, "png")
    cut_short = decoding.ImageFile("x", lambda: encoded.getvalue()[:-4000])
    with pytest.raises(ValueError, match=r"2 of 2 images cannot be read: x \(image file is truncated\)"):
        decoding.decode_images([cut_short] * 2, text="")


def test_folder_without_classes_says_what_is_wanted(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
    with pytest.raises(ValueError, match=r"train has no class folders; wanted .*<class>/ with png"):
        load_data(f"folder:{tmp_path}", "train", data_dir=NO_DATA)


# ---------------------------------------------------------------- cache, progress bar


def test_cache_is_used_until_a_source_changes(tmp_path: Path, cache_folder: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"1")
    calls: list[int] = []

    def make() -> dict[str, NDArray[Any]]:
        calls.append(len(calls))
        return {"a": np.array(calls), "b": np.array(["x"])}

    def get() -> list[int]:
        return list(Cache(tmp_path, [source]).get("made", make)["a"])

    assert (get(), get()) == ([0], [0])
    source.write_bytes(b"22")
    assert (get(), get()) == ([0, 1], [0, 1])
    os.utime(source, ns=(1, 1))
    assert get() == [0, 1, 2]
    [path] = cache_folder.iterdir()  # one file a source, no litter
    for damaged in (b"", b"junk", path.read_bytes()[:-40]):
        path.write_bytes(damaged)
        before = len(calls)
        assert len(get()) == before + 1  # made anew,
        assert len(get()) == before + 1  # and kept


def test_a_long_folder_name_is_cached_too(tmp_path: Path, cache_folder: Path) -> None:
    for name in ("n" * 250, "é" * 125, "\udcff" * 120):
        load_data(f"folder:{make_tree(tmp_path / name)}", "train", data_dir=NO_DATA)
    assert len(list(cache_folder.iterdir())) == 3


def test_cache_sees_files_change_places_that_have_one_size_and_time(tmp_path: Path) -> None:
    """As images of one format in an archive may."""
    files = [tmp_path / name for name in ("a", "b")]
    for file in files:
        file.write_text(file.name)
        os.utime(file, ns=(1, 1))

    def get() -> list[str]:
        return list(Cache(tmp_path, files).get("made", lambda: {"a": np.array([f.read_text() for f in files])})["a"])

    assert get() == ["a", "b"]
    time.sleep(0.02)  # clocks of file systems may tick a hundred times a second
    for source, target in (("a", "c"), ("b", "a"), ("c", "b")):
        (tmp_path / source).rename(tmp_path / target)
    assert get() == ["b", "a"]


@pytest.mark.parametrize("root", ["set", ".", "/"])
def test_a_fingerprint_is_of_paths_below_the_root_sizes_and_times(
    tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch, root: str
) -> None:
    """Whether paths are texts or Paths; another one would void all caches."""
    folder = make_tree(tmp_path / "set")
    (folder / "train/cat/é\udcff.png").symlink_to("gone.png")
    monkeypatch.chdir(folder if root == "." else tmp_path)
    place = {"set": Path("set"), ".": Path(), "/": folder}[root]
    digest = hashlib.sha256(b"5")
    paths = sorted((place / "train").glob("*/*"))
    for path in paths:
        digest.update(os.fsencode(path.relative_to(root)))
        if path.exists():
            stat = path.stat()
            digest.update(f"\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ctime_ns}\0".encode())
    listed = [path for found in class_files(place / "train").values() for path in found]
    assert listed == [str(path) for path in paths] and len(listed) == 7
    for sources in (paths, listed):
        Cache(Path(root), sources).get("made", lambda: {"a": np.zeros(1)})
        [kept] = cache_folder.iterdir()
        assert read_npz(kept)["fingerprint"] == digest.hexdigest()
        kept.unlink()


def test_cache_is_not_scattered_over_working_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The standard of XDG_CACHE_HOME says to take no relative path."""
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / ".cache" / "tetdeploy"


def test_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    root = make_tree(tmp_path / "set")
    assert len(load_data(f"folder:{root}", "train", data_dir=NO_DATA)) == 6


def test_cache_does_not_mind_how_the_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_tree(tmp_path / "set")
    load_data(f"folder:{root}", "train", data_dir=NO_DATA)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tetdeploy.data.folder.decode_images", None)  # would be called without a cache
    assert len(load_data("folder:set", "train", data_dir=NO_DATA)) == 6


def test_relative_cache_home_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    Cache(tmp_path, []).get("made", lambda: {"a": np.zeros(1)})
    assert not Path("relative").exists() and len(list((tmp_path / "home/.cache/tetdeploy").iterdir())) == 1


def test_ctrl_c_waits_for_the_images_that_are_being_decoded_alone() -> None:
    decoded = []

    def decode(index: int) -> None:
        decoded.append(index)
        if index == 1:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.02)

    with handled(signal.default_int_handler, signal.SIGINT), pytest.raises(KeyboardInterrupt):
        decoding.in_threads(decode, 100, None)
    assert len(decoded) < 100


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("terminal", "seconds", "shown"), [(True, 5, True), (True, 0, False), (False, 5, False)])
def test_progress_bar_shows_on_a_terminal_when_it_takes_long(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, seconds: float, shown: bool
) -> None:
    stream = _Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    begin = time.monotonic()
    clock = iter([begin, begin + seconds, begin + seconds])
    monkeypatch.setattr(decoding, "time", type("Clock", (), {"monotonic": staticmethod(lambda: next(clock))}))
    encoded = io.BytesIO()
    Image.fromarray(noise(4, 4)).save(encoded, "PNG")
    decoding.decode_images([decoding.ImageFile("x", encoded.getvalue)] * 2, text="decoding made\x1b[8m[/x]")
    assert ("decoding made[8m[/x]" in stream.getvalue()) == shown
    assert bool(stream.getvalue()) == shown


# ---------------------------------------------------------------- Fashion-MNIST


def idx_bytes(array: NDArray[np.uint8]) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


def write_fashion(folder: Path, *, compress: bool, prefix: str = "t10k") -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    images, labels = noise(12, 28, 28), np.array([9, 2, 1, 1, 6, 1, 4, 6, 5, 7, 4, 5], np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        content = idx_bytes(array)
        path = folder / f"{prefix}-{name}-ubyte{'.gz' if compress else ''}"
        path.write_bytes(gzip.compress(content) if compress else content)
    return images, labels


@pytest.fixture
def small_fashion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "COUNTS", {"train": 12, "test": 12})


@pytest.mark.usefixtures("small_fashion")
@pytest.mark.parametrize("folder", [".", "fashion-mnist", "FashionMNIST/raw"])
@pytest.mark.parametrize("compress", [True, False])
def test_fashion_mnist_is_found_in_each_layout(tmp_path: Path, folder: str, compress: bool) -> None:
    images, labels = write_fashion(tmp_path / folder, compress=compress)
    data = load_data("fashion-mnist", "test", data_dir=tmp_path)
    np.testing.assert_array_equal(data.images[:, 0], images)
    np.testing.assert_array_equal(data.labels, labels)
    assert data.class_names[9] == "Ankle boot" and (data.mean, data.std) == ((0.2860,), (0.3530,))


def test_fashion_mnist_class_names_are_torchvisions() -> None:
    from torchvision.datasets import FashionMNIST

    from tetdeploy.data.fashion_mnist import CLASS_NAMES

    assert list(CLASS_NAMES) == FashionMNIST.classes


@pytest.mark.parametrize("compress", [True, False])
def test_fashion_mnist_refuses_damaged_files(tmp_path: Path, compress: bool) -> None:
    write_fashion(tmp_path, compress=compress)
    path = tmp_path / f"t10k-images-idx3-ubyte{'.gz' if compress else ''}"
    whole = path.read_bytes()
    negative = bytes((0, 0, 8, 3)) + struct.pack(">iii", -1, -1, 4) + b"abcd"
    for content in (whole[:-100], whole[:6], b"", idx_bytes(noise(12)), negative):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte.* remove it to download the set again"):
            load_data("fashion-mnist", "test", data_dir=tmp_path)


def test_fashion_mnist_refuses_mnist(tmp_path: Path) -> None:
    write_fashion(tmp_path, compress=False)
    labels = np.array([7, 2, 1, 0, 4, 1, 4, 9, 5, 9, 0, 6], np.uint8)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    with pytest.raises(ValueError, match="holds the labels of MNIST, not of Fashion-MNIST"):
        load_data("fashion-mnist", "test", data_dir=tmp_path)


@pytest.mark.parametrize(("shape", "found"), [((12, 28, 28), "12 images of 28x28"), ((10_000, 2, 3), "of 3x2")])
def test_fashion_mnist_refuses_other_numbers_and_sizes(tmp_path: Path, shape: tuple[int, ...], found: str) -> None:
    write_fashion(tmp_path, compress=False)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(noise(*shape)))
    with pytest.raises(ValueError, match=rf"{found}, but fashion-mnist has 10,000 of 28x28 in test; .* folder:PATH"):
        load_data("fashion-mnist", "test", data_dir=tmp_path)


@pytest.mark.usefixtures("small_fashion")
def test_fashion_mnist_is_downloaded(
    server: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torchvision.datasets import FashionMNIST

    data_dir = tmp_path / "new" / "data"
    for prefix in ("train", "t10k"):
        images, _ = write_fashion(server[0], compress=True, prefix=prefix)
    resources = [(p.name, hashlib.md5(p.read_bytes()).hexdigest()) for p in sorted(server[0].iterdir())]
    monkeypatch.setattr(FashionMNIST, "mirrors", [server[1]])
    monkeypatch.setattr(FashionMNIST, "resources", resources)
    for split in ("train", "test"):
        np.testing.assert_array_equal(load_data("fashion-mnist", split, data_dir=data_dir).images[:, 0], images)
    assert capsys.readouterr().out == ""  # stdout is for reports
    assert [path.name for path in data_dir.iterdir()] == ["FashionMNIST"]
    (data_dir / "FashionMNIST/raw/train-labels-idx1-ubyte").unlink()
    (data_dir / "FashionMNIST/raw/train-labels-idx1-ubyte.gz").unlink()
    assert len(load_data("fashion-mnist", "train", data_dir=data_dir)) == 12  # an incomplete set is completed


# ---------------------------------------------------------------- CIFAR


@pytest.fixture
def small_cifar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "COUNTS", {"train": 40, "test": 20})


NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()  # noqa: SIM905


def cifar_files(split: str = "test") -> dict[str, bytes]:
    """Names and webp bytes of a small CIFAR-10; red of the first pixel is the label, green the number."""
    files = {}
    for label, name in enumerate(NAMES):
        for i in range({"train": 4, "test": 2}[split]):
            pixels = noise(32, 32, 3, seed=label * 10 + i)
            pixels[0, 0, :2] = label, i
            encoded = io.BytesIO()
            Image.fromarray(pixels).save(encoded, "WEBP", lossless=True)
            files[f"cifar10/{split}/{name}/{name}_{i}.webp"] = encoded.getvalue()
    return files


def write_zip(path: Path, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def write_tree(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


@pytest.mark.usefixtures("small_cifar")
def test_cifar_tree_and_zips_give_the_same(tmp_path: Path) -> None:
    files = cifar_files("train")
    hidden = {f"cifar10/train/{name}": b"no image" for name in ("cat/.DS_Store", "cat/desktop.ini", ".cache/cat")}
    write_tree(tmp_path / "tree", files | hidden)
    (tmp_path / "zips").mkdir()
    names = list(files)
    for part in range(2):
        write_zip(tmp_path / "zips" / f"cifar10-train-{part}.zip", {n: files[n] for n in names[part::2]} | hidden)
    tree, zips = (load_data("cifar10", "train", data_dir=tmp_path / source) for source in ("tree", "zips"))
    for data in (tree, zips):
        assert data.images.shape == (40, 3, 32, 32) and list(data.class_names) == NAMES
        np.testing.assert_array_equal(data.labels, data.images[:, 0, 0, 0])
        assert sorted(map(tuple, data.images[:, :2, 0, 0])) == [(k, i) for k in range(10) for i in range(4)]
    np.testing.assert_array_equal(tree.images, zips.images)
    assert len(set(zips.labels[:10])) > 3  # mixed over the classes


@pytest.mark.usefixtures("small_cifar")
def test_cifar_refuses_a_zip_under_two_names(tmp_path: Path) -> None:
    half = dict(list(cifar_files("train").items())[::2])
    for part in range(2):
        write_zip(tmp_path / f"cifar10-train-{part}.zip", half)
    twice = r"train-1.zip holds cifar10/train/airplane/airplane_0.webp, which is in .*train-0.zip already; remove one"
    with pytest.raises(ValueError, match=twice):
        load_data("cifar10", "train", data_dir=tmp_path)


@pytest.mark.usefixtures("small_cifar", "no_network")
def test_cifar_single_zip_is_found(tmp_path: Path) -> None:
    write_zip(tmp_path / "cifar10-test.zip", cifar_files())
    assert len(load_data("cifar10", "test", data_dir=tmp_path)) == 20
    with pytest.raises(OSError, match="cifar10 was not found"):
        load_data("cifar10", "train", data_dir=tmp_path)


@pytest.mark.usefixtures("small_cifar")
def test_cifar_second_reading_comes_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_zip(tmp_path / "cifar10-test.zip", cifar_files())
    first = load_data("cifar10", "test", data_dir=tmp_path)
    monkeypatch.setattr(cifar, "decode_images", None)  # would be called without a cache
    second = load_data("cifar10", "test", data_dir=tmp_path)
    np.testing.assert_array_equal(first.images, second.images)
    np.testing.assert_array_equal(first.labels, second.labels)


@pytest.mark.usefixtures("small_cifar")
def test_cifar_refuses_incomplete_or_damaged_sources(tmp_path: Path) -> None:
    files = cifar_files()
    path = tmp_path / "cifar10-test.zip"

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load_data("cifar10", "test", data_dir=tmp_path)

    write_zip(path, dict(list(files.items())[1:]))
    refused(r"cifar10-test.zip: 19 images, but cifar10 has 20 in test; add what is missing")
    write_zip(path, {n: c for n, c in files.items() if "/cat/" not in n})
    refused("class folders are not those of cifar10/test; missing or unknown: cat")
    write_zip(path, files | {"cifar10/test/cat/cat_1.webp": b"junk"})
    refused(r"1 of 20 images cannot be read: .*cifar10-test.zip/cifar10/test/cat/cat_1.webp \(4 bytes")
    write_zip(path, {})
    refused("missing or unknown: airplane, automobile, bird, cat, deer and 5 more")
    write_zip(path, files)
    path.write_bytes(path.read_bytes()[:-50])
    refused("cifar10-test.zip is not a zip or is cut short")
    small = io.BytesIO()
    Image.fromarray(noise(8, 8, 3)).save(small, "WEBP", lossless=True)
    write_zip(path, dict.fromkeys(files, small.getvalue()))
    refused("images of 8x8 with 3 channels; cifar10 has 32x32 with 3")


@pytest.mark.usefixtures("small_cifar")
def test_cifar_tree_with_foreign_class_is_refused(tmp_path: Path) -> None:
    write_tree(tmp_path, cifar_files() | {"cifar10/test/unicorn/x.webp": b"x"})
    with pytest.raises(ValueError, match="not those of cifar10/test; missing or unknown: unicorn"):
        load_data("cifar10", "test", data_dir=tmp_path)


def python2_pickle(value: Any) -> bytes:
    """As CIFAR's files were written: the dtype's flags are integers, of which numpy >= 2.4 warns."""
    return pickle.dumps(value, protocol=2).replace(b"\x89\x88\x87", b"K\x00K\x01\x87")


@pytest.fixture
def torchvision_cifar(server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, small_cifar: None) -> Path:
    """A server with a small CIFAR-10 in torchvision's layout, to whose checksums torchvision is told to hold."""
    from torchvision.datasets import CIFAR10

    batches = server[0] / "cifar-10-batches-py"
    batches.mkdir()
    data, labels = noise(20, 3 * 32 * 32), np.tile(np.arange(10), 2)
    data[:, 0] = labels
    batch = {"data": data, "labels": labels.tolist()}
    contents = {
        "data_batch_1": batch,
        "data_batch_2": batch,
        "test_batch": batch,
        "batches.meta": {"label_names": NAMES},
    }
    md5 = {}
    for name, value in contents.items():
        (batches / name).write_bytes(python2_pickle(value))
        md5[name] = hashlib.md5((batches / name).read_bytes()).hexdigest()
    archive = batches.parent / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(batches, batches.name)
    monkeypatch.setattr(CIFAR10, "url", server[1] + archive.name)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "train_list", [[n, md5[n]] for n in ("data_batch_1", "data_batch_2")])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5["batches.meta"]})
    return batches.parent


def test_cifar_is_read_from_torchvisions_layout(torchvision_cifar: Path) -> None:
    for split, count in (("train", 40), ("test", 20)):
        data = load_data("cifar10", split, data_dir=torchvision_cifar)  # type: ignore[arg-type]
        assert data.images.shape == (count, 3, 32, 32) and list(data.class_names) == NAMES
        np.testing.assert_array_equal(data.labels, data.images[:, 0, 0, 0])
        np.testing.assert_array_equal(data.images[0].ravel()[1:], noise(20, 3 * 32 * 32)[0, 1:])


def test_cifar_damaged_torchvision_layout_is_refused(torchvision_cifar: Path) -> None:
    (torchvision_cifar / "cifar-10-batches-py" / "test_batch").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"cifar-10-batches-py is incomplete or damaged .* remove it to download"):
        load_data("cifar10", "test", data_dir=torchvision_cifar)


def test_cifar_is_downloaded(torchvision_cifar: Path, tmp_path: Path) -> None:
    data_dir = tmp_path / "new" / "data"
    assert len(load_data("cifar10", "train", data_dir=data_dir)) == 40
    assert [path.name for path in data_dir.iterdir()] == ["cifar-10-batches-py"]


@pytest.mark.usefixtures("no_network")
def test_cifar_archive_brought_by_hand_is_unpacked(torchvision_cifar: Path, tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    (torchvision_cifar / "cifar-10-python.tar.gz").rename(data_dir / "cifar-10-python.tar.gz")
    assert len(load_data("cifar10", "test", data_dir=data_dir)) == 20


@pytest.mark.usefixtures("no_network")
def test_cifar_archive_that_is_cut_short_is_named(torchvision_cifar: Path, tmp_path: Path) -> None:
    cut_short = tmp_path / "cifar-10-python.tar.gz"
    cut_short.write_bytes((torchvision_cifar / cut_short.name).read_bytes()[:-9])
    said = r"\(no network in this test; .*cifar-10-python\.tar\.gz is there, but damaged or cut short\)"
    with pytest.raises(OSError, match=said):
        load_data("cifar10", "test", data_dir=tmp_path)
    assert cut_short.is_file()


def test_broken_download_leaves_nothing(
    torchvision_cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "tgz_md5", "0" * 32)
    with pytest.raises(OSError, match="could not be downloaded"):
        load_data("cifar10", "train", data_dir=tmp_path / "new" / "data")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["server"]


def test_two_jobs_may_download_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(root: str) -> None:
        Path(root, "set").mkdir()
        Path(root, "set", "a").write_bytes(b"whole")

    def replace(made: Path, target: Path) -> None:
        make(str(tmp_path))  # the other job's
        os.replace(made, target)  # noqa: PTH105

    monkeypatch.setattr(Path, "replace", replace)
    download("made", make, "set", tmp_path, looked_for=[])
    assert [path.read_bytes() for path in tmp_path.glob("set/*")] == [b"whole"]
    assert not list(tmp_path.glob(".tetdeploy-download-*"))


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("cifar10", ["cifar-10-batches-py (torchvision's layout", "cifar10/train/<class>/*", "cifar10-train-*.zip"]),
        ("cifar100", ["cifar-100-python (torchvision's layout", "cifar100/train/<class>/*", "cifar100-train-*.zip"]),
        ("fashion-mnist", ["FashionMNIST/raw/train-images-idx3-ubyte[.gz]", "fashion-mnist/train-images"]),
    ],
)
def test_failed_download_says_where_data_were_looked_for(tmp_path: Path, name: str, places: list[str]) -> None:
    data_dir = tmp_path / "new" / "data"
    with pytest.raises(OSError, match="could not be downloaded") as caught:
        load_data(name, "train", data_dir=data_dir)
    message = str(caught.value)
    assert message.startswith(f"{name} was not found in {data_dir} and could not be downloaded (")
    assert "no network in this test" in message and "--data-dir" in message and "\n" not in message
    assert all(place in message for place in places)
    assert caught.value.__suppress_context__
    assert not list(tmp_path.iterdir())


def test_download_without_torchvision_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "torchvision", None)  # type: ignore[arg-type]
    with pytest.raises(OSError, match=r"cifar10 was not found .* pip install 'tetdeploy\[train\]'.*Looked for"):
        load_data("cifar10", "train", data_dir=tmp_path)


def test_data_dir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"file is a file; name a folder with --data-dir"):
        load_data("cifar10", "train", data_dir=tmp_path / "file")


# ---------------------------------------------------------------- the real images


@pytest.fixture
def real_data() -> Path:
    folder = os.environ.get("TETDEPLOY_DATA")
    if not folder:
        pytest.skip("TETDEPLOY_DATA does not name a folder with the real CIFAR images")
    return Path(folder)


@pytest.mark.parametrize(("name", "num_classes"), [("cifar10", 10), ("cifar100", 100)])
def test_real_cifar_test_split(real_data: Path, name: str, num_classes: int) -> None:
    data = load_data(name, "test", data_dir=real_data)
    assert data.images.shape == (10_000, 3, 32, 32) and len(data.class_names) == num_classes
    assert np.bincount(data.labels).tolist() == [10_000 // num_classes] * num_classes
    np.testing.assert_allclose(channel_statistics(data.images)[0], data.mean, atol=0.005)
    assert abs(np.bincount(data.labels[:1000], minlength=num_classes) - 1000 / num_classes).max() < 40


@pytest.mark.slow
def test_real_cifar10_train_split(real_data: Path) -> None:
    data = load_data("cifar10", "train", data_dir=real_data)
    assert np.bincount(data.labels).tolist() == [5000] * 10
    np.testing.assert_allclose(channel_statistics(data.images)[0], data.mean, atol=5e-5)
    train, validation = split_validation(data, fraction=0.1)
    assert np.bincount(train.labels).tolist() == [4500] * 10
    assert np.bincount(validation.labels).tolist() == [500] * 10


@pytest.mark.parametrize(
    ("name", "other", "same"),
    [
        ("cifar10", "cifar10", True),
        ("cifar10", "cifar100", False),
        ("a/../d.npz", "d.npz", True),
        ("imagenet@64", "imagenet", True),
        ("imagenet:x", "imagenet", False),
        ("imagenet:x@64", "imagenet:x", True),
        ("folder:photos@2", "folder:photos@3", False),
        ("by-time:events:x/y", "events:x/./y", True),
        ("events:x", "folder:x", False),
        ("folder:2026-11-30T10:15", "folder:./2026-11-30T10:15", True),
        ("saccades:folder:10:15", "saccades:folder:./10:15", True),
        ("10:15/d.npz", "./10:15/d.npz", True),
    ],
)
def test_the_same_data_under_other_names(name: str, other: str, same: bool) -> None:
    assert same_data(name, other) is same
    assert same_data(str(Path("d.npz").absolute()), "d.npz")


def test_normalisation_and_classes_are_those_of_published_weights() -> None:
    assert (CIFAR10.mean, CIFAR10.std) == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    assert (CIFAR100.mean, CIFAR100.std) == ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
    assert (imagenet.MEAN, imagenet.STD) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for data, count in ((CIFAR10, 10), (CIFAR100, 100)):  # in alphabetical order, as the files number them
        assert data.class_names == tuple(sorted(set(data.class_names))) and len(data.class_names) == count
