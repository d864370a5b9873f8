"""What a request of the Open Inference Protocol may say, and what is wrong with it. Knows no transport."""

from __future__ import annotations

import gc
import math
import operator
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import accumulate, chain
from typing import Any

import numpy as np

from tetdeploy.engine import Array

DATATYPES = {"uint8": "UINT8", "float32": "FP32", "int64": "INT64", "object": "BYTES"}  # by numpy's names
SIZE = "binary_data_size"  # of a tensor: how many of the bytes that follow the JSON are its
SHARED_MEMORY = "shared_memory_region"  # of an input, where other servers find its bytes
MAX_ID = 256  # characters of a sequence's id: the server keeps it for as long as the sequence is open
MAX_TENSORS = 16  # inputs and outputs that a request may name: each becomes an object, while nothing else is answered
MAX_AXES, MAX_SIZE = 8, 2**31 - 1  # of a shape: its sizes are multiplied before anything else bounds them


class InvalidRequestError(ValueError):
    """A request that is none, or that no model here could answer."""


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection in this block: to look through millions of new lists, all in use, would take most of it."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@dataclass(frozen=True)
class Input:
    """An input as it came: raw bytes, or numbers as `numbers` reads them."""

    name: str
    datatype: str
    shape: list[int]
    data: bytes | memoryview | Array


@dataclass(frozen=True)
class WantedOutput:
    """An output that a request names."""

    name: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class InferRequest:
    """A request as it came, over HTTP or gRPC.

    Attributes:
        id: the client's, or a new one.
        outputs: those that it names; none for all.
    """

    id: str
    inputs: list[Input]
    outputs: list[WantedOutput]
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Parameters:
    """The parameters of a request.

    Attributes:
        T: steps; None for the model's own.
        early_exit: False, True for the calibrated threshold, or a threshold in 0..1.
        sequence_id: of the sequence that the request is a part of; None if of none, as are 0 and "".
        sequence_start, sequence_end: whether it is the first or the last one.
    """

    T: int | None = None
    early_exit: bool | float = False
    sequence_id: int | str | None = None
    sequence_start: bool = False
    sequence_end: bool = False

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Parameters:
        """Parameters as they came.

        Raises:
            ValueError: one is unknown, of another type, or they contradict each other.
        """
        known = [field.name for field in fields(cls)]
        for name, value in given.items():
            if name not in known:
                raise ValueError(f"unknown parameter {name!r}; there are {', '.join(known)}")
            if not _fits(name, value):
                raise ValueError(f"parameter {name} must be {_WANTED[name]}, got {value!r}")
        return cls(**given).checked()

    def checked(self) -> Parameters:
        """These, with a sequence_id of 0 or "" as None.

        Raises:
            ValueError: they contradict each other.
        """
        if self.sequence_id:
            if self.early_exit is not False:
                raise ValueError("early_exit is for whole requests; the client of a sequence stops when it likes")
            return self
        if self.sequence_start or self.sequence_end:
            raise ValueError("sequence_start and sequence_end need a sequence_id that is not 0")
        return Parameters(self.T, self.early_exit)


_WANTED = {
    "T": "an integer",
    "early_exit": "true, false, or a threshold in 0..1",
    "sequence_id": f"an integer or a string of at most {MAX_ID} characters",
    "sequence_start": "true or false",
    "sequence_end": "true or false",
}


def _fits(name: str, value: Any) -> bool:
    if name == "T":
        return type(value) is int
    if name == "sequence_id":
        return type(value) is int or (type(value) is str and len(value) <= MAX_ID)
    if name == "early_exit":
        return type(value) in (bool, int, float) and 0 <= value <= 1
    return isinstance(value, bool)


def check_input_parameters(name: str, parameters: Collection[str]) -> None:
    """Refuse parameters of an input other than its size: all else is the request's, and an input that lies in shared
    memory would be an empty one.

    Raises:
        InvalidRequestError: it has such.
    """
    if SHARED_MEMORY in parameters:
        raise InvalidRequestError(
            f"unknown parameter {SHARED_MEMORY!r} of the input {name}; there is no shared memory, send the values"
        )
    if unknown := [parameter for parameter in parameters if parameter != SIZE]:
        raise InvalidRequestError(
            f"unknown parameter {unknown[0]!r} of the input {name}; there is {SIZE}, and others are the request's"
        )


