"""The sections of `springtide status` and the page: what each part of the system stores and reports, and its text."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy.experiments import status as experiments
from deploy.formats import decimal, seconds, shown
from deploy.operate.log_view import horizon_here, horizon_text
from deploy.operate.versions import open_registry
from deploy.watch import accounts, scrape
from deploy.watch.figures import segments_behind
from deploy.watch.scrape import SEGMENTS, Scrape
from state import layout, storage
from state.config.settings import Settings
from state.disk import memory_place
from state.errors import SpringtideError, UnknownTopic
from state.history import snapshots
from state.log import Topics
from state.registry import hosts, privacy_ledger
from state.registry.control import HeldUpdate
from state.registry.directory import standbys, trainer_of
from state.registry.privacy_ledger import PrivacyLedger
from state.segments import texts_of
from state.storage import free_bytes, used_bytes
from state.user_shares import UserShares

LONGEST_WAIT_S = 3.0
LATE_INTERVALS, LATE_S = 3, 300
"""A snapshot of histories is late after this many intervals plus seconds, as in `SpringtideSnapshotOld`."""
Text = tuple[str, str]


def read(settings: Settings, now_ms: int) -> dict[str, Any]:
    """Returns the sections of Kafka, registry, stores, disks, validation and experiments."""
    kafka = kafka_lag(settings)
    return {
        "kafka": kafka,
        "registry": registry_state(settings, now_ms),
        "held": held_update(settings),
        "privacy": privacy_budget(settings),
        "rollback": horizon_here(settings, now_ms) if kafka["answers"] else None,
        "storage": disk_usage(settings),
        "rows": row_store(settings),
        "histories": _history_stores(settings),
        "hosts": serving_hosts(settings, now_ms),
        "snapshots": history_snapshots(settings, now_ms),
        "accounting": accounts.account(settings),
        "live_clicks": live_clicks(settings),
        "experiments": experiments.reported(settings),
        "retrain": experiments.retrain_status(settings, now_ms),
    }


def measured(settings: Settings, scrapes: Mapping[str, Scrape]) -> dict[str, Any]:
    """Returns the sections that come from the metrics of the processes."""
    return {
        "parity": _parity(scrapes["applier"]),
        "quality": quality(scrapes["trainer"]),
        "churn": _churn(scrapes["trainer"]),
        "segments": segments(settings, scrapes),
    }


def kafka_lag(settings: Settings) -> dict[str, Any]:
    """Returns the end of the clicks topic, the stream's committed positions, and their difference."""
    kafka = settings.kafka.within(LONGEST_WAIT_S)
    try:
        with Topics(kafka) as topics:
            ends = topics.ends(kafka.clicks_topic)
            committed = topics.committed(kafka.group, kafka.clicks_topic)
            training = topics.ends(kafka.microbatches_topic)
    except SpringtideError as error:
        # UnknownTopic shows that the broker answers. Before `up` creates the topics, there are none.
        return {"answers": False, "problem": str(error), "away": not isinstance(error, UnknownTopic)}
    return {
        "answers": True,
        "away": False,
        "problem": "",
        "servers": kafka.bootstrap_servers,
        "clicks": sum(end for _, end in ends.values()),
        # A group that has committed nothing starts at the beginning.
        "lag": sum(end - committed.get(partition, begin) for partition, (begin, end) in ends.items()),
        "training_log": sum(end for _, end in training.values()),
    }


def _kafka_text(kafka: Mapping[str, Any]) -> Text:
    return "runs" if kafka["answers"] else "unreachable", kafka["problem"] or (
        f"{kafka['servers']}; {shown(kafka['clicks'])} clicks, {shown(kafka['lag'])} not yet committed by the stream; "
        f"training log at {shown(kafka['training_log'])}"
    )


def registry_state(settings: Settings, now_ms: int) -> dict[str, Any]:
    """Returns the newest version and control, or the reason why the registry cannot be read."""
    try:
        registry = open_registry(settings)
        control = registry.control()
        numbers = registry.versions()
        newest = registry.latest(None)
    except (SpringtideError, OSError) as error:
        return {"answers": False, "problem": str(error)}
    return {
        "answers": True,
        "problem": "",
        "versions": len(numbers),
        "newest": newest.version if newest else None,
        # The trainer of a copy is on another host.
        "trainer": "" if registry.directory.is_copy else trainer_of(registry.path),
        "standbys": standbys(registry.path, now_ms / 1000),
        # A version can be newer than `now_ms`, the start of the command.
        "newest_age_s": max(0, now_ms - newest.created_at_ms) / 1000 if newest else None,
        "control": control
        and {
            "generation": control.generation,
            "action": control.action,
            "actor": control.actor,
            "reason": control.reason,
            "epoch": control.epoch,
            "base": control.base,
            "serving": control.serving.mode,
            "version": control.serving.version,
        },
    }


