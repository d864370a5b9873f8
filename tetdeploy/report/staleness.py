"""Whether a result is of the files it lies beside: runs go on, exports take the place of others, files are copied."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tetdeploy.files import sha256_of
from tetdeploy.report.merging import has_accuracy
from tetdeploy.run_folder import other_checkpoint


def stale(content: Mapping[str, Any], files: Sequence[Path]) -> str | None:
    """The note on a result that is of another model or checkpoint than lies beside its files; None if it is not, or
    does not say what it is of."""
    folder, named = files[0].parent, ", ".join(map(str, files))
    model = folder / Path(content["model"]).name
    again = f"measure again: {_command(content, model)}"
    measured = content.get("model_sha256")
    if measured and model.is_file() and (found := sha256_of(model)) != measured:
        return f"{named} is of another model ({measured[:12]}) than {model} is now ({found[:12]}); {again}"
    own = content.get("checkpoint_sha256")
    if own and (other := other_checkpoint(folder, own)):
        return (
            f"{named} is of another checkpoint ({own[:12]}) than that of {folder} ({other[:12]}); "
            f"tetdeploy export {shlex.quote(str(folder))}, then {again}"
        )
    return None


def _command(content: Mapping[str, Any], model: Path) -> str:
    data = ["--data", content["data"]] if has_accuracy(content) and content["data"] else []
    return shlex.join(["tetdeploy", content["kind"], str(model), *data])
