"""The weights in examples/trained: what they are, and the accuracy and the energy that the README says of them."""

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
from tetdeploy.data import ImageSet, load_data
from tetdeploy.energy import Operations, layers_of
from tetdeploy.engine import Engine
from tetdeploy.export import ExportConfig, export_model

ROOT = Path(__file__).parents[1]
RUN = ROOT / "examples" / "trained" / "small-cifar10"
DATA = os.environ.get("TETDEPLOY_DATA")


def said(pattern: str) -> str:
    """What the README says of them where it says `pattern`, whose one group it is."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(pattern, text[text.index("**CIFAR-10, on a CPU.**") :], re.MULTILINE)
    assert found is not None, pattern
    return found[1]


def row(name: str) -> dict[int, float]:
    """The table's row of that name, by T: of 10,000 images."""
    cells = said(rf"^\| {name}[^|]*\|(.*)\|$").split("|")
    return {T: float(cell.strip(" *")) for T, cell in enumerate(cells, 1)}


def cifar10() -> ImageSet:
    assert DATA is not None
    return load_data("cifar10", "test", data_dir=Path(DATA))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Checked against PyTorch where there are images."""
    images = np.zeros((1, 3, 32, 32), np.uint8) if DATA is None else cifar10().images[:20]
    path, config = tmp_path_factory.mktemp("exported") / "m.onnx", ExportConfig("dynamic")
    num_check = 0 if DATA is None else len(images)
    return Engine(export_model(tetdeploy.load(RUN), path, config, images, num_check=num_check).path)


def test_the_weights_are_those_that_the_readme_and_the_settings_describe() -> None:
    net = tetdeploy.load(RUN)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 2) == float(said(r"\(([\d.]+) M parameters\)"))
    settings, metadata = json.loads((RUN / "config.json").read_text()), read_metadata(RUN)
    assert metadata["network"] == settings["network"]
    assert metadata["training"] == settings["training"]
    assert tuple(net.class_names) == tuple(settings["data"]["class_names"])
    best = metadata["provenance"]
    epochs = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    assert len(epochs) == settings["training"]["epochs"]
    assert best["val_accuracy"] == epochs[best["epoch"] - 1]["val_accuracy"]


def test_the_energy_of_their_twin_is_the_readmes(exported: Engine) -> None:
    twin = Operations(layers_of(exported.metadata)).ann()
    assert round(twin["energy_pj"] / 1e6) == float(said(r"ANN twin: (\d+)\)"))


@pytest.mark.slow
@pytest.mark.skipif(DATA is None, reason="TETDEPLOY_DATA names no folder with CIFAR-10")
def test_their_accuracy_and_energy_are_the_readmes(exported: Engine) -> None:
    """On 500 of the images, accuracy within four standard errors."""
    test, operations = cifar10().select(slice(500)), Operations(layers_of(exported.metadata))
    result, active = exported.count(test.images, 4)
    right = result.per_step.cumsum(1).argmax(-1) == np.asarray(test.labels)[:, None]
    operations.add(active, 500, 4)
    for T in (1, 4):
        wanted = row("float32")[T] / 100
        assert abs(right[:, T - 1].mean() - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / 500)
        assert operations.at(T).energy_pj / 1e6 == pytest.approx(row("energy in float32")[T], rel=0.02)  # 0.4 % here
