"""What every test shares: random numbers and threads do not depend on what ran before, nor on the machine's proxy."""

from __future__ import annotations

import gc
import os
import typing
from collections.abc import Iterator
from functools import cache

import pytest
import torch
import torch._export.utils
from hypothesis import settings
from onnxscript.values import TracedOnnxFunction
from torch.fx.traceback import NodeSource
from torch.onnx._internal.exporter import _schemas

import tetdeploy  # noqa: F401  before a test imports ONNX Runtime, which then sends nothing

pytest_plugins = ["ci_skips"]

# torch.onnx asks for it of 500 functions at every export, and each answer parses a function's source: a fourth of the
# export of a small network.
TracedOnnxFunction.function_ir = property(cache(TracedOnnxFunction.function_ir.fget))
_schemas.op_signature_from_function = cache(_schemas.op_signature_from_function)  # a sixth, of 500 functions again
torch._export.utils._materialize_cpp_cia_ops = cache(torch._export.utils._materialize_cpp_cia_ops)  # 30 times each
torch._ops.Callable = typing.Callable  # each export writes Callable[_P, _T] 20,000 times, and typing keeps what that is
NodeSource.__deepcopy__ = lambda self, memo: self  # where a node comes from, copied at each pass, and changed by none

gc.set_threshold(20_000, 20, 20)  # a twelfth of the suite, most of it over what PyTorch and onnxscript keep for good

os.fsync = lambda number: None  # no test's file outlives a power cut; 1,700 took test_restart 7 s on a disk in use

settings.register_profile("the same examples each time", derandomize=True, deadline=None, database=None)
settings.load_profile("the same examples each time")

for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
    os.environ.pop(name, None)  # what commands print is not to depend on where the tests run
os.environ["no_proxy"] = "127.0.0.1,localhost,::1"  # servers of the tests are asked directly


@pytest.fixture(autouse=True)
def _as_if_alone() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:  # two on a core that another process uses take a hundred times as long
        torch.set_num_threads(threads)


@pytest.fixture
def collects_its_own() -> Iterator[None]:
    """A garbage collection within the test goes through what the test itself has made: through all that the suite keeps
    by then it takes a second and more."""
    gc.freeze()
    yield
    gc.unfreeze()
