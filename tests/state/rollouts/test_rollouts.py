"""Generations of a rollout: pure transitions, each created once, in order, and damaged ones refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from state.errors import ControlConflict, CorruptVersion, SettingsError
from state.rollouts import rollout
from state.rollouts.exposure import Exposure, decode
from state.rollouts.rollout import Rollout
from state.rollouts.rollouts import Rollouts

GOLDEN = Path(__file__).parents[2] / "golden" / "rollouts"


def waiting(before: Rollout | None = None, name: str = "wider", steps: tuple[float, ...] = (1.0, 50.0)) -> Rollout:
    return rollout.start(before, name, steps, 60.0, (7, 9), actor="ann", reason="try it", now_ms=1_000)


def started(before: Rollout | None = None, name: str = "wider", steps: tuple[float, ...] = (1.0, 50.0)) -> Rollout:
    return rollout.begin(waiting(before, name, steps), actor="ann", reason="try it", now_ms=1_000)


def by(transition: Callable[..., Rollout], now_ms: int = 2_000) -> Callable[[Rollout], Rollout]:
    return partial(transition, actor="gate", reason="so it is", now_ms=now_ms)


def test_a_rollout_goes_through_its_steps_and_is_done() -> None:
    first = started()
    second = by(rollout.next_step)(first)
    done = by(rollout.next_step, 3_000)(second)
    assert [(one.share, one.phase, one.since_ms) for one in (first, second, done)] == [
        (0.01, "running", 1_000),
        (0.5, "running", 2_000),
        (0.5, "done", 2_000),
    ]
    assert by(rollout.end)(done).share == 0.0
    assert {one.started_ms for one in (first, second, done)} == {1_000}


def test_nobody_is_in_the_trials_arm_until_it_answers() -> None:
    first = waiting()
    assert (first.phase, first.share, first.is_open, first.is_over) == ("starting", 0.0, False, False)
    with pytest.raises(ControlConflict, match="rollout of wider is starting"):
        waiting(first, "deeper")
    begun = by(rollout.begin)(first)
    assert (begun.share, begun.since_ms, by(rollout.begin)(begun)) == (0.01, 2_000, begun)
    assert by(rollout.back)(first).is_over and by(rollout.end)(first).is_over


def test_what_the_gate_stopped_is_told_until_somebody_decides() -> None:
    stopped = rollout.back(started(), actor=rollout.GATE, reason="it is worse", now_ms=2_000)
    assert stopped.is_stopped and stopped.is_told
    assert not by(rollout.end)(stopped).is_told
    halted = rollout.halt(started(), actor=rollout.GATE, reason="lost", now_ms=2_000)
    resumed = rollout.resume(halted, actor="ann", reason="found", now_ms=3_000)
    assert halted.is_stopped and not resumed.is_stopped and resumed.is_told
    assert not rollout.back(started(), actor="ann", reason="enough", now_ms=2_000).is_told


def test_a_halted_one_keeps_its_share_and_its_step_begins_again() -> None:
    halted = by(rollout.halt)(started())
    assert (halted.share, halted.phase) == (0.01, "halted")
    with pytest.raises(ControlConflict, match="halted and cannot go on"):
        by(rollout.next_step)(halted)
    resumed = by(rollout.resume, 9_000)(halted)
    assert (resumed.phase, resumed.since_ms, resumed.step) == ("running", 9_000, 0)


@pytest.mark.parametrize("verb", [rollout.halt, rollout.resume, rollout.back, rollout.end])
def test_a_command_given_twice_changes_nothing(verb: Callable[..., Rollout]) -> None:
    once = by(verb)(by(rollout.halt)(started()))
    assert by(verb)(once) is once


def test_back_is_nobody_and_nothing_goes_on_from_there() -> None:
    gone = by(rollout.back)(by(rollout.next_step)(started()))
    assert gone.share == 0.0 and not gone.is_open
    for verb in (rollout.next_step, rollout.halt, rollout.resume):
        with pytest.raises(ControlConflict, match="is back"):
            by(verb)(gone)
    assert waiting(gone, "deeper").generation == gone.generation + 1


def test_one_is_open_at_a_time() -> None:
    with pytest.raises(ControlConflict, match="rollout of wider is running at 1%") as refused:
        started(started(), "deeper")
    assert "springtide rollout wider --end" in refused.value.do


@pytest.mark.parametrize("steps", [(), (0.0, 5.0), (5.0, 1.0), (5.0, 5.0), (50.0, 101.0)])
def test_steps_ascend_from_above_nobody_to_everybody(steps: tuple[float, ...]) -> None:
    with pytest.raises(SettingsError, match="are no steps"):
        started(steps=steps)


def test_a_generation_is_created_once_and_seen_by_all(tmp_path: Path) -> None:
    ours, theirs = Rollouts(tmp_path), Rollouts(tmp_path)
    assert ours.newest() is None and ours.history("wider") == []
    ours.propose(started())
    with pytest.raises(ControlConflict, match="created by ann"):
        theirs.propose(started(name="deeper"))
    assert theirs.newest() == started()
    halted = theirs.change(by(rollout.halt), "wider")
    assert ours.newest() == halted == Rollouts(tmp_path).newest()
    assert ours.change(by(rollout.halt), "wider") is ours.newest()
    with pytest.raises(ControlConflict, match="the newest one is that of wider"):
        ours.change(by(rollout.back), "deeper")
    assert ours.history("wider") == [started(), halted]


def test_the_history_is_that_of_the_newest_rollout_of_a_name(tmp_path: Path) -> None:
    rollouts = Rollouts(tmp_path)
    gone = rollouts.propose(by(rollout.back)(rollouts.propose(started())))
    again = rollout.start(gone, "wider", (5.0,), 1.0, (8, 9), actor="bob", reason="mended", now_ms=5_000)
    assert [one.generation for one in rollouts.history("wider")] == [2, 3]
    rollouts.propose(again)
    assert rollouts.history("wider") == [again]


def test_a_change_that_was_overtaken_is_made_from_the_newest(tmp_path: Path) -> None:
    """The gate goes on while an operator halts: the transition is asked again, and refuses."""
    rollouts, other = Rollouts(tmp_path), Rollouts(tmp_path)
    rollouts.propose(started())

    def overtaken(newest: Rollout) -> Rollout:
        if newest.phase == "running":
            other.change(by(rollout.halt))
        return by(rollout.next_step)(newest)

    with pytest.raises(ControlConflict, match="halted and cannot go on"):
        rollouts.change(overtaken)
    assert Rollouts(tmp_path).newest() == by(rollout.halt)(started())


def test_a_damaged_generation_is_refused(tmp_path: Path) -> None:
    Rollouts(tmp_path).propose(started())
    (path,) = (tmp_path / "rollouts").glob("*.json")
    path.write_bytes(path.read_bytes().replace(b"wider", b"wiper"))
    with pytest.raises(CorruptVersion, match="digest"):
        Rollouts(tmp_path).newest()


def test_what_this_release_wrote_is_read(tmp_path: Path) -> None:
    """A generation, and an exposure; of a later release fields more are passed over."""
    folder = tmp_path / "rollouts"
    folder.mkdir()
    (folder / "00000001.json").write_bytes((GOLDEN / "generation.json").read_bytes())
    assert Rollouts(tmp_path).newest() == replace(started(), generation=1)
    written = (GOLDEN / "exposure.json").read_bytes()
    wanted = Exposure("00000000000000ff", "wider", 0, 0.01, "trial", 1_000, 2_500, True)
    assert decode(written) == wanted
    assert decode(json.dumps({**json.loads(written), "colour": "red"}).encode()) == wanted
