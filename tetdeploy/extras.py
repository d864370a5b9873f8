"""Optional dependencies: import one, or say which `pip install` line brings it."""

from __future__ import annotations

import importlib
from typing import Any


class MissingExtraError(ImportError):
    """A package of an optional extra is not installed."""


def import_extra(module: str, extra: str) -> Any:
    """Import `module`, which the extra `extra` brings.

    Raises:
        MissingExtraError: it is not installed; the message has the line that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        package = error.name.partition(".")[0]
        raise MissingExtraError(
            f"this needs the package {package!r}, which is not installed: pip install 'tetdeploy[{extra}]'"
        ) from error
