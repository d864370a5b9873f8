"""The commands that README and docs show, in blocks and in the text: each parses, with the options that it names."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tetdeploy.cli import main

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^( *)```\w*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)

INLINE = re.compile(r"`(?:for [^`]*; do )?(?:timeout (?:-\w \w+ )*\w+ )?(?:python3 -m )?tetdeploy ([^`;]*)[^`]*`")


def commands(text: str) -> Iterator[str]:
    """What stands behind each `tetdeploy`: in a block up to a comment, another command or three blanks, elsewhere
    between backticks, up to a `;`."""
    for _, block in BLOCK.findall(text):
        for line in re.sub(r"\\\n *", "", block).splitlines():
            parts = re.split(r" #| {3,}|&&|;|\|", line.strip().removeprefix("$ "))
            yield from (part.strip()[10:] for part in parts if part.strip().startswith("tetdeploy "))
    for inline in INLINE.findall(BLOCK.sub("", text)):
        if "..." not in inline:
            words = re.sub(r"\$\w+", "", re.sub(r"\$\w+(?=/)", ".", re.sub(r":[NM]\b", ":3", inline))).split()
            yield " ".join(words if words[1:] else [*words, "--help"])  # a name alone speaks of the command


def shown() -> list[tuple[str, str]]:
    texts = {document.name: document.read_text(encoding="utf-8") for document in DOCUMENTS}
    return [(name, command) for name, text in texts.items() for command in dict.fromkeys(commands(text))]


def test_what_counts_as_a_command() -> None:
    text = """
```
$ tetdeploy train --T 4 # four
pip install x && tetdeploy sweep   all
tetdeploy export \\
  --T 6
T=4 tetdeploy
```
`tetdeploy bench
MODEL`, `tetdeploy train ...`, `tetdeploy.train`, `python3 -m tetdeploy inspect M`,
`for g in a b; do timeout -k 1 9 tetdeploy train $g --tit 2:N:0.1; cp x y; done`,
`tetdeploy sweep --json $OUT/s.json`"""
    wanted = ["train --T 4", "sweep", "export --T 6", "bench MODEL", "inspect M", "train --tit 2:3:0.1"]
    wanted += ["sweep --json ./s.json"]
    assert list(commands(text)) == wanted
    assert {name for name, _ in shown()} >= {"README.md", "training.md", "tensorrt.md"}


@pytest.mark.parametrize(("document", "command"), shown())
def test_a_command_that_is_shown_parses(
    document: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")  # a recipe is read
    monkeypatch.chdir(tmp_path)  # where results can be written, unlike in a checkout of somebody else's
    name, *arguments = shlex.split(command)
    wanted = main.commands[name]
    if "--help" not in arguments:
        wanted.make_context(name, arguments).close()
