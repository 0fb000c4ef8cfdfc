"""Prepares the kernels of a process before it reports ready: loads or compiles them, and exposes the progress."""

from __future__ import annotations

import importlib
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry

from state.compiled import Declared, declared
from state.metrics import KernelMetrics

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