def registry_text(registry: Mapping[str, Any]) -> Text:
    """Formats newest version and control."""
    if not registry["answers"]:
        return "unreadable", registry["problem"]
    control = registry["control"]
    newest = f"newest version {shown(registry['newest'])}, {seconds(registry['newest_age_s'])} old, {registry['versions']} kept"
    if registry["standbys"]:
        newest += f"; trainer: {registry['trainer'] or 'unknown'}; stands by: {', '.join(registry['standbys'])}"
    if control is None:
        return "readable", f"{newest}; no control yet"
    wanted = "the newest version" if control["serving"] == "follow" else f"version {control['version']} (pinned)"
    return (
        "readable",
        f"{newest}; wanted: {wanted} in epoch {control['epoch']}, by {control['actor']}'s {control['action']}: {control['reason']}",
    )


def held_update(settings: Settings) -> dict[str, Any] | None:
    """Returns the update that the guard holds, with the commands for it; None if there is none."""
    try:
        control = open_registry(settings).control()
    except (SpringtideError, OSError):
        return None
    return None if control is None or control.held is None else held_document(control.held)


def held_document(held: HeldUpdate) -> dict[str, Any]:
    """Describes a held update, with the commands to type: roll back without the suspect clicks, or release.

    >>> from state.registry.control import SuspectClicks
    >>> held = HeldUpdate("user", "share of one user", 30.0, 1.0, 7, 40, 90, 0, 9000, (SuspectClicks("ab" * 16, 2, 5, 80),))
    >>> print("; ".join(held_document(held)["commands"]))
    springtide rollback --to 7 --skip 2:5-79 --follow-when-caught-up --reason 'guard: user'; springtide release --reason TEXT
    """
    words = ["springtide", "rollback", *(("--to", str(held.version)) if held.version else ("--before-mask",))]
    for clicks in held.clicks:
        words += ["--skip", f"{clicks.partition}:{clicks.first}-{clicks.next - 1}"]
    roll_back = shlex.join([*words, "--follow-when-caught-up", "--reason", f"guard: {held.rule}"])
    commands = [roll_back, "springtide release --reason TEXT"]
    return {**dataclasses.asdict(held), "words": held.in_words(), "commands": commands}


def held_text(held: Mapping[str, Any]) -> Text:
    """Formats a held update."""
    roll_back, release = held["commands"]
    serving = (
        f"answers stay at version {held['version']}" if held["followed"] else "answers stay where an operator put them"
    )
    return (
        "HOLDS",
        f"{held['words']}; {serving}; to roll back without these clicks: {roll_back}; to accept them: {release}",
    )


def privacy_budget(settings: Settings) -> dict[str, Any] | None:
    """Returns the spent and remaining budget in the trainer's ledger; None without a budget or a readable ledger."""
    try:
        ledger = privacy_ledger.read(settings.privacy_ledger_path)
    except (SpringtideError, OSError):
        return None
    return (
        None if ledger is None or not settings.privacy.epsilon else privacy_document(ledger, settings.privacy.periods)
    )


def privacy_document(ledger: PrivacyLedger, periods: int) -> dict[str, Any]:
    """Returns the spent and the remaining part of a budget for this many periods."""
    return {
        "unit": ledger.unit,
        "epsilon": ledger.epsilon,
        "delta": ledger.delta,
        "spent": ledger.spent,
        "left": max(0.0, ledger.epsilon - ledger.spent),
        "periods": len(ledger.periods),
        "of_periods": periods,
        "held": ledger.held,
        "key": ledger.key,
    }


