"""Says what runs and how well: `springtide status`, `python -m deploy.status [-o json] [--watch | --wait-for CONDITION]`.

Each part is asked on its own, so that whatever is away, the rest still shows.
Rates are of the seconds that a look takes; quantiles are since each process
started, and with `--watch` of the last minute.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deploy.operate import held, horizon, privacy, registry_state
from deploy.operate.conditions import CONDITIONS, wait
from deploy.rollouts import telling as rollouts
from deploy.startup.hints import addresses
from deploy.trials import retrain_told, telling
from deploy.watch import accounts, churn, live_clicks, parity, quality, scrape, segments, storage, stores_place
from deploy.watch.address import serving_address
from deploy.watch.figures import Figures, Watch
from deploy.watch.kafka_lag import kafka_lag
from deploy.watch.live import Screen, live_line
from deploy.watch.messages import seconds, shown
from deploy.watch.panel import lines, panel, wanted, wrong
from deploy.watch.scrape import Scrape
from state.config.loading import load
from state.config.settings import Settings
from state.errors import SettingsError, SpringtideError
from state.process.closed_output import while_read
from state.process.ending import stop_on_signals
from state.process.wall_clock import wall_ms

BETWEEN_S = 1.0
TIMEOUT_S = 60.0
PARTS = (16, 12)
DESCRIPTION = """Shows what runs and how well: clicks a second, lag, dead letters by reason, step time, log loss, AUC, the
served version, freshness, accounts. Rates are of the seconds that the look takes; p50 and p99 are since each process
started, with --watch of the last minute. What is wrong comes first, and makes the exit code 1; what an operator holds
does not."""
EPILOG = (
    "Conditions: "
    + "; ".join(f"{name}: {one.meaning}" for name, one in CONDITIONS.items())
    + ". Settings are written --section.name VALUE; `springtide config` lists them. Exit codes: 0 nothing is wrong, or the "
    "condition holds; 1 something is wrong, or it did not come in time; 2 wrong use."
)

# Process -> (what it is called here, its series). Counters and labelled series are summed.
FIGURES: Mapping[str, Sequence[tuple[str, str]]] = {
    "stream": (
        ("clicks", "springtide_stream_events_total"),
        ("dead letters", "springtide_stream_dead_letters_total"),
        ("lag", "springtide_stream_lag_events"),
        ("micro-batches", "springtide_stream_microbatches_total"),
        ("with attributes", "springtide_stream_attributes_known"),
    ),
    "trainer": (
        ("version", "springtide_trainer_version"),
        ("epoch", "springtide_trainer_epoch"),
        ("steps", "springtide_trainer_steps_total"),
        ("rows", "springtide_trainer_rows_total"),
        ("lag", "springtide_trainer_lag_records"),
        ("log loss", "springtide_trainer_log_loss"),
        ("held", "springtide_trainer_held"),
    ),
    "applier": (
        ("version", "springtide_serving_version"),
        ("epoch", "springtide_serving_epoch"),
        ("pinned", "springtide_serving_pinned"),
        ("newest click in features", "springtide_serving_feature_freshness_seconds"),
        ("in weights", "springtide_serving_weight_freshness_seconds"),
        ("lag", "springtide_serving_microbatch_lag_records"),
        ("with attributes", "springtide_serving_attributes_known"),
    ),
    "worker": (
        ("requests", "springtide_requests_total"),
        ("cold starts", "springtide_cold_starts_total"),
    ),
}


def processes(scrapes: Mapping[str, Scrape], up_s: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Per process whether it answers, why not, since when it is up, and its figures.

    >>> processes({"worker": Scrape(problem="refused")}, {})["worker"]
    {'answers': False, 'problem': 'refused', 'up_s': None, 'figures': {}}
    """
    return {
        name: {
            "answers": not one.problem,
            "problem": one.problem,
            "up_s": up_s.get(name),
            "figures": {} if one.problem else {label: _figure(one, series) for label, series in FIGURES[name]},
        }
        for name, one in scrapes.items()
    }


