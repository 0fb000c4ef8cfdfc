"""Prepares kernels: those of a process before it reports ready, or those of all processes before any of them starts.

`python -m state.kernels [--all] [MODULE...]` does the latter.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry

from state.compiled import Declared, declared
from state.metrics import KernelMetrics
from state.process import log_lines
from state.process.part import own_stderr, quiet_stderr

SAY_S = 2.0


class Kernels:
    """The kernels of all modules that this process has imported. Processes that start together share the work.

    Args:
        registry: Registry of the metrics. Create this object as soon as the registry is served.
        logger: Logs the progress.
        without: Modules whose kernels the settings leave unused.
        uses: Modules that are imported late, and whose kernels are prepared too.
    """

    def __init__(
        self, registry: CollectorRegistry, logger: logging.Logger, without: Sequence[str] = (), uses: Sequence[str] = ()
    ) -> None:
        for module in uses:
            importlib.import_module(module)
        self._metrics, self._logger, self._without = KernelMetrics(registry), logger, frozenset(without)
        # Later imports may add kernels, so nothing counts as ready before `prepare`.
        self.total, self.ready = max(1, len(self.wanted())), 0
        self._metrics.total.set(self.total)
        self._metrics.ready.set(0)

    @property
    def done(self) -> bool:
        """Whether all are ready."""
        return self.ready == self.total

    @property
    def progress(self) -> str:
        """The progress as text."""
        return f"compiling kernels, {self.ready} of {self.total}"

    def prepare(self, stopping: Callable[[], bool] = lambda: False) -> None:
        """Prepares all kernels in this thread; returns early if the process is stopping."""
        waiting = deque(self.wanted())
        begin_s = said_s = time.monotonic()
        self.total, self.ready = len(waiting), 0
        self._metrics.total.set(self.total)
        passed = 0
        while waiting:
            if stopping():
                return
            if time.monotonic() >= said_s + SAY_S:
                said_s = time.monotonic()
                self._logger.info("%s", self.progress)
            kernel = waiting.popleft()
            # Kernels that another process is compiling come last, because they then only need to be loaded.
            if passed < len(waiting) and kernel.busy:
                waiting.append(kernel)
                passed += 1
                continue
            kernel.prepare()
            self.ready, passed = self.ready + 1, 0
            self._metrics.ready.set(self.ready)
        self._logger.info("%d kernels ready after %.1f s", self.total, time.monotonic() - begin_s)

    def wanted(self) -> list[Declared]:
        """The kernels to prepare, in order.

        The largest come first, so that processes that share the work finish at about the same time.
        """
        kernels = [kernel for kernel in declared() if kernel.module not in self._without]
        return sorted(kernels, key=lambda kernel: kernel.size, reverse=True)


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
