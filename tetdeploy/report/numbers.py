"""Numbers as text, in engineering units; in a report, what was not measured is a dash."""

from __future__ import annotations

from collections.abc import Callable

from tetdeploy.report.document import NONE


def text(value: float | None, form: Callable[[float], str], std: float | None = None) -> str:
    """A number, and its standard deviation if there is one: `36.30% ± 1.56%`."""
    if value is None:
        return NONE
    return form(float(value)) + ("" if std is None else f" ± {form(float(std))}")


def percent(value: float | None, std: float | None = None) -> str:
    return text(value, lambda v: f"{v:.2%}", std)


def rate(value: float | None, std: float | None = None) -> str:
    """A firing rate, spikes a neuron and step."""
    return text(value, lambda v: f"{v:.3f}", std)


def scientific(value: float | None) -> str:
    """A small number: `1.2e-06`."""
    return text(value, lambda v: f"{v:.1e}")


def milliseconds(value: float | None, std: float | None = None) -> str:
    return _in_unit(value, std, "ms")


def latency(milliseconds: float | None) -> str:
    """To two decimals, for a column of them."""
    return text(milliseconds, lambda v: f"{v:.2f} ms")


def times(value: float | None, std: float | None = None) -> str:
    return _in_unit(value, std, "×")


def count(number: float | None, std: float | None = None) -> str:
    """A number of operations in engineering units: `1.66 M`."""
    return _scaled(number, std, (("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0)))


def energy(picojoules: float | None, std: float | None = None) -> str:
    """An energy in engineering units: `1.92 µJ`."""
    return _scaled(picojoules, std, (("mJ", 1e9), ("µJ", 1e6), ("nJ", 1e3), ("pJ", 1.0)))


def ppm(rate: float | None) -> str:
    """A rate in parts per million: `0.15 ppm`."""
    return text(rate, lambda v: f"{three_digits(v * 1e6)} ppm")


def three_digits(number: float | None) -> str:
    """Three digits, or all of a larger whole number: `0.15`, `12.3`, `1,230`."""
    return text(number, lambda v: f"{v:,.0f}" if v >= 99.95 else f"{v:.3g}")


def _scaled(number: float | None, std: float | None, units: tuple[tuple[str, float], ...]) -> str:
    # what would be 1,000 by its three digits is 1 of the next unit
    unit, size = next((u for u in units if number is not None and number >= 0.9995 * u[1]), units[-1])
    return _in_unit(number, std, unit, size)


def _in_unit(number: float | None, std: float | None, unit: str, size: float = 1.0) -> str:
    """`1.20 ± 0.06 µJ`, where the unit is of so many of what the number is in: three digits of the larger of the two,
    and as many decimals of the other, or of both so many that a deviation is not shown as 0."""
    if number is None:
        return NONE
    value = number / size
    if std is None:
        return f"{three_digits(value)} {unit}".rstrip()
    larger = max(value, std / size)
    decimals = max(0, 2 - _exponent(larger))
    if std and not float(f"{std / size:.{decimals}f}"):
        decimals = -_exponent(std / size)
    return f"{text(value, lambda v: f'{v:,.{decimals}f}', std / size)} {unit}".rstrip()


def _exponent(value: float) -> int:
    """Of ten, in the first of three digits."""
    return int(f"{value:.2e}".partition("e")[2])
