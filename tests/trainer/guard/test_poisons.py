"""The bench of the guard in small: each poison in clean traffic is held, ten times the traffic is not, nor is clean traffic."""

from __future__ import annotations

import pytest

from tests.bench.guard import POISONS, measure, traffic
from tests.bench.report import Stages
from trainer import holding

FLAGS = (
    *("--model.dim", "8", "--model.hidden", "16,8", "--model.popular", "8"),
    *("--guard.window_s", "2"),
)  # fmt: skip


def test_each_poison_is_held_and_clean_traffic_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holding, "WINDOW_ROWS", 512)
    monkeypatch.setattr(holding, "WARM_UP", 12)
    figures = measure("shoppers", traffic("shoppers", 20_480, FLAGS), Stages("guard", 60.0))
    assert {name: one.value for name, one in figures.items() if one.reached is False} == {}
    held = {name: one.value for name, one in figures.items() if name.endswith("delay")}
    assert len(held) == len(POISONS) - 1
    assert max(held.values()) <= 6144, "rows until the verdict"
