"""Where a run of `tetdeploy train` begins, and what it takes over: from a run, its weights alone, or a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tetdeploy.class_names import check_classes
from tetdeploy.cli.inputs import of_fewer_held_out
from tetdeploy.cli.recipe import is_given, is_typed
from tetdeploy.cli.terminal import console
from tetdeploy.names import is_own_model
from tetdeploy.storage.provenance import own_fraction
from tetdeploy.storage.run_folder import latest_run, seeds_folder, without_latest

if TYPE_CHECKING:
    from tetdeploy.checkpoint import Checkpoint
    from tetdeploy.data import LabelledSet
    from tetdeploy.networks import Classifier
    from tetdeploy.train import How
    from tetdeploy.train.restart import Restart

NETWORK_OPTIONS = ("model", "width", "tau", "v_th", "gamma", "ann", "smooth_spike")
HOW_OPTIONS = ("cuda_graphs", "recompute", "shards_mb")  # of no effect on the result

# What fine-tuning in 8 bits takes over from the checkpoint, and what it has of its own; what is given comes first.
_KEPT_BY_QAT = ("T", "batch_size", "label_smoothing", "clip", "lam", "phi", "val_fraction", "augment", "cutout")
_QAT_DEFAULTS = {"lr": 1e-4, "epochs": 2}


def check_beginnings(ctx: click.Context) -> None:
    """Refuse options that begin a run in different ways."""
    resume, init, restart = (ctx.params[name] is not None for name in ("resume", "init", "restart_from"))
    run, out = ctx.params["resume"], ctx.params["out"]
    if run and out is not None and Path(run).resolve() != out.resolve():
        raise click.UsageError(f"--resume goes on in the run's own folder, {run}, and --out names {out}: leave it out")
    if out is not None and not resume and os.path.realpath(out) == os.path.realpath(ctx.params["runs"]):
        raise click.UsageError(f"--out {out} is the folder of all runs: name one in it, such as {out / 'NAME'}")
    if init and resume:
        raise click.UsageError("--init starts a new run and --resume goes on with one: choose one of them")
    if init and ctx.params["seeds"]:
        raise click.UsageError("--init gives the same weights to every seed; choose --init or --seeds")
    if restart and (resume or init or ctx.params["seeds"] or ctx.params["qat"]):
        raise click.UsageError(
            "--restart-from goes on with one run from its weights: not together with --resume, --init, --seeds or --qat"
        )


@dataclass(frozen=True)
class Beginning:
    """What decides a run beside its options.

    Attributes:
        out: the folder; None for a new one.
        seeds: of several runs; none of one.
        how: see `_how`.
        init: the checkpoint of --init, as it was when it was read.
        data: the data settings of what is begun from, or of a teacher; none of a run from scratch.
    """

    out: Path | None
    seeds: tuple[int, ...]
    how: How
    init: Checkpoint | None
    data: Mapping[str, Any]


def begin(ctx: click.Context, options: dict[str, Any], *, out: Path | None, seeds: tuple[int, ...]) -> Beginning:
    """Give options that were neither typed nor in a recipe what the run or the checkpoint has that is begun from; of
    --init alone that is the network, its neurons included, and the data; of --distill the data.

    Args:
        out, seeds: those given; a run that is resumed has its own.

    Raises:
        ValueError: see `_take_carried` and `_take_checkpoint`; what is begun from cannot be read, or holds a network of
            the user's own that is not named.
        click.UsageError: --seed was typed for several seeds.
    """
    from tetdeploy.checkpoint import read_checkpoint, read_metadata
    from tetdeploy.train.runs import read_run_config, teacher_file

    resume, restart_from = ctx.params["resume"], ctx.params["restart_from"]
    init = None if ctx.params["init"] is None else read_checkpoint(ctx.params["init"])
    before: Mapping[str, Any] = {}
    data: Mapping[str, Any] = {} if init is None else init.metadata["data"]
    if resume is not None:
        out = without_latest(Path(resume)) if resume else out or _latest(ctx.params["runs"], several=bool(seeds))
        settings = read_run_config(out)
        _check_named(ctx, out, settings.get("network", {}))
        seeds = _take_settings(ctx, out, settings, options) or seeds
        before, data = settings.get("how", {}), settings.get("data", {})
    elif restart_from is not None:
        restart = _take_carried(ctx, restart_from, options)
        before, data = restart.how, restart.settings.get("data", {})
    elif options["qat"]:
        _take_checkpoint(ctx, init, options)
    elif init is not None:
        _take_network(ctx, init.path, init.metadata["network"], options)
        _take_data(ctx, init.path, data, options)
    if options["distill"] and not data:
        teacher = teacher_file(options["distill"])
        data = read_metadata(teacher)["data"]
        _take_data(ctx, teacher, data, options)
    if seeds and is_typed(ctx, "seed"):
        has = ctx.params["config"] if is_given(ctx, "seeds") else out
        held = "" if is_typed(ctx, "seeds") else f" ({has} has the seeds {', '.join(map(str, seeds))})"
        raise click.UsageError(f"--seed and --seeds both decide the random numbers: choose one of them{held}")
    return Beginning(out, seeds, _how(ctx, before), init, data)


def _latest(runs: Path, *, several: bool) -> Path:
    """The newest run; for several seeds the folder of all, of which `latest` is the best once they are trained."""
    run = latest_run(runs)
    return seeds_folder(run) if several else run


def _take_carried(ctx: click.Context, weights: Path, options: dict[str, Any]) -> Restart:
    """Give options that were neither typed nor in a recipe the settings of the run that the weights are from.

    Raises:
        ValueError: there are none, or their network is the user's own and not named.
    """
    from tetdeploy.train.restart import find_restart

    restart = find_restart(weights)
    settings = restart.settings
    _check_named(ctx, weights, settings["network"])
    here = {name: value for name, value in settings["training"].items() if name != "device"}
    _take_settings(ctx, weights, settings | {"training": here}, options)
    return restart


def _check_named(ctx: click.Context, begun_from: Path, network: Mapping[str, Any]) -> None:
    """Refuse the user's own network where --model does not name it: no code is imported because a file says so."""
    if is_own_model(str(network.get("model"))) and not is_given(ctx, "model"):
        raise ValueError(f"{begun_from} holds a network of your own: pass --model {network['model']}")


