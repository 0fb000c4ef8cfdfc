"""The figures of a running loop: how they are computed, shown in columns and rewritten on a terminal."""

from __future__ import annotations

import dataclasses
import io
import math
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram

from deploy.watch.figures import BudgetLeft, Figures, Watch, between, quantile
from deploy.watch.panel import Screen, live_line, panel
from deploy.watch.scrape import Scrape, fetch, parsed, scrape
from deploy.watch.snapshot import Snapshot
from state.metrics import ANSWERING_ROUTES, ApplierMetrics, StreamMetrics, TrainerMetrics, WorkerMetrics, serve
from state.process.network import free_port
from tests.rules import RECORDED


def texts(figures: Figures) -> list[str]:
    """The problems of figures, the worst first."""
    return [problem.text for problem in Snapshot(figures).problems]


@dataclasses.dataclass
class Loop:
    """The metrics of all processes, really offered over HTTP."""

    stream: StreamMetrics
    trainer: TrainerMetrics
    applier: ApplierMetrics
    worker: WorkerMetrics
    port: int

    def scrapes(self) -> dict[str, Scrape]:
        url = f"http://127.0.0.1:{self.port}/metrics"
        return scrape(dict.fromkeys(("stream", "trainer", "applier", "worker"), url))


@pytest.fixture
def loop() -> Iterator[Loop]:
    registry, port = CollectorRegistry(), free_port()
    made = Loop(
        StreamMetrics(registry), TrainerMetrics(registry), ApplierMetrics(registry), WorkerMetrics(registry), port
    )
    stop = serve(registry, port)
    yield made
    stop()


def busy(loop: Loop) -> Figures:
    """Two looks, two seconds apart, at a loop that works."""
    watch = Watch()
    loop.stream.events.labels("rows").inc(100)
    loop.worker.requests.labels("metrics", "200").inc(50)
    watch.figures(loop.scrapes(), now_s=10.0, wall_s=0.0)
    loop.stream.events.labels("rows").inc(390)
    loop.stream.events.labels("dead").inc(10)
    loop.stream.dead_letters.labels("missing_field").inc(3)
    loop.stream.dead_letters.labels("undecodable").inc(7)
    loop.stream.lag_events.set(12)
    loop.stream.lag_seconds.set(0.5)
    loop.stream.microbatches.inc(20)
    for rows in (10, 30):
        loop.stream.microbatch_rows.observe(rows)
    loop.trainer.steps.inc(18)
    loop.trainer.rows.labels("trained").inc(380)
    loop.trainer.log_loss.set(1.25)
    loop.trainer.auc.set(0.625)
    loop.trainer.version.set(35)
    loop.trainer.lag_records.set(0)
    loop.applier.microbatch_lag_records.set(0)
    for _ in range(10):
        loop.trainer.step_seconds.observe(0.0015)
    loop.applier.version.set(34)
    loop.applier.epoch.set(2)
    loop.applier.feature_freshness_seconds.set(0.25)
    loop.applier.weight_freshness_seconds.set(0.5)
    loop.worker.requests.labels("profile", "200").inc(7)
    loop.worker.requests.labels("batch", "503").inc(1)
    loop.worker.requests.labels("metrics", "200").inc(50)
    return watch.figures(loop.scrapes(), now_s=12.0, wall_s=0.0)


def test_the_view_says_them_in_fixed_columns_with_the_trouble_first(loop: Loop) -> None:
    found = busy(loop)
    assert panel(Snapshot(found), [("try", "curl")])[:7] == [
        "state           0.5/s answers fail, 2% dead letters   up 0.0 s",
        "clicks          200/s       lag 12 events, 0.5 s      500 read",
        "dead letters    5.0/s       10: 7 undecodable, 3 missing_field",
        "micro-batches   10.0/s      20.0 examples each        trainer 0 behind",
        "training        190/s       log loss 1.250, AUC 0.625 9.0 steps/s, top 1 0.0%",
        "served version  34          epoch 2, follows          newest 35, serving 0 behind",
        "answers         4.0/s       8 given, 1 failed         0 cold starts",
    ]
    assert panel(Snapshot(found))[8] == "                now       p50       p99       over the last 60 s"
    assert panel(Snapshot(found))[9:11] == [
        "features        0.25 s    -         -         age of the newest click known",
        "weights         0.50 s    -         -         age of the newest click learned",
    ]
    assert live_line(Snapshot(found)) == (
        "0.5/s answers fail | 2% dead letters | 200 events/s, lag 12 | version 34, epoch 2 | "
        "features 0.2 s, weights 0.5 s old | log loss 1.25"
    )


