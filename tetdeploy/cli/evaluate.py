"""`tetdeploy evaluate`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from numpy.typing import NDArray

from tetdeploy.cli.errors import Recorded, lacks_memory
from tetdeploy.cli.inputs import load_classifier, load_part, note_own_file
from tetdeploy.cli.options import (
    PARTS,
    check_distinct,
    checked_output,
    data_dir_option,
    json_option,
    limit_option,
    own_network_option,
    runs_option,
    steps_option,
    torch_batch_option,
    torch_device_option,
    torch_precision_option,
)
from tetdeploy.cli.terminal import console, image_bar, print_notes, say_next
from tetdeploy.steps import trained_T
from tetdeploy.storage.arrays import write_npz
from tetdeploy.storage.files import write_json
from tetdeploy.storage.provenance import own_fraction
from tetdeploy.storage.run_folder import CHECKPOINT_NAME, newest_run, seed_runs
from tetdeploy.system.extras import import_extra
from tetdeploy.wording import first_line

if TYPE_CHECKING:
    import torch

    from tetdeploy.checkpoint import Checkpoint
    from tetdeploy.networks import Classifier


@click.command(
    cls=Recorded,
    epilog="""\b
Examples:
  tetdeploy evaluate                                    the newest run on its test set, at T=1..8
  tetdeploy evaluate runs/tet runs/ann --T 1:6          a network and its ANN twin
  tetdeploy evaluate runs/sdt runs/tet --json seeds.json
                                                        of folders of several seeds also mean and standard deviation
  tetdeploy evaluate runs/tet --predictions tet.npz     the class of each image, for a paired test
  tetdeploy evaluate runs/r19 --device cuda --precision bf16 --batch-size 1024
