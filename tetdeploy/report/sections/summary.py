"""The headline numbers of each model."""

from __future__ import annotations

from tetdeploy.report.document import NONE, Card, Cards, Note, Section
from tetdeploy.report.numbers import energy, milliseconds, percent, rate, three_digits
from tetdeploy.report.results import Measurement, Results, Source


def at_a_glance(results: Results) -> Section:
    """A card for each series."""
    cards = [
        card
        for source in results.sources
        for card in ([_measured(m) for m in source.series] or [_trained(source, results)])
    ]
    notes = [Note(note) for note in results.notes]
    if len({m.T for source in results.sources for m in source.series if m.headline.get("accuracy") is not None}) > 1:
        notes.append(Note("The numbers of each are at the T that stands beside its accuracy."))
    return Section("At a glance", (Cards(tuple(cards)), *notes))


def _measured(m: Measurement) -> Card:
    row = m.headline
    std = {key: m.std(m.T, key) for key in ("accuracy", "energy_pj", "firing_rate", "latency_ms", "top1_agreement")}
    where = f"T={m.T}" + (", as trained" if m.trained_T == m.T else "")
    facts = [
        (f"accuracy at {where}", percent(row.get("accuracy"), std["accuracy"])),
        ("mean of", m.counted_seeds),
        ("measured on", m.images),
        ("precision of its layers", NONE if m.precision in ("", "fp32") else m.precision),
        ("energy per image", energy(row.get("energy_pj"), std["energy_pj"])),
        ("against its ANN twin", _against(row.get("ann_ratio"), m, row.get("energy_pj"))),
        ("spikes per neuron and step", rate(row.get("firing_rate"), std["firing_rate"])),
        ("latency of one image", milliseconds(row.get("latency_ms"), std["latency_ms"])),
        ("same answer as PyTorch", percent(row.get("top1_agreement"), std["top1_agreement"])),
    ]
    if row.get("accuracy") is None:
        facts.insert(0, facts.pop())  # without labels agreement is the headline
    return Card(m.name, tuple((label, value) for label, value in facts if value != NONE))


def _against(ratio: float | None, m: Measurement, energy_pj: float | None) -> str:
    """How many times the twin's energy is this one's."""
    if ratio is None and m.ann_pj and energy_pj:
        ratio = m.ann_pj / energy_pj
    if not ratio:
        return NONE
    return f"{three_digits(ratio)} times less energy" if ratio >= 1 else f"{three_digits(1 / ratio)} times more energy"


def _trained(source: Source, results: Results) -> Card:
    """A training of which nothing was exported and measured."""
    run = source.run
    assert run is not None  # a source without measurements has runs
    images = f"{run.data['val_images']:,} validation images" if run.data.get("val_images") else NONE
    facts = []
    if (mean := source.summary.get("mean_val_accuracy")) is not None:
        std = source.summary.get("std_val_accuracy")
        facts.append((f"validation accuracy, {source.finished_seeds}", percent(mean, std)))
    elif run.best is not None and run.best.get("val_accuracy") is not None:
        facts.append((f"validation accuracy at T={run.best.get('T')}", percent(run.best["val_accuracy"])))
    if (energy_pj := results.twin_energy(run)) is not None:
        facts.append(("energy per image", f"{energy(energy_pj)} in float32"))
    kind = "ANN: no T, not exported" if run.network.get("ann") else "trained, not exported or not measured"
    facts += [("measured on", images), ("kind", kind)]
    return Card(source.name, tuple((label, value) for label, value in facts if value != NONE))