def tensor(
    name: str, datatype: str, shape: list[int], data: bytes | memoryview | Array, wanted: np.dtype[Any]
) -> Array:
    """A tensor of raw bytes, or of `numbers`.

    Raises:
        ValueError: it is not what it says, or of another datatype than `wanted`.
    """
    if datatype != DATATYPES[wanted.name]:
        raise ValueError(f"the model takes {name} as {DATATYPES[wanted.name]}, got {datatype!r}")
    if len(shape) > MAX_AXES:
        raise ValueError(f"{name} has a shape of {len(shape)} axes; there may be {MAX_AXES}")
    if not all(0 <= size <= MAX_SIZE for size in shape):
        raise ValueError(f"{name} has the shape {shape}; no size may be negative, or more than {MAX_SIZE}")
    values = _cast(name, data, wanted) if isinstance(data, np.ndarray) else _raw(name, data, wanted)
    if values.size != math.prod(shape):
        raise ValueError(f"{name} of shape {shape} has {math.prod(shape)} values, got {values.size}")
    if not _fits_into(values.shape, shape):
        raise ValueError(
            f"{name} of shape {shape} got data nested as {list(values.shape)}, whose rows are others; nest them alike, "
            "or give them flat, the last axis fastest"
        )
    return values.reshape(shape)


def _fits_into(nested: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether one shape has the axes of the other, or some of them merged: images of [N, H, W, 3] are none of [N, 3, H,
    W], though as many values."""
    ends, wanted = ({*accumulate(sizes, operator.mul)} - {1} for sizes in (nested, shape))
    return ends <= wanted or ends >= wanted


def raw_bytes(values: Array) -> bytes:
    """The bytes of a tensor, by rows; of strings each after its length, 4 bytes, little-endian."""
    if values.dtype != object:
        return values.tobytes()
    encoded = [value.encode() for value in values.flat]
    return b"".join(struct.pack("<I", len(value)) + value for value in encoded)


def _raw(name: str, data: bytes | memoryview, wanted: np.dtype[Any]) -> Array:
    if len(data) % wanted.itemsize:
        raise ValueError(f"{name} has {len(data)} bytes, which are no whole number of {wanted} values")
    return np.frombuffer(data, wanted)


def numbers(name: str, data: list[Any]) -> Array:
    """Numbers in any nesting, as numpy finds them: integers, floats, or what is too large for both.

    Raises:
        InvalidRequestError: they are none, or nested unevenly.
    """
    kinds = _kinds(data)
    if list in kinds:
        raise InvalidRequestError(f"the data of {name} are nested unevenly")
    if not kinds <= {int, float}:  # numpy would make each of them as long as the longest string
        got = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise InvalidRequestError(f"the data of {name} must be numbers, got {got}")
    try:
        return np.array(data)
    except ValueError as error:
        raise InvalidRequestError(f"the data of {name} are nested unevenly") from error


def _cast(name: str, values: Array, wanted: np.dtype[Any]) -> Array:
    if values.size == 0:
        return values.astype(wanted)
    if values.dtype.kind not in ("iu" if wanted.kind == "u" else "iuf"):
        raise ValueError(f"the data of {name} must be numbers of {wanted}, got {values.dtype}")
    if wanted.kind == "u" and not (values.min() >= 0 and values.max() <= np.iinfo(wanted).max):
        raise ValueError(f"the data of {name} must lie in 0..{np.iinfo(wanted).max}")
    with np.errstate(over="ignore"):  # the engine refuses infinity with a better message
        return values.astype(wanted)


def _kinds(data: list[Any]) -> set[type]:
    """The types of what lists hold, in any nesting; `list` is among them where it is uneven."""
    while (kinds := set(map(type, data))) == {list}:
        data = list(chain.from_iterable(data))
    return kinds
