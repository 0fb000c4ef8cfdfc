"""Compiles kernels before the processes that use them start: `python -m state.kernels [--all] [MODULE...]`."""

from __future__ import annotations

import importlib
import logging
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry

from state.compiled.preparing import Kernels
from state.process import log_lines
from state.process.part import own_stderr, quiet_stderr

USED = (
    "state.features.kernel", "state.log.batch_decoder", "state.ranking.crosses", "state.ranking.item_scores",
    "state.ranking.transitions",
)  # fmt: skip
"""The modules with kernels that serving and the stream use."""
ALL = "--all"
MOST_PROCESSES = 4
"""Maximum number of processes of `--all`: the largest kernel takes a quarter of all time."""
ROOT = Path(__file__).parents[1]
PACKAGES = ("state", "streaming", "trainer", "deploy", "evaluation")
DECLARES = re.compile(r"^@compiled(_sums)?\(", re.MULTILINE)
_log = logging.getLogger(__name__)


def modules() -> list[str]:
    """The modules that declare kernels.

    >>> {"streaming.labels", *USED} <= {*modules()}
    True
    """
    files = (file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py")))
    return [
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for file in files
        if file.name != "__init__.py" and DECLARES.search(file.read_text())
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Prepares the kernels of the modules in `argv`, of all with `--all`, or of `USED`; returns the exit code."""
    log_lines.begin("kernels", own_stderr())
    words = list(sys.argv[1:] if argv is None else argv)
    children = []
    if ALL in words:
        words = modules()
        command = [sys.executable, "-m", "state.kernels", *words]
        # The child processes share the work; only this process reports progress.
        children = [
            subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            for _ in range(1, min(MOST_PROCESSES, os.cpu_count() or 1))
        ]
    # Some packages write while they are imported.
    with quiet_stderr():
        for module in words or USED:
            importlib.import_module(module)
    Kernels(CollectorRegistry(), _log).prepare()
    for child in children:
        errors = child.communicate()[1]
        if child.returncode:
            sys.stderr.write(errors.decode(errors="replace"))
            return child.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
