"""Examples: they run as their own text says."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_helpers import printed

from tetdeploy.export import preflight

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
        printed(*shlex.split(line))
    sweep = json.loads((tmp_path / "runs" / "own-loop" / "model-T6.sweep.json").read_text(encoding="utf-8"))
    assert sweep["trained_T"] == 2
    assert [100 * row["accuracy"] for row in sweep["rows"]] == pytest.approx([*accuracies.values()], abs=0.5)


def by_script(*arguments: str) -> str:
    """What the console script prints, in the current folder."""
    command = [Path(sys.executable).with_name("tetdeploy"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=ONE_THREAD)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "train_by", "folded", "steps"),
    [("own_network:my_network", by_script, "folded 4 BN | 4 neuron layers", 6),
     ("spikformer:spikformer_2_64", printed, "folded 17 BN | 19 neuron layers", 8)],
)  # fmt: skip
def test_own_networks_go_the_whole_path_by_the_commands_in_their_text(
    model: str,
    train_by: Callable[..., str],
    folded: str,
    steps: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the folder of the module, as the text says; only what they work on is cut short. The training is by the
    console script once, which asks in one more process whether the network exports; each imports torch for seconds."""
    name = model.partition(":")[0]
    shutil.copy(EXAMPLES / f"{name}.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(preflight, "why_not", preflight._answer)
    text = Path(f"{name}.py").read_text(encoding="utf-8")
    train, export, sweep = (shlex.split(line) for line in re.findall(r"^    tetdeploy (.*)$", text, re.MULTILINE))
    assert [train[0], export[0], sweep[0]] == ["train", "export", "sweep"]
    assert f"--model {model}" in train_by(*train, "--epochs", "2", "--T", "2").splitlines()[-1]
    sys.modules.pop(name, None)  # the export imports it by itself
    said = printed(*export, "--check", "64")
    assert folded in said and "will not be counted" not in said
    del sys.modules[name]
    printed(*sweep, "--limit", "64")
    assert name not in sys.modules  # an exported model needs no code
    (written,) = {file.resolve() for file in tmp_path.glob("runs/*/*.sweep.json")}  # runs/latest has it, too
    rows = json.loads(written.read_text(encoding="utf-8"))["rows"]
    assert [row["T"] for row in rows] == [*range(1, steps + 1)]
    assert rows[3]["accuracy"] > 0.5
