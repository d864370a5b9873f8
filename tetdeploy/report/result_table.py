"""The table that the commands print."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import TextType

_BETWEEN = 3  # characters between two columns of the box below


class ResultTable(Table):
    """A table of which no number is ever cut: where the console is too narrow for all columns, the others go on below,
    beside the labels again. What is in other columns than those of numbers is wrapped or folded first.

    Args:
        headers: of columns of words.
        numbers: headers of the columns of numbers behind them: to the right, and in one line.
        num_labels: the first columns, which say what a row is.
        title: above it, on the left.
    """

    def __init__(
        self, *headers: str, numbers: Iterable[str] = (), num_labels: int = 1, title: TextType | None = None
    ) -> None:
        super().__init__(*headers, box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
        self.num_labels = num_labels
        for header in numbers:
            self.add_column(header, justify="right", no_wrap=True)

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        """A row; a line break in a name, which a foreign file may have, would begin what looks like another one."""
        shown = [cell.replace("\n", "\\n") if isinstance(cell, str) else cell for cell in cells]
        super().add_row(*shown, **options)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths = [_least_width(console, options, column) for column in self.columns]
        for number, chosen in enumerate(self._parts(widths, options.max_width)):
            part = copy(self)
            part.title = None if number else self.title
            part.columns = [
                replace(column, _index=i, min_width=widths[k] if column.no_wrap else None, overflow="fold")
                for i, (k, column) in enumerate((k, self.columns[k]) for k in chosen)
            ]
            yield from super(ResultTable, part).__rich_console__(console, options)

    def _parts(self, widths: Sequence[int], most: int) -> Iterator[list[int]]:
        """The numbers of the columns of each part: the labels, and as many others as fit, but at least one."""
        labels, others = range(self.num_labels), range(self.num_labels, len(widths))
        part = [*labels]
        for k in others:
            if len(part) > len(labels) and sum(widths[j] + _BETWEEN for j in (*part, k)) > most + 1:
                yield part
                part = [*labels]
            part.append(k)
        yield part


def _least_width(console: Console, options: ConsoleOptions, column: Column) -> int:
    """Of a column of numbers the longest one, of others the longest word."""
    unlimited = options.update(max_width=1_000_000)
    cells = (Measurement.get(console, unlimited, cell) for cell in (column.header, *column.cells))
    return max(cell.maximum if column.no_wrap else cell.minimum for cell in cells)
