"""`tetdeploy train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tetdeploy.cli.errors import INTERRUPTED
from tetdeploy.cli.options import console, data_dir_option, json_option, network_of, runs_option
from tetdeploy.extras import import_extra

if TYPE_CHECKING:
    from tetdeploy.data import LabelledSet
    from tetdeploy.networks import Classifier, NetworkConfig

_NETWORK_OPTIONS = ("model", "width", "tau", "v_th", "gamma")


@click.command(
    epilog="""\b
Examples:
  tetdeploy train                                         the digits, with the small convsnn
  tetdeploy train --data cifar10 --model resnet19 --augment crop-flip --epochs 100 --device cuda
  tetdeploy train --data folder:photos --T 2 --out runs/photos
  tetdeploy train --data dvs-cifar10 --T 10 --model vggsnn --augment flip-roll --lam 0.001
  tetdeploy train --data saccades:digits --T 5            event frames, made of images
  tetdeploy train --resume                                go on with the newest run
  tetdeploy train --init runs/digits --T 6 --epochs 5     start from given weights
  tetdeploy train --model my_package.my_module:my_network your own network
"""
)
@click.option(
    "--data",
    default="digits",
    show_default=True,
    help="digits, fashion-mnist, cifar10, cifar100, folder:PATH or FILE.npz; of events n-mnist, dvs-cifar10, "
    "events:PATH or saccades:NAME of images (frames of equal count; by-time:... of equal time).",
)
@data_dir_option
@click.option(
    "--model", default="convsnn", show_default=True, help="A network's name, or package.module:function for your own."
)
@click.option("--width", default=1.0, show_default=True, help="Factor on every channel count.")
@click.option("--tau", default=0.5, show_default=True, help="Leak factor per step (Eq. 1).")
@click.option("--v-th", default=1.0, show_default=True, help="Firing threshold (Eq. 2).")
@click.option("--gamma", default=1.0, show_default=True, help="Half-width of the surrogate triangle (Eq. 5).")
@click.option("--T", "T", default=4, show_default=True, help="Time steps.")
@click.option("--epochs", default=30, show_default=True)
@click.option("--batch-size", default=64, show_default=True)
@click.option("--lr", default=2e-3, show_default=True, help="Peak learning rate; warm-up, then a cosine to 0.")
@click.option("--optimizer", default="adamw", show_default=True, help="adamw or sgd (Nesterov 0.9).")
@click.option(
    "--weight-decay", default=1e-2, show_default=True, help="On the weights of convolutions and linear layers."
)
@click.option("--warmup-epochs", default=1.0, show_default=True)
@click.option("--label-smoothing", default=0.0, show_default=True)
@click.option("--clip", default=0.0, show_default=True, help="Largest norm of the gradient; 0 is off.")
@click.option("--loss", default="tet", show_default=True, help="tet (Eq. 13) or sdt (Eq. 7).")
@click.option("--lam", default=0.05, show_default=True, help="Weight of the MSE term (Eq. 13).")
@click.option("--phi", default=1.0, show_default=True, help="Target of the MSE term (Eq. 12).")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--val-fraction", default=0.1, show_default=True, help="Share of the training images held out for validation."
)
@click.option("--augment", default="none", show_default=True, help="none, shift, crop or crop-flip.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:1.")
@click.option("--precision", default="auto", show_default=True, help="auto, fp32, bf16 or fp16.")
@click.option("--out", type=click.Path(path_type=Path), help="Run folder. [default: RUNS/<data>-<model>, numbered]")
@runs_option
@click.option(
    "--resume",
    is_flag=False,
    flag_value="",
    metavar="[RUN]",
    help="Go on with a run, the newest by default, with its settings.",
)
@click.option("--init", type=click.Path(path_type=Path), help="Start from the weights of this checkpoint or run.")
@json_option
@click.pass_context
def train(
    ctx: click.Context,
    /,
    out: Path | None,
    runs: Path,
    resume: str | None,
    init: Path | None,
    json_path: Path | None,
    **options: Any,
) -> None:
    """Train a network with Temporal Efficient Training.

    Writes RUN/checkpoint.safetensors (the best epoch on held-out training images; the test set is not touched),
    RUN/last.safetensors (for --resume), RUN/metrics.jsonl and RUN/config.json. Ctrl-C saves and stops.
    """
    import_extra("torch", "train")
    from tetdeploy.checkpoint import load_weights
    from tetdeploy.data import load_data, split_validation
    from tetdeploy.files import write_json
    from tetdeploy.train import TrainConfig
    from tetdeploy.train import train as run_training

    if resume is not None:
        out = _resumed(ctx, Path(resume) if resume else None, out, runs, init, options)
    data, data_dir = options.pop("data"), options.pop("data_dir")
    network = {name: options.pop(name) for name in _NETWORK_OPTIONS}
    config = TrainConfig(**options)
    images = load_data(data, "train", data_dir=data_dir, T=config.T)
    train_set, val_set = (
        split_validation(images, fraction=config.val_fraction) if config.val_fraction else (images, None)
    )
    classifier = _classifier(images, config.seed, network)
    if init is not None:
        load_weights(classifier, init)
    out = out or _unused(runs, data, network["model"])
    result = run_training(classifier, train_set, val_set, config, out, resume=resume is not None, runs=runs)
    if result.interrupted:
        console.print(f"interrupted after {result.epochs} epochs; go on with: tetdeploy train --resume {result.out}")
        ctx.exit(INTERRUPTED)
    best = result.best
    if json_path is not None:
        fields = (
            {}
            if best is None
            else {"best_epoch": best.epoch, "val_accuracy": best.val_accuracy, "val_loss": best.val_loss}
        )
        write_json(json_path, {"run": str(result.out), "epochs": result.epochs, "seconds": result.seconds, **fields})
    if best is not None and best.val_accuracy is not None:
        console.print(f"best val {best.val_accuracy:.2%} at epoch {best.epoch}  ->  {result.checkpoint}")
    else:
        console.print(f"last epoch  ->  {result.checkpoint}")
    own = f" --model {network['model']}" if ":" in network["model"] else ""
    steps = " --T 6" if images.encoding == "direct" else ""  # recordings were cut into the T frames of the training
    console.print(f"next: tetdeploy export {result.out}{steps} --fold-bn{own}")


def _resumed(
    ctx: click.Context, run: Path | None, out: Path | None, runs: Path, init: Path | None, options: dict[str, Any]
) -> Path:
    """The run to go on with; options that were not typed take its settings."""
    from tetdeploy.checkpoint import newest_run
    from tetdeploy.train.runs import read_run_config

    if init is not None:
        raise click.UsageError("--init starts a new run and --resume goes on with one: choose one of them")
    run = run or out or newest_run(runs)
    settings = read_run_config(run)
    typed = {name for name in options if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE}
    data = {"data": settings.get("data", {}).get("name", options["data"])}
    for name, value in {**settings.get("network", {}), **settings.get("training", {}), **data}.items():
        if name in options and name not in typed:
            options[name] = value
    return run


def _classifier(images: LabelledSet, seed: int, network: dict[str, Any]) -> Classifier:
    """A freshly initialised classifier for a data set; `seed` decides its weights."""
    import torch

    from tetdeploy.networks import Classifier, NetworkConfig

    config: NetworkConfig = NetworkConfig(
        num_classes=len(images.class_names),
        in_channels=images.image_shape[0],
        image_size=images.image_shape[1:],
        **network,
    )
    torch.manual_seed(seed)
    return Classifier(
        network_of(config, config.model if config.is_own else None),
        config=config,
        mean=images.mean,
        std=images.std,
        class_names=images.class_names,
        data=images.name,
        encoding=images.encoding,
    )


def _unused(runs: Path, data: str, model: str) -> Path:
    from tetdeploy.train.runs import unused_run_folder

    name = f"{Path(data.removeprefix('folder:')).stem.replace(':', '-')}-{model.rpartition(':')[2]}"
    folder: Path = unused_run_folder(runs, name)
    return folder
