"""What files say of the version that wrote them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_helpers import printed

from tetdeploy import __version__
from tetdeploy.cli import main
from tetdeploy.cli.errors import Recorded
from tetdeploy.storage import provenance
from tetdeploy.storage.provenance import version


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder where the package lies, as far as `version` can tell."""
    (tmp_path / "tetdeploy" / "storage").mkdir(parents=True)
    (tmp_path / "tetdeploy" / "storage" / "provenance.py").write_text("")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "tetdeploy" / "storage" / "provenance.py"))
    version.cache_clear()
    yield tmp_path
    version.cache_clear()


@pytest.fixture
def git(package: Path) -> Callable[..., str]:
    if shutil.which("git") is None:
        pytest.skip("needs git")
    # Where a hook runs the tests, they say that its repository is meant: the commit below would be one of it.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def run(*arguments: str) -> str:
        of = ["-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(package), *of, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    run("init")
    run("add", ".")
    run("commit", "-m", "first")
    return run


def test_a_checkout_names_its_commit(git: Callable[..., str]) -> None:
    git("tag", "v9")  # which a description would begin with
    assert version() == f"{__version__}+g{git('rev-parse', 'HEAD')[:12]}"
    assert provenance.written()["versions"]["tetdeploy"] == version()


def test_the_time_of_a_reproducible_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert provenance.written()["created"] == "2023-11-14T22:13:20+00:00"
    for wrong in ("", "yesterday", "1" * 30):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", wrong)
        with pytest.raises(ValueError, match=r"^SOURCE_DATE_EPOCH must be seconds since 1970, got"):
            provenance.written()


def test_a_hook_of_another_repository_and_the_index_are_left_alone(
    git: Callable[..., str], package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, commit = package / ".git" / "index", git("rev-parse", "HEAD")[:12]
    monkeypatch.setenv("GIT_DIR", str(package / "elsewhere"))
    (package / "tetdeploy" / "storage" / "provenance.py").touch()  # the index has another time
    before = index.stat().st_mtime_ns
    assert version() == f"{__version__}+g{commit}"
    assert index.stat().st_mtime_ns == before


def test_a_changed_checkout_says_so(git: Callable[..., str], package: Path) -> None:
    (package / "runs").mkdir()
    (package / "runs" / "new").write_text("what is not of the repository changes nothing")
    commit = git("rev-parse", "HEAD")[:12]
    assert version() == f"{__version__}+g{commit}"
    version.cache_clear()
    (package / "tetdeploy" / "storage" / "provenance.py").write_text("changed")
    assert version() == f"{__version__}+g{commit}.dirty"


def test_elsewhere_it_is_the_release(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert version() == __version__  # installed: beside the package is no repository
    version.cache_clear()
    (package / ".git").mkdir()  # of which Git can make nothing
    assert version() == f"{__version__}+unknown"
    version.cache_clear()
    monkeypatch.setenv("PATH", str(package))  # no Git
    assert version() == f"{__version__}+unknown"


def test_a_command_records_the_version_with_which_it_began(git: Callable[..., str]) -> None:
    begun, recorded = git("rev-parse", "HEAD")[:12], []

    def pulls() -> None:
        git("commit", "--allow-empty", "-m", "second")
        recorded.append(provenance.written()["versions"]["tetdeploy"])

    command = Recorded("measure", callback=pulls)
    printed("--help", command=command)
    assert version.cache_info().currsize == 0  # no Git for a help page
    printed(command=command)
    assert recorded == [f"{__version__}+g{begun}"] and not git("rev-parse", "HEAD").startswith(begun)


def test_every_command_that_writes_files_is_recorded() -> None:
    without = {"inspect", "landscape", "predict", "report", "serve"}  # what these write names no version
    assert {name for name, command in main.commands.items() if not isinstance(command, Recorded)} == without
