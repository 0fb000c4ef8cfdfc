"""Where the Python processes that we start find our packages: where this one did, whatever the current directory holds.

`python -m` looks into the current directory first, where a directory named
`state` would hide ours. Modules of the user's own may still lie there: they are
looked for last (`state/process/user_code.py`).
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
"""Where our packages lie: a clone, or the interpreter's own packages."""


def for_children(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which Python passes over the current directory and finds our packages.

    >>> found = for_children({"PYTHONPATH": "/theirs", "LANG": "C"})
    >>> found["PYTHONSAFEPATH"], found["PYTHONPATH"].endswith("/theirs"), found["LANG"]
    ('1', True, 'C')
    """
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    # Installed, they are found anyway; put first, what is installed beside them would hide Python's own modules.
    if Path(sysconfig.get_path("purelib")) != ROOT:
        paths = [str(ROOT), *(path for path in paths if Path(path) != ROOT)]
    return {**environment, "PYTHONSAFEPATH": "1", **({"PYTHONPATH": os.pathsep.join(paths)} if paths else {})}


def look_here_last() -> None:
    """From now on this process imports from the current directory too, where nothing else has a module of that name."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
