"""What `springtide status --wait-for` waits for: each condition looks at the running loop and says what is still missing.

Looks cost some milliseconds; a part that does not answer is what is missing.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from deploy.operate.versions import open_registry
from deploy.watch import scrape
from deploy.watch.address import serving_address
from deploy.watch.figures import Watch
from deploy.watch.kafka_lag import kafka_lag
from deploy.watch.panel import wrong
from state.config.settings import Settings
from state.errors import RegistryError, SettingsError, SpringtideError
from state.registry.control import Control
from state.registry.registry import Registry

LOOK_S = 0.2
NEAR_RECORDS = 64  # what the applier takes at once
BETWEEN_S = 1.0  # rates come from two looks

Missing = Callable[[Settings], str]
"""Looks once; returns what is missing, and nothing where the condition holds."""


class Condition(NamedTuple):
    """One condition.

    Attributes:
        meaning: What holds then, in words.
        missing: Looks.
    """

    meaning: str
    missing: Missing


def wait(
    settings: Settings,
    name: str,
    timeout_s: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> float:
    """Waits for a condition, see `condition_of`; returns the seconds that it took.

    Raises:
        SpringtideError: It did not come in time; with what was missing.
    """
    began_s = clock()
    condition = condition_of(name)
    while missing := _looked(condition, settings):
        if clock() - began_s >= timeout_s:
            raise SpringtideError(
                f"{name}: not within {timeout_s:g} s: {missing}", "look at `springtide status`, or wait longer"
            )
        sleep(LOOK_S)
    return clock() - began_s


def _looked(condition: Condition, settings: Settings) -> str:
    try:
        return condition.missing(settings)
    except SpringtideError as error:
        # It may come yet: the loop may just be starting.
        return str(error)


def ready(settings: Settings) -> str:
    """Serving says that it can answer."""
    code, said = scrape.fetch(serving_address(settings, "/readyz"))
    return "" if code == 200 else said or "nothing answers"


def well(settings: Settings) -> str:
    """Nothing is wrong; what an operator wanted is not."""
    asked, looks = scrape.watched_urls(settings), Watch(spread_s=None)
    begin_s = time.monotonic()
    looks.look(scrape.scrape(asked), begin_s, time.time())
    kafka = kafka_lag(settings)
    time.sleep(max(0.0, begin_s + BETWEEN_S - time.monotonic()))
    return ", ".join(wrong(looks.look(scrape.scrape(asked), time.monotonic(), time.time()).with_kafka(kafka)))


def caught_up(settings: Settings) -> str:
    """The trainer works in control's epoch and has learned again what a rollback took back."""
    registry, control = _control(settings)
    trainer = scrape.scrape({"trainer": scrape.urls(settings)["trainer"]})["trainer"]
    if trainer.problem:
        return trainer.problem
    if (epoch := trainer.value("springtide_trainer_epoch")) != control.epoch:
        return f"the trainer is in epoch {epoch or 0:.0f}, and epoch {control.epoch} is wanted"
    if not trainer.value("springtide_trainer_caught_up"):
        lag = trainer.value("springtide_trainer_lag_records")
        return "the trainer is starting" if lag is None else f"the trainer is {lag:,.0f} records behind"
    began = registry.beginning_of(control.epoch)
    if began is not None and began.action == "rollback" and registry.outcome(control.epoch, "learned") is None:
        return "what was learned before the rollback is not learned again yet"
    return ""


def answering(settings: Settings) -> str:
    """Answers of this host come from a version that control wants."""
    registry, control = _control(settings)
    return _unlike(registry, control, _applier(settings))


def following(settings: Settings) -> str:
    """Answers follow the newest version, and come from control's epoch already, with the histories that belong to it."""
    registry, control = _control(settings)
    if control.serving.mode != "follow":
        return f"answers are to stay at version {control.serving.version}: `springtide follow` lets them go"
    applier = _applier(settings)
    if missing := _unlike(registry, control, applier):
        return missing
    epoch, lag = (applier.value(f"springtide_serving_{name}") for name in ("history_epoch", "microbatch_lag_records"))
    if epoch != control.log[-1].epoch:
        return f"the histories are of epoch {epoch or 0:.0f} of the log, and epoch {control.log[-1].epoch} is wanted"
    return "" if (lag or 0) <= NEAR_RECORDS else f"the histories are {lag:,.0f} records behind"


def _applier(settings: Settings) -> scrape.Scrape:
    return scrape.scrape({"applier": scrape.urls(settings)["applier"]})["applier"]


def _unlike(registry: Registry, control: Control, applier: scrape.Scrape) -> str:
    """In what answers differ from what control wants."""
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
    learned = registry.outcome(control.epoch, "learned")
    if learned is None or learned["rows"] > learned["masked"]:
        return False
    newest = max((*registry.versions(), *registry.recents()))
    return registry.either(newest).epoch < control.epoch


CONDITIONS: Mapping[str, Condition] = {
    "ready": Condition("serving can answer", ready),
    "well": Condition("nothing is wrong", well),
    "answering": Condition("answers come from what control wants: the pinned version, or control's epoch", answering),
    "caught-up": Condition("the trainer has read its log to the end, and learned a rollback's clicks again", caught_up),
    "following": Condition("answers follow the newest version of control's epoch, with its histories", following),
}


NUMBERS: Mapping[str, tuple[str, str]] = {
    "version": ("trainer", "springtide_trainer_version"),
    "epoch": ("trainer", "springtide_trainer_epoch"),
    "answers": ("applier", "springtide_serving_version"),
}
"""What may be compared with a number -> process and series."""


def condition_of(text: str) -> Condition:
    """The condition that an operator wrote: one of `CONDITIONS`, or one of `NUMBERS` with = or >= and a number.

    >>> condition_of("answers=176").meaning
    'answers is 176'

    Raises:
        SettingsError: It is none.
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
        found = scrape.scrape({process: scrape.urls(settings)[process]})[process]
        value = found.value(series)
        if found.problem or value is None:
            return found.problem or f"{name} is not known yet"
        return "" if value == number or (sign == ">=" and value > number) else f"{name} is {value:.0f}"

    return Condition(f"{name} is {number}{' or more' * (sign == '>=')}", missing)


def _control(settings: Settings) -> tuple[Registry, Control]:
    registry = open_registry(settings)
    control = registry.control()
    if control is None:
        raise RegistryError(f"{registry.path}: no control yet", "start the trainer first, it writes generation 1")
    return registry, control