def _take_settings(
    ctx: click.Context, run: Path, settings: Mapping[str, Any], options: dict[str, Any]
) -> tuple[int, ...]:
    """Give options that were neither typed nor in a recipe the settings of a run.

    Returns:
        Its seeds, if it has several and none are given.

    Raises:
        FileNotFoundError: its data are not where they were.
    """
    from tetdeploy.data import check_recorded

    data = {"data": settings.get("data", {}).get("name", options["data"])}
    if not is_given(ctx, "data"):
        check_recorded(data["data"], run, other=", or name where it lies now with --data")
    for name, value in {**settings.get("network", {}), **settings.get("training", {}), **data}.items():
        if name in options and not is_given(ctx, name):
            options[name] = value
    return () if is_given(ctx, "seeds") else tuple(settings.get("seeds", ()))


def _how(ctx: click.Context, before: Mapping[str, Any]) -> How:
    """What was typed or is in a recipe, else as the run ran that is gone on with."""
    from tetdeploy.train import How

    values = {
        name: ctx.params[name] if is_given(ctx, name) else before.get(name, ctx.params[name]) for name in HOW_OPTIONS
    }
    return How(**values | {"shards_mb": values["shards_mb"] or None})


def _take_checkpoint(ctx: click.Context, init: Checkpoint | None, options: dict[str, Any]) -> None:
    """Give options that were neither typed nor in a recipe what the checkpoint to fine-tune says, or qat's defaults.

    Raises:
        ValueError: an option of the network was given that disagrees, the network is the user's own and not named, or
            no data are named.
    """
    from tetdeploy.checkpoint import trained_on

    if init is None:
        raise click.UsageError("--qat fine-tunes a trained network: name its run or checkpoint with --init")
    network, training = init.metadata["network"], init.metadata["training"]
    _check_named(ctx, init.path, network)
    for name in NETWORK_OPTIONS:
        value = network.get(name, options[name])
        if is_given(ctx, name) and options[name] != value:
            raise ValueError(f"{init.path} has {name} {value}, not {options[name]}: leave it out")
        options[name] = value
    kept = {name: training[name] for name in _KEPT_BY_QAT if name in training}
    kept["loss"] = "tet" if training.get("switch_to_tet") else training.get("loss", options["loss"])
    if not is_given(ctx, "data"):
        kept["data"] = trained_on(init.metadata, init.path)
    for name, value in {**kept, **_QAT_DEFAULTS}.items():
        if not is_given(ctx, name):
            options[name] = value


def _take_network(ctx: click.Context, init: Path, network: Mapping[str, Any], options: dict[str, Any]) -> None:
    """Give what decides the weights' shapes and what they go with, where neither typed nor in a recipe, their values.

    Raises:
        ValueError: the network is the user's own and not named.
    """
    _check_named(ctx, init, network)
    is_another = is_given(ctx, "model") and options["model"] != network["model"]
    for name in ("tau", "v_th", "gamma") if is_another else ("model", "width", "tau", "v_th", "gamma"):
        if not is_given(ctx, name) and network.get(name, options[name]) != options[name]:
            options[name] = network[name]
            console.print(f"{name} {network[name]}, as in {init}", style="yellow")


