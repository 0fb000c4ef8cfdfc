"""Compactor and exports are children of the trainer: one at a time, when it is due, and a failure only delays the next."""

from __future__ import annotations

from trainer.loop import HURRY_S, Scheduled


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
