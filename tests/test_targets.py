"""What goes with what: the table of docs/precision.md and the code say the same."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest
from command_helpers import printed

from tetdeploy.export import ExportConfig
from tetdeploy.export.config import LAYOUTS, PRECISIONS, REFUSED, TARGETS

DOCS = Path(__file__).parents[1] / "docs" / "precision.md"


def table() -> dict[tuple[str, str], str]:
    """The cells of the table by target and precision."""
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    header = next(row for row in rows if row[0] == "target")
    named = [row for row in rows if row[0] in TARGETS]
    return {(row[0], header[k]): row[k] for row in named for k in range(2, len(header))}


def test_the_docs_have_every_combination_and_the_reason_of_every_refusal() -> None:
    cells = table()
    assert set(cells) == set(product(TARGETS, PRECISIONS))
    for combination, cell in cells.items():
        assert cell == (f"no: {REFUSED[combination]}" if combination in REFUSED else "yes")


@pytest.mark.parametrize(("target", "precision"), list(product(TARGETS, PRECISIONS)))
def test_every_layout_is_taken_or_refused_as_the_docs_say(target: str, precision: str) -> None:
    for layout, with_state in [*((layout, False) for layout in LAYOUTS), ("unrolled", True)]:
        options = {"layout": layout, "with_state": with_state, "target": target, "precision": precision}
        if table()[target, precision] == "yes":
            assert ExportConfig(**options).file_name.endswith(  # type: ignore[arg-type]
                ("" if precision == "fp32" else f"-{precision}") + ("" if target == "cpu" else f"-{target}") + ".onnx"
            )
        else:
            with pytest.raises(ValueError, match=f"precision {precision} gains nothing on target {target}: "):
                ExportConfig(**options)  # type: ignore[arg-type]


def test_unknown_names_and_the_command_line() -> None:
    with pytest.raises(ValueError, match="unknown target 'tpu'; choose one of cpu, cuda, tensorrt"):
        ExportConfig(target="tpu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="choose precision fp32, fp16, or for int8 target cpu, tensorrt, tensorrt-rtx"):
        ExportConfig(target="cuda", precision="int8")
    helped = printed("export", "--help")
    assert all(re.search(rf"\b{name}\b", helped) for name in (*TARGETS, *PRECISIONS))
