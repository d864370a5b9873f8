"""Two-dimensional loss landscapes round trained weights (Figure 2), after Li et al., NeurIPS 2018.

For weights w and two random directions d1, d2, the losses are measured at w + alpha d1 + beta d2 on a grid of (alpha,
beta). The directions are filter-normalised, so that landscapes of different networks compare: every filter of a
direction (an output channel of a convolution, a row of a linear layer) has the norm of the network's own filter::

    d[k] = g[k] ||w[k]|| / ||g[k]||,   g ~ N(0, 1)

BN's parameters and all biases stay as they are (their direction is zero), and BN is in eval mode throughout, as in the
authors' program. One forward pass gives the logits of all T steps, and from them L_SDT (Eq. 7), L_TET (Eq. 9) and the
accuracy: both losses are measured in the same directions and at the same points.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from tetdeploy.arguments import check_choice, check_count, check_number, check_whole
from tetdeploy.checkpoint import data_settings
from tetdeploy.networks import Classifier
from tetdeploy.steps import MAX_T
from tetdeploy.storage.arrays import read_npz, write_npz
from tetdeploy.storage.form import as_json, parse_json
from tetdeploy.sweep import check_class_numbers

from .config import PRECISIONS
from .device import autocast, forward_batch, pick_device, pick_precision, tuned_convolutions
from .losses import sdt_loss, tet_loss
from .runs import differences
from .schedule import derive_seed
from .validation import count_correct

FORMAT = 1
MAX_POINTS = 1001  # along a direction: of a million points each is a pass over the images
_SURFACES = ("sdt_loss", "tet_loss", "accuracy")


@dataclass(frozen=True, kw_only=True)
class LandscapeConfig:
    """What is measured. Checks itself: a value out of range raises `ValueError`.

    Attributes:
        T: time steps of every forward pass.
        points: grid points along each direction; odd, so that the weights themselves are one of them; 3 to 1,001.
        extent: alpha and beta run from -extent to extent; at 1 the perturbation is as long as the weights.
        seed: of the two directions; checkpoints of one network share them up to the norms of their filters.
        batch_size: images at a time; None is 64 on a CPU and 512 on a GPU.
        device: "auto", "cpu", "cuda" or "cuda:1".
        precision: "fp32", "bf16" or "fp16" autocast, or "auto", see `TrainConfig.precision`.
    """

    T: int
    points: int = 21
    extent: float = 1.0
    seed: int = 0
    batch_size: int | None = None
    device: str = "auto"
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if check_count("T", self.T) > MAX_T:
            raise ValueError(f"T is {self.T}; it must be at most {MAX_T}")
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size)
        if check_whole("points", self.points) < 3 or self.points % 2 == 0:
            raise ValueError(f"points is {self.points}; it must be odd, for the centre to be one, and at least 3")
        if self.points > MAX_POINTS:
            raise ValueError(f"points is {self.points}; it must be at most {MAX_POINTS}")
        if not 0.0 < check_number("extent", self.extent) < math.inf:
            raise ValueError(f"extent is {self.extent}; it must be above 0 and finite")
        if check_whole("seed", self.seed) < 0:
            raise ValueError(f"seed is {self.seed}; it must be at least 0")
        check_choice("precision", self.precision, PRECISIONS)

    @property
    def axis(self) -> NDArray[np.float64]:
        """The grid's alphas, which are its betas as well; 0 is exactly 0."""
        half = self.points // 2
        return np.arange(-half, half + 1, dtype=np.float64) * np.float64(self.extent / half)


