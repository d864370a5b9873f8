"""Tables in consoles of any width: numbers are whole, labels are repeated, words are wrapped."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tetdeploy.report.result_table import ResultTable

ROWS = [[f"{'x' * 9}{row}", str(row), *(f"{row}.{column}5 ms" for column in range(6))] for row in range(3)]


def lines(table: ResultTable, width: int, encoding: str = "utf-8") -> list[str]:
    file = io.TextIOWrapper(io.BytesIO(), encoding)
    Console(width=width, file=file, soft_wrap=True, highlight=False).print(table)
    file.seek(0)
    return file.read().splitlines()


def numbers(*, title: str | None = None) -> ResultTable:
    """Two labels and six columns of numbers, 76 characters wide."""
    table = ResultTable(num_labels=2, title=title)
    table.add_column("name")
    for header in ("T", *(f"column\n{k}" for k in range(6))):
        table.add_column(header, justify="right", no_wrap=True)
    for row in ROWS[:2]:
        table.add_row(*row)
    table.add_section()
    table.add_row(*ROWS[2])
    return table


@given(st.integers(20, 130), st.sampled_from(["utf-8", "ascii"]))
def test_no_number_is_cut_and_no_line_too_long(width: int, encoding: str) -> None:
    shown = lines(numbers(), width, encoding)
    text = "\n".join(shown)
    assert "…" not in text
    for row in ROWS:
        for cell in row[1:]:
            assert cell in text
    if width >= 26:  # the labels and one column
        assert all(len(line) <= width for line in shown)
        assert all(ROWS[k][0] in text for k in range(3))


@pytest.mark.parametrize(("width", "parts"), [(75, 2), (76, 1), (60, 2), (40, 3), (26, 6)])
def test_what_does_not_fit_goes_on_below_beside_the_labels(width: int, parts: int) -> None:
    shown = lines(numbers(title="A title"), width)
    labels = [line.split()[:2] for line in shown if line.startswith(f" {'x' * 9}")]
    assert labels == [row[:2] for row in ROWS] * parts
    assert sum("A title" in line for line in shown) == 1


def test_words_are_wrapped_before_columns_go_below() -> None:
    table = ResultTable()
    table.add_column("what")
    table.add_column("ops", no_wrap=True)
    table.add_column("what is counted")
    table.add_row("neurons", "53.8 k", "a few words about that")
    shown = [line.rstrip() for line in lines(table, 33)]
    assert shown[-3:] == [" neurons   53.8 k   a few words", f"{'':20}about that", ""]
