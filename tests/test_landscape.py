"""Loss landscapes: directions, the numbers against perturbed copies, interruptions, refusals, plot and command."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import os
import signal
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np
import pytest
import torch
from command_helpers import printed, refused
from matplotlib.colors import LogNorm
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from tetdeploy.checkpoint import save_checkpoint
from tetdeploy.data import load_data
from tetdeploy.networks import Classifier, NetworkConfig, build_network
from tetdeploy.report import landscape as landscape_figure
from tetdeploy.report.landscape import landscape_table, plot_landscape, summarise
from tetdeploy.storage.shards import write_shards
from tetdeploy.storage.tensor_file import read_content
from tetdeploy.train import evaluate, landscape, sdt_loss, tet_loss
from tetdeploy.train.landscape import (
    Landscape,
    LandscapeConfig,
    filter_normalised,
    load_landscape,
    measure_landscape,
    save_landscape,
)
from tetdeploy.train.schedule import derive_seed

CONFIG = LandscapeConfig(T=2, points=3, extent=0.5, batch_size=24, device="cpu")


def classifier_of(seed: int = 0) -> Classifier:
    return copy.deepcopy(_built(seed))


@functools.cache
def _built(seed: int) -> Classifier:
    """A small network that spikes in every layer, its BN statistics being those of its images."""
    torch.manual_seed(seed)
    config = NetworkConfig("convsnn", 10, 1, (8, 8), width=0.125)
    names = tuple("0123456789")
    classifier = Classifier(
        build_network(config), config=config, mean=(0.3,), std=(0.4,), class_names=names, data="digits"
    )
    with torch.no_grad():
        for _ in range(30):
            classifier(torch.tensor(digits()[0]), 2)
    return classifier.eval()


class OfFrames(nn.Module):
    """A network as one of the user's own may be: it takes frames `[T, N, C, H, W]` and no T."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        return logits


@functools.cache
def digits(count: int = 40) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    images = load_data("digits", "train", data_dir=Path("data"))
    return images.images[:count], images.labels[:count]


def bowl(points: int = 5) -> Landscape:
    """Two checkpoints: a^2 + b^2 and four times that, above 0.1; L_TET is higher by 1."""
    axis = LandscapeConfig(T=1, points=points).axis
    square = axis[:, None] ** 2 + axis[None, :] ** 2
    sdt = np.stack([square + 0.1, 4 * square + 0.1])
    settings = {"num_images": 1, "T": 1}
    return Landscape(("flat", "sharp"), axis, axis, sdt, sdt + 1, np.ones_like(sdt), sdt.size, settings)


class TestDirections:
    def test_every_filter_is_as_long_as_the_networks(self) -> None:
        classifier = classifier_of()
        direction = filter_normalised(classifier, seed=3)
        weights = dict(classifier.named_parameters())
        assert set(direction) == {name for name, weight in weights.items() if weight.dim() in (2, 4)}
        assert len(direction) == 4 and len(weights) > 4  # BN and biases have none
        for name, d in direction.items():
            assert torch.allclose(d.flatten(1).norm(dim=1), weights[name].detach().flatten(1).norm(dim=1), rtol=1e-5)

    def test_the_seed_decides(self) -> None:
        one, same, other = (filter_normalised(classifier_of(), seed=seed) for seed in (3, 3, 4))
        for name in one:
            assert torch.equal(one[name], same[name])
            assert not torch.allclose(one[name], other[name])

    def test_a_dead_filter_stays(self) -> None:
        layer = torch.nn.Linear(3, 2)
        torch.nn.init.zeros_(layer.weight)
        assert filter_normalised(layer, seed=0)["weight"].abs().max() == 0

    def test_they_are_normal(self) -> None:
        layer = torch.nn.Linear(100, 100)
        torch.nn.init.ones_(layer.weight)
        direction = filter_normalised(layer, seed=0)["weight"]
        assert direction.mean().item() == pytest.approx(0, abs=0.05)
        assert (direction.abs() > 2).float().mean().item() == pytest.approx(0.0455, abs=0.01)


