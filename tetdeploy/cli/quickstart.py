"""`tetdeploy quickstart`."""

from __future__ import annotations

from pathlib import Path

import click

from tetdeploy import native
from tetdeploy.cli.errors import Recorded
from tetdeploy.cli.export import export
from tetdeploy.cli.options import result_option, runs_option
from tetdeploy.cli.sweep import sweep
from tetdeploy.cli.terminal import console
from tetdeploy.cli.train import train


@click.command(
    cls=Recorded,
    epilog="""\b
Examples:
  tetdeploy quickstart
  tetdeploy quickstart --seed 1 --runs /tmp/runs
""",
)
@click.option("--seed", default=0, show_default=True)
@runs_option
@result_option(".sweep.json")
@click.pass_context
def quickstart(ctx: click.Context, seed: int, runs: Path, json_path: Path | None) -> None:
    """The whole path on small real images: train, fold, export, check, run at T = 1..8.

    Trains a small convolutional SNN with TET at T=4 on scikit-learn's 1,797 scanned digits; works offline.
    """
    native.missing()  # a value of TETDEPLOY_NATIVE that the last step would refuse, before any work
    console.print("1  tetdeploy train", style="bold")
    run = ctx.invoke(train, seed=seed, runs=runs)
    console.print("\n2  tetdeploy export --T 8 --fold-bn", style="bold")
    model = ctx.invoke(export, run=run, T=8)
    console.print("\n3  tetdeploy sweep --T 1:8", style="bold")
    ctx.invoke(sweep, model=model, steps=tuple(range(1, 9)), json_path=json_path)
    console.print(f"\nthe model: {model}")
