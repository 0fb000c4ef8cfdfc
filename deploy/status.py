"""Reports what runs and how well: `springtide status [-o json] [--watch | --wait-for CONDITION]`."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from deploy import sections
from deploy.formats import seconds
from deploy.operate.control import current
from deploy.operate.versions import open_registry
from deploy.startup.hints import addresses
from deploy.watch import scrape
from deploy.watch.panel import Screen, lines, live_line, panel
from deploy.watch.scrape import Scrape, serving_address
from deploy.watch.snapshot import Poller, Snapshot
from state.config.loading import load
from state.config.settings import Settings
from state.errors import SettingsError, SpringtideError
from state.process.commands import parser_of
from state.process.environment import wall_ms
from state.process.part import run_command, stop_on_signals
from state.registry.control import Control
from state.registry.registry import Registry

POLL_S = 0.2
NEAR_RECORDS = 64  # the applier's batch size
Missing = Callable[[Settings], str]
"""Polls once; returns what is missing, or an empty text if the condition holds."""
NUMBERS: Mapping[str, tuple[str, str]] = {
    "version": ("trainer", "springtide_trainer_version"),
    "epoch": ("trainer", "springtide_trainer_epoch"),
    "answers": ("applier", "springtide_serving_version"),
}
"""Names that a condition may compare with a number -> process and series."""
BETWEEN_S = 1.0
PARTS = (16, 12)


class Condition(NamedTuple):
    """A condition: its meaning in words, and what polls it."""

    meaning: str
    missing: Missing


def wait(settings: Settings, name: str, timeout_s: float) -> float:
    """Waits for a condition, see `condition_of`; returns the seconds that it took.

    Raises:
        SpringtideError: It did not hold in time; the message says what was missing.
    """
    began_s = time.monotonic()
    condition = condition_of(name)
    while missing := _looked(condition, settings):
        if time.monotonic() - began_s >= timeout_s:
            raise SpringtideError(
                f"{name}: not within {timeout_s:g} s: {missing}", "look at `springtide status`, or wait longer"
            )
        time.sleep(POLL_S)
    return time.monotonic() - began_s


def _looked(condition: Condition, settings: Settings) -> str:
    try:
        return condition.missing(settings)
    except SpringtideError as error:
        # The loop may still be starting, so keep waiting.
        return str(error)


def ready(settings: Settings) -> str:
    """Serving reports that it can answer."""
    code, body = scrape.fetch(serving_address(settings, "/readyz"))
    return "" if code == 200 else body or "nothing answers"


def well(settings: Settings) -> str:
    """No problem needs action."""
    return ", ".join(problem.text for problem in take(settings).faults)


def caught_up(settings: Settings) -> str:
    """The trainer works in control's epoch and has relearned the clicks of a rollback."""
    registry, control = _control(settings)
    trainer = scrape.scrape_one(settings, "trainer")
    if trainer.problem:
        return trainer.problem
    if (epoch := trainer.value("springtide_trainer_epoch")) != control.epoch:
        return f"the trainer is in epoch {epoch or 0:.0f}, and epoch {control.epoch} is wanted"
    if not trainer.value("springtide_trainer_caught_up"):
        lag = trainer.value("springtide_trainer_lag_records")
        return "the trainer is starting" if lag is None else f"the trainer is {lag:,.0f} records behind"
    began = registry.generations.beginning_of(control.epoch)
    if (
        began is not None
        and began.action == "rollback"
        and registry.generations.outcome(control.epoch, "learned") is None
    ):
        return "the clicks since the rollback point are still being learned again"
    return ""


def answering(settings: Settings) -> str:
    """Answers of this host come from a version that control wants."""
    registry, control = _control(settings)
    return _unlike(registry, control, scrape.scrape_one(settings, "applier"))