class TestNumbers:
    def test_every_point_is_a_perturbed_copy(self, tmp_path: Path) -> None:
        classifier = classifier_of()
        images, labels = digits()
        config = dataclasses.replace(CONFIG, seed=4)
        measured = measure_landscape({"a": classifier}, images, labels, config, tmp_path / "l.npz")
        assert measured.complete and measured.sdt_loss.shape == (1, 3, 3)
        assert list(measured.alphas) == [-0.5, 0.0, 0.5]
        d1, d2 = (filter_normalised(classifier, seed=derive_seed(4, "direction", k)) for k in (1, 2))
        for i, alpha in enumerate((-0.5, 0.0, 0.5)):
            for j, beta in enumerate((-0.5, 0.0, 0.5)):
                moved = copy.deepcopy(classifier)
                with torch.no_grad():
                    for name, parameter in moved.named_parameters():
                        if name in d1:
                            parameter += alpha * d1[name] + beta * d2[name]
                for loss, values in ((sdt_loss, measured.sdt_loss), (tet_loss, measured.tet_loss)):
                    wanted = evaluate(moved, torch.tensor(images), torch.tensor(labels), T=2, loss=loss)
                    assert wanted == pytest.approx((values[0, i, j], measured.accuracy[0, i, j]), rel=1e-4)
        assert np.ptp(measured.sdt_loss) > 1e-3
        assert (measured.tet_loss >= measured.sdt_loss - 1e-5).all()  # Lemma 4.1

    def test_the_classifier_stays_as_it_was(self, tmp_path: Path) -> None:
        classifier = classifier_of()
        before = copy.deepcopy(classifier.state_dict())
        classifier.train()  # BN must not see what is measured
        measure_landscape({"a": classifier}, *digits(), CONFIG, tmp_path / "l.npz")
        assert not classifier.training
        for name, value in classifier.state_dict().items():
            assert torch.equal(value, before[name]), name

    def test_precision_is_that_of_the_passes(self, tmp_path: Path) -> None:
        full, half = (
            measure_landscape(
                {"a": classifier_of()}, *digits(), dataclasses.replace(CONFIG, precision=of), tmp_path / f"{of}.npz"
            )
            for of in ("fp32", "bf16")
        )
        assert not np.array_equal(full.sdt_loss, half.sdt_loss)

    def test_nothing_is_kept_for_gradients(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        kept, counted = list[bool](), landscape.count_correct

        def watched(logits: Tensor, y: Tensor) -> Tensor:
            kept.append(logits.requires_grad)
            return counted(logits, y)

        monkeypatch.setattr(landscape, "count_correct", watched)
        measure_landscape({"a": classifier_of()}, *digits(), CONFIG, tmp_path / "l.npz")
        assert kept and not any(kept)

    def test_all_checkpoints_share_their_directions(self, tmp_path: Path) -> None:
        same = {name: classifier_of() for name in "ab"}
        measured = measure_landscape(same, *digits(), CONFIG, tmp_path / "l.npz")
        for values in (measured.sdt_loss, measured.tet_loss, measured.accuracy):
            np.testing.assert_array_equal(values[0], values[1])

    def test_frames_take_their_first_steps(self, tmp_path: Path) -> None:
        images, labels = digits()
        frames = images[:, None].repeat(4, axis=1)
        frames[:, 2:] = 0
        of_frames = classifier_of()
        of_frames.network = OfFrames(of_frames.network)
        shown = [
            measure_landscape({"a": classifier}, x, labels, CONFIG, tmp_path / f"{x.shape}.npz")
            for classifier, x in ((classifier_of(), images), (of_frames, frames), (of_frames, frames[:, :2]))
        ]
        for part in shown[1:]:
            np.testing.assert_allclose(shown[0].tet_loss, part.tet_loss, rtol=1e-5)
        assert [part.settings["frames"] for part in shown] == [None, 4, 2]
        longer = LandscapeConfig(T=5, points=3, device="cpu")
        with pytest.raises(ValueError, match="T is 5, but the frames hold 4 steps"):
            measure_landscape({"a": classifier_of()}, frames, labels, longer, tmp_path / "l.npz")

    def test_the_file_holds_all_of_it(self, tmp_path: Path) -> None:
        measured = measure_landscape({"a": classifier_of()}, *digits(), CONFIG, tmp_path / "l.npz")
        read = load_landscape(tmp_path / "l.npz")
        for name in ("alphas", "betas", "sdt_loss", "tet_loss", "accuracy"):
            np.testing.assert_array_equal(getattr(read, name), getattr(measured, name))
        assert (read.names, read.finished, read.settings) == (("a",), 9, measured.settings)
        assert {"T", "seed", "extent", "points", "weights", "images"} <= set(read.settings)


class TestInterruptions:
    def test_two_sessions_end_as_one(self, tmp_path: Path) -> None:
        classifiers = {"a": classifier_of(0), "b": classifier_of(1)}
        whole = measure_landscape(classifiers, *digits(), CONFIG, tmp_path / "whole.npz")
        measured = 0

        def tick() -> None:
            nonlocal measured
            measured += 1

        for last in (4, 12, 99):  # in the first checkpoint, in the second, never
            path = tmp_path / "parts.npz"
            part = measure_landscape(
                classifiers, *digits(), CONFIG, path, point_done=tick, stop=lambda last=last: measured >= last
            )
            assert part.finished == measured == min(last, 18)
            assert np.isfinite(part.sdt_loss).sum() == part.finished
            assert load_landscape(path).finished == part.finished
        for name in ("sdt_loss", "tet_loss", "accuracy"):
            np.testing.assert_array_equal(getattr(part, name), getattr(whole, name))

    def test_what_is_complete_is_not_measured_again(self, tmp_path: Path) -> None:
        measure_landscape({"a": classifier_of()}, *digits(), CONFIG, tmp_path / "l.npz")
        told, ticks = [], []
        measure_landscape(
            {"a": classifier_of()},
            *digits(),
            CONFIG,
            tmp_path / "l.npz",
            begun=lambda *numbers: told.append(numbers),
            point_done=lambda: ticks.append(1),
        )
        assert told == [(9, 9)] and not ticks

    def test_names_are_those_of_the_call(self, tmp_path: Path) -> None:
        measure_landscape({"a": classifier_of()}, *digits(), CONFIG, tmp_path / "l.npz")
        renamed = measure_landscape({"b": classifier_of()}, *digits(), CONFIG, tmp_path / "l.npz")
        assert renamed.names == load_landscape(tmp_path / "l.npz").names == ("b",)

    def test_a_kill_costs_a_row_at_most(self, tmp_path: Path) -> None:
        ticks = []

        def kill_at_the_fifth() -> None:
            ticks.append(1)
            if len(ticks) == 5:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            measure_landscape(
                {"a": classifier_of()}, *digits(), CONFIG, tmp_path / "l.npz", point_done=kill_at_the_fifth
            )
        assert load_landscape(tmp_path / "l.npz").finished == 3


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"points": 4}, "points is 4; it must be odd"),
            ({"points": 1}, "points is 1; it must be odd, .* at least 3"),
            ({"points": 10**20 + 1}, f"points is {10**20 + 1}; it must be at most 1001"),
            ({"extent": 0.0}, "extent is 0.0; it must be above 0"),
            ({"extent": float("nan")}, "extent is nan"),
            ({"extent": float("inf")}, "extent is inf"),
            ({"seed": -1}, "seed is -1"),
            ({"T": 0}, "must be at least 1, got 0"),
            ({"T": "4"}, "T must be a whole number, got '4'"),
            ({"T": True}, "T must be a whole number, got True"),
            ({"T": 10**9}, "T is 1000000000; it must be at most 1024"),
            ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
            ({"batch_size": 1.5}, r"batch_size must be a whole number, got 1\.5"),
            ({"points": 21.0}, r"points must be a whole number, got 21\.0"),
            ({"extent": "1"}, "extent must be a number, got '1'"),
            ({"seed": 1.5}, r"seed must be a whole number, got 1\.5"),
            ({"precision": "int4"}, "unknown precision 'int4'; choose one of auto, fp32"),
        ],
    )
    def test_settings_out_of_range(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            LandscapeConfig(**{"T": 4, **options})

    def test_without_classifiers_nothing_is_written(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="there are no classifiers to measure"):
            measure_landscape({}, *digits(), CONFIG, tmp_path / "l.npz")
        assert not list(tmp_path.iterdir())

    def test_other_settings_are_named_and_nothing_is_lost(self, tmp_path: Path) -> None:
        file = tmp_path / "l.npz"
        measure_landscape({"a": classifier_of()}, *digits(), CONFIG, file)
        content = file.read_bytes()
        other = LandscapeConfig(T=3, points=5, extent=0.5, batch_size=24, device="cpu")
        with pytest.raises(ValueError, match=r"other settings: T: 2 -> 3; points: 3 -> 5; give another --out"):
            measure_landscape({"a": classifier_of()}, *digits(), other, file)
        with pytest.raises(ValueError, match=r"other settings: weights: "):
            measure_landscape({"a": classifier_of(1)}, *digits(), CONFIG, file)
        with pytest.raises(ValueError, match=r"num_images: 40 -> 39; images: "):
            measure_landscape({"a": classifier_of()}, *digits(39), CONFIG, file)
        images, labels = digits()
        with pytest.raises(ValueError, match=r"other settings: images: "):
            measure_landscape({"a": classifier_of()}, images, labels[::-1], CONFIG, file)
        for change, message in (
            ({"precision": "bf16"}, "precision: fp32 -> bf16"),
            ({"extent": 1.0}, "extent: 0.5 -> 1.0"),
        ):
            with pytest.raises(ValueError, match=rf"other settings: {message}; give"):
                measure_landscape({"a": classifier_of()}, images, labels, dataclasses.replace(CONFIG, **change), file)
        statistics = classifier_of()
        next(m for m in statistics.modules() if isinstance(m, nn.BatchNorm2d)).running_var.mul_(2)
        with pytest.raises(ValueError, match=r"other settings: weights: "):
            measure_landscape({"a": statistics}, images, labels, CONFIG, file)
        other = classifier_of()
        other.config = dataclasses.replace(other.config, tau=0.9)
        other.mean += 0.1
        with pytest.raises(
            ValueError, match=r"networks\.1\.tau: 0\.5 -> 0\.9; networks\.1\.mean: \[0\.3\] -> \[0\.4\]; give"
        ):
            measure_landscape({"a": other}, *digits(), CONFIG, file)
        assert file.read_bytes() == content

    def test_files_that_are_no_landscape(self, tmp_path: Path) -> None:
        (tmp_path / "text.npz").write_text("not an archive")
        np.savez(tmp_path / "other.npz", images=np.zeros(3))
        save_landscape(tmp_path / "cut.npz", bowl())
        (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:700])
        save_landscape(tmp_path / "smaller.npz", dataclasses.replace(bowl(), sdt_loss=bowl().sdt_loss[:, :, 1:]))
        save_landscape(tmp_path / "beyond.npz", dataclasses.replace(bowl(), finished=bowl().total + 1))
        for name in ("text", "other", "cut", "smaller", "beyond"):
            with pytest.raises(ValueError, match=rf"{name}\.npz is not a landscape, or damaged"):
                measure_landscape({"a": classifier_of()}, *digits(), CONFIG, tmp_path / f"{name}.npz")
        with pytest.raises(FileNotFoundError, match=r"none\.npz does not exist"):
            load_landscape(tmp_path / "none.npz")

    def test_images_that_do_not_fit(self, tmp_path: Path) -> None:
        images, labels = digits()
        for x, y, message in (
            (images.astype(np.float32), labels, "images are float32"),
            (images, labels[:-1], "40, 1, 8, 8. with 39 labels"),
            (images[:0], labels[:0], "wanted one or more"),
            (images[:, :, :7], labels, r"shape \(1, 7, 8\); a takes \(1, 8, 8\)"),
            (images, labels + 1, "labels run from 1 to 10, but a has 10 classes"),
        ):
            with pytest.raises(ValueError, match=message):
                measure_landscape({"a": classifier_of()}, x, y, CONFIG, tmp_path / "l.npz")
        assert not list(tmp_path.iterdir())


