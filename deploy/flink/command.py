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
from typing import Any

import psutil

from deploy.children.ending import has_ended
from deploy.flink import jars, looking
from deploy.flink.cluster import Cluster
from deploy.flink.ending import end_jobs
from deploy.flink.process_plan import ports
from deploy.startup.checks import require_disk, require_ports
from deploy.up import Signals
from state import layout
from state.config.loading import load
from state.config.settings import Settings
from state.config.sources import split_settings
from state.disk.lock import DirectoryLock
from state.errors import FlinkFailed, LockHeld, SettingsError, SpringtideError
from state.flink.rest import JobManager, url
from state.process.closed_output import while_read
from state.process.private_files import keep_private
from state.process.wall_clock import wall_ms

DESCRIPTION = """A Flink cluster on this machine, for the stream on a distributed runner: JobManager, TaskManagers, job server
and Python workers, as `[flink]` says. up runs it until Ctrl-C, and starts again what dies. down ends the jobs of a running
one by savepoint, then all of it. status shows TaskManagers, slots, jobs, their last checkpoints and restarts, and what a job
can be resumed from; what is wrong comes first, and makes the exit code 1. One's own cluster: deploy/flink/README.md."""
LEAST_FREE_BYTES = 1 << 30
DOWN_S = 90.0
LOOK_S = 0.1


def parser() -> argparse.ArgumentParser:
    """The command's words; settings are taken out before."""
    found = argparse.ArgumentParser(
        prog="springtide flink",
        description=DESCRIPTION,
        epilog="Settings are written --section.name VALUE; `springtide config flink` lists them. Exit codes: 0 done, 1 "
        "failed or something is wrong, 2 wrong use.",
        allow_abbrev=False,
    )
    found.add_argument("action", choices=("up", "down", "status"), help="what to do")
    found.add_argument(
        "--no-savepoint", action="store_true", help="down: cancel jobs at their newest checkpoint, without a savepoint"
    )
    found.add_argument("--url", help="status: the JobManager of another cluster, http://HOST:PORT")
    found.add_argument(
        "-o", "--output", choices=("text", "json"), default="text", help="status: how to print (default text)"
    )
    return found


def up(settings: Settings) -> int:
    """Runs the cluster until it is stopped; returns the exit code.

    1. Locks its directory; checks disk and ports. 2. Finds its jars, or fetches and merges them. 3. Runs it.

    Raises:
        SpringtideError: It cannot be started.
    """
    say = functools.partial(print, flush=True)
    # 1.
    require_disk(settings.flink_dir, LEAST_FREE_BYTES)
    with DirectoryLock(settings.flink_dir):
        require_ports(ports(settings.flink))
        # 2. Ctrl-C still ends it as it ends any program.
        jar = jars.merged_jar(say)
        # 3.
        signals = Signals()
        return Cluster(settings, say, signals.stop, signals.hurry).run(jar)


def down(settings: Settings, savepoint: bool) -> int:
    """Ends jobs and cluster; returns the exit code.

    Raises:
        FlinkFailed: None runs here, or it does not end.
    """
    supervisor = holder(settings.flink_dir)
    if supervisor is None:
        raise FlinkFailed(
            f"no cluster runs in {settings.flink_dir}", "correct paths.state, or end it where it was started"
        )
    # Here, so that what becomes of the jobs is said here. One whose JobManager is away has none to end.
    try:
        end_jobs(JobManager(url(settings)), functools.partial(print, flush=True), savepoint)
    except FlinkFailed as failure:
        print(f"{failure.what}: no job was ended", flush=True)
    with contextlib.suppress(psutil.NoSuchProcess):
        supervisor.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + DOWN_S
    while not has_ended(supervisor):
        if time.monotonic() >= deadline:
            raise FlinkFailed(
                f"process {supervisor.pid} did not end within {DOWN_S:.0f} s", f"see {settings.flink_dir / 'logs'}"
            )
        time.sleep(LOOK_S)
    print("Flink is down", flush=True)
    return 0


def holder(directory: Path) -> psutil.Process | None:
    """The process that runs the cluster of a directory; None where none does."""
    if not directory.is_dir():
        return None
    try:
        with DirectoryLock(directory):
            return None
    except LockHeld:
        try:
            written: dict[str, Any] = json.loads((directory / layout.LOCK).read_text())
            return psutil.Process(written["pid"])
        except (OSError, ValueError, KeyError, psutil.NoSuchProcess):
            # It has just started, or just ended.
            return None


def status(settings: Settings, other: str | None, output: str, now_ms: int) -> int:
    """Prints the cluster's state; returns 1 where something is wrong."""
    state = looking.look(settings, (other or url(settings)).rstrip("/"), now_ms, local=other is None)
    print(json.dumps(state, indent=2) if output == "json" else looking.as_text(state, now_ms))
    return int(looking.is_wrong(state))


def main(argv: Sequence[str] | None = None) -> int:
    """Does what the words say; returns the exit code."""
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
            return up(settings)
        if asked.action == "down":
            return down(settings, not asked.no_savepoint)
        return status(settings, asked.url, asked.output, wall_ms())
    except SpringtideError as error:
        print(f"springtide: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        return 1


if __name__ == "__main__":
    sys.exit(main())
