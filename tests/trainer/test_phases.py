"""A starting trainer shows what it does, and how much of the log is left."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from state.metrics import TrainerMetrics
from trainer import loop as phases
from trainer.loop import CATCHING_UP, LEARNING, PHASES, VERSION, Phases


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
