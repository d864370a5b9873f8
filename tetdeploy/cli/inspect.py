"""`tetdeploy inspect`."""

from __future__ import annotations

from pathlib import Path

import click

from tetdeploy.cli.options import json_option
from tetdeploy.cli.terminal import console
from tetdeploy.storage.files import write_json


@click.command(
    epilog="""\b
Examples:
  tetdeploy inspect runs/r19                          the best weights of a run, and how they were trained
  tetdeploy inspect runs/r19/model-T6.onnx            what it takes and gives, layers, neurons, where it comes from
  tetdeploy inspect model.onnx --json model.json      the same for programs
"""
)
@click.argument("file", type=click.Path(path_type=Path))
@json_option
def inspect(file: Path, json_path: Path | None) -> None:
    """What a checkpoint or an exported model is: how it was made, inputs and outputs, layers, neurons, state.

    FILE is a run folder, a folder of shards, a .safetensors or an .onnx file, also one that another tool wrote, as far
    as it can be read. Needs no torch.
    """
    from tetdeploy.inspection import inspect as describe
    from tetdeploy.report.inspection import inspection_tables

    found = describe(file)
    if json_path is not None:
        write_json(json_path, found)
    for table in inspection_tables(found):
        console.print(table)
    if json_path is not None:
        console.print(str(json_path))
