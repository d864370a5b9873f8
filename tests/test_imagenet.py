"""Images that stay on disk: listed without a look at them, the same pixels in any process, every damage named."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command_helpers import printed, refused
from numpy.typing import NDArray
from PIL import ExifTags, Image
from torch import Tensor, nn
from torchvision.transforms import v2

import tetdeploy
from tetdeploy.cli.evaluate import _batches
from tetdeploy.cli.inputs import as_model_input
from tetdeploy.data import ImageFiles, image_files, load_data, split_validation
from tetdeploy.data.image_files import centre_crop
from tetdeploy.early_exit import softmax
from tetdeploy.export.trained import check_images
from tetdeploy.networks import Classifier, NetworkConfig
from tetdeploy.train import TrainConfig, TrainResult, disk_images, train
from tetdeploy.train.device_images import Batch, Draws
from tetdeploy.train.disk_images import DiskImages, ImageReader, random_crop_flip, rank_cores
from tetdeploy.train.schedule import derive_seed

WNIDS = ("n01440764", "n01443537", "n02102040")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with imagenet/train and imagenet/val: 3 classes of 12 and 4 JPEGs of various sizes."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 4)):
        for k, wnid in enumerate(WNIDS):
            (folder / "imagenet" / part / wnid).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 80, (*rng.integers(20, 60, 2), 3), np.uint8)
                pixels[..., k] += 150
                Image.fromarray(pixels).save(folder / "imagenet" / part / wnid / f"{wnid}_{number}.JPEG")
    return folder


@pytest.fixture
def copied(imagenet: Path, tmp_path: Path) -> Path:
    """A copy to do harm to."""
    shutil.copytree(imagenet, tmp_path / "data")
    return tmp_path / "data"


def files_of(folder: Path, split: Any = "train", name: str = "imagenet@16") -> ImageFiles:
    data = load_data(name, split, data_dir=folder)
    assert isinstance(data, ImageFiles)
    return data


# --- the set


def test_the_folders_are_listed_mixed_over_the_classes(imagenet: Path) -> None:
    data, test = files_of(imagenet, name="imagenet"), files_of(imagenet, "test")
    assert (len(data), data.image_shape, data.class_names) == (36, (3, 224, 224), WNIDS)
    assert (len(test), test.image_shape, test.encoding) == (12, (3, 16, 16), "direct")
    assert [Path(data.path(i)).parent.name for i in range(36)] == [WNIDS[label] for label in data.labels]
    assert len({data.path(i) for i in range(36)}) == 36
    assert set(data.labels[:9]) == {0, 1, 2}
    other = files_of(Path("nowhere"), name=f"imagenet:{imagenet}/imagenet")
    assert [other.path(i) for i in range(36)] == [data.path(i) for i in range(36)]


def test_an_array_that_is_decoded_where_it_is_sliced(imagenet: Path) -> None:
    data = files_of(imagenet)
    whole = np.asarray(data.x)
    assert whole.shape == data.x.shape == (36, 3, 16, 16) and whole.dtype == data.x.dtype == np.uint8
    indices: list[Any] = [3, -1, slice(2, 7), slice(30, 99), slice(None, None, 5), [4, 0], data.labels == 1, slice(0)]
    for index in indices:
        np.testing.assert_array_equal(data.x[index], whole[index])
    np.testing.assert_array_equal(data.select([5, 2]).x[:], whole[[5, 2]])
    brightest = whole.mean(axis=(2, 3)).argmax(axis=1)
    np.testing.assert_array_equal(brightest, data.labels)


def test_slices_in_a_row_are_decoded_ahead(imagenet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, read = files_of(imagenet), []
    whole, reader = data.x[:], image_files.read_image
    monkeypatch.setattr(image_files, "read_image", lambda path: read.append(path) or reader(path))
    x = data.x
    np.testing.assert_array_equal(x[0:10], whole[:10])
    assert len(read) == 10  # one slice is no row yet
    np.testing.assert_array_equal(x[10:20], whole[10:20])
    deadline = time.monotonic() + 60
    while len(read) < 30 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(read) == 30
    np.testing.assert_array_equal(x[20:30], whole[20:30])
    np.testing.assert_array_equal(x[30:40], whole[30:])
    assert len(read) == 36


def test_evaluate_reads_ahead(imagenet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, asked = files_of(imagenet), []
    read = image_files.FileImages.__getitem__
    monkeypatch.setattr(image_files.FileImages, "__getitem__", lambda x, index: asked.append(x) or read(x, index))
    batches = list(_batches(data, 10, torch.device("cpu"), None))
    assert [len(batch) for batch in batches] == [10, 10, 10, 6]
    assert len(asked) == 4 and all(x is asked[0] for x in asked)  # one, which knows what it was asked for before


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (40, 300), (256, 256), (333, 257)])
def test_the_evaluation_crop_is_torchvisions(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(pixels)
    wanted = v2.Compose([v2.Resize(256), v2.CenterCrop(224)])(image)
    np.testing.assert_array_equal(centre_crop(image, 224), np.asarray(wanted).transpose(2, 0, 1))


def test_a_line_of_pixels_is_refused_before_it_is_scaled() -> None:
    with pytest.raises(ValueError, match=r"^of 1 x 65000 pixels it is too long and narrow to be cropped$"):
        centre_crop(Image.new("RGB", (1, 65_000)), 224)


def test_grey_and_cmyk_become_rgb(copied: Path) -> None:
    data = files_of(copied)
    for index, mode in enumerate(("L", "CMYK")):
        path = data.path(index)
        Image.open(path).convert(mode).save(path, "JPEG")
    assert data.x[:2].shape == (2, 3, 16, 16)


def test_a_fingerprint_is_of_the_files_names(copied: Path) -> None:
    def held_out() -> ImageFiles:
        return split_validation(files_of(copied), fraction=0.25)[1]

    before = held_out()
    first = Path(before.path(0))
    first.write_bytes(b"")  # nothing is read
    assert held_out().fingerprint == before.fingerprint != before.select(slice(1, None)).fingerprint
    longer = replace(before, files=before.files.astype("S99"))
    assert longer.fingerprint == before.fingerprint
    first.rename(first.with_name("another.JPEG"))
    assert held_out().fingerprint != before.fingerprint


def test_selecting_and_splitting_read_no_image(copied: Path) -> None:
    data = files_of(copied)
    for index in range(36):
        Path(data.path(index)).write_bytes(b"")
    train_part, val_part = split_validation(data, fraction=0.25)
    assert (len(train_part), len(val_part)) == (27, 9)
    assert sorted(np.concatenate([train_part.files, val_part.files])) == sorted(data.files)
    with pytest.raises(
        ValueError, match=r"9 of the images .* cannot be read: .*0 bytes that are no png, .* and 4 more"
    ):
        val_part.x[:]


def test_an_export_is_checked_on_no_more_images_than_it_is_asked_for(copied: Path) -> None:
    data = files_of(copied)
    train_part, val_part = split_validation(data, fraction=0.25)
    for part, kept in ((train_part, 2), (val_part, 9)):
        for index in range(kept, len(part)):
            Path(part.path(index)).write_bytes(b"")
    x, labels = check_images(train_part, val_part, 11)
    assert x.shape == (11, 3, 16, 16)
    np.testing.assert_array_equal(labels, np.concatenate([val_part.labels, train_part.labels[:2]]))
    assert len(check_images(train_part, val_part, 4)[0]) == 4


def test_what_is_wrong_with_the_folders_is_named(copied: Path) -> None:
    root = copied / "imagenet"

    def refused(match: str, split: Any = "train", kind: type[Exception] = ValueError) -> None:
        with pytest.raises(kind, match=match):
            files_of(copied, split)

    (root / "train" / "n9").mkdir()
    refused("1 class folders in .*train are empty: n9; fill or remove them")
    refused("the classes in .*/train and .*/val differ .1 only in train: n9.; give both the same", "test")
    (root / "train" / "n9").rmdir()
    (root / "val" / WNIDS[0] / "notes.txt").write_text("")
    refused("1 entries of the class folders in .*val are no .*: .*notes.txt; convert or remove", "test")
    (root / "val" / "x.JPEG").write_bytes(b"")
    refused("1 images in .*val lie outside a class folder: .*x.JPEG; move them into one")
    shutil.rmtree(root / "val")
    refused("no folder .*imagenet/val; wanted .*<class>/ with png", kind=FileNotFoundError)
    shutil.rmtree(root)
    refused("no folder .*imagenet: .* is not downloaded; lay .* or name .*, imagenet:PATH", kind=FileNotFoundError)
    with pytest.raises(ValueError, match="size is 0 pixels; it must be at least 1"):
        ImageFiles("x", "train", root, np.array([b"a"]), np.array([0]), ("a",), (0.5,) * 3, (0.2,) * 3, 0)
    with pytest.raises(ValueError, match=r"files are int64 \[1\]; wanted bytes \[N\]"):
        ImageFiles("x", "train", root, np.array([1]), np.array([0]), ("a",), (0.5,) * 3, (0.2,) * 3, 8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown data set 'imagenette'"):
        load_data("imagenette", "train", data_dir=copied)


def test_saccades_want_images_in_memory(imagenet: Path) -> None:
    with pytest.raises(ValueError, match="imagenet@16 stays on disk; saccades turn images into frames"):
        load_data("saccades:imagenet@16", "train", data_dir=imagenet)


# --- batches


def drawn(data: ImageFiles, workers: int, share: slice = slice(0, 6)) -> list[Batch]:
    """Two passes, one of which is given up, and the images in order, of one reader."""
    reader = ImageReader(workers, CPU)
    images = DiskImages(data, reader, augment=True)
    draws = Draws(torch.arange(36).flip(0).view(6, 6), (1, 2, 3, 4, 5, 6), share)
    next(images.drawn(draws))
    return [*images.drawn(draws), *images.in_order(10)]


def test_workers_shares_and_passes_change_no_pixel(imagenet: Path) -> None:
    data = files_of(imagenet)
    own, others = drawn(data, 0), drawn(data, 2)
    assert [len(y) for _, y in own] == [6] * 6 + [10, 10, 10, 6]
    for one, other in zip(own, others, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert torch.equal(torch.cat([y for _, y in own[:6]]), torch.tensor(data.labels).flip(0))
    for x, seed, index in ((own[0][0][2], 1, 33), (own[5][0][5], 6, 0)):  # as in runs of before
        crop = random_crop_flip(image_files.read_image(data.path(index)), 16, derive_seed(seed, "image", index))
        np.testing.assert_array_equal(x, crop)
    assert torch.equal(torch.cat([x for x, _ in own[6:]]), torch.from_numpy(data.x[:]))
    for whole, part in zip(own[:6], drawn(data, 0, slice(2, 4)), strict=False):
        assert torch.equal(whole[0][2:4], part[0])
    assert not multiprocessing.active_children()


def test_a_random_crop_follows_from_its_seed_alone() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    image, state = Image.fromarray(pixels), torch.get_rng_state()
    crops = [random_crop_flip(image, 24, seed) for seed in (1, 2, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert crops[0].shape == (3, 24, 24) and crops[0].dtype == np.uint8
    np.testing.assert_array_equal(crops[0], crops[2])
    assert (crops[0] != crops[1]).any()
    ramp = Image.fromarray(np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))).convert("RGB")
    ramps = [random_crop_flip(ramp, 8, seed)[0, 0].astype(int) for seed in range(8)]
    assert {bool(row[0] < row[-1]) for row in ramps} == {True, False}  # some are flipped
    flat = Image.new("RGB", (9, 200), (10, 20, 30))  # smaller than the crop, and far from square
    assert (random_crop_flip(flat, 32, 3) == np.array([10, 20, 30])[:, None, None]).all()


def test_random_crops_have_the_area_and_the_aspect_ratio_that_are_documented() -> None:
    row, column = np.mgrid[:64, :64].astype(np.uint8)
    image = Image.fromarray(np.stack([row, column, column], axis=-1))
    crops = np.stack([random_crop_flip(image, 64, seed)[:2] for seed in range(100)]).astype(int)
    height, width = (crops.max((2, 3)) - crops.min((2, 3)) + 1).T
    area, ratio = height * width / 64**2, width / height
    assert 0.07 < area.min() < 0.15 and area.max() > 0.9
    assert 0.7 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.43  # 3/4 and 4/3, of whole pixels


def test_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tetdeploy.train.disk_images.usable_cores", lambda: 8)
    for ranks, cores in ((1, 8), (2, 4), (16, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert rank_cores() == cores


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_are_named(copied: Path, workers: int) -> None:
    data = files_of(copied)
    Path(data.path(7)).write_bytes(Path(data.path(7)).read_bytes()[:300])
    Path(data.path(8)).unlink()
    match = r"2 of the images read at once cannot be read: .*JPEG \(.*runcated.*JPEG \(No such file or directory\)"
    with closing(ImageReader(workers, CPU)) as reader, pytest.raises(ValueError, match=match):
        list(DiskImages(data, reader, augment=True).in_order(10))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_too_narrow_to_be_cropped_is_named(copied: Path, workers: int) -> None:
    data = files_of(copied, name="imagenet@224")
    path = data.path(7)
    Image.new("RGB", (1, 65_000)).save(path, "PNG")
    named = rf"1 of the images .* cannot be read: {path} \(of 1 x 65000 pixels it is too long and narrow to be"
    with pytest.raises(ValueError, match=named):
        data.x[7]
    with closing(ImageReader(workers, CPU)) as reader, pytest.raises(ValueError, match=named):
        list(DiskImages(data, reader, augment=True).in_order(10))


def test_a_worker_that_dies_is_an_error(imagenet: Path) -> None:
    with closing(ImageReader(1, CPU)) as reader:
        batches = DiskImages(files_of(imagenet), reader, augment=False).in_order(1)
        next(batches)
        (worker,) = multiprocessing.active_children()
        assert worker.pid is not None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # to all processes; a worker does not mind
            os.kill(worker.pid, number)
        next(batches)
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(
            ChildProcessError, match=r"a process that reads images ended .*--resume and fewer --workers"
        ):
            list(batches)
    assert not multiprocessing.active_children()


def test_after_a_worker_died_none_is_left_to_be_waited_for(imagenet: Path) -> None:
    with closing(ImageReader(2, CPU)) as reader:
        images = DiskImages(files_of(imagenet), reader, augment=False)
        list(images.in_order(1))
        victim, other = multiprocessing.active_children()
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()
        with pytest.raises(ChildProcessError, match="a process that reads images ended"):  # between two passes, too
            list(images.in_order(1))
        other.join(10)  # as multiprocessing does at exit, without an end
        assert not other.is_alive()


def test_batches_that_do_not_fit_into_shared_memory_are_an_error(
    imagenet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_images, "_Files", _NoRoom)
    with closing(ImageReader(1, CPU)) as reader:
        batches = DiskImages(files_of(imagenet), reader, augment=False).in_order(1)
        with pytest.raises(ChildProcessError, match=r"unable to allocate shared memory.*/dev/shm ran out"):
            list(batches)


class _NoRoom(disk_images._Files):
    def __getitems__(self, batch: Any) -> Any:
        def full(tensor: Tensor) -> Tensor:
            raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device")

        Tensor.share_memory_ = full  # type: ignore[method-assign]  # in the worker alone
        return super().__getitems__(batch)


# --- training


class Tiny(nn.Module):
    def __init__(self, on_forward: Callable[[], None]) -> None:
        super().__init__()
        self.conv, self.norm, self.readout = nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.Linear(4 * 16, 3)
        self.on_forward = on_forward

    def forward(self, x: Tensor, T: int = 1) -> Tensor:
        self.on_forward()
        logits: Tensor = self.readout(torch.relu(self.norm(self.conv(x))).flatten(1))
        return logits.expand(T, -1, -1)


def trained(
    folder: Path, out: Path, on_forward: Callable[[], None] = lambda: None, *, workers: int = 0, **options: Any
) -> tuple[TrainResult, Classifier]:
    torch.manual_seed(0)
    data = files_of(folder)
    config = NetworkConfig("tests:tiny", 3, 3, (16, 16))
    classifier = Classifier(
        Tiny(on_forward), config=config, mean=data.mean, std=data.std, class_names=data.class_names, data=data.name
    )
    parts = split_validation(data, fraction=0.25)
    settings = TrainConfig(T=1, epochs=3, batch_size=8, augment="resized-crop", ema=0.9, device="cpu")
    return train(classifier, *parts, settings, out, workers=workers, progress=False, **options), classifier


def test_a_resumed_run_ends_as_an_uninterrupted_one(imagenet: Path, tmp_path: Path) -> None:
    _, whole = trained(imagenet, tmp_path / "whole", workers=0)
    passes = iter(range(99))

    def interrupt() -> None:
        if next(passes) == 10:
            signal.raise_signal(signal.SIGINT)

    result, _ = trained(imagenet, tmp_path / "parts", interrupt, workers=2)
    assert result.interrupted and result.epochs == 1
    assert not multiprocessing.active_children()
    result, resumed = trained(imagenet, tmp_path / "parts", workers=1, resume=True)
    assert not result.interrupted
    wanted = whole.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in resumed.state_dict().items())
    rows = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    for row, other in zip(*rows, strict=True):
        first, second = json.loads(row), json.loads(other)
        assert [first[key] == second[key] for key in first if key not in ("seconds", "images_per_s")].count(False) == 0


@pytest.fixture(scope="module")
def trained_folder(imagenet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/r and its model-T2.onnx, trained on imagenet@16."""
    folder = tmp_path_factory.mktemp("trained")
    small = ("--width", "0.25", "--T", "2", "--epochs", "1", "--batch-size", "9", "--warmup-epochs", "0")
    crops = ("--augment", "resized-crop", "--workers", "0", "--val-fraction", "0.25")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TETDEPLOY_DATA", str(imagenet))
        for command in (
            ("train", "--data", "imagenet@16", *crops, *small, "--out", "runs/r"),
            ("export", "runs/r", "--check", "20"),
        ):
            printed(*command)
    return folder


