"""Can the loader feed the training? Images a second of the loader alone, of the training step alone, and of both.

    \b
    python examples/benchmarks/loader.py [--workers 0,2] [--json loader.json]
    python examples/benchmarks/loader.py --data-dir ~/data --device cuda --workers 4,8,16 --batch-size 256 --width 1

Two kinds of sets: one of CIFAR's size that lives on the device and is cropped and flipped there in batches (random
pixels: the time does not depend on them), and image files that worker processes decode to random crops of 224 x 224.
The files are ImageNet's where DATA_DIR/imagenet exists, else JPEGs of 500 x 375 pixels made for this in a temporary
folder; those come from the system's file cache, a disk may be slower. On a CPU the workers take their cores from the
training.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from tetdeploy.cli.errors import CleanErrors
from tetdeploy.cli.options import ABOVE_0, AT_LEAST_1, Numbers, json_option
from tetdeploy.data import ImageFiles, ImageSet, LabelledSet, load_data
from tetdeploy.networks import Classifier, NetworkConfig, build_network
from tetdeploy.storage.files import write_json
from tetdeploy.system.memory import reused_memory
from tetdeploy.train import TrainConfig
from tetdeploy.train.device import (
    autocast,
    device_name,
    pick_device,
    pick_precision,
    place,
    tuned_convolutions,
    wants_channels_last,
)
from tetdeploy.train.device_images import Batch, DeviceImages, Draws, Images
from tetdeploy.train.disk_images import DiskImages, ImageReader, rank_cores
from tetdeploy.train.losses import total_loss
from tetdeploy.train.optimizer import build_optimizer

T = 4


@dataclass(frozen=True)
class Row:
    """One loader before one network; workers is None without any."""

    data: str
    network: str
    workers: int | None
    loader_images_per_s: float
    step_images_per_s: float
    both_images_per_s: float


class Step:
    """A training step of a network on a device."""

    def __init__(self, model: str, width: float, data: LabelledSet, device: torch.device) -> None:
        torch.manual_seed(0)
        num_classes = len(data.class_names)
        config = NetworkConfig(model, num_classes, data.image_shape[0], data.image_shape[1:], width=width)
        names, mean, std = data.class_names, data.mean, data.std
        self.name = f"{model} x{width:g}"
        self.classifier = Classifier(build_network(config), config=config, mean=mean, std=std, class_names=names)
        self.device, self.precision = device, pick_precision("auto", device)
        last = wants_channels_last(config, device, self.precision, fusable=True)
        place(self.classifier, device, channels_last=last)
        self.classifier.train()
        self.optimizer = build_optimizer(self.classifier.network, TrainConfig(lr=1e-3), scaled=False)

    def __call__(self, batch: Batch) -> None:
        x, labels = batch
        with autocast(self.device, self.precision):
            logits = self.classifier(x, T)
        self.optimizer.zero_grad(set_to_none=True)
        total_loss(logits, labels, lam=0.001, phi=1.0).backward()
        self.optimizer.step()


def images_per_s(batches: Iterator[Batch], device: torch.device, work: Callable[[Batch], None] | None = None) -> float:
    """The rate of all batches but the first two, which start workers and warm up."""
    count, start = -2, 0.0
    for batch in batches:
        if work is not None:
            work(batch)
        count += 1
        if count == 0:
            finish(device)
            start = time.perf_counter()
    finish(device)
    return count * len(batch[0]) / (time.perf_counter() - start)


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measured(
    images: Images, step: Step, steps: int, batch_size: int, *, workers: int = 0
) -> tuple[float, float, float]:
    """Images a second of the loader, the step, and both."""

    def batches(count: int) -> Iterator[Batch]:
        # beyond the set's end it begins again: a small set of files will do
        indices = (torch.arange(count * batch_size) % len(images)).view(-1, batch_size)
        return images.drawn(Draws(indices, tuple(range(count)), slice(0, batch_size)))

    one = next(batches(1))
    loader = images_per_s(batches(2 + steps + 16 * workers), step.device)  # each worker is two batches ahead at first
    alone = images_per_s(repeat(one, 2 + steps), step.device, step)
    return loader, alone, images_per_s(batches(2 + steps), step.device, step)


def cifar_sized(count: int) -> ImageSet:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (count, 3, 32, 32), np.uint8), np.arange(count) % 10
    names = tuple(map(str, range(10)))
    return ImageSet("CIFAR-sized", "train", images, labels, names, (0.5,) * 3, (0.25,) * 3)


def write_jpegs(folder: Path, count: int) -> None:
    """Blurred noise of 500 x 375 pixels: about 100 kB a file, as ImageNet's are on average."""
    rng = np.random.default_rng(0)
    for part, number in (("train", count), ("val", 1)):
        for k in range(2):
            (folder / part / f"n{k}").mkdir(parents=True)
            for i in range(number // 2 + 1):
                coarse = Image.fromarray(rng.integers(0, 256, (75, 100, 3), np.uint8)).resize((500, 375))
                pixels = np.asarray(coarse) * 0.8 + rng.integers(0, 52, (375, 500, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / part / f"n{k}" / f"{i}.JPEG", quality=92)


def files_in(data_dir: Path | None, made: Path) -> ImageFiles:
    if data_dir is not None and (data_dir / "imagenet").is_dir():
        name = "imagenet"
    else:
        write_jpegs(made, 128)
        name = f"imagenet:{made}"
    data = load_data(name, "train", data_dir=data_dir or made)
    assert isinstance(data, ImageFiles)
    return data


def device_row(device: torch.device, steps: int) -> Row:
    data = cifar_sized(10_000)
    step = Step("convsnn", 1.0, data, device)
    images = DeviceImages(data, step.classifier, TrainConfig(augment="crop-flip"))
    return Row("32x32, on the device", step.name, None, *measured(images, step, steps, 64))


def files_row(data: ImageFiles, step: Step, workers: int, steps: int, batch_size: int) -> Row:
    with closing(ImageReader(workers, step.device)) as reader:
        images = DiskImages(data, reader, augment=True)
        name = "ImageNet" if data.name == "imagenet" else "JPEGs of 500x375"
        return Row(f"{name}, 224x224", step.name, workers, *measured(images, step, steps, batch_size, workers=workers))


@click.command(cls=CleanErrors, help=__doc__)
@click.option(
    "--workers", default=f"0,{rank_cores()}", type=Numbers(0), show_default=True, help="Numbers of processes to try."
)
@click.option("--model", default="spiking-resnet34", show_default=True, help="The network behind the image files.")
@click.option("--width", default=0.125, type=ABOVE_0, show_default=True, help="Its factor on every channel count.")
@click.option("--batch-size", default=8, type=AT_LEAST_1, show_default=True, help="Its images a step.")
@click.option("--steps", default=6, type=AT_LEAST_1, show_default=True, help="Steps to time.")
@click.option("--threads", default=torch.get_num_threads(), type=AT_LEAST_1, show_default=True)
@click.option("--device", "device_option", default="auto", show_default=True)
@click.option(
    "--data-dir", type=click.Path(path_type=Path), envvar="TETDEPLOY_DATA", help="Where imagenet lies, if any."
)
@json_option
def main(
    workers: tuple[int, ...],
    model: str,
    width: float,
    batch_size: int,
    steps: int,
    threads: int,
    device_option: str,
    data_dir: Path | None,
    json_path: Path | None,
) -> None:
    torch.set_num_threads(threads)
    device = pick_device(device_option)
    with tempfile.TemporaryDirectory() as made, tuned_convolutions(), reused_memory():  # as a run has them
        rows = [device_row(device, steps)]
        data = files_in(data_dir, Path(made))
        step = Step(model, width, data, device)
        rows += [files_row(data, step, number, steps, batch_size) for number in workers]
    where = f"{device_name(device)}, {threads} threads"
    table = Table(title=f"images a second, T={T}, {where}")
    for column in ("data", "network", "workers", "loader alone", "step alone", "both", "loader / step"):
        table.add_column(column, justify="left" if column in ("data", "network") else "right")
    for row in rows:
        loader, step_rate, both = row.loader_images_per_s, row.step_images_per_s, row.both_images_per_s
        rates = [f"{rate:,.0f}" if rate > 100 else f"{rate:.1f}" for rate in (loader, step_rate, both)]
        number = "–" if row.workers is None else str(row.workers)
        table.add_row(row.data, row.network, number, *rates, f"{loader / step_rate:,.1f}x")
    Console(width=130).print(table)
    if json_path is not None:
        write_json(json_path, {"device": where, "T": T, "steps": steps, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
