"""Accuracy of each class."""

from __future__ import annotations

from collections import Counter
from statistics import median

from tetdeploy.report.document import NONE, Block, Note, Row, Section, Table
from tetdeploy.report.entry_plot import plot_by_entry
from tetdeploy.report.numbers import percent
from tetdeploy.report.results import Measurement, Results, means_caption

_FEW = 24  # as many classes are drawn and listed whole; of more, the best and the worst are
_ENDS = 8


def accuracy_by_class(results: Results) -> Section | None:
    """At the headline's T."""
    measured = [m for m in results.series if m.by_entry("by_class", "accuracy")]
    if not measured:
        return None
    if max(len(m.content["by_class"]) for m in measured) > _FEW:
        return Section("Accuracy by class", tuple(block for m in measured for block in _compact(m)))
    caption = "Accuracy of each class"
    plot = plot_by_entry(results, measured, "by_class", "accuracy", label="accuracy (%)", size=0.01, caption=caption)
    return Section("Accuracy by class", (Row((plot, _table(measured))),))


def _table(measured: list[Measurement]) -> Table:
    values = [m.by_entry("by_class", "accuracy") for m in measured]
    images = {f"images, {m.name}": {c["name"]: c["num_samples"] for c in m.content["by_class"]} for m in measured}
    any_of = {name: count for counts in images.values() for name, count in counts.items()}
    if all(counts.items() <= any_of.items() for counts in images.values()):
        images = {"images": any_of}
    rows = tuple(
        (
            name,
            *(f"{counts[name]:,}" if name in counts else NONE for counts in images.values()),
            *(percent(v.get(name)) for v in values),
        )
        for name in any_of
    )
    headers = ("class", *images, *(f"{m.name}, T={m.T}" for m in measured))
    return Table(f"Accuracy of each class.{means_caption(measured, bars=False)}", headers, rows)


def _compact(m: Measurement) -> tuple[Block, ...]:
    """Of many classes: how they spread, and the ends."""
    values = m.by_entry("by_class", "accuracy")
    ordered = sorted(values, key=lambda name: values[name])
    low, high = ordered[:_ENDS], ordered[-_ENDS:][::-1]
    rows = tuple(
        (worst, percent(values[worst]), best, percent(values[best])) for worst, best in zip(low, high, strict=True)
    )
    tenths = Counter(min(int(10 * value), 9) for value in values.values())
    spread = ", ".join(f"{10 * k}-{10 * k + 10} %: {n}" for k, n in sorted(tenths.items()))
    caption = f"{m.heading} at T={m.T}: the lowest and the highest of {len(values)} classes."
    table = Table(caption, ("lowest", "accuracy", "highest", "accuracy"), rows)
    return table, Note(f"{m.name}: classes by accuracy: {spread}. Median {percent(median(values.values()))}.")
