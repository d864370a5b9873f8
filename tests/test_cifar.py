"""The whole path on real photographs: some hundred steps on CIFAR-10, where it lies on this machine."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from command_helpers import printed

from tetdeploy.data import load_data, save_npz

DATA = os.environ.get("TETDEPLOY_DATA")


@pytest.mark.slow
@pytest.mark.skipif(DATA is None, reason="TETDEPLOY_DATA names no folder with CIFAR-10")
def test_some_steps_train_export_and_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert DATA is not None
    images = load_data("cifar10", "test", data_dir=Path(DATA))  # the training set takes five times as long to decode
    save_npz(images.select(slice(2_000, 6_000)), "train.npz")
    options = ("--T", "2", "--width", "0.25", "--batch-size", "32", "--augment", "crop-flip", "--lr", "3e-3")
    printed("train", "--data", "train.npz", *options, "--epochs", "1", "--warmup-epochs", "0.2", "--out", "run")
    assert "top-1 agreement" in printed("export", "run", "--T", "4", "--fold-bn", "--check", "200")
    of_test = ("--data", "cifar10", "--data-dir", DATA, "--limit", "1000")
    printed("sweep", "run/model-T4.onnx", *of_test, "--json", "s.json")
    rows = json.loads(Path("s.json").read_text())["rows"]
    assert [row["T"] for row in rows] == [1, 2, 3, 4]
    assert rows[1]["accuracy"] > 0.3  # ten classes: chance is 0.1
    assert 0.01 < rows[1]["firing_rate"] < 0.5