def privacy_text(budget: Mapping[str, Any]) -> Text:
    """Formats the privacy budget.

    >>> from state.registry.privacy_ledger import PrivacyPeriod
    >>> ledger = PrivacyLedger("1f", "user", (PrivacyPeriod(1, 7, 8, 9.0),), 8.0, 1e-06, 1.5)
    >>> privacy_text(privacy_document(ledger, 30))
    ('counts', 'epsilon 1.50 of 8.00 spent, 6.50 left (delta 1e-06, unit user); 1 of 30 periods begun')
    """
    text = (
        f"epsilon {budget['spent']:.2f} of {budget['epsilon']:.2f} spent, {budget['left']:.2f} left (delta "
        f"{budget['delta']:g}, unit {budget['unit']}); {budget['periods']} of {budget['of_periods']} periods begun"
    )
    if not budget["held"]:
        return "counts", text
    return "SPENT", f"{text}; training is held and answers continue; see docs/model/privacy.md about a larger budget"


def disk_usage(settings: Settings) -> dict[str, Any] | None:
    """Returns the disk usage of each part on this machine against its share; None if nothing is stored here."""
    folders = {part: [path for path in storage.folders(settings, part) if path.is_dir()] for part in storage.SHARES}
    parts = {
        part: {"used_bytes": used_bytes(paths), "limit_bytes": storage.limit_bytes(settings, part)}
        for part, paths in folders.items()
        if paths
    }
    if not parts:
        return None
    return {
        "used_bytes": sum(part["used_bytes"] for part in parts.values()),
        "budget_bytes": storage.budget_bytes(settings),
        "free_bytes": min(free_bytes(path) for paths in folders.values() for path in paths),
        "parts": parts,
    }


def disk_text(usage: Mapping[str, Any]) -> Text:
    """Formats disk usage.

    >>> parts = {"logs": {"used_bytes": 2e8, "limit_bytes": 5e8}, "kafka": {"used_bytes": 0, "limit_bytes": 4e9}}
    >>> disk_text({"used_bytes": 2e8, "budget_bytes": 10e9, "free_bytes": 7e9, "parts": parts})
    ('2%', '0.20 of 10.00 GB, 7.00 GB free on the disk; logs 0.20 of 0.50, kafka 0.00 of 4.00')
    """
    used, budget, free = (f"{usage[name] / 1e9:.2f}" for name in ("used_bytes", "budget_bytes", "free_bytes"))
    parts = (
        f"{name} {part['used_bytes'] / 1e9:.2f} of {part['limit_bytes'] / 1e9:.2f}"
        for name, part in usage["parts"].items()
    )
    text = f"{used} of {budget} GB, {free} GB free on the disk; {', '.join(parts)}"
    return f"{usage['used_bytes'] / usage['budget_bytes']:.0%}", text


def row_store(settings: Settings) -> dict[str, Any] | None:
    """Returns location and size of this host's row store; None if there is none."""
    return _store(settings, settings.serving_dir / layout.ROWS, "serving starts again")


def _history_stores(settings: Settings) -> list[dict[str, Any]]:
    """Returns location and size of the histories of stream and serving; on disk while no process writes them."""
    links = [*layout.streams(settings.state_dir), settings.serving_dir / layout.HISTORIES]
    stores = ((link, _store(settings, link, "their writer starts")) for link in links)
    return [{"name": f"{link.parent.name}/{link.name}", **store} for link, store in stores if store is not None]


def _store(settings: Settings, link: Path, moves_when: str) -> dict[str, Any] | None:
    location, memory = memory_place.current(link), settings.storage.memory_dir
    if location is None:
        return None
    # If memory is disabled, the location is intended and needs no reason.
    intended = location.in_memory or not memory
    return {
        "path": str(location.path),
        "in_memory": location.in_memory,
        "bytes": memory_place.size(location.path),
        "why": ""
        if intended
        else memory_place.lack(link, memory) or f"{memory} has space now, and the store moves there when {moves_when}",
    }


def store_text(store: Mapping[str, Any]) -> Text:
    """Formats location and size of a store, and why it is on disk instead of in memory.

    >>> store_text({"path": "state/serving/rows.disk", "in_memory": False, "bytes": 5e6, "why": "/dev/shm is missing"})
    ('on disk', 'state/serving/rows.disk, 5 MB; /dev/shm is missing')
    """
    text = f"{store['path']}, {store['bytes'] / 1e6:,.0f} MB"
    return "in memory" if store["in_memory"] else "on disk", "; ".join(filter(None, (text, store["why"])))


