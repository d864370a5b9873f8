"""Event data: frames count every event where and when it happened, and recordings that cannot be used are named.

`fixtures/*.aedat4` were written by iniVation's own library (dv-processing 2.0.4, MonoCameraWriter): event i of 60 is at
t = 1,000,000 + 100 i, x = 7 i mod width, y = 13 i mod height, ON where 3 divides i. `camera-lz4` (LZ4) and
`camera-empty` have a sensor of 64x40 pixels, `dvs128` (uncompressed) of 128x128 like DVS-CIFAR10.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from command_helpers import printed, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tetdeploy.checkpoint import load, read_metadata
from tetdeploy.cli.predict import _read_recording
from tetdeploy.data import (
    FrameSet,
    ImageSet,
    event_sets,
    load_data,
    load_frames,
    load_parts,
    save_npz,
    split_validation,
    warn_of_other_framing,
)
from tetdeploy.data.cifar import CIFAR10
from tetdeploy.data.events import (
    READERS,
    Binning,
    Framing,
    Recording,
    decode_recordings,
    frame_size,
    read_aedat4,
    read_bin,
    read_npz,
    to_frames,
)
from tetdeploy.data.fingerprint import images_sha256
from tetdeploy.data.frames import count_statistics
from tetdeploy.data.labelled import LabelledSet
from tetdeploy.data.saccades import NUM_STEPS, saccade_events, saccade_frames, saccade_path
from tetdeploy.early_exit import softmax
from tetdeploy.engine import Engine
from tetdeploy.networks import Classifier, NetworkConfig, build_network
from tetdeploy.neurons import LIF
from tetdeploy.storage.form import as_json
from tetdeploy.train import TrainConfig, distillation_loss, train
from tetdeploy.train.augment import AUGMENTATIONS, same_at_every_step
from tetdeploy.train.device_images import DeviceImages, Draws
from tetdeploy.train.objective import Teacher

FIXTURES = Path(__file__).parent / "fixtures"
NOWHERE = Path("nowhere")


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def recording(**changes: Any) -> Recording:
    """Six events on a sensor of 4x3 pixels (width x height)."""
    arrays: dict[str, Any] = {"t": [0, 1, 2, 3, 50, 60], "x": [0, 1, 3, 3, 2, 0], "y": [0, 0, 2, 2, 1, 0]}
    arrays["p"] = [1, 0, 1, 1, 0, 1]
    return Recording(**{name: np.asarray(value) for name, value in (arrays | changes).items()}, sensor=(3, 4))


def random_recording(seed: int, num: int, sensor: tuple[int, int]) -> Recording:
    rng = np.random.default_rng(seed)
    height, width = sensor
    t = np.sort(rng.integers(0, 300_000, num))
    return Recording(t, rng.integers(0, width, num), rng.integers(0, height, num), rng.integers(0, 2, num), sensor)


def write_npz(path: Path, events: Recording, **more: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, t=events.t, x=events.x, y=events.y, p=events.p, **more)


def write_bin(path: Path, events: Recording) -> None:
    """N-MNIST's format: 40 bits an event, big endian: x (8), y (8), polarity (1), microseconds (23)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    t, x, y, p = (array.astype(np.int64) for array in (events.t, events.x, events.y, events.p))
    last = (p << 7) | (t >> 16)
    path.write_bytes(np.stack([x, y, last, t >> 8 & 255, t & 255], axis=1).astype(np.uint8).tobytes())


def event_folder(root: Path, sensor: tuple[int, int] = (20, 30), **more: Any) -> Path:
    """Three training and two test recordings of each of two classes, as `.npz`."""
    for part, count in (("train", 3), ("test", 2)):
        for label, name in enumerate(("left", "right")):
            for i in range(count):
                events = random_recording(100 * label + 10 * count + i, 400, sensor)
                write_npz(root / part / name / f"{i}.npz", events, **more)
    return root


# ---------------------------------------------------------------- frames


def test_frames_by_count_have_the_same_number_of_events() -> None:
    frames = to_frames(recording(), Binning(3, "count"), (3, 4))
    assert frames.shape == (3, 2, 3, 4) and frames.dtype == np.uint8
    wanted = np.zeros((3, 2, 3, 4), int)
    for t, p, y, x in [(0, 1, 0, 0), (0, 0, 0, 1), (1, 1, 2, 3), (1, 1, 2, 3), (2, 0, 1, 2), (2, 1, 0, 0)]:
        wanted[t, p, y, x] += 1
    np.testing.assert_array_equal(frames, wanted)


def test_frames_by_time_have_the_same_length() -> None:
    frames = to_frames(recording(), Binning(3, "time"), (3, 4))
    assert frames.sum((1, 2, 3)).tolist() == [4, 0, 2]  # 0..20, 20..40, 40..60: the last event ends the last frame
    floating = to_frames(recording(t=np.array([0, 1, 2, 3, 50, 60]) / 1e6), Binning(3, "time"), (3, 4))
    np.testing.assert_array_equal(floating, frames)
    at_once = to_frames(recording(t=np.full(6, 7)), Binning(3, "time"), (3, 4))
    assert at_once.sum((1, 2, 3)).tolist() == [6, 0, 0]


@settings(max_examples=30)
@given(
    T=st.integers(1, 12),
    by=st.sampled_from(["count", "time"]),
    num=st.integers(1, 200),
    sensor=st.tuples(st.integers(1, 48), st.integers(1, 48)),
)
def test_every_event_is_counted_once(T: int, by: Any, num: int, sensor: tuple[int, int]) -> None:
    events = random_recording(num, num, sensor)
    frames = to_frames(events, Binning(T, by), sensor)
    assert frames.shape == (T, 2, *sensor)
    assert frames.sum() == num
    assert frames.sum((0, 2, 3)).tolist() == [int((events.p == 0).sum()), int((events.p == 1).sum())]
    if by == "count":
        assert np.ptp(frames.sum((1, 2, 3), dtype=int)) <= 1


@pytest.mark.parametrize("by", ["count", "time"])
def test_frames_are_those_of_tonic(by: Any) -> None:
    transforms = pytest.importorskip("tonic.transforms")
    events = random_recording(0, 1000, (34, 34))
    made = np.zeros(1000, [("t", np.int64), ("x", np.int64), ("y", np.int64), ("p", np.int64)])
    for name in "txyp":
        made[name] = getattr(events, name)
    theirs = transforms.ToFrame((34, 34, 2), **{"n_event_bins" if by == "count" else "n_time_bins": 5})(made)
    ours = to_frames(events, Binning(5, by), (34, 34))
    # By time, tonic's bins have whole microseconds and leave out what lies behind the last one.
    allowed = 0 if by == "count" else 5
    assert np.abs(theirs.astype(int) - ours).sum() <= allowed


def test_a_large_sensor_is_brought_to_48_pixels_evenly() -> None:
    y, x = (axis.ravel() for axis in np.mgrid[:128, :96])
    t = np.arange(9 * len(x))
    events = Recording(t, np.tile(x, 9), np.tile(y, 9), np.ones(len(t), int), (128, 96))
    frames = to_frames(events, Binning(1), (128, 96))
    assert frames.shape == (1, 2, 48, 48) and frame_size((128, 96)) == (48, 48)
    assert (frames[0, 1] == 48).all()  # nine events on each of 128 / 48 x 96 / 48 pixels
    lone = Recording(*(np.array([value]) for value in (0, 9, 8, 1)))
    assert np.argwhere(to_frames(lone, Binning(1), (128, 96))).tolist() == [[0, 1, 3, 4]]
    assert frame_size((34, 200)) == (34, 48)


