"""Rolls a trial out to a growing share of users: `springtide rollout NAME [--steps 1,5,50,100] [--every 30m]`.

The command stays in the foreground and drives the rollout until it is done, is rolled back, or Ctrl-C. Run again, it
continues where it was. While it does not run, shares stay as they are. `--halt`, `--resume`, `--back` and `--end`
change the rollout and return.
"""

from __future__ import annotations

import argparse
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial

from deploy.operate.options import SETTINGS_HELP
from deploy.operate.times import age
from deploy.rollouts.driving import RolloutDriver
from state import http, layout
from state.config.loading import load
from state.config.settings import Settings
from state.config.spans import span_ms
from state.disk.lock import DirectoryLock
from state.errors import (
    GapError,
    LogError,
    RegistryError,
    SettingsError,
    SpringtideError,
    UnknownTopic,
)
from state.log import Log, topic_plan
from state.process.actor import actor
from state.process.closed_output import while_read
from state.process.ending import stop_on_signals
from state.process.said_once import SaidOnce
from state.process.wall_clock import wall_ms
from state.rollouts import rollout
from state.rollouts.report import as_lines
from state.rollouts.rollout import EVERY_S, GATE, STEPS, Rollout
from state.rollouts.rollouts import Rollouts

Say = Callable[[str], None]
VERBS = {"halt": rollout.halt, "resume": rollout.resume, "back": rollout.back, "end": rollout.end}
RETRY_S = 1.0
LOOK_S, READY_S = 0.25, 2.0
"""Interval between two checks that the trial answers, and the timeout of a check."""


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command; settings are parsed separately."""
    made = argparse.ArgumentParser(
        prog="springtide rollout",
        description="Serve a growing share of the users with a trial, whose workers are at rollout.address. The gate continues, halts or "
        "rolls back depending on engagements, failures, latency and the sample ratio. The command runs until the rollout is "
        "over; run it again to resume.",
        epilog=SETTINGS_HELP,
        allow_abbrev=False,
    )
    made.add_argument("name", metavar="NAME", help="name of the trial")
    shown = ",".join(f"{one:g}" for one in STEPS)
    made.add_argument(
        "--steps",
        type=_steps,
        default=STEPS,
        metavar="P,P,...",
        help=f"share of the users in each step, in percent (default {shown})",
    )
    made.add_argument("--every", type=_duration, default=EVERY_S, metavar="T", help="duration of a step (default 30m)")
    alone = made.add_mutually_exclusive_group()
    alone.add_argument("--halt", action="store_true", help="halt the rollout at its current share")
    alone.add_argument("--resume", action="store_true", help="resume the rollout; its step starts again")
    alone.add_argument(
        "--back", action="store_true", help="roll back: the live versions answer all users again, within a second"
    )
    alone.add_argument(
        "--end",
        action="store_true",
        help="end the rollout without a verdict against the trial, for example after its promotion",
    )
    made.add_argument("--reason", default="none given", metavar="TEXT", help="reason; recorded with your name")
    return made


def run(settings: Settings, asked: argparse.Namespace, log: Log, stop: threading.Event, say: Say) -> None:
    """Runs the command.

    Raises:
        SettingsError: The steps are invalid, or no address is set.
        ControlConflict: Another rollout is open, or this one cannot make the requested change.
        LogError: Kafka does not answer.
    """
    rollouts = Rollouts(settings.registry_dir)
    for verb, transition in VERBS.items():
        if getattr(asked, verb):
            decided = partial(transition, actor=actor(), reason=asked.reason, now_ms=wall_ms())
            say(_told(rollouts.change(decided, asked.name)))
            return
    if not settings.rollout.address:
        raise SettingsError(
            "rollout.address is not set: no worker knows where the trial answers",
            "set it for this command and for `springtide up`, which runs the trial's workers at an address of its machine such "
            "as http://127.0.0.1:8601; elsewhere start them first (`springtide serve` with the trial's registry and a state "
            "directory of its own)",
        )
    with DirectoryLock(settings.registry_dir / layout.ROLLOUTS):
        drive(settings, asked, log, rollouts, stop, say)


def drive(
    settings: Settings, asked: argparse.Namespace, log: Log, rollouts: Rollouts, stop: threading.Event, say: Say
) -> None:
    """Starts the rollout, or continues it, until it is over or `stop` is set."""
    newest = rollouts.newest()
    if newest is None or newest.name != asked.name or newest.is_over:
        started = rollout.start(
            newest, asked.name, asked.steps, asked.every, _places(settings, log),
            actor=actor(), reason=asked.reason, now_ms=wall_ms(),
        )  # fmt: skip
        newest = rollouts.propose(started)
    say(_told(newest))
    complain, driver = SaidOnce(lambda _, line: print(line, file=sys.stderr)), None
    begun = _when_it_answers(settings, rollouts, newest, stop, complain)
    if begun is not newest:
        newest = begun
        say(_told(newest))
    while not stop.is_set():
        try:
            driver = driver or RolloutDriver(settings, log, rollouts, newest, wall_ms)
            now = driver.step()
        except (GapError, UnknownTopic, LogError, RegistryError) as error:
            complain(f"{error}; shares stay as they are, and it is tried again")
            if driver is not None:
                driver.close()
                driver = None
            stop.wait(RETRY_S)
            continue
        if now.generation != newest.generation:
            newest = now
            say(_told(newest))
        if newest.phase not in ("running", "halted") or newest.name != asked.name:
            break
    if driver is not None:
        found, history = driver.report(), rollouts.history(asked.name)
        driver.keep()
        driver.close()
        for line in as_lines(found, history):
            say(line)


def _when_it_answers(
    settings: Settings, rollouts: Rollouts, newest: Rollout, stop: threading.Event, complain: Callable[[str], None]
) -> Rollout:
    """Waits until the trial answers, the rollout is ended, or `stop` is set; returns the newest generation.

    Without the wait, the trial would fail the requests of its first users.
    """
    while newest.phase == "starting" and not stop.is_set():
        status, why = http.ask(f"{settings.rollout.address}/readyz", READY_S)
        if status == 200:
            begins = partial(rollout.begin, actor=GATE, reason="the trial answers", now_ms=wall_ms())
            return rollouts.change(begins, newest.name)
        complain(f"the trial does not answer at {settings.rollout.address} yet ({status or why}): its first step waits")
        stop.wait(LOOK_S)
        newest = rollouts.newest() or newest
    return newest


def _places(settings: Settings, log: Log) -> tuple[int, int]:
    """Returns the end offsets of exposures and training log; creates the topic of exposures if it is missing."""
    kafka = settings.kafka
    with log.topics() as topics:
        topics.ensure(*topic_plan.exposures(settings))
        return (
            topics.ends(kafka.exposures_topic)[0][1],
            topics.ends(kafka.microbatches_topic)[settings.trainer.partition][1],
        )


def _told(one: Rollout) -> str:
    lasts = f", each step {age(one.every_s)}" if one.phase == "running" else ""
    return f"generation {one.generation}: {one.name} {one.phase}, {one.share:.4g} of the users{lasts} ({one.actor}: {one.reason})"


def _steps(text: str) -> tuple[float, ...]:
    try:
        steps = tuple(float(one) for one in text.split(","))
        rollout.require_steps(steps)
    except (ValueError, SettingsError):
        raise argparse.ArgumentTypeError(
            f"{text!r} are no steps: give ascending percentages such as 1,5,50,100"
        ) from None
    return steps


def _duration(text: str) -> float:
    """Parses a duration to seconds.

    >>> _duration("30m"), _duration("1.5s")
    (1800.0, 1.5)
    """
    if not (found_ms := span_ms(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no duration: write 30m, 2h or 90s")
    return found_ms / 1000


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    asked, flags = parser().parse_known_args(sys.argv[1:] if argv is None else argv)
    stop = stop_on_signals()
    # The Kafka client logs every attempt; the command reports each failure once.
    logging.getLogger("kafka").setLevel(logging.CRITICAL)
    try:
        settings = load(flags)
        run(settings, asked, Log(settings.kafka), stop, lambda line: print(line, flush=True))
    except SpringtideError as error:
        print(f"springtide rollout: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(while_read(main))