def serving_hosts(settings: Settings, now_ms: int) -> dict[str, Any] | None:
    """Returns the serving hosts in the routing table, and the shares of users without a live host and with only one.

    Returns None if the table has no entries, because each host holds all users, or if it cannot be read.
    """
    try:
        entries = hosts.all_entries(open_registry(settings))
    except (SpringtideError, OSError):
        return None
    if not entries:
        return None
    table = hosts.RoutingTable.of(entries, now_ms)
    return {
        "hosts": [
            {
                "name": entry.name,
                "address": entry.address,
                "shares": entry.shares,
                "live": entry.is_live(now_ms),
                "age_s": max(0, now_ms - entry.at_ms) / 1000,
            }
            for entry in entries
        ],
        "without_host": [*table.held_by(0)],
        "with_one_host": [*table.held_by(1)],
    }


def hosts_text(section: Mapping[str, Any]) -> Text:
    """Formats the routing table.

    >>> a, b = ({"name": name, "address": f"http://{name}", "live": name == "a", "age_s": 30.0} for name in "ab")
    >>> found = {"hosts": [a | {"shares": "0-31"}, b | {"shares": "32-63"}], "with_one_host": range(32)}
    >>> word, text = hosts_text(found | {"without_host": range(32, 64)})
    >>> print(word, *text.split("; "), sep=chr(10))
    INCOMPLETE
    1 of 2 are live: http://a 0-31, http://b 32-63 (not renewed for 30 s)
    no live host holds the shares 32-63
    one live host holds the shares 0-31
    """
    live = sum(host["live"] for host in section["hosts"])
    listed = ", ".join(
        f"{host['address']} {host['shares']}" + ("" if host["live"] else f" (not renewed for {seconds(host['age_s'])})")
        for host in section["hosts"]
    )
    parts = [f"{live} of {len(section['hosts'])} are live: {listed}"]
    if section["without_host"]:
        parts.append(f"no live host holds the shares {UserShares.of(section['without_host'])}")
    if section["with_one_host"]:
        parts.append(f"one live host holds the shares {UserShares.of(section['with_one_host'])}")
    word = "INCOMPLETE" if section["without_host"] else "ONE HOST" if section["with_one_host"] else "complete"
    return word, "; ".join(parts)


def history_snapshots(settings: Settings, now_ms: int) -> dict[str, Any] | None:
    """Returns the snapshots of histories with their ages, from the newest readable one; None if none are written and
    none exist.
    """
    every_s = settings.history.snapshot_every_s
    try:
        location = snapshots.location_of(settings)
        newest = snapshots.newest(location, UserShares(0))
        numbers = [number for number in reversed(snapshots.numbers(location)) if newest and number <= newest.number]
    except SpringtideError as error:
        return {"problem": str(error), "every_s": every_s, "ages_s": []}
    if not every_s and not numbers:
        return None
    ages_s, late_s = [max(0, now_ms - number) / 1000 for number in numbers], LATE_INTERVALS * every_s + LATE_S
    return {
        "problem": "",
        "every_s": every_s,
        "ages_s": ages_s,
        "late": bool(every_s) and (not ages_s or ages_s[0] > late_s),
        "late_s": late_s,
        "users": newest.users if newest else 0,
        "bytes": newest.bytes if newest else 0,
        "writer": newest.writer if newest else "",
        "held": newest.held if newest else "",
    }


def snapshots_text(section: Mapping[str, Any]) -> Text:
    """Formats the snapshots of histories.

    >>> found = {"problem": "", "every_s": 120.0, "ages_s": [], "late": True, "users": 0, "bytes": 0, "writer": "", "held": ""}
    >>> snapshots_text(found)
    ('none', 'written every 120 s, once serving has caught up')
    >>> found |= {"ages_s": [42.0, 170.0, 3700.0], "late": False, "users": 20_000, "bytes": 3e6}
    >>> snapshots_text(found | {"writer": "serving-a", "held": "0-63"})
    ('fresh', 'the newest of 3 is 42 s old, the others 170 s, 62 min; 20,000 users of shares 0-63, 3 MB, by serving-a; every 120 s')
    """
    every = f"every {section['every_s']:g} s" if section["every_s"] else "no more are written"
    if section["problem"]:
        return "UNREACHABLE", section["problem"]
    if not section["ages_s"]:
        return "none", f"written {every}, once serving has caught up"
    first, *others = (seconds(age_s) for age_s in section["ages_s"])
    text = f"the newest of {len(others) + 1} is {first} old" + (f", the others {', '.join(others)}" if others else "")
    size = f"{section['users']:,} users of shares {section['held']}, {section['bytes'] / 1e6:,.0f} MB, by {section['writer']}"
    return "OLD" if section["late"] else "fresh", f"{text}; {size}; {every}"