def test_cells_of_a_large_sensor_round_exact_sums() -> None:
    """Half an event is a tie, which a sum of inexact fractions would round by its own errors."""
    height, width = sensor = (260, 346)
    events = random_recording(0, 3000, sensor)
    counts = np.zeros((2, height, width), int)
    np.add.at(counts, (events.p, events.y, events.x), 1)
    rows = counts.repeat(48, 1).reshape(2, 48, height, width).sum(2)
    parts = rows.repeat(48, 2).reshape(2, 48, 48, width).sum(3)
    whole, left = np.divmod(parts, 48 * 48)
    is_tie = left == 24 * 48
    assert is_tie.sum() > 20
    wanted = whole + np.where(is_tie, whole % 2, left > 24 * 48)
    np.testing.assert_array_equal(to_frames(events, Binning(1), sensor)[0], wanted)


def test_the_memory_for_a_large_sensor_does_not_grow_with_T() -> None:
    events = random_recording(0, 100, (240, 304))
    tracemalloc.start()
    to_frames(events, Binning(50), (240, 304))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10e6  # counts of one frame take 1.2 MB


def test_counts_are_clipped_at_255() -> None:
    events = Recording(*(np.full(300, value) for value in (5, 1, 2, 0)))
    assert to_frames(events, Binning(1), (3, 3)).max() == 255


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({name: [] for name in "txyp"}, "it holds no event"),
        ({"t": [0, 1, -2, 3, 4, 5]}, "it has a negative time, -2; times start at 0"),
        (
            {"t": [0, 1, 7, 3, 4, 5]},
            "its times are not sorted: event 3 is at 3, after 7; sort all arrays by t, or, where the camera's clock",
        ),
        ({"t": [0, 1, 2, 3, 4, np.nan]}, "event 5 is at nan; wanted times, such as microseconds"),
        ({"t": ["a"] * 6}, "its times are <U1"),
        ({"x": [0, 1, 2, 3, 4, 0]}, "it reaches the pixel x=4, y=2, outside the sensor of 4x3 pixels"),
        ({"y": [0, 1, 3, 0, 1, 0]}, "it reaches the pixel x=3, y=3, outside the sensor"),
        ({"y": [0, 1, -1, 0, 1, 0]}, "it has an event at y=-1; pixels are counted from 0"),
        ({"x": [0, 1, 65_535, 0, 1, 0]}, "it reaches the pixel x=65535, y=2, outside the sensor of 4x3 pixels"),
        ({"x": [0.5] * 6}, "x is float64; wanted integers"),
        ({"p": [0, 1, 2, 0, 1, 0]}, "its polarities run from 0 to 2; wanted 0 .OFF. and 1"),
        ({"p": [0, 1, -1, 0, 1, 0]}, "its polarities run from -1 to 1"),
        ({"p": ["a"] * 6}, "its polarities are <U1; wanted 0 .OFF. and 1"),
        ({"p": [1j] * 6}, "its polarities are complex128"),
        ({"p": [0, 1]}, r"shapes t \[6\], x \[6\], y \[6\], p \[2\]; wanted \[n\], all of one length"),
        ({"p": np.zeros((6, 1), int)}, r"p \[6, 1\]; wanted \[n\]"),
    ],
)
def test_a_recording_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recording(**changes)


def test_a_pixel_that_no_sensor_has_is_refused_where_none_is_named() -> None:
    of_none = replace(recording(), sensor=None)
    with pytest.raises(ValueError, match=r"an event at x=65535, and no camera has 16,384 pixels a line; take damaged"):
        replace(of_none, x=np.where(np.arange(len(of_none.x)) == 2, 65_535, of_none.x))


def test_frames_refuse_a_sensor_that_is_too_small() -> None:
    with pytest.raises(ValueError, match="outside the sensor of 2x3 pixels"):
        to_frames(recording(), Binning(1), (3, 2))


def test_both_ways_to_write_polarities_and_unsigned_arrays_are_read() -> None:
    plain = to_frames(recording(), Binning(2), (3, 4))
    for p in ([1, -1, 1, 1, -1, 1], [True, False, True, True, False, True]):
        np.testing.assert_array_equal(to_frames(recording(p=p), Binning(2), (3, 4)), plain)
    unsigned = {"t": np.uint64([0, 1, 2, 3, 50, 60]), "x": np.uint64([0, 1, 3, 3, 2, 0])}
    np.testing.assert_array_equal(to_frames(recording(**unsigned), Binning(2), (3, 4)), plain)


