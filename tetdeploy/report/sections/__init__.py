"""The sections of a report, in its order. Each makes a section of the results, or None where it has nothing to show:
a new kind of result needs a function here and its name in `reading.KINDS`."""

from __future__ import annotations

from collections.abc import Callable

from tetdeploy.report.document import Section
from tetdeploy.report.results import Results
from tetdeploy.report.sections.accuracy import accuracy_by_energy, accuracy_by_T, pareto_front
from tetdeploy.report.sections.agreement import agreement
from tetdeploy.report.sections.classes import accuracy_by_class
from tetdeploy.report.sections.cost import latency_by_T, numbers_by_T
from tetdeploy.report.sections.layers import energy_by_layer, firing_rate_by_layer
from tetdeploy.report.sections.provenance import provenance
from tetdeploy.report.sections.summary import at_a_glance
from tetdeploy.report.sections.training import seeds, settings, training_curves

SECTIONS: tuple[Callable[[Results], Section | None], ...] = (
    at_a_glance,
    settings,
    training_curves,
    seeds,
    accuracy_by_T,
    accuracy_by_energy,
    pareto_front,
    numbers_by_T,
    firing_rate_by_layer,
    energy_by_layer,
    latency_by_T,
    agreement,
    accuracy_by_class,
    provenance,
)