def account_text(accounting: Mapping[str, Any]) -> Text:
    """Formats the account of all examples."""
    balanced = accounting["balanced"]
    word = "unknown" if balanced is None else "balances" if balanced else "WRONG"
    return word, accounts.as_text(accounting)


def live_clicks(settings: Settings) -> dict[str, Any] | None:
    """Returns the validation's result for the newest window: its rows, baseline, and features by anomaly type.

    Returns None before the first window has ended, or if the validation does not run.
    """
    urls = scrape.targets(settings)
    if "validation" not in urls:
        return None
    metrics = scrape.scrape({"validation": urls["validation"]})["validation"]
    rows, baseline = (metrics.value(f"springtide_validation_{name}") for name in ("window_rows", "baseline"))
    if not rows or baseline is None:
        return None
    anomalies = metrics.by("springtide_validation_anomalies", "type").items()
    return {
        "rows": int(rows),
        "baseline": int(baseline),
        "anomalies": {name: int(count) for name, count in anomalies if count},
    }


def live_clicks_text(window: Mapping[str, Any]) -> Text:
    """Formats the validation's result.

    >>> live_clicks_text({"rows": 12000, "baseline": 0, "anomalies": {}})
    ('unchanged', 'the newest window, of 12,000 examples, is like the baseline of the bootstrap')
    >>> word, text = live_clicks_text({"rows": 500, "baseline": 2, "anomalies": {"ENUM_TYPE_UNEXPECTED_STRING_VALUES": 1}})
    >>> print(word, *text.split("; "), sep=chr(10))
    CHANGED
    the newest window, of 500 examples, differs from baseline 2 in 1 feature
    ENUM_TYPE_UNEXPECTED_STRING_VALUES (1)
    `springtide schema diff` shows the differences
    """
    baseline = f"baseline {window['baseline']}" if window["baseline"] else "the baseline of the bootstrap"
    rows, anomalies = f"the newest window, of {window['rows']:,} examples,", window["anomalies"]
    if not anomalies:
        return "unchanged", f"{rows} is like {baseline}"
    count = sum(anomalies.values())
    listed = ", ".join(f"{name} ({features})" for name, features in sorted(anomalies.items()))
    differs = f"{rows} differs from {baseline} in {count} feature{'s' * (count > 1)}"
    return "CHANGED", f"{differs}; {listed}; `springtide schema diff` shows the differences"


def _parity(applier: Scrape) -> dict[str, int] | None:
    """Returns sampled rows by outcome: whether serving computes the features that were trained on; None without any."""
    rows = {name: int(count) for name, count in applier.by("springtide_serving_parity_rows_total", "outcome").items()}
    return rows if any(rows.values()) else None


def parity_text(rows: Mapping[str, int]) -> Text:
    """Formats the comparison of features.

    >>> parity_text({"equal": 1200, "differs": 0, "unknown": 3})
    ('holds', '1,200 examples of the training log have the same features here; 3 cannot be compared')
    >>> parity_text({"equal": 0, "differs": 0, "unknown": 3})[0], parity_text({"equal": 5, "differs": 1, "unknown": 0})[0]
    ('unknown', 'BROKEN')
    """
    equal, differs, unknown = (rows.get(outcome, 0) for outcome in ("equal", "differs", "unknown"))
    word = "BROKEN" if differs else "holds" if equal else "unknown"
    parts = [
        *([f"{differs:,} examples of the training log have other features here"] * bool(differs)),
        f"{equal:,} examples of the training log have the same features here",
        *([f"{unknown:,} cannot be compared"] * bool(unknown)),
    ]
    return word, "; ".join(parts)


QUALITY = {
    "log_loss": "log_loss",
    "mrr": "reciprocal_rank",
    "top1": "top1_ratio",
    "top5": "top5_ratio",
    "missed": "missed_ratio",
}
"""By name of the measure, the suffix of its series."""
USERS = ("all", "new", "known")
BASELINES = {
    "popular": "what was popular in the last hour",
    "previous": "the user's previous category",
    "came_next": "what came next after it",
}
"""The baselines and their descriptions."""