""",
)
@click.argument("checkpoints", nargs=-1, metavar="[RUN]...", type=click.Path(path_type=Path))
@steps_option("1:8; of recordings 1 to the training's")
@click.option(
    "--split",
    default="test",
    show_default=True,
    type=PARTS,
    help="Images to measure on; train and validation are the run's own parts.",
)
@limit_option
@click.option("--data", help="Another data set. [default: each training's]")
@data_dir_option
@own_network_option
@torch_batch_option
@torch_device_option
@torch_precision_option
@runs_option
@json_option
@click.option(
    "--predictions",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=checked_output,
    help="Also write labels, and the class that each run predicts for each image at each T, here (.npz).",
)
def evaluate(
    checkpoints: tuple[Path, ...],
    steps: tuple[int, ...] | None,
    split: str,
    limit: int | None,
    data: str | None,
    data_dir: Path,
    model: str | None,
    batch_size: int | None,
    device: str,
    precision: str,
    runs: Path,
    json_path: Path | None,
    predictions: Path | None,
) -> None:
    """Accuracy of trained weights at each T, in PyTorch.

    RUN is a run folder, a folder of several seeds, a .safetensors or a folder of shards; the newest run by default. Use
    this command before an export, and for what has no export: ANN twins and smooth spikes. What is deployed is measured
    by tetdeploy sweep, with its energy. For a run of train --qat, this is the network in float32, not the one in 8
    bits.
    """
    check_distinct({"--json": json_path, "--predictions": predictions})
    torch = import_extra("torch", "train")
    from tetdeploy.checkpoint import read_checkpoint
    from tetdeploy.data import is_own_file
    from tetdeploy.report.reading import read_run
    from tetdeploy.report.seeds import summary_of
    from tetdeploy.storage.provenance import written
    from tetdeploy.train.device import device_name, forward_batch, pick_device, pick_precision

    checkpoints = checkpoints or (newest_run(runs),)
    on = pick_device(device)
    chosen = pick_precision(precision, on)
    begun = {folder: found for folder in checkpoints if (found := seed_runs(folder))}
    # before all measuring: what is damaged is told at once
    summaries = {folder: summary_of(folder, [read_run(run) for run in found]) for folder, found in begun.items()}
    seeds = {folder: [run for run in found if (run / CHECKPOINT_NAME).exists()] for folder, found in begun.items()}
    best = {_best(summaries[folder], found) for folder, found in seeds.items()}
    beaten = {run for found in seeds.values() for run in found} - best
    rows, following = list[dict[str, Any]](), list[tuple[Path | str, ...]]()
    predicted = list[dict[int, NDArray[np.int64]]]()
    paths = [run for given in checkpoints for run in seeds.get(given) or [given]]
    data_sets = _DataSets(data, split, limit, data_dir)
    labels = None if predictions is None else _shared_labels(paths, data_sets)  # before all measuring, too
    for path in paths:
        checkpoint = read_checkpoint(path)
        metadata, sha256 = checkpoint.metadata, checkpoint.sha256
        classifier, images = load_classifier(checkpoint, model), data_sets.of(checkpoint)
        del checkpoint  # its tensors
        own_file = split == "test" and is_own_file(images.name, metadata["data"]["name"])
        if own_file and images.name not in (row["data"] for row in rows if "trained_on" in row):
            note_own_file(images.name)
        wanted, size = _steps(steps, classifier, trained_T(metadata)), batch_size or forward_batch(on)
        classes = _measure(str(path), classifier, images, max(wanted), size, on, chosen, trained=trained_T(metadata))
        predicted.append({T: classes[T - 1] for T in wanted})
        row = _row(path, metadata, images, predicted[-1], ann=classifier.config.ann, checkpoint_sha256=sha256)
        rows.append(row | ({"trained_on": True} if own_file else {}))
        if classifier.config.is_spiking and path not in beaten:
            given = ("--data", data) if data is not None and not metadata["data"]["name"] else ()
            following.append((path, *given, *(("--precision", "int8") if row["qat"] else ())))
    result = {"kind": "evaluate", "split": split, "device": device_name(on), "precision": chosen, "runs": rows}
    if seeds:
        result["seeds"] = [_over_seeds(folder, summary, rows) for folder, summary in summaries.items()]
    if json_path is not None:
        write_json(json_path, result | written(torch=torch.__version__))
    if predictions is not None:
        assert labels is not None
        write_npz(predictions, _predictions(rows, predicted, labels))
    _print(result)
    if files := [str(path) for path in (json_path, predictions) if path is not None]:
        console.print("   ".join(files))
    if following:
        say_next("export", *following[0], *(("--model", model) if model else ()))


class _DataSets:
    """The images to measure each run on. The last ones are kept: seeds share them."""

    def __init__(self, data: str | None, split: str, limit: int | None, data_dir: Path) -> None:
        self._data, self._split, self._limit, self._data_dir = data, split, limit, data_dir
        self._asked: Any = None
        self._images: Any = None

    def of(self, checkpoint: Checkpoint) -> Any:
        from tetdeploy.checkpoint import trained_on

        metadata = checkpoint.metadata
        name = trained_on(metadata, checkpoint.file) if self._data is None else self._data
        fraction = own_fraction(metadata)
        asked = {"T": trained_T(metadata), "fraction": fraction, "known": metadata["data"]}
        if (name, asked) != self._asked:
            self._asked = self._images = None  # which memory need not hold beside the next
            images = load_part(name, self._split, data_dir=self._data_dir, **asked)
            self._images = images if self._limit is None else images.select(slice(self._limit))
            self._asked = name, asked
        return self._images


def _row(
    path: Path, metadata: Mapping[str, Any], images: Any, classes: Mapping[int, NDArray[np.int64]], **known: Any
) -> dict[str, Any]:
    """What the result says of a run, of `classes [N]` at each T; `known` goes with it."""
    training = metadata["training"]
    return {
        "run": str(path),
        "seed": training.get("seed"),
        "qat": bool(training.get("qat")),
        "trained_T": trained_T(metadata),
        "data": images.name,
        "num_images": len(images),
        "images_sha256": images.fingerprint,
        "accuracy": [{"T": T, "accuracy": float((found == images.labels).mean())} for T, found in classes.items()],
    } | known


def _shared_labels(paths: Sequence[Path], data_sets: _DataSets) -> NDArray[np.int64]:
    """The labels of the images that all runs are measured on, as --predictions needs it."""
    from tetdeploy.checkpoint import read_checkpoint

    first = data_sets.of(read_checkpoint(paths[0]))
    labels: NDArray[np.int64] = first.labels
    for path in paths[1:]:
        images = data_sets.of(read_checkpoint(path))
        # Recordings of the same name may be cut into other frames.
        are_same = images.name == first.name or images.fingerprint == first.fingerprint
        if not (are_same and np.array_equal(images.labels, labels)):
            raise ValueError(
                f"--predictions: {path} is measured on other images than {paths[0]}; choose --data, or write a file "
                "for each"
            )
    return labels


def _best(summary: Mapping[str, Any], runs: Sequence[Path]) -> Path | None:
    """Of the runs of several seeds the one with the highest validation accuracy, as `train` names it; without
    validation the first."""
    accuracies = {entry["run"]: entry.get("val_accuracy") or 0.0 for entry in summary["runs"] if "run" in entry}
    return max(runs, key=lambda run: accuracies[run.name], default=None)


def _over_seeds(folder: Path, summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation at each T, over the seeds that are finished by `summary_of`."""
    from tetdeploy.report.seeds import finished_seeds
    from tetdeploy.train.seeds import mean_and_std

    of_folder = {Path(row["run"]).name: row for row in rows if Path(row["run"]).parent == folder}
    averaged = [of_folder[name] for name in finished_seeds(summary) if name in of_folder]
    accuracies: dict[int, list[float]] = {}
    for row in averaged:
        for entry in row["accuracy"]:
            accuracies.setdefault(entry["T"], []).append(entry["accuracy"])
    means = {T: mean_and_std(values) for T, values in accuracies.items()}
    return {
        "run": str(folder),
        "ann": any(row["ann"] for row in of_folder.values()),
        "qat": any(row["qat"] for row in of_folder.values()),
        "num_finished": len(averaged),
        "accuracy": [{"T": T, "mean": mean, "std": std} for T, (mean, std) in means.items()],
    }