@pytest.mark.parametrize(
    ("T", "by", "message"),
    [
        (0, "count", "at least 1 frames, got 0"),
        (2.5, "count", r"T must be a whole number, got 2\.5"),
        (1, "tim", "cut by 'tim'"),
    ],
)
def test_binning_refuses(T: Any, by: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Binning(T, by)


# ---------------------------------------------------------------- files


def assert_same_events(got: Recording, wanted: Recording) -> None:
    for name in "txyp":
        np.testing.assert_array_equal(getattr(got, name).astype(int), getattr(wanted, name).astype(int))


def test_npz_is_read(tmp_path: Path) -> None:
    events = random_recording(0, 50, (10, 20))
    write_npz(tmp_path / "a.npz", events, sensor_size=np.array([20, 10]))
    got = read_npz(tmp_path / "a.npz")
    assert_same_events(got, events)
    assert got.sensor == (10, 20)
    write_npz(tmp_path / "b.npz", events)
    assert read_npz(tmp_path / "b.npz").sensor is None


@pytest.mark.parametrize("size", [[np.inf, 3], [np.nan, 3], [-4, 3], [0, 3], [4, 3, 2], [4.5, 3], [16_385, 3]])
def test_sizes_that_no_sensor_has_are_refused(size: list[float], tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz", recording(), sensor_size=np.array(size))
    with pytest.raises(ValueError, match=r"sensor_size is \[.*\]; wanted two whole numbers from 1 to 16,384, width"):
        READERS[".npz"](tmp_path / "a.npz")


def test_n_mnists_bin_is_read(tmp_path: Path) -> None:
    pytest.importorskip("tonic")
    events = random_recording(0, 50, (34, 34))
    write_bin(tmp_path / "a.bin", events)
    got = read_bin(tmp_path / "a.bin")
    assert_same_events(got, events)
    assert got.sensor == (34, 34)


@pytest.mark.parametrize(("name", "width", "height"), [("camera-lz4", 64, 40), ("dvs128", 128, 128)])
def test_aedat4_is_read(name: str, width: int, height: int) -> None:
    pytest.importorskip("tonic")
    i = np.arange(60)
    got = read_aedat4(FIXTURES / f"{name}.aedat4")
    assert_same_events(got, Recording(1_000_000 + 100 * i, 7 * i % width, 13 * i % height, i % 3 == 0))
    assert got.sensor == (height, width)


# ---------------------------------------------------------------- events:PATH


def test_event_folder_is_read(tmp_path: Path) -> None:
    root = event_folder(tmp_path / "set")
    train = load_data(f"events:{root}", "train", data_dir=NOWHERE, T=4)
    test = load_data(f"events:{root}", "test", data_dir=NOWHERE, T=4)
    assert isinstance(train, FrameSet) and train.encoding == "frames"
    assert train.frames.shape == (6, 4, 2, 20, 30) and test.x.shape == (4, 4, 2, 20, 30)
    assert train.image_shape == (2, 20, 30)
    assert (train.class_names, train.name) == (("left", "right"), f"events:{root}")
    assert sorted(train.labels.tolist()) == [0, 0, 0, 1, 1, 1]
    wanted = to_frames(random_recording(100 + 30 + 1, 400, (20, 30)), Binning(4), (20, 30))
    assert sum((wanted == frames).all() for frames in train.frames[train.labels == 1]) == 1
    assert train.mean == test.mean == (0.0, 0.0)
    assert train.std == test.std
    normalized = train.frames / 255 / np.array(train.std)[:, None, None]
    np.testing.assert_allclose((normalized**2).mean((0, 1, 3, 4)), 1)


def test_event_folder_by_time_and_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = event_folder(tmp_path / "set")
    by_time = load_data(f"by-time:events:{root}", "train", data_dir=NOWHERE, T=4)
    assert by_time.name == f"by-time:events:{root}"
    assert (by_time.x != load_data(f"events:{root}", "train", data_dir=NOWHERE, T=4).x).any()
    monkeypatch.setattr("tetdeploy.data.events.READERS", {})
    again = load_data(f"by-time:events:{root}", "train", data_dir=NOWHERE, T=4)
    np.testing.assert_array_equal(again.x, by_time.x)


def test_the_cache_tells_numbers_of_frames_apart(tmp_path: Path) -> None:
    root = event_folder(tmp_path / "set")
    held = [load_data(f"events:{root}", "train", data_dir=NOWHERE, T=T).x.shape[1] for T in (2, 3, 2)]
    assert held == [2, 3, 2]


def test_the_parts_of_a_run_are_cut_into_its_frames(tmp_path: Path) -> None:
    root = event_folder(tmp_path / "set")
    train, val = load_parts(f"events:{root}", data_dir=NOWHERE, T=3, fraction=0.3)
    assert val is not None
    assert (train.x.shape[:2], val.x.shape[:2]) == ((4, 3), (2, 3))


def test_event_folder_of_all_formats(tmp_path: Path) -> None:
    pytest.importorskip("tonic")
    for part in ("train", "test"):
        write_bin(tmp_path / part / "digit" / "a.bin", random_recording(1, 80, (34, 34)))
        write_npz(tmp_path / part / "noise" / "a.npz", random_recording(2, 80, (34, 34)))
    data = load_data(f"events:{tmp_path}", "train", data_dir=NOWHERE, T=2)
    assert data.x.shape == (2, 2, 2, 34, 34)
    for part in ("train", "test"):
        (tmp_path / part / "camera").mkdir()
        shutil.copy(FIXTURES / "camera-lz4.aedat4", tmp_path / part / "camera")
    with pytest.raises(
        ValueError, match=r"sensors of 2 sizes: 34x34 in .*a\.bin, 64x40 in .*camera-lz4\.aedat4; wanted one"
    ):
        load_data(f"events:{tmp_path}", "train", data_dir=NOWHERE, T=2)


def test_a_sensor_that_nothing_says_is_named_where_it_is_scaled(tmp_path: Path) -> None:
    said = r"no recording of dvs says .*: the 12[0-9]x[0-9]+ pixels .* are scaled to 48x40, .* write sensor_size"
    root = event_folder(tmp_path / "dvs", (40, 128))
    with pytest.warns(RuntimeWarning, match=said):
        assert load_data(f"events:{root}", "train", data_dir=NOWHERE, T=2).image_shape == (2, 40, 48)
    with pytest.warns(RuntimeWarning, match=said):  # from the cache as well
        load_data(f"events:{root}", "test", data_dir=NOWHERE, T=2)
    say_sensor(root, 128, 40)
    known = load_data(f"events:{root}", "train", data_dir=NOWHERE, T=2)  # a warning would be an error
    assert known.framing == Framing("count", (40, 128))


def say_sensor(root: Path, width: int, height: int) -> None:
    one = next(root.rglob("*.npz"))
    with np.load(one) as arrays:
        np.savez(one, **dict(arrays) | {"sensor_size": [width, height]})


def test_what_recordings_do_not_say_of_their_sensor_is_as_in_the_training(tmp_path: Path) -> None:
    root, trained = event_folder(tmp_path / "set", (60, 100)), Framing("count", (70, 130))
    name = f"events:{root}"
    again = [load_data(name, "test", data_dir=NOWHERE, T=2, trained=trained) for _ in range(2)]
    assert again[0].framing == trained and (again[0].x == again[1].x).all()
    part = load_parts(name, data_dir=NOWHERE, T=2, fraction=0.3, trained=trained)[1]
    assert part is not None and part.framing == again[0].framing
    say_sensor(root, 130, 70)
    said = load_data(name, "test", data_dir=NOWHERE, T=2, trained=Framing("count", (90, 140)))
    np.testing.assert_array_equal(said.x, again[0].x)
    say_sensor(root, 100, 60)
    own = load_data(name, "test", data_dir=NOWHERE, T=2, trained=trained)
    assert own.framing == Framing("count", (60, 100)) and (own.x != said.x).any()


def test_events_beyond_the_sensor_of_the_training_come_from_another(tmp_path: Path) -> None:
    name = f"events:{event_folder(tmp_path / 'set', (60, 100))}"
    with pytest.warns(RuntimeWarning, match="no recording of set says"):
        frames = load_data(name, "test", data_dir=NOWHERE, T=2, trained=Framing("count", (60, 90)))
    assert frames.framing is not None and frames.framing.sensor[1] > 90
    height, width = frames.framing.sensor
    for sensor in ((height, width + 9), (height + 9, width)):  # whose border they reach
        trained = Framing("count", sensor)
        assert load_data(name, "test", data_dir=NOWHERE, T=2, trained=trained).framing == trained


@pytest.mark.parametrize("name", ["events:set", "saccades:digits"])
def test_frames_cut_otherwise_than_in_the_training_are_named(tmp_path: Path, name: str) -> None:
    event_folder(tmp_path / "set")
    trained = load_data(name, "test", data_dir=NOWHERE, T=2)
    by_time = load_data(f"by-time:{name}", "test", data_dir=NOWHERE, T=2)
    assert trained.framing is not None and by_time.framing == replace(trained.framing, by="time")
    warn_of_other_framing(trained, trained.framing, "net")  # a warning would be an error
    warn_of_other_framing(trained, None, "net")
    said = f"by-time:{name} holds frames of equal time, .*; net was trained on frames of equal counts, .*"
    with pytest.warns(RuntimeWarning, match=said):
        warn_of_other_framing(by_time, trained.framing, "net")
    whole = load_data(f"by-time:{name}", "test", data_dir=NOWHERE, T=1)
    warn_of_other_framing(whole, trained.framing, "net")  # one frame holds all events, whatever its rule
    with pytest.warns(RuntimeWarning, match="of a sensor of 3x2 pixels"):
        warn_of_other_framing(whole, Framing("time", (2, 3)), "net")


@pytest.mark.parametrize(
    "said",
    [
        "count",
        {"by": "count"},
        {"by": "width", "sensor": [2, 3]},
        {"by": "time", "sensor": [2]},
        {"sensor": 3},
        {"by": "time", "sensor": [0, 3]},
        {"by": "time", "sensor": [2.5, 3]},
    ],
)
def test_framing_in_a_file_that_was_changed_is_refused(said: Any) -> None:
    assert Framing.of(as_json({"framing": Framing("time", (3, 4)).to_dict()})) == Framing("time", (3, 4))
    assert Framing.of({}) is None
    with pytest.raises(ValueError, match=r"framing of the data is .*; wanted by, count or time, and sensor"):
        Framing.of({"framing": said})


def test_recordings_that_cannot_be_used_are_counted_and_named(tmp_path: Path) -> None:
    root = event_folder(tmp_path / "set", sensor_size=[30, 20])
    (root / "train/left/0.npz").write_bytes(b"PK no zip")
    np.savez(root / "train/right/0.npz", t=np.array([None]), x=[1], y=[2], p=[1])
    np.savez(root / "train/right/1.npz", t=[1], x=[1])
    np.savez(root / "test/left/0.npz", t=[1], x=[30], y=[2], p=[1])
    unsorted = {"t": [3, 1], "x": [1, 1], "y": [2, 2], "p": [1, 1]}
    np.savez(root / "test/right/0.npz", **unsorted)
    np.savez(root / "test/right/1.npz", t=[], x=np.zeros(0, int), y=np.zeros(0, int), p=[])
    with pytest.raises(ValueError, match=r"^5 of 10 recordings cannot be used: .*; repair or remove them$") as caught:
        load_data(f"events:{root}", "test", data_dir=NOWHERE)
    for part in (
        r"train/left/0.npz (it is damaged: it is no .npz, or is cut short)",
        r"train/right/0.npz (in it, t holds Python objects, which",
        r"train/right/1.npz (it holds t, x but not y, p)",
        r"test/right/0.npz (its times are not sorted",
        r"test/right/1.npz (it holds no event)",
    ):
        assert part in str(caught.value)
    for name in ("train/left/0", "train/right/0", "train/right/1", "test/right/0", "test/right/1"):
        shutil.copy(root / "train/left/1.npz", root / f"{name}.npz")
    with pytest.raises(ValueError, match=r"1 of 10 .*test/left/0.npz \(it reaches the pixel x=30, y=2, outside"):
        load_data(f"events:{root}", "test", data_dir=NOWHERE)


def test_what_a_reader_says_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[Exception] = [ValueError("two\n  lines"), MemoryError()]
    monkeypatch.setitem(READERS, ".npz", Mock(side_effect=errors))
    said = r"2 of 2 recordings cannot be used: a\.npz \(two lines\), b\.npz \(MemoryError\);"
    with pytest.raises(ValueError, match=said):
        decode_recordings([Path("a.npz"), Path("b.npz")], Binning(1), (2, 2), text="")
    engine = Mock(metadata={"source": {"data": {"framing": Framing("count", (2, 2)).to_dict()}}})
    (file := tmp_path / "a.npz").touch()
    for error, said in zip(errors, ("two lines", "MemoryError"), strict=True):
        monkeypatch.setitem(READERS, ".npz", Mock(side_effect=error))
        with pytest.raises(ValueError, match=f"a.npz cannot be read as a recording: {said}$"):
            _read_recording(file, engine)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.bin", b"123456", "it has 6 bytes, which are no events of 5 bytes each: it is cut short"),
        ("a.bin", b"", "it holds no event"),
        ("a.bin", bytes([40, 1, 0, 0, 0]), "it reaches the pixel x=40, y=1, outside the sensor of 34x34 pixels"),
        ("a.bin", bytes([1, 1, 0, 0, 9, 1, 1, 0, 0, 8]), "its times are not sorted"),
        ("a.aedat4", b"hello", r"a.aedat4 \(it is damaged, or cut short: \w+"),
        ("a.aedat4", (FIXTURES / "dvs128.aedat4").read_bytes()[:1500], r"a.aedat4 \(it is damaged, or cut short: \w"),
        ("a.aedat4", (FIXTURES / "camera-empty.aedat4").read_bytes(), "it holds no event"),
        (
            "a.aedat4",
            (FIXTURES / "dvs128.aedat4").read_bytes().replace(b">128<", b">100<"),
            "it reaches the pixel x=1.., y=1.., outside the sensor of 100x100 pixels",
        ),
        (
            "a.aedat4",
            (FIXTURES / "dvs128.aedat4").read_bytes().replace(b">128<", b">128\x80"),
            "it is damaged: the text on its streams is no UTF-8: invalid start byte",
        ),
        (
            "a.aedat4",
            (FIXTURES / "dvs128.aedat4").read_bytes().replace(b"\xf2\x02\0\0<dv", b"\xf2\x02\0\xff<dv"),
            "it is damaged: range end index",  # on which aedat panics
        ),
        (
            "a.aedat4",
            (FIXTURES / "camera-lz4.aedat4").read_bytes().replace(b"\xc0\x88\x02\0\0", b"\xc0\x88\x03\0\0"),
            "it is damaged: assertion failed",  # on which aedat panics as it reads the packets
        ),
    ],
)
def test_damaged_files_of_cameras_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    pytest.importorskip("tonic")
    for part in ("train", "test"):
        (tmp_path / part / "one").mkdir(parents=True)
        (tmp_path / part / "one" / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"2 of 2 recordings cannot be used: .*{message}"):
        load_data(f"events:{tmp_path}", "train", data_dir=NOWHERE)


