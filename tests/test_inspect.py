"""inspect: what it says of checkpoints, models and files of others agrees with the files; what it refuses."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from command_helpers import printed, refused
from export_helpers import convsnn, digits, exported, shared_traces
from onnx import TensorProto, helper
from rich.table import Table
from safetensors.torch import save_file
from test_imports import HEAVY, loaded_by

from tetdeploy.checkpoint import save_checkpoint
from tetdeploy.energy import Layer
from tetdeploy.export import ExportConfig, export_model
from tetdeploy.export.sequence_graph import sequence_graph
from tetdeploy.inspection import _layer, _type, inspect
from tetdeploy.report.inspection import inspection_tables, size
from tetdeploy.storage.tensor_file import write_tensors
from tetdeploy.system.standard_output import StandardOutput

TRAINING = {"T": 3, "epochs": 2, "tit": "", "loss": "tet", "lam": 0.05, "optimizer": "adamw", "lr": 0.002, "seed": 7}
PROVENANCE = {"versions": {"torch": "2.13"}, "created": "2026-01-02T03:04:05", "epoch": 2, "val_accuracy": 0.9321}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("run") / "checkpoint.safetensors"
    save_checkpoint(file, convsnn(), training=TRAINING, provenance=PROVENANCE)
    return file


def shown(found: dict[str, Any], width: int = 100) -> str:
    console = StandardOutput(width=width, file=io.StringIO())
    for table in inspection_tables(found):
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def rows(table: Table) -> list[tuple[str, ...]]:
    return list(zip(*([str(cell) for cell in column.cells] for column in table.columns), strict=True))


def safetensors(
    path: Path, shapes: dict[str, list[int]], metadata: dict[str, str] | None = None, dtype: str = "F16"
) -> Path:
    """A file of zeros, two bytes each, written by hand."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))
    return path


def relu(path: Path, names: Sequence[str] = "xy") -> Path:
    """An ONNX model of somebody else."""
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3]) for name in names]
    graph = helper.make_graph([helper.make_node("Relu", names[:1], names[1:])], "theirs", ports[:1], ports[1:])
    opsets = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="[bold]them[/x]")
    onnx.save(model, path)
    return path


class TestCheckpoint:
    def test_parameters_are_those_of_the_network(self, checkpoint: Path) -> None:
        found = inspect(checkpoint)
        network = convsnn().network
        assert found["kind"] == "checkpoint"
        assert found["parameters"] == sum(p.numel() for p in network.parameters())
        assert found["training"] == TRAINING
        modules = dict(network.named_modules())
        types = {torch.nn.Conv2d: "convolution", torch.nn.BatchNorm2d: "batch norm", torch.nn.Linear: "linear"}
        kinds = {name: kind for name, m in modules.items() for type_, kind in types.items() if isinstance(m, type_)}
        assert {layer["name"]: layer["type"] for layer in found["layers"]} == kinds
        for layer in found["layers"]:
            module = modules[layer["name"]]
            assert layer["shape"] == list(module.weight.shape)
            assert layer["bias"] == (module.bias is not None)

    def test_a_run_folder_is_its_checkpoint(self, checkpoint: Path) -> None:
        assert inspect(checkpoint.parent) == inspect(checkpoint)

    def test_table(self, checkpoint: Path) -> None:
        text = shown(inspect(checkpoint))
        assert max(map(len, text.splitlines())) <= 100
        for part in ("T=3, 2 epochs, TET λ=0.05", "epoch 2, validation accuracy 93.21%", "my.networks:odd", "16×8×3×3"):
            assert part in text, part
        for part in ("digits, images [1, 8, 8]", "10: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 ", "03:04:05 on ? with torch 2.13"):
            assert part in text, part

    def test_state_of_a_run(self, tmp_path: Path) -> None:
        file = tmp_path / "last.safetensors"
        tensors = {"network.conv.weight": torch.zeros(4, 1, 3, 3), "optimizer.0": torch.zeros(4)}
        best = {"epoch": 2, "stage": 1, "val_accuracy": 0.5, "val_loss": math.nan}
        position = {"epoch": 2, "step": 5, "seconds": 0.5, "best": best, "precision": "fp32", "scaler": {}}
        write_tensors(file, tensors, {"format": 1, "resume": position})
        found = inspect(file)
        assert (found["kind"], found["parameters"], found["num_tensors"]) == ("training state", 36, 2)
        assert "2 epochs and 5 steps finished" in shown(found)

    def test_layers_go_by_number(self, tmp_path: Path) -> None:
        file = safetensors(tmp_path / "a.safetensors", {f"blocks.{k}.weight": [2, 2] for k in (10, "norm", 9, 1)})
        assert [layer["name"] for layer in inspect(file)["layers"]] == [f"blocks.{k}" for k in (1, 9, 10, "norm")]


