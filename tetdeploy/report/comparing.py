"""Whether results may stand side by side: on different data they may not; of what else sets them apart, notes say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path

from tetdeploy.names import is_npz
from tetdeploy.report.merging import has_accuracy
from tetdeploy.report.results import Measurement, Source


def check_comparable(sources: Sequence[Source]) -> None:
    """Refuse to show results of different data side by side.

    Raises:
        ValueError: they are.
    """
    labelled = [m for source in sources for m in source.measurements if has_accuracy(m.content)]
    _refuse_different("measured on", measured_on(labelled))
    if any(not source.measurements for source in sources):  # its validation images are all there is to compare by
        runs = {source.name: source.run.data for source in sources if source.run}
        trained = ((name, data.get("name", ""), data.get("fingerprint")) for name, data in runs.items())
        _refuse_different("trained on", _data_names(trained))


def cautions(sources: Sequence[Source]) -> Iterator[str]:
    """What sets results apart without making them incomparable."""
    measured = [m for source in sources for m in source.measurements]
    apart = [(a, b) for a, b in combinations(measured, 2) if not a.same_images(b)]
    if apart:
        hashes = [m.content.get("images_sha256") for m in measured]
        alike = any(a.images == b.images for a, b in apart)  # in number and name, so that only hashes tell them apart
        listed = ", ".join(
            f"{m.name}: {m.images}" + (f" with the SHA-256 {sha256[:12]}" if alike and sha256 else "")
            for m, sha256 in zip(measured, hashes, strict=True)
        )
        yield f"The models were measured on different images ({listed}): compare them with care."
    own = [m for m in measured if m.content.get("trained_on") and has_accuracy(m.content)]
    if own:
        listed = ", ".join(f"{m.name}: {m.images}" for m in own)
        yield (
            f"Measured on the file that was trained on, which has no test part ({listed}): accuracy on new images may "
            "be lower; tetdeploy sweep takes others with --data TEST.npz."
        )
    ran_on = {m.ran_on for m in measured}
    if len(ran_on) > 1:
        listed = ", ".join(sorted(ran_on))
        yield f"The models did not all run on the same device and runtime ({listed}): latencies do not compare."


def _refuse_different(what: str, data: Mapping[str, str]) -> None:
    if len(set(data.values())) > 1:
        listed = ", ".join(f"{name} on {where or 'unknown data'}" for name, where in data.items())
        raise ValueError(
            f"these results cannot be compared, they were {what} different data: {listed}; make a report for each"
        )


def measured_on(measurements: Iterable[Measurement]) -> dict[str, str]:
    """The data of each, by its name."""
    return _data_names((m.name, m.content["data"], m.content.get("images_sha256")) for m in measurements)


def _data_names(named: Iterable[tuple[str, str, str | None]]) -> dict[str, str]:
    """The data of each, by names, data and hashes; of the same images by another path, as hashes tell, the first's."""
    first: dict[str, str] = {}
    return {name: first.setdefault(sha256 or data_name(data), data_name(data)) for name, data, sha256 in named}


def data_name(data: str) -> str:
    """Files of data may lie elsewhere on another machine: only their own name counts."""
    return Path(data).name if is_npz(data) else data