def test_the_view_fits_a_usual_terminal_also_with_large_figures() -> None:
    large = Figures(
        up_s={"stream": 1e6, "trainer": 5.0},
        events=9_876_543_210.0,
        events_per_s=123_456.0,
        lag_events=98_765.0,
        lag_s=59.9,
        microbatches_per_s=987.6,
        microbatch_rows=2048.0,
        trainer_lag=1234.0,
        rows_per_s=123_456.0,
        steps_per_s=123.4,
        log_loss=1.234,
        auc=0.987,
        top1=0.5,
        version=123_456.0,
        newest_version=123_456.0,
        epoch=12.0,
        serving_lag=12.0,
        answers=12_345_678.0,
        failed=1.0,
        answers_per_s=23_456.0,
    )
    lines = panel(Snapshot(large), [("try", "curl -s http://127.0.0.1:8501/v1/profiles/shopper-1")], workers=4)
    assert len(lines) <= 22
    assert [line for line in lines if len(line) > 92] == []


def scraped(*lines: str) -> Scrape:
    return Scrape(parsed("\n".join(lines)))


def test_a_start_is_reported_with_its_progress_and_unknown_values_are_not_0(loop: Loop) -> None:
    scrapes = loop.scrapes()
    kernels: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {
        ("springtide_kernels_total", ()): 30.0,
        ("springtide_kernels_ready", ()): 12.0,
    }
    scrapes["stream"] = Scrape({**scrapes["stream"].values, **kernels})
    found = Watch().figures(scrapes, 0.0, 0.0)
    assert texts(found) == ["stream compiling kernels, 12 of 30", "trainer starting", "applier starting"]
    unknown = (found.lag_events, found.lag_s, found.trainer_lag, found.serving_lag, found.version, found.newest_version)
    assert unknown == (None,) * 6
    loop.stream.lag_events.set(0)
    loop.trainer.version.set(1)
    loop.applier.version.set(1)
    assert texts(Watch().figures(loop.scrapes(), 0.0, 0.0)) == ["trainer lag unknown", "applier lag unknown"]
    loop.trainer.lag_records.set(0)
    loop.applier.microbatch_lag_records.set(0)
    found = Watch().figures(loop.scrapes(), 0.0, 0.0)
    assert (texts(found), found.lag_events) == ([], 0)


def test_a_trainer_that_waits_for_workers_says_so_and_later_how_long_each_computes(loop: Loop) -> None:
    phase, steps = loop.trainer.phase.labels("waiting for workers"), loop.trainer.steps
    phase.set(1)
    assert "trainer waits for workers" in texts(Watch().figures(loop.scrapes(), 0.0, 0.0))
    for worker, is_missing in (("1", False), ("2", True)):
        loop.trainer.worker_missing.labels(worker).set(is_missing)
    assert "trainer waits for worker 2 of 3" in texts(Watch().figures(loop.scrapes(), 0.0, 0.0))
    phase.set(0)
    watch = Watch(spread_s=None)
    for at_s in (0.0, 2.0):
        found = watch.figures(loop.scrapes(), at_s, 0.0)
        steps.inc(10)
        for worker, seconds in (("0", 0.1), ("1", 0.2)):
            loop.trainer.worker_seconds.labels(worker).inc(seconds)
    assert found.trainer_workers == {"0": pytest.approx(0.05), "1": pytest.approx(0.1)}
    assert any("slowest 1: 20 ms a step, fastest 0: 10 ms" in line for line in panel(Snapshot(found)))


def test_parts_that_up_has_still_to_start_are_not_called_away() -> None:
    away = {name: Scrape(problem="refused") for name in ("stream", "trainer")}
    found = Watch().figures({**away, "up": scraped("springtide_up_settled 0")}, 0.0, 0.0)
    assert texts(found) == ["stream not started yet", "trainer not started yet"]
    found = Watch().figures({**away, "up": scraped("springtide_up_settled 1")}, 0.0, 0.0)
    assert texts(found) == ["stream unreachable", "trainer unreachable"]
    assert texts(Watch().figures(away, 0.0, 0.0)) == ["nothing answers"]


