"""`tetdeploy train`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tetdeploy.cli.beginnings import (
    HOW_OPTIONS,
    NETWORK_OPTIONS,
    begin,
    check_beginnings,
    check_same_inputs,
    note_trained_on,
    start_from,
)
from tetdeploy.cli.errors import INTERRUPTED, Recorded, lacks_memory
from tetdeploy.cli.inputs import network_of
from tetdeploy.cli.options import (
    STEPS,
    FiniteRange,
    PlaceToWrite,
    check_distinct,
    data_dir_option,
    json_option,
    runs_option,
    torch_device_option,
)
from tetdeploy.cli.recipe import config_option, is_given, is_typed
from tetdeploy.cli.terminal import command_line, console, progress_bar, say_next
from tetdeploy.names import is_npz, is_own_model
from tetdeploy.storage.files import atomic_write, write_json
from tetdeploy.storage.run_folder import CONFIG_NAME, LATEST_NAME, METRICS_NAME, SUMMARY_NAME
from tetdeploy.system.extras import import_extra
from tetdeploy.wording import counted

if TYPE_CHECKING:
    from torch import nn

    from tetdeploy.data import LabelledSet
    from tetdeploy.networks import Classifier, NetworkConfig
    from tetdeploy.train import SeedsResult, TrainConfig, TrainResult
    from tetdeploy.train.ranks import Ranks


_OF_BUILT_IN = ("width", "tau", "v_th", "gamma")
_NEWEST = "\0"  # of a bare --resume: nobody can type it, while a shell's variable that is not set gives ""


class _Resumed(click.ParamType):  # type: ignore[type-arg]  # generic in new versions only
    """The run of --resume; "" is the newest."""

    name = "run"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value == "":
            self.fail("it is empty; name a run, or give --resume alone to go on with the newest", param, ctx)
        return "" if value == _NEWEST else value


@click.command(
    cls=Recorded,
    epilog="""\b
Examples:
  tetdeploy train                                         the digits, with the small convsnn
  tetdeploy train --config examples/recipes/table1-tet-T4.toml --seeds 0,1,2
  tetdeploy train --data cifar10 --model resnet19 --augment crop-flip --epochs 100 --device cuda
  tetdeploy train --tit 2:20,6:10                         20 epochs at T=2, then 10 at T=6
  tetdeploy train --data folder:photos --T 2 --out runs/photos
  tetdeploy train --config examples/recipes/imagenet-sew-resnet34.toml --data imagenet:PATH --workers 16
  tetdeploy train --data dvs-cifar10 --T 10 --model vggsnn --augment flip-roll --lam 0.001
  tetdeploy train --data saccades:digits --T 5            event frames, made of images
  tetdeploy train --resume                                go on with the newest run
  tetdeploy train --init runs/digits --T 6 --epochs 5     start from given weights
  tetdeploy train --restart-from carried/shards           continue a run of which only the weights are here
  tetdeploy train --qat --init runs/digits                fine-tune in 8 bits, for export --precision int8
  tetdeploy train --ann --out runs/ann                    the ANN twin, and learning from it:
  tetdeploy train --distill runs/ann
  tetdeploy train --model my_package.my_module:my_network your own network
  torchrun --nproc-per-node 2 -m tetdeploy train          two processes, each with its share of every batch
