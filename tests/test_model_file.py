"""The file of an exported model: a graph whose outputs are not those of its metadata is refused."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tetdeploy.storage.model_file import check_outputs

METADATA: dict[str, Any] = {
    "class_names": ["a", "b"],
    "T": None,
    "states": [{"output": "u.lif.next", "shape": [3]}],
    "encoded": [{"output": "i.next", "shape": [4]}],
}
OUTPUTS = {"logits": ["n", 2], "per_step": ["n", "t", 2], "u.lif.next": ["n", 3], "i.next": ["n", 4]}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, None),
        ({"logits": ["n", 2, 1]}, "logits should be [N, 2], the graph gives [N, 2, 1];"),
        ({"per_step": ["n", "t", 3]}, "per_step should be [N, T, 2], the graph gives [N, t, 3];"),
        ({"u.lif.next": ["n"]}, "u.lif.next should be [N, 3], the graph gives [N];"),
        ({"i.next": ["n", 5]}, "i.next should be [N, 4], the graph gives [N, 5];"),
    ],
)
def test_outputs_are_those_that_the_metadata_say(changed: dict[str, Any], message: str | None) -> None:
    outputs = [SimpleNamespace(name=name, shape=shape) for name, shape in (OUTPUTS | changed).items()]
    if message is None:
        check_outputs(outputs, METADATA, Path("m.onnx"))
    else:
        with pytest.raises(ValueError, match=rf"^m\.onnx is not what its metadata say: {re.escape(message)}"):
            check_outputs(outputs, METADATA, Path("m.onnx"))
