"""ONNX Runtime's CUDA provider with CUDA graphs: the kernels of a call are recorded once and launched as one.

A recorded call reads and writes where it did when it was recorded. So every run or stream has arrays of its own for as
long as it lasts, a `_Slot`: the input, the logits and two sets of membranes, of which a call reads one and writes the
other. At most three calls are recorded for a slot: from u = 0, from the first set and from the second.

What ONNX Runtime asks for is from its documentation, source and issues, and was never run on a GPU: no control flow in
the graph, no layer on the CPU (https://github.com/microsoft/onnxruntime/pull/16491), always the same thread, since what
is recorded belongs to the one that ran it, and nothing else of the process on the device while it records.
"""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tetdeploy.runtimes.onnxruntime_gpu import Array, BoundSession, DeviceArray, DeviceZeros

PROVIDER_OPTIONS = {"enable_cuda_graph": "1"}
MOST_SLOTS = 16  # that are recorded and stay; ONNX Runtime forgets no recording
_DTYPES = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}


def why_not(metadata: Mapping[str, Any]) -> str | None:
    """Why a graph with these metadata cannot be recorded, and what to do; None if it can."""
    if metadata["layout"] == "dynamic":
        return "a dynamic graph has a Scan, which cannot be recorded; export with --layout step, or unrolled"
    if metadata["encoded"]:
        return (
            "this step graph has an If round what depends on the image alone, which cannot be recorded; one exported "
            "with --target cuda has none, if that is a single layer"
        )
    return None


class GraphSession(BoundSession):
    """An ONNX Runtime session that records its calls as CUDA graphs, called as `Engine` and `Stream` call a plain one.

    Threads take turns: all calls are made by one of the session's own. A batch size is recorded when it first comes up,
    or comes up twice at the same time, and its arrays stay; with MOST_SLOTS of these, others run without a recording.

    Args:
        session: the `InferenceSession`, made with PROVIDER_OPTIONS, of a graph that `why_not` has nothing against.
        device: as ONNX Runtime calls it: `cuda`; or `cpu`, where the same is done but nothing recorded.
        states: every membrane's output by its input.
    """

    def __init__(self, session: Any, device: str, states: Mapping[str, str]) -> None:
        super().__init__(session, device, states.values())
        self._states = dict(states)
        values = [*session.get_inputs(), *session.get_outputs()]
        self._tensors = {v.name: (v.shape, _DTYPES[v.type]) for v in values if v.name in ("x", "per_step", *states)}
        self._slots: list[_Slot] = []
        self._ids = itertools.count(1)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cuda-graphs")
        self._process = os.getpid()

    def put(self, array: Array) -> _Shown:  # type: ignore[override]
        """An array to be fed to many calls; the first one of a run or stream takes it to the device."""
        return _Shown(np.ascontiguousarray(array))

    def zeros(self, shape: Sequence[int]) -> DeviceZeros:
        made: DeviceZeros = self._on_thread(super().zeros, shape)
        return made

    def run(self, names: Sequence[str], feed: Mapping[str, Any]) -> list[Any]:
        outputs: list[Any] = self._on_thread(self._run, names, feed)
        return outputs

    def _on_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if os.getpid() != self._process:  # where the thread is not, and CUDA would fail
            raise ValueError("an engine on a GPU does not go on in a forked process; open another one there")
        return self._thread.submit(function, *arguments).result()

    def _run(self, names: Sequence[str], feed: Mapping[str, Any]) -> list[Any]:
        lease, source = self._place(feed)
        slot, target = lease.slot, 1 if source == 0 else 0
        slot.show(feed["x"])
        if source not in slot.calls:
            slot.calls[source] = self._call(slot, source, target, feed)
        slot.written[target] += 1
        slot.calls[source]()
        # Copied, since on a CPU it is the slot's own.
        given: dict[str, Any] = {"per_step": slot.logits.numpy().copy()}
        given |= {
            self._states[name]: _Held(value, lease, target, self._thread) for name, value in slot.u[target].items()
        }
        return [given[name] for name in names]

    def _place(self, feed: Mapping[str, Any]) -> tuple[_Lease, int | None]:
        """Where a call takes place, and which of the sets of membranes it reads; None is u = 0."""
        u = {name: feed[name] for name in self._states}
        first = next(iter(u.values()), None)
        if isinstance(first, _Held) and all(first.belongs_with(other) for other in u.values()):
            return first.lease, first.which
        lease = self._lease(len(feed["x"]))
        if all(isinstance(value, DeviceZeros) for value in u.values()):
            return lease, None
        lease.slot.written[0] += 1
        for name, value in u.items():
            _update(lease.slot.u[0][name], value, name)
        return lease, 0

    def _lease(self, batch: int) -> _Lease:
        """Arrays that no run or stream is using."""
        slot = next((slot for slot in self._slots if slot.batch == batch and slot.lease() is None), None)
        if slot is None:
            u = tuple({name: self._empty(name, batch) for name in self._states} for _ in range(2))
            slot = _Slot(batch, self._empty("x", batch), self._empty("per_step", batch), u)
            if len(self._slots) < MOST_SLOTS:
                self._slots.append(slot)
        lease = _Lease(slot)
        slot.lease = weakref.ref(lease)
        return lease

    def _empty(self, name: str, batch: int) -> Any:
        from onnxruntime import OrtValue

        shape, dtype = self._tensors[name]
        return OrtValue.ortvalue_from_shape_and_type([batch, *shape[1:]], dtype, self._device, 0)

    def _call(self, slot: _Slot, source: int | None, target: int, feed: Mapping[str, Any]) -> Callable[[], None]:
        """A call, which ONNX Runtime records when it is made for the first time, if its slot stays."""
        from onnxruntime import RunOptions

        binding, options = self._session.io_binding(), RunOptions()
        binding.bind_ortvalue_input("x", slot.x)
        binding.bind_ortvalue_output("per_step", slot.logits)
        for name, output in self._states.items():
            if source is None:
                zeros = feed[name]
                slot.zeros.append(zeros)
                binding.bind_input(name, self._device, 0, np.float32, zeros.shape, zeros.value.data_ptr())
            else:
                binding.bind_ortvalue_input(name, slot.u[source][name])
            binding.bind_ortvalue_output(output, slot.u[target][name])
        options.add_run_config_entry("gpu_graph_id", str(next(self._ids)) if slot in self._slots else "-1")
        session = self._session  # not self, which has the slot: an engine that is dropped is to go at once
        return lambda: session.run_with_iobinding(binding, options)