""",
)
@config_option
@click.option(
    "--data",
    default="digits",
    show_default=True,
    help="digits, fashion-mnist, cifar10, cifar100, imagenet[:PATH][@SIZE], folder:PATH or FILE.npz; of events "
    "n-mnist, dvs-cifar10, events:PATH or saccades:NAME of images (frames of equal count; by-time:... of equal time).",
)
@data_dir_option
@click.option(
    "--model",
    default="convsnn",
    show_default=True,
    help="convsnn, resnet19, vggsnn, vggsnn-strided, spiking-resnet34, sew-resnet34, or package.module:function for "
    "your own.",
)
@click.option("--width", default=1.0, show_default=True, help="Factor on every channel count.")
@click.option("--tau", default=0.5, show_default=True, help="Leak factor per step (Eq. 1).")
@click.option("--v-th", default=1.0, show_default=True, help="Firing threshold (Eq. 2); raise --gamma with it.")
@click.option("--gamma", default=1.0, show_default=True, help="Half-width of the surrogate triangle (Eq. 5).")
@click.option("--ann", is_flag=True, help="Train the ANN twin, with ReLU for neurons; T is 1.")
@click.option(
    "--smooth-spike",
    default=0.0,
    show_default=True,
    metavar="K",
    help="Use sigmoid(K x) in place of the Heaviside function (Table 2); 0 is off.",
)
@click.option("--T", "T", type=STEPS, default=4, show_default=True, help="Time steps; 1 with --ann.")
@click.option("--epochs", default=30, show_default=True, help="Passes over the training images.")
@click.option(
    "--tit", default="", metavar="T:EPOCHS[:LR],...", help="Time inheritance training, in place of --T and --epochs."
)
@click.option("--batch-size", default=64, show_default=True, help="Images a step.")
@click.option("--lr", default=2e-3, show_default=True, help="Peak learning rate; warm-up, then a cosine to 0.")
@click.option("--optimizer", default="adamw", show_default=True, help="adamw or sgd (Nesterov 0.9).")
@click.option(
    "--weight-decay", default=1e-2, show_default=True, help="On the weights of convolutions and linear layers."
)
@click.option("--warmup-epochs", default=0.5, show_default=True, help="Warm-up of each stage; may be a fraction.")
@click.option("--label-smoothing", default=0.0, show_default=True, help="Share of the target spread over all classes.")
@click.option("--clip", default=0.0, show_default=True, help="Largest norm of the gradient; 0 is off.")
@click.option("--loss", default="tet", show_default=True, help="tet (Eq. 13) or sdt (Eq. 7).")
@click.option(
    "--switch-to-tet",
    default=0,
    show_default=True,
    metavar="EPOCHS",
    help="With --loss sdt: switch to tet after this many epochs (Figure 3); 0 is never.",
)
@click.option("--lam", default=0.05, show_default=True, help="Weight of the MSE term (Eq. 13); 0 with --ann.")
@click.option("--phi", type=float, help="Target of the MSE term (Eq. 12). [default: that of --v-th]")
@click.option("--seed", default=0, show_default=True, help="Decides every random number.")
@click.option("--seeds", default="", metavar="0,1,2", help="A run for each seed, OUT/seed-0 ..., and OUT/summary.json.")
@click.option(
    "--val-fraction", default=0.1, show_default=True, help="Share of the training images held out for validation."
)
@click.option(
    "--augment",
    default="none",
    show_default=True,
    help="none, shift, crop, crop-flip, autoaugment (after crop-flip) or flip-roll; of ImageNet none or resized-crop.",
)
@click.option("--cutout", default=0, show_default=True, metavar="PIXELS", help="Side of a blank square; 0 is off.")
@click.option("--ema", default=0.0, show_default=True, help="Decay of the weights' moving average; 0 is off.")
@click.option(
    "--random-T",
    "random_T",
    default="",
    metavar="LOW:HIGH[:DRAWS]",
    help="Draw T anew at each training step, DRAWS times (by default 3).",
)
@click.option("--distill", default="", metavar="RUN", help="Learn from this ANN twin at every time step.")
@click.option("--distill-alpha", default=1.0, show_default=True, help="Weight of the distillation.")
@click.option("--distill-tau", default=3.0, show_default=True, help="Temperature of the distillation.")
@torch_device_option
@click.option("--precision", default="auto", show_default=True, help="auto, fp32, bf16 or fp16.")
@click.option(
    "--workers", type=click.IntRange(min=0), help="Processes that read ImageNet; 0 reads in this one. [default: cores]"
)
@click.option(
    "--recompute/--no-recompute",
    default=False,
    help="Less memory, more time: compute blocks again in the backward pass.",
)
@click.option(
    "--qat",
    is_flag=True,
    help="Fine-tune the weights of --init in 8 bits, as export --precision int8 computes them; 2 epochs at lr 1e-4.",
)
@click.option(
    "--cuda-graphs/--no-cuda-graphs",
    default=False,
    help="On an NVIDIA GPU: record forward and backward, and replay them.",
)
@click.option(
    "--shards-mb",
    type=FiniteRange(min=0),
    default=0.0,
    show_default=True,
    help="Also write the last weights to RUN/shards, in files of at most this many MB, for --restart-from "
    "(which takes no weights of --qat); 0 is off.",
)
@click.option("--tensorboard", is_flag=True, help="Also write curves to RUN/tensorboard, now and when it is resumed.")
@click.option(
    "--out",
    type=PlaceToWrite(path_type=Path),
    help="Run folder. [default: RUNS/<data>-<model>, or RUNS/<the recipe's name> with --config; numbered]",
)
@runs_option
@click.option(
    "--resume",
    type=_Resumed(),
    is_flag=False,
    flag_value=_NEWEST,
    metavar="[RUN]",
    help="Continue a run (by default the newest) with its settings.",
)
@click.option(
    "--init",
    type=click.Path(path_type=Path),
    help="Start from the weights and network of this checkpoint or run; for another number of classes the readout "
    "starts anew.",
)
@click.option(
    "--restart-from",
    type=click.Path(path_type=Path),
    help="Continue a run elsewhere from its weights alone (shards, or a checkpoint), with that run's settings.",
)
@json_option
@click.pass_context
def train(
    ctx: click.Context,
    /,
    config: Path | None,
    seeds: str,
    workers: int | None,
    tensorboard: bool,
    out: Path | None,
    runs: Path,
    resume: str | None,
    init: Path | None,
    restart_from: Path | None,
    json_path: Path | None,
    **options: Any,
) -> Path:
    """Train a network with Temporal Efficient Training.

    Writes RUN/checkpoint.safetensors (the best epoch on held-out training images; the test set is not touched),
    RUN/last.safetensors (for --resume), RUN/metrics.jsonl and RUN/config.json. Ctrl-C saves and stops.
    """
    import_extra("safetensors", "train")  # only a checkpoint needs it, after all the data has been read
    import_extra("tetdeploy.train", "train")  # and what that needs
    from tetdeploy.train import train as run_training
    from tetdeploy.train import train_seeds
    from tetdeploy.train.ranks import process_group
    from tetdeploy.train.runs import weights_origin

    check_beginnings(ctx)
    options = {name: value for name, value in options.items() if name not in HOW_OPTIONS}
    default_by_network(ctx, options)
    with ExitStack() as made, process_group() as ranks, _one_voice(ranks):
        with ranks.first(), _naming(config):
            _refuse_started_again(ctx)
            begun = begin(ctx, options, out=out, seeds=_parse_seeds(seeds))
            job = _job(ctx, options, begun.data)
            if options["qat"] and begun.init is not None:
                check_same_inputs(begun.init.path, begun.init.metadata, job.train)
        out = begun.out
        if out is None and ranks.writes:
            out = made.enter_context(_new_folder(runs, config, job))
        out = ranks.agreed(out)
        assert out is not None
        made.enter_context(_naming_resume(out, job))
        with ranks.first():
            _check_json(json_path, out, begun.seeds, runs)
        json_path = json_path if ranks.writes else None
        also: dict[str, Any] = {"resume": resume is not None, "runs": runs, "board": tensorboard, "workers": workers}
        also["how"] = begun.how
        if begun.seeds:
            job = job.asked_of_export(ranks)
            recipe = None if config is None else str(config)
            many = train_seeds(job.classifier, job.train, job.val, job.config, begun.seeds, out, recipe=recipe, **also)
            _report_seeds(ctx, many, job, json_path)
            return out
        classifier = job.classifier(job.config.seed)
        origin = None
        if begun.init is not None:
            start_from(ctx, classifier, begun.init)
            if job.val is not None:
                note_trained_on(begun.init.path, begun.init.metadata, job.val, job.config.val_fraction)
            origin = weights_origin(begun.init)
        del begun  # the tensors of --init
        job = job.asked_of_export(ranks)
        also |= {"init": origin, "restart_from": restart_from}
        _report(ctx, run_training(classifier, job.train, job.val, job.config, out, **also), job, json_path)
        return out


def _refuse_started_again(ctx: click.Context) -> None:
    """Refuse to begin a second run beside the first where `torchrun --max-restarts` repeats the command."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and ctx.params["resume"] is None:
        raise ValueError(
            "torchrun --max-restarts has started this command again, which would begin another run: go on with "
            "--resume (a command with --resume RUN may be started again)"
        )


