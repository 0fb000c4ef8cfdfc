"""Where a process finds modules, ours and those of users."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from state.errors import SettingsError
from state.process import user_code
from state.process.user_code import ROOT, error_line, for_children, load_named

OURS = ("deploy", "evaluation", "springtide_client", "state", "streaming", "trainer")


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with packages of our names in it."""
    for name in OURS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('theirs, not ours')")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = for_children({**os.environ, **more})
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("more", [{}, {"PYTHONPATH": "."}], ids=["", "the directory is asked for"])
def test_a_child_imports_our_packages_where_others_of_their_names_lie(theirs: Path, more: dict[str, str]) -> None:
    show = f"import {', '.join(OURS)}; print(*sorted({{one.__path__[0] for one in ({', '.join(OURS)})}}))"
    done = said("-c", show, **more)
    assert done.stdout.split() == [str(ROOT / name) for name in OURS], done.stderr


def test_a_module_of_the_users_own_is_found_there_last(theirs: Path) -> None:
    (theirs / "shop.py").write_text("def build(): pass")
    (theirs / "numpy.py").write_text("raise ImportError('theirs, not numpy')")
    load = (
        "import state.process.user_code as it; print(it.load_named('shop:build', 'model.tower').__name__); import numpy"
    )
    done = said("-c", load)
    assert (done.returncode, done.stdout.strip()) == (0, "build"), done.stderr


def test_what_is_installed_beside_ours_is_not_put_before_pythons_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_code, "ROOT", Path(sysconfig.get_path("purelib")))
    assert for_children({"PYTHONPATH": "/theirs"}) == {"PYTHONPATH": "/theirs", "PYTHONSAFEPATH": "1"}
    assert for_children({}) == {"PYTHONSAFEPATH": "1"}


@pytest.mark.parametrize(
    ("module", "path", "why"),
    [
        ("", "nowhere_at_all:build", "ModuleNotFoundError"),
        ("", "own_module:other", "AttributeError"),
        ("", "own_module", "AttributeError"),
        ("1 / 0", "own_module:build", "ZeroDivisionError"),
        ("raise BaseExceptionGroup('several', [KeyError(1)])", "own_module:build", "ExceptionGroup"),
    ],
)
def test_whatever_keeps_a_module_from_loading_is_a_wrong_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, path: str, why: str
) -> None:
    (tmp_path / "own_module.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_module", raising=False)
    with pytest.raises(SettingsError, match=rf"model\.tower '{path}' cannot be loaded \({why}.*name a function"):
        load_named(path, "model.tower")


def test_an_error_is_told_with_the_line_that_raised_it() -> None:
    try:
        raise ValueError("\n  the first line\nthe second")
    except ValueError as error:
        line = error.__traceback__.tb_lineno if error.__traceback__ else 0
        assert error_line(error) == f"ValueError: the first line ({Path(__file__).name}:{line})"
