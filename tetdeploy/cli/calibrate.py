"""`tetdeploy calibrate`."""

from __future__ import annotations

from pathlib import Path

import click

from tetdeploy.cli.errors import Recorded
from tetdeploy.cli.inputs import default_steps, held_out, note_other_checkpoint
from tetdeploy.cli.options import (
    AT_LEAST_1,
    PARTS,
    STEPS,
    ChosenModel,
    FiniteRange,
    data_dir_option,
    json_option,
    limit_option,
    opens_model,
)
from tetdeploy.cli.terminal import console, image_bar, say_next
from tetdeploy.storage.files import check_writable, write_json


@click.command(
    cls=Recorded,
    epilog="""\b
Examples:
  tetdeploy export --layout step && tetdeploy calibrate     the newest export, T = 8, at most 0.1 points lost
  tetdeploy calibrate MODEL --T 4 --loss 0.5
  tetdeploy calibrate MODEL --data held-out.npz             images of your own, all of them; no torch needed
  tetdeploy calibrate MODEL --point-estimate                few images: go by the loss found on them, sure or not
  tetdeploy early-exit MODEL                                then: what it keeps and saves on the test set

\b
Exit codes: 0, 1 an error, 2 wrong usage, 130 Ctrl-C.
""",
)
@click.option(
    "--data",
    help="A data set's name, or FILE.npz with images and labels. Of a set that the network was not trained on all "
    "images are used. [default: the training's data]",
)
@data_dir_option
@click.option(
    "--split",
    type=PARTS,
    help="For the training's data: validation, the images held out, or train, those trained on (the answers to these "
    "are surer than those to new images). For another set: train or test, the whole of it; not for another FILE.npz. "
    "[default: validation; for another set, train]",
)
@limit_option
@click.option("--T", "T", type=STEPS, help="The most steps. [default: 8; with frames that of the training]")
@click.option(
    "--loss",
    type=FiniteRange(0, 100),
    default=0.1,
    show_default=True,
    help="Points of accuracy (per cent of the images) that may be lost against T steps for every image.",
)
@click.option(
    "--criterion",
    type=click.Choice(("confidence", "margin", "both")),
    default="both",
    show_default=True,
    help="What must exceed the threshold. confidence: the largest entry of the softmax of the mean logits; margin: how "
    "far it is ahead of the second; both: the one that takes fewer steps.",
)
@click.option(
    "--confident/--point-estimate",
    default=True,
    help="confident: a test must show that less than --loss is lost, at the threshold and all above it, so that this "
    "nearly always holds on other images too; it takes thousands of images. point-estimate: the loss found on these "
    "images alone must stay within --loss, which other images exceed in most cases. [default: confident]",
)
@click.option("--min-T", "min_T", type=AT_LEAST_1, default=1, show_default=True, help="The fewest steps.")
@click.option("--batch-size", default=64, show_default=True, type=AT_LEAST_1)
@opens_model()
@json_option
def calibrate(
    chosen: ChosenModel,
    data: str | None,
    data_dir: Path,
    split: str | None,
    limit: int | None,
    T: int | None,
    loss: float,
    criterion: str,
    confident: bool,
    min_T: int,
    batch_size: int,
    json_path: Path | None,
) -> None:
    """When is an answer certain enough to stop? The threshold of early exit, from held-out images.

    MODEL is an .onnx file of the step layout; the newest export by default. One run of T steps gives every threshold's
    accuracy; the one that takes the fewest steps on average and loses no more than --loss, with 95 % confidence, goes
    beside the model, into MODEL.exit.json. Needs no torch.
    """
    from tetdeploy.data.fingerprint import images_sha256
    from tetdeploy.early_exit import CRITERIA, exit_path
    from tetdeploy.early_exit.threshold import check_min_T, find_threshold, run_answers
    from tetdeploy.report.early_exit import calibration_shown

    engine = chosen.engine()
    note_other_checkpoint(engine)
    engine.check_early_exit()
    rule = exit_path(engine.path)
    check_writable(rule, remedy="copy the model to another folder")
    written = [rule] if json_path is None else [rule, json_path]
    name, x, labels = held_out(engine, data, data_dir, split, limit)
    T = T or max(default_steps(engine))
    check_min_T(min_T, T)
    criteria = CRITERIA if criterion == "both" else tuple(c for c in CRITERIA if c == criterion)
    with image_bar(f"{engine.path.name} on {name}", len(x)) as tick:
        answers = run_answers(engine, x, labels, T, batch_size=batch_size, tick=tick)
    found = find_threshold(answers, loss=loss / 100, criteria=criteria, min_T=min_T, confident=confident)
    result = found.to_dict(engine, name) | {"images_sha256": images_sha256(x, labels)}
    for path in written:
        write_json(path, result)
    for part in calibration_shown(result):
        console.print(part)
    console.print("   ".join(map(str, written)))
    say_next("early-exit", engine.path)
