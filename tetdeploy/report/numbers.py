"""Numbers of a report as text; what was not measured is a dash."""

from __future__ import annotations

from collections.abc import Callable

from tetdeploy.report.document import NONE
from tetdeploy.report.tables import count, energy, ppm, short


def text(value: float | None, form: Callable[[float], str]) -> str:
    return NONE if value is None else form(float(value))


def percent(value: float | None) -> str:
    return text(value, lambda v: f"{v:.2%}")


def rate(value: float | None) -> str:
    """A firing rate, spikes a neuron and step."""
    return text(value, lambda v: f"{v:.3f}")


def operations(value: float | None) -> str:
    return text(value, count)


def joules(picojoules: float | None) -> str:
    return text(picojoules, energy)


def milliseconds(value: float | None) -> str:
    return text(value, lambda v: f"{short(v)} ms")


def times(value: float | None) -> str:
    return text(value, lambda v: f"{short(v)} ×")


def parts_per_million(value: float | None) -> str:
    return text(value, ppm)


def short_float(value: float | None) -> str:
    return text(value, short)
