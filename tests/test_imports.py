"""What an import pulls in: a serving host has numpy and onnxruntime, and no torch."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from export_helpers import digits, exported
from PIL import Image
from serve_helpers import needs_serve

import tetdeploy
import tetdeploy.export

HEAVY = ("torch", "torchvision", "onnx", "onnxscript", "onnx_ir", "sklearn", "matplotlib", "safetensors", "scipy")
MODULES = [
    "tetdeploy",
    *(
        f"tetdeploy.{name}"
        for name in (
            *("agreement", "bench", "cli", "data", "energy", "engine", "engine_stream", "inspection", "native"),
            *("early_exit.savings", "early_exit.threshold", "measured", "resumable", "serve", "streams", "sweep"),
            "storage.model_file",
            *("report.sweep_plot", "report.tables"),
            *("runtimes.nvidia", "runtimes.onnxruntime_gpu", "runtimes.openvino_session", "runtimes.sessions"),
        )
    ),
]


ABSENT = ("torch", "torchvision", "onnxscript", "onnx_ir", "sklearn", "safetensors", "matplotlib")  # from such a host
ROOT = Path(__file__).parent.parent


def loaded_by(code: str, *arguments: str) -> set[str]:
    """The top-level packages that are loaded after `code` in a process of its own."""
    code += "\nimport json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    command = [sys.executable, "-W", "error", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


IMPORT_EACH = f"""
import importlib, sys
for name in sys.argv[1:]:
    for known in [known for known in sys.modules if known.partition(".")[0] == "tetdeploy"]:
        del sys.modules[known]  # each is imported as the first of them
    importlib.import_module(name)
    assert sys.modules.keys().isdisjoint({HEAVY}), name
"""


def test_importing_loads_nothing_heavy() -> None:
    loaded = loaded_by(IMPORT_EACH, *MODULES)
    assert "tetdeploy" in loaded
    assert loaded.isdisjoint(HEAVY)
    on_a_training_host = loaded_by(IMPORT_EACH, "tetdeploy", "tetdeploy.energy", "tetdeploy.data")
    assert "onnxruntime" not in on_a_training_host


def test_training_and_what_is_asked_before_it_know_nothing_of_reports_and_of_graphs() -> None:
    """And what the tests above look for is seen where it is loaded."""
    heavy = "[name for name in sys.modules if 'tetdeploy.report' in name or name in {'onnx', 'onnxscript', 'onnx_ir'}]"
    code = f"import tetdeploy.train, tetdeploy.export.preflight, sys; assert not {heavy}, {heavy}"
    assert {"torch", "onnx"} <= loaded_by(f"{code}\nfrom tetdeploy.export import export_model")


def test_commands_begin_without_data() -> None:
    code = "import tetdeploy.cli, sys; assert 'tetdeploy.data' not in sys.modules"
    assert loaded_by(code).isdisjoint({*HEAVY, "onnxruntime"})


def test_the_rules_of_early_exit_need_no_engine() -> None:
    code = "import tetdeploy.early_exit, sys; assert 'tetdeploy.engine' not in sys.modules"
    assert loaded_by(code).isdisjoint({*HEAVY, "onnxruntime"})


@pytest.mark.skipif(importlib.util.find_spec("tritonclient") is None, reason="tritonclient is not installed")
def test_engines_and_triton_repositories_need_no_torch() -> None:
    loaded = loaded_by("import tetdeploy.export.tensorrt")
    assert "onnx" in loaded and not loaded & {"torch", "onnxscript", "onnx_ir", "onnxruntime"}
    loaded = loaded_by("import tetdeploy.export.repository")
    assert "onnx" in loaded and not loaded & {"torch", "onnxscript", "onnx_ir", "onnxruntime"}
    loaded = loaded_by("import tetdeploy.runtimes.tensorrt_engine")
    assert not loaded & {"torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "cuda"}


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_running_an_engine_sends_nothing_to_anyone(runtime: str, tmp_path: Path) -> None:
    """Both report home unless told not to (OpenVINO: but in CI), and keep an identifier in the home folder."""
    pytest.importorskip(runtime, reason="openvino is not installed (extra openvino)")
    code = f"import tetdeploy; tetdeploy.Engine({str(exported('dynamic'))!r}, runtime={runtime!r})"
    told = {"ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "CI", "TF_BUILD", "JENKINS_URL"}
    kept = {name: value for name, value in os.environ.items() if name not in told}
    subprocess.run([sys.executable, "-c", code], env=kept | {"HOME": str(tmp_path)}, check=True, timeout=120)
    assert not [*tmp_path.rglob("*onnxruntime*"), *tmp_path.rglob("*openvino*")]


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


def on_a_serving_host(code: str, *arguments: str, folder: Path) -> None:
    """Run `code` in a process in which nothing of ABSENT can be imported."""
    code = f"import sys; sys.modules |= dict.fromkeys({ABSENT})\n{code}"
    command = [sys.executable, "-W", "error", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr


IMPORT_ALL = "import importlib\nfor name in sys.argv[1:]: importlib.import_module(name)"


def modules_below(*folders: str) -> list[str]:
    files = [file for folder in folders for file in sorted((ROOT / "tetdeploy" / folder).rglob("*.py"))]
    return [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]


def test_a_serving_host_runs_every_command_for_models(tmp_path: Path) -> None:
    data = digits()
    Image.fromarray(data.images[0, 0]).save(tmp_path / "a.png")
    names = np.array(data.class_names)
    np.savez(tmp_path / "d.npz", images=data.images[:60], labels=data.labels[:60], class_names=names)
    folders = ("runtimes", "native", "report", "early_exit", "storage", "system")
    model, *modules = str(exported("step")), *modules_below(*folders)
    assert len(modules) > 20
    shutil.copy(model, tmp_path / "m.onnx")
    code = """
