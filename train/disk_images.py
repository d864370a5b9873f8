"""Batches of image files: worker processes decode, crop and flip, the device gets uint8."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import get_all_start_methods, get_context, parent_process
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from tetdeploy.data.image_files import as_pixels, read_crop, read_image, refuse_unreadable
from tetdeploy.system.extras import import_extra
from tetdeploy.system.machine import usable_cores

from .schedule import derive_seed

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

    from tetdeploy.data import ImageFiles

    from .device_images import Batch, Draws


# What PyTorch's loader says when a process or thread of its own is gone.
_LOST = ("DataLoader worker", "Pin memory thread")


class Wanted(NamedTuple):
    """An image to read, and what it is to become."""

    path: str
    label: int
    size: int  # of the crop, in pixels
    image: int  # its index in the set
    batch_seed: int | None  # decides, with `image`, a random crop and flip; None for the crop of the evaluation


class ImageReader:
    """Reads batches of image files in worker processes, started at the first batch, ahead of those who take them.

    What is to be read comes with the request, so that the workers hold no list of files, and one set of them serves
    training and validation in turn.

    Args:
        workers: processes; 0 reads in this one. None takes as many as this rank has cores, see `rank_cores`.
        device: where the batches go.
    """

    def __init__(self, workers: int | None, device: torch.device) -> None:
        self._workers = rank_cores() if workers is None else workers
        self._device = device
        self._requests = _Requests()
        self._loader: DataLoader[Batch | list[str]] | None = None

    def read(self, requests: Iterable[list[Wanted]]) -> Iterator[Batch]:
        """A batch for each request, on the device: uint8 [N, 3, size, size] and int64 [N]. One pass at a time.

        Raises:
            ValueError: images cannot be read; how many of a batch, and which.
            ChildProcessError: a worker ended.
        """
        if self._loader is None:
            self._loader = self._started()
        self._requests.batches = requests
        for batch in self._received(self._loader):
            if isinstance(batch, list):
                refuse_unreadable(batch)
            else:
                x, y = batch
                yield x.to(self._device, non_blocking=True), y.to(self._device, non_blocking=True)

    def close(self) -> None:
        """End the workers; the next `read` starts new ones."""
        self._loader = None

    def _started(self) -> DataLoader[Batch | list[str]]:
        processes = self._workers > 0
        return DataLoader(
            _Files(),
            batch_sampler=self._requests,
            num_workers=self._workers,
            collate_fn=_as_it_is,
            pin_memory=self._device.type == "cuda",
            worker_init_fn=_begin_worker,
            persistent_workers=processes,
            multiprocessing_context=_context() if processes else None,
            generator=torch.Generator(),  # its own: the run's random numbers are no affair of a loader
        )

    def _received(self, loader: DataLoader[Batch | list[str]]) -> Iterator[Batch | list[str]]:
        try:
            yield from loader
        except (RuntimeError, EOFError, OSError) as error:  # the latter two where a batch was on its way
            lines = str(error).strip().splitlines() or ["in the middle of a batch"]
            lost, full = lines[0].startswith(_LOST), "shared memory" in lines[-1]  # below the worker's traceback
            if self._workers == 0 or (isinstance(error, RuntimeError) and not (lost or full)):
                raise
            reason = lines[0] if lost else lines[-1]
            self.close()
            # Each of the others lets one SIGTERM pass, and Python, as it ends, sends one and waits for them.
            for worker in getattr(loader._iterator, "_workers", ()):
                worker.kill()
            raise ChildProcessError(
                f"a process that reads images ended ({reason}); "
                "if memory or /dev/shm ran out, go on with --resume and fewer --workers"
            ) from error


class DiskImages:
    """A set that stays on disk, read by an `ImageReader`.

    Args:
        data: the files.
        reader: shared by the sets of a run.
        augment: whether training crops and flips at random, as ImageNet is trained: a crop of 8 to 100 % of the area
            and an aspect ratio of 3/4 to 4/3, scaled to the size. Otherwise as in the evaluation.

    Raises:
        MissingExtraError: torchvision or Pillow is not installed.
    """

    def __init__(self, data: ImageFiles, reader: ImageReader, *, augment: bool) -> None:
        import_extra("torchvision.transforms.v2" if augment else "PIL.Image", "train")  # here, not first in a worker
        self._data = data
        self._reader = reader
        self._augment = augment

    def __len__(self) -> int:
        return len(self._data)

    def drawn(self, draws: Draws) -> Iterator[Batch]:
        steps = zip(draws.chosen, draws.seeds, strict=True)
        return self._reader.read(
            [self._wanted(index, seed) for index in chosen[draws.share].tolist()] for chosen, seed in steps
        )

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        starts = range(0, len(self), batch_size)
        parts = (range(start, min(start + batch_size, len(self))) for start in starts)
        return self._reader.read([self._wanted(index, None) for index in part] for part in parts)

    def _wanted(self, index: int, batch_seed: int | None) -> Wanted:
        path, label = self._data.path(index), int(self._data.labels[index])
        return Wanted(path, label, self._data.size, index, batch_seed if self._augment else None)


def rank_cores() -> int:
    """The cores at hand, shared between the ranks that torchrun started on this machine."""
    return max(usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def random_crop_flip(image: Image, size: int, seed: int) -> NDArray[np.uint8]:
    """torchvision's RandomResizedCrop and RandomHorizontalFlip of a Pillow image in RGB: uint8 [3, size, size].

    Raises:
        MissingExtraError: torchvision is not installed.
    """
    transforms = import_extra("torchvision.transforms.v2", "train")
    augment = transforms.Compose([transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return as_pixels(augment(image))


class _Requests:
    """What a loader asks for its batches' contents; the next requests are put here before each pass."""

    batches: Iterable[list[Wanted]] = ()

    def __iter__(self) -> Iterator[list[Wanted]]:
        return iter(self.batches)


