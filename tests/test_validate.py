"""The sweep against counts made by hand, and how numbers of steps are typed."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from export_helpers import digits, exported
from PIL import Image
from rich.console import Console

from tetdeploy.engine import Engine
from tetdeploy.report import count, energy, plot_sweep, sweep_table
from tetdeploy.validate import parse_steps, sweep


@pytest.mark.parametrize(
    ("text", "steps"), [("6", (6,)), ("1:4", (1, 2, 3, 4)), ("4,1,2", (1, 2, 4)), ("1:3,2:5", (1, 2, 3, 4, 5))]
)
def test_steps_as_typed(text: str, steps: tuple[int, ...]) -> None:
    assert parse_steps(text) == steps


@pytest.mark.parametrize("text", ["", "x", "1:", ":3", "1-4", "0", "0:3", "4:1", "-1", "1:300000000", "2.5"])
def test_steps_that_do_not_parse(text: str) -> None:
    with pytest.raises(ValueError, match="T must"):
        parse_steps(text)


@pytest.mark.parametrize("layout", ["unrolled", "dynamic", "step"])
def test_a_sweep_is_what_single_runs_give(layout: str) -> None:
    engine = Engine(exported(layout))
    data = digits()
    x, labels = data.images[:70], data.labels[:70]
    seen: list[int] = []
    result = sweep(engine, x, labels, (1, 3), data="digits", batch_size=32, num_timed=1, tick=seen.append)
    assert sum(seen) == result.num_samples == 70
    for row in result.rows:
        run, counts = engine.count(x, row.T)
        assert row.accuracy == np.mean(run.logits.argmax(-1) == labels)
        fired = sum(counts[f"fired.{n['name']}"].sum() for n in engine.metadata["neurons"])
        neurons = sum(np.prod(n["shape"]) for n in engine.metadata["neurons"])
        assert row.firing_rate == pytest.approx(fired / (neurons * row.T * 70))
        assert row.latency_ms > 0
    assert result.rows[0].ac_ops < result.rows[1].ac_ops
    assert result.rows[1].mac_ops == pytest.approx(3 * result.rows[0].mac_ops)


def test_labels_that_do_not_fit() -> None:
    engine = Engine(exported("unrolled"))
    x = digits().images[:4]
    with pytest.raises(ValueError, match="every image needs a label: 4 images, 3 labels"):
        sweep(engine, x, np.zeros(3, np.int64), (1,))
    with pytest.raises(ValueError, match=r"labels run from 0 to 10, but .* has 10 classes"):
        sweep(engine, x, np.array([0, 1, 2, 10]), (1,))
    with pytest.raises(ValueError, match="batch_size and num_timed must be at least 1"):
        sweep(engine, x, np.zeros(4, np.int64), (1,), num_timed=0)


def test_engineering_units() -> None:
    assert [count(n) for n in (0, 12, 1_234, 5_678_000, 2.2e9)] == ["0", "12", "1.23 k", "5.68 M", "2.2 G"]
    assert [energy(pj) for pj in (0.5, 900, 1.92e6, 3e9)] == ["0.5 pJ", "900 pJ", "1.92 µJ", "3 mJ"]


def test_the_table_marks_the_trained_T_and_the_plot_is_a_picture(tmp_path: Path) -> None:
    engine = Engine(exported("unrolled"))
    data = digits()
    result = sweep(engine, data.images[:20], data.labels[:20], (1, 2, 3), num_timed=1)
    console = Console(width=80, file=io.StringIO())
    console.print(sweep_table(result, 2))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "2*" in text
    assert "…" not in text  # nothing is cut at 80 columns
    picture = tmp_path / "plot.png"
    plot_sweep(result, picture, 2)
    with Image.open(picture) as image:
        assert min(image.size) > 400
