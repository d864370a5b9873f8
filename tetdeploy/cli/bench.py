"""`tetdeploy bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tetdeploy.cli.errors import INTERRUPTED, Recorded
from tetdeploy.cli.inputs import load_inputs, note_other_checkpoint
from tetdeploy.cli.options import (
    ABOVE_0,
    AT_LEAST_1,
    ChosenModel,
    Numbers,
    data_dir_option,
    opens_model,
    output_path,
    result_option,
    steps_option,
)
from tetdeploy.cli.terminal import console, print_notes, progress_bar, say_next
from tetdeploy.storage.files import write_json
from tetdeploy.storage.run_folder import CONFIG_NAME
from tetdeploy.wording import counted

if TYPE_CHECKING:
    from tetdeploy.bench import Bench
    from tetdeploy.engine import Engine


@click.command(
    cls=Recorded,
    epilog="""\b
Examples:
  tetdeploy bench                                               the newest export
  tetdeploy bench model-dynamic.onnx --T 1,2,4 --batch 1,16 --threads 1,2,4
  tetdeploy bench MODEL --repeats 1000 --json here.bench.json   as many calls as a 99th percentile wants
  tetdeploy bench MODEL --device cuda --batch 1,64 --cuda-graphs
  tetdeploy bench MODEL --runtime openvino --json openvino.bench.json

\b
Exit codes: 0, 1 an error, 2 wrong usage, 130 Ctrl-C.
""",
)
@click.option("--batch", "batches", default="1,8", show_default=True, type=Numbers(), help="Images a call.")
@click.option(
    "--threads",
    type=Numbers(),
    help="Threads of an operation. [default: 1 and all cores, or what affinity and a CPU quota leave; on a GPU 1]",
)
@steps_option("the graph's, or else the training's")
@click.option("--repeats", type=AT_LEAST_1, help="Timed calls of each setting. [default: by --seconds]")
@click.option(
    "--seconds",
    type=ABOVE_0,
    help="How long all settings together take turns. [default: 10]",
)
@click.option(
    "--data",
    help="A data set's name or FILE.npz. [default: the reference images beside the model, or else noise, which takes "
    "as long, except on CPUs without AMX, where more spikes may take longer]",
)
@click.option("--cuda-graphs", is_flag=True, help="With --device cuda: record each call's kernels, launch them as one.")
@data_dir_option
@opens_model(threads=False)
@result_option(".bench.json")
@click.pass_context
def bench(
    ctx: click.Context,
    chosen: ChosenModel,
    batches: tuple[int, ...],
    threads: tuple[int, ...] | None,
    steps: tuple[int, ...] | None,
    repeats: int | None,
    seconds: float | None,
    data: str | None,
    cuda_graphs: bool,
    data_dir: Path,
    json_path: Path | None,
) -> None:
    """Latency and throughput of an exported model on this machine.

    MODEL is an .onnx file; the newest export by default. Every combination of batch, threads and T is timed, all taking
    turns. Writes MODEL.bench.json, which tetdeploy report shows; after Ctrl-C what was timed, unless an earlier result
    is there. Needs no torch.
    """
    from tetdeploy.bench import Bench
    from tetdeploy.system.machine import usable_cores

    if repeats is not None and seconds is not None:
        raise click.UsageError("--repeats and --seconds exclude each other")
    cores = usable_cores()
    threads = threads or (tuple(sorted({1, cores})) if chosen.device == "cpu" else (1,))
    timing = Bench(
        chosen.path,
        batches=batches,
        threads=threads,
        steps=steps or (),
        device=chosen.device,
        runtime=chosen.runtime,
        cuda_graphs=cuda_graphs,
    )
    note_other_checkpoint(timing.engine)
    named, json_path = json_path is not None, output_path(json_path, timing.engine, ".bench.json")
    if max(threads) > cores:
        console.print(f"{max(threads)} threads on {cores} cores: they will wait for each other", style="yellow")
    name, x = _inputs(timing, data, data_dir)
    interrupted = False
    try:
        _run(timing, x, repeats, seconds)
    except KeyboardInterrupt:
        interrupted = True
    earlier = interrupted and not named and json_path.exists()
    if timing.rows:
        result = timing.to_dict(name) | {"interrupted": interrupted}
        if not earlier:
            write_json(json_path, result)
        print_bench(result, timing.engine)
        console.print(str(json_path))
    if interrupted:
        kept = "that file stays as it was: name another with --json" if earlier else "what was timed until then is kept"
        console.print(f"interrupted; {kept}" if timing.rows else "interrupted")
        ctx.exit(INTERRUPTED)
    if (json_path.parent / CONFIG_NAME).is_file():  # of timings alone there is no report
        say_next("report", json_path.parent)


def _inputs(timing: Bench, data: str | None, data_dir: Path) -> tuple[str, Any]:
    """What the images are called, and as many as the largest batch if there are."""
    from tetdeploy.agreement import load_reference, reference_path
    from tetdeploy.bench import random_input

    largest, T = max(s.batch for s in timing.settings), max(s.T for s in timing.settings)
    if data is not None:
        name, x, _ = load_inputs(timing.engine, data, data_dir, largest)
        return name, x[: len(x)]  # decoded now, if they lie on disk
    if reference_path(timing.engine.path).exists():
        x = load_reference(timing.engine).x[:largest]
        if timing.engine.encoding == "direct" or x.shape[1] >= T:
            return "reference images", x
    return "noise", random_input(timing.engine, T)


def _run(timing: Bench, x: Any, repeats: int | None, seconds: float | None) -> None:
    with progress_bar() as bar:
        task = bar.add_task(f"{timing.engine.path.name}, {len(timing.settings)} settings, %", total=100)
        timing.run(
            x,
            repeats=repeats,
            seconds=seconds or 10.0,
            share_done=lambda share: bar.update(task, completed=round(100 * share)),
        )


def print_bench(result: dict[str, Any], engine: Engine) -> None:
    from tetdeploy.report.tables import bench_table, hardware

    on = result["machine"]
    console.print(f"{result['model']}   {result['size_bytes'] / 1e6:.1f} MB   {engine.layout}   {result['data']}")
    console.print(f"{hardware(on)}, {on['system']}, {on['provider']}")
    console.print(bench_table(result))
    loads = ((entry["load_ms"], counted(entry["threads"], "thread")) for entry in result["load_ms"])
    loading = ", ".join(f"{load_ms:.0f} ms with {threads}" for load_ms, threads in loads)
    notes = [f"times of one call; loading: {loading}"]
    if engine.lacks_native:
        notes.append(f"slower than it could be: {engine.lacks_native}")
    if result["data"] == "noise":
        length = " of so many steps" if engine.encoding == "frames" else ""
        notes.append(
            f"no reference images{length} beside the model: noise takes as long, except on CPUs without AMX, where "
            "more spikes may take longer"
        )
    if engine.is_fixed:
        notes.append(f"an unrolled graph always runs its T={engine.T} steps: a smaller T takes as long")
    if (least := min(row["calls"] for row in result["rows"])) < 100:
        few = f"{counted(least, 'call')} of a setting"
        notes.append(f"{few}: for a 99th percentile time 100 and more (--repeats, --seconds)")
    if (on["load"] or 0) >= 1:
        notes.append(f"{on['load']:.1f} processes were running when this began: an idle machine is faster")
    print_notes(notes)
