"""`--fail-under`: a result as a gate for CI."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import click

FAILED = 3  # exit code of a gate that failed; 1 and 2 are errors


@dataclass(frozen=True)
class _Bound:
    """What KEY bounds: a field of a result's rows, from above or from below, in a unit ("fraction": 0 to 1)."""

    field: str
    at_most: bool = False
    unit: str = "fraction"


_BOUNDS = {
    "accuracy": _Bound("accuracy"),
    "agreement": _Bound("top1_agreement"),
    "energy": _Bound("energy_pj", at_most=True, unit="pJ"),
}


@dataclass(frozen=True)
class Gate:
    """The least or, as `_BOUNDS` says, the most that a number may be at one T. T is None for the default."""

    key: str
    wanted: float
    T: int | None = None

    @property
    def bound(self) -> _Bound:
        return _BOUNDS[self.key]

    def passes(self, got: float) -> bool:
        return got <= self.wanted if self.bound.at_most else got >= self.wanted


def parse_gate(text: str) -> Gate:
    """`accuracy=0.94`, `agreement=0.999@4`, `energy=2e6` (pJ).

    Raises:
        ValueError: it does not parse, and why.
    """
    key, equals, rest = text.partition("=")
    if not equals or key not in _BOUNDS:
        raise ValueError(f"{text!r}: write KEY=VALUE or KEY=VALUE@T with KEY one of {', '.join(_BOUNDS)}")
    value, at, step = rest.partition("@")
    try:
        wanted, T = float(value), int(step) if at else None
    except ValueError:
        raise ValueError(f"{text!r}: write {key}=VALUE or {key}=VALUE@T with numbers") from None
    if not math.isfinite(wanted) or wanted < 0 or (T is not None and T < 1):
        raise ValueError(f"{text!r}: VALUE must be 0 or more and T at least 1")
    if _BOUNDS[key].unit == "fraction" and wanted > 1:
        raise ValueError(f"{text!r}: {key} is a fraction, 0 to 1 ({wanted:g} % is {wanted / 100:g})")
    return Gate(key, wanted, T)


def parse_gates(ctx: click.Context, param: click.Parameter, value: Sequence[str]) -> tuple[Gate, ...]:
    """The callback of `--fail-under`."""
    try:
        return tuple(parse_gate(text) for text in value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def place_gates(gates: Sequence[Gate], steps: Collection[int], trained_T: int) -> list[Gate]:
    """Gates with a T each: by default the training's, if it is measured, otherwise the largest.

    Raises:
        ValueError: a gate's T is not measured.
    """
    default = trained_T if trained_T in steps else max(steps)
    placed = [Gate(gate.key, gate.wanted, gate.T or default) for gate in gates]
    for gate in placed:
        if gate.T not in steps:
            measured = ", ".join(map(str, sorted(steps)))
            raise ValueError(
                f"--fail-under {gate.key}={gate.wanted:g}@{gate.T}: T={gate.T} is not measured ({measured})"
            )
    return placed


def check_gates(gates: Sequence[Gate], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What each gate, with a T, got from the rows of a result, as JSON: key, T, wanted, at_most, unit, got, passed."""
    by_T = {row["T"]: row for row in rows}
    found = []
    for gate in gates:
        bound, got = gate.bound, by_T[gate.T][gate.bound.field]
        passed = got is not None and gate.passes(got)
        found.append(asdict(gate) | {"at_most": bound.at_most, "unit": bound.unit, "got": got, "passed": passed})
    return found


def describe(gate: Mapping[str, Any]) -> str:
    """`accuracy at T=4: 0.9312, wanted at least 0.94`, of what `check_gates` gives."""
    unit = "" if gate["unit"] == "fraction" else f" {gate['unit']}"
    got = "not measured" if gate["got"] is None else f"{gate['got']:.10g}{unit}"
    bound = "at most" if gate["at_most"] else "at least"
    return f"{gate['key']} at T={gate['T']}: {got}, wanted {bound} {gate['wanted']:.10g}{unit}"
