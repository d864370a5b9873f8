"""What image sets and frame sets have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from .events import Framing
from .fingerprint import images_sha256

Split = Literal["train", "test"]
Encoding = Literal["direct", "frames"]
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)


class LabelledSet:
    """A set of labelled inputs; the base of `ImageSet`, `ImageFiles` and `FrameSet`, which are frozen dataclasses.

    Attributes:
        encoding: "direct" for images, shown at every step; "frames" for an input of its own at each step.
        x: the images uint8 [N, C, H, W], or the frames uint8 [N, T, C, H, W]; of `ImageFiles` decoded where sliced.
        image_shape: (C, H, W).
        framing: of recordings, how they became frames.
    """

    encoding: ClassVar[Encoding]
    _array: ClassVar[str]  # the field that x reads
    _items: ClassVar[str]  # what errors call its entries

    name: str
    split: Split
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    framing: Framing | None = None

    @property
    def x(self) -> NDArray[np.uint8]:
        array: NDArray[np.uint8] = getattr(self, self._array)
        return array

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.x.shape[-3:]
        return channels, height, width

    @property
    def fingerprint(self) -> str:
        """Tells these entries, with their labels and in this order, from any others; see `images_sha256`."""
        return images_sha256(self.x, self.labels)

    def __len__(self) -> int:
        return len(self.x)

    def select(self, indices: Sequence[int] | slice | NDArray[Any]) -> Self:
        """The entries at `indices` (integers, a slice or a mask [N]), in that order.

        Raises:
            ValueError: nothing is selected, or an index lies outside the set.
        """
        try:
            chosen = np.arange(len(self))[indices]
        except IndexError as error:
            raise ValueError(
                f"{self.name} {self.split}: cannot select from {len(self)} {self._items}: {error}"
            ) from None
        fields: dict[str, Any] = {self._array: getattr(self, self._array)[chosen], "labels": self.labels[chosen]}
        return replace(self, **fields)  # type: ignore[type-var]  # each subclass is a dataclass

    def _check(self, layout: str) -> None:
        """Refuse parts that do not fit each other; `layout` is the shape of x, such as "[N, C, H, W]"."""
        if self.split not in ("train", "test"):
            raise ValueError(f"{self.name}: split is {self.split!r}; choose 'train' or 'test'")
        self._straighten(self._array)
        self._straighten("labels")
        object.__setattr__(self, "class_names", tuple(map(str, self.class_names)))
        self._check_array(layout)
        self._check_labels()
        self._check_statistics()

    def _straighten(self, name: str) -> None:
        """Lay an array out anew that runs backwards in memory, as flipped ones do: PyTorch takes none."""
        array = getattr(self, name)
        if isinstance(array, np.ndarray) and min(array.strides, default=0) < 0:
            object.__setattr__(self, name, np.ascontiguousarray(array))

    def _check_array(self, layout: str) -> None:
        x, ndim = self.x, layout.count(",") + 1
        if not isinstance(x, np.ndarray) or x.dtype != np.uint8 or x.ndim != ndim:
            raise ValueError(f"{self.name}: {self._array} are {_kind(x)}; wanted uint8 {layout}")
        if 0 in x.shape:
            raise ValueError(
                f"{self.name}: {self._array} have the shape {list(x.shape)}, which holds no pixel; "
                f"give one of the {self._items} or more"
            )

    def _check_labels(self) -> None:
        name, labels, class_names = self.name, self.labels, self.class_names
        if not isinstance(labels, np.ndarray) or labels.dtype != np.int64 or labels.ndim != 1:
            raise ValueError(f"{name}: labels are {_kind(labels)}; wanted int64 [N]")
        if len(labels) != len(self.x):
            raise ValueError(f"{name}: {len(self.x)} {self._items} but {len(labels)} labels; each needs one")
        repeated = sorted(c for c, count in Counter(class_names).items() if count > 1)
        if repeated:
            raise ValueError(f"{name}: class_names has {', '.join(repeated)} more than once; names must differ")
        if labels.min() < 0 or labels.max() >= len(class_names):
            raise ValueError(
                f"{name}: labels run from {labels.min()} to {labels.max()}, outside 0..{len(class_names) - 1} "
                f"for {len(class_names)} classes; number the labels from 0 or give more class_names"
            )

    def _check_statistics(self) -> None:
        mean, std, channels = self.mean, self.std, self.image_shape[0]
        if len(mean) != channels or len(std) != channels:
            raise ValueError(
                f"{self.name}: {len(mean)} means and {len(std)} stds for {channels} channels; wanted one a channel"
            )
        if not np.isfinite(mean).all() or not np.isfinite(std).all() or min(std) <= 0:
            raise ValueError(f"{self.name}: mean {mean} and std {std} must be finite, and std greater than 0")


def _kind(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
