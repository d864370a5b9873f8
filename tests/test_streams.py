"""A pool of streams: each as if it were alone, whatever the others do; state that outlives the pool."""

from __future__ import annotations

import copy
import io
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from export_helpers import digits, engine, frames
from hypothesis import given, settings
from hypothesis import strategies as st

from tetdeploy.engine import Engine
from tetdeploy.engine_stream import Stream
from tetdeploy.streams import StreamPool, StreamState, _Rows

Array = np.ndarray[Any, Any]
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("step", {}),
    ("step", {"encoding": "frames"}),
    ("step", {"normalize": False}),
    ("unrolled", {"T": 3, "with_state": True}),
    ("unrolled", {"T": 3, "with_state": True, "encoding": "frames"}),
]
kinds = pytest.mark.parametrize(("layout", "options"), KINDS, ids=lambda value: str(value))


def frame(of: Engine, k: int) -> Array:
    """What one stream may push, the k-th of 60."""
    if of.encoding == "frames" and of.layout == "unrolled":
        return frames(60, 3)[k]
    image = digits().images[k]
    return image if of.input_dtype == np.uint8 else (image.astype(np.float32) / 255 - 0.3) / 0.4


def membranes(state: StreamState) -> dict[str, Array]:
    return {name: value for name, value in state.carried.items() if name.startswith("u.")}


def assert_same(pool: StreamPool, id: int, alone: Stream) -> None:
    """The stream in the pool carries what the one by itself carries."""
    state = pool.state(id)
    assert state.t == alone.t
    for name, u in alone.state.items():
        np.testing.assert_array_equal(state.carried[name], u[0])


# ------------------------------------------------------------------------------------------------ as if alone

operations = st.one_of(
    st.just(("open",)),
    st.tuples(st.just("push"), st.lists(st.tuples(st.integers(0, 11), st.integers(-8, 20)), max_size=12)),
    *(st.tuples(st.just(name), st.integers(0, 11)) for name in ("reset", "close", "move")),
)


@kinds
@settings(max_examples=25)
@given(script=st.lists(operations, min_size=4, max_size=24), max_batch=st.integers(1, 5))
def test_each_stream_is_as_if_alone(
    layout: str, options: dict[str, Any], script: list[tuple[Any, ...]], max_batch: int
) -> None:
    of = engine(layout, **options)
    pools = [StreamPool(of, max_batch=max_batch), StreamPool(of)]
    alone: dict[tuple[int, int], Stream] = {(0, pools[0].open()): of.stream()}  # by number of the pool, and id
    for name, *arguments in script:
        keys = list(alone)
        if name == "open":
            alone[0, pools[0].open()] = of.stream()
        elif name == "push":
            push(pools, {keys[n % len(keys)]: k for n, k in arguments[0]}, alone)
        else:
            pool, id = key = keys[arguments[0] % len(keys)]
            if name == "reset":
                pools[pool].reset(id)
                alone[key].reset()
            elif name == "move":  # to the other pool, as bytes; the copy goes on from here
                saved = StreamState.from_bytes(pools[pool].state(id).to_bytes())
                alone[1 - pool, pools[1 - pool].open(saved)] = copy.copy(alone[key])
            elif len(keys) > 1:
                pools[pool].close(id)
                del alone[key]
    assert [len(pool) for pool in pools] == [sum(key[0] == n for key in alone) for n in (0, 1)]
    for (pool, id), stream in alone.items():
        assert_same(pools[pool], id, stream)


def push(pools: list[StreamPool], asked: dict[tuple[int, int], int], alone: dict[tuple[int, int], Stream]) -> None:
    """Push to each pool the streams asked for; a negative number is the last image again, where there is one."""
    for number, pool in enumerate(pools):
        direct = pool.engine.encoding == "direct"
        shown = {
            id: None if k < 0 and direct and alone[of, id].t else frame(pool.engine, abs(k))
            for (of, id), k in asked.items()
            if of == number
        }
        results = pool.push(shown)
        assert set(results) == set(shown)
        for id, x in shown.items():
            wanted = alone[number, id].push(None if x is None else x[None])
            np.testing.assert_array_equal(results[id].step_logits, wanted.step_logits[0])
            np.testing.assert_array_equal(results[id].logits, wanted.logits[0])
            assert results[id].t == wanted.t