def test_sweep_validate_and_landscape(imagenet: Path, trained_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained_folder)
    monkeypatch.setenv("TETDEPLOY_DATA", str(imagenet))
    commands: tuple[tuple[str, ...], ...] = (
        ("sweep", "runs/r/model-T2.onnx", "--json", "sweep.json", "--batch-size", "5"),
        ("sweep", "runs/r/model-T2.onnx", "--json", "few.json", "--limit", "7", "--T", "1"),
        ("validate", "runs/r/model-T2.onnx", "--data", "imagenet@16", "--json", "validate.json"),
        ("landscape", "runs/r", "--points", "3", "--limit", "4", "--split", "train"),
    )
    for command in commands:
        printed(*command)
    sweep, few = (json.loads(Path(name).read_text()) for name in ("sweep.json", "few.json"))
    assert (sweep["num_samples"], few["num_samples"], sweep["data"]) == (12, 7, "imagenet@16")
    test = files_of(imagenet, "test")
    assert sweep["rows"][-1]["accuracy"] == pytest.approx(accuracy(Path("runs/r"), test.x[:], test.labels))


@pytest.mark.parametrize("options", [(), ("--resize",)])
def test_predict_reads_files_as_the_set_does(
    copied: Path, trained_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    """Of any size, the model's own among them, grey, with alpha, and to be turned, as EXIF says."""
    data = files_of(copied, "test")
    paths = [data.path(i) for i in range(len(data))]
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    photo = Image.open(paths[0])
    photo.resize((16, 16)).save(paths[0])
    photo.convert("L").save(paths[1])
    photo.convert("RGBA").save(paths[2], "PNG")
    photo.save(paths[3], exif=turned)
    model, written = str(trained_folder / "runs/r/model-T2.onnx"), tmp_path / "p.json"
    taken, whole_run = [], tetdeploy.Engine.run
    monkeypatch.setattr(tetdeploy.Engine, "run", lambda self, x, T=None: taken.append(x) or whole_run(self, x, T))
    printed("predict", model, *paths, *options, "--json", written)
    np.testing.assert_array_equal(taken[0], data.x[:])
    got = [image["certainty"] for image in json.loads(written.read_text())["images"]]
    per_step = whole_run(tetdeploy.Engine(model), data.x[:]).per_step
    np.testing.assert_array_equal(got, softmax(np.cumsum(per_step, axis=1) / np.array([[1], [2]])))


def test_predict_names_what_it_cannot_crop(trained_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    call = ("predict", trained_folder / "runs/r/model-T2.onnx", path)
    assert f"no image at {path}" in refused(*call)
    Image.new("1", (1, 10**6)).save(path)
    assert f"cannot read {path} (of 1 x 1000000 pixels it is too long and narrow to be cropped); give" in refused(*call)
    path.write_bytes(b"?")
    assert f"cannot read {path} (1 bytes that are no png" in refused(*call)


def test_a_model_that_does_not_normalise_gets_it_done_batch_by_batch(imagenet: Path) -> None:
    data = files_of(imagenet)
    known: Any = {"source": {"data": {"mean": data.mean, "std": data.std}}}
    engine: Any = SimpleNamespace(input_dtype=np.dtype(np.float32), metadata=known, path=Path("m.onnx"))
    x = as_model_input(engine, data.x)
    assert len(x) == 36
    np.testing.assert_array_equal(x[2:5], as_model_input(engine, data.x[2:5]))
    assert x[3].dtype == np.float32 and x[3].mean() < 2


def accuracy(run_folder: Path, x: NDArray[np.uint8], labels: NDArray[np.int64]) -> float:
    classifier = tetdeploy.load(run_folder).eval()
    with torch.inference_mode():
        answers = classifier(torch.from_numpy(x), 2).mean(0).argmax(-1)
    return float((answers.numpy() == labels).mean())


def test_augmentations_that_do_not_go_with_the_data(imagenet: Path) -> None:
    call = ("train", "--data-dir", imagenet, "--runs", imagenet / "runs")
    named = "is cropped as it is read from disk: choose augment none or resized-crop and cutout 0, got"
    assert f"imagenet@16 {named} augment crop-flip" in refused(*call, "--data", "imagenet@16", "--augment", "crop-flip")
    assert f"{named} augment none and cutout 4" in refused(*call, "--data", "imagenet@16", "--cutout", "4")
    assert "for digits choose another augment" in refused(*call, "--augment", "resized-crop")
