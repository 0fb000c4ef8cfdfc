"""Reports which processes of the loop are still starting, and which ones fall behind and by how much. Pure.

Both reports are texts by process, so that `status`, `up` and the page show the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from deploy.watch.messages import shown
from deploy.watch.scrape import Scrape

KERNELS = "springtide_kernels"
"""Prefix of two gauges of a process that compiles kernels: `_total` for all kernels, `_ready` for the compiled ones."""
LEAST_BETWEEN_S = 0.9
FEW_RECORDS = 100  # of the training log: about ten seconds
QUEUED_S = 10.0

# A process that answers on /metrics works once this gauge is known; a version number is known once it is not 0.
KNOWN_ONCE_WORKING = {
    "stream": "springtide_stream_lag_events",
    "trainer": "springtide_trainer_version",
    "applier": "springtide_serving_version",
}
# An operator or the guard stops training on purpose; this is reported separately.
HELD = ("held", "paused", "privacy_held")


class Backlog(NamedTuple):
    """The metrics that describe what waits for a process.

    Attributes:
        waiting: Name of the gauge with the number of waiting items.
        done: Name of the counter of processed items; empty if there is none.
        what: Name of the items in messages.
        most: How many may wait while their number grows.
        seconds: Name of the gauge with their waiting time, which is used instead of `most`; empty if there is none.
    """

    waiting: str
    done: str
    what: str
    most: int = FEW_RECORDS
    seconds: str = ""


BACKLOGS = {
    "stream": Backlog(
        "springtide_stream_lag_events", "springtide_stream_events_total", "clicks", 0, "springtide_stream_lag_seconds"
    ),
    "trainer": Backlog("springtide_trainer_lag_records", "springtide_trainer_rows_total", "records"),
    "applier": Backlog("springtide_serving_microbatch_lag_records", "springtide_serving_history_rows_total", "records"),
}


def state_of_up(up: Scrape) -> str:
    """Returns the state of `springtide up`: `starting` or `running`; empty if it does not answer.

    >>> from deploy.watch.scrape import parsed
    >>> state_of_up(Scrape(parsed("springtide_up_settled 0"))), state_of_up(Scrape())
    ('starting', '')
    """
    if not up.values:
        return ""
    return "starting" if up.value("springtide_up_settled") == 0 else "running"


def starting(scrapes: Mapping[str, Scrape]) -> dict[str, str]:
    r"""Returns, by process that answers on /metrics but does not work yet, what it does.

    >>> from deploy.watch.scrape import parsed
    >>> kernels = "springtide_kernels_total 30\nspringtide_kernels_ready 12"
    >>> starting({"stream": Scrape(parsed(kernels)), "trainer": Scrape(parsed("springtide_trainer_version 0"))})
    {'stream': 'compiling kernels, 12 of 30', 'trainer': 'starting'}
    """
    found = {}
    for name, one in scrapes.items():
        if not one.values:
            continue
        total, ready = one.value(f"{KERNELS}_total") or 0.0, one.value(f"{KERNELS}_ready") or 0.0
        known = one.value(KNOWN_ONCE_WORKING.get(name, ""))
        if ready < total:
            found[name] = f"compiling kernels, {shown(ready)} of {shown(total)}"
        elif name in KNOWN_ONCE_WORKING and (known is None or (name != "stream" and not known)):
            found[name] = "starting"
    return found


def falls_behind(name: str, now: Scrape, earlier: Scrape | None, elapsed_s: float) -> str:
    r"""Describes the backlog of a process that makes no progress, or too little; empty if it keeps up.

    >>> from deploy.watch.scrape import parsed
    >>> lag = "springtide_trainer_lag_records"
    >>> behind = [Scrape(parsed(f"{lag} {waiting}\nspringtide_trainer_rows_total {rows}"))
    ...           for waiting, rows in ((5600, 70), (5673, 70), (5673, 90), (9, 90))]
    >>> falls_behind("trainer", behind[1], behind[0], 2.0)
    '5,673 records wait and none is read'
    >>> falls_behind("trainer", behind[2], behind[0], 2.0)
    '5,673 records wait and their number grows'
    >>> falls_behind("trainer", behind[3], behind[2], 2.0)
    ''
    >>> falls_behind("trainer", behind[2], None, 0.0), falls_behind("trainer", behind[3], None, 0.0)
    ('5,673 records wait', '')

    Args:
        name: The process.
        now: Its metrics.
        earlier: Its metrics at an earlier poll; None if there was none.
        elapsed_s: The time between the two polls.
    """
    backlog = BACKLOGS.get(name)
    if backlog is None:
        return ""
    if any(now.value(f"springtide_{name}_{held}") for held in HELD):
        return ""
    waiting = now.value(backlog.waiting) or 0.0
    long = (now.value(backlog.seconds) or 0.0) > QUEUED_S if backlog.seconds else waiting > backlog.most
    before = None if earlier is None or elapsed_s < LEAST_BETWEEN_S else earlier.value(backlog.waiting)
    if earlier is None or before is None:
        # Without an earlier poll its progress is unknown.
        return f"{shown(waiting)} {backlog.what} wait" if waiting and long else ""
    if not before or waiting < before:
        return ""
    if (now.total(backlog.done) or 0.0) == (earlier.total(backlog.done) or 0.0):
        return f"{shown(waiting)} {backlog.what} wait and none is read"
    return f"{shown(waiting)} {backlog.what} wait and their number grows" if long and waiting > before else ""


def kafka_runs(scrapes: Mapping[str, Scrape]) -> bool | None:
    """Returns whether serving reaches Kafka; None if unknown.

    >>> from deploy.watch.scrape import parsed
    >>> kafka_runs({"applier": Scrape(parsed("springtide_serving_log_away 1"))}), kafka_runs({})
    (False, None)
    """
    applier = scrapes.get("applier", Scrape())
    if applier.value("springtide_serving_log_away"):
        return False
    return None if applier.value(BACKLOGS["applier"].waiting) is None else True
