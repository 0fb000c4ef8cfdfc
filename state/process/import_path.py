"""Makes the Python processes that we start import our packages from the same location as this process.

`python -m` searches the current directory first, where a directory named
`state` would hide ours. User modules may be in the current directory: it is
searched last (`state/process/user_code.py`).
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The location of our packages: a clone, or the interpreter's site-packages."""


def for_children(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which Python ignores the current directory and finds our packages.

    >>> found = for_children({"PYTHONPATH": "/theirs", "LANG": "C"})
    >>> found["PYTHONSAFEPATH"], found["PYTHONPATH"].endswith("/theirs"), found["LANG"]
    ('1', True, 'C')
    """
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    # Installed packages are found anyway; if they came first, their neighbours would hide Python's own modules.
    if Path(sysconfig.get_path("purelib")) != ROOT:
        paths = [str(ROOT), *(path for path in paths if Path(path) != ROOT)]
    return {**environment, "PYTHONSAFEPATH": "1", **({"PYTHONPATH": os.pathsep.join(paths)} if paths else {})}


def look_here_last() -> None:
    """Adds the current directory at the end of this process's import path."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