def _take_data(ctx: click.Context, weights: Path, data: Mapping[str, Any], options: dict[str, Any]) -> None:
    """Where no data are named, those that the weights were trained on, if they say so.

    Raises:
        FileNotFoundError: they are not where they were.
    """
    from tetdeploy.data import check_recorded

    if data["name"] and data["name"] != options["data"] and not is_given(ctx, "data"):
        check_recorded(data["name"], weights)
        options["data"] = data["name"]
        console.print(f"data {data['name']}, as in {weights}", style="yellow")


def start_from(ctx: click.Context, classifier: Classifier, init: Checkpoint) -> None:
    """Take the weights of `init`, and say which ones its number of classes leaves out, or that its classes are others.

    Raises:
        ValueError: they do not fit the network; a model or a width that was given and is not theirs is named, and
            another shape of the images.
    """
    from tetdeploy.checkpoint import MisfitError, load_weights

    try:
        anew = load_weights(classifier, init, other_classes=True)
    except MisfitError as error:
        theirs, ours = init.metadata["network"], {"model": classifier.config.model, "width": classifier.config.width}
        others = {k: value for k, value in ours.items() if is_given(ctx, k) and theirs.get(k, value) != value}
        shape, own = list(init.metadata["data"]["image_shape"]), list(classifier.image_shape)
        if not others and shape != own:  # of a size that the readout's weights go by, or of other channels
            raise ValueError(
                f"{init.path} takes images {shape} and {classifier.data} has {own}, which its weights do not fit; make "
                "them alike with --data, or train without --init"
            ) from error
        if not others:
            raise
        differ = ", and ".join(f"{name} {theirs[name]}, not {value}" for name, value in others.items())
        options = " and ".join(f"--{name}" if is_typed(ctx, name) else f"{name} in the recipe" for name in others)
        raise ValueError(f"{init.path} has {differ}, which its weights do not fit: leave out {options}") from error
    if anew:
        known, num_classes = init.metadata["network"]["num_classes"], classifier.config.num_classes
        console.print(
            f"{init.path} knows {known} classes, {classifier.data} has {num_classes}: {', '.join(anew)} start anew",
            style="yellow",
        )
        return
    names = tuple(init.metadata["data"]["class_names"])
    try:
        check_classes(str(init.path), names, classifier.data, classifier.class_names)
    except ValueError as error:
        console.print(f"{error} If not, the readout begins with the weights of other classes", style="yellow")


def note_trained_on(init: Path, metadata: Mapping[str, Any], data: LabelledSet, val_fraction: float) -> None:
    """Say so if some of `data`, to validate on, are not among what the run of `init` held out of the same set: of a
    larger share some are not, of the same share all are unless their order is another."""
    from tetdeploy.data import holds_out_others, remedy_of_others, same_data

    training, held_out = metadata["training"], own_fraction(metadata)
    if held_out < val_fraction and same_data(data.name, metadata["data"]["name"]):
        remedy = f"take --val-fraction {held_out:g}" if held_out else "judge by the test set"
        if training.get("val_fraction") is None:
            will, said = "may", "does not say what it held out, and may have been trained on these"
        else:
            will, said = "will", of_fewer_held_out(held_out)
        console.print(
            f"{data.name}: {init} {said}, so the validation accuracy {will} look better than it is; {remedy}",
            style="yellow",
        )
        return
    if data.encoding == "frames" and data.x.shape[1] != training.get("T"):  # the same recordings cut otherwise
        return
    if training.get("val_fraction") == val_fraction and holds_out_others(data.name, data, metadata["data"]):
        console.print(
            f"{data.name}: {init} held out other images and was trained on some of these, so the validation accuracy "
            f"will look better than it is; {remedy_of_others(data.name)}",
            style="yellow",
        )


def check_same_inputs(init: Path, metadata: Mapping[str, Any], data: LabelledSet) -> None:
    """Refuse data of another kind than the checkpoint's network takes, or to which its labels mean other classes."""
    kept = metadata["data"]
    theirs = kept["encoding"], list(kept["image_shape"]), len(kept["class_names"])
    ours = data.encoding, list(data.image_shape), len(data.class_names)
    if theirs != ours:
        wanted, got = (f"{encoding} input {shape} of {count} classes" for encoding, shape, count in (theirs, ours))
        raise ValueError(f"{init} takes {wanted}; {data.name} has {got}: choose the --data it was trained on")
    check_classes(str(init), tuple(kept["class_names"]), data.name, data.class_names)
