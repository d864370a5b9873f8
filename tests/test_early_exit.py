"""Early exit: what leaves and when, that its answer is that of the same image alone, and the threshold's file."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export_helpers import digits, engine, exported, frames
from hypothesis import given, settings
from hypothesis import strategies as st

from tetdeploy.early_exit import CRITERIA, Criterion, Exit, certainty, exit_path, load_exit

Array = np.ndarray[Any, Any]


def expected_steps(per_step: Array, exit: Exit) -> Array:
    """Step by step and image by image, what `Exit` says of `per_step [N, T, K]`."""
    steps = []
    for logits in per_step.astype(np.float64):
        for t in range(1, len(logits) + 1):
            p = np.sort(np.exp(logits[:t].mean(0)) / np.exp(logits[:t].mean(0)).sum())
            certain = p[-1] if exit.criterion == "confidence" else p[-1] - p[-2]
            if t == len(logits) or (t >= exit.min_T and certain > exit.threshold):
                steps.append(t)
                break
    return np.array(steps)


# ---------------------------------------------------------------------------------------------------------- the rule


def test_certainty_by_hand() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]]))
    np.testing.assert_allclose(certainty(logits, "confidence"), [0.5, 0.8])
    np.testing.assert_allclose(certainty(logits, "margin"), [0.2, 0.7])
    np.testing.assert_allclose(certainty(logits + 1000, "margin"), [0.2, 0.7])  # no overflow
    assert certainty(np.log([0.3, 0.7]), "margin") == pytest.approx(0.4)  # of two classes alone, too
    assert 0.99999999 < certainty(np.array([20.0, 0.0], np.float32), "confidence") < 1  # nor is it rounded to float32
    np.testing.assert_array_equal(Exit(0.6).certain(logits), [False, True])
    np.testing.assert_array_equal(Exit(0.1, "margin").certain(logits), [True, True])
    np.testing.assert_array_equal(Exit(1.0).certain(np.array([[1e9, 0.0]])), [False])


def test_one_class_is_certain_of_itself() -> None:
    for criterion in CRITERIA:
        np.testing.assert_array_equal(certainty(np.zeros((2, 1)), criterion), [1, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.5}, "threshold must lie in 0..1, got 1.5"),
        ({"threshold": "0.9"}, "threshold must be a number, got '0.9'"),
        ({"threshold": float("nan")}, "threshold must lie in 0..1, got nan"),
        ({"threshold": 0.5, "criterion": "entropy"}, "unknown criterion 'entropy'; choose confidence or margin"),
        ({"threshold": 0.5, "min_T": 0}, "min_T must be at least 1, got 0"),
        ({"threshold": 0.5, "min_T": 1.5}, "min_T must be a whole number, got 1.5"),
    ],
)
def test_what_an_exit_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Exit(**options)


def test_numbers_of_numpy_are_kept_as_pythons() -> None:
    exit = Exit(np.float32(0.1), min_T=np.int64(2))  # type: ignore[arg-type]
    assert exit == Exit(float(np.float32(0.1)), min_T=2)
    assert (type(exit.threshold), type(exit.min_T)) == (float, int)


# --------------------------------------------------------------------------------------------------------- the engine


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("encoding", ["direct", "frames"])
def test_images_leave_when_they_are_certain(encoding: str, criterion: Criterion) -> None:
    runner = engine("step", encoding=encoding)
    x = digits().images[:40] if encoding == "direct" else frames(40, 6)
    whole = runner.run(x, 6)
    np.testing.assert_array_equal(whole.steps, np.full(40, 6))
    running = np.cumsum(whole.per_step, 1) / np.arange(1, 7)[:, None]
    exit = Exit(float(np.quantile(certainty(running, criterion), 0.7)), criterion, min_T=2)
    result = runner.run(x, 6, exit=exit)
    np.testing.assert_array_equal(result.steps, expected_steps(whole.per_step, exit))
    assert set(result.steps) >= {2, 3, 6}  # some leave at once, some later, some never
    for n, taken in enumerate(result.steps):
        np.testing.assert_allclose(result.per_step[n, :taken], whole.per_step[n, :taken], rtol=0, atol=1e-5)
        assert np.isnan(result.per_step[n, taken:]).all()
        np.testing.assert_allclose(result.logits[n], whole.per_step[n, :taken].mean(0), rtol=0, atol=1e-5)
    assert result.logits.dtype == result.per_step.dtype == np.float32


@settings(max_examples=25)
@given(
    threshold=st.floats(0, 1),
    criterion=st.sampled_from(CRITERIA),
    count=st.integers(1, 9),
    T=st.integers(1, 5),
    min_T=st.integers(1, 6),
)
def test_any_batch_answers_as_each_image_alone(
    threshold: float, criterion: Criterion, count: int, T: int, min_T: int
) -> None:
    runner, exit = engine("step"), Exit(threshold, criterion, min_T)
    x = digits().images[50 : 50 + count]
    together = runner.run(x, T, exit=exit)
    for n in range(count):
        alone = runner.run(x[n : n + 1], T, exit=exit)
        assert together.steps[n] == alone.steps[0]
        np.testing.assert_allclose(together.logits[n], alone.logits[0], rtol=0, atol=1e-5)
        np.testing.assert_allclose(together.per_step[n], alone.per_step[0], rtol=0, atol=1e-5)


def test_the_work_shrinks_with_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    from tetdeploy.engine_stream import Stream

    sizes: list[dict[str, int]] = []
    call = Stream.call

    def recorded(stream: Stream, *arguments: Any, **options: Any) -> dict[str, Array]:
        outputs = call(stream, *arguments, **options)
        sizes.append({name: len(value) for name, value in outputs.items()})
        return outputs

    monkeypatch.setattr(Stream, "call", recorded)
    runner, x = engine("step"), digits().images[:40]
    confidence = certainty(runner.run(x, 1).logits, "confidence")
    sizes.clear()
    steps = runner.run(x, 6, exit=Exit(float(np.median(confidence)))).steps
    assert steps.min() == 1 and 1 < len(sizes) == steps.max()
    for t, outputs in enumerate(sizes, start=1):
        assert set(outputs.values()) == {(steps >= t).sum()}


@pytest.mark.parametrize("which", [np.array([True, False, True, True]), np.array([3, 0])], ids=["mask", "numbers"])
def test_a_stream_goes_on_with_those_that_are_kept(which: Array) -> None:
    x = digits().images[:4]
    every, some = engine("step").stream(4), engine("step").stream(4)
    every.push(x)
    some.push(x)
    some.keep(which)
    for _ in range(2):
        all_of_them, kept = every.push(), some.push()
    assert (some.batch, kept.t) == (len(kept.logits), 3) == (len(x[which]), 3)
    np.testing.assert_allclose(kept.logits, all_of_them.logits[which], rtol=0, atol=1e-5)
    for name, u in some.state.items():
        np.testing.assert_allclose(u, every.state[name][which], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=f"has a batch of {some.batch}, got 4"):
        some.push(x)


def test_all_may_leave_at_once_or_none_ever() -> None:
    runner, x = engine("step"), digits().images[:5]
    np.testing.assert_array_equal(runner.run(x, 4, exit=Exit(0.0)).steps, np.ones(5))
    never, whole = runner.run(x, 4, exit=Exit(1.0)), runner.run(x, 4)
    np.testing.assert_array_equal(never.steps, whole.steps)
    np.testing.assert_array_equal(never.per_step, whole.per_step)
    np.testing.assert_allclose(never.logits, whole.logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("layout", "options"), [("unrolled", {"T": 4}), ("dynamic", {}), ("unrolled", {"T": 3, "with_state": True})]
)
def test_other_layouts_refuse(layout: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"is {layout} and runs its steps in one call.* export with --layout step"):
        engine(layout, **options).run(digits().images[:2], 3, exit=Exit(0.9))


def test_a_bare_number_is_no_exit() -> None:
    with pytest.raises(TypeError, match=r"exit must be an Exit, such as Exit\(0\.9\), .*; got 0\.9"):
        engine("step").run(digits().images[:2], 3, exit=0.9)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------- the file


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copy(exported("step"), tmp_path / "m.onnx"))


def write_exit(model: Path, **changes: Any) -> None:
    content = {"threshold": 0.9, "criterion": "margin", "min_T": 2, "T": 6, "model_sha256": engine("step").sha256}
    exit_path(model).write_text(json.dumps(content | changes))


def test_a_threshold_is_loaded(model: Path) -> None:
    write_exit(model)
    assert exit_path(model) == model.parent / "m.exit.json"
    assert load_exit(model) == load_exit(str(model), T=6) == load_exit(model, T=9) == Exit(0.9, "margin", 2)


def test_what_to_run_is_quoted_for_a_shell(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    moved = Path(shutil.move(model, tmp_path / "a b"))
    command = re.escape(f"; run: tetdeploy calibrate {shlex.quote(str(moved))}")
    with pytest.raises(FileNotFoundError, match=rf"{command}$"):
        load_exit(moved)
    write_exit(moved)
    with pytest.raises(ValueError, match=rf"{command} --T 4$"):
        load_exit(moved, T=4)


def test_what_load_exit_refuses(model: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no early-exit threshold at .*m.exit.json; run: tetdeploy calibrate"):
        load_exit(model)
    with pytest.raises(ValueError, match=r"is a folder, not an \.onnx file"):
        load_exit(model.parent)
    with pytest.raises(ValueError, match=r"model must be the path of an \.onnx file, got None"):
        load_exit(None)  # type: ignore[arg-type]
    for changes in (
        {"threshold": 2},
        {"criterion": "luck"},
        {"min_T": None},
        {"T": "many"},
        {"T": float("inf")},
        {"T": 0},
        {"T": "4"},
        {"threshold": True},
        {"model_sha256": None},
    ):
        write_exit(model, **changes)
        with pytest.raises(ValueError, match=r"exit\.json is damaged; run: tetdeploy calibrate"):
            load_exit(model)
    for text in ("", "[]", "{}", '{"threshold": 0.9'):
        exit_path(model).write_text(text)
        with pytest.raises(ValueError, match=r"exit\.json is damaged"):
            load_exit(model)
    write_exit(model, model_sha256="00")
    with pytest.raises(ValueError, match="threshold of another model than"):
        load_exit(model)
    write_exit(model)
    with pytest.raises(ValueError, match=r"was found for T=6 and says nothing of T=4; run: .* --T 4"):
        load_exit(model, T=4)
