"""What a file says of where it comes from: versions, time, and the run behind a model. Needs no torch."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from tetdeploy import __version__
from tetdeploy.storage.form import FRACTION, NUMBER, STEP

PARENT = {"path!": str, "checkpoint_sha256!": str}  # what `--init` leaves in a run's files, see `storage.form`
_SETTINGS = ("width", "tau", "v_th", "gamma", "smooth_spike")
# What a checkpoint says of itself, and an exported model of its checkpoint, as far as it is read.
ORIGIN: dict[str, Any] = {
    "network": {"model": str, "ann": bool, **dict.fromkeys(_SETTINGS, NUMBER)},
    "data": {"name": str, "mean": [NUMBER], "std": [NUMBER], "class_names": [object], "image_shape": [STEP]},
    "training": {"T": STEP, "lam": NUMBER, "val_fraction": FRACTION},
    "provenance": {"init": PARENT, "code_sha256": str, "val_accuracy": NUMBER},
    "checkpoint_sha256": str,
}


def written(**packages: str) -> dict[str, Any]:
    """Who writes a file, and when, as JSON: `versions` of tetdeploy, Python and `packages`, and `created`, in UTC.

    Raises:
        ValueError: the environment variable SOURCE_DATE_EPOCH, which stands for the time, is no such number.
    """
    return {
        "versions": {"tetdeploy": version(), "python": platform.python_version(), **packages},
        "created": _now().isoformat(timespec="seconds"),
    }


def _now() -> datetime:
    """The time, or the one of builds whose every byte is to come out the same (reproducible-builds.org)."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if epoch is None:
        return datetime.now(UTC)
    try:
        return datetime.fromtimestamp(int(epoch), UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise ValueError(f"SOURCE_DATE_EPOCH must be seconds since 1970, got {epoch!r}") from error


@cache
def version() -> str:
    """tetdeploy's, and where it runs from a Git checkout the commit, as in 0.1.0+g1f3c2a9b4d5e; .dirty with changes,
    and 0.1.0+unknown where Git does not say."""
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():
        return __version__
    command = ["git", "-C", str(checkout), "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # a hook's, say
    environment |= {"GIT_OPTIONAL_LOCKS": "0"}  # that it writes nothing there
    try:
        said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=3).stdout
    except (OSError, subprocess.SubprocessError):  # no Git, or a checkout that it does not trust
        return f"{__version__}+unknown"
    branch, *lines = said.splitlines()  # the first is "# branch.oid" and the commit
    changed = any(not line.startswith("#") for line in lines)
    return f"{__version__}+g{branch.split()[-1][:12]}{'.dirty' if changed else ''}"


def own_fraction(origin: Mapping[str, Any]) -> float:
    """The share of its training's images that was held out; 0 where a checkpoint, or a model of its checkpoint
    (`metadata["source"]`), does not say."""
    return float((origin.get("training") or {}).get("val_fraction") or 0.0)