@pytest.fixture
def meshes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The coloured surfaces of the panels, in figures that are not rendered."""
    drawn, panel = list[Any](), landscape_figure._panel

    def watched(*given: Any) -> Any:
        drawn.append(panel(*given))
        return drawn[-1]

    monkeypatch.setattr(landscape_figure, "_panel", watched)
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: Path(path).touch())
    return drawn


class TestFigure:
    def test_sharpness_of_a_bowl(self) -> None:
        flat, sharp = summarise(bowl(), radius=0.5)  # a step of 0.5: the four neighbours of the centre
        assert flat["sdt_loss"] == pytest.approx(0.1) and flat["tet_loss"] == pytest.approx(1.1)
        assert flat["sdt_mean_increase"] == pytest.approx(0.25) and sharp["sdt_mean_increase"] == pytest.approx(1.0)
        flat, sharp = summarise(bowl(), radius=1.0)  # 4 at 0.5, 4 at 0.5 sqrt 2, 4 at 1
        assert flat["tet_mean_increase"] == pytest.approx((0.25 + 0.5 + 1.0) / 3)
        assert sharp["tet_max_increase"] == pytest.approx(4.0)
        with pytest.raises(ValueError, match=r"radius is 0\.4, but the grid's nearest points are 0\.5 away"):
            summarise(bowl(), radius=0.4)

    @pytest.mark.parametrize(("radius", "near"), [(0.3, 28), (0.6, 112), (0.7, 148)])
    def test_points_at_the_radius_itself_count(self, radius: float, near: int) -> None:
        assert bowl(21).increases("sdt_loss", radius).shape == (2, near)

    def test_each_number_is_in_its_column(self) -> None:
        shown = bowl()
        shown.accuracy[1, 2, 2] = 0.5
        shown.tet_loss = 2 * shown.sdt_loss + 1
        rows = zip(*(column.cells for column in landscape_table(shown, 1.0).columns), strict=True)
        assert [[str(cell) for cell in row] for row in rows] == [
            ["flat", "100.00%", "0.1000", "0.5833", "1.0000", "1.2000", "1.1667", "2.0000"],
            ["sharp", "50.00%", "0.1000", "2.3333", "4.0000", "1.2000", "4.6667", "8.0000"],
        ]

    def test_what_is_not_finite_stays_json(self) -> None:
        odd = bowl()
        odd.sdt_loss[0, 2, 1] = np.inf
        assert json.loads(json.dumps(summarise(odd, 0.5), allow_nan=False))[0]["sdt_mean_increase"] is None

    @pytest.mark.parametrize(
        ("kind", "ending"), [("bowl", "png"), ("decades", "png"), ("constant", "pdf"), ("infinite", "png")]
    )
    def test_plots_of_all_sorts(self, tmp_path: Path, kind: str, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
        figures, savefig = list[Any](), Figure.savefig
        monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k)))
        shown = bowl()
        if kind == "decades":
            shown.sdt_loss **= 6
        if kind == "constant":
            shown.sdt_loss[:] = shown.tet_loss[:] = 0.0
        if kind == "infinite":
            shown.tet_loss[1] = np.inf
        plot_landscape(shown, tmp_path / f"plot.{ending}", radius=0.5, title=kind)
        assert (tmp_path / f"plot.{ending}").read_bytes()[1:4].decode().lower() == ending
        (figure,) = figures
        axis = figure.axes[0].yaxis
        assert axis.label.get_window_extent().x0 > figure.bbox.x0  # nothing is cut off at the left

    def test_a_panel_has_its_loss_its_circle_and_the_end_of_a_long_name(
        self, tmp_path: Path, meshes: list[Any]
    ) -> None:
        shown = dataclasses.replace(bowl(), names=("flat", f"runs/{'x' * 40}/seed-7"))
        plot_landscape(shown, tmp_path / "plot.png", radius=0.5, title="1,000 images")
        assert [mesh.get_array().max() for mesh in meshes] == pytest.approx([2.1, 3.1, 8.1, 9.1])
        panels = [mesh.axes for mesh in meshes]
        assert [(panel.patches[0].center, panel.patches[0].radius) for panel in panels] == [((0, 0), 0.5)] * 4
        titles = [panel.get_title(loc="left").split() for panel in panels]
        assert [title[:2] for title in titles] == [["A", "L_SDT"], ["B", "L_TET"], ["C", "L_SDT"], ["D", "L_TET"]]
        assert titles[0][2] == "flat" and titles[2][2].endswith("xxx/seed-7")
        assert [panel.get_xlabel() for panel in panels] == ["", "", *["α, first direction"] * 2]
        assert [panel.get_ylabel() for panel in panels] == ["β, second direction", ""] * 2
        assert panels[0].figure.get_suptitle() == "1,000 images"
        assert panels[0].figure.get_supxlabel().startswith("dashed circle: r = 0.5, ")

    @pytest.mark.parametrize(
        ("decades", "levels"),
        [
            (3.0, [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100]),
            (1.5, [0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1, 1.5, 2, 3]),
        ],
    )
    def test_over_decades_levels_are_round_and_colours_logarithmic(self, decades: float, levels: list[float]) -> None:
        shown = bowl()
        for values in (shown.sdt_loss, shown.tet_loss):
            values.flat = np.geomspace(0.1, 0.1 * 10**decades, values.size)
        found, norm = landscape_figure._levels(shown)
        assert found == pytest.approx(levels) and isinstance(norm, LogNorm)

    def test_alpha_goes_right_and_both_losses_share_their_levels(self, tmp_path: Path, meshes: list[Any]) -> None:
        shown = bowl()
        shown.sdt_loss[0, 4, 0] = 6.0  # at alpha = 1, beta = -1
        plot_landscape(shown, tmp_path / "plot.png", radius=0.5)
        assert meshes[0].get_array()[0, 4] == 6.0  # [beta, alpha]
        (lines,) = (drawn for drawn in meshes[0].axes.collections if isinstance(drawn, ContourSet))
        alpha, beta = lines.get_paths()[[*lines.levels].index(5)].vertices.T
        assert alpha.min() > 0.5 and beta.max() < -0.5
        assert (meshes[0].norm.vmin, meshes[0].norm.vmax) == (pytest.approx(0.1), pytest.approx(9.1))

    def test_names_of_any_bytes(self, tmp_path: Path) -> None:
        name = r"$\frac$ 数字-שלום " + os.fsdecode(b"\xff")
        shown = dataclasses.replace(bowl(), names=("flat", name))
        plot_landscape(shown, tmp_path / "plot.png", radius=0.5, title=f"1 images of folder:{name}")
        assert (tmp_path / "plot.png").exists()

    def test_as_many_checkpoints_as_there_are(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        loss = np.repeat(bowl(3).sdt_loss[:1], 14, axis=0)
        names = tuple(f"runs[{k}]" for k in "abcdefghijklmn")
        many = dataclasses.replace(bowl(3), names=names, sdt_loss=loss, tet_loss=loss, accuracy=loss)
        titles = list[str]()
        monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda axes, title, **options: titles.append(title))
        monkeypatch.setattr(Figure, "draw_without_rendering", lambda figure: None)
        monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: Path(path).touch())  # 12 s
        plot_landscape(many, tmp_path / "plot.png", radius=1.0)
        assert [title.split()[0] for title in titles] == [*ascii_uppercase, "AA", "AB"]
        assert [str(name) for name in landscape_table(many, 1.0).columns[0].cells] == list(names)

    def test_labels_are_whole_and_none_covers_another(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        steep = bowl()
        steep.sdt_loss **= 3  # levels lie close round the minimum
        steep.tet_loss[0] += 0.9 * np.add.outer(steep.alphas, steep.betas)  # levels cut off corners
        thin_out, num_labels = landscape_figure.thin_out, []

        def watched(panel: Any, **options: Any) -> None:
            before = len(panel.texts)
            thin_out(panel, **options)
            boxes = [text.get_bbox_patch().get_window_extent() for text in panel.texts]
            assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
            assert all(panel.bbox.contains(*box.min) and panel.bbox.contains(*box.max) for box in boxes)
            num_labels.append((before, len(boxes)))

        monkeypatch.setattr(landscape_figure, "thin_out", watched)
        plot_landscape(steep, tmp_path / "plot.png", radius=0.5)
        assert len(num_labels) == 4
        assert any(before > after > 0 for before, after in num_labels)

    def test_nothing_finite_is_refused(self, tmp_path: Path) -> None:
        shown = bowl()
        shown.sdt_loss[:] = shown.tet_loss[:] = np.nan
        with pytest.raises(ValueError, match="no loss is finite"):
            plot_landscape(shown, tmp_path / "plot.png", radius=0.5)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """runs/sdt and runs/tet with a checkpoint each, in the working folder."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("sdt", "tet")):
        training = {"T": 2, "val_fraction": 0.1}
        path = tmp_path / "runs" / name / "checkpoint.safetensors"
        save_checkpoint(path, classifier_of(seed), training=training, provenance={})
    return tmp_path / "runs"


