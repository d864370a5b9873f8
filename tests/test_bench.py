"""`tetdeploy bench`: what is timed and what is not, the numbers by a clock of our own, inputs, report, refusals."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_helpers import printed, refused
from export_helpers import digits, exported
from gpu_stand_in import gpu_build
from report_helpers import MACHINE, run_folder, seeds_folder, tables, write
from report_helpers import result as sweep_result

from tetdeploy import native
from tetdeploy.bench import CALLS_PER_TURN, Bench, Setting, random_input
from tetdeploy.engine import Engine
from tetdeploy.report.document import Table
from tetdeploy.report.page import document_of
from tetdeploy.report.sources import read_results
from tetdeploy.report.tables import bench_cells
from tetdeploy.system.machine import cpu_model

Call = tuple[int, int, int]  # threads, batch, T


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A dynamic model with its reference images, in a folder of its own."""
    source = exported("dynamic")
    shutil.copy(source.with_suffix(".reference.npz"), tmp_path / "m.reference.npz")
    return Path(shutil.copy(source, tmp_path / "m.onnx"))


run = partial(printed, "bench")


def reported(timings: Path) -> Table:
    """The table of a bench in a report, which is of a sweep, too."""
    sweep = write(timings.parent / "m.sweep.json", sweep_result(kind="sweep"))
    (table,) = tables(read_results([sweep, timings]), "Latency and throughput")
    return table


class Clock:
    """Stands in for `time`; a call of the engine takes what `cost` says, in seconds."""

    def __init__(self, cost: Callable[[Call, int], float]) -> None:
        self.now, self.cost = 100.0, cost
        self.calls: list[Call] = []

    def perf_counter(self) -> float:
        return self.now

    def run(self, engine: Engine, x: np.ndarray[Any, Any], T: int) -> None:
        call = (engine._sessions._threads or 0, len(x), T)
        self.now += self.cost(call, self.calls.count(call))
        self.calls.append(call)


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Call, int], float]], Clock]:
    def make(cost: Callable[[Call, int], float]) -> Clock:
        clock = Clock(cost)
        monkeypatch.setattr("tetdeploy.bench.time", clock)
        monkeypatch.setattr(Engine, "run", lambda engine, x, T: clock.run(engine, x, T))
        return clock

    return make


# -------------------------------------------------------------------------------------------------- what is measured


