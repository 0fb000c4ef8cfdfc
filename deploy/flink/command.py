"""`springtide flink up | down | status`: a Flink cluster on this machine, for a laptop and for tests."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from deploy.children.ending import has_ended
from deploy.flink import cluster, jars, status
from deploy.flink.cluster import LOGS, ports
from deploy.startup.checks import require_disk, require_ports
from deploy.up import Signals
from state import layout
from state.config.loading import load
from state.config.settings import Settings
from state.config.sources import split_settings
from state.disk.lock import DirectoryLock
from state.errors import FlinkFailed, LockHeld, SettingsError, SpringtideError
from state.flink import JobManager, url
from state.process.ending import while_read
from state.process.private_files import keep_private
from state.process.wall_clock import wall_ms

DESCRIPTION = """Run a Flink cluster on this machine for the stream on a distributed runner, as configured in `[flink]`: JobManager,
TaskManagers, job server and Python workers. up runs the cluster until Ctrl-C and restarts processes that exit. down stops the
jobs with a savepoint, then the cluster. status shows TaskManagers, slots, jobs, their last checkpoints and restarts, and the
savepoints and checkpoints to resume from; problems come first and set the exit code to 1. For your own cluster see
deploy/flink/README.md."""
EPILOG = (
    "Settings are written --section.name VALUE; `springtide config flink` lists them. Exit codes: 0 done, 1 failed or "
    "something is wrong, 2 wrong use."
)
LEAST_FREE_BYTES = 1 << 30
DOWN_S, POLL_S = 90.0, 0.1


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command; settings have been removed from the arguments before."""
    found = argparse.ArgumentParser(prog="springtide flink", description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False)
    found.add_argument("action", choices=("up", "down", "status"), help="action")
    found.add_argument(
        "--no-savepoint",
        action="store_true",
        help="down: cancel the jobs without a savepoint; they can resume from their newest checkpoint",
    )
    found.add_argument("--url", help="status: JobManager of another cluster, http://HOST:PORT")
    found.add_argument(
        "-o", "--output", choices=("text", "json"), default="text", help="status: output format (default text)"
    )
    return found


def up(settings: Settings) -> None:
    """Runs the cluster until it is stopped.

    Raises:
        SpringtideError: The cluster does not start.
    """
    say = functools.partial(print, flush=True)
    require_disk(settings.flink_dir, LEAST_FREE_BYTES)
    with DirectoryLock(settings.flink_dir):
        require_ports(ports(settings.flink))
        # Until the signal handlers are installed, Ctrl-C aborts the download of jars at once.
        jar = jars.merged_jar(say)
        signals = Signals()
        cluster.run(settings, jar, say, signals.stop, signals.hurry)


def down(settings: Settings, savepoint: bool) -> None:
    """Ends the jobs and the cluster.

    Raises:
        FlinkFailed: No cluster runs here, or it does not end.
    """
    say, directory = functools.partial(print, flush=True), settings.flink_dir
    supervisor = holder(directory)
    if supervisor is None:
        raise FlinkFailed(f"no cluster runs in {directory}", "correct paths.state, or end it where it was started")
    # Jobs are ended here rather than in the supervisor, so that this command reports what becomes of them.
    try:
        cluster.end_jobs(JobManager(url(settings)), say, savepoint)
    except FlinkFailed as failure:
        say(f"{failure.what}: no job was ended")
    with contextlib.suppress(psutil.NoSuchProcess):
        supervisor.send_signal(signal.SIGTERM)
    deadline_s = time.monotonic() + DOWN_S
    while not has_ended(supervisor):
        if time.monotonic() >= deadline_s:
            raise FlinkFailed(f"process {supervisor.pid} did not end within {DOWN_S:.0f} s", f"see {directory / LOGS}")
        time.sleep(POLL_S)
    say("Flink is down")


def holder(directory: Path) -> psutil.Process | None:
    """Returns the process that runs the cluster of a directory; None if none does."""
    if not directory.is_dir():
        return None
    try:
        with DirectoryLock(directory):
            return None
    except LockHeld:
        try:
            return psutil.Process(json.loads((directory / layout.LOCK).read_text())["pid"])
        except (OSError, ValueError, KeyError, psutil.NoSuchProcess):
            # The process has just started, or just ended.
            return None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    keep_private()
    return while_read(lambda: _main(sys.argv[1:] if argv is None else list(argv)))


def _main(words: Sequence[str]) -> int:
    try:
        flags, rest = split_settings(words)
        asked = parser().parse_args(rest)
        if asked.url is not None and (asked.action != "status" or not asked.url.startswith(("http://", "https://"))):
            raise SettingsError("--url is for status, and is written http://HOST:PORT")
        if asked.no_savepoint and asked.action != "down":
            raise SettingsError("--no-savepoint is for down")
        settings = load(flags)
        if asked.action == "up":
            up(settings)
        elif asked.action == "down":
            down(settings, not asked.no_savepoint)
        else:
            now_ms, other = wall_ms(), asked.url
            state = status.read(settings, (other or url(settings)).rstrip("/"), now_ms, local=other is None)
            print(json.dumps(state, indent=2) if asked.output == "json" else status.as_text(state, now_ms))
            return int(status.is_wrong(state))
        return 0
    except SpringtideError as error:
        print(f"springtide: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        return 1


if __name__ == "__main__":
    sys.exit(main())
