"""Start and end of a process: private files, log lines under its name, settings, signals, exit code.

It also filters the startup chatter of native libraries out of standard error.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TextIO

from state.config.loading import load
from state.config.settings import Settings
from state.errors import ProgramError, SettingsError, SpringtideError, of_disk
from state.process import log_lines
from state.process.private_files import keep_private

Work = Callable[[], int | None]
Check = Callable[[Settings, Path | None], str]

_PR_SET_PDEATHSIG = 1

_TALK = re.compile(
    rb"WARNING: All log messages before absl::InitializeLog"
    rb"|[IWE]\d{4} \d\d:\d\d:\d\d\.\d+ |[IWE]0000 00:00:\d+\.\d+ "
    rb"|INFO: Created TensorFlow Lite"
    rb"|To enable the following instructions:"
    # The LiteRT converter prints these in addition to its exception, which contains all of it.
    rb"|loc\(.*error: |error: failed while converting|Some ops |(Custom|TF Select) ops: |Details:|\ttf\.\w+\(|\s*$"
)
_TURN = threading.Lock()

OPTIONS_READ = "options_read.json"
"""File next to a kept graph with the names of the `model.options` that the preprocessing read."""


def run_part(
    name: str, work: Callable[[Settings], int | None], argv: Sequence[str] | None, logger: logging.Logger
) -> int:
    """Runs a process whose command line has only settings, see `run_process`."""

    def start(words: Sequence[str]) -> tuple[Settings, Work]:
        settings = load(words)
        return settings, lambda: work(settings)

    return run_process(name, start, argv, logger)


def run_process(
    name: str,
    start: Callable[[Sequence[str]], tuple[Settings, Work]],
    argv: Sequence[str] | None,
    logger: logging.Logger,
    stream: TextIO | None = None,
    level: int = logging.INFO,
) -> int:
    """Runs a process: private files, log lines under its name, settings, and one line for the error that ends it.

    Returns the exit code.

    Args:
        name: Name of the process in its log lines.
        start: Parses the command line; returns the settings and the work, which returns the exit code, None for 0.
        argv: The command line; None for that of this process.
        logger: Logs the error that ended the process.
        stream: Where log lines are written; None for standard error.
        level: The lowest level that is logged.
    """
    keep_private()
    log_lines.begin(name, stream, level)

    def run() -> int | None:
        settings, work = start(list(sys.argv[1:] if argv is None else argv))
        log_lines.follow(settings.logs)
        return work()

    try:
        return reported(run, logger)
    except KeyboardInterrupt:
        logger.error("stopped")
        return 1


def run_command(
    program: str,
    work: Callable[[Sequence[str]], int | None],
    argv: Sequence[str] | None,
    errors: TextIO | None = None,
) -> int:
    """Runs a command, and prints the error that ends it in one line; returns the exit code.

    The code is 0 if the reader of standard output closed the pipe. `head`, for example, closes it after ten lines.

    Args:
        program: Name of the command in its errors.
        work: Runs the command with its arguments; returns the exit code, None for 0.
        argv: The arguments; None for those of this process.
        errors: Where the error is printed; None for standard error.
    """

    def run() -> int:
        try:
            return work(sys.argv[1:] if argv is None else argv) or 0
        except BrokenPipeError:
            raise
        except (SpringtideError, OSError) as problem:
            error = of_disk(problem)
            print(f"{program}: {error}", file=errors or sys.stderr, flush=True)
            return error.exit_code
        except KeyboardInterrupt:
            return 1

    try:
        code = run()
        # Flushes here, where a broken pipe can be caught, rather than at Python's exit.
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes again at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def run_tensorflow_command(
    name: str, work: Callable[[Sequence[str], TextIO], int | None], argv: Sequence[str] | None
) -> int:
    """Runs a command that loads TensorFlow; returns the exit code.

    TensorFlow's chatter is kept from the stream that `work` gets for standard error. Log lines have the `name`.
    """
    with own_stderr() as errors:
        log_lines.begin(name, errors, logging.WARNING)
        quiet_tensorflow(os.environ)
        return run_command("springtide", lambda words: work(words, errors), argv, errors)


def run_check(argv: Sequence[str] | None, option: str, check: Check) -> int:
    """Runs a check on the settings and the directory that `option`, such as `--keep`, names; returns the exit code.

    Prints the check's result, one line, or its error to standard error.
    """

    def work(words: Sequence[str], errors: TextIO) -> None:
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument(option, dest="folder", type=Path)
        args, flags = parser.parse_known_args(words)
        settings = load(flags, os.environ)
        with quiet_stderr():
            result = check(settings, args.folder)
        print(result)

    return run_tensorflow_command("check", work, argv)


def run_child(module: str, words: Sequence[str], environment: Mapping[str, str]) -> str:
    """Runs a module as a command in a process of its own; returns its output.

    Raises:
        SettingsError: It ended with status 2; the message is its own.
        ProgramError: It ended with another status than 0; the message is its own.
    """
    child = subprocess.run(
        [sys.executable, "-m", module, *words], env=environment, capture_output=True, text=True, check=False
    )
    if child.returncode == 0:
        return child.stdout.strip()
    lines = [line.strip() for line in child.stderr.splitlines() if line.strip()]
    message = lines[-1].removeprefix("springtide: ") if lines else f"{module} ended with {child.returncode} in silence"
    raise (SettingsError if child.returncode == SettingsError.exit_code else ProgramError)(message)


def stop_on_signals() -> threading.Event:
    """Returns an event that SIGTERM and SIGINT set from now on; call it in the main thread."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


