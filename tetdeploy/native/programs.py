"""Programs of `elementwise.c`: the arithmetic of a region of a graph on a block of elements, one instruction after the
other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum

MAX_REGISTERS = 256


class Op(IntEnum):
    """As in `elementwise.c`. `<op>_K` has an immediate as its right operand, `K_<op>` as its left."""

    LOAD = 0
    DEQUANTIZE = 1
    STORE = 2
    ADD = 3
    SUB = 4
    MUL = 5
    DIV = 6
    LESS = 7
    GREATER = 8
    LESS_EQUAL = 9
    GREATER_EQUAL = 10
    ADD_K = 11
    SUB_K = 12
    K_SUB = 13
    MUL_K = 14
    DIV_K = 15
    K_DIV = 16
    LESS_K = 17
    GREATER_K = 18
    LESS_EQUAL_K = 19
    GREATER_EQUAL_K = 20
    THRESHOLDED_RELU = 21
    HARD_SIGMOID = 22


@dataclass
class Program:
    """Instructions `(op, d, a, b, k)` on values that are each written once; `encode` finds registers for them.

    `states` are values that last from one run of the program to the next, of which the first finds zeros.
    """

    instructions: list[tuple[Op, int, int, int, int]] = field(default_factory=list)
    immediates: list[float] = field(default_factory=list)
    states: list[int] = field(default_factory=list)
    _values: int = 0

    def immediate(self, *numbers: float) -> int:
        """Where `numbers` stand one after the other."""
        wanted = [number.hex() for number in numbers]  # tells -0 from 0
        for start in range(len(self.immediates) - len(numbers) + 1):
            if [number.hex() for number in self.immediates[start : start + len(numbers)]] == wanted:
                return start
        self.immediates += numbers
        return len(self.immediates) - len(numbers)

    def add(self, op: Op, a: int, b: int = 0, k: int = 0) -> int:
        """The value that an instruction gives."""
        self._values += 1
        self.instructions.append((op, self._values - 1, a, b, k))
        return self._values - 1

    def state(self) -> int:
        """A value that lasts; `keep` says what it is in the next run."""
        self.states.append(self._values)
        self._values += 1
        return self.states[-1]

    def keep(self, value: int, state: int) -> None:
        """To be called when nothing reads the state any more."""
        self.instructions.append((Op.MUL_K, state, value, 0, self.immediate(1.0)))

    def store(self, value: int, output: int, part: int) -> None:
        self.instructions.append((Op.STORE, output, value, part, 0))

    def encode(self) -> list[int]:
        """The attribute `program`.

        Raises:
            ValueError: more values are needed at once than there are registers.
        """
        last = {value: k for k, step in enumerate(self.instructions) for value in _read(step)}
        free, encoded, used = list[int](), list[int](), len(self.states)
        place = {state: k for k, state in enumerate(self.states)}
        for k, (op, d, a, b, immediate) in enumerate(self.instructions):
            read = list(_read((op, d, a, b, immediate)))
            at = [place[value] for value in read]
            free += [place[value] for value in set(read) if last[value] == k and value not in self.states]
            if op == Op.STORE:
                encoded += [op, d, at[0], b, immediate]
                continue
            if d not in self.states:
                if not free:
                    free.append(used)
                    used += 1
                place[d] = free.pop()
                if d not in last:
                    free.append(place[d])
            encoded += [op, place[d], *([a, b] if op <= Op.DEQUANTIZE else [*at, 0][:2]), immediate]
        if used > MAX_REGISTERS:
            raise ValueError(f"{used} values at once")
        return encoded


def _read(instruction: tuple[Op, int, int, int, int]) -> Iterable[int]:
    """The values that an instruction reads."""
    op, _, a, b, _ = instruction
    if op <= Op.DEQUANTIZE:
        return ()
    return (a, b) if Op.ADD <= op < Op.ADD_K else (a,)