class TestModel:
    @pytest.mark.parametrize("layout", ["unrolled", "dynamic", "step"])
    def test_inputs_layers_and_neurons(self, layout: str) -> None:
        found = inspect(exported(layout))
        assert (found["kind"], found["layout"], found["precision"]) == ("model", layout, "fp32")
        assert "counting_overlay" not in found
        inputs = {port["name"]: port for port in found["inputs"]}
        assert inputs["x"] == {"name": "x", "shape": ["batch", 1, 8, 8], "dtype": "uint8"}
        for neuron in found["neurons"]:
            assert neuron["size"] == np.prod(neuron["shape"])
            if layout == "step":
                assert inputs[neuron["state"]]["shape"][1:] == list(neuron["shape"])
            else:
                assert neuron["state"] is None
        convolutions = [m for m in convsnn().modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
        assert [layer["weights"] for layer in found["layers"]] == [m.weight.numel() for m in convolutions]
        assert [layer["input"] for layer in found["layers"]] == ["image", "spikes", "spikes", "spikes"]
        assert found["num_weights"] == sum(m.weight.numel() for m in convolutions)
        assert found["num_neurons"] == sum(neuron["size"] for neuron in found["neurons"])

    def test_what_is_said_of_a_layer(self) -> None:
        padded = {"strides": (2, 2), "pads": ((1, 1), (1, 1)), "dilations": (1, 1)}
        layer = Layer("c", (4, 6, 6), 8, from_input=False, binary=False, kernel=(3, 3), precision="int8", **padded)
        assert _layer(layer) == {
            "name": "c",
            "type": "convolution",
            "input_shape": [4, 6, 6],
            "input": "analogue",
            "outputs": 8,
            "kernel": [3, 3],
            "precision": "int8",
            "strides": [2, 2],
            "weights": 4 * 8 * 9,
            "fan_out": pytest.approx(8 * 64 / 36),  # of the 9 outputs at each place, 4, 6 or 9 of a value's
            "dense_ops": 4 * 8 * 64,
            "once": False,
        }
        of_frames = _layer(replace(layer, from_input=True))
        assert (of_frames["input"], of_frames["once"]) == ("image", False)
        assert _layer(replace(layer, once=True))["once"] and _layer(replace(layer, binary=True))["input"] == "spikes"
        kinds = ["linear", "convolution 1d", "convolution", "convolution 3d", "other"]
        assert [_type(False, {"weight": [1] * axes}) for axes in (2, 3, 4, 5, 6)] == kinds

    def test_json_can_be_written_and_tables_fit_100_columns(self) -> None:
        found = inspect(exported("step"))
        assert json.loads(json.dumps(found))["kind"] == "model"
        text = shown(found)
        assert max(map(len, text.splitlines())) <= 100
        assert "…" not in text
        for part in ("step, T=1", "u.lif1", "[batch, 1, 8, 8]", "folded into the convolutions (Eq. 6)"):
            assert part in text, part

    def test_a_model_that_was_never_compared_says_so(self, tmp_path: Path) -> None:
        told = []
        for num_check in (0, 4):
            file = tmp_path / f"{num_check}.onnx"
            with shared_traces():
                options: dict[str, Any] = {"num_check": num_check, "source": {"loss": math.inf}}
                found = export_model(convsnn(), file, ExportConfig(T=4), digits().images[:4], **options)
            assert inspect(file)["source"] == {"loss": None}
            assert (found.parity is None, inspect(file)["checked"]) == (num_check == 0, num_check > 0)
            told.append([line for line in shown(inspect(file)).splitlines() if "compared with PyTorch" in line])
        (never,), (before,) = ([line.rstrip() for line in lines] for lines in told)
        assert never.endswith("no (--check 0); tetdeploy validate does so") and before.endswith("before it was written")
        earlier = {name: value for name, value in inspect(file).items() if name != "checked"}
        assert "compared with PyTorch" not in shown(earlier)

    def test_a_step_graph_for_triton(self, tmp_path: Path) -> None:
        step = onnx.load(exported("step"))
        graph = sequence_graph(step, json.loads(step.metadata_props[0].value))
        onnx.save(graph, tmp_path / "model.onnx")
        found = inspect(tmp_path / "model.onnx")
        assert (found["kind"], found["layout"]) == ("model", "sequence")
        assert {"sequence.t", "sequence.shown", "u.lif1"} <= {port["name"] for port in found["inputs"]}
        assert "sequence, T=1" in shown(found)

    def test_loads_nothing_heavy(self, checkpoint: Path) -> None:
        code = "import sys\nfrom tetdeploy.inspection import inspect\nfor path in sys.argv[1:]: inspect(path)"
        assert loaded_by(code, str(checkpoint), str(exported("unrolled"))).isdisjoint(HEAVY)


FILE = {"path": "m", "size_bytes": 1234, "sha256": "own"}
MODEL: dict[str, Any] = FILE | {"kind": "model", "layout": "dynamic", "T": None, "trained_T": 7, "encoding": "direct"}
MODEL |= {"normalization": None, "input": {"shape": [1, 8, 8], "dtype": "uint8"}, "class_names": ["a"]}
MODEL |= {"num_neurons": 5, "fires": "u > v_th", "reset": "to 0", "num_weights": 9, "precision": "int8"}
MODEL |= {"fold_bn": False, "uncounted": ["pool"], "created": "now", "versions": {"torch": "9"}}
MODEL |= {
    "source": {"checkpoint_sha256": "trained", "network": {"model": "vggsnn", "width": 0.5, "tau": 0.25, "v_th": 2.0}},
    "inputs": [{"name": "x", "shape": ["n", None], "dtype": "uint8"}],
    "outputs": [{"name": "y", "shape": ["n", 2], "dtype": "float32"}],
    "layers": [
        {"name": "c", "input": "image", "once": True, "input_shape": [1, 8, 8], "kernel": [3, 5], "strides": [2, 1]}
        | {"outputs": 1000, "weights": 2000, "precision": "int8", "fan_out": 1.5, "dense_ops": 3e6},
        {"name": "f", "input": "spikes", "once": False, "input_shape": [4], "kernel": [], "strides": []}
        | {"outputs": 2, "weights": 8, "precision": "fp32", "fan_out": 2.0, "dense_ops": 8},
    ],
    "neurons": [
        {"name": "lif1", "state": "u.lif1", "tau": 0.25, "v_th": 2.0, "shape": [4, 8], "size": 32},
        {"name": "lif2", "state": None, "tau": 0.5, "v_th": 1.0, "shape": [2], "size": 2},
    ],
}
STATE: dict[str, Any] = FILE | {"kind": "training state", "parameters": 1, "num_tensors": 2}
OWN = {"network": {"model": "nets:mine", "tau": 0.5}}
TIT = {"training": TRAINING | {"loss": "sdt", "tit": "2:3"}}
BEST = {"epoch": 2, "val_accuracy": 0.5}
PARENT = {"path": "runs/old", "checkpoint_sha256": "abcd"}


class TestTables:
    """Made-up descriptions: every number is where its label says."""

    def test_of_what_a_model_that_does_not_normalise_takes(self) -> None:
        data = {"mean": [0.5, 0.25], "std": [1, 2]}
        model = MODEL | {"source": MODEL["source"] | {"data": data}}
        facts, *_ = map(rows, inspection_tables(model))
        asked = "the input is (pixel / 255 - mean) / std of each channel, mean 0.5, 0.25, std 1, 2"
        assert ("input", f"[1, 8, 8] uint8; normalised no: {asked}") in facts

    def test_of_a_model(self) -> None:
        facts, ports, layers, neurons = map(rows, inspection_tables(MODEL))
        assert facts == [
            ("what", "a model that tetdeploy exported"),
            ("file", "m   1.23 kB"),
            ("SHA-256", "own"),
            ("layout", "dynamic, T free; trained at T=7; direct encoding"),
            ("input", "[1, 8, 8] uint8; normalised no: the input is normalised already"),
            ("classes", "1: a"),
            ("neurons", "5; fire at u > v_th; reset to 0"),
            ("weights", "9 of convolutions and linear layers, int8 and fp32"),
            ("BN", "not folded"),
            ("operations not counted", "pool"),
            ("exported", "now with torch 9"),
            ("from checkpoint", "trained"),
            ("network", "vggsnn, width 0.5; tau 0.25, v_th 2"),
        ]
        assert ports == [("input", "x", "[n, ?]", "uint8"), ("output", "y", "[n, 2]", "float32")]
        assert layers == [
            ("c", "image, once", "[1, 8, 8]", "3×5", "2×1", "1,000", "2,000 int8", "1.5", "3 M"),
            ("f", "spikes", "[4]", "–", "–", "2", "8", "2", "8"),
        ]
        assert neurons == [
            ("lif1", "u.lif1", "0.25", "2", "[4, 8]", "32"),
            ("lif2", "none: starts at 0", "0.5", "1", "[2]", "2"),
        ]

    @pytest.mark.parametrize(
        ("found", "label", "value"),
        [
            (MODEL | {"normalization": {"mean": [0]}}, "input", "[1, 8, 8] uint8; normalised inside the graph"),
            (MODEL | {"class_names": range(11)}, "classes", "11: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, …"),
            (MODEL | {"source": OWN}, "network", "nets:mine"),
            (MODEL | {"source": {"network": OWN["network"] | {"ann": True}}}, "network", "nets:mine, ANN twin"),
            (MODEL | {"source": {"network": {"model": None, "tau": 0.5}}}, "network", "?, width 1; tau 0.5"),
            (MODEL | {"source": {"data": {"name": "x", "class_names": None}}}, "data", "x, images []"),
            (MODEL | {"source": {"training": {"loss": "tet", "lam": None}}}, "training", "T=None, None epochs, TET"),
            (
                MODEL | {"source": {"training": {"T": 2, "epochs": 9, "loss": "sdt", "switch_to_tet": 3, "lam": 0.05}}},
                "training",
                "T=2, 9 epochs, SDT for 3 epochs, then TET λ=0.05",
            ),
            (
                MODEL | {"source": {"training": TRAINING | {"random_T": "1:6"}}},
                "training",
                "T drawn from 1:6, validated at T=3, 2 epochs, TET λ=0.05, optimizer adamw, lr 0.002, seed 7",
            ),
            (MODEL | {"source": TIT}, "training", "TIT 2:3, SDT, optimizer adamw, lr 0.002, seed 7"),
            (
                MODEL | {"source": {"training": TRAINING | {"qat": True}}},
                "training",
                "T=3, 2 epochs, TET λ=0.05, optimizer adamw, lr 0.002, seed 7, fine-tuned in 8 bits (--qat)",
            ),
            (MODEL | {"source": {"provenance": {"init": PARENT}}}, "began with", "runs/old, checkpoint abcd"),
            (MODEL | {"source": {"provenance": BEST | {"epoch": 0}}}, "kept", "epoch 0, validation accuracy 50.00%"),
            (MODEL | {"source": {"provenance": {"created": "then"}}}, "trained", "then on ? with unknown versions"),
            (STATE | {"resume": {"epoch": 9, "step": 5}}, "best epoch", "none yet"),
            (
                STATE | {"resume": {"epoch": 9, "step": 5, "best": BEST}},
                "best epoch",
                "2, 50.00% of validation images right",
            ),
        ],
    )
    def test_of_how_it_was_trained(self, found: dict[str, Any], label: str, value: str) -> None:
        assert dict(rows(next(inspection_tables(found))))[label] == value

    def test_of_modules(self, tmp_path: Path) -> None:
        found = inspect(safetensors(tmp_path / "m.safetensors", {"m.weight": [2, 3], "m.bias": [2]}, dtype="BF16"))
        assert rows([*inspection_tables(found)][-1]) == [("m", "linear", "bfloat16", "2×3", "yes", "8")]
        save_file({"bn.weight": torch.ones(2), "bn.num_batches_tracked": torch.tensor(0)}, tmp_path / "bn.safetensors")
        found = inspect(tmp_path / "bn.safetensors")
        assert rows([*inspection_tables(found)][-1]) == [("bn", "other", "float32", "2", "no", "2")]


class TestOthers:
    def test_safetensors(self, tmp_path: Path) -> None:
        shapes = {"a.weight": [2, 3], "a.bias": [2], "[bold]alone[/x]": [5]}
        found = inspect(safetensors(tmp_path / "a.safetensors", shapes, {"made": "[red]by hand"}))
        assert (found["kind"], found["parameters"]) == ("safetensors", 13)
        assert {layer["dtype"] for layer in found["layers"]} == {"float16"}
        assert ("parameters", "13") in rows(next(inspection_tables(found)))
        text = shown(found)
        assert "[bold]alone[/x]" in text  # as it is: no markup
        assert "made=[red]by hand" in text

    def test_onnx(self, tmp_path: Path) -> None:
        found = inspect(relu(tmp_path / "a.onnx"))
        assert (found["kind"], found["producer"]) == ("onnx", "[bold]them[/x]")
        assert found["inputs"] == [{"name": "x", "shape": ["n", 3], "dtype": "float32"}]
        assert "[bold]them[/x]" in shown(found)

    def test_a_line_break_in_a_name_makes_no_row(self, tmp_path: Path) -> None:
        file = relu(tmp_path / "a.onnx", names=("x\n         z", "y"))
        *_, first, second = map(str.split, shown(inspect(file)).strip().splitlines())
        assert (first[:2], first[2], second) == (["input", "x\\n"], "z", ["output", "y", "[n,", "3]", "float32"])

    def test_what_others_keep_in_and_beside_an_onnx_model(self, tmp_path: Path) -> None:
        model = onnx.load(relu(tmp_path / "a.onnx"))
        helper.set_model_props(model, {"author": "them"})
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(3, np.float32), "w"))
        model.graph.node[0].CopyFrom(helper.make_node("Add", ["x", "w"], ["y"]))
        onnx.save(model, tmp_path / "b.onnx", save_as_external_data=True, location="b.data", size_threshold=0)
        found = inspect(tmp_path / "b.onnx")
        assert (found["kind"], found["metadata"]) == ("onnx", ["author"])
        assert ("metadata", "author") in rows(next(inspection_tables(found)))


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "content", "match"),
        [
            ("a.onnx", b"hello", "not an ONNX model, or a damaged one"),
            ("a.onnx", b"", "not an ONNX model, or a damaged one"),
            ("a.safetensors", b"hello world", "not a safetensors file"),
            ("a.safetensors", struct.pack("<Q", 999) + b"{}", "is truncated"),
            (
                "a.safetensors",  # of which the tensor named first lies last
                struct.pack("<Q", 62) + b'{"a": {"data_offsets": [4, 8]}, "b": {"data_offsets": [0, 4]}}' + bytes(4),
                "is truncated",
            ),
            ("a.pth", b"PK\x03\x04rest", "a zip archive, as torch.save writes"),
            ("a.engine", b"", r"is a TensorRT engine, which a\.engine\.json beside it describes; .* the \.onnx file"),
            ("a.json", b"{}", "is neither a checkpoint .* nor a model .* tetdeploy report"),
        ],
    )
    def test_files(self, tmp_path: Path, name: str, content: bytes, match: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=match):
            inspect(tmp_path / name)

    @pytest.mark.parametrize("shape", [{}, {"shape": None}, {"shape": ["a"]}])
    def test_a_tensor_without_a_shape(self, tmp_path: Path, shape: dict[str, Any]) -> None:
        text = json.dumps({"a": {"dtype": "F32", "data_offsets": [0, 0]} | shape}).encode()
        (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
        with pytest.raises(ValueError, match="its header does not describe its tensors"):
            inspect(tmp_path / "a.safetensors")

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="does not exist; give a run folder"):
            inspect(tmp_path / "no")
        with pytest.raises(FileNotFoundError, match="it is not a run folder"):
            inspect(tmp_path)


