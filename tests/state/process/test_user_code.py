"""Functions of the user's own: any failure of theirs becomes one line that names the setting, the file and the line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from state.errors import SettingsError
from state.process.user_code import error_line, load_named


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
        assert error_line(error) == f"ValueError: the first line (test_user_code.py:{line})"
