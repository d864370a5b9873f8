"""What every test shares: the same random numbers in each run, whatever ran before."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from onnxscript.values import TracedOnnxFunction

# torch.onnx asks for it of 500 functions at every export, and each answer parses a function's source: a fourth of the
# export of a small network.
TracedOnnxFunction.function_ir = property(cache(TracedOnnxFunction.function_ir.fget))


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)
