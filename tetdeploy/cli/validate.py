"""`tetdeploy validate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from tetdeploy.cli.errors import INTERRUPTED, Recorded
from tetdeploy.cli.fail_under import FAILED, Gate, check_gates, describe, parse_gates, place_gates
from tetdeploy.cli.inputs import default_steps, export_again, load_classifier, load_inputs, note_other_checkpoint
from tetdeploy.cli.options import (
    AT_LEAST_1,
    ChosenModel,
    data_dir_option,
    limit_option,
    opens_model,
    output_path,
    result_option,
    steps_option,
)
from tetdeploy.cli.recipe import is_typed
from tetdeploy.cli.terminal import command_line, console, image_bar, progress_bar, say_next
from tetdeploy.storage.files import write_json
from tetdeploy.system.extras import import_extra
from tetdeploy.system.memory import reused_memory

if TYPE_CHECKING:
    from tetdeploy.agreement import Compared, Reference
    from tetdeploy.engine import Engine
    from tetdeploy.resumable import Partial, Pass
    from tetdeploy.sweep import Sweep, Tally


@click.command(
    cls=Recorded,
    epilog="""\b
Examples:
  tetdeploy validate runs/r19/model-T4.onnx                     does this machine compute what PyTorch computed?
  tetdeploy validate MODEL --data cifar10 --fail-under accuracy=0.94 --fail-under agreement=0.999
  tetdeploy validate MODEL --data test.npz --fail-under energy=2e6@2     at most 2 µJ an image at T=2
  tetdeploy validate MODEL --against runs/r19 --T 1:4           spike by spike, needs tetdeploy[train]

