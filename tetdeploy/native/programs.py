"""Programs of `elementwise.c`: the arithmetic of a region of a graph on a block of elements, one instruction after the
other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum

MAX_REGISTERS = 64


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


Instruction = tuple[Op, int, int, int, int]


@dataclass
class Program:
    """Instructions `(op, d, a, b, k)` on values that are each written once; `encode` puts them in order and finds
    registers.

    Attributes:
        stores: which value is which part of which output.
        kept: of each value that lasts from one run of the program to the next, of which the first finds zeros, the
            value that it then is.
    """

    instructions: list[Instruction] = field(default_factory=list)
    immediates: list[float] = field(default_factory=list)
    stores: list[tuple[int, int, int]] = field(default_factory=list)
    kept: dict[int, int] = field(default_factory=dict)
    _values: int = 0
    _loaded: dict[tuple[Op, int, int, int], int] = field(default_factory=dict)

    def immediate(self, *numbers: float) -> int:
        """Where `numbers` stand one after the other."""
        wanted = [number.hex() for number in numbers]  # tells -0 from 0
        for start in range(len(self.immediates) - len(numbers) + 1):
            if [number.hex() for number in self.immediates[start : start + len(numbers)]] == wanted:
                return start
        self.immediates += numbers
        return len(self.immediates) - len(numbers)

    def add(self, op: Op, a: int, b: int = 0, k: int = 0) -> int:
        """The value that an instruction gives; of a part dequantised the same way before, that."""
        loaded = (op, a, b, k) if op == Op.DEQUANTIZE else None
        if loaded is not None and loaded in self._loaded:
            return self._loaded[loaded]
        self._values += 1
        self.instructions.append((op, self._values - 1, a, b, k))
        if loaded is not None:
            self._loaded[loaded] = self._values - 1
        return self._values - 1

    def state(self) -> int:
        """A value that lasts. What it is in the next run belongs into `kept`."""
        self._values += 1
        self.kept[self._values - 1] = self._values - 1
        return self._values - 1

    def encode(self) -> list[int]:
        """The attribute `program`.

        Raises:
            ValueError: more values are needed at once than there are registers; a state becomes another one, which may
                have its next value by then.
        """
        if any(value in self.kept and value != state for state, value in self.kept.items()):
            raise ValueError("a state becomes another one")
        instructions = self._in_order()
        last = {value: k for k, step in enumerate(instructions) for value in _read(step)}
        free, encoded, used = list[int](), list[int](), len(self.kept)
        place = {state: k for k, state in enumerate(self.kept)}
        for k, (op, d, a, b, immediate) in enumerate(instructions):
            read = list(_read((op, d, a, b, immediate)))
            at = [place[value] for value in read]
            free += [place[value] for value in set(read) if last[value] == k and value not in self.kept]
            if op == Op.STORE:
                encoded += [op, d, at[0], b, immediate]
                continue
            if d not in self.kept:
                if not free:
                    free.append(used)
                    used += 1
                place[d] = free.pop()
            encoded += [op, place[d], *([a, b] if op <= Op.DEQUANTIZE else [*at, 0][:2]), immediate]
        if used > MAX_REGISTERS:
            raise ValueError(f"{used} values at once")
        return encoded

    def _in_order(self) -> list[Instruction]:
        """What leads to the stores and states. So that few values are held at once, a value is stored as soon as it is
        there, one that is only stored is computed step by step, and of operands the longer chain comes first."""
        made = {step[1]: step for step in self.instructions}
        length = dict.fromkeys(self.kept, 0)
        for step in self.instructions:
            length[step[1]] = 1 + max((length[value] for value in _read(step)), default=0)
        read = {value for step in self.instructions for value in _read(step)}
        stores = defaultdict[int, list[Instruction]](list)
        for value, output, part in self.stores:
            stores[value].append((Op.STORE, output, value, part, 0))
        first = sorted(self.stores, key=lambda store: (store[0] in read, store[2], length[store[0]]))
        waiting = [*self.kept.values(), *(value for value, _, _ in reversed(first))]
        order, done = [step for state in self.kept for step in stores[state]], set(self.kept)
        while waiting:
            value = waiting[-1]
            needed = [operand for operand in _read(made[value]) if operand not in done] if value not in done else []
            if needed:
                waiting += sorted(needed, key=length.__getitem__)
                continue
            waiting.pop()
            if value not in done:
                done.add(value)
                order += [made[value], *stores[value]]
        # Nothing reads the states any more.
        keep = self.immediate(1.0)
        return [*order, *((Op.MUL_K, state, value, 0, keep) for state, value in self.kept.items())]


def _read(instruction: Instruction) -> Iterable[int]:
    """The values that an instruction reads."""
    op, _, a, b, _ = instruction
    if op <= Op.DEQUANTIZE:
        return ()
    return (a, b) if Op.ADD <= op < Op.ADD_K else (a,)