@pytest.mark.parametrize(
    ("process", "earlier", "now", "words"),
    [
        # The trainer was killed; the one that started again has 5,673 records to read and reads none.
        ("trainer", ("lag_records 5600", 'rows_total{outcome="trained"} 9'), ("lag_records 5673", 'rows_total{outcome="trained"} 9'), "trainer: 5,673 records wait and none is processed"),
        # It answered too late for the poll before, or did not know its lag then.
        ("trainer", ("lag_records NaN",), ("lag_records 1147",), "trainer: 1,147 records wait"),
        ("trainer", ("lag_records 5673",), ("lag_records 900", 'rows_total{outcome="trained"} 99999'), ""),
        ("trainer", ("lag_records 140", 'rows_total{outcome="trained"} 9'), ("lag_records 150", 'rows_total{outcome="trained"} 19'), "trainer: 150 records wait and their number grows"),
        ("trainer", ("lag_records 2", 'rows_total{outcome="trained"} 9'), ("lag_records 3", 'rows_total{outcome="trained"} 19'), ""),
        ("trainer", ("lag_records 5600", "paused 1"), ("lag_records 5673", "paused 1"), "training is paused by an operator"),
        ("stream", ("lag_events 40",), ("lag_events 60",), "stream: 60 clicks wait and none is processed"),
        ("stream", ("lag_events 4000", 'events_total{outcome="rows"} 1'), ("lag_events 4500", "lag_seconds 12", 'events_total{outcome="rows"} 9'), "stream: 4,500 clicks wait and their number grows"),
        ("stream", ("lag_events 4000", 'events_total{outcome="rows"} 1'), ("lag_events 4500", "lag_seconds 0.3", 'events_total{outcome="rows"} 9'), ""),
    ],
)  # fmt: skip
def test_a_part_that_falls_behind_is_a_trouble(
    process: str, earlier: tuple[str, ...], now: tuple[str, ...], words: str
) -> None:
    watch = Watch(spread_s=None)
    others = ("lag_events 0", "version 1")
    for at_s, lines in ((0.0, earlier), (1.0, now)):
        series = [f"springtide_{process}_{line}" for line in ("began_seconds 1", *others, *lines)]
        found = watch.figures({process: scraped(*series)}, at_s, 0.0)
    assert texts(found) == ([words] if words else [])


def test_a_part_that_answers_again_is_not_said_to_be_unable_to_run() -> None:
    series = "springtide_up_deaths_in_a_row"
    up = scraped(f'{series}{{part="trainer"}} 9', f'{series}{{part="kafka"}} 3', "springtide_up_settled 1")
    series_of_trainer = ("version 7", "began_seconds 1", "lag_records 0")
    running = {"trainer": scraped(*(f"springtide_trainer_{one}" for one in series_of_trainer))}
    found = Watch().figures({**running, "up": up}, 0.0, 0.0)
    assert texts(found) == ["kafka cannot run, 3 deaths in a row"]
    assert texts(found.with_kafka({"answers": True, "lag": 0})) == []
    found = Watch().figures({"trainer": Scrape(problem="refused"), "up": up}, 0.0, 0.0)
    assert "trainer cannot run, 9 deaths in a row" in texts(found)


def test_without_kafka_kafka_is_named_first_and_the_critical_problems_before_the_others() -> None:
    scrapes = {
        "stream": Scrape(problem="refused"),
        "applier": scraped(*(f"springtide_serving_{one}" for one in ("version 3", "log_away 1", "began_seconds 1"))),
        "up": scraped('springtide_up_deaths_in_a_row{part="stream"} 4'),
    }
    found = Watch().figures(scrapes, 0.0, 0.0)
    assert texts(found) == [
        "Kafka unreachable",
        "stream unreachable",
        "stream cannot run, 4 deaths in a row",
        "applier lag unknown",
    ]


def test_what_failed_is_the_same_here_and_in_the_alert(loop: Loop) -> None:
    counted = re.findall(r'(\w+)=~"([^"]*)"', RECORDED["job:springtide_requests_failed:rate5m"]["expr"])
    fails = {label: re.compile(expression) for label, expression in counted}
    watch = Watch()
    watch.figures(loop.scrapes(), 0.0, 0.0)
    codes = [*map(str, range(200, 600)), "OK", *(one.name for one in grpc.StatusCode)]
    routes = [*ANSWERING_ROUTES, "ready", "metrics", "other"]
    for route in routes:
        for code in codes:
            loop.worker.requests.labels(route, code).inc()
    found = watch.figures(loop.scrapes(), 1.0, 0.0)
    expected = sum(
        bool(fails["route"].fullmatch(route) and fails["code"].fullmatch(code))
        for route in routes
        for code in set(codes)
    )
    assert found.failed == expected > 0
    assert f"{found.failed_per_s:.0f}/s answers fail" in [text.replace(",", "") for text in texts(found)]