\b
Exit codes: 0, 1 an error, 2 wrong usage, 3 a --fail-under that failed, 130 Ctrl-C.
""",
)
@steps_option("those of the reference; with data, as for sweep")
@click.option(
    "--data",
    help="A data set's name or FILE.npz with images and labels, for the accuracy. [default: only the reference images "
    "beside the model; with --against the test set of the training's data]",
)
@data_dir_option
@limit_option
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="CHECKPOINT",
    help="Run PyTorch beside the engine: the run folder or checkpoint that the model was exported from.",
)
@click.option(
    "--num-torch", type=click.IntRange(min=0), help="Images that PyTorch sees; 0 is all. [default: the first 2,000]"
)
@click.option("--model", "network", help="With --against: package.module:function, if the network is your own.")
@click.option(
    "--fail-under",
    "gates",
    multiple=True,
    callback=parse_gates,
    metavar="KEY=VALUE[@T]",
    help="Exit with 3 if accuracy or agreement (fractions) is below VALUE, or energy (pJ an image, as in the table) "
    "above it, at T [default: the training's]. May be repeated.",
)
@click.option("--layers/--no-layers", default=None, help="Also a table of the layers. [default: with --against]")
@click.option("--batch-size", default=32, show_default=True, type=AT_LEAST_1)
@click.option("--restart", is_flag=True, help="Begin anew instead of continuing an interrupted run.")
@opens_model()
@result_option(".validate.json")
@click.pass_context
def validate(
    ctx: click.Context,
    chosen: ChosenModel,
    steps: tuple[int, ...] | None,
    data: str | None,
    data_dir: Path,
    limit: int | None,
    against: Path | None,
    num_torch: int | None,
    network: str | None,
    gates: tuple[Gate, ...],
    layers: bool | None,
    batch_size: int,
    restart: bool,
    json_path: Path | None,
) -> None:
    """Does an exported model compute, on this machine, what PyTorch computes?

    MODEL is an .onnx file; the newest export by default. Without further options, the images that the export kept (up
    to 256) are run and compared with PyTorch's answers; --data also measures the accuracy at each T. Neither needs
    torch. --against runs PyTorch side by side. Ctrl-C keeps what is done; the same command goes on from there. Writes
    MODEL.validate.json.
    """
    if against is None and (num_torch is not None or network is not None):
        raise click.UsageError("--num-torch and --model go with --against CHECKPOINT")
    if against is None and data is None and (limit is not None or restart or is_typed(ctx, "data_dir")):
        raise click.UsageError("--limit, --data-dir and --restart go with --data or --against")
    engine = chosen.engine()
    note_other_checkpoint(engine)
    json_path = output_path(json_path, engine, ".validate.json")
    partial_path = json_path.with_suffix(".partial.npz")
    job = _Job(engine, steps, gates, batch_size, restart=restart)
    try:
        if against is not None:
            beside, digest = _beside(engine, against, network, chosen.threads)
            inputs = load_inputs(engine, data, data_dir, limit)
            result = job.side_by_side(*inputs, beside, digest, 2000 if num_torch is None else num_torch, partial_path)
        elif data is not None:
            result = job.with_data(*load_inputs(engine, data, data_dir, limit), partial_path)
        else:
            result = job.reference_only()
    except KeyboardInterrupt:
        kept = f"; what is done lies in {partial_path} and the same command goes on" if partial_path.exists() else ""
        console.print(f"interrupted{kept}")
        ctx.exit(INTERRUPTED)
    write_json(json_path, result)
    if job.partial is not None:
        job.partial.remove()
    _tell(result, json_path, layers=against is not None if layers is None else layers)
    if not all(gate["passed"] for gate in result["gates"]):
        ctx.exit(FAILED)


def _tell(result: dict[str, Any], json_path: Path, *, layers: bool) -> None:
    """What was found, and where it lies."""
    from tetdeploy.report.validation import shown

    for part in shown(result, layers=layers):
        console.print(part)
    console.print(str(json_path))
    for gate in result["gates"]:
        verdict = ("passed:", "green") if gate["passed"] else ("failed:", "red")
        console.print(Text.assemble(verdict, f" {describe(gate)}"))
    say_next("report", json_path)


class _Job:
    """What to measure of a model; its methods are the three kinds of validation and give their JSON. `partial` is what
    one leaves where it is interrupted."""

    def __init__(
        self,
        engine: Engine,
        wanted: tuple[int, ...] | None,
        gates: tuple[Gate, ...],
        batch_size: int,
        *,
        restart: bool,
    ) -> None:
        self.engine, self.wanted, self.gates, self.batch_size = engine, wanted, gates, batch_size
        self.restart = restart
        self.trained_T = engine.trained_T
        self.partial: Partial | None = None

    def reference_only(self) -> dict[str, Any]:
        """The kept images alone: no test accuracy."""
        from tetdeploy.agreement import load_reference

        engine, reference = self.engine, load_reference(self.engine)
        steps = self.wanted or tuple(range(1, reference.T + 1))
        if max(steps) > reference.T:
            raise ValueError(
                f"the reference of {engine.path.name} holds T={reference.T} steps, too few for T={max(steps)}; "
                f"{'' if engine.is_fixed else 'name data with --data, or '}choose a smaller --T"
            )
        gates = self._placed(steps, compared=steps, accuracy=False)
        compared = self._compare(reference, max(steps))
        measured = self._sweep(compared.tally, reference.x, reference.labels, steps, "reference images")
        return self._json(measured, compared, gates, labelled=False)

    def with_data(self, name: str, x: Any, labels: Any, partial_path: Path) -> dict[str, Any]:
        """A data set, and the kept images where they are there."""
        from tetdeploy.agreement import load_reference, reference_path
        from tetdeploy.resumable import Pass
        from tetdeploy.sweep import check_images

        engine, steps = self.engine, self.wanted or default_steps(self.engine)
        file = reference_path(engine.path)
        reference = load_reference(engine) if file.exists() or self._needs_agreement else None
        held = [t for t in steps if reference is not None and t <= reference.T]
        gates = self._placed(steps, compared=held)
        if not held:
            why = f"no {file.name}" if reference is None else f"{file.name} holds T={reference.T}, no T={min(steps)}"
            console.print(f"{why}, so nothing is compared with PyTorch", style="dim")
            reference = None
        check_images(engine, x, labels, max(steps))
        run = Pass(engine, x, labels, max(steps), batch_size=self.batch_size)
        self._finish(run, _partial(partial_path, run, name))
        compared = None if reference is None else self._compare(reference, max(steps))
        return self._json(self._sweep(run.tally, x, labels, steps, name), compared, gates)

    def side_by_side(
        self, name: str, x: Any, labels: Any, classifier: Any, digest: str, num_torch: int, partial_path: Path
    ) -> dict[str, Any]:
        """PyTorch beside the engine on the first images, and the engine on all."""
        from tetdeploy.export import SideBySide
        from tetdeploy.export.sidebyside import torch_latency
        from tetdeploy.resumable import Pass
        from tetdeploy.sweep import check_images

        engine, steps = self.engine, self.wanted or default_steps(self.engine)
        gates = self._placed(steps, compared=steps)
        check_images(engine, x, labels, max(steps))
        beside = SideBySide(classifier, engine, max(steps))
        run = Pass(
            engine,
            x,
            labels,
            max(steps),
            batch_size=self.batch_size,
            beside=beside,
            num_beside=num_torch or len(x),
        )
        with reused_memory():
            self._finish(run, _partial(partial_path, run, name, checkpoint=digest))
        result = self._json(self._sweep(run.tally, x, labels, steps, name), beside, gates)
        result["agreement"]["checkpoint_sha256"] = digest
        latency = torch_latency(classifier, x, steps)
        result["rows"] = [row | {"torch_latency_ms": latency[row["T"]]} for row in result["rows"]]
        return result

    @property
    def _needs_agreement(self) -> bool:
        return any(gate.key == "agreement" for gate in self.gates)

    def _placed(self, steps: tuple[int, ...], *, compared: Any, accuracy: bool = True) -> list[Gate]:
        """The gates, each at its T; those that could only fail for want of a number are refused before any work."""
        from tetdeploy.energy import uncounted_layers
        from tetdeploy.report.tables import uncounted_note

        gates = place_gates(self.gates, steps, self.trained_T)
        left_out = uncounted_note(uncounted_layers(self.engine.metadata["uncounted"]), self.engine.layout)
        for gate in gates:
            if gate.key == "energy" and left_out:
                raise ValueError(f"--fail-under energy cannot be judged: {left_out[0]}")
            if gate.key == "accuracy" and not accuracy:
                raise ValueError("--fail-under accuracy needs a test set: name one with --data")
            if gate.key == "agreement" and gate.T not in compared:
                raise ValueError(
                    f"--fail-under agreement: the reference holds no T={gate.T}; give another one, agreement=...@T"
                )
        return gates

    def _compare(self, reference: Reference, T: int) -> Any:
        from tetdeploy.agreement import compare_reference

        with image_bar("reference images", len(reference.x)) as tick:
            return compare_reference(self.engine, reference, T, batch_size=self.batch_size, tick=tick)

    def _finish(self, run: Pass, partial: Partial) -> None:
        """Run a pass to its end, with a bar for the images that PyTorch sees too and one for the others."""
        from tetdeploy.resumable import finish

        self.partial = partial
        if self.restart:  # now that nothing can be refused any more
            partial.path.unlink(missing_ok=True)
        kept = partial.load()
        if kept is not None:
            run.restore(kept)
            console.print(f"going on after {run.done:,} of {len(run.x):,} images (--restart begins anew)")
        with progress_bar("images") as bar:
            both = bar.add_task("PyTorch and engine", total=run.num_beside, visible=run.num_beside > 0)
            alone = bar.add_task(self.engine.path.name, total=len(run.x) - run.num_beside)
            bar.update(both, completed=min(run.done, run.num_beside))
            bar.update(alone, completed=max(run.done - run.num_beside, 0))
            finish(run, partial, lambda done: bar.advance(both if run.done <= run.num_beside else alone, done))

    def _sweep(self, tally: Tally, x: Any, labels: Any, steps: tuple[int, ...], name: str) -> Sweep:
        from tetdeploy.sweep import summarise

        return summarise(self.engine, tally, x, labels, steps, data=name)

    def _json(
        self, measured: Sweep, compared: Compared | None, gates: list[Gate], *, labelled: bool = True
    ) -> dict[str, Any]:
        from tetdeploy.agreement import validation

        result = validation(measured, compared, labelled=labelled)
        return result | {"gates": check_gates(gates, result["rows"])}


def _beside(engine: Engine, path: Path, own: str | None, threads: int | None) -> tuple[Any, str]:
    """The classifier of the checkpoint that a model was exported from, and the checkpoint's SHA-256.

    Raises:
        ValueError: it is another one.
    """
    torch = import_extra("torch", "train")
    import_extra("onnxscript", "train")
    from tetdeploy.checkpoint import read_checkpoint

    checkpoint = read_checkpoint(path)
    wanted = engine.metadata["source"].get("checkpoint_sha256") or ""
    if checkpoint.sha256 != wanted:
        beside = checkpoint.file.parent.resolve() == engine.path.parent.resolve()
        raise ValueError(
            f"{engine.path.name} was not exported from {checkpoint.file}: it was made from "
            f"{f'the checkpoint {wanted[:12]}' if wanted else 'a network it does not name'}, this is "
            f"{checkpoint.sha256[:12]} (SHA-256); name that checkpoint, or export this one again: "
            f"{export_again(engine, path) if beside else command_line('export', path)}"
        )
    if threads is not None:
        torch.set_num_threads(threads)
    return load_classifier(checkpoint, own), checkpoint.sha256


def _partial(path: Path, run: Pass, name: str, **settings: str) -> Partial:
    """The file of an unfinished run, with all that decides its result."""
    from tetdeploy import __version__
    from tetdeploy.data.fingerprint import images_sha256
    from tetdeploy.resumable import Partial

    engine = run.engine
    decisive = {"model": engine.sha256, "device": engine.device, "data": name, "images": len(run.x), "T": run.T}
    decisive |= {"runtime": engine.runtime, "tetdeploy": __version__}
    decisive |= {"images_sha256": images_sha256(run.x, run.labels), "torch images": run.num_beside}
    return Partial(path, decisive | settings)
