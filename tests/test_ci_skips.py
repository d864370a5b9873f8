"""What CI lets a test be skipped for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import ci_skips
import pytest

FILES = {
    "test_module.py": "import pytest\npytest.importorskip('no_such_package')",
    "test_one.py": """
import pytest
@pytest.mark.skipif(True, reason="the native operator is switched off by TETDEPLOY_NATIVE=0")
def test_native(): pass
def test_passes(): pass
""",
    "test_peer.py": """
import pytest
@pytest.mark.peer
def test_compares(): pytest.skip("needs no_such_framework")
""",
    "test_machine.py": """
import pytest
@pytest.mark.gpu
def test_gpu(): pytest.skip("anything")
@pytest.mark.skipif(True, reason="this processor has AMX")
def test_amx(): pass
def test_data(): pytest.skip("TETDEPLOY_DATA names no folder with CIFAR-10")
""",
}


def status(folder: Path, *files: str, ci: str = "1") -> tuple[int, str]:
    for name in files:
        (folder / name).write_text(FILES[name])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "ci_skips", "-p", "no:cacheprovider", *files]
    alone = {"PYTHONPATH": str(Path(__file__).parent), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # Hypothesis takes 1 s
    environment = os.environ | alone | {"TETDEPLOY_CI": ci}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("test_module.py", "test_module.py: could not import 'no_such_package'"),
        ("test_one.py", "test_one.py::test_native: the native operator is switched off by TETDEPLOY_NATIVE=0"),
        ("test_peer.py", "test_peer.py::test_compares: needs no_such_framework"),
    ],
)
def test_a_skip_of_what_ci_installs_fails_it(file: str, named: str, tmp_path: Path) -> None:
    code, output = status(tmp_path, file)
    assert code == 1 and named in output
    code, output = status(tmp_path, file, ci="0")
    assert code != 1 and named not in output


def test_a_machine_may_lack_what_it_lacks(tmp_path: Path) -> None:
    assert status(tmp_path, "test_machine.py")[0] == 0


@pytest.mark.parametrize(("compiler", "may"), [("/usr/bin/cc", False), (None, True)])
def test_operators_may_be_missing_where_no_compiler_is(
    compiler: str | None, may: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ci_skips.shutil, "which", lambda name: compiler)
    assert ci_skips.expected("the native operator was not compiled: install a C compiler", {}) is may
