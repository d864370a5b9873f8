"""A network, its data and its exports, for several test files; each export is made once a session."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from tetdeploy import native
from tetdeploy.data import ImageSet, load_data
from tetdeploy.engine import Engine
from tetdeploy.export import ExportConfig, export_model, model
from tetdeploy.export.onnx_tracer import OnnxTracer
from tetdeploy.layers import DirectEncoding, OverTime, tdBN
from tetdeploy.networks import Classifier, ConvSNN, NetworkConfig
from tetdeploy.neurons import LIF
from tetdeploy.streams import StreamPool
from tetdeploy.tracing import Tracer

_temporary = cache(partial(tempfile.TemporaryDirectory, prefix="tetdeploy-tests-"))


def folder() -> Path:
    """Of this process's exports, made for the first: what imports this, and is killed before that, leaves none."""
    return Path(_temporary().name)


@cache
def digits() -> ImageSet:
    return load_data("digits", "test", data_dir=Path("unused"))


def frames(count: int, T: int) -> np.ndarray[Any, Any]:
    """Real digits as frames `[count, T, 1, 8, 8]`, another digit at each step."""
    images = digits().images
    return np.stack([images[np.arange(count) * 3 + 7 * t] for t in range(T)], axis=1)


def classifier(network: nn.Module) -> Classifier:
    """A classifier of digits in inference, whose BN have seen data and whose affine parameters are not 1 and 0."""
    data = digits()
    config = NetworkConfig("my.networks:odd", num_classes=10, in_channels=1, image_size=(8, 8))
    made = Classifier(network, config=config, mean=data.mean, std=data.std, class_names=data.class_names, data="digits")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for module in made.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.7, 1.5)
                nn.init.uniform_(module.bias, -0.2, 0.3)
                module.momentum = None  # the mean over the batches below
    made.train()
    with torch.no_grad():
        for start in range(0, 192, 64):
            made(torch.from_numpy(data.images[start : start + 64]), 3)
    return made.eval()


@cache
def convsnn() -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return classifier(ConvSNN(num_classes=10, in_channels=1, image_size=(8, 8), width=0.25))


def exported(layout: str, **options: Any) -> Path:
    """The path of `convsnn` as an export; `options` are those of `ExportConfig`."""
    return _exported(ExportConfig(layout=layout, **options))  # type: ignore[arg-type]


@cache
def _exported(config: ExportConfig) -> Path:
    labels = digits().labels[:60] if config.encoding == "direct" else None
    return _export(config, _inputs(config, 60, 9), labels=labels)


def int8_exported(layout: str, **options: Any) -> Path:
    """The same in int8 at T=3; no gate has seen it."""
    return _int8_exported(ExportConfig(layout=layout, T=3, trained_T=3, precision="int8", **options))  # type: ignore[arg-type]


@cache
def _int8_exported(config: ExportConfig) -> Path:
    labels = digits().labels[:64] if config.encoding == "direct" else None
    images = _inputs(config, 64, 3)
    return _export(config, images, num_check=0, calibration=(images, labels))


def _inputs(config: ExportConfig, count: int, T: int) -> np.ndarray[Any, Any]:
    return digits().images[:count] if config.encoding == "direct" else frames(count, T)


def _export(config: ExportConfig, images: np.ndarray[Any, Any], **options: Any) -> Path:
    """To a file whose name says what is not the default."""
    chosen = (f"{f.name}-{getattr(config, f.name)}" for f in fields(config)[1:] if getattr(config, f.name) != f.default)
    path = folder() / f"{'-'.join([config.layout, *chosen])}.onnx"
    with shared_traces():
        return export_model(convsnn(), path, config, images, **options).path


@contextmanager
def shared_traces(*, onnx: bool = True) -> Iterator[None]:
    """Within it no trace is taken twice, whatever target and precision are, of networks whose weights stay.

    Args:
        onnx: nor is one made ONNX twice; not where a test has what lies between changed, as the 8-bit arithmetic.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "Tracer", _shared_tracer)
        if onnx:
            patch.setattr(model, "OnnxTracer", _shared_onnx_tracer)
        yield


_shared_tracer, _shared_onnx_tracer = cache(Tracer), cache(OnnxTracer)


@cache
def engine(layout: str, **options: Any) -> Engine:
    return Engine(exported(layout, **options), threads=1)


def inputs(of: Engine, count: int, T: int) -> np.ndarray[Any, Any]:
    """Images, or frames of T steps, as an export takes them; the caller's own."""
    if of.encoding == "frames":
        return frames(count, T)
    images = digits().images[:count]
    return images.copy() if of.input_dtype == np.uint8 else (images.astype(np.float32) / 255 - 0.3) / 0.4


