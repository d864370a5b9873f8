"""Where the tests of the Triton kernels run: on a GPU, or in Triton's interpreter, in a process of its own.

The interpreter must be chosen before Triton is imported, and torch may import it at any time: a test file runs itself
once more with TRITON_INTERPRET=1, where the same comparisons take CPU tensors through the same launches.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tetdeploy import kernels, neurons

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    """The device whose tensors go through the kernels."""
    return gpu_device(monkeypatch)


def gpu_device(monkeypatch: pytest.MonkeyPatch) -> str:
    """A GPU, or the CPU for the interpreter; skips where neither is."""
    if INTERPRETED:
        monkeypatch.setattr(kernels, "by_triton", interpreted_kernels)
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here; Triton's interpreter runs the same comparisons")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions of PyTorch warn of these names once; the new ones came with 2.9
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # 10 bits of a product would be compared
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    return "cuda"


def interpreted_kernels(current: Tensor) -> Any:
    """In place of `kernels.by_triton`: the kernels for CPU tensors as well."""
    return kernels.triton_kernels() if neurons.membrane_dtype(current.dtype) == torch.float32 else None


@contextmanager
def kernel_calls() -> Iterator[list[tuple[str, tuple[Any, ...]]]]:
    """Names and arguments of the kernels that run within it."""
    compiled, calls = kernels.triton_kernels(), []

    def recorded(name: str) -> Any:
        function = getattr(compiled, name)

        def call(*arguments: Any) -> None:
            calls.append((name, arguments))
            function(*arguments)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("forward", "backward"):
            patch.setattr(compiled, name, recorded(name))
        yield calls


def run_interpreted(file: str) -> None:
    """Run a file's GPU tests in the interpreter, but for the slow ones; all must pass there, none may be skipped."""
    pytest.importorskip("triton", reason="Triton is not installed")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu and not slow", file]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d+ passed(, \d+ deselected)? in", done.stdout, re.MULTILINE), done.stdout


def run_compiled(code: str) -> list[str]:
    """Lines that a script prints which compiles kernels, in a process of its own, by `ptx_for_h100`."""
    pytest.importorskip("triton", reason="Triton is not installed")
    command, here = [sys.executable, "-c", code], Path(__file__).parent
    with tempfile.TemporaryDirectory() as cache:  # Triton's own is in the home folder; used again it saves 9 s
        own = {} if os.access(Path.home(), os.W_OK) else {"TRITON_CACHE_DIR": cache}
        environment = own | dict(os.environ)
        done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def ptx_for_h100(kernel: Any, dtype: str, types: Mapping[str, str], constants: Mapping[str, Any]) -> str:
    """What Triton makes of a kernel without a GPU, checked: no multiply-add is fused, and all is kept in registers.

    Arguments that neither `types` nor `constants` name are pointers to `dtype`. PTX has any number of registers; what
    ptxas, which assembles it, spills has its place on the stack, where these kernels put nothing else.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tetdeploy.kernels.triton_lif import NOT_FUSED

    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = {**types, **dict.fromkeys(constants, "constexpr")}
    signature = {name: types.get(name, f"*{dtype}") for name in kernel.arg_names}
    even = {(k,): [["tt.divisibility", 16]] for k, kind in enumerate(signature.values()) if kind[0] in "*i"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=even)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=NOT_FUSED)
    ptx = str(compiled.asm["ptx"])
    case = f"{kernel.__name__} of {dtype} with {constants}"
    assert "fma." not in ptx, f"{case}: a multiply-add was fused"
    assert stack_bytes(compiled.asm["cubin"]) == 0, f"{case}: registers do not suffice"
    return ptx


def launch_nothing() -> list[tuple[str, tuple[int, ...]]]:
    """From here on this process has an H100, as far as Triton knows, whose kernels are compiled from the arguments that
    they are launched with, and are not launched. Gives the list of their names and grids, which grows."""
    import triton
    from triton.backends.compiler import GPUTarget

    launched: list[tuple[str, tuple[int, ...]]] = []

    class Launcher:
        def __init__(self, source: Any, metadata: Any) -> None:
            self.name = source.fn.__name__

        def __call__(self, *arguments: Any) -> None:
            launched.append((self.name, arguments[:3]))

    class Driver:
        launcher_cls = Launcher
        utils = SimpleNamespace(
            load_binary=lambda *_: (1, 1, 32, 0, 1024),  # module, function, registers, spills, most threads
            get_device_properties=lambda device: {"max_shared_mem": 232_448},
            unload_module=lambda module: None,
        )

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

    triton.runtime.driver.set_active(Driver())
    return launched


def stack_bytes(cubin: bytes) -> int:
    """Of a thread of an assembled kernel, by the cuobjdump that comes with Triton."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (found,) = re.findall(r"REG:\d+ STACK:(\d+)", said)
    return int(found)
