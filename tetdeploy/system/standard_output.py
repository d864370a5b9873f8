"""Where commands and training print."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from tetdeploy.wording import visible


class VisibleConsole(Console):
    """A console that leaves out characters of text which steer a terminal: names come from foreign files."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


class StandardOutput(VisibleConsole):
    """A console that prints text as it is, `[x]` and `:x:` too, on lines as long as it wants, but for what a
    `VisibleConsole` leaves out. Its errors, a full disk for instance, say that it is the one: the system does not."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, soft_wrap=True, markup=False, emoji=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except OSError as error:
            raise OSError(error.errno, error.strerror, "standard output") from error
