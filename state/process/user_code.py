"""Imports of this process and its children: our packages from one location, and the user's own functions.

`python -m` searches the current directory first, where a directory named `state` would hide ours. User modules may be
in the current directory: it is searched last.
"""

from __future__ import annotations

import importlib
import os
import sys
import sysconfig
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from state.errors import SettingsError, first_line

ROOT = Path(__file__).parents[2]
"""The location of our packages: a clone, or the interpreter's site-packages."""


def for_children(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which Python ignores the current directory and finds our packages."""
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    # Installed packages are found anyway. If site-packages came first, other packages would hide Python's own modules.
    if Path(sysconfig.get_path("purelib")) != ROOT:
        paths = [str(ROOT), *(path for path in paths if Path(path) != ROOT)]
    return {**environment, "PYTHONSAFEPATH": "1", **({"PYTHONPATH": os.pathsep.join(paths)} if paths else {})}


def search_here_last() -> None:
    """Adds the current directory at the end of this process's import path."""
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)


def load_named(path: str, setting: str) -> Any:
    """Loads the function that `path` names; SettingsError if that fails.

    The module is on Python's path or in the current directory.

    >>> load_named("state.process.user_code:error_line", "model.tower").__name__
    'error_line'
    """
    module, _, name = path.partition(":")
    search_here_last()
    try:
        return getattr(importlib.import_module(module), name)
    # The user's module may fail in any way.
    except Exception as error:
        raise SettingsError(
            f"{setting} {path!r} cannot be loaded ({type(error).__name__}: {error})",
            "name a function as `module:name`, in a module that Python finds from here",
        ) from error


def error_line(error: BaseException) -> str:
    """Formats an error of the user's code in one line, with the file and line that raised it.

    >>> error_line(ValueError("x is negative"))
    'ValueError: x is negative'
    """
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {first_line(error)}{where}"
