"""The compiled kernels leave torch's number of threads as it was."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import torch
from tetdeploy.neurons import lif
lif(torch.ones(2, 3))
print(torch.get_num_threads())
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core has no second thread to start")
def test_the_first_call_does_not_raise_torchs_number_of_threads() -> None:
    pytest.importorskip("numba")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "1"
