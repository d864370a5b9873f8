"""Which TensorRT and which GPU there is, on a stand-in for CUDA."""

from __future__ import annotations

import importlib
import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
from gpu_stand_in import Cuda, TensorRT

from tetdeploy.runtimes import nvidia
from tetdeploy.runtimes.nvidia import (
    NoGpuError,
    choose_package,
    gpu_architecture,
    gpu_name,
    gpu_runtime,
    import_tensorrt,
    target_architectures,
)
from tetdeploy.system.extras import MissingExtraError

INSTALL = r"pip install 'tetdeploy\[tensorrt\]' --extra-index-url https://pypi\.nvidia\.com"


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make packages be there, as modules, or not, as None or as the error of their import."""

    def put(**modules: Any) -> None:
        def find(name: str) -> Any:
            return modules.get(name)

        def load(name: str, extra: str) -> Any:
            module = modules.get(name.partition(".")[0])
            if isinstance(module, Exception):
                raise module
            if module is None:
                raise MissingExtraError(f"no {name}: pip install 'tetdeploy[{extra}]'")
            return module

        monkeypatch.setattr(nvidia, "find_spec", find)
        monkeypatch.setattr(nvidia, "import_extra", load)

    return put


def test_auto_takes_what_is_installed(install: Any) -> None:
    install(tensorrt=object(), cuda=Cuda())
    assert choose_package() == "tensorrt"
    install(tensorrt_rtx=object())
    assert choose_package() == "tensorrt-rtx"
    install(tensorrt=object(), tensorrt_rtx=object(), cuda=Cuda())
    assert choose_package() == "tensorrt"
    install(tensorrt=object(), tensorrt_rtx=object(), cuda=Cuda(driver=0))
    assert choose_package() == "tensorrt-rtx"


def test_a_package_asked_for_is_taken_or_refused(install: Any) -> None:
    install(tensorrt=object())
    assert choose_package("tensorrt-rtx") == "tensorrt-rtx"
    with pytest.raises(MissingExtraError, match=r"pip install 'tetdeploy\[rtx\]'"):
        import_tensorrt("tensorrt-rtx")
    install(tensorrt_rtx=object())
    with pytest.raises(MissingExtraError, match=rf"TensorRT is not installed: {INSTALL}$"):
        import_tensorrt("tensorrt")
    with pytest.raises(ValueError, match="unknown package 'trt'; choose one of auto, tensorrt, tensorrt-rtx"):
        choose_package("trt")


def test_without_either_both_lines_are_told(install: Any) -> None:
    install()
    with pytest.raises(MissingExtraError, match=rf"\[rtx\]' for GeForce .* {INSTALL} for any card"):
        choose_package()


def test_libraries_that_pypi_does_not_hold(install: Any) -> None:
    install(tensorrt=ImportError("libnvinfer.so.11: cannot open shared object file"))
    with pytest.raises(MissingExtraError, match=r"libnvinfer\.so\.11.*--extra-index-url https://pypi\.nvidia\.com"):
        import_tensorrt("tensorrt")


def test_an_old_tensorrt_is_refused(install: Any) -> None:
    install(tensorrt=SimpleNamespace(__version__="10.13.3"))
    with pytest.raises(ValueError, match=r"TensorRT 10\.13\.3 is too old; 11 or later .*-U tensorrt --extra-index-url"):
        import_tensorrt("tensorrt")
    install(tensorrt=SimpleNamespace(__version__="11.4.0"), tensorrt_rtx=SimpleNamespace(__version__="1.7.1"))
    assert import_tensorrt("tensorrt").__version__ == "11.4.0"
    assert import_tensorrt("tensorrt-rtx").__version__ == "1.7.1"


def test_a_gpu_is_found(install: Any) -> None:
    cuda = Cuda()
    install(cuda=cuda)
    assert gpu_runtime("this") is cuda
    assert gpu_architecture(cuda) == "8.6" and gpu_name() == "NVIDIA Stand-in 8.6"


def test_architectures_are_the_one_at_hand_or_those_asked_for_in_order(install: Any) -> None:
    trt = TensorRT(Cuda())
    assert target_architectures(trt, "tensorrt-rtx", ("12.0", "8.6", "8.6")) == ["8.6", "12.0"]
    with pytest.raises(ValueError, match=r"architecture 'sm_90'; it can for 8\.0, .*, 12\.1\.$"):
        target_architectures(trt, "tensorrt-rtx", ("sm_90",))
    install(cuda=Cuda())
    assert target_architectures(trt, "tensorrt", ("8.6",)) == target_architectures(trt, "tensorrt", None) == ["8.6"]


@pytest.mark.parametrize(
    ("cuda", "message"),
    [
        (Cuda(driver=0), "^this needs an NVIDIA GPU and its driver, and this machine has no NVIDIA driver$"),
        (Cuda(error=35), "^this needs an NVIDIA GPU, and none can be used: error 35$"),
        (Cuda(count=0), "^this needs an NVIDIA GPU, and none can be used: the driver sees none$"),
    ],
    ids=["no driver", "an old driver", "no GPU"],
)
def test_no_gpu_says_why(cuda: Cuda, message: str, install: Any) -> None:
    install(cuda=cuda)
    with pytest.raises(NoGpuError, match=message):
        gpu_runtime("this")
    assert gpu_name() is None


def test_without_bindings_a_gpu_has_no_name(install: Any) -> None:
    install()
    assert gpu_name() is None
    install(cuda=ImportError("libcuda.so.1: cannot open shared object file"))
    assert gpu_name() is None


def test_the_real_bindings_say_that_there_is_no_driver() -> None:
    cuda = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed (extra rtx)")
    if cuda.cudaDriverGetVersion()[1]:
        pytest.skip("this machine has an NVIDIA driver")
    with pytest.raises(NoGpuError, match=r"^this needs .* has no NVIDIA driver$"):
        gpu_runtime("this")


def test_the_real_bindings_take_what_the_runner_gives_them() -> None:
    """Without a driver every call fails, but not before its arguments were taken."""
    cuda = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed (extra rtx)")
    driver = importlib.import_module("cuda.bindings.driver")
    if cuda.cudaDriverGetVersion()[1]:
        pytest.skip("this machine has an NVIDIA driver")
    stream, pool = cuda.cudaStream_t(), cuda.cudaMemPool_t()
    threshold = cuda.cudaMemPoolAttr.cudaMemPoolAttrReleaseThreshold
    calls = [
        cuda.cudaStreamCreate(),
        cuda.cudaStreamDestroy(stream),
        cuda.cudaStreamSynchronize(stream),
        cuda.cudaSetDevice(0),
        cuda.cudaGetDeviceProperties(0),
        cuda.cudaDeviceGetDefaultMemPool(0),
        cuda.cudaMemPoolSetAttribute(pool, threshold, driver.cuuint64_t(2**64 - 1)),
        cuda.cudaMallocAsync(16, stream),
        cuda.cudaMemcpyAsync(4096, 8192, 16, cuda.cudaMemcpyKind.cudaMemcpyHostToDevice, stream),
        cuda.cudaMemcpyAsync(4096, 8192, 16, cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost, stream),
        cuda.cudaMemsetAsync(4096, 0, 16, stream),
        cuda.cudaFreeAsync(4096, stream),
        cuda.cudaDeviceGetAttribute(cuda.cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor, 0),
        cuda.cudaDeviceGetAttribute(cuda.cudaDeviceAttr.cudaDevAttrComputeCapabilityMinor, 0),
    ]
    assert {result[0] for result in calls} == {cuda.cudaError_t.cudaErrorInsufficientDriver}
    assert int(stream) == 0
    assert b"driver" in cuda.cudaGetErrorString(calls[0][0])[1]
