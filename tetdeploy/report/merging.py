"""Several results of one exported model as one: a sweep's latencies, a validation's agreement with PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tetdeploy.report.reading import KINDS

AGREEMENT = (
    "top1_agreement",
    "spike_mismatch_rate",
    "local_mismatch_rate",
    "spike_count_error",
    "max_abs_logit_error",
    "margin",
)
_DEVICE = ("device", "runtime")  # what latencies and agreement belong to
_ENTRIES = ("layers", "neurons", "by_class")  # each with rows by T


def merged(contents: Mapping[Path, dict[str, Any]]) -> tuple[dict[str, Any], list[Path], list[str]]:
    """What was measured of one model.

    A result with accuracies leads, of two such one on images that were not trained on, then the one of the later kind
    in `KINDS`, but a sweep or a validation of the same model on more images comes first. It takes what it lacks, steps
    among it, from the others if they measured the same images, and the agreement with PyTorch whatever images that is
    of: an export's reference images have no part in the accuracy.

    Args:
        contents: of one result file or several, as `read_result` gives them.

    Returns:
        The content, the files it is of, and notes on those that were left out.
    """
    ordered = sorted(contents, key=lambda file: _rank(contents[file]), reverse=True)
    first = _of_most_images(ordered, contents)
    others = [file for file in ordered if file != first]
    content, used, notes = contents[first], [first], []
    for file in others:
        other = contents[file]
        differing = apart(content, other)
        if not differing:
            content = _filled(content, other)
        elif not {"model_sha256", *_DEVICE} & {*differing} and not agrees(content) and agrees(other):
            content = _with_agreement(content, other)
        else:
            notes.append(f"{file} is left out: it and {first.name} differ in {', '.join(differing)}.")
            continue
        used.append(file)
    return content, used, notes


def agrees(content: Mapping[str, Any]) -> bool:
    """Whether a result compares with PyTorch."""
    return any(row.get(key) is not None for row in content["rows"] for key in AGREEMENT)


def has_accuracy(content: Mapping[str, Any]) -> bool:
    """Whether the images had labels."""
    return any(row.get("accuracy") is not None for row in content["rows"])


def _rank(content: Mapping[str, Any]) -> tuple[bool, bool, int]:
    return has_accuracy(content), not content.get("trained_on"), KINDS.index(content["kind"])


def _of_most_images(ordered: Sequence[Path], contents: Mapping[Path, Mapping[str, Any]]) -> Path:
    """Of the first result and of those that measured the accuracy of its very model over all images, that of the most
    images, of as many the first."""
    first = contents[ordered[0]]
    model = first.get("model_sha256")
    alike = [
        file
        for file in ordered[1:]
        if model and contents[file].get("model_sha256") == model and contents[file]["data"] == first["data"]
        if has_accuracy(contents[file]) and contents[file]["kind"] != "early-exit"
    ]
    return max([ordered[0], *alike], key=lambda file: int(contents[file]["num_samples"]))


def apart(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """What tells two results apart: another model, other images or prices, or another device for the
    latencies of both or the agreement of the second. What only one of them says is no difference, and of the same
    images, by their hash, nor is the name, which is a path."""
    same = first.get("images_sha256") and first["images_sha256"] == second.get("images_sha256")
    keys = [*([] if same else ["data"]), "num_samples", "images_sha256", "model_sha256", "constants"]
    keys += _DEVICE if (_timed(first) and _timed(second)) or agrees(second) else ()
    return [key for key in keys if first.get(key) and second.get(key) and first[key] != second[key]]


def _timed(content: Mapping[str, Any]) -> bool:
    return any(row.get("latency_ms") is not None for row in content["rows"])


def _filled(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """`first`, and what it lacks from `second`: steps, layers, classes, and what a row of either lacks."""
    parts = {key: _by_name(first.get(key) or [], second.get(key) or []) for key in _ENTRIES}
    return _joined(first, second) | parts | {"rows": _by_T(first["rows"], second["rows"])}


def _by_name(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Entries with rows of their own, those of both as one."""
    others = {entry["name"]: entry for entry in second}
    joined = [
        _joined(entry, other) | {"rows": _by_T(entry["rows"], other.get("rows", []))}
        for entry in first
        for other in [others.pop(entry["name"], {})]
    ]
    return [*joined, *map(dict, others.values())]


def _by_T(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of both in the order of T; where both have one, what the first lacks is the second's."""
    rows = {row["T"]: dict(row) for row in second}
    for row in first:
        rows[row["T"]] = _joined(row, rows.get(row["T"], {}))
    return [rows[T] for T in sorted(rows)]


def _with_agreement(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """`first`, and the agreement of `second`, of its rows and of its layers of neurons."""
    rows = {row["T"]: _agreement(row) for row in second["rows"]}
    neurons = {entry["name"]: _agreement(entry) for entry in second.get("neurons") or []}
    parts = {"rows": [row | rows.get(row["T"], {}) for row in first["rows"]]}
    if first.get("neurons"):
        parts["neurons"] = [entry | neurons.get(entry["name"], {}) for entry in first["neurons"]]
    compared = {"num_images": second["num_samples"], "data": second["data"]} | (second.get("agreement") or {})
    gates = [*(first.get("gates") or ()), *(second.get("gates") or ())]
    return {**first, **parts, "agreement": compared, "gates": gates}


def _agreement(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: entry[key] for key in AGREEMENT if entry.get(key) is not None}


def _joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    return {**second, **{key: value for key, value in first.items() if value is not None or key not in second}}