def quality(trainer: Scrape) -> dict[str, Any] | None:
    """Returns the measures by predictor and group of users, and the lift; None before any row was scored."""

    def measures(predictor: str, users: str) -> dict[str, float | None]:
        return {
            name: trainer.value(f"springtide_trainer_quality_{end}", predictor=predictor, users=users)
            for name, end in QUALITY.items()
        }

    model = {users: measures("model", users) for users in USERS}
    if model["all"]["top1"] is None:
        return None
    return {
        "predictors": {"model": model, **{name: {"all": measures(name, "all")} for name in BASELINES}},
        "lift": {
            "top1": trainer.value("springtide_trainer_lift_top1_ratio"),
            "log_loss": trainer.value("springtide_trainer_lift_log_loss"),
        },
        "skipped": trainer.value("springtide_trainer_quality_skipped_ratio"),
    }


def quality_text(section: Mapping[str, Any]) -> Text:
    """Formats the model's quality: lift of top 1 in percentage points, and a description.

    >>> one = dict.fromkeys(QUALITY, 0.25) | {"log_loss": 3.5}
    >>> simple = {name: {"all": one | {"top1": 0.2}} for name in BASELINES}
    >>> model = {"all": one | {"top1": 0.3}, "new": dict.fromkeys(QUALITY), "known": one}
    >>> lift = {"top1": 0.1, "log_loss": 0.5}
    >>> word, text = quality_text({"predictors": {"model": model, **simple}, "lift": lift, "skipped": 0.04})
    >>> print(word, *text.split("; "), sep=chr(10))
    +10.0 points
    more often right than the best baseline: top 1 30.0 % against 20.0 % for what was popular in the last hour
    top 5 25.0 %, MRR 0.250, log loss 3.500 (0.500 less), missed 25.0 %
    known users: top 1 25.0 %, top 5 25.0 %, log loss 3.500
    of these examples 4.0 % were skipped by the guard and not learned
    """
    model, lift = section["predictors"]["model"], section["lift"]
    simple = {name: section["predictors"][name]["all"]["top1"] or 0.0 for name in BASELINES}
    best = max(simple, key=lambda name: simple[name])
    above = (lift["top1"] or 0.0) >= 0
    less, every = lift["log_loss"], model["all"]
    change = "-" if less is None else f"{abs(less):.3f} {'less' if less >= 0 else 'MORE'}"
    parts = [
        f"{'more' if above else 'LESS'} often right than the best baseline: top 1 {_percent(every['top1'])} against "
        f"{_percent(simple[best])} for {BASELINES[best]}",
        f"top 5 {_percent(every['top5'])}, MRR {decimal(every['mrr'])}, log loss {decimal(every['log_loss'])} "
        f"({change}), missed {_percent(every['missed'])}",
    ]
    parts += [
        f"{users} users: top 1 {_percent(measured['top1'])}, top 5 {_percent(measured['top5'])}, log loss {decimal(measured['log_loss'])}"
        for users, measured in model.items()
        if users != "all" and measured["top1"] is not None
    ]
    if section["skipped"]:
        parts.append(f"of these examples {_percent(section['skipped'])} were skipped by the guard and not learned")
    return f"{100 * (lift['top1'] or 0.0):+.1f} points", "; ".join(parts)


CHURN = {
    "examples": "examples",
    "waiting": "waiting",
    "dropped": "dropped",
    "left": "left_ratio",
    "log_loss": "log_loss",
    "auc": "auc",
    "calibration": "calibration_ratio",
    "calibration_error": "calibration_error",
}
"""By name of the figure, the suffix of its series."""


def _churn(trainer: Scrape) -> dict[str, float] | None:
    """Returns the quality of the churn prediction; None if there are no examples and none wait."""
    figures = {name: trainer.value(f"springtide_trainer_churn_{end}") or 0.0 for name, end in CHURN.items()}
    return figures if figures["examples"] or figures["waiting"] else None


