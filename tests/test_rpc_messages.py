"""Messages of gRPC: what they would take is known before they are parsed."""

from __future__ import annotations

import time
from unittest.mock import Mock

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

pytest.importorskip("tritonclient", reason="needs the extra serve")
pytest.importorskip("starlette", reason="needs the extra serve")
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2 as pb

from tetdeploy.serve.bodies import Sizes, TooLargeError
from tetdeploy.serve.requests import InvalidRequestError
from tetdeploy.serve.rpc_messages import MAX_FIELDS, parse, read_request

SIZES = Sizes(100_000_000, 1_000, 100_000_000)


def request(raw: bytes = bytes(300)) -> pb.ModelInferRequest:
    made = pb.ModelInferRequest(model_name="m", id="1", raw_input_contents=[raw])
    made.inputs.add(name="x", datatype="UINT8", shape=[1, 1, 8, 8])
    made.parameters["T"].int64_param = 4
    return made


@pytest.mark.parametrize("size", [0, 1, 127, 128, 70_000])
def test_all_but_raw_bytes_is_bounded(size: int) -> None:
    made = request(bytes(size))
    listed = made.ByteSize() - size
    assert parse(made.SerializeToString(), Sizes(10**6, listed, 10**6)) == made
    with pytest.raises(TooLargeError, match=f"at most {listed - 1} bytes of numbers one by one .* got {listed}:"):
        parse(made.SerializeToString(), Sizes(10**6, listed - 1, 10**6))


def test_a_message_has_no_more_fields_than_there_may_be() -> None:
    made = pb.ModelInferRequest()
    for _ in range(MAX_FIELDS):
        made.outputs.add()
    assert parse(made.SerializeToString(), SIZES) == made
    made.outputs.add()
    with pytest.raises(InvalidRequestError, match="may have 96 fields"):
        parse(made.SerializeToString(), SIZES)


def test_numbers_in_the_place_of_another_datatype_are_named() -> None:
    made = pb.ModelInferRequest()
    made.inputs.add(name="x", datatype="UINT8", shape=[2]).contents.int_contents.extend([1, 2])
    with pytest.raises(InvalidRequestError, match=r"^x has int_contents; put values of UINT8 into uint_contents$"):
        read_request(made)


@pytest.mark.parametrize(("text", "read"), [("0.9", 0.9), ("1", 1.0), ("often", "often")])
def test_a_threshold_may_come_as_text(text: str, read: float | str) -> None:
    made = request()
    made.parameters["early_exit"].string_param = text
    assert read_request(made).parameters == {"T": 4, "early_exit": read}


def test_the_calibrated_rule_is_asked_for_by_a_flag() -> None:
    made = request()
    made.parameters["early_exit"].bool_param = True
    assert read_request(made).parameters["early_exit"] is True


def test_many_fields_take_no_time() -> None:
    sent = b"\x2a\x00" * 31_000_000  # empty inputs; parsed they take 3 GB, and 8 s
    began = time.process_time()
    with pytest.raises(InvalidRequestError, match="may have 96 fields"):
        parse(sent, SIZES)
    assert time.process_time() - began < 0.5


def test_raw_bytes_that_are_not_there_allow_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which each would be parsed before the end is seen."""
    made = pb.ModelInferRequest()
    made.inputs.add().contents.uint_contents.extend([300] * 1000)
    parsed = Mock()
    monkeypatch.setattr("tetdeploy.serve.rpc_messages.pb", Mock(ModelInferRequest=Mock(FromString=parsed)))
    with pytest.raises(InvalidRequestError, match="cut off"):
        parse(made.SerializeToString() + b"\x3a\xff\xff\xff\x7f", SIZES)
    parsed.assert_not_called()


def test_an_input_in_shared_memory_is_refused_by_name() -> None:
    sent = pb.ModelInferRequest(model_name="m")
    x = sent.inputs.add(name="x", datatype="UINT8", shape=[1, 1, 8, 8])
    x.parameters["shared_memory_region"].string_param = "r"
    x.parameters["shared_memory_byte_size"].int64_param = 64
    with pytest.raises(InvalidRequestError, match="'shared_memory_region' of the input x; there is no shared memory"):
        read_request(sent)


def test_an_input_has_no_parameters_but_its_size() -> None:
    made = request()
    made.inputs[0].parameters["binary_data_size"].int64_param = 300  # KServe's client sends it over gRPC too
    assert read_request(made).inputs[0].data == bytes(300)
    made.inputs[0].parameters["T"].int64_param = 1
    with pytest.raises(InvalidRequestError, match="unknown parameter 'T' of the input x; there is binary_data_size"):
        read_request(made)


@given(st.one_of(st.binary(max_size=40), st.integers(0, 400).map(lambda k: request().SerializeToString()[:k])))
@example(
    b"\x08\x01\x11" + b"\xff" * 8 + b"\x1d" + b"\xff" * 4
)  # fields of every size, of other types than they should be
@example(b"\xa3\x06\xa4\x06")  # a group
@example(b"\x3a\xff\x7f")  # raw bytes that are more than the message
@example(b"\x3a" + b"\xff" * 10 + b"\x7f")
def test_what_is_parsed_is_what_protobuf_takes(sent: bytes) -> None:
    try:
        expected = pb.ModelInferRequest.FromString(sent)
    except DecodeError:
        expected = None
    try:
        got = parse(sent, SIZES)
    except InvalidRequestError:
        groups = {byte & 7 for byte in sent} & {3, 4}
        assert expected is None or groups
    else:
        assert got == expected
