"""Functions of the user's own that a setting names as `module:name`: how they are loaded, and how their errors are told."""

from __future__ import annotations

import importlib
import traceback
from pathlib import Path
from typing import Any

from state.errors import SettingsError
from state.process.import_path import look_here_last


def load_named(path: str, setting: str) -> Any:
    """The function that `path` names, in a module that Python finds or that lies in the current directory.

    >>> load_named("state.process.user_code:told", "model.tower").__name__
    'told'

    Args:
        path: `module:name`.
        setting: Where it stands, for the message.

    Raises:
        SettingsError: There is none.
    """
    module, _, name = path.partition(":")
    look_here_last()
    try:
        return getattr(importlib.import_module(module), name)
    # A module of the user's own may fail in any way.
    except Exception as error:
        raise SettingsError(
            f"{setting} {path!r} cannot be loaded ({type(error).__name__}: {error})",
            "name a function as `module:name`, in a module that Python finds from here",
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says anything.

    >>> first_line(ValueError("  in user code: x is negative "))
    'in user code: x is negative'
    """
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


def told(error: BaseException) -> str:
    """An error of the user's code in one line, with where it was raised.

    >>> told(ValueError("x is negative"))
    'ValueError: x is negative'
    """
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {first_line(error)}{where}"