def _figure(scraped: Scrape, series: str) -> float | None:
    found = scraped.total(series)
    # A counter with labels offers nothing before its first event.
    return 0.0 if found is None and series.endswith("_total") else found


def _balance(accounting: Mapping[str, Any]) -> tuple[str, str]:
    balanced = accounting["balanced"]
    word = "unknown" if balanced is None else "balances" if balanced else "WRONG"
    return word, accounts.as_text(accounting)


BESIDE: Mapping[str, tuple[str, Callable[[Any], tuple[str, str]]]] = {
    "held": ("guard", held.as_text),
    "privacy": ("privacy", privacy.as_text),
    "rollback": ("rollback", horizon.as_text),
    "storage": ("storage", storage.as_text),
    "rows": ("rows", stores_place.as_text),
    "histories": ("histories", stores_place.as_text),
    "quality": ("quality", quality.as_text),
    "churn": ("churn", churn.as_text),
    "segments": ("segments", segments.as_text),
    "trials": ("trial", telling.as_text),
    "rollout": ("rollout", rollouts.as_text),
    "retrain": ("retrain", retrain_told.as_text),
    "live_clicks": ("live clicks", live_clicks.as_text),
    "accounting": ("accounting", _balance),
    "parity": ("parity", parity.as_text),
}
"""Parts of the state that there may be: what each is called, and its word and text; of several each has lines."""


def as_table(state: Mapping[str, Any]) -> str:
    """The parts, whether they are there, and more of each."""
    rows: list[Sequence[str]] = []
    for name, one in state["processes"].items():
        rows += _part(name, "runs" if one["answers"] else "away", one["problem"] or f"up {seconds(one['up_s'])}")
    kafka = state["kafka"]
    text = kafka["problem"] or (
        f"{kafka['servers']}; {shown(kafka['clicks'])} clicks, {shown(kafka['lag'])} not yet committed by the stream; "
        f"training log at {shown(kafka['training_log'])}"
    )
    rows += _part("kafka", "runs" if kafka["answers"] else "away", text)
    registry = state["registry"]
    text = registry["problem"] or registry_state.as_text(registry)
    rows += _part("registry", "there" if registry["answers"] else "away", text)
    for key, (name, words) in BESIDE.items():
        found = state.get(key) or []
        for one in found if isinstance(found, list) else [found]:
            rows += _part(name, *words(one))
    return "\n".join(lines(rows, PARTS))


def _part(name: str, word: str, text: str) -> list[Sequence[str]]:
    """A part's lines: what its text says in several sentences stands below each other."""
    first, *others = text.split("; ")
    return [(name, word, first), *(("", "", one) for one in others)]


def status(settings: Settings, now_ms: int, between_s: float = BETWEEN_S) -> tuple[Figures, dict[str, Any]]:
    """The figures, and the whole state of the loop as JSON values, whatever of it runs.

    Args:
        settings: The loop's settings.
        now_ms: Wall clock.
        between_s: Least time between the two looks that the rates come from.
    """
    looks, asked = Watch(spread_s=None), scrape.watched_urls(settings)
    begin_s = time.monotonic()
    first = looks.look(scrape.scrape(asked), begin_s, time.time())
    # The other parts are asked between the two looks.
    others = parts(settings, now_ms)
    if first.up_s:
        time.sleep(max(0.0, begin_s + between_s - time.monotonic()))
    scrapes = scrape.scrape(asked)
    figures = looks.look(scrapes, time.monotonic(), time.time()).with_kafka(others["kafka"])
    return figures, document(settings, figures, scrapes, others)