def test_class_folders_are_checked(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no folder .*set/train; wanted .*/<class>/ with npz, aedat4 or bin rec"
    ):
        load_data("events:set", "train", data_dir=NOWHERE)
    root = event_folder(tmp_path / "set")
    (root / "train/up").mkdir()
    with pytest.raises(ValueError, match=r"1 class folders in .*train are empty: up; fill or remove them"):
        load_data("events:set", "train", data_dir=NOWHERE)
    shutil.copy(root / "train/left/0.npz", root / "train/up")
    with pytest.raises(ValueError, match=r"the classes in set/train and set/test differ .*only in train: up"):
        load_data("events:set", "train", data_dir=NOWHERE)
    (root / "train/up/0.npz").rename(root / "train/up/0.txt")
    with pytest.raises(
        ValueError, match=r"1 entries of the class folders .* are no .npz/.aedat4/.bin recordings: .*0.txt"
    ):
        load_data("events:set", "train", data_dir=NOWHERE)


@pytest.mark.parametrize("package", ["tonic", "aedat"])
def test_a_missing_package_is_named_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    if package == "aedat":
        pytest.importorskip("tonic")
    for part in ("train", "test"):
        (tmp_path / "set" / part / "a").mkdir(parents=True)
        shutil.copy(FIXTURES / "dvs128.aedat4", tmp_path / "set" / part / "a")
    monkeypatch.setitem(sys.modules, package, None)
    for name in ("events:set", *(("n-mnist", "dvs-cifar10") if package == "tonic" else ())):
        output = refused("train", "--data", name)
        assert f"needs the package '{package}', which is not installed: pip install 'tetdeploy[events]'" in output


