"""A document as one HTML page, and as Markdown."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib import resources
from itertools import count

from tetdeploy import __version__
from tetdeploy.report.document import Block, Cards, Document, Plot, Row, Section, Table
from tetdeploy.system.extras import import_extra


def to_html(document: Document) -> str:
    """One page without scripts that loads nothing from anywhere. Everything but the plots is escaped.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    jinja2 = import_extra("jinja2", "report")
    source = resources.files("tetdeploy.report").joinpath("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page: str = environment.from_string(source).render(document=_with_own_ids(document), version=__version__)
    return page


def to_markdown(document: Document) -> str:
    """Cards, tables and notes; a Markdown file cannot hold the plots, whose numbers the tables have."""
    parts = [f"# {_plain(document.title)}", _plain(document.subtitle)]
    for section in document.sections:
        blocks = [text for block in section.blocks if (text := _markdown(block))]
        if blocks:
            parts += [f"## {section.title}", *blocks]
    return "\n\n".join(parts) + "\n"


def _with_own_ids(document: Document) -> Document:
    """matplotlib numbers the parts of every figure alike, and an id must be unique in a page."""
    numbers = count(1)

    def own(block: Block) -> Block:
        if not isinstance(block, Row):
            return block
        items = (
            replace(item, svg=_prefixed(item.svg, f"p{next(numbers)}-")) if isinstance(item, Plot) else item
            for item in block.items
        )
        return Row(tuple(items))

    return replace(document, sections=tuple(Section(s.title, tuple(map(own, s.blocks))) for s in document.sections))


def _prefixed(svg: str, prefix: str) -> str:
    svg = re.sub(r'(<[^<>]* id=")', rf"\g<1>{prefix}", svg)
    return re.sub(r'(url\(#|xlink:href="#)', rf"\g<1>{prefix}", svg)


def _markdown(block: Block) -> str:
    if isinstance(block, Table):
        headers = [header or " " for header in block.headers]
        rules = [":--" if k < block.num_labels else "--:" for k in range(len(headers))]
        rows = [
            tuple(cell and f"**{cell}**" for cell in cells) if k in block.marked else cells
            for k, cells in enumerate(tuple(map(_cell, row)) for row in block.rows)
        ]
        return _plain(block.caption) + "\n\n" + _lines([tuple(map(_cell, headers)), tuple(rules), *rows])
    if isinstance(block, Cards):
        labels = list(dict.fromkeys(label for card in block.cards for label, _ in card.facts))
        facts = [dict(card.facts) for card in block.cards]
        head = ("", *(card.title for card in block.cards))
        table = [head, *((label, *(found.get(label, "–") for found in facts)) for label in labels)]
        cells = [tuple(map(_cell, row)) for row in table]
        return _lines([cells[0], (":--", *("--:" for _ in facts)), *cells[1:]])
    if isinstance(block, Row):
        return "\n\n".join(_markdown(item) for item in block.items if isinstance(item, Table))
    return _plain(block.text)


def _lines(rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(text: str) -> str:
    return _plain(text).replace("|", "\\|")


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, as pandoc has it too, on one line: names may hold anything."""
    return re.sub(r"([\\`*_\[\]<>&#~^$])", r"\\\1", " ".join(text.split()))
