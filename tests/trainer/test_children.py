"""The children of the trainer's process, and the phases that it shows."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from state.metrics import TrainerMetrics
from trainer import loop as phases
from trainer.loop import CATCHING_UP, HURRY_S, LEARNING, PHASES, VERSION, Phases, Scheduled


def test_one_run_is_started_when_it_is_due_and_failures_in_a_row_are_counted() -> None:
    now, ends = 0.0, list[tuple[int, int]]()
    runs = Scheduled("json.tool", ["--no-such-option"], 10.0, lambda *end: ends.append(end), lambda: now)
    for number in range(3):
        runs.tick()
        assert runs._child is None
        now += 10.0
        runs.tick()
        child = runs._child
        runs.tick()
        assert child is not None and runs._child in (child, None), "no second one"
        child.wait()
        if number == 1:
            runs._command[-1] = "--help"
        runs.tick()
    assert ends == [(2, 1), (2, 2), (0, 0)]
    runs.close()


def test_no_run_is_started_without_an_interval() -> None:
    runs = Scheduled("json.tool", [], 0.0, lambda *_: None, lambda: 1e9)
    runs.tick()
    assert runs._child is None


def test_a_run_starts_sooner_on_a_full_disk() -> None:
    now_s = 0.0
    runs = Scheduled("json.tool", ["--help"], 600.0, lambda *_: None, lambda: now_s)
    for now_s, hurry, started in ((HURRY_S - 1, True, False), (HURRY_S, False, False), (HURRY_S, True, True)):  # noqa: B007
        runs.tick(hurry)
        assert (runs._child is not None) == started
    runs.close()


def test_one_phase_is_shown_at_a_time_and_records_left_are_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phases, "LOG_S", 0.0)
    caplog.set_level("INFO")
    registry = CollectorRegistry()
    shown = Phases(TrainerMetrics(registry))

    def now() -> list[str]:
        return [one for one in PHASES if registry.get_sample_value("springtide_trainer_phase", {"phase": one})]

    shown.enter(VERSION)
    assert now() == [VERSION]
    shown.follow(False, None)
    shown.follow(False, 5673)
    assert now() == [CATCHING_UP]
    shown.follow(True, 0)
    shown.follow(True, 0)
    assert now() == [LEARNING]
    said = [record.getMessage() for record in caplog.records]
    assert said[1:3] == ["catching up, unknown records left", "catching up, 5,673 records left"]
    assert said[0].endswith("now catching up") and said[3].endswith("now learning") and len(said) == 4
