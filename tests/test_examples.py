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
from click.testing import CliRunner

from tetdeploy.cli import main

EXAMPLES = Path(__file__).parents[1] / "examples"
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def test_own_training_loop_learns_the_digits_and_ends_with_what_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-W", "error", str(EXAMPLES / "own_training_loop.py"), "--epochs", "2", "--T", "2"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=ONE_THREAD, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    accuracies = {int(T): float(percent) for T, percent in re.findall(r"T=(\d): accuracy ([\d.]+)%", result.stdout)}
    assert list(accuracies) == [1, 2, 3, 4, 5, 6]
    assert accuracies[2] > 80
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    text = (EXAMPLES / "own_training_loop.py").read_text(encoding="utf-8")
    for line in re.findall(r"^    tetdeploy (.*)$", text, re.MULTILINE):
        done = CliRunner().invoke(main, shlex.split(line))
        assert done.exit_code == 0, done.output
    sweep = json.loads((tmp_path / "runs" / "own-loop" / "model-T6.sweep.json").read_text(encoding="utf-8"))
    assert sweep["trained_T"] == 2
    assert [100 * row["accuracy"] for row in sweep["rows"]] == pytest.approx([*accuracies.values()], abs=0.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "folded", "steps"),
    [("own_network:my_network", "folded 4 BN | 4 neuron layers", 6),
     ("spikformer:spikformer_2_64", "folded 17 BN | 19 neuron layers", 8)],
)  # fmt: skip
def test_own_networks_go_the_whole_path_by_the_commands_in_their_text(
    model: str, folded: str, steps: int, tmp_path: Path
) -> None:
    """The console script in the folder of the module, as the text says; only the training is cut short."""
    module = f"{model.partition(':')[0]}.py"
    shutil.copy(EXAMPLES / module, tmp_path)
    text = (tmp_path / module).read_text(encoding="utf-8")
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
            assert f"--model {model}" in result.stdout.splitlines()[-1]
        if command[1] == "export":
            assert folded in result.stdout and "will not be counted" not in result.stdout
    (written,) = {file.resolve() for file in tmp_path.glob("runs/*/*.sweep.json")}  # runs/latest has it, too
    sweep = json.loads(written.read_text(encoding="utf-8"))
    assert [row["T"] for row in sweep["rows"]] == [*range(1, steps + 1)]
    assert sweep["rows"][3]["accuracy"] > 0.5