def following(settings: Settings) -> str:
    """Answers follow the newest version, and come from control's epoch already, with the histories that belong to it."""
    registry, control = _control(settings)
    if control.serving.mode != "follow":
        return f"answers are pinned to version {control.serving.version}: `springtide follow` unpins them"
    applier = scrape.scrape_one(settings, "applier")
    if missing := _unlike(registry, control, applier):
        return missing
    epoch, lag = (applier.value(f"springtide_serving_{name}") for name in ("history_epoch", "microbatch_lag_records"))
    if epoch != control.log[-1].epoch:
        return f"the histories belong to epoch {epoch or 0:.0f} of the log, and epoch {control.log[-1].epoch} is wanted"
    return "" if (lag or 0) <= NEAR_RECORDS else f"the histories are {lag:,.0f} records behind"


def _unlike(registry: Registry, control: Control, applier: scrape.Scrape) -> str:
    """Returns how answers differ from what control requires; empty if they do not."""
    if applier.problem:
        return applier.problem
    version, epoch = (applier.value(f"springtide_serving_{name}") or 0.0 for name in ("version", "epoch"))
    if control.serving.version is not None:
        is_wanted, wanted = version == control.serving.version, f"version {control.serving.version}"
    else:
        is_wanted, wanted = epoch == control.epoch, f"a version of epoch {control.epoch}"
        is_wanted |= version == control.base and _learned_nothing(registry, control)
    return "" if is_wanted else f"answers come from version {version:.0f} of epoch {epoch:.0f}, and {wanted} is wanted"


def _learned_nothing(registry: Registry, control: Control) -> bool:
    """Whether control's epoch has caught up without a row to learn from: until a click comes it has only its base."""
    learned = registry.generations.outcome(control.epoch, "learned")
    if learned is None or learned["rows"] > learned["masked"]:
        return False
    newest = max((*registry.versions(), *registry.recents()))
    return registry.either(newest).epoch < control.epoch


CONDITIONS: Mapping[str, Condition] = {
    "ready": Condition("serving can answer", ready),
    "well": Condition("nothing is wrong", well),
    "answering": Condition(
        "answers use the version that control requires: the pinned one, or one of control's epoch", answering
    ),
    "caught-up": Condition(
        "the trainer has read the training log to its end, and has relearned the clicks of a rollback", caught_up
    ),
    "following": Condition(
        "answers follow the newest version of control's epoch, and the histories are up to date", following
    ),
}


def condition_of(text: str) -> Condition:
    """Returns the condition that an operator wrote: one of `CONDITIONS`, or one of `NUMBERS` with = or >= and a number.

    >>> condition_of("answers=176").meaning
    'answers is 176'

    Raises:
        SettingsError: It is not a condition.
    """
    if text in CONDITIONS:
        return CONDITIONS[text]
    match = re.fullmatch(rf"({'|'.join(NUMBERS)})(>=|=)(\d+)", text)
    if match is None:
        known = ", ".join((*CONDITIONS, *(f"{name}>=N" for name in NUMBERS)))
        raise SettingsError(f"--wait-for {text}: no such condition", f"take one of {known}, or = in place of >=")
    name, sign, number = match[1], match[2], int(match[3])
    process, series = NUMBERS[name]

    def missing(settings: Settings) -> str:
        metrics = scrape.scrape_one(settings, process)
        value = metrics.value(series)
        if metrics.problem or value is None:
            return metrics.problem or f"{name} is not known yet"
        return "" if value == number or (sign == ">=" and value > number) else f"{name} is {value:.0f}"

    return Condition(f"{name} is {number}{' or more' * (sign == '>=')}", missing)


def _control(settings: Settings) -> tuple[Registry, Control]:
    registry = open_registry(settings)
    return registry, current(registry)


EPILOG = (
    "Conditions: "
    + "; ".join(f"{name}: {condition.meaning}" for name, condition in CONDITIONS.items())
    + ". Settings are written --section.name VALUE; `springtide config` lists them. Exit codes: 0 nothing is wrong, or the "
    "condition holds; 1 something is wrong, or the condition timed out; 2 wrong use."
)


