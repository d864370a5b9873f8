"""Results and run folders as the commands write them, made up, for the tests of the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from tetdeploy.report.document import Block, Cards, Note, Plot, Row, Table
from tetdeploy.report.page import document_of
from tetdeploy.report.results import Results
from tetdeploy.storage.tensor_file import write_tensors

PLOTTERS = (*(f"sections.{name}" for name in ("accuracy", "cost", "early_exit", "pareto", "training")), "entry_plot")
VOID = {"meta", "br", "hr", "img", "link", "input"}


def result(**changes: Any) -> dict[str, Any]:
    """A validation of two layers at T = 1, 2, 3; a change to None takes the key out."""
    steps = (1, 2, 3)
    content: dict[str, Any] = {
        "kind": "validate",
        "model": "runs/a/model-T3.onnx",
        "data": "digits",
        "num_samples": 200,
        "model_sha256": "ab" * 32,
        "trained_T": 2,
        "layout": "unrolled",
        "num_classes": 2,
        "versions": {"tetdeploy": "0.1.0", "onnxruntime": "1.32.0"},
        "device": "cpu",
        "created": "2026-01-02T03:04:05+00:00",
        "rows": [
            {
                "T": T,
                "accuracy": 0.9 + T / 100,
                "firing_rate": 0.1,
                "ac_ops": 1e6 * T,
                "mac_ops": 1e5 * T,
                "energy_pj": 1.36e6 * T,
                "energy_exact_pj": 1.4e6 * T,
                "energy_once_pj": 1e6 * T,
                "ann_ratio": 5.0 / T,
                "latency_ms": 0.5 * T,
                "top1_agreement": 0.995,
                "spike_mismatch_rate": 2e-6,
                "max_abs_logit_error": 1e-5,
            }
            for T in steps
        ],
        "layers": [
            {
                "name": name,
                "from_input": name == "conv1",
                "binary": name != "conv1",
                "fan_out": 288.0,
                "weights": 1152,
                "precision": "fp32",
                "rows": [
                    {"T": T, "ac_ops": 1e6, "mac_ops": 0.0, "energy_pj": energy * T, "energy_exact_pj": energy * T}
                    for T in steps
                ],
            }
            for name, energy in (("conv1", 4e5), ("conv2", 9.6e5))
        ],
        "neurons": [
            {"name": f"lif{k}", "size": 2048, "rows": [{"T": T, "firing_rate": k / 10} for T in steps]} for k in (1, 2)
        ],
        "ann": {"mac_ops": 1_478_260, "energy_pj": 6.8e6},
        "other_ops": {"neuron_ops": 4096},
        "constants": {"ac_pj": 0.9, "mac_pj": 4.6, "source": "Horowitz, ISSCC 2014"},
        "by_class": [
            {"name": "cat", "num_samples": 120, "accuracy": [0.91, 0.92, 0.93]},
            {"name": "dog", "num_samples": 80, "accuracy": [0.71, 0.72, 0.73]},
        ],
    }
    return {key: value for key, value in (content | changes).items() if value is not None}


def without(keys: Sequence[str], **changes: Any) -> dict[str, Any]:
    """A result whose rows lack some numbers."""
    content = result(**changes)
    content["rows"] = [{key: value for key, value in row.items() if key not in keys} for row in content["rows"]]
    return content


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def run_folder(
    folder: Path,
    *,
    metrics: list[dict[str, Any]] | None = None,
    kept: int | None = None,
    network: dict[str, Any] | None = None,
    data: str = "digits",
    init: dict[str, str] | None = None,
    **training: Any,
) -> Path:
    """A run of two epochs, without a checkpoint or with one, which has no tensors, of the epoch `kept`."""
    shape = {"model": "convsnn", "num_classes": 2, "in_channels": 1, "image_size": [8, 8], "width": 1.0}
    config: dict[str, Any] = {
        "network": shape | {"ann": training.pop("ann", False)} | (network or {}),
        "data": {"name": data, "image_shape": [1, 8, 8], "train_images": 900, "val_images": 100},
        "training": {"T": 2, "epochs": 2, "tit": "", "loss": "tet", "lr": 0.002, "seed": 0} | training,
    }
    write(folder / "config.json", config)
    if kept is not None:
        data_of_it = config["data"] | {"encoding": "direct", "mean": [0], "std": [1], "class_names": ["cat", "dog"]}
        made = {"epoch": kept, "device": "GPU7", "precision": "bf16", "created": "now", "versions": {"torch": "9"}}
        made |= {"init": init} if init else {}
        content = {"format": 1, **config, "data": data_of_it, "provenance": made}
        write_tensors(folder / "checkpoint.safetensors", {}, content)
    records = [epoch(1), epoch(2)] if metrics is None else metrics
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def seeds_folder(folder: Path, *measured: dict[str, Any] | None, unfinished: tuple[int, ...] = ()) -> Path:
    """The runs of several seeds, each with the sweep given for it, or none."""
    for seed, content in enumerate(measured):
        metrics = [epoch(1)] if seed in unfinished else None
        run = run_folder(folder / f"seed-{seed}", seed=seed, metrics=metrics)
        if content is not None:
            write(run / "m.sweep.json", content | {"model_sha256": f"{seed}" * 64})
    runs = [{"seed": seed, "interrupted": seed in unfinished} for seed in range(len(measured))]
    write(folder / "summary.json", {"runs": runs, "num_finished": len(runs) - len(unfinished)})
    return folder


def sweep(scale: float, **changes: Any) -> dict[str, Any]:
    """Of a model that takes so many times the energy of `result`, whose accuracy is as much less in points."""
    content = result(kind="sweep", **changes)
    for row in content["rows"]:
        row |= {"energy_pj": row["energy_pj"] * scale, "accuracy": row["accuracy"] - scale / 100}
    return content


COMPARED = ("top1_agreement", "spike_mismatch_rate", "max_abs_logit_error")  # with PyTorch
MACHINE = {"cpu": "c", "cores": 1, "gpu": None, "provider": "p"}
EARLY_EXIT: dict[str, Any] = {
    "criterion": "confidence",
    "threshold": 0.93,
    "min_T": 1,
    "T": 3,
    "accuracy": 0.9,
    "fixed_accuracy": 0.92,
    "lost": 7,
    "gained": 3,
    "loss": 0.02,
    "loss_95": 0.031,
    "mean_T": 1.5,
    "batch_size": 64,
    "load": 0.1,
    "seconds": 2.0,
    "fixed_seconds": 5.0,
    "speedup": 2.5,
    "by_steps": [{"T": T, "num_images": n, "accuracy": 0.9} for T, n in ((1, 120), (2, 60), (3, 20))],
    "cost": {"ac_ops": 1e6, "mac_ops": 1e5, "energy_pj": 2e6, "energy_exact_pj": 2.2e6, "energy_once_pj": 1e6},
    "fixed_cost": {"ac_ops": 1e6, "mac_ops": 1e5, "energy_pj": 4e6, "energy_exact_pj": 6.6e6, "energy_once_pj": 4e6},
}


def epoch(number: int, **changes: Any) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    record = {"epoch": number, "stage": 1, "T": 2, "loss": "tet", "lr": 0.002 / number, "seconds": 1.5}
    record |= {"train_loss": 1.0 / number, "train_accuracy": 0.8, "val_loss": 1.1 / number, "val_accuracy": 0.85}
    return record | changes


def reached(accuracy: float) -> list[dict[str, Any]]:
    """Two epochs, of which the second is the best."""
    return [epoch(1, val_accuracy=accuracy - 0.1), epoch(2, val_accuracy=accuracy)]


def without_rendering(patch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """From now on plots are painted and not rendered; their axes, by the module that draws them."""
    painted: dict[str, list[Any]] = {name: [] for name in PLOTTERS}

    def paint_only(name: str, paint: Callable[[Any], None], *, description: str, caption: str, **_: Any) -> Plot:
        painted[name].append(Figure().add_subplot())
        paint(painted[name][-1])
        return Plot("", description, caption)

    for name in PLOTTERS:
        patch.setattr(import_module(f"tetdeploy.report.{name}"), "draw", partial(paint_only, name))
    return painted


def blocks(results: Results, title: str) -> tuple[Block, ...]:
    return next(section.blocks for section in document_of(results).sections if section.title == title)


def items(results: Results, title: str) -> list[Cards | Table | Plot | Note]:
    """Those beside each other too."""
    rows = (block.items if isinstance(block, Row) else (block,) for block in blocks(results, title))
    return [item for row in rows for item in row]


def tables(results: Results, title: str) -> list[Table]:
    return [item for item in items(results, title) if isinstance(item, Table)]


class Page(HTMLParser):
    """What a page holds, checked while it is read: every element is closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style",) and data.strip():
            self.texts.append(data.strip())

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    def attributes(self, name: str) -> list[str]:
        return [value for _, attributes in self.tags if (value := attributes.get(name)) is not None]
