"""What a report is made of, whatever it is written as: sections of cards, tables, plots and notes."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

NONE = "–"  # what stands for a number that was not measured


@dataclass(frozen=True)
class Card:
    """The headline numbers of one model: `(label, value)` pairs."""

    title: str
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Cards:
    cards: tuple[Card, ...]


@dataclass(frozen=True)
class Table:
    """Cells as text. The first `num_labels` columns are labels, to the left; the others numbers, to the right.

    Attributes:
        marked: indices of rows to stress, the T of the training for instance.
        wide: cells hold long text, hashes for instance, that may be broken anywhere.
    """

    caption: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_labels: int = 1
    marked: frozenset[int] = frozenset()
    wide: bool = False

    def without_empty_columns(self) -> Table:
        """The columns in which something stands: what was not measured is a dash in every row."""
        kept = [k for k in range(len(self.headers)) if any(row[k] != NONE for row in self.rows)]
        rows = tuple(tuple(row[k] for k in kept) for row in self.rows)
        return replace(self, headers=tuple(self.headers[k] for k in kept), rows=rows)


@dataclass(frozen=True)
class Plot:
    """A drawing, as the inside of an HTML page takes it.

    Attributes:
        svg: one `<svg>` element.
        description: what one sees, for those who cannot.
    """

    svg: str
    description: str
    caption: str


@dataclass(frozen=True)
class Row:
    """Side by side where there is room."""

    items: tuple[Plot | Table, ...]


@dataclass(frozen=True)
class Note:
    text: str


Block = Cards | Table | Row | Note


@dataclass(frozen=True)
class Section:
    title: str
    blocks: tuple[Block, ...]

    @property
    def anchor(self) -> str:
        """The name that links in the page use."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Document:
    title: str
    subtitle: str
    sections: tuple[Section, ...]
