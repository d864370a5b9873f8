"""Examples: they run as their own text says."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def test_own_training_loop_learns_the_digits() -> None:
    command = [sys.executable, "-W", "error", str(EXAMPLES / "own_training_loop.py"), "--epochs", "2", "--T", "2"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=ONE_THREAD)
    assert result.returncode == 0, result.stderr
    accuracies = {int(T): float(percent) for T, percent in re.findall(r"T=(\d): accuracy ([\d.]+)%", result.stdout)}
    assert list(accuracies) == [1, 2, 3, 4, 5, 6]
    assert accuracies[2] > 80


@pytest.mark.slow
def test_own_network_goes_the_whole_path_by_the_commands_in_its_text(tmp_path: Path) -> None:
    """The console script in the folder of the module, as the text says; only the training is cut short."""
    shutil.copy(EXAMPLES / "own_network.py", tmp_path)
    text = (tmp_path / "own_network.py").read_text(encoding="utf-8")
    commands = [shlex.split(line) for line in re.findall(r"^    (tetdeploy .*)$", text, re.MULTILINE)]
    assert [command[1] for command in commands] == ["train", "export", "sweep"]
    for command in commands:
        short = ["--epochs", "2"] if command[1] == "train" else []
        script = str(Path(sys.executable).with_name(command[0]))
        result = subprocess.run(
            [script, *command[1:], *short], capture_output=True, text=True, check=False, env=ONE_THREAD, cwd=tmp_path
        )
        assert result.returncode == 0, result.stdout + result.stderr
        if command[1] == "train":
            assert "--model own_network:my_network" in result.stdout.splitlines()[-1]
        if command[1] == "export":
            assert "folded 4 BN | 4 neuron layers" in result.stdout
    sweep = json.loads((tmp_path / "runs" / "own" / "model-T6.sweep.json").read_text(encoding="utf-8"))
    assert [row["T"] for row in sweep["rows"]] == [1, 2, 3, 4, 5, 6]
    assert sweep["rows"][3]["accuracy"] > 0.5