def test_a_whole_run_in_a_pool_is_engine_run() -> None:
    of, x = engine("step"), digits().images[:150]
    pool = StreamPool(of)
    ids = [pool.open() for _ in x]
    steps = [pool.push({id: image if t == 0 else None for id, image in zip(ids, x, strict=True)}) for t in range(4)]
    whole = of.run(x, 4)
    np.testing.assert_array_equal(np.array([[step[id].step_logits for step in steps] for id in ids]), whole.per_step)
    np.testing.assert_allclose(np.array([steps[-1][id].logits for id in ids]), whole.logits, rtol=0, atol=1e-6)
    assert {steps[-1][id].t for id in ids} == {4}


@pytest.mark.parametrize("bound", ["max_batch", "cache"])
def test_one_call_for_as_many_as_a_batch_holds(bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of = Engine(engine("step").path, threads=1)
    if bound == "cache":  # of a network so large that ten streams fill a CPU's
        largest = max(int(np.prod(layer["shape"])) for layer in of.metadata["neurons"])
        monkeypatch.setattr("tetdeploy.engine.IN_CACHE", largest * 3 * 10)
    pool = StreamPool(of, max_batch=10 if bound == "max_batch" else 64)
    sizes: list[tuple[int, bool]] = []
    call = pool.engine.call

    def counted(feed: dict[str, Array], names: list[str], **options: Any) -> dict[str, Array]:
        sizes.append((len(feed["x"]), bool(feed["encode"][0])))
        return call(feed, names, **options)

    monkeypatch.setattr(pool.engine, "call", counted)
    ids = [pool.open() for _ in range(25)]
    pool.push({id: frame(pool.engine, id) for id in ids})
    assert sizes == [(10, True), (10, True), (5, True)]
    sizes.clear()
    pool.push({id: frame(pool.engine, id) if id == ids[7] else None for id in ids[:11]})
    assert sizes == [(1, True), (10, False)]
    assert pool.push({}) == {}


def test_state_of_streams_that_lie_together_is_read_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = StreamPool(engine("step"))
    call, shared = pool.engine.call, list[set[bool]]()

    def watched(feed: Any, *arguments: Any, **options: Any) -> Any:
        shared.append({np.shares_memory(feed[name], array) for name, array in pool._carried.items() if name != "x"})
        return call(feed, *arguments, **options)

    monkeypatch.setattr(pool.engine, "call", watched)
    a, b, c = (pool.open() for _ in range(3))
    for ids in ((a, b, c), (b, c), (c, b), (a, c)):
        pool.push(dict.fromkeys(ids, digits().images[0]))
    assert shared == [{True}, {True}, {False}, {False}]


def test_threads_share_a_pool() -> None:
    pool = StreamPool(engine("step"))
    ids = [pool.open() for _ in range(24)]

    def use(id: int) -> list[Array]:
        """Among streams that the others open and close."""
        first = pool.push({id: frame(pool.engine, id)})[id]
        other = pool.open(pool.state(id))
        pool.close(other)
        return [first.step_logits, *(pool.push({id: None})[id].step_logits for _ in range(3))]

    with ThreadPoolExecutor(6) as threads:
        got = list(threads.map(use, ids))
    whole = engine("step").run(np.stack([frame(pool.engine, id) for id in ids]), 4).per_step
    np.testing.assert_array_equal(np.array(got), whole)
    assert len(pool) == 24


def test_threads_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one is in a call of the graph, all others wait."""
    pool = StreamPool(Engine(engine("step").path, threads=1))
    first, second, third = (pool.open() for _ in range(3))
    x, state, call = frame(pool.engine, 0), pool.state(first), pool.engine.call
    entered, go_on = threading.Event(), threading.Event()

    def blocks(*arguments: Any, **options: Any) -> dict[str, Array]:
        if not entered.is_set():
            entered.set()
            assert go_on.wait(60)
        return call(*arguments, **options)

    monkeypatch.setattr(pool.engine, "call", blocks)
    others = [
        lambda: pool.push({second: x}),
        lambda: pool.open(state),
        lambda: pool.close(third),
        lambda: pool.reset(second),
        lambda: pool.state(second),
    ]
    with ThreadPoolExecutor(6) as threads:
        pushing = threads.submit(pool.push, {first: x})
        assert entered.wait(60)
        waiting = [threads.submit(other) for other in others]
        done = wait(waiting, timeout=0.3).done
        go_on.set()
        assert not done
        assert pushing.result()[first].t == 1
        for other in waiting:
            other.result()
    assert len(pool) == 3


# ------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("options", [{}, {"encoding": "frames"}], ids=["images", "frames"])
def test_a_stream_costs_its_state_and_nothing_else(options: dict[str, Any]) -> None:
    of = engine("step", **options)
    pool = StreamPool(of)
    carried = sum(4 * int(np.prod(s["shape"])) for s in (*of.metadata["states"], *of.metadata["encoded"]))
    one = carried + (0 if options else 64) + 8 * 10 + 8  # the image; the logits' sum; t
    assert pool.nbytes == 8 * one
    ids = [pool.open() for _ in range(256)]
    assert pool.nbytes == 256 * one
    for start in range(0, 256, 64):
        pool.push({id: frame(of, id % 60) for id in ids[start : start + 64]})
    assert pool.nbytes == 256 * one
    ids.append(pool.open())
    assert pool.nbytes == 512 * one
    kept = ids[::50]
    before = {id: pool.state(id) for id in kept}
    for id in set(ids) - set(kept):
        pool.close(id)
    assert len(pool) == 6 and pool.nbytes == 16 * one
    for id, state in before.items():
        assert state.to_bytes() == pool.state(id).to_bytes()
        pool.close(id)
    assert pool.nbytes == 8 * one  # however few are left: none could be doubled


@pytest.mark.parametrize(("use", "count"), [("open", 8), ("close", 5)])
def test_no_stream_notices_that_memory_was_short(use: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8 rows a ninth stream makes 16, of which the fifth to close makes 8: for each array it may fail."""
    of, zeros = engine("step"), _Rows._zeros
    num_arrays = len(StreamPool(of)._carried.layout) + 2
    for failing in range(num_arrays):
        pool, left = StreamPool(of), [failing]

        def short(self: _Rows, name: str, capacity: int, left: list[int] = left) -> Array:
            left[0] -= 1
            if left[0] == -1:
                raise MemoryError
            return zeros(self, name, capacity)

        ids = [pool.open() for _ in range(9 if use == "close" else 8)]
        for id in ids[count:]:
            pool.close(id)
        alone = {(0, id): of.stream() for id in ids[:count]}
        push([pool], {id: id[1] for id in alone}, alone)
        with monkeypatch.context() as patch:
            patch.setattr(_Rows, "_zeros", short)
            if use == "close":
                pool.close(ids[0])
                del alone[0, ids[0]]
            else:
                with pytest.raises(MemoryError):
                    pool.open()
        assert left[0] < 0 and len(pool) == len(alone)
        alone |= {(0, pool.open()): of.stream() for _ in range(6)}
        push([pool], {id: 20 + id[1] for id in alone}, alone)
        del alone[0, ids[1]]
        pool.close(ids[1])
        push([pool], dict.fromkeys(alone, -1), alone)


def test_a_new_stream_finds_nothing_of_the_one_before() -> None:
    pool = StreamPool(engine("step"))
    first = pool.open()
    pool.push({first: frame(pool.engine, 3)})
    assert all(u.any() for u in membranes(pool.state(first)).values())
    pool.close(first)
    second = pool.open()
    assert second != first
    state = pool.state(second)
    assert state.t == 0 and not state.sum_logits.any() and not any(value.any() for value in state.carried.values())
    pool.push({second: frame(pool.engine, 4)})
    pool.reset(second)
    assert not any(value.any() for value in pool.state(second).carried.values())


# ------------------------------------------------------------------------------------------------ saved state


@kinds
def test_a_saved_stream_goes_on(layout: str, options: dict[str, Any], tmp_path: Path) -> None:
    of = engine(layout, **options)
    pool = StreamPool(of)
    id = pool.open()
    for k in (1, 2):
        pool.push({id: frame(of, k)})
    pool.state(id).save(tmp_path / "new" / "stream.npz")
    more = frame(of, 3) if of.encoding == "frames" else None
    wanted = pool.push({id: more})[id]
    later = StreamPool(Engine(of.path, threads=1))  # as in another process
    restored = later.open(StreamState.load(tmp_path / "new" / "stream.npz"))
    got = later.push({restored: more})[restored]
    np.testing.assert_array_equal(got.logits, wanted.logits)
    np.testing.assert_array_equal(got.step_logits, wanted.step_logits)
    assert got.t == wanted.t == (9 if layout == "unrolled" else 3)


def test_a_state_is_a_copy() -> None:
    pool = StreamPool(engine("step"))
    id = pool.open()
    pool.push({id: frame(pool.engine, 0)})
    saved = pool.state(id)
    kept = saved.to_bytes()
    pool.push({id: frame(pool.engine, 5)})
    assert saved.to_bytes() == kept != pool.state(id).to_bytes()
    other = pool.open(saved)
    for value in saved.carried.values():
        value[...] = 1
    assert pool.state(other).to_bytes() == kept


def test_what_is_no_engine_or_names_no_stream_is_refused() -> None:
    with pytest.raises(ValueError, match=r"engine must be of type Engine, got str; pass Engine\(path\)"):
        StreamPool("model.onnx")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"frames must be of type Mapping, got list; pass \{id: frame\}, by the id"):
        StreamPool(engine("step")).push([digits().images[0]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"path must be the path of a state that save\(\) wrote, got None"):
        StreamState.load(None)  # type: ignore[arg-type]


def test_refused_states(tmp_path: Path) -> None:
    pool = StreamPool(engine("step"))
    good = pool.state(pool.open())
    other_pool = StreamPool(engine("step", normalize=False))
    with pytest.raises(
        ValueError, match=r"^state must be of type StreamState, got bytes; StreamState.load and from_bytes"
    ):
        pool.open(good.to_bytes())  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"of another model than step\.onnx \(SHA-256 \w{12}\.\.\., not \w{12}\.\.\.\)"
    ):
        pool.open(other_pool.state(other_pool.open()))
    for carried in (
        {},
        {**good.carried, "u.lif1": good.carried["u.lif1"][:1]},
        {**good.carried, "u.lif1": good.carried["u.lif1"].astype(float)},
        {**good.carried, "u.lif9": good.carried["u.lif1"]},
        {**good.carried, "sum_logits": good.sum_logits},
    ):
        with pytest.raises(ValueError, match="the state is damaged: it does not hold what a stream of step"):
            pool.open(StreamState(carried, good.sum_logits, 1, good.model_sha256))
    with pytest.raises(ValueError, match="the state is damaged"):
        pool.open(StreamState(good.carried, good.sum_logits[:3], 1, good.model_sha256))
    for t in (-1, 2**62 + 1):
        with pytest.raises(ValueError, match="the state is damaged"):
            pool.open(StreamState(good.carried, good.sum_logits, t, good.model_sha256))
    for value in (np.nan, -np.inf):
        broken = {**good.carried, "u.lif1": good.carried["u.lif1"] + np.float32(value)}
        with pytest.raises(ValueError, match=r"the state is damaged: u\.lif1 holds NaN"):
            pool.open(StreamState(broken, good.sum_logits, 1, good.model_sha256))
        with pytest.raises(ValueError, match="the state is damaged: sum_logits holds NaN"):
            pool.open(StreamState(good.carried, good.sum_logits + value, 1, good.model_sha256))
    for t in ("1", None, 1.5, True):
        with pytest.raises(ValueError, match=f"the state is damaged: t must be a whole number, got {t!r}"):
            pool.open(StreamState(good.carried, good.sum_logits, t, good.model_sha256))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the state is damaged: carried must be of type Mapping, got NoneType"):
        pool.open(StreamState(None, good.sum_logits, 1, good.model_sha256))  # type: ignore[arg-type]
    for changes, message in (
        ({"model_sha256": None}, "model_sha256 must be of type str, got NoneType"),
        ({"sum_logits": [0.0]}, "sum_logits must be of type ndarray, got list"),
        ({"carried": good.carried | {"u.lif1": [0.0]}}, r"u\.lif1 must be of type ndarray, got list"),
    ):
        with pytest.raises(ValueError, match=f"the state is damaged: {message}"):
            pool.open(replace(good, **changes))  # type: ignore[arg-type]
    assert len(pool) == 1
    assert pool.state(pool.open(StreamState(good.carried, good.sum_logits, 2**62, good.model_sha256))).t == 2**62
    data = good.to_bytes()
    unclosed = io.BytesIO()
    with zipfile.ZipFile(unclosed, "w") as file:
        file.writestr("t.npy", b"\x93NUMPY\x01\x00\x12\x00{'descr': ('<f4', \n")
    for bad in (b"", b"words", data[:-200], data[:100], unclosed.getvalue()):
        with pytest.raises(ValueError, match="the state is damaged"):
            StreamState.from_bytes(bad)
    (tmp_path / "s.npz").write_bytes(data[:-200])
    with pytest.raises(ValueError, match=r"s\.npz is damaged"):
        StreamState.load(tmp_path / "s.npz")
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        StreamState.load(tmp_path / "none.npz")


