"""What an import pulls in: a serving host has numpy and onnxruntime, and no torch."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from export_helpers import digits, exported

import tetdeploy

HEAVY = ("torch", "torchvision", "onnx", "onnxscript", "onnx_ir", "sklearn", "matplotlib", "safetensors", "scipy")
MODULES = [
    "tetdeploy",
    *(
        f"tetdeploy.{name}"
        for name in (
            *("agreement", "bench", "cli", "data", "energy", "engine", "inspection", "model_file", "native", "report"),
            *("early_exit.calibration", "early_exit.savings", "resumable", "serve", "stream", "streams", "sweep"),
            *("runtimes.nvidia", "runtimes.onnxruntime_gpu", "runtimes.openvino_session", "runtimes.sessions"),
        )
    ),
]


def loaded_by(code: str, *arguments: str) -> set[str]:
    """The top-level packages that are loaded after `code` in a process of its own."""
    code += "\nimport json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    command = [sys.executable, "-W", "error", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_probe_sees_what_is_loaded() -> None:
    assert {"torch", "onnx"} <= loaded_by("from tetdeploy.export import export_model")


@pytest.mark.parametrize("module", MODULES)
def test_importing_loads_nothing_heavy(module: str) -> None:
    loaded = loaded_by(f"import {module}")
    assert "tetdeploy" in loaded
    assert loaded.isdisjoint(HEAVY)


@pytest.mark.parametrize("module", ["tetdeploy", "tetdeploy.energy", "tetdeploy.data"])
def test_a_training_host_needs_no_onnxruntime_for(module: str) -> None:
    assert "onnxruntime" not in loaded_by(f"import {module}")


def test_training_knows_nothing_of_reports() -> None:
    code = "import tetdeploy.train, sys; assert not [name for name in sys.modules if 'tetdeploy.report' in name]"
    assert "torch" in loaded_by(code)


@pytest.mark.skipif(importlib.util.find_spec("tritonclient") is None, reason="tritonclient is not installed")
def test_engines_and_triton_repositories_need_no_torch() -> None:
    loaded = loaded_by("import tetdeploy.export.tensorrt")
    assert "onnx" in loaded and not loaded & {"torch", "onnxscript", "onnx_ir", "onnxruntime"}
    loaded = loaded_by("import tetdeploy.export.repository")
    assert "onnx" in loaded and not loaded & {"torch", "onnxscript", "onnx_ir", "onnxruntime"}
    loaded = loaded_by("import tetdeploy.runtimes.tensorrt_engine")
    assert not loaded & {"torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "cuda"}


def test_running_an_engine_loads_no_torch(tmp_path: Path) -> None:
    images = tmp_path / "images.bin"
    images.write_bytes(digits().images[:4].tobytes())
    code = """
import sys
import numpy as np
from tetdeploy import Engine
from tetdeploy.energy import Layer, Operations
x = np.fromfile(sys.argv[2], np.uint8).reshape(4, 1, 8, 8)
engine = Engine(sys.argv[1])
assert engine.run(x, T=3).per_step.shape == (4, 3, 10)
operations = Operations(tuple(Layer.from_dict(layer) for layer in engine.metadata["layers"]))
operations.add(engine.count(x, 3)[1], 4, 3)
assert operations.at(3).energy_pj > 0
stream = engine.stream(batch=4)
assert stream.push(x).t == 1 and stream.push().t == 2
"""
    loaded = loaded_by(code, str(exported("step")), str(images))
    assert "onnxruntime" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_names_of_the_package_are_found_lazily() -> None:
    code = "import tetdeploy; assert tetdeploy.Engine.__name__ == 'Engine'; assert tetdeploy.__version__"
    assert loaded_by(code).isdisjoint({"torch", "safetensors"})
    with pytest.raises(AttributeError, match="module 'tetdeploy' has no attribute 'Motor'"):
        _ = tetdeploy.Motor


ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("folder", "unknown"),
    [
        ("tetdeploy", "train|export|report|cli"),
        ("train", "export|report|cli"),
        ("export", "train|report|cli"),
        ("tetdeploy/report", "cli"),
    ],
)
def test_imports_go_one_way(folder: str, unknown: str) -> None:
    """As docs/architecture.md says; what a function imports when it is called counts as well."""
    found = []
    for file in sorted((ROOT / folder).rglob("*.py")):
        if folder == "tetdeploy" and file.relative_to(ROOT).parts[1] in ("cli", "report", "__main__.py"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [f"{node.module}.{name.name}" for name in node.names] if isinstance(node, ast.ImportFrom) else []
            names += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            found += [f"{file.name}: {name}" for name in names if re.match(rf"tetdeploy\.({unknown})\b", name)]
    assert not found
