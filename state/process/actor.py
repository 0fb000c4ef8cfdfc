"""Who gives a command: the name that the audit log keeps beside the reason."""

from __future__ import annotations

import getpass
import os


def actor() -> str:
    """Who gives the command: the user of the operating system, behind sudo the one who called it."""
    try:
        return os.environ.get("SUDO_USER") or getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"
