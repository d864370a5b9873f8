"""CIFAR-10 and CIFAR-100: 50,000 + 10,000 colour images, 32x32."""

from __future__ import annotations

import contextlib
import functools
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from tetdeploy.system.extras import import_extra
from tetdeploy.wording import shorten

from .cache import Arrays, Cache
from .decoding import ImageFile, decode_images
from .download import download_torchvision
from .folder import class_files, is_hidden
from .images import ImageSet, mixed_order
from .labelled import Split

COUNTS = {"train": 50_000, "test": 10_000}


_FINE_CLASSES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
wardrobe whale willow_tree wolf woman worm
"""


@dataclass(frozen=True)
class _Cifar:
    name: str
    dataset_class: str  # torchvision's
    folder: str  # what it unpacks into
    class_names: tuple[str, ...]  # in torchvision's order
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


CIFAR10 = _Cifar(
    name="cifar10",
    dataset_class="CIFAR10",
    folder="cifar-10-batches-py",
    class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2023, 0.1994, 0.2010),  # the field's customary values; over all pixels it is (0.2470, 0.2435, 0.2616)
)
CIFAR100 = _Cifar(
    name="cifar100",
    dataset_class="CIFAR100",
    folder="cifar-100-python",
    class_names=tuple(_FINE_CLASSES.split()),
    mean=(0.5071, 0.4867, 0.4408),
    std=(0.2675, 0.2565, 0.2761),
)


def load_cifar10(split: Split, data_dir: Path) -> ImageSet:
    """CIFAR-10, uint8 [N, 3, 32, 32], found under `data_dir` or else downloaded into it.

    Looked for, in this order: `cifar-10-batches-py` (torchvision's layout), `cifar10/<split>/<class>/*` (images), and
    `cifar10-<split>.zip` or `cifar10-<split>-*.zip` with the same tree inside. Labels are torchvision's whatever the
    source; the order of the images is fixed and mixed over the classes, but torchvision's layout has another one.

    Raises:
        OSError: nothing was found and the download failed.
        ValueError: what was found is damaged or not the whole set.
        MissingExtraError: torchvision or Pillow is needed and not installed.
    """
    return _load(CIFAR10, split, data_dir)


def load_cifar100(split: Split, data_dir: Path) -> ImageSet:
    """CIFAR-100 with its 100 fine classes; as `load_cifar10`, with `cifar-100-python` and `cifar100`."""
    return _load(CIFAR100, split, data_dir)


def _load(cifar: _Cifar, split: Split, data_dir: Path) -> ImageSet:
    tree = data_dir / cifar.name / split
    zips = sorted({*data_dir.glob(f"{cifar.name}-{split}.zip"), *data_dir.glob(f"{cifar.name}-{split}-*.zip")})
    if not (data_dir / cifar.folder).is_dir():
        if tree.is_dir():
            return _image_set(cifar, split, _from_tree(cifar, split, tree), str(tree))
        if zips:
            arrays = Cache(data_dir, zips).get(f"{cifar.name}-{split}", lambda: _from_zips(cifar, split, zips))
            return _image_set(cifar, split, arrays, ", ".join(map(str, zips)))
        looked_for = [
            f"{data_dir / cifar.folder} (torchvision's layout, or the archive it unpacks)",
            f"{tree}/<class>/*",
            f"{data_dir}/{cifar.name}-{split}.zip or {cifar.name}-{split}-*.zip with {cifar.name}/{split}/<class>/*",
        ]
        download_torchvision(cifar.name, cifar.dataset_class, cifar.folder, data_dir, looked_for=looked_for)
    return _image_set(cifar, split, _from_torchvision(cifar, split, data_dir), str(data_dir / cifar.folder))


def _image_set(cifar: _Cifar, split: Split, arrays: Arrays, source: str) -> ImageSet:
    images, labels = arrays["images"], arrays["labels"]
    if len(images) != COUNTS[split]:
        raise ValueError(
            f"{source}: {len(images):,} images, but {cifar.name} has {COUNTS[split]:,} in {split}; "
            "add what is missing, or use folder:PATH for a set of your own"
        )
    if images.shape[1:] != (3, 32, 32):
        channels, height, width = images.shape[1:]
        raise ValueError(
            f"{source}: images of {width}x{height} with {channels} channels; {cifar.name} has 32x32 with 3"
        )
    return ImageSet(cifar.name, split, images, labels, cifar.class_names, cifar.mean, cifar.std)


def _from_torchvision(cifar: _Cifar, split: Split, data_dir: Path) -> Arrays:
    dataset_class = getattr(import_extra("torchvision.datasets", "train"), cifar.dataset_class)
    with warnings.catch_warnings():
        # CIFAR's pickles are of Python 2: numpy >= 2.4 warns of the integer flags in their dtypes
        warnings.filterwarnings("ignore", message=r"dtype\(\): align should be passed")
        try:
            dataset = dataset_class(data_dir, train=split == "train")
        except RuntimeError as error:
            raise ValueError(
                f"{data_dir / cifar.folder} is incomplete or damaged (torchvision's checksums differ); "
                "remove it to download it again"
            ) from error
    assert tuple(dataset.classes) == cifar.class_names, "torchvision verified the file that names the classes"
    images = np.ascontiguousarray(dataset.data.transpose(0, 3, 1, 2))
    return {"images": images, "labels": np.array(dataset.targets, np.int64)}


def _from_tree(cifar: _Cifar, split: Split, tree: Path) -> Arrays:
    classes = class_files(tree)
    paths = [path for found in classes.values() for path in found]

    def decode() -> Arrays:
        files = {name: [ImageFile(path, Path(path).read_bytes) for path in found] for name, found in classes.items()}
        return _decode(cifar, split, files, str(tree))

    return Cache(tree, paths).get(f"{cifar.name}-{split}-tree", decode)


def _from_zips(cifar: _Cifar, split: Split, zips: list[Path]) -> Arrays:
    files: dict[str, list[ImageFile]] = {}
    found: dict[tuple[str, ...], Path] = {}
    with contextlib.ExitStack() as stack:
        for path in zips:
            try:
                archive = stack.enter_context(zipfile.ZipFile(path))
            except zipfile.BadZipFile as error:
                raise ValueError(f"{path} is not a zip or is cut short ({error}); copy it again") from error
            for info in archive.infolist():
                parts = PurePosixPath(info.filename).parts
                hidden = any(map(is_hidden, parts))  # left out, as in a tree
                if parts[:2] != (cifar.name, split) or len(parts) != 4 or hidden:
                    continue
                if parts in found:
                    raise ValueError(
                        f"{path} holds {info.filename}, which is in {found[parts]} already; remove one of them, "
                        "or the set would have images twice"
                    )
                found[parts] = path
                read = functools.partial(archive.read, info)
                files.setdefault(parts[2], []).append(ImageFile(f"{path}/{info.filename}", read))
        return _decode(cifar, split, files, ", ".join(map(str, zips)))


def _decode(cifar: _Cifar, split: Split, files: dict[str, list[ImageFile]], source: str) -> Arrays:
    unlike = sorted(set(files) ^ set(cifar.class_names))
    if unlike:
        raise ValueError(
            f"{source}: the class folders are not those of {cifar.name}/{split}; missing or unknown: {shorten(unlike)}"
        )
    pairs = [(f, label) for label, name in enumerate(cifar.class_names) for f in sorted(files[name], key=_base_name)]
    pairs = [pairs[index] for index in mixed_order(len(pairs))]
    images = decode_images([file for file, _ in pairs], text=f"decoding {cifar.name} {split}")
    return {"images": images, "labels": np.array([label for _, label in pairs], np.int64)}


def _base_name(file: ImageFile) -> str:
    return PurePosixPath(file.name).name  # the order is then the same for a tree and for any number of zips
