"""Sets of image files that are too many for memory: listed at once, decoded when they are wanted."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from tetdeploy.system.extras import import_extra

from .decoding import in_threads, open_image, refuse_failed
from .labelled import Encoding, LabelledSet, Split

_WORTH_A_BAR = 256  # images read in one go
_MOST_PIXELS = 2**26  # of an image that is scaled before it is cropped
_CHUNK = 8  # images a thread takes at a time; each is tens of milliseconds


@dataclass(frozen=True, eq=False)
class ImageFiles(LabelledSet):
    """Labelled images on disk, of any size; read as RGB, scaled and cropped to `size` x `size` pixels.

    `x` takes the place of the array [N, 3, size, size]: what is sliced from it is decoded at that moment, see
    `FileImages`. Selecting and splitting read no image.

    Attributes:
        name: what `load_data` was given: "imagenet", "imagenet:PATH@64".
        split: "train" or "test".
        folder: the files' names are relative to it.
        files: [N], as the system encodes them, such as b"n01440764/n01440764_10026.JPEG".
        labels: int64 [N], 0..K-1.
        class_names: K distinct names; label k means class_names[k].
        mean: per channel, of images / 255, in the training split.
        std: per channel, of images / 255, in the training split; greater than 0.
        size: of the crops, in pixels.

    Raises:
        ValueError: the parts do not fit each other.
    """

    encoding: ClassVar[Encoding] = "direct"
    _array: ClassVar[str] = "files"
    _items: ClassVar[str] = "images"

    name: str
    split: Split
    folder: Path
    files: NDArray[np.bytes_]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int

    def __post_init__(self) -> None:
        self._check("[N]")

    @property
    def x(self) -> NDArray[np.uint8]:
        return cast("NDArray[np.uint8]", FileImages(self))  # an array to those who slice it

    def path(self, index: int) -> str:
        return os.path.join(self.folder, os.fsdecode(self.files[index]))  # noqa: PTH118  # a Path takes 5 times as long

    def _check_array(self, layout: str) -> None:
        if self.files.dtype.kind != "S" or self.files.ndim != 1 or not len(self.files):
            raise ValueError(
                f"{self.name}: files are {self.files.dtype} {list(self.files.shape)}; wanted bytes {layout}"
            )
        if self.size < 1:
            raise ValueError(f"{self.name}: size is {self.size} pixels; it must be at least 1")


class FileImages:
    """Images on disk as an array uint8 [N, 3, size, size] that is decoded where it is indexed.

    Whoever reads slice after slice finds the next one decoded already: threads work on it meanwhile.
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(
        self, data: ImageFiles, convert: Callable[[NDArray[Any]], NDArray[Any]] = lambda pixels: pixels
    ) -> None:
        self._data = data
        self._convert = convert
        self._end = -1  # of the slice before
        self._ahead: tuple[range, Future[NDArray[np.uint8]]] | None = None
        self._reader = ThreadPoolExecutor(1)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self._data.files), 3, self._data.size, self._data.size

    def __len__(self) -> int:
        return len(self._data.files)

    def converted(self, convert: Callable[[NDArray[Any]], NDArray[Any]]) -> FileImages:
        """The same images, each batch of pixels changed by `convert`."""
        return FileImages(self._data, convert)

    def listing(self) -> Iterator[bytes]:
        """Names of the files, in their order: what tells them from others without reading them."""
        for name in self._data.files:
            yield bytes(name) + b"\0"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self[:], dtype)

    def __getitem__(self, index: Any) -> NDArray[Any]:
        """What numpy's indexing by an integer, a slice, integers or a mask gives.

        Raises:
            ValueError: images cannot be read; says how many, and names them.
        """
        if isinstance(index, slice):
            return self._convert(self._slice(range(*index.indices(len(self)))))
        chosen = np.arange(len(self))[index]
        pixels = self._convert(self._read(np.atleast_1d(chosen)))
        return pixels if np.ndim(chosen) else pixels[0]

    def _slice(self, wanted: range) -> NDArray[np.uint8]:
        ahead = self._ahead
        pixels = ahead[1].result() if ahead is not None and ahead[0] == wanted else self._read(wanted)
        in_a_row = wanted.start == self._end and wanted.step == 1
        following = range(wanted.stop, min(wanted.stop + len(wanted), len(self)))
        self._ahead = (following, self._reader.submit(self._read, following)) if in_a_row and following else None
        self._end = wanted.stop
        return pixels

    def _read(self, indices: Sequence[int] | NDArray[np.intp]) -> NDArray[np.uint8]:
        import_extra("PIL.Image", "cpu")
        pixels = np.empty((len(indices), *self.shape[1:]), np.uint8)

        def read(position: int) -> str | None:
            path = self._data.path(int(indices[position]))
            try:
                pixels[position] = read_crop(path, self._data.size)
            except ValueError as error:
                return str(error)
            return None

        text = f"decoding {self._data.name}" if len(indices) >= _WORTH_A_BAR else None
        refuse_unreadable(in_threads(read, len(indices), text, chunk=_CHUNK))
        return pixels


def read_crop(path: str, size: int) -> NDArray[np.uint8]:
    """An image file as the evaluation takes it, see `read_image` and `centre_crop`: uint8 [3, size, size].

    Raises:
        ValueError: it cannot be read, or not be cropped; begins with the path.
    """
    image = read_image(path)
    try:
        return centre_crop(image, size)
    except ValueError as error:
        raise ValueError(f"{path} ({error})") from error


def read_image(path: str) -> Any:
    """An image file as a Pillow image in RGB, decoded.

    Raises:
        ValueError: it cannot be read; begins with the path.
    """
    try:
        with open(path, "rb") as file:  # noqa: PTH123  # paths are texts here: a million of them
            image = open_image(file.read()).convert("RGB")
        image.load()
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and more for damaged files
        known = error.strerror if isinstance(error, OSError) else None  # without the path, once more
        raise ValueError(f"{path} ({known or error})") from error
    return image


def centre_crop(image: Any, size: int) -> NDArray[np.uint8]:
    """The evaluation crop: the shorter side scaled to size x 256 / 224, of that the centre.

    As torchvision's Resize(256) and CenterCrop(224), which need torch, do it for 224.

    Args:
        image: a Pillow image in RGB.
        size: of the crop, in pixels.

    Returns:
        uint8 [3, size, size].

    Raises:
        ValueError: the image is so long and narrow that the other side would get beyond all measure.
    """
    bilinear = import_extra("PIL.Image", "cpu").Resampling.BILINEAR
    shorter, short = min(image.size), round(size * 256 / 224)
    width, height = (short * side // shorter for side in image.size)
    if width * height > _MOST_PIXELS:
        raise ValueError(f"of {image.size[0]} x {image.size[1]} pixels it is too long and narrow to be cropped")
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.resize((width, height), bilinear).crop((left, top, left + size, top + size))
    return as_pixels(image)


def as_pixels(image: Any) -> NDArray[np.uint8]:
    """A Pillow image in RGB as uint8 [3, H, W]."""
    return np.asarray(image).transpose(2, 0, 1)


def refuse_unreadable(errors: Sequence[str]) -> None:
    """Raise ValueError, with their number and the first ones, if there are errors of `read_crop`."""
    refuse_failed(errors, "the images read at once cannot be read")
