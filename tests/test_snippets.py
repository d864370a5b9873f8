"""The Python that README and docs show, and the README's `curl`: each block runs where a reader would run it."""

from __future__ import annotations

import ast
import builtins
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from client_helpers import triton_client
from command_helpers import printed
from safetensors.torch import load_file
from serve_helpers import start, stop

import tetdeploy
from tetdeploy.data import load_data

ROOT = Path(__file__).parents[1]


def block(document: str, containing: str, language: str = "python") -> str:
    """The one block of a document that has these words."""
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks: list[str] = re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (found,) = [text for text in blocks if containing in text]
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader stands after the README's tour: a run, and its models of T=6 and of one step, calibrated."""
    folder = tmp_path_factory.mktemp("place")
    commands = (
        ("train", "--epochs", "4", "--width", "0.5"),
        ("export", "--T", "6", "--fold-bn", "--check", "64"),
        ("export", "--layout", "step", "--check", "64"),
        ("calibrate", "--T", "8", "--point-estimate"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in commands:
            printed(*command)
    return folder


@pytest.fixture
def images() -> Any:
    return load_data("digits", "test", data_dir=Path("data")).x[:16]


def run(code: str, **names: Any) -> dict[str, Any]:
    exec(compile(code, "document", "exec"), names)
    return names


def test_readme_from_python(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    found = run(block("README.md", "tetdeploy.Engine(").replace("net(torch", "out = net(torch"))
    assert found["result"].logits.shape == (16, 10)
    assert found["result"].per_step.shape == (16, 4, 10)
    assert found["answer"].t == 8
    per_step = found["out"].detach().numpy()
    assert per_step.shape == (6, 16, 10)
    np.testing.assert_allclose(per_step[:4].transpose(1, 0, 2).mean(1), found["result"].logits, atol=1e-2)


def test_early_exit(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place / "runs" / "latest")
    result = run(block("docs/early-exit.md", "load_exit"))["result"]
    assert result.logits.shape == (359, 10)
    assert result.steps.min() < 8  # digits are easy


def test_streams(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "model-step.onnx").symlink_to(place / "runs" / "latest" / "model-step.onnx")
    monkeypatch.chdir(tmp_path)
    found = run(block("docs/streams.md", "stream.reset()"))
    assert found["answer"].logits.shape == (1, 10)
    found = run(block("docs/streams.md", "StreamPool(engine)"), **found)
    assert found["answers"][found["a"]].logits.shape == (10,)
    assert found["pool"].state(found["c"]).t == 1  # it goes on where b stood


def test_a_step_graph_in_plain_onnx_runtime(place: Path, images: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place / "runs" / "latest")
    code = block("docs/exported-model.md", "InferenceSession").replace("np.zeros((8, 1, 8, 8), np.uint8)", "pixels")
    wanted = tetdeploy.Engine("model-step.onnx").run(images, T=6).logits
    np.testing.assert_allclose(run(code, pixels=images)["logits"], wanted, atol=1e-2)


def test_two_networks_on_the_same_images(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    printed("evaluate", place / "runs" / "latest", "--T", "2,4", "--predictions", "first.npz")
    first = dict(np.load("first.npz"))
    right = first["predicted"][0, 1] == first["labels"]
    other = first["predicted"].copy()
    other[0, 1, np.flatnonzero(right)[:9]] = -1
    np.savez("second.npz", **first | {"predicted": other})
    assert run(block("docs/training.md", "binomtest"))["p"] == 2 * 0.5**9
    assert "only the first is right: 9, only the second: 0, p = 0.00391" in capsys.readouterr().out


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")  # snnTorch's
def test_nir_in_snntorch(place: Path, images: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("snntorch.import_nir")
    monkeypatch.chdir(tmp_path)
    run_folder = place / "runs" / "latest"
    printed("export", run_folder, "--format", "nir", "-o", "model.nir")
    code = block("docs/nir.md", "import_from_nir").replace("torch.zeros(8, 1, 8, 8)", "torch.from_numpy(pixels)")
    answer = run(code, pixels=images)["answer"]
    with torch.no_grad():
        ours = tetdeploy.load(run_folder)(torch.from_numpy(images), T=4).mean(0)
    np.testing.assert_allclose(answer, ours, atol=1e-2)


NETWORK = """
from torch import nn
from tetdeploy.layers import DirectEncoding, OverTime, tdBN

def network(num_classes, in_channels, image_size):
    stem = DirectEncoding(nn.Conv2d(in_channels, 4, 3, padding=1), tdBN(4))
    size = 4 * image_size[0] * image_size[1]
    return Network([stem, ATanLIF(), OverTime(nn.Flatten(), nn.Linear(size, num_classes))])

class Network(nn.ModuleList):
    def forward(self, x, T):
        stem, lif, readout = self
        return readout(lif(stem(x, T)))
"""


def test_a_surrogate_of_your_own_has_its_gradient_and_exports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = block("docs/training.md", "class ATanLIF")
    lif = run(code)["ATanLIF"](tau=0.5)
    current = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    spikes = lif(current)
    assert spikes.any() and torch.equal(spikes, lif.eval()(current))
    (gradient,) = torch.autograd.grad(spikes[0].sum(), current)
    torch.testing.assert_close(gradient[0], 1 / (1 + (torch.pi * (current[0] - 1)).square()))
    (tmp_path / "atan_network.py").write_text(code + NETWORK)
    train_and_export("atan_network:network", monkeypatch, tmp_path)


def test_a_leak_that_is_learned_is_exported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = block("docs/training.md", "class ParametricLIF")
    (tmp_path / "atan.py").write_text(block("docs/training.md", "class ATanLIF"))
    (tmp_path / "plif_network.py").write_text(code + NETWORK.replace("ATanLIF", "ParametricLIF"))
    train_and_export("plif_network:network", monkeypatch, tmp_path)
    (w,) = [value for name, value in load_file("r/checkpoint.safetensors").items() if name.endswith("w")]
    tau = float(w.sigmoid())
    assert tau != 0.5
    assert [neuron["tau"] for neuron in tetdeploy.Engine("r/model-T4.onnx").metadata["neurons"]] == [tau]
    lif = run(code)["ParametricLIF"]().eval()
    assert lif.tau == 0.5
    lif.load_state_dict({"w": w})
    assert lif.tau == tau and not lif.training


def train_and_export(model: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(folder)
    for words in (["train", "--epochs", "1", "--out", "r"], ["export", "r", "--check", "64"]):
        output = printed(*words, "--model", model)
        assert "Warning" not in output
    assert "spike mismatch 0.00 ppm" in output


@pytest.mark.parametrize(
    "document", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.stem
)
def test_a_page_defines_the_names_that_it_uses_and_ends_its_loops_for_a_prompt(document: Path) -> None:
    known = set(dir(builtins))
    for code in re.findall(
        r"^```python\n(?!>>>)(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    ):
        # Python 3.12 and earlier, where it is pasted to a prompt, wants a blank line there.
        assert not re.search(r"^ .*\n(?!elif|else|except|finally)\w", code, re.MULTILINE)
        nodes = list(ast.walk(ast.parse(code)))
        imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
        known |= {name.asname or name.name for node in imports for name in node.names}
        known |= {node.name for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        known |= {node.arg for node in nodes if isinstance(node, ast.arg)}
        names = [node for node in nodes if isinstance(node, ast.Name)]
        known |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
        assert not {node.id for node in names} - known


@pytest.fixture
def server(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`tetdeploy serve` answers as the README starts it, but at a free port."""
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    monkeypatch.chdir(place)
    command = re.search(r"^tetdeploy serve (.*?) +#", block("README.md", "load_digits", ""), re.MULTILINE)
    assert command is not None
    server = start(*command[1].split())
    try:
        yield server
    finally:
        stop(server)


def test_a_served_model_is_asked_as_in_the_readme(server: Any) -> None:
    shell = block("README.md", "load_digits", "").partition("\n\n")[2]
    assert shell.startswith("x=$(python")
    shell = shell.replace("127.0.0.1:8080", server.http).replace("$(python", f"$({sys.executable}")
    told = subprocess.run(["bash", "-euc", shell], capture_output=True, text=True, check=True).stdout
    outputs = {output["name"]: output for output in json.loads(told)["outputs"]}
    assert outputs["class"]["data"] == ["0"]  # scikit-learn's first digit
    code = block("README.md", "tritonclient.grpc")
    for protocol, there in (("grpc", server.grpc), ("http", server.http)):
        triton_client(protocol)
        asking = code.replace("tritonclient.grpc as", f"tritonclient.{protocol} as").replace("127.0.0.1:8081", there)
        answer = run(asking)["answer"]
        assert answer.as_numpy("class").shape == (16,)
        assert answer.as_numpy("steps").max() <= 6
