"""Sends clicks to the topic, from files or from synthetic shoppers whose taste drifts: `springtide replay`."""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from deploy.replaying.recording import (
    MAX,
    NAMED_LINES,
    Findings,
    Options,
    Outcome,
    RecordingSource,
    Replay,
    ReplayJournal,
    check,
    folder_of,
    key_of,
    parse_speed,
    try_out,
)
from deploy.replaying.sender import Outbox, Progress
from deploy.replaying.shoppers import Clicks, Pace, ShopperCrowd, burst, encode, let_click
from state.config.loading import load
from state.config.settings import Settings
from state.config.sources import split_settings
from state.disk.lock import DirectoryLock
from state.errors import LogError, SettingsError
from state.log import Topics, topic_plan
from state.process.commands import parser_of
from state.process.environment import wall_ms
from state.process.part import run_command, stop_on_signals
from state.recordings.files import as_settings, chosen, digest
from state.recordings.rows import NO_TIME, as_utc, left_out, mapped_fields, shown_reasons


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run_command("springtide replay", _main, argv)


def _main(arguments: Sequence[str]) -> None:
    flags, words = split_settings(arguments)
    options = parser_of("replay").parse_args(words)
    stopped = stop_on_signals()
    if bool(options.files) + options.synthetic + bool(options.burst) != 1:
        raise SettingsError("name what to replay: files, --synthetic, or --burst", "see `springtide replay --help`")
    if options.files and (options.rate is not None or options.seed is not None):
        raise SettingsError("--rate and --seed are for --synthetic", "use --speed for files")
    if options.dry_run and not options.files:
        raise SettingsError("--dry-run is for files", "name them")
    settings = load([*flags, *as_settings(options)])
    if options.files:
        _send_files(options, settings, stopped)
        return
    with Topics(settings.kafka) as topics:
        topics.ensure(*topic_plan.clicks(settings))
    _make_clicks(options, settings, stopped)


def _make_clicks(options: argparse.Namespace, settings: Settings, stopped: threading.Event) -> None:
    with Outbox(settings.kafka, settings.kafka.clicks_topic) as outbox:

        def send(clicks: Clicks) -> None:
            outbox.send(encode(clicks, settings.events))

        if options.burst:
            user, category, count = options.burst
            send(burst(user, category, int(count), wall_ms(), settings.events.actions[0]))
            print(f"sent {int(count)} clicks of one user in {category}", flush=True)
            return
        rate = settings.shoppers.rate if options.rate is None else options.rate
        speed = parse_speed(options.speed or "1x")
        # How long the shoppers' clock has run already; 0 without a pace.
        made_s = options.head_start / rate if rate > 0 and speed != MAX else 0.0
        shoppers = ShopperCrowd.from_settings(settings, options.seed, rate, int((time.time() - made_s) * 1000))
        started_s = time.monotonic()
        # At full speed the shoppers' clock keeps its rate, and there is no waiting.
        pace = Pace(0.0 if speed == MAX else rate, speed, options.limit, made_s / speed)
        sent = let_click(shoppers, send, pace, stopped)
        took_s = max(time.monotonic() - started_s, 1e-9)
        print(f"sent {sent} clicks in {took_s:.1f} s ({sent / took_s:.0f}/s)", flush=True)


def identity(source: RecordingSource, topic: str, topic_id: str) -> dict[str, Any]:
    """Returns what makes two runs the same replay: files by content, mapping, order, kind of time, and the topic."""
    recording, events, options = source.recording, source.events, source.options
    return {
        "files": [[digest(file.path), file.format, file.delimiter] for file in recording.files],
        "columns": list(recording.columns),
        "constants": dict(recording.constants or {}),
        "fields": [*mapped_fields(events), events.time, events.label, events.time_unit],
        "sort": options.sort,
        "time": "kept" if options.keep else "newest is now" if options.speed == MAX else "paced",
        "topic": [topic, topic_id],
    }


