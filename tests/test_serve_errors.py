"""What an error is to a client, as docs/serving.md has it."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("grpc", reason="needs the extra serve")
pytest.importorskip("starlette", reason="needs the extra serve")

from tetdeploy.serve.bodies import OverBudgetError, TooLargeError
from tetdeploy.serve.errors import status_of
from tetdeploy.serve.protocol import UnknownModelError, UnknownVersionError
from tetdeploy.serve.requests import InvalidRequestError
from tetdeploy.serve.scheduler import CallFailedError, QueueFullError, StoppingError
from tetdeploy.serve.sequences import LostSequenceError, TooManySequencesError, UnknownSequenceError

DOCUMENT = Path(__file__).parents[1] / "docs" / "serving.md"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (InvalidRequestError, "shape, type, T, NaN"),
        (UnknownModelError, "unknown model"),
        (UnknownVersionError, "a version of it other than 1"),
        (UnknownSequenceError, "a sequence that is not open"),
        (TooLargeError, "more than `--max-request-mb`"),
        (OverBudgetError, "more than `--max-total-mb`"),
        (QueueFullError, "full queue"),
        (TooManySequencesError, "`--max-sequences` are open"),
        (StoppingError, "shutting down"),
        (CallFailedError, "the engine failed"),
        (LostSequenceError, "an earlier step of the sequence failed"),
    ],
)
def test_an_error_has_the_codes_that_are_documented(kind: type[Exception], said: str) -> None:
    [row] = [line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line[:1] == "|" and said in line]
    http, rpc, message = status_of(kind("why"))
    assert row.endswith(f"| {http} | {rpc.name} |") and message == "why"
