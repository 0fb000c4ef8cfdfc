"""Loads the user's own functions that a setting names as `module:name`, and formats their errors."""

from __future__ import annotations

import importlib
import traceback
from pathlib import Path
from typing import Any

from state.errors import SettingsError
from state.process.import_path import look_here_last


def load_named(path: str, setting: str) -> Any:
    """Loads the function that `path` names, from a module on Python's path or in the current directory.

    >>> load_named("state.process.user_code:told", "model.tower").__name__
    'told'

    Args:
        path: `module:name`.
        setting: The setting that names the function, for the message.

    Raises:
        SettingsError: The function cannot be loaded.
    """
    module, _, name = path.partition(":")
    look_here_last()
    try:
        return getattr(importlib.import_module(module), name)
    # The user's module may fail in any way.
    except Exception as error:
        raise SettingsError(
            f"{setting} {path!r} cannot be loaded ({type(error).__name__}: {error})",
            "name a function as `module:name`, in a module that Python finds from here",
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text that is not blank.

    >>> first_line(ValueError("  in user code: x is negative "))
    'in user code: x is negative'
    """
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


def told(error: BaseException) -> str:
    """Formats an error of the user's code in one line, with the file and line that raised it.

    >>> told(ValueError("x is negative"))
    'ValueError: x is negative'
    """
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {first_line(error)}{where}"