def test_npz_recordings_need_numpy_only(tmp_path: Path) -> None:
    event_folder(tmp_path / "set")
    program = (
        "import sys, tetdeploy.data as d; from pathlib import Path;"
        "n = len(d.load_data('events:set', 'test', data_dir=Path('.')));"
        "print(n, [m for m in ('torch', 'tonic', 'aedat', 'sklearn', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "4 []"


# ---------------------------------------------------------------- N-MNIST and DVS-CIFAR10


def test_n_mnist_is_found_in_tonics_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tonic")
    monkeypatch.setitem(event_sets.COUNTS, "n-mnist", {"train": 20, "test": 10})
    for part, count, num in (("Train", 2, 60), ("Test", 1, 600)):
        for digit in range(10):
            for i in range(count):
                events = random_recording(digit, num, (34, 34))
                write_bin(tmp_path / "NMNIST" / part / str(digit) / f"{i:05}.bin", events)
            (tmp_path / "NMNIST" / part / str(digit) / "._00000.bin").write_bytes(b"macOS")
    train = load_data("n-mnist", "train", data_dir=tmp_path, T=3)
    test = load_data("n-mnist", "test", data_dir=tmp_path, T=3)
    assert train.x.shape == (20, 3, 2, 34, 34) and test.x.shape == (10, 3, 2, 34, 34)
    assert all((np.diff(part.labels) < 0).any() for part in (train, test))  # mixed
    assert (train.std, train.class_names) == (test.std, tuple("0123456789"))  # as network inputs: of the training set
    for frames, label in zip(test.x, test.labels, strict=True):
        np.testing.assert_array_equal(frames, to_frames(random_recording(label, 600, (34, 34)), Binning(3), (34, 34)))
    (tmp_path / "NMNIST/Test/3/00000.bin").unlink()
    with pytest.raises(ValueError, match=r"NMNIST: 9 recordings, but n-mnist has 10 in test; remove the folder"):
        load_data("n-mnist", "test", data_dir=tmp_path)


def test_the_training_recordings_that_normalise_n_mnists_test_set_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tonic")
    monkeypatch.setitem(event_sets.COUNTS, "n-mnist", {"train": 20, "test": 10})
    train = [tmp_path / f"NMNIST/Train/{digit}/{i}.bin" for digit in range(10) for i in range(2)]
    for i, path in enumerate((*train, *(tmp_path / f"NMNIST/Test/{digit}/0.bin" for digit in range(10)))):
        write_bin(path, random_recording(i, 60, (34, 34)))
    decoded: list[int] = []

    def count(paths: list[Path], *args: Any, **more: Any) -> NDArray[np.uint8]:
        decoded.append(len(paths))
        return decode_recordings(paths, *args, **more)

    monkeypatch.setattr(event_sets, "decode_recordings", count)

    def std(split: Any = "test", name: str = "n-mnist", T: int = 3) -> tuple[float, ...]:
        decoded.clear()
        return load_data(name, split, data_dir=tmp_path, T=T).std

    first = std()
    assert decoded == [10, 20] and (std(), decoded) == (first, [])
    assert (std("train"), decoded) == (first, [20])
    assert std(T=2) != first and decoded == [10, 20]  # each binning has its own
    assert std(name="by-time:n-mnist") != first and decoded == [10, 20]
    assert (std(), decoded) == (first, [])
    [kept] = (tmp_path / "cache/tetdeploy").glob("n-mnist-statistics-T3-count-*.npz")
    kept.write_bytes(kept.read_bytes()[:-40])
    assert (std(), decoded) == (first, [20])  # damaged
    write_bin(train[0], random_recording(0, 600, (34, 34)))
    assert std() != first and decoded == [20]  # of other files
    assert std("train") == std()


def test_dvs_cifar10_is_found_in_tonics_layout_and_split_by_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tonic")
    monkeypatch.setitem(event_sets.COUNTS, "dvs-cifar10", {"train": 90, "test": 10})
    read: list[str] = []
    monkeypatch.setitem(event_sets.READERS, ".aedat4", lambda path: read.append(path.name) or read_aedat4(path))
    for name in CIFAR10.class_names:
        (tmp_path / "CIFAR10DVS" / name).mkdir(parents=True)
        for i in range(1, 11):
            shutil.copy(FIXTURES / "dvs128.aedat4", tmp_path / "CIFAR10DVS" / name / f"cifar10_{name}_{i}.aedat4")
        (tmp_path / "CIFAR10DVS" / name / f"._cifar10_{name}_10.aedat4").write_bytes(b"macOS")
    test = load_data("dvs-cifar10", "test", data_dir=tmp_path)
    assert test.x.shape == (10, 10, 2, 48, 48)
    assert sorted(test.labels.tolist()) == list(range(10))
    assert {f"cifar10_{name}_10.aedat4" for name in CIFAR10.class_names} == set(read[:10])
    train = load_data("by-time:dvs-cifar10", "train", data_dir=tmp_path)
    assert train.x.shape == (90, 10, 2, 48, 48) and train.std == pytest.approx(test.std)
    assert np.bincount(train.labels).tolist() == [9] * 10


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("name", "place"), [("n-mnist", r"NMNIST/Train/<digit>/\*.bin"), ("dvs-cifar10", r"CIFAR10DVS/<class>/\*.aedat4")]
)
def test_a_download_that_fails_says_what_to_do(tmp_path: Path, name: str, place: str) -> None:
    pytest.importorskip("tonic")
    with pytest.raises(
        OSError, match=f"{name} was not found in data and could not be downloaded .*Looked for: .*{place}"
    ):
        load_data(name, "train", data_dir=Path("data"))
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


# ---------------------------------------------------------------- saccades


def noise_images(count: int, channels: int, height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, channels, height, width), np.uint8)