class _Files(Dataset["Batch | list[str]"]):
    """Answers requests: a batch, or what is wrong with its images. An error raised in a worker would lose its text."""

    def __getitems__(self, batch: Sequence[Wanted]) -> Batch | list[str]:
        pixels, errors = [], []
        for wanted in batch:
            try:
                pixels.append(_cropped(wanted))
            except ValueError as error:
                errors.append(str(error))
        if errors:
            return errors
        x, labels = torch.from_numpy(np.stack(pixels)), torch.tensor([wanted.label for wanted in batch])
        if get_worker_info() is None:
            return x, labels
        # Here, not in the thread of a queue: where /dev/shm is full, that loses a batch, and the run waits for ever.
        return x.share_memory_(), labels.share_memory_()


def _cropped(wanted: Wanted) -> NDArray[np.uint8]:
    if wanted.batch_seed is None:
        return read_crop(wanted.path, wanted.size)
    # the image's own: its place in the batch, and so its rank, play no part
    seed = derive_seed(wanted.batch_seed, "image", wanted.image)
    return random_crop_flip(read_image(wanted.path), wanted.size, seed)


def _as_it_is(batch: Batch | list[str]) -> Batch | list[str]:
    return batch


def _begin_worker(number: int) -> None:
    # A Ctrl-C, a terminal's SIGHUP or a cluster's SIGTERM goes to all; the run ends its workers when it has saved.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    warnings.filterwarnings("ignore", "(?i)corrupt exif", module="PIL")  # some of ImageNet's; nothing of it is used
    threading.Thread(target=_end_with_the_run, daemon=True).start()


def _end_with_the_run() -> None:
    """PyTorch's own watch looks at a worker's parent, which is the fork server and lives while a worker does."""
    run = parent_process()
    if run is not None:
        run.join()
        os._exit(1)


def _context() -> Any:
    """New processes, not copies of this one with its threads and its GPU: a copied lock stays locked for ever."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__, "torchvision.transforms.v2"])  # imported once, not by each worker
    return context
