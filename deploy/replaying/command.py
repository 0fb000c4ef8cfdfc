"""The command `springtide replay FILE...`: its options, what it says, and where its parts come from."""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TextIO

from deploy.replaying.checking import check
from deploy.replaying.clock import MAX, parse_speed
from deploy.replaying.dry_run import report, try_out
from deploy.replaying.journal import ReplayJournal, folder_of, key_of
from deploy.replaying.options import Options
from deploy.replaying.progress import Progress
from deploy.replaying.replay import Outcome, replay
from deploy.replaying.sender import Outbox
from state.config.sections import Events
from state.config.settings import Settings
from state.disk.lock import DirectoryLock
from state.errors import LogError, SettingsError
from state.log import Topics, topic_plan
from state.process.wall_clock import wall_ms
from state.recordings.files import Recording, digest
from state.recordings.options import add_file_arguments, chosen
from state.recordings.rows import mapped_fields, shown_reasons


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of files; `--speed` and `--limit` are shared with the shoppers and not among them."""
    add_file_arguments(parser, "Only the columns in [events] are sent. The same command again goes on where it ended.")
    times = parser.add_mutually_exclusive_group()
    times.add_argument(
        "--rebase-time",
        action="store_false",
        dest="keep_time",
        default=False,
        help="move times to now (default): at --speed max the newest click is of now; at 60x the click being sent is",
    )
    times.add_argument("--keep-time", action="store_true", help="leave times as recorded")
    parser.add_argument(
        "--longest-wait",
        type=float,
        default=10.0,
        metavar="S",
        help="longest pause for a gap in the recording (default 10)",
    )
    parser.add_argument("--restart", action="store_true", help="send it again from the beginning")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="send nothing and ask no Kafka: counts, refused rows by reason and line, the first events",
    )


def identity(recording: Recording, events: Events, options: Options, topic: str, topic_id: str) -> dict[str, Any]:
    """What makes two runs the same replay: files by content, mapping, order, kind of time, and the topic."""
    return {
        "files": [[digest(file.path), file.format, file.delimiter] for file in recording.files],
        "columns": list(recording.columns),
        "constants": dict(recording.constants or {}),
        "fields": [*mapped_fields(events), events.time, events.label, events.time_unit],
        "sort": options.sort,
        "time": "kept" if options.keep else "newest is now" if options.speed == MAX else "paced",
        "topic": [topic, topic_id],
    }


def run(
    options: argparse.Namespace,
    settings: Settings,
    stopped: threading.Event,
    say: Callable[[str], None] = print,
    progress_to: TextIO = sys.stderr,
) -> None:
    """Replays the files of the command line.

    1. Files, columns and mapping are looked at.
    2. `--dry-run` ends with what it found.
    3. Kafka is asked, and the rows are sent.

    Raises:
        SpringtideError: Files, settings, Kafka or another replay of the same files are in the way.
    """
    events, topic = settings.events, settings.kafka.clicks_topic
    recording = chosen(options, events)
    how = Options(
        sort=options.sort,
        speed=parse_speed(options.speed or "max"),
        keep=options.keep_time,
        limit=options.limit,
        longest_wait_s=options.longest_wait,
    )
    if not how.longest_wait_s >= 0:
        raise SettingsError(f"--longest-wait {options.longest_wait:g}: write seconds, 0 or more")
    # 1.
    now_ms = wall_ms()
    check(recording, events, now_ms + round(events.max_future_s * 1000))
    # 2.
    if options.dry_run:
        say(report(try_out(recording, events, how, now_ms), len(recording.files), topic))
        return
    # 3.
    progress = Progress(progress_to, time.monotonic)
    with ExitStack() as stack:
        with Topics(settings.kafka) as topics:
            topic_id = topics.ensure(*topic_plan.clicks(settings)).topic_id
        folder = folder_of(settings.state_dir, key_of(identity(recording, events, how, topic, topic_id)))
        stack.enter_context(DirectoryLock(folder))
        journal = ReplayJournal(folder)
        if options.restart:
            journal.forget()
        outbox = stack.enter_context(Outbox(settings.kafka, topic))
        try:
            outcome = replay(recording, events, how, outbox, journal, progress, stopped, wall_ms)
        except LogError:
            progress.say("Kafka stopped the replay; the same command goes on where it was")
            raise
    say(summary(outcome, topic, progress.took_s))


def summary(outcome: Outcome, topic: str, took_s: float) -> str:
    """What a run did and how to go on."""
    position = outcome.position
    if position.complete and not outcome.sent:
        return f"all {position.acknowledged:,} rows are in {topic} already; --restart sends them again"
    done = f"sent {outcome.sent:,} rows to {topic} in {took_s:.1f} s ({outcome.sent / took_s:,.0f} rows/s)"
    parts = [f"{outcome.clicks:,} clicks", shown_reasons(position.refused)]
    if outcome.late:
        parts.append(f"{outcome.late:,} rows were late")
    if position.unsendable:
        parts.append(f"{position.unsendable:,} too large to send")
    of = "" if outcome.total is None else f" of {outcome.total:,}"
    state = (
        "complete" if position.complete else f"row {position.acknowledged:,}{of}; the same command goes on from there"
    )
    return f"{done}: {', '.join(parts)}; {state}"
