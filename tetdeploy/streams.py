"""Many streams of one engine, run together: those that push at the same time share a call of the graph.

A stream is nothing but its state, a row in a few arrays: one that waits costs that memory and no more.
"""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tetdeploy.arguments import check_count, check_path, check_type, check_whole
from tetdeploy.batches import parts
from tetdeploy.engine import Array, Engine
from tetdeploy.engine_stream import StepResult, check_finite
from tetdeploy.runtimes.native_session import zeros_last
from tetdeploy.storage.arrays import opened_npz
from tetdeploy.storage.files import atomic_write

_PREFIX = "carried."  # of the arrays' names in a file
_MOST_STEPS = 2**62  # of a state, so that int64 counts those that come


@dataclass(frozen=True)
class StreamState:
    """All that a stream carries from one step to the next.

    Attributes:
        carried: by the graph's input, without a batch axis: membranes `u.<neurons>`; for a directly encoded model the
            last image `x` and its encoded currents `encoded.<k>`.
        sum_logits: of all steps since the last reset, `[K]` float64.
        t: their number.
        model_sha256: of the model file.
    """

    carried: Mapping[str, Array]
    sum_logits: Array
    t: int
    model_sha256: str

    def to_bytes(self) -> bytes:
        """A `.npz` without Python objects."""
        buffer = io.BytesIO()
        carried: dict[str, Any] = {f"{_PREFIX}{name}": value for name, value in self.carried.items()}
        np.savez(buffer, sum_logits=self.sum_logits, t=self.t, model_sha256=self.model_sha256, **carried)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str = "the state") -> StreamState:
        """What `to_bytes` made of a state; `name` is what errors call it.

        Raises:
            ValueError: the bytes are damaged, or something else.
        """
        with opened_npz(io.BytesIO(data), name) as file:
            arrays = dict(file)
        try:
            total, t, sha256 = (arrays.pop(key) for key in ("sum_logits", "t", "model_sha256"))
            steps = check_whole("t", t)
            if odd := [key for key in arrays if not key.startswith(_PREFIX)]:
                raise ValueError(f"it has {odd[0]}")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{name} is no state of a stream") from error
        return cls({key.removeprefix(_PREFIX): value for key, value in arrays.items()}, total, steps, str(sha256))

    def save(self, path: Path | str) -> None:
        """Write `to_bytes` to a file, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        with atomic_write(path) as temporary:
            temporary.write_bytes(self.to_bytes())

    @classmethod
    def load(cls, path: Path | str) -> StreamState:
        """What `save` wrote.

        Raises:
            ValueError: the file is damaged, or something else.
            OSError: it cannot be read.
        """
        check_path("path", path, "a state that save() wrote")
        return cls.from_bytes(Path(path).read_bytes(), name=str(path))


class StreamPool:
    """Many streams of one engine. Threads may share a pool: they take turns.

    Args:
        engine: of a model that gives its state out: layout step, or unrolled with `--with-state`.
        max_batch: most streams in one call of the graph; a push of more takes several calls. A TensorRT engine may
            have been built for fewer, and a CPU takes fewer of a large network.

    Raises:
        ValueError: `engine` is not an `Engine`; the graph gives no state out; `max_batch` is not a whole number, or
            below 1; the engine does not take every smaller batch.
    """

    def __init__(self, engine: Engine, *, max_batch: int = 64) -> None:
        check_type("engine", engine, Engine, "pass Engine(path)")
        engine.check_streams()
        engine.check_small_batches("a pool calls it with those streams that push")
        max_batch = check_count("max_batch", max_batch)
        self.engine = engine
        self.max_batch = min(max_batch, engine.max_batch or max_batch)
        self._at_once = engine.most_at_once(self.max_batch, engine.chunk_T)
        states, encoded = engine.metadata["states"], engine.metadata["encoded"]
        self._outputs = {s["input"]: s["output"] for s in (*states, *encoded)}
        self._encodes = bool(encoded)
        self._direct = engine.encoding == "direct"
        chunk = () if self._direct or engine.layout == "step" else (engine.chunk_T,)
        self._frame_shape = (*chunk, *engine.input_shape)
        layout = {s["input"]: (tuple(s["shape"]), np.dtype(np.float32)) for s in (*states, *encoded)}
        if self._direct:
            layout["x"] = (self._frame_shape, engine.input_dtype)
        self._carried = _Rows(layout, engine.states_last)
        self._sums = _Rows(
            {"logits": ((len(engine.class_names),), np.dtype(np.float64)), "t": ((), np.dtype(np.int64))}
        )
        self._ids: list[int] = []  # of the stream in each row
        self._row: dict[int, int] = {}
        self._next_id = 0
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def nbytes(self) -> int:
        """Memory of all state: doubled as streams open and halved as they close, so below four times what they need, or
        that of eight streams. Halving itself needs memory; where there is none, it waits until another stream closes.
        """
        return self._carried.nbytes + self._sums.nbytes

    @property
    def stream_nbytes(self) -> int:
        """Memory of the state of one stream."""
        return self._carried.row_nbytes + self._sums.row_nbytes

    def open(self, state: StreamState | None = None) -> int:
        """Start a stream, at u = 0 or where `state` was taken. Gives its id; ids are not used again.

        Raises:
            ValueError: the state is none, of another model, or damaged.
        """
        if state is not None:
            self._check_state(state)
        with self._lock:
            row = self._carried.append()
            try:
                self._sums.append()
            except MemoryError:
                self._carried.remove(row)
                raise
            self._next_id += 1
            self._ids.append(self._next_id)
            self._row[self._next_id] = row
            if state is not None:
                for name, value in state.carried.items():
                    self._carried[name][row] = value
                self._sums["logits"][row], self._sums["t"][row] = state.sum_logits, state.t
            return self._next_id

    def close(self, id: int) -> None:
        """End a stream and free its memory."""
        with self._lock:
            row = self._find(id)
            self._carried.remove(row)  # the last row takes its place
            self._sums.remove(row)
            del self._row[id]
            last = self._ids.pop()
            if last != id:
                self._ids[row] = last
                self._row[last] = row

    def reset(self, id: int) -> None:
        """Start a stream anew: u = 0, t = 0."""
        with self._lock:
            row = self._find(id)
            self._carried.clear(row)
            self._sums.clear(row)

    def state(self, id: int) -> StreamState:
        """A copy of what a stream carries."""
        with self._lock:
            row = self._find(id)
            carried = {name: array[row].copy() for name, array in self._carried.items()}
            total, t = self._sums["logits"][row].copy(), int(self._sums["t"][row])
        return StreamState(carried, total, t, self.engine.sha256)

    def push(self, frames: Mapping[int, Array | None]) -> dict[int, StepResult]:
        """Run the next step of the streams named, together.

        Args:
            frames: by stream: its frame or image `[C, H, W]`; None shows a directly encoded stream its last image
                again, see `Stream.push`. A chunk `[T, C, H, W]` for an unrolled graph that takes frames.

        Returns:
            By stream what `Stream.push` gives, without the batch axis: `logits [K]`, `step_logits [K]`, `t`.

        Raises:
            ValueError: `frames` is no mapping; there is no such stream; a frame has another shape or dtype than the
                model's, or holds NaN; None before any image, or with frames. The message names the stream, and no
                stream has moved on.
        """
        check_type("frames", frames, Mapping, "pass {id: frame}, by the id that open() gave")
        with self._lock:
            shown = {id: frame for id, frame in frames.items() if frame is not None}
            repeated = [id for id in frames if id not in shown]
            for id in frames:
                self._find(id)
            for id in repeated:
                self._check_repeats(id)
            if not self._encodes and repeated:  # what is shown again is computed again, so that all share a call
                shown |= {id: self._carried["x"][self._row[id]] for id in repeated}
                repeated = []
            groups = [[*shown][part] for part in parts(len(shown), self._at_once)]
            pushes: list[tuple[list[int], Array | None]] = [
                (ids, self._stack({id: shown[id] for id in ids})) for ids in groups
            ]
            pushes += [(repeated[part], None) for part in parts(len(repeated), self._at_once)]
            calls = [(ids, x, self._call(ids, x)) for ids, x in pushes]
            if calls:
                self.engine.check_finite(np.concatenate([outputs["per_step"] for _, _, outputs in calls]))
            results: dict[int, StepResult] = {}
            for ids, x, outputs in calls:
                results |= self._move_on(ids, x, outputs)
            return results

    def _call(self, ids: Sequence[int], x: Array | None) -> dict[str, Array]:
        """One call of the graph for some of the streams, whose state stays as it is."""
        rows = self._rows_of(ids)
        feed = {name: array[rows] for name, array in self._carried.items() if x is None or name != "x"}
        if x is not None:
            feed["x"] = x
        if self._encodes:
            feed["encode"] = np.array([x is not None])
        return self.engine.call(feed, ["per_step", *self._outputs.values()], check=False)

    def _move_on(self, ids: Sequence[int], x: Array | None, outputs: Mapping[str, Array]) -> dict[int, StepResult]:
        """Take over what a call gave."""
        rows, per_step = self._rows_of(ids), outputs["per_step"]
        for name, output in self._outputs.items():
            self._carried[name][rows] = np.asarray(outputs[output])
        if x is not None and self._direct:
            self._carried["x"][rows] = x
        self._sums["t"][rows] += per_step.shape[1]
        self._sums["logits"][rows] += per_step.sum(1)
        t = self._sums["t"][rows]
        logits = (self._sums["logits"][rows] / t[:, None]).astype(np.float32)
        return dict(zip(ids, map(StepResult, logits, per_step[:, -1], t.tolist()), strict=True))

    def _rows_of(self, ids: Sequence[int]) -> slice | Array:
        """The rows of some streams; as a slice, which is read without a copy, if they follow one another."""
        rows = [self._row[id] for id in ids]
        first = rows[0]
        return slice(first, first + len(rows)) if rows == [*range(first, first + len(rows))] else np.array(rows)

    def _find(self, id: int) -> int:
        if id not in self._row:
            raise ValueError(f"there is no stream {id}: it was closed, or open() never gave that id")
        return self._row[id]

    def _stack(self, frames: Mapping[int, Array]) -> Array:
        """The frames as one batch `[B, C, H, W]`."""
        for id, frame in frames.items():
            try:
                shape = np.shape(frame)
            except ValueError as error:
                raise ValueError(f"stream {id}: its frame is nested unevenly") from error
            if shape != self._frame_shape:
                wanted, got = list(self._frame_shape), list(shape)
                raise ValueError(f"stream {id} takes a frame of shape {wanted}, got {got}")
        try:
            return self._check(np.stack(list(frames.values()), dtype=self.engine.input_dtype, casting="no"))
        except (TypeError, ValueError):
            for id, frame in frames.items():
                self._check_frame(id, np.asanyarray(frame))
            raise

    def _check(self, batch: Array) -> Array:
        time = self.engine.encoding == "frames" and self.engine.layout == "step"
        self.engine.check_input(batch[:, None] if time else batch)
        return batch

    def _check_frame(self, id: int, frame: Array) -> None:
        try:
            self._check(frame[None])
        except ValueError as error:
            raise ValueError(f"stream {id}: {error}") from error

    def _check_repeats(self, id: int) -> None:
        if not self._direct:
            raise ValueError(f"stream {id}: only a directly encoded model shows its last image again; push a frame")
        if not self._sums["t"][self._row[id]]:
            raise ValueError(f"stream {id} has no image yet to show again; push one")

    def _check_state(self, state: StreamState) -> None:
        check_type("state", state, StreamState, "StreamState.load and from_bytes make one of what was saved")
        check_type("the state is damaged: model_sha256", state.model_sha256, str)
        if state.model_sha256 != self.engine.sha256:
            raise ValueError(
                f"the state is of another model than {self.engine.path.name} (SHA-256 {state.model_sha256[:12]}..., "
                f"not {self.engine.sha256[:12]}...); a stream goes on only with the very file it began with"
            )
        check_type("the state is damaged: carried", state.carried, Mapping)
        for name, value in {**state.carried, "sum_logits": state.sum_logits}.items():
            check_type(f"the state is damaged: {name}", value, np.ndarray)
        t = check_whole("the state is damaged: t", state.t)
        carried = {name: (value.shape, value.dtype) for name, value in state.carried.items()}
        total = state.sum_logits.shape, state.sum_logits.dtype
        wanted = self._carried.layout, self._sums.layout["logits"]
        if (carried, total) != wanted or not 0 <= t <= _MOST_STEPS:
            raise ValueError(f"the state is damaged: it does not hold what a stream of {self.engine.path.name} carries")
        check_finite({**state.carried, "sum_logits": state.sum_logits})


class _Rows:
    """Arrays by name with a row for each stream, the first `count` of which are in use; those `last` have channels last
    in memory."""

    _LEAST = 8

    def __init__(self, layout: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]], last: Container[str] = ()) -> None:
        self.layout = dict(layout)
        self.count = 0
        self._last = last
        self._arrays = {name: self._zeros(name, self._LEAST) for name in layout}
        self._capacity = self._LEAST

    def __getitem__(self, name: str) -> Array:
        return self._arrays[name]

    def items(self) -> list[tuple[str, Array]]:
        return list(self._arrays.items())

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._arrays.values())

    @property
    def row_nbytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.layout.values())

    def append(self) -> int:
        """One row more, of zeros; gives its number."""
        if self.count == self._capacity:
            self._resize(2 * self._capacity)
        self.clear(self.count)
        self.count += 1
        return self.count - 1

    def remove(self, row: int) -> None:
        """One row less: the last takes the place of `row`."""
        self.count -= 1
        for array in self._arrays.values():
            array[row] = array[self.count]
        if self._capacity > self._LEAST and self.count <= self._capacity // 4:
            with suppress(MemoryError):  # the larger arrays do as well
                self._resize(self._capacity // 2)

    def clear(self, row: int) -> None:
        for array in self._arrays.values():
            array[row] = 0

    def _resize(self, capacity: int) -> None:
        arrays = {name: self._zeros(name, capacity) for name in self._arrays}
        for name, array in arrays.items():
            array[: self.count] = self._arrays[name][: self.count]
        self._arrays, self._capacity = arrays, capacity

    def _zeros(self, name: str, capacity: int) -> Array:
        shape, dtype = self.layout[name]
        return zeros_last((capacity, *shape)) if name in self._last else np.zeros((capacity, *shape), dtype)
