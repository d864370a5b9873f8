"""A session with native operators, whose LIF state lies in memory as its convolutions want it.

Each state has the shape that the file says, `[N, C, H, W]`, but channels may lie last in memory, so that none is
transposed on its way into a call and out of it. States that lie otherwise are taken as well, and copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tetdeploy.native import TO_FIRST, TO_LAST, last_name

Array = NDArray[Any]


class NativeSession:
    """ONNX Runtime's session of what `fuse_model` made, by the names and shapes of the model file.

    Args:
        session: ONNX Runtime's.
        states: as `fuse_model` was given them.

    Attributes:
        states_last: inputs whose channels are to lie last in memory.
    """

    def __init__(self, session: Any, states: Sequence[tuple[str, str]]) -> None:
        self._session = session
        inputs = {value.name for value in session.get_inputs()}
        turned = [(read, made) for read, made in states if read not in inputs]
        self._inputs = {read: last_name(read) for read, _ in turned}
        self._outputs = {made: last_name(made) for _, made in turned}
        self.states_last = frozenset(self._inputs)

    def run(self, names: Sequence[str], feed: Mapping[str, Array]) -> list[Array]:
        fed = dict(feed)
        for name, last in self._inputs.items():
            fed[last] = np.ascontiguousarray(fed.pop(name).transpose(TO_LAST))
        given = self._session.run([self._outputs.get(name, name) for name in names], fed)
        return [y.transpose(TO_FIRST) if name in self._outputs else y for name, y in zip(names, given, strict=True)]

    def get_outputs(self) -> list[Any]:
        names = {last: made for made, last in self._outputs.items()}
        return [SimpleNamespace(name=names.get(value.name, value.name)) for value in self._session.get_outputs()]


def zeros_last(shape: Sequence[int]) -> Array:
    """float32 zeros `[N, C, H, W]` whose channels lie last in memory."""
    return np.zeros([shape[axis] for axis in TO_LAST], np.float32).transpose(TO_FIRST)
