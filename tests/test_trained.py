"""The weights in examples/trained: what they are, and the accuracy that the README says of them."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest

import tetdeploy
from tetdeploy.checkpoint import read_metadata
from tetdeploy.data import load_data
from tetdeploy.engine import Engine
from tetdeploy.export import ExportConfig, export_model

ROOT = Path(__file__).parents[1]
RUN = ROOT / "examples" / "trained" / "small-cifar10"
DATA = os.environ.get("TETDEPLOY_DATA")


def said() -> tuple[float, dict[int, float]]:
    """By the README: millions of parameters; and accuracy at each T in float32, in per cent, of 10,000 images."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    about = text[text.index("**CIFAR-10, on a CPU.**") :]
    parameters = re.search(r"\(([\d.]+) M parameters\)", about)
    row = re.search(r"^\| float32 \|(.*)\|$", about, re.MULTILINE)
    assert parameters is not None and row is not None
    return float(parameters[1]), {T: float(cell.strip(" *")) for T, cell in enumerate(row[1].split("|"), 1)}


def test_the_weights_are_those_that_the_readme_and_the_settings_describe() -> None:
    net = tetdeploy.load(RUN)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 2) == said()[0]
    settings, metadata = json.loads((RUN / "config.json").read_text()), read_metadata(RUN)
    assert metadata["network"] == settings["network"]
    assert metadata["training"] == settings["training"]
    assert tuple(net.class_names) == tuple(settings["data"]["class_names"])
    best = metadata["provenance"]
    epochs = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    assert len(epochs) == settings["training"]["epochs"]
    assert best["val_accuracy"] == epochs[best["epoch"] - 1]["val_accuracy"]


@pytest.mark.slow
@pytest.mark.skipif(DATA is None, reason="TETDEPLOY_DATA names no folder with CIFAR-10")
def test_their_accuracy_is_the_readmes(tmp_path: Path) -> None:
    """On 500 of the images, within four standard errors."""
    assert DATA is not None
    test = load_data("cifar10", "test", data_dir=Path(DATA)).select(slice(500))
    made = export_model(tetdeploy.load(RUN), tmp_path / "m.onnx", ExportConfig("dynamic"), test.images, num_check=20)
    right = Engine(made.path).run(test.images, 4).per_step.cumsum(1).argmax(-1) == np.asarray(test.labels)[:, None]
    for T in (1, 4):
        wanted = said()[1][T] / 100
        assert abs(right[:, T - 1].mean() - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / 500)