def test_a_state_may_hold_no_python_objects() -> None:
    buffer = io.BytesIO()
    np.savez(buffer, sum_logits=np.zeros(10, np.float32), t=1, model_sha256=np.array([print], object))
    with pytest.raises(ValueError, match="in the state, model_sha256 holds Python objects, which are not read"):
        StreamState.from_bytes(buffer.getvalue())
    rest = {"sum_logits": np.zeros(10), "model_sha256": "00"}
    for arrays in (
        {"u": np.zeros(3)},
        {**rest, "t": np.inf},
        {**rest, "t": 1.7},
        {**rest, "t": 1, "u.lif1": np.zeros(3)},
    ):
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        with pytest.raises(ValueError, match="the state is no state of a stream"):
            StreamState.from_bytes(buffer.getvalue())


# ------------------------------------------------------------------------------------------------ refusals


def test_a_wrong_frame_is_named_and_nobody_moves_on() -> None:
    pool = StreamPool(engine("step"), max_batch=2)
    ids = [pool.open() for _ in range(5)]
    pool.push({id: frame(pool.engine, id) for id in ids})
    before = [pool.state(id).to_bytes() for id in ids]
    good, last = frame(pool.engine, 9), ids[-1]
    for bad, match in (
        (good[0], rf"^stream {last} takes a frame of shape \[1, 8, 8\], got \[8, 8\]"),
        (good[None], rf"^stream {last} takes a frame of shape \[1, 8, 8\], got \[1, 1, 8, 8\]"),
        (good.astype(np.float32), rf"^stream {last}: step\.onnx takes uint8 pixels .*, got float32"),
        (good > 3, rf"^stream {last}: step\.onnx takes uint8 pixels .*, got bool"),
        (np.ma.masked_less(good, 3), rf"^stream {last}: the input is a masked array"),
        ([good.tolist()[0], [[1]]], rf"^stream {last}: its frame is nested unevenly"),
        (good.tolist(), rf"^stream {last}: step\.onnx takes uint8 pixels .*, got int64"),
    ):
        with pytest.raises(ValueError, match=match):
            pool.push({id: bad if id == last else good if id % 2 else None for id in ids})
    fresh = pool.open()
    with pytest.raises(ValueError, match=f"^stream {fresh} has no image yet to show again; push one"):
        pool.push({ids[0]: good, fresh: None})
    with pytest.raises(ValueError, match=r"^there is no stream 99: it was closed, or open"):
        pool.push({ids[0]: good, 99: good})
    assert [pool.state(id).to_bytes() for id in ids] == before