def naive_events(image: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Events [30, 2, H, W] of one grey image, pixel by pixel."""
    height, width = image.shape
    log = np.rint(np.log(np.arange(256) / 255 + 0.1) / 0.25 * 64)[image] / 64
    events = np.zeros((NUM_STEPS, 2, height, width), int)

    def seen(step: int, row: int, column: int) -> float:
        x, y = column - float(path[step, 0]), row - float(path[step, 1])
        left, top = int(np.floor(x)), int(np.floor(y))
        value = 0.0
        for r, c, weight in [
            (top, left, (1 - (y - top)) * (1 - (x - left))),
            (top, left + 1, (1 - (y - top)) * (x - left)),
            (top + 1, left, (y - top) * (1 - (x - left))),
            (top + 1, left + 1, (y - top) * (x - left)),
        ]:
            value += weight * log[min(max(r, 0), height - 1), min(max(c, 0), width - 1)]
        return value

    path = saccade_path(height, width)
    for row in range(height):
        for column in range(width):
            reference = seen(0, row, column)
            for step in range(NUM_STEPS):
                n = int(seen(step + 1, row, column) - reference)
                reference += n
                events[step, int(n > 0), row, column] = abs(n)
    return events


def test_saccades_are_those_of_a_naive_loop() -> None:
    image = noise_images(2, 1, 9, 12)
    for n, events in enumerate(np.moveaxis(saccade_events(image), 1, 0)):
        np.testing.assert_array_equal(events, naive_events(image[n, 0]))


def test_colours_are_seen_as_bright_as_they_are() -> None:
    red, green, blue = (image := noise_images(1, 3, 6, 7))[0].astype(int)
    luma = (299 * red + 587 * green + 114 * blue + 500) // 1000
    np.testing.assert_array_equal(saccade_events(image)[:, 0], naive_events(luma))


def test_the_path_is_a_closed_triangle_round_the_middle() -> None:
    path = saccade_path(32, 16)
    np.testing.assert_array_equal(path[[0, 10, 20, 30]], [(-2, -4), (0, 4), (2, -4), (-2, -4)])
    assert path.shape == (31, 2)


def test_a_closed_path_gives_as_many_on_as_off_events() -> None:
    counts = saccade_events(noise_images(3, 3, 10, 10)).sum(0, dtype=int)
    np.testing.assert_array_equal(counts[:, 0], counts[:, 1])
    assert counts.min() >= 0 and counts.max() > 0


def test_an_edge_that_moves_right_turns_pixels_off() -> None:
    image = np.zeros((1, 1, 8, 8), np.uint8)
    image[..., 4:] = 255  # dark on the left: the third saccade moves it left, the others right
    events = saccade_events(image).sum((1, 3, 4), dtype=int)
    assert events[:20, 0].sum() > 0 and events[:20, 1].sum() == 0
    assert events[20:, 1].sum() == events[:20, 0].sum() and events[20:, 0].sum() == 0


def test_an_even_image_has_no_events_and_colours_are_seen_as_grey() -> None:
    assert saccade_events(np.full((1, 1, 8, 8), 200, np.uint8)).sum() == 0
    grey = noise_images(2, 1, 8, 8)
    np.testing.assert_array_equal(saccade_events(grey), saccade_events(grey.repeat(3, axis=1)))
    with pytest.raises(ValueError, match="saccades need images of 1 or 3 channels, got 2"):
        saccade_events(noise_images(1, 2, 8, 8))


def test_saccade_frames_of_an_image_whose_events_end_early() -> None:
    image = np.full((1, 1, 8, 8), 79, np.uint8)
    image[0, 0, 0, 1] = 192
    events = saccade_events(image).sum((1, 2, 3, 4), dtype=int)
    assert events[-1] == 0 < events.sum()
    for T in (2, 4, 30):
        assert saccade_frames(image, Binning(T)).sum() == events.sum()


@pytest.mark.parametrize("by", ["count", "time"])
def test_saccade_frames_hold_all_events(by: Any) -> None:
    images = noise_images(70, 1, 8, 8)  # more than one chunk
    events, frames = saccade_events(images), saccade_frames(images, Binning(7, by))
    assert frames.shape == (70, 7, 2, 8, 8)
    np.testing.assert_array_equal(frames.sum(1, dtype=int), events.sum(0, dtype=int))
    per_frame = frames.sum((2, 3, 4), dtype=int)
    if by == "count":  # to one step of the movement
        largest_step = events.sum((2, 3, 4), dtype=int).max(0)
        assert (np.abs(per_frame - per_frame.mean(1, keepdims=True)) <= largest_step[:, None]).all()
    else:
        np.testing.assert_array_equal(per_frame[:, 0], events[:5].sum((0, 2, 3, 4), dtype=int))


def test_saccades_of_the_digits() -> None:
    train = load_data("saccades:digits", "train", data_dir=NOWHERE, T=5)
    test = load_data("saccades:digits", "test", data_dir=NOWHERE, T=5)
    digits = load_data("digits", "test", data_dir=NOWHERE)
    assert isinstance(test, FrameSet) and test.name == "saccades:digits"
    assert train.x.shape == (1438, 5, 2, 8, 8) and test.x.shape == (359, 5, 2, 8, 8)
    np.testing.assert_array_equal(test.labels, digits.labels)
    assert train.std == test.std and train.mean == (0.0, 0.0)
    assert int(test.x.sum(dtype=int)) == 263_948  # exact arithmetic: the same on every machine


@pytest.mark.parametrize(
    ("name", "T", "message"),
    [
        ("saccades:digits", 31, "moves in 30 steps, too few for T=31"),
        ("saccades:mnist", 5, "unknown data set 'mnist'"),
        ("saccades:frames.npz", 5, "frames.npz holds frames already; saccades turn images into frames"),
        ("by-time:digits", 5, "'by-time:digits': only events are cut into frames"),
        ("by-time:frames.npz", 5, "only events are cut into frames"),
        ("saccades:digits", 0, "at least 1 frames, got 0"),
    ],
)
def test_names_of_event_sets_refuse(name: str, T: int, message: str) -> None:
    save_npz(frame_set(), "frames.npz")
    with pytest.raises(ValueError, match=message):
        load_data(name, "train", data_dir=NOWHERE, T=T)


# ---------------------------------------------------------------- FrameSet


def frame_set(**changes: Any) -> FrameSet:
    parts: dict[str, Any] = {
        "name": "made",
        "split": "train",
        "frames": np.random.default_rng(0).integers(0, 9, (12, 3, 2, 8, 8), np.uint8),
        "labels": np.arange(12) % 3,
        "class_names": ("a", "b", "c"),
        "mean": (0.0, 0.0),
        "std": (0.02, 0.02),
    }
    return FrameSet(**(parts | changes))


def stored(data: LabelledSet) -> dict[str, Any]:
    return {"mean": data.mean, "std": data.std, "class_names": data.class_names}


def classifier_of(data: LabelledSet, encoding: str = "frames", **options: Any) -> Classifier:
    """A small network for the data's frames, as it is before a training."""
    config = NetworkConfig("convsnn", len(data.class_names), 2, data.image_shape[1:], **{"width": 0.1} | options)
    torch.manual_seed(0)
    return Classifier(build_network(config), config=config, encoding=encoding, **stored(data))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"frames": np.zeros((12, 2, 8, 8), np.uint8)},
            r"frames are uint8 \[12, 2, 8, 8\]; wanted uint8 \[N, T, C, H, W\]",
        ),
        ({"frames": np.zeros((12, 3, 2, 8, 8))}, "frames are float64"),
        ({"frames": np.zeros((12, 0, 2, 8, 8), np.uint8)}, r"frames have the shape \[12, 0, 2, 8, 8\]"),
        ({"labels": np.zeros(5, np.int64)}, "12 recordings but 5 labels"),
        ({"std": (0.1,)}, "2 means and 1 stds for 2 channels"),
    ],
)
def test_frame_set_refuses_parts_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frame_set(**changes)


def test_frame_sets_split_and_select_as_image_sets_do() -> None:
    data = frame_set()
    train, val = split_validation(data, fraction=0.25)
    assert isinstance(train, FrameSet)
    assert np.bincount(val.labels).tolist() == [1, 1, 1] and len(train) == 9
    chosen = data.select([5, 2])
    np.testing.assert_array_equal(chosen.frames, data.frames[[5, 2]])
    with pytest.raises(ValueError, match="made train: cannot select from 12 recordings"):
        data.select([12])


