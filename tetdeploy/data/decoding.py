"""Image files, on disk or inside zips, to one array."""

from __future__ import annotations

import io
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tetdeploy.storage.files import lfs_pointer
from tetdeploy.system.extras import import_extra
from tetdeploy.system.machine import usable_cores
from tetdeploy.wording import shorten

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_GREY_MODES = ("1", "L", "LA")
_COLOUR_MODES = ("RGB", "RGBA", "CMYK", "YCbCr")
_PNG_DEPTH = 24  # where a PNG has its bits a channel: its first chunk is the header
_CHUNK = 128  # images a task: few enough that the bar moves, many enough that a task's own cost does not count


@dataclass(frozen=True)
class ImageFile:
    """One encoded image: the name errors use, and a function that returns its bytes."""

    name: str
    read: Callable[[], bytes]


def decode_images(files: Sequence[ImageFile], *, text: str) -> NDArray[np.uint8]:
    """Decode png, jpeg, webp and bmp files of one size, in threads.

    Args:
        files: one or more encoded images.
        text: what the progress bar says; it shows on stderr, if that is a terminal, after a second.

    Returns:
        uint8 [N, C, H, W]: C is 1 when every image is greyscale, else 3 (alpha is dropped).

    Raises:
        ValueError: some files cannot be read or sizes differ; says how many, and names them.
        MissingExtraError: Pillow is not installed.
    """
    import_extra("PIL.Image", "cpu")
    sizes: list[tuple[int, ...]] = [()] * len(files)
    height, width = _first_size(files)
    colour = np.zeros(len(files), bool)
    images: NDArray[np.uint8] | None = None
    try:
        images = np.zeros((len(files), 3, height, width), np.uint8)
    except MemoryError as error:  # the first image may be a large one among small ones: then their sizes are the reason
        lacking = error

    def decode(index: int) -> str | None:
        try:
            image = open_image(files[index].read())
            sizes[index] = image.size[::-1]
            if images is None or (height and sizes[index] != (height, width)):
                return None  # its pixels will not be wanted
            pixels = _pixels(image)
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and more for damaged files
            return f"{files[index].name} ({error})"
        colour[index] = pixels.ndim == 3
        images[index] = pixels.transpose(2, 0, 1) if colour[index] else pixels
        return None

    refuse_failed(in_threads(decode, len(files), text), f"{len(files)} images cannot be read")
    _refuse_unequal(files, sizes)
    if images is None:
        raise lacking
    return images if colour.any() else np.ascontiguousarray(images[:, :1])


def _first_size(files: Iterable[ImageFile]) -> tuple[int, int]:
    """Height and width of the first file that can be read; 0 x 0 when none can, for the error to come later."""
    for file in files:
        try:
            height, width = _pixels(open_image(file.read())).shape[:2]
        except Exception:  # reported with all the others
            continue
        return height, width
    return 0, 0


def _pixels(image: Any) -> NDArray[np.uint8]:
    """`[H, W]` of a grey image, else `[H, W, 3]`."""
    mode = "L" if image.mode in _GREY_MODES else "RGB"
    return np.asarray(image if image.mode == mode else image.convert(mode))


def open_image(data: bytes) -> Any:
    """The Pillow image of a file's bytes, of 8 bits a channel, in grey or colours.

    Raises:
        ValueError: it is none; a damaged one raises what Pillow's decoders do, some only where the pixels are used.
    """
    pillow: Any = import_extra("PIL.Image", "cpu")
    try:
        image = pillow.open(io.BytesIO(data), formats=_FORMATS)  # naming the formats is 5 times faster, too
    except pillow.UnidentifiedImageError:
        fault = lfs_pointer(data, "image") or f"{len(data)} bytes that are no png, jpeg, webp or bmp"
        raise ValueError(fault) from None
    deep = image.format == "PNG" and data[_PNG_DEPTH] == 16  # of colours Pillow keeps the upper 8 and calls them RGB
    if image.mode == "P":
        image = image.convert("RGBA")  # straight to RGB, Pillow warns of palettes with transparency
    if deep or image.mode not in (*_GREY_MODES, *_COLOUR_MODES):  # convert() would clip 16 bits of grey
        pixels = f"{image.mode.partition(';')[0]};16" if deep else image.mode
        raise ValueError(f"pixel format {pixels} is not 8 bits a channel")
    return image


def in_threads(decode: Callable[[int], str | None], count: int, text: str | None, *, chunk: int = _CHUNK) -> list[str]:
    """Call `decode` with 0..count-1 in threads, `chunk` a task, with a progress bar that says `text`, if any.

    Returns:
        What `decode` says is wrong, in the order of its numbers.
    """
    ended = threading.Event()

    def decode_chunk(start: int) -> list[str | None]:
        return [decode(index) for index in range(start, min(start + chunk, count)) if not ended.is_set()]

    # 6 threads on 2 cores took 1.4 times as long as 2: for small images they fight for the interpreter lock
    errors, pool = list[str](), ThreadPoolExecutor(usable_cores())
    try:
        with _progress(text, count) as advance:
            for results in pool.map(decode_chunk, range(0, count, chunk)):
                advance(len(results))
                errors += filter(None, results)
    finally:  # Ctrl-C need not wait for the rest, nor for that of a task: photos and recordings take 0.1 s each
        ended.set()
        pool.shutdown(cancel_futures=True)
    return errors


@contextmanager
def _progress(text: str | None, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the number of images done; a bar appears when it takes more than a second."""
    from rich.progress import Progress, TextColumn

    from tetdeploy.system.standard_output import VisibleConsole

    console = VisibleConsole(stderr=True)
    name = TextColumn("{task.description}", markup=False)
    columns = (name, *Progress.get_default_columns()[1:])
    progress = Progress(*columns, console=console, disable=text is None or not console.is_terminal, transient=True)
    task = progress.add_task(text or "", total=total)
    begin = time.monotonic()

    def advance(count: int) -> None:
        progress.advance(task, count)
        if time.monotonic() - begin > 1:
            progress.start()

    try:
        yield advance
    finally:
        progress.stop()


def refuse_failed(errors: Sequence[str], what: str) -> None:
    """Raise ValueError, with their number and the first ones, if there are errors, each of which names its file.

    Args:
        what: failed, such as "12 images cannot be read".
    """
    if errors:
        raise ValueError(f"{len(errors)} of {what}: {shorten(errors)}; repair or remove them")


def _refuse_unequal(files: Sequence[ImageFile], sizes: Sequence[tuple[int, ...]]) -> None:
    counts = Counter(sizes).most_common()
    if len(counts) > 1:
        most = counts[0][0]
        groups = ", ".join(f"{count} of {width}x{height}" for (height, width), count in counts[:5])
        odd = [file.name for file, size in zip(files, sizes, strict=True) if size != most]
        raise ValueError(
            f"images have {len(counts)} sizes (width x height): {groups}; wanted one. "
            f"Resize or remove these {len(odd)}: {shorten(odd)}"
        )