def counted(born: float, steps: int, slow: int = 0) -> dict[str, Scrape]:
    """A trainer that began at `born` with so many steps, some of them slow."""
    series = "springtide_trainer_step_seconds_bucket"
    lines = [
        f"springtide_trainer_began_seconds {born}",
        f"springtide_trainer_steps_total {steps}",
        *(
            f'{series}{{le="{bound}"}} {count}'
            for bound, count in (("0.1", steps - slow), ("1.0", steps), ("+Inf", steps))
        ),
    ]
    return {"trainer": Scrape(parsed("\n".join(lines)))}


def test_a_restarted_process_has_no_rate_and_quantiles_of_its_own() -> None:
    watch = Watch()
    watch.figures(counted(1.0, 500, slow=500), 0.0, 0.0)
    after = watch.figures(counted(2.0, 600), 1.0, 0.0)
    assert after.steps_per_s is None
    assert after.spreads["step"].count == 600
    assert after.spreads["step"].p99 == pytest.approx(0.099)
    assert watch.figures(counted(2.0, 610), 2.0, 0.0).steps_per_s == 10


def test_quantiles_are_of_the_last_minute_and_forget_a_slow_start() -> None:
    watch = Watch()
    watch.figures(counted(1.0, 100, slow=100), 0.0, 0.0)
    assert watch.figures(counted(1.0, 200, slow=100), 60.0, 0.0).spreads["step"].count == 100
    found = watch.figures(counted(1.0, 300, slow=100), 120.0, 0.0).spreads["step"]
    assert found.count == 100
    assert found.p99 == pytest.approx(0.099)


def test_a_single_look_says_quantiles_since_the_start() -> None:
    watch = Watch(spread_s=None)
    watch.figures(counted(1.0, 100, slow=100), 0.0, 0.0)
    found = watch.figures(counted(1.0, 300, slow=100), 2.0, 0.0)
    assert (found.spreads["step"].count, found.spread_s, found.steps_per_s) == (300, None, 100)
    assert (found.spreads["step"].p99 or 0.0) > 0.9
    assert "since each process started" in "\n".join(panel(Snapshot(found)))


def test_a_rate_is_of_the_last_seconds_or_of_the_last_look_where_looks_are_rare() -> None:
    watch = Watch()
    for second in range(20):
        watch.figures(counted(1.0, 0), float(second), 0.0)
    assert watch.figures(counted(1.0, 50), 20.0, 0.0).steps_per_s == 10
    assert watch.figures(counted(1.0, 150), 30.0, 0.0).steps_per_s == 10


