"""What commands read: a model's images and steps, and the network of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tetdeploy.class_names import check_classes
from tetdeploy.cli.terminal import command_line, console
from tetdeploy.measured import own_data, said_of_data
from tetdeploy.names import is_npz, is_own_model
from tetdeploy.storage.form import parse_json
from tetdeploy.storage.provenance import own_fraction
from tetdeploy.storage.run_folder import other_checkpoint, weights_file, weights_sha256
from tetdeploy.storage.tensor_file import read_content

if TYPE_CHECKING:
    from tetdeploy.checkpoint import Checkpoint
    from tetdeploy.data import LabelledSet
    from tetdeploy.engine import Engine


def default_steps(engine: Engine) -> tuple[int, ...]:
    """Every T that an unrolled graph holds; where T is free 1..8, or with frames up to the T of the training."""
    free = engine.trained_T if engine.encoding == "frames" else 8
    last = engine.T if engine.layout == "unrolled" and engine.T else free
    return tuple(range(1, last + 1))


def load_inputs(engine: Engine, data: str | None, data_dir: Path, limit: int | None) -> tuple[str, Any, Any]:
    """Name, images or frames as the graph takes them, and labels of a data set; by default the test set of the data
    that the model was trained on."""
    from tetdeploy.data import Framing, is_own_file, load_data, load_frames, warn_of_other_framing

    name = _data_name(engine, data)
    if is_own_file(name, own_data(engine)):
        note_own_file(name)
    if engine.encoding == "frames" and is_npz(name):
        x, labels, names = load_frames(name)
        check_classes(engine.path.name, engine.class_names, name, names)
        return name, x[:limit], labels[:limit]
    trained = Framing.of(said_of_data(engine))
    test = load_data(name, "test", data_dir=data_dir, T=engine.trained_T, trained=trained)
    warn_of_other_framing(test, trained, engine.path.name)
    check_classes(engine.path.name, engine.class_names, name, test.class_names)
    note_other_scale(test, said_of_data(engine))
    test = test if limit is None else test.select(slice(limit))  # images on disk are decoded later, batch by batch
    return name, as_model_input(engine, test.x, mean=test.mean, std=test.std), test.labels


def note_own_file(name: str) -> None:
    """Say that `name`, whose test set is meant, is the very file that was trained on, which has none."""
    console.print(
        f"{name} is one set with no test part: these images were trained on; give others with --data TEST.npz",
        style="yellow",
    )


def note_other_scale(data: LabelledSet, known: Mapping[str, Any]) -> None:
    """Say so if images in memory vary a quarter as much as those of the training, or less, as those do that were scaled
    to 0..1 or 0..16 and not to 0..255.

    Args:
        known: what is said of the training's data.
    """
    from tetdeploy.data import ImageSet

    trained = max(known.get("std") or [0.0])
    if isinstance(data, ImageSet) and max(data.std) < trained / 4:
        console.print(
            f"pixels of {data.name} go up to {data.x.max()} and vary {trained / max(data.std):.0f} times less than "
            "those of the training: are they scaled to 0..255?",
            style="yellow",
        )


def note_replaced(path: Path, data: str, num_samples: int) -> None:
    """Say so if a result of other images, or of another number of them, lies where this one will."""
    try:
        held = parse_json(path.read_bytes())
        if (held["data"], held["num_samples"]) == (data, num_samples):
            return
        other = f"{held['num_samples']:,} images of {held['data']}"
    except (OSError, ValueError, KeyError, TypeError):  # nothing is there, or no result
        return
    console.print(f"{path}, the result of {other}, will be replaced; another --json keeps both", style="yellow")


def note_other_checkpoint(engine: Engine) -> None:
    """Say so if the run that the model lies in has other weights by now than those it was exported from."""
    folder = engine.path.parent
    if other_checkpoint(folder, engine.metadata["source"].get("checkpoint_sha256")):
        console.print(
            f"{engine.path.name} was exported from another checkpoint than {folder} has now; for that one run "
            f"{export_again(engine, folder)}",
            style="yellow",
        )


def note_unfit_threshold(model: Path) -> None:
    """Say so if the early-exit threshold beside a model was found for another."""
    from tetdeploy.early_exit import why_unfit

    if (reason := why_unfit(model)) is not None:
        console.print(reason, style="yellow")


def export_again(engine: Engine, run: Path) -> str:
    """What writes a model anew, in its place, of a run or checkpoint."""
    metadata, graph = engine.metadata, engine.path.with_suffix(".onnx")
    unrolled, network = metadata["layout"] == "unrolled", (metadata["source"].get("network") or {}).get("model") or ""
    options = {
        "--T": metadata["T"] if unrolled else "",
        "--layout": "" if unrolled else metadata["layout"],
        "--precision": metadata["precision"].replace("fp32", ""),
        "--target": metadata["target"].replace("cpu", ""),
        "--model": network if is_own_model(network) else "",
    }
    flags = {
        "--with-state": unrolled and metadata["states"],
        "--no-normalize": metadata["input"]["dtype"] != "uint8",
        "--no-fold-bn": not metadata.get("fold_bn", True),
    }
    words = [word for option, value in options.items() if value for word in (option, value)]
    words += [flag for flag, given in flags.items() if given]
    command = command_line("export", run, *words, "--out", graph)
    return command if graph == engine.path else f"{command}, then {command_line('build', graph)}"


def held_out(engine: Engine, data: str | None, data_dir: Path, split: str | None, limit: int | None) -> Any:
    """Name, images or frames as the graph takes them, and labels to calibrate on.

    Raises:
        ValueError: the training held no images out, or others than would be here; the data are of other classes.
        click.UsageError: no data are named, or the split is not one of theirs.
    """
    from tetdeploy.data import is_copy, same_data

    name, known = _data_name(engine, data), said_of_data(engine)
    held = own_fraction(engine.metadata["source"])
    trained_on = same_data(name, own_data(engine)) or (
        split != "test"  # for which no training part need be there
        and is_copy(name, T=engine.trained_T, fraction=held, known=known)
    )
    if is_npz(name) and not trained_on:
        if split is not None:
            raise click.UsageError(f"{name} is one set, of which all images are used: leave out --split")
        return load_inputs(engine, name, data_dir, limit)
    split = split or ("validation" if trained_on else "train")
    if split == "test" and trained_on:
        raise click.UsageError(
            f"the test set of {name} is for tetdeploy early-exit; take --split validation, or another set"
        )
    if split == "validation" and not trained_on:
        raise click.UsageError(f"{name} is not what was trained on, so nothing is held out; take --split train or test")
    fraction = held if trained_on else 0.0
    if split == "validation" and not fraction:
        raise ValueError(
            f"the training of {engine.path.name} held out no images as far as it says (val_fraction is 0 or missing), "
            "so there are none to calibrate on; name others with --data, or take those it was trained on with --split "
            "train"
        )
    if split == "train" and trained_on:
        console.print(
            f"{engine.path.name} was trained on these images and is surer of them than of new ones, of which it may "
            "lose more than --loss, whatever the test says",
            style="yellow",
        )
    if split == "validation":
        _note_first_run(engine, fraction)
    images = load_part(name, split, data_dir=data_dir, T=engine.trained_T, fraction=fraction, known=known)
    check_classes(engine.path.name, engine.class_names, name, images.class_names)
    chosen = images if limit is None else images.select(slice(limit))
    x = as_model_input(engine, chosen.x, mean=chosen.mean, std=chosen.std)
    what = {"validation": "held out", "train": "trained on"}[split] if trained_on else f"{split} split, of other data"
    return f"{name} ({what})", x, chosen.labels


def _note_first_run(engine: Engine, fraction: float) -> None:
    """Say so if the weights that the training began with (`--init`), where they still lie, are of a run that held out a
    smaller share than `fraction` of the same images."""
    from tetdeploy.data import same_data

    first = (engine.metadata["source"].get("provenance") or {}).get("init")
    if first is None:
        return
    try:
        file = weights_file(first["path"])
        content = {} if file.is_dir() or weights_sha256(file) != first["checkpoint_sha256"] else read_content(file)
    except (OSError, ValueError):  # gone, or no longer those
        return
    said, own = (content.get("training") or {}).get("val_fraction"), own_data(engine)
    if said is not None and said < fraction and same_data(own, (content.get("data") or {}).get("name") or ""):
        console.print(
            f"{own}: {first['path']}, which the training began with, {of_fewer_held_out(said)}, so the threshold may "
            "lose more than --loss; name others with --data",
            style="yellow",
        )


def of_fewer_held_out(share: float) -> str:
    """What is to be said of a run that held out `share` of its images, and of which a later one holds out more."""
    return f"held out {f'only {share:g}' if share else 'none'} of its images and was trained on some of these"


def _data_name(engine: Engine, data: str | None) -> str:
    """What --data names, or else what the model was trained on."""
    from tetdeploy.data import check_recorded

    if data is not None:
        return data
    if not (own := own_data(engine)):
        raise click.UsageError(f"{engine.path.name} does not say what data it was trained on; name some with --data")
    check_recorded(own, engine.path)
    return own


def load_part(
    name: str, part: str, *, data_dir: Path, T: int, fraction: float, known: Mapping[str, Any]
) -> LabelledSet:
    """A part of a data set as the run has it that held out this fraction.

    Args:
        part: test, or of the training images train, those trained on, or validation, those held out.
        known: the run's settings of its data.

    Raises:
        ValueError: the run held out no images, or others than these; and what `load_data` raises.
    """
    from tetdeploy.data import Framing, holds_out_others, load_data, load_parts, remedy_of_others, warn_of_other_framing

    trained = Framing.of(known)
    if part == "test":
        test = load_data(name, "test", data_dir=data_dir, T=T, trained=trained)
        warn_of_other_framing(test, trained, "the network")
        note_other_scale(test, known)
        return test
    train, val = load_parts(name, data_dir=data_dir, T=T, fraction=fraction, trained=trained)
    warn_of_other_framing(train, trained, "the network")
    if part == "train":
        return train
    if val is None:
        raise ValueError(
            "--split validation: a run held out no images as far as it says (val_fraction is 0 or missing); take train "
            "or test"
        )
    if holds_out_others(name, val, known):
        raise ValueError(
            f"{name}: the training held out other images, and was trained on some of these: they are others or in "
            f"another order; {remedy_of_others(name)}, or choose another --split or --data"
        )
    return val


def as_model_input(engine: Engine, pixels: Any, **statistics: Any) -> Any:
    """uint8 pixels `[..., C, H, W]` as the graph takes them: as they are, or normalised where it does not do so itself.

    Args:
        statistics: mean and std for a model that does not say with which ones it was trained.

    Raises:
        ValueError: it does not say, and none are given.
    """
    import numpy as np

    from tetdeploy.data.image_files import FileImages

    if engine.input_dtype == np.uint8:
        return pixels
    known = statistics | dict(said_of_data(engine))
    if "mean" not in known:
        raise ValueError(f"{engine.path.name} takes normalised float32 input and does not say how; run it from Python")
    mean, std = (np.array(known[key], np.float32)[:, None, None] for key in ("mean", "std"))

    def normalised(pixels: Any) -> Any:
        return (pixels.astype(np.float32) / np.float32(255) - mean) / std

    return pixels.converted(normalised) if isinstance(pixels, FileImages) else normalised(pixels)


def network_of(config: Any, own: str | None) -> Any:
    """A network for a configuration; the user's own is imported only if `own`, from --model, names that very function.

    Raises:
        ValueError: the checkpoint needs --model, or was made with another one.
    """
    from tetdeploy.networks import build_network, import_network

    if own is not None and own != config.model:
        raise ValueError(f"--model {own} is not what this checkpoint was trained with: {config.model}")
    return import_network(config) if own is not None and config.is_own else build_network(config)


def load_classifier(checkpoint: Checkpoint, own: str | None) -> Any:
    """The classifier of a checkpoint; `own` is --model, for a network of the user's own."""
    from tetdeploy.checkpoint import load
    from tetdeploy.networks import NetworkConfig, drawn_as_trained

    with drawn_as_trained(checkpoint.metadata["training"]):
        network = network_of(NetworkConfig(**checkpoint.metadata["network"]), own)
    return load(checkpoint, network=network)
