"""A click's way through the loop is timed by what answers say, and what is late is told by where it stopped."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import pytest
from prometheus_client import CollectorRegistry

from deploy import probe
from deploy.probe import NEVER, Passage, ProbedLoop, Sent, Stopwatch, action_of, click_of
from deploy.startup.steps import ports, process_plans
from springtide_client import ClientError, Profile, Refused, Unreachable, Version
from state.config.sections import Events, LabelSettings, ProbeSettings
from state.config.settings import Settings
from state.errors import LogError, SettingsError
from state.metrics import ProbeMetrics

SOURCE, USER = "ab:3", "springtide-probe-5"
SETTINGS = Settings()


@dataclass
class Loop:
    """A loop whose answers show a click `features_s`, and have learned from it `weights_s`, after it was sent."""

    features_s: float = 0.2
    weights_s: float = 0.5
    recency: int = NEVER
    fails: Callable[[float], ClientError | None] = lambda now_s: None
    refuses: LogError | None = None
    now_s: float = 100.0
    sent_s: float = 1e9
    clicks: list[bytes] = field(default_factory=list)

    def send(self, user: str, click: bytes) -> Sent:
        assert user == USER
        if self.refuses is not None:
            raise self.refuses
        self.clicks.append(click)
        self.sent_s = self.now_s
        return Sent(SOURCE, 41)

    def ask(self, user: str, at_ms: int) -> Profile:
        assert (user, at_ms) == (USER, 1_000)
        if (error := self.fails(self.now_s)) is not None:
            raise error
        took_s = self.now_s - self.sent_s
        sources: Mapping[str, int] = {"ab:2": 99, SOURCE: 42 if took_s >= self.weights_s else 41}
        recency = 0 if took_s >= self.features_s else self.recency
        return Profile(
            user_id=user,
            known=False,
            cold_start=True,
            version=Version(57, 1, 0.1, 0, dict(sources)),
            at="",
            at_ms=at_ms,
            clock="request",
            interests=[],
            features={"view.recency": recency, "cart.recency": 0},
        )

    def sleep(self, wait_s: float) -> None:
        self.now_s += wait_s

    def time(self, settings: Settings = SETTINGS) -> Passage:
        loop = ProbedLoop(self.send, self.ask)
        watch = Stopwatch(settings, loop, lambda: 1_000, lambda: self.now_s, self.sleep)
        return watch.time(USER)


@pytest.mark.parametrize("recency", [NEVER, 40], ids=["new", "clicked before"])
def test_features_and_weights_are_timed_apart_from_the_sending_on(recency: int) -> None:
    loop = Loop(recency=recency)
    found = loop.time()
    assert (found.source, found.offset, found.version, found.reason) == (SOURCE, 41, 57, "")
    assert 0.2 <= (found.feature_seconds or 0.0) < 0.23
    assert 0.5 <= (found.weight_seconds or 0.0) < 0.53
    assert len(loop.clicks) == 1


@pytest.mark.parametrize(
    ("loop", "reason", "said"),
    [
        (Loop(features_s=90.0), "features", "is in no answer after 30 s"),
        (Loop(weights_s=90.0), "weights", "version 57 has not learned from it after 30 s"),
        (Loop(refuses=LogError("no broker", "start it")), "kafka", "no broker"),
        (Loop(fails=lambda _: Unreachable("nobody there")), "answers", "nobody there"),
        (Loop(fails=lambda _: Refused(401, "no token")), "refused", "no token"),
        (Loop(fails=lambda now_s: Unreachable("it died") if now_s > 100.1 else None), "answers", "it died"),
    ],
    ids=["no features", "no weights", "no kafka", "nobody", "no token", "dies"],
)
def test_what_does_not_come_through_says_where_it_stopped(loop: Loop, reason: str, said: str) -> None:
    found = loop.time()
    assert found.reason == reason
    assert said in str(found)
    assert loop.now_s <= 130.1
    assert USER not in str(found)


def test_a_worker_that_is_away_for_a_moment_is_waited_for() -> None:
    loop = Loop(fails=lambda now_s: Unreachable("starts again") if 100.1 < now_s < 101.0 else None)
    found = loop.time()
    assert not found.reason
    assert 1.0 <= (found.weight_seconds or 0.0) < 1.1


def test_a_failure_counts_what_it_reached_and_only_success_moves_its_time() -> None:
    registry = CollectorRegistry()
    metrics = ProbeMetrics(registry)
    probe.count(Loop(weights_s=90.0).time(), metrics, 1_700.0)
    assert registry.get_sample_value("springtide_probe_failures_total", {"reason": "weights"}) == 1.0
    assert registry.get_sample_value("springtide_probe_feature_seconds_count") == 1.0
    assert registry.get_sample_value("springtide_probe_weight_seconds_count") == 0.0
    assert registry.get_sample_value("springtide_probe_last_success_timestamp_seconds") == 0.0
    probe.count(Loop().time(), metrics, 1_800.0)
    assert registry.get_sample_value("springtide_probe_weight_seconds_count") == 1.0
    assert registry.get_sample_value("springtide_probe_last_success_timestamp_seconds") == 1_800.0


def test_a_probe_that_runs_on_counts_each_offers_every_reason_and_ends_in_order() -> None:
    registry, stop = CollectorRegistry(), threading.Event()
    left = [Loop(), Loop(features_s=90.0), Loop()]

    def time_one() -> Passage:
        if not left:
            stop.set()
            return Passage(reason="answers", problem="given up")
        return left.pop().time()

    probe.run(Settings(probe=ProbeSettings(every_s=0.001)), stop, time_one, ProbeMetrics(registry))
    failures = {
        one: registry.get_sample_value("springtide_probe_failures_total", {"reason": one}) for one in probe.REASONS
    }
    assert failures == {"kafka": 0.0, "answers": 0.0, "refused": 0.0, "features": 1.0, "weights": 0.0}
    assert registry.get_sample_value("springtide_probe_weight_seconds_count") == 3.0


def test_up_starts_a_probe_where_it_is_asked_for_and_looks_after_its_port() -> None:
    assert process_plans(python="python")["probe"].command == ("python", "-m", "deploy.probe", "--continuously")
    settings = Settings(probe=ProbeSettings(every_s=5.0))
    assert settings.up.probe_port in [one.port for one in ports(settings, local_kafka=True)]
    assert settings.up.probe_port not in [one.port for one in ports(Settings(), local_kafka=True)]


@pytest.mark.parametrize(
    ("events", "time"),
    [(Events(time="t", time_unit="s"), 1), (Events(time="t", time_unit="iso"), None), (Events(), 1000)],
)
def test_a_click_is_written_as_the_settings_read_one(events: Events, time: int | None) -> None:
    click = json.loads(click_of(USER, 1_000, Settings(events=events)))
    assert click.pop(events.user) == USER
    assert click.pop("action") == "view"
    assert click == {events.time: "1970-01-01T00:00:01.000+00:00" if time is None else time}


def test_an_action_that_waits_for_a_label_is_not_taken_and_clicks_that_are_no_json_are_refused() -> None:
    labels = LabelSettings(impressions=("view",), outcomes=("cart",))
    assert action_of(Settings(labels=labels)) == "favorite"
    with pytest.raises(SettingsError, match="JSON only"):
        click_of(USER, 1, replace(SETTINGS, events=Events(decoder="own:decode")))
