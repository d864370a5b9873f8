"""docs/json.md names every field of what the commands write, and no other one."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_helpers import printed
from export_helpers import convsnn, digits, exported
from report_helpers import run_folder

from tetdeploy.checkpoint import save_checkpoint
from tetdeploy.networks import Classifier, NetworkConfig

PAGE = (Path(__file__).parents[1] / "docs" / "json.md").read_text(encoding="utf-8")
PARTS = {
    "sweep": ("Every measurement", "sweep"),
    "validate": ("Every measurement", "sweep", "validate"),
    "bench": ("Every measurement", "bench"),
    "evaluate": ("evaluate, predict",),
    "early-exit": ("Every measurement", "sweep", "bench", "calibrate, early-exit"),
    "calibrate": ("Every measurement", "calibrate, early-exit"),
}


def named(part: str) -> Iterator[tuple[str, bool]]:
    """The fields in the tables of a part of the page, and whether each is always there."""
    (text,) = re.findall(rf"^## {part}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    for row in re.findall(r"^\| (`.*) \|$", text, re.MULTILINE):
        first, *_, meaning = (cell.strip() for cell in row.split("|"))
        field = ""
        for name in re.findall(r"`([^`]+)`", first):
            field = f"{field.rpartition('.')[0]}{name}" if name.startswith(".") else name
            yield field, not meaning.startswith("where")


def fields(value: Any, at: str = "") -> Iterator[str]:
    """The fields of a result; what is null or empty stands for all below it."""
    entries = value if isinstance(value, list) else []
    if isinstance(value, Mapping) and value:
        for name, child in value.items():
            yield from fields(child, f"{at}.{name}" if at else name)
    elif any(isinstance(entry, Mapping) for entry in entries):
        for entry in entries:
            yield from fields(entry, f"{at}[]")
    else:
        yield at


def covers(name: str, field: str) -> bool:
    return field == name or (name.endswith("*") and field.startswith(name[:-1]))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each command writes, by command."""
    folder = tmp_path_factory.mktemp("results")
    data, snn = digits(), convsnn()
    statistics: dict[str, Any] = {"mean": data.mean, "std": data.std, "class_names": data.class_names}
    config = NetworkConfig("convsnn", 10, 1, (8, 8), width=0.25)
    trained = Classifier(snn.network, config=config, data="digits", **statistics)
    run_folder(folder / "seeds/seed-0")
    for run in ("run", "seeds/seed-0"):
        save_checkpoint(folder / run / "checkpoint.safetensors", trained, training={"T": 2}, provenance={})
    np.savez(folder / "own.npz", images=data.images[:40], labels=data.labels[:40], class_names=data.class_names)
    shutil.copy(exported("step"), folder / "step.onnx")
    model, step, own = (str(folder / name) for name in ("run/model-T2.onnx", "step.onnx", "own.npz"))
    written: dict[str, list[dict[str, Any]]] = {}
    for command, *arguments in (
        ("export", str(folder / "run"), "--check", "20"),
        ("sweep", model, "--data", own),
        ("validate", model),
        ("validate", model, "--data", own, "--against", str(folder / "run"), "--fail-under", "energy=1e9"),
        ("bench", model, "--repeats", "1", "--threads", "1", "--batch", "1"),
        ("calibrate", step, "--data", own, "--T", "2", "--point-estimate"),
        ("early-exit", step, "--data", own),
        ("evaluate", str(folder / "run"), str(folder / "seeds"), "--T", "1", "--limit", "9"),
    ):
        printed(command, *arguments, "--json", folder / "written.json")
        written.setdefault(command, []).append(json.loads((folder / "written.json").read_text()))
    return written


def test_how_the_page_and_results_are_read() -> None:
    assert dict(named("evaluate, predict"))["runs[].accuracy[].accuracy"]
    assert dict(named("sweep"))["layers[].product"] is False
    assert list(fields({"a": [{"b": 1, "c": {}}], "d": None, "e": [1, 2]})) == ["a[].b", "a[].c", "d", "e"]


@pytest.mark.parametrize("command", PARTS)
def test_the_page_names_every_field(command: str, results: dict[str, list[dict[str, Any]]]) -> None:
    page = [name for part in PARTS[command] for name, _ in named(part)]
    for field in {field for result in results[command] for field in fields(result)}:
        below = [name for name in page if name.startswith((f"{field}.", f"{field}[]"))]
        assert below or any(covers(name, field) for name in page), field


@pytest.mark.parametrize("command", ["sweep", "validate", "bench", "evaluate"])
def test_results_have_every_field_of_the_page(command: str, results: dict[str, list[dict[str, Any]]]) -> None:
    found = {field for result in results[command] for field in fields(result)}
    for part in PARTS[command]:
        for name, always in named(part):
            assert not always or any(covers(name, field) for field in found), name
