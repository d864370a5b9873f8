"""Options that take numbers, for benchmarks: what makes no sense is refused before anything is measured."""

from __future__ import annotations

from typing import Any

import click

from tetdeploy.cli.options import FiniteRange

COUNT = click.IntRange(min=1)
ABOVE_0 = FiniteRange(min=0, min_open=True)  # widths, seconds


class Counts(click.ParamType):
    """Whole numbers with commas between them, such as `1,16,64`; a list."""

    name = "numbers"

    def __init__(self, least: int = 1) -> None:
        self.one = click.IntRange(min=least)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        return value if isinstance(value, list) else [self.one.convert(v, param, ctx) for v in value.split(",")]
