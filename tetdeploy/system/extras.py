"""Optional dependencies: import one, or say which `pip install` line brings it."""

from __future__ import annotations

import importlib
from typing import Any


class MissingExtraError(ImportError):
    """A package of an optional extra is not installed."""


def import_extra(module: str, extra: str) -> Any:
    """Import `module`, which the extra `extra` brings, or whose own imports it brings if it is one of ours.

    Raises:
        MissingExtraError: it is not installed; the message has the line that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package, wanted = (error.name or "").partition(".")[0], module.partition(".")[0]
        if package in ("", "tetdeploy") or wanted not in (package, "tetdeploy"):
            raise
        raise MissingExtraError(
            f"this needs the package {package!r}, which is not installed: pip install 'tetdeploy[{extra}]'"
        ) from error
    except ImportError as error:  # as which pybind11 hands on a Ctrl-C that comes while a module of it starts
        if isinstance(error.__cause__, KeyboardInterrupt):
            raise error.__cause__ from None
        raise