from tetdeploy.cli import main
for arguments in (
    "inspect m.onnx", "predict m.onnx a.png", "sweep m.onnx --T 1:3 --data d.npz --json s.json",
    "calibrate m.onnx --data d.npz --T 2 --point-estimate", "early-exit m.onnx --data d.npz",
    "bench m.onnx --batch 1 --repeats 1",
):
    assert main(arguments.split(), standalone_mode=False) in (None, 0), arguments
"""
    on_a_serving_host(IMPORT_ALL + code, *modules, folder=tmp_path)
    assert [row["T"] for row in json.loads((tmp_path / "s.json").read_text())["rows"]] == [1, 2, 3]
    assert (tmp_path / "m.exit.json").exists()


@needs_serve
def test_the_server_needs_no_torch(tmp_path: Path) -> None:
    on_a_serving_host(IMPORT_ALL, *modules_below("serve"), folder=tmp_path)


def test_names_of_the_package_are_found_lazily() -> None:
    code = "import tetdeploy; assert tetdeploy.Engine.__name__ == 'Engine'; assert tetdeploy.__version__"
    assert loaded_by(code).isdisjoint({"torch", "safetensors"})
    with pytest.raises(AttributeError, match="module 'tetdeploy' has no attribute 'Motor'"):
        _ = tetdeploy.Motor


@pytest.mark.parametrize(
    ("folder", "unknown"),
    [
        ("tetdeploy", "train|export|report|cli"),
        ("train", "export|report|cli"),
        ("export", "train|report|cli"),
        ("tetdeploy/report", "cli"),
        ("tetdeploy/storage", r"(?!(storage|system|arguments|energy|wording|__version__)\b)\w+"),
    ],
)
def test_imports_go_one_way(folder: str, unknown: str) -> None:
    """As docs/architecture.md says; what a function imports when it is called counts as well."""
    found = []
    for file in sorted((ROOT / folder).rglob("*.py")):
        if folder == "tetdeploy" and file.relative_to(ROOT).parts[1] in ("cli", "report", "__main__.py"):
            continue
        package = file.relative_to(ROOT).parent.parts
        package = package if package[0] == "tetdeploy" else ("tetdeploy", *package)  # train and export install below it
        names = imported_by(file.read_text(encoding="utf-8"), package)
        found += [f"{file.name}: {name}" for name in names if re.match(rf"tetdeploy\.({unknown})\b", name)]
    assert not found


def test_a_prompt_offers_what_is_imported_late() -> None:
    assert {"Engine", "load", "__version__"} <= set(dir(tetdeploy))
    assert {"ExportConfig", "export_model"} <= set(dir(tetdeploy.export))


@pytest.mark.parametrize("folder", ["train", "export", "tetdeploy/serve"])
def test_a_package_names_its_modules(folder: str) -> None:
    """In the docstring that says what each is for."""
    named = re.findall(r"`(\w+)`", ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text())) or "")
    modules = {file.stem for file in (ROOT / folder).glob("*.py")} - {"__init__"}
    assert modules - set(named) == set()
    assert set(named) - modules <= {"export_model", "serve"}  # a function, an extra


def imported_by(source: str, package: Sequence[str]) -> Iterator[str]:
    """Names of all that a file of `package` imports, relative imports by their whole name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*above, *filter(None, [node.module])])
            yield from (f"{module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def test_relative_imports_have_whole_names() -> None:
    source = "from ..report import page\nfrom . import graph\nfrom .graph import node\nfrom .. import cli\nimport a.b"
    names = ["tetdeploy.report.page", "tetdeploy.export.graph", "tetdeploy.export.graph.node", "tetdeploy.cli", "a.b"]
    assert list(imported_by(source, ("tetdeploy", "export"))) == names
