"""Who gives a command: the name that the audit log keeps beside the reason."""

from __future__ import annotations

import getpass
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_named: ContextVar[str] = ContextVar("actor", default="")


def actor() -> str:
    """Who gives the command: who acts here, else the user of the operating system, behind sudo the one who called it."""
    if named := _named.get():
        return named
    try:
        return os.environ.get("SUDO_USER") or getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


@contextmanager
def acting(name: str) -> Iterator[None]:
    """Lets commands within be given by somebody else, whom a process stands for.

    >>> with acting("ann (console)"):
    ...     actor()
    'ann (console)'
    """
    before = _named.set(name)
    try:
        yield
    finally:
        _named.reset(before)
