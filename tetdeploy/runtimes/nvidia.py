"""NVIDIA's libraries: which TensorRT is installed, and which GPU is there. Needs numpy only until it is asked.

Two packages have one API. `tensorrt` builds an engine for the GPU it builds on, any from Turing (7.5) on, those of data
centres included. `tensorrt-rtx` builds on any machine, without GPU or driver, for GeForce, RTX and workstation cards
from Ampere (8.0) on, and compiles the rest where the engine runs.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Any

from tetdeploy.arguments import check_choice
from tetdeploy.system.extras import MissingExtraError, import_extra

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_EXTRAS = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}
NVIDIA_INDEX = "--extra-index-url https://pypi.nvidia.com"
_INSTALL_TENSORRT = f"pip install 'tetdeploy[tensorrt]' {NVIDIA_INDEX}"
_TURING = "7.5"
BUILDING = "building with TensorRT (not with TensorRT-RTX)"


class NoGpuError(ValueError):
    """No NVIDIA driver or no GPU that it can use."""


def choose_package(asked: str = "auto") -> str:
    """The TensorRT package to take: the one asked for; for `auto` the one installed, and of both `tensorrt` where there
    is a GPU and `tensorrt-rtx` where there is none.

    Raises:
        ValueError: an unknown name.
        MissingExtraError: neither is installed.
    """
    check_choice("package", asked, ("auto", *MODULES))
    if asked != "auto":
        return asked
    installed = [package for package, module in MODULES.items() if find_spec(module) is not None]
    if not installed:
        raise MissingExtraError(
            "TensorRT is not installed: pip install 'tetdeploy[rtx]' for GeForce and RTX cards, built "
            f"on any machine, or {_INSTALL_TENSORRT} for any card, built on the card itself"
        )
    if len(installed) == 2:
        try:
            gpu_runtime(BUILDING)
        except NoGpuError:
            return "tensorrt-rtx"
    return installed[0]


def import_tensorrt(package: str) -> Any:
    """The module of a TensorRT package. For `tensorrt` call `gpu_runtime` before making any object of it: without a
    driver that ends the process.

    Raises:
        MissingExtraError: it is not installed, or its libraries are not.
        ValueError: its version is one that this project does not know.
    """
    try:
        module = import_extra(MODULES[package], _EXTRAS[package])
    except MissingExtraError as error:
        if package != "tensorrt":
            raise
        raise MissingExtraError(f"TensorRT is not installed: {_INSTALL_TENSORRT}") from error
    except ImportError as error:
        raise MissingExtraError(
            f"the package {package!r} is installed, but its libraries cannot be loaded ({error}); install it from "
            f"NVIDIA's index: pip install {package} {NVIDIA_INDEX}"
        ) from error
    if package == "tensorrt" and int(module.__version__.partition(".")[0]) < 11:
        raise ValueError(
            f"TensorRT {module.__version__} is too old; 11 or later is needed: pip install -U tensorrt {NVIDIA_INDEX}"
        )
    return module


def gpu_runtime(purpose: str) -> Any:
    """`cuda.bindings.runtime`, once a driver and a GPU are known to be there. `purpose` is what needs them.

    Raises:
        NoGpuError: they are not, and why.
        MissingExtraError: cuda-bindings is not installed.
    """
    cuda = import_extra("cuda.bindings.runtime", "rtx")
    if checked(cuda, cuda.cudaDriverGetVersion()) == 0:
        raise NoGpuError(f"{purpose} needs an NVIDIA GPU and its driver, and this machine has no NVIDIA driver")
    error, count = cuda.cudaGetDeviceCount()
    if int(error) or not count:
        reason = _reason(cuda, error) if int(error) else "the driver sees none"
        raise NoGpuError(f"{purpose} needs an NVIDIA GPU, and none can be used: {reason}")
    return cuda


def gpu_architecture(cuda: Any) -> str:
    """The compute capability of the first GPU, such as `8.9`."""
    names = cuda.cudaDeviceAttr
    major = checked(cuda, cuda.cudaDeviceGetAttribute(names.cudaDevAttrComputeCapabilityMajor, 0))
    minor = checked(cuda, cuda.cudaDeviceGetAttribute(names.cudaDevAttrComputeCapabilityMinor, 0))
    return f"{major}.{minor}"


def gpu_name() -> str | None:
    """What NVIDIA calls the first GPU; None where there is none, or no cuda-bindings to ask."""
    try:
        cuda = gpu_runtime("naming it")
        name: bytes = checked(cuda, cuda.cudaGetDeviceProperties(0)).name
    except (ImportError, ValueError):
        return None
    return name.decode()


def target_architectures(trt: Any, package: str, asked: tuple[str, ...] | None) -> list[str]:
    """The compute capabilities to build for.

    Raises:
        ValueError: the package cannot build for one of those asked for; the message says which package can.
        NoGpuError: TensorRT builds for the GPU at hand, and there is none.
    """
    if package == "tensorrt":
        present = gpu_architecture(gpu_runtime(BUILDING))
        if asked not in (None, (present,)):
            raise ValueError(
                f"TensorRT builds for the GPU at hand, here {present}, not for {', '.join(asked or ())}; build where "
                "that GPU is, or with --package tensorrt-rtx, which needs none to build"
            )
        return [present]
    if asked is None:
        return _rtx_architectures(trt)
    for name in asked:
        if reason := why_not_rtx(trt, name):
            raise ValueError(reason)
    return sorted(set(asked), key=_version)


def why_not_rtx(trt: Any, architecture: str) -> str | None:
    """Why TensorRT-RTX cannot build our graphs for a GPU architecture, and what can; None where it can."""
    known = _rtx_architectures(trt)
    if architecture in known:
        return None
    is_turing = architecture == _TURING
    reason = ", where it has no float32 matrix products, and a readout is one" if is_turing else ""
    why = f"TensorRT-RTX cannot build for GPU architecture {architecture!r}{reason}; it can for {', '.join(known)}."
    if re.fullmatch(r"\d+\.\d", architecture) is None or _version(architecture) < _version(_TURING):
        return why
    return (
        f"{why} The package tensorrt can, on a machine with that GPU: {_INSTALL_TENSORRT}, then tetdeploy build "
        "MODEL.onnx --package tensorrt"
    )


def _rtx_architectures(trt: Any) -> list[str]:
    names = [name.removeprefix("SM") for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    known = sorted((f"{name[:-1]}.{name[-1]}" for name in names), key=_version)
    return [name for name in known if name != _TURING]


def checked(cuda: Any, result: tuple[Any, ...]) -> Any:
    """The value of a CUDA call.

    Raises:
        ValueError: the call failed, with CUDA's own words.
    """
    error, *values = result
    if int(error):
        raise ValueError(f"CUDA failed: {_reason(cuda, error)}")
    return values[0] if values else None


def _reason(cuda: Any, error: Any) -> str:
    text: bytes = cuda.cudaGetErrorString(error)[1]
    return text.decode()


def _version(architecture: str) -> tuple[int, ...]:
    return tuple(map(int, architecture.split(".")))