@pytest.mark.parametrize("count", [2, 4])
def test_a_chunk_of_another_length_is_named_and_nobody_moves_on(count: int) -> None:
    pool = StreamPool(engine("unrolled", T=3, with_state=True, encoding="frames"))
    good, bad = pool.open(), pool.open()
    match = rf"^stream {bad} takes a frame of shape \[3, 1, 8, 8\], got \[{count}, 1, 8, 8\]"
    for chunks in ({bad: frames(1, count)[0]}, {good: frames(1, 3)[0], bad: frames(1, count)[0]}):
        with pytest.raises(ValueError, match=match):
            pool.push(chunks)
    assert pool.state(good).t == pool.state(bad).t == 0


def test_a_call_holds_no_more_streams_than_the_engine_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    of = Engine(engine("step").path, threads=1)
    monkeypatch.setattr(of, "max_batch", 4)  # as of a TensorRT engine
    assert [StreamPool(of, max_batch=size).max_batch for size in (3, 64)] == [3, 4]
    assert StreamPool(engine("step"), max_batch=64).max_batch == 64


def test_a_call_that_fails_moves_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = StreamPool(Engine(engine("step").path, threads=1), max_batch=2)
    ids = [pool.open() for _ in range(5)]
    pool.push({id: frame(pool.engine, id) for id in ids})
    before = [pool.state(id).to_bytes() for id in ids]
    call, calls = pool.engine.call, []

    def fails(feed: dict[str, Array], names: list[str], **options: Any) -> dict[str, Array]:
        calls.append(feed)
        if len(calls) == 3:
            raise ValueError("ONNX Runtime failed: bad allocation")
        return call(feed, names, **options)

    monkeypatch.setattr(pool.engine, "call", fails)
    with pytest.raises(ValueError, match="bad allocation"):
        pool.push(dict.fromkeys(ids))
    assert [pool.state(id).to_bytes() for id in ids] == before