def parts(settings: Settings, now_ms: int) -> dict[str, Any]:
    """What is beside the line, as JSON values: asked of Kafka, the registry, the stores, the disks and the validation.

    Args:
        settings: The loop's settings.
        now_ms: Wall clock.
    """
    kafka = kafka_lag(settings)
    return {
        "kafka": kafka,
        "registry": registry_state.look(settings, now_ms),
        "held": held.look(settings),
        "privacy": privacy.look(settings),
        "rollback": horizon.look(settings, now_ms) if kafka["answers"] else None,
        "storage": storage.look(settings),
        "rows": stores_place.look(settings),
        "histories": stores_place.look_at_histories(settings),
        "accounting": accounts.account(settings),
        "live_clicks": live_clicks.look(settings),
        "trials": telling.running(settings),
        "rollout": rollouts.look(settings),
        "retrain": retrain_told.look(settings, now_ms),
    }


def document(
    settings: Settings, figures: Figures, scrapes: Mapping[str, Scrape], others: Mapping[str, Any]
) -> dict[str, Any]:
    """The whole state of the loop as JSON values.

    Args:
        settings: The loop's settings.
        figures: Of now.
        scrapes: What they were read from.
        others: Of `parts`.
    """
    urls = scrape.urls(settings)
    return {
        "troubles": wrong(figures),
        "holds": wanted(figures),
        "figures": figures.to_json(),
        "processes": processes({name: scrapes[name] for name in urls}, figures.up_s),
        **others,
        "parity": parity.look(scrapes["applier"]),
        "quality": quality.look(scrapes["trainer"]),
        "churn": churn.look(scrapes["trainer"]),
        "segments": segments.look(settings, scrapes),
        "urls": {
            "profile": scrape.profile_url(settings, scrape.ANY_USER),
            "ready": serving_address(settings, "/readyz"),
            "metrics": urls,
        },
    }


def as_text(figures: Figures, state: Mapping[str, Any], settings: Settings) -> str:
    """Everything on one screen: the figures, the parts, what to try."""
    parts = as_table(state).splitlines()
    return "\n".join(
        [*panel(figures, (), settings.serving.processes), "", *parts, "", *lines(addresses(settings, figures.shoppers))]
    )


def watch(settings: Settings, screen: Screen, stop: Callable[[], bool], wait: Callable[[float], object]) -> None:
    """Rewrites the figures until it is stopped.

    Args:
        settings: The loop's settings.
        screen: Takes the view.
        stop: Whether to stop.
        wait: Waits a number of seconds, or until the stop.
    """
    looks, urls = Watch(), scrape.watched_urls(settings)
    while not stop():
        figures = looks.look(scrape.scrape(urls), time.monotonic(), time.time())
        tries = addresses(settings, figures.shoppers)[:1]
        screen.live(live_line(figures), panel(figures, tries, settings.serving.processes))
        wait(screen.every_s)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the state; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="springtide status", allow_abbrev=False, description=DESCRIPTION, epilog=EPILOG
    )
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text", help="how to print (default text)")
    parser.add_argument("-w", "--watch", action="store_true", help="rewrite the figures each second until Ctrl-C")
    parser.add_argument(
        "--wait-for",
        metavar="CONDITION",
        help=f"wait for {', '.join(CONDITIONS)}, or version, epoch or answers with = or >= and a number, as in answers=176",
    )
    parser.add_argument(
        "--timeout", type=float, default=TIMEOUT_S, metavar="S", help=f"how long to wait (default {TIMEOUT_S:.0f})"
    )
    asked, flags = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    try:
        settings = load(flags)
        if asked.wait_for is not None:
            took_s = wait(settings, asked.wait_for, asked.timeout)
            found = {"condition": asked.wait_for, "seconds": round(took_s, 3)}
            print(json.dumps(found) if asked.output == "json" else f"{asked.wait_for} after {took_s:.1f} s")
            return 0
        if asked.watch:
            if asked.output == "json":
                raise SettingsError("argument --watch: it is for people", "ask again and again for -o json")
            stopping = stop_on_signals()
            watch(settings, Screen(), stopping.is_set, stopping.wait)
            print()
            return 0
        figures, state = status(settings, wall_ms())
    except SpringtideError as error:
        print(f"springtide: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(state, indent=2) if asked.output == "json" else as_text(figures, state, settings))
    return int(bool(wrong(figures)))


if __name__ == "__main__":
    sys.exit(while_read(main))
