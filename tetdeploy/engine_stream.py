"""One stream of an engine, or several in step: the LIF state between one call of the graph and the next.

An engine itself keeps nothing between calls. Streams that come and go each for themselves: `tetdeploy.streams`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tetdeploy.arguments import check_count, check_unmasked
from tetdeploy.storage.model_file import state_outputs

if TYPE_CHECKING:
    from tetdeploy.engine import Array, Engine


@dataclass(frozen=True)
class StepResult:
    """What one `push` gives: `logits [N, K]`, the mean since the last reset; `step_logits [N, K]`; steps `t` so far."""

    logits: Array
    step_logits: Array
    t: int


def check_finite(state: Mapping[str, Array]) -> None:
    """Refuse a state after which answers would be wrong, and look as others do.

    Raises:
        ValueError: some of it is NaN or infinite.
    """
    if broken := [name for name, value in state.items() if not np.isfinite(value).all()]:
        raise ValueError(f"the state is damaged: {broken[0]} holds NaN or infinite values")


class Stream:
    """Frames in, answers out, with the LIF state kept in between. Made by `Engine.stream`.

    Attributes:
        t: steps since the last reset.
        state: a copy of every membrane by its input's name, `u.<neurons> [N, ...]` float32; may be saved and put back.
            Another set of names, shape or dtype, and NaN or infinite values, raise ValueError.
    """

    def __init__(self, engine: Engine, batch: int, session: Any = None) -> None:
        engine.check_streams()
        self.engine, self.batch = engine, check_count("batch", batch)
        self._session = session
        self._states = [(s["input"], s["output"], tuple(s["shape"])) for s in engine.metadata["states"]]
        self._encoded = [(s["input"], s["output"], tuple(s["shape"])) for s in engine.metadata["encoded"]]
        self.reset()

    def reset(self) -> None:
        """Start anew: u = 0, t = 0."""
        self.t = 0
        self._u = self._zeros(self._states)
        self._image: Any = None  # as `Engine.put` gave it
        self._kept = self._zeros(self._encoded)
        # In float64: in float32 a sum of 2^24 and more takes no logits of 1 any more.
        self._sum = np.zeros((self.batch, len(self.engine.class_names)), np.float64)

    @property
    def state(self) -> dict[str, Array]:
        return {name: np.array(u) for name, u in self._u.items()}  # they may lie on a GPU

    @state.setter
    def state(self, state: Mapping[str, Array]) -> None:
        wanted = {name: (self.batch, *shape) for name, _, shape in self._states}
        if not isinstance(state, Mapping):
            raise ValueError(f"the state must hold {', '.join(wanted)} by name; got {type(state).__name__}")
        if set(state) != set(wanted):
            raise ValueError(f"the state must hold {', '.join(wanted)}; got {', '.join(map(str, state)) or 'nothing'}")
        for name, u in state.items():
            check_unmasked(name, u)
        copies = {name: np.array(u, order="C") for name, u in state.items()}
        for name, u in copies.items():
            if u.shape != wanted[name] or u.dtype != np.float32:
                raise ValueError(f"{name} must be float32 {list(wanted[name])}, got {u.dtype} {list(u.shape)}")
        check_finite(copies)
        self._u = copies

    def push(self, x: Array | None = None) -> StepResult:
        """Run the next step, or the next T steps of an unrolled graph.

        Args:
            x: a frame, or the image of a directly encoded model, `[N, C, H, W]`; a chunk `[N, T, C, H, W]` for an
                unrolled graph that takes frames. None shows the last image again, which costs no encoding unless the
                graph is one for a GPU, where encoding costs nothing to speak of.

        Raises:
            ValueError: another shape, dtype or batch than the stream's; None before any image, or with frames.
        """
        if x is None and self.engine.encoding == "frames":
            raise ValueError("a model of frames takes a new one at each step: push(frame)")
        if x is None and self._image is None:
            raise ValueError("push() repeats the last image of a directly encoded stream; there is none: push(image)")
        if x is not None:
            frames = self.engine.encoding == "frames"
            x = self.engine.check_input(self._with_time(np.asanyarray(x)) if self._one_frame() else x)
            if frames and x.shape[1] != self.engine.chunk_T:
                raise ValueError(f"push a chunk of exactly T={self.engine.chunk_T} frames, got {x.shape[1]}")
            x = x.copy()  # push() may show it again, after the caller has filled the buffer anew
        outputs = self.call(x, [])
        per_step = outputs["per_step"]
        self._sum = self._sum + per_step.sum(1)
        self.t += per_step.shape[1]
        return StepResult((self._sum / self.t).astype(np.float32), per_step[:, -1], self.t)

    def keep(self, which: Array) -> None:
        """Go on with some of the streams only: `which` is a mask `[N]`, or their numbers in a new order."""
        self.batch = len(np.arange(self.batch)[which])
        self._u, self._kept = ({name: np.asarray(u)[which] for name, u in a.items()} for a in (self._u, self._kept))
        self._image = None if self._image is None else self.engine.put(np.asarray(self._image)[which])
        self._sum = self._sum[which]

    def call(self, x: Array | None, names: Sequence[str], *, check: bool = True) -> dict[str, Array]:
        """One call of the graph on checked input: its `per_step` and the outputs `names`. State moves on, unless no
        image has finite logits, which `check` refuses."""
        if x is not None and len(x) != self.batch:
            raise ValueError(f"this stream has a batch of {self.batch}, got {len(x)}")
        shown = self._image if x is None else self.engine.put(x[:, 0] if self._one_frame() else x)
        assert shown is not None
        feed: dict[str, Array] = {"x": shown, **self._u}
        if self._encoded:
            feed |= {"encode": np.array([x is not None]), **self._kept}
        wanted = ["per_step", *names, *state_outputs(self.engine.metadata)]
        outputs = self.engine.call(feed, wanted, self._session, check=check)
        # taken out: who collects the answers of many calls does not hold the state of each
        self._u = {name: outputs.pop(output) for name, output, _ in self._states}
        self._kept = {name: outputs.pop(output) for name, output, _ in self._encoded}
        self._image = shown
        return outputs

    def _with_time(self, frame: Array) -> Array:
        """One frame `[N, C, H, W]` as the `[N, 1, C, H, W]` of the others."""
        if frame.ndim != 1 + len(self.engine.input_shape):
            shape = ", ".join(map(str, ("N", *self.engine.input_shape)))
            raise ValueError(f"push one frame at a time, of shape [{shape}]; got {list(frame.shape)}")
        return frame[:, None]

    def _one_frame(self) -> bool:
        return self.engine.layout == "step" and self.engine.encoding == "frames"

    def _zeros(self, states: list[tuple[str, str, tuple[int, ...]]]) -> dict[str, Any]:
        return {name: self.engine.zeros(name, (self.batch, *shape)) for name, _, shape in states}