class Signals:
    """Counts SIGINT, SIGTERM and SIGHUP: the first asks to stop, the second to stop at once."""

    def __init__(self) -> None:
        self.count = 0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._take)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.count += 1

    def stop(self) -> bool:
        """Returns whether to stop."""
        return self.count > 0

    def hurry(self) -> bool:
        """Returns whether to stop at once."""
        return self.count > 1


def die_with(parent: int, signal_number: signal.Signals = signal.SIGKILL) -> Callable[[], None]:
    """Returns a function that binds a child to its parent; the child calls it between fork and exec, or later.

    The kernel then ends the child with the signal `signal_number` when the parent's thread that started it ends.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def arrange() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal_number)
            # The parent may have ended before prctl was called.
            if os.getppid() != parent:
                os._exit(1)

    return arrange


def reported(work: Callable[[], int | None], logger: logging.Logger) -> int:
    """Runs a process's work; returns its exit code, and logs an error that ends it in one line with its class."""
    try:
        return work() or 0
    except (SpringtideError, OSError) as problem:
        error = of_disk(problem)
        logger.error("%s: %s", type(error).__name__, error)
        return error.exit_code


def is_talk(line: bytes) -> bool:
    """Whether a line is chatter."""
    return _TALK.match(line) is not None


def quiet_tensorflow(environment: MutableMapping[str, str]) -> None:
    """Lowers TensorFlow's log level and hides a missing GPU driver. Call it before TensorFlow is loaded."""
    environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        environment.setdefault("CUDA_VISIBLE_DEVICES", "-1")


def own_stderr() -> TextIO:
    """The current standard error as a stream that `quiet_stderr` does not hold back, for the process's own log."""
    return os.fdopen(os.dup(2), "w", buffering=1)


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Buffers the process's output to standard error inside the block, then writes all of it except the chatter."""
    sys.stderr.flush()
    # The descriptor belongs to the whole process, so threads take turns. A memory file works even on a full disk.
    with _TURN, os.fdopen(os.memfd_create("stderr"), "w+b") as buffer:
        descriptor = os.dup(2)
        os.dup2(buffer.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(descriptor, 2)
            buffer.seek(0)
            for line in buffer:
                if not is_talk(line):
                    os.write(descriptor, line)
            os.close(descriptor)
