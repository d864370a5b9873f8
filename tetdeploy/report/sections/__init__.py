"""The sections of a report, in its order. Each makes a section of the results, or None where it has nothing to show:
a new kind of result needs a function here and its name in `reading.KINDS`."""

from __future__ import annotations

from collections.abc import Callable

from tetdeploy.report.document import Section
from tetdeploy.report.results import Results
from tetdeploy.report.sections.accuracy import accuracy
from tetdeploy.report.sections.agreement import agreement, gates
from tetdeploy.report.sections.bench import bench
from tetdeploy.report.sections.classes import accuracy_by_class
from tetdeploy.report.sections.cost import cost
from tetdeploy.report.sections.early_exit import early_exit
from tetdeploy.report.sections.layers import layers
from tetdeploy.report.sections.pareto import pareto_front
from tetdeploy.report.sections.provenance import provenance
from tetdeploy.report.sections.settings import settings
from tetdeploy.report.sections.summary import at_a_glance
from tetdeploy.report.sections.training import seeds, training

SECTIONS: tuple[Callable[[Results], Section | None], ...] = (
    at_a_glance,
    gates,
    settings,
    training,
    seeds,
    accuracy,
    pareto_front,
    cost,
    early_exit,
    layers,
    bench,
    agreement,
    accuracy_by_class,
    provenance,
)
