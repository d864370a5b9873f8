"""Numbers as text, in engineering units; in a report, what was not measured is a dash."""

from __future__ import annotations

from collections.abc import Callable

from tetdeploy.report.document import NONE


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


def count(number: float) -> str:
    """A number of operations in engineering units: `1.66 M`."""
    return _scaled(number, (("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0)))


def energy(picojoules: float) -> str:
    """An energy in engineering units: `1.92 µJ`."""
    return _scaled(picojoules, (("mJ", 1e9), ("µJ", 1e6), ("nJ", 1e3), ("pJ", 1.0)))


def ppm(rate: float) -> str:
    """A rate in parts per million: `0.15 ppm`."""
    return f"{short(rate * 1e6)} ppm"


def short(number: float) -> str:
    """Three digits, or all of a larger whole number: `0.15`, `12.3`, `1,230`."""
    return f"{number:,.0f}" if number >= 99.5 else f"{number:.3g}"


def _scaled(number: float, units: tuple[tuple[str, float], ...]) -> str:
    # what would be 1,000 by its three digits is 1 of the next unit
    unit, size = next((u for u in units if number >= 0.9995 * u[1]), units[-1])
    return f"{short(number / size)} {unit}".rstrip()