def _send_files(options: argparse.Namespace, settings: Settings, stopped: threading.Event) -> None:
    """Replays the files named on the command line.

    1. Check files, columns and mapping.
    2. With `--dry-run`, report the findings and stop.
    3. Contact Kafka, and send the rows.

    Raises:
        SpringtideError: The files, the settings or Kafka cannot be used, or another replay of the same files runs.
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
    source = RecordingSource(recording, events, how)
    # 1.
    now_ms = wall_ms()
    check(recording, events, now_ms + round(events.max_future_s * 1000))
    # 2.
    if options.dry_run:
        print(report(try_out(source, now_ms), len(recording.files), topic))
        return
    # 3.
    progress = Progress(sys.stderr, time.monotonic)
    with ExitStack() as stack:
        with Topics(settings.kafka) as topics:
            topic_id = topics.ensure(*topic_plan.clicks(settings)).topic_id
        folder = folder_of(settings.state_dir, key_of(identity(source, topic, topic_id)))
        stack.enter_context(DirectoryLock(folder))
        journal = ReplayJournal(folder)
        if options.restart:
            journal.forget()
        outbox = stack.enter_context(Outbox(settings.kafka, topic))
        try:
            outcome = Replay(source, outbox, journal, progress, stopped, wall_ms).run()
        except LogError:
            progress.say("Kafka stopped the replay; the same command resumes where it stopped")
            raise
    print(summary(outcome, topic, progress.took_s))


def summary(outcome: Outcome, topic: str, took_s: float) -> str:
    """Describes the result of a run and how to continue."""
    position = outcome.position
    if position.complete and not outcome.sent:
        return f"all {position.acknowledged:,} rows are in {topic} already; --restart sends them again"
    sent = f"sent {outcome.sent:,} rows to {topic} in {took_s:.1f} s ({outcome.sent / took_s:,.0f} rows/s)"
    parts = [f"{outcome.clicks:,} clicks", shown_reasons(position.refused)]
    if outcome.late:
        parts.append(f"{outcome.late:,} rows were late")
    if position.unsendable:
        parts.append(f"{position.unsendable:,} too large to send")
    total = "" if outcome.total is None else f" of {outcome.total:,}"
    state = "complete" if position.complete else f"row {position.acknowledged:,}{total}; the same command resumes there"
    lines = [left_out(position.refused, position.acknowledged), f"{sent}: {', '.join(parts)}; {state}"]
    return "\n".join(line for line in lines if line)


def report(findings: Findings, files: int, topic: str) -> str:
    """Formats the findings of a dry run.

    >>> print(report(Findings(9, {"wrong_type": (3, ["a.csv:4", "a.csv:7"])}, [], ['{"user":"u"}']), 1, "clicks"))
    9 rows of 1 file: 6 clicks, 3 dead letters (3 wrong_type)
    WARNING: 33 % of the rows are left out: 3 dead letters (3 wrong_type)
    wrong_type: a.csv:4, :7 and 1 more
    the first events as they would be sent to clicks:
      {"user":"u"}
    nothing was sent: without --dry-run the same command sends the rows
    """
    counts = {reason: count for reason, (count, _) in findings.refused.items()}
    warning = left_out(counts, findings.rows)
    unsendable = f", {len(findings.unsendable):,} too large to send" if findings.unsendable else ""
    lines = [
        f"{findings.rows:,} rows of {files} file{'s' * (files != 1)}: {findings.clicks:,} clicks, "
        f"{shown_reasons(counts)}{unsendable}",
        *([warning] if warning else []),
    ]
    named = {reason: locations for reason, (_, locations) in findings.refused.items()} | {
        "too large to send": findings.unsendable
    }
    for reason, locations in named.items():
        more = counts.get(reason, len(locations)) - len(locations[:NAMED_LINES])
        if locations:
            lines.append(f"{reason}: {_listed(locations[:NAMED_LINES])}{f' and {more:,} more' if more else ''}")
    if findings.stray:
        lines.append(findings.stray)
    if findings.recorded[0] != NO_TIME:
        lines.append(f"recorded {_span(findings.recorded)}, sent as {_span(findings.sent)}")
    if findings.first:
        lines += [f"the first events as they would be sent to {topic}:", *(f"  {value}" for value in findings.first)]
    return "\n".join([*lines, "nothing was sent: without --dry-run the same command sends the rows"])


def _listed(locations: Sequence[str]) -> str:
    files = ["", *(location.rpartition(":")[0] for location in locations)]
    return ", ".join(
        location.removeprefix(before) if file == before else location
        for location, file, before in zip(locations, files[1:], files, strict=False)
    )


def _span(span: tuple[int, int]) -> str:
    return f"{as_utc(span[0])} to {as_utc(span[1])}"


if __name__ == "__main__":
    sys.exit(main())
