"""Stream processes that begin where their imports end: Beam takes 2 s of a core, and tests start some sixty of them.

One process imports the stream and forks itself for each; the end-to-end tests start `python -m streaming.pipeline`.
Each has its own process id, environment, arguments and standard error, and dies as any other.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import TimeoutExpired

from state.process import killpoints

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["streaming.pipeline", __name__])


class Forked:
    """A process that does what `python -m streaming.pipeline` does; used as `subprocess.Popen` is.

    Args:
        arguments: Its command line.
        environment: All of its environment.
        log: Where its standard error goes, after what is there.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        log.open("ab").close()
        self._process = _SERVER.Process(target=_run, args=(list(arguments), dict(environment), str(log)))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout_s: float) -> int:
        """The exit code, once it has ended."""
        self._process.join(timeout_s)
        code = self._process.exitcode
        if code is None:
            raise TimeoutExpired("streaming.pipeline", timeout_s)
        return code

    def send_signal(self, number: int) -> None:
        """Sends a signal; nothing happens where it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it at once."""
        self.send_signal(signal.SIGKILL)


def _run(arguments: Sequence[str], environment: Mapping[str, str], log: str) -> None:
    """What the new process does."""
    errors = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(errors, sys.stderr.fileno())
    os.close(errors)
    os.environ.clear()
    os.environ.update(environment)
    # It is the one module that reads the environment when it is imported.
    importlib.reload(killpoints)
    sys.argv = ["streaming.pipeline", *arguments]
    from streaming.pipeline import main

    sys.exit(main())
