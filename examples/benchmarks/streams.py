"""Many streams of one model, in a pool: pushes per second, and whether memory stays as it is.

    \b
    python examples/benchmarks/streams.py MODEL.onnx [--streams 1,10,100,1000] [--seconds 10] [--json streams.json]

MODEL is a step-layout export that takes uint8 (`tetdeploy export --layout step`). Each stream begins with a digit of
scikit-learn, scaled to the model's input; at each tick all streams push, half of a directly encoded model's a new image
and half the last one again. `alone` is the same streams one `Stream` each, in turn. RSS is the process's memory at the
beginning, the middle and the end of the ticks; a closing line opens and closes streams at random for as long.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

from tetdeploy import Engine
from tetdeploy.cli.errors import CleanErrors
from tetdeploy.cli.options import ABOVE_0, AT_LEAST_1, Numbers, json_option
from tetdeploy.storage.files import write_json
from tetdeploy.streams import StreamPool

Array = Any
_PAGE = os.sysconf("SC_PAGE_SIZE")


def rss_mb() -> float:
    """Memory of this process now, in MB. Linux only."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE / 1e6


def inputs(engine: Engine) -> Array:
    """1,797 digits as the model's input, `[1797, C, H, W]` uint8."""
    digits = (load_digits().images * (255 / 16)).astype(np.uint8)
    channels, height, width = engine.input_shape
    rows, columns = (np.arange(size) * 8 // size for size in (height, width))
    return np.repeat(digits[:, None, rows][..., columns], channels, axis=1)


def tick(streams: int, number: int, images: Array, direct: bool) -> list[Array | None]:
    """What each stream is shown at this tick."""
    again = [direct and number > 0 and (k + number) % 2 == 0 for k in range(streams)]
    return [None if a else images[(k + 7 * number) % len(images)] for k, a in enumerate(again)]


def run_for(seconds: float, step: Callable[[int], int]) -> dict[str, Any]:
    """Call `step` with 0, 1, 2, ... for so long: pushes a second, and the memory on the way."""
    step(0)
    memory, pushes, number = [rss_mb()], 0, 1
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or number < 3:
        if elapsed > seconds / 2 and len(memory) == 1:
            memory.append(rss_mb())
        pushes += step(number)
        number += 1
    return {"pushes_per_s": pushes / (time.perf_counter() - start), "rss_mb": [*memory, rss_mb()]}


def pooled(engine: Engine, count: int, max_batch: int, images: Array, seconds: float) -> dict[str, Any]:
    pool = StreamPool(engine, max_batch=max_batch)
    ids = [pool.open() for _ in range(count)]
    direct = engine.encoding == "direct"

    def step(number: int) -> int:
        return len(pool.push(dict(zip(ids, tick(count, number, images, direct), strict=True))))

    row = run_for(seconds, step)
    return {"streams": count, "max_batch": max_batch, "state_mb": pool.nbytes / 1e6, **row}


def alone(engine: Engine, count: int, images: Array, seconds: float) -> dict[str, Any]:
    streams = [engine.stream() for _ in range(count)]
    direct = engine.encoding == "direct"

    def step(number: int) -> int:
        for stream, x in zip(streams, tick(count, number, images, direct), strict=True):
            stream.push(None if x is None else x[None])
        return count

    return {"streams": count, "max_batch": None, "state_mb": None, **run_for(seconds, step)}


def churned(engine: Engine, count: int, max_batch: int, images: Array, seconds: float) -> dict[str, Any]:
    """Streams come and go, `count` at most; those that are open push a new image now and then."""
    pool, rng = StreamPool(engine, max_batch=max_batch), np.random.default_rng(0)
    ids: list[int] = []

    def step(number: int) -> int:
        wanted = int(rng.integers(1, count + 1))
        while len(ids) > wanted:
            pool.close(ids.pop(int(rng.integers(len(ids)))))
        while len(ids) < wanted:
            ids.append(pool.open())
        chosen = rng.choice(ids, size=int(rng.integers(1, wanted + 1)), replace=False)
        return len(pool.push({int(k): images[int(k) % len(images)] for k in chosen}))

    return run_for(seconds, step)


@click.command(cls=CleanErrors, help=__doc__)
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--streams", "counts", default="1,10,100,1000", type=Numbers(), show_default=True)
@click.option("--max-batch", "sizes", default="16,64,256", type=Numbers(), show_default=True)
@click.option("--threads", default=1, type=AT_LEAST_1, show_default=True)
@click.option("--seconds", default=10.0, type=ABOVE_0, show_default=True, help="For each line.")
@json_option
def main(
    model: Path, counts: tuple[int, ...], sizes: tuple[int, ...], threads: int, seconds: float, json_path: Path | None
) -> None:
    engine = Engine(model, threads=threads)
    images = inputs(engine)
    table = Table(title=f"{model.name}, {threads} thread{'s' * (threads > 1)}", title_justify="left")
    for header in ("streams", "max batch", "pushes/s", "state MB", "RSS MB: start", "middle", "end"):
        table.add_column(header, justify="right")
    rows = []
    for count in counts:
        rows.append(alone(engine, count, images, seconds))
        rows += [pooled(engine, count, size, images, seconds) for size in sizes if size == sizes[0] or size <= count]
    for row in rows:
        size, state = row["max_batch"], row["state_mb"]
        cells = [f"{row['streams']:,}", "alone" if size is None else str(size), f"{row['pushes_per_s']:,.0f}"]
        cells += ["" if state is None else f"{state:.2f}", *(f"{mb:.1f}" for mb in row["rss_mb"])]
        table.add_row(*cells)
    Console(width=110).print(table)
    churn = churned(engine, max(counts), sizes[-1], images, seconds)
    memory = " ".join(f"{mb:.1f}" for mb in churn["rss_mb"])
    click.echo(
        f"streams that come and go, {max(counts):,} at most: {churn['pushes_per_s']:,.0f} pushes/s, RSS {memory} MB"
    )
    if json_path is not None:
        write_json(json_path, {"model": model.name, "threads": threads, "rows": rows, "churn": churn})


if __name__ == "__main__":
    main()