def _predictions(
    rows: Sequence[Mapping[str, Any]], predicted: Sequence[Mapping[int, NDArray[np.int64]]], labels: NDArray[np.int64]
) -> dict[str, Any]:
    """The arrays of --predictions; -1 where a run was not measured at a T."""
    steps, none = sorted({T for of_run in predicted for T in of_run}), np.full_like(labels, -1)
    return {
        "labels": labels,
        "T": np.array(steps),
        "predicted": np.array([[of_run.get(T, none) for T in steps] for of_run in predicted]),
        "runs": np.array([row["run"] for row in rows]),
        "images_sha256": np.array([row["images_sha256"] for row in rows]),
    }


def _steps(steps: tuple[int, ...] | None, classifier: Classifier, trained: int) -> tuple[int, ...]:
    """The numbers of steps to measure at; an ANN has one."""
    if classifier.config.ann:
        return (1,)
    return steps or tuple(range(1, 1 + (trained if classifier.encoding == "frames" else 8)))


def _measure(
    name: str,
    classifier: Classifier,
    images: Any,
    T: int,
    batch_size: int,
    device: torch.device,
    precision: str,
    *,
    trained: int,
) -> NDArray[np.int64]:
    """The predicted class of each image after each of T steps, `[T, N]`.

    Raises:
        ValueError: the images do not fit, or the network's own code fails beyond the T that it was trained with, and at
            that T it does not.
    """
    from tetdeploy.system.memory import reused_memory
    from tetdeploy.train.device import place, tuned_convolutions, wants_channels_last
    from tetdeploy.train.session import check_data
    from tetdeploy.train.validation import classes_by_step

    check_data(images, classifier, T)
    channels_last = wants_channels_last(classifier.config, device, precision, fusable=False)
    place(classifier, device, channels_last=channels_last)
    memory = reused_memory() if device.type == "cpu" else nullcontext()
    with image_bar(f"{name} on {images.name}", len(images)) as tick, tuned_convolutions(), memory:
        batches = _batches(images, batch_size, device, tick)
        try:
            classes: NDArray[np.int64] = classes_by_step(classifier, batches, T=T, precision=precision).numpy()
        except (RuntimeError, IndexError) as error:
            if trained >= T or lacks_memory(error):
                raise
            some = [next(_batches(images, batch_size, device, None))]
            classes_by_step(classifier, some, T=trained, precision=precision)  # if T is not the reason, fails alike
            reason = f"fails at T={T}, beyond the T={trained} of its training ({first_line(error)})"
            raise ValueError(f"the network of {name} {reason}; choose --T 1:{trained}") from error
    return classes


def _batches(images: Any, size: int, device: torch.device, tick: Any) -> Iterator[torch.Tensor]:
    import torch

    from tetdeploy.batches import parts

    x = images.x  # one object, which reads ahead what lies on disk
    for part in parts(len(images), size, tick):
        yield torch.from_numpy(np.ascontiguousarray(x[part])).to(device)


def _print(result: Mapping[str, Any]) -> None:
    from tetdeploy.report.numbers import percent
    from tetdeploy.report.result_table import ResultTable

    rows = result["runs"]
    steps = sorted({entry["T"] for row in rows if not row["ann"] for entry in row["accuracy"]}) or [1]
    sets = ", ".join(dict.fromkeys(f"{row['num_images']:,} images of {row['data']}" for row in rows))
    console.print(f"{sets}, {result['split']}   {result['precision']} on {result['device']}")
    table = ResultTable("", numbers=(f"T={T}" for T in steps))
    for row in rows:
        found = {entry["T"]: entry["accuracy"] for entry in row["accuracy"]}
        if row["ann"]:
            table.add_row(f"{row['run']} (ANN)", f"{found[1]:.2%}")
            continue
        cells = (f"{found[T]:.2%}{'*' * (row['trained_T'] == T)}" if T in found else "" for T in steps)
        table.add_row(f"{row['run']} (not int8)" if row["qat"] else row["run"], *cells)
    averaged = [folder for folder in result.get("seeds", ()) if folder["num_finished"]]
    for folder in averaged:
        entries = {entry["T"]: entry for entry in folder["accuracy"]}
        for label, key in ((f"mean (n={folder['num_finished']})", "mean"), ("± standard deviation", "std")):
            cells = (percent(entries.get(T, {}).get(key)) for T in ([1] if folder["ann"] else steps))
            table.add_row(f"{folder['run']} {label}{' (not int8)' * folder['qat']}", *cells)
    console.print(table)
    notes = ["* the T of the training"] * any(not row["ann"] for row in rows)
    notes += ["an ANN has no time"] * any(row["ann"] for row in rows)
    notes += [
        f"{folder['run']} has no mean: none of its seeds is finished, as far as their files say"
        for folder in result.get("seeds", ())
        if not folder["num_finished"]
    ]
    if averaged:
        notes.append("mean and standard deviation (over n - 1) are of the seeds that are finished")
    if any(row["qat"] for row in rows):
        notes.append(
            f"not int8: fine-tuned in 8 bits (--qat), but measured in {result['precision']}; tetdeploy export "
            "--precision int8 and then tetdeploy sweep measure it in 8 bits"
        )
    print_notes(notes)
