"""What an operation costs: the constants of every energy, with their source. They can be replaced.

They are Horowitz's for 45 nm CMOS, which nearly all papers on spiking networks use, Rathi & Roy (2020) among them, whom
the TET paper follows. They are of the arithmetic alone: memory, which costs more on most machines, is in none of them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from tetdeploy.arguments import check_number

_JOULE = 1e12  # in picojoules


@dataclass(frozen=True)
class EnergyConstants:
    """Picojoules of an accumulate and of a multiply-accumulate, and where the figures come from.

    Attributes:
        by_layer: `ac_pj` or `mac_pj` if each layer has its own, that of its precision, and only the other was given.

    Raises:
        ValueError: a figure is no positive number, or more than a joule, or a multiply-accumulate costs less than its
            addition.
    """

    ac_pj: float
    mac_pj: float
    source: str
    by_layer: str = ""

    def __post_init__(self) -> None:
        for name, value in (("ac_pj", self.ac_pj), ("mac_pj", self.mac_pj)):
            object.__setattr__(self, name, check_number(name, value))
            if not 0 < value <= _JOULE:
                raise ValueError(f"{name} must be a positive number of picojoules, at most a joule, got {value}")
        if self.mac_pj < self.ac_pj:
            remedy = f"; give {self.by_layer} as well" if self.by_layer else ""
            raise ValueError(
                f"a multiply-accumulate contains an accumulate, so mac_pj must be at least ac_pj={self.ac_pj}; "
                f"got {self.mac_pj}{remedy}"
            )

    def of(self, precision: str) -> EnergyConstants:
        """What a layer of this precision is billed."""
        if not self.by_layer:
            return self
        return replace(self, **{self.by_layer: getattr(CONSTANTS[precision], self.by_layer)})

    def to_dict(self) -> dict[str, Any]:
        """As JSON: `by_layer` only where there is one."""
        return {key: value for key, value in asdict(self).items() if key != "by_layer" or value}


_HOROWITZ = "M. Horowitz, Computing's energy problem, ISSCC 2014, 45 nm"
CONSTANTS = {
    "fp32": EnergyConstants(0.9, 4.6, f"{_HOROWITZ}, 32-bit float: addition 0.9 pJ, multiplication 3.7 pJ"),
    "fp16": EnergyConstants(
        0.4,
        1.5,
        f"{_HOROWITZ}, 16-bit float: addition 0.4 pJ, multiplication 1.1 pJ; layers that stay in float32 at 0.9 pJ an "
        "addition and 3.7 pJ a multiplication",
    ),
    "int8": EnergyConstants(
        0.1,
        0.3,
        f"{_HOROWITZ}: 8-bit integer multiplication 0.2 pJ, addition into 32-bit integers 0.1 pJ; layers that stay in "
        "float32 at 0.9 pJ an addition and 3.7 pJ a multiplication",
    ),
}


def energy_constants(
    precision: str = "fp32", *, ac_pj: float | None = None, mac_pj: float | None = None
) -> EnergyConstants:
    """The constants for a model's arithmetic, `fp32`, `fp16` or `int8`, or one's own instead of one or both.

    One that is given holds for every layer; the other stays each layer's own, as layers of an int8 model compute in
    float32, too.

    Raises:
        ValueError: no cited figures for this precision, and not both are given; see also `EnergyConstants`.
    """
    own = {name: value for name, value in (("ac_pj", ac_pj), ("mac_pj", mac_pj)) if value is not None}
    if precision not in CONSTANTS and len(own) < 2:
        raise ValueError(
            f"no cited energies for precision {precision!r}, only for {', '.join(CONSTANTS)}; "
            "give your own with --ac-pj and --mac-pj (in Python energy_constants(ac_pj=, mac_pj=))"
        )
    if not own:
        return CONSTANTS[precision]
    source = "given: " + ", ".join(f"{name} {check_number(name, value):g}" for name, value in own.items())
    if len(own) == 2:
        return EnergyConstants(own["ac_pj"], own["mac_pj"], source)
    known = CONSTANTS[precision]
    (other,) = {"ac_pj", "mac_pj"} - own.keys()
    constants = replace(known, **own, source=f"{source}; the other by precision: {_HOROWITZ}", by_layer=other)
    constants.of("fp32")  # the first layer and the neurons of any model
    return constants
