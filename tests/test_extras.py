"""An optional dependency that is missing is named with the line that installs it; other errors are left as they are."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from tetdeploy.system.extras import MissingExtraError, import_extra


def test_a_missing_package_is_named() -> None:
    with pytest.raises(MissingExtraError, match=r"'no_such_package'.*pip install 'tetdeploy\[nir\]'"):
        import_extra("no_such_package.part", "nir")


@pytest.mark.parametrize("module", ["tetdeploy", "other"])
def test_what_a_module_imports_comes_by_the_extra_if_the_module_is_ours(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def imported(name: str) -> None:
        raise ModuleNotFoundError("No module named 'no_such_package'", name="no_such_package")

    monkeypatch.setattr(importlib, "import_module", imported)
    with pytest.raises(MissingExtraError if module == "tetdeploy" else ModuleNotFoundError) as raised:
        import_extra(f"{module}.serve.server", "serve")
    assert isinstance(raised.value, MissingExtraError) == (module == "tetdeploy")


def test_ctrl_c_within_an_import_is_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "interrupted.py").write_text('raise ImportError("initialization failed") from KeyboardInterrupt()')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        import_extra("interrupted", "cpu")


def test_a_module_of_ours_that_is_missing_is_no_matter_of_extras() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        import_extra("tetdeploy.no_such_module", "serve")
