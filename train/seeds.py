"""One recipe under several seeds (`--seeds 0,1,2`): a run for each, and the mean and the standard deviation of all."""

from __future__ import annotations

import copy
import statistics
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tetdeploy.arguments import check_flag, check_type, check_whole
from tetdeploy.data import LabelledSet
from tetdeploy.networks import Classifier, check_classifier
from tetdeploy.storage.files import write_json
from tetdeploy.storage.run_folder import SUMMARY_NAME, without_latest
from tetdeploy.system.standard_output import StandardOutput

from .config import How, TrainConfig
from .ranks import current_ranks
from .runs import (
    check_latest,
    check_run,
    check_settings,
    is_begun,
    mark_latest,
    only_trainer,
    read_run_config,
    refuse_held,
    run_settings,
    write_run_config,
)
from .session import check_sets
from .training import TrainResult, train


@dataclass(frozen=True)
class SeedsResult:
    """How the runs of several seeds ended.

    Attributes:
        out: the folder of all of them.
        runs: one for each seed that was begun, in the order of the seeds.
        mean: of the best validation accuracies; None without any.
        std: their sample standard deviation (over n - 1); None for fewer than two.
        interrupted: Ctrl-C ended it.
    """

    out: Path
    runs: tuple[TrainResult, ...]
    mean: float | None
    std: float | None
    interrupted: bool

    @property
    def best(self) -> TrainResult | None:
        """The run with the highest validation accuracy; without validation the first."""
        begun = [run for run in self.runs if run.best is not None]
        return max(begun, key=_accuracy, default=None)

    @property
    def summary(self) -> Path:
        return self.out / SUMMARY_NAME


def train_seeds(
    make_classifier: Callable[[int], Classifier],
    train_set: LabelledSet,
    val_set: LabelledSet | None,
    config: TrainConfig,
    seeds: Sequence[int],
    out: Path | str,
    *,
    recipe: str | None = None,
    resume: bool = False,
    runs: Path | str | None = None,
    progress: bool | None = None,
    board: bool = False,
    workers: int | None = None,
    how: How | None = None,
) -> SeedsResult:
    """Train under each seed into `out/seed-<seed>`, and write `out/summary.json` after each.

    The seed decides the initial weights and every random number of training; the images held out stay the same.

    Args:
        make_classifier: makes the freshly initialised classifier of a seed, a new one each time; called after
            `torch.manual_seed(seed)`.
        train_set, val_set, config, progress, board, workers, how: see `train`; the seed of `config` plays no part.
        seeds: distinct, each at least 0.
        out: folder of the runs.
        recipe: what the summary calls the recipe, the file it came from for instance.
        resume: go on: finished seeds stay as they are, the interrupted one goes on, the others are trained; `seeds` may
            be more than before.
        runs: folder whose `latest` points at `out` until all are trained, then at the best of the runs.

    Raises:
        ValueError: no seed, or one twice; when resuming, not all of those before; make_classifier returns the same
            weights again; the folder of a seed holds another run; and what `train` raises, for the first seed before
            anything is written.
        OSError: see `train`.
    """
    out, ranks, how = without_latest(Path(out)), current_ranks(), how or How()
    runs = None if runs is None else Path(runs)
    seeds = [check_whole("seed", seed) for seed in seeds]  # JSON holds none of NumPy's
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds are {seeds}; give at least one, and none twice")
    check_type("config", config, TrainConfig)
    check_flag("resume", resume)  # the other flags are left to `train`
    if resume:  # those before come first: what is finished stays in the summary
        before = [seed for seed in read_run_config(out).get("seeds", ()) if seed in seeds]
        seeds = [*before, *(seed for seed in seeds if seed not in before)]
    configs = {seed: replace(config, seed=seed) for seed in seeds}
    fresh = _Fresh(make_classifier)
    check_sets(train_set, val_set)
    made = {seed: fresh.classifier(seed) for seed in seeds[:2]}  # the same one twice is refused before any training
    settings = run_settings(made[seeds[0]], train_set, val_set, configs[seeds[0]])
    settings |= {"seeds": seeds}
    options: dict[str, Any] = {"how": how, "progress": progress, "board": board, "workers": workers}
    console = StandardOutput(quiet=progress is False or not ranks.writes)
    results: list[TrainResult] = []
    # The only trainer of each seed too, in `train`: a seed may be resumed by itself.
    with _each_warning_once(), only_trainer(out, resume=resume):
        with ranks.first():
            if ranks.writes:
                recipe = _check(out, settings, recipe, resume=resume)
                if runs is not None:
                    check_latest(out, runs)

        def begin() -> None:
            if ranks.writes:
                write_run_config(out, settings | {"recipe": recipe, "how": asdict(how)}, resume=resume)
                if runs is not None:
                    mark_latest(out, runs)

        for number, seed in enumerate(seeds, 1):
            folder = out / f"seed-{seed}"
            console.print(f"seed {seed}, {number} of {len(seeds)}  ->  {folder}")
            begun = ranks.agreed(resume and is_begun(folder))
            options |= {"resume": begun, "before_writing": None if results else begin}
            classifier = made.pop(seed, None) or fresh.classifier(seed)
            results.append(train(classifier, train_set, val_set, configs[seed], folder, **options))
            result = _summarised(out, results)
            if ranks.writes:
                write_json(out / SUMMARY_NAME, _summary(result, settings, recipe))
            if result.interrupted:
                return result
        if runs is not None and result.best is not None and ranks.writes:
            mark_latest(result.best.out, runs)
        return result


