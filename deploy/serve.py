"""Serving on one host: starts the applier and the workers, and stops them together: `springtide serve`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from deploy.supervisor import how
from state.config.loading import load
from state.errors import ProcessFailed, SpringtideError
from state.process.part import die_with
from state.process.private_files import keep_private

STOP_S = 10.0
POLL_S = 0.1


def commands(flags: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Returns names and command lines of a host's processes; all workers have one parent process.

    >>> [name for name, _ in commands([])]
    ['applier', 'workers']
    """
    python = [sys.executable, "-m"]
    return [
        ("applier", [*python, "deploy.serving.applier", *flags]),
        ("workers", [*python, "deploy.serving.rest", *flags]),
    ]


def run(
    programs: Sequence[tuple[str, Sequence[str]]],
    environment: Mapping[str, str],
    stopping: Callable[[], bool],
    stop_s: float = STOP_S,
) -> None:
    """Keeps `programs` running until `stopping` returns True, then ends them, the last one first.

    Raises:
        ProcessFailed: One program ended by itself; the others were stopped.
    """
    running: list[tuple[str, subprocess.Popen[bytes]]] = []
    try:
        for name, command in programs:
            # A session of its own: Ctrl-C goes to this process, which then stops the programs in order.
            process = subprocess.Popen(
                command, env=dict(environment), start_new_session=True, preexec_fn=die_with(os.getpid())
            )
            running.append((name, process))
        while not stopping():
            for name, process in running:
                if process.poll() is not None:
                    raise ProcessFailed(
                        f"{name} ended unasked ({how(process.returncode)})", "its reason is above; serving stops here"
                    )
            time.sleep(POLL_S)
    finally:
        for _, process in reversed(running):
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + stop_s
        for _, process in reversed(running):
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs serving with the settings of `argv` until a signal; returns the exit status."""
    keep_private()
    flags = list(sys.argv[1:] if argv is None else argv)
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: signals.append(number))
    try:
        drain_s = load(flags).serving.drain_s  # an invalid setting is reported once, not by each process
        run(commands(flags), os.environ, lambda: bool(signals), STOP_S + drain_s)
    except SpringtideError as error:
        print(f"springtide serve: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
