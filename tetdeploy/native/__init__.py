"""Element-wise arithmetic of a graph in few passes over memory and convolutions of spikes, for ONNX Runtime on a CPU.

ONNX Runtime runs one operator after the other, and between two of them a tensor goes through memory. What stands
between two convolutions of a spiking network (scales of the currents, residual sums, leak, threshold and reset of
every step) is one operator here, in C, with the same bits, and others are its convolutions of spikes where the
processor has AVX2 or AMX, in int8 where it has AMX, AMD's AVX-512, or AVX2 without VNNI. Model files do not know of
them: they are put in when a model is loaded, into the graph that ONNX Runtime has optimised for the machine.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

DOMAIN = "ai.tetdeploy"
TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)  # where the channels go


def library() -> Path | None:
    """The compiled operators; None where they could not be compiled at installation."""
    found = importlib.util.find_spec("tetdeploy.native._library")
    return Path(found.origin) if found is not None and found.origin else None


def missing() -> str | None:
    """Why there is no native operator here, and what to do; None if there is.

    Raises:
        ValueError: TETDEPLOY_NATIVE is neither 0 nor 1.
    """
    switch = os.environ.get("TETDEPLOY_NATIVE") or "1"
    if switch not in ("0", "1"):
        raise ValueError(
            f"TETDEPLOY_NATIVE is {switch!r}; it must be 0, which switches the native operator off, or 1, as when unset"
        )
    if switch == "0":
        return "the native operator is switched off by TETDEPLOY_NATIVE=0"
    if library() is None:
        if sys.platform == "win32":
            return "the native operator does not compile on Windows"
        return "the native operator was not compiled: with a C compiler (GCC or Clang) at hand, install tetdeploy again"
    if importlib.util.find_spec("onnx") is None:
        return "the native operator needs the package onnx: pip install onnx"
    return None


def last_name(name: str) -> str:
    """What a tensor is called whose channels were the second axis, and are the last; no layer's has a colon."""
    return f"{name}:last"


def has_tiles() -> bool:
    """Whether the processor and the system let this process multiply int8 in tiles (AMX)."""
    return bool(_ask("has_tiles"))


def vector_bytes() -> int:
    """How long the vector registers are that additions of spikes may use: 64 with AVX-512, 32 with AVX2, or 16."""
    return _ask("vector_bytes")


def has_vnni() -> bool:
    """Whether the processor has instructions that multiply int8 in vector registers."""
    return bool(_ask("has_vnni"))


def has_lookups() -> bool:
    """Whether lookups of sums of spikes can be used: the processor has AVX-512 with VNNI."""
    return bool(_ask("has_lookups"))


def has_fast_lookups() -> bool:
    """Whether they are faster than multiplications: processors of AMD permute registers in as little time."""
    return bool(_ask("has_fast_lookups"))


def _ask(what: str) -> int:
    path = library()
    if path is None:
        return 0
    try:
        return int(ctypes.CDLL(str(path))[what]())
    except AttributeError as error:
        raise RuntimeError(f"{path} was compiled from another version: install tetdeploy again") from error


def use(ort: Any, options: Any) -> None:
    """Let a session with `options` open what `fusing.fuse_model` made."""
    options.register_custom_ops_library(str(library()))
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # all is done