def test_frames_come_back_from_a_npz(tmp_path: Path) -> None:
    data = frame_set()
    save_npz(data, tmp_path / "frames.npz")
    got = load_data(str(tmp_path / "frames.npz"), "test", data_dir=NOWHERE)
    assert isinstance(got, FrameSet)
    np.testing.assert_array_equal(got.frames, data.frames)
    np.testing.assert_array_equal(load_frames(tmp_path / "frames.npz")[0], data.frames)
    assert got.class_names == data.class_names
    np.savez(tmp_path / "float.npz", images=data.frames / 255, labels=data.labels)
    with pytest.raises(ValueError, match=r"images are float64 .*; wanted frames, uint8 \[N"):
        load_data(str(tmp_path / "float.npz"), "test", data_dir=NOWHERE)


def test_a_channel_without_events_does_not_divide_by_zero() -> None:
    frames = np.zeros((2, 3, 2, 4, 4), np.uint8)
    frames[:, :, 1] = 51
    assert count_statistics(frames) == ((0.0, 0.0), (1 / 255, pytest.approx(0.2)))


def test_the_first_thousand_recordings_are_measured() -> None:
    frames = np.zeros((1001, 1, 2, 1, 1), np.uint8)
    frames[1000] = 255
    assert count_statistics(frames)[1] == (1 / 255, 1 / 255)


# ---------------------------------------------------------------- augmentation


def test_cutout_is_the_same_at_every_step() -> None:
    data = frame_set(frames=np.full((12, 3, 2, 8, 8), 9, np.uint8))
    images = DeviceImages(data, classifier_of(data), TrainConfig(T=3, epochs=1, augment="none", cutout=3))
    ((x, _),) = images.drawn(Draws(torch.arange(4)[None], (0,), slice(4)))
    assert (x == 0).any((1, 2, 3, 4)).all() and torch.equal(x, x[:, :1, :1].expand_as(x))


def test_flip_and_roll_are_the_same_at_every_step() -> None:
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (40, 3, 2, 12, 14), np.uint8))
    made = same_at_every_step(AUGMENTATIONS["flip-roll"], frames, torch.Generator().manual_seed(0))
    assert made.shape == frames.shape and made.dtype == torch.uint8
    found = set()
    for before, after in zip(frames, made, strict=True):
        matches = [
            (flip, down, right)
            for flip in (False, True)
            for down in range(-5, 6)
            for right in range(-5, 6)
            if torch.equal((before.flip(-1) if flip else before).roll((down, right), (-2, -1)), after)
        ]
        assert len(matches) == 1, "one flip and one roll for all steps and channels"
        found.add(matches[0])
    assert {flip for flip, _, _ in found} == {False, True}
    assert {-5, 5} <= {shift for _, *shifts in found for shift in shifts}
    assert any(down != right for _, down, right in found)


