"""The actor: the name of the person who runs a command, which the audit log stores with the reason."""

from __future__ import annotations

import getpass
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_named: ContextVar[str] = ContextVar("actor", default="")


def actor() -> str:
    """The name set by `acting`, or else the operating system's user; with sudo, the user who called it."""
    if named := _named.get():
        return named
    try:
        return os.environ.get("SUDO_USER") or getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


@contextmanager
def acting(name: str) -> Iterator[None]:
    """Sets the actor for commands within the block, for a process that acts on a user's behalf."""
    before = _named.set(name)
    try:
        yield
    finally:
        _named.reset(before)