def pooled(of: Engine, x: np.ndarray[Any, Any], T: int) -> np.ndarray[Any, Any]:
    """The logits of each step `[N, T, K]` of images that a pool is shown together."""
    pool = StreamPool(of)
    ids = [pool.open() for _ in x]
    steps = [pool.push({id: image if t == 0 else None for id, image in zip(ids, x, strict=True)}) for t in range(T)]
    return np.array([[step[id].step_logits for step in steps] for id in ids])


def unchecked(network: nn.Module, path: Path, config: ExportConfig) -> Engine:
    """A network's graph, or a classifier's, which no gate has seen: for networks whose answers do not matter."""
    graph, *_ = model.build_graph(network if isinstance(network, Classifier) else classifier(network), config)
    path.write_bytes(ir.to_proto(graph.model).SerializeToString())
    return Engine(path, threads=1)


needs_torch_2_13 = pytest.mark.skipif(torch.__version__ < "2.13", reason="an earlier PyTorch cannot trace it")

needs_emulator = pytest.mark.skipif(
    shutil.which("qemu-x86_64") is None, reason="qemu-x86_64 (Debian's qemu-user) is not installed"
)


def run_emulated(processor: str, *arguments: object) -> None:
    """Python on another x86-64 processor, which NumPy's OpenBLAS may not be told to take for this one."""
    command = ["qemu-x86_64", "-cpu", processor, sys.executable, *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")}
    subprocess.run(command, check=True, capture_output=True, timeout=1200, env=environment)


def computed(graph: ir.Model, x: np.ndarray[Any, Any]) -> list[Any]:
    """What ONNX Runtime computes of `x`, once ONNX has checked the graph."""
    proto = ir.to_proto(graph)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, {"x": x}))


class SideBySide(nn.Module):
    """Networks of the same input, whose logits are added: one export instead of one for each.

    Args:
        kinds: called with a seed each: of layers with the same weights the exporter would make one.
    """

    def __init__(self, *kinds: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(kind(seed) for seed, kind in enumerate(kinds))

    def forward(self, x: Tensor, T: int) -> Tensor:
        return torch.stack([network(x, T) for network in self.networks]).sum(0)


class LinearTokens(nn.Module):
    """As spiking transformers are written: a linear layer of tokens `[T * N, L, C]`, and a BN of what is transposed."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.encode = DirectEncoding(nn.Conv2d(1, 8, 3, 2, 1, bias=False), tdBN(8))
            self.conv = OverTime(nn.Conv2d(8, 8, 3, padding=1), tdBN(8))
            self.linear, self.bn, self.head = nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.Linear(16, 10)
        self.lif0, self.lif1, self.lif2 = LIF(v_th=0.5), LIF(v_th=0.5), LIF(v_th=0.5)

    def forward(self, x: Tensor, T: int) -> Tensor:
        tokens = self.lif1(self.conv(self.lif0(self.encode(x, T)))).flatten(-2).mT
        current = self.bn(self.linear(tokens.flatten(0, 1)).transpose(-1, -2)).transpose(-1, -2)
        spikes = self.lif2(current.reshape(*tokens.shape[:3], -1).contiguous())
        logits: Tensor = self.head(spikes.mean(2))
        return logits


# Of what a TensorRT engine may hold, for the tests of its builder and of its runner.
LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    ("unrolled", {"T": 3}),
    ("unrolled", {"T": 3, "with_state": True}),
    ("unrolled", {"T": 3, "encoding": "frames"}),
    ("dynamic", {}),
    ("dynamic", {"encoding": "frames"}),
    ("step", {}),
    ("step", {"encoding": "frames"}),
    ("step", {"normalize": False}),
]
layouts = pytest.mark.parametrize(("layout", "options"), LAYOUTS, ids=lambda value: str(value))


def keep_ort_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions of spikes stay ONNX Runtime's; the native ones of float32 have other bits."""
    monkeypatch.setattr(native, "has_tiles", lambda: False)
    monkeypatch.setattr(native, "vector_bytes", lambda: 0)