def _check_json(json_path: Path | None, out: Path, seeds: Sequence[int], runs: Path) -> None:
    """Refuse a --json in the place of what a run's folder, or one of several seeds, holds."""
    folders = [out, *(out / f"seed-{seed}" for seed in seeds)]
    names = [CONFIG_NAME, METRICS_NAME, *[SUMMARY_NAME] * bool(seeds)]
    kept = {f"{name} of {folder}": folder / name for folder in folders for name in names}
    check_distinct(kept | {"the link to the newest run": runs / LATEST_NAME, "--json": json_path})


@contextmanager
def _one_voice(ranks: Ranks) -> Iterator[None]:
    """Of several processes the first alone prints and writes; the others say what is wrong with them alone."""
    if ranks.writes:
        yield
        return
    console.quiet = True
    try:
        yield
    except ConnectionError:  # the first one says it
        raise SystemExit(1) from None
    except (ValueError, OSError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError  # some of their kinds take other arguments
        raise kind(f"process {ranks.rank} of {ranks.size}: {error}") from error
    finally:
        console.quiet = False


@dataclass(frozen=True)
class _Job:
    """What the options say: the configuration, the network's options, and the data."""

    config: TrainConfig
    network: dict[str, Any]
    train: LabelledSet
    val: LabelledSet | None
    begins: bool  # with weights that no run trained yet
    exports: bool = True  # as far as is known, as is the next
    folds: bool = True

    @property
    def own(self) -> tuple[str, ...]:
        """What commands that take up the run are told as well: --model, if the network is the user's own."""
        return ("--model", self.network["model"]) if is_own_model(self.network["model"]) else ()

    def classifier(self, seed: int) -> Classifier:
        """A freshly initialised classifier for the data set; `seed` decides its weights."""
        import torch

        from tetdeploy.networks import Classifier

        data, config = self.train, self.network_config
        torch.manual_seed(seed)
        network = network_of(config, config.model if config.is_own else None)
        if config.is_own and self.begins:
            _refuse_half(network, config.model)
        return Classifier(
            network,
            config=config,
            mean=data.mean,
            std=data.std,
            class_names=data.class_names,
            data=data.name,
            encoding=data.encoding,
            framing=data.framing,
        )

    @property
    def network_config(self) -> NetworkConfig:
        from tetdeploy.networks import NetworkConfig

        return NetworkConfig(
            num_classes=len(self.train.class_names),
            in_channels=self.train.image_shape[0],
            image_size=self.train.image_shape[1:],
            **self.network,
        )

    def asked_of_export(self, ranks: Ranks) -> _Job:
        """Say before a training why a network of the user's own cannot be exported after it. The job that knows it."""
        config = self.network_config
        if not (self.begins and config.is_own and config.is_spiking and ranks.writes):
            return self
        from tetdeploy.export.preflight import why_not
        from tetdeploy.train.device import pick_device

        pick_device(self.config.device)  # what is not there is refused at once
        with progress_bar() as bar:
            bar.add_task(f"can {config.model} be exported?", total=None)
            obstacle = why_not(config, self.train.encoding, self.config.T)
        if obstacle is None or lacks_memory(ValueError(obstacle.reason)):
            return self
        text = "this network cannot be exported" + ", except with --no-fold-bn, in float32" * obstacle.of_folding
        warnings.warn(f"{config.model}: {text}: {obstacle.reason}", RuntimeWarning, stacklevel=2)
        return replace(self, exports=obstacle.of_folding, folds=False)


def _refuse_half(network: nn.Module, model: str) -> None:
    for name, parameter in network.named_parameters():
        if parameter.requires_grad and parameter.dtype.itemsize < 4:
            raise ValueError(
                f"{model} returns a network whose {name!r} is {parameter.dtype}; weights that are trained must be "
                "float32 (call .float()): --precision bf16 computes in bfloat16 with them"
            )


def default_by_network(ctx: click.Context, options: dict[str, Any]) -> None:
    """Other defaults for what the network decides: an ANN has one step and no membranes whose mean is held at phi."""
    if options["ann"]:
        options |= {name: value for name, value in {"T": 1, "lam": 0.0}.items() if not is_given(ctx, name)}


def _job(ctx: click.Context, options: dict[str, Any], before: Mapping[str, Any]) -> _Job:
    """Args: before: the data settings of what is begun from, if anything is."""
    from tetdeploy.data import Framing, load_parts

    name, data_dir = options.pop("data"), options.pop("data_dir")
    network = {option: options.pop(option) for option in NETWORK_OPTIONS}
    unused = [option for option in _OF_BUILT_IN if is_own_model(network["model"]) and is_given(ctx, option)]
    if unused:
        raise click.UsageError(
            f"--{unused[0].replace('_', '-')} is for the built-in networks; {network['model']} is code of your own and "
            "is not told of it: set it there"
        )
    if network["model"] == "sew-resnet34" and is_given(ctx, "tau") and network["tau"] != 1.0:
        raise click.UsageError("--tau is 1 for sew-resnet34, whose IF neurons do not leak: leave it out")
    config = train_config(ctx, options, v_th=network["v_th"])
    T, trained = config.longest_T, Framing.of(before)
    train, val = load_parts(name, data_dir=data_dir, T=T, fraction=config.val_fraction, trained=trained)
    begins = ctx.params["resume"] is None and ctx.params["restart_from"] is None
    return _Job(config, network, train, val, begins)


def train_config(ctx: click.Context, options: dict[str, Any], *, v_th: float) -> TrainConfig:
    """The configuration of these options; phi is v_th where nothing says otherwise.

    Raises:
        ValueError: a value is out of its range, or --T or --epochs was given beside a --tit that says otherwise.
    """
    from tetdeploy.train import TrainConfig

    config = TrainConfig(**options | {"phi": v_th if options["phi"] is None else options["phi"]})
    for name in ("T", "epochs"):
        # A recipe's T gives way to a --tit that is typed.
        stands = ctx.get_parameter_source(name) == ctx.get_parameter_source("tit") or is_typed(ctx, name)
        if config.tit and stands and is_given(ctx, name) and options[name] != getattr(config, name):
            said = {"T": f"ends at T={config.T}", "epochs": f"has {counted(config.epochs, 'epoch')} in all"}[name]
            raise ValueError(f"tit {config.tit!r} {said}, but {name} is {options[name]}; leave out one of the two")
    return config


@contextmanager
def _naming_resume(out: Path, job: _Job) -> Iterator[None]:
    """Within it, a second Ctrl-C, which does not wait for the batch and saves nothing, still says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        if (out / CONFIG_NAME).is_file():
            console.print(f"go on from what was saved last with: {_resume(out, job)}")
        raise


def _resume(out: Path, job: _Job) -> str:
    return command_line("train", "--resume", out, *job.own)


@contextmanager
def _naming(recipe: Path | None) -> Iterator[None]:
    """Within it, what is wrong with a value also names the recipe that the options came from."""
    try:
        yield
    except ValueError as error:
        if recipe is None:
            raise
        raise ValueError(f"{recipe}, with what was typed: {error}") from error


def _parse_seeds(text: str) -> tuple[int, ...]:
    """The seeds of `--seeds`; none without it."""
    if not text:
        return ()
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        seeds = (-1,)
    if min(seeds) < 0:
        raise ValueError(f"seeds is {text!r}; it must be whole numbers from 0, separated by commas, such as 0,1,2")
    return seeds


def _new_folder(runs: Path, recipe: Path | None, job: _Job) -> AbstractContextManager[Path]:
    """A new run's folder: `RUNS/<recipe>`, or `RUNS/<data>-<model>`; numbered if it exists."""
    from tetdeploy.train.runs import new_run_folder

    data, model = Path(job.train.name).stem.replace(":", "-"), job.network["model"].rpartition(":")[2]
    return new_run_folder(runs, f"{data}-{model}" if recipe is None else recipe.stem)


def _report(ctx: click.Context, result: TrainResult, job: _Job, json_path: Path | None) -> None:
    if result.interrupted:
        console.print(f"interrupted after {counted(result.epochs, 'epoch')}; go on with: {_resume(result.out, job)}")
        ctx.exit(INTERRUPTED)
    best = result.best
    if json_path is not None:
        fields = (
            {}
            if best is None
            else {"best_epoch": best.epoch, "val_accuracy": best.val_accuracy, "val_loss": best.val_loss}
        )
        write_json(json_path, {"run": str(result.out), "epochs": result.epochs, "seconds": result.seconds, **fields})
    kept = "last epoch"
    if best is not None and best.val_accuracy is not None:
        kept = f"best val {best.val_accuracy:.2%} at epoch {best.epoch}"
    if not result.checkpoint.is_file():  # of a run that was finished before; a warning has said so
        console.print(f"{kept}: gone")
        return
    console.print(f"{kept}  ->  {result.checkpoint}")
    _say_next(result.out, job)


def _report_seeds(ctx: click.Context, result: SeedsResult, job: _Job, json_path: Path | None) -> None:
    for run in result.runs:
        if run.best is not None and run.best.val_accuracy is not None:
            console.print(f"{run.out.name}  best val {run.best.val_accuracy:.2%} at epoch {run.best.epoch}")
    if result.interrupted:
        console.print(f"interrupted; go on with: {_resume(result.out, job)}")
        ctx.exit(INTERRUPTED)
    if json_path is not None:
        with atomic_write(json_path) as temporary:
            temporary.write_bytes(result.summary.read_bytes())
    trained = counted(len(result.runs), "seed")
    if result.mean is not None:
        spread = "" if result.std is None else f" +- {result.std:.2%}"
        trained = f"best val {result.mean:.2%}{spread} over {trained}"
    console.print(f"{trained}  ->  {result.summary}")
    if result.best is not None:
        _say_next(result.best.out, job)


def _say_next(run: Path, job: _Job) -> None:
    of_frames = job.train.encoding == "frames" and is_npz(job.train.name)  # no teacher sees them whole
    if job.network["ann"] and not of_frames:
        say_next("train", "--distill", run, *job.own)
    elif job.network["ann"] or not job.exports:
        say_next("evaluate", run, *job.own)
    elif not job.network["smooth_spike"]:
        steps = ("--T", 6) if job.train.encoding == "direct" else ()  # recordings were cut into the training's T frames
        form = ("--precision", "int8") if job.config.qat else ("--fold-bn" if job.folds else "--no-fold-bn",)
        say_next("export", run, *steps, *form, *job.own)