@dataclass(eq=False)
class Landscape:
    """The numbers of `landscape.npz`, filled point by point; NaN where nothing was measured yet.

    Attributes:
        names: of the R checkpoints.
        alphas, betas: [P], the coordinates along the two directions.
        sdt_loss, tet_loss, accuracy: [R, P, P], indexed by checkpoint, alpha, beta.
        finished: measured points, in this very order.
        settings: everything that decided the numbers; a measurement is taken up again under the same only.
    """

    names: tuple[str, ...]
    alphas: NDArray[np.float64]
    betas: NDArray[np.float64]
    sdt_loss: NDArray[np.float64]
    tet_loss: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    finished: int
    settings: Mapping[str, Any]

    @property
    def total(self) -> int:
        """How many points there are to measure."""
        return self.sdt_loss.size

    def record(self, where: tuple[int, int, int], values: Sequence[float]) -> None:
        """Note the values of the next point, (checkpoint, alpha, beta), in the order of the attributes."""
        for name, value in zip(_SURFACES, values, strict=True):
            getattr(self, name)[where] = value
        self.finished += 1

    @property
    def complete(self) -> bool:
        """Whether every point is measured."""
        return self.finished == self.total

    def centre(self, name: str) -> NDArray[np.float64]:
        """[R], the values of "sdt_loss", "tet_loss" or "accuracy" at the checkpoints themselves."""
        middle = len(self.alphas) // 2
        values: NDArray[np.float64] = getattr(self, name)[:, middle, middle]
        return values

    def increases(self, name: str, radius: float) -> NDArray[np.float64]:
        """[R, M], by how much a loss is higher than at the centre, at the M other points at most `radius` away.

        Its mean is the sharpness that `tetdeploy landscape` reports, its maximum the worst case.

        Raises:
            ValueError: no point lies that near.
        """
        distance = np.hypot(self.alphas[:, None], self.betas[None, :])
        near = (distance <= radius * (1 + 1e-9)) & (distance > 0)
        if not near.any():
            step = self.alphas[1] - self.alphas[0]
            raise ValueError(f"radius is {radius:g}, but the grid's nearest points are {step:g} away; take more points")
        around: NDArray[np.float64] = getattr(self, name)[:, near] - self.centre(name)[:, None]
        return around


def measure_landscape(
    classifiers: Mapping[str, Classifier],
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    config: LandscapeConfig,
    path: Path | str,
    *,
    begun: Callable[[int, int], None] = lambda finished, total: None,
    point_done: Callable[[], None] = lambda: None,
    stop: Callable[[], bool] = lambda: False,
) -> Landscape:
    """Measure both losses and the accuracy round one or more checkpoints; goes on with what `path` holds already.

    After every row of the grid, and when stopped behind a point, the file is replaced by a fuller one. Points are
    independent of each other: a measurement that was interrupted ends with the same numbers.

    Args:
        classifiers: by name; each is moved to the device and put in eval mode, its weights stay as they are.
        images: uint8 [N, C, H, W], or frames uint8 [N, T or more, C, H, W], of which the first T are taken.
        labels: int64 [N].
        config: how to measure.
        path: the `.npz` to write.
        begun: told, once, how many points are measured already, and how many there are.
        point_done: called after each point.
        stop: asked before each batch; True ends the measurement.

    Returns:
        What was measured: all of it, unless stopped.

    Raises:
        ValueError: there are no classifiers, `path` holds a measurement with other settings (the differences are
            named) or something else, images and labels do not fit the classifiers, or the device is not there.
        OSError: the file cannot be written.
    """
    if not classifiers:
        raise ValueError("there are no classifiers to measure; give one or more, by name")
    for name, classifier in classifiers.items():
        _check(name, classifier, images, labels, config)
    device = pick_device(config.device)
    precision = pick_precision(config.precision, device)
    settings = _settings(classifiers, images, labels, config, device, precision)
    landscape = _begin(Path(path), tuple(classifiers), settings, config.axis)
    begun(landscape.finished, landscape.total)
    batches = _batches(images, labels, config, device)
    for run, classifier in enumerate(classifiers.values()):
        classifier.to(device).eval()
        with torch.inference_mode(), tuned_convolutions(), autocast(device, precision):
            for _ in _measure_run(landscape, run, classifier, batches, config, stop):
                point_done()
                if landscape.finished % config.points == 0:
                    save_landscape(path, landscape)
    if landscape.finished:  # other names, or points after the last row
        save_landscape(path, landscape)
    return landscape