# ---------------------------------------------------------------- the whole chain


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `train` and two exports ran on frames: T=3, unrolled and step."""
    folder = tmp_path_factory.mktemp("trained")
    runs = ["--runs", str(folder / "runs")]
    small = ["--data", "saccades:digits", "--T", "3", "--epochs", "3", "--width", "0.25", "--lr", "1e-2"]
    for arguments in (["train", *small], ["export", "--check", "64"], ["export", "--layout", "step", "--check", "64"]):
        output = printed(*arguments, *runs)
        if arguments[0] == "train":
            made = shlex.quote(f"{folder}/runs/saccades-digits-convsnn")
            assert f"next: tetdeploy export {made} --fold-bn" in output
    return folder / "runs" / "saccades-digits-convsnn"


def test_a_model_of_recordings_says_how_they_were_framed_and_predict_frames_alike(tmp_path: Path) -> None:
    root = event_folder(tmp_path / "set", (60, 100))
    say_sensor(root, 110, 60)
    small = ["--data", f"by-time:events:{root}", "--T", "2", "--epochs", "1", "--width", "0.1", "--batch-size", "2"]
    printed("train", *small, "--out", "run")
    framing = Framing("time", (60, 110))
    assert Framing.of(read_metadata("run")["data"]) == load("run").framing == framing
    printed("export", "run", "--check", "2", "-o", "model.onnx")
    for file in ("run", "model.onnx"):
        assert "of a sensor of 110x60 pixels" in printed("inspect", file)

    one = next(path for path in root.rglob("*.npz") if read_npz(path).sensor is None)
    recording = read_npz(one)
    engine = Engine("model.onnx")
    printed("predict", "model.onnx", one, "--json", "p.json")
    certainty = json.loads(Path("p.json").read_text())["images"][0]["certainty"]
    logits = engine.run(to_frames(recording, Binning(2, "time"), framing.sensor)[None]).per_step[0]
    np.testing.assert_allclose(certainty, softmax(np.cumsum(logits, 0) / [[1], [2]]), rtol=1e-5)

    write_npz(Path("wide.npz"), recording, sensor_size=[120, 60])
    write_npz(Path("far.npz"), random_recording(1, 50, (90, 110)))
    Path("broken.npz").write_bytes(b"PK")
    Path("a.png").touch()
    write_npz(Path("odd.npz"), recording, sensor_size=[16.5, 2])
    for arguments, message, code in (
        (
            ["wide.npz"],
            "wide.npz is of a sensor of 120x60 pixels (width x height); the network was trained on 110x60",
            1,
        ),
        (["far.npz"], "far.npz: it reaches the pixel x=", 1),
        (["broken.npz"], "broken.npz cannot be read as a recording: it is damaged", 1),
        (["a.png"], "a.png cannot be read as a recording: recordings end in .npz, .aedat4, .bin", 1),
        (["none.aedat4"], "no recording at none.aedat4", 1),
        (["odd.npz"], "its sensor_size is [16.5, 2.0]; wanted two whole numbers", 1),
        ([str(one), "--resize"], "--resize is for images", 2),
    ):
        assert message in refused("predict", "model.onnx", *arguments, code=code)

    printed("export", "run", "--T", "1", "--check", "2", "-o", "short.onnx")
    printed("predict", "short.onnx", one)  # the first of the frames

    unsaid = event_folder(tmp_path / "unsaid", (60, 100))
    printed("sweep", "model.onnx", "--data", f"by-time:events:{unsaid}", "--json", "s.json")
    swept = json.loads(Path("s.json").read_text())
    alike = load_data(f"by-time:events:{unsaid}", "test", data_dir=NOWHERE, T=2, trained=framing)
    assert swept["images_sha256"] == images_sha256(alike.x, alike.labels)
    for command in (["sweep", "model.onnx"], ["evaluate", "run"], ["export", "run", "--check", "2"]):
        with pytest.warns(RuntimeWarning, match="was trained on frames of equal time"):
            printed(*command, "--data", f"events:{root}")


def test_predict_refuses_recordings_where_the_model_does_not_say_how_they_were_framed() -> None:
    frames = load_data("saccades:digits", "train", data_dir=NOWHERE, T=3)
    save_npz(frames, "frames.npz")
    small = ["--data", "frames.npz", "--T", "3", "--epochs", "1", "--width", "0.1", "--out", "run"]
    printed("train", *small)
    printed("export", "run", "--check", "2", "-o", "m.onnx")
    assert "m.onnx does not say how recordings became the frames" in refused("predict", "m.onnx", "a.npz")


def test_frames_are_trained_exported_and_swept(trained: Path, tmp_path: Path) -> None:
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["val_accuracy"] > 0.4  # ten classes
    printed("sweep", trained / "model-T3.onnx", "--json", tmp_path / "sweep.json")
    swept = json.loads((tmp_path / "sweep.json").read_text())
    assert (swept["data"], swept["num_samples"]) == ("saccades:digits", 359)
    assert [row["T"] for row in swept["rows"]] == [1, 2, 3]
    assert swept["rows"][-1]["accuracy"] > 0.4
    printed("sweep", trained / "model-step.onnx", "--limit", "20")


def test_frames_are_streamed(trained: Path) -> None:
    whole, step = Engine(trained / "model-T3.onnx"), Engine(trained / "model-step.onnx")
    assert whole.encoding == step.encoding == "frames"
    frames = load_data("saccades:digits", "test", data_dir=NOWHERE, T=3).x[:20]
    stream = step.stream(batch=20)
    for t in range(3):
        result = stream.push(frames[:, t])
    np.testing.assert_allclose(result.logits, whole.run(frames).logits, atol=1e-4)
    with pytest.raises(ValueError, match="a model of frames takes a new one"):
        stream.push()


def test_what_does_not_fit_frames_is_refused(trained: Path) -> None:
    save_npz(frame_set(), "frames.npz")
    for arguments, message in [
        (("export", str(trained), "--T", "8"), "T=8 steps are checked on as many frames, got 3; choose a smaller T"),
        (
            ("train", "--data", "frames.npz", "--T", "4", "--epochs", "2"),
            "3 frames a recording, too few for T=4; lower --T",
        ),
        (
            ("train", "--data", "frames.npz", "--tit", "4:1,3:1"),  # not of the last stage alone
            "3 frames a recording, too few for T=4; lower --T",
        ),
        (("sweep", str(trained / "model-T3.onnx"), "--data", "digits"), "takes input of shape [N, T, 2, 8, 8]"),
        (("train", "--data", "saccades:digits", "--T", "40"), "moves in 30 steps, too few for T=40"),
    ]:
        assert message in refused(*arguments)


def test_a_teacher_without_time_sees_recordings_whole(tmp_path: Path) -> None:
    cut = {T: load_data("saccades:digits", "test", data_dir=NOWHERE, T=T).select(range(20)) for T in (1, 4)}
    classifier = classifier_of(cut[1], width=1.0, ann=True).eval()
    logits = torch.randn(4, 20, 10)
    expected = distillation_loss(logits, classifier(torch.from_numpy(cut[1].x).transpose(0, 1))[0].detach(), tau_kd=2.0)
    assert Teacher(classifier, 0.5, 2.0).loss(logits, torch.from_numpy(cut[4].x)) == 0.5 * expected

    save_npz(cut[4], tmp_path / "cut.npz")
    data = load_data(str(tmp_path / "cut.npz"), "train", data_dir=NOWHERE)
    with pytest.raises(ValueError, match=r"a teacher without time learns from whole recordings: for distill choose"):
        train(classifier, data, None, TrainConfig(T=1, distill="ann"), tmp_path / "run")


def test_recordings_have_the_sensor_of_a_teacher_or_a_warning_says_that_it_is_another(tmp_path: Path) -> None:
    said, unsaid = (event_folder(tmp_path / name, (60, 100)) for name in ("said", "unsaid"))
    say_sensor(said, 110, 60)
    small = ["--epochs", "1", "--width", "0.1", "--batch-size", "2"]
    taught = ["train", *small, "--distill", "ann", "--T", "2", "--data"]
    printed("train", *small, "--ann", "--data", f"events:{said}", "--out", "ann")
    for name, framing in ((f"events:{unsaid}", Framing("count", (60, 110))), (f"by-time:events:{said}", None)):
        printed(*taught, name, "--out", "run")  # alike when seen whole; a warning would be an error
        assert framing in (None, load("run").framing)
        shutil.rmtree("run")
    say_sensor(unsaid, 120, 60)
    other = "of a sensor of 120x60 pixels .*; the teacher ann was trained on .* 110x60"
    with pytest.warns(RuntimeWarning, match=other):
        printed(*taught, f"events:{unsaid}", "--out", "run")
    printed("train", *small, "--T", "2", "--data", f"events:{unsaid}", "--out", "first")
    shutil.rmtree(unsaid)
    event_folder(unsaid, (60, 100))  # without a word again
    with pytest.warns(RuntimeWarning, match=other):  # what the run begins with goes before the teacher
        printed(*taught, f"events:{unsaid}", "--init", "first", "--out", "second")
    assert "--distill: nothing does not exist" in refused("train", *small, "--distill", "nothing")


def test_a_teacher_without_time_sees_255_events_a_pixel_at_most() -> None:
    classifier = classifier_of(frame_set(std=(1.0, 1.0)), ann=True).eval()
    logits, x = torch.randn(4, 3, 3), torch.full((3, 4, 2, 8, 8), 100, dtype=torch.uint8)
    targets = classifier(torch.full((1, 3, 2, 8, 8), 255, dtype=torch.uint8))[0].detach()
    assert Teacher(classifier, 1.0, 2.0).loss(logits, x) == distillation_loss(logits, targets, tau_kd=2.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"T": 2, "random_T": "1:3"}, "into 3 frames for training and into T=2 afterwards; train with T=3$"),
        ({"T": 2, "tit": "3:1,2:1"}, "into 3 frames for training and into T=2 afterwards; .*T=3 in the last stage"),
    ],
)
def test_recordings_are_cut_into_as_many_frames_after_the_training(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    data = frame_set()
    with pytest.raises(ValueError, match=message):
        train(classifier_of(data), data, None, TrainConfig(epochs=2, **changes), tmp_path / "run")


def test_a_network_that_takes_frames_alone_is_trained(tmp_path: Path) -> None:
    class FramesAlone(torch.nn.Sequential):  # type: ignore[misc, name-defined]
        def forward(self, frames: Any) -> Any:
            return super().forward(frames.flatten(2))

    torch.manual_seed(0)
    data, network = frame_set(), FramesAlone(torch.nn.Linear(128, 16), LIF(), torch.nn.Linear(16, 3))
    config = NetworkConfig("made:network", num_classes=3, in_channels=2, image_size=(8, 8))
    classifier = Classifier(network, config=config, encoding="frames", **stored(data))
    how = TrainConfig(T=3, epochs=2, batch_size=4, lr=1e-2, ema=0.5, random_T="1:3")
    assert train(classifier, data, data, how, tmp_path / "run").epochs == 2


def test_images_do_not_go_on_with_a_network_for_frames() -> None:
    data = frame_set()
    with pytest.raises(ValueError, match="made has frames input; the network was made for direct input"):
        train(classifier_of(data, "direct"), data, None, TrainConfig(T=3), Path("run"))
    images = ImageSet("flat", "train", data.frames[:, 0], data.labels, **stored(data))
    with pytest.raises(
        ValueError, match="flat has direct input; the network was made for frames input, as encoding of its"
    ):
        train(classifier_of(data), images, None, TrainConfig(T=3), Path("run"))
    with pytest.raises(ValueError, match="unknown encoding 'rate'; choose one of direct, frames"):
        classifier_of(data, "rate")