def damaged(path: Path, content: dict[str, Any], tensors: str = "") -> Path:
    header = '{"__metadata__": ' + json.dumps({"tetdeploy": json.dumps({"format": 1} | content)}) + tensors + "}"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    return path


def test_damaged_metadata_are_one_line(tmp_path: Path) -> None:
    data = {"name": "x", "encoding": "direct", "mean": [0], "std": [1], "class_names": ["a"], "image_shape": [1, 8, 8]}
    parts: dict[str, Any] = {"data": data, "training": {}, "provenance": {}}
    shapes = {"num_classes": 1, "in_channels": 1, "image_size": [8, 8]}
    network = {"model": "convsnn", "tau": None, "v_th": 1.0} | shapes
    file = tmp_path / "m.safetensors"
    for content, tensors, message in (
        (parts | {"network": {"tau": 1.0}}, "", "its metadata lacks network.model"),
        (parts | {"network": network | {"width": [1]}}, "", r"network\.width must be a finite number, got \[1\]"),
        ({"resume": {"epoch": 1}}, "", "is damaged: where the run stands, step is missing"),
        ({}, ', "w": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 0]}', "does not describe its tensors"),
    ):
        with pytest.raises(ValueError, match=message):
            inspect(damaged(file, content, tensors))
    numbered = {"data": data | {"class_names": [0]}}  # as of a classifier whose names were no strings
    found = inspect(damaged(file, parts | {"network": network} | numbered))
    assert list(inspection_tables(found))


def test_a_path_need_not_be_utf8(tmp_path: Path, checkpoint: Path) -> None:
    for file in (exported("step"), checkpoint):
        copy = shutil.copy(file, tmp_path / os.fsdecode(b"n\xe9" + file.suffix.encode()))
        assert inspect(copy) == inspect(file) | {"path": str(copy)}


def test_command(tmp_path: Path, checkpoint: Path) -> None:
    assert "a checkpoint of tetdeploy" in printed("inspect", checkpoint, "--json", tmp_path / "i.json")
    assert json.loads((tmp_path / "i.json").read_text()) == inspect(checkpoint)
    refused("inspect", tmp_path / "i.json")


def test_sizes() -> None:
    sizes = {12: "12 bytes", 999: "999 bytes", 1000: "1 kB", 1_234: "1.23 kB", 249_400: "249 kB", 5_678_000: "5.68 MB"}
    assert {n: size(n) for n in sizes} == sizes