def filter_normalised(module: nn.Module, *, seed: int) -> dict[str, Tensor]:
    """A random direction in the space of a module's weights, each filter as long as the module's own.

    Args:
        module: parameters of two dimensions and more are weights, their axis 0 counts the filters.
        seed: drawn on the CPU, so that a GPU gets the same direction.

    Returns:
        The direction by parameter name, for weights only: BN's parameters and biases have none.
    """
    generator = torch.Generator().manual_seed(seed)
    direction = {}
    for name, weight in module.named_parameters():
        if weight.dim() > 1:
            drawn = torch.randn(weight.shape, generator=generator).to(weight)
            norms = [torch.linalg.vector_norm(x.detach().flatten(1), dim=1) for x in (weight, drawn)]
            ratio = norms[0] / (norms[1] + 1e-10)
            direction[name] = drawn * ratio.view(-1, *[1] * (weight.dim() - 1))
    return direction


def load_landscape(path: Path | str) -> Landscape:
    """Read a `landscape.npz`, complete or not.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is something else, or damaged.
    """
    path = Path(path)
    try:
        file = read_npz(path)
        arrays = {name: file[name] for name in ("alphas", "betas", *_SURFACES)}
        settings = parse_json(str(file["settings"]))
        names, finished = tuple(str(name) for name in file["names"]), int(file["finished"])
        grid = (len(names), len(arrays["alphas"]), len(arrays["betas"]))
        if any(arrays[name].shape != grid for name in _SURFACES) or not 0 <= finished <= math.prod(grid):
            raise ValueError("its values are not those of its grid")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a landscape, or damaged ({error}); choose another file, or remove it"
        ) from error
    return Landscape(names=names, **arrays, finished=finished, settings=settings)


def save_landscape(path: Path | str, landscape: Landscape) -> None:
    """Write the `.npz`, atomically: an error leaves an earlier file as it was.

    Raises:
        OSError: the file cannot be written.
    """
    arrays: dict[str, Any] = {name: getattr(landscape, name) for name in ("alphas", "betas", "names", *_SURFACES)}
    arrays |= {"settings": json.dumps(landscape.settings), "finished": landscape.finished}
    write_npz(path, arrays)


def _measure_run(
    landscape: Landscape,
    run: int,
    classifier: Classifier,
    batches: Sequence[tuple[Tensor, Tensor]],
    config: LandscapeConfig,
    stop: Callable[[], bool],
) -> Iterator[None]:
    """Measure one checkpoint's points that are still missing, and yield after each."""
    P = config.points
    weights = {name: weight for name, weight in classifier.named_parameters() if weight.dim() > 1}
    d1, d2 = (filter_normalised(classifier, seed=derive_seed(config.seed, "direction", k)) for k in (1, 2))
    while run * P**2 <= landscape.finished < (run + 1) * P**2:
        i, j = divmod(landscape.finished - run * P**2, P)
        alpha, beta = float(landscape.alphas[i]), float(landscape.betas[j])
        here = {name: weights[name] + alpha * d1[name] + beta * d2[name] for name in weights}
        values = _measure_point(classifier, here, batches, config.T, stop)
        if values is None:
            return
        landscape.record((run, i, j), values)
        yield


def _measure_point(
    classifier: Classifier,
    weights: dict[str, Tensor],
    batches: Sequence[tuple[Tensor, Tensor]],
    T: int,
    stop: Callable[[], bool],
) -> list[float] | None:
    """L_SDT, L_TET and the accuracy with these weights in place of the classifier's own; None if stopped."""
    totals = torch.zeros(len(_SURFACES), dtype=torch.float64, device=batches[0][1].device)
    for x, y in batches:
        if stop():
            return None
        logits: Tensor = functional_call(classifier, weights, (x,) if x.dim() == 5 else (x, T))
        means = [sdt_loss(logits, y).double(), tet_loss(logits, y).double()]
        totals += torch.stack([means[0] * len(y), means[1] * len(y), count_correct(logits, y).double()])
    values: list[float] = (totals / sum(len(y) for _, y in batches)).tolist()
    return values


