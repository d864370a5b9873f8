"""examples/benchmarks/memory.py: the loop is the same network, and what it shows is in the right order."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import Mock

import pytest
import torch
from command_helpers import invoke, printed, refused

from tetdeploy.cli.errors import CleanErrors
from tetdeploy.networks import NetworkConfig, build_network
from tetdeploy.train import total_loss

SCRIPT = Path(__file__).parents[1] / "examples" / "benchmarks" / "memory.py"


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("memory_benchmark", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_loop_computes_what_ours_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    loop_twin, gradients = importlib.import_module("peers").loop_twin, []
    x, labels = torch.rand(8, 1, 8, 8), torch.arange(8)
    for twin in (lambda network: network, loop_twin):
        torch.manual_seed(0)
        network = twin(build_network(NetworkConfig("convsnn", 10, 1, (8, 8), width=0.25))).double()
        total_loss(network(x.double(), 3), labels).backward()
        gradients.append([p.grad for p in network.parameters()])
    for ours, loop in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, loop)
    assert gradients[0][0].abs().max() > 0


@pytest.mark.slow
def test_recomputation_and_our_neurons_take_less(tmp_path: Path) -> None:
    options = ["--model", "vggsnn", "--batch-size", "8", "--T", "4", "--device", "cpu", "--repeats", "1"]
    command = [sys.executable, "-W", "error", str(SCRIPT), *options, "--json", str(tmp_path / "m.json")]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr
    assert "vggsnn width 0.25, batch 8 of 32x32, cpu" in result.stdout
    rows = json.loads((tmp_path / "m.json").read_text(encoding="utf-8"))["rows"]
    peak = {(row["neurons"], row["recompute"]): row["peak_mb"] for row in rows}
    assert peak["ours", True] < 0.8 * peak["ours", False] < 0.8 * peak["loop", False]
    assert peak["loop", True] < 0.8 * peak["loop", False]


def test_a_case_that_fails_is_named() -> None:
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--model", "nothing", "--T", "3"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert result.stderr.startswith("Error: T=3, neurons=ours, recompute=False: unknown model 'nothing'; choose one of")
    assert len(result.stderr.splitlines()) == 1


def test_a_case_that_lacks_memory_has_no_numbers_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, file = script(), tmp_path / "m.json"
    told = invoke(command=CleanErrors("m", callback=Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))))

    def ended(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        case = json.loads(command[-1])
        row = {name: case[name] for name in ("T", "neurons", "recompute")}
        if case["T"] == 4 and case["neurons"] == "loop":
            code, said = (-signal.SIGKILL, "") if case["recompute"] else (told.exit_code, told.stderr)
            return subprocess.CompletedProcess(command, code, "", said)
        numbers = row | {"device": "GPU7", "peak_mb": 100.0 * case["T"], "seconds": 0.5}
        return subprocess.CompletedProcess(command, 0, json.dumps(numbers), "")

    monkeypatch.setattr(memory.subprocess, "run", ended)
    done = invoke("--T", "1,2,4", "--json", file, command=memory.main)
    assert done.exit_code == 0, done.output
    last = next(line for line in done.stdout.splitlines() if line.split()[:1] == ["4"])
    assert last.split() == ["4", "400", "0.500", "400", "0.500", *["no", "memory"] * 2]
    assert "at T=2: ours 100%" in done.stdout and "ours 100.0, ours recompute 100.0, loop 100.0" in done.stdout
    *_, first, second = json.loads(file.read_text())["rows"]
    assert first["lacks_memory"].startswith("the memory does not suffice (CUDA out of memory)")
    assert (second["peak_mb"], second["lacks_memory"]) == (None, "its process ended with -9")
    none = invoke("--T", "4", command=memory.main)
    assert none.exit_code == 0 and "at every T a case lacks memory: nothing to compare" in none.stdout


def test_what_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = script()
    monkeypatch.setattr(memory, "in_own_process", lambda case: pytest.fail("measured"))
    (tmp_path / "m.json").write_text("else")
    output = refused("--json", tmp_path / "m.json", command=memory.main)
    assert "m.json: it is there, and something else; choose another with --json" in output


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, MemoryError])
def test_an_end_is_one_line(interrupt: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    memory = script()
    monkeypatch.setattr(memory, "in_own_process", Mock(side_effect=interrupt))
    output = printed(code=130 if interrupt is KeyboardInterrupt else 1, command=memory.main)
    assert len(output.splitlines()) == 1


def test_nothing_is_divided_by_memory_too_little_to_measure() -> None:
    rows = [
        {"T": 1, "neurons": neurons, "recompute": recompute, "peak_mb": 0.0, "seconds": 1.0}
        for neurons in ("ours", "loop")
        for recompute in (False, True)
    ]
    assert script().growth([1], rows) == ["too little memory to compare; take a larger --batch-size"]
