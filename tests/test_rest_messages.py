"""JSON of requests: what is left of it once it is read."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pydantic", reason="needs the extra serve")
pytest.importorskip("starlette", reason="needs the extra serve")

from tetdeploy.serve.bodies import Sizes
from tetdeploy.serve.protocol import OpenInferenceModel
from tetdeploy.serve.requests import InvalidRequestError, uncollected
from tetdeploy.serve.rest_messages import read_request

SIZES = Sizes(10**7, 10**7, 10**7)


def body(data: bytes) -> bytes:
    return b'{"inputs": [{"name": "x", "shape": [200000], "datatype": "UINT8", "data": [%s]}]}' % data


@contextmanager
def collections() -> Iterator[list[int]]:
    """The generations that were collected."""
    found: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            found.append(info["generation"])

    gc.callbacks.append(note)
    try:
        yield found
    finally:
        gc.callbacks.remove(note)


@pytest.mark.usefixtures("collects_its_own")
def test_json_is_read_without_garbage_collection_and_its_lists_are_gone() -> None:
    many = body(b",".join([b"[1]"] * 200_000))
    gc.collect()
    alive = len(gc.get_objects())
    with collections() as found:
        request = read_request(many, {}, SIZES)
    assert len(found) <= 1  # 300 with it
    assert len(gc.get_objects()) - alive < 10_000
    [x] = request.inputs
    np.testing.assert_array_equal(x.data, np.ones((200_000, 1)))


@pytest.mark.usefixtures("collects_its_own")
@pytest.mark.parametrize("last", [b"2", b'"2"]', b"[{}]"])
def test_a_refusal_keeps_no_lists(last: bytes) -> None:
    many = body(b",".join([*[b"[1]"] * 200_000, last]))
    gc.collect()
    alive = len(gc.get_objects())
    with pytest.raises(InvalidRequestError) as refused:
        read_request(many, {}, SIZES)
    assert len(gc.get_objects()) - alive < 10_000, refused


def test_an_input_in_shared_memory_is_refused_by_name() -> None:
    shared = b'"parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 64}'
    sent = b'{"inputs": [{"name": "x", "shape": [1, 1, 8, 8], "datatype": "UINT8", %s}]}' % shared
    with pytest.raises(InvalidRequestError, match="'shared_memory_region' of the input x; there is no shared memory"):
        read_request(sent, {}, SIZES)


@pytest.mark.parametrize(("given", "match"), [
    (b'"parameters": {"T": 1}', "^unknown parameter 'T' of the input x; there is binary_data_size, and others are"),
    (b'"data": [1], "parameters": {"binary_data_size": 1}', "^input x has data and binary_data_size; send one of them"),
])  # fmt: skip
def test_nothing_that_an_input_says_is_dropped(given: bytes, match: str) -> None:
    head = b'{"inputs": [{"name": "x", "shape": [1], "datatype": "UINT8", %s}]}' % given
    with pytest.raises(InvalidRequestError, match=match):
        read_request(head + b"9", {"inference-header-content-length": str(len(head))}, SIZES)


@pytest.mark.parametrize("was", [True, False])
def test_collection_is_as_it_was_before(was: bool) -> None:
    try:
        (gc.enable if was else gc.disable)()
        with uncollected():
            assert not gc.isenabled()
        assert gc.isenabled() is was
        with pytest.raises(ZeroDivisionError), uncollected():
            raise ZeroDivisionError
        assert gc.isenabled() is was
    finally:
        gc.enable()


def test_numbers_do_not_wait_beside_the_tensor() -> None:
    """They are integers of 8 bytes each, or floats."""
    left: list[Any] = []

    async def infer(x: Any, **options: Any) -> None:
        left.extend(request.inputs)
        raise InvalidRequestError(f"{x.dtype} {len(x)}")

    engine = SimpleNamespace(
        encoding="direct", class_names=["a"], input_dtype=np.dtype(np.uint8), input_shape=(1, 8, 8)
    )
    served: Any = SimpleNamespace(name="m", engine=engine, infer=infer)
    request = read_request(body(b"1," * 199_999 + b"1"), {}, SIZES)
    with pytest.raises(InvalidRequestError, match="uint8 200000"):
        asyncio.run(OpenInferenceModel(served).predict(request))
    assert not left