def _begin(path: Path, names: tuple[str, ...], settings: dict[str, Any], axis: NDArray[np.float64]) -> Landscape:
    """The measurement that `path` holds, or a new one."""
    if path.exists():
        landscape = load_landscape(path)
        if different := differences(landscape.settings, settings):
            raise ValueError(
                f"{path} was measured with other settings: {'; '.join(different)}; "
                "give another --out, or remove it to measure anew"
            )
        return replace(landscape, names=names)  # a run may have another name by now
    shape = (len(names), len(axis), len(axis))
    surfaces = {name: np.full(shape, np.nan) for name in _SURFACES}
    return Landscape(names=names, alphas=axis, betas=axis, finished=0, settings=settings, **surfaces)


def _settings(
    classifiers: Mapping[str, Classifier],
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    config: LandscapeConfig,
    device: torch.device,
    precision: str,
) -> dict[str, Any]:
    """Everything that decides the numbers, as JSON gives it back."""
    networks = {}
    for number, classifier in enumerate(classifiers.values(), 1):
        data = data_settings(classifier)
        networks[str(number)] = {**asdict(classifier.config), "mean": data["mean"], "std": data["std"]}
    settings: dict[str, Any] = {
        "format": FORMAT,
        "T": config.T,
        "points": config.points,
        "extent": config.extent,
        "seed": config.seed,
        "device": device.type,
        "precision": precision,
        "num_images": len(images),
        "frames": images.shape[1] if images.ndim == 5 else None,
        "images": _digest([images, labels]),
        "weights": [
            _digest([value.detach().cpu().float().numpy() for value in classifier.state_dict().values()])
            for classifier in classifiers.values()
        ],
        "networks": networks,
    }
    plain: dict[str, Any] = as_json(settings)
    return plain


def _digest(arrays: Sequence[NDArray[Any]]) -> str:
    """The first 16 digits of the SHA-256 of all values."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def _batches(
    images: NDArray[np.uint8], labels: NDArray[np.int64], config: LandscapeConfig, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Batches on the device: uint8 [N, C, H, W], or with time first [T, N, C, H, W]; and their labels [N]."""
    x = torch.tensor(images[:, : config.T] if images.ndim == 5 else images, device=device)
    size = min(config.batch_size or forward_batch(device), len(images))  # torch takes no integer beyond 64 bits
    inputs = [part.transpose(0, 1).contiguous() if part.dim() == 5 else part for part in x.split(size)]
    return list(zip(inputs, torch.tensor(labels, device=device).split(size), strict=True))


def _check(
    name: str, classifier: Classifier, images: NDArray[np.uint8], labels: NDArray[np.int64], config: LandscapeConfig
) -> None:
    """Refuse what a classifier cannot take."""
    if images.dtype != np.uint8 or images.ndim not in (4, 5) or len(images) == 0 or len(images) != len(labels):
        raise ValueError(
            f"images are {images.dtype} {list(images.shape)} with {len(labels)} labels; "
            "wanted one or more, uint8 [N, C, H, W] or frames [N, T, C, H, W], and as many labels"
        )
    if images.shape[-3:] != classifier.image_shape:
        raise ValueError(f"the images have the shape {images.shape[-3:]}; {name} takes {classifier.image_shape}")
    check_class_numbers(labels, len(images), len(classifier.class_names), name)
    if images.ndim == 5 and images.shape[1] < config.T:
        raise ValueError(f"T is {config.T}, but the frames hold {images.shape[1]} steps; take a smaller T")