@pytest.fixture
def _undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured is not drawn, which takes longer."""
    monkeypatch.setattr(landscape_figure, "plot_landscape", lambda landscape, path, **options: Path(path).touch())


COMMAND = ("landscape", "--points", "3", "--limit", "30", "--device", "cpu")
run = functools.partial(printed, *COMMAND)


class TestCommand:
    @pytest.mark.parametrize(
        ("paths", "names"),
        [
            (("out/SDT/seed-0", "out/TET/seed-0"), ["SDT", "TET"]),
            (("a/run", "run"), ["a/run", "run"]),
            (("x/run", "x/x/run"), ["run", "x/run"]),
        ],
    )
    @pytest.mark.usefixtures("_undrawn")
    def test_runs_of_one_name_are_called_by_what_sets_their_paths_apart(
        self, paths: tuple[str, ...], names: list[str], runs: Path
    ) -> None:
        for path in paths:
            (runs / path).mkdir(parents=True)
            (runs / path / "checkpoint.safetensors").hardlink_to(runs / "sdt" / "checkpoint.safetensors")
        run(*(runs / path for path in paths), "--radius", "1", "--json", "l.json")
        assert [row["name"] for row in json.loads(Path("l.json").read_text())["rows"]] == names

    @pytest.mark.usefixtures("_undrawn")
    @pytest.mark.parametrize(
        ("paths", "names", "out"),
        [
            ((".",), ["sdt"], "landscape.npz"),
            (("checkpoint.safetensors",), ["sdt/checkpoint.safetensors"], "landscape.npz"),
            (("../tet", "."), ["tet", "sdt"], "../tet/landscape-sdt.npz"),
        ],
    )
    def test_a_run_has_its_name_in_its_own_folder(
        self, paths: tuple[str, ...], names: list[str], out: str, runs: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(runs / "sdt")
        run(*paths, "--radius", "1", "--json", "l.json")
        found = json.loads(Path("l.json").read_text())
        assert ([row["name"] for row in found["rows"]], found["numbers"]) == (names, out)

    @pytest.mark.usefixtures("_undrawn")
    @pytest.mark.parametrize(
        ("folder", "paths", "out"),
        [
            ("", ("runs/sdt/shards",), "runs/sdt/landscape.npz"),
            ("", ("runs/sdt/shards/epoch-00001-step-000000",), "runs/sdt/landscape.npz"),
            ("", ("runs/tet", "runs/sdt/shards"), "runs/tet/landscape-sdt.npz"),
            ("runs/sdt/shards", (".",), "../landscape.npz"),
        ],
    )
    def test_of_shards_it_lies_in_the_folder_of_their_run(
        self, folder: str, paths: tuple[str, ...], out: str, runs: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        checkpoint = runs / "sdt" / "checkpoint.safetensors"
        shards, content = runs / "sdt" / "shards" / "epoch-00001-step-000000", read_content(checkpoint)
        weights = {f"network.{name}": weight for name, weight in load_file(checkpoint).items()}
        write_shards(shards, weights, content, limit=10**6)
        monkeypatch.chdir(runs.parent / folder)
        run(*paths, "--radius", "1", "--json", "l.json")
        assert json.loads(Path("l.json").read_text())["numbers"] == out

    def test_two_runs(self, runs: Path) -> None:
        output = run("runs/sdt", "runs/tet", "--radius", "1", "--json", "l.json")
        assert "30 images of digits, train; T=2" in output
        measured = load_landscape(runs / "sdt" / "landscape-tet.npz")
        assert measured.names == ("sdt", "tet") and measured.complete
        assert (runs / "sdt" / "landscape-tet.png").read_bytes().startswith(b"\x89PNG")
        content = json.loads(Path("l.json").read_text())
        assert [row["name"] for row in content["rows"]] == ["sdt", "tet"]
        assert content["rows"][1]["sdt_loss"] == measured.sdt_loss[1, 1, 1]
        assert content["settings"]["T"] == 2 and content["radius"] == 1

    @pytest.mark.usefixtures("_undrawn")
    def test_losses_that_are_not_finite_are_told(self, runs: Path) -> None:
        told = "- : some losses at most {} away are not finite; take a smaller --extent"
        assert told.format("1e+300") in run("runs/sdt", "--extent", "1e300", "--radius", "1e300")
        assert "not finite" not in run("runs/tet", "--radius", "1")

    @pytest.mark.usefixtures("_undrawn")
    def test_parts_of_the_data(self, runs: Path) -> None:
        digests = set()
        for split in ("train", "validation", "val", "test"):
            run("runs/sdt", "--split", split, "--radius", "1", "--out", f"{split}.npz")
            digests.add(load_landscape(f"{split}.npz").settings["images"])
        assert len(digests) == 3  # val is validation

    @pytest.mark.usefixtures("_undrawn")
    def test_a_few_images_are_taken_from_all_over_the_set(self, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        digests = set()
        for name, order in (("first", np.arange), ("last", lambda count: np.arange(count)[::-1])):
            monkeypatch.setattr("tetdeploy.data.images.mixed_order", order)
            run("runs/sdt", "--radius", "1", "--out", f"{name}.npz")
            digests.add(load_landscape(f"{name}.npz").settings["images"])
        assert len(digests) == 2

    @pytest.mark.usefixtures("_undrawn")
    def test_all_runs_trained_on_the_images_or_none_did(self, runs: Path) -> None:
        path = runs / "more" / "checkpoint.safetensors"
        save_checkpoint(path, classifier_of(), training={"T": 2, "val_fraction": 0.3}, provenance={})
        for split, alone in (("validation", "sdt"), ("train", "more")):
            digests = set()
            for k, paths in enumerate(([f"runs/{alone}"], ["runs/more", "runs/sdt"], ["runs/sdt", "runs/more"])):
                run(*paths, "--split", split, "--radius", "1", "--out", f"{split}{k}.npz")
                digests.add(load_landscape(f"{split}{k}.npz").settings["images"])
            assert len(digests) == 1

    @pytest.mark.parametrize("split", ["train", "validation"])
    def test_recordings_cut_for_another_T_are_refused(self, runs: Path, split: str) -> None:
        for name, T in (("e2", 2), ("e4", 4)):
            classifier = classifier_of()
            classifier.data, classifier.encoding = "saccades:digits", "frames"
            training = {"T": T, "val_fraction": 0.1}
            save_checkpoint(runs / name / "checkpoint.safetensors", classifier, training=training, provenance={})
        for steps in ([], ["--T", "2"]):
            output = refused(*COMMAND, "runs/e2", "runs/e4", *steps, "--split", split)
            assert "whatever --T, and these differ (e2: 2, e4: 4); measure each run by itself" in output

    def test_frames_of_a_file_are_not_cut_for_a_T(self, runs: Path) -> None:
        Path("frames.npz").touch()
        for name, T in (("e2", 2), ("e4", 4)):
            classifier = classifier_of()
            classifier.data, classifier.encoding = "frames.npz", "frames"
            save_checkpoint(runs / name / "checkpoint.safetensors", classifier, training={"T": T}, provenance={})
        assert "different T (e2: 2, e4: 4); say which with --T" in refused(*COMMAND, "runs/e2", "runs/e4")

    @pytest.mark.usefixtures("_undrawn")
    def test_frames_of_a_file_are_the_same_for_all_runs(self, runs: Path) -> None:
        path = runs / "more" / "checkpoint.safetensors"
        save_checkpoint(path, classifier_of(), training={"T": 3, "val_fraction": 0.1}, provenance={})
        images, labels = digits()
        np.savez("frames.npz", images=images[:, None].repeat(3, axis=1), labels=labels)
        output = run("runs/sdt", "runs/more", "--T", "2", "--data", "frames.npz", "--radius", "1")
        assert "T=2 of 3 frames" in output

    def test_data_of_other_classes_are_refused(self, runs: Path) -> None:
        classifier = classifier_of()
        classifier.class_names = tuple("9876543210")
        save_checkpoint(runs / "other" / "checkpoint.safetensors", classifier, training={"T": 2}, provenance={})
        output = refused(*COMMAND, "runs/sdt", "runs/other", "--radius", "1")
        assert "Error: the labels of digits do not match the model's" in output and "other knows" in output

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (["--out", "fig2.npz", "--plot", "fig2.npz"], 2, "--out and --plot would be one file, fig2.npz"),
            (["--out", "l4.txt"], 1, "cannot write l4.txt: its name must end in .npz; choose another with --out"),
            (["--out", "l3.npz", "--json", "runs/../l3.npz"], 1, "write runs/../l3.npz: JSON has no name in .npz"),
            (["--out", "l.npz", "--plot", "l.pdf", "--json", "l.pdf"], 2, "--plot and --json would be one file, l.pdf"),
            (["--json", "-"], 1, "cannot write -: a result goes to a file, not to the terminal; choose another with"),
        ],
    )
    def test_outputs_that_would_be_lost(self, runs: Path, arguments: list[str], code: int, message: str) -> None:
        assert message in refused(*COMMAND, "runs/sdt", "--radius", "1", *arguments, code=code)
        assert {path.name for path in runs.parent.iterdir()} == {"runs"}

    @pytest.mark.usefixtures("_undrawn")
    def test_a_batch_of_any_size_is_all_images_at_most(self, runs: Path) -> None:
        for size in (30, 10**20):
            run("runs/sdt", "--radius", "1", "--batch-size", size, "--out", f"{size}.npz")
        whole, larger = (load_landscape(f"{size}.npz").tet_loss for size in (30, 10**20))
        np.testing.assert_array_equal(larger, whole)

    @pytest.mark.usefixtures("_undrawn")
    def test_ctrl_c_keeps_what_is_measured(self, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        count, counted = 0, landscape.count_correct

        def interrupted(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            if count == 5:
                os.kill(os.getpid(), signal.SIGINT)
            return counted(*arguments)

        monkeypatch.setattr(landscape, "count_correct", interrupted)
        output = run("runs/tet", "--radius", "1", code=130)
        assert "interrupted after 5 of 9 points, kept in runs/tet/landscape.npz" in output
        assert "holds 5 of 9 points already" in run("runs/tet", "--radius", "1")
        assert count == 9

    @pytest.mark.usefixtures("_undrawn")
    def test_ctrl_c_before_the_first_point_leaves_no_file(self, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(*_: Any) -> Iterator[None]:
            os.kill(os.getpid(), signal.SIGINT)
            yield from ()

        monkeypatch.setattr(landscape, "_measure_run", interrupted)
        output = run("runs/tet", "--radius", "1", "--out", "none.npz", code=130)
        assert output.endswith("interrupted after 0 of 9 points\n")
        assert not Path("none.npz").exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["runs/none"], "runs/none does not exist"),
            (["runs/sdt", "runs/sdt"], "a checkpoint is named twice: sdt, sdt"),
            (["runs/sdt", "--radius", "nan"], "--radius is nan; it must be above 0 and finite"),
            (["runs/sdt", "--radius", "0"], "--radius is 0; it must be above 0 and finite"),
            (["runs/sdt", "--radius", "0.1"], "--radius 0.1 is shorter than a step of the grid, 1; give more --points"),
            (["runs/sdt", "--radius", "1.5"], "--radius 1.5 leaves the grid, which ends at 1; give a larger --extent"),
            (["runs/sdt", "--points", "4"], "points is 4; it must be odd"),
            (["runs/sdt", "--device", "cuda:99"], "device cuda:99 is not there"),
            (["runs/sdt", "--data", "nowhere"], "unknown data set 'nowhere'"),
            (["runs/sdt", "--data", ""], "unknown data set ''; choose"),
        ],
    )
    def test_refusals(self, runs: Path, arguments: list[str], message: str) -> None:
        assert f"Error: {message}" in refused(*COMMAND, *arguments)
        assert not list(runs.rglob("*.npz"))

    def test_an_unknown_precision_is_wrong_usage(self, runs: Path) -> None:
        assert "Invalid value for '--precision'" in refused(*COMMAND, "runs/sdt", "--precision", "int4", code=2)

    def test_runs_that_differ(self, runs: Path) -> None:
        path = runs / "long" / "checkpoint.safetensors"
        save_checkpoint(path, classifier_of(), training={"T": 6}, provenance={})
        output = refused(*COMMAND, "runs/sdt", "runs/long")
        assert "Error: the checkpoints were trained with different T (sdt: 2, long: 6); say which with --T" in output
        output = refused(*COMMAND, "runs/long", "--split", "validation")
        assert "Error: --split validation: a run held out no images as far as it says" in output