def churn_text(section: Mapping[str, Any]) -> Text:
    """Formats the quality of the churn prediction: the area under the curve, and a description.

    >>> figures = dict.fromkeys(CHURN, 0.0) | {"examples": 2100.0, "waiting": 300.0, "left": 0.25, "auc": 0.8125}
    >>> word, text = churn_text(figures | {"log_loss": 0.4, "calibration": 1.02, "calibration_error": 0.013})
    >>> print(word, *text.split("; "), sep=chr(10))
    AUC 0.812
    2,100 examples, of recent ones 25.0 % left, log loss 0.400
    predicted over observed 1.02, 1.3 points apart in the mean
    300 examples wait until it is known
    >>> churn_text(dict.fromkeys(CHURN, 0.0) | {"waiting": 300.0})
    ('-', 'nothing is known yet; 300 examples wait until it is known')
    """
    waits = f"{section['waiting']:,.0f} examples wait until it is known"
    if section["dropped"]:
        waits += f", {section['dropped']:,.0f} were dropped for lack of space"
    if not section["examples"]:
        return "-", f"nothing is known yet; {waits}"
    return f"AUC {section['auc']:.3f}", (
        f"{section['examples']:,.0f} examples, of recent ones {_percent(section['left'])} left, log loss "
        f"{section['log_loss']:.3f}; predicted over observed {section['calibration']:.2f}, "
        f"{100 * section['calibration_error']:.1f} points apart in the mean; {waits}"
    )


def segments(settings: Settings, scrapes: Mapping[str, Scrape]) -> dict[str, Any] | None:
    """Returns each segment with its size, and the progress of their process; None if no segment is configured."""
    texts, keeper = texts_of(settings), scrapes.get(SEGMENTS)
    if not texts or keeper is None:
        return None
    users = keeper.by("springtide_segments_members", "segment")
    return {
        "problem": keeper.problem,
        "lag": keeper.value("springtide_segments_lag_records"),
        "waiting": keeper.value("springtide_segments_waiting"),
        "sweep_s": keeper.value("springtide_segments_sweep_seconds"),
        "behind": segments_behind(keeper),
        "segments": [
            {"name": name, "users": int(users[name]) if name in users else None, "expression": text}
            for name, text in texts.items()
        ],
    }


def segments_text(section: Mapping[str, Any]) -> Text:
    """Formats segments and the progress of their process.

    >>> found = {"problem": "", "lag": 2.0, "waiting": 0.0, "sweep_s": 41.0, "behind": ""}
    >>> found["segments"] = [{"name": "sporty", "users": 1200, "expression": "..."}, {"name": "idle", "users": 0, "expression": "..."}]
    >>> word, text = segments_text(found)
    >>> print(word, *text.split("; "), sep=chr(10))
    kept
    sporty 1,200, idle 0 users
    2 records of the training log and 0 users wait, all users were evaluated in 41 s
    >>> segments_text(found | {"behind": "4,000 records wait"})[0], segments_text(found | {"problem": "it does not answer"})
    ('BEHIND', ('UNREACHABLE', 'it does not answer'))
    """
    if section["problem"]:
        return "UNREACHABLE", section["problem"]
    lag, waiting, sweep_s = (section[name] or 0.0 for name in ("lag", "waiting", "sweep_s"))
    sizes = ", ".join(f"{segment['name']} {segment['users'] or 0:,}" for segment in section["segments"])
    swept = f"all users were evaluated in {seconds(sweep_s)}" if sweep_s else "not all users are evaluated yet"
    text = f"{sizes} users; {lag:,.0f} records of the training log and {waiting:,.0f} users wait, {swept}"
    return "BEHIND" if section["behind"] else "kept", text


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


TEXTS: Mapping[str, tuple[str, Callable[[Any], Text]]] = {
    "kafka": ("kafka", _kafka_text),
    "registry": ("registry", registry_text),
    "held": ("guard", held_text),
    "privacy": ("privacy", privacy_text),
    "rollback": ("rollback", horizon_text),
    "storage": ("storage", disk_text),
    "rows": ("row store", store_text),
    "histories": ("histories", store_text),
    "hosts": ("hosts", hosts_text),
    "snapshots": ("snapshots", snapshots_text),
    "quality": ("quality", quality_text),
    "churn": ("churn", churn_text),
    "segments": ("segments", segments_text),
    "experiments": ("experiment", experiments.as_text),
    "retrain": ("retrain", experiments.retrain_as_text),
    "live_clicks": ("live clicks", live_clicks_text),
    "accounting": ("accounting", account_text),
    "parity": ("parity", parity_text),
}
"""By section, its label and its text; a section that is a list has one text for each element."""


def labelled(state: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Returns label, keyword and description of each section of a state that has something to show."""
    sections: list[tuple[str, str, str]] = []
    for name, (label, text) in TEXTS.items():
        section = state.get(name) or []
        listed: Sequence[Any] = section if isinstance(section, list) else [section]
        sections += [(label, *text(element)) for element in listed]
    return sections
