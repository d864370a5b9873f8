"""Triton's client, where it is installed with what it needs."""

from __future__ import annotations

import importlib
from typing import Any

import pytest


def triton_client(protocol: str) -> Any:
    """`tritonclient.http` or `.grpc`; a test module without it is skipped. Where the package lacks what that needs it
    raises a RuntimeError, which `pytest.importorskip` lets through."""
    try:
        return importlib.import_module(f"tritonclient.{protocol}")
    except (ImportError, RuntimeError):
        pytest.skip(f"needs tritonclient[{protocol}]", allow_module_level=True)
