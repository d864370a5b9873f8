"""Whether a result is of the files it lies beside: runs go on, exports take the place of others, files are copied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from tetdeploy.report.merging import has_accuracy
from tetdeploy.report.reading import json_object
from tetdeploy.storage.files import sha256_of
from tetdeploy.storage.run_folder import CHECKPOINT_NAME, other_checkpoint
from tetdeploy.wording import quoted


def stale(content: Mapping[str, Any], files: Sequence[Path]) -> str | None:
    """The note on a result that is of another model or checkpoint than lies beside its files; None if it is not, or
    does not say what it is of."""
    folder, named = files[0].parent, _listed(files)
    model = folder / PureWindowsPath(content["model"]).name  # which knows both separators: results move
    measured = content.get("model_sha256")
    if measured and model.is_file() and (found := sha256_of(model)) != measured:
        return f"{named} of another model ({measured[:12]}) than {model} is now ({found[:12]}); {_again(files, model)}"
    own = content.get("checkpoint_sha256")
    if own and (other := other_checkpoint(folder, own)):
        return (
            f"{named} of another checkpoint ({own[:12]}) than that of {folder} ({other[:12]}); "
            f"export {model} once more, with the options that it had, then {_again(files, model)}"
        )
    return None


def _listed(files: Sequence[Path]) -> str:
    """`a.json is`, `a.json and b.json are`."""
    *others, last = map(str, files)
    return f"{', '.join(others)} and {last} are" if others else f"{last} is"


def _again(files: Sequence[Path], model: Path) -> str:
    return f"measure again: {', then '.join(command for file in files for command in _commands(file, model))}"


def _commands(file: Path, model: Path) -> list[str]:
    """What measures as a result says that it was measured; an early exit by a threshold of this model."""
    content = json_object(file)
    usual = {"device": "cpu", "runtime": "onnxruntime"}.items()
    on = [word for key, own in usual if content.get(key) not in (None, own) for word in (f"--{key}", content[key])]
    data = ["--data", content["data"]] if has_accuracy(content) and content["data"] else []
    beside = (content.get("agreement") or {}).get("with") == "checkpoint" and (model.parent / CHECKPOINT_NAME).is_file()
    against = ["--against", str(model.parent)] if beside else []
    kind = content.get("kind", "sweep")
    commands = [["tetdeploy", kind, str(model), *data, *against, *on]]
    if kind == "early-exit":
        commands.insert(0, ["tetdeploy", "calibrate", str(model), *on])
    return [quoted(*words) for words in commands]