# A replay of clicks of three weeks ago that keeps their times: nothing waits anywhere.
OLD_CLICKS: dict[str, Any] = {
    "events_per_s": 100.0,
    "lag_events": 3.0,
    "lag_s": 0.1,
    "serving_lag": 1.0,
    "trainer_lag": 2.0,
    "features_s": 1_933_200.0,
    "weights_s": 1_933_200.4,
}
STALE = {"events_per_s": 1.0, "weights_s": 61.0}
UP = {"worker": 1.0}


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ({}, "nothing is wrong"),
        ({"up_s": {}}, "nothing answers"),
        ({"up_s": {}, "away": {"stream": "refused"}}, "nothing answers"),
        ({"up": "starting"}, "up is still starting"),
        ({"faults": 1.0}, "accounts do not balance"),
        ({"held": True, "rows_per_s": 100.0, "skipped_per_s": 30.0}, "training is held by the guard"),
        ({"rows_per_s": 100.0, "skipped_per_s": 30.0}, "the guard skips 30% of the examples"),
        ({"withheld": True}, "versions wait, at most 30 s, because the guard is unsure about an update"),
        ({"withheld": True, "held": True}, "training is held by the guard"),
        ({"rows_per_s": 100.0, "skipped_per_s": 1.0}, "nothing is wrong"),
        ({"budget": BudgetLeft(8.0, 0.1, False)}, "nothing is wrong"),
        ({"budget": BudgetLeft(8.0, 0.1, True)}, "training holds: the privacy budget is spent"),
        ({"events_per_s": 1.0, "weights_s": 15.0}, "nothing is wrong"),
        (STALE, "weights 61 s old"),
        (STALE | {"events_per_s": 0.0}, "nothing is wrong"),
        (STALE | {"pinned": True}, "pinned by an operator"),
        (STALE | {"paused": True}, "training is paused by an operator"),
        (STALE | {"publishing_held": True}, "publishing is held by an operator"),
        ({"events_per_s": 1.0, "features_s": 90.0}, "features 90 s old"),
        (OLD_CLICKS, "nothing is wrong"),
        (OLD_CLICKS | {"trainer_lag": 101.0}, "weights 537.0 h old"),
        (OLD_CLICKS | {"serving_lag": 101.0}, "weights 537.0 h old, features 537.0 h old"),
        (OLD_CLICKS | {"lag_s": 61.0}, "weights 537.0 h old, features 537.0 h old"),
        ({"lag_events": 10_001.0}, "10,001 clicks wait"),
        ({"events_per_s": 100.0, "dead_per_s": 1.0}, "nothing is wrong"),
        ({"events_per_s": 100.0, "dead_per_s": 1.1}, "1% dead letters"),
        ({"corrupt": 2.0}, "corrupt versions: 2"),
        ({"starting": {"trainer": "waits for worker 1 of 2"}}, "trainer waits for worker 1 of 2"),
        ({"trainer_workers": {"0": 0.1, "1": 0.3}}, "nothing is wrong"),
        ({"trainer_workers": {"0": 0.1, "1": 0.31}}, "worker 1 slows the trainer, another one waits 21% of the time"),
        ({"refused": 17.0}, "version 17 is refused"),
        ({"degraded": ["version"]}, "serving gets no new versions"),
        ({"degraded": ["histories"]}, "nothing is wrong"),
    ],
)
def test_each_problem_is_reported_from_its_bound_on(figures: dict[str, Any], words: str) -> None:
    assert Snapshot(Figures(**({"up_s": UP} | figures))).texts == words


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"kafka": {"answers": False, "away": True}}, "Kafka unreachable"),
        ({"kafka": {"answers": False, "away": False}}, "Kafka has no topics yet"),
        ({"registry": {"answers": False}}, "no registry can be read"),
        ({"accounting": {"balanced": None}}, "accounts unknown"),
        ({"accounting": {"balanced": False}}, "accounts do not balance"),
        (
            {"experiments": [{"rollout": {"stopped": True, "unwatched_s": 90.0}}]},
            "a rollout was stopped, no command drives the rollout",
        ),
        ({"experiments": [{"problem": "damaged"}], "retrain": {"problem": "damaged"}}, "experiments cannot be read"),
        ({"retrain": {"problem": "", "outcome": "failed"}}, "the last retrain failed"),
        ({"live_clicks": {"anomalies": {"ENUM": 1}}}, "live clicks have changed"),
        ({"snapshots": {"problem": "denied", "ages_s": []}}, "snapshots of histories cannot be read"),
        (
            {"snapshots": {"problem": "", "late": True, "late_s": 660.0, "ages_s": [700.0]}},
            "snapshot of histories 12 min old",
        ),
        ({"snapshots": {"problem": "", "late": True, "late_s": 660.0, "ages_s": []}}, "no snapshot of histories"),
        ({"snapshots": {"problem": "", "late": True, "late_s": 1000.0, "ages_s": []}}, "nothing is wrong"),
        (
            {"accounting": {"balanced": True}, "retrain": None, "experiments": None, "live_clicks": None},
            "nothing is wrong",
        ),
    ],
)
def test_what_the_sections_show_is_in_the_same_list(sections: dict[str, Any], words: str) -> None:
    assert Snapshot(Figures(up_s=UP | {"applier": 900.0})).having(sections).texts == words


def test_a_hold_is_no_fault_and_each_problem_links_to_the_runbook() -> None:
    snapshot = Snapshot(Figures(up_s=UP, paused=True, faults=1.0)).having({"accounting": {"balanced": False}})
    assert [problem.text for problem in snapshot.faults] == ["accounts do not balance"]
    assert [problem.to_json()["runbook"] for problem in snapshot.problems] == [
        "docs/operate/runbook.md#accounts-do-not-balance",
        "docs/operate/runbook.md#held-by-an-operator",
    ]


def test_old_clicks_are_called_so_beside_their_age() -> None:
    figures = Figures(**OLD_CLICKS)
    assert "features 537.0 h, weights 537.0 h old (old clicks)" in live_line(Snapshot(figures))
    assert "(old clicks)" not in live_line(Snapshot(dataclasses.replace(figures, kafka_away=True)))
    assert "(old clicks)" not in live_line(Snapshot(Figures(features_s=0.2, weights_s=0.4, lag_s=0.1, serving_lag=1.0)))
    (line,) = (line for line in panel(Snapshot(figures)) if line.startswith("features"))
    assert line.endswith("age of the newest, an old click") and len(line) < 80