@pytest.mark.parametrize("broken", [range(1, 3), range(5)], ids=["some", "all"])
def test_streams_without_an_answer_leave_others_theirs(broken: range, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where they are all of a call; only if no stream has one is the model damaged, and none moves on."""
    pool = StreamPool(Engine(engine("step").path, threads=1), max_batch=1)
    ids, session = [pool.open() for _ in range(5)], pool.engine._session
    calls = list[int]()

    def without(names: list[str], feed: dict[str, Array]) -> list[Array]:
        outputs: list[Array] = session.run(names, feed)
        if len(calls) in broken:
            outputs[names.index("per_step")][:] = np.nan
        calls.append(1)
        return outputs

    monkeypatch.setattr(pool.engine, "_session", SimpleNamespace(run=without))
    frames_of = {id: frame(pool.engine, id) for id in ids}
    if len(broken) == len(ids):
        with pytest.raises(ValueError, match="gives NaN or infinite logits"):
            pool.push(frames_of)
        assert {pool.state(id).t for id in ids} == {0}
    else:
        finite = [bool(np.isfinite(result.logits).all()) for result in pool.push(frames_of).values()]
        assert finite == [True, False, False, True, True]


def test_nan_is_refused_by_stream() -> None:
    pool = StreamPool(engine("step", normalize=False))
    one, other = pool.open(), pool.open()
    bad = frame(pool.engine, 1)
    bad[0, 3, 3] = np.nan
    with pytest.raises(ValueError, match=f"^stream {other}: the input holds NaN"):
        pool.push({one: frame(pool.engine, 0), other: bad})
    assert pool.state(one).t == 0


def test_frames_are_not_repeated() -> None:
    pool = StreamPool(engine("step", encoding="frames"))
    id = pool.open()
    pool.push({id: frame(pool.engine, 0)})
    with pytest.raises(ValueError, match=f"^stream {id}: only a directly encoded model shows its last image again"):
        pool.push({id: None})


def test_closed_streams_and_models_without_state_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = StreamPool(engine("step"))
    id = pool.open()
    pool.close(id)
    for use in (pool.close, pool.reset, pool.state, lambda id: pool.push({id: None})):
        with pytest.raises(ValueError, match=f"there is no stream {id}: it was closed"):
            use(id)
    for layout, options in (("dynamic", {}), ("unrolled", {"T": 4})):
        with pytest.raises(ValueError, match="gives no LIF state out, so it cannot stream; export with --layout step"):
            StreamPool(engine(layout, **options))
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "min_batch", 2)  # built again for one image, it would be refused again
        with pytest.raises(ValueError, match="gives no LIF state out"):
            StreamPool(engine("dynamic"))
    with pytest.raises(ValueError, match="max_batch must be at least 1, got 0"):
        StreamPool(engine("step"), max_batch=0)
    with pytest.raises(ValueError, match=r"max_batch must be a whole number, got 2\.0"):
        StreamPool(engine("step"), max_batch=2.0)  # type: ignore[arg-type]
