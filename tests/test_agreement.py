"""The kept reference: what is compared, to the last count, and which files are refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export_helpers import exported, int8_exported

from tetdeploy import native
from tetdeploy.agreement import (
    LogitAgreement,
    Reference,
    compare_reference,
    computed_by,
    load_reference,
    reference_path,
    validation,
)
from tetdeploy.engine import Engine
from tetdeploy.sweep import running_class, running_sum, summarise


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """A model of its own folder, unrolled to T=4, with its reference to do harm to."""
    return copied(exported("unrolled"), tmp_path)


def copied(model: Path, folder: Path) -> Engine:
    for path in (model, reference_path(model)):
        shutil.copy(path, folder / path.name)
    return Engine(folder / model.name, threads=1)


def rewrite(engine: Engine, change: Callable[[dict[str, Any]], object]) -> None:
    path = reference_path(engine.path)
    with np.load(path) as file:
        arrays = dict(file)
    change(arrays)
    np.savez(path, **arrays)


def test_logits_by_step() -> None:
    rows = [
        [[1.0, 0.0], [0.0, 3.0], [1.0, 0.0]],
        [[0.0, 2.0], [0.0, 2.0], [1.0, 0.0]],
        [[1.0, 0.0], [0.0, 3.0], [0.0, 1.0]],
    ]
    per_step = np.array(rows)
    expected = np.array(
        [
            [[1.0, 0.0], [0.5, 0.0], [0.0, 1.0]],
            [[2.0, 0.0], [0.0, 6.0], [0.0, 1.0]],
            [[1.0, 0.0], [1.0, 0.0], [0.0, 3.0]],
        ]
    )
    whole, parts, resumed = LogitAgreement(3), LogitAgreement(3), LogitAgreement(3)
    whole.add(per_step, expected)
    parts.add(per_step[1:], expected[1:])  # the largest errors first
    resumed.restore(parts.arrays())
    for sums in (parts, resumed):
        sums.add(per_step[:1], expected[:1])
    for sums in (whole, parts, resumed):
        # classes after one, two and three steps:
        # (0, 1, 0), (1, 1, 1), (1, 1, 1) against (0, 0, 0), (0, 1, 0), (0, 1, 1)
        assert [3 * sums.top1_agreement(t) for t in (1, 2, 3)] == pytest.approx([2, 1, 2])
        assert [sums.max_abs_logit_error(t) for t in (1, 2, 3)] == [2.0, 4.0, 4.0]
    assert running_class(per_step).tolist() == [[0, 1, 1], [1, 1, 1], [0, 1, 1]]


def test_running_sums_are_those_of_numpy_to_the_bit() -> None:
    per_step = np.random.default_rng(0).normal(size=(3, 50, 7)).astype(np.float32)
    given = per_step.copy()
    sums = running_sum(per_step)
    assert sums.dtype == np.float32 and np.array_equal(sums, np.cumsum(per_step, axis=1))
    assert np.array_equal(per_step, given)


def test_what_is_tied_is_judged_by_the_logits_of_its_own_step() -> None:
    ours, theirs = (np.array([[[1e-3, 0.0], [1000.0, last]]]) for last in (1000.0014, 1000.0006))
    sums = LogitAgreement(2)
    sums.add(ours, theirs)
    assert sums.same.tolist() == [1, 1]


@pytest.mark.parametrize("offset", [0, -2])
@pytest.mark.parametrize("factor", [1, 1e3, 1e-3])
def test_of_tied_classes_either_agrees(factor: float, offset: float) -> None:
    """By the largest logit in size, whatever that is."""
    first = np.array([[offset], [0]])
    engine = factor * np.add([[[1, 1 + 2e-7, 0], [0, 0, 0]]], first)
    torch = factor * np.add([[[1, 1 - 2e-7, 0], [5e-6, 0, 0]]], first)  # after the second step they differ
    for sides in ((engine, torch), (torch, engine)):
        sums = LogitAgreement(2)
        sums.add(*sides)
        assert [sums.top1_agreement(t) for t in (1, 2)] == [1, 0]
    sums = LogitAgreement(2)
    sums.add(np.eye(3)[None, 1:], 0 * torch)  # all classes are tied on one side only
    assert sums.top1_agreement(1) == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers(value: float) -> None:
    good, bad = np.zeros((1, 2, 3)), np.full((1, 2, 3), value)
    with pytest.raises(ValueError, match="the engine gives NaN or infinite logits"):
        LogitAgreement(2).add(bad, good)
    with pytest.raises(ValueError, match="PyTorch gives NaN"):
        LogitAgreement(2).add(good, bad)


@pytest.mark.parametrize("layout", ["unrolled", "dynamic", "step"])
def test_the_reference_agrees_where_it_was_written(layout: str) -> None:
    engine = Engine(exported(layout), threads=1)
    reference = load_reference(engine)
    seen: list[int] = []
    result = compare_reference(engine, reference, reference.T, batch_size=25, tick=seen.append)
    assert seen == [25, 25, 10]
    for t in range(1, reference.T + 1):
        row = result.row(t)
        assert row["top1_agreement"] == 1.0
        assert row["max_abs_logit_error"] < 1e-4  # 0 on some machines; that it counts is tested below
        assert row["spike_count_error"] < 100e-6
        assert row["spike_mismatch_rate"] is None
    assert reference.labels is not None
    np.testing.assert_array_equal(result.tally.seen, np.bincount(reference.labels, minlength=10))
    right = reference.per_step.mean(1).argmax(-1) == reference.labels
    np.testing.assert_array_equal(
        result.tally.correct[:, -1], np.bincount(reference.labels, weights=right, minlength=10)
    )


def test_every_difference_counts_at_its_step(engine: Engine) -> None:
    own = load_reference(engine)
    run, counts = engine.count(own.x, 4)
    fired = np.stack([counts[f"fired.{n['name']}"] for n in engine.metadata["neurons"]], axis=-1)
    spike_counts = fired.swapaxes(0, 1).astype(np.int64)
    per_step = run.per_step.copy()
    per_step[7, 2] += 0.25  # the class stays
    per_step[3, 1:, :] *= -100.0  # the class becomes another one
    spike_counts[5, 1, 0] += 3
    spike_counts[6, 3, 2] -= 2
    result = compare_reference(engine, Reference(own.x, per_step, spike_counts, None), 4)
    sizes = [int(np.prod(n["shape"])) for n in engine.metadata["neurons"]]
    agreement = [result.row(t)["top1_agreement"] for t in (1, 2, 3, 4)]
    assert agreement[0] == 1.0
    assert agreement[1:] == [pytest.approx(59 / 60)] * 3
    errors = [result.row(t)["spike_count_error"] for t in (1, 2, 3, 4)]
    wrong = (0, 3, 3, 5)
    assert errors == pytest.approx([n / (sum(sizes) * t * 60) for t, n in zip((1, 2, 3, 4), wrong, strict=True)])
    assert result.neuron(0)["spike_count_error"] == pytest.approx(3 / (sizes[0] * 4 * 60))
    assert result.neuron(2)["spike_count_error"] == pytest.approx(2 / (sizes[2] * 4 * 60))
    shorter = compare_reference(engine, Reference(own.x, per_step, spike_counts, None), 2)
    assert shorter.T == 2 and shorter.row(2) == result.row(2)  # causal


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
def test_a_native_operator_that_computes_otherwise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(exported("dynamic"), threads=1, native=True)
    reference = load_reference(engine)
    right = compare_reference(engine, reference, reference.T).row(reference.T)

    class Wrong:
        def __init__(self, session: Any) -> None:
            self.session = session

        def run(self, names: list[str], feed: dict[str, Any]) -> list[Any]:
            return [-output for output in self.session.run(names, feed)]

    monkeypatch.setattr(engine, "_session", Wrong(engine._session))
    wrong = compare_reference(engine, reference, reference.T).row(reference.T)
    assert right["top1_agreement"] == 1.0 > wrong["top1_agreement"]
    assert wrong["spike_count_error"] == right["spike_count_error"]  # counted without it


def test_only_the_reference_s_steps_are_compared() -> None:
    engine = Engine(exported("dynamic"), threads=1)
    reference = load_reference(engine)
    compared = compare_reference(engine, reference, 100)
    assert compared.T == reference.T and compare_reference(engine, reference, 2).to_dict()["T"] == 2 < reference.T
    x = reference.x[:5]
    longer = compare_reference(engine, reference, reference.T).tally
    longer.T = reference.T
    measured = summarise(engine, longer, x, None, (1, reference.T), num_timed=1)
    value = validation(measured, compared, labelled=True)
    assert value["kind"] == "validate"
    assert [row["top1_agreement"] for row in value["rows"]] == [1.0, 1.0]
    compared.count_error[1, 0] += 7
    neurons = validation(measured, compared, labelled=True)["neurons"]
    assert [neuron["spike_count_error"] for neuron in neurons] == [
        compared.neuron(k)["spike_count_error"] for k in range(3)
    ]
    assert neurons[1]["spike_count_error"] > neurons[0]["spike_count_error"]
    compared.T = 1  # as if the reference held one step
    value = validation(measured, compared, labelled=False)
    assert value["rows"][1] | {"top1_agreement": None, "max_abs_logit_error": None} == value["rows"][1]
    assert [row["accuracy"] for row in value["rows"]] == [None, None]
    assert value["by_class"] == []
    nothing = validation(measured, None, labelled=True)
    assert nothing["agreement"] is None
    assert nothing["rows"][0]["top1_agreement"] is None
    assert nothing["rows"][0]["accuracy"] is not None


def test_a_missing_reference(engine: Engine) -> None:
    reference_path(engine.path).unlink()
    with pytest.raises(FileNotFoundError, match=r"no reference images at .*reference\.npz.*copy them along"):
        load_reference(engine)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no zip at all"])
def test_a_damaged_reference(engine: Engine, content: bytes) -> None:
    reference_path(engine.path).write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        load_reference(engine)


def test_a_truncated_reference(engine: Engine) -> None:
    path = reference_path(engine.path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        load_reference(engine)


def test_a_reference_without_counts(engine: Engine) -> None:
    rewrite(engine, lambda arrays: arrays.pop("spike_counts"))
    with pytest.raises(ValueError, match=r"lacks spike_counts; export the model again"):
        load_reference(engine)


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: arrays.update(neurons=np.array(["a", "b", "c"])),
        lambda arrays: arrays.update(per_step=arrays["per_step"][:, :, :-1]),
        lambda arrays: arrays.update(checkpoint_sha256=np.array("0" * 64)),
    ],
)
def test_the_reference_of_another_model(engine: Engine, change: Callable[[dict[str, Any]], None]) -> None:
    rewrite(engine, change)
    with pytest.raises(ValueError, match="it was written with another model"):
        load_reference(engine)


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: arrays.update(per_step=arrays["per_step"][:-1]),
        lambda arrays: arrays.update(per_step=arrays["per_step"].astype(str)),
        lambda arrays: arrays.update(per_step=arrays["per_step"][:, :0], spike_counts=arrays["spike_counts"][:, :0]),
        lambda arrays: arrays.update(spike_counts=arrays["spike_counts"][:, :, :2]),
        lambda arrays: arrays.update(spike_counts=arrays["spike_counts"].astype(np.float32)),
        lambda arrays: arrays.update(x=arrays["x"][:-1]),
        lambda arrays: arrays.update(labels=np.full(len(arrays["x"]), 10)),
        lambda arrays: arrays.update(labels=np.full(len(arrays["x"]), -1)),
        lambda arrays: arrays.update(labels=np.zeros(3, np.int64)),
        lambda arrays: arrays.update(labels=np.full(len(arrays["x"]), "seven")),
    ],
)
def test_a_reference_whose_arrays_do_not_fit_each_other(
    engine: Engine, change: Callable[[dict[str, Any]], None]
) -> None:
    rewrite(engine, change)
    with pytest.raises(ValueError, match="its arrays do not fit each other; export the model again"):
        load_reference(engine)


def test_the_reference_of_another_precision_or_other_scales(tmp_path: Path) -> None:
    engine = copied(int8_exported("unrolled"), tmp_path)
    assert load_reference(engine).T == 3
    rewrite(engine, lambda arrays: arrays.update(scales_sha256=np.array("ab" * 32)))
    with pytest.raises(ValueError, match="it was written with another model"):
        load_reference(engine)
    shutil.copy(reference_path(exported("unrolled")), reference_path(engine.path))
    with pytest.raises(ValueError, match="it was written with another model"):
        load_reference(engine)


def test_an_older_reference_does_not_say_whose_answers_it_holds(tmp_path: Path) -> None:
    engine = copied(int8_exported("unrolled"), tmp_path)
    rewrite(engine, lambda arrays: [arrays.pop(key) for key in computed_by(engine.metadata)])
    assert load_reference(engine).T == 3
    del engine.metadata["scales_sha256"]  # nor did the export
    assert computed_by(engine.metadata) == {"precision": "int8", "checkpoint_sha256": ""}
