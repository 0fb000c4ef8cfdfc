"""Says what runs, its lag, versions and freshness: `springtide status`, `python -m deploy.status [-o json]`.

Each part is asked on its own, so that whatever is away, the rest still shows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deploy import accounts, scrape
from deploy.live import seconds, shown
from deploy.scrape import Scrape
from deploy.versions import open_registry, table
from state.config import Settings, load
from state.errors import SpringtideError
from state.log import Topics

LONGEST_WAIT_S = 3.0

# Process -> (what it is called here, its series, how it is shown). Counters and labelled series are summed.
FIGURES: Mapping[str, Sequence[tuple[str, str, Callable[[float | None], str]]]] = {
    "stream": (
        ("clicks", "springtide_stream_events_total", shown),
        ("dead letters", "springtide_stream_dead_letters_total", shown),
        ("lag", "springtide_stream_lag_events", shown),
        ("micro-batches", "springtide_stream_microbatches_total", shown),
    ),
    "trainer": (
        ("version", "springtide_trainer_version", shown),
        ("epoch", "springtide_trainer_epoch", shown),
        ("steps", "springtide_trainer_steps_total", shown),
        ("rows", "springtide_trainer_rows_total", shown),
        ("lag", "springtide_trainer_lag_records", shown),
        ("log loss", "springtide_trainer_log_loss", lambda value: "-" if value is None else f"{value:.3f}"),
        ("held", "springtide_trainer_held", lambda value: "yes" if value else "no"),
    ),
    "applier": (
        ("version", "springtide_serving_version", shown),
        ("epoch", "springtide_serving_epoch", shown),
        ("pinned", "springtide_serving_pinned", lambda value: "yes" if value else "no"),
        ("newest click in features", "springtide_serving_feature_freshness_seconds", seconds),
        ("in weights", "springtide_serving_weight_freshness_seconds", seconds),
        ("lag", "springtide_serving_microbatch_lag_records", shown),
    ),
    "worker": (
        ("requests", "springtide_requests_total", shown),
        ("cold starts", "springtide_cold_starts_total", shown),
    ),
}


def processes(scrapes: Mapping[str, Scrape]) -> dict[str, dict[str, Any]]:
    """Per process whether it answers, why not, and its figures.

    >>> processes({"worker": Scrape(problem="refused")})["worker"]
    {'answers': False, 'problem': 'refused', 'figures': {}}
    """
    return {
        name: {
            "answers": not one.problem,
            "problem": one.problem,
            "figures": {} if one.problem else {label: _figure(one, series) for label, series, _ in FIGURES[name]},
        }
        for name, one in scrapes.items()
    }


def _figure(scraped: Scrape, series: str) -> float | None:
    found = scraped.total(series)
    # A counter with labels offers nothing before its first event.
    return 0.0 if found is None and series.endswith("_total") else found


def kafka_lag(settings: Settings, connect: Callable[[Any], Topics] = Topics) -> dict[str, Any]:
    """End of the clicks topic, the stream's committed positions, and their difference."""
    kafka = dataclasses.replace(settings.kafka, request_timeout_s=min(LONGEST_WAIT_S, settings.kafka.request_timeout_s))
    try:
        with connect(kafka) as topics:
            ends = topics.ends(kafka.clicks_topic)
            committed = topics.committed(kafka.group, kafka.clicks_topic)
            training = topics.ends(kafka.microbatches_topic)
    except SpringtideError as error:
        return {"answers": False, "problem": str(error)}
    return {
        "answers": True,
        "problem": "",
        "servers": kafka.bootstrap_servers,
        "clicks": sum(end for _, end in ends.values()),
        # A group that has committed nothing stands at the beginning.
        "lag": sum(end - committed.get(partition, begin) for partition, (begin, end) in ends.items()),
        "training_log": sum(end for _, end in training.values()),
    }


def registry_state(settings: Settings, now_ms: int) -> dict[str, Any]:
    """Newest version and what control wants."""
    try:
        registry = open_registry(settings)
        control = registry.control()
        numbers = registry.versions()
        newest = registry.manifest(numbers[-1]) if numbers else None
    except (SpringtideError, OSError) as error:
        return {"answers": False, "problem": str(error)}
    return {
        "answers": True,
        "problem": "",
        "versions": len(numbers),
        "newest": newest.version if newest else None,
        # A version may be newer than the command that asks.
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


def as_table(state: Mapping[str, Any]) -> str:
    """The whole state as a table of parts and their figures."""
    rows: list[Sequence[str]] = [("part", "state", "figures")]
    for name, one in state["processes"].items():
        shows = {label: show for label, _, show in FIGURES[name]}
        figures = ", ".join(f"{label} {shows[label](value)}" for label, value in one["figures"].items())
        rows.append((name, "runs", figures) if one["answers"] else (name, "away", one["problem"]))
    kafka = state["kafka"]
    if kafka["answers"]:
        text = f"{shown(kafka['clicks'])} clicks, stream's lag {shown(kafka['lag'])}, training log at {shown(kafka['training_log'])}"
        rows.append(("kafka", "runs", text))
    else:
        rows.append(("kafka", "away", kafka["problem"]))
    registry = state["registry"]
    if registry["answers"]:
        rows.append(("registry", "there", _registry_text(registry)))
    else:
        rows.append(("registry", "away", registry["problem"]))
    if accounting := state.get("accounting"):
        balanced = accounting["balanced"]
        word = "unknown" if balanced is None else "balances" if balanced else "WRONG"
        rows.append(("accounting", word, accounts.as_text(accounting)))
    return table(rows)


def _registry_text(registry: Mapping[str, Any]) -> str:
    control = registry["control"]
    newest = f"newest version {shown(registry['newest'])}, {seconds(registry['newest_age_s'])} old, {registry['versions']} kept"
    if control is None:
        return f"{newest}; no control yet"
    wanted = "the newest version" if control["serving"] == "follow" else f"version {control['version']} (pinned)"
    return f"{newest}; wanted: {wanted} in epoch {control['epoch']}, by {control['actor']}'s {control['action']}: {control['reason']}"


def status(settings: Settings, now_ms: int) -> dict[str, Any]:
    """The whole state of the loop, whatever of it runs."""
    return {
        "processes": processes(scrape.scrape(scrape.urls(settings))),
        "kafka": kafka_lag(settings),
        "registry": registry_state(settings, now_ms),
        "accounting": accounts.account(settings),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the state; returns the exit code."""
    parser = argparse.ArgumentParser(prog="springtide status", allow_abbrev=False, description=__doc__)
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text", help="how to print (default text)")
    asked, flags = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    try:
        state = status(load(flags), time.time_ns() // 1_000_000)
    except SpringtideError as error:
        print(f"springtide: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(state, indent=2) if asked.output == "json" else as_table(state))
    return 0


if __name__ == "__main__":
    sys.exit(main())