@contextmanager
def _each_warning_once() -> Iterator[None]:
    """What is the same for several seeds is told once: Python forgets which warnings it has shown where a library that
    is imported adds a filter."""
    show = warnings.showwarning
    shown: set[tuple[type[Warning], str]] = set()

    def show_new(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if (category, str(message)) not in shown:
            shown.add((category, str(message)))
            show(message, category, *where, **more)

    warnings.showwarning = show_new
    try:
        yield
    finally:
        warnings.showwarning = show


class _Fresh:
    """Makes the classifier of each seed, and sees to it that none goes on training the weights of another."""

    def __init__(self, make_classifier: Callable[[int], Classifier]) -> None:
        self._make = make_classifier
        self._seen: list[weakref.ref[Tensor]] = []

    def classifier(self, seed: int) -> Classifier:
        """Raises: ValueError: some of its weights were returned before."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = self._make(seed)
        check_classifier(made)
        weights = [p for p in made.parameters() if p.requires_grad]
        alive = {id(weight) for weight in (seen() for seen in self._seen) if weight is not None}
        if any(id(weight) in alive for weight in weights):
            raise ValueError(
                f"make_classifier returned for seed {seed} weights that it had returned before; let it build a new "
                "network each time, so that no seed goes on with what another has trained"
            )
        self._seen += map(weakref.ref, weights)
        return made


def _check(out: Path, settings: dict[str, Any], recipe: str | None, *, resume: bool) -> str | None:
    """Refuse a folder that holds another run, itself or in a seed's; the recipe that the seeds were begun with."""
    if resume:
        recipe = _check_resumed(out, settings)
    else:
        refuse_held(out)
    for seed in settings["seeds"]:
        one = {name: settings[name] for name in ("network", "data")}
        one["training"] = settings["training"] | {"seed": seed}
        check_run(out / f"seed-{seed}", one, resume=resume and is_begun(out / f"seed-{seed}"))
    return recipe


def _check_resumed(out: Path, settings: dict[str, Any]) -> str | None:
    before = read_run_config(out)
    left_out = [seed for seed in before.get("seeds", ()) if seed not in settings["seeds"]]
    if missing := [seed for seed in left_out if is_begun(out / f"seed-{seed}")]:
        raise ValueError(
            f"{out} has the seeds {before['seeds']}, of which {settings['seeds']} lacks {missing}: seeds may be added, "
            "none left out; name all of them with --seeds, delete the folders of those to leave out, or start a new "
            "run in another --out"
        )
    if "seeds" in before:  # there may be more now, and another one the first
        first = {name: value for name, value in before.get("training", {}).items() if name == "seed"}
        settings = settings | {"seeds": before["seeds"], "training": settings["training"] | first}
    check_settings(out, settings)
    return before.get("recipe")


def _accuracy(run: TrainResult) -> float:
    return -1.0 if run.best is None or run.best.val_accuracy is None else run.best.val_accuracy


def _summarised(out: Path, runs: Sequence[TrainResult]) -> SeedsResult:
    finished = [_accuracy(run) for run in runs if not run.interrupted and _accuracy(run) >= 0]
    return SeedsResult(out, tuple(runs), *mean_and_std(finished), runs[-1].interrupted)


def mean_and_std(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The mean, None without any value, and the sample standard deviation (over n - 1), None for fewer than two."""
    mean = statistics.fmean(values) if values else None
    return mean, statistics.stdev(values) if len(values) > 1 else None


def _summary(result: SeedsResult, settings: dict[str, Any], recipe: str | None) -> dict[str, Any]:
    """What summary.json holds: the recipe with all its settings, and which of its runs made which number."""
    shared = copy.deepcopy(settings)
    seeds = shared.pop("seeds")
    shared["training"].pop("seed")
    return {
        "recipe": recipe,
        "mean_val_accuracy": result.mean,
        "std_val_accuracy": result.std,
        "num_finished": sum(not run.interrupted for run in result.runs),
        "runs": [
            {
                "seed": seed,
                "run": run.out.name,
                "epochs": run.epochs,
                "interrupted": run.interrupted,
                "best_epoch": None if run.best is None else run.best.epoch,
                "val_accuracy": None if run.best is None else run.best.val_accuracy,
                "val_loss": None if run.best is None else run.best.val_loss,
            }
            for seed, run in zip(seeds, result.runs, strict=False)
        ],
        "settings": shared,
    }