@given(
    st.lists(st.floats(0.001, 9.0), min_size=1, max_size=60),
    st.lists(st.floats(0.001, 9.0), max_size=60),
    st.sampled_from([0.5, 0.9, 0.99]),
)
def test_a_quantile_lies_in_the_bucket_of_the_true_one(later: list[float], earlier: list[float], q: float) -> None:
    bounds = (0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0)
    registry = CollectorRegistry()
    histogram = Histogram("of", "test", buckets=bounds, registry=registry)

    def buckets() -> dict[float, float]:
        (family,) = registry.collect()
        return {float(one.labels["le"]): one.value for one in family.samples if one.name == "of_bucket"}

    for value in earlier:
        histogram.observe(value)
    before = buckets()
    for value in later:
        histogram.observe(value)
    found = quantile(between(buckets(), before), q)
    rank = max(0, math.ceil(q * len(later) - 1e-9) - 1)
    place = int(np.searchsorted(bounds, sorted(later)[rank]))
    assert found is not None
    assert (0.0, *bounds)[place] <= found <= bounds[place] * (1 + 1e-9)


@pytest.mark.parametrize("make", [Watch, lambda: Watch(spread_s=None)])
def test_a_loop_of_which_nothing_is_known_is_a_view_of_dashes(make: Callable[[], Watch]) -> None:
    shown = "\n".join(panel(Snapshot(make().figures({}, 0.0, 0.0))))
    assert "None" not in shown and "nan" not in shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def screen(columns: int, lines: int) -> tuple[Screen, Terminal]:
    out = Terminal()
    return Screen(out, size=lambda: os.terminal_size((columns, lines))), out


def visible(written: str, columns: int) -> list[str]:
    """What a terminal shows after `written`, with the few codes that a screen uses."""
    shown, row, column = [""], 0, 0
    for code in re.findall(r"\x1b\[\d*[AJ]|[\r\n]|[^\x1b\r\n]+", written):
        if code == "\r":
            column = 0
        elif code == "\n":
            row, column = row + 1, 0
            shown += [""] * (row + 1 - len(shown))
        elif code.endswith("A") and code.startswith("\x1b"):
            row -= int(code[2:-1])
        elif code == "\x1b[J":
            shown = [*shown[:row], shown[row][:column]]
        else:
            assert len(code) < columns, "the line would take two"
            shown[row], column = shown[row][:column] + code, column + len(code)
    return shown


def test_a_small_terminal_sees_one_line_rewritten_and_other_lines_stay() -> None:
    small, out = screen(10, 50)
    small.live("first live line", ["panel"])
    small.live("second")
    small.say("stream died")
    small.live("third")
    assert out.getvalue() == "first liv\r\x1b[Jsecond\r\x1b[Jstream died\nthird"
    assert small.every_s == 1.0


def test_a_terminal_with_room_sees_the_panel_rewritten_and_other_lines_stay() -> None:
    large, out = screen(80, 24)
    large.say("started")
    large.live("line", ["one", "two", "x" * 200])
    large.live("line", ["uno", "due"])
    assert visible(out.getvalue(), 80) == ["started", "", "uno", "due"]
    large.say("stream died")
    large.live("line", ["ein"])
    assert visible(out.getvalue(), 80) == ["started", "stream died", "", "ein"]


@pytest.mark.parametrize(("columns", "lines"), [(79, 24), (80, 4)])
def test_a_panel_that_does_not_fit_gives_way_to_the_line(columns: int, lines: int) -> None:
    narrow, out = screen(columns, lines)
    narrow.live("line", ["one", "two", "three"])
    assert out.getvalue() == "line"


def test_a_file_sees_whole_lines_and_fewer_of_them() -> None:
    out = io.StringIO()
    quiet = Screen(out)
    quiet.live("one", ["panel"])
    quiet.live("two", ["panel"])
    assert out.getvalue() == "one\ntwo\n"
    assert quiet.every_s == 10.0


def test_a_process_that_dies_in_the_middle_of_its_answer_is_one_that_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer_half() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")

        half = threading.Thread(target=answer_half)
        half.start()
        status, reason = fetch(f"http://127.0.0.1:{server.getsockname()[1]}/metrics")
        half.join()
    assert status == 0
    assert "IncompleteRead" in reason