class _Shown:
    """An array of the host that `put` gave: the same object is the same array."""

    def __init__(self, array: Array) -> None:
        self.array, self.shape = array, array.shape

    def __len__(self) -> int:
        return len(self.array)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.asarray(self.array, dtype)


@dataclass(eq=False)
class _Slot:
    """The arrays of one run or stream, and the calls among them by the set of membranes that is read.

    Attributes:
        batch: images in a call.
        x, logits, u: input, per-step logits, and two sets of membranes by their inputs' names.
        zeros: what calls from u = 0 read; kept alive for them.
        shown: what x holds.
        written: how often each set of u was.
        lease: who uses the slot, if anyone.
    """

    batch: int
    x: Any
    logits: Any
    u: tuple[dict[str, Any], ...]
    zeros: list[DeviceZeros] = field(default_factory=list)
    calls: dict[int | None, Callable[[], None]] = field(default_factory=dict)
    shown: _Shown | None = None
    written: list[int] = field(default_factory=lambda: [0, 0])
    lease: Callable[[], _Lease | None] = lambda: None

    def show(self, x: Array | _Shown) -> None:
        if isinstance(x, _Shown) and x is self.shown:
            return
        self.shown = None  # should the copy fail
        _update(self.x, x, "x")
        self.shown = x if isinstance(x, _Shown) else None


class _Lease:
    """Lives as long as the membranes of one run or stream are held."""

    def __init__(self, slot: _Slot) -> None:
        self.slot = slot


class _Held(DeviceArray):
    """A membrane in a slot, until the call after the next one writes there."""

    def __init__(self, value: Any, lease: _Lease, which: int, thread: ThreadPoolExecutor) -> None:
        super().__init__(value)
        self.lease, self.which = lease, which
        self._thread, self._version = thread, lease.slot.written[which]

    def belongs_with(self, other: Any) -> bool:
        """Whether the other is a membrane of the same set, and both are still there."""
        return (
            isinstance(other, _Held)
            and other.lease is self.lease
            and other.which == self.which
            and self._version == other._version == self.lease.slot.written[self.which]
        )

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return self._thread.submit(self.copied, dtype).result()

    def copied(self, dtype: Any = None) -> Array:
        """The membrane on the host, for the thread that makes the calls."""
        if not self.belongs_with(self):
            raise ValueError("a membrane that the call after the next has overwritten; copy it with np.asarray before")
        return super().__array__(dtype).copy()  # on a CPU it is the membrane itself


def _update(value: Any, array: Any, name: str) -> None:
    """Write an array to where it is read.

    Raises:
        ValueError: it has another shape or dtype.
    """
    array = array.copied() if isinstance(array, _Held) else np.ascontiguousarray(array)
    if list(array.shape) != value.shape():
        raise ValueError(f"{name} must be of shape {value.shape()}, got {list(array.shape)}")
    value.update_inplace(array)