def processes(scrapes: Mapping[str, Scrape], up_s: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Returns by process whether it answers, why not, since when it is up, and its memory.

    >>> processes({"worker": Scrape(problem="refused")}, {})["worker"]
    {'answers': False, 'problem': 'refused', 'up_s': None, 'memory_bytes': None}
    """
    return {
        name: {
            "answers": not scraped.problem,
            "problem": scraped.problem,
            "up_s": up_s.get(name),
            "memory_bytes": scraped.value("process_resident_memory_bytes"),
        }
        for name, scraped in scrapes.items()
    }


def take(settings: Settings, between_s: float = BETWEEN_S) -> Snapshot:
    """Returns a snapshot with all sections; the two polls for the rates are at least `between_s` apart."""
    poller, begin_s = Poller(settings, spread_s=None), time.monotonic()
    first = poller.poll()
    # The other parts are queried between the two polls.
    states = sections.read(settings, wall_ms())
    if first.figures.up_s:
        time.sleep(max(0.0, begin_s + between_s - time.monotonic()))
    return poller.poll().having(states)


def document(settings: Settings, snapshot: Snapshot) -> dict[str, Any]:
    """Returns a snapshot as JSON values, for `-o json` and the page."""
    urls = scrape.urls(settings)
    return {
        "problems": [problem.to_json() for problem in snapshot.problems],
        "figures": snapshot.figures.to_json(),
        "processes": processes({name: snapshot.scrapes[name] for name in urls}, snapshot.figures.up_s),
        **snapshot.sections,
        **sections.measured(settings, snapshot.scrapes),
        "urls": {
            "profile": scrape.profile_url(settings, scrape.ANY_USER),
            "ready": serving_address(settings, "/readyz"),
            "metrics": urls,
        },
    }


def as_text(settings: Settings, snapshot: Snapshot) -> str:
    """Formats a snapshot as one screen of text: the figures, the sections, where to read more, and what to try."""
    state = document(settings, snapshot)
    rows = [
        (name, "runs" if process["answers"] else "unreachable", process["problem"] or f"up {seconds(process['up_s'])}")
        for name, process in state["processes"].items()
    ]
    rows += sections.labelled(state)
    table: list[Sequence[str]] = []
    for label, word, text in rows:
        first, *others = text.split("; ")
        table += [(label, word, first), *(("", "", other) for other in others)]
    links = [("see", f"{problem['runbook']} ({problem['text']})") for problem in state["problems"]]
    tries = addresses(settings, snapshot.figures.shoppers)
    return "\n".join(
        [*panel(snapshot, (), settings.serving.processes), "", *lines(table, PARTS), "", *lines([*links, *tries])]
    )


def watch(settings: Settings, screen: Screen, stop: Callable[[], bool], wait: Callable[[float], object]) -> None:
    """Redraws the figures until it is stopped; `wait` waits a number of seconds, or until the stop."""
    poller = Poller(settings)
    while not stop():
        snapshot = poller.poll()
        tries = addresses(settings, snapshot.figures.shoppers)[:1]
        screen.live(live_line(snapshot), panel(snapshot, tries, settings.serving.processes))
        wait(screen.every_s)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the state; returns the exit code."""
    return run_command("springtide", _main, argv)


def _main(words: Sequence[str]) -> int:
    parser = parser_of("status")
    parser.epilog = EPILOG
    args, flags = parser.parse_known_args(words)
    settings = load(flags)
    if args.wait_for is not None:
        took_s = wait(settings, args.wait_for, args.timeout)
        waited = {"condition": args.wait_for, "seconds": round(took_s, 3)}
        print(json.dumps(waited) if args.output == "json" else f"{args.wait_for} after {took_s:.1f} s")
        return 0
    if args.watch:
        if args.output == "json":
            raise SettingsError("--watch prints text only", "repeat `springtide status -o json` instead")
        stopping = stop_on_signals()
        watch(settings, Screen(), stopping.is_set, stopping.wait)
        print()
        return 0
    snapshot = take(settings)
    as_json = args.output == "json"
    print(json.dumps(document(settings, snapshot), indent=2) if as_json else as_text(settings, snapshot))
    return int(bool(snapshot.faults))


if __name__ == "__main__":
    sys.exit(main())