def test_numbers_are_those_of_the_clock(model: Path, clocked: Any) -> None:
    """The k-th timed call of 100 takes k ms, the last 100 more; each turn begins with a call of 1 s, which must not
    count."""
    turn = CALLS_PER_TURN + 1
    last = 100 * turn // CALLS_PER_TURN - 1
    clocked(lambda call, k: 1.0 if k % turn == 0 else (k - k // turn) * 1e-3 + 0.1 * (k == last))
    timing = Bench(model, batches=[4], threads=[1], steps=[3])
    timing.run(random_input(timing.engine, 3), repeats=100)
    (row,) = timing.rows
    assert (row["batch"], row["threads"], row["T"], row["calls"]) == (4, 1, 3, 100)
    assert row["median_ms"] == pytest.approx(50.5) and row["p95_ms"] == pytest.approx(95.05)
    assert row["p99_ms"] == pytest.approx(100.01)
    assert row["images_per_s"] == pytest.approx(4 * 100 / 5.15)
    assert timing.load_ms == {1: 0}  # no call


def test_images_come_round_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(Engine, "run", lambda engine, x, T: shown.append(x))
    Bench(model, batches=[5], threads=[1], steps=[1]).run(digits().images[:2], repeats=1)
    np.testing.assert_array_equal(shown[0], digits().images[[0, 1, 0, 1, 0]])


def test_settings_take_turns_in_changing_order(model: Path, clocked: Any) -> None:
    clock = clocked(lambda call, k: 1e-3)
    timing = Bench(model, batches=[1, 2], threads=[1, 2], steps=[1, 3])
    timing.run(random_input(timing.engine, 3), repeats=4 * CALLS_PER_TURN)
    turns = clock.calls[:: CALLS_PER_TURN + 1]
    assert clock.calls == [call for call in turns for _ in range(CALLS_PER_TURN + 1)]
    rounds = [turns[k : k + 8] for k in range(0, len(turns), 8)]
    everything = {(threads, batch, T) for threads in (1, 2) for batch in (1, 2) for T in (1, 3)}
    assert [set(r) for r in rounds] == [everything] * 4
    assert len({tuple(r) for r in rounds}) > 1


def test_repeats_are_exact(model: Path, clocked: Any) -> None:
    clocked(lambda call, k: 1e-3)
    timing = Bench(model, batches=[1, 8], threads=[1])
    ticks: list[float] = []
    timing.run(random_input(timing.engine, 4), repeats=7, share_done=ticks.append)
    assert [row["calls"] for row in timing.rows] == [7, 7]
    assert ticks == sorted(ticks) and ticks[-1] == 1.0


def test_seconds_end_it_but_every_setting_has_a_turn(model: Path, clocked: Any) -> None:
    clock = clocked(lambda call, k: 0.75 / (CALLS_PER_TURN + 1))
    timing = Bench(model, batches=[1, 8], threads=[1])
    shares: list[float] = []
    timing.run(random_input(timing.engine, 4), seconds=0.01, share_done=shares.append)
    assert [row["calls"] for row in timing.rows] == [CALLS_PER_TURN] * 2
    assert shares == [0.0, 1.0]  # though it has taken longer than it was to
    begun = clock.now
    shares.clear()
    timing.run(random_input(timing.engine, 4), seconds=6.0, share_done=shares.append)
    assert clock.now - begun == 6.0 and shares == [turn / 8 for turn in range(8)]


def test_numbers_of_numpy_are_written_as_json(model: Path) -> None:
    bench = Bench(model, batches=np.array([1, 2]), threads=np.array([1]), steps=(np.int64(2),))  # type: ignore[arg-type]
    bench.run(random_input(bench.engine, 2), repeats=1)
    assert [row["batch"] for row in json.loads(json.dumps(bench.to_dict("noise")))["rows"]] == [1, 2]


def test_real_calls(model: Path) -> None:
    timing = Bench(model, batches=[1, 32], threads=[1], steps=[8])
    timing.run(random_input(timing.engine, 8), repeats=10)
    one, many = timing.rows
    assert 0 < one["median_ms"] <= one["p95_ms"] <= one["p99_ms"]
    assert one["median_ms"] < many["median_ms"]  # 32 images take longer than one
    assert set(timing.load_ms) == {1} and timing.load_ms[1] > 0.1


@pytest.mark.parametrize(
    ("layout", "options", "T"), [("unrolled", {"T": 3}, 3), ("dynamic", {}, 4), ("step", {}, 4)], ids=lambda v: str(v)
)
def test_T_is_the_graphs_or_that_of_the_training(layout: str, options: dict[str, Any], T: int) -> None:
    assert Bench(exported(layout, **options), batches=[1], threads=[1]).settings == [Setting(1, 1, T)]


def test_noise_is_what_the_graph_takes() -> None:
    frames = Engine(exported("unrolled", T=4, encoding="frames"))
    assert random_input(frames, 4).shape == (1, 4, 1, 8, 8) and random_input(frames, 4).dtype == np.uint8
    normalised = random_input(Engine(exported("dynamic", normalize=False)), 4)
    assert normalised.shape == (1, 1, 8, 8) and normalised.dtype == np.float32


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
def test_says_whether_the_native_operator_runs(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tetdeploy.runtimes.sessions.NATIVE_FROM", 1)
    monkeypatch.setenv("COLUMNS", "200")
    fast = run(model, "--threads", "1", "--repeats", "1")
    assert "CPUExecutionProvider, native operators" in fast and "slower than" not in fast
    monkeypatch.setenv("TETDEPLOY_NATIVE", "0")
    plain = run(model, "--threads", "1", "--repeats", "1")
    assert "native operators" not in plain and "slower than it could be" in plain and "TETDEPLOY_NATIVE=0" in plain


def test_the_name_of_the_processor() -> None:
    assert cpu_model(["processor\t: 0", "model name\t: Xeon: 8 cores", "flags: sse"]) == "Xeon: 8 cores"
    assert cpu_model(["Hardware\t: BCM2711", "Model\t\t: Raspberry Pi 4"]) == "Raspberry Pi 4"
    assert cpu_model([])


# ------------------------------------------------------------------------------------------------------ command line


def test_json_and_table(model: Path) -> None:
    output = run(model, "--batch", "1,3", "--threads", "1", "--T", "1,4", "--repeats", "6")
    content = json.loads(model.with_suffix(".bench.json").read_text())
    assert content["kind"] == "bench" and content["model"] == str(model) and content["data"] == "reference images"
    assert content["model_sha256"] == Engine(model).sha256 and content["device"] == "cpu" and not content["interrupted"]
    assert content["size_bytes"] == model.stat().st_size and content["load_ms"][0]["threads"] == 1
    assert content["machine"]["provider"] == "CPUExecutionProvider" and content["machine"]["cores"] >= 1
    assert content["versions"]["onnxruntime"] and content["machine"]["cpu"]
    assert [(r["batch"], r["threads"], r["T"]) for r in content["rows"]] == [(1, 1, 1), (3, 1, 1), (1, 1, 4), (3, 1, 4)]
    keys = {"batch", "threads", "T", "median_ms", "p95_ms", "p99_ms", "images_per_s", "calls"}
    assert all(row.keys() == keys and row["calls"] == 6 for row in content["rows"])
    for text in ("median", "p99", "images/s", content["machine"]["cpu"], "6 calls of a setting", ".bench.json"):
        assert text in output
    assert " with 1 thread\n" in output


def test_a_row_has_its_percentiles_in_order() -> None:
    row = {"T": 4, "threads": 2, "batch": 8, "median_ms": 1.0, "p95_ms": 2.0, "p99_ms": 3.0, "calls": 9}
    expected = ("4", "2", "8", "1 ms", "2 ms", "3 ms", "8,000", "9")
    assert bench_cells(row | {"images_per_s": 8000.0}) == expected


def test_without_reference_images_noise_is_shown(model: Path, tmp_path: Path) -> None:
    model.with_suffix(".reference.npz").unlink()
    assert "noise takes as long" in run(model, "--repeats", "1", "--threads", "1", "--json", tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["data"] == "noise"


def test_reference_frames_that_are_too_few_are_not_said_to_be_missing(tmp_path: Path) -> None:
    source = exported("dynamic", encoding="frames")
    output = run(source, "--T", "10", "--repeats", "1", "--threads", "1", "--json", tmp_path / "a.json")
    assert "no reference images of so many steps beside the model" in " ".join(output.split())
    assert "1 call of a setting" in output


def test_images_of_a_data_set(model: Path, tmp_path: Path) -> None:
    run(model, "--repeats", 1, "--threads", 1, "--data", "digits", "--json", tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["data"] == "digits"


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3", None])
def test_on_a_gpu_its_name_is_kept_and_threads_are_one_setting(
    name: str | None, model: Path, clocked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_build(monkeypatch, ["CUDAExecutionProvider"])
    monkeypatch.setattr("tetdeploy.bench.gpu_name", lambda: name)
    monkeypatch.setattr("tetdeploy.system.machine.usable_cores", lambda: 8)
    monkeypatch.setenv("COLUMNS", "200")
    clocked(lambda call, k: 1e-3)
    output = run(model, "--device", "cuda", "--repeats", 1)
    timings = model.with_suffix(".bench.json")
    content = json.loads(timings.read_text())
    assert content["machine"]["gpu"] == name and {row["threads"] for row in content["rows"]} == {1}
    system = content["machine"]["system"]
    assert f" cores{f', {name}' if name else ''}, {system}, CUDAExecutionProvider\n" in output
    table = reported(timings)
    assert table.caption.endswith(f" cores{f', {name}' if name else ''}, CUDAExecutionProvider.")


def test_on_a_cpu_no_gpu_is_asked_for(model: Path, clocked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tetdeploy.bench.gpu_name", lambda: pytest.fail("asked"))
    monkeypatch.setattr("tetdeploy.system.machine.usable_cores", lambda: 2)
    clocked(lambda call, k: 1e-3)
    run(model, "--repeats", 1)
    content = json.loads(model.with_suffix(".bench.json").read_text())
    assert content["machine"]["gpu"] is None and {row["threads"] for row in content["rows"]} == {1, 2}


def test_an_unrolled_graph_says_that_T_changes_nothing(tmp_path: Path) -> None:
    output = run(exported("unrolled", T=3), "--T", 2, "--repeats", 1, "--threads", 1, "--json", tmp_path / "a.json")
    assert "always runs its T=3 steps: a smaller T takes as long" in output


def test_more_threads_than_cores_are_warned_of(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tetdeploy.system.machine.usable_cores", lambda: 1)
    assert "2 threads on 1 cores" in run(model, "--repeats", 1, "--threads", "1,2", "--batch", 1)


def test_ctrl_c_keeps_what_was_timed(model: Path, clocked: Any) -> None:
    def cost(call: Call, k: int) -> float:
        if k == 3 * CALLS_PER_TURN:
            raise KeyboardInterrupt
        return 1e-3

    clocked(cost)
    output = run(model, "--repeats", 1000, "--threads", 1, "--batch", "1,2", code=130)
    assert "what was timed until then is kept" in output
    content = json.loads(model.with_suffix(".bench.json").read_text())
    assert content["interrupted"] and all(0 < row["calls"] <= 3 * CALLS_PER_TURN for row in content["rows"])
    assert reported(model.with_suffix(".bench.json")).caption.endswith("ExecutionProvider, interrupted.")


def test_ctrl_c_leaves_an_earlier_result_unless_it_is_named(model: Path, clocked: Any) -> None:
    def cost(call: Call, k: int) -> float:
        if k == CALLS_PER_TURN:
            raise KeyboardInterrupt
        return 1e-3

    result = model.with_suffix(".bench.json")
    clocked(lambda call, k: 1e-3)
    run(model, "--repeats", 1, "--threads", 1, "--batch", 1)
    before = result.read_bytes()
    clocked(cost)
    output = run(model, "--repeats", 1000, "--threads", 1, "--batch", 1, code=130)
    assert "that file stays as it was: name another with --json" in output
    assert result.read_bytes() == before
    clocked(cost)
    run(model, "--repeats", 1000, "--threads", 1, "--batch", 1, "--json", result, code=130)
    assert json.loads(result.read_text())["interrupted"]


def test_ctrl_c_before_the_first_call_writes_nothing(model: Path, clocked: Any) -> None:
    def cost(call: Call, k: int) -> float:
        raise KeyboardInterrupt

    clocked(cost)
    assert "Traceback" not in run(model, "--threads", 1, code=130)
    assert not model.with_suffix(".bench.json").exists()


def test_no_torch_is_loaded(model: Path) -> None:
    code = (
        "import sys; from tetdeploy.cli import main\n"
        "main(['bench', sys.argv[1], '--repeats', '2', '--threads', '1'], standalone_mode=False)\n"
        "assert not {'torch', 'onnx', 'matplotlib'} & set(sys.modules), 'heavy'"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert model.with_suffix(".bench.json").exists()


# ----------------------------------------------------------------------------------------------------------- report


def test_the_report_has_a_table_for_each_model(model: Path) -> None:
    """Of a run folder, and of files named one by one."""
    run(model, "--repeats", 2, "--threads", 1)
    timings = model.with_suffix(".bench.json")
    sweep = write(model.with_suffix(".sweep.json"), sweep_result(kind="sweep"))
    folder = run_folder(model.parent / "trained")
    shutil.copy(timings, folder)
    for paths, name in (
        ([sweep, timings], str(timings)),
        ([folder], "trained m"),
        ([folder, folder / timings.name], "trained m"),
    ):
        (table,) = tables(read_results(paths), "Latency and throughput")
        assert table.caption.startswith(f"{name}: {model} on ")
        assert table.headers[:4] == ("T", "threads", "batch", "median")
        assert [row[:3] for row in table.rows] == [("4", "1", "1"), ("4", "1", "8")]
        assert all(row[3].endswith(" ms") and row[-1] == "2" for row in table.rows)


def test_timings_of_runs_of_one_name_stand_side_by_side(tmp_path: Path) -> None:
    """As seed-0 of several trainings."""
    row = dict.fromkeys(("median_ms", "p95_ms", "p99_ms", "images_per_s"), 1.0)
    row |= dict.fromkeys(("T", "threads", "batch", "calls"), 1)
    trained = [seeds_folder(tmp_path / name, sweep_result(kind="sweep")) for name in ("sdt", "tet")]
    for folder in trained:
        write(folder / "seed-0/m.bench.json", {"kind": "bench", "model": "m.onnx", "machine": MACHINE, "rows": [row]})
    assert [*read_results(trained).benches] == ["sdt seed-0 m", "tet seed-0 m"]
    assert [*read_results(trained, ["A"]).benches] == ["A seed-0 m", "tet seed-0 m"]


def test_the_next_step_is_the_report_of_the_run(model: Path) -> None:
    """Where there is one: of timings alone no report can be made."""
    alone = run(model, "--repeats", 1, "--threads", 1, "--batch", 1)
    assert alone.endswith(f"{model.with_suffix('.bench.json')}\n")
    folder = run_folder(model.parent)
    output, quoted = run(model, "--repeats", 1, "--threads", 1, "--batch", 1), shlex.quote(str(folder))
    assert output.endswith(f"{model.with_suffix('.bench.json')}\nnext: tetdeploy report {quoted}\n")
    assert any(section.title == "Latency and throughput" for section in document_of(read_results([folder])).sections)


def test_a_report_says_which_timings_are_of_another_model_than_lies_beside_them(model: Path, clocked: Any) -> None:
    clocked(lambda call, k: 1e-3)
    run(model, "--repeats", 1, "--threads", 1, "--batch", 1)
    timings, folder = model.with_suffix(".bench.json"), run_folder(model.parent)
    assert read_results([folder]).notes == ()
    model.write_bytes(b"a new export")
    sweep = write(folder / "other" / "a.sweep.json", sweep_result(kind="sweep"))
    for given in ([folder], [sweep, timings]):
        (note,) = read_results(given).notes
        assert note.startswith(f"{timings} is of another model (")
        assert note.endswith(f"; measure again: tetdeploy bench {model}")


def test_a_report_refuses_timings_alone_and_damaged_ones(tmp_path: Path) -> None:
    damaged = {"kind": "bench", "model": "m", "machine": {}, "rows": [{"batch": 1}]}
    bad, by_its_content = (write(tmp_path / name, damaged) for name in ("a.bench.json", "a.json"))
    for timings in (bad, by_its_content):
        with pytest.raises(ValueError, match="timings alone make no report"):
            read_results([timings])
    sweep = write(tmp_path / "a.sweep.json", sweep_result(kind="sweep"))
    with pytest.raises(
        ValueError, match=r"a\.bench\.json does not have the form of a bench.*run tetdeploy bench again"
    ):
        read_results([sweep, bad])
    times = dict.fromkeys(("median_ms", "p95_ms", "p99_ms", "images_per_s"), 1.0)
    row = times | dict.fromkeys(("T", "threads", "batch", "calls"), 1)
    write(bad, {"kind": "bench", "model": "m", "machine": MACHINE | {"provider": None}, "rows": [row]})
    with pytest.raises(ValueError, match=r"form of a bench: machine.provider is missing; run tetdeploy bench again"):
        read_results([sweep, bad])
    write(bad, {"kind": "bench", "model": "m", "machine": MACHINE, "rows": [row | {"p99_ms": "1"}]})
    with pytest.raises(ValueError, match=r"rows\[0\].p99_ms must be a finite number of at least 0, got '1'"):
        read_results([sweep, bad])
    write(bad, {"kind": "sweep"})
    with pytest.raises(ValueError, match="its kind is not bench"):
        read_results([sweep, bad])


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch", "0"), "must be at least 1, got 0"),
        (("--threads", "1,-2"), "must be at least 1, got -2"),
        (("--batch", "many"), "must be like 8 or 1,8,64; got 'many'"),
        (("--T", "0"), "T must lie in 1..1024"),
        (("--repeats", "0"), "0 is not in the range"),
        (("--seconds", "0"), "0"),
        (("--repeats", "3", "--seconds", "3"), "exclude each other"),
    ],
)
def test_wrong_usage(model: Path, options: tuple[str, ...], message: str) -> None:
    assert message in refused("bench", model, *options, code=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--T", "5"), "is unrolled to T=3 and cannot run T=5"),
        (("--device", "tpu"), "unknown device 'tpu'"),
        (("--data", "nothing.npz"), "nothing.npz"),
        (("--batch", str(10**20)), f"batch must be at most {2**31 - 1}, got {10**20}"),
    ],
)
def test_one_line_for_what_cannot_be_timed(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    assert message in refused("bench", exported("unrolled", T=3), "--threads", 1, "--json", file, *options)
    assert not file.exists()


def test_too_many_threads_are_refused_and_not_warned_of(model: Path) -> None:
    output = refused("bench", model, "--threads", "1,100000")
    assert "threads must be at most" in output
    assert "they will wait for each other" not in output


def test_no_model(tmp_path: Path) -> None:
    assert "no model at" in refused("bench", tmp_path / "none.onnx")
    assert "no exported model in" in refused("bench", "--runs", tmp_path)


def test_python_refuses_the_same(model: Path) -> None:
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        Bench(model, batches=[1, 0], threads=[1])
    with pytest.raises(ValueError, match="T must be at least 1, got 0"):
        Bench(model, batches=[1], threads=[1], steps=[0])
    with pytest.raises(ValueError, match="batch must be a whole number, got '1'"):
        Bench(model, batches=["1"], threads=[1])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="threads: there is nothing to time; give one number or more"):
        Bench(model, batches=[1], threads=[])
    with pytest.raises(ValueError, match="unknown runtime 'none'"):
        Bench(model, batches=[1], threads=[1], runtime="none")
    timing = Bench(model, batches=[1], threads=[1])
    with pytest.raises(ValueError, match="repeats and seconds must be above 0, got 0"):
        timing.run(random_input(timing.engine, 4), repeats=0)
    with pytest.raises(ValueError, match=r"takes input of shape \[N, 1, 8, 8\]"):
        timing.run(np.zeros((1, 3, 8, 8), np.uint8))
    with pytest.raises(ValueError, match=r"the input is empty: \[0, 1, 8, 8\]"):
        timing.run(np.zeros((0, 1, 8, 8), np.uint8))
    timing = Bench(exported("unrolled", T=3), batches=[1], threads=[1], steps=[1, 2, 3, 5])
    with pytest.raises(ValueError, match="is unrolled to T=3 and cannot run T=5"):
        timing.run(random_input(timing.engine, 3), repeats=1)
    assert timing.rows == []  # it was refused before the others were timed
